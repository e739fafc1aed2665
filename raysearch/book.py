"""The bookkeeping of a sweep: what the workers report becomes records, the study, and events for whoever watches.

One object hears of everything in one place, in an order that survives a kill at any point: first the record, then the
study. What a killed driver left half done is completed by the next one from the records.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from optuna.trial import TrialState

from analysis.front import Front
from raysearch.keep import Keeper
from raysearch.ledger import Ledger, Proposal
from raysearch.limits import broken, excesses
from raysearch.records import SCHEMA, Log, RunFolder, complete_trials
from trainables.build import layer_table
from trainables.config import parse
from trainables.cost import size_bytes

Listener = Callable[["Book"], None]
METRICS = ("accuracy", "loss", "bops", "relative_bops", "size_bytes")


@dataclass
class Live:
    """A trial in training."""

    proposal: Proposal
    began_at: float
    history: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)


class Book:
    """Records, study and counts of one sweep.

    Args:
        folder: the run folder.
        ledger: the study.
        facts: fields that every record of this driver shares: sweep, versions, git.
        listener: called after each event.
    """

    def __init__(self, folder: RunFolder, ledger: Ledger, facts: Mapping[str, Any], listener: Listener) -> None:
        self.folder, self.ledger, self.facts, self._listener = folder, ledger, dict(facts), listener
        self.sweep = ledger.sweep
        self.live: dict[int, Live] = {}
        self.rows = complete_trials(folder.records)
        self.counts = {"complete": 0, "pruned": 0, "failed": 0}
        self._ended: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows:
            self._count(row)
        self.ended_before = sum(self.counts.values())
        self.opened_at = time.monotonic()
        self.first_end_s: float | None = None
        self._epochs_known = _known_epochs(folder)
        self._records, self._epochs = Log(folder.records), Log(folder.epochs)
        self.float_size_bytes = size_bytes(ledger.resolved.table, {}, extra_floats=0)
        self._keeper = Keeper(folder, self.sweep.objectives, self.rows, self.sweep.max_checkpoint_bytes)
        self._reconcile()

    def _reconcile(self) -> None:
        """Tell the study of trials that have a record but no end: the last driver was killed between the two."""
        for number in self.ledger.running():
            if number in self._ended:
                self._tell(number)
        self.ledger.interrupted = [p for p in self.ledger.interrupted if p.number not in self._ended]

    def begin(self, proposal: Proposal) -> None:
        """A trial starts, or goes on after an interruption."""
        known = self._epochs_known.get(proposal.number, {})
        self.live[proposal.number] = Live(proposal, time.time(), history=[known[e] for e in sorted(known)])
        self._listener(self)

    def epoch(self, number: int, message: Mapping[str, Any]) -> None:
        """A worker reports an epoch; one that is known already, reported again after a restart, changes nothing."""
        live = self.live[number]
        report = message["report"]
        live.points = report["points"]
        live.timing = {key: message[key] for key in ("slot", "began_at", "reported_at") if key in message}
        live.timing["first_step_at"] = report["first_step_at"]
        if report["epoch"] in (row["epoch"] for row in live.history):
            return
        first = report["points"][0]
        metrics = {"train_loss": report["train_loss"], **{n: first[n] for n in METRICS}, **first.get("measures", {})}
        metrics["relative_bops"] *= self._share(live.proposal.tree)
        row = {"epoch": report["epoch"], **_written(metrics), "seconds": report["seconds"]}
        if live.proposal.cost.bits is None:  # widths that training decides are part of its course
            row["bits"] = report["points"][0]["bits"]
        live.history.append(row)
        self._epochs.append({"trial": number, **row, "time": time.time()})
        self._listener(self)

    def end(self, number: int, status: str, reason: str | None = None) -> None:
        """A trial ended: `complete`, `pruned` or `failed`, with the reason for the latter two."""
        live = self.live.pop(number)
        if number in self._ended:
            return
        if status == "complete" and (fault := _fault(live)):
            status, reason = "failed", fault
        points = (live.points if status == "complete" else live.points[:1]) or [{}]
        rows = [self._row(live, _written(point), len(points), status, reason) for point in points]
        self._records.append(*rows, durable=True)
        for row in rows:
            self.rows.append(row)
            self._count(row)
        if self.first_end_s is None:
            self.first_end_s = time.monotonic() - self.opened_at
        self._tell(number)
        self._keeper.ended(number, rows)
        self._listener(self)

    def front(self) -> Front:
        """The front of all complete points so far."""
        return Front.of(self.rows, self.sweep.objectives, self.sweep.reference)

    def has_points(self) -> bool:
        """Whether any trial is complete."""
        return self.counts["complete"] > 0

    def close(self) -> None:
        """Close the files."""
        self._records.close()
        self._epochs.close()

    def _share(self, tree: Mapping[str, Any]) -> float:
        """MACs of a trial's network over those of the base configuration's, which relative BOPs refer to."""
        resolved = self.ledger.resolved
        if all(tree.get(part) == resolved.base.get(part) for part in ("model", "data")):
            return 1.0
        return layer_table(parse(tree)).macs / resolved.table.macs

    def _row(
        self, live: Live, point: Mapping[str, Any], points: int, status: str, reason: str | None
    ) -> dict[str, Any]:
        proposal, tree = live.proposal, live.proposal.tree
        cost = proposal.cost
        share = self._share(tree)
        measured = {**cost.measures, **point.get("measures", {})}
        found = {**cost.values(), **point, **measured}
        if "relative_bops" in point:
            found["relative_bops"] = point["relative_bops"] * share
        missed = broken(self.ledger.limits, found) if status == "complete" else {}
        return {
            "schema": SCHEMA,
            **self.facts,
            "trial": proposal.number,
            "point": point.get("label", "final"),
            "points": points,
            "status": status,
            "reason": reason,
            "accuracy": point.get("accuracy"),
            "loss": point.get("loss"),
            "bops": point.get("bops", cost.bops),
            "relative_bops": point["relative_bops"] * share if "relative_bops" in point else cost.relative_bops,
            "size_bytes": point.get("size_bytes", cost.size_bytes),
            "float_size_bytes": self.float_size_bytes,
            "macs": round(share * self.ledger.resolved.table.macs),
            **{name: measured.get(name) for name in self.sweep.measures},
            "measures": list(self.sweep.measures),
            "bits": point.get("bits", cost.bits),
            "epoch": live.history[-1]["epoch"] if live.history else 0,
            "epochs": self.sweep.epochs,
            "seconds": round(time.time() - live.began_at, 3),
            "seed": tree["seed"],
            "digest": cost.digest,
            "source": proposal.source,
            "repaired": proposal.repaired,
            "within_limits": not missed,
            "method": tree["method"]["name"],
            "model": tree["model"]["name"],
            "data": tree["data"]["name"],
            "params": proposal.params,
            "config": tree,
            "history": live.history,
            "checkpoint": str(self.folder.trial(proposal.number).relative_to(self.folder.path)),
            "started_at": _iso(live.began_at),
            "finished_at": _iso(time.time()),
            "timing": live.timing,
        }

    def _count(self, row: dict[str, Any]) -> None:
        points = self._ended.setdefault(row["trial"], [])
        if not points:
            self.counts[row["status"]] += 1
        points.append(row)

    def _tell(self, number: int) -> None:
        rows = self._ended[number]
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
        status = rows[0]["status"]
        names = self.sweep.objectives if status == "complete" else {}
        points = [[float(row[name]) for name in names] for row in rows]
        missed = [excesses(self.ledger.learned, row) for row in rows] if status == "complete" else []
        self.ledger.tell(number, state[status], points, rows[0]["reason"] or "", missed)


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them: what is no finite number becomes None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _fault(live: Live) -> str | None:
    """Why a trial that ended well is no point all the same."""
    if not live.points:
        return "it ended without a report"
    broken = [f"{k} is {point[k]}" for point in live.points for k in METRICS if not math.isfinite(point[k])]
    return f"{broken[0]} after epoch {live.history[-1]['epoch']}" if broken else None


def _known_epochs(folder: RunFolder) -> dict[int, dict[int, dict[str, Any]]]:
    """Epochs on disk: trial -> epoch -> metrics."""
    from raysearch.records import read_lines

    known: dict[int, dict[int, dict[str, Any]]] = {}
    for line in read_lines(folder.epochs):
        row = {key: value for key, value in line.items() if key not in ("trial", "time")}
        known.setdefault(line["trial"], {})[line["epoch"]] = row
    return known


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
