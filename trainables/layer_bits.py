"""The widths of every layer: as a configuration gives them by name or pattern, else the defaults.

A name goes before a pattern, a longer pattern before a shorter; the first and the last layer keep 8 bits unless named
in full.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from trainables import plugins
from trainables.config import TrialConfig
from trainables.cost import FLOAT_BITS, INPUT_BITS, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError

ENDS_BITS = 8
"""Width of the first and the last layer unless told otherwise."""
DEFAULT_BITS = 4
"""Width of the layers between them unless told otherwise."""


def resolve_bits(config: TrialConfig, table: LayerTable) -> dict[str, LayerBits]:
    """Widths of every quantizable layer: as given by name or pattern, else 8 bits at the ends and 4 between them.

    Widths that the method decides itself are 32 here.

    Raises:
        ConfigError: a layer that the model does not have, a width that the method does not take, or settings that do
            not fit together; all faults at once.
    """
    if config.method.name == "float":
        if config.bits:
            raise ConfigError("method 'float' has no bits; take lsq, pact, dorefa, or leave bits out")
        return {}
    method = plugins.attribute("methods", config.method.name, "Method")
    names = [layer.name for layer in table.quantizable]
    faults = [
        f"bits/{name}: model {config.model.name!r} has no such layer{plugins.nearest(name, names)}"
        for name in config.bits
        if not any(fnmatchcase(layer, name) for layer in names)
    ]
    inner = [layer.name for layer in table.quantizable if not (layer.first or layer.last)]
    faults += [
        f"bits/{name}: matches only the first or the last layer, which take bits by their full name"
        for name in config.bits
        if name not in names
        and any(fnmatchcase(n, name) for n in names)
        and not any(fnmatchcase(n, name) for n in inner)
    ]
    bits = {}
    for layer in table.quantizable:
        weight = _width(config.bits, layer, "weight") if "weight" in method.given_bits else FLOAT_BITS
        activation = _width(config.bits, layer, "activation") if "activation" in method.given_bits else FLOAT_BITS
        bits[layer.name] = LayerBits(weight=weight, activation=INPUT_BITS if layer.first else activation)
        faults += _width_faults(config, layer, bits[layer.name], method)
    faults += _role_faults(config, method)
    if config.training.finetune_epochs and not method.learns_bits:
        faults.append(
            f"training/finetune_epochs = {config.training.finetune_epochs}: method {config.method.name!r} learns no "
            "widths that could be fixed; leave it at 0"
        )
    elif config.search_epochs < 1:
        faults.append(
            f"training/finetune_epochs = {config.training.finetune_epochs}: fewer than training/epochs = "
            f"{config.training.epochs} are needed, or no width is learned"
        )
    faults += method.faults(config, table)
    if faults:
        raise ConfigError("; ".join(faults))
    return bits


def _width(bits: Mapping[str, Mapping[str, int]], layer: Layer, role: str) -> int:
    """By name, else by the longest pattern (not at the ends), else the default."""
    named = bits.get(layer.name, {}).get(role)
    if named is not None:
        return named
    if layer.first or layer.last:
        return ENDS_BITS
    patterns = [name for name, widths in bits.items() if role in widths and fnmatchcase(layer.name, name)]
    return bits[max(patterns, key=lambda name: (len(name), name))][role] if patterns else DEFAULT_BITS


def _role_faults(config: TrialConfig, method: Any) -> Iterable[str]:
    for name, widths in config.bits.items():
        for role in widths:
            if role not in method.given_bits:
                how = "learns" if method.learns_bits else "has settings for"
                yield f"bits/{name}/{role}: method {config.method.name!r} {how} its {role} bits; leave it out"


def _width_faults(config: TrialConfig, layer: Layer, width: LayerBits, method: Any) -> Iterable[str]:
    name = config.method.name
    allowed = f"{method.weight_bits.start}..{method.weight_bits.stop - 1}"
    if "weight" in method.given_bits and width.weight not in method.weight_bits:
        yield f"bits/{layer.name}/weight = {width.weight}: method {name!r} takes {allowed}{_one_bit(width.weight)}"
    given = config.bits.get(layer.name, {}).get("activation", INPUT_BITS)
    if layer.first and given != INPUT_BITS:
        yield f"bits/{layer.name}/activation = {given}: the network's input has {INPUT_BITS} bits"
    lowest = max(method.activation_bits.start, 2 if layer.signed and method.signed_codes else 1)
    if layer.first or "activation" not in method.given_bits:
        return
    if not lowest <= width.activation < method.activation_bits.stop:
        allowed = f"{lowest}..{method.activation_bits.stop - 1}"
        why = " where the layer reads negative values" if lowest > method.activation_bits.start else ""
        yield f"bits/{layer.name}/activation = {width.activation}: method {name!r} takes {allowed}{why}"


def _one_bit(width: int) -> str:
    return " (use 'dorefa' or 'n2uq' for 1 bit)" if width == 1 else ""
