"""Activations on as many levels as their width allows between zero and the largest value of the tensor at hand.

The quantizer of the public code of BSQ (Yang et al. 2021): clip, take the largest magnitude S of the whole mini-batch,
round `|x| * steps / S` and scale back. The gradient is that of the clip alone: none flows through S, rounding passes it
on. Above 3 bits the clip is ReLU6; at 3 bits and below it is PACT's, at a trained `clip_max` that starts at 10.

What the backward pass needs is kept small, since bit planes take their room: `CodedConv2d` keeps the codes that it
read, and computes what an ordinary convolution does, to the last bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from trainables import world
from trainables.cost import FLOAT_BITS
from trainables.encoding import Dynamic, Encoding
from trainables.methods._lean_layers import (
    PIECE,
    Layout,
    codes_per_byte,
    masked,
    pack_codes,
    pack_mask,
    pieces,
    unpack_codes,
)
from trainables.modules import QuantizedConv2d, Quantizer
from trainables.quantize import by_number, dense

RELU6 = 6.0
PACT_INIT = 10.0
PACT_BITS = 3
"""Widths up to here clip at a trained bound."""
MOST_CODES = 255
"""Steps that fit a byte."""
MOMENTUM = 0.1
"""Weight of the newest batch in a running range."""


@dataclass(frozen=True)
class Range:
    """What a tensor is rounded on, as numbers.

    Attributes:
        largest: value of the largest code, > 0.
        lowest, steps: the codes' range.
        within: whether no value exceeds it.
    """

    largest: float
    lowest: float
    steps: float
    within: bool

    def encode(self, x: Tensor, packed: Tensor | None) -> Tensor:
        """The quantized dense `x`, piece by piece; the codes are packed too, where there is a tensor for them."""
        y = torch.empty_like(x)
        parts = packed.split(PIECE * packed.numel() // x.numel()) if packed is not None else [None] * len(pieces(x))
        for source, target, part in zip(pieces(x), pieces(y), parts, strict=True):
            codes = torch.mul(source, self.steps, out=target).div_(self.largest)
            codes = (codes if self.within else codes.clamp_(self.lowest, self.steps)).round_()
            if part is not None:
                pack_codes(codes, part, int(self.steps))
            self.scale_(codes)
        return y

    def decode(self, packed: Tensor, layout: Layout, like: Tensor) -> Tensor:
        """The quantized values of packed codes."""
        y = like.new_empty_strided(*layout)
        for part, target in zip(packed.split(PIECE * packed.numel() // y.numel()), pieces(y), strict=True):
            self.scale_(unpack_codes(part, target))
        return y

    def scale_(self, codes: Tensor) -> Tensor:
        """What codes stand for, written over them; in this order, to the last bit as published."""
        return codes.div_(self.steps).mul_(self.largest)


class _Clipped(torch.autograd.Function):
    """The quantized values forward; backward the gradient of a clip to 0..clip_max.

    A fixed bound has the gradient 0 at both ends, a trained one 1, and gets what lies at or above it itself.
    `untouched` says that nothing was clipped: then there is nothing to keep.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, values: Tensor, untouched: bool) -> Tensor:
        ctx.trained = ctx.needs_input_grad[1]
        if untouched:
            ctx.save_for_backward()
        elif ctx.trained:
            ctx.save_for_backward(x, clip_max)
        else:
            ctx.layout = x.shape, x.stride()
            inside = (torch.ops.aten.hardtanh_backward(piece, piece, 0.0, RELU6) for piece in pieces(x))
            ctx.save_for_backward(pack_mask(inside, x.numel(), x))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.saved_tensors:
            return g, g.new_zeros(()) if ctx.trained else None, None, None
        if not ctx.trained:
            return masked(g, ctx.saved_tensors[0], ctx.layout), None, None, None
        x, clip_max = ctx.saved_tensors
        inside, above = (x >= 0).logical_and_(x <= clip_max), x >= clip_max
        return g * inside.to(g.dtype), (g * above.to(g.dtype)).sum(), None, None


class DynamicRange(Quantizer):
    """Clip, then round on the range of the tensor at hand.

    Args:
        bits: width, 1..16; with the sign where there is one.
        signed: whether values below zero exist; they are not clipped then.
        running: evaluate on a running mean of the batches' ranges, not on the range of the evaluated batch.

    Attributes:
        clip_max: (), a parameter when trained (unsigned, `bits` <= 3), else 6; unused when signed.
        running_largest: (), 0 before the first batch.
    """

    clip_max: Tensor
    running_largest: Tensor

    def __init__(self, bits: int, *, signed: bool = False, running: bool = False) -> None:
        super().__init__(bits, signed=signed, symmetric=True)
        self.running = running
        if bits <= PACT_BITS and not signed:
            self.clip_max = nn.Parameter(torch.tensor(PACT_INIT))
        else:
            self.register_buffer("clip_max", torch.tensor(RELU6))
        if running:
            self.register_buffer("running_largest", torch.zeros(()))

    @torch.no_grad()
    def _range(self, x: Tensor) -> tuple[Tensor, bool]:
        """The largest magnitude to round on, and whether it is known that the clip leaves all of `x` alone."""
        low, high = x.amin(), x.amax()  # two passes: `aminmax` is slower than both
        if self.training and world.size() > 1:
            low, high = world.largest(torch.stack([-low, high])).mul(self.q_max.new_tensor([-1, 1]))
        if self.signed:
            largest, untouched = torch.maximum(-low, high), True
        else:
            largest = high.clamp_min(0).minimum(self.clip_max)
            # Zeros count as untouched: where they come from a ReLU, it holds their gradient back itself.
            untouched = by_number(x) and float(low) >= 0 and float(high) < float(self.clip_max)
        if not self.running:
            return largest, untouched
        if not self.training:
            return self.running_largest, untouched
        unset = self.running_largest == 0
        self.running_largest.copy_(torch.where(unset, largest, self.running_largest.lerp(largest, MOMENTUM)))
        return largest, untouched

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Levels on the running range, or on that of the tensor at hand."""
        codes: dict[str, Any] = {"bits": self.bits, "q_min": int(self.q_min), "q_max": int(self.q_max)}
        if self.running:
            return Encoding(**codes, scale=self.running_largest, divisor=float(self.q_max), multiplies_first=True)
        return Dynamic(**codes, scale=self.clip_max.detach())

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        return self.encode(dense(x))[0]

    def encode(self, x: Tensor, *, keep: bool = False) -> tuple[Tensor, Tensor | None, Range | None]:
        """The quantized activations of a dense tensor; with `keep`, their packed codes too, and their range."""
        largest, untouched = self._range(x)
        packed, found = None, None
        with torch.no_grad():
            if not by_number(x):
                ratio = torch.where(largest > 0, self.q_max / largest, 0.0)
                values = torch.clamp(x * ratio, self.q_min, self.q_max).round() / self.q_max * largest
            elif float(largest) > 0:
                within = untouched and (self.training or not self.running)
                found = Range(float(largest), float(self.q_min), float(self.q_max), within)
                if keep:
                    bytes_ = x.numel() // codes_per_byte(int(found.steps), x.numel())
                    packed = x.new_empty(bytes_, dtype=torch.uint8)
                values = found.encode(x, packed)
            else:
                values = torch.zeros_like(x)
        return _Clipped.apply(x, self.clip_max, values, untouched), packed, found


class CodedConv2d(QuantizedConv2d):
    """A quantized convolution that keeps its input for the backward pass as codes of a byte or half a byte."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in `nn.Conv2d`."""
        reads = self.input_quantizer
        if not (isinstance(reads, DynamicRange) and torch.is_grad_enabled() and by_number(x)):
            return super().forward(x)
        if reads.signed or float(reads.q_max) > MOST_CODES or x.dtype != self.weight.dtype:
            return super().forward(x)
        values, packed, found = reads.encode(dense(x), keep=True)
        address, layout, like = values.data_ptr(), (values.shape, values.stride()), reads.q_max

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == address and packed is not None else saved

        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            assert packed is not None
            assert found is not None
            return found.decode(packed, layout, like)

        with saved_tensors_hooks(pack, unpack):
            return self._conv_forward(values, self.weight_quantizer(self.weight), self.bias)


class AsItComes(Quantizer):
    """Leaves what a layer reads alone, and knows its width: quantized further up, or float.

    `calibrate` counts the distinct values of a batch: a quantizer's output has few, also behind a maximum.

    Args:
        widths: of the quantizers further up; the first is the one that the layer reads, if any.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths[0], signed=False)
        self.widths = tuple(widths)

    @property
    def bits(self) -> int:
        """Width in bits; 32 where there are more values than any of those quantizers makes."""
        return min(super().bits, FLOAT_BITS)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take the first width whose codes suffice for the distinct values of `x`."""
        values = x.unique().numel()
        self.set_bits(next((width for width in self.widths if values <= 2**width), FLOAT_BITS))

    def encoding(self, x: Tensor | None = None) -> None:
        """Nothing is rounded here."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


def relus(model: nn.Module) -> list[str]:
    """Names of the ReLU and ReLU6 modules, in the order of definition."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.ReLU | nn.ReLU6)]


def put_at_relus(model: nn.Module, widths: Mapping[str, int], *, running: bool = False) -> list[int]:
    """Replace every ReLU module but the first by a clip and a quantizer, in place.

    Args:
        model: whose ReLUs are modules, each called once.
        widths: by layer; a ReLU gets the width of the layer defined next after it, at the end of the last one.
        running: as in `DynamicRange`.

    Returns:
        The widths of the quantizers; none when there are no two ReLUs.
    """
    names = [name for name, _ in model.named_modules()]
    layers = [name for name in names if name in widths]
    sites = relus(model)[1:]
    found = []
    for site in sites:
        after = [name for name in layers if names.index(name) > names.index(site)]
        found.append(widths[after[0] if after else layers[-1]])
        model.set_submodule(site, DynamicRange(found[-1], running=running))
    return found
