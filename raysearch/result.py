"""What a sweep found, read from its run folder; needs no server and no Ray."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch.errors import RecordError
from raysearch.records import TESTED, Log, RunFolder, read_trials

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.front import Front
    from raysearch.mirror.links import Status
    from trainables.export.onnx_file import Agreement
    from trainables.fit import Session


EXPORTS = (".safetensors", ".onnx", ".pt2")
EXPORTED_FACTS = ("trial", "point", "method", "model", "data", "accuracy", "bops", "relative_bops", "size_bytes")
CHECKED = 2000
"""Test images, at most, on which onnxruntime must predict what torch predicts."""


class Result:
    """One run folder.

    Args:
        path: the run folder.
        mirrored: how far the MLflow mirror got, when the caller knows.
    """

    def __init__(self, path: str | Path, *, mirrored: "Status | None" = None) -> None:
        self.folder = RunFolder(Path(path))
        self.description: dict[str, Any] = self.folder.read_sweep()
        self.mirrored = mirrored

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def name(self) -> str:
        """Name of the sweep."""
        return str(self.description["name"])

    @property
    def objectives(self) -> Mapping[str, str]:
        """What was searched for."""
        return self.description["objectives"]

    def __repr__(self) -> str:
        ended = {row["trial"]: row["status"] for row in self.records()}
        complete = sum(status == "complete" for status in ended.values())
        return f"Result({self.name!r}, {complete} of {self.description['trials']} trials complete)"

    def _repr_html_(self) -> str:
        front = self.front()._repr_html_() if self._has_points() else ""
        return f"<p>{html.escape(repr(self))} in {html.escape(str(self.path))}</p>{front}"

    def plot(self) -> "Figure":
        """The front as a matplotlib figure, which a notebook shows.

        Raises:
            RecordError: no trial is complete.
        """
        return self.front().plot(self.name)

    def report(self, path: str | Path) -> Path:
        """Write the report as one HTML page that needs no network.

        Raises:
            RecordError: no trial is complete.
        """
        Path(path).write_text(report_of([self]), encoding="utf-8")
        return Path(path)

    def _has_points(self) -> bool:
        return any(row["status"] == "complete" for row in self.records())

    def records(self) -> list[dict[str, Any]]:
        """All records as dictionaries."""
        return self.folder.read_records()

    def to_pandas(self) -> "pd.DataFrame":
        """All records as a DataFrame, one row for each (trial, operating point), in order of finish."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def to_parquet(self, path: str | Path | None = None) -> Path:
        """Write the records as Parquet, nested fields as JSON text; default `RUN/records.parquet`."""
        import json

        frame = self.to_pandas()
        for column in ("inherited", "bits", "measures", "params", "config", "history", "versions", "git", "timing"):
            if column in frame:
                frame[column] = frame[column].map(json.dumps)
        target = Path(path) if path is not None else self.folder.path / "records.parquet"
        frame.to_parquet(target, index=False)
        return target

    def front(self) -> "Front":
        """The Pareto front of the complete points."""
        return front_of([self])

    def test(self, row: Mapping[str, Any]) -> float:
        """Test accuracy of a point of the front, 0..1; computed once and kept.

        Raises:
            RecordError: the point's checkpoint is gone.
        """
        return float(self.tested(row)["test_accuracy"])

    def tested(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """`test_accuracy` of a point of the front, and how many `test_images` and `validation_images` there are.

        Computed once and kept.

        Raises:
            RecordError: the point's checkpoint is gone.
        """
        trial, point = int(row["trial"]), str(row["point"])
        for known in read_trials(self.folder.tests):
            if (known["trial"], known["point"]) == (trial, point):
                return {name: known[name] for name in TESTED if name in known}
        session = _session(self, trial, point)
        accuracy = next(p.accuracy for p in session.measure(session.data.test) if p.label == point)
        found = dict(zip(TESTED, (accuracy, len(session.data.test), len(session.data.validation)), strict=True))
        log = Log(self.folder.tests)
        log.append({"trial": trial, "point": point, **found}, durable=True)
        log.close()
        return found

    def export(
        self, trial: int, point: str = "final", *, to: str | Path, opset: int | None = None, checked: int = CHECKED
    ) -> "Agreement | None":
        """Write a point as a file that runs elsewhere; the ending of `to` says which.

        `.safetensors` is the packed file of `trainables.packed`, `.onnx` the graph of `trainables.export.onnx_file`,
        checked in onnxruntime on test images, `.pt2` a `torch.export` program. The metadata of an ONNX file say how its
        input is made from pixels of 0..1: minus `input_mean`, over `input_std`.

        Args:
            trial: its number.
            point: its operating point.
            to: file to write.
            opset: of ONNX, 20..25; None takes the oldest that has the types that the widths need.
            checked: test images, at most, on which onnxruntime must predict what torch predicts; 0: all.

        Returns:
            how far onnxruntime agrees with torch, for `.onnx`; None for the others, which come back bit by bit.

        Raises:
            RecordError: another ending, an opset for another format, no such point, or its checkpoint is gone.
            ConfigError: what the format cannot hold, or an opset that is too old.
        """
        path = Path(to)
        if path.suffix not in EXPORTS:
            raise RecordError(f"{path}: the name of an exported file ends in {', '.join(EXPORTS)}")
        if opset is not None and path.suffix != ".onnx":
            raise RecordError(f"opset = {opset}: only .onnx files have one, and {path} is none")

        import torch

        from trainables.build import normalisation
        from trainables.export.onnx_file import save_onnx
        from trainables.export.packed_writer import save_packed
        from trainables.export.program_file import save_program

        session = _session(self, trial, point)
        next(each for each in session.points() if each.label == point).activate()
        record = next(row for row in self.records() if (row["trial"], row["point"]) == (trial, point))
        facts = {name: record[name] for name in EXPORTED_FACTS} | {"sweep": self.name}
        if path.suffix == ".safetensors":
            save_packed(path, session.model, session.config, **facts)
            return None
        if path.suffix == ".pt2":
            save_program(path, session.model, session.input_shape)
            return None
        facts |= {f"input_{name}": values for name, values in normalisation(session.config).items()}
        parts, count = [], 0
        for images, _ in session.data.test.batches(CHECKED, device=torch.device("cpu"), seed=None, augment=False):
            parts.append(images)
            count += len(images)
            if checked and count >= checked:
                break
        return save_onnx(path, session.model, images=torch.cat(parts)[: checked or None], opset=opset, **facts)

    def session(self, trial: int, point: str = "final") -> "Session":
        """A trained network in memory, with its data, rebuilt from its checkpoint.

        Raises:
            RecordError: there is no such point, or its checkpoint is gone.
        """
        return _session(self, trial, point)

    def shapes(self, trial: int) -> tuple[int, tuple[int, int, int]]:
        """Number of classes and shape of an image (channels, height, width) of a trial's network.

        Raises:
            StopIteration: there is no such trial.
        """
        from trainables.build import data_shape
        from trainables.config import parse

        return data_shape(parse(next(row for row in self.records() if row["trial"] == trial)["config"]))

    def layers(self, trial: int, point: str = "final") -> "pd.DataFrame":
        """What a trained network is, layer by layer: weights, MACs, widths, and what its method has learned besides.

        Raises:
            RecordError: there is no such point, or its checkpoint is gone.
        """
        import pandas as pd

        return pd.DataFrame(_session(self, trial, point).layers(point))


def load(path: str | Path) -> Result:
    """The result of a run folder, finished or not.

    Raises:
        RecordError: no run folder.
    """
    return Result(path)


def front_of(results: list[Result]) -> "Front":
    """One front over the points of several sweeps, under the objectives of the first.

    Raises:
        RecordError: none of them has a complete trial, or they are of several data sets.
    """
    from analysis.front import Front

    rows = [{**row, "run": result.name} for result in results for row in result.records()]
    if not any(row["status"] == "complete" for row in rows):
        raise RecordError(f"no complete trial in {', '.join(str(result.path) for result in results)}")
    if len(results) == 1:
        rows = [{key: value for key, value in row.items() if key != "run"} for row in rows]
    try:
        return Front.of(rows, results[0].objectives, results[0].description["sweep"].get("reference"))
    except ValueError as error:
        raise RecordError(str(error)) from error


def report_of(results: list[Result], title: str | None = None) -> str:
    """The report of several sweeps as one self-contained HTML page.

    Raises:
        RecordError: none of them has a complete trial, or they are of several data sets.
    """
    from analysis.report import report
    from raysearch.reporting import swept

    sweeps = [swept(result.path, result.description, result.records()) for result in results]
    try:
        return report(sweeps, title or ", ".join(dict.fromkeys(result.name for result in results)))
    except ValueError as error:
        raise RecordError(str(error)) from error


def _session(result: Result, trial: int, point: str) -> "Session":
    """A trial in memory, rebuilt from its checkpoint."""
    from trainables import checkpoint, supernet
    from trainables.config import parse
    from trainables.fit import Session

    rows = [row for row in result.records() if row["trial"] == trial and row["status"] == "complete"]
    record = next((row for row in rows if row["point"] == point), None)
    if record is None:
        known = f"; it has the points {', '.join(str(row['point']) for row in rows)}" if rows else ""
        raise RecordError(f"trial {trial} of {result.path} has no complete point {point!r}{known}")
    root = result.description["sweep"]["data_root"]
    if "calibration" in record:  # a mixture of a supernet's widths
        session = supernet.opened(result.path / record["checkpoint"], data_root=None if root is None else Path(root))
        supernet.fix(session, record["bits"], calibration=record["calibration"])
        return session
    path = result.folder.trial(trial) / checkpoint.FILE
    if not path.exists():
        raise RecordError(
            f"trial {trial} has no checkpoint in {result.path}: only those of the front are kept, "
            "within --max-checkpoint-bytes (`raysearch pick --no-test` needs none)"
        )
    session = Session(parse(record["config"]), data_root=None if root is None else Path(root))
    session.load(path)
    return session
