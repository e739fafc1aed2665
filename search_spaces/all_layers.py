"""Weight and activation bits of every layer, the first and the last included, 2 to 8, each on its own."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers a layer; the network's input keeps its 8 bits."""
    return {
        f"bits/{layer.name}/{role}": IntDistribution(2, 8)
        for layer in layers
        for role in ("weight", "activation")
        if not (layer.first and role == "activation")
    }
