"""MLflow's pages of sweeps on this machine: a server on loopback for each database, and where to click.

A sweep whose store is a server needs none; a sweep whose mirror is behind is caught up first.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from raysearch.errors import TrialError
from raysearch.mirror.links import is_served, tracking_uri

HOST = "127.0.0.1"
START_S = 120.0
STOP_S = 10.0
LEAN = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""Without the workers of its jobs, MLflow's server starts in half the time and a sixth of the memory."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """MLflow's server at work on a database.

    Attributes:
        url: of its pages.
        process: leads a session of its own.
        log: what it says.
    """

    url: str
    process: "subprocess.Popen[bytes]"
    log: IO[bytes]

    def wait_until_ready(self) -> None:
        """Return when it answers.

        Raises:
            TrialError: it ended, or took too long.
        """
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise TrialError(f"MLflow's server ended with {self.process.returncode}: {self._last_words()}")
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.2)
        raise TrialError(f"MLflow's server does not answer at {self.url} after {START_S:g} s: {self._last_words()}")

    def stop(self) -> None:
        """End it and its workers."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
                break
        self.log.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def start_server(run: Path, uri: str | None, port: int) -> Server:
    """Start MLflow's server on a sweep's database; `wait_until_ready` says when it answers."""
    log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the server
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", HOST, "--port", str(port)],
        # The address may hold a password, and everybody may read the arguments of a process.
        env={**LEAN, **os.environ, "MLFLOW_BACKEND_STORE_URI": tracking_uri(run, uri)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that all of it can be ended; Ctrl-C is for us
    )
    return Server(url=f"http://{HOST}:{port}", process=process, log=log)


def is_own(run: Path, uri: str | None) -> bool:
    """Whether the sweep's store is a database, which needs a server of ours."""
    return not is_served(tracking_uri(run, uri))


def free_ports(first: int) -> Iterator[int]:
    """Ports of loopback that nobody listens on, from `first` on."""
    for port in range(first, 65536):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        yield port
    raise TrialError(f"no free port from {first} on")


def is_running(run: Path) -> bool:
    """Whether a driver is at work on the sweep, and its mirror with it."""
    import filelock

    if not (run / ".lock").exists():
        return False
    try:
        with filelock.FileLock(run / ".lock", blocking=False):
            return False
    except filelock.Timeout:
        return True
