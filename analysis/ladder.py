"""A ladder of budgets of one resource, each with its best options: the Pareto set of summed sensitivity and amount.

It needs no solver: the lower convex hulls of all layers, merged by slope, are the optima of the Lagrangian for every
budget at once (Sinha and Zoltners 1979, the multiple-choice knapsack); the bound that they give leaves few options a
layer that could still improve a budget's solution, and a dynamic program over these finds the best.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from analysis.allocate import allocate
from analysis.integer_program import Allocation, InfeasibleError, IntegerProgram, Limit, Table

MOST_LABELS = 20_000
"""Partial solutions that the dynamic program keeps; beyond, the worst are dropped and the reported gap stays open."""


def ladder(
    scores: Table,
    limit: Limit,
    budgets: Sequence[float],
    *,
    others: Sequence[Limit] = (),
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
    program = IntegerProgram(scores, [replace(limit, at_most=math.inf, at_least=-math.inf), *others])
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


class _Hulls:
    """Lower convex hulls of (amount, score) of all layers, merged into one path by slope.

    Attributes:
        least: smallest sum of amounts.
    """

    def __init__(self, program: IntegerProgram) -> None:
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
