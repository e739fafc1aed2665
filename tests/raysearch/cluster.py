"""What the tests on a real Ray share: one Ray for a test file, and readers of what a sweep left behind."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raysearch.cli import main
from raysearch.cluster.connection import RAY_ENVIRONMENT, start_local
from raysearch.result import Result
from tests.raysearch.fragile import DIARY

ROOT = Path(__file__).parents[2]
CPUS = 2

Row = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of two CPUs for all sweeps of a test file; yields the diary of `fragile`."""
    diary = tmp_path_factory.mktemp("diary") / "diary.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**RAY_ENVIRONMENT, "PYTHONPATH": str(ROOT), DIARY: str(diary)}.items():
            patch.setenv(name, value)
        start_local(num_cpus=CPUS)
        yield diary
        ray.shutdown()


def command(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command `raysearch` in this process, and so on the Ray that runs in it."""
    patch.setattr(sys, "argv", ["raysearch", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(str(stop.value.code))


def lines(path: Path) -> list[Row]:
    """The complete lines of a log that may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def epochs_of(run: Path) -> dict[int, list[int]]:
    """Trial -> epochs in `epochs.jsonl`, in the order in which they were written."""
    found: dict[int, list[int]] = {}
    for row in lines(run / "epochs.jsonl"):
        found.setdefault(row["trial"], []).append(row["epoch"])
    return found


def numbers(rows: list[Row], by: str = "digest") -> dict[Any, list[tuple[float, ...]]]:
    """What each complete trial measured, epoch by epoch and to the last bit, under its digest or another field."""
    measured = ("train_loss", "accuracy", "loss")
    return {
        json.dumps(row[by]): [tuple(epoch[name] for name in measured) for epoch in row["history"]]
        for row in rows
        if row["status"] == "complete"
    }


def check_books(result: Result, trials: int) -> None:
    """Every trial has one record, every trained epoch one line, and the study agrees with the records.

    Raises:
        AssertionError: what is wrong.
    """
    import optuna

    rows = result.records()
    assert sorted(row["trial"] for row in rows) == list(range(trials))
    assert len({row["digest"] for row in rows}) == trials
    written = epochs_of(result.path)
    for row in rows:
        epochs = [epoch["epoch"] for epoch in row["history"]]
        assert epochs == list(range(1, row["epoch"] + 1))
        assert written.get(row["trial"], []) == epochs
        if row["status"] == "complete":
            assert row["epoch"] == row["epochs"]
            assert (row["accuracy"], row["loss"]) == (row["history"][-1]["accuracy"], row["history"][-1]["loss"])
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{result.path.resolve() / 'study.db'}")
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    told = {trial.number: (states.get(trial.state.name, trial.state.name), trial.values) for trial in study.trials}
    assert told == {
        row["trial"]: (
            row["status"],
            [row[name] for name in result.objectives] if row["status"] == "complete" else None,
        )
        for row in rows
    }
