"""Sensitivity as a service: measured tables, the file, first proposals that a brute force agrees with, bad input."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution, IntDistribution

import raysearch
from analysis.sensitivity_plot import plot_sensitivity, sensitivity_table
from raysearch import sensitivities
from raysearch.errors import SweepError
from raysearch.search.bit_layout import BitLayout
from raysearch.sensitivities import expected_rises, read, seeds_of, write
from raysearch.sweep import Sweep
from tests.raysearch.builders import law, make_run, small_sweep
from tests.raysearch.cluster import cluster, command
from tests.raysearch.sensitivity_tables import WIDTHS, random_table
from trainables.cost import Layer
from trainables.layer_profile import Plan

__all__ = ["cluster"]

SMALL: dict[str, Any] = {"data/train_limit": 256, "data/validation_limit": 128, "start/epochs": 2}
PLAN = Plan(widths=WIDTHS, batches=2, batch_size=32, probes=4, images=64)
LAYERS = [
    Layer(name=f"l{i}", kind="conv", macs=m, weights=w, biases=0, channels=2, first=i == 0, last=i == 2)
    for i, (m, w) in enumerate([(700, 30), (400, 90), (90, 200)])
]
SPACE = {f"bits/l1/{role}": IntDistribution(2, 8, step=2) for role in ("weight", "activation")} | {
    "bits/l2/weight": IntDistribution(2, 8, step=3)
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return raysearch.sensitivity(Sweep(model="lenet5", settings=SMALL), PLAN)


def test_every_layer_has_traces_with_errors_quantization_errors_and_drops(table: pd.DataFrame) -> None:
    assert list(table["layer"]) == ["conv1", "conv2", "fc1", "fc2"]
    assert (table[["hessian_error", "fisher", "fisher_error", "fisher_read"]] > 0).all().all()
    for role in ("weight", "activation"):
        errors = table[[f"{role}_error_{bits}" for bits in WIDTHS]].to_numpy()
        assert (np.diff(errors) <= 0).all()
    assert (table["weight_rise_2"] > table["weight_rise_8"]).sum() >= 3
    assert table["weight_drop_8"].abs().max() < 0.1
    assert table.loc[0, "activation_drop_8"] == 0  # the network's input has 8 bits


def test_ray_tasks_measure_the_same_numbers(cluster: Path, table: pd.DataFrame) -> None:
    found = raysearch.sensitivity(Sweep(model="lenet5", settings=SMALL), PLAN, workers=2)
    pd.testing.assert_frame_equal(found, table, rtol=1e-3, atol=1e-6)


def test_a_table_survives_the_way_through_its_file(table: pd.DataFrame, tmp_path: Path) -> None:
    write(table, tmp_path / "s.json")
    found = read(tmp_path / "s.json")
    pd.testing.assert_frame_equal(found, table)
    assert found.attrs == table.attrs == {"model": "lenet5", "data": "digits", "widths": list(WIDTHS)}


def test_people_get_a_table_and_a_picture(table: pd.DataFrame, tmp_path: Path) -> None:
    text = sensitivity_table(table)
    assert {"conv2", "W2", "A8", "±"} <= set(text.split())
    assert plot_sensitivity(table, tmp_path / "s.png", title="t").stat().st_size > 10_000
    bare = table.drop(columns=[name for name in table if "_drop_" in name])
    assert "W2" not in sensitivity_table(bare)
    assert plot_sensitivity(bare, tmp_path / "bare.png").stat().st_size > 5_000


@law
@given(
    seed=st.integers(0, 10_000),
    score=st.sampled_from(["fisher", "hessian", "rise"]),
    cost=st.sampled_from(["bops", "energy"]),
)
def test_each_proposal_is_what_a_brute_force_finds_under_its_budget(seed: int, score: str, cost: str) -> None:
    frame = random_table(seed)
    tables = {"energy": np.random.default_rng(seed).random((3, 33, 33))}
    seeds = seeds_of(frame, SPACE, LAYERS, {}, {"accuracy": "max", cost: "min"}, score=score, tables=tables)
    rises, layout = expected_rises(frame, score), BitLayout(SPACE, LAYERS, tables=tables)

    def rise(values: dict[str, int]) -> float:
        parts = [address.split("/") for address in values]
        return sum(sensitivities._at(rises[layer, role], values[f"bits/{layer}/{role}"]) for _, layer, role in parts)

    def price(values: dict[str, int]) -> float:
        return float(layout.cost({cost: 1.0}, np.array([[values[a] for a in layout.addresses]], dtype=float))[0])

    every = [dict(zip(SPACE, row, strict=True)) for row in itertools.product((2, 4, 6, 8), (2, 4, 6, 8), (2, 5, 8))]
    assert seeds.first
    for source, values in seeds.first:
        assert source == "sensitivity"
        cheaper = [rise(other) for other in every if price(other) <= price(values) + 1e-9]
        assert rise(values) <= min(cheaper) + 1e-9 * abs(min(cheaper))
    assert set(seeds.sensitivities) == set(SPACE)
    assert min(seeds.sensitivities.values()) > 0


@law
@given(seed=st.integers(0, 10_000))
def test_expected_rises_never_rise_with_the_width_and_are_never_negative(seed: int) -> None:
    for score in ("fisher", "hessian", "rise"):
        for values in expected_rises(random_table(seed), score).values():
            assert all(value >= 0 for value in values.values())
            assert list(values.values()) == sorted(values.values(), reverse=True)


def test_a_width_that_was_not_measured_has_a_quarter_of_the_noise_for_each_bit() -> None:
    assert sensitivities._at({2: 16.0, 8: 0.1}, 3) == 4.0
    assert sensitivities._at({2: 16.0, 8: 0.1}, 2) == 16.0


def test_a_sweep_is_seeded_from_the_file_and_a_resumed_one_needs_it_no_more(
    tmp_path: Path, table: pd.DataFrame
) -> None:
    from raysearch.driver import read_seeds, seed
    from raysearch.search.ledger import Ledger

    write(table, tmp_path / "s.json")
    sweep = small_sweep(space="per_layer", seed_from=str(tmp_path / "s.json"))
    folder, resolved = make_run(tmp_path / "run", sweep)
    seed(folder, resolved, read_seeds(resolved))
    (tmp_path / "s.json").unlink()
    seed(folder, resolved, raysearch.driver.Seeds())
    ledger = Ledger(folder, resolved)
    first = [ledger.propose() for _ in range(3)]
    assert [proposal.source for proposal in first if proposal] == ["sensitivity"] * 3


def test_the_command_line_measures_seeds_and_sweeps(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [text for name, value in SMALL.items() for text in ("--set", f"{name}={value}")]
    small = [*settings, "--widths", "2,8", "--batches", "1", "--probes", "2", "--images", "0"]
    assert command(monkeypatch, "sensitivity", "lenet5", *small, "-o", str(tmp_path / "s.json"), "--csv") == 0
    assert capsys.readouterr().out.startswith("layer,weights,macs,hessian")
    sweep = ["sweep", *settings, "--trials", "2", "--epochs", "1", "--out", str(tmp_path / "run")]
    assert command(monkeypatch, *sweep, "--seed-from", "sensitivity") == 0
    rows = raysearch.load(tmp_path / "run").records()
    assert {row["source"] for row in rows} == {"sensitivity"}
    assert json.loads((tmp_path / "run" / "sensitivity.json").read_text())["model"] == "lenet5"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"optimizer/lr": FloatDistribution(0.01, 0.1)}}, "the space has no bits"),
        ({"method": "double_rounding", "space": "double_rounding"}, "method 'double_rounding' decides widths itself"),
        ({"model": "vgg7", "data": "cifar10"}, "these sensitivities are of another network: they lack"),
        ({"seed_from": "nowhere.json"}, "--seed-from nowhere.json: .*No such file"),
        ({"seed_from": __file__}, "--seed-from .*give a file of `raysearch sensitivity -o FILE`"),
    ],
)
def test_a_sweep_without_use_for_the_sensitivities_is_refused(
    tmp_path: Path, table: pd.DataFrame, changes: dict[str, Any], message: str
) -> None:
    from raysearch.resolve import resolve
    from raysearch.sensitivities import read_seeds

    write(table, tmp_path / "s.json")
    sweep = Sweep(**{"space": "all_layers", "seed_from": str(tmp_path / "s.json"), **changes})
    with pytest.raises(SweepError, match=message):
        read_seeds(resolve(sweep))


def test_scores_that_are_unknown_or_not_measured_are_refused() -> None:
    frame = random_table(0)
    with pytest.raises(SweepError, match="score = 'trace': one of fisher, hessian, rise"):
        expected_rises(frame, "trace")
    bare = frame.drop(columns=[name for name in frame if "_rise_" in name])
    bare.attrs = frame.attrs
    with pytest.raises(SweepError, match="it was not measured"):
        expected_rises(bare, "rise")
