"""The ONNX graph of a quantized network: exported as float with its weights left open, then given codes.

Where a quantizer of activations stands, the exporter writes a mark, for which `onnx_quantizers` puts nodes. What is put
in, and why, stands in `onnx_file`.
"""

import io
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import dataflow, modules
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.export import onnx_quantizers
from trainables.export.coded import Coded, Read, scale_and_shift
from trainables.export.onnx_constants import Constants, dense_groups, storage, unpacked

INPUT, OUTPUT = "images", "logits"
GRAPH_OPSET = 20
"""Operators that torch emits mean the same from this opset to 25: later ones add types."""
DOMAIN, MARK = "raysearch", "Quantize"


class _Marked(torch.autograd.Function):
    """A node that says which quantizer stands here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, encoding: Encoding) -> Tensor:
        tracing = torch._C._get_tracing_state()
        # The tracer would take in the encoding's constants, and not find them the second time.
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return encoding.rounded(x)
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, encoding: Encoding) -> Any:
        return g.op(f"{DOMAIN}::{MARK}", x, name_s=name).setType(x.type())


class _Mark(nn.Module):
    """Stands in the place of the quantizer `name`."""

    def __init__(self, name: str, encoding: Encoding, before: nn.Module | None) -> None:
        super().__init__()
        self.name, self.encoding = name, encoding
        self.before = before or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return _Marked.apply(self.before(x), self.name, self.encoding)


def flows_of(twin: nn.Module, layers: Mapping[str, Coded]) -> dict[str, dataflow.Flow]:
    """Where the layers stand, if that can be told."""
    try:
        return dataflow.trace(twin, layers).layers
    except ConfigError:  # a forward that branches has no symbolic trace, but the exporter can follow one path
        return {}


def plain_twin(
    twin: nn.Module, layers: Mapping[str, Coded], sites: Mapping[str, Read], flows: Mapping[str, dataflow.Flow]
) -> dict[str, Tensor]:
    """Make quantized layers ordinary ones behind marks, in place, and fold the batch norms that alone read one of them.

    Returns:
        for each folded layer, what its output channels are multiplied by.
    """
    factors = {}
    for name, read in sites.items():
        assert read.encoding is not None
        twin.set_submodule(name, _Mark(name, read.encoding, read.before))
    for name, layer in list(modules.quantized_layers(twin)):
        plain = _ordinary(layer, layers[name].values)
        modules.put(twin, name, plain)
        reads = layers[name].reads
        if reads is not None and (reads.encoding is not None or reads.before is not None):
            mark = None if reads.encoding is None else _Mark(name, reads.encoding, reads.before)
            plain.reads = reads.before if mark is None else mark
            plain.register_forward_pre_hook(_through_reads)
        norm_name = flows[name].norm if name in flows else None
        if norm_name is None or hasattr(plain, modules.OUTPUT):
            continue
        norm = twin.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        scale, shift = scale_and_shift(norm)
        factors[name] = scale
        plain.bias = nn.Parameter(shift if plain.bias is None else plain.bias.detach() * scale + shift)
        plain.weight.data = plain.weight.data * scale.view(-1, *[1] * (plain.weight.dim() - 1))  # if it is float
        modules.put(twin, norm_name, nn.Identity())
    return factors


def _through_reads(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (layer.get_submodule("reads")(args[0]), *args[1:])


def _ordinary(layer: modules.QuantizedLayer, values: Tensor) -> Any:
    """The layer without its quantizers."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    plain: Any = kind.__new__(kind)
    nn.Module.__init__(plain)
    kept = {name: value for name, value in vars(layer).items() if not name.startswith("_") or name in _OF_PADDING}
    vars(plain).update(kept)
    plain.weight, plain.bias = nn.Parameter(values), layer.bias
    return plain


_OF_PADDING = ("_reversed_padding_repeated_twice",)


@torch.no_grad()
def float_graph(twin: nn.Module, input_shape: Iterable[int]) -> Any:
    """The network as an ONNX model whose parameters are inputs by their names.

    By torch's TorchScript exporter: it needs no further package and leaves operators and names alone. Left open,
    parameters that happen to be equal stay apart.
    """
    import onnx

    file: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its age
        torch.onnx.export(
            twin,
            (torch.zeros(2, *input_shape),),
            file,
            dynamo=False,
            export_params=False,
            do_constant_folding=False,
            opset_version=GRAPH_OPSET,
            custom_opsets={DOMAIN: 1},
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
    return onnx.load_model_from_string(file.getvalue())


class Graph:
    """Puts parameters and quantizers into a float graph.

    Args:
        graph: of ONNX, changed in place.
        integer: whether 8-bit layers are left to onnxruntime's integer kernels.
    """

    def __init__(self, graph: Any, *, integer: bool) -> None:
        self.graph = graph
        self.integer = integer
        self.constants = Constants(graph)
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.made: list[Any] = []

    def quantize(
        self,
        layers: Mapping[str, Coded],
        sites: Mapping[str, Read],
        factors: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> None:
        """Give every parameter its value, every quantized layer its codes, and every mark its quantizer.

        Args:
            layers: codes and encodings.
            sites: quantizers outside of layers.
            factors: of output channels, from folded norms.
            state: of the ordinary network, for the parameters that are float.

        Raises:
            ConfigError: a layer whose product is not to be found in the graph, or what ONNX cannot express.
        """
        opened = [entry.name for entry in self.graph.input if entry.name != INPUT]
        for entry in list(self.graph.input)[::-1]:
            if entry.name != INPUT:
                self.graph.input.remove(entry)
        coded = {name: layer for name, layer in layers.items() if layer.codes is not None}
        for parameter in opened:
            if parameter.removesuffix(".weight") not in coded or not parameter.endswith(".weight"):
                self.constants.add(parameter, state[parameter].detach().cpu().numpy())
        ready: dict[str, str] = {}
        for group in dense_groups(layers):
            ready |= unpacked(group, self.constants, self.made)
        for name in layers:
            self._products(name, f"{name}.weight")
        for name, layer in coded.items():
            self._weights(name, layer, factors.get(name), ready.get(name))
        reads = {name: layer.reads for name, layer in layers.items() if layer.reads is not None}
        self._marks({**reads, **sites})
        self._shorten()
        nodes = [*self.made, *self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _marks(self, reads: Mapping[str, Read]) -> None:
        """Put nodes that quantize into the place of each mark."""
        nodes: list[Any] = []
        for node in self.graph.node:
            if node.domain != DOMAIN:
                nodes.append(node)
                continue
            name = node.attribute[0].s.decode()
            encoding = reads[name].encoding
            assert encoding is not None
            nodes += onnx_quantizers.nodes(name, encoding, node.input[0], node.output[0], self.constants)
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _shorten(self) -> None:
        """Number nodes and the tensors between them: the exporter's names are paths, and most of a small file."""
        short: dict[str, str] = {}
        for number, node in enumerate([*self.made, *self.graph.node]):
            node.name = str(number)  # onnxruntime makes names of constants from it
            for i, name in enumerate(node.input):
                node.input[i] = short.get(name, name)
            for i, name in enumerate(node.output):
                if name != OUTPUT and name:
                    short[name] = str(len(short))
                    node.output[i] = short[name]
        del self.graph.value_info[:]

    def _products(self, name: str, weight: str) -> list[Any]:
        """The nodes that multiply by a weight."""
        found = []
        for node in self.readers.get(weight, []):
            if node.op_type in ("Transpose", "Identity"):
                found += self._products(name, node.output[0])
            elif node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] == weight:
                found.append(node)
            else:
                raise ConfigError(
                    f"layer {name}: its weights go into {node.op_type}, not into a convolution or product"
                )
        if not found:
            raise ConfigError(f"layer {name}: no product with its weights is in the graph; does forward call it?")
        return found

    def _weights(self, name: str, layer: Coded, factor: Tensor | None, codes: str | None) -> None:
        """The weights of a layer as codes, behind nodes that make them numbers."""
        from onnx import helper

        encoding = layer.weight
        assert encoding is not None
        assert layer.codes is not None
        shape = list(layer.codes.shape)
        if not encoding.bits:
            size = self.constants.add(f"{name}.shape", np.array(shape, np.int64))
            self.made.append(helper.make_node("ConstantOfShape", [size], [f"{name}.weight"]))
            return
        if codes is None:
            codes = self.constants.integers(f"{name}.codes", layer.codes.numpy(), encoding)
        eight = layer.reads is not None and layer.reads.bits == 8 == encoding.bits
        if encoding.unit_offset:
            self._shifted(name, codes, encoding, factor, len(shape))
        else:
            self._straight(name, codes, encoding, factor, len(shape), integer=self.integer and eight)

    def _straight(
        self, name: str, codes: str, encoding: Encoding, factor: Tensor | None, dims: int, *, integer: bool
    ) -> None:
        """Weights with a level at 0: codes times their step, times the factor of a folded norm."""
        from onnx import helper

        step = encoding.step.cpu()
        if factor is not None and integer:
            step, factor = step * factor.double(), None
        constants = [codes, self.constants.add(f"{name}.step", step.float().numpy())]
        axis: dict[str, Any] = {}
        if step.dim():  # onnxruntime puts a single zero point where none is given, and then refuses it
            axis["axis"] = 0
            width = None if codes in self.constants.names else max(8, storage(encoding.bits)[0])  # as unpacked
            constants.append(self.constants.integers(f"{name}.zero", np.zeros(len(step), np.int32), encoding, width))
        last = f"{name}.weight"
        target = last if integer and factor is None else f"{name}.decoded"
        self.made.append(helper.make_node("DequantizeLinear", constants, [target], **axis))
        if factor is not None:
            along = self.constants.add(f"{name}.factor", _along(factor.numpy(), dims))
            self.made.append(helper.make_node("Mul", [target, along], [last]))
        elif not integer:
            self.made.append(helper.make_node("Sum", [target], [last]))

    def _shifted(self, name: str, codes: str, encoding: Encoding, factor: Tensor | None, dims: int) -> None:
        """Weights without a level at 0: codes on the scale of one, moved, then scaled for each channel or all."""
        from onnx import helper

        scale = encoding.scale.cpu() if factor is None else encoding.scale.cpu() * factor
        step = self.constants.add(f"{name}.step", np.float32(encoding.unit_step))
        offset = self.constants.add(f"{name}.offset", np.float32(encoding.unit_offset))
        along = self.constants.add(f"{name}.scale", _along(scale.numpy(), dims))
        self.made.append(helper.make_node("DequantizeLinear", [codes, step], [f"{name}.decoded"]))
        self.made.append(helper.make_node("Add", [f"{name}.decoded", offset], [f"{name}.moved"]))
        self.made.append(helper.make_node("Mul", [f"{name}.moved", along], [f"{name}.weight"]))


def _along(values: Any, dims: int) -> Any:
    """A number, or numbers for the first of `dims` dimensions, in a shape that multiplies weights."""
    return values.reshape([-1, *[1] * (dims - 1)]) if values.ndim else values
