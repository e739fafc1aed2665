"""Search on shared weights: one switchable network is trained, then thousands of its mixtures of widths are evaluated.

    search(Search(run=...))  -> open the trained network, check, make a run folder -> _evaluate
    resume(folder)           -> read the run folder                               -> _evaluate

The run folder is one like any other, with a record for each mixture, and holds the network itself (`SUPERNET`), so it
can be picked and exported from when the run that trained it is gone. MLflow gets the front, not all mixtures.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raysearch import facts
from raysearch.errors import RecordError, SweepError
from raysearch.records import SCHEMA, Log, RunFolder, complete_trials, write_json
from raysearch.result import Result
from raysearch.seeds import Seeds
from raysearch.sweep import DEFAULT_OBJECTIVES, Resolved, Sweep, check_values, default_name, default_out

if TYPE_CHECKING:
    from raysearch.mixtures import Mixtures, Proposed
    from raysearch.nodes import Capacity
    from raysearch.proposals import Cost
    from trainables.fit import Session
    from trainables.method import Choices

SUPERNET = "supernet.safetensors"
BATCH = 64
"""Mixtures that are proposed at a time."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """The question of a search on shared weights.

    Attributes:
        run: folder of the run that trained the network.
        trial: its number; None where there is one alone.
        evaluations: how many mixtures.
        objectives: name to direction.
        sampler: `auto` (the frontier), or as in a sweep.
        seed: of the search.
        widths: those to choose from; None takes all that were trained.
        images: validation images, the first so many; None takes all.
        calibration: training images that batch norm is recalibrated on for each mixture; 0 leaves it.
        max_bops, max_relative_bops, max_size_bytes: never evaluate a mixture over these.
        workers: at the same time; None takes one for each GPU, or each CPU core.
        mlflow_uri: as in a sweep.
    """

    run: str
    trial: int | None = None
    evaluations: int = 5000
    objectives: dict[str, str] = field(default_factory=DEFAULT_OBJECTIVES.copy)
    sampler: str = "auto"
    seed: int = 0
    widths: tuple[int, ...] | None = None
    images: int | None = None
    calibration: int = 0
    max_bops: float | None = None
    max_relative_bops: float | None = None
    max_size_bytes: float | None = None
    workers: int | None = None
    mlflow_uri: str | None = None


class Watcher(Protocol):
    """Who watches a search."""

    def started(self, path: Path, text: str, known: int) -> None:
        """The run folder exists; so many mixtures are evaluated already."""
        ...

    def evaluated(self, rows: Sequence[Mapping[str, Any]], evaluations: int) -> None:
        """More mixtures are evaluated."""
        ...


@dataclass(frozen=True)
class _Opened:
    """A supernet, and what is asked of it."""

    session: "Session"
    choices: "Mapping[str, Choices]"
    resolved: Resolved
    calibration: int
    images: int | None

    def cost(self, values: Mapping[str, Any]) -> "Cost":
        """What a mixture costs."""
        from raysearch.mixtures import mixture
        from raysearch.proposals import Cost
        from trainables.config import digest
        from trainables.supernet import bits_of

        widths = mixture(values, self.choices)
        bits = bits_of(widths)
        report = self.session.report(self.session.method.mixture(self.session.model, bits), 0.0, 0.0)
        name = digest(self.session.config, bits) + (f"-{self.calibration}" if self.calibration else "")
        return Cost(name, report.bops, report.relative_bops, report.size_bytes, widths)


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

    session, trained = _trained(question)
    opened = _asked(session, question, trained)
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
        session = supernet.opened(folder.path / SUPERNET, data_root=_root(description["sweep"]))
        opened = _asked(session, question, description["search"]["trained"])
        with _capacity(opened, folder) as capacity:
            return _evaluate(folder, opened, capacity, watcher)


def is_search(path: Path) -> bool:
    """Whether a run folder is that of a search on shared weights."""
    return "search" in RunFolder(path).read_sweep()


def _seeds(opened: _Opened, path: str | Path | None) -> Seeds:
    """What a file of sensitivities suggests for the mixtures."""
    from raysearch.mixtures import mixture
    from raysearch.sensitivities import read, seeds_of

    if path is None:
        return Seeds()
    resolved = opened.resolved
    layers, objectives = resolved.table.quantizable, resolved.sweep.objectives
    return seeds_of(read(path), resolved.space, layers, {}, objectives, fixed=mixture({}, opened.choices))


@contextlib.contextmanager
def _capacity(opened: _Opened, folder: RunFolder) -> "Iterator[Capacity]":
    """Ray, and how many evaluators it holds."""
    from raysearch.connection import ray_for
    from raysearch.nodes import survey

    sweep = opened.resolved.sweep
    with ray_for(sweep) as joined:
        yield survey(sweep, folder.path, _root(sweep.tree()), joined)


def _trained(question: Search) -> tuple["Session", dict[str, Any]]:
    """The trained network that a search is about, and the sweep that trained it."""
    from trainables import checkpoint
    from trainables.config import parse
    from trainables.fit import Session

    result = Result(question.run)
    if "search" in result.description:
        raise SweepError(f"{question.run} is a search already: give the run that trained its network")
    trials = {row["trial"]: row for row in result.records() if row["status"] == "complete"}
    kept = {n: row for n, row in trials.items() if (result.folder.trial(n) / checkpoint.FILE).exists()}
    if question.trial is None and len(kept) == 1:
        number = next(iter(kept))
    elif question.trial in kept:
        number = question.trial
    else:
        if not kept:
            raise RecordError(
                f"{question.run} has no trial with a checkpoint: give a run of `raysearch supernet train`"
            )
        asked = "several trials" if question.trial is None else f"no trial {question.trial} with a checkpoint"
        raise RecordError(f"{question.run} has {asked}: name one of {', '.join(map(str, sorted(kept)))}")
    session = Session(parse(kept[number]["config"]), data_root=_root(result.description["sweep"]))
    session.load(result.folder.trial(number) / checkpoint.FILE)
    return session, {"sweep": result.description["sweep"], "name": result.name, "trial": number}


def _root(sweep: Mapping[str, Any]) -> Path | None:
    return None if sweep["data_root"] is None else Path(sweep["data_root"])


def _asked(session: "Session", question: Search, trained: Mapping[str, Any]) -> _Opened:
    """Check a question against a network, and work out what follows.

    Raises:
        SweepError, ConfigError: what cannot be.
    """
    from raysearch.mixtures import mixture_space
    from raysearch.proposals import cheapest
    from trainables.supernet import check_images, check_recalibration, choices_of

    choices = narrowed(choices_of(session), question.widths)
    check_recalibration(session.table.norm_channels, question.calibration)
    check_images(session.data.validation, question.images)
    space = mixture_space(choices)
    if not space:
        raise SweepError(f"widths = {question.widths}: nothing is left to choose; give two or more")
    limits = {name: getattr(question, name) for name in ("max_bops", "max_relative_bops", "max_size_bytes")}
    sweep = replace(
        Sweep.from_tree(trained["sweep"]),
        space=space,
        objectives=question.objectives,
        trials=question.evaluations,
        sampler=question.sampler,
        seed=question.seed,
        concurrent=question.workers,
        workers=1,
        cpus_per_worker=1,
        mlflow_uri=question.mlflow_uri,
        **limits,
    )
    check_values(sweep)
    if sweep.sampler == "grid":
        raise SweepError("sampler 'grid' is for sweeps that train; take random or qmc for mixtures")
    resolved = Resolved(sweep, session.config.tree(), session.config, session.table, space)
    opened = _Opened(session, choices, resolved, question.calibration, question.images)
    _check_limits(opened.cost(cheapest(space)), sweep)
    return opened


def narrowed(choices: "Mapping[str, Choices]", widths: Sequence[int] | None) -> "Mapping[str, Choices]":
    """Only these widths where a layer has several; a layer that has one keeps it.

    Raises:
        SweepError: widths that the network was not trained at, or a layer that none of them is left for.
    """
    if widths is None:
        return choices
    trained = sorted({w for each in choices.values() for w in (*each.weight, *each.activation)}, reverse=True)
    unknown = [width for width in widths if width not in trained]
    if unknown:
        raise SweepError(
            f"widths {', '.join(map(str, unknown))}: the network was not trained at them; "
            f"it has {', '.join(map(str, trained))}"
        )
    found = {}
    for layer, each in choices.items():
        kept = {}
        for role in ("weight", "activation"):
            have = getattr(each, role)
            kept[role] = tuple(w for w in have if w in widths) if len(have) > 1 else have
            if not kept[role]:
                raise SweepError(
                    f"layer {layer} has no legal {role} width: it was trained at {', '.join(map(str, have))}, "
                    f"and --widths has none of them"
                )
        found[layer] = replace(each, **kept)
    return found


def _check_limits(least: "Cost", sweep: Sweep) -> None:
    for name in ("bops", "relative_bops", "size_bytes"):
        limit, have = getattr(sweep, f"max_{name}"), getattr(least, name)
        if limit is not None and have > limit:
            raise SweepError(
                f"max_{name} = {limit:g} leaves nothing to evaluate: the cheapest mixture has {have:g}, "
                f"{have - limit:g} more"
            )


def _evaluate(folder: RunFolder, opened: _Opened, capacity: "Capacity", watcher: Watcher) -> Result:
    from raysearch.driver import MIRROR_WAIT_S
    from raysearch.evaluators import Workers
    from raysearch.tracking import start_mirror

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
            _hunt(folder, opened, workers, watcher)
        finally:
            workers.close()
    mirrored = start_mirror(folder.path, sweep.mlflow_uri).close(MIRROR_WAIT_S)
    return Result(folder.path, mirrored=mirrored)


def _hunt(folder: RunFolder, opened: _Opened, workers: Any, watcher: Watcher) -> None:
    """Propose, evaluate and write down, until there are as many records as were asked for, or no more mixtures."""
    from raysearch.mixtures import Mixtures, asked
    from raysearch.proposals import uniform_proposals

    sweep, space = opened.resolved.sweep, opened.resolved.space
    seeds = Seeds.read(folder.seeds)
    sampler = asked(space, opened.choices, opened.resolved.table.quantizable, sweep, opened.cost, seeds.sensitivities)
    uniform = [("uniform", values) for values in uniform_proposals(space, {}, 0)]
    mixtures = Mixtures(space, sweep, opened.cost, [*seeds.first, *uniform], sampler)
    rows = complete_trials(folder.records)
    known = len(rows)
    log, began, before = Log(folder.records), time.time(), None
    while True:
        proposed = mixtures.batch(BATCH)
        _check_known(proposed, rows[:known], folder)
        new = [each for each in proposed if each.number >= known]
        begun = workers.submit([each.cost.bits for each in new])
        if before is not None:
            _finish(before, rows, opened, mixtures, workers, log, folder)
            watcher.evaluated(rows, sweep.trials)
        before = proposed, new, begun, facts.now()
        if not proposed:
            break
    log.close()
    seconds = time.time() - began
    write_json(
        folder.end,
        {
            "ended_at": facts.now(),
            "trials": len(rows),
            "refused": mixtures.refused,
            "seconds": round(seconds, 3),
            "workers": workers.count,
            "evaluations_per_second": round((len(rows) - known) / max(seconds, 1e-9), 2),
        },
    )


def _check_known(proposed: "Sequence[Proposed]", rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """What is on disk must be what would be proposed again."""
    for each in proposed:
        if each.number < len(rows) and rows[each.number]["params"] != each.values:
            raise RecordError(
                f"{folder.records}: evaluation {each.number} is none that this version proposes; begin a new search"
            )


def _finish(
    before: Any,
    rows: list[dict[str, Any]],
    opened: _Opened,
    mixtures: "Mixtures",
    workers: Any,
    log: Log,
    folder: RunFolder,
) -> None:
    """Take the outcomes of a batch: those on disk, and those just measured."""
    proposed, new, begun, began_at = before
    shared = {"schema": SCHEMA, "sweep": folder.read_sweep()["name"], "versions": facts.versions(), "git": facts.git()}
    measured = [
        _row(each, outcome, opened, shared | {"started_at": began_at})
        for each, outcome in zip(new, workers.collect(begun), strict=True)
    ]
    if measured:
        log.append(*measured, durable=True)
        rows += measured
    for each in proposed:
        mixtures.tell(each, rows[each.number] if rows[each.number]["status"] == "complete" else None)


def _row(proposal: "Proposed", outcome: tuple[float, float], opened: _Opened, shared: dict[str, Any]) -> dict[str, Any]:
    """The record of a mixture, with the fields that every record has."""
    accuracy, loss = outcome
    good = math.isfinite(loss)
    sweep, config, cost = opened.resolved.sweep, opened.session.config, proposal.cost
    return {
        **shared,
        "trial": proposal.number,
        "point": "final",
        "points": 1,
        "status": "complete" if good else "failed",
        "reason": None if good else f"loss is {loss}",
        "accuracy": accuracy if good else None,
        "loss": loss if good else None,
        "bops": cost.bops,
        "relative_bops": cost.relative_bops,
        "size_bytes": cost.size_bytes,
        "float_size_bytes": _float_size(opened),
        "macs": opened.resolved.table.macs,
        "bits": cost.bits,
        "epoch": config.training.epochs,
        "epochs": config.training.epochs,
        "seed": config.seed,
        "digest": cost.digest,
        "source": proposal.source,
        "method": sweep.method,
        "model": sweep.model,
        "data": sweep.data,
        "params": proposal.values,
        "config": opened.resolved.base,
        "history": [],
        "checkpoint": SUPERNET,
        "calibration": opened.calibration,
        "images": opened.images,
        "finished_at": facts.now(),
    }


def _float_size(opened: _Opened) -> int:
    from trainables.cost import size_bytes

    return size_bytes(opened.resolved.table, {}, extra_floats=0)
