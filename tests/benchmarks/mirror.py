"""What MLflow costs a sweep: 1,000 trials of 30 epochs with 8 metrics each, sent to a database as in a sweep.

    python -m tests.benchmarks.mirror [--trials 1000] [--epochs 30]

The driver never waits for MLflow: a process of its own, at the lowest priority but one, reads the run folder. So what a
sweep can lose to it is CPU time. The folder here is that of a sweep whose trials take no time; the mirror's CPU time,
over that of a sweep's trials, is what it adds. The last line says for how short a trial that is 5 %.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from raysearch.records import RunFolder
from raysearch.tracking import mirror_once
from tests.raysearch.builders import finished_run, small_sweep

SHARE = 0.05


def repeat(folder: RunFolder, trials: int) -> int:
    """Let the run folder have so many trials, all like its first; returns how many metrics its epochs have."""
    record = folder.read_records()[0]
    epochs = [json.loads(line) | {"energy": 1.0} for line in folder.epochs.read_text().splitlines()]
    with folder.records.open("w") as records, folder.epochs.open("w") as lines:
        for number in range(trials):
            for epoch in epochs:
                lines.write(json.dumps(epoch | {"trial": number}) + "\n")
            records.write(json.dumps(record | {"trial": number}) + "\n")
    return trials * sum(len(epoch.keys() - {"trial", "epoch", "time"}) for epoch in epochs)


def main() -> None:
    """Write, send, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mirror-") as scratch:
        folder = finished_run(Path(scratch) / "run", small_sweep(trials=1, epochs=given.epochs))
        metrics = repeat(folder, given.trials)
        import mlflow  # noqa: F401  its import is paid once a sweep

        wall, cpu = time.monotonic(), time.process_time()
        found = mirror_once(folder.path)
        wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    assert found.complete, found
    print(f"{given.trials} trials x {given.epochs} epochs, {metrics} metrics: {cpu:.1f} s of CPU time, {wall:.1f} s")
    a_trial_s = cpu / given.trials
    print(f"{1000 * a_trial_s:.1f} ms a trial: {SHARE:.0%} of trials that take {a_trial_s / SHARE:.2f} s of CPU time")


if __name__ == "__main__":
    main()
