"""What workers report becomes records and a study that agree, even if the driver dies at any event."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from raysearch.book import Book
from raysearch.cluster.worker import Message
from raysearch.records import RunFolder, read_lines
from raysearch.result import load
from raysearch.search.ledger import STUDY, Ledger, Proposal
from raysearch.search.proposals import Cost
from tests.raysearch.builders import (
    BEGAN_AT,
    FACTS,
    by_formula,
    drive,
    formula,
    make_run,
    message,
    open_book,
    point,
    proposals,
    small_sweep,
    train,
)
from trainables import checkpoint
from trainables.cost import HEADER_BYTES, size_bytes

FIELDS = (
    *("schema", "sweep", "versions", "git", "trial", "point", "points", "status", "reason", "accuracy", "loss"),
    *("bops", "relative_bops", "size_bytes", "float_size_bytes", "macs", "measures", "bits", "epoch", "epochs"),
    *("seconds", "seed"),
    *(
        "digest",
        "source",
        "repaired",
        "inherited",
        "within_limits",
        "method",
        "model",
        "data",
        "params",
        "config",
        "history",
        "checkpoint",
        "started_at",
    ),
    *("finished_at", "timing"),
)
NESTED = {"versions", "git", "measures", "bits", "params", "config", "history", "timing"}


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return open_book(*make_run(tmp_path / "a-run"))


def next_of(book: Book) -> Proposal:
    proposal = book.ledger.propose()
    assert proposal is not None
    return proposal


def study_of(folder: RunFolder) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{folder.study}").get_trials()


def keeps_checkpoint(folder: RunFolder, proposal: Proposal) -> list[Message]:
    """A trial by the formula that also leaves a file, as training does."""
    path = folder.trial(proposal.number) / checkpoint.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return by_formula(proposal)


def checkpoints(folder: RunFolder) -> set[int]:
    return {int(path.parent.name) for path in folder.path.glob(f"trials/*/{checkpoint.FILE}")}


def test_a_record_says_everything_about_a_trial(book: Book) -> None:
    proposal = next_of(book)
    train(book, proposal, by_formula(proposal))
    (row,) = read_lines(book.folder.records)
    assert [row] == book.rows
    assert tuple(row) == FIELDS
    assert {name for name, value in row.items() if isinstance(value, dict | list)} == NESTED
    accuracy, cost = formula(proposal.cost.bits), proposal.cost
    expected = {
        **{
            "schema": 1,
            "sweep": "a-run",
            "trial": 0,
            "point": "final",
            "points": 1,
            "status": "complete",
            "reason": None,
        },
        **{"accuracy": accuracy, "loss": 1 - accuracy, **asdict(cost), "measures": []},
        **{"macs": book.ledger.resolved.table.macs, "repaired": False, "within_limits": True},
        **{"epoch": 2, "epochs": 2, "seed": 0, "source": "uniform", "params": proposal.params},
        **{"method": "lsq", "model": "lenet5", "data": "digits", "config": proposal.tree, "checkpoint": "trials/00000"},
    }
    assert {name: row[name] for name in expected} == expected
    assert [entry["epoch"] for entry in row["history"]] == [1, 2]
    assert [entry["accuracy"] for entry in row["history"]] == [accuracy / 2, accuracy]
    assert datetime.fromisoformat(row["started_at"]) <= datetime.fromisoformat(row["finished_at"])
    assert row["seconds"] >= 0
    assert row["timing"] == {
        "slot": 1,
        "began_at": BEGAN_AT,
        "reported_at": BEGAN_AT + 2,
        "first_step_at": BEGAN_AT + 1,
    }


def test_a_record_tells_what_the_network_weighs_without_quantization(book: Book) -> None:
    proposal = next_of(book)
    train(book, proposal, by_formula(proposal))
    (row,) = book.rows
    table = book.ledger.resolved.table
    parameters = sum(layer.weights + layer.biases for layer in table.layers)
    assert row["float_size_bytes"] == 4 * parameters + HEADER_BYTES == size_bytes(table, {}, extra_floats=0)


def test_the_front_is_that_of_the_formula(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=20))
    book = open_book(folder, resolved)
    drive(book)
    costs = [(1 - formula(row["bits"]), row["bops"], row["size_bytes"]) for row in book.rows]
    beaten = [any(all(np.less_equal(a, b)) and a != b for a in costs) for b in costs]
    expected = {row["trial"] for row, out in zip(book.rows, beaten, strict=True) if not out}
    assert set(book.front().to_pandas()["trial"]) == expected
    assert len(expected) > 1


def test_epochs_are_on_disk_as_they_happen(book: Book) -> None:
    proposal = next_of(book)
    book.begin(proposal)
    first, second = by_formula(proposal)
    book.epoch(0, first)
    (line,) = read_lines(book.folder.epochs)
    assert list(line) == [
        *("trial", "epoch", "train_loss", "accuracy", "loss", "bops", "relative_bops", "size_bytes", "seconds", "time")
    ]
    assert (line["trial"], line["epoch"], line["train_loss"]) == (0, 1, 1.0)
    book.epoch(0, second)
    assert [line["epoch"] for line in read_lines(book.folder.epochs)] == [1, 2]
    assert book.live[0].history[-1]["epoch"] == 2
    assert list(read_lines(book.folder.records)) == []


def test_an_epoch_that_is_reported_again_changes_nothing_but_the_points(book: Book) -> None:
    proposal = next_of(book)
    said = by_formula(proposal)
    train(book, proposal, [said[0], said[0], said[1], said[1]])
    assert [line["epoch"] for line in read_lines(book.folder.epochs)] == [1, 2]
    assert [entry["epoch"] for entry in book.rows[0]["history"]] == [1, 2]


def test_a_failed_trial_has_its_known_cost_and_its_reason_but_no_accuracy(book: Book) -> None:
    proposal = next_of(book)
    train(book, proposal, [], ("failed", "DivergedError: loss is nan"))
    (row,) = read_lines(book.folder.records)
    assert tuple(row) == FIELDS
    assert (row["status"], row["reason"]) == ("failed", "DivergedError: loss is nan")
    assert (row["accuracy"], row["loss"], row["epoch"], row["history"]) == (None, None, 0, [])
    assert (row["bops"], row["bits"]) == (proposal.cost.bops, proposal.cost.bits)
    assert study_of(book.folder)[0].state == TrialState.FAIL
    assert not book.has_points()


def test_a_pruned_trial_keeps_what_it_reached_and_is_no_point(book: Book) -> None:
    proposal = next_of(book)
    train(book, proposal, by_formula(proposal)[:1], ("pruned", "stopped early"))
    (row,) = book.rows
    assert (row["status"], row["epoch"]) == ("pruned", 1)
    assert row["accuracy"] == formula(proposal.cost.bits) / 2
    assert study_of(book.folder)[0].state == TrialState.PRUNED
    assert len(book.front()) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_what_is_not_finite_is_never_a_point_and_never_written(tmp_path: Path, name: str, value: float) -> None:
    sweep = small_sweep(objectives={"accuracy": "max", "loss": "min", "bops": "min"})
    book = open_book(*make_run(tmp_path / "a-run", sweep))
    proposal = next_of(book)
    broken = point(proposal, 0.5, **{name: value})
    train(book, proposal, [message([point(proposal, 0.4)], 1, 2), message([broken], 2, 2)])
    (row,) = read_lines(book.folder.records)
    assert (row["status"], row["reason"]) == ("failed", f"{name} is {value} after epoch 2")
    assert row[name] is None
    assert [line[name] is None for line in read_lines(book.folder.epochs)] == [False, True]
    assert study_of(book.folder)[0].state == TrialState.FAIL
    drive(book, limit=1)
    assert list(book.front().to_pandas()["trial"]) == [1]


def test_a_trial_that_ends_well_without_a_report_has_failed(book: Book) -> None:
    train(book, next_of(book), [])
    assert (book.rows[0]["status"], book.rows[0]["reason"]) == ("failed", "it ended without a report")


def test_a_trial_may_have_several_points(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run")
    book = open_book(folder, resolved)
    proposal = next_of(book)
    said = message([point(proposal, 0.9, label="8-bit"), point(proposal, 0.7, label="2-bit", bops=1)], 1, 1)
    train(book, proposal, [said])
    train(book, next_of(book), [said], ("pruned", "stopped early"))
    assert [(row["trial"], row["point"], row["accuracy"]) for row in book.rows] == [
        (0, "8-bit", 0.9),
        (0, "2-bit", 0.7),
        (1, "8-bit", 0.9),
    ]
    assert book.counts == {"complete": 1, "pruned": 1, "failed": 0}
    assert set(book.front().to_pandas()["point"]) == {"8-bit", "2-bit"}
    assert study_of(folder)[0].values[0] == 0.9
    again = open_book(folder, resolved)
    assert again.counts == book.counts
    for ledger in (book.ledger, again.ledger):  # the sampler learns the second point, too
        learnt = [trial.values for trial in ledger._twin.study.get_trials(deepcopy=False) if trial.values]
        assert [values[0] for values in learnt] == [0.9, 0.7]


def test_a_trial_whose_points_were_written_in_part_is_trained_again(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run")
    book = open_book(folder, resolved)
    for _ in range(2):
        proposal = next_of(book)
        train(book, proposal, [message([point(proposal, a, label=str(a)) for a in (0.9, 0.8, 0.7)], 1, 1)])
    lines = folder.records.read_bytes().splitlines(keepends=True)
    folder.records.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    again = open_book(folder, resolved)
    assert [row["trial"] for row in again.rows] == [0, 0, 0]
    assert folder.records.read_bytes() == b"".join(lines[:3])


def test_where_training_decides_the_widths_they_are_kept_for_each_epoch(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run")
    book = open_book(folder, resolved)
    proposal = replace(next_of(book), cost=Cost(digest="d"))
    costs = {"bops": 1, "relative_bops": 0.1, "size_bytes": 1}
    said = [
        message([point(proposal, 0.9, bits={"fc": [width, 8]}, **costs)], epoch, 2) for epoch, width in ((1, 4), (2, 0))
    ]
    train(book, proposal, said)
    assert [line["bits"] for line in book.rows[0]["history"]] == [{"fc": [4, 8]}, {"fc": [0, 8]}]
    assert book.rows[0]["bits"] == {"fc": [0, 8]}


def test_only_trials_of_the_front_keep_their_checkpoints(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(sampler="random"))
    book = open_book(folder, resolved)
    for proposal in proposals(book.ledger):
        train(book, proposal, keeps_checkpoint(folder, proposal))
        assert checkpoints(folder) == set(book.front().to_pandas()["trial"])
    assert 1 < len(checkpoints(folder)) < 12


@pytest.mark.parametrize("status", ["failed", "pruned"])
def test_what_did_not_end_well_keeps_no_checkpoint_and_drops_none(book: Book, status: str) -> None:
    first, second = next_of(book), next_of(book)
    train(book, second, keeps_checkpoint(book.folder, second), (status, "why"))
    assert checkpoints(book.folder) == set()
    train(book, first, keeps_checkpoint(book.folder, first))
    assert checkpoints(book.folder) == {0}


def test_a_trial_in_training_keeps_its_checkpoint_when_others_end(book: Book) -> None:
    first, second = next_of(book), next_of(book)
    book.begin(second)
    keeps_checkpoint(book.folder, second)
    train(book, first, keeps_checkpoint(book.folder, first))
    assert checkpoints(book.folder) == {0, 1}


def test_what_can_be_picked_under_a_limit_that_was_not_searched_for_keeps_its_checkpoint(tmp_path: Path) -> None:
    """Picking under a size makes the size an objective, so points beyond the sweep's own front may be picked."""
    sweep = small_sweep(trials=49, objectives={"accuracy": "max", "bops": "min"})
    folder, resolved = make_run(tmp_path / "a-run", sweep)
    book = open_book(folder, resolved)
    drive(book, trial=lambda proposal: keeps_checkpoint(folder, proposal))
    searched, sizes = load(folder.path).front(), sorted({row["size_bytes"] for row in book.rows})
    picked = {int(searched.pick(max_size_bytes=size)["trial"]) for size in sizes}
    assert not picked <= set(searched.to_pandas()["trial"])
    assert picked <= checkpoints(folder)
    assert set(searched.to_pandas()["trial"]) <= checkpoints(folder)


class Killed(BaseException):
    """What a driver does not survive."""


def killed_at(event: int) -> Callable[[Book], None]:
    """A listener that ends the driver at the given event."""
    events = iter(range(10**6))

    def listen(book: Book) -> None:
        if next(events) == event:
            raise Killed

    return listen


class KilledBeforeStudy(Ledger):
    """A ledger whose driver dies when it is told of a trial for the second time."""

    def tell(self, number: int, *arguments: Any, **named: Any) -> None:
        if number == 1:
            raise Killed
        super().tell(number, *arguments, **named)


def drive_mixed(book: Book) -> None:
    """Run the sweep; one trial fails and one is pruned."""
    endings: dict[int, tuple[str, str | None]] = {2: ("failed", "loss is nan"), 3: ("pruned", "stopped early")}
    for proposal in proposals(book.ledger):
        train(book, proposal, by_formula(proposal), endings.get(proposal.number, ("complete", None)))


def check_whole(folder: RunFolder, trials: int) -> None:
    """Records, epochs and study of a finished sweep say the same, and everything once."""
    rows = folder.read_records()
    assert sorted(row["trial"] for row in rows) == list(range(trials))
    epochs = [(line["trial"], line["epoch"]) for line in read_lines(folder.epochs)]
    assert sorted(epochs) == [(trial, epoch) for trial in range(trials) for epoch in (1, 2)]
    states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    trial_of = {trial.number: trial for trial in study_of(folder)}
    assert list(trial_of) == list(range(trials))
    for row in rows:
        trial = trial_of[row["trial"]]
        assert trial.state.name == states[row["status"]]
        assert trial.params == row["params"]
        assert trial.user_attrs.get("reason") == row["reason"]
        if row["status"] == "complete":
            assert trial.values == [row["accuracy"], row["bops"], row["size_bytes"]]
        assert [entry["epoch"] for entry in row["history"]] == [1, 2]


@pytest.mark.parametrize("event", [0, 1, 2, 3, 4, 9, 11, 13, 15, 18, 19])
def test_a_driver_that_is_killed_at_any_event_leaves_what_the_next_one_completes(tmp_path: Path, event: int) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=5))
    first = open_book(folder, resolved, killed_at(event))
    with pytest.raises(Killed):
        drive_mixed(first)
    second = open_book(folder, resolved)
    assert second.ended_before == sum(second.counts.values()) == len({row["trial"] for row in folder.read_records()})
    drive_mixed(second)
    check_whole(folder, 5)
    assert second.counts == {"complete": 3, "pruned": 1, "failed": 1}


def test_a_driver_that_is_killed_between_record_and_study_is_completed_from_the_record(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=5))
    first = Book(folder, KilledBeforeStudy(folder, resolved), FACTS, lambda book: None)
    with pytest.raises(Killed):
        drive_mixed(first)
    assert [trial.state.name for trial in study_of(folder)] == ["COMPLETE", "RUNNING"]
    assert len(folder.read_records()) == 2
    second = open_book(folder, resolved)
    assert [trial.state.name for trial in study_of(folder)] == ["COMPLETE", "COMPLETE"]
    assert second.ledger.interrupted == []
    drive_mixed(second)
    check_whole(folder, 5)


def test_a_trial_that_was_interrupted_goes_on_with_the_epochs_it_had(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run")
    first = open_book(folder, resolved)
    proposal = next_of(first)
    first.begin(proposal)
    first.epoch(0, by_formula(proposal)[0])
    second = open_book(folder, resolved)
    again = next_of(second)
    assert again == proposal
    train(second, again, by_formula(again))
    assert [entry["train_loss"] for entry in second.rows[0]["history"]] == [1.0, 0.5]


def test_a_trial_ends_once(book: Book) -> None:
    proposal = next_of(book)
    train(book, proposal, by_formula(proposal))
    train(book, proposal, by_formula(proposal), ("failed", "too late"))
    assert len(list(read_lines(book.folder.records))) == 1
    assert book.counts == {"complete": 1, "pruned": 0, "failed": 0}
    assert book.live == {}


def test_the_listener_hears_of_every_event(tmp_path: Path) -> None:
    heard = []
    folder, resolved = make_run(tmp_path / "a-run")
    book = open_book(folder, resolved, lambda book: heard.append((len(book.live), sum(book.counts.values()))))
    drive(book, limit=1)
    assert heard == [(1, 0), (1, 0), (1, 0), (0, 1)]
