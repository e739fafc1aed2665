"""Kernels of SAT and AdaBits: weights normalised by the largest |tanh|, activations clipped with the exact gradient.

Both map their range to 0..1, round there to `2^b` levels by one of three schemes, and map back (Jin et al. 2020,
arXiv:1912.10207, section 3; the scheme `centered` is of their code):

| scheme | value of code k, k = 0..2^b - 1 | code of x in 0..1 |
|---|---|---|
| `original` | `k / (2^b - 1)` | `round((2^b - 1) x)`, half to even |
| `modified` | `k / 2^b` | `floor(2^b x)`, at most `2^b - 1` |
| `centered` | `(k + 1/2) / 2^b` | the same |

On 0..1 `centered` is what the authors' page calls centered asymmetric, on -1..1 (`2 q((x + 1) / 2) - 1`) centered
symmetric. The codes of `modified` and `centered` are nested: those of fewer bits are the first bits of those of more.
From `FLOAT_CODES` codes on nothing is rounded. Structure and layout of the kernels: `quantize`.
"""

from collections.abc import Callable
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

Scheme = Literal["original", "modified", "centered"]
SCHEMES: tuple[Scheme, ...] = ("original", "modified", "centered")
FLOAT_CODES = 2.0**32 - 1
"""Largest code of 32 bits, which stand for no quantization."""

Kernel = Callable[..., Any]


def _for_each_scheme(kernel: Kernel) -> dict[str, Kernel]:
    """The kernel with its first argument bound, under names of their own, for the compiler's cache."""

    def bound(scheme: Scheme) -> Kernel:
        def call(*tensors: Tensor) -> Any:
            return kernel(scheme, *tensors)

        call.__name__ = f"{kernel.__name__}_{scheme}"
        return call

    return {scheme: bound(scheme) for scheme in SCHEMES}


def _round_unit(scheme: Scheme, x: Tensor, q_max: Tensor) -> Tensor:
    """The levels of `x`, clipped to 0..1 first."""
    if scheme == "original":
        rounded = (x.clamp(0, 1) * q_max).round() / q_max
    else:
        code = torch.minimum((x.clamp(0, 1) * (q_max + 1)).floor(), q_max)
        rounded = (code + 0.5 if scheme == "centered" else code) / (q_max + 1)
    return torch.where(q_max >= FLOAT_CODES, x.clamp(0, 1), rounded)


class _UnitLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q_max: Tensor, scheme: Scheme) -> Tensor:
        return _round_unit(scheme, x, q_max)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, None


def unit_levels(x: Tensor, q_max: Tensor, *, scheme: Scheme) -> Tensor:
    """Round `x` to the levels of a scheme, with the gradient of the identity.

    Args:
        x: any shape, within 0..1.
        q_max: largest code, `2^bits - 1`; shape ().
        scheme: `original`, `modified` or `centered`.

    >>> unit_levels(torch.tensor([0.0, 0.3, 0.6, 1.0]), torch.tensor(3.0), scheme="centered")
    tensor([0.1250, 0.3750, 0.6250, 0.8750])
    """
    return _UnitLevels.apply(x, q_max, scheme)


def _affine(scheme: Scheme, codes: float) -> tuple[float, float]:
    """Distance of the levels on 0..1, and the lowest one."""
    if scheme == "original":
        return 1 / codes, 0.0
    step = 1 / (codes + 1)
    return step, step / 2 if scheme == "centered" else 0.0


def _to_levels(scheme: Scheme, x: Tensor, codes: float, low: float, high: float) -> Tensor:
    """`x` on `low..high` rounded to the levels there; the same as `_round_unit`, by numbers, with the fewest passes."""
    if codes >= FLOAT_CODES:
        return x.clamp(low, high)
    step, lowest = (value * (high - low) for value in _affine(scheme, codes))
    y = x.mul(1 / step)
    if low:
        y.add_(-low / step)
    y.clamp_(0, codes)
    y = y.round_() if scheme == "original" else y.floor_()
    y.mul_(step)
    return y.add_(low + lowest) if low + lowest else y


# ---------------------------------------------------------------------------------------------------------------------
# Weights: normalised, then rounded


def _normalise(w: Tensor) -> tuple[Tensor, Tensor]:
    t = w.tanh()
    largest = t.abs().max().clamp_min(SMALLEST_SCALE)
    return t / largest, largest


def _normalise_backward(g: Tensor, u: Tensor, largest: Tensor) -> Tensor:
    tied = torch.where(u.abs() >= 1, u, 0.0)  # those that are the maximum, else 0
    through = (g * u).sum() / (tied * tied).sum().clamp_min(1)
    t = u * largest
    return (g - tied * through) / largest * (1 - t * t)


def _normalise_by_number(w: Tensor) -> tuple[Tensor, float]:
    t = w.tanh()
    smallest, greatest = t.aminmax()
    largest = max(-float(smallest), float(greatest), SMALLEST_SCALE)
    return t.div_(largest), largest


def _normalise_backward_by_number(g: Tensor, u: Tensor, largest: float) -> Tensor:
    tied = u.abs().ge_(1).mul_(u)
    through = float(inner_product(g, u)) / max(1.0, float(inner_product(tied, tied)))
    return torch.ops.aten.tanh_backward(tied.mul_(-through).add_(g).div_(largest), u * largest)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        w = dense(w)
        ctx.by_number = by_number(w) and not compilable()
        if ctx.by_number:
            u, ctx.largest = _normalise_by_number(w)
            ctx.save_for_backward(u)
            return u
        if compilable():
            u, largest = run_compiled(_normalise, flattened(w))
            u = u.as_strided_(w.shape, w.stride())
        else:
            u, largest = _normalise(w)
        ctx.save_for_backward(u, largest)
        return u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        u, *largest = ctx.saved_tensors
        g = laid_out_as(g, u)
        if ctx.by_number:
            return _normalise_backward_by_number(g, u, ctx.largest)
        if compilable():
            return run_elementwise(_normalise_backward, g, flattened(u), *largest)
        return _normalise_backward(g, u, *largest)


def normalise(w: Tensor) -> Tensor:
    """`t / m` with `t = tanh(w)` and `m = max |t|` over the tensor, -1..1 (SAT, equation 2); zeros stay zero.

    The gradient flows through the tanh and the maximum, which those that tie for it share.

    Args:
        w: any shape.
    """
    return _Normalise.apply(w)


def _round_signed(scheme: Scheme, u: Tensor, q_max: Tensor) -> Tensor:
    return 2 * _round_unit(scheme, u / 2 + 0.5, q_max) - 1


_ROUND_SIGNED = _for_each_scheme(_round_signed)


def factor_for(y: Tensor, target: Tensor) -> Tensor:
    """What gives `y` the standard deviation `target`; 1 where all of `y` is equal."""
    spread = y.std()
    return torch.where(spread > 0, target / spread, 1.0)


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, q_max: Tensor, target: Tensor | None, scheme: Scheme) -> Tensor:
        u = dense(u)
        if compilable():
            y = run_elementwise(_ROUND_SIGNED[scheme], u, q_max)
        elif by_number(u):
            y = _to_levels(scheme, u, float(q_max), -1.0, 1.0)
        else:
            y = _round_signed(scheme, u, q_max)
        ctx.scaled = target is not None
        if target is None:
            return y
        factor = factor_for(y, target)
        ctx.save_for_backward(factor)
        return y.mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g * ctx.saved_tensors[0] if ctx.scaled else g, None, None, None


def round_weight(u: Tensor, q_max: Tensor, target: Tensor | None, *, scheme: Scheme) -> Tensor:
    """`s * (2 q((u + 1) / 2) - 1)` (SAT, equations 1 and 5), with gradient s: the rounding is the identity for it.

    Args:
        u: normalised weights, -1..1, any shape.
        q_max: largest code, `2^bits - 1`; `FLOAT_CODES` rounds nothing; shape ().
        target: standard deviation of the result (`s = target / std`, unbiased, a constant); None: `s = 1`.
        scheme: `original`, `modified` or `centered`.

    >>> round_weight(torch.tensor([-1.0, 0.0, 0.4, 1.0]), torch.tensor(3.0), None, scheme="modified")
    tensor([-1.0000,  0.0000,  0.0000,  0.5000])
    """
    return _RoundWeight.apply(u, q_max, target, scheme)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, target: Tensor) -> Tensor:
        factor = factor_for(w, target)
        ctx.save_for_backward(factor)
        return w * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        return g * factor, None


def rescale_weight(w: Tensor, target: Tensor | None) -> Tensor:
    """`s * w` with the standard deviation `target` (None: `w`); s is a constant for the gradient."""
    return w if target is None else _Rescale.apply(w, target)


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def _clip(scheme: Scheme, x: Tensor, bound: Tensor, low: Tensor, q_max: Tensor, passes: Tensor) -> Tensor:
    span = bound - low
    return torch.where(passes, x, _round_unit(scheme, (x - low) / span, q_max) * span + low)


def _clip_backward(
    g: Tensor, x: Tensor, y: Tensor, bound: Tensor, low: Tensor, passes: Tensor
) -> tuple[Tensor, Tensor]:
    grad = torch.where(passes | ((x > low) & (x < bound)), g, 0.0)
    return grad, (g * y - grad * x).sum() / bound


_CLIP = _for_each_scheme(_clip)


def _bounds(clip_max: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    bound = clip_max.detach().abs().clamp_min(SMALLEST_SCALE)
    return bound, -bound if signed else torch.zeros_like(bound)


class _CalibratedClip(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, clip_max: Tensor, q_max: Tensor, passes: Tensor | None, scheme: Scheme, signed: bool
    ) -> Tensor:
        x = dense(x)
        ctx.signed = signed
        if passes is None:  # by number
            bound = max(abs(float(clip_max)), SMALLEST_SCALE)
            y = _to_levels(scheme, x, float(q_max), -bound if signed else 0.0, bound)
        elif compilable():
            y = run_elementwise(_CLIP[scheme], x, *_bounds(clip_max, signed), q_max, passes)
        else:
            y = _clip(scheme, x, *_bounds(clip_max, signed), q_max, passes)
        ctx.save_for_backward(x, y, clip_max, passes)  # x and y cost nothing: their neighbours keep them, too
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, clip_max, passes = ctx.saved_tensors
        g = laid_out_as(g, x)
        if passes is None:
            bound = max(abs(float(clip_max)), SMALLEST_SCALE)
            grad = torch.ops.aten.hardtanh_backward(g, x, -bound if ctx.signed else 0.0, bound)
            grad_bound = (inner_product(g, y) - inner_product(grad, x)) / bound
        elif compilable():
            bounds = _bounds(clip_max, ctx.signed)
            grad, grad_bound = run_compiled(_clip_backward, flattened(g), flattened(x), flattened(y), *bounds, passes)
            grad = grad.as_strided_(x.shape, x.stride())
        else:
            grad, grad_bound = _clip_backward(g, x, y, *_bounds(clip_max, ctx.signed), passes)
        return grad, grad_bound * clip_max.sign(), None, None, None, None


def calibrated_clip(
    x: Tensor, clip_max: Tensor, q_max: Tensor, *, scheme: Scheme, signed: bool, clip_float: bool = False
) -> Tensor:
    """PACT with the gradient of its own formula (SAT, section 3.3): clip to 0..A and round, `A = |clip_max|`.

    With `y` the result, the gradient for `x` is that of `y` strictly inside the range, else 0; for A it is
    `y / A - x / A` inside and `y / A` outside, so that the rounding error counts, which the paper of PACT neglects.

    Args:
        x: any shape.
        clip_max: upper bound (alpha), in the units of `x`, of either sign; shape ().
        q_max: largest code, `2^bits - 1`; `FLOAT_CODES` rounds nothing; shape ().
        scheme: `original`, `modified` or `centered`; the last has no zero.
        signed: the range is -A..A with the same number of codes (double-sided in the authors' code).
        clip_float: with `FLOAT_CODES`, clip nevertheless.

    >>> t = torch.tensor
    >>> calibrated_clip(t([-1.0, 0.4, 0.6, 9.0]), t(1.5), t(3.0), scheme="original", signed=False)
    tensor([0.0000, 0.5000, 0.5000, 1.5000])
    """
    if by_number(x) and not compilable():
        if float(q_max) >= FLOAT_CODES and not clip_float:
            return x
        return _CalibratedClip.apply(x, clip_max, q_max, None, scheme, signed)
    passes = q_max >= (float("inf") if clip_float else FLOAT_CODES)
    return _CalibratedClip.apply(x, clip_max, q_max, passes, scheme, signed)
