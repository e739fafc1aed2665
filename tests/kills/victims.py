"""Who can die in a sweep, and where to find it: by the session that a driver and its own Ray run in."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

VICTIMS = ("rank", "controller", "slot", "driver", "mlflow", "node", "head")
"""A Ray Train worker, Ray Train's controller, the trial's actor, the driver, the MLflow server, a node, the head."""
NAMES = {"rank": ("RayTrainWorker",), "controller": ("TrainController",), "slot": ("InlineSlot", "GroupSlot")}
FIND_S = 120


def processes(session: int) -> dict[int, str]:
    """Processes of a session that are not over: pid -> command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue
        if int(stat[3]) == session and stat[0] != "Z":
            found[int(folder.name)] = line
    return found


def descendants(root: int) -> list[int]:
    """A process and all that it has started, itself first."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def find(victim: str, session: int, alive: Callable[[], None]) -> list[int]:
    """The processes to hit, waited for if they are not there yet."""
    until = time.monotonic() + FIND_S
    while time.monotonic() < until:
        found = processes(session)
        if victim == "head":
            hit = [pid for pid, line in found.items() if "gcs_server" in line.split(" ")[0] or "/raylet " in line]
        else:
            hit = [
                pid
                for pid, line in found.items()
                if line.startswith("ray::") and any(name in line for name in NAMES[victim])
            ]
        if hit:
            return hit if victim == "head" else hit[:1]
        alive()
        time.sleep(0.01)
    raise AssertionError(f"no {victim} among {sorted(processes(session).values())}")


def end_all(session: int) -> None:
    """Leave nothing of a session behind."""
    for pid in processes(session):
        kill(pid)


def kill(*pids: int) -> None:
    """SIGKILL; who is gone already is gone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
