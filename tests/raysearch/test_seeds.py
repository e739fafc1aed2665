"""First proposals: in their order, under their sources, once each, and again after a resume."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from raysearch.errors import RecordError, SweepError
from raysearch.search.ledger import Ledger
from raysearch.search.proposals import contains
from raysearch.seeds import Seeds, proposed
from tests.raysearch.builders import drive, make_run, open_book, small_sweep

SPACE = {
    "bits/*/weight": IntDistribution(2, 8),
    "bits/*/activation": IntDistribution(2, 8),
}
widths = st.fixed_dictionaries({name: st.integers(2, 8) for name in SPACE})


def sources(folder: Path) -> list[tuple[str, int, int]]:
    from raysearch.records import RunFolder

    rows = RunFolder(folder).read_records()
    return [(r["source"], r["params"]["bits/*/weight"], r["params"]["bits/*/activation"]) for r in rows]


@given(first=st.lists(widths, max_size=4), sensitivities=st.dictionaries(st.text(max_size=5), st.floats(0, 1e9)))
def test_seeds_survive_the_way_through_the_file(tmp_path_factory, first, sensitivities) -> None:
    path = tmp_path_factory.mktemp("seeds") / "seeds.json"
    seeds = Seeds(first=tuple(("given", values) for values in first), sensitivities=sensitivities)
    seeds.write(path)
    assert Seeds.read(path) == seeds


def test_seeds_come_first_in_their_order_and_a_resumed_sweep_goes_on_with_them(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "run", small_sweep(trials=6))
    wanted = [{"bits/*/weight": 3, "bits/*/activation": w} for w in (7, 5, 5, 2)]
    one = proposed("one", wanted[:2], resolved.space, resolved.base)
    one.and_then(proposed("two", wanted[2:], resolved.space, resolved.base)).write(folder.seeds)
    book = open_book(folder, resolved)
    drive(book, limit=2)
    book.close()
    book = open_book(folder, resolved)
    drive(book)
    book.close()
    found = sources(folder.path)
    assert found[:3] == [("one", 3, 7), ("one", 3, 5), ("two", 3, 2)]
    assert {source for source, _, _ in found[3:]} == {"uniform"}


def test_known_sensitivities_reach_the_frontier(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "run", small_sweep())
    Seeds(sensitivities={"bits/*/weight": 64.0, "bits/*/activation": 1.0}).write(folder.seeds)
    frontier = Ledger(folder, resolved)._frontier
    assert frontier is not None
    assert dict(zip(frontier.layout.addresses, frontier.prior, strict=True)) == Seeds.read(folder.seeds).sensitivities


def test_of_what_both_know_the_first_counts() -> None:
    both = Seeds(sensitivities={"a": 1.0}).and_then(Seeds(sensitivities={"a": 2.0, "b": 3.0}))
    assert both.sensitivities == {"a": 1.0, "b": 3.0}


def test_what_a_configuration_leaves_open_is_as_in_the_base() -> None:
    space = {**SPACE, "optimizer/lr": FloatDistribution(0.01, 1.0, log=True)}
    seeds = proposed("given", [{"bits/*/weight": 2}], space, {"optimizer": {"lr": 0.3}})
    assert seeds.first == (("given", {"bits/*/weight": 2, "bits/*/activation": 5, "optimizer/lr": 0.3}),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits/*/weight": 9}, r"configuration 1 from given: bits/\*/weight = 9: the space has IntDistribution"),
        ({"bits/conv9/weight": 4}, "bits/conv9/weight is not searched"),
    ],
)
def test_a_configuration_outside_of_the_space_is_refused(values, message) -> None:
    with pytest.raises(SweepError, match=message):
        proposed("given", [values], SPACE, {})


@pytest.mark.parametrize("text", ["", "[]", '{"first": [1], "sensitivities": {}}', '{"first": []}'])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "seeds.json").write_text(text)
    with pytest.raises(RecordError, match=r"seeds\.json"):
        Seeds.read(tmp_path / "seeds.json")


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (IntDistribution(2, 8, step=2), [2, 6], [3, 9, "4", True, None]),
        (FloatDistribution(0.1, 1.0), [0.1, 0.55, 1], [0, 1.1, "0.5"]),
        (CategoricalDistribution(("a", 4)), ["a", 4], ["b", 5]),
    ],
)
def test_a_distribution_contains_its_values_alone(distribution, inside, outside) -> None:
    assert [contains(distribution, value) for value in inside] == [True] * len(inside)
    assert [contains(distribution, value) for value in outside] == [False] * len(outside)
