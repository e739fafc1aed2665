"""Cells of the kill matrix (`python -m tests.kill_matrix`) that nothing else in the suite covers."""

from pathlib import Path
from typing import Any

import pytest

from raysearch.result import Result
from tests.kills.cells import FAULT_S, Cell, can_mount, check, outcome

CELLS = [("slot", "between trials")] + [("storage full", "mid-epoch")] * can_mount()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the sweep that nothing happens to."""
    return outcome(Cell("", "", tmp_path_factory.mktemp("undisturbed") / "cell").play().path)


@pytest.mark.parametrize(("victim", "moment"), CELLS)
def test_after_a_death_or_a_fault_books_and_front_are_those_of_an_undisturbed_sweep(
    victim: str, moment: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    ran = Cell(victim, moment, tmp_path / "cell").play()
    check(ran, expected)
    if victim == "storage full":  # what was in the air waited for room, and nobody had to resume
        seconds = [row["seconds"] for row in Result(ran.path).records() if row["trial"] > 0]
        assert max(seconds) > 0.8 * FAULT_S
        assert ran.resumed == 0
