"""What is tried first and what it costs, for any space over bits."""

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raysearch.limits import limits_of
from raysearch.resolve import resolve
from raysearch.search.proposals import (
    ORDER,
    Cost,
    cardinality,
    cheapest,
    choices,
    corners,
    cost_of,
    random_values,
    uniform_proposals,
)
from raysearch.sweep import Sweep
from tests.raysearch.builders import law, small_sweep
from trainables import cost as trainables_cost
from trainables.build import layer_table
from trainables.config import merged, parse
from trainables.errors import ConfigError
from trainables.layer_bits import resolve_bits

BASE = resolve(Sweep(space="uniform")).base
LAYERS = ("conv1", "conv2", "fc1", "fc2", "*")


def int_range(low: int, high: int) -> st.SearchStrategy[IntDistribution]:
    return st.builds(
        lambda ends, step: IntDistribution(ends[0], ends[0] + (ends[1] - ends[0]) // step * step, step=step),
        st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted),
        st.integers(1, 3),
    )


WIDTHS = int_range(1, 8) | st.permutations([1, 2, 3, 4, 8]).flatmap(
    lambda order: st.integers(1, 5).map(lambda n: CategoricalDistribution(order[:n]))
)
BITS = st.dictionaries(
    st.builds("bits/{}/{}".format, st.sampled_from(LAYERS), st.sampled_from(["weight", "activation"])), WIDTHS
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "optimizer/lr": st.builds(FloatDistribution, st.floats(1e-4, 1e-2), st.floats(0.011, 1), log=st.booleans()),
        "optimizer/momentum": st.sampled_from([(0.21, 0.07), (0.3, 0.1), (0.9, 0.3)]).map(
            lambda ends: FloatDistribution(0.0, ends[0], step=ends[1])
        ),
        "training/batch_size": int_range(7, 300),
        "optimizer/name": st.sampled_from([["adam", "sgd"], ["adam", "adamw"]]).map(CategoricalDistribution),
    },
)
SPACES = st.builds(lambda bits, others: bits | others, BITS, OTHERS)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether Optuna agrees that a value lies in the distribution."""
    return bool(distribution._contains(distribution.to_internal_repr(value)))


def widths_of(space: dict[str, BaseDistribution]) -> set[int]:
    return {width for name, d in space.items() if name.startswith("bits/") for width in choices(d, limit=64)}


def nearest(distribution: BaseDistribution, width: int) -> int:
    """Brute force; the narrower of two that are equally near."""
    return min(sorted(choices(distribution, limit=64)), key=lambda value: abs(value - width))


def bits_at(space: dict[str, BaseDistribution], weight: int, activation: int) -> dict[str, int]:
    width = {"weight": weight, "activation": activation}
    return {name: nearest(d, width[name.rsplit("/", 1)[1]]) for name, d in space.items() if name.startswith("bits/")}


def bits_in(proposal: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in proposal.items() if name.startswith("bits/")}


@law
@given(space=SPACES, trials=st.integers(1, 120))
def test_every_first_proposal_is_the_uniform_configuration_nearest_to_some_pair_of_widths(
    space: dict[str, BaseDistribution], trials: int
) -> None:
    widths = widths_of(space)
    uniform = [bits_at(space, w, a) for w in widths for a in widths]
    for proposal in uniform_proposals(space, BASE, trials):
        assert proposal.keys() == space.keys()
        assert bits_in(proposal) in uniform


@law
@given(space=SPACES, trials=st.integers(1, 120))
def test_no_first_proposal_comes_twice_and_together_they_are_half_of_the_trials_or_the_diagonal(
    space: dict[str, BaseDistribution], trials: int
) -> None:
    found = uniform_proposals(space, BASE, trials)
    assert all(proposal not in found[:i] for i, proposal in enumerate(found))
    assert len(found) <= max(len(widths_of(space)), trials // 2)


@law
@given(space=SPACES, trials=st.integers(1, 120))
def test_the_diagonal_comes_first_and_complete(space: dict[str, BaseDistribution], trials: int) -> None:
    diagonal = [bits_at(space, width, width) for width in widths_of(space)]
    distinct = [bits for i, bits in enumerate(diagonal) if bits not in diagonal[:i]]
    first = [bits_in(proposal) for proposal in uniform_proposals(space, BASE, trials)[: len(distinct)]]
    assert all(bits in first for bits in distinct)


@law
@given(space=SPACES, trials=st.integers(1, 120))
def test_values_lie_in_their_distributions(space: dict[str, BaseDistribution], trials: int) -> None:
    drawn = [random_values(space, random.Random(trials))]
    for values in [*uniform_proposals(space, BASE, trials), *corners(space), cheapest(space), *drawn]:
        assert values.keys() == space.keys()
        assert all(contains(space[name], value) for name, value in values.items())


@law
@given(bits=BITS.filter(len), trials=st.integers(2, 50))
def test_other_parameters_stay_where_the_base_configuration_has_them(
    bits: dict[str, BaseDistribution], trials: int
) -> None:
    space = bits | {
        "optimizer/lr": FloatDistribution(1e-3, 1e-1, log=True),
        "optimizer/name": CategoricalDistribution(["adam", "sgd"]),
        "training/batch_size": IntDistribution(16, 128, step=16),
    }
    wanted = {"optimizer/lr": 0.05, "optimizer/name": "sgd", "training/batch_size": 64}
    for proposal in uniform_proposals(space, merged(BASE, wanted), trials):
        assert {name: proposal[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("distribution", "value"),
    [
        (FloatDistribution(1e-4, 1e-2, log=True), 1e-3),
        (FloatDistribution(0.2, 0.4), 0.3),
        (FloatDistribution(0.2, 1.0, step=0.2), 0.6),
        (IntDistribution(2, 9), 6),
        (IntDistribution(2, 8, step=3), 5),
        (CategoricalDistribution(["a", "b"]), "a"),
    ],
)
def test_a_parameter_whose_range_lacks_the_base_value_starts_in_the_middle(
    distribution: BaseDistribution, value: Any
) -> None:
    space = {"bits/*/weight": IntDistribution(4, 4), "optimizer/warmup": distribution}
    (proposal,) = uniform_proposals(space, merged(BASE, {"optimizer/warmup": 77}), 10)
    assert proposal["optimizer/warmup"] == pytest.approx(value)


def test_the_ends_of_the_diagonal_come_first_then_the_rest_nearest_to_it() -> None:
    space = resolve(Sweep(space="uniform")).space
    pairs = [tuple(proposal.values()) for proposal in uniform_proposals(space, BASE, 98)]
    assert pairs[:7] == [(width, width) for width in ORDER]
    assert len(pairs) == 49
    distances = [abs(w - a) for w, a in pairs]
    assert distances == sorted(distances)


@pytest.mark.parametrize(("trials", "expected"), [(1, 7), (14, 7), (20, 10), (98, 49), (1000, 49)])
def test_uniform_proposals_are_half_of_the_trials_but_never_less_than_the_diagonal(trials: int, expected: int) -> None:
    assert len(uniform_proposals(resolve(Sweep(space="uniform")).space, BASE, trials)) == expected


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_with_one_role_to_search_every_width_is_on_the_diagonal(role: str) -> None:
    space = {f"bits/*/{role}": IntDistribution(2, 8)}
    assert uniform_proposals(space, BASE, 2) == [{f"bits/*/{role}": width} for width in ORDER]


@pytest.mark.parametrize("space", [{}, {"optimizer/lr": FloatDistribution(0.1, 1)}])
def test_a_space_without_bits_has_no_uniform_proposals(space: dict[str, BaseDistribution]) -> None:
    assert uniform_proposals(space, BASE, 10) == []


@law
@given(space=SPACES)
def test_the_corners_are_the_ends_and_every_choice(space: dict[str, BaseDistribution]) -> None:
    seen: dict[str, list[Any]] = {name: [] for name in space}
    for corner in corners(space):
        for name, value in corner.items():
            seen[name].append(value)
    for name, distribution in space.items():
        ends = choices(distribution, limit=64)
        wanted = ends if isinstance(distribution, CategoricalDistribution) else [ends[0], ends[-1]]
        assert all(value in seen[name] for value in wanted)


@pytest.mark.parametrize("name", ["uniform", "per_layer", "per_block", "all_layers", "training"])
@pytest.mark.parametrize("model", ["lenet5", "resnet20"])
def test_the_corners_of_our_spaces_are_valid_configurations(name: str, model: str) -> None:
    found = resolve(Sweep(space=name, model=model))
    for corner in corners(found.space):
        assert resolve_bits(parse(merged(found.base, corner)), found.table).keys() == {
            row.name for row in found.table.quantizable
        }


@law
@given(values=st.fixed_dictionaries({f"bits/{layer}/weight": st.integers(2, 8) for layer in ("conv2", "fc1")}))
def test_no_configuration_costs_less_than_the_cheapest(values: dict[str, int]) -> None:
    space = {name: IntDistribution(2, 8) for name in values}
    least, other = cost_of(merged(BASE, cheapest(space))), cost_of(merged(BASE, values))
    assert least.bops <= other.bops
    assert least.size_bytes <= other.size_bytes


BITS_OF_LENET = st.fixed_dictionaries(
    {
        **{f"bits/{layer}/weight": st.integers(2, 8) for layer in ("conv1", "conv2", "fc1", "fc2")},
        **{f"bits/{layer}/activation": st.integers(2, 8) for layer in ("conv2", "fc1", "fc2")},
    }
)


@law
@given(values=BITS_OF_LENET)
def test_a_cost_is_what_the_convention_says_of_the_layer_table(values: dict[str, int]) -> None:
    tree = merged(BASE, values)
    table = layer_table(parse(tree))
    bits = resolve_bits(parse(tree), table)
    found = cost_of(tree)
    assert found.bops == trainables_cost.bops(table, bits)
    assert found.relative_bops == trainables_cost.relative_bops(table, bits)
    assert found.size_bytes == trainables_cost.size_bytes(table, bits)
    assert found.bits == {name: [w.weight, w.activation] for name, w in bits.items()}
    assert found.bits["conv2"] == [values["bits/conv2/weight"], values["bits/conv2/activation"]]


@law
@given(weight=st.integers(2, 8), activation=st.integers(2, 8))
def test_a_pattern_and_the_layers_it_names_are_the_same_computation(weight: int, activation: int) -> None:
    pattern = merged(BASE, {"bits/*/weight": weight, "bits/*/activation": activation})
    named = merged(
        BASE,
        {
            f"bits/{layer}/{role}": width
            for layer in ("fc1", "conv2")
            for role, width in (("activation", activation), ("weight", weight))
        },
    )
    assert cost_of(pattern) == cost_of(named)


@law
@given(one=BITS_OF_LENET, other=BITS_OF_LENET)
def test_two_costs_share_a_digest_only_if_their_bits_are_equal(one: dict[str, int], other: dict[str, int]) -> None:
    first, second = cost_of(merged(BASE, one)), cost_of(merged(BASE, other))
    assert (first.digest == second.digest) == (first.bits == second.bits)


@pytest.mark.parametrize(
    "change", [{"optimizer/lr": 0.123}, {"seed": 1}, {"training/epochs": 9}, {"method/per_channel": True}]
)
def test_whatever_changes_the_training_changes_the_digest(change: dict[str, Any]) -> None:
    assert cost_of(merged(BASE, change)).digest != cost_of(BASE).digest


def test_the_cost_of_what_is_no_configuration_is_an_error() -> None:
    with pytest.raises(ConfigError, match="bits/fc1/weight = 9"):
        cost_of(merged(BASE, {"bits/fc1/weight": 9}))


COST = Cost(digest="", bops=1000, relative_bops=0.5, size_bytes=200, bits={})


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, ""),
        ({"max_bops": 1000, "max_relative_bops": 0.5, "max_size_bytes": 200}, ""),
        ({"max_bops": 999}, "1000 BOPs (limit 999)"),
        ({"max_relative_bops": 0.25}, "0.5 relative BOPs (limit 0.25)"),
        ({"max_size_bytes": 199.5}, "200 bytes (limit 199.5)"),
        ({"max_bops": 0}, "1000 BOPs (limit 0)"),
        ({"max_bops": 1, "max_size_bytes": 2}, "1000 BOPs (limit 1), 200 bytes (limit 2)"),
    ],
)
def test_a_cost_says_which_limits_it_breaks(limits: dict[str, float], words: str) -> None:
    assert COST.over(limits_of(small_sweep(**limits))) == words


@law
@given(space=st.dictionaries(st.sampled_from(["a", "b"]), int_range(0, 4) | st.just(CategoricalDistribution("xyz"))))
def test_the_size_of_a_space_counts_its_configurations(space: dict[str, BaseDistribution]) -> None:
    generator = random.Random(0)
    drawn = {tuple(random_values(space, generator).values()) for _ in range(400)}
    assert cardinality(space) == len(drawn)


@pytest.mark.parametrize(
    ("distribution", "size"),
    [
        (FloatDistribution(0, 0.3, step=0.1), 4),
        (FloatDistribution(0, 1), math.inf),
        (IntDistribution(1, 10**12), 10**12),
        (IntDistribution(1, 9, step=4), 3),
    ],
)
def test_steps_are_counted_and_what_is_continuous_has_no_end(distribution: BaseDistribution, size: float) -> None:
    assert cardinality({"x": distribution}) == size


def test_random_configurations_depend_on_their_generator_alone() -> None:
    space = {"x": FloatDistribution(1e-3, 1, log=True), "y": IntDistribution(1, 10**12)}
    first, again, other = (random_values(space, random.Random(seed)) for seed in (3, 3, 4))
    assert first == again != other
