"""Batches of mixtures: what is searched, what is proposed and never twice, limits, and what a search repeats."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution

from raysearch.search.proposals import Cost, contains, uniform_proposals
from raysearch.shared_weights.mixtures import Mixtures, Proposed, asked, mixture, mixture_space
from raysearch.sweep import Sweep
from tests.raysearch.builders import formula, law
from trainables.cost import Layer
from trainables.method import Choices

LAYERS = [
    Layer(name=f"l{i}", kind="conv", macs=100 * (i + 1), weights=10, biases=0, channels=2, first=i == 0, last=i == 3)
    for i in range(4)
]
CHOICES = {
    "l0": Choices(weight=(8,), activation=(8,)),
    "l1": Choices(weight=(8, 5, 2), activation=(8, 5, 2)),
    "l2": Choices(weight=(8, 5, 4), activation=(6, 4)),
    "l3": Choices(weight=(8,), activation=(8, 4)),
}
SPACE = mixture_space(CHOICES)
SIZE = 3 * 3 * 3 * 2 * 2


def cost(values: Mapping[str, Any]) -> Cost:
    widths = mixture(values, CHOICES)
    bops = sum(layer.macs * widths[layer.name][0] * widths[layer.name][1] for layer in LAYERS)
    size = sum(layer.weights * widths[layer.name][0] for layer in LAYERS)
    return Cost(str(widths), bops, bops / 1024 / sum(layer.macs for layer in LAYERS), size, widths)


def opened(**fields: Any) -> Mixtures:
    sweep = Sweep(**{"trials": 40, "sampler": "auto", **fields})
    uniform = [("uniform", values) for values in uniform_proposals(SPACE, {}, 0)]
    return Mixtures(SPACE, sweep, cost, uniform, asked(SPACE, CHOICES, LAYERS, sweep, cost, {}))


def outcome(proposal: Proposed) -> dict[str, float]:
    assert proposal.cost.bits is not None
    accuracy = formula(proposal.cost.bits)
    return {
        "accuracy": accuracy,
        "loss": 1 - accuracy,
        "bops": float(proposal.cost.bops or 0),
        "size_bytes": float(proposal.cost.size_bytes or 0),
    }


def hunt(mixtures: Mixtures, size: int = 8) -> list[Proposed]:
    """All proposals; each batch is proposed while the one before is measured, as in a search."""
    found: list[Proposed] = []
    before: list[Proposed] = []
    while True:
        batch = mixtures.batch(size)
        for proposal in before:
            mixtures.tell(proposal, outcome(proposal))
        found += batch
        before = batch
        if not batch:
            return found


def test_what_has_one_width_is_not_searched_and_keeps_it() -> None:
    assert set(SPACE) == {
        *(f"bits/{layer}/{role}" for layer in ("l1", "l2") for role in ("weight", "activation")),
        "bits/l3/activation",
    }
    assert SPACE["bits/l1/weight"] == IntDistribution(2, 8, step=3)
    assert SPACE["bits/l2/weight"] == CategoricalDistribution((4, 5, 8))
    assert mixture({"bits/l1/weight": 2}, CHOICES) == {"l0": [8, 8], "l1": [2, 8], "l2": [8, 6], "l3": [8, 8]}


@pytest.mark.parametrize("sampler", ["auto", "nsga2", "random"])
def test_every_mixture_is_proposed_once_until_none_is_left(sampler: str) -> None:
    found = hunt(opened(sampler=sampler, trials=1000))
    assert [each.number for each in found] == list(range(SIZE))
    assert len({tuple(each.values.items()) for each in found}) == SIZE
    assert all(contains(SPACE[name], value) for each in found for name, value in each.values.items())
    assert {each.source for each in found} <= {"uniform", "frontier", "random", sampler}
    assert [each.source for each in found[:3]] == ["uniform"] * 3


@pytest.mark.parametrize("sampler", ["auto", "nsga2", "tpe"])
def test_the_same_seed_and_results_give_the_same_search_and_another_seed_another(sampler: str) -> None:
    first, again, other = (
        [each.values for each in hunt(opened(sampler=sampler, seed=seed, trials=60))] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


@law
@given(share=st.floats(0.0, 1.0))
def test_nothing_over_a_limit_is_proposed(share: float) -> None:
    low = cost(dict.fromkeys(SPACE, 2) | {"bits/l2/weight": 4, "bits/l2/activation": 4, "bits/l3/activation": 4})
    limit = int(low.bops or 0) + share * 20_000
    found = hunt(opened(trials=30, max_bops=limit))
    assert found
    assert all((each.cost.bops or 0) <= limit for each in found)


def test_the_frontier_finds_a_better_front_than_chance() -> None:
    import numpy as np

    from analysis.pareto import hypervolume

    def volume(sampler: str) -> float:
        found = hunt(opened(sampler=sampler, trials=24))
        values = np.array([[1 - outcome(each)["accuracy"], (each.cost.bops or 0) / 64_000] for each in found])
        return float(hypervolume(values, np.ones(2)))

    assert volume("auto") > volume("random")


def test_a_mixture_whose_loss_is_no_number_does_not_end_the_search() -> None:
    for sampler in ("auto", "nsga2"):
        mixtures = opened(sampler=sampler, trials=24)
        for _ in range(6):
            for proposal in mixtures.batch(4):
                mixtures.tell(proposal, None if proposal.number % 3 == 0 else outcome(proposal))
        assert mixtures.proposed == 24


def test_an_objective_that_widths_say_nothing_of_is_left_to_evolution() -> None:
    sweep = Sweep(objectives={"accuracy": "max"})
    assert asked(SPACE, CHOICES, LAYERS, sweep, cost, {}).name == "nsga2"
