"""Quantization at learned thresholds with equal output levels, at a cost that does not grow with the number of levels.

Liu et al. 2022, "Nonuniform-to-uniform quantization" (N2UQ), arXiv:2111.14826. One `autograd.Function` with the
gradients of the paper in closed form, as in `quantize`.

The ends and the middles ("boundaries") of the N segments are sorted, so one number for each element, how many
boundaries lie below it, says both its code and its segment. On a CPU a table finds it: the range is cut into cells so
narrow that none holds two boundaries, and one comparison within the cell decides. It is exact, because the cell of a
boundary is computed as that of an element, and rounding keeps the order of both. In the backward pass the gradients of
thresholds and scales follow from two sums over each segment. Elsewhere the straight formulas run, with a binary search.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainables.quantize import _by_number, _dense, _flat, _laid_out_as

NARROWEST = 1e-3
"""Widths of segments are floored here in the forward pass; at or below it a width has no gradient."""
OUTPUT_RANGE = 2.0
"""What the highest code stands for before the output scale, at every width."""
LANES = 8
"""Partial sums of each segment: adding to one number again and again would wait for each sum."""
MOST_CELLS = 1 << 15
"""A longer table would not stay in the cache; binary search takes its place."""
TINY = 1e-30

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""For x, start, widths, input scale and output scale."""


def knots(start: Tensor, widths: Tensor, q_max: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the segments d_0..d_N, and the thresholds t_1..t_N in their middles, both rising; N = `q_max`.

    Args:
        start: d_0, the paper's s; shape ().
        widths: of the segments, the paper's a; floored at `NARROWEST`; shape (N or more,), the rest is not read.
        q_max: number of segments and highest code; shape ().
    """
    floored = widths[: int(q_max)].clamp_min(NARROWEST)
    ends = torch.cat([start.reshape(1), floored]).cumsum(0)
    return ends, ends[:-1] + floored / 2


def _boundaries(start: Tensor, widths: Tensor, q_max: Tensor) -> Tensor:
    """d_0, t_1, d_1, t_2, .. d_N; beyond the last of a longer `widths` infinity. Shape (2 * len(widths) + 1,)."""
    used = torch.arange(len(widths), device=widths.device) < q_max
    floored = widths.clamp_min(NARROWEST)
    ends = torch.cat([start.reshape(1), floored]).cumsum(0)
    pairs = torch.stack([ends[:-1] + floored / 2, ends[1:]], dim=1)
    return torch.cat([ends[:1], torch.where(used[:, None], pairs, math.inf).flatten()])


# ---------------------------------------------------------------------------------------------------------------------
# The straight formulas


def _threshold_forward(
    x: Tensor, start: Tensor, widths: Tensor, input_scale: Tensor, output_scale: Tensor, q_max: Tensor
) -> tuple[Tensor, Tensor]:
    """The quantized `x`, and the number of boundaries below each element."""
    z = x * input_scale
    below = torch.bucketize(z, _boundaries(start, widths, q_max), out_int32=True)
    below = torch.where(z.isnan(), 0, below)
    y = (below // 2) * (output_scale * OUTPUT_RANGE / q_max)
    return torch.where(z.isnan(), z, y), below.to(torch.int16)


def _threshold_gradients(
    sums: Tensor,
    sums_x: Tensor,
    start: Tensor,
    widths: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    q_max: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Slope by number of boundaries below, and the gradients of start, widths, input scale and output scale.

    Args:
        sums: of the gradient of the output, by number of boundaries below; shape (2 * len(widths) + 2,).
        sums_x: the same of the gradient times x.
    """
    step = OUTPUT_RANGE / q_max
    floored = widths.clamp_min(NARROWEST)
    used = torch.arange(len(widths), device=widths.device) < q_max
    slope = torch.where(used, output_scale * step / floored, 0.0)
    left = torch.cat([start.reshape(1), floored]).cumsum(0)[:-1]
    segment, segment_x = sums[1:-1].view(-1, 2).sum(1), sums_x[1:-1].view(-1, 2).sum(1)
    through = slope * segment
    inner = slope / floored * (input_scale * segment_x - left * segment)
    to_the_right = through.sum() - through.cumsum(0)
    grad_widths = torch.where(used & (widths > NARROWEST), -inner - to_the_right, 0.0)
    codes = torch.arange(len(sums), device=sums.device) // 2
    by_below = torch.cat([slope.new_zeros(1), slope.repeat_interleave(2), slope.new_zeros(1)])
    return by_below, -through.sum(), grad_widths, (slope * segment_x).sum(), step * (sums * codes).sum()


def _threshold_backward(
    g: Tensor,
    x: Tensor,
    below: Tensor,
    start: Tensor,
    widths: Tensor,
    input_scale: Tensor,
    output_scale: Tensor,
    q_max: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    index = below.flatten().to(torch.int64)
    zeros = torch.zeros(2 * len(widths) + 2, dtype=torch.float64, device=x.device)
    sums = zeros.index_add(0, index, g.flatten().double())
    sums_x = zeros.index_add(0, index, (g.double() * x).flatten())
    parameters = [p.double() for p in (start, widths, input_scale, output_scale, q_max)]
    by_below, *grads = _threshold_gradients(sums, sums_x, *parameters)
    grad_x = g * (by_below * parameters[2]).to(g.dtype)[index].view(g.shape)
    return grad_x, *(grad.to(x.dtype) for grad in grads)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# On a CPU. Short arrays are numpy's, which takes a fraction of the time for them. There is no compiled twin: the
# compiler does not vectorize the table, and the fused loop is no faster than the passes.


@dataclass(frozen=True)
class _Segments:
    """What the kernels need to know of one quantizer, as numbers; 2N + 2 bins count the boundaries below."""

    steps: int
    ends: np.ndarray
    widths: np.ndarray
    input_scale: float
    output_scale: float

    @property
    def bins(self) -> int:
        return 2 * self.steps + 2

    @property
    def slopes(self) -> np.ndarray:
        """Rise of the line over each segment, float64."""
        return self.output_scale * OUTPUT_RANGE / self.steps / self.widths.astype(np.float64)

    def boundaries(self) -> np.ndarray:
        """As `_boundaries`, without the infinite ones."""
        found = np.empty(2 * self.steps + 1, self.ends.dtype)
        found[::2] = self.ends
        np.add(self.ends[:-1], self.widths / 2, out=found[1::2])
        return found


def _segments(start: Tensor, widths: Tensor, input_scale: Tensor, output_scale: Tensor, q_max: Tensor) -> _Segments:
    steps = int(q_max)
    floored = widths.detach().numpy()[:steps]
    ends = np.empty(steps + 1, floored.dtype)
    floored = np.maximum(floored, floored.dtype.type(NARROWEST))
    ends[0], ends[1:] = float(start), floored
    ends[:] = ends.cumsum(dtype=np.float64)  # as torch.cumsum does
    return _Segments(steps, ends, floored, float(input_scale), float(output_scale))


def _cell_table(boundaries: np.ndarray) -> tuple[Tensor, Tensor, float] | None:
    """The boundary in each cell (else infinity), how many lie before it, cells in a unit; None: too many cells."""
    cells_per_unit = 1 / max((boundaries[1:] - boundaries[:-1]).min(), TINY)
    for _ in range(2):  # at the first try rounding may put two boundaries into one cell
        if (boundaries[-1] - boundaries[0]) * cells_per_unit > MOST_CELLS:
            return None
        # Subtracting, then multiplying rounds alike here and in the kernels, which keeps the order.
        cells = ((boundaries - boundaries[0]) * cells_per_unit).astype(np.int32)
        if (cells[1:] > cells[:-1]).all():
            within = np.full(cells[-1] + 2, np.inf, boundaries.dtype)
            within[cells] = boundaries
            before = np.zeros(len(within), boundaries.dtype)
            before[cells + 1] = 1
            return torch.from_numpy(within), torch.from_numpy(before.cumsum()), float(cells_per_unit)
        cells_per_unit = 2 * cells_per_unit
    return None


def _look_up(
    x: Tensor, within: Tensor, before: Tensor, input_scale: float, first: float, cells_per_unit: float, level: float
) -> tuple[Tensor, Tensor]:
    z = x * input_scale
    place = z.sub(first).mul_(cells_per_unit).clamp_(0, len(within) - 1)
    cell = place.to(torch.int32)
    above = torch.index_select(within, 0, cell, out=place)  # memory just written is in the cache
    torch.sub(z, above, out=above).gt_(0)
    below = torch.index_select(before, 0, cell, out=z).add_(above)
    return torch.mul(below, 0.5, out=place).floor_().mul_(level), below.to(torch.int16)


def _forward_on_cpu(x: Tensor, segments: _Segments) -> tuple[Tensor, Tensor]:
    boundaries = segments.boundaries()
    level = segments.output_scale * OUTPUT_RANGE / segments.steps
    table = _cell_table(boundaries)
    if table is not None:
        within, before, cells_per_unit = table
        if math.isfinite(float(x.sum())):  # NaN has no cell
            return _look_up(x, within, before, segments.input_scale, float(boundaries[0]), cells_per_unit, level)
    z = x * segments.input_scale
    missing = z.isnan()
    below = torch.bucketize(z, torch.from_numpy(boundaries), out_int32=True).masked_fill_(missing, 0)
    return torch.where(missing, z, (below >> 1).to(z.dtype) * level), below.to(torch.int16)


@functools.cache
def _lanes(row: int, bins: int) -> Tensor:
    return (torch.arange(row) % LANES * bins).to(torch.int16)


def _backward_on_cpu(g: Tensor, x: Tensor, below: Tensor, segments: _Segments, widths: Tensor) -> Gradients:
    """From the sums on, the formulas of `_threshold_gradients`."""
    bins, slope = segments.bins, segments.slopes
    by_below = np.zeros(bins, segments.ends.dtype)
    by_below[1:-1:2] = by_below[2:-1:2] = slope * segments.input_scale
    grad_x = torch.index_select(torch.from_numpy(by_below), 0, below.to(torch.int32)).mul_(g)
    row = math.gcd(len(below), 1024)
    spread = (below.view(-1, row) + _lanes(row, bins)).view(-1)
    sums, sums_x = (
        torch.bincount(spread, weights, minlength=LANES * bins).numpy().reshape(LANES, bins).sum(0, np.float64)
        for weights in (g, g * x)
    )
    segment, segment_x = sums[1:-1:2] + sums[2:-1:2], sums_x[1:-1:2] + sums_x[2:-1:2]
    up_to = (slope * segment).cumsum()
    inner = slope / segments.widths * (segments.input_scale * segment_x - segments.ends[:-1] * segment)
    grads = np.zeros(len(widths) + 3)
    grads[: segments.steps] = (up_to - up_to[-1] - inner) * (segments.widths > segments.widths.dtype.type(NARROWEST))
    grads[-3:] = -up_to[-1], slope @ segment_x, OUTPUT_RANGE / segments.steps * (sums @ (np.arange(bins) // 2))
    grad_widths, start, input_scale, output_scale = torch.from_numpy(grads).to(x.dtype).split([len(widths), 1, 1, 1])
    return grad_x, start.view(()), grad_widths, input_scale.view(()), output_scale.view(())


# ---------------------------------------------------------------------------------------------------------------------


class _ThresholdQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        x = _dense(x)
        if _by_number(x):
            ctx.segments = _segments(*parameters)
            y, below = _forward_on_cpu(_flat(x), ctx.segments)
        else:
            y, below = _threshold_forward(x if torch.compiler.is_compiling() else _flat(x), *parameters)
        ctx.save_for_backward(x, below, *parameters)
        return y if torch.compiler.is_compiling() else y.as_strided_(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, below, *parameters = ctx.saved_tensors
        g = _laid_out_as(g, x)
        if torch.compiler.is_compiling():
            return *_threshold_backward(g, x, below, *parameters), None
        if _by_number(x):
            grad_x, *grads = _backward_on_cpu(_flat(g), _flat(x), below, ctx.segments, parameters[1])
        else:
            grad_x, *grads = _threshold_backward(_flat(g), _flat(x), below, *parameters)
        return grad_x.as_strided_(x.shape, x.stride()), *grads, None


def threshold_quantize(
    x: Tensor, start: Tensor, widths: Tensor, input_scale: Tensor, output_scale: Tensor, q_max: Tensor
) -> Tensor:
    """Count the thresholds below `input_scale * x`, and map the counts to equal levels; N2UQ, equations 4 to 8.

    Forward: `code = #{i: z > t_i}` with z = `input_scale` * x and t_i the middle of segment i, which is `widths[i]`
    wide (at least `NARROWEST`); the first begins at `start`. The result is `output_scale * 2 / q_max * code`. An
    element on a threshold gets the lower level.

    Backward (the paper's generalized straight-through estimator): as if the result were `output_scale` times the line
    that rises by `2 / q_max` over each segment, 0 below the first and constant above the last, with its gradients for
    x, start, widths and input scale. A width at or below `NARROWEST` gets none. The gradient of the output scale is
    that of the quantized value. NaN stays NaN.

    Args:
        x: any shape.
        start: where the first segment begins (the paper's s), in the units of z; shape ().
        widths: of the segments (a), in the units of z; shape (q_max or more,), the rest is not read.
        input_scale: factor on x (beta1), of either sign; shape ().
        output_scale: factor on the result (beta2), of either sign; shape ().
        q_max: highest code, `2^bits - 1`; shape ().

    >>> t = torch.tensor
    >>> threshold_quantize(t([-1.0, 0.3, 0.4, 1.1, 9.0]), t(0.0), t([0.6, 0.6, 1.0]), t(1.0), t(1.0), t(3.0))
    tensor([0.0000, 0.0000, 0.6667, 1.3333, 2.0000])
    """
    return _ThresholdQuantize.apply(x, start, widths, input_scale, output_scale, q_max)
