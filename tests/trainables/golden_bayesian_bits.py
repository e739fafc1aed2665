"""Golden arrays of Bayesian Bits: how they are loaded and compared, and the counts that several tests share.

Whatever `golden/bayesian_bits/index.json` lists goes through our quantizers, layers, penalty and method. The networks
of the golden set quantize what a layer makes, so they are put together from the method's own pieces. Names in the set:
`gammas` and `gamma_2` are our `gate_logits` and `pruning_logits`, `x_max` is `clip_max`, `gamma` and `beta` of a batch
norm are its weight and bias.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import Arrays, cases
from trainables.methods._gates import UNQUANTIZED

METHOD = "bayesian_bits"
Settings = dict[str, Any]
State = dict[str, Tensor]

# The index gives its tolerances as a sentence (`conventions`, `tolerances`); these are its numbers.
DTYPES = {"f64": torch.float64, "f32": torch.float32}
EXACT = {"rtol": 1e-9, "atol": 1e-12}
TRAINING = {"f64": {"rtol": 1e-7, "atol": 1e-9}, "f32": {"rtol": 2e-3, "atol": 2e-4}}
AFTER_ADAM = {"f64": {"rtol": 1e-7, "atol": 1e-9}, "f32": {"rtol": 0.0, "atol": 2.1e-3}}
TEST_AFTER_ADAM = {"f64": {"rtol": 1e-7, "atol": 1e-9}, "f32": {"rtol": 0.0, "atol": 5e-2}}


def listed(file: str, only: Callable[[str, Settings], bool] = lambda name, settings: True) -> Any:
    """Runs a test on every case of a file, or on those that it wants."""
    found = [case for case in cases(METHOD, file) if only(case[0], case[1])]
    return pytest.mark.parametrize(("name", "settings", "arrays"), found, ids=[name for name, _, _ in found])


def tensors(arrays: Arrays) -> State:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def close(computed: Tensor, stored: Tensor, tolerance: dict[str, float], name: str) -> None:
    torch.testing.assert_close(
        computed.detach().to(stored.dtype).reshape(stored.shape),
        stored,
        **tolerance,
        msg=lambda text: f"{name}: {text}",
    )


class Stored:
    """Hands out written-down noise in place of random numbers; what was not drawn then has no effect and is 0.5."""

    def __init__(self, *parts: Tensor) -> None:
        self.left = torch.cat([part.double().reshape(-1) for part in parts]) if parts else torch.empty(0)

    def __call__(self, count: int, *, device: Any, dtype: torch.dtype) -> Tensor:
        drawn, self.left = self.left[:count], self.left[count:]
        return nn.functional.pad(drawn, (0, count - len(drawn)), value=0.5).to(dtype)


FIXED = {"fixed_8bit": (8, 8), "fixed_4bit": (4, 4), "fixed_48bit": (4, 8)}


def fixed_bits(settings: Settings, *, activation: bool = False) -> int | None:
    """The width that a case's flags fix."""
    for flag, widths in FIXED.items():
        if settings.get(flag):
            return widths[activation]
    return UNQUANTIZED if settings.get("prune_only") else None


def input_factors(network: str, weights: list[str], output_keep: dict[str, float]) -> list[float]:
    """Share of the channels that each layer reads, where the published count tracks it."""
    factors = []
    for position, name in enumerate(weights):
        before = weights[position - 1] if position else None
        if network == "resnet18":
            before = name.replace("features.1.weight", "features.0.weight") if "features.1.weight" in name else None
        if network == "mobilenetv2":
            before = None
        factors.append(1.0 if before is None else output_keep[before])
    return factors


def relative_bops(network: dict[str, Any], weights: dict[str, tuple[int, float]], activations: dict[str, int]) -> float:
    """Percent of the bit operations at 32 x 32, from (width, share of the MACs) of each weight."""
    total = 0.0
    for group in network["groups"]:
        reads = activations.get(group["activation"], 8)
        for name in group["weights"]:
            width, keep = weights[name]
            total += network["macs_per_layer"][name.removesuffix(".weight_quantizer")] * width * reads * keep
    return 100 * total / (1024 * sum(network["macs_per_layer"].values()))
