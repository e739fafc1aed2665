"""Constants of ONNX graphs: codes in the types that ONNX has, or densely where it has none of their width.

ONNX has integers of 2, 4, 8 and 16 bits. Codes of other widths are kept as a stream of bytes without gaps, all layers
of one width in one stream, and nodes unpack them: every bit is shifted out, and those of one code are summed with their
place values, in two's complement where there is a sign. onnxruntime computes that once, when it loads the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainables.encoding import Encoding
from trainables.export.bit_packing import pack
from trainables.export.coded import Coded

STORED = ((2, 25), (4, 21), (8, 20), (16, 21))
"""Widths of ONNX's integers, and the first opset that has them."""
OWN = (".weight", ".bias", ".zero")
"""Endings of constants that are not shared: parameters, and zero points of weights, which onnxruntime replaces."""
SMALL = 16
"""Elements of a constant that may be shared."""
WORTHWHILE = 400
"""Bytes that a dense stream must save: its nodes take about as many."""


def storage(bits: int) -> tuple[int, int]:
    """Width of the integer type that holds `bits`, and the first opset that has it.

    >>> [storage(bits) for bits in (1, 2, 3, 4, 5, 8, 9)]
    [(2, 25), (2, 25), (4, 21), (4, 21), (8, 20), (8, 20), (16, 21)]
    """
    return next(row for row in STORED if bits <= row[0])


def type_of(encoding: Encoding, width: int | None = None) -> int:
    """ONNX's number of the integer type that holds an encoding's codes, or of another width."""
    from onnx import TensorProto

    width = storage(encoding.bits)[0] if width is None else width
    return int(TensorProto.DataType.Value(f"{'INT' if encoding.q_min < 0 else 'UINT'}{width}"))


class Constants:
    """The initializers of a graph; small ones that are equal are kept once.

    Args:
        graph: of ONNX, to which they are added.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.known: dict[tuple[Any, ...], str] = {}
        self.names: set[str] = set()

    def add(self, name: str, values: Any) -> str:
        """The name of a constant: `name`, or that of an equal one."""
        from onnx import numpy_helper

        values = np.ascontiguousarray(values).reshape(np.shape(values))
        key = (str(values.dtype), values.shape, values.tobytes())
        if not name.endswith(OWN) and key in self.known:
            return self.known[key]
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        self.names.add(name)
        if values.size <= SMALL:
            self.known.setdefault(key, name)
        return name

    def integers(self, name: str, values: Any, encoding: Encoding, width: int | None = None) -> str:
        """A constant of the type of an encoding, or of another width."""
        from onnx import helper

        kind = type_of(encoding, width)
        wide = encoding.bits > 8 if width is None else width > 8
        through = (np.int16 if wide else np.int8) if encoding.q_min < 0 else (np.uint16 if wide else np.uint8)
        return self.add(name, values.astype(through).astype(helper.tensor_dtype_to_np_dtype(kind)))


@dataclass(frozen=True)
class Dense:
    """Layers whose codes share a stream.

    Attributes:
        bits: width of the codes.
        signed: whether codes below 0 exist.
        codes: by layer, int32.
    """

    bits: int
    signed: bool
    codes: Mapping[str, Tensor]


def dense_groups(layers: Mapping[str, Coded]) -> list[Dense]:
    """Which layers to keep densely: those of each width that ONNX lacks, where that saves enough."""
    groups: dict[tuple[int, bool], dict[str, Tensor]] = {}
    for name, layer in layers.items():
        encoding = layer.weight
        if encoding is not None and layer.codes is not None and encoding.bits not in (0, 2, 4, 8, 16):
            groups.setdefault((encoding.bits, encoding.q_min < 0), {})[name] = layer.codes
    found = [Dense(bits, signed, codes) for (bits, signed), codes in groups.items()]
    return [group for group in found if _saved(group) > WORTHWHILE]


def _saved(group: Dense) -> float:
    return sum(c.numel() for c in group.codes.values()) * (storage(group.bits)[0] - group.bits) / 8


def unpacked(group: Dense, constants: Constants, nodes: list[Any]) -> dict[str, str]:
    """Add the stream of a group and the nodes that unpack it.

    Returns:
        by layer, the name of its codes, in the shape of the weights, as integers of 8 or 16 bits.
    """
    from onnx import TensorProto, helper

    flat = torch.cat([codes.flatten() for codes in group.codes.values()]) & (2**group.bits - 1)
    sizes = [codes.numel() for codes in group.codes.values()]
    if rest := -len(flat) % 8:  # whole bytes and whole codes at the end
        flat, sizes = torch.cat([flat, flat.new_zeros(rest)]), [*sizes, rest]
    places = 1 << np.arange(group.bits)
    if group.signed:
        places[-1] *= -1
    name = f"codes{group.bits}{'s' if group.signed else 'u'}"
    stream = constants.add(name, pack(flat, group.bits).numpy().reshape(-1, 1))
    shifts = constants.add("shifts", np.arange(8, dtype=np.uint8))
    one = constants.add("one", np.array(1, np.uint8))
    rows = constants.add(f"{name}.rows", np.array([-1, group.bits], np.int64))
    parts = constants.add(f"{name}.sizes", np.array(sizes, np.int64))
    whole = f"{'' if group.signed else 'U'}INT{storage(group.bits)[0] if group.bits > 4 else 8}"
    split = [f"{name}.{number}" for number in range(len(sizes))]
    nodes += [
        helper.make_node("BitShift", [stream, shifts], [f"{name}.shifted"], direction="RIGHT"),
        helper.make_node("BitwiseAnd", [f"{name}.shifted", one], [f"{name}.bits"]),
        helper.make_node("Reshape", [f"{name}.bits", rows], [f"{name}.by_code"]),
        *_summed(f"{name}.by_code", f"{name}.wide", places, group, constants),
        helper.make_node("Cast", [f"{name}.wide"], [f"{name}.whole"], to=TensorProto.DataType.Value(whole)),
        helper.make_node("Split", [f"{name}.whole", parts], split, axis=0),
    ]
    found = {}
    for part, (layer, codes) in zip(split, group.codes.items(), strict=False):
        shape = constants.add(f"{layer}.shape", np.array(codes.shape, np.int64))
        nodes.append(helper.make_node("Reshape", [part, shape], [f"{layer}.codes"]))
        found[layer] = f"{layer}.codes"
    return found


def _summed(bits: str, target: str, places: Any, group: Dense, constants: Constants) -> list[Any]:
    """Nodes that multiply rows of bits by place values: in integers up to 8 bits, above in floats, which are exact."""
    from onnx import TensorProto, helper

    name = f"{target}.places"
    if group.bits <= 8:
        values = constants.add(name, places.astype(np.int8 if group.signed else np.uint8).reshape(-1, 1))
        return [helper.make_node("MatMulInteger", [bits, values], [target])]
    values = constants.add(name, places.astype(np.float32).reshape(-1, 1))
    cast = helper.make_node("Cast", [bits], [f"{bits}.floats"], to=TensorProto.FLOAT)
    return [cast, helper.make_node("MatMul", [f"{bits}.floats", values], [target])]
