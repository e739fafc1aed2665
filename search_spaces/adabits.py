"""AdaBits: which widths one network is trained for, the levels of weights and activations, and switched clip levels."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

WIDTHS = ("8,6,5,4", "8,6,4,2", "8,4,2", "8,4", "6,4,2", "4,3,2", "4,2")
"""The list of the paper, and lists that go lower or have fewer widths to serve."""
SCHEMES = ("original", "modified", "centered")


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Four choices; a trial has a point for each of its widths."""
    return {
        "method/widths": CategoricalDistribution(WIDTHS),
        "method/weight_scheme": CategoricalDistribution(SCHEMES),
        "method/activation_scheme": CategoricalDistribution(SCHEMES),
        "method/switch_clip": CategoricalDistribution((False, True)),
    }
