"""What a sweep found is read from its folder alone."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import raysearch
from raysearch.errors import RecordError
from raysearch.records import Log, RunFolder, read_lines
from raysearch.result import Result, front_of, load
from tests.raysearch.builders import (
    SMALL,
    by_training,
    drive,
    finished_run,
    make_run,
    open_book,
    small_sweep,
)
from trainables import checkpoint
from trainables.build import load_data
from trainables.config import parse
from trainables.fit import Session


@pytest.fixture(scope="module")
def by_formula(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of twelve trials that ran by the formula; to be read only."""
    return finished_run(tmp_path_factory.mktemp("runs") / "by-formula")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of two trials that were really trained."""
    torch.set_num_threads(1)
    sweep = small_sweep(trials=2, settings=SMALL)
    folder, resolved = make_run(tmp_path_factory.mktemp("runs") / "trained", sweep)
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    return folder


def test_a_result_knows_its_sweep(by_formula: RunFolder) -> None:
    result = load(str(by_formula.path))
    assert (result.name, result.path) == ("by-formula", by_formula.path)
    assert result.objectives == {"accuracy": "max", "bops": "min", "size_bytes": "min"}
    assert result.description["sweep"]["trials"] == 12
    assert isinstance(raysearch.load(by_formula.path), Result)


def test_no_run_folder_has_no_result(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"is no run folder: it has no sweep\.json"):
        load(tmp_path)


def test_a_frame_has_a_row_for_each_record(by_formula: RunFolder) -> None:
    frame = load(by_formula.path).to_pandas()
    assert list(frame["trial"]) == list(range(12))
    assert frame["accuracy"].tolist() == [row["accuracy"] for row in by_formula.read_records()]


def test_parquet_holds_the_frame_with_nested_fields_as_json(by_formula: RunFolder, tmp_path: Path) -> None:
    written = load(by_formula.path).to_parquet(tmp_path / "records.parquet")
    frame, rows = pd.read_parquet(written), by_formula.read_records()
    assert list(frame.columns) == list(rows[0])
    for name in ("inherited", "bits", "params", "config", "history", "versions", "git", "timing"):
        assert [json.loads(text) for text in frame[name]] == [row[name] for row in rows]
    for name in ("trial", "accuracy", "bops", "digest", "status"):
        assert frame[name].tolist() == [row[name] for row in rows]


def test_parquet_lies_in_the_run_folder_unless_told_otherwise(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path / "a-run")
    assert load(folder.path).to_parquet() == folder.path / "records.parquet"
    assert len(pd.read_parquet(folder.path / "records.parquet")) == 0


def test_the_front_can_be_picked_from(by_formula: RunFolder) -> None:
    front = load(by_formula.path).front()
    frame = front.to_pandas()
    assert front.pick()["accuracy"] == frame["accuracy"].max()
    limit = float(frame["size_bytes"].median())
    chosen = front.pick(max_size_bytes=limit)
    assert chosen["accuracy"] == frame[frame["size_bytes"] <= limit]["accuracy"].max()
    assert "run" not in frame


def test_the_front_of_an_unfinished_sweep_is_that_of_what_it_has(tmp_path: Path) -> None:
    folder, resolved = make_run(tmp_path / "a-run")
    drive(open_book(folder, resolved), limit=3)
    assert {int(trial) for trial in load(folder.path).front().to_pandas()["trial"]} <= {0, 1, 2}


def test_a_sweep_without_a_complete_trial_has_no_front(tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path / "a-run")
    with pytest.raises(RecordError, match=r"no complete trial in .*a-run"):
        load(folder.path).front()


def test_several_sweeps_share_a_front_that_names_them(tmp_path: Path) -> None:
    few = finished_run(tmp_path / "few", small_sweep(trials=2))
    pact = finished_run(tmp_path / "pact", small_sweep(trials=8, method="pact", seed=1))
    front = front_of([load(few.path), load(pact.path)])
    frame = front.to_pandas()
    assert set(frame["run"]) == {"few", "pact"}
    assert len(front.rows) == 10
    assert frame["accuracy"].max() == max(row["accuracy"] for f in (few, pact) for row in f.read_records())


def test_sweeps_on_different_data_share_no_front(by_formula: RunFolder, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", small_sweep(trials=1))
    rows = other.read_records()
    other.records.unlink()
    log = Log(other.records)
    log.append({**rows[0], "data": "mnist"})
    log.close()
    with pytest.raises(RecordError, match="digits, mnist: accuracies compare on one data set"):
        front_of([load(by_formula.path), load(other.path)])


def kept(folder: RunFolder) -> dict[str, Any]:
    """A record of the front."""
    on_front = {int(trial) for trial in load(folder.path).front().to_pandas()["trial"]}
    return next(row for row in folder.read_records() if row["trial"] in on_front)


def test_the_test_accuracy_is_that_of_the_checkpoint_on_the_test_split(trained: RunFolder) -> None:
    trained.tests.unlink(missing_ok=True)
    row = kept(trained)
    measured = load(trained.path).test(row)
    session = Session(parse(row["config"]))
    checkpoint.load_weights(trained.trial(row["trial"]) / checkpoint.FILE, session.model)
    assert measured == session.measure(session.data.test)[0].accuracy
    assert session.measure(session.data.validation)[0].accuracy == row["accuracy"]
    assert len(load_data(parse(row["config"]), None).test) == 359


def test_the_test_accuracy_is_measured_once_and_kept(trained: RunFolder) -> None:
    trained.tests.unlink(missing_ok=True)
    row, result = kept(trained), load(trained.path)
    measured = result.test(row)
    (line,) = read_lines(trained.tests)
    counts = {"test_images": 359, "validation_images": 64}
    assert line == {"trial": row["trial"], "point": "final", "test_accuracy": measured, **counts}
    checkpoint_file = trained.trial(row["trial"]) / checkpoint.FILE
    away = checkpoint_file.with_suffix(".away")
    checkpoint_file.rename(away)
    assert result.test(row) == measured  # a row that was read before it was measured
    assert result.test(kept(trained)) == measured
    away.rename(checkpoint_file)
    assert len(list(read_lines(trained.tests))) == 1
    assert [kept(trained)[name] for name in ("test_accuracy", *counts)] == [measured, 359, 64]
    assert result.front().to_pandas()["test_accuracy"].notna().sum() == 1


def test_a_point_whose_checkpoint_was_dropped_cannot_be_tested(by_formula: RunFolder) -> None:
    with pytest.raises(RecordError, match=r"trial 3 has no checkpoint in .*: only those of the front are kept"):
        load(by_formula.path).test({"trial": 3, "point": "final"})
    assert not by_formula.tests.exists()


def test_a_trained_network_is_told_layer_by_layer(trained: RunFolder) -> None:
    row = kept(trained)
    layers = load(trained.path).layers(row["trial"])
    assert list(layers.columns) == ["layer", "weights", "macs", "weight_bits", "activation_bits"]
    told = layers.set_index("layer")[["weight_bits", "activation_bits"]].T.to_dict("list")
    assert told == row["bits"]
    assert layers["macs"].sum() == row["macs"]


def test_a_point_that_is_not_there_is_named_with_those_that_are(trained: RunFolder) -> None:
    row = kept(trained)
    with pytest.raises(
        RecordError, match=f"trial {row['trial']} of .* has no complete point '3-bit'; it has the point"
    ):
        load(trained.path).layers(row["trial"], "3-bit")
