"""From a sweep to records: checks everything, starts Ray, lets Tune drive the slots, and leaves a complete run folder.

    run(sweep)    -> resolve, load the data once, make the run folder -> _drive
    resume(path)  -> read the run folder                              -> _drive
    _drive        -> Ray, ledger, book, MLflow mirror, Tune           -> Result

A driver may be killed at any point: whatever was reported is on disk, and `resume` goes on with the same sweep.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch import facts
from raysearch.asked_space import read, written
from raysearch.cluster.connection import ray_for
from raysearch.cluster.nodes import Capacity, survey
from raysearch.errors import RecordError, SweepError, TrialError
from raysearch.records import SCHEMA, RunFolder, complete_trials, write_json
from raysearch.resolve import check_files, files_of, resolve
from raysearch.seeds import Seeds
from raysearch.sensitivities import read_seeds, seed
from raysearch.sweep import Resolved, Sweep, default_name, default_out

if TYPE_CHECKING:
    from raysearch.book import Book
    from raysearch.mirror.links import Status
    from raysearch.result import Result
    from raysearch.search.ledger import Proposal

MIRROR_WAIT_S = 60.0
INTERRUPTED_WAIT_S = 5.0
GROUP_WAIT_S = 30.0
GROUP_INTERRUPTED_WAIT_S = 2.0


class Watcher:
    """Who watches a sweep; the base watches silently."""

    def started(self, folder: RunFolder, resolved: Resolved) -> None:
        """The run folder exists, nothing runs yet."""

    def event(self, book: "Book") -> None:
        """Something happened to a trial."""

    def closed(self) -> None:
        """The sweep is over, or interrupted."""


def run(
    sweep: Sweep, out: str | Path | None = None, *, watcher: Watcher | None = None, seeds: Seeds | None = None
) -> "Result":
    """Run a sweep on this machine, or on the cluster that RAY_ADDRESS names.

    Args:
        sweep: the question.
        out: run folder to make; default `runs/NAME`.
        watcher: told of every event.
        seeds: what to try first, and known sensitivities.

    Raises:
        SweepError, ConfigError, DataError, PluginError: before Ray starts; nothing was written.
        TrialError: every trial failed.
    """
    resolved = resolve(sweep)
    name = default_name(sweep, time.strftime("%Y%m%d-%H%M%S"))
    folder = RunFolder(Path(out) if out is not None else default_out(name))
    check_folder(folder)
    known = (seeds or Seeds()).and_then(read_seeds(resolved))
    _load_data(resolved)
    with ray_for(resolved.sweep) as joined:
        capacity = survey(resolved.sweep, folder.path, _data_root(sweep), joined)
        with locked(folder):
            describe(folder, resolved, name if out is None else folder.path.resolve().name)
            seed(folder, resolved, known)
            return _drive(folder, resolved, capacity, watcher or Watcher())


def resume(path: str | Path, *, watcher: Watcher | None = None) -> "Result":
    """Go on with an interrupted sweep; a finished one only completes its MLflow mirror, and its watcher hears nothing.

    Raises:
        RecordError: no run folder.
        SweepError: another driver is at work on it, or a file of a plug-in has changed.
    """
    from raysearch.tracking import mirror_rest

    folder = RunFolder(Path(path))
    described = folder.read_sweep()
    if "search" in described:
        raise RecordError(
            f"{path} is a search on shared weights: raysearch.shared_weights.supernet.resume goes on with it"
        )
    sweep = Sweep.from_tree(described["sweep"])
    check_files(described.get("files", {}))
    with locked(folder):
        over = _records_if_over(folder)
        if over is not None:
            return _outcome(folder, mirror_rest(folder.path, sweep.mlflow_uri, MIRROR_WAIT_S), over)
        resolved = resolve(sweep, read(described["space"]))
        _load_data(resolved)
        with ray_for(resolved.sweep) as joined:
            capacity = survey(resolved.sweep, folder.path, _data_root(sweep), joined)
            seed(folder, resolved, Seeds())
            return _drive(folder, resolved, capacity, watcher or Watcher())


def check_folder(folder: RunFolder) -> None:
    """Refuse a run folder that is in use, or that cannot be written.

    Raises:
        SweepError: what is in the way.
    """
    path = folder.path
    _check_free(folder)
    if "?" in str(path.resolve()):
        raise SweepError(f"{path}: a path with a question mark cannot hold the study's database; take another --out")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise SweepError(f"{path} exists and is not an empty folder: take another --out")
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        if made:
            path.rmdir()
    except OSError as error:
        raise SweepError(f"{path} cannot be written: {error.strerror}; take another --out") from error


def _check_free(folder: RunFolder) -> None:
    path = folder.path
    if folder.sweep.exists():
        raise SweepError(
            f"{path} already holds a sweep: `raysearch resume {path}` goes on with it; or take another --out"
        )


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep other drivers away from a run folder; it is made if it does not exist."""
    import filelock

    lock = filelock.FileLock(folder.lock)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise SweepError(f"{folder.path} is being worked on by another driver: wait for it, or end it") from None
    except OSError as error:
        raise SweepError(f"{folder.path} cannot be written: {error}; take another --out") from error
    try:
        yield
    finally:
        lock.release()


def describe(folder: RunFolder, resolved: Resolved, name: str, **more: Any) -> None:
    """Write `sweep.json`: the question, what follows from it, and what else there is to say.

    Raises:
        SweepError: there is one already.
    """
    _check_free(folder)  # another driver may have been faster
    write_json(
        folder.sweep,
        {
            "schema": SCHEMA,
            "name": name,
            **{k: v for k, v in resolved.sweep.tree().items() if k in ("method", "model", "data", "objectives")},
            "trials": resolved.sweep.trials,
            "seed": resolved.sweep.seed,
            "sweep": resolved.sweep.tree(),
            "base": resolved.base,
            "space": written(resolved.space),
            "files": files_of(resolved.sweep),
            "macs": resolved.table.macs,
            "created_at": facts.now(),
            "versions": facts.versions(),
            "git": facts.git(),
            **more,
        },
    )


def _load_data(resolved: Resolved) -> None:
    """Load the data set once here, so that a fault in it is found before any trial."""
    from trainables.build import load_data

    load_data(resolved.config, _data_root(resolved.sweep), download=resolved.sweep.download)


def _data_root(sweep: Sweep) -> Path | None:
    return None if sweep.data_root is None else Path(sweep.data_root).resolve()


def _uses_group(sweep: Sweep, gpus_per_worker: float) -> bool:
    return sweep.train or sweep.workers > 1 or gpus_per_worker > 0


def _drive(folder: RunFolder, resolved: Resolved, capacity: Capacity, watcher: Watcher) -> "Result":
    from raysearch.book import Book
    from raysearch.search.ledger import Ledger
    from raysearch.tracking import start_mirror

    with _groups(folder, resolved.sweep, capacity) as groups:
        ledger = Ledger(folder, resolved)
        shared = {"sweep": folder.read_sweep()["name"], "versions": facts.versions(), "git": facts.git()}
        book = Book(folder, ledger, shared, watcher.event)
        watcher.started(folder, resolved)
        mirror, mirror_wait_s = start_mirror(folder.path, resolved.sweep.mlflow_uri), INTERRUPTED_WAIT_S
        try:
            unfinished = ledger.interrupted or ledger.started < resolved.sweep.trials
            if unfinished or book.promotable() is not None:
                _tune(folder, resolved, capacity, ledger, book, groups)
            book.let_all_go()
            write_json(folder.end, {"ended_at": facts.now(), "trials": ledger.started, "refused": ledger.refused})
            mirror_wait_s = MIRROR_WAIT_S
        finally:
            watcher.closed()
            book.close()
            mirrored = mirror.close(mirror_wait_s)
    return _outcome(folder, mirrored, book.rows)


def _records_if_over(folder: RunFolder) -> list[dict[str, Any]] | None:
    """The records of a sweep that has ended and lost none of them since; None where there is something left to do."""
    try:
        trials = json.loads(folder.end.read_text(encoding="utf-8"))["trials"]
    except (OSError, ValueError, LookupError, TypeError):  # not yet written, or damaged: it is written anew
        return None
    rows = complete_trials(folder.records)
    return rows if len({row["trial"] for row in rows}) == trials else None


def _outcome(folder: RunFolder, mirrored: "Status", rows: list[dict[str, Any]]) -> "Result":
    from raysearch.result import Result

    if not any(row["status"] == "complete" for row in rows):
        reasons = sorted({row["reason"] for row in rows if row["reason"]})
        raise TrialError(f"all {len(rows)} trials failed: {'; '.join(reasons[:3])} (records in {folder.records})")
    return Result(folder.path, mirrored=mirrored)


@contextlib.contextmanager
def _groups(folder: RunFolder, sweep: Sweep, capacity: Capacity) -> Iterator[list[str]]:
    """One worker group for each concurrent trial, where trials run in groups: the names of their mailboxes.

    They are started first of all: that takes longest.
    """
    from raysearch.cluster.group import Group

    if not _uses_group(sweep, capacity.gpus) or folder.end.exists():
        yield []
        return
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(sweep.hang_timeout)
    scratch = _scratch(folder)
    shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was interrupted
    names = [f"raysearch-{time.time_ns()}-{index}" for index in range(capacity.concurrent)]
    options: dict[str, Any] = {"cpus": sweep.cpus_per_worker, "gpus": capacity.gpus, "storage": str(scratch)}
    groups = [Group(sweep.workers, name=name, **options) for name in names]
    wait_s = GROUP_INTERRUPTED_WAIT_S
    try:
        yield names
        wait_s = GROUP_WAIT_S
    finally:
        for group in groups:
            group.end()
        for group in groups:
            group.close(wait_s)


def _scratch(folder: RunFolder) -> Path:
    """Where Ray Tune and Train keep files that nobody reads again."""
    return folder.path.resolve() / "ray"


def _tune(
    folder: RunFolder, resolved: Resolved, capacity: Capacity, ledger: Any, book: "Book", groups: list[str]
) -> None:
    from ray import tune

    from raysearch.cluster.group import drop_job
    from raysearch.cluster.searcher import Forget, LedgerSearcher, RungScheduler
    from raysearch.cluster.slots import GroupSlot, InlineSlot, Watchdog
    from raysearch.cluster.worker import make_job
    from trainables.measures import travelling

    sweep = resolved.sweep
    root = None if sweep.data_root is None else str(_data_root(sweep))
    absolute = RunFolder(folder.path.resolve())
    scratch = _scratch(folder)
    measures = travelling(sweep.measures)
    if not groups:
        shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was interrupted

    rungs = book.stopper.rungs.epochs if book.stopper else []

    def slot_config(proposal: "Proposal", place: int) -> dict[str, Any]:
        number = proposal.number
        device = "cuda" if capacity.gpus else "cpu"
        return {
            "job": make_job(
                number, proposal.tree, absolute.trial(number), absolute.starts, root, device, measures, rungs
            ),
            "cpus": sweep.cpus_per_worker,
            "group": groups[place] if groups else None,
        }

    def vacate(place: int) -> None:
        if groups:
            drop_job(groups[place])

    searcher = LedgerSearcher(ledger, book, slot_config, capacity.concurrent, vacate)
    if groups:
        slot = tune.with_resources(GroupSlot, {"cpu": 0, "memory": 1e6})
    else:
        slot = tune.with_resources(InlineSlot, {"cpu": sweep.cpus_per_worker})
    tuner = tune.Tuner(
        slot,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=RungScheduler(searcher),
            num_samples=-1,
            max_concurrent_trials=capacity.concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),  # a slot that died is the searcher's business
            callbacks=[Forget(), Watchdog(sweep.hang_timeout)],
            # Trials keep their own checkpoints (trainables.checkpoint); Tune's would be pickles.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False, checkpoint_frequency=0),
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it prints a page for each process that died
    tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
