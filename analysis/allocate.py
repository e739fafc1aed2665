"""One option for each layer: the least summed sensitivity under limits on bits, size and operations.

An integer program (Yao et al. 2021, HAWQ-V3, arXiv:2011.10680): `scores[l, k]` is what layer l costs in sensitivity
when it takes option k, `amounts[l, k]` what that uses of a resource, and every resource has a limit. An option is
whatever the caller tables: a width, or a pair of a weight and an activation width.

`allocate` solves one such program exactly, with HiGHS. `ladder` solves a whole ladder of budgets of one resource. It
needs no solver: the lower convex hulls of all layers, merged by slope, are the optima of the Lagrangian for every
budget at once (Sinha and Zoltners 1979, the multiple-choice knapsack); the bound that they give leaves few options a
layer that could still improve a budget's solution, and a dynamic program over these finds the best. `alternatives`
forces each layer in turn to other options, as Huang et al. 2025 (arXiv:2502.01199, algorithm 2) do for a pool of nets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

Table = Sequence[Sequence[float]] | np.ndarray
NO_LIMITS: tuple["Limit", ...] = ()
ROUNDING = 1e-9
"""Share of the largest amount by which a sum may miss its bound."""
MOST_LABELS = 20_000
"""Partial solutions that the dynamic program keeps; beyond, the worst are dropped and the reported gap stays open."""


class InfeasibleError(ValueError):
    """No choice of options meets the limits."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on the summed amounts of a resource.

    Attributes:
        name: for messages, such as `size_bytes`.
        amounts: what each option of each layer uses, (layers, options).
        at_most: upper bound.
        at_least: lower bound; equal to `at_most` to fix the sum.
    """

    name: str
    amounts: Table
    at_most: float = math.inf
    at_least: float = -math.inf


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A choice of options.

    Attributes:
        options: index of each layer's option, (layers,).
        score: summed sensitivity.
        used: summed amounts, by name of the limit.
        gap: share of the score by which an optimum may lie lower; 0 is proven optimal.
    """

    options: np.ndarray
    score: float
    used: Mapping[str, float]
    gap: float = 0.0


def mean_bits(layers: int, widths: Sequence[int], at_most: float) -> Limit:
    """Limit on the mean over layers of the options' widths in bits."""
    return Limit(name="mean_bits", amounts=np.tile(np.asarray(widths) / layers, (layers, 1)), at_most=at_most)


def size_bytes(weights: Sequence[int], widths: Sequence[int], at_most: float) -> Limit:
    """Limit on the bytes of all codes: weights of each layer times width of each option, over 8."""
    return Limit(name="size_bytes", amounts=np.outer(weights, widths) / 8, at_most=at_most)


def bops(macs: Sequence[int], widths: Sequence[int], activation_widths: Sequence[int], at_most: float) -> Limit:
    """Limit on bit operations: multiply-accumulates of each layer times both widths of each option."""
    products = np.multiply(widths, activation_widths)
    return Limit(name="bops", amounts=np.outer(np.asarray(macs, dtype=float), products), at_most=at_most)


def linear_scores(sensitivities: Sequence[float], widths: Sequence[int], *, printed: bool = False) -> np.ndarray:
    """Scores of Huang et al.: sensitivity times width, whose sum their code maximizes, so negative here.

    Args:
        sensitivities: average Hessian trace of each layer.
        widths: of the options, in bits.
        printed: minimize the sum as their algorithm 2 prints it, which gives sensitive layers the fewest bits.
    """
    return np.outer(sensitivities, widths) * (1 if printed else -1)


def allocate(
    scores: Table, limits: Sequence[Limit] = NO_LIMITS, *, forced: Mapping[int, int] | None = None
) -> Allocation:
    """The options with the least summed score within all limits, exactly.

    Args:
        scores: (layers, options); infinite or NaN where a layer cannot take an option. Rows may differ in length.
        limits: bounds on resources.
        forced: option that a layer must take, by the layer's number.

    Raises:
        InfeasibleError: names the limits that cannot be met, and by how much.
        ValueError: a layer without any option, or tables of other shapes.

    >>> widths = [2, 4, 8]
    >>> best = allocate([[9, 1, 0], [5, 4, 0]], [mean_bits(2, widths, 6)])
    >>> [widths[k] for k in best.options], best.score, best.used
    ([4, 8], 1.0, {'mean_bits': 6.0})
    """
    program = _Program(scores, limits)
    for layer, option in (forced or {}).items():
        program.legal[layer] &= np.arange(program.legal.shape[1]) == option
    program.check_layers()
    return program.solved()


def alternatives(scores: Table, limits: Sequence[Limit]) -> tuple[list[Allocation], int]:
    """The best choice, then those with one layer forced to another option, in order of discovery, each once.

    Options must be in ascending order of width. Forced are those below the highest in use; if all layers have the same
    option, nothing is.

    Returns:
        the allocations, and how many forced programs were infeasible.
    """
    best = allocate(scores, limits)
    found = {tuple(best.options.tolist()): best}
    infeasible = 0
    if len(set(best.options.tolist())) > 1:
        for layer, taken in enumerate(best.options):
            for option in range(int(best.options.max())):
                if option != taken:
                    try:
                        other = allocate(scores, limits, forced={layer: option})
                    except InfeasibleError:
                        infeasible += 1
                        continue
                    found.setdefault(tuple(other.options.tolist()), other)
    return list(found.values()), infeasible


def ladder(
    scores: Table,
    limit: Limit,
    budgets: Sequence[float],
    *,
    others: Sequence[Limit] = NO_LIMITS,
    gap: float = 0.0,
) -> list[Allocation]:
    """The best options under each of several budgets of one resource: the Pareto set of score and amount.

    Args:
        scores: as in `allocate`.
        limit: the resource; its bounds are not read.
        budgets: upper bounds of its sum, in any order.
        others: further limits. A budget at which they bind is solved by `allocate`.
        gap: share of a score that need not be proven optimal; 0 looks on until it is.

    Raises:
        InfeasibleError: a budget, or another limit, that cannot be met.
        ValueError: as in `allocate`.
    """
    program = _Program(scores, [replace(limit, at_most=math.inf, at_least=-math.inf), *others])
    program.check_layers()
    hulls = _Hulls(program)
    found = []
    for budget in budgets:
        bounded = replace(limit, at_most=budget, at_least=-math.inf)
        reach = budget + program.slacks[0]
        if reach < hulls.least:
            raise InfeasibleError(program.unmet_alone([bounded]))
        allocation = program.allocation(*hulls.best(reach, gap))
        if not program.fits(allocation):
            allocation = allocate(scores, [bounded, *others])
        found.append(allocation)
    return found


class _Program:
    """Scores and amounts as full tables, with a mask of what is legal."""

    def __init__(self, scores: Table, limits: Sequence[Limit]) -> None:
        self.scores = _padded(scores, math.nan)
        self.legal = np.isfinite(self.scores)
        self.scores = np.where(self.legal, self.scores, 0.0)
        self.limits = list(limits)
        self.amounts = [_padded(limit.amounts, 0.0) for limit in limits]
        for limit, amounts in zip(limits, self.amounts, strict=True):
            if amounts.shape != self.scores.shape:
                raise ValueError(f"amounts of {limit.name} have shape {amounts.shape}: scores have {self.scores.shape}")
            if not np.isfinite(amounts[self.legal]).all():
                raise ValueError(f"amounts of {limit.name} hold a value that is not finite: give numbers")
        # Sums of floats, such as thirds of bits, may miss a bound by a rounding error.
        self.slacks = [ROUNDING * float(np.abs(amounts).max(initial=0.0)) for amounts in self.amounts]

    def check_layers(self) -> None:
        empty = np.flatnonzero(~self.legal.any(axis=1))
        if len(empty):
            raise ValueError(f"layer {empty[0]} has no legal option: give it a finite score for one of its widths")

    def allocation(self, options: np.ndarray, gap: float = 0.0) -> Allocation:
        rows = np.arange(len(options))
        used = {
            limit.name: float(amounts[rows, options].sum())
            for limit, amounts in zip(self.limits, self.amounts, strict=True)
        }
        return Allocation(options=options, score=float(self.scores[rows, options].sum()), used=used, gap=gap)

    def fits(self, allocation: Allocation) -> bool:
        """Whether the bounds of all limits are kept."""
        return all(
            limit.at_least - slack <= allocation.used[limit.name] <= limit.at_most + slack
            for limit, slack in zip(self.limits, self.slacks, strict=True)
        )

    def solved(self) -> Allocation:
        """By HiGHS, whose tolerances are absolute: rows and scores are scaled, and the answer is checked."""
        at_most = [limit.at_most for limit in self.limits]
        at_least = [limit.at_least for limit in self.limits]
        for _ in range(10):
            options = self._minimized(at_most, at_least)
            if options is None:
                raise InfeasibleError(self.unmet_alone(self.limits) or self._unmet_together())
            allocation = self.allocation(options)
            if self.fits(allocation):
                return allocation
            for i, limit in enumerate(self.limits):
                used = allocation.used[limit.name]
                at_most[i] -= max(0.0, used - limit.at_most)
                at_least[i] += max(0.0, limit.at_least - used)
        raise InfeasibleError(f"limits {[limit.name for limit in self.limits]} are too tight to be met in float64")

    def _minimized(self, at_most: Sequence[float], at_least: Sequence[float]) -> np.ndarray | None:
        rows = [self.amounts[i][self.legal] for i in range(len(self.limits))]
        costs = self.scores - self.scores.min(axis=1, where=self.legal, initial=math.inf)[:, None]
        answer = self._program(costs[self.legal], rows, at_most, at_least, elastic=False)
        return None if answer.x is None else self._options(answer.x)

    def _options(self, x: np.ndarray) -> np.ndarray:
        taken = np.zeros(self.legal.shape)
        taken[self.legal] = x[: int(self.legal.sum())]
        return taken.argmax(axis=1)

    def _program(
        self,
        costs: np.ndarray,
        rows: list[np.ndarray],
        at_most: Sequence[float],
        at_least: Sequence[float],
        *,
        elastic: bool,
    ) -> Any:
        """Minimize; with `elastic`, every limit may be missed at a price, and nothing else costs anything."""
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        layer, count = np.nonzero(self.legal)[0], len(costs)
        one_each = sparse.csr_array((np.ones(count), (layer, np.arange(count))), shape=(len(self.legal), count))
        scales = [max(float(np.abs(row).max()), 1e-300) for row in rows]
        slacks = 2 * len(rows) if elastic else 0
        cost = np.concatenate([np.zeros(count), np.ones(slacks)]) if elastic else costs / max(costs.max(), 1e-300) * 1e4
        constraints = [LinearConstraint(sparse.hstack([one_each, sparse.csr_array((len(self.legal), slacks))]), 1, 1)]
        for i, (row, scale) in enumerate(zip(rows, scales, strict=True)):
            missed = np.zeros(slacks)
            if elastic:
                missed[2 * i : 2 * i + 2] = (-1.0, 1.0)
            tight = np.concatenate([row / scale * 1e3, missed])
            constraints.append(LinearConstraint(tight, at_least[i] / scale * 1e3, at_most[i] / scale * 1e3))
        whole = np.concatenate([np.ones(count), np.zeros(slacks)])
        bounds = Bounds(0, np.where(whole, 1.0, np.inf))
        return milp(cost, integrality=whole, bounds=bounds, constraints=constraints, options={"mip_rel_gap": 0.0})

    def unmet_alone(self, limits: Sequence[Limit]) -> str:
        """Which limits no choice meets even by themselves, and by how much; empty if all can be met."""
        faults = []
        for limit, amounts, slack in zip(limits, self.amounts, self.slacks, strict=False):
            least = float(amounts.min(axis=1, where=self.legal, initial=math.inf).sum())
            most = float(amounts.max(axis=1, where=self.legal, initial=-math.inf).sum())
            if least > limit.at_most + slack:
                over = least - limit.at_most
                faults.append(f"{limit.name} <= {limit.at_most:g}: the least possible is {least:g}, {over:g} more")
            if most < limit.at_least - slack:
                under = limit.at_least - most
                faults.append(f"{limit.name} >= {limit.at_least:g}: the most possible is {most:g}, {under:g} less")
        return "; ".join(faults)

    def _unmet_together(self) -> str:
        """By how much the choice that misses the limits least, in units of their largest amounts, misses each."""
        rows = [amounts[self.legal] for amounts in self.amounts]
        at_most, at_least = ([getattr(limit, end) for limit in self.limits] for end in ("at_most", "at_least"))
        answer = self._program(np.zeros(int(self.legal.sum())), rows, at_most, at_least, elastic=True)
        used = self.allocation(self._options(answer.x)).used
        faults = []
        for limit in self.limits:
            if used[limit.name] > limit.at_most:
                faults.append(f"{limit.name} <= {limit.at_most:g} by {used[limit.name] - limit.at_most:g}")
            if used[limit.name] < limit.at_least:
                faults.append(f"{limit.name} >= {limit.at_least:g} by {limit.at_least - used[limit.name]:g}")
        return f"the limits cannot be met together: the nearest choice misses {' and '.join(faults)}"


class _Hulls:
    """Lower convex hulls of (amount, score) of all layers, merged into one path by slope.

    Attributes:
        least: smallest sum of amounts.
    """

    def __init__(self, program: _Program) -> None:
        self.scores = np.where(program.legal, program.scores, np.inf)
        self.amounts = np.where(program.legal, program.amounts[0], np.inf)
        hulls = [_hull(amounts, scores) for amounts, scores in zip(self.amounts, self.scores, strict=True)]
        self.start = np.array([hull[0] for hull in hulls])
        self.rows = np.arange(len(hulls))
        moves = [(layer, a, b) for layer, hull in enumerate(hulls) for a, b in pairwise(hull)]
        self.layer, before, self.after = np.array(moves, dtype=int).reshape(-1, 3).T
        more = self.amounts[self.layer, self.after] - self.amounts[self.layer, before]
        gain = self.scores[self.layer, before] - self.scores[self.layer, self.after]
        order = np.argsort(-gain / more, kind="stable")  # within a layer, hulls are in this order already
        self.layer, self.after, self.more, self.gain = self.layer[order], self.after[order], more[order], gain[order]
        self.least = float(self.amounts[self.rows, self.start].sum())
        self.reached = self.least + np.concatenate([[0.0], np.cumsum(self.more)])

    def best(self, budget: float, gap: float) -> tuple[np.ndarray, float]:
        """Options within the budget, and the share of their score by which they may miss the optimum."""
        moves = int(np.searchsorted(self.reached, budget, side="right")) - 1
        options = self.start.copy()
        np.put(options, self.layer[:moves], self.after[:moves])  # a layer's last move counts
        if moves == len(self.more):
            return options, 0.0
        slope = self.gain[moves] / self.more[moves]
        score = float(self.scores[self.rows, options].sum())
        bound = score - slope * (budget - self.reached[moves])  # of the relaxed program
        options = self._filled(options, budget, moves)
        score = float(self.scores[self.rows, options].sum())
        if score - bound > gap * abs(score):
            options, closed = self._improved(options, budget, slope, bound)
            if closed:
                return options, 0.0
            score = float(self.scores[self.rows, options].sum())
        return options, (score - bound) / max(abs(score), 1e-300)

    def _filled(self, options: np.ndarray, budget: float, moves: int) -> np.ndarray:
        """Spend what is left of the budget on single changes, the largest gain first."""
        options = options.copy()
        left = budget - float(self.amounts[self.rows, options].sum())
        while True:
            extra = self.amounts - self.amounts[self.rows, options][:, None]
            gain = self.scores[self.rows, options][:, None] - self.scores
            gain[extra > left] = -np.inf
            layer, option = np.unravel_index(int(gain.argmax()), gain.shape)
            if gain[layer, option] <= 0:
                return options
            left -= float(extra[layer, option])
            options[layer] = option

    def _improved(self, options: np.ndarray, budget: float, slope: float, bound: float) -> tuple[np.ndarray, bool]:
        """Search all choices that the bound leaves, layer by layer; whether the result is proven optimal.

        With reduced costs `r = score + slope * amount`, less the layer's smallest, every choice within the budget
        scores `bound + sum r + slope * (budget - amount)`: no option with r above the gap can be part of a better one.
        """
        gap = float(self.scores[self.rows, options].sum()) - bound
        reduced = self.scores + slope * np.where(np.isfinite(self.amounts), self.amounts, 0.0)
        reduced -= reduced.min(axis=1)[:, None]
        kept = [np.flatnonzero(row < gap) for row in reduced]
        order = np.argsort([len(k) for k in kept], kind="stable")
        lows = [self.amounts[layer, kept[layer]].min() for layer in order]
        rest = np.concatenate([np.cumsum(lows[::-1])[::-1][1:], [0.0]])  # least amount of the layers to come
        highs = [self.amounts[layer, kept[layer]].max() for layer in order]
        rest_most = np.concatenate([np.cumsum(highs[::-1])[::-1][1:], [0.0]])
        amount, cost = np.zeros(1), np.zeros(1)
        trail: list[tuple[np.ndarray, np.ndarray]] = []
        closed = True
        for i, layer in enumerate(order):
            choice = kept[layer]
            amounts = (amount[:, None] + self.amounts[layer, choice]).ravel()
            costs = (cost[:, None] + reduced[layer, choice]).ravel()
            unspent = np.maximum(budget - amounts - rest_most[i], 0.0)
            alive = np.flatnonzero((amounts + rest[i] <= budget) & (costs + slope * unspent < gap))
            alive = alive[_undominated(amounts[alive], costs[alive] - slope * amounts[alive])]
            if len(alive) > MOST_LABELS:
                alive = alive[np.argsort(costs[alive], kind="stable")[:MOST_LABELS]]
                closed = False
            if not len(alive):
                return options, closed
            trail.append((alive // len(choice), choice[alive % len(choice)]))
            amount, cost = amounts[alive], costs[alive]
        label = int(np.argmin(cost + slope * (budget - amount)))
        better = options.copy()
        for layer, (parents, picks) in zip(order[::-1], trail[::-1], strict=True):
            better[layer], label = picks[label], int(parents[label])
        return better, closed


def _hull(amounts: np.ndarray, scores: np.ndarray) -> list[int]:
    """Options on the lower convex hull, by rising amount and falling score."""
    hull: list[int] = []
    for k in np.lexsort((scores, amounts)):
        if not np.isfinite(scores[k]) or (hull and scores[k] >= scores[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(amounts, scores, hull[-1], k) <= _slope(amounts, scores, hull[-2], hull[-1]):
            hull.pop()
        hull.append(int(k))
    return hull


def _slope(amounts: np.ndarray, scores: np.ndarray, a: int, b: int) -> float:
    return float((scores[b] - scores[a]) / (amounts[b] - amounts[a]))


def _undominated(amounts: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Positions of the points that no other point equals or beats in both columns."""
    order = np.lexsort((scores, amounts))
    lowest = np.minimum.accumulate(scores[order])
    return order[np.concatenate([[True], scores[order][1:] < lowest[:-1]])] if len(order) else order


def _padded(table: Table, fill: float) -> np.ndarray:
    """Rows of any lengths as one float64 table."""
    rows = [np.asarray(row, dtype=float) for row in table]
    padded = np.full((len(rows), max((len(row) for row in rows), default=0)), fill)
    for layer, row in enumerate(rows):
        padded[layer, : len(row)] = row
    return padded
