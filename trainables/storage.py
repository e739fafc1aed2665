"""Storage that is full, read-only or gone for a while: whoever writes waits and tries again.

A sweep may run for days on a file system that others fill up, or that an administrator remounts. Nothing is lost by
standing still meanwhile, and everything by giving up at once.
"""

import errno
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from trainables.errors import StorageError

log = logging.getLogger("trainables.storage")

PATIENCE_S = 3600.0
RETRY_S = 1.0
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
"""Errors of a system call that may pass by themselves."""
PASSING_SQLITE = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_BUSY,
}

T = TypeVar("T")


def patiently(write: Callable[[], T], what: Path, *, patience_s: float = PATIENCE_S, retry_s: float = RETRY_S) -> T:
    """The result of `write`, which is called again as long as the storage refuses.

    Args:
        write: writes; after a failure, it must be able to begin from the start.
        what: it writes, for the message.
        patience_s: how long to try, in seconds.
        retry_s: from one attempt to the next.

    Raises:
        StorageError: the storage has refused for too long.
    """
    began = time.monotonic()
    told = False
    while True:
        try:
            return write()
        except Exception as error:
            why = refusal(error)
            if why is None:
                raise
            if time.monotonic() - began > patience_s:
                raise StorageError(
                    f"{what} could not be written for {patience_s:g} s ({why}): make room or mount it again, then "
                    f"`raysearch resume` goes on"
                ) from error
        if not told:
            log.warning("%s cannot be written (%s); trying again for %g s", what, why, patience_s)
            told = True
        time.sleep(retry_s)


def refusal(error: BaseException | None) -> str | None:
    """Why the storage refuses, if that is the cause of an error and may pass by itself."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in PASSING:
            return error.strerror
        # Primary result codes are the low byte: https://sqlite.org/rescode.html
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in PASSING_SQLITE:
            return str(error)
        error = error.__cause__ or error.__context__
    return None
