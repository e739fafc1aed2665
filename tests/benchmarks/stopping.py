"""Samplers with and without early stopping: hypervolume over trial-epochs on the closed-form problems, and two ratios.

    python -m tests.benchmarks.stopping [--seeds 10] [--budget 360] [--concurrent 8] [--problems coupled,error]
        [--curves parallel,noisy,crossing] [--pairs frontier+none,random+mo_asha,...]

Each cell is the mean over seeds of the hypervolume, as a share of the exact front's, of the trials that were trained to
their end, with half the width of its 95 % confidence interval. The ratios under each table say with what share of the
epochs the default reaches the final hypervolume of random search, and of Optuna's TPE and NSGA-II without stopping.
Ray Tune's stock integration, its own OptunaSearch and ASHAScheduler, knows one objective: the loss, or the sum of loss
and cost, each over its range.
"""

import argparse
import sys
import time
from dataclasses import dataclass, replace

import numpy as np

from tests.laboratory.clock import Proposer, Stopper, Trial, points, simulate
from tests.laboratory.problems import CURVES, PROBLEMS, Problem
from tests.laboratory.proposers import PROPOSERS, RayOptuna
from tests.laboratory.stoppers import STOPPERS, RayASHA

SHOWN = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the budget at which the hypervolume is printed."""
DEFAULT, RANDOM, PLAIN = "auto+none", "random+none", ("tpe+none", "nsga2+none")
CHEAP = (
    "auto+none",
    "auto+mo_asha",
    "auto+front",
    "random+none",
    "random+mo_asha",
    "random+mo_asha/hv",
    "random+front",
)
OPTUNA = ("nsga2+none", "nsga2+mo_asha", "nsga2+front", "tpe+none", "tpe+mo_asha", "tpe+front", "ray+loss", "ray+sum")
BARS = {RANDOM: 1 / 3, **dict.fromkeys(PLAIN, 1 / 2)}
SMALL_ERROR = 0.05
"""Curves are in decades of noise; those of the saturating error are so much lower."""


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


def problem_of(name: str, curves: str, seed: int) -> Problem:
    """A problem of the laboratory with these learning curves."""
    fidelity = CURVES[curves]
    if name == "error":
        scale = SMALL_ERROR
        fidelity = replace(fidelity, excess=4 * scale * fidelity.excess, noise=scale * fidelity.noise)
    return replace(PROBLEMS[name](seed), fidelity=fidelity)


def pair(name: str, problem: Problem, seed: int) -> tuple[Proposer, Stopper]:
    """Sampler and stopper by name."""
    sampler, _, stopper = name.partition("+")
    if sampler == "ray":
        span = problem.reference - problem.evaluate(np.full((1, 2 * len(problem.layers)), problem.widths[-1]))[0]

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
    """Print a table; the curves of all seeds by pair."""
    marks = [round(share * given.budget) for share in SHOWN]
    print(f"\n{problem}, {curves} curves; epochs:{'':10}" + "".join(f"{mark:>15}" for mark in marks) + "  trials   s")
    found: dict[str, list[Curve]] = {}
    for name in names:
        began, ended = time.perf_counter(), []
        for seed in range(given.seeds):
            curve, run = sweep(name, problem, curves, seed, given.budget, given.concurrent)
            found.setdefault(name, []).append(curve)
            ended.append((sum(not trial.stopped for trial in run), len(run)))
        cells = "".join(f"{cell([curve.at(mark) for curve in found[name]]):>15}" for mark in marks)
        done, begun = np.mean(ended, axis=0)
        seconds = (time.perf_counter() - began) / given.seeds
        print(f"{name:32}{cells}  {done:.0f}/{begun:.0f} {seconds:5.2f}", flush=True)
    return found


def cell(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval (normal approximation)."""
    half = 1.96 * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{np.mean(values):.4f} ±{half:.4f}"


def ratios(found: dict[str, list[Curve]]) -> int:
    """Print with what share of the others' epochs the default is as good; how many bars were missed."""
    missed = 0
    for other, bar in BARS.items():
        if DEFAULT not in found or other not in found:
            continue
        shares = [
            mine.reaches(float(theirs.share[-1])) / theirs.spent[-1]
            for mine, theirs in zip(found[DEFAULT], found[other], strict=True)
        ]
        missed += max(shares) > bar
        verdict = "reached" if max(shares) <= bar else "MISSED"
        print(
            f"  default over {other}: {np.median(shares):.3f} of the epochs (worst seed {max(shares):.3f}), "
            f"bar {bar:.2f}: {verdict}"
        )
    return missed


def cheap_sweeps_per_minute(budget: int = 180) -> float:
    """Simulated sweeps of random search with stopping in a minute, of 20 trials' epochs each."""
    began, count = time.process_time(), 0
    while time.process_time() - began < 3:
        sweep("random+front", "noise 1", "parallel", count % 5, budget, 8)
        count += 1
    return count * 60 / (time.process_time() - began)


def main() -> None:
    """Print the tables; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=int, default=360)
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--problems", default="noise 1,coupled,error")
    parser.add_argument("--curves", default=",".join(CURVES))
    parser.add_argument("--pairs", default=",".join(CHEAP + OPTUNA))
    given = parser.parse_args()
    missed = 0
    for problem in given.problems.split(","):
        for curves in given.curves.split(","):
            missed += ratios(table(given, problem, curves, given.pairs.split(",")))
    print(f"\nsimulated sweeps of random search with stopping: {cheap_sweeps_per_minute():.0f} a minute")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
