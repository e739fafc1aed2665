"""Pareto fronts and hypervolumes of points with several objectives, exactly.

`non_dominated` and `hypervolume` are geometry over arrays in which every column is minimised; `oriented` and
`hypervolume_history` bring the rows of a sweep into that form. Points p dominates q when p <= q in every column and
p < q in one. The hypervolume (Zitzler and Thiele 1998, "size of the space covered") is the volume of all places that
some point dominates, up to a reference point. Three columns are swept with a staircase of the other two, as in
Kung, Luccio and Preparata 1975 and Beume et al. 2009; more columns are cut into slices of one column less.

The reference point that all sweeps share. So that hypervolumes of different sweeps compare, each objective is scaled
to 0 (ideal) .. 1 (the reference), and the hypervolume lies within 0..1:

    accuracy                1 - accuracy                    1.0 is a network that is never right
    bops, relative_bops     relative_bops                   1.0 is the network at 32 x 32 bits
    size_bytes              size_bytes / float_size_bytes   1.0 is the network stored as 32-bit floats
    loss, own measures      have no upper end: give a reference

`float_size_bytes` is an optional key of a record. A row without it is divided by the largest size in the frame
instead; such hypervolumes compare within that frame only.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from analysis.rows import OBJECTIVES, check_objectives, complete_rows, numbers, own_columns


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Which points no other point dominates; of equal points the first stays.

    Up to three columns take O(n log n); more take O(n x size of the front).

    Args:
        values: shape (n, k), k >= 1, finite; every column is minimised.

    Returns:
        bool, shape (n,).

    Raises:
        ValueError: another shape, or a value that is NaN or infinite.

    >>> non_dominated(np.array([[1, 4], [2, 2], [3, 3], [2, 2]])).tolist()
    [True, True, False, False]
    """
    values = _checked(values)
    mask = np.zeros(len(values), dtype=bool)
    if len(values):
        front = {1: _front_1d, 2: _front_2d, 3: _front_3d}.get(values.shape[1], _front_any)
        mask[front(values)] = True
    return mask


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Volume of what the points dominate within the reference point, exactly up to rounding.

    Up to three columns take O(n log n); each further column multiplies by n.

    Args:
        values: shape (n, k), k >= 1, finite; every column is minimised. Points not below the reference in every column
            add nothing.
        reference: shape (k,), finite.

    Raises:
        ValueError: shapes that do not match, or a value that is NaN or infinite.

    >>> hypervolume(np.array([[1, 4], [2, 2], [9, 0]]), np.array([5, 5]))
    10.0
    """
    values = _checked(values)
    reference = np.asarray(reference, dtype=float)
    if reference.shape != (values.shape[1],):
        raise ValueError(f"reference has shape {reference.shape}: {values.shape[1]} columns need {(values.shape[1],)}")
    if not np.isfinite(reference).all():
        raise ValueError(f"reference {reference.tolist()} is not finite: give a number for each column")
    return _volume(values[(values < reference).all(axis=1)], reference)


def oriented(frame: pd.DataFrame, objectives: Mapping[str, str]) -> np.ndarray:
    """The objectives of each row as columns to be minimised, shape (rows, objectives): what is maximised is negated.

    Raises:
        ValueError: an unknown objective or direction, or a column that the frame lacks.

    >>> oriented(pd.DataFrame({"accuracy": [0.9, 0.8], "bops": [20, 10]}), {"accuracy": "max", "bops": "min"}).tolist()
    [[-0.9, 20.0], [-0.8, 10.0]]
    """
    objectives = check_objectives(objectives, own_columns(frame))
    _require(frame, *objectives)
    return numbers(frame, list(objectives)) * _signs(objectives)


def scaled(
    frame: pd.DataFrame, objectives: Mapping[str, str], reference: Mapping[str, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The objectives of each row as columns to be minimised, and the reference point that belongs to them.

    Args:
        frame: complete rows.
        objectives: name to direction.
        reference: the worst value of an objective that still counts, in the objective's own unit (an accuracy as an
            accuracy), which is then the unit of its column; the others take the reference that all sweeps share, see
            the module.

    Returns:
        columns, shape (rows, objectives), and reference, shape (objectives,).

    Raises:
        ValueError: a column is missing, the reference names other objectives, or there is none for the loss or for a
            person's own measure.
    """
    objectives = check_objectives(objectives, own_columns(frame))
    reference = reference or {}
    if not set(reference) <= set(objectives):
        raise ValueError(f"reference has {', '.join(reference)}: give {', '.join(objectives)}")
    given = oriented(frame, objectives) if reference else None
    columns = [_share(frame, n) if n not in reference else given[:, i] for i, n in enumerate(objectives)]  # type: ignore[index]
    worst = [reference.get(name, sign) * sign for name, sign in zip(objectives, _signs(objectives), strict=True)]
    return np.column_stack(columns), np.array(worst)


def bounded(objectives: Mapping[str, str], reference: Mapping[str, float] | None = None) -> bool:
    """Whether there is a reference for every objective, so that a front has a hypervolume.

    >>> bounded({"accuracy": "max", "bops": "min"}), bounded({"loss": "min"}), bounded({"loss": "min"}, {"loss": 2.3})
    (True, False, True)
    """
    shared = set(OBJECTIVES) - {"loss"}
    return all(name in shared or name in (reference or {}) for name in objectives)


def hypervolume_history(
    frame: Iterable[Mapping[str, Any]] | pd.DataFrame,
    objectives: Mapping[str, str],
    reference: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Hypervolume of all points so far, after each completed trial in the order of finish. It never falls.

    A trial with several operating points is one row, as of its last one.

    Args:
        frame: records of one sweep or several; those that are not complete are left out.
        objectives: name to direction.
        reference: as in `scaled`.

    Returns:
        columns `run` (if the records have it), `trial`, `finished_at` (if they have it) and `hypervolume`; the index
        `completed` counts from 1.
    """
    rows = complete_rows(frame, objectives)
    keys = [name for name in ("run", "trial") if name in rows]
    shown = keys + [name for name in ("finished_at",) if name in rows]
    values, worst = scaled(rows, objectives, reference)
    front, volume = values[:0], 0.0
    last, volumes = [], []
    trials = rows.groupby(keys, sort=False, dropna=False).indices.values()
    for positions in sorted(trials, key=max):
        candidates = np.concatenate([front, values[positions]])
        mask = non_dominated(candidates)
        if mask[len(front) :].any():
            volume = max(volume, hypervolume(candidates[mask], worst))
        front = candidates[mask]
        last.append(max(positions))
        volumes.append(volume)
    history = rows.iloc[last][shown].assign(hypervolume=np.array(volumes, dtype=float))
    return history.set_index(pd.RangeIndex(1, len(history) + 1, name="completed"))


def _share(frame: pd.DataFrame, name: str) -> np.ndarray:
    """An objective as a share of what the worst network counts as, see the module; shape (rows,), 0 is ideal."""
    if name not in OBJECTIVES or name == "loss":
        raise ValueError(f"objective {name} has no upper end: give a reference for it, such as {name} = 2.3")
    if name in ("bops", "relative_bops"):
        _require(frame, "relative_bops")
        return numbers(frame, ["relative_bops"])[:, 0]
    _require(frame, name)
    column = numbers(frame, [name])[:, 0]
    if name == "accuracy":
        return 1 - column
    largest = np.full(len(column), column.max(initial=1))
    if "float_size_bytes" not in frame:
        return column / largest
    given = numbers(frame, ["float_size_bytes"])[:, 0]
    return column / np.where(np.isnan(given), largest, given)


def _signs(objectives: Mapping[str, str]) -> np.ndarray:
    return np.array([-1.0 if direction == "max" else 1.0 for direction in objectives.values()])


def _require(frame: pd.DataFrame, *names: str) -> None:
    missing = [name for name in names if name not in frame]
    if missing:
        raise ValueError(f"the frame lacks {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values have shape {values.shape}: a row for each point, a column for each objective")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise ValueError(f"row {bad[0]} is {values[bad[0]].tolist()}: a point has finite values, drop it first")
    return values


def _ascending(values: np.ndarray) -> np.ndarray:
    """Positions in lexicographic order; equal points stay in theirs. A point follows all that dominate it."""
    return np.lexsort(values.T[::-1])


def _front_1d(values: np.ndarray) -> np.ndarray:
    return np.array([values[:, 0].argmin()])


def _front_2d(values: np.ndarray) -> np.ndarray:
    order = _ascending(values)
    y = values[order, 1]
    best_before = np.concatenate([[math.inf], np.minimum.accumulate(y)[:-1]])
    return order[y < best_before]


def _front_3d(values: np.ndarray) -> np.ndarray:
    order = _ascending(values)
    stairs = _Staircase(math.inf, math.inf)
    return order[[stairs.add(y, z) for y, z in values[order, 1:].tolist()]]


def _front_any(values: np.ndarray) -> np.ndarray:
    """The point with the smallest sum of ranks is on the front; remove what it covers; repeat."""
    ranks = np.column_stack([np.unique(column, return_inverse=True)[1] for column in values.T])
    rest = np.argsort(ranks.sum(axis=1), kind="stable")
    ranks = ranks[rest]
    front = []
    while len(rest):
        front.append(rest[0])
        outside = (ranks < ranks[0]).any(axis=1)
        rest, ranks = rest[outside], ranks[outside]
    return np.array(front)


def _volume(values: np.ndarray, reference: np.ndarray) -> float:
    """Hypervolume of points that all lie below the reference in every column."""
    columns = values.shape[1]
    if not len(values):
        return 0.0
    if columns == 1:
        return float(reference[0] - values.min())
    if columns == 2:  # a rectangle from each step of the front to the next
        x, y = values[_front_2d(values)].T
        return float(np.diff(x, append=reference[0]) @ (reference[1] - y))
    if columns == 3:
        return _volume_3d(values, reference)
    return _volume_in_slices(values[non_dominated(values)], reference)


def _volume_3d(values: np.ndarray, reference: np.ndarray) -> float:
    """Sweep the third column: the area dominated in the other two so far, times the way to the next point."""
    values = values[_ascending(values[:, ::-1])]
    stairs = _Staircase(*reference[:2].tolist())
    area = volume = 0.0
    for (x, y, _), thickness in zip(values.tolist(), _thickness(values, reference), strict=True):
        area += stairs.gain(x, y)
        stairs.add(x, y)
        volume += area * thickness
    return volume


def _volume_in_slices(values: np.ndarray, reference: np.ndarray) -> float:
    """Slice the last column: each slice is the volume, in one column less, of the points so far."""
    values = values[_ascending(values[:, ::-1])]
    volume = 0.0
    for count, thickness in enumerate(_thickness(values, reference), start=1):
        if thickness > 0:
            volume += thickness * _volume(values[:count, :-1], reference[:-1])
    return volume


def _thickness(values: np.ndarray, reference: np.ndarray) -> list[float]:
    """From each point to the next, and from the last to the reference, in the last column, which rises."""
    return np.diff(values[:, -1], append=reference[-1]).tolist()


class _Staircase:
    """The front of points with two columns, between two sentinels: `xs` rises strictly, `ys` falls strictly.

    Args:
        x_end: where the area under the last step ends.
        y_end: height of the area left of the first step.
    """

    def __init__(self, x_end: float, y_end: float) -> None:
        self.xs = [-math.inf, x_end]
        self.ys = [y_end, -math.inf]

    def add(self, x: float, y: float) -> bool:
        """Take in a point unless one that is there is as small in both columns; tells whether it was taken."""
        if self.ys[bisect_right(self.xs, x) - 1] <= y:
            return False
        start, stop = self._covered(x, y)
        self.xs[start:stop] = [x]
        self.ys[start:stop] = [y]
        return True

    def gain(self, x: float, y: float) -> float:
        """By how much `add` of this point, which lies before both ends, enlarges the dominated area."""
        start, stop = self._covered(x, y)
        edges = [x, *self.xs[start : stop + 1]]
        heights = self.ys[start - 1 : stop]
        widths = [right - left for left, right in pairwise(edges)]
        return sum(width * max(height - y, 0.0) for width, height in zip(widths, heights, strict=True))

    def _covered(self, x: float, y: float) -> tuple[int, int]:
        """Range of the steps that this point is as small as in both columns."""
        start = stop = bisect_left(self.xs, x)
        while self.ys[stop] >= y:
            stop += 1
        return start, stop
