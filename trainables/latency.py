"""A table of one number for each layer and pair of widths, and how to measure one on this machine.

The file is JSON:

    {"unit": "ms", "what": "...", "layers": {"conv1": {"8/8": 0.021, "4/8": 0.034, "32/32": 0.05}, ...}, "rest": 0.1}

A key is `weight bits/activation bits`, `32/32` is float. Widths that are not there count as the next wider ones that
are, as hardware runs 5 bits as 8; `rest` is added once. A table of another origin (a device's, an energy model's) works
as well as ours.

`measured` times each layer by itself in onnxruntime on this machine's CPU: the layer with its quantizers as the ONNX
export writes them, on its own input shape, one image, one thread, the median of interleaved runs. So the sum is neither
a network's latency with operators fused across layers nor that of any other machine; the time of the whole float
network stands beside it in the file (`whole_float`). onnxruntime decodes weights below 8 bits on every call: here fewer
bits are slower, and only a device with kernels for them is faster.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainables import plugins
from trainables.cost import FLOAT_BITS, INPUT_BITS, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError
from trainables.export.onnx_file import open_session, write_onnx
from trainables.export.onnx_graph import INPUT
from trainables.layers import trace
from trainables.modes import in_mode

WIDTHS = (2, 4, 8)
WARM_UP = 3
FIELDS = ("layers", "rest", "unit", "what")


class Table:
    """A number for each layer and pair of widths; calling it looks one up.

    Args:
        layers: layer -> (weight bits, activation bits) -> number.
        rest: what is added once; with the first layer.
    """

    def __init__(self, layers: Mapping[str, Mapping[tuple[int, int], float]], rest: float = 0.0) -> None:
        self.layers, self.rest = layers, rest

    @classmethod
    def read(cls, path: str | Path) -> "Table":
        """The table of a file.

        Raises:
            ConfigError: it is no table, and why.
        """
        try:
            tree = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is no table of layers: {error}; `raysearch latency` writes one") from error
        return cls.of(tree, str(path))

    @classmethod
    def of(cls, tree: Any, where: str) -> "Table":
        """The table of what is in a file; `where` it comes from is for errors.

        Raises:
            ConfigError: it is no table, and why.
        """
        try:
            rows = {
                name: {(int(w), int(a)): float(value) for (w, a), value in ((k.split("/"), v) for k, v in row.items())}
                for name, row in tree["layers"].items()
            }
            return cls(rows, float(tree.get("rest", 0.0)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{where} is no table of layers: {type(error).__name__}: {error}; `raysearch latency` writes one"
            ) from error

    def __call__(self, layer: Layer, bits: LayerBits) -> float:
        """One layer's number at these widths.

        Raises:
            ConfigError: a layer or a width that the table lacks.
        """
        row = self.layers.get(layer.name)
        if row is None:
            if not layer.quantizable:
                return 0.0  # products of activations are nobody's layer: they belong to `rest`
            near = plugins.nearest(layer.name, list(self.layers))
            raise ConfigError(f"layer {layer.name!r} is not in the table, which is of another network{near}")
        wider = [key for key in row if key[0] >= bits.weight and key[1] >= bits.activation]
        if not wider:
            raise ConfigError(
                f"layer {layer.name}: the table has {', '.join(f'{w}/{a}' for w, a in row)} bits, nothing as wide as "
                f"{bits.weight}/{bits.activation}"
            )
        return row[min(wider)] + (self.rest if layer.first else 0.0)


@torch.no_grad()
def measured(
    model: nn.Module, input_shape: tuple[int, int, int], *, widths: Sequence[int] = WIDTHS, runs: int = 30
) -> dict[str, Any]:
    """The table of a network on this machine's CPU, as its file has it; see the module for what is timed.

    Args:
        model: float; it is left as it is.
        input_shape: (channels, height, width).
        widths: of weights and activations, each with each, 1..8.
        runs: how often each is timed; the median counts.

    Raises:
        ConfigError: a width that ONNX files do not hold.
    """
    if not all(1 <= width <= 8 for width in widths):
        raise ConfigError(f"widths {list(widths)}: 1..8 bits can be timed")
    table = trace(model, input_shape)
    inputs = _inputs(model, input_shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.onnx"
            write_onnx(whole, model, input_shape)
            whole_ms = _medians({(0, 0): whole}, torch.randn(1, *input_shape), runs)[0, 0]
            rows = {}
            for row in table.quantizable:
                files = _layer_files(model, row, inputs[row.name], widths, Path(folder))
                times = _medians(files, inputs[row.name], runs)
                rows[row.name] = {f"{w}/{a}": value for (w, a), value in times.items()}
    finally:
        torch.set_num_threads(threads)
    what = "median time of each layer by itself in onnxruntime on one CPU thread, one image"
    return {"unit": "ms", "what": what, "runs": runs, "whole_float": whole_ms, "layers": rows, "rest": 0.0}


def _inputs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """What each convolution and linear layer reads for one image of noise."""
    found: dict[str, Tensor] = {}
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]

    def keep(name: str) -> Any:
        return lambda _, given: found.setdefault(name, given[0].detach().clone())

    with in_mode(model, training=False), ExitStack() as hooks:
        for name, module in layers:
            hooks.enter_context(module.register_forward_pre_hook(keep(name)))
        model(torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)))
    return found


def _layer_files(
    model: nn.Module, row: Layer, read: Tensor, widths: Sequence[int], folder: Path
) -> dict[tuple[int, int], Path]:
    """One ONNX file for each pair of widths of one layer, and one in float."""
    from copy import deepcopy
    from dataclasses import replace

    lsq = plugins.attribute("methods", "lsq", "Method")
    pairs = [(w, a) for w in widths for a in ([INPUT_BITS] if row.first else widths)]
    files = {}
    for weight, activation in [*pairs, (FLOAT_BITS, FLOAT_BITS)]:
        layer = nn.Sequential(deepcopy(model.get_submodule(row.name))).eval()
        if weight < FLOAT_BITS:
            method = lsq(lsq.Settings())
            bits = {"0": LayerBits(weight=weight, activation=activation)}
            method.prepare(layer, LayerTable(layers=(replace(row, name="0"),)), bits)
            method.calibrate(layer, read)
        files[weight, activation] = folder / f"{weight}-{activation}.onnx"
        write_onnx(files[weight, activation], layer.eval(), tuple(read.shape[1:]))
    return files


def _medians(files: Mapping[tuple[int, int], Path], read: Tensor, runs: int) -> dict[tuple[int, int], float]:
    """Median milliseconds of each file, taking turns."""
    sessions = {key: open_session(path) for key, path in files.items()}
    times: dict[tuple[int, int], list[float]] = {key: [] for key in files}
    given = {INPUT: read.contiguous().numpy()}
    for turn in range(WARM_UP + runs):
        for key, session in sessions.items():
            began = time.perf_counter()
            session.run(None, given)
            if turn >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - began))
    return {key: statistics.median(values) for key, values in times.items()}
