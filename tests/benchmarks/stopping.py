"""Samplers with and without early stopping: hypervolume over trial-epochs on the closed-form problems, and the ratios.

    python -m tests.benchmarks.stopping [--seeds 5] [--budget 360] [--concurrent 8] [--problems coupled,mine.py:make]
        [--curves parallel,noisy,crossing] [--pairs auto+none,random+mo_asha,...] [--tables]

A line of the first table is a problem: with what share of the epochs that another one has spent the default reaches the
hypervolume that the other one ends with, as mean over seeds, half the width of its 95 % confidence interval, and the
worst seed. The others are random search, Optuna's NSGA-II and TPE without stopping, and Ray Tune's stock integration,
its own OptunaSearch and ASHAScheduler, which knows one objective: the loss, or the sum of loss and cost, each over its
range. `--tables` prints the hypervolume over epochs of all pairs before it: mean share of the exact front's, of the
trials that were trained to their end, with its interval likewise.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from tests.laboratory.clock import Proposer, Stopper, Trial, points, simulate
from tests.laboratory.problem import Problem
from tests.laboratory.problems import CURVES, PROBLEMS, problem_named
from tests.laboratory.proposers import PROPOSERS, RayOptuna
from tests.laboratory.stoppers import STOPPERS, RayASHA

SHOWN = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the budget at which the hypervolume is printed."""
DEFAULT, RANDOM, PLAIN, RAY = "auto+none", "random+none", ("nsga2+none", "tpe+none"), ("ray+loss", "ray+sum")
BARS = {RANDOM: 1 / 3, **dict.fromkeys((*PLAIN, *RAY), 1 / 2)}
"""Pairs, and the share of their epochs that the default may need for what they end with."""
ALL = (DEFAULT, "auto+mo_asha", "auto+front", RANDOM, "random+mo_asha", "random+mo_asha/hv", "random+front")
ALL += (*PLAIN, "nsga2+mo_asha", "nsga2+front", "tpe+mo_asha", "tpe+front", *RAY)


@dataclass(frozen=True)
class Curve:
    """Share of the exact hypervolume after so many epochs, of one sweep."""

    spent: np.ndarray
    share: np.ndarray

    def at(self, epochs: float) -> float:
        """Share after so many epochs."""
        place = int(np.searchsorted(self.spent, epochs, side="right"))
        return float(self.share[place - 1]) if place else 0.0

    def reaches(self, share: float) -> float:
        """Epochs until this share; infinite if never."""
        place = int(np.searchsorted(self.share, share))
        return float(self.spent[place]) if place < len(self.spent) else np.inf


@cache
def problem_of(name: str, curves: str, seed: int) -> Problem:
    """A problem of the laboratory, or of a file, with these learning curves."""
    problem, fidelity = problem_named(name, seed), CURVES[curves]
    scaled = replace(fidelity, excess=problem.scale * fidelity.excess, noise=problem.scale * fidelity.noise)
    return replace(problem, fidelity=scaled)


def pair(name: str, problem: Problem, seed: int) -> tuple[Proposer, Stopper]:
    """Sampler and stopper by name."""
    sampler, _, stopper = name.partition("+")
    if sampler == "ray":
        span = problem.reference - problem.evaluate(problem.extreme(-1)[None])[0]

        def objective(loss: float, cost: float) -> float:
            return loss if stopper == "loss" else loss / abs(span[0]) + cost

        return RayOptuna(problem, seed, objective), RayASHA(problem, objective)
    return PROPOSERS[sampler](problem, seed), STOPPERS[stopper](problem)


def curve_of(problem: Problem, run: list[Trial]) -> Curve:
    """Of the trials that were not stopped, in the order of their ends."""
    ended = sorted((trial for trial in run if not trial.stopped), key=lambda trial: trial.spent)
    values = points(ended)
    shares = [problem.share(values[: count + 1]) for count in range(len(values))]
    return Curve(np.array([trial.spent for trial in ended]), np.maximum.accumulate(shares))


def sweep(name: str, problem: str, curves: str, seed: int, budget: int, concurrent: int) -> tuple[Curve, list[Trial]]:
    """One simulated sweep."""
    made = problem_of(problem, curves, seed)
    proposer, stopper = pair(name, made, seed)
    run = simulate(
        made, proposer, trials=10**6, concurrent=concurrent, seed=seed, stopper=stopper, budget=float(budget)
    )
    return curve_of(made, run), run


def table(given: argparse.Namespace, problem: str, curves: str, names: list[str]) -> dict[str, list[Curve]]:
    """The curves of all seeds by pair; printed as a table if it is asked for."""
    marks = [round(share * given.budget) for share in SHOWN]
    if given.tables:
        heads = "".join(f"{mark:>15}" for mark in marks)
        print(f"\n{problem}, {curves} curves; epochs:{'':10}{heads}  trials   s")
    found: dict[str, list[Curve]] = {}
    for name in names:
        began, ended = time.process_time(), []
        for seed in range(given.seeds):
            curve, run = sweep(name, problem, curves, seed, given.budget, given.concurrent)
            found.setdefault(name, []).append(curve)
            ended.append((sum(not trial.stopped for trial in run), len(run)))
        cells = "".join(f"{cell([curve.at(mark) for curve in found[name]]):>15}" for mark in marks)
        done, begun = np.mean(ended, axis=0)
        seconds = (time.process_time() - began) / given.seeds
        if given.tables:
            print(f"{name:32}{cells}  {done:.0f}/{begun:.0f} {seconds:5.2f}", flush=True)
    return found


def cell(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval (normal approximation)."""
    half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ±{half:.3f}"


def ratios(found: dict[str, list[Curve]]) -> dict[str, list[float]]:
    """With what share of the epochs of each other pair the default is as good, by pair and seed."""
    return {
        other: [
            mine.reaches(float(theirs.share[-1])) / theirs.spent[-1]
            for mine, theirs in zip(found[DEFAULT], found[other], strict=True)
        ]
        for other in BARS
        if DEFAULT in found and other in found
    }


def main() -> None:
    """Print the tables; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=360)
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    parser.add_argument("--curves", default="parallel")
    parser.add_argument("--pairs", default=",".join((DEFAULT, *BARS)))
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    pairs = list(ALL) if given.pairs == "all" else given.pairs.split(",")
    shown = [other for other in BARS if other in pairs]
    print(f"epochs that the default needs, over those of:\n{'':20}" + "".join(f"{other:>24}" for other in shown))
    missed = []
    for problem in given.problems.split(","):
        for curves in given.curves.split(","):
            found = ratios(table(given, problem, curves, pairs))
            line = "".join(f"{cell(values)} ({max(values):.2f})".rjust(24) for values in found.values())
            print(f"{problem + ' ' + curves:20}{line}", flush=True)
            missed += [f"{problem} {curves}: {other}" for other, each in found.items() if max(each) > BARS[other]]
    bars = ", ".join(f"{other} {bar:.2f}" for other, bar in BARS.items() if other in shown)
    print(f"bars of every seed: {bars}: " + ("MISSED by " + "; ".join(missed) if missed else "reached"))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
