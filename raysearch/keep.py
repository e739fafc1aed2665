"""Which trials' checkpoints stay on disk: those of the front, as far as the sweep's limit allows.

Picking under a limit makes what it limits an objective, so what could then be picked is kept, too. Fronts are kept up
to date trial by trial: what an ended trial costs does not grow with their number.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.rows import OBJECTIVES
from raysearch.records import RunFolder
from trainables import checkpoint

PICKED = ("accuracy", "bops", "size_bytes")
"""What picking prefers, the first two, and what it may limit besides; relative BOPs go with BOPs."""


class Archive:
    """The records on the front of some objectives; of equal points the first stays.

    Args:
        objectives: name to direction.
    """

    def __init__(self, objectives: Mapping[str, str]) -> None:
        self.names = tuple(objectives)
        self._signs = np.array([-1.0 if direction == "max" else 1.0 for direction in objectives.values()])
        self._values = np.empty((0, len(self.names)))
        self.rows: list[Mapping[str, Any]] = []

    @property
    def trials(self) -> set[int]:
        """Their numbers."""
        return {row["trial"] for row in self.rows}

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a complete record."""
        values = np.array([row[name] for name in self.names], dtype=float) * self._signs
        if (self._values <= values).all(axis=1).any():
            return
        left = ~(values <= self._values).all(axis=1)
        self._values = np.vstack([self._values[left], values])
        self.rows = [*itertools.compress(self.rows, left), row]


class Keeper:
    """Drops the checkpoints that nobody will ask for.

    Args:
        folder: the run folder.
        objectives: of the sweep.
        rows: records of trials that have ended before.
        most_bytes: what the checkpoints of ended trials may take on disk; None: no limit. Beyond it the least accurate
            go first.
    """

    def __init__(
        self,
        folder: RunFolder,
        objectives: Mapping[str, str],
        rows: Iterable[Mapping[str, Any]],
        most_bytes: float | None = None,
    ) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        names = list(objectives)
        wanted = dict.fromkeys(tuple(dict.fromkeys([*names, *PICKED[:count]])) for count in (0, 2, 3))
        ways = {**OBJECTIVES, **objectives}
        self._wanted = [{name: ways[name] for name in each} for each in wanted]
        self._fronts = [Archive(each) for each in self._wanted]
        self._within = False
        self._accuracy: dict[int, float] = {}
        self._bytes: dict[int, int] = {}
        over = set()
        for row in rows:
            self._take(row)
            over.add(row["trial"])
        for path in folder.trials.glob("*"):  # a killed driver may not have dropped what it should have
            if path.name.isdigit() and int(path.name) in over:
                self._bytes[int(path.name)] = checkpoint.size_bytes(path / checkpoint.FILE)
        self._tidy()

    @property
    def total_bytes(self) -> int:
        """What the checkpoints of ended trials take on disk."""
        return sum(self._bytes.values())

    @property
    def front(self) -> list[Mapping[str, Any]]:
        """Records on the front of the sweep's objectives, in the order in which they ended."""
        return self._fronts[0].rows

    def ended(self, number: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A trial has ended with these records: it may have pushed others off the front, or never been on it."""
        for row in rows:
            self._take(row)
        self._bytes[number] = checkpoint.size_bytes(self._path(number))
        self._tidy()

    def _tidy(self) -> None:
        for trial in self._bytes.keys() - self._on_front():
            self._drop(trial)
        if self.most_bytes is not None:
            for trial in sorted(self._bytes, key=lambda trial: (self._accuracy[trial], -trial)):
                if self.total_bytes <= self.most_bytes:
                    break
                self._drop(trial)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["status"] != "complete":
            return
        self._accuracy[row["trial"]] = max(row["accuracy"], self._accuracy.get(row["trial"], 0.0))
        within = row.get("within_limits", True)
        if within and not self._within:  # from now on, points over a limit are on no front
            self._within, self._fronts = True, [Archive(each) for each in self._wanted]
        if within or not self._within:
            for front in self._fronts:
                front.add(row)

    def _on_front(self) -> set[int]:
        return set().union(*(front.trials for front in self._fronts))

    def _drop(self, trial: int) -> None:
        checkpoint.remove(self._path(trial))
        del self._bytes[trial]

    def _path(self, trial: int) -> Path:
        return self.folder.trial(trial) / checkpoint.FILE
