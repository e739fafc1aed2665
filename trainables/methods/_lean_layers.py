"""Little memory and few passes: masks as bits, codes as half bytes, element-wise chains piece by piece in the cache.

A float network keeps two float tensors a layer for its backward pass: what batch norm read, and what the ReLU gave,
which the convolution read. Here a ReLU keeps one bit a value, and a convolution may keep the codes of its quantized
input, half a byte or a byte each: room for methods that train more parameters than the network has.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainables.quantize import by_number, dense

PIECE = 1 << 17
"""Elements of a piece: a few of them fit the cache of a core."""
Layout = tuple[Sequence[int], Sequence[int]]
"""Shape and strides of a dense tensor."""
_GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, in one word: its top byte has a bit for each, and no sum below carries."""
_SPREAD = 0x0101010101010101
_PICK = 0x8040201008040201 - (1 << 64)
"""From a byte in all eight places of a word, the bit of each place."""


def laid_out(x: Tensor, layout: Layout) -> Tensor:
    """`x` with this layout."""
    return x if x.stride() == tuple(layout[1]) else x.new_empty_strided(*layout).copy_(x)


def pieces(x: Tensor, size: int = PIECE) -> tuple[Tensor, ...]:
    """The elements of a dense tensor in the order of memory, without a copy, `size` at a time."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset()).split(size)


def pack_mask(sources: Iterator[Tensor], elements: int, like: Tensor) -> Tensor:
    """Where a tensor is not 0: a bit each, or a byte where their number is no multiple of 8.

    The cast to bool is quick on a CPU, comparisons are not.

    Args:
        sources: the tensor, piece by piece.
        elements: how many in all.
        like: a tensor on the same device.
    """
    per_byte = 1 if elements % 8 else 8
    mask = like.new_empty(elements // per_byte, dtype=torch.uint8)
    for source, part in zip(sources, mask.split(PIECE // per_byte), strict=True):
        bytes_ = source.to(torch.bool)
        part.copy_(bytes_ if per_byte == 1 else bytes_.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56))
    return mask


def masked(g: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    """`g` where the packed mask of a tensor with this layout is set, else 0."""
    result = g.new_empty_strided(*layout)
    per_byte = result.numel() // max(1, mask.numel())
    packed = mask.split(PIECE // max(1, per_byte))
    for part, source, target in zip(packed, pieces(laid_out(g, layout)), pieces(result), strict=True):
        if per_byte == 8:
            part = part.to(torch.int64).mul_(_SPREAD).bitwise_and_(_PICK).view(torch.int8).to(torch.bool)
        target.copy_(part.view(torch.int8)).mul_(source)
    return result


def codes_per_byte(steps: int, elements: int) -> int:
    """How many codes 0..steps <= 255 are kept in a byte."""
    return 2 if steps <= 15 and elements % 2 == 0 else 1


def pack_codes(codes: Tensor, packed: Tensor, steps: int) -> None:
    """Write codes 0..steps of one piece to `packed`, two a byte if it has half as many elements."""
    small = codes.to(torch.int8 if steps <= 127 else torch.uint8)
    if packed.numel() < codes.numel():
        pairs = small.view(torch.int16)
        packed.copy_(pairs.bitwise_or(pairs >> 4))
    else:
        packed.copy_(small)


def unpack_codes(packed: Tensor, codes: Tensor) -> Tensor:
    """Write the codes of one piece to `codes`, as floats."""
    if packed.numel() < codes.numel():
        pairs = packed.to(torch.int16)
        packed = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.int8)
    return codes.copy_(packed)


class _OpenWhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = dense(x)
        y = torch.empty_like(x)
        ctx.layout = y.shape, y.stride()
        clamped = (torch.clamp_min(a, 0, out=b) for a, b in zip(pieces(x), pieces(y), strict=True))
        ctx.save_for_backward(pack_mask(clamped, x.numel(), x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return masked(g, ctx.saved_tensors[0], ctx.layout)


class LeanReLU(nn.ReLU):
    """A ReLU that keeps one bit a value for its backward pass; on a CPU, in the eager network."""

    def plain(self) -> nn.Module:
        """A ReLU of torch's, for exports."""
        return nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """`max(x, 0)`, any shape."""
        return _OpenWhere.apply(x) if by_number(x) and torch.is_grad_enabled() else super().forward(x)
