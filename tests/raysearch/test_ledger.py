"""The study on disk: proposals that are never wasted, told truthfully, and a driver that may die at any point."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from raysearch.errors import SweepError
from raysearch.limits import limits_of
from raysearch.records import RunFolder
from raysearch.resolve import resolve
from raysearch.search.ledger import STUDY, Ledger, Proposal
from raysearch.search.proposals import cost_of, uniform_proposals
from raysearch.sweep import Resolved, Sweep
from raysearch.sweep_checks import SAMPLERS
from tests.ports import free_port
from tests.raysearch.builders import formula, law, proposals, small_sweep

FEW = settings(law, max_examples=6)
_fresh = iter(range(10**6))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The Gaussian process of `gp` is small."""
    torch.set_num_threads(1)


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
        ledger.tell(proposal.number, TrialState.COMPLETE, [values_of(ledger, proposal)])


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
    sweep = Sweep(space="per_layer", trials=16, sampler=sampler)
    found = run(open_ledger(tmp_path, sweep))
    assert [proposal.number for proposal in found] == list(range(16))
    assert len({proposal.cost.digest for proposal in found}) == 16
    by_frontier = sampler in ("auto", "frontier")
    first = 7 if by_frontier else 8
    assert [proposal.source for proposal in found[:first]] == ["uniform"] * first
    wanted = "frontier" if by_frontier else sampler
    assert sum(proposal.source == wanted for proposal in found[first:]) >= 4


def test_a_grid_is_walked_to_its_end_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    space = {f"bits/{layer}/weight": CategoricalDistribution([2, 4, 8]) for layer in ("conv2", "fc1", "fc2")}
    orders = []
    for seed in (0, 1):
        found = run(open_ledger(fresh_folder(tmp_path), Sweep(space=space, trials=40, sampler="grid", seed=seed)))
        assert sorted(tuple(p.params.values()) for p in found) == list(product((2, 4, 8), repeat=3))
        assert [p.source for p in found] == ["uniform"] * 3 + ["grid"] * 24
        orders.append([p.params for p in found])
    assert orders[0] != orders[1]


def test_a_grid_over_networks_goes_on_where_trials_lack_bits_of_layers_that_they_have_not(tmp_path: Path) -> None:
    space = {
        "model/depth": CategoricalDistribution([8, 14]),
        "bits/layer1.0.conv1/weight": CategoricalDistribution([2, 4]),
        "bits/layer1.1.conv1/weight": CategoricalDistribution([2, 4]),
    }
    sweep = Sweep(model="resnet20", space=space, trials=12, sampler="grid", settings={"model/width": 4})
    found = run(open_ledger(tmp_path, sweep), 3) + run(open_ledger(tmp_path, sweep))
    assert sorted(len(p.params) for p in found) == [2] * 2 + [3] * 4
    assert len({p.cost.digest for p in found}) == 6


@pytest.mark.parametrize("space", ["all_layers", "training"])
def test_a_grid_without_end_is_refused(space: str) -> None:
    with pytest.raises(SweepError, match=r"sampler 'grid' cannot walk .* configurations, at most 100,000"):
        resolve(Sweep(space=space, model="resnet20", data="cifar10", sampler="grid"))


def affordable(sweep: Sweep) -> int:
    """How many configurations of the uniform space are within the limits, by trying all of them."""
    base = resolve(sweep).base
    widths = range(2, 9)
    costs = [cost_of({**base, "bits": {"*": {"weight": w, "activation": a}}}) for w in widths for a in widths]
    return sum(not cost.over(limits_of(sweep)) for cost in costs)


@FEW
@given(
    share=st.floats(0, 1),
    limit=st.sampled_from(["max_bops", "max_relative_bops", "max_size_bytes"]),
    trials=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_there_are_as_many_proposals_as_asked_for_or_affordable_none_twice_none_over_the_limit(
    tmp_path: Path, share: float, limit: str, trials: int, seed: int
) -> None:
    base, name = resolve(small_sweep()).base, limit.removeprefix("max_")
    least, most = (
        getattr(cost_of({**base, "bits": {"*": {"weight": width, "activation": width}}}), name) for width in (2, 8)
    )
    sweep = small_sweep(trials=trials, seed=seed, **{limit: least + share * (most - least)})
    found = run(open_ledger(fresh_folder(tmp_path), sweep))
    assert len(found) == len({proposal.cost.digest for proposal in found}) == min(trials, affordable(sweep))
    assert all(getattr(proposal.cost, name) <= getattr(sweep, limit) for proposal in found)


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 49), ({"max_size_bytes": 8256}, 21), ({"max_bops": 1_200_000}, 1)],
    ids=str,
)
def test_a_small_space_is_exhausted_and_then_there_is_none_left(
    tmp_path: Path, changes: dict[str, Any], size: int
) -> None:
    sweep = small_sweep(trials=60, **changes)
    ledger = open_ledger(tmp_path, sweep)
    assert len(run(ledger)) == affordable(sweep) == size
    assert ledger.propose() is None
    assert open_ledger(tmp_path, sweep).propose() is None


def test_uniform_configurations_come_first_in_their_order(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep(trials=20))
    expected = uniform_proposals(ledger.space, ledger.resolved.base, 0)
    assert [set(values.values()) for values in expected] == [{width} for width in (8, 2, 4, 3, 6, 5, 7)]
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
    ledger.tell(0, TrialState.COMPLETE, [[0.5, 1.0, 2.0]])
    ledger.tell(0, TrialState.FAIL, reason="too late")
    (trial,) = on_disk(tmp_path)
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.5, 1.0, 2.0])
    assert "reason" not in trial.user_attrs


def test_a_reason_of_any_length_is_kept_in_its_first_part(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, small_sweep())
    ledger.propose()
    ledger.tell(0, TrialState.FAIL, reason="ä" * 5000)
    assert on_disk(tmp_path)[0].user_attrs["reason"] == "ä" * 2000


@cache
def uninterrupted(sweep_name: str) -> list[Proposal]:
    """What a sweep proposes from its beginning to its end."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Ledger(RunFolder(Path(folder)), searched(sweep_name)))


def searched(sweep_name: str) -> Resolved:
    if sweep_name != "few configurations":
        return resolve(Sweep(space="per_layer", trials=14, sampler=sweep_name, seed=5))
    layers = [f"bits/{layer}/{role}" for layer in ("conv2", "fc1") for role in ("weight", "activation")]
    return replace(resolve(Sweep(trials=14)), space={name: CategoricalDistribution([2, 4]) for name in layers})


@pytest.mark.parametrize("sweep_name", ["frontier", "tpe", "nsga2", "qmc", "grid", "few configurations"])
@pytest.mark.parametrize("killed_at", [5, 12])
def test_a_sweep_that_was_stopped_between_trials_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep_name: str, killed_at: int
) -> None:
    monkeypatch.setattr("raysearch.search.ledger.ATTEMPTS", 4)  # or a sampler that lost its place would find it in time
    folder, resolved = RunFolder(tmp_path), searched(sweep_name)
    found = run(Ledger(folder, resolved), killed_at) + run(Ledger(folder, resolved))
    assert [(p.params, p.source) for p in found] == [(p.params, p.source) for p in uninterrupted(sweep_name)]


@pytest.mark.parametrize("killed_at", [0, 6, 12, 13])
def test_trials_that_were_interrupted_come_back_under_their_numbers(tmp_path: Path, killed_at: int) -> None:
    sweep = small_sweep(space="per_layer", trials=14)
    ledger = open_ledger(tmp_path, sweep)
    run(ledger, killed_at)
    cut = list(islice(proposals(ledger), 2))
    again = open_ledger(tmp_path, sweep)
    assert list(islice(proposals(again), len(cut))) == cut
    for proposal in cut:
        finish(again, proposal)
    rest = run(again)
    assert [proposal.number for proposal in rest] == list(range(killed_at + len(cut), 14))
    trials = on_disk(tmp_path)
    assert [trial.number for trial in trials] == list(range(14))
    assert len({trial.user_attrs["digest"] for trial in trials}) == 14
    assert all(trial.state.is_finished() for trial in trials)


def test_an_interrupted_trial_may_be_interrupted_again(tmp_path: Path) -> None:
    sweep = small_sweep()
    first = open_ledger(tmp_path, sweep).propose()
    assert open_ledger(tmp_path, sweep).propose() == first
    assert open_ledger(tmp_path, sweep).propose() == first
    assert len(on_disk(tmp_path)) == 1


def test_two_seeds_search_differently_and_the_same_seed_alike(tmp_path: Path) -> None:
    def params(seed: int) -> list[dict[str, Any]]:
        sweep = Sweep(space="per_layer", trials=24, seed=seed)
        return [p.params for p in run(open_ledger(fresh_folder(tmp_path), sweep))]

    assert params(0) == params(0) != params(1)


@pytest.mark.parametrize("name", ["a b", "50%", "ä", "a#b"])
def test_the_run_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    run(open_ledger(tmp_path / name, small_sweep()), 2)
    assert (tmp_path / name / "study.db").is_file()
    assert open_ledger(tmp_path / name, small_sweep()).started == 2


def test_the_dashboard_shows_the_study(tmp_path: Path) -> None:
    run(open_ledger(tmp_path, small_sweep()), 2)
    port = free_port()
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), f"sqlite:///{tmp_path / 'study.db'}"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        (study,) = answer(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
    finally:
        server.terminate()
        server.wait()
    assert study["study_name"] == STUDY
    assert study["directions"] == ["maximize", "minimize", "minimize"]


def answer(url: str) -> Any:
    """The JSON behind an address, as soon as its server is there."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)
        except urllib.error.URLError:
            time.sleep(0.1)
    raise TimeoutError(url)


def test_gp_does_not_want_for_ever_what_has_failed(tmp_path: Path) -> None:
    """It does not learn from failures, so it asks for the failed configuration again; one beside it is taken."""
    ledger = open_ledger(tmp_path, Sweep(space="per_layer", trials=13, sampler="gp"))
    for proposal in proposals(ledger):
        if proposal.number < 10:
            ledger.tell(proposal.number, TrialState.COMPLETE, [values_of(ledger, proposal)])
        else:
            ledger.tell(proposal.number, TrialState.FAIL, reason="loss is nan")
    assert ledger.started == 13
    assert 0 < ledger.refused <= 8  # it asked again, and not as often as it is allowed to


def test_an_impossible_proposal_is_refused_and_never_a_trial(tmp_path: Path) -> None:
    """A space of one's own may hold what its corners do not show: here, one layer's widths beyond the other's."""
    resolved = resolve(Sweep(trials=30))
    space = {"bits/conv2/weight": CategoricalDistribution([2, 4, 9]), "bits/fc1/weight": IntDistribution(2, 3)}
    found = run(Ledger(RunFolder(tmp_path), replace(resolved, space=space)))
    assert {proposal.params["bits/conv2/weight"] for proposal in found} == {2, 4}
    assert len(found) == 4
