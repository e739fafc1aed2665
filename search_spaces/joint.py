"""The architecture of our networks together with the weight and activation bits of each layer, 2 to 8.

A layer has bits in the trials whose network has that layer: the third block of a stage where the depth is enough for
it, the third convolution of a block where the block has three. The first and the last layer keep 8 bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution

from search_spaces import architecture, per_layer

Layers = Sequence[Any]
LayersOf = Callable[[Mapping[str, Any]], Layers]


def space(layers: Layers, config: Mapping[str, Any], layers_of: LayersOf) -> dict[str, BaseDistribution]:
    """The parameters of `architecture`, and those of `per_layer` on the layers that any of its networks has."""
    changing = architecture.space(layers, config)
    return {**changing, **per_layer.space(every_layer(changing, layers_of))}


def every_layer(changing: Mapping[str, BaseDistribution], layers_of: LayersOf) -> Layers:
    """The layers that any network of a space has, those of the largest first.

    Args:
        changing: parameters that change the network.
        layers_of: from values of those to the layers of that network.
    """
    found: dict[str, Any] = {}
    for values in architecture.largest(changing):
        for layer in layers_of(values):
            found.setdefault(layer.name, layer)
    return list(found.values())
