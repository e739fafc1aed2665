"""Searches over networks: a trial has the bits of its own layers, costs what its own network costs, and is new."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from raysearch.records import RunFolder
from raysearch.repeat import train_command
from raysearch.resolve import resolve
from raysearch.search.choice import choose
from raysearch.search.ledger import Ledger, Proposal
from raysearch.search.networks import configured, existing, sets_any, trimmed
from raysearch.search.proposals import cost_of
from raysearch.seeds import Seeds, proposed
from raysearch.sweep import Resolved, Sweep
from search_spaces import per_layer
from search_spaces.joint import LayersOf, every_layer
from tests.raysearch.builders import SMALL, by_training, drive, formula, law, make_run, open_book
from trainables.build import layer_table
from trainables.config import merged, parse
from trainables.cost import Layer, LayerBits, bops, size_bytes
from trainables.errors import ConfigError

SAMPLERS = ["random", "tpe", "nsga2", "qmc"]


def few_networks(
    layers: Sequence[Layer], config: dict[str, Any], layers_of: LayersOf
) -> Mapping[str, BaseDistribution]:
    """As `joint`, with sixteen small networks."""
    changing = {
        "model/depth": IntDistribution(8, 14, step=6),
        "model/width": IntDistribution(4, 8, step=4),
        "model/block": CategoricalDistribution(("basic", "bottleneck")),
        "data/resolution": IntDistribution(4, 8, step=4),
    }
    return {**changing, **per_layer.space(every_layer(changing, layers_of))}


JOINT = Sweep(model="resnet20", data="digits", space=few_networks, sampler="random", trials=64)


@cache
def joint() -> Resolved:
    return resolve(JOINT)


def make(path: Path, **changes: Any) -> tuple[RunFolder, Resolved]:
    return make_run(path, replace(joint().sweep, **changes))


def own_bits(proposal: Proposal) -> set[str]:
    """The bit parameters that the proposal's network should have."""
    layers = layer_table(parse(proposal.tree)).quantizable
    inner = [layer.name for layer in layers if not (layer.first or layer.last)]
    return {f"bits/{name}/{role}" for name in inner for role in ("weight", "activation")}


def test_a_trial_has_the_bits_of_its_own_layers_and_costs_what_those_cost(tmp_path: Path) -> None:
    folder, resolved = make(tmp_path / "run")
    ledger = Ledger(folder, resolved)
    proposals = [ledger.propose() for _ in range(24)]
    assert len({tuple(proposal.tree["model"].values()) for proposal in proposals}) > 4
    for proposal in proposals:
        assert {name for name in proposal.params if name.startswith("bits/")} == own_bits(proposal)
        table = layer_table(parse(proposal.tree))
        bits = {name: LayerBits(weight=w, activation=a) for name, (w, a) in proposal.cost.bits.items()}
        assert set(bits) == {layer.name for layer in table.quantizable}
        assert proposal.cost.bops == bops(table, bits)
        assert proposal.cost.size_bytes == size_bytes(table, bits)
        assert proposal.cost.relative_bops == pytest.approx(proposal.cost.bops / (resolved.table.macs * 32 * 32))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_copes_with_parameters_that_come_and_go(tmp_path: Path, sampler: str) -> None:
    folder, resolved = make(tmp_path / "run", sampler=sampler, seed=3)
    ledger, running, seen = Ledger(folder, resolved), [], []
    for number in range(16):  # four at a time, the oldest ends first
        seen.append(ledger.propose())
        running.append(seen[-1])
        if len(running) == 4:
            done = running.pop(0)
            values = [formula(done.cost.bits), float(done.cost.bops), float(done.cost.size_bytes)]
            ledger.tell(done.number, TrialState.COMPLETE, [values])
        if number == 12:
            ledger = Ledger(folder, resolved)  # another driver goes on
            assert [p.params for p in ledger.interrupted] == [p.params for p in running]
            ledger.interrupted = []
    assert len({proposal.cost.digest for proposal in seen}) == 16
    assert sum(proposal.source == sampler for proposal in seen) >= 8
    for proposal in seen:
        layers = layer_table(parse(proposal.tree)).quantizable
        asked = [name for name in resolved.space if not name.startswith("bits/") or sets_any(name, layers)]
        assert sorted(proposal.params) == sorted(asked)


def test_a_limit_holds_for_every_architecture(tmp_path: Path) -> None:
    folder, resolved = make(tmp_path / "run", max_relative_bops=0.004)
    ledger = Ledger(folder, resolved)
    found = [ledger.propose() for _ in range(24)]
    assert max(proposal.cost.bops for proposal in found) <= 0.004 * resolved.table.macs * 1024
    assert any(proposal.repaired for proposal in found)
    assert all({n for n in p.params if n.startswith("bits/")} == own_bits(p) for p in found)


def test_auto_leaves_architectures_to_a_sampler_that_needs_no_sums() -> None:
    choice = choose(replace(joint(), sweep=replace(joint().sweep, sampler="auto")))
    assert (choice.sampler, "changes the network" in choice.reason) == ("tpe", True)


def values_in(space: dict[str, BaseDistribution]) -> st.SearchStrategy[dict[str, object]]:
    """Values for all parameters, whether a network has them or not."""

    def drawn(distribution: BaseDistribution) -> st.SearchStrategy[object]:
        if isinstance(distribution, CategoricalDistribution):
            return st.sampled_from(distribution.choices)
        assert isinstance(distribution, IntDistribution | FloatDistribution)
        count = round((distribution.high - distribution.low) / distribution.step)
        return st.integers(0, count).map(lambda i: distribution.low + i * distribution.step)

    return st.fixed_dictionaries({name: drawn(distribution) for name, distribution in space.items()})


@settings(law, max_examples=12)
@given(data=st.data())
def test_values_that_a_network_lacks_do_not_count(data: st.DataObject) -> None:
    space, base = joint().space, joint().base
    values = data.draw(values_in(space))
    kept = trimmed(base, values)
    assert trimmed(base, kept) == kept
    assert sorted(kept) == sorted(existing(space, base, kept))
    assert cost_of(configured(base, values)) == cost_of(merged(base, kept))
    absent = data.draw(values_in({name: d for name, d in space.items() if name not in kept}))
    assert cost_of(configured(base, values | absent)).digest == cost_of(configured(base, values)).digest


@pytest.mark.parametrize(
    ("model", "data", "written"),
    [
        ("resnet20", "cifar10", {"model/depth": 20, "model/block": "basic", "model/kernel": 3, "data/resolution": 32}),
        ("lenet5", "digits", {"model/width": 0.25, "model/padding": 2, "model/kernel": 5}),
        ("lenet5", "mnist", {"model/width": 1.0, "model/padding": 0}),
        ("mobilenet_v2", "cifar10", {"model/width": 1, "model/expansion": 6}),
    ],
)
def test_defaults_written_out_are_the_same_configuration(model: str, data: str, written: dict[str, object]) -> None:
    base = resolve(Sweep(model=model, data=data)).base
    assert cost_of(merged(base, written)).digest == cost_of(base).digest


def test_the_same_configuration_by_two_routes_is_trained_once(tmp_path: Path) -> None:
    folder, resolved = make(tmp_path / "run")
    shallow = {"model/depth": 8, "model/block": "basic"}
    tries = [shallow, {**shallow, "bits/layer3.1.conv2/weight": 7}, {**shallow, "bits/layer3.0.conv2/weight": 7}]
    proposed("person", tries, resolved.space, resolved.base).write(folder.seeds)
    ledger = Ledger(folder, resolved)
    first = [ledger.propose() for _ in range(3)]
    assert [proposal.source for proposal in first] == ["person", "person", "uniform"]
    assert ledger.refused == 1
    assert Seeds.read(RunFolder(folder.path).seeds).first[0][1].keys() == resolved.space.keys()


def test_a_layer_that_no_network_of_the_space_has_is_an_error_with_the_nearest_name() -> None:
    space = {"model/depth": IntDistribution(8, 20, step=6), "bits/layer1.2.conf1/weight": IntDistribution(2, 8)}
    with pytest.raises(ConfigError, match=r"layer1.2.conf1/weight: no network of the space .* 'layer1.2.conv1'"):
        resolve(Sweep(model="resnet20", space=space))


def test_trials_of_other_networks_inherit_from_the_base_network_unless_told_otherwise() -> None:
    assert joint().base["start"]["parent"] == {
        "model/depth": 20,
        "model/width": 16,
        "model/block": "basic",
        "data/resolution": 8,
    }
    own = replace(joint().sweep, settings={"start/parent": "own"})
    assert resolve(own).base["start"]["parent"] == "own"
    assert resolve(Sweep()).base["start"]["parent"] == "own"


def test_trials_begin_with_the_weights_of_one_float_network_and_their_records_say_so(tmp_path: Path) -> None:
    settings = {**SMALL, "start/epochs": 1}
    folder, resolved = make(tmp_path / "run", settings=settings, epochs=1, trials=2)
    tries = [{"model/depth": 8, "model/width": 8, "model/block": "bottleneck"}, {"model/width": 4}]
    proposed("person", tries, resolved.space, resolved.base).write(folder.seeds)
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    assert len(list(folder.starts.glob("*.safetensors"))) == 1
    bottleneck, basic = folder.read_records()
    assert bottleneck["status"] == basic["status"] == "complete"
    assert (bottleneck["inherited"]["fresh"] > 0, basic["inherited"]["fresh"]) == (True, 0)
    assert set(bottleneck["bits"]) - set(basic["bits"])
    assert "start/parent" in train_command(folder.read_sweep()["sweep"], basic)
