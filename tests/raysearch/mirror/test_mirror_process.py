"""The mirror as a process of its own: killed drivers, servers that are silent, late or missing."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from raysearch.mirror.links import Progress, front_url
from raysearch.tracking import Mirror, start_mirror, status
from tests.ports import free_port
from tests.raysearch.mirror.swept import RECORDS, append, client_of, epoch, on_front, record, runs_of

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
        [sys.executable, "-c", DRIVER, fresh], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
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
