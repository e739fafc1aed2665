"""Search spaces: the contract of every space on every model and method, the sizes of ours, and what a block is."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, reduce
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, distribution_to_json, json_to_distribution

from raysearch.search.networks import trimmed
from raysearch.search.proposals import corners
from raysearch.search.space import made
from search_spaces.per_block import block
from trainables import plugins
from trainables.build import layer_table
from trainables.config import TrialConfig, merged, parse
from trainables.cost import Layer, LayerBits
from trainables.layer_bits import resolve_bits

Values = Mapping[str, Any]

NETWORKS = [
    ("lenet5", "digits"),
    ("lenet5", "mnist"),
    ("vgg7", "cifar10"),
    ("resnet20", "cifar10"),
    ("resnet18", "cifar10"),
    ("resnet34", "cifar10"),
    ("resnet50", "cifar10"),
    ("mobilenet_v2", "cifar10"),
    ("mobilenet_v1", "cifar10"),
]
METHODS = ["lsq", "pact", "dorefa"]
"""For spaces that are not made for one method; a space with the name of a method is made for that one."""
SPACES = plugins.describe("search_spaces")
OF_NETWORKS = ("architecture", "joint", "joint_per_block", "joint_per_stage")
SAMPLES = 2


def methods_for(space: str) -> list[str]:
    if space in OF_NETWORKS:
        return METHODS[:1]
    return [space] if space in plugins.describe("trainables.methods") else METHODS


every_space = pytest.mark.parametrize("name", SPACES)
every_space_with_a_method = pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in SPACES for method in methods_for(name)]
)
every_network = pytest.mark.parametrize("network", NETWORKS, ids="-".join)


@cache
def base(method: str, network: tuple[str, str]) -> TrialConfig:
    return parse({"method": method, "model": network[0], "data": network[1]})


def layers(network: tuple[str, str]) -> Sequence[Layer]:
    return layer_table(base("lsq", network)).quantizable


def space_of(name: str, rows: Sequence[Any], network: tuple[str, str]) -> dict[str, BaseDistribution]:
    return made(name, rows, base("lsq", network).tree())


def end(distribution: Any, *, high: bool) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[-1 if high else 0]
    return distribution.high if high else distribution.low


def corner(space: dict[str, BaseDistribution], *, high: bool) -> Values:
    return {address: end(distribution, high=high) for address, distribution in space.items()}


@cache
def proposals(name: str, network: tuple[str, str]) -> list[Values]:
    """All lows, all highs, and a few draws, which a seed repeats; each with what its network has."""
    space, tree = space_of(name, layers(network), network), base("lsq", network).tree()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    draws = [study.ask(space).params for _ in range(SAMPLES)]
    return [trimmed(tree, v) for v in (corner(space, high=False), corner(space, high=True), *draws)]


def configured(method: str, network: tuple[str, str], values: Values) -> tuple[TrialConfig, dict[str, LayerBits]]:
    config = parse(merged(base(method, network).tree(), values))
    return config, resolve_bits(config, layer_table(config))


def at(tree: Mapping[str, Any], address: str) -> Any:
    return reduce(lambda node, step: node[step], address.split("/"), tree)


# The contract, for every space


def test_every_model_is_searched() -> None:
    assert {model for model, _ in NETWORKS} == set(plugins.describe("trainables.models"))


@every_space
def test_a_space_says_in_one_line_what_it_is(name: str) -> None:
    assert plugins.describe("search_spaces")[name].endswith(".")


@every_space
@every_network
def test_a_space_is_a_dict_of_distributions_and_the_same_each_time(name: str, network: tuple[str, str]) -> None:
    space = space_of(name, layers(network), network)
    assert space
    assert all(isinstance(distribution, BaseDistribution) for distribution in space.values())
    assert list(space.items()) == list(space_of(name, layers(network), network).items())


@every_space
@every_network
def test_a_space_reads_only_name_first_and_last_of_a_layer(name: str, network: tuple[str, str]) -> None:
    bare = [SimpleNamespace(name=row.name, first=row.first, last=row.last) for row in layers(network)]
    assert space_of(name, bare, network) == space_of(name, layers(network), network)


@every_space
@every_network
def test_a_space_survives_the_way_through_json(name: str, network: tuple[str, str]) -> None:
    space = space_of(name, layers(network), network)
    assert {key: json_to_distribution(distribution_to_json(asked)) for key, asked in space.items()} == space


@every_space
@every_network
def test_addresses_of_bits_name_layers_that_the_model_has(name: str, network: tuple[str, str]) -> None:
    space = space_of(name, layers(network), network)
    asked = [address.split("/") for address in space if address.startswith("bits/")]
    assert {role for _, _, role in asked} <= {"weight", "activation"}
    if name not in OF_NETWORKS:
        for _, pattern, _ in asked:
            assert any(fnmatchcase(row.name, pattern) for row in layers(network)), pattern


@every_space_with_a_method
@every_network
def test_every_proposal_is_a_valid_config_that_says_what_was_proposed(
    name: str, network: tuple[str, str], method: str
) -> None:
    for values in proposals(name, network):
        config, bits = configured(method, network, values)
        assert {address: at(config.tree(), address) for address in values} == values
        assert list(bits) == [row.name for row in layer_table(config).quantizable]


@every_space_with_a_method
@every_network
def test_every_width_that_is_asked_for_changes_some_layer(name: str, network: tuple[str, str], method: str) -> None:
    space, tree = space_of(name, layers(network), network), base(method, network).tree()
    idle = {address for address in space if address.startswith("bits/")}
    for values in corners({a: d for a, d in space.items() if not a.startswith("bits/")}):
        lows = trimmed(tree, {a: end(d, high=False) for a, d in space.items()} | values)
        config, lowest = configured(method, network, lows)
        for address in idle & set(lows):
            changed = merged(config.tree(), {address: end(space[address], high=True)})["bits"]
            if resolve_bits(replace(config, bits=changed), layer_table(config)) != lowest:
                idle.remove(address)
    assert idle == set()


# Our spaces


@pytest.mark.parametrize(
    ("network", "name", "size"),
    [
        (("lenet5", "digits"), "uniform", 2),
        (("lenet5", "digits"), "per_layer", 4),
        (("lenet5", "digits"), "per_block", 4),
        (("lenet5", "digits"), "all_layers", 7),
        (("resnet20", "cifar10"), "uniform", 2),
        (("resnet20", "cifar10"), "training", 5),
        (("resnet20", "cifar10"), "per_stage", 6),
        (("resnet20", "cifar10"), "architecture", 5),
        (("resnet18", "cifar10"), "architecture", 5),
        (("mobilenet_v2", "cifar10"), "architecture", 4),
        (("resnet50", "cifar10"), "architecture", 1),
        (("lenet5", "digits"), "joint", 7),
        (("resnet20", "cifar10"), "joint_per_stage", 11),
        (("resnet20", "cifar10"), "joint_per_block", 35),
        (("resnet20", "cifar10"), "joint", 101),
        (("resnet20", "cifar10"), "per_block", 18),
        (("resnet20", "cifar10"), "per_layer", 40),
        (("resnet20", "cifar10"), "all_layers", 43),
        (("mobilenet_v2", "cifar10"), "per_block", 36),
        (("mobilenet_v2", "cifar10"), "per_layer", 102),
    ],
)
def test_a_space_has_its_number_of_parameters(network: tuple[str, str], name: str, size: int) -> None:
    assert len(space_of(name, layers(network), network)) == size


@pytest.mark.parametrize("name", ["uniform", "training", "per_layer", "per_block"])
@every_network
def test_the_first_and_the_last_layer_keep_8_bits(name: str, network: tuple[str, str]) -> None:
    _, bits = configured("lsq", network, corner(space_of(name, layers(network), network), high=False))
    kept = {row.name: bits[row.name] for row in layers(network) if row.first or row.last}
    assert len(kept) == 2
    assert set(kept.values()) == {LayerBits(weight=8, activation=8)}


@every_network
def test_all_layers_gives_the_first_and_the_last_layer_widths_too(network: tuple[str, str]) -> None:
    _, bits = configured("lsq", network, corner(space_of("all_layers", layers(network), network), high=False))
    first = next(row.name for row in layers(network) if row.first)
    assert bits.pop(first) == LayerBits(weight=2, activation=8)
    assert set(bits.values()) == {LayerBits(weight=2, activation=2)}


@every_network
def test_per_layer_gives_each_layer_its_own_widths(network: tuple[str, str]) -> None:
    for values in proposals("per_layer", network):
        _, bits = configured("lsq", network, values)
        assert values == {
            f"bits/{row.name}/{role}": getattr(bits[row.name], role)
            for row in layers(network)
            if not (row.first or row.last)
            for role in ("weight", "activation")
        }


@every_network
def test_per_block_gives_all_layers_of_a_block_its_widths(network: tuple[str, str]) -> None:
    for values in proposals("per_block", network):
        _, bits = configured("lsq", network, values)
        for row in layers(network):
            if not (row.first or row.last):
                asked = (values[f"bits/{block(row.name)}/{role}"] for role in ("weight", "activation"))
                assert (bits[row.name].weight, bits[row.name].activation) == tuple(asked), row.name


# Blocks

layer_names = st.lists(st.sampled_from(["a", "b", "conv1", "0", "1", "10"]), min_size=1, max_size=4).map(".".join)


@given(name=layer_names)
def test_a_layer_is_in_its_block_and_a_block_is_its_own(name: str) -> None:
    assert fnmatchcase(name, block(name))
    assert block(block(name)) == block(name)


@given(one=layer_names, other=layer_names)
def test_a_layer_matches_the_block_of_another_exactly_when_it_is_in_it(one: str, other: str) -> None:
    assert fnmatchcase(one, block(other)) == (block(one) == block(other))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fc1", "fc1"),
        ("conv1", "conv1"),
        ("features.3", "features.3"),
        ("classifier.1", "classifier.1"),
        ("layer1.0.conv1", "layer1.0.*"),
        ("layer1.10.conv1", "layer1.10.*"),
        ("layer1.0.downsample.0", "layer1.0.*"),
        ("features.2.conv.0.0", "features.2.*"),
        ("0.fc", "0.*"),
    ],
)
def test_a_block_is_a_name_up_to_its_first_number(name: str, expected: str) -> None:
    assert block(name) == expected
