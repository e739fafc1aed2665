"""Who searches the laboratory's problems: ours, and what it is measured against."""

import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import IntDistribution

from raysearch.search.frontier import Frontier, Tried
from raysearch.search.proposals import random_values, uniform_proposals
from raysearch.search.samplers import make_sampler
from tests.laboratory.clock import Proposer
from tests.laboratory.problem import OBJECTIVES, Problem


class Default:
    """Ours: the diagonal of the uniform configurations, then the frontier.

    Args:
        learns: whether it learns from what stopped trials had reached.
    """

    def __init__(self, problem: Problem, seed: int, *, learns: bool = True) -> None:
        self.anchors = uniform_proposals(problem.space, {}, 0)
        self.frontier = Frontier(problem.space, problem.layers, OBJECTIVES, sensitivities=problem.told)
        self.history: list[Tried] = []
        self.pending: list[Mapping[str, Any]] = []
        self.seed, self.learns = seed, learns

    def ask(self) -> dict[str, Any] | None:
        values = self.anchors.pop(0) if self.anchors else self.frontier.propose(self.history, self.pending, self.seed)
        if values is not None:
            self.pending.append(values)
        return values

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        if values in self.pending:
            self.pending.remove(values)
        self.history = [tried for tried in self.history if tried.values != values]
        course = dict(enumerate(losses, start=1)) if self.learns else {}
        self.history.append(Tried(values=values, quality=losses[-1] if complete else None, course=course))


class Random:
    """Every configuration as likely as any other."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.space, self.generator = problem.space, random.Random(seed)

    def ask(self) -> dict[str, Any] | None:
        return random_values(self.space, self.generator)

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        pass


class Uniform:
    """The uniform configurations, and nothing after them."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self.left = uniform_proposals(problem.space, {}, 10**6)

    def ask(self) -> dict[str, Any] | None:
        return self.left.pop(0) if self.left else None

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        pass


class Plain:
    """An Optuna sampler as a person would use it: each parameter an ordered integer, the place of its width."""

    def __init__(self, problem: Problem, seed: int, sampler: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.problem = problem
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made = optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else make_sampler(sampler, seed, 50)
        self.study = optuna.create_study(directions=["minimize", "minimize"], sampler=made)
        self.widths = dict(zip(problem.space, problem.choices, strict=True))
        self.places = {name: IntDistribution(0, len(widths) - 1) for name, widths in self.widths.items()}
        self.running: list[tuple[dict[str, Any], optuna.Trial]] = []

    def ask(self) -> dict[str, Any] | None:
        trial = self.study.ask(self.places)
        values = {name: self.widths[name][place] for name, place in trial.params.items()}
        self.running.append((values, trial))
        return values

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        place = next((i for i, (mine, _) in enumerate(self.running) if mine is values or mine == values), None)
        if place is None:  # it was stopped before
            places = {name: widths.index(values[name]) for name, widths in self.widths.items()}
            told = optuna.trial.create_trial(
                params=places, distributions=dict(self.places), values=self.objectives(values, losses)
            )
            if complete:
                self.study.add_trial(told)
            return
        _, trial = self.running.pop(place)
        if complete:
            self.study.tell(trial, self.objectives(values, losses))
        else:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def objectives(self, values: Mapping[str, Any], losses: Sequence[float]) -> list[float]:
        return [losses[-1], float(self.problem.evaluate(self.problem.array(values)[None])[0, 1])]


class RayOptuna:
    """Ray Tune's own OptunaSearch (its default sampler is a univariate TPE), asked as Tune asks it.

    It hears of a stopped trial as of a complete one, with the value that it had reached: so does Tune tell it.

    Args:
        objective: the one that it knows, of loss and cost.
    """

    def __init__(self, problem: Problem, seed: int, objective: Callable[[float, float], float]) -> None:
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("ray.tune.search.optuna.optuna_search").setLevel(logging.ERROR)
        self.problem, self.objective = problem, objective
        self.widths = dict(zip(problem.space, problem.choices, strict=True))
        places = {name.replace("/", ":"): IntDistribution(0, len(each) - 1) for name, each in self.widths.items()}
        self.searcher = OptunaSearch(places, metric="objective", mode="min", seed=seed)
        self.running: list[tuple[dict[str, Any], str]] = []
        self.asked = 0

    def ask(self) -> dict[str, Any] | None:
        name = str(self.asked)
        self.asked += 1
        places = self.searcher.suggest(name)
        assert places is not None
        values = {address: widths[places[address.replace("/", ":")]] for address, widths in self.widths.items()}
        self.running.append((values, name))
        return values

    def tell(self, values: Mapping[str, Any], losses: Sequence[float], complete: bool) -> None:
        place = next(i for i, (mine, _) in enumerate(self.running) if mine == values)
        _, name = self.running.pop(place)
        cost = float(self.problem.evaluate(self.problem.array(values)[None])[0, 1])
        self.searcher.on_trial_complete(name, {"objective": self.objective(losses[-1], cost)})


PROPOSERS: dict[str, Callable[[Problem, int], Proposer]] = {
    "auto": Default,
    "uniform": Uniform,
    "random": Random,
    "nsga2": lambda problem, seed: Plain(problem, seed, "nsga2"),
    "tpe": lambda problem, seed: Plain(problem, seed, "tpe"),
}
