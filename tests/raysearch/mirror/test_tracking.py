"""The mirror against real MLflow, in databases of temporary folders: what is in the store, whatever happened."""

import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import ViewType

from raysearch.tracking import mirror_once, mirror_rest, status
from tests.raysearch.mirror.swept import (
    NAME,
    START_S,
    SWEEP,
    append,
    client_of,
    epoch,
    everything,
    history,
    on_front,
    record,
    runs_of,
)


def test_a_trial_becomes_a_flat_run_with_its_params_tags_curves_and_times(mirrored: Path) -> None:
    found = status(mirrored)
    assert (found.complete, found.trials, found.error) == (True, 6, None)
    client = client_of(mirrored)
    trial = runs_of(client)["trial-0001"]
    facts = {"method": "lsq", "model": "lenet5", "data": "digits", "seed": "0", "epochs": "2", "source": "tpe"}
    assert trial.data.params == {**facts, "bits/fc/weight": "4", "optimizer/lr": "0.1"}
    assert trial.data.tags == {
        "mlflow.runName": "trial-0001",
        "mlflow.source.git.commit": "c0ffee",
        "raysearch.sweep": NAME,
        "raysearch.kind": "trial",
        "raysearch.trial": "1",
        "raysearch.status": "complete",
        "raysearch.digest": "digest1",
        "raysearch.bits": "8/8 4/3",
        "raysearch.checkpoint": "trials/00001",
        "mlflow.note.content": "90.00% validation accuracy, 20.000% relative BOPs, 200 BOPs, 12.5 KiB as exported",
        "pareto": "true",
    }
    first, second, end = (1000 * (START_S + 10 + seconds) for seconds in (2, 4, 4))
    assert history(client, trial, "train_loss") == [(1, 1.0, first), (2, 0.5, second)]
    assert history(client, trial, "bops") == [(1, 100, first), (2, 100, second), (2, 200, end)]
    assert trial.data.metrics["trial_seconds"] == 4.0
    assert (trial.info.status, trial.info.end_time) == ("FINISHED", end)
    assert trial.info.artifact_uri.startswith((mirrored / "mlartifacts").as_uri())


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [("trial-0002", "FAILED", "accuracy is nan after epoch 2"), ("trial-0004", "KILLED", "rung 1")],
)
def test_a_trial_that_did_not_complete_says_why(mirrored: Path, name: str, outcome: str, reason: str) -> None:
    trial = runs_of(client_of(mirrored))[name]
    assert (trial.info.status, trial.data.tags["raysearch.reason"]) == (outcome, reason)


def test_the_tags_of_the_front_move_when_a_better_trial_comes(run: Path) -> None:
    mirror_once(run)
    client = client_of(run)
    assert on_front(client) == {"trial-0000", "trial-0001", "trial-0005"}
    append(run, "records.jsonl", record(6, 0.96, 150))
    mirror_once(run)
    assert on_front(client) == {"trial-0000", "trial-0006"}


def test_the_summary_has_the_front_as_table_and_picture_and_the_hypervolume_after_each_trial(mirrored: Path) -> None:
    client = client_of(mirrored)
    summary = runs_of(client)["summary"]
    folder = Path(client.download_artifacts(summary.info.run_id, ""))
    assert pd.read_csv(folder / "front.csv")["trial"].tolist() == [5, 1, 0]
    assert [point["bits"]["fc"] for point in json.loads((folder / "front.json").read_text())] == [[4, 3]] * 3
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "3 points on the front of 4 completed trials" in (folder / "summary.html").read_text()
    volumes = history(client, summary, "hypervolume")
    expected = [0.8 * 0.9, 0.8 * 0.9 + 0.1 * 0.8, 0.8 * 0.9 + 0.1 * 0.8, 0.8 * 0.9 + 0.1 * 0.8 + 0.05 * 0.6]
    assert [step for step, _, _ in volumes] == [1, 2, 3, 4]
    assert [volume for _, volume, _ in volumes] == pytest.approx(expected)
    assert "| 5 | 95.00% | 400 | 8/8 4/3 |" in summary.data.tags["mlflow.note.content"].splitlines()
    assert (summary.info.status, summary.data.params["objectives/bops"]) == ("FINISHED", "min")


def test_a_search_for_the_loss_has_a_summary_without_hypervolume(run: Path) -> None:
    (run / "sweep.json").write_text(json.dumps(SWEEP | {"objectives": {"loss": "min", "bops": "min"}}))
    assert mirror_once(run).complete
    assert runs_of(client_of(run))["summary"].data.metrics == {}


def test_each_trial_gives_one_hypervolume_even_when_a_larger_network_rescales_the_earlier_ones(run: Path) -> None:
    (run / "sweep.json").write_text(json.dumps(SWEEP | {"objectives": {"accuracy": "max", "size_bytes": "min"}}))
    mirror_once(run)
    client = client_of(run)
    before = history(client, runs_of(client)["summary"], "hypervolume")
    append(run, "records.jsonl", record(6, 0.99, 5000))
    mirror_once(run)
    after = history(client, runs_of(client)["summary"], "hypervolume")
    assert [step for step, _, _ in after] == [1, 2, 3, 4, 5]
    assert after[:4] == before


def test_a_sweep_that_is_extended_keeps_its_first_settings_and_goes_on(run: Path) -> None:
    mirror_once(run)
    (run / "sweep.json").write_text(json.dumps(SWEEP | {"trials": 8, "workers": 2}))
    append(run, "records.jsonl", record(6, 0.99, 50))
    assert mirror_once(run).error is None
    summary = runs_of(client_of(run))["summary"]
    assert (summary.data.params["trials"], summary.data.params["workers"], summary.info.status) == ("6", "2", "KILLED")
    assert "| 6 | 99.00% | 50 | 8/8 4/3 |" in summary.data.tags["mlflow.note.content"]


def test_a_second_run_of_a_trial_made_by_a_lost_answer_is_removed(run: Path) -> None:
    mirror_once(run)
    client = client_of(run)
    before = everything(client)
    twin = runs_of(client)["trial-0001"]
    client.create_run(twin.info.experiment_id, 0, {**twin.data.tags, "pareto": "false"}, twin.info.run_name)
    assert mirror_once(run).complete
    assert everything(client) == before


def test_mirroring_again_changes_nothing(run: Path) -> None:
    mirror_once(run)
    before = everything(client_of(run))
    assert mirror_once(run).complete
    assert everything(client_of(run)) == before


def test_what_is_all_there_is_not_sent_again_unless_the_store_is_lost(run: Path) -> None:
    mirror_once(run)
    before, written = len(runs_of(client_of(run))), (run / "mlflow.json").stat()
    assert mirror_rest(run, None, wait_s=60).complete
    assert (run / "mlflow.json").stat() == written
    (run / "mlflow.db").unlink()
    assert mirror_rest(run, None, wait_s=60).complete
    with sqlite3.connect(run / "mlflow.db") as store:  # MLflow's client here still has the old file open
        assert store.execute("SELECT COUNT(*) FROM runs").fetchone() == (before,)


def test_without_its_memory_the_mirror_finds_the_runs_again_and_changes_nothing(run: Path) -> None:
    mirror_once(run)
    before = everything(client_of(run))
    (run / "mlflow.json").unlink()
    assert mirror_once(run).complete
    assert everything(client_of(run)) == before


def test_killed_after_any_write_the_mirror_ends_with_the_same(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "undisturbed")
    mirror_once(other)
    for writes in range(1, 40):
        if mirror_killed_after(writes, run) == 0:
            break
    else:
        pytest.fail("the mirror got nowhere")
    assert writes > 5
    assert status(run).complete
    assert everything(client_of(run)) == everything(client_of(other))


def mirror_killed_after(writes: int, run: Path) -> int:
    """Mirror in a process that gets SIGKILL when so many writes have arrived, before it hears of the last one."""
    pid = os.fork()
    if pid == 0:
        left = [writes]

        def deadly(write: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                done = write(*args, **kwargs)
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return done

            return call

        writing = "create_experiment create_run log_batch set_tag delete_tag set_terminated log_text log_artifact"
        for name in writing.split():
            setattr(MlflowClient, name, deadly(getattr(MlflowClient, name)))
        os._exit(0 if mirror_once(run).complete else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_torn_last_line_waits_until_it_is_whole(run: Path) -> None:
    whole = json.dumps(record(6, 0.96, 50)) + "\n"
    with (run / "records.jsonl").open("a") as file:
        file.write(whole[:100])
    assert mirror_once(run).trials == 6
    with (run / "records.jsonl").open("a") as file:
        file.write(whole[100:])
    assert not status(run).complete
    assert mirror_once(run).trials == 7
    assert on_front(client_of(run)) == {"trial-0006"}


def test_a_line_that_was_never_finished_is_left_out_and_said_so(run: Path) -> None:
    size = (run / "records.jsonl").stat().st_size
    with (run / "records.jsonl").open("a") as file:
        file.write('{"trial": 6, "acc' + json.dumps(record(7, 0.9, 50)) + "\n")
    append(run, "records.jsonl", record(8, 0.9, 40))
    assert mirror_once(run).complete
    assert {"trial-0006", "trial-0007", "trial-0008"} & set(runs_of(client_of(run))) == {"trial-0008"}
    assert f"records.jsonl: the line at byte {size} is not JSON" in (run / "mlflow.log").read_text()


def test_a_trial_is_interrupted_when_nobody_trains_it_and_goes_on_when_the_sweep_does(run: Path) -> None:
    append(run, "epochs.jsonl", epoch(6, 1))
    mirror_once(run)
    client = client_of(run)
    trial = runs_of(client)["trial-0006"]
    assert (trial.info.status, trial.data.tags["raysearch.status"]) == ("KILLED", "interrupted")
    append(run, "epochs.jsonl", epoch(6, 2))
    append(run, "records.jsonl", record(6, 0.5, 500))
    mirror_once(run)
    trial = runs_of(client)["trial-0006"]
    assert (trial.info.status, trial.data.tags["raysearch.status"]) == ("FINISHED", "complete")
    assert [step for step, _, _ in history(client, trial, "train_loss")] == [1, 2]


def test_epochs_that_nobody_wrote_while_training_come_from_the_record(run: Path) -> None:
    append(run, "records.jsonl", record(6, 0.7, 90))
    mirror_once(run)
    client = client_of(run)
    start = 1000 * (START_S + 60)
    expected = [(1, 0.5, start + 2000), (2, 0.7, start + 4000)]
    assert history(client, runs_of(client)["trial-0006"], "accuracy") == expected


def test_operating_points_of_a_trial_share_its_run(run: Path) -> None:
    append(run, "records.jsonl", record(6, 0.97, 500, point="w8a8"), record(6, 0.7, 20, point="w2a2"))
    assert mirror_once(run).trials == 7
    trial = runs_of(client_of(run))["trial-0006"]
    assert (trial.data.metrics["w8a8/accuracy"], trial.data.metrics["w2a2/accuracy"]) == (0.97, 0.7)
    assert trial.data.tags["raysearch.bits.w2a2"] == "8/8 4/3"


def test_a_run_that_a_person_deleted_stays_deleted_and_stops_nothing(run: Path) -> None:
    append(run, "epochs.jsonl", epoch(6, 1))
    mirror_once(run)
    client = client_of(run)
    client.delete_run(runs_of(client)["trial-0006"].info.run_id)
    append(run, "records.jsonl", record(6, 0.5, 500), record(7, 0.99, 10))
    found = mirror_once(run)
    assert found.complete
    assert found.error is not None
    assert found.error.startswith("MLflow refuses trial 6")
    assert "trial-0006" not in runs_of(client)
    assert "trial-0006" in runs_of(client, ViewType.ALL)
    assert on_front(client) == {"trial-0007"}


def test_another_store_gets_everything_from_the_start(run: Path, empty_store: Path, tmp_path: Path) -> None:
    mirror_once(run)
    second = Path(shutil.copy(empty_store, tmp_path / "second.db"))
    assert mirror_once(run, f"sqlite:///{second}").complete
    assert everything(MlflowClient(f"sqlite:///{second}")) == everything(client_of(run))


def test_many_params_long_values_and_odd_names_are_taken(run: Path) -> None:
    many = {f"bits/layer{index}.0.conv1/weight": 4 for index in range(150)}
    odd = {"../x[0]": "y" * 7000, "a//b": None, "n" * 300: True, "nested": {"lr": [0.1, 0.2]}}
    append(run, "records.jsonl", record(6, 0.9, 500, params=many | odd, loss=float("inf")))
    assert mirror_once(run).error is None
    trial = runs_of(client_of(run))["trial-0006"]
    assert len(trial.data.params) == 6 + 150 + 4
    assert trial.data.params["x_0_"] == "y" * 6000
    assert (trial.data.params["a/b"], trial.data.params["n" * 250]) == ("null", "true")
    assert trial.data.params["nested/lr"] == "[0.1, 0.2]"
    assert "loss" not in trial.data.metrics


def test_a_second_mirror_of_a_folder_is_turned_away(run: Path) -> None:
    with FileLock(run / ".mlflow.lock"):
        found = mirror_once(run)
    assert (found.complete, found.error) == (False, f"another mirror is at work on {run}")


def test_a_store_that_is_no_store_is_reported_and_raises_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 2)  # MLflow tries ten times, for 102 seconds
    found = mirror_once(run, f"sqlite:///{run / 'sweep.json'}")
    assert not found.complete
    assert found.error is not None
    assert "cannot write to MLflow at sqlite:///" in found.error
    assert mirror_once(run).complete
