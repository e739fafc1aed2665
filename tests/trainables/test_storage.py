"""Who writes to storage that refuses for a while waits for it; what is no fault of the storage is raised at once."""

import errno
import os
import resource
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from trainables.errors import StorageError
from trainables.storage import PASSING, patiently, refusal

HERE = Path("records.jsonl")


class Refusing:
    """A write that fails so many times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.calls = error, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.left:
            raise self.error
        return 7


@pytest.mark.parametrize("code", sorted(PASSING), ids=errno.errorcode.__getitem__)
def test_a_write_is_tried_again_until_the_storage_takes_it(code: int, caplog: pytest.LogCaptureFixture) -> None:
    write = Refusing(OSError(code, os.strerror(code)), times=3)
    assert patiently(write, HERE, retry_s=0) == 7
    assert write.calls == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"records.jsonl cannot be written ({os.strerror(code)}); trying again for 3600 s"
    ]


def test_patience_ends_with_an_error_that_says_what_to_do() -> None:
    write = Refusing(OSError(errno.ENOSPC, "No space left on device"), times=10**6)
    with pytest.raises(
        StorageError, match=r"records.jsonl could not be written for 0.05 s \(No space left on device\)"
    ):
        patiently(write, HERE, patience_s=0.05, retry_s=0.01)
    assert 2 <= write.calls <= 7


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "no"), FileNotFoundError(errno.ENOENT, "no"), ValueError("no")]
)
def test_another_error_is_raised_at_once(error: Exception) -> None:
    write = Refusing(error, times=1)
    with pytest.raises(type(error), match="no"):
        patiently(write, HERE)
    assert write.calls == 1


def test_sqlite_says_it_in_its_own_way(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (x)")
        connection.execute("pragma max_page_count = 3")
        with pytest.raises(sqlite3.OperationalError) as full:
            connection.execute("insert into t values (zeroblob(100000))")
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection, pytest.raises(sqlite3.Error) as readonly:
        connection.execute("insert into t values (1)")
    with sqlite3.connect(path) as connection, pytest.raises(sqlite3.Error) as wrong:
        connection.execute("insert into u values (1)")
    assert refusal(full.value) == "database or disk is full"
    assert refusal(readonly.value) == "attempt to write a readonly database"
    assert refusal(wrong.value) is None


def test_an_error_is_known_by_its_cause() -> None:
    outer = RuntimeError("the study could not be written")
    outer.__cause__ = OSError(errno.EROFS, "Read-only file system")
    assert refusal(outer) == "Read-only file system"


def test_a_line_that_the_storage_took_in_part_is_cut_off_and_written_whole_later(tmp_path: Path) -> None:
    """A limit on the size of files, in a process of its own, is a disk that fills up in the middle of a line."""
    program = """
import resource, sys, threading
from pathlib import Path
import trainables.storage as storage
storage.PASSING.add(27)  # EFBIG, which is how this limit says it
from raysearch.records import Log
path, limit = Path(sys.argv[1]), int(sys.argv[2])
log = Log(path)
log.append({"trial": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
def free():
    print(path.read_bytes(), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
threading.Timer(0.5, free).start()
log.append({"trial": 1}, {"trial": 1}, durable=True)
log.append({"trial": 2})
"""
    path = tmp_path / "records.jsonl"
    limit = len('{"trial": 0}\n') + 20
    done = subprocess.run([sys.executable, "-c", program, str(path), str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == repr(b'{"trial": 0}\n') + "\n"
    assert path.read_text() == "".join(f'{{"trial": {n}}}\n' for n in (0, 1, 1, 2))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
