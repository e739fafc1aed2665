"""Measures that are sums over layers, as tables that the default proposer and the repair can add up quickly."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from raysearch.search.proposals import Space, choices
from trainables.cost import FLOAT_BITS, INPUT_BITS, Layer, LayerBits
from trainables.measures import Measure


def summed(measures: Iterable[Measure]) -> dict[str, Measure]:
    """The measures that are sums over layers, by name."""
    return {measure.name: measure for measure in measures if measure.takes == "layer"}


def tables_of(
    measures: Iterable[Measure], layers: Sequence[Layer], space: Space, fixed: Mapping[str, Sequence[int]]
) -> dict[str, np.ndarray]:
    """Each such measure at every pair of widths that the space can give a layer, (layers, 33, 33); elsewhere NaN.

    Args:
        measures: of the sweep.
        layers: the quantizable layers, in order.
        space: distributions by address.
        fixed: layer -> [weight bits, activation bits] where the space says nothing.
    """
    asked = {int(w) for name in space if name.startswith("bits/") for w in choices(space[name], limit=64)}
    tables = {}
    for name, measure in summed(measures).items():
        table = np.full((len(layers), FLOAT_BITS + 1, FLOAT_BITS + 1), np.nan)
        for place, layer in enumerate(layers):
            weight, activation = fixed.get(layer.name, (INPUT_BITS, INPUT_BITS))
            for w in {*asked, weight}:
                for a in {INPUT_BITS} if layer.first else {*asked, activation}:
                    table[place, w, a] = measure.of_layer(layer, LayerBits(weight=w, activation=a))
        tables[name] = table
    return tables
