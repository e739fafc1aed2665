"""The default search against random search and plain Optuna on real trainings: per-layer bits of LeNet-5 on MNIST.

    python -m tests.benchmarks.search_mnist --data-root DATA --out FOLDER [--seeds 5] [--budget 60] [--epochs 3]
        [--batch 128] [--limit 20000] [--lr 0.02] [--data mnist] [--concurrent N]

A budget of trial-epochs for each of three searches and each seed: `default` is `raysearch sweep` as it is; `random` and
`tpe` are Optuna's samplers with all objectives as a person would use them, without stopping or first proposals, in this
process. Each search has a folder below --out: what is complete is not run again, what was interrupted is resumed.
Every trial begins with the same float network (`--start-epochs`). Two ratios are printed: with what share of the epochs
of random search, and of plain TPE, the default reaches their final hypervolume; median over seeds, and each seed's.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna

import raysearch
from analysis.pareto import hypervolume_history
from raysearch.records import Log, read_lines
from raysearch.resolve import resolve, trial_config
from raysearch.result import Result
from raysearch.sweep import Sweep
from trainables.config import merged, parse
from trainables.cost import size_bytes
from trainables.fit import fit
from trainables.start import float_start

BARS = {"random": 1 / 3, "tpe": 1 / 2}
SAMPLERS = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
Curve = tuple[np.ndarray, np.ndarray]
"""Epochs of all trials together when each complete trial ended, and the hypervolume then."""


def sweep_of(given: argparse.Namespace, seed: int) -> Sweep:
    """The question of a search."""
    settings: dict[str, Any] = {
        "optimizer/lr": given.lr,
        "training/batch_size": given.batch,
        "start/batch_size": given.batch,
        "start/epochs": given.start_epochs,
    }
    if given.limit:
        settings["data/train_limit"] = given.limit
    return Sweep(
        model="lenet5",
        data=given.data,
        data_root=given.data_root,
        space="all_layers",
        epochs=given.epochs,
        trials=given.budget,
        epoch_budget=given.budget,
        seed=seed,
        concurrent=given.concurrent,
        settings=settings,
    )


def default(given: argparse.Namespace, seed: int) -> Curve:
    """Ours, which is run, resumed, or there already."""
    path = given.out / f"default-{seed}"
    if (path / "end.json").exists():
        result = Result(path)
    elif (path / "sweep.json").exists():
        result = raysearch.resume(path)
    else:
        shutil.rmtree(path, ignore_errors=True)  # a driver that was killed before it had asked its question
        result = raysearch.run(sweep_of(given, seed), path)
    last = {line["trial"]: spent for spent, line in enumerate(read_lines(result.folder.epochs), start=1)}
    rows = [row for row in result.records() if row["status"] == "complete"]
    return curve(sorted(rows, key=lambda row: last[row["trial"]]), last, result.objectives)


def plain(given: argparse.Namespace, search: str, seed: int) -> Curve:
    """A sampler of Optuna with all objectives; one line is kept for each trial."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{search}-{seed}.jsonl"
    sweep = sweep_of(given, seed)
    resolved = resolve(sweep)
    directions = ["maximize" if way == "max" else "minimize" for way in sweep.objectives.values()]
    rows, log = list(read_lines(path)), Log(path)
    study = optuna.create_study(directions=directions)
    for number in range(given.budget // given.epochs):
        # A sampler for each trial, so that a search that is resumed proposes what it would have.
        study.sampler = SAMPLERS[search](seed=seed * 100_003 + number)
        trial = study.ask(resolved.space)
        if number == len(rows):
            row = {"trial": number, "status": "complete", **trained(given, sweep, resolved.base, trial.params)}
            row["float_size_bytes"] = size_bytes(resolved.table, {}, extra_floats=0)
            log.append(row, durable=True)
            rows.append(row)
        study.tell(trial, [rows[number][name] for name in sweep.objectives])
    log.close()
    spent = {row["trial"]: (row["trial"] + 1) * given.epochs for row in rows}
    return curve(rows, spent, sweep.objectives)


def trained(given: argparse.Namespace, sweep: Sweep, base: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and costs of one trial."""
    config = parse(merged(base, params))
    root = None if sweep.data_root is None else Path(sweep.data_root)
    start = float_start(trial_config(sweep), given.out / "starts", data_root=root, device=given.device)
    *_, report = fit(config, data_root=root, start=start, device=given.device)
    point = json.loads(json.dumps(report.to_json()))["points"][0]
    return {name: point[name] for name in ("accuracy", "loss", "bops", "relative_bops", "size_bytes")}


def curve(rows: list[dict[str, Any]], spent: dict[int, int], objectives: dict[str, str]) -> Curve:
    """Hypervolume over epochs of complete trials in the order of their ends."""
    history = hypervolume_history(rows, objectives)
    return np.array([spent[trial] for trial in history["trial"]]), history["hypervolume"].to_numpy()


def share_of_epochs(mine: Curve, theirs: Curve) -> float:
    """Epochs until we reach their final hypervolume, as a share of all of theirs; infinite if never."""
    place = int(np.searchsorted(mine[1], theirs[1][-1]))
    return float(mine[0][place] / theirs[0][-1]) if place < len(mine[0]) else np.inf


def main() -> None:
    """Run what is missing, print the table and the ratios; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--start-epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=int, default=20_000, help="training images; 0 is all")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--concurrent", type=int)
    parser.add_argument("--device", default="cpu", help="of random and tpe; the default search takes what Ray has")
    given = parser.parse_args()
    curves: dict[str, list[Curve]] = {}
    for seed in range(given.seeds):
        for search in ("default", *BARS):
            found = default(given, seed) if search == "default" else plain(given, search, seed)
            curves.setdefault(search, []).append(found)
            marks = [found[1][found[0] <= given.budget * share] for share in (0.25, 0.5, 1.0)]
            shown = "  ".join(f"{volumes[-1]:.4f}" if len(volumes) else "-" for volumes in marks)
            print(f"seed {seed} {search:8} hypervolume after 1/4, 1/2, all of the epochs: {shown}", flush=True)
    missed = 0
    for other, bar in BARS.items():
        shares = [share_of_epochs(a, b) for a, b in zip(curves["default"], curves[other], strict=True)]
        median = float(np.median(shares))
        missed += median > bar
        verdict = "reached" if median <= bar else "MISSED"
        each = ", ".join(f"{share:.2f}" for share in shares)
        print(f"default over {other}: {median:.2f} of the epochs (bar {bar:.2f}: {verdict}); seeds: {each}")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
