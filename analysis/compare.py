"""Fronts of several sweeps side by side: what each attains at a cost, and how much of that is chance.

A run is one sweep with one seed. Its attainment at a cost is the best accuracy of its points at no more than that cost.
Over several runs of the same question, the k-th best of them is attained by at least k runs: the empirical attainment
function (Fonseca and Fleming 1996; López-Ibáñez et al. 2010), exact for one cost, no grid and no averaging of fronts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.confidence import Interval, of_mean
from analysis.rows import numbers


class Attained(NamedTuple):
    """The best accuracy at one cost over several runs.

    Attributes:
        accuracies: of the runs that have a point at no more than that cost, falling.
        runs: how many runs there are.
    """

    accuracies: tuple[float, ...]
    runs: int

    @property
    def mean(self) -> float | None:
        """Mean over the runs; None when one of them has no such point, because the mean of the others would flatter."""
        return float(np.mean(self.accuracies)) if len(self.accuracies) == self.runs else None

    @property
    def interval(self) -> Interval | None:
        """The mean's 95 % interval over seeds; None for fewer than two, or when a run has no such point."""
        return None if self.mean is None else of_mean(self.accuracies)


def attained(frame: pd.DataFrame, cost: str, at: float) -> float | None:
    """The best accuracy of the rows whose cost is at most `at`; None if none is so cheap.

    >>> front = pd.DataFrame({"accuracy": [0.9, 0.8], "bops": [64, 16]})
    >>> attained(front, "bops", 63), attained(front, "bops", 8)
    (0.8, None)
    """
    values = numbers(frame, [cost, "accuracy"])
    fits = values[values[:, 0] <= at, 1]
    return float(fits.max()) if fits.size else None


def at_equal_cost(runs: Sequence[pd.DataFrame], cost: str, at: float) -> Attained:
    """What runs of the same question attain at a cost."""
    found = [accuracy for run in runs if (accuracy := attained(run, cost, at)) is not None]
    return Attained(tuple(sorted(found, reverse=True)), len(runs))


def attainment(runs: Sequence[pd.DataFrame], cost: str) -> pd.DataFrame:
    """Attainment surfaces over all costs at which something changes.

    Args:
        runs: complete rows of each run, with `accuracy` and the cost.
        cost: its column.

    Returns:
        index `cost`, rising; columns `best` (attained by one run), `median` (by at least half of them) and `worst` (by
        all), NaN where fewer runs have a point so cheap.
    """
    costs = np.unique(np.concatenate([numbers(run, [cost])[:, 0] for run in runs]))
    table = np.column_stack([_staircase(run, cost, costs) for run in runs])
    ranked = -np.sort(-np.where(np.isnan(table), -math.inf, table), axis=1)
    ranked[np.isinf(ranked)] = math.nan
    chosen = {"best": 0, "median": math.ceil(len(runs) / 2) - 1, "worst": len(runs) - 1}
    frame = pd.DataFrame({name: ranked[:, k] for name, k in chosen.items()}, index=pd.Index(costs, name="cost"))
    changed = (frame != frame.shift()) & ~(frame.isna() & frame.shift().isna())
    keep = changed.any(axis=1)
    keep.iloc[[0, -1]] = True
    return frame[keep]


def levels(frames: Sequence[pd.DataFrame], cost: str, unit: float = 1.0, most: int = 6) -> list[float]:
    """Round costs (1, 2, 5 times a power of ten units) that lie among those of the points, evenly chosen.

    >>> levels([pd.DataFrame({"relative_bops": [0.004, 0.06]})], "relative_bops", unit=0.01)
    [0.005, 0.01, 0.02, 0.05]
    """
    values = np.concatenate([numbers(frame, [cost])[:, 0] for frame in frames]) / unit
    values = values[values > 0]
    if not values.size:
        return []
    powers = range(math.floor(math.log10(values.min())), math.ceil(math.log10(values.max())) + 1)
    rounded = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [float(f"{value:.6g}") for value in rounded if values.min() <= value <= values.max()]
    chosen = inside or [float(values.max())]
    places = np.unique(np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int))
    return [float(f"{chosen[place] * unit:.10g}") for place in places]


def hypervolume_bands(histories: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Hypervolumes of several runs after each completed trial: columns `mean`, `low`, `high`, as far as all runs go.

    Args:
        histories: what `pareto.hypervolume_history` returned, one for each run.
    """
    shared = min(len(history) for history in histories)
    table = np.column_stack([history["hypervolume"].to_numpy()[:shared] for history in histories])
    index = pd.RangeIndex(1, shared + 1, name="completed")
    columns: Mapping[str, np.ndarray] = {"mean": table.mean(1), "low": table.min(1), "high": table.max(1)}
    return pd.DataFrame(columns, index=index)


def _staircase(run: pd.DataFrame, cost: str, costs: np.ndarray) -> np.ndarray:
    """The run's attainment at each of `costs`, NaN where it has none."""
    values = numbers(run, [cost, "accuracy"])
    values = values[np.argsort(values[:, 0], kind="stable")]
    best = np.concatenate([[math.nan], np.fmax.accumulate(values[:, 1])])
    return best[np.searchsorted(values[:, 0], costs, side="right")]
