"""Depth and width of our networks together with the weight and activation bits of each stage, 2 to 8.

Stages are there at every depth and width, so every combination is a network. The first and the last layer keep 8 bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from search_spaces import architecture, per_stage


def space(layers: Sequence[Any], config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The parameters of `architecture` and of `per_stage`."""
    return {**architecture.space(layers, config), **per_stage.space(layers)}
