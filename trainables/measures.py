"""What a person wants to know of a network beside accuracy, BOPs and size: latency, energy, a figure of a device.

A measure is a function in one file, told by the names of its parameters, or a table of one number for each layer and
pair of widths:

| source | gives | known |
|---|---|---|
| `measure(layer, bits)` | one layer's part; the network's is the sum | before training |
| `measure(layers, bits)` | the network's | before training |
| `measure(model, ...)` | a trained network's; may also take `images`, `layers` and `bits` | after training |
| `FILE.json` | a table (`trainables.latency`), summed over the layers | before training |

`layer` is a row of the layer table (`trainables.cost.Layer`) and `bits` its widths (`LayerBits`); `layers` are all
rows and `bits` then maps their names to widths. A row that is not quantized has 32 and 32 bits. `images` are the first
of the validation split, normalized, (64, channels, height, width) or fewer. Pruned channels count as if they were
there.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainables import plugins
from trainables.cost import FLOAT_BITS, Bits, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError, PluginError
from trainables.latency import Table

IMAGES = 64
"""How many of the validation split a measure may look at."""
FLOAT = LayerBits(weight=FLOAT_BITS, activation=FLOAT_BITS)
FORMS = "measure(layer, bits), measure(layers, bits) or measure(model, ...)"


@dataclass(frozen=True)
class Measure:
    """A measure that is ready to be taken.

    Attributes:
        name: the key under which records hold it.
        takes: what its function takes first: a `layer`, all `layers`, or the trained `model`.
        function: of the person's own, or the look-up in a table.
    """

    name: str
    takes: Literal["layer", "layers", "model"]
    function: Callable[..., Any]

    def of_widths(self, table: LayerTable, bits: Bits) -> float:
        """The value at these widths; not for a measure of the trained model.

        Raises:
            ConfigError: what the function gives is no finite number.
        """
        widths = {row.name: bits.get(row.name, FLOAT) for row in table.layers}
        if self.takes == "layer":
            return sum(self.of_layer(row, widths[row.name]) for row in table.layers)
        return self._number(self.function(table.layers, widths))

    def of_layer(self, layer: Layer, bits: LayerBits) -> float:
        """One layer's part of a measure that is a sum over layers.

        Raises:
            ConfigError: what the function gives is no finite number.
        """
        return self._number(self.function(layer, bits), layer.name)

    def of_model(self, table: LayerTable, bits: Bits, model: Any, images: Any) -> float:
        """The value of a trained model, in evaluation mode, at these widths.

        Raises:
            ConfigError: what the function gives is no finite number.
        """
        offered = {"images": images, "layers": table.layers, "bits": bits}
        wanted = inspect.signature(self.function).parameters
        return self._number(self.function(model, **{key: offered[key] for key in wanted if key in offered}))

    def _number(self, value: Any, layer: str = "") -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            where = f" for layer {layer}" if layer else ""
            raise ConfigError(f"measure {self.name!r} gives {value!r}{where}: a finite number is needed")
        return number


def load(name: str, source: str | dict[str, Any]) -> Measure:
    """The measure that a source defines.

    Args:
        name: of the measure.
        source: `FILE.py` or `package.module`, with the function `measure`; either with `:function`; `FILE.json`, or
            what is in it.

    Raises:
        PluginError: no such source, or its function takes something else.
        ConfigError: a table that cannot be read.
    """
    if isinstance(source, dict):
        return Measure(name, "layer", Table.of(source, name))
    if source.endswith(".json"):
        return Measure(name, "layer", Table.read(source))
    module, wanted = plugins.split(source)
    if "." not in module:
        raise PluginError(f"measure {name!r} = {source!r}: give FILE.py, FILE.json or package.module:function")
    function = plugins.attribute("measures", source, wanted or "measure")
    try:
        first, *others = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise PluginError(f"measure {name!r}: {source} must define {FORMS}") from None
    if first in ("layer", "layers") and others == ["bits"]:
        return Measure(name, first, function)  # type: ignore[arg-type]
    if first == "model" and set(others) <= {"images", "layers", "bits"}:
        return Measure(name, "model", function)
    raise PluginError(f"measure {name!r}: {source} takes {', '.join([first, *others])}; define {FORMS}")


def known(measures: Iterable[Measure], table: LayerTable, bits: Bits) -> dict[str, float]:
    """Values of the measures that follow from the widths, by name."""
    return {m.name: m.of_widths(table, bits) for m in measures if m.takes != "model"}


def travelling(sources: Mapping[str, str]) -> dict[str, Any]:
    """Sources as they travel to workers: what is in a table instead of its path."""
    return {
        name: json.loads(Path(source).read_text(encoding="utf-8")) if source.endswith(".json") else source
        for name, source in sources.items()
    }


def load_all(sources: Mapping[str, Any]) -> tuple[Measure, ...]:
    """The measures of several sources, by name."""
    return tuple(load(name, source) for name, source in sources.items())
