"""Whole sweeps of the methods that learn widths or train several, on a real Ray: points, books, pictures, one front."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import raysearch
from raysearch.result import Result
from raysearch.sweep import Sweep
from tests.raysearch.cluster import check_books, cluster, command
from trainables import plugins

__all__ = ["cluster"]

SMALL: dict[str, Any] = {"data/train_limit": 320, "data/validation_limit": 200}
SETTINGS: dict[str, dict[str, Any]] = {
    "bayesian_bits": {"method/gate_optimizer": "sgd", "start/epochs": 0},
    "bsq": {"training/finetune_epochs": 1, "start/epochs": 1},
    "adabits": {"start/epochs": 0},
    "double_rounding": {"start/epochs": 0},
    "n2uq": {"start/epochs": 1},
}
TRIALS = 2
EPOCHS = 2

every_method = pytest.mark.parametrize("method", SETTINGS)


@pytest.fixture(scope="module")
def results(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """A sweep of each method over the space of its name."""
    folder = tmp_path_factory.mktemp("methods")
    return {
        method: raysearch.run(
            Sweep(
                method=method,
                space=method,
                trials=TRIALS,
                epochs=EPOCHS,
                stopper="none",
                settings={**SMALL, **settings},
            ),
            folder / method,
        )
        for method, settings in SETTINGS.items()
    }


@every_method
def test_every_trial_ends_in_points_that_the_books_agree_on(results: dict[str, Result], method: str) -> None:
    rows = results[method].records()
    assert {(row["trial"], row["status"]) for row in rows} == {(trial, "complete") for trial in range(TRIALS)}
    if {row["points"] for row in rows} == {1}:
        check_books(results[method], TRIALS)
    else:
        labels = {row["point"] for row in rows if row["trial"] == 0}
        assert len(labels) == rows[0]["points"] > 1
        bops = [row["bops"] for row in rows if row["trial"] == 0]
        assert len(set(bops)) == len(bops)


@every_method
def test_each_point_of_the_front_is_rebuilt_from_its_checkpoint_with_its_widths(
    results: dict[str, Result], method: str
) -> None:
    for _, row in results[method].front().to_pandas().iterrows():
        record = next(r for r in results[method].records() if (r["trial"], r["point"]) == (row["trial"], row["point"]))
        layers = results[method].layers(record["trial"], record["point"]).set_index("layer")
        assert layers[["weight_bits", "activation_bits"]].T.to_dict("list") == record["bits"]


@every_method
def test_the_test_accuracy_of_a_point_is_measured_from_its_checkpoint(results: dict[str, Result], method: str) -> None:
    point = results[method].front().to_pandas().iloc[0]
    assert 0 <= results[method].test(point) <= 1


@pytest.mark.parametrize("method", [m for m in SETTINGS if plugins.attribute("methods", m, "Method").learns_bits])
def test_learned_widths_are_told_epoch_by_epoch_and_drawn_in_mlflow(results: dict[str, Result], method: str) -> None:
    result = results[method]
    row = result.records()[0]
    assert [set(epoch["bits"]) for epoch in row["history"]] == [set(row["bits"])] * EPOCHS
    assert row["history"][-1]["bits"] == row["bits"]
    client = MlflowClient(tracking_uri=f"sqlite:///{result.path.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(result.name)
    assert experiment is not None
    trials = client.search_runs([experiment.experiment_id], "tags.`raysearch.kind` = 'trial'")
    assert len(trials) == TRIALS
    for run in trials:
        assert "bits.png" in [file.path for file in client.list_artifacts(run.info.run_id)]


def test_the_fronts_of_methods_merge_in_one_command(
    results: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(result.path) for result in results.values()]
    assert command(monkeypatch, "front", *runs, "--csv", "--plot", str(tmp_path / "front.png")) == 0
    table = capsys.readouterr().out.splitlines()
    assert "method" in table[0]
    assert (tmp_path / "front.png").stat().st_size > 10_000
