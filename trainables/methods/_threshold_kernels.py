"""Quantization at learned thresholds with equal output levels, at a cost that does not grow with the number of levels.

Liu et al. 2022, "Nonuniform-to-uniform quantization" (N2UQ), arXiv:2111.14826. One `autograd.Function` with the
gradients of the paper in closed form, as in `quantize`.

The ends and the middles ("boundaries") of the N segments are sorted, so one number for each element, how many
boundaries lie below it, says both its code and its segment. On a CPU a table finds it: the range is cut into cells so
narrow that none holds two boundaries, and each element gets its place, a number whose whole part is its cell. What the
table holds for the cell is added; the whole part is then the number of boundaries below, for it goes up by one where
the cell's boundary is passed. No sum rounds across it, and an element on a boundary has the boundary's place, so it
stays below; one less than a rounding error (1e-7 of the range in single precision) above may do so too. In the backward
pass the gradients of thresholds and scales follow from two sums over each segment. Elsewhere the straight formulas run,
with a binary search.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainables.quantize import by_number, dense, flattened, laid_out_as

NARROWEST = 1e-3
"""Widths of segments are floored here in the forward pass; at or below it a width has no gradient."""
OUTPUT_RANGE = 2.0
"""What the highest code stands for before the output scale, at every width."""
LANES = 8
"""Partial sums of each segment: adding to one number again and again would wait for each sum."""
MOST_CELLS = 1 << 15
"""A longer table would not stay in the cache; binary search takes its place."""
TINY = 1e-30


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
# On a CPU. Short arrays are numpy's, which takes a fraction of the time for them, and those of all quantizers of a
# network are made together: it is the number of calls that takes the time. There is no compiled twin: the compiler does
# not vectorize the table, and the fused loop is no faster than the passes.


@dataclass(frozen=True)
class Lookup:
    """What the kernels need to know of one quantizer.

    Attributes:
        boundaries: (2N + 1 or more), those beyond are infinite.
        cells: what the table holds for each cell, where the first one begins, cells in a unit; None: too many cells.
        input_scale, level: factor on x, and the value of code 1.
        slopes: of the line, for x, by number of boundaries below, in each lane; (LANES x (2N + 2 or more)).
    """

    boundaries: Tensor
    cells: tuple[Tensor, float, float] | None
    input_scale: float
    level: float
    slopes: Tensor


Prepared = tuple[Tensor, Tensor, Lookup]
"""Where the backward pass leaves its sums, and the tables."""


class _Segments:
    """The segments of several quantizers, a row each, padded to those of the one with the most.

    Args:
        parameters: start, widths, input scale, output scale and q_max of each.
    """

    def __init__(self, parameters: Sequence[Sequence[Tensor]]) -> None:
        numbers = torch.stack([p.detach() for start, _, *others in parameters for p in (start, *others)])
        start, self.input_scale, self.output_scale, self.steps = numbers.numpy().reshape(-1, 4).T[:, :, None]
        given = torch.stack([widths.detach() for _, widths, *_ in parameters]).numpy()[:, : int(self.steps.max())]
        self.used = np.arange(given.shape[1]) < self.steps
        self.trained = self.used & (given > NARROWEST)
        self.widths = np.where(self.used, np.maximum(given, NARROWEST), 0)
        ends = np.concatenate([start, self.widths], axis=1).cumsum(axis=1, dtype=np.float64)  # as torch.cumsum does
        self.ends = ends.astype(given.dtype)
        self.slopes = self.output_scale * OUTPUT_RANGE / self.steps / np.where(self.used, self.widths, np.inf)

    def lookups(self) -> list[Lookup]:
        """One for each quantizer."""
        rows, columns = self.widths.shape
        boundaries = np.empty((rows, 2 * columns + 1), self.ends.dtype)
        boundaries[:, ::2] = self.ends
        np.add(self.ends[:, :-1], self.widths / 2, out=boundaries[:, 1::2])
        used = self.used.repeat(2, axis=1)
        cells = _cell_tables(boundaries, used)
        boundaries[:, 1:][~used] = np.inf
        slopes = np.zeros((rows, LANES, 2 * columns + 2), self.ends.dtype)
        slopes[:, :, 1:-1:2] = slopes[:, :, 2:-1:2] = (self.slopes * self.input_scale)[:, None]
        return [
            Lookup(*row)
            for row in zip(
                torch.from_numpy(boundaries).unbind(),
                cells,
                self.input_scale[:, 0].tolist(),
                (self.output_scale * OUTPUT_RANGE / self.steps)[:, 0].tolist(),
                torch.from_numpy(slopes).flatten(1).unbind(),
                strict=True,
            )
        ]

    def gradients(self, sums: np.ndarray) -> tuple[np.ndarray, ...]:
        """Those of starts, widths, input scales and output scales, by the formulas of `_threshold_gradients`.

        Args:
            sums: of the gradient of the output, and of its product with x, by number of boundaries below; float64,
                (rows, 2, 2 * columns + 2).
        """
        segment, segment_x = (sums[:, :, 1:-1:2] + sums[:, :, 2:-1:2]).swapaxes(0, 1)
        up_to = (self.slopes * segment).cumsum(axis=1)
        inner = self.slopes * (self.input_scale * segment_x - self.ends[:, :-1] * segment)
        inner /= np.where(self.used, self.widths, 1)
        widths = np.where(self.trained, up_to - up_to[:, -1:] - inner, 0)
        codes = np.arange(sums.shape[2]) // 2
        output_scale = OUTPUT_RANGE / self.steps[:, 0] * (sums[:, 0] @ codes)
        return -up_to[:, -1], widths, (self.slopes * segment_x).sum(1), output_scale


def _cell_tables(boundaries: np.ndarray, used: np.ndarray) -> list[tuple[Tensor, float, float] | None]:
    """`Lookup.cells` of each row of boundaries; `used` says which but the first are no padding, which is the last."""
    with np.errstate(invalid="ignore", over="ignore"):  # parameters may be no numbers
        gaps = np.where(used, np.diff(boundaries), np.inf).min(axis=1, keepdims=True)
        per_unit = (1 / np.maximum(gaps, TINY)).astype(boundaries.dtype)
        for _ in range(2):  # at the first try rounding may put two boundaries into one cell
            # Subtracting, then multiplying rounds alike here and in the kernels, which keeps the order.
            origin = boundaries[:, :1] - 1 / per_unit
            places = (boundaries - origin) * per_unit
            cells = places.astype(np.int32)
            apart = ((np.diff(cells) > 0) | ~used).all(axis=1) & (places[:, -1] <= MOST_CELLS)
            per_unit = np.where(apart[:, None], per_unit, 2 * per_unit)
    sizes = np.where(apart, cells[:, -1] + 2, 0)
    first = sizes.cumsum() - sizes
    real = np.concatenate([apart[:, None], used & apart[:, None]], axis=1)
    at = (cells + first[:, None])[real]
    before = np.zeros(sizes.sum() + 1, boundaries.dtype)
    before[at + 1] = 1
    before = before.cumsum()
    before = before[:-1] - before[first].repeat(sizes)
    table = before - (np.arange(len(before)) - first.repeat(sizes))
    table[at] = before[at] + 1 - np.nextafter(places[real], np.inf, dtype=boundaries.dtype)
    tables = torch.from_numpy(table.astype(boundaries.dtype)).split(sizes.tolist())
    rows = zip(tables, origin[:, 0].tolist(), per_unit[:, 0].tolist(), strict=True)
    return [row if found else None for row, found in zip(rows, apart, strict=True)]


def _look_up(x: Tensor, lookup: Lookup) -> tuple[Tensor, Tensor]:
    """The quantized flat `x`, and the number of boundaries below each element."""
    z = x * lookup.input_scale
    if lookup.cells is not None and math.isfinite(float(x.sum())):  # NaN has no cell
        table, origin, per_unit = lookup.cells
        place = z.sub_(origin).mul_(per_unit).clamp_(0, len(table) - 1)
        below = torch.index_select(table, 0, place.to(torch.int32)).add_(place)  # and a fraction
        return torch.mul(below, 0.5, out=place).floor_().mul_(lookup.level), below.to(torch.int16)
    missing = z.isnan()
    below = torch.bucketize(z, lookup.boundaries, out_int32=True).masked_fill_(missing, 0)
    return torch.where(missing, z, (below >> 1).to(z.dtype) * lookup.level), below.to(torch.int16)


@functools.cache
def _lanes(row: int, bins: int) -> Tensor:
    return (torch.arange(row) % LANES * bins).to(torch.int32)


class _Prepare(torch.autograd.Function):
    """Two tensors for each quantizer; they have no values, but their gradients are the sums of `_Segments.gradients`.

    By lane and number of boundaries below, flat.
    """

    @staticmethod
    def forward(ctx: Any, segments: _Segments, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.segments, ctx.like = segments, parameters[1]
        rows, columns = segments.widths.shape
        return tuple(ctx.like.new_empty(LANES * (2 * columns + 2)) for _ in range(2 * rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sums: Tensor) -> tuple[Tensor | None, ...]:
        lanes = torch.stack(sums).view(len(sums) // 2, 2, LANES, -1).sum(2, dtype=torch.float64)
        start, widths, *scales = map(torch.from_numpy, ctx.segments.gradients(lanes.numpy()))
        padded = ctx.like.new_zeros(len(lanes), len(ctx.like))
        padded[:, : widths.shape[1]] = widths
        columns = [part.to(padded.dtype).unbind() for part in (start, padded, *scales)]
        return None, *(part for row in zip(*columns, strict=True) for part in (*row, None))


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: Tensor, sums_x: Tensor, lookup: Lookup) -> Tensor:
        x = dense(x)
        ctx.lookup = lookup
        y, below = _look_up(_elements(x), lookup)
        ctx.save_for_backward(x, below)
        return y.as_strided_(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, below = ctx.saved_tensors
        slopes, flat = ctx.lookup.slopes, _elements(laid_out_as(g, x))
        row = math.gcd(len(below), 1024)
        place = (below.view(-1, row) + _lanes(row, len(slopes) // LANES)).view(-1)
        grad_x = torch.index_select(slopes, 0, place).mul_(flat)
        sums = (torch.bincount(place, weights, minlength=len(slopes)) for weights in (flat, flat * _elements(x)))
        return grad_x.as_strided_(x.shape, x.stride()), *sums, None


def _elements(x: Tensor) -> Tensor:
    """Those of a dense tensor in the order of memory, without a copy."""
    return x.as_strided((x.numel(),), (1,))


def prepare(parameters: Sequence[Sequence[Tensor]]) -> list[Prepared]:
    """What `look_up` takes, for several quantizers on a CPU at once.

    Args:
        parameters: start, widths, input scale, output scale and q_max of each, as `threshold_quantize` takes them; all
            widths of one length.
    """
    segments = _Segments(parameters)
    sums = _Prepare.apply(segments, *itertools.chain(*parameters))
    return list(zip(sums[::2], sums[1::2], segments.lookups(), strict=True))


def look_up(x: Tensor, prepared: Prepared) -> Tensor:
    """`threshold_quantize` with what `prepare` made."""
    return _Quantize.apply(x, *prepared)


# ---------------------------------------------------------------------------------------------------------------------


class _ThresholdQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        x = dense(x)
        y, below = _threshold_forward(x if torch.compiler.is_compiling() else flattened(x), *parameters)
        ctx.save_for_backward(x, below, *parameters)
        return y if torch.compiler.is_compiling() else y.as_strided_(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, below, *parameters = ctx.saved_tensors
        g = laid_out_as(g, x)
        if torch.compiler.is_compiling():
            return *_threshold_backward(g, x, below, *parameters), None
        grad_x, *grads = _threshold_backward(flattened(g), flattened(x), below, *parameters)
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
    parameters = (start, widths, input_scale, output_scale, q_max)
    if by_number(x):
        return look_up(x, prepare([parameters])[0])
    return _ThresholdQuantize.apply(x, *parameters)
