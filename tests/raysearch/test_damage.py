"""A run folder that was damaged by hand, or comes from elsewhere: one clear error, or it heals."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray

from raysearch.driver import resume
from raysearch.errors import RecordError
from raysearch.mirror.links import PROGRESS, Progress
from raysearch.overview import overview
from raysearch.records import RunFolder, write_json
from raysearch.resolve import resolve
from raysearch.result import load
from tests.raysearch.builders import by_formula, drive, finished_run, make_run, open_book, proposals, small_sweep, train


def reopened(folder: RunFolder) -> None:
    """Open the folder as `resume` does."""
    open_book(folder, resolve(small_sweep())).close()


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"[" * 200_000,
        b'{"trial": "../../elsewhere"}',
        b'{"trial": -1}',
        b'{"trial": true}',
        b"{}",
    ],
    ids=["half", "no text", "no object", "nested without end", "a path", "negative", "no number", "empty"],
)
@pytest.mark.parametrize("log", ["records", "epochs"])
def test_a_damaged_line_is_named(tmp_path: Path, log: str, line: bytes) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=2))
    path = getattr(folder, log)
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (reopened, lambda folder: overview(folder.path, busy=False)):
        with pytest.raises(RecordError, match=rf"{log}\.jsonl, line 1 is damaged"):
            read(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 200_000, "{}", '{"schema": 1, "name": "run", "trials": "four"}'])
def test_a_damaged_question_is_named(tmp_path: Path, text: str) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=2))
    folder.sweep.write_text(text)
    with pytest.raises(RecordError, match=r"sweep\.json"):
        load(folder.path)


@pytest.mark.parametrize("place", ["run/net.py:build", "net.py"], ids=["inside", "relative"])
@pytest.mark.parametrize("book", ["sweep", "records"])
def test_code_that_came_with_a_folder_is_never_run(tmp_path: Path, place: str, book: str) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=2))
    (folder.path / "net.py").write_text("raise SystemExit('run')\n")
    name = str(tmp_path / place) if "/" in place else place
    path = getattr(folder, book)
    path.write_text(path.read_text().replace('"lenet5"', json.dumps(name)))
    with pytest.raises(RecordError, match="names code that may have come with it"):
        load(folder.path).records()


def test_torn_ends_are_cut_off_and_the_sweep_goes_on(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "run")
    book = open_book(folder, resolved)
    drive(book, limit=3)
    book.close()
    for path in (folder.records, folder.epochs):
        path.write_bytes(path.read_bytes() + b'{"trial": 3, "ep')
    again = open_book(folder, resolved)
    drive(again)
    again.close()
    assert sorted(row["trial"] for row in folder.read_records()) == list(range(12))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"status": None}, "its status is null"),
        ({"status": "gone"}, 'its status is "gone"'),
        ({"accuracy": "high"}, 'its accuracy is "high", not a number'),
        ({"accuracy": None}, "its accuracy is null, not a number"),
        ({"trial": 0}, "it repeats trial 0, point final"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=2))
    first, second = folder.records.read_text().splitlines()
    folder.records.write_text(f"{first}\n{json.dumps(json.loads(second) | changes)}\n")
    for read in (reopened, lambda folder: overview(folder.path, busy=False)):
        with pytest.raises(RecordError, match=f"line 2 is damaged: {fault}"):
            read(folder)


@pytest.mark.parametrize("ending", [("complete", None), ("failed", "loss is nan"), ("pruned", "rung rank 2 of 2")])
def test_lost_records_are_made_again(tmp_path: Path, ending: tuple[str, str | None]) -> None:
    """The study still has them: what was complete runs again, under its number, and the rest is known."""
    folder, resolved = make_run(tmp_path / "run", small_sweep(trials=3))
    book = open_book(folder, resolved)
    for number, proposal in enumerate(proposals(book.ledger)):
        train(book, proposal, by_formula(proposal), ending if number == 1 else ("complete", None))
    book.close()
    before = folder.read_records()
    folder.records.write_bytes(folder.records.read_bytes()[:-200].partition(b"\n")[0] + b"\n" + b'{"trial": 1, "po')
    again = open_book(folder, resolved)
    drive(again)
    again.close()
    told = ("trial", "status", "reason", "accuracy", "size_bytes", "digest", "history")
    found = sorted(folder.read_records(), key=lambda row: row["trial"])
    assert [[row[name] for name in told] for row in found] == [[row[name] for name in told] for row in before]


def test_a_sweep_that_is_over_is_resumed_without_ray(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=3))
    write_json(folder.end, {"trials": 3})
    written = [folder.records.read_bytes(), folder.study.read_bytes()]
    result = resume(folder.path)
    assert result.mirrored
    assert result.mirrored.complete
    assert len(result.records()) == 3
    assert [folder.records.read_bytes(), folder.study.read_bytes()] == written
    assert not ray.is_initialized()


@pytest.mark.parametrize("content", [b"no database at all" * 100, None], ids=["damaged", "deleted"])
def test_a_lost_study_is_one_clear_error(tmp_path: Path, content: bytes | None) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(trials=3))
    folder.study.unlink()
    if content is not None:
        folder.study.write_bytes(content)
    with pytest.raises(RecordError, match="bring back the study of this sweep"):
        reopened(folder)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000])
def test_a_damaged_state_of_the_mirror_heals(tmp_path: Path, text: str) -> None:
    (tmp_path / PROGRESS).write_text(text)
    assert Progress.load(tmp_path) == Progress()
