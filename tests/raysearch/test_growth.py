"""What a trial costs the driver does not grow with the number of trials before it.

Counted in Python calls, not in seconds: the same on any machine. Ten thousand through Ray: `benchmarks/scale.py`.
"""

import gc
import sys
from pathlib import Path

from optuna.distributions import BaseDistribution

from raysearch.cluster.searcher import Forget
from tests.raysearch.builders import by_formula, drive, make_run, open_book, small_sweep, train

EARLY, LATE, MEASURED = 70, 110, 6
"""The first half of the trials are uniform configurations, which cost less."""


def calls(function: object) -> int:
    """Python and C functions that are called while `function` runs."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        function()  # type: ignore[operator]
    finally:
        sys.setprofile(None)
    return count


def test_a_late_trial_takes_as_many_calls_as_an_early_one(tmp_path: Path) -> None:
    sweep = small_sweep(space="all_layers", trials=LATE + MEASURED, epochs=1, sampler="random")
    book = open_book(*make_run(tmp_path / "run", sweep))

    def one_trial() -> None:
        proposal = book.ledger.propose()
        assert proposal is not None
        train(book, proposal, by_formula(proposal))
        book.front()

    found = []
    for number in range(LATE + MEASURED):
        if number in range(EARLY, EARLY + MEASURED) or number >= LATE:
            found.append(calls(one_trial))
        else:
            one_trial()
    early, late = sorted(found[:MEASURED]), sorted(found[MEASURED:])
    assert late[MEASURED // 2] < 1.1 * early[MEASURED // 2]


def test_the_book_keeps_long_fields_of_the_last_trial_only(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "run")
    book = open_book(folder, resolved)
    for _ in range(4):
        proposal = book.ledger.propose()
        assert proposal is not None
        train(book, proposal, by_formula(proposal))
    assert ["config" in row for row in book.rows] == [False, False, False, True]
    book.close()
    assert all("config" in row for row in folder.read_records())
    again = open_book(folder, resolved)
    assert ["config" in row for row in again.rows] == [False, False, False, True]
    again.close()


def test_all_trials_share_their_distributions(tmp_path: Path) -> None:
    def distributions() -> int:
        return sum(isinstance(thing, BaseDistribution) for thing in gc.get_objects())

    folder, resolved = make_run(tmp_path / "run")
    before = distributions()
    book = open_book(folder, resolved)
    drive(book, limit=4)
    assert distributions() == before
    book.close()
    again = open_book(folder, resolved)
    assert distributions() == before
    again.close()


class Ended:
    """A trial as Tune has it."""

    def __init__(self, *, over: bool) -> None:
        self.over = over

    def is_finished(self) -> bool:
        return self.over


def test_tune_forgets_all_trials_that_ended_but_one() -> None:
    trials = [Ended(over=over) for over in (True, False, True, True, False)]
    left = [trials[1], trials[4], trials[3]]
    Forget().on_step_end(1, trials)
    assert trials == left
