"""Weight and activation bits of every layer between the first and the last, 2 to 8, each on its own."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers a layer; the first and the last layer keep their 8 bits."""
    return {
        f"bits/{layer.name}/{role}": IntDistribution(2, 8)
        for layer in layers
        if not (layer.first or layer.last)
        for role in ("weight", "activation")
    }
