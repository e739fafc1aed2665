"""The ONNX graph of a quantized network: exported as float with its weights left open, then given codes.

What is put in, and why, stands in `onnx_file`.
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
from trainables.coded import Coded, scale_and_shift
from trainables.encoding import Encoding
from trainables.errors import ConfigError

INPUT, OUTPUT = "images", "logits"
GRAPH_OPSET = 20
"""Operators that torch emits mean the same from this opset to 25: later ones add types."""


def storage(bits: int) -> tuple[int, int]:
    """Width of the integer type that holds `bits`, and the first opset that has it.

    >>> [storage(bits) for bits in (1, 2, 3, 4, 5, 8)]
    [(2, 25), (2, 25), (4, 21), (4, 21), (8, 20), (8, 20)]
    """
    return next(row for row in ((2, 25), (4, 21), (8, 20)) if bits <= row[0])


def plain_twin(twin: nn.Module, layers: Mapping[str, Coded]) -> dict[str, Tensor]:
    """Make quantized layers ordinary ones, in place, and fold the batch norms that alone read one of them.

    Returns:
        for each folded layer, what its output channels are multiplied by.
    """
    try:
        flows = dataflow.trace(twin, layers).layers
    except ConfigError:  # a forward that branches has no symbolic trace, but the exporter can follow one path
        flows = {}
    factors = {}
    for name, layer in list(modules.quantized_layers(twin)):
        plain = _ordinary(layer)
        twin.set_submodule(name, plain)
        norm_name = flows[name].norm if name in flows else None
        if norm_name is None:
            continue
        norm = twin.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        scale, shift = scale_and_shift(norm)
        factors[name] = scale
        plain.bias = nn.Parameter(shift if plain.bias is None else plain.bias.detach() * scale + shift)
        plain.weight.data = plain.weight.data * scale.view(-1, *[1] * (plain.weight.dim() - 1))  # if it is float
        twin.set_submodule(norm_name, nn.Identity())
    return factors


def _ordinary(layer: modules.QuantizedLayer) -> nn.Conv2d | nn.Linear:
    """The layer without its quantizers."""
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    plain: Any = kind.__new__(kind)
    nn.Module.__init__(plain)
    kept = {name: value for name, value in vars(layer).items() if name not in ("_modules", "_parameters", "_buffers")}
    vars(plain).update(kept)
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


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
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.made: list[Any] = []

    def quantize(self, layers: Mapping[str, Coded], factors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Give every parameter its value, and every quantized layer its codes.

        Args:
            layers: codes and encodings.
            factors: of output channels, from folded norms.
            state: of the ordinary network, for the parameters that are float.

        Raises:
            ConfigError: a layer whose product is not to be found in the graph.
        """
        opened = [entry.name for entry in self.graph.input if entry.name != INPUT]
        for entry in list(self.graph.input)[::-1]:
            if entry.name != INPUT:
                self.graph.input.remove(entry)
        quantized = {f"{name}.weight": name for name, layer in layers.items() if layer.weight is not None}
        for parameter in opened:
            if parameter not in quantized:
                self._constant(parameter, state[parameter].detach().cpu().numpy())
        for name, layer in layers.items():
            products = self._products(name, f"{name}.weight")
            if layer.weight is not None and layer.codes is not None:
                integer = self.integer and layer.reads is not None and layer.weight.bits == layer.reads.bits == 8
                self._weights(name, layer.codes, layer.weight, factors.get(name), integer)
            if layer.reads is not None:
                self._reads(name, products, layer.reads)
        self._shorten()
        nodes = [*self.made, *self.graph.node]
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def _shorten(self) -> None:
        """Give the tensors between the nodes short names: the exporter's are paths, and most of a small file."""
        short: dict[str, str] = {}
        for node in self.graph.node:
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

    def _constant(self, name: str, values: Any) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def _integers(self, name: str, values: Any, encoding: Encoding) -> str:
        """A constant of the type of an encoding."""
        from onnx import helper

        dtype = helper.tensor_dtype_to_np_dtype(_type(encoding))
        return self._constant(name, values.astype(np.int8 if encoding.q_min < 0 else np.uint8).astype(dtype))

    def _weights(self, name: str, codes: Tensor, encoding: Encoding, factor: Tensor | None, integer: bool) -> None:
        """The weights of a layer as codes, behind nodes that make them numbers."""
        from onnx import helper

        made: list[tuple[str, str | None]] = []
        step = encoding.step.cpu()
        if factor is not None and integer and not encoding.offset:
            step, factor = step * factor.double(), None
        if encoding.offset:
            lowest = (encoding.offset * encoding.scale.cpu()).numpy()
            made.append(("Add", self._constant(f"{name}.lowest", _along(lowest, codes.dim()))))
        if factor is not None:
            made.append(("Mul", self._constant(f"{name}.factor", _along(factor.numpy(), codes.dim()))))
        if not made and not integer:
            made.append(("Sum", None))
        names = [f"{name}.weight.{number}" for number in range(len(made))] + [f"{name}.weight"]
        constants = [
            self._integers(f"{name}.codes", codes.numpy(), encoding),
            self._constant(f"{name}.step", step.float().numpy()),
        ]
        axis: dict[str, Any] = {}
        if step.dim():  # onnxruntime puts a single zero point where none is given, and then refuses it
            axis["axis"] = 0
            constants.append(self._integers(f"{name}.zero", np.zeros(len(step), np.int32), encoding))
        self.made.append(helper.make_node("DequantizeLinear", constants, names[:1], **axis))
        for number, (operator, constant) in enumerate(made):
            inputs = names[number : number + 1] + ([constant] if constant else [])
            self.made.append(helper.make_node(operator, inputs, names[number + 1 : number + 2]))

    def _reads(self, name: str, products: list[Any], encoding: Encoding) -> None:
        """Quantize what a layer reads, before each of its products."""
        from onnx import helper

        if encoding.offset or encoding.scale.dim():
            raise ConfigError(
                f"layer {name}: its input has an offset or several scales; QuantizeLinear is written for one scale "
                "around 0 only"
            )
        step = encoding.step.float().cpu().numpy()
        scale = self._constant(f"{name}.input_step", step)
        zero = self._integers(f"{name}.input_zero", np.zeros((), np.int32), encoding)
        fills_type = (encoding.q_min, encoding.q_max) in ((-128, 127), (0, 255))
        for number, product in enumerate(products):
            prefix = f"{name}.input{number or ''}"
            source = product.input[0]
            nodes = []
            if not fills_type:
                low = self._constant(f"{prefix}.low", encoding.q_min * step)
                high = self._constant(f"{prefix}.high", encoding.q_max * step)
                nodes.append(helper.make_node("Clip", [source, low, high], [f"{prefix}.clipped"]))
                source = f"{prefix}.clipped"
            nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [f"{prefix}.codes"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{prefix}.codes", scale, zero], [f"{prefix}.read"]))
            place = next(i for i, node in enumerate(self.graph.node) if node is product)
            product.input[0] = f"{prefix}.read"
            for node in nodes[::-1]:
                self.graph.node.insert(place, node)


def _along(values: Any, dims: int) -> Any:
    """A number, or numbers for the first of `dims` dimensions, in a shape that multiplies weights."""
    return values.reshape([-1, *[1] * (dims - 1)]) if values.ndim else values


def _type(encoding: Encoding) -> int:
    """ONNX's number of the integer type that holds an encoding's codes."""
    from onnx import TensorProto

    width, _ = storage(encoding.bits)
    return int(TensorProto.DataType.Value(f"{'INT' if encoding.q_min < 0 else 'UINT'}{width}"))
