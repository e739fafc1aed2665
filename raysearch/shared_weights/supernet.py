"""Search on shared weights: one switchable network is trained, then thousands of its mixtures of widths are evaluated.

    search(Search(run=...))  -> open the trained network, check, make a run folder -> _evaluate
    resume(folder)           -> read the run folder                               -> _evaluate

The run folder is one like any other, with a record for each mixture, and holds the network itself (`SUPERNET`), so it
can be picked and exported from when the run that trained it is gone. MLflow gets the front, not all mixtures.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raysearch.errors import RecordError
from raysearch.records import RunFolder, complete_trials
from raysearch.result import Result
from raysearch.seeds import Seeds
from raysearch.shared_weights.evaluators import SUPERNET, Workers
from raysearch.shared_weights.question import Opened, Search, checked, root_of, trained_network
from raysearch.sweep import default_name, default_out

if TYPE_CHECKING:
    from raysearch.cluster.nodes import Capacity


class Watcher(Protocol):
    """Who watches a search."""

    def started(self, path: Path, text: str, known: int) -> None:
        """The run folder exists; so many mixtures are evaluated already."""
        ...

    def evaluated(self, rows: Sequence[Mapping[str, Any]], evaluations: int) -> None:
        """More mixtures are evaluated."""
        ...


def search(
    question: Search, out: str | Path | None = None, *, seed_from: str | Path | None = None, watcher: Watcher
) -> Result:
    """Search over the mixtures of a trained network's widths.

    Args:
        question: what is searched.
        out: run folder to make; default `runs/NAME`.
        seed_from: file of sensitivities, whose suggestions are evaluated first.
        watcher: told of progress.

    Raises:
        SweepError, ConfigError, RecordError: before anything is evaluated or written.
    """
    from raysearch.driver import check_folder, describe, locked
    from trainables import supernet

    session, trained = trained_network(question)
    opened = checked(session, question, trained)
    sweep = opened.resolved.sweep
    seeds = _seeds(opened, seed_from)
    name = default_name(sweep, time.strftime("%Y%m%d-%H%M%S")) + "-shared"
    folder = RunFolder(Path(out) if out is not None else default_out(name))
    check_folder(folder)
    with _capacity(opened, folder) as capacity, locked(folder):
        supernet.keep(session, folder.path / SUPERNET)
        seeds.write(folder.seeds)
        describe(
            folder,
            opened.resolved,
            name if out is None else folder.path.resolve().name,
            search={**asdict(question), "trained": trained},
        )
        return _evaluate(folder, opened, capacity, watcher)


def resume(path: str | Path, *, watcher: Watcher) -> Result:
    """Go on with an interrupted search.

    Raises:
        RecordError: no run folder of a search.
        SweepError: another driver is at work on it.
    """
    from raysearch.driver import locked
    from trainables import supernet

    folder = RunFolder(Path(path))
    description = folder.read_sweep()
    if "search" not in description:
        raise RecordError(f"{path} holds no search on shared weights: `raysearch resume` goes on with sweeps, too")
    known = {name: value for name, value in description["search"].items() if name != "trained"}
    question = Search(**{**known, "widths": None if known["widths"] is None else tuple(known["widths"])})
    with locked(folder):
        session = supernet.opened(folder.path / SUPERNET, data_root=root_of(description["sweep"]))
        opened = checked(session, question, description["search"]["trained"])
        with _capacity(opened, folder) as capacity:
            return _evaluate(folder, opened, capacity, watcher)


def is_search(path: Path) -> bool:
    """Whether a run folder is that of a search on shared weights."""
    return "search" in RunFolder(path).read_sweep()


def _seeds(opened: Opened, path: str | Path | None) -> Seeds:
    """What a file of sensitivities suggests for the mixtures."""
    from raysearch.sensitivities import read, seeds_of
    from raysearch.shared_weights.mixtures import mixture

    if path is None:
        return Seeds()
    resolved = opened.resolved
    layers, objectives = resolved.table.quantizable, resolved.sweep.objectives
    return seeds_of(read(path), resolved.space, layers, {}, objectives, fixed=mixture({}, opened.choices))


@contextlib.contextmanager
def _capacity(opened: Opened, folder: RunFolder) -> "Iterator[Capacity]":
    """Ray, and how many evaluators it holds."""
    from raysearch.cluster.connection import ray_for
    from raysearch.cluster.nodes import survey

    sweep = opened.resolved.sweep
    with ray_for(sweep) as joined:
        yield survey(sweep, folder.path, root_of(sweep.tree()), joined)


def _evaluate(folder: RunFolder, opened: Opened, capacity: "Capacity", watcher: Watcher) -> Result:
    from raysearch.driver import MIRROR_WAIT_S
    from raysearch.shared_weights.mixture_loop import evaluate_mixtures
    from raysearch.tracking import mirror_rest

    sweep = opened.resolved.sweep
    text = (
        f"{sweep.trials} mixtures of {sweep.method} on {sweep.model}, {sweep.data}: "
        f"{len(opened.resolved.space)} widths to choose, {capacity.concurrent} workers"
    )
    watcher.started(folder.path, text, len(complete_trials(folder.records)))
    if not folder.end.exists():
        root = None if sweep.data_root is None else str(Path(sweep.data_root).resolve())
        options = {"images": opened.images, "calibration": opened.calibration}
        workers = Workers(capacity.concurrent, capacity.gpus, (str((folder.path / SUPERNET).resolve()), root), options)
        try:
            workers.wait()
            evaluate_mixtures(folder, opened, workers, watcher.evaluated)
        finally:
            workers.close()
    mirrored = mirror_rest(folder.path, sweep.mlflow_uri, MIRROR_WAIT_S)
    return Result(folder.path, mirrored=mirrored)
