"""The run folder: append-only records on disk, which everything else is derived from.

    RUN/sweep.json      the question, resolved: `raysearch sweep --from` repeats it
    RUN/records.jsonl   one line for each (trial, operating point) that ended, and one for each trial without a point
    RUN/epochs.jsonl    one line for each epoch of each trial, as it happens
    RUN/tests.jsonl     test accuracy of picked points, computed once
    RUN/study.db        the Optuna study
    RUN/trials/00007/   checkpoint of a trial
    RUN/starts/         float networks that trials start from
    RUN/seeds.json      what was to be tried first, and known sensitivities (`raysearch.seeds`)
    RUN/end.json        made when the sweep has ended by itself
    RUN/mlflow.db       the MLflow mirror, unless it lives elsewhere

A line counts when it ends in a newline. A process may be killed while it writes one: the torn end is not read, and cut
off before the next line is written.
"""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch.errors import RecordError
from trainables.storage import patiently

SCHEMA = 1
DESCRIBED: dict[str, type] = {"name": str, "trials": int, "objectives": dict, "sweep": dict, "space": dict}
"""What `sweep.json` must hold."""
STATUSES = ("complete", "pruned", "failed")
VALUES = ("accuracy", "bops", "size_bytes")
TESTED = ("test_accuracy", "test_images", "validation_images")
"""What is known of a point once it was tested."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def sweep(self) -> Path:
        """The resolved sweep."""
        return self.path / "sweep.json"

    @property
    def records(self) -> Path:
        """The records."""
        return self.path / "records.jsonl"

    @property
    def epochs(self) -> Path:
        """The epochs as they happened."""
        return self.path / "epochs.jsonl"

    @property
    def tests(self) -> Path:
        """Test accuracies."""
        return self.path / "tests.jsonl"

    @property
    def study(self) -> Path:
        """The Optuna study, a SQLite file."""
        return self.path / "study.db"

    @property
    def starts(self) -> Path:
        """Float networks."""
        return self.path / "starts"

    @property
    def seeds(self) -> Path:
        """What was known before the first trial."""
        return self.path / "seeds.json"

    @property
    def end(self) -> Path:
        """Made when a sweep has ended by itself; it may have fewer trials than asked for, if its space has no more."""
        return self.path / "end.json"

    @property
    def lock(self) -> Path:
        """Held by the driver while it runs."""
        return self.path / ".lock"

    @property
    def trials(self) -> Path:
        """Folders of the trials."""
        return self.path / "trials"

    def trial(self, number: int) -> Path:
        """Folder of one trial."""
        return self.trials / f"{number:05d}"

    def checkpoints(self) -> tuple[int, int]:
        """How many trials have checkpoints, and how many bytes they take on disk."""
        files = list(self.trials.glob("*/checkpoint.*"))
        return len({file.parent for file in files}), sum(file.stat().st_size for file in files)

    def read_sweep(self) -> dict[str, Any]:
        """The resolved sweep.

        Raises:
            RecordError: this is no run folder, or one of another version.
        """
        try:
            tree = json.loads(self.sweep.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(f"{self.path} is no run folder: it has no sweep.json") from None
        except (OSError, ValueError, RecursionError) as error:  # not JSON, not even text, or nested without end
            raise RecordError(f"cannot read {self.sweep}: {error}") from error
        if not isinstance(tree, dict):
            raise RecordError(f"cannot read {self.sweep}: it holds {json.dumps(tree)[:40]} instead of a sweep")
        if tree.get("schema") != SCHEMA:
            raise RecordError(f"{self.sweep} has schema {tree.get('schema')!r}; this version reads {SCHEMA}")
        for name, kind in DESCRIBED.items():
            if not isinstance(tree.get(name), kind) and not (name == "space" and "search" in tree):
                raise RecordError(f"cannot read {self.sweep}: its {name} is {json.dumps(tree.get(name))[:40]}")
        self._refuse_code(tree.get("sweep"))
        return tree

    def read_records(self) -> list[dict[str, Any]]:
        """All records, in the order they were written, each with the test accuracy that was measured for it."""
        tests = {(t["trial"], t.get("point")): t for t in read_trials(self.tests)}
        rows = list(read_points(self.records))
        for row in rows:
            self._refuse_code(
                [part.get("name") for part in (row.get("config") or {}).values() if isinstance(part, dict)]
            )
            measured = tests.get((row["trial"], row.get("point")), {})
            row |= {name: measured[name] for name in TESTED if name in measured}
        return rows

    def _refuse_code(self, tree: Any) -> None:
        """A run folder may come from elsewhere, so no code that came with it is ever run: plug-ins lie outside.

        Raises:
            RecordError: a name in the tree is the path of a Python file in this folder, or relative to who knows where.
        """
        if isinstance(tree, str):
            path = Path(tree.rpartition(":")[0] if ".py:" in tree else tree)
            inside = path.is_absolute() and path.resolve().is_relative_to(self.path.resolve())
            if path.suffix == ".py" and (inside or not path.is_absolute()):
                raise RecordError(
                    f"{self.path} names code that may have come with it, {tree}, which is never run: if you trust it, "
                    "move it out of the folder and name it by its absolute path"
                )
        elif isinstance(tree, dict | list):
            for part in tree.values() if isinstance(tree, dict) else tree:
                self._refuse_code(part)


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file in one atomic step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")

    def write() -> None:
        temporary.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    patiently(write, path)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a log; none if the file does not exist.

    Raises:
        RecordError: a complete line that is no JSON object.
    """
    if not path.exists():
        return
    if path.is_dir():
        raise RecordError(f"cannot read {path}: it is a folder")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not even text, or nested without end
                raise RecordError(f"{path}, line {number} is damaged: {error}") from error
            if not isinstance(row, dict):
                raise RecordError(f"{path}, line {number} is damaged: it is no object")
            yield row


def read_trials(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a log about trials.

    Raises:
        RecordError: a complete line that is no JSON object with the number of a trial, which names a folder.
    """
    for number, row in enumerate(read_lines(path), start=1):
        trial = row.get("trial")
        if isinstance(trial, bool) or not isinstance(trial, int) or trial < 0:
            raise RecordError(f"{path}, line {number} is damaged: its trial is {json.dumps(trial)[:40]}, not a number")
        yield row


def read_points(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of the records.

    Raises:
        RecordError: a complete line that is no record, or repeats an earlier one.
    """
    seen = set()
    for number, row in enumerate(read_trials(path), start=1):
        status, key = row.get("status"), (row["trial"], json.dumps(row.get("point")))
        absent = [] if status == "complete" else [None]
        wrong = [n for n in VALUES if not isinstance(row.get(n), int | float) and row.get(n) not in absent]
        if status not in STATUSES:
            fault = f"its status is {json.dumps(status)[:40]}"
        elif wrong:
            fault = f"its {wrong[0]} is {json.dumps(row.get(wrong[0]))[:40]}, not a number"
        elif key in seen:
            fault = f"it repeats trial {row['trial']}, point {row.get('point')}"
        else:
            seen.add(key)
            yield row
            continue
        raise RecordError(f"{path}, line {number} is damaged: {fault}")


class Log:
    """An append-only file of JSON lines with one writer."""

    def __init__(self, path: Path) -> None:
        """Open for appending; a torn last line, left by a killed writer, is cut off."""
        self._path = path
        self._file = patiently(lambda: path.open("ab", buffering=0), path)
        with path.open("rb") as file:
            self._end = _end_of_last_line(file)
        patiently(self._cut, path)

    def append(self, *rows: dict[str, Any], durable: bool = False) -> None:
        """Write a line for each row with a single system call; `durable` waits until they are on the disk.

        Where the storage refuses, what it took of the lines is cut off again, and they are written when it takes them.
        """
        data = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
        patiently(lambda: self._write(data, durable), self._path)
        self._end += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: bytes, durable: bool) -> None:
        self._cut()  # what an attempt that failed has left
        if self._file.write(data) < len(data):
            self._cut()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if durable:
            os.fsync(self._file.fileno())

    def _cut(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self._end:
            os.ftruncate(self._file.fileno(), self._end)


def complete_trials(path: Path) -> list[dict[str, Any]]:
    """The records of a run, after those of its last trial are cut off if a writer was killed between its points."""
    rows = list(read_points(path))
    last = [row for row in rows if row["trial"] == rows[-1]["trial"]]
    if not rows or len(last) >= last[-1].get("points", 1):
        return rows
    lines = path.read_bytes().splitlines(keepends=True)
    os.truncate(path, sum(map(len, lines[: len(rows) - len(last)])))
    return rows[: len(rows) - len(last)]


def _end_of_last_line(file: Any) -> int:
    """Offset just behind the last newline of a binary file."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
