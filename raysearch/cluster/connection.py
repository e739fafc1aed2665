"""Ray for the time of a sweep: one of our own on this machine, or the cluster that RAY_ADDRESS names.

What listens: our own Ray listens on loopback only, has no dashboard, and wants Ray's token, which lies in
`~/.ray/auth_token`, for its owner's eyes alone, and is made when it is missing. A cluster listens as its start commands
say (`cluster.yaml`); the token mode is set here in any case, because processes that do not say it decide by whether
they happen to have a token.
"""

import contextlib
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysearch import facts
from raysearch.cluster.shipping import runtime_env
from raysearch.errors import SweepError
from raysearch.sweep import Sweep

TRAINING_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    **facts.THREADS,
}
"""Environment of every process of a sweep, on every node."""
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # A Train run polls its workers' start at this interval; a group starts once for many trials, but a person waits.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A machine that a group waits for may have to be bought and set up first, or come back tomorrow.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(7 * 24 * 3600),
    # A worker that dies is replaced; Ray would announce it on stdout, where our data is.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    # Tune's own files are not read again: records and study are the truth.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    **TRAINING_ENVIRONMENT,
}
RAY_OPTIONS: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
CONNECT_S = 5.0


@contextlib.contextmanager
def ray_for(sweep: Sweep) -> Iterator[bool]:
    """Ray for the time of a sweep, and whether its nodes run the driver's code; one that runs already is left running.

    Raises:
        SweepError: there is no cluster at RAY_ADDRESS, or none that lets us in.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    mine = _start(sweep)
    try:
        with _terminable():
            yield mine
    finally:
        if mine:
            import ray

            ray.shutdown()


def start_local(**options: Any) -> None:
    """Start a Ray of our own on this machine, without the dashboard: its ten processes would take the first seconds."""
    import ray

    _want_token()
    _keep_token()
    with _on_loopback():
        ray.init(address="local", include_dashboard=False, object_store_memory=200 * 2**20, **RAY_OPTIONS, **options)


def _want_token() -> None:
    """Set the token mode, also for a Ray that was imported, and has read its environment, before."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    Config.initialize("")


def _keep_token() -> None:
    """Let nobody else on this machine read the token: it opens Ray to whoever has it. Ray makes it readable to all."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists() and not os.environ.get("RAY_AUTH_TOKEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="ascii") as fresh:  # its owner's alone
            fresh.write(secrets.token_hex(32))
            fresh.flush()
            with contextlib.suppress(FileExistsError):  # another driver was faster
                os.link(fresh.name, path)
    if path.exists() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let Ray listen on loopback only, as it does on macOS; elsewhere it has no setting for that."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _start(sweep: Sweep) -> bool:
    import ray

    if ray.is_initialized():
        return False
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, sweep)
    else:
        start_local()
    return True


def _join(address: str, sweep: Sweep) -> None:
    import ray
    from ray.exceptions import RayError

    _want_token()
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():
            # Ray itself would wait for minutes.
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        with tempfile.TemporaryDirectory() as scratch:
            shipped = runtime_env(sweep, TRAINING_ENVIRONMENT, Path(scratch))
            ray.init(address="auto", runtime_env=shipped, **RAY_OPTIONS)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        why = " ".join(str(error).split())
        if "Version mismatch" in why:
            hint = "install the same versions here and there"
        elif "oken" in why or "Failed to connect" in why:
            hint = "its token must be the one in ~/.ray/auth_token here, and its start commands say RAY_AUTH_MODE=token"
        else:
            hint = "start a cluster there (ray start --head), or unset RAY_ADDRESS"
        raise SweepError(f"RAY_ADDRESS = {address}: {why}; {hint}") from error


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C, so that the end is orderly; Ray's own handler would abort."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
