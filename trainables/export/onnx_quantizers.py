"""ONNX nodes that quantize activations, one way for each class of encodings.

Levels on a line are a Clip to the lowest and the highest, a QuantizeLinear and a DequantizeLinear; where they do not
lie around 0, a sum before and one behind. The codes between the two are 8 bits wide whatever the width is (16 above 8):
nothing is stored of them, and onnxruntime packs narrower ones at a cost and fails to optimize some graphs with them. A
range of the tensor at hand is the same with a scale that is computed. Thresholds are searched by bisection, as many
steps as the code has bits, and the codes decoded by a DequantizeLinear. 32 bits with a range are a Clip.
"""

from typing import Any

import numpy as np

from trainables.encoding import Clipped, Dynamic, Encoding, Thresholds
from trainables.errors import ConfigError
from trainables.export.onnx_constants import Constants

FULL = ((-128, 127), (0, 255), (-(2**15), 2**15 - 1), (0, 2**16 - 1))
"""Ranges that fill their type, which QuantizeLinear clips to."""
TINIEST = 1e-30
"""Smallest scale of a tensor of zeros."""


def nodes(name: str, encoding: Encoding, source: str, target: str, constants: Constants) -> list[Any]:
    """Nodes that make `target` of `source`.

    Args:
        name: of the layer, or of the place, for names and errors.
        encoding: of what it reads.
        source: tensor of floats.
        target: tensor of the quantized floats.
        constants: of the graph.

    Raises:
        ConfigError: several scales.
    """
    if encoding.scale.dim():
        raise ConfigError(f"layer {name}: its input has several scales; QuantizeLinear is written for one scale only")
    chain = _Chain(f"{name}.input", source, constants)
    if isinstance(encoding, Clipped):
        end = float(encoding.scale)
        chain.clip(-end if encoding.q_min < 0 else 0.0, end)
    elif isinstance(encoding, Thresholds):
        _search(chain, encoding)
    elif isinstance(encoding, Dynamic):
        _dynamic(chain, encoding)
    else:
        _affine(chain, encoding)
    return chain.ending_in(target)


class _Chain:
    """Nodes one after another, each reading what the one before made."""

    def __init__(self, prefix: str, source: str, constants: Constants) -> None:
        self.prefix, self.last, self.constants = f"{prefix}.{source}", source, constants
        self.made: list[Any] = []

    def constant(self, values: Any) -> str:
        """A constant without a name of its own."""
        return self.constants.add(f"c{len(self.constants.graph.initializer)}", values)

    def number(self, value: float) -> str:
        """A float32 constant."""
        return self.constant(np.float32(value))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node of these inputs, and the name of what it makes, which is the last now."""
        from onnx import helper

        self.last = f"{self.prefix}:{len(self.made)}"
        self.made.append(helper.make_node(operator, list(inputs), [self.last], **attributes))
        return self.last

    def then(self, operator: str, *others: str) -> str:
        """A node that reads the last tensor and these."""
        return self.add(operator, self.last, *others)

    def clip(self, low: float, high: float) -> str:
        """The last tensor within bounds."""
        return self.then("Clip", self.number(low), self.number(high))

    def through_codes(self, scale: str, encoding: Encoding) -> None:
        """To codes and back."""
        width = 8 if encoding.bits <= 8 else 16
        zero = self.constants.integers(
            f"zero{len(self.constants.graph.initializer)}", np.zeros((), np.int32), encoding, width
        )
        self.then("QuantizeLinear", scale, zero)
        self.then("DequantizeLinear", scale, zero)

    def ending_in(self, target: str) -> list[Any]:
        """The nodes; the last one makes `target`."""
        self.made[-1].output[0] = target
        return self.made


def _affine(chain: _Chain, encoding: Encoding) -> None:
    scale, step = float(encoding.scale), float(encoding.step)
    if encoding.unit_shift:
        chain.then("Sub", chain.number(encoding.unit_shift * scale))
    if (encoding.q_min, encoding.q_max) not in FULL:
        chain.clip(encoding.q_min * step, encoding.q_max * step)
    chain.through_codes(chain.number(step), encoding)
    if encoding.unit_offset:
        chain.then("Add", chain.number(encoding.unit_offset * scale))


def _dynamic(chain: _Chain, encoding: Dynamic) -> None:
    if encoding.q_min < 0:
        read = chain.last
        chain.then("Abs")
    else:
        read = chain.clip(0.0, float(encoding.scale))
    largest = chain.add("ReduceMax", chain.last, keepdims=0)
    chain.add("Div", largest, chain.number(encoding.q_max))
    scale = chain.then("Max", chain.number(TINIEST))
    chain.last = read
    chain.through_codes(scale, encoding)


def _search(chain: _Chain, encoding: Thresholds) -> None:
    from onnx import TensorProto

    if encoding.falls:
        chain.then("Neg")
    read, half = chain.last, 2 ** (encoding.bits - 1)
    thresholds = encoding.thresholds.cpu().numpy()
    table = chain.constant(thresholds)

    def integer(value: int) -> str:
        return chain.constant(np.array(value, np.int32))

    place = ""
    limit = chain.number(thresholds[half - 1])
    while half:
        above = chain.add("Greater", read, limit)
        half //= 2
        up, down = (half, -half) if half else (1, 0)
        if place:
            place = chain.add("Add", place, chain.add("Where", above, integer(up), integer(down)))
        else:
            first = 2 ** (encoding.bits - 1) - 1
            place = chain.add("Where", above, integer(first + up), integer(first + down))
        if half:
            limit = chain.add("Gather", table, place)
    chain.add("Cast", place, to=TensorProto.UINT8)
    chain.then("DequantizeLinear", chain.number(float(encoding.scale)))
