"""Who stops the trials of simulated sweeps: ours, and what it is measured against."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from analysis.pareto import hypervolume, non_dominated
from raysearch.search.rungs import Rungs, ranks
from tests.laboratory.clock import Never, Stopper
from tests.laboratory.problem import Problem


class Ours:
    """Rungs that rank by loss and cost.

    Args:
        problem: tells the epochs.
        settings: of `Rungs`.
    """

    def __init__(self, problem: Problem, *, resumes: bool = True, **settings: Any) -> None:
        self.rungs, self.resumes = Rungs(problem.fidelity.epochs, **settings), resumes

    def report(self, trial: int, epoch: int, loss: float, cost: float) -> bool:
        standing = self.rungs.report(trial, epoch, np.array([[loss, cost]]))
        return standing is None or standing.goes_on

    def end(self, trial: int, epoch: int, loss: float, cost: float) -> None:
        self.rungs.report(trial, epoch, np.array([[loss, cost]]))

    def promote(self, room: float) -> int | None:
        trial = self.rungs.promotable(room) if self.resumes else None
        if trial is not None:
            self.rungs.promote(trial)
        return trial


class RayASHA:
    """Ray Tune's own ASHA, asked as Tune's controller asks it; it knows one objective."""

    def __init__(self, problem: Problem, objective: Callable[[float, float], float]) -> None:
        self.scheduler = ASHAScheduler(
            time_attr="epoch", metric="objective", mode="min", max_t=problem.fidelity.epochs, reduction_factor=3
        )
        self.objective = objective
        self.trials: dict[int, Any] = {}

    def report(self, trial: int, epoch: int, loss: float, cost: float) -> bool:
        if trial not in self.trials:
            self.trials[trial] = SimpleNamespace(trial_id=str(trial))
            self.scheduler.on_trial_add(None, self.trials[trial])
        result = {"epoch": epoch, "objective": self.objective(loss, cost)}
        return self.scheduler.on_trial_result(None, self.trials[trial], result) != TrialScheduler.STOP

    def end(self, trial: int, epoch: int, loss: float, cost: float) -> None:
        self.report(trial, epoch, loss, cost)

    def promote(self, room: float) -> int | None:
        return None


def hypervolume_order(values: np.ndarray) -> np.ndarray:
    """The one that adds least to the hypervolume of those left comes last, and so on (SMS-EMOA: Beume et al. 2007)."""
    places = ranks(values)
    left, last = list(range(len(places))), []
    reference = np.full(places.shape[1], 1.1)
    while left:
        volumes = [hypervolume(places[[i for i in left if i != each]], reference) for each in left]
        least = left.pop(int(np.argmax(volumes)))
        last.append(least)
    return np.array(last[::-1])


class FrontOnly:
    """A trial goes on as long as none that stood on the same rung dominates it."""

    def __init__(self, problem: Problem) -> None:
        self.epochs = Rungs(problem.fidelity.epochs).epochs
        self.stood: dict[int, list[tuple[float, float]]] = {}

    def report(self, trial: int, epoch: int, loss: float, cost: float) -> bool:
        if epoch not in self.epochs:
            return True
        self.stood.setdefault(epoch, []).append((loss, cost))
        return bool(non_dominated(np.array(self.stood[epoch]))[-1])

    def end(self, trial: int, epoch: int, loss: float, cost: float) -> None:
        pass

    def promote(self, room: float) -> int | None:
        return None


STOPPERS: dict[str, Callable[[Problem], Stopper]] = {
    "none": lambda problem: Never(),
    "mo_asha": Ours,
    "mo_asha/hv": partial(Ours, order=hypervolume_order),
    "mo_asha/no resume": partial(Ours, resumes=False),
    "front": FrontOnly,
}
