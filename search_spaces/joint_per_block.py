"""The architecture of our networks together with the weight and activation bits of each block, 2 to 8.

As `joint`, with fewer parameters: a block has bits in the trials whose network has that block.
"""

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution

from search_spaces import architecture, per_block
from search_spaces.joint import Layers, LayersOf, every_layer


def space(layers: Layers, config: Mapping[str, Any], layers_of: LayersOf) -> dict[str, BaseDistribution]:
    """The parameters of `architecture`, and those of `per_block` on the layers that any of its networks has."""
    changing = architecture.space(layers, config)
    return {**changing, **per_block.space(every_layer(changing, layers_of))}
