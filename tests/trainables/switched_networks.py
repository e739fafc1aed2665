"""Networks under Double Rounding, for its tests."""

from typing import Any

import torch
from torch import Tensor, nn

from trainables.build import build_model
from trainables.config import TrialConfig, parse
from trainables.cost import LayerTable
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.methods.double_rounding import Method

WIDTHS = (8, 6, 4, 2)
RESNET = {"name": "resnet20", "depth": 8, "width": 4}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def config(model: Any = "lenet5", epochs: int = 2, **method: Any) -> TrialConfig:
    return parse(
        {
            "method": {"name": "double_rounding", **method},
            "model": model,
            "data": "digits",
            "training": {"epochs": epochs, "batch_size": 128},
            "optimizer": {"lr": 0.05},
        }
    )


def prepared(
    model: Any = RESNET, shape: tuple[int, int, int] = (1, 8, 8), **given: Any
) -> tuple[Method, nn.Module, LayerTable]:
    chosen = config(model, **given)
    net = build_model(chosen, 10, shape, seed=0)
    table = trace(net, shape)
    method = Method(Method.Settings(**chosen.method.settings), epochs=2)
    method.prepare(net, table, resolve_bits(chosen, table))
    method.calibrate(net, torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)))
    return method, net.eval(), table
