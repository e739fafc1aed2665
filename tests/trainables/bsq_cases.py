"""What the tests of BSQ share: widths, seeds, random tensors, configurations of small networks."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from trainables.config import TrialConfig, parse

widths = st.integers(1, 8)
seeds = st.integers(0, 2**16)


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def config(model: Any = "lenet5", data: str = "digits", **more: Any) -> TrialConfig:
    method = {"name": "bsq", "interval": 1, **more.pop("method", {})}
    tree = {"method": method, "model": model, "data": data, **more}
    return parse({"optimizer": {"lr": 0.02}, "training": {"epochs": 2}, **tree})


SMALL = {"name": "resnet20", "depth": 8, "width": 4}
