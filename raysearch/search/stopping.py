"""Early stopping of a sweep: who stops trials and why, and the rungs over the sweep's own objectives (`rungs`).

A trial that is stopped is paused: its slot takes the next one, its checkpoint stays, and it may go on later. Whoever is
least likely to go on is let go, as `pruned`, when more than `max_paused` wait, and all who wait when the sweep ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raysearch.search.choice import FRONTIER, choose
from raysearch.search.rungs import Rungs, Standing, rung_epochs

if TYPE_CHECKING:
    from raysearch.sweep import Resolved, Sweep


@dataclass(frozen=True)
class StopperChoice:
    """A stopper by name, and why it was taken."""

    stopper: str
    reason: str


def choose_stopper(resolved: "Resolved") -> StopperChoice:
    """What `auto` means for this sweep; any other name means itself."""
    sweep = resolved.sweep
    if sweep.stopper != "auto":
        return StopperChoice(sweep.stopper, "as asked for")
    if not rung_epochs(sweep.epochs, sweep.grace_epochs, sweep.reduction_factor):
        return StopperChoice("none", f"trials of {sweep.epochs} epochs are too short to stop any")
    if not judged(resolved):
        return StopperChoice("none", "all objectives are measured at the end of a training")
    if choose(resolved).sampler == FRONTIER:
        return StopperChoice("none", "the frontier proposes few trials that are worth stopping")
    return StopperChoice("front", "the sampler proposes many trials that others dominate")


def judged(resolved: "Resolved") -> dict[str, str]:
    """The objectives that are known after every epoch: all but measures of the trained model, taken at the end."""
    late = {measure.name for measure in resolved.measures if measure.takes == "model"}
    return {name: way for name, way in resolved.sweep.objectives.items() if name not in late}


class Stopper:
    """Rungs that rank trials by the objectives of their reports.

    Args:
        objectives: name to direction, those that are known after every epoch.
        sweep: epochs, and the rungs' settings.
        name: of the stopper, none of `auto` and `none`.
    """

    def __init__(self, objectives: Mapping[str, str], sweep: "Sweep", name: str) -> None:
        self._signs = {objective: -1.0 if way == "max" else 1.0 for objective, way in objectives.items()}
        self.rungs = Rungs(
            sweep.epochs, grace=sweep.grace_epochs, factor=sweep.reduction_factor, front_only=name == "front"
        )

    def report(self, trial: int, epoch: int, points: Sequence[Mapping[str, Any]]) -> Standing | None:
        """What the rungs say of a trial after an epoch; None where there is none, or a value is no number."""
        values = self._values(points)
        return None if values is None else self.rungs.report(trial, epoch, values)

    def restore(self, trial: int, epoch: int, points: Sequence[Mapping[str, Any]], goes_on: bool) -> None:
        """A report of a driver that has ended, and what it was told."""
        values = self._values(points)
        if values is not None:
            self.rungs.restore(trial, epoch, values, goes_on)

    def others(self, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What must be on disk of the operating points beyond the first."""
        return [{name: value_of(point, name) for name in self._signs} for point in points[1:]]

    def _values(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        rows = [[value_of(point, name) for name in self._signs] for point in points]
        if any(value is None or not math.isfinite(value) for row in rows for value in row):
            return None
        return np.array(rows, dtype=float) * np.array(list(self._signs.values()))


def value_of(point: Mapping[str, Any], name: str) -> Any:
    """An objective of an operating point, as a report or a line of an epoch has it; None if it has none."""
    return point.get(name, point.get("measures", {}).get(name))


def stopper_of(resolved: "Resolved") -> Stopper | None:
    """The stopper that `choose_stopper` gives to a sweep."""
    name = choose_stopper(resolved).stopper
    return None if name == "none" else Stopper(judged(resolved), resolved.sweep, name)
