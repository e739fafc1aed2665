"""The architecture of our networks together with the weight and activation bits of each stage, 2 to 8.

As `joint`, with the fewest parameters: stages are there at every depth.
"""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution

from search_spaces import architecture, per_stage
from search_spaces.joint import Layers


def space(layers: Layers, config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The parameters of `architecture` and of `per_stage`."""
    return {**architecture.space(layers, config), **per_stage.space(layers)}
