"""A sweep on a real cluster of several nodes on this machine, and, where hosts can be made, on one made by `ray up`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysearch.result import Result
from tests.cluster import ray_up
from tests.cluster.hosts import missing
from tests.kills.machines import Machines
from tests.kills.moments import Events
from tests.kills.victims import descendants, find, kill
from tests.raysearch.cluster import ROOT, check_books, numbers

TRIALS = 5
SWEEP = ["--space", "uniform", "--trials", str(TRIALS), "--epochs", "3", "--set", "training/batch_size=8"]
SWEEP += ["--set", "start/epochs=1", "--set", "data/train_limit=640", "--set", "data/validation_limit=300"]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A head without CPUs and two nodes of one CPU; the token is wanted."""
    cluster = Machines(2)
    yield cluster
    cluster.close()


def start(machines: Machines | None, *arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"RAY_ADDRESS": machines.address} if machines else {})
    command = [sys.executable, "-c", "from raysearch.cli import main; main()", "sweep", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]


def test_a_node_that_dies_and_another_that_comes_leave_no_trace_in_the_numbers(
    machines: Machines, tmp_path: Path
) -> None:
    driver = start(machines, *SWEEP, "--out", str(tmp_path / "run"))

    def alive() -> None:
        assert driver.poll() is None, driver.communicate()

    events = Events(tmp_path / "run", alive)
    events.wait_for("mid-epoch")
    events.close()
    busy = find("slot", os.getsid(machines.raylets[0]), alive)[0]
    kill(*next(pids for pids in map(descendants, machines.raylets) if busy in pids))
    machines.add()
    alone = start(None, *SWEEP, "--out", str(tmp_path / "alone"))
    for process in (driver, alone):
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err
    result, expected = Result(tmp_path / "run"), Result(tmp_path / "alone")
    check_books(result, TRIALS)
    assert numbers(result.records()) == numbers(expected.records())
    columns = ["trial", "accuracy", "bops", "size_bytes"]
    assert result.front().to_pandas()[columns].equals(expected.front().to_pandas()[columns])


def test_a_node_with_another_version_is_one_line_and_exit_code_2(machines: Machines, tmp_path: Path) -> None:
    installed = tmp_path / "torch-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    machines.add(PYTHONPATH=str(tmp_path))
    driver = start(machines, *SWEEP, "--out", str(tmp_path / "run"))
    out, err = driver.communicate(timeout=300)
    assert (driver.returncode, out) == (2, "")
    assert err.startswith("error: node ")
    assert " has torch 0.1, the driver has " in err
    assert err.endswith("install the same on all nodes\n")
    assert not (tmp_path / "run").exists()


def with_ray_up(tmp_path: Path) -> None:
    ray_up.play(tmp_path, print)


if not missing():
    test_a_sweep_on_a_cluster_that_ray_up_made_survives_a_power_cut = with_ray_up
