"""Depth, width, kernel size, block type and resolution of our networks, at the bits of the base configuration.

Every combination is a network. What a network of one's own can vary is a space of one's own, over addresses such as
`model/hidden`; its images' resolution is varied here where its data set has such a setting.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

BLOCKS = CategoricalDistribution(("basic", "preactivation", "bottleneck", "inverted"))
SETTINGS: dict[str, dict[str, BaseDistribution]] = {
    "lenet5": {"model/width": FloatDistribution(0.125, 1.0, step=0.125), "model/kernel": IntDistribution(3, 7, step=2)},
    "resnet18": {
        "model/depth": IntDistribution(10, 26, step=8),
        "model/width": IntDistribution(16, 64, step=16),
        "model/kernel": IntDistribution(3, 5, step=2),
        "model/block": BLOCKS,
    },
    "resnet20": {
        "model/depth": IntDistribution(8, 32, step=6),
        "model/width": IntDistribution(8, 24, step=4),
        "model/kernel": IntDistribution(3, 5, step=2),
        "model/block": BLOCKS,
    },
    "vgg7": {"model/width": FloatDistribution(0.125, 1.0, step=0.125), "model/kernel": IntDistribution(3, 5, step=2)},
    "mobilenet_v1": {
        "model/width": FloatDistribution(0.25, 1.0, step=0.25),
        "model/kernel": IntDistribution(3, 7, step=2),
    },
    "mobilenet_v2": {
        "model/width": FloatDistribution(0.25, 1.0, step=0.25),
        "model/kernel": IntDistribution(3, 7, step=2),
        "model/expansion": IntDistribution(2, 6, step=2),
    },
}
"""By model: layers on the longest path, factors of width or channels of the first stage, sides of kernels."""
LEAST_SIDE = {"vgg7": 8}
"""Pixels on a side below which a network takes no images."""


def space(layers: Sequence[Any], config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The settings of the model and of the data set that `config`, the tree of the base configuration, names."""
    model, side = config["model"]["name"], config["data"].get("resolution")
    found = dict(SETTINGS.get(model, {}))
    if side is not None and side // 2 >= LEAST_SIDE.get(model, 1) and side % 4 == 0:
        found["data/resolution"] = IntDistribution(side // 2, side, step=side // 4)
    return found


def largest(changing: Mapping[str, BaseDistribution]) -> Iterator[dict[str, Any]]:
    """The largest network of a space, once for each choice of what has no order: together they have all layers."""
    top = {name: _ends(distribution)[-1] for name, distribution in changing.items()}
    yield top
    for name, distribution in changing.items():
        if isinstance(distribution, CategoricalDistribution):
            yield from ({**top, name: choice} for choice in distribution.choices[:-1])


def _ends(distribution: Any) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    return (distribution.low, distribution.high)
