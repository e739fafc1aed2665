"""One sweep and one MLflow store, from the first contact to the first failure: everything that is written to MLflow.

A session may be cut off anywhere, by a store that goes away or by SIGKILL. The next one starts from RUN/mlflow.json,
asks MLflow which runs are there already, and repeats the last step; `entries` makes that harmless.
"""

import contextlib
import json
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.front import Front
from analysis.pareto import bounded, hypervolume_history
from raysearch.mirror import entries
from raysearch.mirror.links import Progress, is_served, public, redact, view_tag
from raysearch.reporting import SUMMARY_PAGE, swept

log = logging.getLogger("raysearch.tracking")

PUBLISH_S = 10.0
PAGE_S = 60.0
CHUNK_BYTES = 1 << 20
METRICS_MAX = 1000
"""Metrics that MLflow takes in one call."""
SUMMARY = -1
"""Stands for the summary where the other runs have the number of their trial."""

Line = dict[str, Any]


class Lines:
    """The complete lines of a file that grows; a last line without its end is still being written."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path = path
        self.offset = offset

    def size(self) -> int:
        """Bytes that the file has now, 0 without a file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read(self, until: int, most: int = CHUNK_BYTES) -> list[Line]:
        """The next lines before byte `until`, about `most` bytes of them and at least one."""
        if self.offset >= until:
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(min(most, until - self.offset))
            if b"\n" not in data:
                data += file.readline()
        data = data[: data.rfind(b"\n") + 1]
        start, self.offset = self.offset, self.offset + len(data)
        return list(self._parsed(data, start))

    def waiting(self) -> bool:
        """Whether there is a complete line that was not read."""
        if self.size() <= self.offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.readline().endswith(b"\n")

    def _parsed(self, data: bytes, start: int) -> Iterator[Line]:
        for line in data.splitlines(keepends=True):
            try:
                yield json.loads(line)
            except ValueError:  # the writer was killed within this line, and a later one went on behind it
                log.warning("%s: the line at byte %d is not JSON and is left out", self.path.name, start)
            start += len(line)


class Session:
    """See the module.

    Args:
        run: the sweep's folder, with `sweep.json`.
        uri: the store.

    Raises:
        MlflowException: the store does not answer, or refuses. So do all methods; see also `tracking.failures`.
    """

    def __init__(self, run: Path, uri: str) -> None:
        from mlflow import MlflowClient

        self.run = run
        self.sweep: dict[str, Any] = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
        self.client = MlflowClient(tracking_uri=uri)
        self.experiment, made = self._experiment(uri)
        self.record_lines, self.epoch_lines = Lines(run / "records.jsonl"), Lines(run / "epochs.jsonl")
        self.progress = self._progress(uri, known=not made)
        self.runs: dict[int, str] = {}
        self.tagged: set[int] = set()
        self.interrupted: set[int] = set()
        self._look_around()
        self.records: list[Line] = []
        self.trained: set[int] = set()
        records_sent, epochs_sent = self.progress.records_sent, self.progress.epochs_sent
        self._learn(self.epoch_lines.read(epochs_sent, epochs_sent), self.record_lines.read(records_sent, records_sent))
        self.next_publish = self.next_page = 0.0
        self._save()

    def step(self, *, last: bool) -> bool:
        """Send the next lines and, when there are none or it is time to, the front. Returns whether anything was sent.

        Args:
            last: nothing more will come, so do not wait for the time.
        """
        # A record is written after its epochs: with its file's size asked first, its epochs are in what is read next.
        size = self.record_lines.size()
        epochs = self.epoch_lines.read(self.epoch_lines.size())
        records = [] if self.epoch_lines.waiting() else self.record_lines.read(size)
        self._learn(epochs, records)
        self._send(epochs, records)
        stale = bool(self.records) and self.progress.published != self.record_lines.offset
        due = stale and (not (epochs or records) if last else time.monotonic() >= self.next_publish)
        if due:
            self._publish(last=last)
        if epochs or records or due:
            self._save()
        return bool(epochs or records or due)

    def end(self) -> None:
        """Say of trials without a record that they were interrupted, and of the sweep whether it has all its trials."""
        recorded = {record["trial"] for record in self.records}
        for trial in sorted((self.trained - recorded - self.interrupted) & set(self.runs)):
            with self._unless_refused(f"trial {trial}"):
                self.client.set_tag(self.runs[trial], "raysearch.status", "interrupted")
                self.client.set_terminated(self.runs[trial], "KILLED")
        if SUMMARY in self.runs:
            done = len(recorded) >= self.sweep.get("trials", 0)
            end_ms = max(entries.span_ms(record)[1] for record in self.records)
            with self._unless_refused("the summary"):
                self.client.set_terminated(self.runs[SUMMARY], "FINISHED" if done else "KILLED", end_ms)
        self._save(ended=True)

    def _experiment(self, uri: str) -> tuple[str, bool]:
        """The id of the sweep's experiment, and whether it was made just now."""
        name = self.sweep["name"]
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id, False
        # A server has a place for files; a bare database would have them put into the working directory.
        place = None if is_served(uri) else (self.run / "mlartifacts").as_uri()
        own = (self.sweep.get("sweep") or {}).get("measures") or {}
        kind = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the pages ask, and suggest GenAI
        return self.client.create_experiment(name, artifact_location=place, tags=kind | view_tag(own)), True

    def _progress(self, uri: str, *, known: bool) -> Progress:
        """What was sent to this experiment before; nothing if it is another one, or the files are not those.

        Args:
            known: whether the store knew the experiment; a new store may give it the id that it had in a lost one.
        """
        before = Progress.load(self.run)
        same = (before.uri, before.sweep, before.experiment_id) == (public(uri), self.sweep["name"], self.experiment)
        whole = before.records_sent <= self.record_lines.size() and before.epochs_sent <= self.epoch_lines.size()
        if known and same and whole:
            return before
        return Progress(uri=public(uri), sweep=self.sweep["name"], experiment_id=self.experiment)

    def _look_around(self) -> None:
        """Ask MLflow which runs the sweep has, also those that a person deleted: they are not made again."""
        from mlflow.entities import ViewType

        found: defaultdict[int, list[Any]] = defaultdict(list)
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment], "", ViewType.ALL, 1000, None, token)
            for run in page:
                if run.data.tags.get("raysearch.sweep") == self.sweep["name"]:
                    found[int(run.data.tags.get("raysearch.trial", SUMMARY))].append(run)
            token = page.token
            if not token:
                break
        for trial, same in found.items():
            self._take_in(trial, same)

    def _take_in(self, trial: int, same: list[Any]) -> None:
        """Of several runs for one trial, made when a slow answer was taken for a lost one, a single one stays."""
        remembered = self.progress.summary if trial == SUMMARY else self.progress.runs.get(str(trial))
        same = sorted(same, key=lambda run: (run.info.run_id != remembered, run.info.lifecycle_stage != "active"))
        self.runs[trial] = same[0].info.run_id
        tags = same[0].data.tags
        if "pareto" in tags:
            self.tagged.add(trial)
        if tags.get("raysearch.status") == "interrupted":
            self.interrupted.add(trial)
        for run in same[1:]:
            if run.info.lifecycle_stage == "active":
                self.client.delete_run(run.info.run_id)

    def _learn(self, epochs: Sequence[Line], records: Sequence[Line]) -> None:
        self.trained |= {line["trial"] for line in epochs}
        self.records += records

    def _send(self, epochs: Sequence[Line], records: Sequence[Line]) -> None:
        """A run for each trial; of a search on shared weights only those of the front, when it is published."""
        if "search" in self.sweep:
            return
        news: defaultdict[int, tuple[list[Line], list[Line]]] = defaultdict(lambda: ([], []))
        for line in epochs:
            news[line["trial"]][0].append(line)
        for record in records:
            news[record["trial"]][1].append(record)
        for trial, (its_epochs, its_records) in news.items():
            with self._unless_refused(f"trial {trial}"):
                self._send_trial(trial, its_epochs, its_records)

    def _send_trial(self, trial: int, epochs: Sequence[Line], records: Sequence[Line]) -> None:
        metrics = [metric for line in epochs for metric in entries.epoch_metrics(line)]
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for record in records:
            metrics += [] if trial in self.trained else entries.history_metrics(record)
            metrics += entries.record_metrics(record)
            params |= entries.record_params(record)
            tags |= entries.record_tags(record)
        if records:
            tags["mlflow.note.content"] = entries.trial_note(self.sweep, records[0])
        if trial not in self.runs:
            start_ms = entries.span_ms(records[0])[0] if records else entries.epoch_start_ms(epochs[0])
            self._create(trial, f"trial-{trial:04d}", start_ms, {"raysearch.trial": str(trial)})
        self._log(trial, metrics, params, tags)
        if records:
            self._log_bits(trial, records[0])
            outcome = entries.STATUS[records[-1]["status"]]
            self.client.set_terminated(self.runs[trial], outcome, entries.span_ms(records[-1])[1])
        elif trial in self.interrupted:
            self.client.delete_tag(self.runs[trial], "raysearch.status")
            self.client.update_run(self.runs[trial], "RUNNING")
        self.interrupted.discard(trial)

    def _log_bits(self, trial: int, record: Line) -> None:
        """The course of the widths as a picture, where training decides them."""
        if not any(line.get("bits") for line in record.get("history") or []):
            return
        from analysis.plots import plot_bits

        with tempfile.TemporaryDirectory() as folder:
            picture = plot_bits(record["history"], Path(folder) / "bits.png", title=f"trial {trial}")
            self.client.log_artifact(self.runs[trial], str(picture))

    def _publish(self, *, last: bool) -> None:
        """Tags of the front, and the summary of all records so far; its page, which takes longer, not every time."""
        points = [record for record in self.records if record["status"] == "complete"]
        front = Front.of(points, self.sweep["objectives"], self._reference)
        if "search" in self.sweep:
            missing = {int(trial) for trial in front.to_pandas()["trial"]}.difference(self.runs)
            for record in [record for record in points if record["trial"] in missing]:
                with self._unless_refused(f"trial {record['trial']}"):
                    self._send_trial(record["trial"], [], [record])
        ranked = [int(trial) for trial in dict.fromkeys(front.to_pandas()["trial"]) if int(trial) in self.runs]
        on_front = set(ranked)
        for trial in sorted(on_front - self.tagged):
            with self._unless_refused(f"trial {trial}"):
                self.client.set_tag(self.runs[trial], "pareto", "true")
        for trial in sorted(self.tagged - on_front):
            with self._unless_refused(f"trial {trial}"):
                self.client.delete_tag(self.runs[trial], "pareto")
        self.tagged = on_front
        with self._unless_refused("the summary"):
            self._summarize(front, points)
            if len(front) and (last or time.monotonic() >= self.next_page):
                self._log_page()
        ids = [self.runs[trial] for trial in ranked]
        self.progress = replace(self.progress, published=self.record_lines.offset, front=ids)
        self.next_publish = time.monotonic() + PUBLISH_S

    def _summarize(self, front: Front, points: Sequence[Line]) -> None:
        """Write the summary: settings, description, hypervolume after each completed trial, front as table and plot."""
        if SUMMARY not in self.runs:
            start_ms = min(entries.span_ms(record)[0] for record in self.records)
            self._create(SUMMARY, "summary", start_ms, {})
        run_id = self.runs[SUMMARY]
        known = self.client.get_run(run_id).data.params
        settings = {name: text for name, text in entries.params(self.sweep).items() if name not in known}
        completed = len({point["trial"] for point in points})
        note = {"mlflow.note.content": entries.description(self.sweep, front.to_pandas(), completed)}
        self._log(SUMMARY, self._hypervolumes(points), settings, note)
        self.client.log_text(run_id, front.to_csv(), "front.csv")
        self.client.log_text(run_id, front.to_json(), "front.json")
        if len(front):
            from analysis.plots import plot_front

            with tempfile.TemporaryDirectory() as folder:
                picture = plot_front(front, Path(folder) / "front.png", title=self.sweep["name"])
                self.client.log_artifact(run_id, str(picture))

    def _log_page(self) -> None:
        """The report of the sweep as a page that MLflow shows."""
        from analysis.report import report

        sweep = swept(self.run, self.sweep, self.records)
        self.client.log_text(self.runs[SUMMARY], report([sweep], self.sweep["name"]), SUMMARY_PAGE)
        self.next_page = time.monotonic() + PAGE_S

    @property
    def _reference(self) -> dict[str, float]:
        return dict((self.sweep.get("sweep") or {}).get("reference") or {})

    def _hypervolumes(self, points: Sequence[Line]) -> list[entries.Metric]:
        """Those that MLflow lacks. None where an objective has no worst value to measure from, as the loss."""
        objectives = self.sweep["objectives"]
        if not bounded(objectives, self._reference) or not points:
            return []
        # Earlier values can change with the largest size seen so far, but MLflow would keep both: the first one stays.
        sent = {metric.step for metric in self.client.get_metric_history(self.runs[SUMMARY], "hypervolume")}
        history = hypervolume_history(points, objectives, self._reference)
        volumes = zip(history.index, history["hypervolume"], history["finished_at"], strict=True)
        return [
            entries.Metric("hypervolume", volume, entries.moment_ms(finished), int(step))
            for step, volume, finished in volumes
            if step not in sent
        ]

    def _create(self, trial: int, name: str, start_ms: int, facts: Mapping[str, str]) -> None:
        kind = "sweep" if trial == SUMMARY else "trial"
        tags = {"raysearch.sweep": self.sweep["name"], "raysearch.kind": kind, **facts}
        self.runs[trial] = self.client.create_run(self.experiment, start_ms, tags, name).info.run_id

    def _log(
        self, trial: int, metrics: Sequence[entries.Metric], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        values = [Metric(metric.key, metric.value, metric.time_ms, metric.step) for metric in metrics]
        self.client.log_batch(
            self.runs[trial],
            values[:METRICS_MAX],
            [Param(key, value) for key, value in params.items()],
            [RunTag(key, value) for key, value in tags.items()],
        )
        for first in range(METRICS_MAX, len(values), METRICS_MAX):
            self.client.log_batch(self.runs[trial], values[first : first + METRICS_MAX])

    @contextlib.contextmanager
    def _unless_refused(self, what: str) -> Iterator[None]:
        """Go on without what MLflow will never take: a run that a person deleted, a param that has another value."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            log.warning("MLflow refuses %s: %s", what, error)
            self.progress = replace(self.progress, refused=redact(f"MLflow refuses {what}: {error}"))

    def _save(self, *, ended: bool = False) -> None:
        self.progress = self.progress.save(
            self.run,
            runs={str(trial): run_id for trial, run_id in sorted(self.runs.items()) if trial != SUMMARY},
            summary=self.runs.get(SUMMARY),
            records_sent=self.record_lines.offset,
            epochs_sent=self.epoch_lines.offset,
            error=None,
            ended=ended,
        )
