"""The kill matrix: whatever dies, the sweep ends, its books are whole, and its front is that of an undisturbed sweep.

    python -m tests.kill_matrix [--seed 0] [--delay 0] [--only VICTIM] [--at MOMENT] [--kept FILE]

Every victim is killed (SIGKILL) at every moment, once; storage is filled up, made read-only, and processes are stopped
(SIGSTOP) in the middle of an epoch. Where driver or head died, `raysearch resume` follows, as a person would. Equality
is bit for bit: one worker on CPUs. Each cell has a Ray of its own; `node` cells have a cluster of a head and two nodes.
`--delay` moves all blows, in seconds; `--seed` changes the sweep. The exit code is 1 if a cell fails. `--kept` names a
file of results: cells that have passed according to it are not played again.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

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
    parser.add_argument("--kept", type=Path, help="JSON file of results: read at first, written after each cell")
    asked = parser.parse_args()
    cells = [(victim, moment) for victim in VICTIMS for moment in MOMENTS]
    cells += [(fault, "mid-epoch") for fault in FAULTS if can_mount() or not fault.startswith("storage")]
    cells = [c for c in cells if c[0] in (asked.only or c) and c[1] in (asked.at or c)]
    kept = json.loads(asked.kept.read_text()) if asked.kept and asked.kept.exists() else []
    results: dict[tuple[str, str], str] = {(victim, moment): word for victim, moment, word in kept}
    left = [cell for cell in cells if not results.get(cell, "").startswith("ok")]
    with tempfile.TemporaryDirectory() as scratch:
        undisturbed = Cell("", "", Path(scratch) / "undisturbed", seed=asked.seed).play()
        expected = outcome(undisturbed.path)
        print(f"undisturbed: {undisturbed.seconds:.0f} s, {len(expected['front'])} points on the front", flush=True)
        for number, cell in enumerate(left):
            results[cell] = play(*cell, Path(scratch) / f"{number}", asked.seed, asked.delay, expected)
            print(f"{cell[0]:18s} {cell[1]:15s} {results[cell]}", flush=True)
            if asked.kept:
                asked.kept.write_text(json.dumps([[*each, word] for each, word in results.items()], indent=1) + "\n")
    print("\n" + table({cell: results[cell] for cell in cells}))
    return any(not results[cell].startswith("ok") for cell in cells)


def play(victim: str, moment: str, folder: Path, seed: int, delay: float, expected: dict[str, Any]) -> str:
    """What became of a cell, in a few words."""
    try:
        ran = Cell(victim, moment, folder, seed=seed, delay=delay).play()
        check(ran, expected)
    except AssertionError as error:
        kept = Path(tempfile.mkdtemp(prefix="kill-matrix-")) / "cell"
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("ray"))
        print(f"  everything of this cell is kept in {kept}", flush=True)
        return f"FAILED: {str(error).splitlines()[0]}"
    shutil.rmtree(folder)
    return f"ok {ran.seconds:.0f} s" + (f", resumed {ran.resumed}x" if ran.resumed else "")


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
