"""Depth and width of our networks, at the bits of the base configuration.

Of the networks that have such settings: lenet5, resnet20, vgg7, mobilenet_v1 and mobilenet_v2. What a network of one's
own can vary is a space of one's own, over addresses such as `model/hidden`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

SETTINGS: dict[str, dict[str, BaseDistribution]] = {
    "lenet5": {"model/width": FloatDistribution(0.125, 1.0, step=0.125)},
    "resnet20": {"model/depth": IntDistribution(8, 32, step=6), "model/width": IntDistribution(8, 24, step=4)},
    "vgg7": {"model/width": FloatDistribution(0.125, 1.0, step=0.125)},
    "mobilenet_v1": {"model/width": FloatDistribution(0.25, 1.0, step=0.25)},
    "mobilenet_v2": {"model/width": FloatDistribution(0.25, 1.0, step=0.25)},
}
"""By model: factors of width, or channels of the first stage; layers on the longest path."""


def space(layers: Sequence[Any], config: Mapping[str, Any]) -> dict[str, BaseDistribution]:
    """The settings of the model that `config`, the tree of the base configuration, names."""
    return dict(SETTINGS.get(config["model"]["name"], {}))
