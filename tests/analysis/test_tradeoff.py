"""Weights, the knee and `within` choose points that exist, by rules that can be checked by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.front import Front
from analysis.pick import pick
from analysis.tradeoff import scores
from tests.analysis.records import OBJECTIVES, record

EQUAL = {"accuracy": 1.0, "bops": 1.0}
points = st.lists(
    st.tuples(st.integers(0, 100), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=12, unique=True
)


def frame(*rows):
    """A frame of (accuracy, BOPs[, bytes])."""
    made = pd.DataFrame([(*row, 1)[:3] for row in rows], columns=["accuracy", "bops", "size_bytes"])
    return made.assign(trial=range(len(made)))


@given(points, st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_score_lies_within_0_and_1_and_only_the_ratio_of_the_weights_matters(rows, accuracy, bops):
    given_frame = frame(*((a / 100, b, s) for a, b, s in rows))
    found = scores(given_frame, {"accuracy": accuracy, "bops": bops})
    assert ((found >= 0) & (found <= 1)).all()
    assert np.allclose(found, scores(given_frame, {"accuracy": 7 * accuracy, "bops": 7 * bops}))


@given(points, st.sampled_from(["bops", "size_bytes"]), st.integers(1, 1000))
def test_the_unit_of_a_cost_does_not_matter(rows, cost, factor):
    given_frame = frame(*((a / 100, b, s) for a, b, s in rows))
    weights = {"accuracy": 1, cost: 1}
    scaled = given_frame.assign(**{cost: given_frame[cost] * factor})
    assert np.allclose(scores(given_frame, weights), scores(scaled, weights), atol=1e-9)


@given(points, st.floats(0.1, 10), st.floats(0.1, 10))
def test_what_weights_choose_is_dominated_by_no_point(rows, accuracy, bops):
    given_frame = frame(*((a / 100, b, s) for a, b, s in rows))
    chosen = pick(given_frame, weights={"accuracy": accuracy, "bops": bops})
    better = (given_frame["accuracy"] >= chosen["accuracy"]) & (given_frame["bops"] < chosen["bops"])
    assert not better.any()


def test_the_knee_is_where_accuracy_stops_to_pay():
    front = frame((0.90, 1000), (0.89, 500), (0.88, 60), (0.40, 40), (0.10, 30))
    assert pick(front, weights=EQUAL)["bops"] == 60
    assert pick(front, weights={"accuracy": 1, "bops": 0})["bops"] == 1000
    assert pick(front, weights={"accuracy": 0.01, "bops": 1})["bops"] == 30


def test_a_halving_of_the_cost_counts_the_same_wherever_it_is():
    found = scores(frame((0.5, 800), (0.5, 400), (0.5, 200), (0.5, 100)), {"bops": 1})
    assert np.allclose(found, [1, 2 / 3, 1 / 3, 0])


def test_a_cost_of_nothing_counts_as_the_smallest_that_is_something():
    assert scores(frame((0.5, 0), (0.5, 10), (0.5, 100)), {"bops": 1}).tolist() == [0, 0, 1]


def test_weights_choose_among_what_fits_the_limits_but_are_scaled_on_the_whole_front():
    front = frame((0.90, 1000), (0.88, 60), (0.40, 40), (0.10, 30))
    assert pick(front, weights=EQUAL, max_bops=50)["bops"] == 40
    assert pick(front, weights=EQUAL, min_accuracy=0.89)["bops"] == 1000


@pytest.mark.parametrize(("within", "bops"), [(0.0, 900), (0.004, 900), (0.005, 500), (0.5, 60), (1.0, 30)])
def test_within_takes_the_cheapest_that_is_at_most_so_much_less_accurate(within, bops):
    front = frame((0.98, 1000), (0.98, 900), (0.975, 500), (0.48, 60), (0.10, 30))
    assert pick(front, within=within)["bops"] == bops


def test_within_measures_from_the_best_that_fits_the_limits():
    front = frame((0.98, 1000, 9), (0.90, 500, 1), (0.895, 60, 1))
    assert pick(front, within=0.01, max_size_bytes=1)["bops"] == 60


@pytest.mark.parametrize(
    ("rules", "fault"),
    [
        ({"weights": {"speed": 1}}, "weights name speed: give accuracy, loss, bops"),
        ({"weights": {"accuracy": -1.0}}, "weights accuracy = -1: give numbers >= 0"),
        ({"weights": {"accuracy": float("nan")}}, "weights accuracy = nan: give numbers >= 0"),
        ({"weights": {"accuracy": 0.0}}, "weights are all 0"),
        ({"weights": {}}, "weights are all 0"),
        ({"weights": {"loss": 1.0}}, "weights name loss: the points have no such column"),
        ({"within": 5.0}, "within = 5: give a share within 0..1"),
        ({"within": float("nan")}, "within = nan: give a share"),
        ({"within": 0.1, "weights": EQUAL}, "two ways to choose one point"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(rules, fault):
    with pytest.raises(ValueError, match=fault):
        pick(frame((0.9, 1)), **rules)


def test_a_front_names_the_points_that_people_ask_for():
    rows = [(0.9, 16_000, 900), (0.88, 2_000, 1000), (0.6, 1500, 100), (0.3, 1000, 1100)]
    front = Front.of([record(n, accuracy=a, bops=b, size_bytes=s) for n, (a, b, s) in enumerate(rows)], OBJECTIVES)
    assert front.marks() == {"most-accurate": 0, "fewest-bops": 3, "smallest": 2, "knee": 2}
    assert front.knee()["trial"] == 2
    assert Front.of([], OBJECTIVES).marks() == {}
    with pytest.raises(ValueError, match="no trial is complete"):
        Front.of([], OBJECTIVES).knee()


def test_weights_on_what_was_not_searched_for_overlook_no_point():
    front = Front.of(
        [record(0, accuracy=0.9, bops=100, size_bytes=900), record(1, accuracy=0.8, bops=200, size_bytes=100)],
        {"accuracy": "max", "bops": "min"},
    )
    assert len(front) == 1
    assert front.pick(weights={"size_bytes": 1})["trial"] == 1


@pytest.mark.parametrize(("way", "trial"), [("min", 1), ("max", 0)])
def test_weights_may_name_a_persons_own_measure_which_counts_in_its_direction(way, trial):
    rows = [record(n, accuracy=a, measures=["range"], range=m) for n, (a, m) in enumerate([(0.9, 30.0), (0.8, 2.0)])]
    front = Front.of(rows, {"accuracy": "max", "range": way})
    assert front.pick(weights={"range": 1})["trial"] == trial
    assert front.pick(weights=front.knee_weights)["trial"] == front.knee()["trial"] == 0
