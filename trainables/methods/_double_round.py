"""Rounding twice: integer codes of the highest width, from which every lower width is rounded again.

Huang et al. 2025, arXiv:2502.01199, equations 1 to 3 and 13. With the scale s of the highest width h, the low width l
and `ratio = 2^(h-l)`

    high = clip(round(w / s))    low = clip(round(high / ratio))    weights = low * ratio * s

so the codes `high` and one scale hold every width. Rounding is half to even, which matters: high codes are integers,
and a fraction `1 / ratio` of them lies halfway. The first clip changes no weight, since the second one is as tight; it
is made only where codes are stored.

The default gradient is that of the authors' code, LSQ's at the low width: with `r = w / (ratio * s)` it is 1 for the
weights where `q_min <= r <= q_max`, and for the scale `round(r) - r` there and the bound outside, without the factor
`ratio`, so that the lowest width does not rule the scale that all share. `chain` is the exact derivative by s, strict
at the edges: `ratio * (low - r)` inside and `ratio` times the bound outside.
"""

import functools
from typing import Any, Literal

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
    run_elementwise,
)

Ties = Literal["even", "up", "away", "floor"]


def high_codes(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes that are stored: `clip(round(w / scale), -2^(bits-1), 2^(bits-1) - 1)`, int8.

    Args:
        w: weights, any shape.
        scale: > 0; shape () or (channels, 1, ...).
        bits: highest width, 2..8.
    """
    top = 2 ** (bits - 1)
    return (w / scale.clamp_min(SMALLEST_SCALE)).round().clamp(-top, top - 1).to(torch.int8)


def lower_codes(codes: Tensor, high: int, low: int, *, signed: bool = True, ties: Ties = "even") -> Tensor:
    """Codes of `high` bits rounded to `low` bits by shifts, in the integer type given.

    Args:
        codes: integers within the range of `high` bits, any shape.
        high: their width, 1..15.
        low: wanted width, 1..high.
        signed: whether the range is `-2^(bits-1)..2^(bits-1) - 1` or `0..2^bits - 1`.
        ties: where halves go: `even` (the method), `up`, `away` from zero. `floor` does not round: a bare shift.

    >>> lower_codes(torch.tensor([-128, -37, 6, 96, 127]), 8, 4)
    tensor([-8, -2,  0,  6,  7])
    """
    shift = high - low
    if shift == 0:
        return codes
    wide = codes.to(torch.int32)
    low_codes = wide >> shift
    rest, half = wide - (low_codes << shift), 1 << (shift - 1)
    if ties != "floor":
        halves_up = {"even": low_codes % 2 == 1, "up": torch.ones_like(wide, dtype=torch.bool), "away": wide > 0}
        low_codes = low_codes + ((rest > half) | ((rest == half) & halves_up[ties]))
    top = 2 ** (low - 1) if signed else 2**low
    return low_codes.clamp(-top if signed else 0, top - 1).to(codes.dtype)


def double_round(
    w: Tensor,
    scale: Tensor,
    ratio: Tensor,
    q_min: Tensor,
    q_max: Tensor,
    factor: Tensor,
    *,
    chain: bool = False,
    pooled: bool = False,
) -> Tensor:
    """Weights at a low width, by way of the codes of the highest.

    Args:
        w: any shape; channels first when `scale` has more than one entry.
        scale: of the highest width, > 0; shape () or (channels, 1, ...).
        ratio: `2^(highest - width)`; shape ().
        q_min: smallest code at the low width; shape ().
        q_max: largest code at the low width; shape ().
        factor: what the gradient of the scale is multiplied by; shape ().
        chain: the exact derivative instead of the published gradient.
        pooled: give every channel's scale the gradient summed over all channels, as the authors' code does.

    >>> t = torch.tensor
    >>> double_round(t([-3.0, 0.62, 1.27]), t(0.01), t(64.0), t(-2.0), t(1.0), t(1.0))
    tensor([-1.2800,  0.6400,  0.6400])
    """
    return _DoubleRound.apply(w, scale, ratio, q_min, q_max, factor, chain, pooled)


def round_once(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor) -> Tensor:
    """Activations: multiples of `scale` within `q_min..q_max` (equations 4 and 5), both edges inside for the gradient.

    Args: as in `quantize.fake_quantize`, which leaves the edges out.
    """
    return _RoundOnce.apply(x, scale, q_min, q_max, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _round_twice_forward(w: Tensor, scale: Tensor, ratio: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    scale = scale.clamp_min(SMALLEST_SCALE)
    codes = ((w / scale).round() / ratio).round().clamp(q_min, q_max)
    return codes.masked_fill(codes == 0, 0.0) * (scale * ratio)  # no negative zeros: integers have none


def _round_twice_eager(w: Tensor, scale: Tensor, ratio: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    if by_number(w) and scale.dim() == 0:
        s, r = max(float(scale), SMALLEST_SCALE), float(ratio)
        codes = w.div(s).round_()
        if r > 1:  # otherwise the second rounding is the identity
            codes.mul_(1 / r).round_()
        return codes.clamp_(float(q_min), float(q_max)).add_(0.0).mul_(s * r)  # no negative zeros: integers have none
    return _round_twice_forward(w, scale, ratio, q_min, q_max)


def _round_once_forward(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    scale = scale.clamp_min(SMALLEST_SCALE)
    return (x / scale).clamp(q_min, q_max).round() * scale


def _terms(g: Tensor, x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient for x, and the summands of the gradient for the scale (before the gradient factor)."""
    v = x / step
    inside = (v >= q_min) & (v <= q_max)
    return torch.where(inside, g, 0.0), g * torch.where(inside, v.round() - v, v.clamp(q_min, q_max))


def _chain_terms(
    g: Tensor, w: Tensor, scale: Tensor, ratio: Tensor, q_min: Tensor, q_max: Tensor
) -> tuple[Tensor, Tensor]:
    high = w / scale
    v = high / ratio
    inside = (v > q_min) & (v < q_max)
    low = (high.round() / ratio).round().clamp(q_min, q_max)
    return torch.where(inside, g, 0.0), g * torch.where(inside, low - v, v.clamp(q_min, q_max)) * ratio


def _round_backward(
    g: Tensor, x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, terms = _terms(g, x, step, q_min, q_max)
    return grad_x, terms.sum() * factor


@functools.cache
def _beside(edge: float, dtype: torch.dtype, towards: float) -> float:
    """The number next to an edge; next to 0 the smallest that is not denormal, for the sake of speed."""
    tiny = torch.finfo(dtype).tiny
    if edge == 0:
        return tiny if towards > 0 else -tiny
    return float(torch.nextafter(torch.tensor(edge, dtype=dtype), torch.tensor(towards, dtype=dtype)))


def _round_backward_eager(
    g: Tensor, x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """With one step for the whole tensor; in the fewest passes on a CPU, as in `quantize`."""
    if not by_number(x):
        return _round_backward(g, x, step, q_min, q_max, factor)
    low, high = float(q_min), float(q_max)
    below, above = _beside(low, x.dtype, -torch.inf), _beside(high, x.dtype, torch.inf)
    v = x.div(float(step))
    grad_x = torch.ops.aten.hardtanh_backward(g, v, below, above)  # g strictly between, else 0
    error = torch.ops.aten.hardtanh_backward(v, v, below, above)
    torch.sub(v.clamp_(low, high).round_(), error, out=error)  # round(v) - v inside, the bound outside
    return grad_x, inner_product(g, error) * factor


def _per_channel(terms: Tensor, scale: Tensor, pooled: bool) -> Tensor:
    """The gradient of the scale from its summands: a sum a channel, or with `pooled` the sum of all for each."""
    if scale.dim() == 0:
        return terms.sum()
    sums = terms.sum(dim=tuple(range(1, terms.dim())), keepdim=True).view_as(scale)
    return sums.sum().expand_as(scale) if pooled else sums


class _DoubleRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        scale: Tensor,
        ratio: Tensor,
        q_min: Tensor,
        q_max: Tensor,
        factor: Tensor,
        chain: bool,
        pooled: bool,
    ) -> Tensor:
        w = dense(w)
        ctx.chain, ctx.pooled = chain, pooled
        ctx.save_for_backward(w, scale, ratio, q_min, q_max, factor)
        if compilable() and scale.dim() == 0:
            return run_elementwise(_round_twice_forward, w, scale.data, ratio, q_min, q_max)
        return _round_twice_eager(w, scale, ratio, q_min, q_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, scale, ratio, q_min, q_max, factor = ctx.saved_tensors
        floored = scale.clamp_min(SMALLEST_SCALE)
        if ctx.chain:
            grad_w, terms = _chain_terms(g, w, floored, ratio, q_min, q_max)
            grad_scale = _per_channel(terms, scale, ctx.pooled) * factor
        elif scale.dim() > 0:
            grad_w, terms = _terms(g, w, floored * ratio, q_min, q_max)
            grad_scale = _per_channel(terms, scale, ctx.pooled) * factor
        elif compilable():
            grad_w, grad_scale = _round_backward_compiled(g, w, floored * ratio, q_min, q_max, factor)
        else:
            grad_w, grad_scale = _round_backward_eager(g, w, floored * ratio, q_min, q_max, factor)
        return grad_w, grad_scale, None, None, None, None, None, None


class _RoundOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, scale, q_min, q_max, factor)
        if compilable():
            return run_elementwise(_round_once_forward, x, scale.data, q_min, q_max)
        if by_number(x):
            s = max(float(scale), SMALLEST_SCALE)
            return x.div(s).clamp_(float(q_min), float(q_max)).round_().mul_(s)
        return _round_once_forward(x, scale, q_min, q_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, q_min, q_max, factor = ctx.saved_tensors
        backward = _round_backward_compiled if compilable() else _round_backward_eager
        return *backward(g, x, scale.detach().clamp_min(SMALLEST_SCALE), q_min, q_max, factor), None, None, None


def _round_backward_compiled(
    g: Tensor, x: Tensor, step: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, grad_scale = run_compiled(
        _round_backward, flattened(laid_out_as(g, x)), flattened(x), step, q_min, q_max, factor
    )
    return grad_x.as_strided_(x.shape, x.stride()), grad_scale
