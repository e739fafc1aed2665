"""One weight and one activation width for each stage (`layer1`), 2 to 8; the first and the last layer keep 8."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers a stage, which is what a name says before its first dot; a layer without one is its own."""
    stages = dict.fromkeys(stage(layer.name) for layer in layers if not (layer.first or layer.last))
    return {f"bits/{name}/{role}": IntDistribution(2, 8) for name in stages for role in ("weight", "activation")}


def stage(name: str) -> str:
    """The address of a layer's stage.

    >>> stage("layer1.0.conv1"), stage("fc1")
    ('layer1.*', 'fc1')
    """
    head, dot, _ = name.partition(".")
    return f"{head}.*" if dot else name
