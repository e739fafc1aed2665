"""What a person sees, from a book that lives through a sweep."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from raysearch.book import Book
from raysearch.driver import Watcher
from raysearch.overview import overview
from raysearch.progress import LiveProgress, PlainProgress, clock, seconds_left
from tests.raysearch.builders import by_formula, drive, make_run, message, open_book, point, small_sweep, train


def watched(path: Path, watcher: Watcher, **changes: Any) -> Book:
    """A book whose events a watcher sees, before its first trial."""
    folder, resolved = make_run(path, small_sweep(trials=4, **changes))
    book = open_book(folder, resolved, watcher.event)
    watcher.started(folder, resolved)
    return book


def plain(width: int = 80) -> tuple[PlainProgress, io.StringIO]:
    text = io.StringIO()
    return PlainProgress(Console(file=text, width=width)), text


def live() -> tuple[LiveProgress, Console]:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=60, color_system=None)
    return LiveProgress(console), console


def view(watcher: LiveProgress, book: Book) -> str:
    """What the live view would draw now."""
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(watcher._view(book, 60.0))
    return console.export_text()


def begin(book: Book) -> Any:
    proposal = book.ledger.propose()
    assert proposal is not None
    book.begin(proposal)
    return proposal


def test_plain_progress_is_a_line_for_each_trial_that_ends(tmp_path: Path) -> None:
    watcher, text = plain()
    book = watched(tmp_path / "a-run", watcher)
    first, second = begin(book), begin(book)
    for said in by_formula(first):
        book.epoch(0, said)
    book.end(0, "complete")
    book.end(second.number, "failed", "DivergedError: loss is nan [bold]")
    head, sampler, stopper, one, two = text.getvalue().splitlines()
    assert stopper == "stopper none: the frontier proposes few trials that are worth stopping"
    assert sampler == "sampler frontier: 2 bit parameters, whose costs are known before training"
    assert head == f"{tmp_path / 'a-run'}: 4 trials of lsq on lenet5, digits, 2 epochs, space uniform (2 parameters)"
    cost = f"{first.cost.relative_bops:.2%} BOPs, {first.cost.size_bytes / 1024:.1f} KiB (uniform)"
    front = f"front: 1 point, hypervolume {book.front().hypervolume():.4f}"
    assert one.startswith(f"trial 0 complete: accuracy {book.rows[0]['accuracy']:.2%}, {cost} | ")
    assert f"| 1/4 done, 1 running, 0 pruned, 0 failed | {front} | " in one
    reason = "DivergedError: loss is nan [bold]"
    assert two.startswith(f"trial 1 failed: {reason} | 1/4 done, 0 running, 0 pruned, 1 failed | {front} | ")
    assert one.endswith(" left")
    assert two.endswith(" left")


def test_one_training_has_neither_sampler_nor_stopper(tmp_path: Path) -> None:
    watcher, text = plain()
    watcher.started(*make_run(tmp_path / "net", small_sweep(trials=1, space={})))
    assert text.getvalue() == f"{tmp_path / 'net'}: one training of lsq on lenet5, digits, 2 epochs\n"


def test_a_sweep_that_goes_on_says_nothing_of_what_ended_before(tmp_path: Path) -> None:
    watcher, text = plain()
    drive(watched(tmp_path / "a-run", watcher), limit=2)
    again, later = plain()
    folder, resolved = make_run_again(tmp_path / "a-run")
    book = open_book(folder, resolved, again.event)
    begin(book)
    assert later.getvalue() == ""
    book.end(2, "pruned", "stopped early")
    (line,) = later.getvalue().splitlines()
    assert line.startswith("trial 2 pruned: stopped early | 2/4 done, 0 running, 1 pruned, 0 failed | ")
    assert len(text.getvalue().splitlines()) == 5


def make_run_again(path: Path) -> Any:
    """Folder and sweep of a run that exists."""
    from raysearch.records import RunFolder
    from raysearch.resolve import resolve
    from raysearch.sweep import Sweep

    folder = RunFolder(path)
    return folder, resolve(Sweep.from_tree(folder.read_sweep()["sweep"]))


OBJECTIVES = [
    {"accuracy": "max", "bops": "min", "size_bytes": "min"},
    {"accuracy": "max"},
    {"loss": "min", "bops": "min"},
    {"size_bytes": "min", "relative_bops": "min", "accuracy": "max"},
]


@pytest.mark.parametrize("objectives", OBJECTIVES, ids=["-".join(o) for o in OBJECTIVES])
def test_every_set_of_objectives_can_be_watched(tmp_path: Path, objectives: dict[str, str]) -> None:
    watcher, text = plain()
    book = watched(tmp_path / "a-run", watcher, objectives=objectives)
    drive(book)
    assert len(text.getvalue().splitlines()) == 7
    assert "4/4 done" in view(live()[0], book)
    assert "4/4 done" in overview(tmp_path / "a-run", busy=False)
    shown = "loss" not in objectives  # it has no worst value that all sweeps share
    assert ("hypervolume" in text.getvalue()) == shown
    assert ("hypervolume" in view(live()[0], book)) == shown
    assert ("hypervolume" in overview(tmp_path / "a-run", busy=False)) == shown


def test_the_live_view_shows_counts_trials_in_training_and_the_best_points(tmp_path: Path) -> None:
    watcher, _ = live()
    book = watched(tmp_path / "a-run", watcher)
    drive(book, limit=2)
    running, starting = begin(book), begin(book)
    book.epoch(running.number, by_formula(running)[0])
    watcher.closed()
    text = view(watcher, book)
    assert "lsq on lenet5, digits |" in text
    assert "2/4 done, 2 running, 0 pruned, 0 failed | 1:00 gone, " in text
    accuracy = book.live[2].history[0]["accuracy"]
    assert f"  trial 2: epoch 1/2, accuracy {accuracy:.2%} (uniform)" in text
    assert f"  trial {starting.number}: epoch 0/2, starting (uniform)" in text
    assert f"front: 2 points, hypervolume {book.front().hypervolume():.4f}" in text
    for _, row in book.front().to_pandas().iterrows():
        assert f"{row['accuracy']:.2%}" in text
        assert row["bits"] in text


def test_the_live_view_stands_an_epoch_without_accuracy(tmp_path: Path) -> None:
    watcher, _ = live()
    book = watched(tmp_path / "a-run", watcher)
    proposal = begin(book)
    book.epoch(0, message([point(proposal, float("nan"))], 1, 2))
    watcher.closed()
    assert "trial 0: epoch 1/2, accuracy - (uniform)" in view(watcher, book)


def test_the_live_view_is_gone_when_the_sweep_is_over(tmp_path: Path) -> None:
    watcher, console = live()
    book = watched(tmp_path / "a-run", watcher)
    drive(book, limit=1)
    assert watcher._live.is_started
    watcher.closed()
    assert not watcher._live.is_started
    assert isinstance(console.file, io.StringIO)
    assert "1/4 done" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_a_clock_shows_hours_minutes_and_seconds(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_the_rest_of_a_sweep_is_unknown_before_a_trial_ended_and_nothing_after_the_last(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=3))
    book = open_book(folder, resolved)
    assert seconds_left(book, 10.0) is None
    drive(book, limit=1)
    assert seconds_left(book, 10.0) == 20.0
    drive(book)
    assert seconds_left(book, 10.0) == 0.0


def test_what_ended_before_a_driver_began_says_nothing_about_its_pace(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=4))
    drive(open_book(folder, resolved), limit=2)
    book = open_book(folder, resolved)
    assert seconds_left(book, 10.0) is None
    drive(book, limit=1)
    assert seconds_left(book, 10.0) == 10.0


def test_an_overview_of_a_run_at_work_names_its_trials(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=4))
    book = open_book(folder, resolved)
    drive(book, limit=1)
    train(book, book.ledger.propose(), [], ("failed", "loss is nan"))  # type: ignore[arg-type]
    running = begin(book)
    book.epoch(2, by_formula(running)[0])
    lines = overview(folder.path, busy=True).splitlines()
    assert lines[:4] == [
        "a-run: running",
        "  1/4 done, 0 pruned, 1 failed",
        "  trial 2: epoch 1/2",
        "  trial 1 failed: loss is nan",
    ]
    assert lines[4] == f"  front: 1 point, hypervolume {book.front().hypervolume():.4f}"
    assert overview(folder.path, busy=False).splitlines()[0] == "a-run: interrupted"
    assert overview(folder.path, busy=False).endswith(f"go on with: raysearch resume {folder.path}")


def test_an_overview_of_a_finished_run_ends_with_its_front(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=3))
    book = open_book(folder, resolved)
    drive(book)
    text = overview(folder.path, busy=False)
    assert text.splitlines()[:2] == ["a-run: finished", "  3/3 done, 0 pruned, 0 failed"]
    assert text.endswith(book.front().table())


def test_an_overview_of_a_run_that_has_not_begun_has_no_front(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path / "a-run")
    lines = overview(folder.path, busy=False).splitlines()
    assert lines[:2] == ["a-run: interrupted", "  0/12 done, 0 pruned, 0 failed"]


def test_the_pace_is_measured_while_the_driver_runs(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run", small_sweep(trials=3))
    before = time.monotonic()
    book = open_book(folder, resolved)
    assert before <= book.opened_at <= time.monotonic()
