"""A sweep on a simulated clock: trials run side by side, end out of order, and may be stopped after any epoch.

Nothing waits: a heap holds the next epoch of each running trial. A stopped trial frees its place at once; its stopper
may let it go on later from the epoch at which it was stopped. The same seed gives the same sweep.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tests.laboratory.problem import Fidelity, Problem


class Proposer(Protocol):
    """Who proposes configurations to a simulated sweep."""

    def ask(self) -> dict[str, Any] | None:
        """The next configuration, which runs from now on; None if there is none."""

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        """A configuration has ended, or is stopped and may be told again; its losses after each epoch so far."""


class Stopper(Protocol):
    """Who stops the trials of a simulated sweep, and lets them go on."""

    def report(self, trial: int, epoch: int, loss: float, cost: float) -> bool:
        """A trial has finished this epoch, and not its last one: whether it goes on."""

    def end(self, trial: int, epoch: int, loss: float, cost: float) -> None:
        """A trial has finished its last epoch."""

    def promote(self, room: float) -> int | None:
        """A stopped trial that goes on now and needs at most so many epochs to its end; None if there is none."""


class Never:
    """No trial is stopped."""

    def report(self, trial: int, epoch: int, loss: float, cost: float) -> bool:
        return True

    def end(self, trial: int, epoch: int, loss: float, cost: float) -> None:
        pass

    def promote(self, room: float) -> int | None:
        return None


@dataclass
class Trial:
    """One simulated training. Times in seconds of the simulated clock; `loss` is without noise and at full fidelity.

    Attributes:
        reported: losses after each epoch so far.
        spent: epochs of the whole sweep when this trial ended.
    """

    number: int
    values: dict[str, Any]
    loss: float
    cost: float
    started_s: float
    epoch_s: float
    reported: list[float] = field(default_factory=list)
    ended_s: float | None = None
    stopped: bool = False
    spent: int = 0


def simulate(
    problem: Problem,
    proposer: Proposer,
    *,
    trials: int,
    concurrent: int = 1,
    seed: int = 0,
    stopper: Stopper | None = None,
    budget: float = np.inf,
) -> list[Trial]:
    """Run a sweep; its trials by number, in the order in which they were proposed.

    Args:
        problem: what is searched; its fidelity says what an epoch shows and how long it takes.
        proposer: is asked whenever a place is free, and told each end in the order of the ends.
        trials: how many.
        concurrent: how many at the same time.
        seed: of speeds and of noise, which belong to the trial's number and not to the order of events.
        stopper: asked after each epoch but the last, and for a stopped trial that goes on before a new one begins.
        budget: epochs of all trials together; what would not fit to its end does not begin.
    """
    stopper = stopper or Never()
    whole = problem.fidelity.epochs
    done: list[Trial] = []
    curves: list[list[float]] = []
    queue: list[tuple[float, int]] = []
    now, spent, promised = 0.0, 0, 0

    def start() -> bool:
        nonlocal promised
        number = stopper.promote(budget - spent - promised)
        if number is not None:
            done[number].stopped = False
        elif len(done) < trials and spent + promised + whole <= budget:
            values = proposer.ask()
            if values is None:
                return False
            number = len(done)
            trial, curve = _trial(problem, number, values, now, seed)
            done.append(trial)
            curves.append(curve)
        else:
            return False
        promised += whole - len(done[number].reported)
        heapq.heappush(queue, (now + done[number].epoch_s, number))
        return True

    while True:
        while len(queue) < concurrent and start():
            pass
        if not queue:
            return done
        now, number = heapq.heappop(queue)
        trial, curve = done[number], curves[number]
        trial.reported.append(curve[len(trial.reported)])
        epoch, loss = len(trial.reported), trial.reported[-1]
        spent, promised = spent + 1, promised - 1
        if epoch == whole:
            stopper.end(number, epoch, loss, trial.cost)
        elif stopper.report(number, epoch, loss, trial.cost):
            heapq.heappush(queue, (now + trial.epoch_s, number))
            continue
        trial.stopped = epoch < whole
        trial.ended_s, trial.spent = now, spent
        promised -= whole - epoch
        proposer.tell(trial.values, trial.reported, not trial.stopped)


def _trial(problem: Problem, number: int, values: dict[str, Any], now: float, seed: int) -> tuple[Trial, list[float]]:
    """A trial, and what it will report. Its curve belongs to its configuration, its speed and noise to its number."""
    fidelity, bits = problem.fidelity, problem.array(values)
    generator = np.random.default_rng([seed, number])
    loss, cost = problem.evaluate(bits[None])[0].tolist()
    speed = float(generator.lognormal(0.0, fidelity.spread))
    trial = Trial(number, dict(values), loss, cost, started_s=now, epoch_s=fidelity.epoch_s * speed)
    noise = fidelity.noise * generator.standard_normal(fidelity.epochs)
    return trial, (loss + _excess(fidelity, bits) + noise).tolist()


def _excess(fidelity: Fidelity, bits: np.ndarray) -> np.ndarray:
    """How far above its last loss a training is after each epoch, (epochs,)."""
    height, slowness = 1.0, 1.0
    if fidelity.crossing:
        drawn = np.random.default_rng(bits.astype(int)).standard_normal(2)
        height, slowness = np.exp(fidelity.crossing * drawn)
    excess = height * fidelity.excess * fidelity.rate ** (np.arange(fidelity.epochs) / slowness)
    return excess - excess[-1]


def points(trials: list[Trial]) -> np.ndarray:
    """True loss and cost of the trials that were not stopped, (n, 2)."""
    return np.array([(t.loss, t.cost) for t in trials if not t.stopped]).reshape(-1, 2)


def wasted(trials: list[Trial]) -> list[int]:
    """Trials that one dominates, or equals, which had ended before they were proposed; by true loss and cost."""
    ended = sorted((t for t in trials if t.ended_s is not None and not t.stopped), key=lambda t: t.ended_s or 0.0)
    values, ends = points(ended), np.array([t.ended_s for t in ended])
    found = []
    for trial in trials:
        known = values[: np.searchsorted(ends, trial.started_s, side="right")]
        if (known <= (trial.loss, trial.cost)).all(axis=1).any():
            found.append(trial.number)
    return found


def repeated(trials: list[Trial]) -> list[int]:
    """Trials of a configuration that an earlier trial has."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for trial in trials:
        key = tuple(trial.values.items())
        if key in seen:
            found.append(trial.number)
        seen.add(key)
    return found
