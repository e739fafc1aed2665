"""Quantizer primitives: forward and backward of each published formula, as kernels over plain tensors.

Every function here maps a float tensor to the float tensor that its integer codes stand for ("fake quantization"), with
the gradient that the paper gives, not the one of the rounding. Widths arrive as tensors (`q_min`, `q_max`, `steps`), so
that one graph serves every width.

A formula is a pair of kernels (forward, backward) called from one `autograd.Function`. The kernels exist twice: eager,
written with the fewest passes over memory, and compiled by `torch.compile` from the straight formula, one fused pass
each. `use_compiled` chooses for the whole process. Rounding is half to even everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST_SCALE = 1e-8
"""Scales are floored here in the forward pass; nothing in LSQ keeps its step size positive."""

_compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
_use_compiled = False


def use_compiled(on: bool) -> None:
    """Choose compiled (True) or eager (False) kernels for this process, from the next call on."""
    global _use_compiled
    _use_compiled = on


def graphs_compiled() -> int:
    """How many graphs `torch.compile` has made in this process so far; it must not grow from trial to trial."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def run_compiled(kernel: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call the compiled twin of `kernel`; made on first use, with the sizes as symbols."""
    if kernel not in _compiled:
        _compiled[kernel] = torch.compile(kernel, dynamic=True, fullgraph=True)
    return _compiled[kernel](*tensors)


def flattened(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, without a copy: one graph for every rank and layout.

    An alias made by `set_` rather than a view: the compiler would guard on the shape that a view was taken from.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), (x.numel(),), (1,))  # type: ignore[call-overload]


def dense(x: Tensor) -> Tensor:
    """`x` itself if its elements fill its memory without gaps, else a copy that does."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def laid_out_as(g: Tensor, x: Tensor) -> Tensor:
    """`g` with the strides of `x`, so that both can be read in the order of memory."""
    return g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of the same shape, without a temporary."""
    return torch.dot(flattened(laid_out_as(dense(a), b)), flattened(b))


def run_elementwise(kernel: Callable[..., Any], x: Tensor, *others: Tensor) -> Tensor:
    """Call the compiled `kernel` on the flat `x`; the result has the shape and layout of `x`."""
    return run_compiled(kernel, flattened(x), *others).as_strided_(x.shape, x.stride())


def compilable() -> bool:
    """Whether to call compiled kernels: asked for, and not already inside a compiled model, which fuses by itself."""
    return _use_compiled and not torch.compiler.is_compiling()


def by_number(x: Tensor) -> bool:
    """Whether to read scalars as Python numbers: it takes ATen's vectorised path on a CPU, and would break a graph."""
    return x.is_cpu and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------------------------------
# Uniform quantization with a learned scale (LSQ)


def codes(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    """Integer codes of `x`: `round(clip(x / scale, q_min, q_max))`, as floats of the dtype of `x`."""
    return torch.clamp(x / scale.clamp_min(SMALLEST_SCALE), q_min, q_max).round()


def _lsq_forward(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    return codes(x, scale, q_min, q_max) * scale.clamp_min(SMALLEST_SCALE)


def _lsq_terms(g: Tensor, x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient for x, and the summands of the gradient for the scale (before the gradient factor)."""
    v = x / scale.clamp_min(SMALLEST_SCALE)
    inside = (v > q_min) & (v < q_max)
    clipped = torch.clamp(v, q_min, q_max)
    return torch.where(inside, g, 0.0), g * torch.where(inside, v.round() - v, clipped)


def _lsq_backward(
    g: Tensor, x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x, terms = _lsq_terms(g, x, scale, q_min, q_max)
    return grad_x, terms.sum() * factor


def _lsq_forward_eager(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    if by_number(x) and scale.dim() == 0:
        s = max(float(scale), SMALLEST_SCALE)
        return x.div(s).clamp_(float(q_min), float(q_max)).round_().mul_(s)
    return _lsq_forward(x, scale, q_min, q_max)


def _lsq_backward_eager(
    g: Tensor, x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    if scale.dim() > 0:
        grad_x, terms = _lsq_terms(g, x, scale, q_min, q_max)
        return grad_x, terms.sum(dim=tuple(range(1, x.dim())), keepdim=True).view_as(scale) * factor
    if not by_number(x):
        return _lsq_backward(g, x, scale, q_min, q_max, factor)
    low, high = float(q_min), float(q_max)
    v = x.div(max(float(scale), SMALLEST_SCALE))
    grad_x = torch.ops.aten.hardtanh_backward(g, v, low, high)  # g strictly inside the range, else 0, in one pass
    error = torch.ops.aten.hardtanh_backward(v, v, low, high)
    torch.sub(v.clamp_(low, high).round_(), error, out=error)  # round(v) - v inside, the bound outside
    return grad_x, inner_product(g, error) * factor


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, scale, q_min, q_max, factor)
        if compilable() and scale.dim() == 0:
            return run_elementwise(_lsq_forward, x, scale.data, q_min, q_max)
        return _lsq_forward_eager(x, scale, q_min, q_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, q_min, q_max, factor = ctx.saved_tensors
        if compilable() and scale.dim() == 0:
            flat = flattened(laid_out_as(g, x))
            grad_x, grad_scale = run_compiled(_lsq_backward, flat, flattened(x), scale.data, q_min, q_max, factor)
            return grad_x.as_strided_(x.shape, x.stride()), grad_scale, None, None, None
        return *_lsq_backward_eager(g, x, scale, q_min, q_max, factor), None, None, None


def fake_quantize(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor) -> Tensor:
    """Round `x` to multiples of `scale` within `q_min * scale .. q_max * scale`; LSQ, equations 1 to 3.

    The gradient for `x` is 1 strictly inside the range and 0 elsewhere; for the scale it is `factor` times
    `round(v) - v` inside (v = x / scale), and the bound outside.

    Args:
        x: any shape; channels first when `scale` has more than one entry.
        scale: width of one level, > 0; shape () or (channels, 1, ...).
        q_min: smallest code, reachable; shape ().
        q_max: largest code, reachable; shape ().
        factor: what the gradient of the scale is multiplied by (paper: 1 / sqrt(N * q_max)); shape ().

    >>> t = torch.tensor
    >>> fake_quantize(t([-1.0, 0.24, 0.26, 9.0]), t(0.5), t(-2.0), t(1.0), t(1.0))
    tensor([-1.0000,  0.0000,  0.5000,  0.5000])
    """
    return _FakeQuantize.apply(x, scale, q_min, q_max, factor)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping quantization with a learned or a fixed bound (PACT, DoReFa activations)


def _clip_forward(x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    scale = clip_max.clamp_min(SMALLEST_SCALE) / q_max
    return torch.clamp(x / scale, q_min, q_max).round() * scale


def _clip_terms(g: Tensor, x: Tensor, clip_max: Tensor, clip_min: Tensor) -> tuple[Tensor, Tensor]:
    above, below = x >= clip_max, x < clip_min
    grad_x = torch.where((x > clip_max) | below, 0.0, g)
    return grad_x, torch.where(above, g, torch.where(below, -g, 0.0))


def _clip_backward(g: Tensor, x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> tuple[Tensor, Tensor]:
    clip_max = clip_max.clamp_min(SMALLEST_SCALE)
    clip_min = torch.where(q_min < 0, -clip_max, 0.0)
    grad_x, terms = _clip_terms(g, x, clip_max, clip_min)
    # Below an unsigned range lies 0, which does not move with the bound; below a signed one lies -clip_max.
    unsigned = torch.where(x >= clip_max, g, 0.0)
    return grad_x, torch.where(q_min < 0, terms, unsigned).sum()


def _clip_forward_eager(x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    if by_number(x):
        scale = max(float(clip_max), SMALLEST_SCALE) / float(q_max)
        return x.div(scale).clamp_(float(q_min), float(q_max)).round_().mul_(scale)
    return _clip_forward(x, clip_max, q_min, q_max)


def _clip_backward_eager(g: Tensor, x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> tuple[Tensor, Tensor]:
    if not by_number(x) or float(q_min) < 0:
        return _clip_backward(g, x, clip_max, q_min, q_max)
    clip_max = clip_max.clamp_min(SMALLEST_SCALE)
    grad_max = inner_product(g, (x >= clip_max).to(g.dtype))
    return g.masked_fill((x > clip_max) | (x < 0), 0.0), grad_max


class _ClipQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, clip_max, q_min, q_max)
        if compilable():
            return run_elementwise(_clip_forward, x, clip_max.data, q_min, q_max)
        return _clip_forward_eager(x, clip_max, q_min, q_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, clip_max, q_min, q_max = ctx.saved_tensors
        if compilable():
            flat = flattened(laid_out_as(g, x))
            grad_x, grad_max = run_compiled(_clip_backward, flat, flattened(x), clip_max.data, q_min, q_max)
            return grad_x.as_strided_(x.shape, x.stride()), grad_max, None, None
        return *_clip_backward_eager(g, x, clip_max, q_min, q_max), None, None


def clip_quantize(x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    """Clip `x` to `0..clip_max` and round it to `q_max` equal levels; PACT, equations 1 to 3.

    The gradient for `x` is 1 in `0..clip_max`, both ends included, and 0 elsewhere. The gradient for `clip_max` is 1
    where `x >= clip_max` (at equality both get it, as in the public implementation of the paper). With a negative
    `q_min` the range is `-clip_max..clip_max`, an extension for signed tensors that the paper does not have.

    Args:
        x: any shape.
        clip_max: upper bound (the paper's alpha), in the units of `x`, > 0; shape ().
        q_min: smallest code, 0 or `-q_max`; shape ().
        q_max: largest code, `2^bits - 1`, or `2^(bits-1) - 1` when signed; shape ().
    """
    return _ClipQuantize.apply(x, clip_max, q_min, q_max)


# ---------------------------------------------------------------------------------------------------------------------
# Quantization on the unit interval (DoReFa activations)


def _unit_forward(x: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    return torch.clamp(x * q_max, q_min, q_max).round() / q_max


def _unit_backward(g: Tensor, x: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    return torch.where((x > q_min / q_max) & (x < 1), g, 0.0)


class _UnitQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
        x = dense(x)
        ctx.save_for_backward(x, q_min, q_max)
        if compilable():
            return run_elementwise(_unit_forward, x, q_min, q_max)
        if by_number(x):
            steps = float(q_max)
            return x.mul(steps).clamp_(float(q_min), steps).round_().div_(steps)
        return _unit_forward(x, q_min, q_max)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, q_min, q_max = ctx.saved_tensors
        if compilable():
            return run_elementwise(_unit_backward, laid_out_as(g, x), flattened(x), q_min, q_max), None, None
        if by_number(x):
            return torch.ops.aten.hardtanh_backward(g, x, float(q_min) / float(q_max), 1.0), None, None
        return _unit_backward(g, x, q_min, q_max), None, None


def unit_quantize(x: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    """Clip `x` to 0..1 and round it to `q_max` equal steps; DoReFa-Net, equation 11.

    The gradient is 1 strictly inside the range and 0 elsewhere, both ends included.

    Args:
        x: any shape.
        q_min: smallest code: 0, or `-q_max` for -1..1, an extension for signed tensors that the paper does not have.
        q_max: largest code, `2^bits - 1`, or `2^(bits-1) - 1` when signed; shape ().
    """
    return _UnitQuantize.apply(x, q_min, q_max)


# ---------------------------------------------------------------------------------------------------------------------
# DoReFa weights


def _dorefa_forward(w: Tensor, steps: Tensor, keep_scale: Tensor) -> tuple[Tensor, Tensor]:
    t = w.tanh()
    largest = t.abs().max().clamp_min(SMALLEST_SCALE)
    codes = (t / (2 * largest) + 0.5).mul(steps).round()
    many = (2 * codes / steps - 1) * torch.where(keep_scale, largest, 1.0)
    binary = w.sign() * w.abs().mean()
    return torch.where(steps == 1, binary, many), largest


def _dorefa_backward(g: Tensor, w: Tensor, largest: Tensor, steps: Tensor, keep_scale: Tensor) -> Tensor:
    slope = (1 - w.tanh().square()) / torch.where(keep_scale, 1.0, largest)
    return torch.where(steps == 1, g, g * slope)


class _DorefaWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, steps: Tensor, keep_scale: Tensor, through_max: bool) -> Tensor:
        w = dense(w)
        ctx.through_max = through_max
        if compilable():
            y, largest = run_compiled(_dorefa_forward, flattened(w), steps, keep_scale)
            y = y.as_strided_(w.shape, w.stride())
        else:
            y, largest = _dorefa_forward(w, steps, keep_scale)
        ctx.save_for_backward(w, largest, steps, keep_scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, largest, steps, keep_scale = ctx.saved_tensors
        if compilable():
            grad = run_elementwise(_dorefa_backward, laid_out_as(g, w), flattened(w), largest, steps, keep_scale)
        else:
            grad = _dorefa_backward(g, w, largest, steps, keep_scale)
        if ctx.through_max:
            t = w.tanh()
            at = torch.unravel_index(t.abs().argmax(), t.shape)  # in any layout
            through = -t[at].sign() * (g * t).sum() / largest**2 * (1 - t[at] ** 2)
            grad[at] += torch.where(steps == 1, 0.0, through)
        return grad, None, None, None


def dorefa_weight(w: Tensor, steps: Tensor, *, variant: str = "A") -> Tensor:
    """Weights of DoReFa-Net (Zhou et al. 2016, equation 9): `2 * round(steps * (t / 2m + 1/2)) / steps - 1`.

    Here `t = tanh(w)` and `m = max |t|` over the tensor. One bit (`steps` = 1) is `sign(w) * mean |w|` with the
    gradient passed unchanged (equation 7); exact zeros stay zero, as published.

    Args:
        w: any shape.
        steps: number of steps between the levels, `2^bits - 1`; shape ().
        variant: `A` treats m as a constant (gradient `(1 - t^2) / m`); `B` lets the gradient flow through m too, as the
            authors' TensorFlow code does; `C` multiplies the result by m, which keeps the scale of the float weights
            (gradient `1 - t^2`), as a widely used PyTorch implementation does.
    """
    keep_scale = torch.tensor(variant == "C", device=w.device)
    return _DorefaWeight.apply(w, steps, keep_scale, variant == "B")
