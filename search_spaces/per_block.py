"""One weight and one activation width for each block (`layer1.0`), 2 to 8; the first and the last layer keep 8."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Two ordered integers a block; a layer outside of any block is a block of its own.

    The block of `layer1.0.downsample.0` is `layer1.0`: a name's part up to its first number.
    """
    blocks = dict.fromkeys(block(layer.name) for layer in layers if not (layer.first or layer.last))
    return {f"bits/{name}/{role}": IntDistribution(2, 8) for name in blocks for role in ("weight", "activation")}


def block(name: str) -> str:
    """The address of a layer's block: a pattern when the block has several layers.

    >>> block("layer1.0.conv1"), block("fc1")
    ('layer1.0.*', 'fc1')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join([*parts[: numbers[0] + 1], "*"]) if numbers and numbers[0] + 1 < len(parts) else name
