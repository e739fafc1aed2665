"""Attainment surfaces and accuracies at equal cost, against definitions that are slow and plain."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from analysis import confidence
from analysis.compare import at_equal_cost, attained, attainment, hypervolume_bands, levels

run = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=8).map(
    lambda rows: pd.DataFrame({"bops": [b for b, _ in rows], "accuracy": [a / 20 for _, a in rows]})
)
runs = st.lists(run, min_size=1, max_size=5)


@given(runs, st.integers(1, 21))
def test_a_surface_is_what_so_many_runs_attain(all_runs, cost):
    surfaces = attainment(all_runs, "bops")
    at = surfaces[surfaces.index <= cost]
    found = [attained(each, "bops", cost) for each in all_runs]
    ranked = sorted((math.nan if a is None else a for a in found), key=lambda a: -1 if math.isnan(a) else a)[::-1]
    expected = {"best": ranked[0], "median": ranked[math.ceil(len(ranked) / 2) - 1], "worst": ranked[-1]}
    for name, value in expected.items():
        shown = math.nan if at.empty else float(at[name].iloc[-1])
        assert shown == value or (math.isnan(shown) and math.isnan(value))


@given(runs)
def test_surfaces_rise_with_the_cost_and_lie_above_one_another(all_runs):
    surfaces = attainment(all_runs, "bops")
    assert (surfaces.ffill().diff().dropna() >= 0).all().all()
    known = surfaces.dropna()
    assert (known["best"] >= known["median"]).all()
    assert (known["median"] >= known["worst"]).all()


@given(runs)
def test_a_surface_names_only_costs_at_which_something_changes(all_runs):
    inner = attainment(all_runs, "bops").iloc[1:-1]
    assert not inner.duplicated(keep=False).any() or len(inner) < 2


def test_a_mean_needs_every_seed():
    cheap, dear = (pd.DataFrame({"bops": [b], "accuracy": [a]}) for b, a in ((1, 0.5), (3, 0.9)))
    assert at_equal_cost([cheap, dear], "bops", 2).mean is None
    assert at_equal_cost([cheap, dear], "bops", 2).interval is None
    assert at_equal_cost([cheap, dear], "bops", 3).mean == pytest.approx(0.7)
    assert at_equal_cost([cheap], "bops", 0) == ((), 1)


@pytest.mark.parametrize(
    ("costs", "unit", "expected"),
    [
        ([1, 1000], 1, [1, 5, 20, 50, 200, 1000]),
        ([3, 4], 1, [4]),
        ([1024, 6000], 1024, [1024, 2048, 5120]),
        ([0], 1, []),
    ],
)
def test_levels_are_round_and_among_the_costs(costs, unit, expected):
    assert levels([pd.DataFrame({"bops": costs})], "bops", unit) == expected


def test_hypervolumes_of_seeds_are_compared_as_far_as_all_of_them_go():
    histories = [pd.DataFrame({"hypervolume": values}) for values in ([0.1, 0.3, 0.5], [0.3, 0.5])]
    bands = hypervolume_bands(histories)
    assert list(bands.index) == [1, 2]
    assert np.allclose(bands[["low", "mean", "high"]], [[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])


@given(st.integers(1, 5000), st.floats(0, 1))
def test_a_wilson_interval_holds_the_share_and_narrows_with_more_images(count, share):
    share = round(share * count) / count
    low, high = confidence.of_share(share, count)
    wider_low, wider_high = confidence.of_share(share, 10 * count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert wider_high - wider_low <= high - low + 1e-12


def test_a_wilson_interval_is_near_the_exact_one():
    low, high = confidence.of_share(0.97, 1000)
    assert (low, high) == pytest.approx((beta.ppf(0.025, 970, 31), beta.ppf(0.975, 971, 30)), abs=2e-3)


def test_one_seed_has_no_interval():
    assert confidence.of_mean([0.5]) is None
