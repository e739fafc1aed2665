"""How fast samplers find the front: hypervolume over budget on the closed-form problems, and the bars.

    python -m tests.benchmarks.search [--seeds 5] [--trials 200] [--concurrent 1] [--samplers auto,random,...]
        [--problems exact,mine.py:make,...]

Each cell is the median over seeds of the hypervolume as a share of the exact front's, with the smallest and the largest
in brackets. No trial is stopped early. `waste` is the mean share of trials that a trial dominates which had ended
before they were proposed; no trial is ever repeated. Optuna's TPE takes minutes; ours takes seconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.integer_program import Limit
from analysis.ladder import ladder
from tests.laboratory.clock import points, repeated, simulate, wasted
from tests.laboratory.problem import Problem
from tests.laboratory.problems import PROBLEMS, problem_named
from tests.laboratory.proposers import PROPOSERS
from tests.laboratory.stoppers import STOPPERS

BUDGETS = (10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Bar:
    """What ours must reach: the smallest share over all seeds after so many trials of a problem."""

    problem: str
    trials: int
    share: float


BARS = (
    Bar("exact", 50, 0.98),
    Bar("exact", 200, 0.995),
    Bar("noise 1", 200, 0.97),
    Bar("coupled", 200, 0.95),
)
SUGGESTIONS, SUGGESTIONS_S = 1000, 2.0
LAYERS, OPTIONS, LADDER, LADDER_S, GAP = 53, 36, 50, 0.5, 1e-3
SHORT, PER_MINUTE = 20, {"random": 3000, "auto": 500}
"""Trials of a short sweep, and how many such sweeps a minute of one core must hold, by sampler."""


@dataclass(frozen=True)
class Sweep:
    """What one simulated sweep was worth: shares of the exact hypervolume by budget, and shares of all trials."""

    shares: dict[int, float]
    wasted: float
    repeated: float


def sweep(problem: Problem, sampler: str, seed: int, trials: int, concurrent: int) -> Sweep:
    """Shares after each budget, trials in the order of their ends."""
    run = simulate(problem, PROPOSERS[sampler](problem, seed), trials=trials, concurrent=concurrent, seed=seed)
    ended = points(sorted(run, key=lambda trial: (trial.ended_s or 0.0, trial.number)))
    shares = {budget: problem.share(ended[:budget]) for budget in BUDGETS if budget <= trials}
    return Sweep(shares, len(wasted(run)) / len(run), len(repeated(run)) / len(run))


def table(given: argparse.Namespace) -> dict[tuple[str, str, int], list[float]]:
    """Print hypervolume over budget; shares of all seeds by problem, sampler and budget."""
    found: dict[tuple[str, str, int], list[float]] = {}
    budgets = [budget for budget in BUDGETS if budget <= given.trials]
    print(f"{'problem':11} {'sampler':8}" + "".join(f"{budget:>20}" for budget in budgets) + "  waste repeats s/sweep")
    for name in given.problems.split(","):
        problems = [problem_named(name, seed) for seed in range(given.seeds)]
        for sampler in given.samplers.split(","):
            began = time.process_time()
            sweeps = [sweep(p, sampler, seed, given.trials, given.concurrent) for seed, p in enumerate(problems)]
            for budget in budgets:
                found[name, sampler, budget] = [each.shares[budget] for each in sweeps]
            cells = "".join(cell(found[name, sampler, budget]) for budget in budgets)
            means = [statistics.mean(s.wasted for s in sweeps), statistics.mean(s.repeated for s in sweeps)]
            seconds = (time.process_time() - began) / given.seeds
            print(f"{name:11} {sampler:8}{cells} {means[0]:6.1%} {means[1]:7.1%} {seconds:7.2f}", flush=True)
    return found


def cell(values: list[float]) -> str:
    """Median and range over seeds."""
    return f"{statistics.median(values):7.4f} [{min(values):.3f} {max(values):.3f}]".rjust(20)


def suggestions_s() -> float:
    """Processor time of 1,000 suggestions over 42 parameters, each told before the next; evaluation included."""
    problem = PROBLEMS["noise 1"](0)
    began = time.process_time()
    simulate(problem, PROPOSERS["auto"](problem, 0), trials=SUGGESTIONS)
    return time.process_time() - began


def ladder_s() -> tuple[float, float]:
    """Processor time of the integer program's front for 50 budgets, 53 layers and 36 choices; the largest gap."""
    generator = np.random.default_rng(0)
    bits = np.array([(w, a) for w in (2, 3, 4, 5, 6, 8) for a in (2, 3, 4, 5, 6, 8)], dtype=float)
    scores = generator.lognormal(0, 1.3, (LAYERS, 2)) @ (4.0**-bits).T
    amounts = generator.lognormal(0, 1, (LAYERS, 1)) * bits.prod(axis=1)
    ends = amounts.min(axis=1).sum(), amounts.max(axis=1).sum()
    began = time.process_time()
    found = ladder(scores, Limit(name="bops", amounts=amounts), np.geomspace(*ends, LADDER).clip(*ends), gap=GAP)
    return time.process_time() - began, max(step.gap for step in found)


def short_sweeps_per_minute(sampler: str, stopper: str) -> float:
    """Simulated sweeps of 20 trials' epochs over 42 parameters in a minute of processor time."""
    problem = PROBLEMS["noise 1"](0)
    epochs = float(SHORT * problem.fidelity.epochs)
    began, count = time.process_time(), 0
    while time.process_time() - began < 2:
        run = simulate(
            problem,
            PROPOSERS[sampler](problem, count),
            trials=10**6,
            concurrent=8,
            seed=count,
            stopper=STOPPERS[stopper](problem),
            budget=epochs,
        )
        problem.share(points(run))
        count += 1
    return count * 60 / (time.process_time() - began)


def speeds() -> Iterator[tuple[str, bool]]:
    """Lines about speed, and whether each bar is reached."""
    seconds = suggestions_s()
    yield (
        f"{SUGGESTIONS} suggestions over 42 parameters: {seconds:.2f} s, bar {SUGGESTIONS_S} s",
        seconds <= SUGGESTIONS_S,
    )
    seconds, gap = ladder_s()
    text = f"{LADDER} budgets x {LAYERS} layers x {OPTIONS} choices: {seconds:.3f} s, gap {gap:.1e}"
    yield f"{text}, bars {LADDER_S} s and {GAP}", seconds <= LADDER_S and gap <= GAP
    for sampler, stopper in (("random", "none"), ("random", "mo_asha"), ("auto", "none"), ("auto", "mo_asha")):
        count = short_sweeps_per_minute(sampler, stopper)
        text = (
            f"simulated sweeps of {SHORT} trials' epochs, {sampler} with {stopper}: {count:,.0f} a minute on one core"
        )
        yield f"{text}, bar {PER_MINUTE[sampler]:,}", count >= PER_MINUTE[sampler]


def verdict(reached: bool) -> str:
    """In words."""
    return "reached" if reached else "MISSED"


def main() -> None:
    """Print the table and the bars; exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--samplers", default=",".join(PROPOSERS))
    parser.add_argument("--problems", default=",".join(PROBLEMS))
    found = table(parser.parse_args())
    print()
    verdicts = []
    for bar in BARS:
        reached = min(found.get((bar.problem, "auto", bar.trials), [np.nan]))
        if not np.isnan(reached):
            verdicts.append(reached >= bar.share)
            text = f"{bar.problem:9} after {bar.trials:3} trials: {reached:.4f} of all seeds, bar {bar.share}"
            print(f"{text}: {verdict(verdicts[-1])}")
    for text, kept in speeds():
        verdicts.append(kept)
        print(f"{text}: {verdict(kept)}", flush=True)
    sys.exit(0 if all(verdicts) else 1)


if __name__ == "__main__":
    main()
