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
from raysearch.errors import RecordError
from raysearch.keep import Keeper
from raysearch.limits import broken, excesses
from raysearch.records import SCHEMA, Log, RunFolder, complete_trials, read_trials
from raysearch.search.ledger import Ledger, Proposal
from raysearch.search.stopping import stopper_of
from trainables import checkpoint
from trainables.build import layer_table
from trainables.config import parse
from trainables.cost import size_bytes

Listener = Callable[["Book"], None]
LONG = ("config", "params", "history", "timing", "versions", "git")
"""Fields that nobody asks the book for; records on disk have them."""
METRICS = ("accuracy", "loss", "bops", "relative_bops", "size_bytes")


@dataclass
class Live:
    """A trial in training, or paused.

    Attributes:
        began_at: when it was begun, or taken up by this driver.
        since: when it last was begun, taken up, or went on after a pause.
        trained_s: time in training before that.
        inherited: how many tensors a parent gave its network, if one did.
    """

    proposal: Proposal
    began_at: float
    since: float
    trained_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    timing: dict[str, Any] = field(default_factory=dict)
    inherited: dict[str, int] | None = None


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
        self.paused: dict[int, Live] = {}
        self.stopper = stopper_of(ledger.resolved)
        self.rows = complete_trials(folder.records)
        self.counts = {"complete": 0, "pruned": 0, "failed": 0}
        self._ended: dict[int, list[dict[str, Any]]] = {}
        for row in self.rows:
            self._count(row)
        self._slim = 0
        self._forget(before=len(self.rows) - 1)
        self.ended_before = sum(self.counts.values())
        self.opened_at = time.monotonic()
        self.first_end_s: float | None = None
        self._epochs_known: dict[int, dict[int, dict[str, Any]]] = {}
        self._paused_at: dict[int, float] = {}
        self.epochs_spent = 0
        self._read_epochs()
        self._records, self._epochs = Log(folder.records), Log(folder.epochs)
        self.float_size_bytes = size_bytes(ledger.resolved.table, {}, extra_floats=0)
        self._keeper = Keeper(folder, self.sweep.objectives, self.rows, self.sweep.max_checkpoint_bytes)
        self._reconcile()

    def _read_epochs(self) -> None:
        """Take in the epochs on disk, in their order, and what the stopper said to them."""
        for number, line in enumerate(read_trials(self.folder.epochs), start=1):
            if not isinstance(line.get("epoch"), int):
                raise RecordError(f"{self.folder.epochs}, line {number} is damaged: it has no epoch")
            row = {key: value for key, value in line.items() if key not in ("trial", "time")}
            self._epochs_known.setdefault(line["trial"], {})[line["epoch"]] = row
            self.epochs_spent += 1
            if self.stopper:
                goes_on = row.get("rung", {}).get("goes_on", True)
                self.stopper.restore(line["trial"], line["epoch"], [row, *row.get("other_points", [])], goes_on)
                self.ledger.learn_course(line["trial"], row)
            if not row.get("rung", {}).get("goes_on", True):
                self._paused_at[line["trial"]] = line["time"]

    def _reconcile(self) -> None:
        """Tell the study of trials that have a record but no end: the last driver was killed between the two. Those
        that were paused are so again.
        """
        lacking = sorted(number for number in self._ended if number >= self.ledger.started)
        if lacking:
            raise RecordError(
                f"{self.folder.study} lacks trial {lacking[0]}, which {self.folder.records} has: "
                "bring back the study of this sweep, or ask its question anew (raysearch sweep --from)"
            )
        for number in self.ledger.running():
            if number in self._ended:
                self._tell(number)
        for number, rows in self._ended.items():
            if self.stopper:
                self.stopper.rungs.end(number, counts=rows[0]["status"] == "complete")
        waiting = self.stopper.rungs.waiting if self.stopper else {}
        for proposal in self.ledger.interrupted:
            if proposal.number in waiting and proposal.number not in self._ended:
                live = self.paused[proposal.number] = self._taken_up(proposal)
                paused_at = self._paused_at[proposal.number]
                live.began_at = paused_at - live.trained_s
                self.ledger.pause(proposal.number, paused_at)
        begun = self._ended.keys() | self.paused.keys()
        self.ledger.interrupted = [p for p in self.ledger.interrupted if p.number not in begun]
        self._mend()

    def _mend(self) -> None:
        """Trials that the study says have ended, but whose records were lost: those that were complete run again, from
        their checkpoint if it is still there; of the others, the study knows all that their records said.
        """
        for proposal, state, reason in list(self.ledger.ended_beside(self._ended)):
            if state == TrialState.COMPLETE:
                self.ledger.interrupted.append(proposal)
            else:
                self.live[proposal.number] = self._taken_up(proposal)
                self.end(proposal.number, "failed" if state == TrialState.FAIL else "pruned", reason)

    def _taken_up(self, proposal: Proposal) -> Live:
        """A trial with the epochs that it has on disk."""
        known = self._epochs_known.get(proposal.number, {})
        now = time.time()
        live = Live(proposal, now, now, history=[known[e] for e in sorted(known)])
        live.trained_s = sum(row["seconds"] for row in live.history)
        live.points = [
            {"bits": proposal.cost.bits, **row, "measures": {name: row.get(name) for name in self.sweep.measures}}
            for row in live.history[-1:]
        ]
        return live

    def begin(self, proposal: Proposal) -> None:
        """A trial starts, or goes on after an interruption."""
        live = self.paused.pop(proposal.number, None) or self._taken_up(proposal)
        live.since = time.time()
        self.live[proposal.number] = live
        self._listener(self)

    def epoch(self, number: int, message: Mapping[str, Any]) -> bool:
        """A worker reports an epoch; the answer says whether the trial goes on, or is to be paused.

        An epoch that is known already, reported again after a restart, changes nothing.
        """
        live = self.live[number]
        report = message["report"]
        share = self._share(live.proposal.tree)
        live.points = [{**point, "relative_bops": point["relative_bops"] * share} for point in report["points"]]
        live.timing = {key: message[key] for key in ("slot", "began_at", "reported_at") if key in message}
        live.inherited = report["inherited"]
        live.timing["first_step_at"] = report["first_step_at"]
        if report["epoch"] in (row["epoch"] for row in live.history):
            return True
        first = live.points[0]
        metrics = {"train_loss": report["train_loss"], **{n: first[n] for n in METRICS}, **first.get("measures", {})}
        row = {"epoch": report["epoch"], **_written(metrics), "seconds": report["seconds"]}
        if live.proposal.cost.bits is None:  # widths that training decides are part of its course
            row["bits"] = report["points"][0]["bits"]
        goes_on = self._stands(number, row, live.points) if self.stopper else True
        live.history.append(row)
        self.epochs_spent += 1
        self._epochs.append({"trial": number, **row, "time": time.time()})
        self._listener(self)
        return goes_on

    def _stands(self, number: int, row: dict[str, Any], points: list[dict[str, Any]]) -> bool:
        """Rank a trial where there is a rung, and write into its epoch's row what was said."""
        assert self.stopper
        standing = self.stopper.report(number, row["epoch"], points)
        if len(points) > 1:
            row["other_points"] = self.stopper.others(points)
        if standing is None:
            return True
        row["rung"] = {"rank": standing.rank, "of": standing.of, "goes_on": standing.goes_on}
        self.ledger.learn_course(number, row)
        return standing.goes_on

    def pause(self, number: int) -> None:
        """A trial was stopped at a rung. It may go on later, unless too many wait."""
        live = self.live.pop(number)
        live.trained_s += time.time() - live.since
        self.paused[number] = live
        self.ledger.pause(number, time.time())
        self._trim()
        self._listener(self)

    def _trim(self) -> None:
        """Let the least hopeful go while too many wait, or their checkpoints and those of the front take too much."""
        most = self.sweep.max_checkpoint_bytes
        while self.stopper and self.paused:
            if len(self.paused) <= self.sweep.max_paused:
                files = [self.folder.trial(number) / checkpoint.FILE for number in self.paused]
                if most is None or self._keeper.total_bytes + sum(map(checkpoint.size_bytes, files)) <= most:
                    return
            self._let_go(self.stopper.rungs.hopeless())

    def promotable(self) -> int | None:
        """The number of a paused trial that may go on; None if there is none, or no room for it."""
        return self.stopper.rungs.promotable(self.room()) if self.stopper and self.paused else None

    def promotion(self) -> Proposal | None:
        """The configuration of a paused trial that goes on now."""
        number = self.promotable()
        if self.stopper is None or number is None:
            return None
        self.stopper.rungs.promote(number)
        self.ledger.go_on(number)
        return self.paused[number].proposal

    def room(self) -> float:
        """Epochs of the budget that are neither spent nor promised to a trial in training."""
        if self.sweep.epoch_budget is None:
            return math.inf
        promised = sum(self.sweep.epochs - len(live.history) for live in self.live.values())
        return self.sweep.epoch_budget - self.epochs_spent - promised

    def let_all_go(self) -> None:
        """The sweep is over: whoever still waits is pruned."""
        while self.paused:
            self._let_go(min(self.paused))

    def _let_go(self, number: int) -> None:
        """End a paused trial."""
        assert self.stopper
        standing = self.stopper.rungs.standing(number)
        live = self.live[number] = self.paused.pop(number)
        live.since = time.time()
        self.end(number, "pruned", f"stopped at epoch {standing.epoch}: rung rank {standing.rank} of {standing.of}")

    def end(self, number: int, status: str, reason: str | None = None) -> None:
        """A trial ended: `complete`, `pruned` or `failed`, with the reason for the latter two."""
        live = self.live.pop(number)
        if number in self._ended:
            return
        if status == "complete" and (fault := _fault(live)):
            status, reason = "failed", fault
        if self.stopper:
            self.stopper.rungs.end(number, counts=status == "complete")
        points = (live.points if status == "complete" else live.points[:1]) or [{}]
        rows = [self._row(live, _written(point), len(points), status, reason) for point in points]
        self._records.append(*rows, durable=True)
        for row in rows:
            self.rows.append(row)
            self._count(row)
        self._forget(before=len(self.rows) - len(rows))
        if self.first_end_s is None:
            self.first_end_s = time.monotonic() - self.opened_at
        self._tell(number)
        self._keeper.ended(number, rows)
        self._listener(self)
        self._trim()

    def front(self) -> Front:
        """The front of all complete points so far; it knows no others."""
        return Front.of(self._keeper.front, self.sweep.objectives, self.sweep.reference)

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
            "relative_bops": point.get("relative_bops", cost.relative_bops),
            "size_bytes": point.get("size_bytes", cost.size_bytes),
            "float_size_bytes": self.float_size_bytes,
            "macs": round(share * self.ledger.resolved.table.macs),
            **{name: measured.get(name) for name in self.sweep.measures},
            "measures": list(self.sweep.measures),
            "bits": point.get("bits", cost.bits),
            "epoch": live.history[-1]["epoch"] if live.history else 0,
            "epochs": self.sweep.epochs,
            "seconds": round(live.trained_s + time.time() - live.since, 3),
            "seed": tree["seed"],
            "digest": cost.digest,
            "source": proposal.source,
            "repaired": proposal.repaired,
            "inherited": live.inherited,
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

    def _forget(self, before: int) -> None:
        """Leave what is long in the records of earlier trials to the disk: memory must not grow with it."""
        for row in self.rows[self._slim : before]:
            for name in LONG:
                row.pop(name, None)
        self._slim = max(self._slim, before)

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


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
