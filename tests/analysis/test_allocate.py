"""Allocations: brute force on small tables, the ladder against the exact solver, limits that cannot be met."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.allocate import allocate, alternatives, bops, linear_scores, mean_bits, size_bytes
from analysis.integer_program import Allocation, InfeasibleError, Limit
from analysis.ladder import ladder

WIDTHS = [2, 4, 8]


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Scores, and amounts of two resources: random, of few distinct values (hence ties) or falling with width."""
    layers, options = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    seed, kind = draw(st.integers(0, 10_000)), draw(st.sampled_from(["random", "ties", "falling"]))
    rng = np.random.default_rng(seed)
    shape = (layers, options)
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(float), rng.integers(0, 4, shape), rng.integers(0, 4, shape), seed
    scores, amounts = rng.random(shape) * 10 ** rng.uniform(-8, 8), rng.random(shape) * 10 ** rng.uniform(-3, 9)
    if kind == "falling":
        scores, amounts = -np.sort(-scores, axis=1), np.sort(amounts, axis=1)
    return scores, amounts, rng.random(shape), seed


def brute_force(scores: np.ndarray, limits: list[Limit]) -> float:
    """The least score of all choices within the limits; infinite if there is none."""
    best = math.inf
    for choice in itertools.product(*[range(len(row)) for row in scores]):
        rows = np.arange(len(choice))
        used = [float(np.asarray(limit.amounts, dtype=float)[rows, choice].sum()) for limit in limits]
        slacks = [1e-9 * float(np.abs(limit.amounts).max()) for limit in limits]
        if all(a.at_least - s <= u <= a.at_most + s for a, u, s in zip(limits, used, slacks, strict=True)):
            best = min(best, float(scores[rows, choice].sum()))
    return best


def near(score: float, scores: np.ndarray) -> float:
    """Equal up to what HiGHS resolves: a share of the largest spread of scores."""
    return pytest.approx(score, rel=1e-9, abs=1e-9 * max(float(np.ptp(scores)), 1e-300))


def check(allocation: Allocation, scores: np.ndarray, limits: list[Limit]) -> None:
    rows = np.arange(len(scores))
    assert allocation.score == pytest.approx(float(np.asarray(scores)[rows, allocation.options].sum()))
    for limit in limits:
        used = float(np.asarray(limit.amounts, dtype=float)[rows, allocation.options].sum())
        slack = 1e-9 * float(np.abs(limit.amounts).max())
        assert allocation.used[limit.name] == pytest.approx(used)
        assert limit.at_least - slack <= used <= limit.at_most + slack


@settings(max_examples=60, deadline=None)
@given(table=tables(), tightness=st.floats(0, 1), other=st.floats(0.3, 1))
def test_an_allocation_is_the_best_of_all_choices_within_the_limits(table, tightness, other):
    scores, first, second, _ = table
    limits = []
    for name, amounts, share in (("first", first, tightness), ("second", second, other)):
        least, most = amounts.min(axis=1).sum(), amounts.max(axis=1).sum()
        limits.append(Limit(name=name, amounts=amounts, at_most=float(least + share * (most - least))))
    wanted = brute_force(scores, limits)
    if math.isinf(wanted):
        with pytest.raises(InfeasibleError, match="together"):
            allocate(scores, limits)
    else:
        best = allocate(scores, limits)
        check(best, scores, limits)
        assert best.score == near(wanted, scores)


@settings(max_examples=80, deadline=None)
@given(table=tables(), shares=st.lists(st.floats(0, 1.1), min_size=1, max_size=5))
def test_every_step_of_a_ladder_is_the_best_of_all_choices_within_its_budget(table, shares):
    scores, amounts, _, _ = table
    limit = Limit(name="amount", amounts=amounts)
    least, most = amounts.min(axis=1).sum(), amounts.max(axis=1).sum()
    budgets = [float(least + share * (most - least)) for share in shares]
    for budget, step in zip(budgets, ladder(scores, limit, budgets), strict=True):
        bounded = Limit(name="amount", amounts=amounts, at_most=budget)
        check(step, scores, [bounded])
        assert step.gap == 0
        assert step.score == pytest.approx(brute_force(scores, [bounded]), rel=1e-9, abs=1e-9 * float(np.ptp(scores)))


def realistic(layers: int, seed: int) -> tuple[np.ndarray, Limit]:
    """Thirty-six pairs of widths a layer, with errors that fall fourfold a bit."""
    rng = np.random.default_rng(seed)
    pairs = [(w, a) for w in (2, 3, 4, 5, 6, 8) for a in (2, 3, 4, 5, 6, 8)]
    macs, trace = rng.integers(10**6, 10**8, layers), rng.lognormal(0, 2, layers)
    noise = rng.lognormal(0, 0.3, (layers, 36, 2))
    falling = np.array([[4.0**-w, 4.0**-a] for w, a in pairs])
    scores = (trace[:, None, None] * noise * falling).sum(axis=2)
    return scores, bops(list(macs), [w for w, _ in pairs], [a for _, a in pairs], math.inf)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_a_ladder_agrees_with_the_solver_on_large_tables(seed, gap):
    scores, limit = realistic(12, seed)
    least, most = np.asarray(limit.amounts).min(axis=1).sum(), np.asarray(limit.amounts).max(axis=1).sum()
    budgets = np.geomspace(least * 1.01, most, 8)
    for budget, step in zip(budgets, ladder(scores, limit, budgets, gap=gap), strict=True):
        exact = allocate(scores, [Limit(name="bops", amounts=limit.amounts, at_most=budget)])
        assert step.gap <= gap
        assert exact.score * (1 - 1e-9) <= step.score <= exact.score * (1 + gap + 1e-9)
        assert step.score * (1 - step.gap) <= exact.score * (1 + 1e-9)


@pytest.mark.parametrize("layers", [3, 7, 11])
def test_a_budget_that_is_met_exactly_but_for_rounding_is_met(layers):
    scores = -np.outer(np.arange(1.0, layers + 1), [2, 4, 6])
    limit = mean_bits(layers, [2, 4, 6], 4)
    assert ladder(scores, limit, [4])[0].used["mean_bits"] == pytest.approx(4)
    assert allocate(scores, [limit]).used["mean_bits"] == pytest.approx(4)


def test_more_budget_never_scores_worse_and_all_of_it_takes_the_best_options():
    scores, limit = realistic(20, 0)
    budgets = np.geomspace(np.asarray(limit.amounts).min(axis=1).sum(), np.asarray(limit.amounts).max(axis=1).sum(), 30)
    found = [step.score for step in ladder(scores, limit, budgets)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(scores.min(axis=1).sum())


def test_a_ladder_keeps_other_limits_too():
    scores, limit = realistic(6, 1)
    amounts = np.asarray(limit.amounts)
    size = Limit(name="size", amounts=np.tile(np.repeat([2, 3, 4, 5, 6, 8], 6), (6, 1)), at_most=21)
    budgets = np.geomspace(amounts.min(axis=1).sum() * 1.5, amounts.max(axis=1).sum(), 4)
    for budget, step in zip(budgets, ladder(scores, limit, budgets, others=[size]), strict=True):
        limits = [Limit(name="bops", amounts=amounts, at_most=budget), size]
        check(step, scores, limits)
        assert step.score == pytest.approx(allocate(scores, limits).score, rel=1e-9)
    assert any(step.used["size"] == 21 for step in ladder(scores, limit, budgets, others=[size]))


# Limits


def test_the_limits_count_bits_bytes_and_operations():
    scores = np.zeros((2, 3))
    limits = [
        mean_bits(2, WIDTHS, math.inf),
        size_bytes([10, 100], WIDTHS, math.inf),
        bops([1000, 10], WIDTHS, WIDTHS, math.inf),
    ]
    used = allocate(scores, limits, forced={0: 0, 1: 2}).used
    assert used == {"mean_bits": 5.0, "size_bytes": (10 * 2 + 100 * 8) / 8, "bops": 1000 * 4 + 10 * 64}


def test_an_infeasible_budget_names_the_bound_and_what_is_missing():
    with pytest.raises(InfeasibleError, match=r"size_bytes <= 20: the least possible is 27\.5, 7\.5 more$"):
        allocate(np.zeros((2, 3)), [size_bytes([10, 100], WIDTHS, 20), mean_bits(2, WIDTHS, 8)])


def test_all_bounds_that_cannot_be_met_alone_are_named():
    wanted = r"size_bytes <= 20: the least .* 7\.5 more; mean_bits <= 1: the least possible is 2, 1 more$"
    with pytest.raises(InfeasibleError, match=wanted):
        allocate(np.zeros((2, 3)), [size_bytes([10, 100], WIDTHS, 20), mean_bits(2, WIDTHS, 1)])


def test_a_lower_bound_that_cannot_be_reached_is_named():
    fixed = Limit(name="sum_bits", amounts=np.tile(WIDTHS, (2, 1)), at_least=20, at_most=20)
    with pytest.raises(InfeasibleError, match="sum_bits >= 20: the most possible is 16, 4 less"):
        allocate(np.zeros((2, 3)), [fixed])


def test_bounds_that_can_be_met_alone_but_not_together_are_missed_by_the_least():
    low = Limit(name="up", amounts=[[0, 1], [0, 1]], at_most=0)
    high = Limit(name="down", amounts=[[1, 0], [3, 0]], at_most=1)
    with pytest.raises(InfeasibleError, match=r"together: the nearest choice misses (up <= 0 by 1|down <= 1 by 3)"):
        allocate(np.zeros((2, 2)), [low, high])


def test_a_sum_that_no_widths_give_is_missed_by_one():
    fixed = Limit(name="sum_bits", amounts=[[2, 4], [2, 4]], at_least=5, at_most=5)
    with pytest.raises(InfeasibleError, match=r"together: the nearest choice misses sum_bits (<=|>=) 5 by 1$"):
        allocate(np.zeros((2, 2)), [fixed])


def test_a_budget_of_a_ladder_below_the_least_is_named():
    with pytest.raises(InfeasibleError, match=r"mean_bits <= 1: the least possible is 2, 1 more"):
        ladder(np.zeros((3, 3)), mean_bits(3, WIDTHS, 0), [4, 1])


@pytest.mark.parametrize("row", [[math.inf, math.nan], []])
def test_a_layer_without_a_legal_option_is_named(row):
    with pytest.raises(ValueError, match="layer 1 has no legal option"):
        allocate([[1.0, 2.0], row])
    with pytest.raises(ValueError, match="layer 1 has no legal option"):
        ladder([[1.0, 2.0], row], Limit(name="x", amounts=[[1, 2], [1, 2][: len(row)] or [0, 0]]), [4])


def test_options_that_a_layer_lacks_are_never_taken():
    scores = [[5.0, math.inf, 1.0], [math.nan, 2.0, 9.0], [3.0]]
    best = allocate(scores, [Limit(name="n", amounts=[[1, 0, 9], [0, 1, 1], [4]], at_most=8)])
    assert best.options.tolist() == [0, 1, 0]
    assert ladder(scores, Limit(name="n", amounts=[[1, 0, 9], [0, 1, 1], [4]]), [8, 100])[1].options.tolist() == [
        2,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("amounts", "message"),
    [([[1, 2, 3]], r"amounts of n have shape \(1, 3\)"), ([[1, math.nan], [1, 2]], "not finite")],
)
def test_amounts_that_do_not_fit_the_scores_are_refused(amounts, message):
    with pytest.raises(ValueError, match=message):
        allocate(np.zeros((2, 2)), [Limit(name="n", amounts=amounts)])


# Pools


def test_nothing_is_forced_when_all_layers_have_the_same_option():
    found, infeasible = alternatives(np.array([[2.0, 1.0], [2.0, 1.0]]), [mean_bits(2, [4, 8], 8)])
    assert ([each.options.tolist() for each in found], infeasible) == ([[1, 1]], 0)


def test_forced_programs_that_are_infeasible_are_counted_and_change_no_later_one():
    fixed = Limit(name="sum", amounts=[[2, 8], [2, 8], [3, 3]], at_least=13, at_most=13)
    found, infeasible = alternatives(linear_scores([3.0, 1.0, 2.0], [2, 8]), [fixed])
    assert [each.options.tolist() for each in found] == [[1, 0, 1], [0, 1, 1], [1, 0, 0]]
    assert infeasible == 0
    found, infeasible = alternatives(
        np.array([[1.0, 0.0], [1.0, 9.0]]), [Limit(name="n", amounts=[[9, 1], [1, 9]], at_most=2)]
    )
    assert ([each.options.tolist() for each in found], infeasible) == ([[1, 0]], 1)


def test_the_published_objective_gives_sensitive_layers_the_most_bits_and_the_printed_one_the_fewest():
    limit = [mean_bits(2, [2, 8], 5)]
    assert allocate(linear_scores([1.0, 2.0], [2, 8]), limit).options.tolist() == [0, 1]
    least = Limit(name="n", amounts=np.tile([2, 8], (2, 1)), at_least=10)
    assert allocate(linear_scores([1.0, 2.0], [2, 8], printed=True), [least]).options.tolist() == [1, 0]
