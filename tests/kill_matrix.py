"""The kill matrix: whatever dies, the sweep ends, its books are whole, and its front is that of an undisturbed sweep.

    python -m tests.kill_matrix [--seed 0] [--delay 0] [--only VICTIM] [--at MOMENT]

Every victim is killed (SIGKILL) at every moment, once; storage is filled up, made read-only, and processes are stopped
(SIGSTOP) in the middle of an epoch. Where driver or head died, `raysearch resume` follows, as a person would. Equality
is bit for bit: one worker on CPUs. Each cell has a Ray of its own; `node` cells have a cluster of a head and two nodes.
`--delay` moves all blows, in seconds; `--seed` changes the sweep. The exit code is 1 if a cell fails.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.kills.cells import FAULTS, Cell, can_mount, check, outcome
from tests.kills.moments import MOMENTS
from tests.kills.victims import VICTIMS


def main() -> int:
    """Play the cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the sweep")
    parser.add_argument("--delay", type=float, default=0.0, help="from each moment to its blow, in seconds")
    parser.add_argument("--only", action="append", choices=[*VICTIMS, *FAULTS], help="only this victim or fault")
    parser.add_argument("--at", action="append", choices=MOMENTS, help="only at this moment")
    asked = parser.parse_args()
    cells = [(victim, moment) for victim in VICTIMS for moment in MOMENTS]
    cells += [(fault, "mid-epoch") for fault in FAULTS if can_mount() or not fault.startswith("storage")]
    cells = [c for c in cells if c[0] in (asked.only or c) and c[1] in (asked.at or c)]
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Cell("", "", Path(scratch) / "undisturbed", seed=asked.seed).play()
        expected = outcome(undisturbed.path)
        print(f"undisturbed: {undisturbed.seconds:.0f} s, {len(expected['front'])} points on the front", flush=True)
        results: dict[tuple[str, str], str] = {}
        for number, (victim, moment) in enumerate(cells):
            folder = Path(scratch) / f"{number}"
            try:
                ran = Cell(victim, moment, folder, seed=asked.seed, delay=asked.delay).play()
                check(ran, expected)
                word = f"ok {ran.seconds:.0f} s" + (f", resumed {ran.resumed}x" if ran.resumed else "")
            except AssertionError as error:
                word = f"FAILED: {str(error).splitlines()[0]}"
                kept = Path(tempfile.mkdtemp(prefix="kill-matrix-")) / "cell"
                shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("ray"))
                print(f"  everything of this cell is kept in {kept}", flush=True)
            results[victim, moment] = word
            print(f"{victim:18s} {moment:15s} {word}", flush=True)
    print("\n" + table(results))
    return any(not word.startswith("ok") for word in results.values())


def table(results: dict[tuple[str, str], str]) -> str:
    """Victims down, moments across."""
    moments = [moment for moment in MOMENTS if any(cell[1] == moment for cell in results)]
    rows = [["killed", *moments]]
    for victim in dict.fromkeys(victim for victim, _ in results):
        rows.append([victim, *(results.get((victim, moment), "").partition(":")[0] for moment in moments)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{word:{width}s}" for word, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
