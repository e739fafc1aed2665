"""SAT: one width for all weights and one for all activations, 2 to 8, with the levels and the scale of the weights."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers and two choices; the first and the last layer keep 8 bits."""
    return {
        "bits/*/weight": IntDistribution(2, 8),
        "bits/*/activation": IntDistribution(2, 8),
        "method/weight_scheme": CategoricalDistribution(("original", "modified", "centered")),
        "method/rescale_target": CategoricalDistribution(("stddev", "constant")),
    }
