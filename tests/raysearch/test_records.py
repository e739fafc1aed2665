"""The run folder: what was written is read back, wherever a writer was killed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch.errors import RecordError
from raysearch.records import SCHEMA, Log, RunFolder, read_lines, write_json
from tests.raysearch.builders import law

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    log = Log(path)
    for row in rows:
        log.append(row)
    log.close()


@law
@given(rows=ROWS, more=ROWS)
def test_what_was_appended_is_read_back_in_order(tmp_path: Path, rows: list[Any], more: list[Any]) -> None:
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    write(path, rows)
    write(path, more)
    assert list(read_lines(path)) == rows + more


@law
@given(rows=ROWS.filter(len), data=st.data())
def test_a_log_cut_at_any_byte_reads_as_its_complete_lines_and_the_next_line_is_whole(
    tmp_path: Path, rows: list[Any], data: st.DataObject
) -> None:
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    write(path, rows)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    complete = rows[: whole[:cut].count(b"\n")]
    assert list(read_lines(path)) == complete
    write(path, [{"next": True}])
    assert list(read_lines(path)) == [*complete, {"next": True}]
    assert path.read_bytes().endswith(b"\n")


def test_a_torn_line_longer_than_what_is_searched_at_a_time_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    write(path, [{"c": 2}])
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_a_log_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "log.jsonl")) == []


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.append({"a": 1}, durable=True)
    assert list(read_lines(tmp_path / "log.jsonl")) == [{"a": 1}]
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_json_does_not_have_is_never_written(tmp_path: Path, value: float) -> None:
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"accuracy": value})
    log.close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


@pytest.mark.parametrize("line", [b"{", b"", b'{"a": 1} x', b"\xff\xfe", b"3", b"[]", b"null"])
def test_a_damaged_line_is_an_error_that_names_the_file_and_the_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n" + b'{"b": 2}\n')
    lines = read_lines(path)
    assert next(lines) == {"a": 1}
    with pytest.raises(RecordError, match=r"records\.jsonl, line 2 is damaged: "):
        next(lines)


def test_json_is_written_over_the_old_file_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [1, "ä"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_tree_that_json_does_not_have_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_a_sweep_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"is no run folder: it has no sweep\.json"):
        RunFolder(tmp_path).read_sweep()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema": 2}', f"has schema 2; this version reads {SCHEMA}"),
        (b"{}", "has schema None"),
        (b"[]", "cannot read .*sweep.json"),
        (b'{"schema": 1', "cannot read .*sweep.json"),
        (b"\xff\xfe", "cannot read .*sweep.json"),
    ],
)
def test_a_sweep_that_cannot_be_read_is_an_error_that_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sweep.json").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        RunFolder(tmp_path).read_sweep()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"cannot read .*file/sweep\.json"):
        RunFolder(tmp_path / "file").read_sweep()


def test_records_carry_the_test_accuracy_that_was_measured_for_their_point(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    values = {"status": "complete", "accuracy": 0.6, "bops": 100, "size_bytes": 10}
    rows = [{"trial": trial, "point": point, **values} for trial, point in [(0, "final"), (1, "a"), (1, "b")]]
    write(folder.records, rows)
    write(folder.tests, [{"trial": 1, "point": "b", "test_accuracy": 0.5}])
    assert folder.read_records() == [*rows[:2], rows[2] | {"test_accuracy": 0.5}]


def test_folders_of_trials_sort_as_their_numbers_do() -> None:
    folder = RunFolder(Path("run"))
    assert [str(folder.trial(n)) for n in (7, 12345)] == ["run/trials/00007", "run/trials/12345"]
