"""What others can see of a sweep: who listens where while it runs, what its files allow, and where its secrets are."""

import ipaddress
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raysearch.cluster.connection import _keep_token
from tests.kills.victims import descendants, processes
from tests.raysearch.builders import SMALL
from tests.raysearch.cluster import ROOT

SECRET = "hunter2secret"
LISTENS = "0A"
"""State of a socket, include/net/tcp_states.h."""


@dataclass(frozen=True)
class Seen:
    """A whole sweep against an MLflow server that is not there, looked at while it ran.

    Attributes:
        listeners: address -> command line of who listens there.
        commands: command lines of its processes, without the driver's own.
    """

    run: Path
    said: str
    listeners: dict[str, str]
    commands: set[str]


def sockets() -> Iterator[tuple[str, str]]:
    """Socket's inode and its address, of all that listen on this machine."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENS:
                host = bytes.fromhex(local.partition(":")[0])
                words = [host[at : at + 4][::-1] for at in range(0, len(host), 4)]  # little-endian machines
                address = ipaddress.ip_address(b"".join(words))
                yield inode, str(getattr(address, "ipv4_mapped", None) or address)


def held(pid: int) -> Iterator[str]:
    """Inodes of the sockets of a process; none of one that is gone."""
    try:
        links = [os.readlink(each.path) for each in os.scandir(f"/proc/{pid}/fd")]
    except OSError:
        return
    yield from (link[8:-1] for link in links if link.startswith("socket:["))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two short trials."""
    folder = tmp_path_factory.mktemp("seen")
    run, log = folder / "run", folder / "log.txt"
    sets = [word for address, value in SMALL.items() for word in ("--set", f"{address}={json.dumps(value)}")]
    command = [sys.executable, "-m", "raysearch.cli", "sweep", "--trials", "2", "--epochs", "1", "--space", "uniform"]
    command += ["--out", str(run), "--mlflow-uri", f"http://ann:{SECRET}@127.0.0.1:9/?token={SECRET}", *sets]
    listeners, commands = {}, set()
    with log.open("w") as said:
        driver = subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            umask=0o022,
        )
        while driver.poll() is None:
            addresses = dict(sockets())
            ours = processes(driver.pid)
            for pid in {*ours, *descendants(driver.pid)}:
                listeners |= {addresses[inode]: ours.get(pid, "") for inode in held(pid) if inode in addresses}
            own = ours.get(driver.pid)  # also that of a child of it which is about to run something else
            commands |= {line for line in ours.values() if line != own}
            time.sleep(0.2)
    assert driver.returncode == 0, log.read_text()
    return Seen(run, log.read_text(), listeners, commands)


def test_nothing_listens_beyond_loopback(seen: Seen) -> None:
    assert seen.listeners
    assert {where: who for where, who in seen.listeners.items() if not ipaddress.ip_address(where).is_loopback} == {}


def test_credentials_of_the_mlflow_address_reach_no_file_no_output_and_no_command_line(seen: Seen) -> None:
    assert SECRET not in seen.said
    assert len(seen.commands) > 5
    assert [line for line in seen.commands if SECRET in line] == []
    files = [path for path in seen.run.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_nobody_else_may_write_into_a_run_folder_and_nothing_in_it_can_be_run(seen: Seen) -> None:
    modes = {path: path.stat().st_mode for path in [seen.run, *seen.run.rglob("*")]}
    assert [path for path, mode in modes.items() if mode & (stat.S_IWGRP | stat.S_IWOTH)] == []
    assert [path for path, mode in modes.items() if stat.S_ISREG(mode) and mode & stat.S_IXUSR] == []


def test_a_missing_token_is_made_and_only_its_owner_may_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "folder" / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    _keep_token()
    made = token.read_text()
    assert len(made) == 64
    token.chmod(0o644)  # as Ray makes it
    _keep_token()
    assert token.read_text() == made
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert list(token.parent.iterdir()) == [token]
