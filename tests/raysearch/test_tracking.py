"""The mirror against real MLflow: databases in temporary folders, and one real server."""

import json
import os
import posixpath
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import ViewType

from raysearch import mlflow_entries as entries
from raysearch.mlflow_links import Progress, front_url, pages, public, redact, tracking_uri
from raysearch.mlflow_session import Lines
from raysearch.tracking import Mirror, mirror_once, start_mirror, status
from tests.ports import free_port

NAME = "digits-lenet5-lsq-20261121-101500"
START_S = 1_795_256_103
SWEEP = {
    "name": NAME,
    "method": "lsq",
    "model": "lenet5",
    "data": "digits",
    "space": "uniform",
    "objectives": {"accuracy": "max", "bops": "min"},
    "trials": 6,
    "seed": 0,
}


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(START_S + seconds, UTC).isoformat()


def epoch(trial: int, number: int, accuracy: float = 0.5) -> dict[str, Any]:
    line = {"epoch": number, "train_loss": 1 / number, "accuracy": accuracy, "loss": 0.5 / number, "bops": 100}
    return {"trial": trial, **line, "seconds": 1.5, "time": START_S + 10 * trial + 2.0 * number}


def record(trial: int, accuracy: float | None, bops: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "sweep": NAME,
        "trial": trial,
        "point": "final",
        "status": "complete",
        "reason": None,
        "accuracy": accuracy,
        "loss": 0.25,
        "bops": bops,
        "relative_bops": bops / 1000,
        "size_bytes": 64 * bops,
        "macs": 10,
        "bits": {"conv1": [8, 8], "fc": [4, 3]},
        "epoch": 2,
        "epochs": 2,
        "seconds": 4.0,
        "seed": 0,
        "digest": f"digest{trial}",
        "source": "tpe",
        "method": "lsq",
        "model": "lenet5",
        "data": "digits",
        "params": {"bits/fc/weight": 4, "optimizer/lr": 0.1},
        "config": {},
        "history": [{"epoch": 1, "accuracy": 0.5}, {"epoch": 2, "accuracy": accuracy}],
        "checkpoint": f"trials/{trial:05d}",
        "started_at": moment(10 * trial),
        "finished_at": moment(10 * trial + 4),
        "versions": {},
        "git": {"commit": "c0ffee", "dirty": False},
    } | changes


RECORDS = [
    record(0, 0.80, 100),
    record(1, 0.90, 200),
    record(2, None, 150, status="failed", reason="accuracy is nan after epoch 2"),
    record(3, 0.85, 300),
    record(4, 0.60, 120, status="pruned", reason="rung 1"),
    record(5, 0.95, 400),
]


def append(run: Path, name: str, *lines: dict[str, Any]) -> None:
    with (run / name).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(autouse=True)
def _no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The folder of a sweep that has just begun; it has no store yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "sweep.json").write_text(json.dumps(SWEEP))
    return run


@pytest.fixture
def run(fresh: Path, empty_store: Path) -> Path:
    """The folder of a sweep that is done, with a store that knows nothing of it."""
    shutil.copy(empty_store, fresh)
    return finished(fresh)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """The folder of a sweep that is done and in its store; to be read only."""
    run = tmp_path_factory.mktemp("mirrored")
    (run / "sweep.json").write_text(json.dumps(SWEEP))
    shutil.copy(empty_store, run)
    mirror_once(finished(run), f"sqlite:///{run / 'mlflow.db'}")
    return run


def finished(run: Path) -> Path:
    append(run, "epochs.jsonl", *(epoch(line["trial"], number) for line in RECORDS for number in (1, 2)))
    append(run, "records.jsonl", *RECORDS)
    return run


def client_of(run: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run / 'mlflow.db'}")


def runs_of(client: MlflowClient, view: int = ViewType.ACTIVE_ONLY) -> dict[str, Any]:
    """Every run of the sweep by its name, which must be unique."""
    experiment = client.get_experiment_by_name(NAME)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "", view, 1000)
    names = [run.info.run_name for run in found]
    assert len(names) == len(set(names))
    return {run.info.run_name: run for run in found}


def on_front(client: MlflowClient) -> set[str]:
    return {name for name, run in runs_of(client).items() if run.data.tags.get("pareto") == "true"}


def everything(client: MlflowClient) -> dict[str, Any]:
    """All that MLflow knows of the sweep, except for the ids of its runs."""
    return {
        name: (
            (run.info.status, run.info.start_time, run.info.end_time),
            run.data.params,
            run.data.tags,
            {key: history(client, run, key) for key in run.data.metrics},
            [file.path for file in client.list_artifacts(run.info.run_id)],
        )
        for name, run in sorted(runs_of(client).items())
    }


def history(client: MlflowClient, run: Any, key: str) -> list[tuple[int, float, int]]:
    found = client.get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value, metric.timestamp) for metric in found)


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


def test_a_store_that_is_no_store_is_reported_and_raises_nothing(run: Path) -> None:
    found = mirror_once(run, f"sqlite:///{run / 'sweep.json'}")
    assert not found.complete
    assert found.error is not None
    assert "cannot write to MLflow at sqlite:///" in found.error
    assert mirror_once(run).complete


DRIVER = """
import sys, time
from pathlib import Path
from raysearch.tracking import start_mirror
mirror = start_mirror(Path(sys.argv[1]))
assert "mlflow" not in sys.modules
print(mirror.process.pid, flush=True)
time.sleep(600)
"""


def test_the_mirror_follows_a_sweep_into_a_new_store_and_outlives_a_killed_driver_until_all_is_sent(
    fresh: Path,
) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, fresh], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        append(fresh, "epochs.jsonl", epoch(0, 1))
        wait_until(lambda: Progress.load(fresh).epochs_sent > 0)
        assert runs_of(client_of(fresh))["trial-0000"].info.status == "RUNNING"
        append(fresh, "records.jsonl", *RECORDS)
    finally:
        driver.kill()
        driver.communicate()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    assert status(fresh).complete
    assert on_front(client_of(fresh)) == {"trial-0000", "trial-0001", "trial-0005"}


def test_a_server_that_never_answers_delays_nobody(fresh: Path) -> None:
    append(fresh, "records.jsonl", *RECORDS)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        mirror = start_mirror(fresh, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        silent.settimeout(30)
        held = silent.accept()  # the mirror asks, and hears nothing
        asked = time.monotonic()
        found = mirror.close(0.5)
        closed = time.monotonic()
        held[0].close()
    assert started - began < 1
    assert closed - asked < 2
    assert (found.complete, found.trials) == (False, 0)
    assert found.error == "MLflow did not catch up within 0.5 s"


def test_what_a_server_missed_arrives_when_it_is_there_and_no_file_has_its_password(run: Path, tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://ann:s3cret@127.0.0.1:{port}"
    mirror = start_mirror(run, uri)
    assert b"s3cret" not in Path(f"/proc/{mirror.process.pid}/cmdline").read_bytes()
    wait_until(lambda: Progress.load(run).error is not None)
    assert f"http://127.0.0.1:{port}: MlflowException" in str(status(run).error)
    append(run, "records.jsonl", record(6, 0.99, 50))
    with server(port, tmp_path):
        found = mirror.close(60)
        assert (found.complete, found.trials, found.error) == (True, 7, None)
        client = MlflowClient(f"http://127.0.0.1:{port}")
        assert on_front(client) == {"trial-0006"}
        files = [file.path for file in client.list_artifacts(runs_of(client)["summary"].info.run_id)]
        assert files == ["front.csv", "front.json", "front.png", "summary.html"]
        experiment = runs_of(client)["summary"].info.experiment_id
    assert front_url(run, uri).startswith(f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?")
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"mlflow.json", "mlflow.log"} <= {path.name for path in written}
    assert [path for path in written if b"s3cret" in path.read_bytes()] == []


class server:
    """A real MLflow server, ready when entered."""

    def __init__(self, port: int, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        options = f"--workers 1 --host 127.0.0.1 --port {port} --backend-store-uri sqlite:///{folder}/server.db"
        places = ["--artifacts-destination", str(folder / "artifacts")]
        self.command = [sys.executable, "-m", "mlflow", "server", *options.split(), *places]

    def __enter__(self) -> None:
        env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(self.command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)
        wait_until(self._ready)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def wait_until(true: Any, at_most_s: float = 60) -> None:
    end = time.monotonic() + at_most_s
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)


def test_a_mirror_that_fails_by_an_error_of_its_own_names_the_log(fresh: Path) -> None:
    (fresh / "sweep.json").write_text("{")
    mirror: Mirror = start_mirror(fresh)
    found = mirror.close(30)
    assert found.error == f"the mirror failed with 1, see {fresh / 'mlflow.log'}"
    assert "JSONDecodeError" in (fresh / "mlflow.log").read_text()


def test_addresses_lead_to_the_front_its_page_its_comparison_and_its_models(fresh: Path) -> None:
    assert front_url(fresh) == "http://127.0.0.1:5000/#/experiments"
    known = Progress(uri=f"sqlite:///{fresh}/mlflow.db", sweep=NAME, experiment_id="7", summary="c0", front=["a", "b"])
    known.save(fresh)
    mode = "workflowType=machine_learning"
    page = f"/#/experiments/7/runs?{mode}&viewStateShareKey=front"
    assert front_url(fresh, port=5001) == f"http://127.0.0.1:5001{page}"
    assert pages(fresh, url="http://127.0.0.1:5002") == {
        "front": f"http://127.0.0.1:5002{page}",
        "summary": f"http://127.0.0.1:5002/#/experiments/7/runs/c0/artifacts/summary.html?{mode}",
        "compare": f"http://127.0.0.1:5002/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D&{mode}",
        "models": f"http://127.0.0.1:5002/#/models/{NAME}?{mode}",
    }
    assert pages(fresh, "http://host:80") == {"front": "http://host:80/#/experiments"}


def test_the_store_of_the_environment_goes_before_our_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////elsewhere/mlflow.db")
    assert tracking_uri(fresh) == "sqlite:////elsewhere/mlflow.db"
    assert tracking_uri(fresh, "sqlite:////given.db") == "sqlite:////given.db"


SECRET = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12)


@given(user=SECRET, password=SECRET, token=SECRET)
def test_addresses_lose_their_secrets_wherever_they_stand(user: str, password: str, token: str) -> None:
    uri = f"https://{user}:{password}@host:5000/ml?token={token}"
    assert public(uri) == "https://host:5000/ml"
    text = redact(f"Error('cannot reach {uri}')")
    assert not any(secret in text for secret in (user, password, token))


@given(st.text(max_size=300) | st.text("a./ :", max_size=300))
def test_every_name_is_made_one_that_mlflow_takes_and_a_good_one_is_kept(text: str) -> None:
    name = entries.entry_name(text)
    assert re.fullmatch(r"[/\w.\- :]{1,250}", name)
    assert posixpath.normpath(name) == name
    assert not name.startswith(("/", "..")) or name.startswith("...") or re.match(r"\.\.[^/]", name)
    assert entries.entry_name(name) == name


@settings(max_examples=50)
@given(
    values=st.lists(st.text(max_size=20), max_size=8),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    most=st.integers(1, 99),
)
def test_lines_are_the_same_however_the_file_grows_and_however_much_is_read_at_once(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], cuts: list[int], most: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    data = b"".join(json.dumps({"value": value}).encode() + b"\n" for value in values)
    lines, found = Lines(path), []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(data)], strict=True):
        with path.open("ab") as file:
            file.write(data[start:end])
        while more := lines.read(lines.size(), most):
            found += more
    assert [line["value"] for line in found] == values
    assert not lines.waiting()


@given(st.integers(0, 400))
def test_a_description_fits_into_a_tag_and_counts_what_it_leaves_out(points: int) -> None:
    front = pd.DataFrame({"trial": range(points), "accuracy": 0.5, "bops": 1000, "bits": "8/8 4/4x18 8/8"})
    text = entries.description(SWEEP, front, points)
    shown = sum(line.startswith("| ") for line in text.splitlines()) - 2
    left_out = re.search(r"and (\d+) more", text)
    assert len(text) <= entries.TAG_MAX
    assert shown + (int(left_out[1]) if left_out else 0) == points
