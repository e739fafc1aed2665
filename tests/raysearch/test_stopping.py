"""Stopped trials in the books: paused, promoted, pruned, and the same after a kill at any point."""

import asyncio
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState

from raysearch.book import Book
from raysearch.cluster.group import Mailbox
from raysearch.cluster.worker import Message
from raysearch.errors import SweepError
from raysearch.overview import overview
from raysearch.records import RunFolder, read_lines
from raysearch.resolve import resolve
from raysearch.search.ledger import Proposal
from raysearch.search.rungs import Rungs
from raysearch.search.stopping import choose_stopper
from tests.raysearch.builders import formula, make_run, message, open_book, point, small_sweep
from tests.raysearch.tuning import tune
from trainables import checkpoint

FIELDS: dict[str, Any] = {"epochs": 9, "trials": 20, "sampler": "random", "stopper": "mo_asha"}


def crossing(proposal: Proposal) -> list[Message]:
    """Trainings of which some are late: an accuracy that rises at a pace of the trial's own, up to the formula's."""
    pace = 0.3 + (proposal.number * 7 % 10) / 10
    best = formula(proposal.cost.bits or {})
    return [message([point(proposal, best * (epoch / 9) ** pace)], epoch, 9) for epoch in range(1, 10)]


def sweep_of(path: Path, **changes: Any) -> tuple[Book, RunFolder]:
    folder, resolved = make_run(path, small_sweep(**FIELDS | changes))
    return open_book(folder, resolved), folder


def again(folder: RunFolder, listener: Callable[[Book], None] = lambda book: None) -> Book:
    from raysearch.sweep import Sweep

    return open_book(folder, resolve(Sweep.from_tree(folder.read_sweep()["sweep"])), listener)


def outcomes(folder: RunFolder) -> list[tuple[Any, ...]]:
    """What a sweep did, without its times."""
    rows = folder.read_records()
    return [
        (
            row["trial"],
            row["params"],
            row["status"],
            row["reason"],
            row["epoch"],
            [e.get("rung") for e in row["history"]],
        )
        for row in sorted(rows, key=lambda row: row["trial"])
    ]


def promoted(folder: RunFolder) -> set[int]:
    """Trials that went on after they were told to stop."""
    found = set()
    for row in folder.read_records():
        told = [epoch["epoch"] for epoch in row["history"] if not epoch.get("rung", {}).get("goes_on", True)]
        if told and row["epoch"] > told[0]:
            found.add(row["trial"])
    return found


@pytest.mark.parametrize(
    ("sampler", "places", "stopper"),
    [("random", 1, "mo_asha"), ("frontier", 3, "mo_asha"), ("tpe", 3, "front"), ("frontier", 1, "front")],
)
def test_every_trial_ends_once_complete_or_pruned_with_its_rank(
    tmp_path: Path, sampler: str, places: int, stopper: str
) -> None:
    book, folder = sweep_of(tmp_path / "a-run", sampler=sampler, stopper=stopper)
    vacated = tune(book, places=places, trial=crossing)
    rows = folder.read_records()
    assert sorted(row["trial"] for row in rows) == list(range(20))
    states = {trial.number: trial.state for trial in book.ledger._disk.get_trials()}
    assert set(vacated) == set(range(places))
    assert {row["status"] for row in rows} == {"complete", "pruned"}
    for row in rows:
        epochs = [epoch["epoch"] for epoch in row["history"]]
        assert epochs == list(range(1, row["epoch"] + 1))
        if row["status"] == "complete":
            assert (row["epoch"], states[row["trial"]]) == (9, TrialState.COMPLETE)
        else:
            last = row["history"][-1]
            assert last["rung"]["goes_on"] is False
            assert row["reason"].startswith(f"stopped at epoch {row['epoch']}: rung rank ")
            assert (row["epoch"] in (1, 3), states[row["trial"]]) == (True, TrialState.PRUNED)
            assert row["accuracy"] == last["accuracy"]
    assert book.counts["pruned"] >= 3
    assert book.front().to_pandas()["trial"].isin([row["trial"] for row in rows if row["status"] == "complete"]).all()


def test_a_paused_trial_goes_on_when_its_rank_is_good_enough(tmp_path: Path) -> None:
    book, folder = sweep_of(tmp_path / "a-run", trials=30)
    tune(book, trial=crossing)
    assert promoted(folder)
    told = [(line["trial"], line["epoch"]) for line in read_lines(folder.epochs)]
    assert len(told) == len(set(told))


class Killed(BaseException):
    """What a driver does not survive."""


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[tuple[Any, ...]]]:
    """Outcomes of sweeps that nobody killed, by sampler."""

    @cache
    def run(sampler: str) -> list[tuple[Any, ...]]:
        book, folder = sweep_of(tmp_path_factory.mktemp("whole") / "a-run", sampler=sampler)
        tune(book, trial=crossing)
        return outcomes(folder)

    return run


@pytest.mark.parametrize("sampler", ["random", "frontier"])
@pytest.mark.parametrize("event", [3, 21, 47])
def test_a_sweep_that_was_killed_is_the_sweep_that_was_not(
    tmp_path: Path, untouched: Callable[[str], list[tuple[Any, ...]]], event: int, sampler: str
) -> None:
    _, folder = sweep_of(tmp_path / "a-run", sampler=sampler)
    events = iter(range(10**6))

    def listen(book: Book) -> None:
        if next(events) == event:
            raise Killed

    with pytest.raises(Killed):
        tune(again(folder, listen), trial=crossing)
    tune(again(folder), trial=crossing)
    assert outcomes(folder) == untouched(sampler)


def test_the_same_seed_and_places_give_the_same_sweep(tmp_path: Path) -> None:
    folders = []
    for name in "ab":
        book, folder = sweep_of(tmp_path / name / "a-run", sampler="frontier")
        tune(book, places=4, trial=crossing)
        folders.append(folder)
    assert outcomes(folders[0]) == outcomes(folders[1])


def with_checkpoints(folder: RunFolder) -> Callable[[Proposal], list[Message]]:
    def trial(proposal: Proposal) -> list[Message]:
        path = folder.trial(proposal.number) / checkpoint.FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        return crossing(proposal)

    return trial


@pytest.mark.parametrize("cap", [0, 2])
def test_only_so_many_stopped_trials_keep_their_checkpoints(tmp_path: Path, cap: int) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(**FIELDS | {"max_paused": cap}))
    kept: list[int] = []

    def listen(book: Book) -> None:
        files = {int(path.parent.name) for path in folder.path.glob(f"trials/*/{checkpoint.FILE}")}
        assert set(book.paused) <= files | book.live.keys()
        kept.append(len(book.paused))

    book = open_book(folder, resolved, listen)
    tune(book, trial=with_checkpoints(folder))
    assert max(kept) <= cap + 1  # the one that is being let go
    left = {int(path.parent.name) for path in folder.path.glob(f"trials/*/{checkpoint.FILE}")}
    assert left >= set(book.front().to_pandas()["trial"])
    assert not left & {row["trial"] for row in book.rows if row["status"] == "pruned"}


@pytest.mark.parametrize("stopper", ["none", "mo_asha"])
@pytest.mark.parametrize("places", [1, 4])
def test_no_more_epochs_are_trained_than_the_budget_has(tmp_path: Path, places: int, stopper: str) -> None:
    book, folder = sweep_of(tmp_path / "a-run", trials=40, epoch_budget=60, stopper=stopper)
    tune(book, places=places, trial=crossing)
    spent = len(list(read_lines(folder.epochs)))
    assert 60 - 9 < spent <= 60
    assert book.room() == 60 - spent
    (folder.end).write_text("{}")
    assert "the budget of 60 epochs is spent" in overview(folder.path, busy=False)


def test_the_sampler_hears_that_a_trial_is_paused_and_later_what_it_reached(tmp_path: Path) -> None:
    book, folder = sweep_of(tmp_path / "a-run", trials=30, sampler="tpe")
    tune(book, trial=crossing)
    went_on = promoted(folder) & {row["trial"] for row in book.rows if row["status"] == "complete"}
    assert went_on
    for number in went_on:
        twins = [t for t in book.ledger._twin.study.get_trials() if t.params == book.ledger._disk.trials[number].params]
        assert [twin.state for twin in twins] == [TrialState.PRUNED, TrialState.COMPLETE]
        assert twins[1].values == book.ledger._disk.trials[number].values


def test_the_frontier_learns_what_stopped_trials_had_reached(tmp_path: Path) -> None:
    book, folder = sweep_of(tmp_path / "a-run", sampler="frontier")
    tune(book, trial=crossing)
    known = {json.dumps(dict(tried.values)): tried for tried in book.ledger._ended}
    for row in folder.read_records():
        tried = known[json.dumps(row["params"])]
        assert tried.course == {e["epoch"]: e["accuracy"] for e in row["history"] if "rung" in e}
        assert tried.quality == (row["accuracy"] if row["status"] == "complete" else None)


def test_points_beyond_the_first_count_after_a_restart_as_before(tmp_path: Path) -> None:
    def switchable(proposal: Proposal) -> list[Message]:
        said = crossing(proposal)
        accuracies = [each["report"]["points"][0]["accuracy"] for each in said]
        wide = [point(proposal, (1 + accuracy) / 2, label="wide", bops=10**7) for accuracy in accuracies]
        return [
            message([point(proposal, accuracy, label="narrow"), extra], epoch, 9)
            for epoch, (accuracy, extra) in enumerate(zip(accuracies, wide, strict=True), start=1)
        ]

    book, folder = sweep_of(tmp_path / "a-run")
    tune(book, trial=switchable)
    restored = again(folder)
    assert restored.stopper is not None
    assert book.stopper is not None
    for epoch in book.stopper.rungs.epochs:
        assert restored.stopper.rungs._rungs[epoch].layers.order() == book.stopper.rungs._rungs[epoch].layers.order()
    assert all(len(line["other_points"]) == 1 for line in read_lines(folder.epochs))


ENERGY = "def measure(layer, bits):\n    return layer.macs * bits.weight * bits.activation / 1e6\n"
RUNTIME = "def measure(model):\n    return 1.0\n"


def test_rungs_rank_by_measures_of_ones_own_as_far_as_each_epoch_tells_them(tmp_path: Path) -> None:
    (tmp_path / "energy.py").write_text(ENERGY)
    (tmp_path / "runtime.py").write_text(RUNTIME)

    def measured(proposal: Proposal) -> list[Message]:
        said = crossing(proposal)
        for each in said:
            own = {"runtime": 1.0 + proposal.number} if each["done"] else {}
            each["report"]["points"][0]["measures"] = {**proposal.cost.measures, **own}
        return said

    measures = {name: str(tmp_path / f"{name}.py") for name in ("energy", "runtime")}
    objectives = {"accuracy": "max", "energy": "min", "runtime": "min"}
    book, folder = sweep_of(tmp_path / "a-run", measures=measures, objectives=objectives, stopper="mo_asha")
    tune(book, trial=measured)
    rungs = Rungs(9)
    for line in read_lines(folder.epochs):
        found = rungs.report(line["trial"], line["epoch"], np.array([[-line["accuracy"], line["energy"]]]))
        if line.get("rung"):
            assert found is not None
            assert (line["rung"]["rank"], line["rung"]["of"]) == (found.rank, found.of)
    assert {row["status"] for row in folder.read_records()} == {"complete", "pruned"}
    assert {row["runtime"] for row in folder.read_records() if row["status"] == "pruned"} == {None}


def test_the_status_of_a_sweep_names_those_that_wait(tmp_path: Path) -> None:
    book, folder = sweep_of(tmp_path / "a-run")
    for accuracy in (0.9, 0.5):
        proposal = book.ledger.propose()
        assert proposal
        book.begin(proposal)
        if not book.epoch(proposal.number, message([point(proposal, accuracy, bops=1, size_bytes=1)], 1, 9)):
            book.pause(proposal.number)
    text = overview(folder.path, busy=True)
    assert "0/20 done, 0 pruned, 0 failed, 1 paused" in text
    assert "trial 1: epoch 1/9, paused" in text
    assert "trial 0: epoch 1/9\n" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("none", "the frontier proposes few trials that are worth stopping")),
        ({"sampler": "tpe"}, ("front", "the sampler proposes many trials that others dominate")),
        ({"sampler": "tpe", "epochs": 1}, ("none", "trials of 1 epochs are too short to stop any")),
        ({"stopper": "mo_asha"}, ("mo_asha", "as asked for")),
    ],
)
def test_the_automatic_stopper_says_what_it_is_and_why(changes: dict[str, Any], expected: tuple[str, str]) -> None:
    choice = choose_stopper(resolve(small_sweep(**{"epochs": 9} | changes)))
    assert (choice.stopper, choice.reason) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stopper": "asha"}, "unknown stopper 'asha'; did you mean 'mo_asha'"),
        ({"stopper": "mo_asha", "epochs": 1}, "stopper 'mo_asha' would stop nobody"),
        (
            {"stopper": "front", "epochs": 9, "measures": {"x": ""}, "objectives": {"x": "min"}},
            "stopper 'front' would stop nobody: all objectives are measured at the end",
        ),
        ({"reduction_factor": 1}, "reduction_factor = 1: a number over 1"),
        ({"grace_epochs": 0}, "grace_epochs = 0: an integer from 1"),
        ({"epoch_budget": 3, "epochs": 5}, "epoch_budget = 3: one trial takes 5 epochs"),
    ],
)
def test_a_stopper_that_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    (tmp_path / "x.py").write_text(RUNTIME)
    if "measures" in changes:
        changes = {**changes, "measures": {"x": str(tmp_path / "x.py")}}
    with pytest.raises(SweepError, match=words):
        resolve(small_sweep(**changes))


def test_workers_wait_at_a_rung_until_their_trial_goes_on_or_is_no_more() -> None:
    async def reported(act: Callable[[Mailbox], Any]) -> tuple[bool, bool]:
        mailbox = Mailbox(1)
        await mailbox.post({"number": 0})
        assert await mailbox.report(1, {"done": False, "rung": False})
        waiting = asyncio.create_task(mailbox.report(1, {"done": False, "rung": True}))
        await mailbox.message(0)
        await mailbox.message(1)
        await asyncio.sleep(0.01)
        waited = not waiting.done()
        task = asyncio.ensure_future(act(mailbox))
        answer = await asyncio.wait_for(waiting, 1)
        task.cancel()
        return waited, answer

    assert asyncio.run(reported(lambda mailbox: mailbox.message(2))) == (True, True)
    assert asyncio.run(reported(lambda mailbox: mailbox.drop())) == (True, False)
    assert asyncio.run(reported(lambda mailbox: mailbox.post({"number": 1}))) == (True, False)
    assert asyncio.run(reported(lambda mailbox: mailbox.close())) == (True, False)


def test_a_job_that_was_dropped_is_begun_anew_when_it_is_posted_again() -> None:
    async def numbers() -> tuple[Any, Any]:
        mailbox = Mailbox(1)
        await mailbox.post({"number": 0})
        first = await mailbox.next_job(0, 0)
        await mailbox.drop()
        await mailbox.post({"number": 0})
        return first, await mailbox.next_job(1, 0)

    assert asyncio.run(numbers()) == (("job", 1, {"number": 0}), ("job", 2, {"number": 0}))
