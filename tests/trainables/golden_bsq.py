"""Golden arrays of BSQ: how they are loaded and compared.

Everything that `golden/bsq/index.json` lists is computed, case by case. Planes after a conversion or an adjustment are
compared exactly, other floats of a layer and the regularizer to 1e-5 of their size, short trainings to 1e-3 absolute,
logits of ResNet-20 to 1e-4 (float) and 5e-2 with the same class (quantized), as the index says. Its networks place
quantizers at the ReLUs and keep shortcut convolutions float; the short trainings run with the public code's slips. The
float ResNet-20 is not in this repository (see `FLOAT_NETWORK`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import ROOT, index
from trainables.methods._bit_planes import BitPlanes, bit_tensors

Tensors = dict[str, Tensor]
Settings = dict[str, Any]

LAYER = {"rtol": 1e-5, "atol": 1e-7}
TRAINING = {"rtol": 0.0, "atol": 1e-3}
FLOAT_NETWORK = Path(os.environ.get("RAYSEARCH_BSQ_CHECKPOINT", ROOT / "bsq" / "resnet20_cifar10_fp32.npz"))
"""The released float network; too large for this repository."""


def arrays(file: str) -> Tensors:
    """All arrays of a file by their stored keys."""
    with np.load(ROOT / "bsq" / file) as archive:
        return {name: torch.from_numpy(np.array(value)) for name, value in archive.items()}


def part(tensors: Tensors, prefix: str) -> Tensors:
    """What lies below a prefix."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def listed(file: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a file: its settings, and its arrays without the case's name."""
    stored, cases = arrays(file), index("bsq")["files"][file]["cases"]
    parameters = [(settings, part(stored, name)) for name, settings in cases.items()]
    return pytest.mark.parametrize(("settings", "stored"), parameters, ids=list(cases))


def compare(computed: Mapping[str, Tensor], stored: Tensors, *, exact: tuple[str, ...] = (), **close: float) -> None:
    """Every stored array equals what was computed under its name."""
    assert set(stored) <= set(computed), sorted(set(stored) - set(computed))
    for name, wanted in stored.items():
        tolerance = {"rtol": 0.0, "atol": 0.0} if name.rpartition(".")[2] in exact else close
        found = computed[name].detach().to(wanted.dtype)
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, **tolerance, msg=lambda t, n=name: f"{n}: {t}")


PLANES = ("pweight", "nweight", "pbias", "nbias")


def raw(tensor: BitPlanes, role: str, trained: Tensor | None = None) -> Tensors:
    """Planes (or something of their shape) and scale in the stored form, whatever their values."""
    width = max(1, tensor.planes)
    whole = tensor.bit_planes[:width].clone() if trained is None else trained
    whole = whole.view(width, 2, *tensor.shape).movedim(0, -1)
    scale = "scale" if role == "weight" else "biasscale"
    return {f"p{role}": whole[0], f"n{role}": whole[1], scale: tensor.scale.clone()}


def planes_of(model: nn.Module) -> dict[str, list[int]]:
    """Planes of weights and biases, a dead layer with 1."""
    found: dict[str, list[int]] = {}
    for layer, role, tensor, _ in bit_tensors(model):
        found.setdefault(layer, [0, 0])[role == "bias"] = tensor.planes
    return found
