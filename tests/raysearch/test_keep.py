"""Whose checkpoints stay: the front's, trial by trial as of all trials at once, within the limit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.pareto import non_dominated
from raysearch.keep import Archive, Keeper
from raysearch.records import RunFolder
from trainables import checkpoint

OBJECTIVES = {"accuracy": "max", "bops": "min", "size_bytes": "min"}
SIZE = 100


def row(trial: int, accuracy: float, bops: int, size_bytes: int, status: str = "complete") -> dict[str, Any]:
    return {"trial": trial, "status": status, "accuracy": accuracy, "bops": bops, "size_bytes": size_bytes}


def stored(folder: RunFolder, *trials: int) -> None:
    for trial in trials:
        path = folder.trial(trial) / checkpoint.FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * SIZE)


def on_disk(folder: RunFolder) -> set[int]:
    return {int(path.parent.name) for path in folder.path.glob("trials/*/checkpoint.*")}


few = st.integers(0, 4)


@given(st.lists(st.tuples(few, few, few), max_size=30))
def test_an_archive_filled_trial_by_trial_is_the_front_of_all(points):
    rows = [row(trial, accuracy, bops, size) for trial, (accuracy, bops, size) in enumerate(points)]
    archive = Archive(OBJECTIVES)
    for each in rows:
        archive.add(each)
    values = np.array([[-a, b, s] for a, b, s in points], dtype=float).reshape(-1, 3)
    assert archive.trials == set(np.flatnonzero(non_dominated(values)))


def test_the_least_accurate_checkpoints_go_first_when_there_is_no_room(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    keeper = Keeper(folder, OBJECTIVES, [], most_bytes=2 * SIZE)
    for trial, accuracy in enumerate((0.7, 0.9, 0.5, 0.8)):
        stored(folder, trial)
        keeper.ended(trial, [row(trial, accuracy, bops=int(10 * accuracy), size_bytes=int(10 * accuracy))])
    assert on_disk(folder) == {1, 3}
    assert folder.checkpoints() == (2, 2 * SIZE)


@pytest.mark.parametrize(("most_bytes", "left"), [(None, {1, 2, 5}), (SIZE, {2, 5}), (0, {5})])
def test_what_a_killed_driver_left_is_dropped_by_the_next(
    tmp_path: Path, most_bytes: float | None, left: set[int]
) -> None:
    folder = RunFolder(tmp_path)
    stored(folder, 0, 1, 2, 3, 5)  # 5 is in training
    rows = [row(0, 0.5, 9, 9), row(1, 0.6, 1, 1), row(2, 0.9, 5, 5), row(3, 0.0, 0, 0, status="failed")]
    Keeper(folder, OBJECTIVES, rows, most_bytes)
    assert on_disk(folder) == left
