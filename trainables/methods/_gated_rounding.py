"""The quantizer of Bayesian Bits as kernels: rounding at 2, 4, 8, 16 and 32 bits, joined by gates.

Van Baalen et al. 2020, arXiv:2005.07093. The paper writes a quantized tensor as a sum of gated residuals (equation 6),

    x_q = d_2 + z_4 (d_4 + z_8 (d_8 + z_16 (d_16 + z_32 d_32))).

The step of each level divides that of the level before by an odd number, so the residuals up to a level add up to plain
rounding at that level's step: d_b = R_b - R_(b/2). The sum is thus a chain of means between roundings,

    x_q = R_2 + z_4 (F_4 - R_2),   F_4 = R_4 + z_8 (F_8 - R_4),   ...   F_32 = R_32,

from which all gradients follow in closed form (straight-through rounding, `c` is `x` clipped to the range `clip_max`):

- for `x`: 1 strictly inside the range, 0 elsewhere, whatever the gates are;
- for `clip_max` (the paper's beta): `(x_q - x) / clip_max` inside, `x_q / clip_max` where `x` is clipped;
- for the gate z_b: `F_b - R_(b/2)` times the gates before it.

Two facts make most levels free. A gate of exactly 1 drops the level before it, so that a chain whose gates are all 1 is
one rounding; a gate of exactly 0 drops all levels behind it. On a CPU the eager kernels read the gates and compute what
is left; elsewhere, and compiled, all levels are computed in one pass without looking. A level finer than the resolution
of the dtype (32 bits in float32) does not round.

Rounding is half to even at each level. The paper's residuals round ties of their own, which differ by one step on exact
ties only.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainables.quantize import (
    SMALLEST_SCALE,
    by_number,
    compilable,
    dense,
    flattened,
    inner_product,
    laid_out_as,
    run_compiled,
)

LEVELS = (2, 4, 8, 16, 32)
"""Widths in bits; every one but the first has a gate."""
STEP_RATIOS = (5, 17, 257, 65537)
"""The step of a level over that of the next: `2^(b/2) + 1` for the next level's b. All odd."""


def _resolved(dtype: torch.dtype) -> int:
    """How many of the levels a dtype tells from no rounding at all."""
    return sum(1 / (2**bits - 1) > torch.finfo(dtype).eps for bits in LEVELS)


def level_step(level: int, signed: bool) -> float:
    """Width of one step of a level (0: that of 2 bits) over `clip_max`."""
    return (2 if signed else 1) / math.prod((3, *STEP_RATIOS[:level]))


def range_end(dtype: torch.dtype) -> float:
    """The share of `clip_max` to clip at: the largest value must not round up to a code outside of the grid.

    The published 1 - 1e-7 is lost in float32, where three roundings can make a tie of it: 1 - 3e-7 there.
    """
    return 1 - max(1e-7, 2.5 * torch.finfo(dtype).eps)


# ---------------------------------------------------------------------------------------------------------------------
# All levels, gates as tensors: what is compiled, and what runs eagerly where reading a number would wait for the device


def _bounds(clip_max: Tensor, signed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lower and upper end of the range."""
    high = clip_max * range_end(dtype)
    return -high if signed else torch.zeros_like(high), high


def _roundings(x: Tensor, clip_max: Tensor, signed: bool) -> list[Tensor]:
    """R_2, R_4, ... of the clipped `x`."""
    clipped = torch.clamp(x, *_bounds(clip_max, signed, x.dtype))
    found = []
    for level in range(len(LEVELS)):
        step = clip_max * level_step(level, signed)
        found.append((clipped / step).round() * step if level < _resolved(x.dtype) else clipped)
    return found


def _forward(x: Tensor, clip_max: Tensor, gates: Tensor, signed: bool) -> Tensor:
    *coarse, value = _roundings(x, clip_max.clamp_min(SMALLEST_SCALE), signed)
    for index in reversed(range(len(coarse))):
        value = coarse[index] + gates[index] * (value - coarse[index])
    return value


def _backward(g: Tensor, x: Tensor, clip_max: Tensor, gates: Tensor, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    clip_max = clip_max.clamp_min(SMALLEST_SCALE)
    low, high = _bounds(clip_max, signed, x.dtype)
    inside = (x > low) & (x < high)
    *coarse, value = _roundings(x, clip_max, signed)
    sums = []
    for index in reversed(range(len(coarse))):
        finer = value - coarse[index]
        sums.append((g * finer).sum())
        value = coarse[index] + gates[index] * finer
    grad_max = (g * (value - torch.where(inside, x, 0.0))).sum() / clip_max
    before = torch.stack([torch.ones_like(gates[0]), gates[0], gates[0] * gates[1], gates[0] * gates[1] * gates[2]])
    grad_gates = torch.where((gates > 0) & (gates < 1), torch.stack(sums[::-1]) * before, 0.0)
    return torch.where(inside, g, 0.0), grad_max, grad_gates


# ---------------------------------------------------------------------------------------------------------------------
# The levels that are left, gates as numbers: eager on a CPU


def _chain(gates: list[float]) -> list[tuple[int, float, int]]:
    """What is left of the levels: (index of the level, its gate, index of that gate), the coarsest first.

    >>> _chain([1.0, 1.0, 0.0, 1.0]), _chain([1.0, 0.25, 1.0, 0.0])
    ([(2, 1.0, -1)], [(1, 1.0, -1), (3, 0.25, 1)])
    """
    chain = [(0, 1.0, -1)]
    for index, gate in enumerate(gates):
        if gate == 0:
            break
        if gate == 1:
            chain[-1] = (index + 1, *chain[-1][1:])
        else:
            chain.append((index + 1, gate, index))
    return chain


def _rounded(clipped: Tensor, clip_max: float, level: int, signed: bool) -> Tensor:
    """A new tensor: `clipped`, rounded at one level."""
    if level >= _resolved(clipped.dtype):
        return clipped.clone()
    step = clip_max * level_step(level, signed)
    return clipped.div(step).round_().mul_(step)


def _eager_forward(
    x: Tensor, clip_max: float, chain: list[tuple[int, float, int]], signed: bool
) -> tuple[Tensor, list[Tensor]]:
    """The quantized `x`, and for each gate of the chain what it multiplies, the coarsest last."""
    high = clip_max * range_end(x.dtype)
    clipped = x.clamp(-high if signed else 0.0, high)
    if len(chain) == 1 and chain[0][0] >= _resolved(x.dtype):
        return clipped, []
    value, gated = _rounded(clipped, clip_max, chain[-1][0], signed), []
    for (level, _, _), (_, gate, _) in zip(chain[-2::-1], chain[:0:-1], strict=True):
        coarse = _rounded(clipped, clip_max, level, signed)
        gated.append(value.sub_(coarse))
        value = coarse.add_(gated[-1], alpha=gate)
    return value, gated


def _eager_backward(g: Tensor, x: Tensor, y: Tensor, clip_max: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Gradients for `x` and for `clip_max`."""
    high = clip_max * range_end(x.dtype)
    low = -high if signed else 0.0
    grad_x = torch.ops.aten.hardtanh_backward(g, x, low, high)  # g strictly inside the range, else 0, in one pass
    error = torch.ops.aten.hardtanh_backward(x, x, low, high)
    torch.sub(y, error, out=error)
    return grad_x, inner_product(g, error) / clip_max


class _GatedQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, gates: Tensor, signed: bool) -> Tensor:
        x = dense(x)
        ctx.signed, ctx.chain = signed, None
        if compilable():
            ctx.save_for_backward(x, clip_max, gates)
            y = run_compiled(_forward, flattened(x), clip_max.data, gates.data, signed)  # type: ignore[arg-type]
            return y.as_strided_(x.shape, x.stride())
        if not by_number(x):
            ctx.save_for_backward(x, clip_max, gates)
            return _forward(x, clip_max, gates, signed)
        ctx.clip_max = max(float(clip_max), SMALLEST_SCALE)
        ctx.chain = _chain(gates.tolist())
        y, gated = _eager_forward(x, ctx.clip_max, ctx.chain, signed)
        ctx.save_for_backward(x, y, *gated)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.chain is None:
            x, clip_max, gates = ctx.saved_tensors
            if not compilable():
                return *_backward(g, x, clip_max, gates, ctx.signed), None
            flat = flattened(laid_out_as(dense(g), x))
            grad_x, *others = run_compiled(_backward, flat, flattened(x), clip_max.data, gates.data, ctx.signed)  # type: ignore[arg-type]
            return grad_x.as_strided_(x.shape, x.stride()), *others, None
        x, y, *gated = ctx.saved_tensors
        g = laid_out_as(dense(g), x)  # else the gradient of a pooling before is copied, at four times the size
        grad_x, grad_max = _eager_backward(g, x, y, ctx.clip_max, ctx.signed)
        grad_gates = x.new_zeros(len(STEP_RATIOS))
        before = 1.0
        for (_, gate, index), product in zip(ctx.chain[1:], reversed(gated), strict=True):
            grad_gates[index] = inner_product(g, product) * before
            before *= gate
        return grad_x, grad_max, grad_gates, None


def gated_quantize(x: Tensor, clip_max: Tensor, gates: Tensor, *, signed: bool) -> Tensor:
    """Clip `x` to the range and round it at the widths whose gates are open; gradients as the module says.

    Gates of exactly 0 or 1 get no gradient: they are the clamped ends of the hard concrete distribution.

    Args:
        x: any shape.
        clip_max: upper end of the range, in the units of `x`, > 0; shape ().
        gates: of the levels 4, 8, 16 and 32, each 0..1; shape (4,).
        signed: whether the range is `-clip_max..clip_max` or `0..clip_max`.

    >>> t = torch.tensor
    >>> gated_quantize(t([-1.0, 0.12, 0.5, 2.0]), t(1.5), t([1.0, 0.0, 0.0, 0.0]), signed=False)
    tensor([0.0000, 0.1000, 0.5000, 1.5000])
    >>> gated_quantize(t([-1.0, 0.12, 0.5, 2.0]), t(1.5), t([0.5, 0.0, 0.0, 0.0]), signed=False)
    tensor([0.0000, 0.0500, 0.5000, 1.5000])
    """
    return _GatedQuantize.apply(x, clip_max, gates, signed)
