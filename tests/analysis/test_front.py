"""A front of records: who is on it, in which order, and how it is written down."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.front import _OPTIONAL, COLUMNS, Front
from analysis.pareto import oriented
from analysis.wording import short_bits
from tests.analysis.records import OBJECTIVES, record

outcomes = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["complete", "complete", "complete", "pruned", "failed"]),
        "accuracy": st.integers(0, 4).map(lambda quarters: quarters / 4),
        "bops": st.integers(1, 4).map(lambda thousands: 1000 * thousands),
        "size_bytes": st.integers(1, 4).map(lambda kib: 1024 * kib),
    }
)
sweeps = st.lists(outcomes, max_size=12).map(lambda rows: [record(trial, **row) for trial, row in enumerate(rows)])


def dominates(p, q):
    return bool((p <= q).all() and (p < q).any())


@given(sweeps)
def test_no_point_of_a_front_is_dominated_and_every_other_is_or_repeats_one(records):
    front = Front.of(records, OBJECTIVES)
    members, others = (oriented(frame, OBJECTIVES) for frame in (front.to_pandas(), front.dominated()))
    assert not any(dominates(p, q) for p in members for q in members)
    assert all(any(dominates(p, q) or (p == q).all() for p in members) for q in others)
    assert len(members) + len(others) == sum(row["status"] == "complete" for row in records)


@given(sweeps, st.randoms(use_true_random=False))
def test_a_front_does_not_depend_on_the_order_of_the_records(records, random):
    shuffled = random.sample(records, len(records))
    assert Front.of(shuffled, OBJECTIVES).to_csv() == Front.of(records, OBJECTIVES).to_csv()


@given(sweeps)
def test_records_make_the_same_front_as_mappings_and_as_a_frame(records):
    frame = pd.DataFrame(records, columns=None if records else list(record()))
    assert Front.of(frame, OBJECTIVES).to_json() == Front.of(iter(records), OBJECTIVES).to_json()


@given(sweeps)
def test_a_front_is_sorted_by_falling_accuracy_then_rising_costs(records):
    frame = Front.of(records, OBJECTIVES).to_pandas()
    keys = list(zip(-frame["accuracy"], frame["bops"], frame["size_bytes"], frame["trial"], strict=True))
    assert keys == sorted(keys)
    assert frame.index.tolist() == list(range(len(frame)))


@given(sweeps)
def test_the_hypervolume_of_a_front_is_within_0_and_1(records):
    assert 0 <= Front.of(records, OBJECTIVES).hypervolume() <= 1


def test_a_front_has_the_documented_columns():
    frame = Front.of([record()], OBJECTIVES).to_pandas()
    assert list(frame) == [name for name in COLUMNS if name not in _OPTIONAL]
    assert frame.iloc[0]["bits"] == "8/8 4/3 8/8"


def test_run_and_test_accuracy_and_a_searched_loss_are_columns_too():
    tested = {"test_accuracy": 0.4, "test_images": 10, "validation_images": 20}
    frame = Front.of([record(run="a", **tested)], {"accuracy": "max", "loss": "min"}).to_pandas()
    assert list(frame) == list(COLUMNS)


def test_counts_stay_integers_beside_failed_records_without_them():
    failed = record(1, status="failed", accuracy=None, bops=None, size_bytes=None)
    frame = Front.of([record(0), failed], OBJECTIVES).to_pandas()
    assert frame["bops"].dtype == frame["size_bytes"].dtype == np.int64


@pytest.mark.parametrize("status", ["pruned", "failed"])
def test_a_record_that_is_not_complete_is_no_point_however_good(status):
    front = Front.of([record(0), record(1, accuracy=0.9, status=status)], OBJECTIVES)
    assert front.to_pandas()["trial"].tolist() == [0]
    assert front.dominated().empty


@pytest.mark.parametrize("lacking", [None, float("nan"), float("inf")])
def test_a_row_without_a_cost_is_left_out(lacking):
    front = Front.of([record(0), record(1, accuracy=0.9, size_bytes=lacking)], OBJECTIVES)
    assert front.to_pandas()["trial"].tolist() == [0]


@pytest.mark.parametrize("accuracy", [None, float("nan"), float("inf"), 97.0, -0.1])
def test_a_complete_record_without_an_accuracy_within_0_and_1_is_an_error(accuracy):
    with pytest.raises(ValueError, match="trial 7: status is complete but accuracy is"):
        Front.of([record(0), record(7, accuracy=accuracy)], OBJECTIVES)


@pytest.mark.parametrize(
    ("records", "objectives", "message"),
    [
        ([record()], {"latency": "min"}, "unknown objective 'latency'"),
        ([record()], {}, "objectives are empty"),
        ([{"trial": 0, "accuracy": 0.5}], OBJECTIVES, "records lack status, bops, size_bytes"),
        ([record(0), record(1, data="cifar10")], OBJECTIVES, "records are of cifar10, digits"),
    ],
)
def test_what_makes_no_front_is_refused(records, objectives, message):
    with pytest.raises(ValueError, match=message):
        Front.of(records, objectives)


def test_of_equal_points_the_one_that_finished_first_is_on_the_front():
    late = record(0, finished_at="2026-11-21T12:00:00.5+00:00")
    early = record(1, finished_at="2026-11-21T12:00:00+00:00")
    front = Front.of([late, early], OBJECTIVES)
    assert front.to_pandas()["trial"].tolist() == [1]
    assert front.dominated()["trial"].tolist() == [0]


def test_of_equal_points_that_finished_together_the_smaller_trial_is_on_the_front():
    together = "2026-11-21T12:00:00+00:00"
    front = Front.of([record(trial, finished_at=together) for trial in (5, 3, 4)], OBJECTIVES)
    assert front.to_pandas()["trial"].tolist() == [3]


def test_runs_share_a_front():
    records = [record(0, run="a", accuracy=0.6), record(0, run="b", bops=8000, digest="other"), record(1, run="b")]
    front = Front.of(records, OBJECTIVES)
    assert front.to_pandas()[["run", "trial"]].to_numpy().tolist() == [["a", 0], ["b", 0]]
    assert front.dominated()[["run", "trial"]].to_numpy().tolist() == [["b", 1]]


@pytest.mark.parametrize(
    ("accuracy", "bops", "member"),
    [(0.5, 16_000, "a"), (0.6, 16_000, "b"), (0.4, 16_000, "a"), (0.6, 17_000, "a")],
    ids=["equal", "dominates", "dominated", "neither"],
)
def test_of_one_configuration_in_two_runs_one_point_is_on_the_front(accuracy, bops, member):
    again = record(5, run="b", digest="digest of 0", accuracy=accuracy, bops=bops)
    front = Front.of([record(0, run="a"), again], OBJECTIVES)
    assert front.to_pandas()["run"].tolist() == [member]
    assert len(front.dominated()) == 1


def test_operating_points_of_one_configuration_may_all_be_on_the_front():
    points = [record(0, point=f"{bits} bits", accuracy=bits / 10, bops=1000 * bits) for bits in (2, 4, 8)]
    assert Front.of(points, OBJECTIVES).to_pandas()["point"].tolist() == ["8 bits", "4 bits", "2 bits"]


def test_dominance_looks_at_the_given_objectives_only():
    records = [record(0), record(1, size_bytes=1024)]
    assert Front.of(records, {"accuracy": "max", "bops": "min"}).to_pandas()["trial"].tolist() == [0]
    assert Front.of(records, OBJECTIVES).to_pandas()["trial"].tolist() == [1]


def test_hypervolume_of_a_front_counted_by_hand():
    records = [record(0, accuracy=0.75, bops=512_000), record(1, accuracy=0.5, bops=256_000), record(2, accuracy=0.25)]
    objectives = {"accuracy": "max", "bops": "min"}
    front = Front.of(records[:2], objectives)
    assert front.hypervolume() == 0.5
    assert front.hypervolume({"accuracy": 0.25, "bops": 1_024_000}) == 0.25 * 768_000 + 0.25 * 512_000


def test_len_and_iteration_give_the_points_in_order():
    front = Front.of([record(0), record(1, accuracy=0.6, bops=20_000), record(2, accuracy=0.1)], OBJECTIVES)
    assert len(front) == 2
    assert [(point.trial, point["accuracy"]) for point in front] == [(1, 0.6), (0, 0.5)]
    assert repr(front) == "Front(2 of 3 points, accuracy, bops, size_bytes)"


def test_nothing_at_all_is_an_empty_front():
    front = Front.of([], OBJECTIVES)
    assert (len(front), list(front), front.to_json(), front.hypervolume()) == (0, [], "[]", 0.0)
    assert front.table().split() == ["trial"]
    with pytest.raises(ValueError, match="no points to pick from"):
        front.pick()


def test_json_has_the_widths_in_full_and_null_for_what_is_missing():
    parquet_like = {"conv1": np.array([8, 8]), "conv2": None}
    points = json.loads(Front.of([record(3, bits=parquet_like, checkpoint=None)], OBJECTIVES).to_json())
    assert points == [
        {
            "trial": 3,
            "point": "final",
            "method": "lsq",
            "model": "lenet5",
            "data": "digits",
            "accuracy": 0.5,
            "bops": 16_000,
            "relative_bops": 0.015625,
            "size_bytes": 2048,
            "macs": 1000,
            "bits": {"conv1": [8, 8]},
            "source": "tpe",
            "seed": 0,
            "digest": "digest of 3",
            "checkpoint": None,
        }
    ]


def test_json_has_a_line_for_each_point():
    front = Front.of([record(0), record(1, accuracy=0.6, bops=20_000)], OBJECTIVES)
    assert len(front.to_json().splitlines()) == 4


def test_csv_reads_back_as_the_frame():
    front = Front.of([record(0), record(1, accuracy=0.6, bops=20_000)], OBJECTIVES)
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(front.to_csv())), front.to_pandas(), check_dtype=False)


def test_a_table_shows_shares_in_per_cent_and_sizes_in_kib():
    records = [record(0), record(12, accuracy=0.97531, bops=41_200, size_bytes=21_811, source="uniform")]
    assert Front.of(records, OBJECTIVES).table().splitlines() == [
        "trial  accuracy  relative BOPs    BOPs      size  bits         source",
        "   12   97.53 %         4.02 %  41.2 k  21.3 KiB  8/8 4/3 8/8  uniform",
        "    0   50.00 %         1.56 %  16.0 k   2.0 KiB  8/8 4/3 8/8  tpe",
    ]


def test_a_table_names_runs_methods_and_points_only_where_they_differ():
    records = [record(0, run="a"), record(1, run="b", method="pact", accuracy=0.6, bops=20_000)]
    assert Front.of(records, OBJECTIVES).table().splitlines()[0].split()[:4] == ["run", "trial", "method", "accuracy"]


def test_a_table_shortens_the_widths_of_deep_networks_between_layers():
    bits = {f"layer{i}": [2 + i % 7, 4] for i in range(60)}
    line = Front.of([record(0, bits=bits)], OBJECTIVES).table().splitlines()[1]
    assert "  2/4 3/4 4/4 5/4 6/4 7/4 8/4 … 6/4 7/4 8/4 2/4 3/4 4/4 5/4  tpe" in line


def test_html_shows_the_table_and_escapes_names():
    front = Front.of([record(0, source="<b>")], OBJECTIVES)
    html = front._repr_html_()
    assert "<td>50.00 %</td>" in html
    assert "&lt;b&gt;" in html


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ({}, "float"),
        ({"fc": None}, "float"),
        ({"conv1": [8, 8], "conv2": [4, 3], "fc1": [4, 4], "fc2": [8, 8]}, "8/8 4/3 4/4 8/8"),
        ({"first": [8, 8], **{f"conv{i}": [4, 4] for i in range(17)}, "last": [8, 8]}, "8/8 4/4x17 8/8"),
        ({f"conv{i}": (2, 32) for i in range(5)}, "2/32x5"),
        ({"conv": np.array([0, 8])}, "0/8"),
    ],
)
def test_short_bits(bits, text):
    assert short_bits(bits) == text


@given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 32)), min_size=1, max_size=40))
def test_short_bits_lose_no_layer(widths):
    text = short_bits({f"layer{i}": pair for i, pair in enumerate(widths)})
    parts = [part.partition("x") for part in text.split()]
    unfolded = [width for width, _, count in parts for _ in range(int(count or 1))]
    assert unfolded == [f"{weight}/{activation}" for weight, activation in widths]


@given(st.integers(0, 32), st.integers(0, 32), st.integers(2, 60))
def test_short_bits_of_uniform_widths_are_one_word(weight, activation, layers):
    bits = {f"layer{i}": [weight, activation] for i in range(layers)}
    assert short_bits(bits) == f"{weight}/{activation}x{layers}"


def test_a_front_picks_among_its_points():
    front = Front.of([record(0), record(1, accuracy=0.6, bops=20_000)], OBJECTIVES)
    assert front.pick()["trial"] == 1
    assert front.pick(max_bops=16_000)["trial"] == 0


def test_a_limit_that_was_no_objective_overlooks_no_point():
    records = [record(0, accuracy=0.6, bops=8000, size_bytes=4096), record(1, accuracy=0.5, size_bytes=1024)]
    front = Front.of(records, {"accuracy": "max", "bops": "min"})
    assert len(front) == 1
    assert front.pick(max_size_bytes=1024)["trial"] == 1


@given(sweeps, st.sampled_from([{"accuracy": "max"}, {"bops": "min"}, {"size_bytes": "min"}, OBJECTIVES]))
def test_the_least_accuracy_asked_for_is_reached_with_the_fewest_bops_of_all(records, objectives):
    enough = [row for row in records if row["status"] == "complete" and row["accuracy"] >= 0.5]
    front = Front.of(records, objectives)
    if enough:
        assert front.pick(min_accuracy=0.5)["bops"] == min(row["bops"] for row in enough)
    else:
        with pytest.raises(ValueError):
            front.pick(min_accuracy=0.5)


def test_taking_a_frame_and_changing_it_leaves_the_front_alone():
    front = Front.of([record(0)], OBJECTIVES)
    frame = front.to_pandas()
    frame.loc[0, "accuracy"] = 0.0
    assert front.to_pandas().loc[0, "accuracy"] == 0.5
