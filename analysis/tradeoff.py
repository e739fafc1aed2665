"""What a point gives up: scores of a front's points under weights, and its knee.

Each objective is scaled to 0 (the best value on the front) .. 1 (the worst), costs on a logarithmic scale, as they are
drawn: halving the BOPs is the same step wherever it is taken. A point's score is the weighted sum, smaller is better.

The knee is the point with the smallest score when accuracy weighs as much as all costs together. With two objectives
that is the point farthest from the line through both ends of the front (Das 1999; "kneedle", Satopaa et al. 2011). It
depends on which points are on the front, as any knee does.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd

from analysis.rows import OBJECTIVES, numbers

NOTHING: Mapping[str, str] = {}


def scores(frame: pd.DataFrame, weights: Mapping[str, float], own: Mapping[str, str] = NOTHING) -> np.ndarray:
    """What each point gives up under these weights, shape (points,), 0 for a point that is best in all of them.

    Args:
        frame: the points of a front, with a column for each weight.
        weights: objective to weight, >= 0, at least one > 0; only their ratios matter.
        own: further names that are allowed, a person's own measures, and their directions.

    Raises:
        ValueError: no such objective, a weight that is negative or not finite, or none above 0.

    >>> front = pd.DataFrame({"accuracy": [0.9, 0.8, 0.5], "bops": [64, 16, 8]})
    >>> scores(front, {"accuracy": 1, "bops": 1}).round(3).tolist()
    [0.5, 0.292, 0.5]
    """
    check_weights(weights, own)
    missing = [name for name in weights if name not in frame]
    if missing:
        raise ValueError(f"weights name {', '.join(missing)}: the points have no such column")
    values = np.column_stack([_scaled(numbers(frame, [name])[:, 0], name, own.get(name)) for name in weights])
    given = np.array(list(weights.values()), dtype=float)
    return (values @ (given / given.sum())).round(12)  # what is equal shall be a tie


def balanced(objectives: Iterable[str]) -> dict[str, float]:
    """The weights of the knee: what is gained weighs 1, what is paid weighs 1, each shared by its objectives.

    >>> balanced(["accuracy", "bops", "size_bytes"])
    {'accuracy': 1.0, 'bops': 0.5, 'size_bytes': 0.5}
    """
    names = list(objectives)
    gains = [name for name in names if name in ("accuracy", "loss")]
    return {name: 1 / (len(gains) if name in gains else len(names) - len(gains)) for name in names}


def check_weights(weights: Mapping[str, float], own: Iterable[str] = ()) -> None:
    """Refuse weights that rank nothing.

    Raises:
        ValueError: see `scores`.
    """
    known = [*OBJECTIVES, *own]
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise ValueError(f"weights name {', '.join(unknown)}: give {', '.join(known)}")
    wrong = [f"{name} = {value:g}" for name, value in weights.items() if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ValueError(f"weights {', '.join(wrong)}: give numbers >= 0")
    if not any(weights.values()):
        raise ValueError("weights are all 0: give at least one above it, such as accuracy=1")


def _scaled(column: np.ndarray, name: str, way: str | None) -> np.ndarray:
    """A column as 0 (best) .. 1 (worst)."""
    if name == "accuracy" or way == "max":
        column = -column
    elif name != "loss" and (column > 0).any():
        column = np.log(np.maximum(column, column[column > 0].min()))
    low, high = column.min(), column.max()
    return (column - low) / (high - low) if high > low else np.zeros(len(column))
