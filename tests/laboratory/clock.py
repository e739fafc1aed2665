"""A sweep on a simulated clock: trials run side by side, end out of order, and may be stopped after any epoch.

Nothing waits: a heap holds the next epoch of each running trial. The same seed gives the same sweep.
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tests.laboratory.problems import Problem

Stop = Callable[[int, int, float, float], bool]
"""Whether to stop trial, after epoch, with this reported loss and this cost."""


class Proposer(Protocol):
    """Who proposes configurations to a simulated sweep."""

    def ask(self) -> dict[str, Any] | None:
        """The next configuration, which runs from now on; None if there is none."""

    def tell(self, values: Mapping[str, Any], quality: float | None) -> None:
        """A configuration has ended with this loss; None: it was stopped."""


@dataclass
class Trial:
    """One simulated training. Times in seconds of the simulated clock; `loss` is without noise and at full fidelity."""

    number: int
    values: dict[str, Any]
    loss: float
    cost: float
    started_s: float
    epoch_s: float
    reported: list[float] = field(default_factory=list)
    ended_s: float | None = None
    stopped: bool = False


def never(trial: int, epoch: int, loss: float, cost: float) -> bool:
    """No trial is stopped."""
    return False


def simulate(
    problem: Problem, proposer: Proposer, *, trials: int, concurrent: int = 1, seed: int = 0, stop: Stop = never
) -> list[Trial]:
    """Run a sweep; its trials by number, in the order in which they were proposed.

    Args:
        problem: what is searched; its fidelity says what an epoch shows and how long it takes.
        proposer: is asked whenever a place is free, and told each end in the order of the ends.
        trials: how many.
        concurrent: how many at the same time.
        seed: of speeds and of noise, which belong to the trial's number and not to the order of events.
        stop: asked after each epoch but the last.
    """
    fidelity, done, queue, now = problem.fidelity, [], [], 0.0
    while len(done) < trials or queue:
        while len(done) < trials and len(queue) < concurrent:
            values = proposer.ask()
            if values is None:
                trials = len(done)
                break
            generator = np.random.default_rng([seed, len(done)])
            loss, cost = problem.evaluate(problem.array(values)[None])[0].tolist()
            speed = float(generator.lognormal(0.0, fidelity.spread))
            trial = Trial(len(done), dict(values), loss, cost, started_s=now, epoch_s=fidelity.epoch_s * speed)
            excess = fidelity.excess * fidelity.rate ** np.arange(fidelity.epochs - 1, -1, -1)[::-1]
            excess = excess - excess[-1]
            noise = fidelity.noise * generator.standard_normal(fidelity.epochs)
            trial.reported = (loss + excess + noise).tolist()
            done.append(trial)
            heapq.heappush(queue, (now + trial.epoch_s, trial.number, 1))
        if not queue:
            break
        now, number, epoch = heapq.heappop(queue)
        trial, last = done[number], epoch == fidelity.epochs
        trial.stopped = not last and stop(number, epoch, trial.reported[epoch - 1], trial.cost)
        if last or trial.stopped:
            trial.reported, trial.ended_s = trial.reported[:epoch], now
            proposer.tell(trial.values, None if trial.stopped else trial.reported[-1])
        else:
            heapq.heappush(queue, (now + trial.epoch_s, number, epoch + 1))
    return done


def points(trials: list[Trial]) -> np.ndarray:
    """True loss and cost of the trials that were not stopped, (n, 2)."""
    return np.array([(t.loss, t.cost) for t in trials if not t.stopped]).reshape(-1, 2)
