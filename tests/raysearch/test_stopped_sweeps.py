"""Early stopping on a real Ray: a stopped trial frees its slot and no process dies; one that goes on is as if it had
never been stopped.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import raysearch
from raysearch.result import Result
from raysearch.sweep import Sweep
from tests.raysearch.cluster import check_books, cluster, lines, numbers

__all__ = ["cluster"]

SMALL: dict[str, Any] = {"start/epochs": 0, "data/train_limit": 128, "data/validation_limit": 64}
SWEEP = Sweep(
    trials=9, epochs=4, sampler="random", stopper="mo_asha", reduction_factor=1.6, concurrent=1, settings=SMALL
)


@pytest.fixture(scope="module")
def inline(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One trial at a time, in a slot's own process."""
    return raysearch.run(SWEEP, tmp_path_factory.mktemp("inline") / "run")


def paused_at(row: dict[str, Any]) -> list[int]:
    return [epoch["epoch"] for epoch in row["history"] if not epoch.get("rung", {}).get("goes_on", True)]


def test_stopped_trials_are_pruned_and_no_process_is_killed_for_it(inline: Result) -> None:
    rows = inline.records()
    check_books(inline, SWEEP.trials)
    stopped = [row for row in rows if row["status"] == "pruned"]
    assert stopped
    assert {row["status"] for row in rows} == {"complete", "pruned"}
    assert all(row["reason"].startswith(f"stopped at epoch {row['epoch']}: rung rank") for row in stopped)
    assert len({row["timing"]["slot"] for row in rows}) == 1
    order = list(dict.fromkeys(line["trial"] for line in lines(inline.folder.epochs)))
    assert order == sorted(order)
    assert {int(path.parent.name) for path in inline.path.glob("trials/*/checkpoint.safetensors")} == set(
        inline.front().to_pandas()["trial"]
    )


def test_a_trial_that_went_on_has_the_numbers_of_one_that_was_never_stopped(inline: Result) -> None:
    went_on = [row for row in inline.records() if row["status"] == "complete" and paused_at(row)]
    assert went_on
    threads = torch.get_num_threads()
    try:
        sweep = Sweep(epochs=SWEEP.epochs, settings={**SMALL, **went_on[0]["params"]})
        reports = list(raysearch.train(sweep, threads=1))
    finally:
        torch.set_num_threads(threads)
    found = [(r.train_loss, r.points[0].accuracy, r.points[0].loss) for r in reports]
    assert found == numbers([went_on[0]])[json.dumps(went_on[0]["digest"])]


def test_a_worker_group_stops_and_goes_on_as_a_slot_does(cluster: Path, inline: Result, tmp_path: Path) -> None:
    grouped = raysearch.run(Sweep(**{**SWEEP.tree(), "train": True}), tmp_path / "run")
    assert len({row["timing"]["slot"] for row in grouped.records()}) == 1

    def told(result: Result) -> list[tuple[Any, ...]]:
        return [
            (line["trial"], line["epoch"], line["train_loss"], line["accuracy"], line.get("rung"))
            for line in lines(result.folder.epochs)
        ]

    assert told(grouped) == told(inline)
