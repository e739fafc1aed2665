"""What a trial costs beside its training: time to the first step of a sweep, and from one trial to the next.

    python -m tests.benchmarks.trials [--trials 12] [--documented 3]

Three ways on the embedded digits, one training step a trial: our slots inline and as a Ray Train worker group, and the
way that Ray documents, a `TorchTrainer` started by each Tune trial. Wall time; run it on a quiet machine. Each way is a
process of its own, as a person would start it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raysearch.cluster.connection import RAY_ENVIRONMENT

SETTINGS = {"start/epochs": 0, "training/batch_size": 1024}


def ours(out: Path, trials: int, workers: int) -> None:
    """A sweep through the platform's slots; its records hold the times."""
    import raysearch

    sweep = raysearch.Sweep(trials=trials, epochs=1, workers=workers, concurrent=1, settings=SETTINGS)
    raysearch.run(sweep, out)


def documented(out: Path, trials: int, workers: int) -> None:
    """The documented way: a function trainable that starts a Train run for each trial."""
    import ray
    from ray import train, tune
    from ray.train.torch import TorchConfig, TorchTrainer

    def loop(job: dict[str, Any]) -> None:
        from raysearch.cluster.worker import messages

        first = train.get_context().get_world_rank() == 0
        for message in messages(job):
            if not first:
                continue
            with Path(job["log"]).open("a") as file:
                file.write(json.dumps(message) + "\n")
        train.report({"done": 1})

    def trial(config: dict[str, Any]) -> None:
        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            torch_config=TorchConfig(backend="gloo"),
            run_config=train.RunConfig(name=f"trial-{config['number']}", storage_path=str(out / "train")),
        ).fit()

    from raysearch.cluster.worker import make_job
    from raysearch.resolve import resolve
    from raysearch.sweep import Sweep

    base = resolve(Sweep(epochs=1, settings=SETTINGS)).base
    jobs = [make_job(n, base, out / f"trials/{n}", out / "starts", None, "cpu") for n in range(trials)]
    ray.init(address="local", log_to_driver=False, logging_level="ERROR")
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0, "memory": 1e6}),
        param_space=tune.grid_search([{**job, "log": str(out / "log.jsonl")} for job in jobs]),
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(storage_path=str(out / "tune"), name="tune", verbose=0),
    ).fit()


def times(out: Path) -> list[dict[str, float]]:
    """First step and last report of each trial, in order."""
    if (out / "records.jsonl").exists():
        rows = [json.loads(line)["timing"] for line in (out / "records.jsonl").read_text().splitlines()]
    else:
        rows = []
        for line in (out / "log.jsonl").read_text().splitlines():
            message = json.loads(line)
            if "report" in message:
                rows.append(
                    {"first_step_at": message["report"]["first_step_at"], "reported_at": message["reported_at"]}
                )
    return sorted(rows, key=lambda row: row["first_step_at"])


WAYS = {
    "inline slot, 1 worker": ("ours", 1),
    "worker group, 2 workers": ("ours", 2),
    "documented way, 1 worker": ("documented", 1),
    "documented way, 2 workers": ("documented", 2),
}


def main() -> None:
    """Run each way in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--documented", type=int, default=3, help="trials of the documented way")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        way, workers = WAYS[arguments.way]
        {"ours": ours, "documented": documented}[way](arguments.out, arguments.trials, workers)
        return
    print(f"{'way':28s} {'first step':>11s} {'between trials, median':>23s} {'largest':>9s}")
    for name, (way, _) in WAYS.items():
        trials = arguments.documented if way == "documented" else arguments.trials
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run"
            began = time.time()
            command = [sys.executable, "-m", "tests.benchmarks.trials", "--way", name, "--out", str(out)]
            environment = os.environ | (RAY_ENVIRONMENT if way == "ours" else {"RAY_USAGE_STATS_ENABLED": "0"})
            subprocess.run([*command, "--trials", str(trials)], check=True, env=environment, stdout=subprocess.DEVNULL)
            rows = times(out)
        gaps = [later["first_step_at"] - row["reported_at"] for row, later in itertools.pairwise(rows)]
        first = rows[0]["first_step_at"] - began
        print(f"{name:28s} {first:9.1f} s {statistics.median(gaps):21.3f} s {max(gaps):7.3f} s", flush=True)


if __name__ == "__main__":
    main()
