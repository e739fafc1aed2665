"""The front of a supernet against independent per-layer QAT at equal total compute: hypervolume and core-hours.

    python -m tests.benchmarks.supernet_vs_qat --data mnist --data-root DATA [--seed 0] [--epochs 3] [--out FOLDER]

A supernet is trained and searched; then a per-layer sweep of one-epoch trials runs for as many trials as fit into the
core-seconds that both took, whose float start is the same. Hypervolumes are of validation accuracy, BOPs and size, over
the same images.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from raysearch.driver import run
from raysearch.result import front_of
from raysearch.seeds import Seeds
from raysearch.supernet import Search, search
from raysearch.sweep import Sweep


class Silent:
    """Watches without a word."""

    def started(self, path: Path, text: str, known: int) -> None:
        pass

    def evaluated(self, rows: Any, evaluations: int) -> None:
        pass


def seconds_of(result: Any) -> float:
    """Core-seconds of all trials, of one core each."""
    return sum(row["seconds"] for row in result.records() if row["point"] in ("final", "8-bit"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=3, help="of the supernet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluations", type=int, default=256)
    parser.add_argument("--images", type=int, default=2000, help="validation images")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp())
    common: dict[str, Any] = {
        "model": given.model,
        "data": given.data,
        "data_root": given.data_root,
        "seed": given.seed,
    }
    settings = {"data/validation_limit": given.images, "start/epochs": 2}
    asked = Sweep(**common, method="double_rounding", epochs=given.epochs, trials=1, space={}, settings=settings)
    net = run(asked, out / "supernet", seeds=Seeds(first=(("given", {}),)))
    began = time.perf_counter()
    question = Search(run=str(net.path), evaluations=given.evaluations, seed=given.seed)
    found = search(question, out / "search", watcher=Silent())
    end = json.loads(found.folder.end.read_text())
    spent = seconds_of(net) + end["seconds"] * end["workers"]
    print(
        f"supernet: {seconds_of(net):.0f} core-s training, {end['seconds'] * end['workers']:.0f} core-s for "
        f"{end['trials']} mixtures ({time.perf_counter() - began:.0f} s wall), {len(found.front())} points, "
        f"hypervolume {found.front().hypervolume():.4f}",
        flush=True,
    )
    starts = next((net.path / "starts").glob("*.safetensors"))
    trial = {"data/validation_limit": given.images, "start/checkpoint": str(starts.resolve())}
    probe = run(Sweep(**common, epochs=1, trials=2, space="per_layer", settings=trial), out / "probe")
    trials = max(2, round(spent / (seconds_of(probe) / 2)))
    qat = run(Sweep(**common, epochs=1, trials=trials, space="per_layer", settings=trial), out / "qat")
    print(
        f"QAT:      {seconds_of(qat):.0f} core-s for {trials} trials of one epoch, {len(qat.front())} points, "
        f"hypervolume {qat.front().hypervolume():.4f}"
    )
    both = front_of([found, qat])
    print(both.table())
    print(f"core-hours: supernet {spent / 3600:.3f}, QAT {seconds_of(qat) / 3600:.3f}")


if __name__ == "__main__":
    main()
