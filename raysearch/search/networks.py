"""Spaces that change the network: layers come and go with its depth or its blocks, and their bit parameters with them.

A parameter `bits/LAYER/ROLE` belongs to a trial if the trial's network has a layer that it sets. Where it does not
belong, no trial has it: neither the sampler, nor the study, nor the records. A configuration that was proposed with
values for all parameters of the space is the one without those, so it is not trained twice.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from trainables.cost import Layer

if TYPE_CHECKING:
    from trainables.config import Tree

CHANGING = ("model/", "data/")
"""What addresses begin with that may change the network."""
BITS = "bits/"


def changes(names: Iterable[str]) -> bool:
    """Whether some of these parameters may change the network."""
    return any(name.startswith(CHANGING) for name in names)


def layers_of(base: "Tree", values: Mapping[str, Any]) -> Sequence[Layer]:
    """The quantizable layers of the network of a configuration.

    Args:
        base: JSON tree of the base configuration.
        values: by address; those that may change the network count.

    Raises:
        ConfigError: there is no such network.
    """
    from trainables.build import layer_table
    from trainables.config import merged, parse

    changing = {name: value for name, value in values.items() if name.startswith(CHANGING)}
    return layer_table(parse(merged(base, changing))).quantizable


def existing(names: Iterable[str], base: "Tree", values: Mapping[str, Any]) -> list[str]:
    """Those of a space's parameters that a configuration has, in their order.

    Args:
        names: the space's parameters.
        base: JSON tree of the base configuration.
        values: by address, at least those that may change the network.

    Raises:
        ConfigError: there is no such network.
    """
    names = list(names)
    if not changes(names):
        return names
    layers = layers_of(base, values)
    return [name for name in names if not name.startswith(BITS) or sets_any(name, layers)]


def trimmed(base: "Tree", values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a configuration has.

    Raises:
        ConfigError: there is no such network.
    """
    return {name: values[name] for name in existing(values, base, values)}


def configured(base: "Tree", values: Mapping[str, Any]) -> "Tree":
    """JSON tree of the configuration with these values, as far as it has them.

    Raises:
        ConfigError: there is no such network.
    """
    from trainables.config import merged

    return merged(base, trimmed(base, values))


def sets_any(address: str, layers: Sequence[Layer]) -> bool:
    """Whether a bit parameter sets a width of some layer: by name, or by a pattern of layers between the ends."""
    pattern = address.split("/")[1]
    return any(
        layer.name == pattern or (fnmatchcase(layer.name, pattern) and not (layer.first or layer.last))
        for layer in layers
    )
