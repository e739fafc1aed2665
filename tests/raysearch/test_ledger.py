"""The study on disk: proposals that are never wasted, told truthfully, and a driver that may die at any point."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from raysearch.ledger import STUDY, Ledger, Proposal
from raysearch.proposals import cost_of, uniform_proposals
from raysearch.records import RunFolder
from raysearch.sweep import SAMPLERS, Resolved, Sweep, resolve
from tests.raysearch.builders import formula, law, proposals, small_sweep

FEW = settings(law, max_examples=12)
_fresh = iter(range(10**6))


def open_ledger(folder: Path, sweep: Sweep) -> Ledger:
    return Ledger(RunFolder(folder), resolve(sweep))


def fresh_folder(parent: Path) -> Path:
    """A folder of its own for each example of a law."""
    path = parent / str(next(_fresh))
    path.mkdir()
    return path


def values_of(ledger: Ledger, proposal: Proposal) -> list[float]:
    """What the formula says, in the order of the objectives."""
    measured = {"accuracy": formula(proposal.cost.bits), "loss": 1 - formula(proposal.cost.bits)}
    costs = {name: getattr(proposal.cost, name) for name in ("bops", "relative_bops", "size_bytes")}
    return [float((measured | costs)[name]) for name in ledger.sweep.objectives]


def finish(ledger: Ledger, proposal: Proposal) -> None:
    """Every fifth trial fails, every seventh is pruned, the others are complete."""
    if proposal.number % 5 == 4:
        ledger.tell(proposal.number, TrialState.FAIL, reason="loss is nan")
    elif proposal.number % 7 == 6:
        ledger.tell(proposal.number, TrialState.PRUNED, reason="stopped early")
    else:
        ledger.tell(proposal.number, TrialState.COMPLETE, values_of(ledger, proposal))


def run(ledger: Ledger, limit: int | None = None) -> list[Proposal]:
    """Drive a ledger, one trial after the other."""
    done: list[Proposal] = []
    while limit is None or len(done) < limit:
        proposal = ledger.propose()
        if proposal is None:
            break
        finish(ledger, proposal)
        done.append(proposal)
    return done


def on_disk(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{folder / 'study.db'}").get_trials()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_trials_that_were_asked_for_and_none_twice(tmp_path: Path, sampler: str) -> None:
    sweep = Sweep(space="per_layer", trials=22, sampler=sampler)
    found = run(open_ledger(tmp_path, sweep))
    assert [proposal.number for proposal in found] == list(range(22))
    assert len({proposal.cost.digest for proposal in found}) == 22
    assert [proposal.source for proposal in found[:11]] == ["uniform"] * 11
    assert {proposal.source for proposal in found[11:]} <= {sampler, "random"}
    assert found[-1].source == sampler


@FEW
@given(
    share=st.floats(0, 1),
    limit=st.sampled_from(["max_bops", "max_relative_bops", "max_size_bytes"]),
    trials=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_no_proposal_breaks_a_limit_and_none_comes_twice(
    tmp_path: Path, share: float, limit: str, trials: int, seed: int
) -> None:
    free = resolve(small_sweep(space="per_layer"))
    least, most = (cost_of({**free.base, "bits": {"*": {"weight": width, "activation": width}}}) for width in (2, 8))
    name = limit.removeprefix("max_")
    budget = getattr(least, name) + share * (getattr(most, name) - getattr(least, name))
    sweep = small_sweep(space="per_layer", trials=trials, seed=seed, **{limit: budget})
    found = run(open_ledger(fresh_folder(tmp_path), sweep))
    assert all(getattr(proposal.cost, name) <= budget for proposal in found)
    assert len({proposal.cost.digest for proposal in found}) == len(found)
    assert 1 <= len(found) <= trials
    if share > 0.5:
        assert len(found) == trials


def affordable(sweep: Sweep) -> int:
    """How many configurations of a small space are within the limits, by trying all of them."""
    found = resolve(sweep)
    costs = [
        cost_of({**found.base, "bits": {"*": {"weight": w, "activation": a}}}) for w in range(2, 9) for a in range(2, 9)
    ]
    return len({cost.digest for cost in costs if not cost.over(sweep)})


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 49), ({"max_size_bytes": 8000}, 28), ({"max_bops": 1_200_000}, 3), ({"sampler": "random"}, 49)],
    ids=str,
)
def test_a_small_space_is_exhausted_and_then_there_is_none_left(
    tmp_path: Path, changes: dict[str, Any], size: int
) -> None:
    sweep = small_sweep(space="uniform", trials=60, **changes)
    ledger = open_ledger(tmp_path, sweep)
    assert len(run(ledger)) == affordable(sweep) == size
    assert ledger.propose() is None
    assert open_ledger(tmp_path, sweep).propose() is None


def test_uniform_configurations_come_first_in_their_order(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep(trials=20))
    expected = uniform_proposals(ledger.space, ledger.resolved.base, 20)
    assert [proposal.params for proposal in run(ledger, len(expected))] == expected


def test_a_proposal_carries_its_configuration_and_its_cost(tmp_path: Path) -> None:
    for proposal in run(open_ledger(tmp_path, Sweep(space="training", trials=16))):
        tree = proposal.tree
        assert tree["bits"]["*"]["weight"] == proposal.params["bits/*/weight"]
        assert tree["optimizer"]["lr"] == proposal.params["optimizer/lr"]
        assert cost_of(tree) == proposal.cost


def test_trials_may_run_at_the_same_time(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep(space="per_layer", trials=24))
    open_trials: list[Proposal] = []
    seen = []
    for proposal in proposals(ledger):
        seen.append(proposal.cost.digest)
        open_trials.append(proposal)
        if len(open_trials) == 4:
            finish(ledger, open_trials.pop(0))
    assert len(set(seen)) == 24
    assert ledger.running() == [proposal.number for proposal in open_trials]


def test_the_study_says_what_became_of_each_trial(tmp_path: Path) -> None:
    sweep = small_sweep(trials=8, objectives={"bops": "min", "accuracy": "max"})
    ledger = open_ledger(tmp_path, sweep)
    found = run(ledger, 7)
    last = ledger.propose()
    assert last is not None
    trials = on_disk(tmp_path)
    states = ["COMPLETE"] * 4 + ["FAIL", "COMPLETE", "PRUNED", "RUNNING"]
    assert [trial.state.name for trial in trials] == states
    assert [trial.number for trial in trials] == list(range(8))
    for trial, proposal in zip(trials, [*found, last], strict=True):
        assert trial.params == proposal.params
        assert trial.user_attrs["source"] == proposal.source
        assert trial.user_attrs["bops"] == proposal.cost.bops
        if trial.state == TrialState.COMPLETE:
            assert trial.values == [proposal.cost.bops, formula(proposal.cost.bits)]
    assert [trial.user_attrs.get("reason") for trial in trials] == [None] * 4 + [
        "loss is nan",
        None,
        "stopped early",
        None,
    ]
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["bops", "accuracy"]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MAXIMIZE"]


def test_telling_twice_changes_nothing(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep())
    proposal = ledger.propose()
    assert proposal is not None
    ledger.tell(0, TrialState.COMPLETE, [0.5, 1.0, 2.0])
    ledger.tell(0, TrialState.FAIL, reason="too late")
    (trial,) = on_disk(tmp_path)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.5, 1.0, 2.0])
    assert "reason" not in trial.user_attrs


def test_a_reason_of_any_length_is_kept_in_its_first_part(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep())
    ledger.propose()
    ledger.tell(0, TrialState.FAIL, reason="ä" * 5000)
    assert on_disk(tmp_path)[0].user_attrs["reason"] == "ä" * 2000


KILLED_AT = [1, 4, 7, 9, 13, 17, 23]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "nsga3", "qmc"])
@pytest.mark.parametrize("killed_at", [3, 9, 14])
def test_a_sweep_that_was_stopped_between_trials_goes_on_as_if_it_had_not_been(
    tmp_path: Path, sampler: str, killed_at: int
) -> None:
    sweep = Sweep(space="per_layer", trials=20, sampler=sampler, seed=5)
    whole = run(open_ledger(fresh_folder(tmp_path), sweep))
    folder = fresh_folder(tmp_path)
    first = run(open_ledger(folder, sweep), killed_at)
    rest = run(open_ledger(folder, sweep))
    assert [p.params for p in first + rest] == [p.params for p in whole]
    assert [p.source for p in first + rest] == [p.source for p in whole]


@pytest.mark.parametrize("killed_at", KILLED_AT)
def test_trials_that_were_interrupted_come_back_under_their_numbers(tmp_path: Path, killed_at: int) -> None:
    sweep = small_sweep(space="per_layer", trials=24)
    ledger = open_ledger(tmp_path, sweep)
    run(ledger, killed_at - 1)
    cut = [ledger.propose(), ledger.propose()][: 24 - killed_at + 1]
    again = open_ledger(tmp_path, sweep)
    assert [again.propose() for _ in cut] == cut
    for proposal in cut:
        assert proposal is not None
        finish(again, proposal)
    rest = run(again)
    assert [trial.number for trial in on_disk(tmp_path)] == list(range(24))
    assert len({trial.user_attrs["digest"] for trial in on_disk(tmp_path)}) == 24
    assert [proposal.number for proposal in rest] == list(range(killed_at + len(cut) - 1, 24))
    assert open_ledger(tmp_path, sweep).running() == []


def test_an_interrupted_trial_may_be_interrupted_again(tmp_path: Path) -> None:
    sweep = small_sweep()
    first = open_ledger(tmp_path, sweep).propose()
    assert open_ledger(tmp_path, sweep).propose() == first
    assert open_ledger(tmp_path, sweep).propose() == first
    assert len(on_disk(tmp_path)) == 1


def test_two_seeds_search_differently_and_the_same_seed_alike(tmp_path: Path) -> None:
    def params(seed: int) -> list[dict[str, Any]]:
        sweep = Sweep(space="per_layer", trials=16, seed=seed)
        return [p.params for p in run(open_ledger(fresh_folder(tmp_path), sweep))]

    assert params(0) == params(0) != params(1)


@pytest.mark.parametrize("name", ["a b", "50%", "ä", "what?", "a#b"])
def test_the_run_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    run(open_ledger(tmp_path / name, small_sweep()), 2)
    assert (tmp_path / name / "study.db").is_file()
    assert open_ledger(tmp_path / name, small_sweep()).started == 2


def test_the_dashboard_shows_the_study(tmp_path: Path) -> None:
    run(open_ledger(tmp_path, small_sweep()))
    from optuna_dashboard._app import create_app

    assert create_app is not None
