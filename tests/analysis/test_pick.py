"""Picking against the sentence that defines it, spelled out as a loop over points."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.pick import pick

points = st.lists(
    st.fixed_dictionaries(
        {
            "accuracy": st.sampled_from([0.25, 0.5, 0.75]),
            "bops": st.integers(1, 4),
            "size_bytes": st.integers(1, 4),
        }
    ),
    min_size=1,
    max_size=12,
).map(
    lambda rows: [{**row, "trial": trial, "relative_bops": row["bops"] / 4} for trial, row in enumerate(reversed(rows))]
)
limits = st.fixed_dictionaries(
    {},
    optional={
        "max_bops": st.integers(0, 4),
        "max_relative_bops": st.sampled_from([0, 0.25, 0.75, 1]),
        "max_size_bytes": st.integers(0, 4),
        "min_accuracy": st.sampled_from([0, 0.5, 0.75, 1]),
    },
)


def fits(point, limits):
    return all(
        point[name.removeprefix("max_")] <= limit if name.startswith("max_") else point["accuracy"] >= limit
        for name, limit in limits.items()
    )


def best(points, limits):
    """The definition: filter, then the first in lexicographic order of what matters."""
    chosen = [point for point in points if fits(point, limits)]
    if list(limits) == ["min_accuracy"]:
        return min(chosen, key=lambda p: (p["bops"], p["size_bytes"], -p["accuracy"], p["trial"]), default=None)
    return min(chosen, key=lambda p: (-p["accuracy"], p["bops"], p["size_bytes"], p["trial"]), default=None)


@given(points, limits)
def test_pick_agrees_with_its_definition(points, limits):
    expected = best(points, limits)
    frame = pd.DataFrame(points)
    if expected is not None:
        assert pick(frame, **limits).to_dict() == expected
        return
    with pytest.raises(ValueError, match="no point fits") as caught:
        pick(frame, **limits)
    alone = [name for name, limit in limits.items() if best(points, {name: limit}) is None]
    if alone:
        assert [name for name in limits if name in str(caught.value)] == alone
    else:
        assert "together" in str(caught.value)


@given(points, limits, st.integers(0, 11))
def test_a_point_that_fits_nothing_changes_nothing_when_it_is_removed(points, limits, position):
    frame = pd.DataFrame(points)
    position %= len(points)
    if fits(points[position], limits) or best(points, limits) is None:
        return
    assert pick(frame.drop(index=position), **limits).equals(pick(frame, **limits))


FRAME = pd.DataFrame(
    {
        "trial": [3, 7, 5],
        "accuracy": [0.97, 0.9, 0.95],
        "bops": [400_000_000, 100_000_000, 200_000_000],
        "relative_bops": [0.04, 0.01, 0.02],
        "size_bytes": [60_000, 21_504, 30_000],
    }
)


@pytest.mark.parametrize(
    ("limits", "trial"),
    [
        ({}, 3),
        ({"max_bops": 4e8}, 3),
        ({"max_bops": 399_999_999}, 5),
        ({"max_relative_bops": 0.02}, 5),
        ({"max_size_bytes": 22_000}, 7),
        ({"min_accuracy": 0.9}, 7),
        ({"min_accuracy": 0.91}, 5),
        ({"min_accuracy": 0.9, "max_size_bytes": 60_000}, 3),
    ],
)
def test_pick_of_a_small_front(limits, trial):
    assert pick(FRAME, **limits)["trial"] == trial


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"max_size_bytes": 20_000, "max_bops": 4e8},
            "no point fits max_size_bytes = 20 000: the smallest point has 21 504 bytes (trial 7)",
        ),
        ({"max_bops": 5}, "no point fits max_bops = 5: the cheapest point has 100 000 000 BOPs (trial 7)"),
        (
            {"max_relative_bops": 0.005},
            "no point fits max_relative_bops = 0.005: the cheapest point has relative BOPs of 0.01 (trial 7)",
        ),
        (
            {"min_accuracy": 0.99},
            "no point fits min_accuracy = 0.99: the most accurate point has accuracy 0.9700 (trial 3)",
        ),
        (
            {"max_bops": 1, "max_size_bytes": 1},
            "no point fits max_bops = 1: the cheapest point has 100 000 000 BOPs (trial 7); "
            "no point fits max_size_bytes = 1: the smallest point has 21 504 bytes (trial 7)",
        ),
        (
            {"max_size_bytes": 29_000, "min_accuracy": 0.94, "max_bops": 4e8},
            "no point fits max_size_bytes = 29 000 and min_accuracy = 0.94 together: "
            "the nearest has 30 000 bytes, accuracy 0.9500 (trial 5)",
        ),
    ],
)
def test_when_nothing_fits_the_binding_limits_and_the_nearest_point_are_named(limits, message):
    with pytest.raises(ValueError) as caught:
        pick(FRAME, **limits)
    assert str(caught.value) == message


def test_the_nearest_point_is_named_with_its_run():
    with pytest.raises(ValueError, match=r"\(run a, trial 7\)"):
        pick(FRAME.assign(run="a"), max_bops=1)


@pytest.mark.parametrize("name", ["max_bops", "max_relative_bops", "max_size_bytes", "min_accuracy"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_limit_that_is_negative_or_not_finite_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} = .*: give a number >= 0"):
        pick(FRAME, **{name: value})


@pytest.mark.parametrize("name", ["max_relative_bops", "min_accuracy"])
def test_a_share_above_one_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 5: give a share within 0..1"):
        pick(FRAME, **{name: 5})


def test_a_limit_on_a_column_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="have no column size_bytes"):
        pick(FRAME.drop(columns="size_bytes"), max_size_bytes=5)


def test_nothing_can_be_picked_from_an_empty_front():
    with pytest.raises(ValueError, match="no points to pick from: no trial is complete"):
        pick(FRAME.iloc[:0])
