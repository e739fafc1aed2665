"""Slots, as Tune's actors use them, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from raysearch.cluster import slots
from raysearch.cluster.slots import InlineSlot
from raysearch.search.ledger import Ledger
from tests.raysearch.builders import job, make_run, small_sweep


def config(folder: Path, number: int) -> dict[str, Any]:
    """What Tune hands to a slot."""
    run, resolved = make_run(folder, small_sweep(settings={"start/epochs": 0, "data/train_limit": 256}))
    proposal = Ledger(run, resolved).propose()
    assert proposal
    return {"job": job(run, number, proposal.tree), "cpus": 1, "group": None}


def test_a_slot_says_that_it_lives_until_an_epoch_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "BEAT_S", 0.001)
    given = config(tmp_path / "run", 0)
    slot = InlineSlot(given)
    results = [slot.train()]
    while not results[-1]["done"]:
        results.append(slot.train())
    slot.stop()
    said = [json.loads(result["message"]) for result in results if result["message"]]
    assert [message["report"]["epoch"] for message in said] == [1, 2]
    assert len(results) > len(said)
    assert [message["done"] for message in said] == [False, True]


def test_a_slot_that_is_given_another_trial_drops_the_one_before(tmp_path: Path) -> None:
    first, second = config(tmp_path / "first", 0), config(tmp_path / "second", 1)
    slot = InlineSlot(first)
    slot.train()
    assert slot.reset_config(second)
    said = [json.loads(slot.train()["message"]) for _ in range(2)]
    slot.stop()
    assert [message["report"]["epoch"] for message in said] == [1, 2]
    assert not (tmp_path / "second" / "trials" / "00000").exists()
