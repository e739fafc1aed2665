"""Laws of early stopping by several objectives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.pareto import non_dominated
from raysearch.search.rungs import Layers, Rungs, Standing, dominated, epsilon_net, rung_epochs
from tests.raysearch.builders import law

Values = np.ndarray
whole = st.integers(0, 6)


@st.composite
def clouds(draw: st.DrawFn, least: int = 1) -> Values:
    """Points of two or three objectives, many of them alike, (n, k)."""
    k = draw(st.integers(2, 3))
    rows = draw(st.lists(st.lists(whole, min_size=k, max_size=k), min_size=least, max_size=25))
    return np.array(rows, dtype=float)


def told(cloud: Values, **settings: float) -> tuple[Rungs, list[Standing]]:
    """Each point a trial that reports its first epoch, one after the other."""
    rungs = Rungs(9, **settings)  # type: ignore[arg-type]
    standings = [rungs.report(trial, 1, value[None]) for trial, value in enumerate(cloud)]
    assert all(standing is not None for standing in standings)
    return rungs, [standing for standing in standings if standing]


def order(rungs: Rungs) -> list[int]:
    return rungs._rungs[1].layers.order()


@law
@given(clouds())
def test_layers_are_the_fronts_of_what_is_left(cloud: Values) -> None:
    layers = Layers(epsilon_net)
    for trial, value in enumerate(cloud):
        layers.add(trial, value)
    left = list(range(len(cloud)))
    for front in layers.fronts():
        beaten = dominated(cloud[left], cloud[left])
        assert front == {trial for trial, below in zip(left, beaten, strict=True) if not below}
        left = [trial for trial in left if trial not in front]
    assert left == []


@law
@given(clouds(), st.floats(1.5, 4))
def test_who_is_on_the_current_front_is_never_stopped(cloud: Values, factor: float) -> None:
    rungs, standings = told(cloud, factor=factor)
    for trial, standing in enumerate(standings):
        front = non_dominated(np.unique(cloud[: trial + 1], axis=0))
        on_front = cloud[trial].tolist() in np.unique(cloud[: trial + 1], axis=0)[front].tolist()
        assert standing.on_front == on_front
        assert standing.goes_on or not on_front
    assert set(rungs.waiting) == {trial for trial, standing in enumerate(standings) if not standing.goes_on}


@law
@given(clouds(), st.floats(1.5, 4))
def test_the_best_share_goes_on_and_the_others_wait(cloud: Values, factor: float) -> None:
    _, standings = told(cloud, factor=factor)
    for trial, standing in enumerate(standings):
        assert standing.of == trial + 1
        assert 1 <= standing.rank <= standing.of
        assert standing.goes_on == (standing.on_front or standing.rank <= np.ceil(standing.of / factor))


@law
@given(clouds(least=2), st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_who_came_first(cloud: Values, random: "np.random.Generator") -> None:
    cloud = np.unique(cloud, axis=0)
    shuffled = list(range(len(cloud)))
    random.shuffle(shuffled)  # type: ignore[arg-type]
    first = [cloud[trial].tolist() for trial in order(told(cloud)[0])]
    second = [cloud[shuffled][trial].tolist() for trial in order(told(cloud[shuffled])[0])]
    assert first == second


@law
@given(clouds(), st.lists(st.floats(0.01, 100), min_size=3, max_size=3), st.lists(whole, min_size=3, max_size=3))
def test_ranks_do_not_depend_on_the_unit_of_an_objective(cloud: Values, scale: list[float], shift: list[int]) -> None:
    k = cloud.shape[1]
    other = np.exp(cloud) * np.array(scale)[:k] + np.array(shift)[:k]
    first, second = told(cloud), told(other)
    assert first[1] == second[1]
    assert order(first[0]) == order(second[0])


@law
@given(clouds())
def test_who_may_go_on_grows_with_those_who_come_and_everybody_goes_on_once(cloud: Values) -> None:
    rungs, standings = told(cloud, factor=2)
    gone = {trial for trial, standing in enumerate(standings) if standing.goes_on}
    while (trial := rungs.promotable()) is not None:
        assert trial not in gone
        standing = rungs.standing(trial)
        assert standing.goes_on
        rungs.promote(trial)
        gone.add(trial)
    assert set(range(len(cloud))) == gone | set(rungs.waiting)
    assert set(order(rungs)[: -(-len(cloud) // 2)]) <= gone


@law
@given(clouds(least=2), st.data())
def test_what_is_restored_decides_as_what_was_never_interrupted(cloud: Values, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(cloud)))
    first, standings = told(cloud)
    second = Rungs(9)
    for trial, value in enumerate(cloud[:cut]):
        second.restore(trial, 1, value[None], standings[trial].goes_on)
    again = [second.report(trial, 1, cloud[trial][None]) for trial in range(cut, len(cloud))]
    assert again == standings[cut:]
    assert second.waiting == first.waiting
    assert second.promotable() == first.promotable()


def test_a_cost_that_moves_counts_as_it_is_now() -> None:
    rungs = Rungs(9)
    rungs.report(0, 1, np.array([[0.5, 10.0]]))
    waits = rungs.report(1, 1, np.array([[0.6, 10.0]]))
    assert waits == Standing(epoch=1, rank=2, of=2, on_front=False, goes_on=False)
    cheap = rungs.report(2, 1, np.array([[0.6, 5.0]]))
    assert cheap is not None
    assert cheap.goes_on
    rungs.report(0, 2, np.array([[0.7, 10.0]]))  # it got worse: the one that waits is no longer dominated, but for 2
    assert rungs.promotable() is None
    rungs.end(2, counts=False)
    assert rungs.promotable() == 1


def test_a_trial_with_several_points_stands_where_its_best_one_stands() -> None:
    rungs = Rungs(9)
    for trial in range(5):
        rungs.report(trial, 1, np.array([[trial, trial]]))
    standing = rungs.report(5, 1, np.array([[9.0, 9.0], [0.5, 0.5]]))
    assert standing == Standing(epoch=1, rank=2, of=6, on_front=False, goes_on=True)
    assert rungs.report(6, 1, np.array([[9.0, 9.0], [0.0, 9.0], [9.0, -1.0]])).on_front  # type: ignore[union-attr]


def test_the_best_of_the_last_rung_goes_on_first_if_there_is_room() -> None:
    rungs = Rungs(9)
    for trial, value in enumerate([1, 9, 8, 7]):
        rungs.report(trial, 1, np.array([[value, value]]))
    assert set(rungs.waiting) == {1, 2}
    for trial, value in enumerate([1, 5], start=10):
        rungs.report(trial, 3, np.array([[value, value]]))
    assert rungs.waiting == {1: 1, 2: 1, 11: 3}
    rungs.report(12, 1, np.array([[99, 99]]))
    rungs.report(13, 3, np.array([[99, 99]]))
    assert rungs.promotable() is None
    rungs.report(14, 3, np.array([[98, 98]]))
    assert rungs.waiting.keys() >= {11, 14}
    assert rungs.promotable() == 11
    assert rungs.promotable(room=6) == 11
    assert rungs.promotable(room=5) is None
    assert rungs.hopeless() == 12


@pytest.mark.parametrize(
    ("epochs", "grace", "factor", "expected"),
    [(5, 1, 3, [1, 3]), (9, 1, 3, [1, 3]), (10, 1, 3, [1, 3, 9]), (10, 2, 2, [2, 4, 8]), (1, 1, 3, []), (4, 4, 2, [])],
)
def test_rungs_lie_below_the_last_epoch(epochs: int, grace: int, factor: float, expected: list[int]) -> None:
    assert rung_epochs(epochs, grace, factor) == expected


@law
@given(clouds())
def test_an_epsilon_net_takes_everybody_once_and_begins_at_the_best_of_the_first_objective(cloud: Values) -> None:
    net = epsilon_net(cloud)
    assert sorted(net.tolist()) == list(range(len(cloud)))
    assert cloud[net[0], 0] == cloud[:, 0].min()
