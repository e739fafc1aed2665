"""Limits, repair, and what samplers hear of limits that only training tells."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from analysis.allocate import allocate
from analysis.integer_program import Limit as Bound
from raysearch.errors import SweepError
from raysearch.limits import Limit, broken, excesses, limits_of
from raysearch.resolve import resolve
from raysearch.search.ledger import Ledger
from raysearch.search.proposals import Cost, cheapest, cost_of, random_values
from raysearch.search.repair import Repair, _damage
from raysearch.sweep import Resolved, Sweep
from tests.raysearch.builders import make_run, small_sweep
from trainables.config import merged

NETWORKS = [
    ("lenet5", "digits"),
    ("vgg7", "cifar10"),
    ("resnet20", "cifar10"),
    ("mobilenet_v1", "cifar10"),
    ("resnet18", "cifar10"),
]
BUDGETS = 200
"""Random ones of each network: 1000 in all."""
KINDS = (("bops",), ("size_bytes",), ("relative_bops",), ("bops", "size_bytes"))


@cache
def searched(model: str, data: str, space: str = "all_layers") -> Resolved:
    return resolve(Sweep(model=model, data=data, space=space))


@cache
def least_of(model: str, data: str) -> Cost:
    resolved = searched(model, data)
    return cost_of(merged(resolved.base, cheapest(resolved.space)))


def budget(
    network: tuple[str, str], generator: random.Random, kinds: tuple[str, ...]
) -> tuple[dict[str, Any], Cost, list[Limit]]:
    """A random configuration, its cost, and limits between that of the cheapest one and its own."""
    resolved, least = searched(*network), least_of(*network)
    values = random_values(resolved.space, generator)
    cost, share = cost_of(merged(resolved.base, values)), generator.random()
    return values, cost, [Limit(k, getattr(least, k) + share * (getattr(cost, k) - getattr(least, k))) for k in kinds]


@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
def test_a_proposal_over_a_random_budget_is_repaired_to_within_it(network: tuple[str, str]) -> None:
    resolved, generator = searched(*network), random.Random(0)
    repair = Repair(resolved.space, resolved.base)
    for number in range(BUDGETS):
        values, cost, limits = budget(network, generator, KINDS[number % 3])
        found = repair(values, cost, limits)
        assert found is not None
        assert cost_of(merged(resolved.base, found)).over(tuple(limits)) == ""
        assert all(found[name] <= values[name] for name in values)


@pytest.mark.parametrize("network", NETWORKS, ids="-".join)
def test_a_repair_hurts_as_little_as_the_exact_program_says(network: tuple[str, str]) -> None:
    """The optimum by another solver (HiGHS) over each layer's own choices."""
    resolved, generator = searched(*network), random.Random(1)
    for number in range(4):
        values, cost, limits = budget(network, generator, KINDS[number])
        repair = Repair(resolved.space, resolved.base)
        layout = repair._layout(merged(resolved.base, values), values, cost)
        row = np.array([values[a] for a in layout.addresses], dtype=float)
        found = repair(values, cost, limits)
        assert found is not None
        harm = _damage(np.array([[found[a] for a in layout.addresses]]), row, layout.prior)
        scores: Any = [_damage(g.options, row[g.columns], layout.prior[g.columns]) for g in layout.groups]
        bounds = []
        for limit in limits:
            kind = "size_bytes" if limit.name == "size_bytes" else "bops"
            per_unit = cost.relative_bops / cost.bops if limit.name == "relative_bops" else 1.0
            amounts = [group.amounts[kind] * per_unit for group in layout.groups]
            places = [(group.options == row[group.columns]).all(axis=1).argmax() for group in layout.groups]
            here = sum(table[place] for table, place in zip(amounts, places, strict=True))
            at_most = limit.bound - (getattr(cost, limit.name) - here)
            bounds.append(Bound(name=limit.name, amounts=amounts, at_most=at_most))
        assert harm[0] <= allocate(scores, bounds).score * 1.01 + 1e-9


def test_a_proposal_within_the_limits_is_left_alone() -> None:
    resolved = searched("lenet5", "digits")
    values = random_values(resolved.space, random.Random(3))
    cost = cost_of(merged(resolved.base, values))
    limits = [Limit("bops", cost.bops), Limit("size_bytes", cost.size_bytes)]
    assert Repair(resolved.space, resolved.base)(values, cost, limits) == values


def test_what_no_width_can_keep_is_not_repaired() -> None:
    resolved = searched("lenet5", "digits")
    values = dict.fromkeys(resolved.space, 8)
    least = cost_of(merged(resolved.base, cheapest(resolved.space))).bops
    cost = cost_of(merged(resolved.base, values))
    assert Repair(resolved.space, resolved.base)(values, cost, [Limit("bops", least - 1)]) is None


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_parameters_that_hang_together_are_repaired_too(seed: int, share: float) -> None:
    """A weight width for each layer beside one activation width for all of them: too many joint choices to table."""
    rows, base = searched("resnet20", "cifar10").table.quantizable, searched("resnet20", "cifar10").base
    space = {f"bits/{row.name}/weight": IntDistribution(2, 8) for row in rows}
    space |= {"bits/*/activation": CategoricalDistribution((2, 4, 8))}
    values = random_values(space, random.Random(seed))
    least, most = (cost_of(merged(base, v)).bops for v in (cheapest(space), values))
    limits = (Limit("bops", least + share * (most - least)),)
    found = Repair(space, base)(values, cost_of(merged(base, values)), limits)
    assert found is not None
    assert cost_of(merged(base, found)).over(limits) == ""


def test_other_parameters_than_bits_are_kept() -> None:
    resolved = searched("lenet5", "digits", "training")
    values = random_values(resolved.space, random.Random(0)) | {"bits/*/weight": 8, "bits/*/activation": 8}
    cost = cost_of(merged(resolved.base, values))
    found = Repair(resolved.space, resolved.base)(values, cost, [Limit("bops", cost.bops * 0.9)])
    assert found is not None
    assert {name for name in values if found[name] != values[name]} <= {"bits/*/weight", "bits/*/activation"}
    assert found != values


@pytest.mark.parametrize("sampler", ["random", "tpe", "nsga2"])
def test_under_a_tight_budget_samplers_are_repaired_and_nothing_over_it_is_proposed(
    tmp_path: Path, sampler: str
) -> None:
    sweep = small_sweep(space="all_layers", sampler=sampler, max_relative_bops=0.008, trials=12)
    folder, resolved = make_run(tmp_path / "run", sweep)
    ledger = Ledger(folder, resolved)
    proposals = [ledger.propose() for _ in range(12)]
    assert [p.cost.over(ledger.limits) for p in proposals] == [""] * 12
    repaired = [p for p in proposals if p.repaired]
    assert repaired
    assert {p.source for p in repaired} <= {sampler, "random"}
    again = Ledger(folder, resolved)
    assert [(p.params, p.repaired) for p in again.interrupted] == [(p.params, p.repaired) for p in proposals]


def test_what_only_training_tells_is_a_constraint_of_the_study(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "run", small_sweep(sampler="tpe", min_accuracy=0.9, max_size_bytes=1e6))
    ledger = Ledger(folder, resolved)
    assert [limit.name for limit in ledger.learned] == ["accuracy"]
    first = ledger.propose()
    missed = [excesses(ledger.learned, {"accuracy": accuracy}) for accuracy in (0.45, 0.9)]
    assert missed == [{"accuracy>=": pytest.approx(0.5)}, {"accuracy>=": 0}]
    ledger.tell(first.number, TrialState.COMPLETE, [[0.45, 1e6, 1e3], [0.9, 2e6, 2e3]], "", missed)
    for each in (ledger, Ledger(folder, resolved)):
        assert each._disk.get_trials()[0].constraints == missed[0]
        ended = [t.constraints for t in each._twin.study.get_trials() if t.state == TrialState.COMPLETE]
        assert ended == missed
    assert ledger.propose() is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_accuracy": 1.2}, "min_accuracy = 1.2: an accuracy, 0..1"),
        ({"limits": ["latency<12"]}, "limit 'latency<12': write NAME<=VALUE or NAME>=VALUE"),
        ({"limits": ["bops<=12"]}, "limit 'bops<=12': bops is no measure of this sweep; use max_bops"),
        ({"limits": ["x<=12"]}, "limit 'x<=12': x is no measure of this sweep; name it among the measures"),
        ({"reference": {"latency": 3}}, "reference latency = 3: a number for one of accuracy, bops, size_bytes"),
        ({"measures": {"seed": "a.b"}}, "measure 'seed': a name of letters, digits and _, none of a record's own"),
        ({"measures": {"ms": "x.py"}, "limits": ["mss<=1"]}, "mss is no measure of this sweep; did you mean 'ms'?"),
    ],
    ids=str,
)
def test_a_limit_that_cannot_be_kept_track_of_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SweepError) as caught:
        resolve(Sweep(**changes))
    assert words in str(caught.value)


def test_limits_speak_of_what_breaks_them() -> None:
    limits = limits_of(Sweep(max_bops=100, min_accuracy=0.5, measures={"ms": "x.py"}, limits=["ms<=2", "ms>=1"]))
    found = broken(limits, {"bops": 101, "accuracy": 0.5, "ms": 0.5})
    assert [limit.words(value) for limit, value in found.items()] == ["101 BOPs (limit 100)", "0.5 ms (limit 1)"]
