"""Whole sweeps on a real Ray: what they leave behind, and that a trial's numbers depend on nothing but the trial."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

import raysearch
from raysearch.driver import Watcher
from raysearch.errors import SweepError
from raysearch.resolve import resolve
from raysearch.result import Result
from raysearch.sweep import Sweep
from tests.raysearch.cluster import check_books, cluster, command, lines, numbers

__all__ = ["cluster"]

TRIALS = 10
SMALL: dict[str, Any] = {"start/epochs": 1, "data/train_limit": 640, "data/validation_limit": 300}
SWEEP = Sweep(trials=TRIALS, epochs=2, settings=SMALL)


@pytest.fixture(scope="module")
def inline(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Two trials at a time, each in a slot's own process."""
    return raysearch.run(SWEEP, tmp_path_factory.mktemp("inline") / "run")


@pytest.fixture(scope="module")
def alone(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same with one trial at a time."""
    return raysearch.run(Sweep(**{**SWEEP.tree(), "concurrent": 1}), tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def trained(cluster: Path, inline: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Through Ray Train with one worker, and with a budget that only small networks keep."""
    budget = sorted(row["size_bytes"] for row in inline.records())[TRIALS // 2]
    sweep = Sweep(**{**SWEEP.tree(), "train": True, "concurrent": 1, "trials": 6, "max_size_bytes": budget})
    return raysearch.run(sweep, tmp_path_factory.mktemp("trained") / "run")


def test_every_trial_is_complete_and_all_books_agree(inline: Result) -> None:
    assert [row["status"] for row in inline.records()] == ["complete"] * TRIALS
    check_books(inline, TRIALS)


def test_the_first_proposals_are_uniform_and_the_sampler_follows(inline: Result) -> None:
    rows = sorted(inline.records(), key=lambda row: row["trial"])
    assert [row["source"] for row in rows] == ["uniform"] * 7 + ["frontier"] * 3
    widths = [{width for name, width in row["params"].items()} for row in rows[:7]]
    assert widths == [{8}, {2}, {4}, {3}, {6}, {5}, {7}]


def test_the_front_is_what_brute_force_finds_in_the_records(inline: Result) -> None:
    def better(a: dict[str, Any], b: dict[str, Any]) -> bool:
        mine, yours = ((-row["accuracy"], row["bops"], row["size_bytes"]) for row in (a, b))
        return mine != yours and all(x <= y for x, y in zip(mine, yours, strict=True))

    rows = lines(inline.folder.records)
    expected = {row["trial"] for row in rows if not any(better(other, row) for other in rows)}
    front = inline.front().to_pandas()
    assert set(front["trial"]) == expected
    assert len(front) == len(expected)


def test_checkpoints_are_kept_for_the_front_and_give_a_test_accuracy(inline: Result) -> None:
    front = set(inline.front().to_pandas()["trial"])
    assert {int(path.parent.name) for path in inline.path.glob("trials/*/checkpoint.safetensors")} == front
    point = next(row for row in inline.records() if row["trial"] in front)
    assert inline.test(point) == pytest.approx(point["accuracy"], abs=0.15)


def test_mlflow_has_a_run_for_each_trial_and_tags_the_front(inline: Result) -> None:
    assert inline.mirrored is not None
    assert (inline.mirrored.complete, inline.mirrored.error) == (True, None)
    client = MlflowClient(f"sqlite:///{inline.path.resolve() / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id], "tags.`raysearch.kind` = 'trial'")
    found = {int(run.data.tags["raysearch.trial"]): run.data for run in runs}
    rows = {row["trial"]: row for row in inline.records()}
    assert {number: data.metrics["accuracy"] for number, data in found.items()} == {
        number: row["accuracy"] for number, row in rows.items()
    }
    tagged = {number for number, data in found.items() if data.tags.get("pareto") == "true"}
    assert tagged == set(inline.front().to_pandas()["trial"])


def test_the_sweep_file_asks_the_same_question_again(inline: Result) -> None:
    again = Sweep.from_tree(json.loads((inline.path / "sweep.json").read_text())["sweep"])
    assert again == SWEEP
    assert resolve(again).base == inline.description["base"]


def test_parquet_holds_the_records(inline: Result) -> None:
    frame = pd.read_parquet(inline.to_parquet())
    rows = inline.records()
    assert frame["trial"].tolist() == [row["trial"] for row in rows]
    assert [json.loads(bits) for bits in frame["bits"]] == [row["bits"] for row in rows]


def test_what_ray_itself_wrote_is_gone(inline: Result, trained: Result) -> None:
    kept = {"sweep.json", "records.jsonl", "epochs.jsonl", "study.db", "trials", "starts", ".lock"} | {
        "end.json",
        "seeds.json",
    }
    mirrored = {"mlflow.db", "mlflow.json", "mlflow.log", "mlartifacts", ".mlflow.lock"}
    parquet = {"records.parquet"}
    for result in (inline, trained):
        assert {path.name for path in result.path.iterdir()} - parquet - {"tests.jsonl"} == kept | mirrored


def test_a_trial_gives_the_same_numbers_alone_and_beside_another(inline: Result, alone: Result) -> None:
    check_books(alone, TRIALS)
    first, second = numbers(inline.records()), numbers(alone.records())
    common = first.keys() & second.keys()
    assert len(common) >= 7
    assert {digest: first[digest] for digest in common} == {digest: second[digest] for digest in common}


def test_a_trial_gives_the_same_numbers_without_ray(inline: Result) -> None:
    record = next(row for row in inline.records() if row["source"] == "frontier")
    threads = torch.get_num_threads()
    try:
        sweep = Sweep(epochs=SWEEP.epochs, settings={**SMALL, **record["params"]})
        reports = list(raysearch.train(sweep, threads=1))
    finally:
        torch.set_num_threads(threads)
    found = [(r.train_loss, r.points[0].accuracy, r.points[0].loss) for r in reports]
    assert found == numbers([record])[json.dumps(record["digest"])]


def test_a_trial_gives_the_same_numbers_through_ray_train(inline: Result, trained: Result) -> None:
    check_books(trained, 6)
    first, second = numbers(inline.records()), numbers(trained.records())
    common = first.keys() & second.keys()
    assert len(common) >= 3
    assert {digest: first[digest] for digest in common} == {digest: second[digest] for digest in common}


def test_nothing_over_the_budget_was_trained(trained: Result) -> None:
    budget = trained.description["sweep"]["max_size_bytes"]
    assert max(row["size_bytes"] for row in trained.records()) <= budget
    assert trained.path.joinpath("trials").is_dir()


def test_no_process_is_started_between_trials(inline: Result, alone: Result, trained: Result) -> None:
    assert len({row["timing"]["slot"] for row in inline.records()}) == 2
    for result in (alone, trained):
        rows = sorted(result.records(), key=lambda row: row["trial"])
        assert len({row["timing"]["slot"] for row in rows}) == 1
        timings = [row["timing"] for row in rows]
        gaps = pd.Series([b["first_step_at"] - a["reported_at"] for a, b in pairwise(timings)])
        assert gaps.min() > 0
        assert gaps.median() < 2  # a new process takes longer; on quiet cores it is 0.2


def test_who_watches_hears_of_every_epoch_and_every_end(cluster: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Recorder(Watcher):
        def started(self, folder: Any, resolved: Any) -> None:
            seen.append("started")

        def event(self, book: Any) -> None:
            seen.append((sum(book.counts.values()), *(len(live.history) for live in book.live.values())))

        def closed(self) -> None:
            seen.append("closed")

    sweep = Sweep(trials=2, epochs=2, concurrent=1, settings=SMALL, mlflow_uri="http://127.0.0.1:9")
    raysearch.run(sweep, tmp_path / "run", watcher=Recorder())
    assert seen == ["started", (0, 0), (0, 1), (0, 2), (1,), (1, 0), (1, 1), (1, 2), (2,), "closed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 4}, "a trial of 4 workers needs 4 CPUs and 0 GPUs; the cluster has 2 and 0"),
        ({"cpus_per_worker": 3}, "a trial of 1 workers needs 3 CPUs"),
        ({"gpus_per_worker": 1.0}, "needs 1 CPUs and 1 GPUs; the cluster has 2 and 0"),
        ({"concurrent": 3}, "concurrent = 3: the cluster holds 2 such trials at the same time"),
        ({"workers": 2, "concurrent": 2}, "the cluster holds 1 such trials"),
    ],
    ids=str,
)
def test_more_than_the_cluster_has_is_an_error_before_anything_is_written(
    cluster: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SweepError, match=message):
        raysearch.run(Sweep(**{**SWEEP.tree(), **changes}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_says_it_in_one_line_with_exit_code_2(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "sweep", "--workers", "4", "--out", str(tmp_path / "run")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: a trial of 4 workers needs 4 CPUs")
    assert err.count("\n") == 1


@pytest.mark.parametrize("path", ["", "file", "other"])
def test_a_folder_that_is_taken_is_an_error_before_ray_starts(inline: Result, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(SweepError, match="take another --out"):
        raysearch.run(SWEEP, inline.path if path == "other" else tmp_path / path)
