"""The front of a supernet against independent per-layer QAT at equal total compute: hypervolume and core-hours.

    python -m tests.benchmarks.supernet_vs_qat --data mnist --data-root DATA [--seed 0] [--epochs 3] [--out FOLDER]

What an epoch of either training and a mixture of the search cost is measured first, in CPU time of one thread, so that
a busy machine does not decide. A supernet is trained and searched; then a per-layer sweep of one-epoch trials runs for
as many trials as fit into the CPU time of both. The float start is the same, and not counted. Hypervolumes are of
validation accuracy, BOPs and size, over the same images. What --out holds already is not made again.
"""

import argparse
import itertools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from raysearch.driver import run
from raysearch.result import Result, front_of
from raysearch.seeds import Seeds
from raysearch.shared_weights.question import Search
from raysearch.shared_weights.supernet import search
from raysearch.sweep import Sweep
from tests.benchmarks.supernet import rate
from trainables.config import merged, parse
from trainables.fit import Session
from trainables.step import training_step
from trainables.supernet import KEPT_BYTES

STEPS, WARM_UP = 20, 3
MIXTURES = 128
"""Evaluated to find what one costs."""


class Silent:
    """Watches without a word."""

    def started(self, path: Path, text: str, known: int) -> None:
        pass

    def evaluated(self, rows: Any, evaluations: int) -> None:
        pass


def epoch_s(session: Session) -> float:
    """CPU seconds of one epoch, validation included."""
    session.calibrate()
    optimizers = session.optimizers()
    session.model.train()
    began = 0.0
    for step, (images, labels) in enumerate(itertools.islice(session.batches(0), STEPS + WARM_UP)):
        if step == WARM_UP:
            began = time.process_time()
        training_step(session.method, session.model, session.forward, images, labels, optimizers)
    steps_s = (time.process_time() - began) / STEPS * session.steps_per_epoch()
    began = time.process_time()
    session.measure(session.data.validation)
    return steps_s + time.process_time() - began


def mixture_s(session: Session, images: int, seed: int) -> float:
    """CPU seconds of evaluating one mixture, as a search does."""
    choices = session.method.choices(session.model)
    chance = random.Random(seed)
    mixtures = [
        {name: [chance.choice(each.weight), chance.choice(each.activation)] for name, each in choices.items()}
        for _ in range(MIXTURES)
    ]
    return 1 / rate(session, images, mixtures, KEPT_BYTES, 64)


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
    torch.set_num_threads(1)
    out = given.out or Path(tempfile.mkdtemp())
    common: dict[str, Any] = {"model": given.model, "data": given.data, "data_root": given.data_root}
    common |= {"seed": given.seed}
    settings = {"data/validation_limit": given.images}
    tree: dict[str, Any] = {"model": {"name": given.model}, "data": {"name": given.data}, "seed": given.seed}
    root = None if given.data_root is None else Path(given.data_root)
    sessions = {
        method: Session(parse(merged({**tree, "method": {"name": method}}, settings)), data_root=root)
        for method in ("double_rounding", "lsq")
    }
    costs = {method: epoch_s(session) for method, session in sessions.items()}
    training_s = given.epochs * costs["double_rounding"]
    search_s = given.evaluations * mixture_s(sessions["double_rounding"], given.images, given.seed)
    trials = max(2, round((training_s + search_s) / costs["lsq"]))

    asked = Sweep(
        **common,
        method="double_rounding",
        epochs=given.epochs,
        trials=1,
        space={},
        settings={**settings, "start/epochs": 2},
    )
    net = _made(out / "supernet") or run(asked, out / "supernet", seeds=Seeds(first=(("given", {}),)))
    question = Search(run=str(net.path), evaluations=given.evaluations, seed=given.seed)
    found = _made(out / "search") or search(question, out / "search", watcher=Silent())
    front = found.front()
    print(
        f"supernet: {training_s:.0f} s training, {search_s:.0f} s for {given.evaluations} mixtures, "
        f"{(training_s + search_s) / 3600:.4f} core-hours, {len(front)} points, hypervolume {front.hypervolume():.4f}",
        flush=True,
    )
    start = next((net.path / "starts").glob("*.safetensors"))
    settings["start/checkpoint"] = str(start.resolve())
    alone = Sweep(**common, epochs=1, trials=trials, space="per_layer", settings=settings)
    qat = _made(out / "qat") or run(alone, out / "qat")
    front = qat.front()
    print(
        f"QAT:      {trials} trials of one epoch and {costs['lsq']:.1f} s, {trials * costs['lsq'] / 3600:.4f} "
        f"core-hours, {len(front)} points, hypervolume {front.hypervolume():.4f}"
    )
    print(front_of([found, qat]).table())


def _made(path: Path) -> Result | None:
    """What was made already."""
    return Result(path) if (path / "end.json").exists() else None


if __name__ == "__main__":
    main()
