"""Fronts and hypervolumes against definitions that are too slow to use but too short to be wrong."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.pareto import hypervolume, hypervolume_history, non_dominated, oriented, scaled

SIDE = 4
"""Points of the laws lie on the grid 0..SIDE in every column; a coordinate SIDE is on the reference."""


@st.composite
def grids(draw, least_columns=1, most_columns=5, most=12):
    k = draw(st.integers(least_columns, most_columns))
    rows = draw(st.lists(st.tuples(*[st.integers(0, SIDE)] * k), max_size=most))
    return np.array(rows, dtype=float).reshape(len(rows), k)


def dominates(p, q):
    return bool((p <= q).all() and (p < q).any())


def cells_covered(values):
    """Hypervolume by its definition: unit cells of the grid whose lower corner some point is not above of."""
    cells = itertools.product(range(SIDE), repeat=values.shape[1])
    return sum(bool((values <= np.array(cell)).all(axis=1).any()) for cell in cells)


@given(grids())
def test_no_member_of_a_front_dominates_another(values):
    front = values[non_dominated(values)]
    assert not any(dominates(p, q) for p, q in itertools.permutations(front, 2))


@given(grids())
def test_every_outsider_is_dominated_or_repeats_an_earlier_member(values):
    mask = non_dominated(values)
    for position in np.flatnonzero(~mask):
        point = values[position]
        assert any(dominates(p, point) for p in values[mask]) or any(
            (p == point).all() for p in values[:position][mask[:position]]
        )


@given(grids(), st.randoms(use_true_random=False))
def test_the_values_on_a_front_do_not_depend_on_the_order_of_the_points(values, random):
    order = random.sample(range(len(values)), len(values))
    front, other = values[non_dominated(values)], values[order][non_dominated(values[order])]
    assert sorted(front.tolist()) == sorted(other.tolist())


@given(grids())
def test_a_front_is_its_own_front(values):
    assert non_dominated(values[non_dominated(values)]).all()


@given(st.lists(st.tuples(*[st.floats(-1e300, 1e300)] * 3), min_size=1, max_size=20))
def test_three_columns_agree_with_the_same_three_and_a_constant_fourth(rows):
    values = np.array(rows)
    padded = np.column_stack([values, np.zeros(len(values))])
    assert non_dominated(values).tolist() == non_dominated(padded).tolist()


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_no_points_have_an_empty_front_without_volume(columns):
    nothing = np.empty((0, columns))
    assert non_dominated(nothing).shape == (0,)
    assert hypervolume(nothing, np.ones(columns)) == 0.0


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_of_equal_points_the_first_stays(columns):
    assert non_dominated(np.ones((3, columns))).tolist() == [True, False, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_a_value_that_is_not_finite_is_refused_with_its_row(columns, bad):
    values = np.zeros((5, columns))
    values[3, columns - 1] = bad
    with pytest.raises(ValueError, match="row 3 is"):
        non_dominated(values)
    with pytest.raises(ValueError, match="row 3 is"):
        hypervolume(values, np.ones(columns))


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((3, 0)), np.zeros((1, 2, 3))])
def test_values_of_another_shape_are_refused(values):
    with pytest.raises(ValueError, match="a row for each point"):
        non_dominated(values)


@pytest.mark.parametrize("columns", [2, 3])
def test_no_point_of_the_front_of_a_million_is_dominated(columns):
    values = np.random.default_rng(0).random((1_000_000, columns))
    front = values[non_dominated(values)]
    assert 1 < len(front) < 1000
    assert non_dominated(front).all()


def test_hypervolume_of_a_staircase_of_a_million_steps():
    """Each step is a column of width 1, from its height to the reference."""
    count = 1_000_000
    steps = np.arange(count)
    values = np.column_stack([steps, count - 1 - steps])
    assert hypervolume(values, np.full(2, count)) == count * (count + 1) / 2


@settings(deadline=None)
@given(grids(most_columns=4))
def test_hypervolume_is_the_number_of_covered_cells(values):
    assert hypervolume(values, np.full(values.shape[1], SIDE)) == cells_covered(values)


@settings(deadline=None, max_examples=30)
@given(grids(least_columns=5, most=6))
def test_hypervolume_of_five_columns_is_the_number_of_covered_cells(values):
    assert hypervolume(values, np.full(5, SIDE)) == cells_covered(values)


@given(grids())
def test_hypervolume_never_falls_when_a_point_is_added(values):
    reference = np.full(values.shape[1], SIDE)
    volumes = [hypervolume(values[:count], reference) for count in range(len(values) + 1)]
    assert volumes == sorted(volumes)


@given(grids(), st.randoms(use_true_random=False))
def test_hypervolume_depends_neither_on_the_order_nor_on_dominated_points(values, random):
    reference = np.full(values.shape[1], SIDE)
    order = random.sample(range(len(values)), len(values))
    volume = hypervolume(values, reference)
    assert hypervolume(values[order], reference) == volume
    assert hypervolume(values[non_dominated(values)], reference) == volume


@given(grids(least_columns=2), st.randoms(use_true_random=False))
def test_hypervolume_does_not_depend_on_the_order_of_the_columns(values, random):
    k = values.shape[1]
    columns = random.sample(range(k), k)
    assert hypervolume(values[:, columns], np.full(k, SIDE)) == hypervolume(values, np.full(k, SIDE))


@settings(max_examples=50)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=6))
def test_hypervolume_of_floats_agrees_with_inclusion_and_exclusion(rows):
    boxes = 1 - np.array(rows)
    expected = sum(
        (-1) ** (count + 1) * boxes[list(subset)].min(axis=0).prod()
        for count in range(1, len(boxes) + 1)
        for subset in itertools.combinations(range(len(boxes)), count)
    )
    assert hypervolume(np.array(rows), np.ones(3)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "reference", "expected"),
    [
        ([[2.0], [3.0]], [5.0], 3.0),
        ([[1.0, 3.0], [2.0, 1.0]], [4.0, 4.0], 7.0),
        ([[1.0, 3.0], [2.0, 1.0], [0.0, 4.0], [9.0, 0.0]], [4.0, 4.0], 7.0),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [2.0, 2.0, 2.0], 7.0),
        ([[-1.0, -1.0, -1.0]], [1.0, 1.0, 1.0], 8.0),
        ([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], [2.0, 2.0, 2.0, 2.0], 12.0),
    ],
)
def test_hypervolume_of_small_examples_counted_by_hand(values, reference, expected):
    assert hypervolume(np.array(values), np.array(reference)) == expected


@pytest.mark.parametrize("reference", [[1.0], [1.0, 1.0, 1.0], [[1.0, 1.0]]])
def test_a_reference_of_another_length_is_refused(reference):
    with pytest.raises(ValueError, match=r"2 columns need \(2,\)"):
        hypervolume(np.zeros((1, 2)), np.array(reference))


def test_a_reference_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        hypervolume(np.zeros((1, 2)), np.array([1.0, np.inf]))


def test_oriented_negates_what_is_maximised_in_the_order_of_the_objectives():
    frame = pd.DataFrame({"accuracy": [0.5, None], "size_bytes": [10, 20]})
    columns = oriented(frame, {"size_bytes": "min", "accuracy": "max"})
    np.testing.assert_array_equal(columns, [[10.0, -0.5], [20.0, np.nan]])


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({}, "objectives are empty"),
        ({"acuracy": "max"}, "did you mean 'accuracy'"),
        ({"zzz": "min"}, "allowed are accuracy, loss"),
        ({"accuracy": "min"}, "its direction is 'max'"),
        ({"bops": "smaller"}, "its direction is 'min'"),
        ({"loss": "min"}, "lacks loss"),
    ],
)
def test_oriented_refuses_what_is_no_objective(objectives, message):
    with pytest.raises(ValueError, match=message):
        oriented(pd.DataFrame({"accuracy": [0.5], "bops": [1]}), objectives)


POINTS = pd.DataFrame(
    {
        "status": "complete",
        "trial": [0, 1, 2, 3],
        "accuracy": [0.5, 0.75, 0.25, 0.75],
        "bops": [1024, 2048, 4096, 2048],
        "relative_bops": [0.25, 0.5, 1.0, 0.5],
        "size_bytes": [100, 200, 400, 50],
        "finished_at": [f"2026-11-21T10:0{minute}:00+00:00" for minute in (3, 1, 2, 4)],
    }
)


def test_the_shared_reference_scales_every_objective_to_a_share():
    values, reference = scaled(POINTS, {"accuracy": "max", "bops": "min", "size_bytes": "min"})
    assert reference.tolist() == [1.0, 1.0, 1.0]
    assert values.tolist() == [[0.5, 0.25, 0.25], [0.25, 0.5, 0.5], [0.75, 1.0, 1.0], [0.25, 0.5, 0.125]]


def test_sizes_are_shares_of_the_float_size_of_the_row_and_else_of_the_largest():
    frame = POINTS.assign(float_size_bytes=[800, 800, None, 100])
    values, _ = scaled(frame, {"size_bytes": "min"})
    assert values[:, 0].tolist() == [0.125, 0.25, 1.0, 0.5]


def test_the_loss_needs_a_reference():
    frame = POINTS.assign(loss=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="loss has no upper end: give a reference"):
        scaled(frame, {"loss": "min"})
    values, reference = scaled(frame, {"accuracy": "max", "loss": "min"}, {"loss": 2.0, "accuracy": 0.25})
    assert values[0].tolist() == [-0.5, 0.1]
    assert reference.tolist() == [-0.25, 2.0]


def test_a_reference_names_objectives_only_and_leaves_the_others_as_shares():
    with pytest.raises(ValueError, match="give accuracy, bops"):
        scaled(POINTS, {"accuracy": "max", "bops": "min"}, {"size_bytes": 100})
    mixed, reference = scaled(POINTS, {"accuracy": "max", "bops": "min"}, {"accuracy": 0.1})
    shares, _ = scaled(POINTS, {"accuracy": "max", "bops": "min"})
    assert reference.tolist() == [-0.1, 1.0]
    assert mixed[:, 0].tolist() == (-POINTS["accuracy"]).tolist()
    assert mixed[:, 1].tolist() == shares[:, 1].tolist()


def test_bops_need_relative_bops_for_the_shared_reference():
    with pytest.raises(ValueError, match="lacks relative_bops"):
        scaled(POINTS.drop(columns="relative_bops"), {"bops": "min"})


def test_a_history_follows_the_order_of_finish():
    history = hypervolume_history(POINTS, {"accuracy": "max", "bops": "min"})
    assert history["trial"].tolist() == [1, 2, 0, 3]
    assert history["hypervolume"].tolist() == [0.375, 0.375, 0.5, 0.5]
    assert history.index.tolist() == [1, 2, 3, 4]
    assert history.index.name == "completed"


def test_a_history_counts_the_points_of_a_trial_together_and_leaves_out_the_incomplete():
    records = [
        {"status": "complete", "trial": 0, "point": "8 bits", "accuracy": 0.75, "relative_bops": 0.5},
        {"status": "complete", "trial": 0, "point": "4 bits", "accuracy": 0.5, "relative_bops": 0.25},
        {"status": "pruned", "trial": 1, "point": "final", "accuracy": None, "relative_bops": None},
        {"status": "complete", "trial": 2, "point": "final", "accuracy": 1.0, "relative_bops": 0.5},
    ]
    history = hypervolume_history(records, {"accuracy": "max", "relative_bops": "min"})
    assert history.to_dict(orient="list") == {"trial": [0, 2], "hypervolume": [0.5, 0.625]}


def test_a_history_keeps_the_trials_of_two_runs_apart():
    records = [
        {
            "run": run,
            "status": "complete",
            "trial": 0,
            "accuracy": accuracy,
            "finished_at": f"2026-11-21T10:0{minute}:00Z",
        }
        for run, accuracy, minute in (("a", 0.5, 2), ("b", 0.25, 1))
    ]
    history = hypervolume_history(records, {"accuracy": "max"}, {"accuracy": 0.0})
    assert history["run"].tolist() == ["b", "a"]
    assert history["hypervolume"].tolist() == [0.25, 0.5]


def test_a_history_of_nothing_is_empty():
    assert hypervolume_history([], {"accuracy": "max", "bops": "min"}, {"accuracy": 0, "bops": 1}).empty
    assert hypervolume_history(POINTS.assign(status="failed"), {"accuracy": "max", "bops": "min"}).empty


@given(grids(least_columns=2, most_columns=2))
def test_a_history_ends_at_the_hypervolume_of_all_points_and_never_falls(values):
    frame = pd.DataFrame({"accuracy": 1 - values[:, 0] / SIDE, "relative_bops": values[:, 1] / SIDE})
    frame = frame.assign(status="complete", trial=range(len(frame)))
    objectives = {"accuracy": "max", "relative_bops": "min"}
    volumes = hypervolume_history(frame, objectives)["hypervolume"].tolist()
    assert volumes == sorted(volumes)
    assert (volumes or [0.0])[-1] == hypervolume(*scaled(frame, objectives))


@pytest.mark.parametrize(("columns", "ball"), [(2, np.pi / 4), (3, np.pi / 6)])
def test_hypervolume_of_a_thousand_points_on_a_sphere_nears_that_of_the_ball(columns, ball):
    points = np.abs(np.random.default_rng(0).normal(size=(1000, columns)))
    points = 1 - points / np.linalg.norm(points, axis=1, keepdims=True)
    assert ball - 0.05 < hypervolume(points, np.ones(columns)) < ball
