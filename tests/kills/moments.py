"""Moments in the life of a sweep, told by the file system at the instant when they happen (inotify).

A kill that is to hit the writing of a file cannot wait for a poll: a checkpoint is written in less than a millisecond.
"""

import ctypes
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.raysearch.cluster import lines

MOMENTS = ("start", "mid-epoch", "checkpoint", "record", "between trials")
"""The beginning; in the middle of an epoch of the second trial; while a checkpoint of it is written; while the first
record is appended; just after the second record, before the third trial says anything."""

CREATE, MODIFY, MOVED_TO = 0x100, 0x2, 0x80  # linux/inotify.h
MID_EPOCH_S = 0.3
BETWEEN_S = 0.03


class Events:
    """What happens in a run folder and in the folders of its trials.

    Args:
        run: the run folder; it may not exist yet.
        alive: raises when there is nothing to wait for any more.
    """

    def __init__(self, run: Path, alive: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(0)
        self._folders: dict[int, Path] = {}
        self.run, self._alive = run, alive

    def close(self) -> None:
        """Stop listening."""
        os.close(self._fd)

    def wait_for(self, moment: str) -> None:
        """Come back at a moment of `MOMENTS`."""
        while not (self.run / "sweep.json").exists():
            self._alive()
            time.sleep(0.002)
        if moment == "start":
            return
        self._watch(self.run)
        for folder, name, created in self._stream():
            if moment == "checkpoint" and created and name.startswith(".checkpoint") and folder.name == "00001":
                return
            if moment == "record" and name == "records.jsonl" and not created:
                return
            if moment == "mid-epoch" and name == "epochs.jsonl" and any(row["trial"] for row in self._rows(name)):
                time.sleep(MID_EPOCH_S)
                return
            if moment == "between trials" and name == "records.jsonl" and len(self._rows(name)) > 1:
                time.sleep(BETWEEN_S)
                return

    def _rows(self, name: str) -> list[dict[str, object]]:
        return lines(self.run / name)

    def _watch(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), CREATE | MODIFY | MOVED_TO)
        self._folders[number] = folder
        for child in folder.iterdir() if folder.exists() else ():
            if child.name == "trials" or child.parent.name == "trials":
                self._watch(child)

    def _stream(self) -> Iterator[tuple[Path, str, bool]]:
        """Folder, name, and whether the file has just been created."""
        while True:
            while not select.select([self._fd], [], [], 0.2)[0]:
                self._alive()
            data = os.read(self._fd, 65536)
            while data:
                number, mask, _, length = struct.unpack("iIII", data[:16])
                name, data = data[16 : 16 + length].rstrip(b"\0").decode(), data[16 + length :]
                folder = self._folders[number]
                if name == "trials" or folder.name == "trials":
                    self._watch(folder / name)
                yield folder, name, bool(mask & CREATE)
