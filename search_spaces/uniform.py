"""One width for all weights and one for all activations, 2 to 8; the first and the last layer keep 8."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers for the whole network."""
    return {f"bits/*/{role}": IntDistribution(2, 8) for role in ("weight", "activation")}
