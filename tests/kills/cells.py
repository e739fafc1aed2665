"""One cell of the kill matrix: a small sweep, one death or fault at one moment, and what must hold afterwards.

The sweep is always the same: uniform widths, one trial at a time, one worker; so its numbers are those of a sweep that
nothing happened to, to the last bit. Ended drivers are resumed; nobody else gets help.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysearch.result import Result
from raysearch.sweep import Sweep
from tests.kills.machines import Machines
from tests.kills.moments import Events
from tests.kills.victims import descendants, end_all, find, kill, processes
from tests.ports import free_port
from tests.raysearch.cluster import ROOT, check_books, numbers

TRIALS, EPOCHS = 4, 2
PATIENCE_S = 600
FAULT_S = 6.0
HANG_S = 15
SETTINGS = {
    "start/epochs": 1,
    "optimizer/lr": 0.005,
    "training/batch_size": 8,
    "data/train_limit": 640,
    "data/validation_limit": 300,
}
STORAGE_BYTES = 24 * 2**20
IN_GROUPS = ("rank", "controller", "hung rank")
FAULTS = ("storage full", "storage read-only", "hung rank", "hung slot")
"""What is no death."""


@dataclass(frozen=True)
class Ran:
    """A sweep in the end.

    Attributes:
        resumed: how often a person had to.
        seconds: from the first start to the last end.
    """

    path: Path
    resumed: int
    seconds: float


def question(seed: int, *, grouped: bool, uri: str | None = None) -> Sweep:
    """The sweep of a cell."""
    return Sweep(
        space="uniform",
        trials=TRIALS,
        epochs=EPOCHS,
        concurrent=1,
        train=grouped,
        seed=seed,
        settings=SETTINGS,
        mlflow_uri=uri,
        hang_timeout=HANG_S,
    )


class Cell:
    """A sweep and what happens to it.

    Args:
        victim: of `victims.VICTIMS`, or one of `FAULTS`, or empty: nothing happens.
        moment: of `moments.MOMENTS`.
        folder: for everything, new.
        seed: of the sweep.
        delay: from the moment to the blow, in seconds.
    """

    def __init__(self, victim: str, moment: str, folder: Path, *, seed: int = 0, delay: float = 0.0) -> None:
        self.victim, self.moment, self.delay = victim, moment, delay
        folder.mkdir(parents=True)
        self.folder, self.run = folder, folder / "storage" / "run"
        self.run.parent.mkdir()
        self.log = (folder / "log.txt").open("w")
        self.machines = Machines(2) if victim == "node" else None
        self.server = Server(folder / "mlflow") if victim == "mlflow" else None
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if self.machines:
            self.environment["RAY_ADDRESS"] = self.machines.address
        sweep = question(seed, grouped=victim in IN_GROUPS, uri=self.server and self.server.uri)
        (folder / "sweep.json").write_text(json.dumps(sweep.tree()))

    def play(self) -> Ran:
        """Run the sweep, strike, and go on until it has ended.

        Raises:
            AssertionError: it does not end well.
        """
        began = time.monotonic()
        resumed = 0
        try:
            self.driver = self._start("sweep", "--from", str(self.folder / "sweep.json"), "--out", str(self.run))
            if self.victim:
                self._strike()
            code = self.driver.wait(PATIENCE_S)
            end_all(self.driver.pid)
            while code != 0:
                assert self.victim in ("driver", "head"), f"the driver ended with {code}"
                assert resumed < 2, f"resumed twice, then ended with {code}"
                resumed += 1
                if (self.run / "sweep.json").exists():
                    self.driver = self._start("resume", str(self.run))
                else:
                    shutil.rmtree(self.run, ignore_errors=True)
                    self.driver = self._start(
                        "sweep", "--from", str(self.folder / "sweep.json"), "--out", str(self.run)
                    )
                code = self.driver.wait(PATIENCE_S)
                end_all(self.driver.pid)
            if self.server:
                self.server.start()
                assert self._start("mirror", str(self.run)).wait(PATIENCE_S) == 0, "MLflow misses something"
        finally:
            end_all(self.driver.pid)
            self.log.close()
            if self.machines:
                self.machines.close()
            if self.server:
                self.server.kill()
        return Ran(self._kept(), resumed, time.monotonic() - began)

    def _kept(self) -> Path:
        kept = self.folder / "kept"
        return kept if kept.exists() else self.run

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "from raysearch.cli import main; main()", *arguments]
        if self.victim.startswith("storage") and arguments[0] == "sweep":
            # A file system of its own, in a mount namespace that ends with the driver.
            script = (
                f'mount -t tmpfs -o size={STORAGE_BYTES} none "$1" && folder="$1" && shift && "$@"; code=$?; '
                f'cp -a "$folder/run" "{self.folder}/kept"; exit $code'
            )
            command = [*ISOLATED, "bash", "-c", script, "storage", str(self.run.parent), *command]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def _alive(self) -> None:
        assert self.driver.poll() is None, f"the driver ended before {self.moment}, with {self.driver.returncode}"

    def _strike(self) -> None:
        run = self.run
        if self.victim.startswith("storage"):
            while not (
                inner := [pid for pid in descendants(self.driver.pid) if _in_other_mounts(pid, self.run.parent)]
            ):
                self._alive()
                time.sleep(0.01)
            run = Path(f"/proc/{inner[0]}/root") / self.run.relative_to("/")
        events = Events(run, self._alive)
        try:
            events.wait_for(self.moment)
        finally:
            events.close()
        time.sleep(self.delay)
        if self.victim in ("storage full", "storage read-only"):
            self._spoil(inner[0])
        elif self.victim.startswith("hung"):
            (pid,) = find(self.victim.removeprefix("hung "), self.driver.pid, self._alive)
            os.kill(pid, signal.SIGSTOP)
        else:
            kill(*self._victims())

    def _victims(self) -> list[int]:
        if self.victim == "driver":
            return [self.driver.pid]
        if self.server:
            return self.server.pids()
        if self.machines:
            slot = find("slot", os.getsid(self.machines.raylets[0]), self._alive)[0]
            return next(pids for pids in map(descendants, self.machines.raylets) if slot in pids)
        return find(self.victim, self.driver.pid, self._alive)

    def _spoil(self, inside: int) -> None:
        """Fill the storage, or make the run folder read-only for whoever opens a file there, and undo it."""
        here = shutil.which("nsenter"), "-t", str(inside), *NAMESPACES, "bash", "-c"
        folder = self.run.parent
        if self.victim == "storage full":
            do, undo = f"cat /dev/zero > {folder}/filler; true", f"rm {folder}/filler"
        else:
            do = f"mount --bind {self.run} {self.run} && mount -o remount,ro,bind {self.run}"
            undo = f"umount -l {self.run}"
        subprocess.run([*map(str, here), do], check=True, stderr=subprocess.DEVNULL)
        time.sleep(FAULT_S)
        subprocess.run([*map(str, here), undo], check=True)


NAMESPACES = ("-m",) if os.getuid() == 0 else ("-U", "--preserve-credentials", "-m")
ISOLATED = ("unshare", "-m") if os.getuid() == 0 else ("unshare", "-Urm")


def can_mount() -> bool:
    """Whether this machine lets us mount a file system in a namespace of our own."""
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        return False
    return subprocess.run([*ISOLATED, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


def _in_other_mounts(pid: int, folder: Path) -> bool:
    try:
        return f" {folder} " in Path(f"/proc/{pid}/mountinfo").read_text()
    except OSError:
        return False


class Server:
    """An MLflow server.

    Args:
        folder: for its database.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, if it is not running, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        end = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db"]
        with (self._folder / "log.txt").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *end, *store],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise AssertionError("MLflow does not start")

    def pids(self) -> list[int]:
        """Its processes."""
        assert self._process
        return list(processes(self._process.pid))

    def kill(self) -> None:
        """End it."""
        assert self._process
        kill(*self.pids())
        self._process.wait()


def check(ran: Ran, expected: dict[str, Any]) -> None:
    """The books are whole, and the numbers are those of the undisturbed sweep.

    Raises:
        AssertionError: what is wrong.
    """
    result = Result(ran.path)
    for name in ("records.jsonl", "epochs.jsonl"):
        data = (ran.path / name).read_bytes()
        assert data.endswith(b"\n"), f"{name} ends in a torn line"
        assert all(isinstance(json.loads(line), dict) for line in data.splitlines()), f"{name} has a damaged line"
    check_books(result, TRIALS)
    found = outcome(ran.path)
    assert found["numbers"] == expected["numbers"], "the epochs differ from those of the undisturbed sweep"
    assert found["front"] == expected["front"], "the front differs from that of the undisturbed sweep"


def outcome(run: Path) -> dict[str, Any]:
    """What two sweeps of the same seed must have in common."""
    result = Result(run)
    front = result.front().to_pandas()[["trial", "accuracy", "bops", "size_bytes"]]
    return {"numbers": numbers(result.records()), "front": front.sort_values("trial").to_dict("records")}
