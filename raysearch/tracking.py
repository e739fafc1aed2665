"""The mirror of a sweep in MLflow. Truth is on disk; MLflow is told of it, and may be away for as long as it likes.

    driver -- appends --> RUN/records.jsonl, RUN/epochs.jsonl -- read by --> the mirror's process -- writes --> MLflow

The mirror is a small process of its own, started by `start_mirror`. The end of its standard input tells it to end, and
that also comes when the driver dies. So the driver never imports MLflow and never waits for it. A store that fails is
tried again and again, more and more rarely; what it missed arrives later, even after the sweep, by `mirror_once`:

    python -m raysearch.tracking RUN [URI]

MLflow gets one experiment for a sweep; one run for a trial, flat, because MLflow's pages hide nested runs; the tag
`pareto = true` on those on the front; and a run `summary` with the front as a table and a picture.

    mirror/links      where it is found, how far it got
    mirror/entries    what is said of a record
    mirror/session    how it is written, so that writing it twice changes nothing
    tracking          when: the process, its failures, its end
"""

import argparse
import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raysearch.mirror.links import SQLITE, Progress, Status, public, redact, tracking_uri
from raysearch.mirror.session import Lines, Session

log = logging.getLogger("raysearch.tracking")

LOG = "mlflow.log"
POLL_S = 0.5
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
LAST_TRIES = 3
ORPHAN_S = 60.0
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the mirror tries again itself, after a look at what had arrived
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # to print it, MLflow asks the server about each run
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class Mirror:
    """A mirror's process at work. Made by `start_mirror`."""

    def __init__(self, run: Path, process: subprocess.Popen[bytes]) -> None:
        self.run = run
        self.process = process

    def close(self, wait_s: float) -> Status:
        """Let it send what is on disk and end. After `wait_s` seconds it is killed; the next mirror sends the rest.

        A store that cannot be reached is given up earlier, after three tries.
        """
        if self.process.returncode is None:
            try:
                self.process.communicate(str(wait_s).encode(), timeout=wait_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        found = status(self.run)
        if found.complete or found.error:
            return found
        code = self.process.returncode
        late = f"MLflow did not catch up within {wait_s:g} s"
        return replace(found, error=f"the mirror failed with {code}, see {self.run / LOG}" if code > 0 else late)


def start_mirror(run: Path, uri: str | None = None) -> Mirror:
    """Start the process that tells MLflow of a sweep; returns at once, whatever state MLflow is in.

    Args:
        run: the sweep's folder, with `sweep.json`; the other files may come later.
        uri: the store; `raysearch.mirror.links.tracking_uri` says what None means.
    """
    run = Path(run).resolve()
    code = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "raysearch.tracking", str(run), "--driver", str(os.getpid())],
        # The address may hold a password, and everybody may read the arguments of a process.
        env={**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": tracking_uri(run, uri)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is meant for the driver
    )
    return Mirror(run, process)


def mirror_rest(run: Path, uri: str | None, wait_s: float) -> Status:
    """Send what MLflow lacks of a sweep that is over, often nothing, as `start_mirror` and `Mirror.close` do."""
    known, store = Progress.load(run), tracking_uri(Path(run).resolve(), uri)
    found = status(run)
    lost = store.startswith(SQLITE) and not Path(store.removeprefix(SQLITE)).exists()
    if found.complete and known.ended and known.uri == public(store) and not lost:
        return found
    return start_mirror(run, uri).close(wait_s)


def mirror_once(run: Path, uri: str | None = None) -> Status:
    """Send what MLflow lacks of a sweep, in this process; a store that cannot be reached is tried once.

    May be called at any time, any number of times. While another mirror works on the folder, it only says so.
    """
    run = Path(run).resolve()
    stop = threading.Event()
    stop.set()
    with mlflow_settings(), _log_file(run):
        error = _mirror(run, tracking_uri(run, uri), stop, last_tries=1)
    found = status(run)
    return replace(found, complete=found.complete and error is None, error=error or found.error)


def status(run: Path) -> Status:
    """How far the mirror of a sweep got, read from the sweep's folder alone."""
    known = Progress.load(run)
    sent = {"records.jsonl": known.records_sent, "epochs.jsonl": known.epochs_sent}
    behind = any(Lines(Path(run) / name, offset).waiting() for name, offset in sent.items())
    shown = known.experiment_id is not None and known.published == known.records_sent
    complete = shown and not behind and known.error is None
    return Status(complete=complete, trials=len(known.runs), error=known.error or known.refused)


def failures() -> tuple[type[Exception], ...]:
    """What a store raises that is away, busy, full, closed to us, or whose driver is not installed."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, RequestException, SQLAlchemyError, OSError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m raysearch.tracking`; returns 0 when MLflow has everything, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m raysearch.tracking", description="Tell MLflow of a sweep.")
    parser.add_argument("run", type=Path, help="the sweep's folder")
    parser.add_argument("uri", nargs="?", help="the store; by default MLFLOW_TRACKING_URI, or a database in the folder")
    parser.add_argument(
        "--driver", type=int, help="follow the sweep until this parent process ends or closes our input"
    )
    given = parser.parse_args(arguments)
    if given.driver is None:
        found = mirror_once(given.run, given.uri)
        print(f"{found.trials} trials in MLflow" + (f"; {found.error}" if found.error else ""), file=sys.stderr)
        return 0 if found.complete else 1
    run, stop = given.run.resolve(), threading.Event()
    threading.Thread(target=_watch, args=(given.driver, stop), daemon=True).start()
    os.nice(10)

    def tell(*what: Any) -> None:
        with _log_file(run):
            log.critical("the mirror ends by an error of its own", exc_info=what)

    sys.excepthook = tell
    _await_news(run, stop)
    with mlflow_settings(), _log_file(run):
        _mirror(run, tracking_uri(run, given.uri), stop, last_tries=LAST_TRIES)
    return 0


def _await_news(run: Path, stop: threading.Event) -> None:
    """Wait for something to tell: importing MLflow takes seconds that the start of the sweep can use better."""
    while not any(Lines(run / name).size() for name in ("epochs.jsonl", "records.jsonl")) and not stop.wait(POLL_S):
        pass


def _mirror(run: Path, uri: str, stop: threading.Event, *, last_tries: int) -> str | None:
    """Mirror until everything was sent after `stop`, or the store failed `last_tries` times after it.

    Returns why not everything was sent, None if it was.
    """
    from filelock import FileLock, Timeout

    failed = 0
    while True:
        last_tries -= stop.is_set()
        began = time.monotonic()
        try:
            with FileLock(run / ".mlflow.lock", timeout=1):
                try:
                    _follow(Session(run, uri), stop)
                    return None
                except failures() as error:
                    reason = redact(f"cannot write to MLflow at {public(uri)}: {type(error).__name__}: {error}")
                    Progress.load(run).save(run, error=reason)
        except Timeout:
            reason = f"another mirror is at work on {run}"
        failed = 1 if time.monotonic() - began > 2 * BACKOFF_S[-1] else failed + 1
        if failed & (failed - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            log.warning("%s (failure %d in a row)", reason, failed)
        if last_tries <= 0 and stop.is_set():
            return reason
        _rest(BACKOFF_S[min(failed, len(BACKOFF_S)) - 1], stop)


def _follow(session: Session, stop: threading.Event) -> None:
    while True:
        last = stop.is_set()
        if session.step(last=last):
            continue
        if last:
            session.end()
            log.info("%d trials are in MLflow at %s", len(session.progress.runs), session.progress.uri)
            return
        stop.wait(POLL_S)


def _rest(seconds: float, stop: threading.Event) -> None:
    """Wait for `seconds`, but no more than one second once it is time to stop."""
    if not stop.wait(seconds):
        return
    time.sleep(min(seconds, 1.0))


def _watch(driver: int, stop: threading.Event) -> None:
    """Set `stop` when the driver closes our input or is gone; end this process when that was long enough ago.

    The driver may leave a number in the input: how many seconds it will wait.
    """
    text = b""
    while os.getppid() == driver:
        if select.select([sys.stdin], [], [], 1.0)[0]:
            read = os.read(sys.stdin.fileno(), 64)
            text += read
            if not read:
                break
    stop.set()
    time.sleep(float(text or ORPHAN_S))
    os._exit(0)  # nothing is lost: the next mirror goes on from the last step


@contextlib.contextmanager
def mlflow_settings() -> Iterator[None]:
    """MLflow reads these from the environment only; what a person set there stays."""
    ours = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


@contextlib.contextmanager
def _log_file(run: Path) -> Iterator[None]:
    handler = logging.FileHandler(run / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()


if __name__ == "__main__":
    raise SystemExit(main())
