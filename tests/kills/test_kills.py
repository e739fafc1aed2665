"""Cells of the kill matrix (`python -m tests.kill_matrix`) that nothing else in the suite covers."""

from pathlib import Path
from typing import Any

import pytest

from tests.kills.cells import Cell, can_mount, check, outcome

CELLS = [("slot", "between trials"), ("head", "record")] + [("storage full", "mid-epoch")] * can_mount()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of the sweep that nothing happens to."""
    return outcome(Cell("", "", tmp_path_factory.mktemp("undisturbed") / "cell").play().path)


@pytest.mark.parametrize(("victim", "moment"), CELLS)
def test_after_a_death_or_a_fault_books_and_front_are_those_of_an_undisturbed_sweep(
    victim: str, moment: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    cell = Cell(victim, moment, tmp_path / "cell")
    check(cell.play(), expected)
    if victim == "storage full":
        assert "epochs.jsonl cannot be written (No space left on device); trying again" in cell.said()
