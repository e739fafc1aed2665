"""The integer program behind an allocation: one option for each layer, least summed score, limits on summed amounts.

`IntegerProgram` holds the tables and a mask of what is legal. It is solved with HiGHS, whose answer is checked against
the limits in float64; where there is none, a second program says which limits are missed, and by how much.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Table = Sequence[Sequence[float]] | np.ndarray
ROUNDING = 1e-9
"""Share of the largest amount by which a sum may miss its bound."""


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


class IntegerProgram:
    """Scores and amounts as full tables, with a mask of what is legal.

    Attributes:
        scores: (layers, options); 0 where there is no option.
        legal: (layers, options); what may be taken.
        limits: bounds on resources.
        amounts: of each limit, (layers, options).
        slacks: of each limit, how far rounding may take a sum over its bound.

    Raises:
        ValueError: tables of other shapes, or an amount that is not finite.
    """

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
        """Refuse a layer that has no option left."""
        empty = np.flatnonzero(~self.legal.any(axis=1))
        if len(empty):
            raise ValueError(f"layer {empty[0]} has no legal option: give it a finite score for one of its widths")

    def allocation(self, options: np.ndarray, gap: float = 0.0) -> Allocation:
        """A choice with its sums."""
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
        answer = self._highs(costs[self.legal], rows, at_most, at_least, elastic=False)
        return None if answer.x is None else self._options(answer.x)

    def _options(self, x: np.ndarray) -> np.ndarray:
        taken = np.zeros(self.legal.shape)
        taken[self.legal] = x[: int(self.legal.sum())]
        return taken.argmax(axis=1)

    def _highs(
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
        answer = self._highs(np.zeros(int(self.legal.sum())), rows, at_most, at_least, elastic=True)
        used = self.allocation(self._options(answer.x)).used
        faults = []
        for limit in self.limits:
            if used[limit.name] > limit.at_most:
                faults.append(f"{limit.name} <= {limit.at_most:g} by {used[limit.name] - limit.at_most:g}")
            if used[limit.name] < limit.at_least:
                faults.append(f"{limit.name} >= {limit.at_least:g} by {limit.at_least - used[limit.name]:g}")
        return f"the limits cannot be met together: the nearest choice misses {' and '.join(faults)}"


def _padded(table: Table, fill: float) -> np.ndarray:
    """Rows of any lengths as one float64 table."""
    rows = [np.asarray(row, dtype=float) for row in table]
    padded = np.full((len(rows), max((len(row) for row in rows), default=0)), fill)
    for layer, row in enumerate(rows):
        padded[layer, : len(row)] = row
    return padded
