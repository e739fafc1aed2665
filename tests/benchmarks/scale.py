"""Ten thousand trials through the real driver: does a trial cost as much at the end as at the beginning?

    python -m tests.benchmarks.scale [--trials 10000] [--sampler random] [--concurrent 2] [--out FOLDER]

Trials of `closed_form` take milliseconds, so what is left is overhead: proposals, Tune, slots, records, the study on
disk. The table has, for windows along the sweep, the wall time of a trial, the CPU time that the driver spends on it,
which other work on the machine does not change, and the memory of the driver. Then the
finished sweep is opened again, as `raysearch resume` does: that is what a restart costs beside Ray's.
"""

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import raysearch
from raysearch.book import Book
from raysearch.driver import Watcher

WINDOW = 100
NAME = "tests.benchmarks.closed_form"
ROOT = Path(__file__).parents[2]


class Clock(Watcher):
    """Notes when each trial ends, and the memory of the driver."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu_s: list[float] = []
        self.memory_bytes: list[int] = []

    def event(self, book: Book) -> None:
        """A trial may have ended."""
        ended = sum(book.counts.values())
        while len(self.ends) < ended:
            self.ends.append(time.monotonic())
            self.cpu_s.append(time.process_time())
            self.memory_bytes.append(_resident_bytes())
            if ended % 500 == 0:
                print(f"{ended} trials, {_line(self, ended)}", file=sys.stderr, flush=True)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _line(clock: Clock, at: int) -> str:
    ends, cpu_s = (times[max(0, at - WINDOW) : at] for times in (clock.ends, clock.cpu_s))
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    mean_ms, median_ms = 1000 * statistics.mean(gaps), 1000 * statistics.median(gaps)
    cpu_ms, megabytes = 1000 * (cpu_s[-1] - cpu_s[0]) / len(gaps), clock.memory_bytes[at - 1] / 1e6
    return f"{mean_ms:6.1f} ms a trial (median {median_ms:6.1f}), CPU {cpu_ms:5.1f} ms, {megabytes:5.0f} MB"


def main() -> None:
    """Run the sweep, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    out = given.out or Path(tempfile.mkdtemp(prefix="scale-"))
    sweep = raysearch.Sweep(
        method=NAME,
        model=f"{NAME}:build",
        data=NAME,
        trials=given.trials,
        epochs=1,
        sampler=given.sampler,
        concurrent=given.concurrent,
        settings={"start/epochs": 0, "training/batch_size": 255},
    )
    clock, began = Clock(), time.monotonic()
    raysearch.run(sweep, out, watcher=clock)
    print(f"{given.trials} trials in {time.monotonic() - began:.0f} s, sampler {given.sampler}")
    for at in (WINDOW, *(at for at in (200, 300, 1000, 3000, 10_000, 30_000) if at <= given.trials)):
        print(f"trial {at:6}: {_line(clock, at)}")
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "raysearch.cli", "resume", str(out)], check=True, capture_output=True)
    print(f"resume of the finished sweep: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
