"""How fast samplers find the front: hypervolume over budget on the closed-form problems, and the bars.

    python -m tests.benchmarks.search [--seeds 5] [--trials 200] [--concurrent 1] [--samplers auto,random,...]

Each cell is the median over seeds of the hypervolume as a share of the exact front's, with the smallest and the largest
in brackets. No trial is stopped early. Optuna's TPE takes minutes; ours takes seconds.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

from tests.laboratory.clock import points, simulate
from tests.laboratory.problems import PROBLEMS
from tests.laboratory.proposers import PROPOSERS

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


def shares(problem: str, sampler: str, seed: int, trials: int, concurrent: int) -> dict[int, float]:
    """Share of the exact hypervolume after each budget, trials in the order of their ends."""
    made = PROBLEMS[problem](seed)
    run = simulate(made, PROPOSERS[sampler](made, seed), trials=trials, concurrent=concurrent, seed=seed)
    ended = points(sorted(run, key=lambda trial: (trial.ended_s or 0.0, trial.number)))
    return {budget: made.share(ended[:budget]) for budget in BUDGETS if budget <= trials}


def table(samplers: list[str], seeds: int, trials: int, concurrent: int) -> dict[tuple[str, str, int], list[float]]:
    """Print hypervolume over budget; shares of all seeds by problem, sampler and budget."""
    found: dict[tuple[str, str, int], list[float]] = {}
    budgets = [budget for budget in BUDGETS if budget <= trials]
    print(f"{'problem':9} {'sampler':8}" + "".join(f"{budget:>20}" for budget in budgets) + "   s/sweep")
    for problem in PROBLEMS:
        for sampler in samplers:
            began = time.perf_counter()
            for seed in range(seeds):
                for budget, share in shares(problem, sampler, seed, trials, concurrent).items():
                    found.setdefault((problem, sampler, budget), []).append(share)
            cells = [cell(found[problem, sampler, budget]) for budget in budgets]
            print(f"{problem:9} {sampler:8}{''.join(cells)} {(time.perf_counter() - began) / seeds:9.2f}", flush=True)
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


def main() -> None:
    """Print the table and the bars; exit 1 if one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--concurrent", type=int, default=1)
    parser.add_argument("--samplers", default=",".join(PROPOSERS))
    given = parser.parse_args()
    found = table(given.samplers.split(","), given.seeds, given.trials, given.concurrent)
    missed = 0
    print()
    for bar in BARS:
        reached = found.get((bar.problem, "auto", bar.trials))
        if reached is None:
            continue
        missed += min(reached) < bar.share
        verdict = "reached" if min(reached) >= bar.share else "MISSED"
        print(
            f"{bar.problem:9} after {bar.trials:3} trials: {min(reached):.4f} of all seeds, bar {bar.share}: {verdict}"
        )
    seconds = suggestions_s()
    missed += seconds > SUGGESTIONS_S
    verdict = "reached" if seconds <= SUGGESTIONS_S else "MISSED"
    print(f"{SUGGESTIONS} suggestions over 42 parameters: {seconds:.2f} s, bar {SUGGESTIONS_S} s: {verdict}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
