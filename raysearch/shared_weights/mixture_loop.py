"""The loop of a search on shared weights: mixtures are proposed, measured by workers and written down, batch by batch.

A batch is proposed while the one before is measured. What is on disk already is not measured again: it must be what
would be proposed, and is told to the sampler in its turn.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysearch import facts
from raysearch.errors import RecordError
from raysearch.records import SCHEMA, Log, RunFolder, complete_trials, write_json
from raysearch.search.proposals import uniform_proposals
from raysearch.seeds import Seeds
from raysearch.shared_weights.evaluators import SUPERNET, Workers
from raysearch.shared_weights.mixtures import Mixtures, Proposed, asked, mixture
from raysearch.shared_weights.question import Opened
from trainables.cost import size_bytes

BATCH = 64
"""Mixtures that are proposed at a time."""


@dataclass(frozen=True)
class _Batch:
    """What is being measured.

    Attributes:
        proposed: mixtures.
        new: those of them that are not on disk yet.
        begun: of `Workers.submit`.
        began_at: when.
    """

    proposed: list[Proposed]
    new: list[Proposed]
    begun: list[tuple[list[int], Any]]
    began_at: str


def evaluate_mixtures(
    folder: RunFolder, opened: Opened, workers: Workers, tell: Callable[[Sequence[Mapping[str, Any]], int], None]
) -> None:
    """Propose, evaluate and write down, until there are as many records as were asked for, or no more mixtures.

    Args:
        folder: with the seeds, and with the records of an interrupted search.
        opened: the supernet, and what is asked of it.
        workers: that have loaded it.
        tell: hears of all records, and how many there will be.
    """
    sweep, space = opened.resolved.sweep, opened.resolved.space
    seeds = Seeds.read(folder.seeds)
    sampler = asked(space, opened.choices, opened.resolved.table.quantizable, sweep, opened.cost, seeds.sensitivities)
    uniform = [("uniform", values) for values in uniform_proposals(space, {}, 0)]
    mixtures = Mixtures(space, sweep, opened.cost, [*seeds.first, *uniform], sampler)
    rows = complete_trials(folder.records)
    known = len(rows)
    log, began = Log(folder.records), time.time()
    before: _Batch | None = None
    while True:
        proposed = mixtures.batch(BATCH)
        _check_known(proposed, rows[:known], folder)
        new = [each for each in proposed if each.number >= known]
        begun = workers.submit([mixture(each.values, opened.choices) for each in new])
        if before is not None:
            _finish(before, rows, opened, mixtures, workers, log, folder)
            tell(rows, sweep.trials)
        before = _Batch(proposed, new, begun, facts.now())
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


def _check_known(proposed: Sequence[Proposed], rows: Sequence[Mapping[str, Any]], folder: RunFolder) -> None:
    """What is on disk must be what would be proposed again."""
    for each in proposed:
        if each.number < len(rows) and rows[each.number]["params"] != each.values:
            raise RecordError(
                f"{folder.records}: evaluation {each.number} is none that this version proposes; begin a new search"
            )


def _finish(
    batch: _Batch,
    rows: list[dict[str, Any]],
    opened: Opened,
    mixtures: Mixtures,
    workers: Workers,
    log: Log,
    folder: RunFolder,
) -> None:
    """Take the outcomes of a batch: those on disk, and those just measured."""
    shared = {"schema": SCHEMA, "sweep": folder.read_sweep()["name"], "versions": facts.versions(), "git": facts.git()}
    measured = [
        _row(each, outcome, opened, shared | {"started_at": batch.began_at})
        for each, outcome in zip(batch.new, workers.collect(batch.begun), strict=True)
    ]
    if measured:
        log.append(*measured, durable=True)
        rows += measured
    for each in batch.proposed:
        mixtures.tell(each, rows[each.number] if rows[each.number]["status"] == "complete" else None)


def _row(proposal: Proposed, outcome: tuple[float, float], opened: Opened, shared: dict[str, Any]) -> dict[str, Any]:
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
        "float_size_bytes": size_bytes(opened.resolved.table, {}, extra_floats=0),
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
