"""The one convention for what a configuration costs: BOPs and bytes. Plain arithmetic over the layer table.

BOPs (bit operations) of one input: the sum over layers of `macs x weight_bits x activation_bits`. A layer's
activation bits are those of the tensor it reads. The network's input has 8 bits: pixels are 8-bit codes. A layer
without bits (not quantized) counts 32 x 32, as do products of two activations (attention). Relative BOPs divide by
`macs x 32 x 32` of the whole table; in a search over architectures, records divide by those of the base
configuration's network instead, so that architectures compare, and `macs` are the trial's own. Batch norm, biases,
additions and pooling cost no BOPs. Where channels are pruned, a layer counts the share of its output channels that is
left, times the share of the channels that it reads.

Size is the number of bytes of the packed file (`packed`): `HEADER_BYTES`, in which it says what network it holds, and
the payload. That is the codes of each layer packed to its weight bits, four bytes for each scale and each bias, eight
for each channel of batch norm (a scale and a shift, once the running statistics are folded in) and four for each other
parameter. The weights of a pruned output channel are not stored, but one bit for each channel of such a layer, which
says whether it is there. Other conventions in use, and how they differ: README, "BOPs and size".
"""

from collections.abc import Mapping
from dataclasses import dataclass

INPUT_BITS = 8
FLOAT_BITS = 32
HEADER_BYTES = 256
"""What comes on top of the payload of a file. A constant, so that sizes compare, and that a few bytes of description
do not matter in a search; it matters itself only for networks of a few KiB."""


@dataclass(frozen=True, kw_only=True)
class LayerBits:
    """Widths of one layer in bits: of its weights, and of the activations that it reads. 0 is pruned, 32 is float."""

    weight: int
    activation: int


Bits = Mapping[str, LayerBits]
Shares = Mapping[str, float]
"""Share of a layer's channels that pruning has left, 0..1; a layer without keeps all of them."""
NONE_PRUNED: Shares = {}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the layer table: a module that multiplies and accumulates.

    Attributes:
        name: path of the module in the model, such as `layer1.0.conv1`.
        kind: `conv`, `linear`, or `matmul` (a product of two activations, or weights outside of conv and linear).
        macs: multiply-accumulates of one forward of one input, all calls of a shared layer together.
        weights: number of weights, without biases.
        biases: number of biases.
        channels: number of output channels (or features).
        signed: whether the tensor it reads has negative values.
        first: whether it reads the network's input.
        last: whether it makes the network's output.
        quantizable: whether methods can give it bits.
    """

    name: str
    kind: str
    macs: int
    weights: int
    biases: int
    channels: int
    signed: bool = False
    first: bool = False
    last: bool = False
    quantizable: bool = True


@dataclass(frozen=True, kw_only=True)
class LayerTable:
    """All layers in order of execution, and what is stored beside them.

    Attributes:
        layers: the rows.
        norm_channels: channels of all batch norms together.
        other_parameters: parameters that belong neither to a row nor to a batch norm.
    """

    layers: tuple[Layer, ...]
    norm_channels: int = 0
    other_parameters: int = 0

    @property
    def quantizable(self) -> tuple[Layer, ...]:
        """The layers that methods can give bits."""
        return tuple(layer for layer in self.layers if layer.quantizable)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward of one input."""
        return sum(layer.macs for layer in self.layers)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)


def bops(
    table: LayerTable, bits: Bits, *, output_share: Shares = NONE_PRUNED, input_share: Shares = NONE_PRUNED
) -> int:
    """Bit operations of one input, rounded to an integer where channels are pruned.

    Args:
        table: the layer table.
        bits: widths; a layer without counts 32 x 32.
        output_share: share of a layer's output channels that is left.
        input_share: share of the channels that a layer reads that is left.

    >>> table = LayerTable(layers=(Layer(name="fc", kind="linear", macs=50, weights=50, biases=5, channels=5),))
    >>> bops(table, {"fc": LayerBits(weight=2, activation=4)}), bops(table, {})
    (400, 51200)
    """
    total = 0
    for layer in table.layers:
        width = bits.get(layer.name)
        product = FLOAT_BITS**2 if width is None else width.weight * width.activation
        left = output_share.get(layer.name, 1) * input_share.get(layer.name, 1)
        total += layer.macs * product if left == 1 else round(layer.macs * product * left)
    return total


def relative_bops(table: LayerTable, bits: Bits) -> float:
    """BOPs divided by those of the network at 32 x 32 bits, 0..1."""
    return bops(table, bits) / (table.macs * FLOAT_BITS**2)


def size_bytes(
    table: LayerTable, bits: Bits, *, extra_floats: int | None = None, output_share: Shares = NONE_PRUNED
) -> int:
    """Bytes of the network as exported: the payload and the header; arguments as for `payload_bytes`."""
    return HEADER_BYTES + payload_bytes(table, bits, extra_floats=extra_floats, output_share=output_share)


def payload_bytes(
    table: LayerTable, bits: Bits, *, extra_floats: int | None = None, output_share: Shares = NONE_PRUNED
) -> int:
    """Bytes of codes and floats.

    Args:
        table: the layer table.
        bits: widths; a layer without is stored as float.
        extra_floats: scales, clip levels and the like that the method stores; by default one scale for each quantized
            weight tensor and one for each quantized activation (the network's input needs none).
        output_share: share of a layer's output channels that is left.
    """
    total = 8 * table.norm_channels + 4 * table.other_parameters
    scales = 0
    for layer in table.layers:
        width = bits.get(layer.name)
        weight_bits = FLOAT_BITS if width is None else width.weight
        left = output_share.get(layer.name, 1)
        total += (round(layer.weights * left) * weight_bits + 7) // 8 + 4 * layer.biases
        total += (layer.channels + 7) // 8 if left < 1 else 0
        if width is not None:
            scales += 1 + (not layer.first)
    return total + 4 * (scales if extra_floats is None else extra_floats)


def uniform(table: LayerTable, weight: int, activation: int, *, ends: int | None = 8) -> dict[str, LayerBits]:
    """The same widths everywhere, except `ends` bits in the first and the last layer (None: no exception).

    The activations of the first layer are the network's input and keep `INPUT_BITS`.
    """
    bits = {}
    for layer in table.quantizable:
        end = ends is not None and (layer.first or layer.last)
        w, a = (ends, ends) if end and ends is not None else (weight, activation)
        bits[layer.name] = LayerBits(weight=w, activation=INPUT_BITS if layer.first else a)
    return bits
