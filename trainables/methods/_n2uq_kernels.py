"""Kernels of N2UQ beside its thresholds: weights of the largest entropy, and RPReLU.

Liu et al. 2022, "Nonuniform-to-uniform quantization", arXiv:2111.14826, section 3.3; RPReLU is from ReActNet, Liu et
al. 2020, arXiv:2003.03488. As in `quantize`, a formula is one `autograd.Function` with its gradient in closed form.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainables.quantize import SMALLEST_SCALE, by_number, compilable, dense, flattened, laid_out_as, run_compiled


class Memory:
    """Memory for a result that is made anew in each step, the same again as soon as nobody holds the last one.

    A system gives large blocks out page by page and takes them back in each step, which takes longer than quantizing.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """An unset tensor with the shape, layout, type and device of `x`."""
        block = self._block
        if block is None or _held(block) or not _alike(block, x):
            block = self._block = torch.empty_like(x)
        return block.data  # by `.data` the next result is no change of this one


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def _held(block: Tensor) -> bool:
    """Whether a tensor or a graph uses the memory of `block`, beside itself and the handle that asks."""
    return int(torch._C._storage_Use_Count(block.untyped_storage()._cdata)) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Weights of the largest entropy


def filter_scale(w: Tensor, q_max: Tensor) -> Tensor:
    """Factor of each filter, `(2^n - 1) / 2^(n-1) * mean |w|`; channels first. Shape (channels, 1, ...).

    Weights spread evenly over their range would then fill all levels alike, which is where their entropy is largest.
    """
    gamma = 2 * q_max / (q_max + 1)
    return (w.abs().mean(dim=tuple(range(1, w.dim())), keepdim=True) * gamma).clamp_min(SMALLEST_SCALE)


def _entropy_forward(w: Tensor, q_max: Tensor, clip_range: Tensor) -> tuple[Tensor, Tensor]:
    scale = filter_scale(w, q_max)
    codes = torch.clamp(w * (q_max / (clip_range * scale)) + q_max / 2, torch.zeros_like(q_max), q_max).round()
    return (codes - q_max / 2) * (scale * clip_range / q_max), scale


def _entropy_into(w: Tensor, y: Tensor, q_max: Tensor, clip_range: Tensor) -> Tensor:
    values, scale = _entropy_forward(w, q_max, clip_range)
    y.copy_(values)
    return scale


def _entropy_forward_eager(w: Tensor, q_max: Tensor, clip_range: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
    if not by_number(w):
        return _entropy_forward(w, q_max, clip_range)
    steps, width = float(q_max), float(clip_range)
    y = torch.abs(w, out=memory.like(w))
    scale = (y.mean(dim=tuple(range(1, w.dim())), keepdim=True) * (2 * steps / (steps + 1))).clamp_min_(SMALLEST_SCALE)
    torch.mul(w, steps / width / scale, out=y).add_(steps / 2).clamp_(0, steps).round_()
    return y.sub_(steps / 2).mul_(scale * (width / steps)), scale


def entropy_levels(w: Tensor, q_max: Tensor, clip_range: Tensor) -> Tensor:
    """Distance of the levels of each filter, in the units of `w`; shape (channels, 1, ...)."""
    return _entropy_forward_eager(w, q_max, clip_range, Memory())[1] * (float(clip_range) / float(q_max))


class _EntropyWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, q_max: Tensor, clip_range: Tensor, rescale: bool, memory: Memory) -> Tensor:
        if compilable():
            w = dense(w)
            y = memory.like(w)
            rows = (flattened(x).view(len(w), -1) for x in (w, y))
            scale = run_compiled(_entropy_into, *rows, q_max, clip_range).view(-1, *[1] * (w.dim() - 1))
        else:
            y, scale = _entropy_forward_eager(w, q_max, clip_range, memory)
        ctx.rescale = rescale
        ctx.save_for_backward(scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        return g / scale if ctx.rescale else g, None, None, None, None


def entropy_weight(
    w: Tensor, q_max: Tensor, clip_range: Tensor, *, rescale: bool = False, memory: Memory | None = None
) -> Tensor:
    """Divide each filter by its `filter_scale`, clip, round to `q_max + 1` levels around 0, and scale back.

    N2UQ, section 3.3. There is no level 0; an exact 0 goes to the level that half to even gives.

    Args:
        w: channels first.
        q_max: highest code, `2^bits - 1`; shape ().
        clip_range: distance of the outer levels in units of the scale, 2 in the method; shape ().
        rescale: whether the gradient is divided by the scale, as in the authors' code, or passed as it is. It has no
            mask for clipped weights either way.
        memory: where the result goes on a CPU; None takes new memory.
    """
    return _EntropyWeight.apply(w, q_max, clip_range, rescale, memory or Memory())


# ---------------------------------------------------------------------------------------------------------------------
# RPReLU

FEW = 64
"""Values of a channel in a row. With fewer of them, loops run over whole examples: short ones are slow."""


def _rprelu_forward(x: Tensor, shift: Tensor, slope: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    moved = x + shift
    return torch.where(moved > 0, moved, moved * slope) + offset, moved


def _rprelu_backward(
    g: Tensor, moved: Tensor, slope: Tensor, summed: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    negative = torch.where(moved > 0, 0.0, g)
    grad_x = g + negative * (slope - 1)
    return grad_x, grad_x.sum(summed), (negative * moved).sum(summed), g.sum(summed)


class _RPReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, slope: Tensor, offset: Tensor, dim: int) -> Tensor:
        dim %= x.dim()
        ctx.summed = [axis for axis in range(x.dim()) if axis != dim]
        inner = x.shape[dim + 1 :]
        ctx.short = dim > 0 and 1 < math.prod(inner) < FEW and x.is_contiguous()
        shift, slope, offset = (p.view(-1, *[1] * len(inner)) for p in (shift, slope, offset))
        if torch.compiler.is_compiling():
            y, moved = _rprelu_forward(x, shift, slope, offset)
        else:
            if ctx.short:
                shift, slope, offset = (p.expand(-1, *inner).contiguous() for p in (shift, slope, offset))
            moved = x + shift
            y = torch._prelu_kernel(moved, slope).add_(offset)
        ctx.save_for_backward(moved, slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        moved, slope = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return *_rprelu_backward(g, moved, slope, ctx.summed), None
        g = laid_out_as(g, moved)
        # What torch.where does, in vectorised passes: the gradient of the positive part, and what it leaves.
        negative = torch.ops.aten.threshold_backward(g, moved, 0)
        torch.sub(g, negative, out=negative)
        grad_x = torch.addcmul(g, negative, slope - 1)
        summands = grad_x, negative.mul_(moved), g
        if ctx.short:
            return grad_x, *(t.sum(0, keepdim=True).sum(ctx.summed) for t in summands), None
        return grad_x, *(t.sum(ctx.summed) for t in summands), None


def rprelu(x: Tensor, shift: Tensor, slope: Tensor, offset: Tensor, dim: int = 1) -> Tensor:
    """`prelu(x + shift, slope) + offset`, each per channel; ReActNet, equation 4.

    Args:
        x: any shape.
        shift: added before the kink; shape (channels,).
        slope: below the kink; at it the gradient is that of the lower side; shape (channels,).
        offset: added after; shape (channels,).
        dim: which dimension of x the channels are.
    """
    return _RPReLU.apply(x, shift, slope, offset, dim)
