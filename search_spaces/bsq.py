"""BSQ: weight of its penalty, epochs between precision adjustments, one width for the activations."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """The paper's alpha, from below its smallest to above its largest, and 2 to 8 bits between the ends."""
    return {
        "method/penalty_strength": FloatDistribution(1e-3, 5e-2, log=True),
        "method/interval": IntDistribution(1, 128, log=True),
        "bits/*/activation": IntDistribution(2, 8),
    }
