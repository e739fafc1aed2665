"""Picking one point of a front: within limits, by weights, or the cheapest that is nearly as accurate as the best.

Limits say which points may be taken; what is left to decide is decided by one rule. Without any, accuracy decides.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from analysis.rows import numbers
from analysis.tradeoff import NOTHING, check_weights, scores

_ROUNDING = 1e-12
"""Accuracies are quotients: 0.98 - 0.975 is not quite 0.005."""


@dataclass(frozen=True, kw_only=True)
class _Limit:
    """One limit: its argument, the column it bounds, on which side, and how the messages put it into words."""

    argument: str
    column: str
    at_most: bool
    best: str
    words: Callable[[float], str]

    def met(self, frame: pd.DataFrame, value: float) -> np.ndarray:
        column = numbers(frame, [self.column])[:, 0]
        return column <= value if self.at_most else column >= value

    def excess(self, frame: pd.DataFrame, value: float) -> np.ndarray:
        """By which share of the limit each row misses it; 0 where it is met."""
        column = numbers(frame, [self.column])[:, 0]
        missed = column - value if self.at_most else value - column
        return np.maximum(missed, 0) / max(abs(value), 1e-12)


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


_LIMITS = (
    _Limit(
        argument="max_bops",
        column="bops",
        at_most=True,
        best="the cheapest point has",
        words=lambda value: f"{_count(value)} BOPs",
    ),
    _Limit(
        argument="max_relative_bops",
        column="relative_bops",
        at_most=True,
        best="the cheapest point has",
        words=lambda value: f"relative BOPs of {value:.4g}",
    ),
    _Limit(
        argument="max_size_bytes",
        column="size_bytes",
        at_most=True,
        best="the smallest point has",
        words=lambda value: f"{_count(value)} bytes",
    ),
    _Limit(
        argument="min_accuracy",
        column="accuracy",
        at_most=False,
        best="the most accurate point has",
        words=lambda value: f"accuracy {value:.4f}",
    ),
)


def parsed(text: str) -> _Limit:
    """The limit that `NAME<=VALUE` or `NAME>=VALUE` speaks of; its value is `bound(text)`.

    Raises:
        ValueError: it is written otherwise, or the value is no finite number.

    >>> parsed("latency<=12.5").column, bound("latency<=12.5")
    ('latency', 12.5)
    """
    name, sign, value = re.split("(<=|>=)", text, maxsplit=1) if re.search("<=|>=", text) else (text, "", "")
    try:
        finite = math.isfinite(float(value))
    except ValueError:
        finite = False
    if not name.strip() or not finite:
        raise ValueError(f"limit {text!r}: write NAME<=VALUE or NAME>=VALUE, such as latency<=12.5")
    best = "the least is" if sign == "<=" else "the most is"
    argument = f"{name.strip()} {sign}"
    return _Limit(
        argument=argument,
        column=name.strip(),
        at_most=sign == "<=",
        best=best,
        words=lambda x: f"{name.strip()} {x:.6g}",
    )


def bound(text: str) -> float:
    """The value of a limit that `parsed` takes."""
    return float(re.split("<=|>=", text, maxsplit=1)[1])


def pick(
    front_frame: pd.DataFrame,
    *,
    max_bops: float | None = None,
    max_relative_bops: float | None = None,
    max_size_bytes: float | None = None,
    min_accuracy: float | None = None,
    within: float | None = None,
    weights: Mapping[str, float] | None = None,
    limits: Sequence[str] = (),
    own: Mapping[str, str] = NOTHING,
) -> pd.Series:
    """The most accurate point that fits every limit; with `min_accuracy` alone, the point with the fewest BOPs.

    Ties go to fewer BOPs, then fewer bytes, then higher accuracy, then the smaller trial. A point on a limit fits.
    `within` and `weights` are other rules for choosing among the points that fit; there can be one of them.

    Args:
        front_frame: one row a point, with `trial`, `accuracy`, and the columns that the limits bound.
        max_bops: bit operations of one input, >= 0.
        max_relative_bops: share of the BOPs at 32 x 32 bits, 0..1.
        max_size_bytes: bytes as exported, >= 0.
        min_accuracy: 0..1.
        within: the fewest BOPs among the points whose accuracy is at most this much below that of the best, 0..1.
        weights: the smallest score of `tradeoff.scores`, scaled on the whole front; `tradeoff.balanced` gives the knee.
        limits: on any other column of numbers, as `latency<=12.5`.
        own: a person's own measures that weights may name, and their directions.

    Raises:
        ValueError: a limit is negative, not finite, or a share above 1; the frame lacks its column; both rules; or
            nothing fits, and then which limits exclude everything and the point nearest to them.
    """
    if within is not None and weights is not None:
        raise ValueError("within and weights are two ways to choose one point: give one of them")
    given = {
        limit: float(value)
        for limit, value in zip(_LIMITS, (max_bops, max_relative_bops, max_size_bytes, min_accuracy), strict=True)
        if value is not None
    } | {parsed(text): bound(text) for text in limits}
    if weights is not None:
        check_weights(weights, own)
    _check(front_frame, given, within)
    fits = _fitting(front_frame, given)
    if not fits.any():
        raise ValueError(_why_nothing_fits(front_frame, given))
    left = front_frame[fits]
    if weights is not None:
        ranked = left.assign(_score=scores(front_frame, weights, own)[fits])
        return _first(ranked, ["_score", "bops", "size_bytes"]).drop("_score")
    if within is not None:
        accuracy = numbers(left, ["accuracy"])[:, 0]
        return _first(left[accuracy >= accuracy.max() - within - _ROUNDING], ["bops", "size_bytes", "accuracy"])
    cheapest = [limit.argument for limit in given] == ["min_accuracy"]
    return _first(left, ["bops", "size_bytes", "accuracy"] if cheapest else ["accuracy", "bops", "size_bytes"])


def limited_columns(**limits: float | None) -> list[str]:
    """Columns that the given arguments of `pick` bound.

    >>> limited_columns(max_bops=4e8, min_accuracy=None)
    ['bops']
    """
    return [limit.column for limit in _LIMITS if limits.get(limit.argument) is not None]


def _first(frame: pd.DataFrame, keys: list[str]) -> pd.Series:
    """The first row by these keys, rising except for the accuracy, then by trial."""
    keys = [name for name in [*keys, "trial"] if name in frame]
    ascending = [name != "accuracy" for name in keys]
    return frame.sort_values(keys, ascending=ascending, kind="stable").astype(object).iloc[0]


def _check(frame: pd.DataFrame, given: dict[_Limit, float], within: float | None) -> None:
    if frame.empty:
        raise ValueError("the front has no points to pick from: no trial is complete")
    if within is not None and not 0 <= within <= 1:
        raise ValueError(f"within = {within:g}: give a share within 0..1 (half a point of accuracy is 0.005)")
    for limit, value in given.items():
        if limit in _LIMITS and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{limit.argument} = {value:g}: give a number >= 0")
        if limit.column in ("accuracy", "relative_bops") and value > 1:
            raise ValueError(f"{limit.argument} = {value:g}: give a share within 0..1 (5 % is 0.05)")
        if limit.column not in frame:
            raise ValueError(f"{limit.argument} = {value:g}: the points have no column {limit.column}")


def _fitting(frame: pd.DataFrame, given: dict[_Limit, float]) -> np.ndarray:
    fits = np.ones(len(frame), dtype=bool)
    for limit, value in given.items():
        fits &= limit.met(frame, value)
    return fits


def _why_nothing_fits(frame: pd.DataFrame, given: dict[_Limit, float]) -> str:
    """The smallest sets of limits that nothing fits, and the point nearest to them."""
    for count in range(1, len(given) + 1):
        binding = [
            subset
            for names in combinations(given, count)
            if not _fitting(frame, subset := {limit: given[limit] for limit in names}).any()
        ]
        if binding:
            break
    if count == 1:
        return "; ".join(_best_alone(frame, *next(iter(subset.items()))) for subset in binding)
    return "; ".join(_nearest_together(frame, subset) for subset in binding)


def _best_alone(frame: pd.DataFrame, limit: _Limit, value: float) -> str:
    column = numbers(frame, [limit.column])[:, 0]
    best = frame.iloc[np.nanargmin(column) if limit.at_most else np.nanargmax(column)]
    return f"no point fits {_say(limit, value)}: {limit.best} {limit.words(best[limit.column])} ({_name(best)})"


def _nearest_together(frame: pd.DataFrame, given: dict[_Limit, float]) -> str:
    excess = sum((limit.excess(frame, value) for limit, value in given.items()), np.zeros(len(frame)))
    nearest = frame.iloc[np.nanargmin(excess)]
    limits = " and ".join(_say(limit, value) for limit, value in given.items())
    has = ", ".join(limit.words(nearest[limit.column]) for limit in given)
    return f"no point fits {limits} together: the nearest has {has} ({_name(nearest)})"


def _say(limit: _Limit, value: float) -> str:
    if limit not in _LIMITS:
        return f"{limit.argument} {value:g}"
    return f"{limit.argument} = {value:g}" if value < 1 else f"{limit.argument} = {_count(value)}"


def _name(row: pd.Series) -> str:
    trial = f"trial {int(row['trial'])}"
    return f"run {row['run']}, {trial}" if "run" in row else trial
