"""What machines can give a sweep, what is asked of each, and what travels to them: without any Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysearch import facts
from raysearch.cluster.nodes import COMPARED, Capacity, Kind, _check, _question, capacity_of
from raysearch.cluster.shipping import JOB, PACKAGES, modules, runtime_env
from raysearch.errors import SweepError
from raysearch.sweep import Sweep
from tests.raysearch.cluster import ROOT

HEAD = Kind(0, 0, 1)
GPUS = Kind(8, 1, 4)


@pytest.mark.parametrize(
    ("kinds", "asked", "expected"),
    [
        ([Kind(2, 0, 1)], {}, Capacity(2, 0)),
        ([HEAD, GPUS], {}, Capacity(4, 1)),
        ([HEAD, GPUS], {"gpus_per_worker": 0.5}, Capacity(8, 0.5)),
        ([HEAD, GPUS], {"gpus_per_worker": 0.4}, Capacity(8, 0.4)),
        ([HEAD, GPUS], {"gpus_per_worker": 0}, Capacity(32, 0)),
        ([HEAD, GPUS], {"workers": 4}, Capacity(1, 1)),
        ([HEAD, GPUS], {"concurrent": 3}, Capacity(3, 1)),
        ([HEAD, GPUS], {"cpus_per_worker": 3, "gpus_per_worker": 0}, Capacity(8, 0)),
        ([Kind(48, 4, 2)], {"workers": 8}, Capacity(1, 1)),
    ],
    ids=str,
)
def test_a_cluster_holds_as_many_trials_as_its_machines_hold_workers(
    kinds: list[Kind], asked: dict[str, Any], expected: Capacity
) -> None:
    assert capacity_of(Sweep(**{"trials": 32} | asked), kinds) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"gpus_per_worker": 1}, "a trial of 1 workers needs 1 CPUs and 1 GPUs; the cluster has 4 and 0: lower"),
        ({"workers": 5}, "a trial of 5 workers needs 5 CPUs and 0 GPUs; the cluster has 4 and 0: lower"),
        (
            {"cpus_per_worker": 3},
            "needs 3 CPUs and 0 GPUs; the cluster has 4 and 0 in all, but too few on each machine",
        ),
        ({"concurrent": 5}, "concurrent = 5: the cluster holds 4 such trials at the same time"),
    ],
    ids=str,
)
def test_what_a_cluster_can_never_give_is_an_error(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        capacity_of(Sweep(**asked), [Kind(2, 0, 2)])


@given(
    cpus=st.integers(0, 64), gpus=st.integers(0, 8), each=st.integers(1, 8), share=st.sampled_from([0, 0.25, 0.5, 1, 2])
)
def test_workers_on_a_machine_never_take_more_than_it_has(cpus: int, gpus: int, each: int, share: float) -> None:
    places = Kind(cpus, gpus, 1).places(each, share)
    assert places * each <= cpus
    assert places * share <= gpus or not share
    assert (places + 1) * each > cpus or (share and (places + 1) * share > gpus)


def ask(folder: Path, data_root: Path | None) -> dict[str, Any]:
    """The answer of this machine, to a file that exists in the folder if there is the folder."""
    probe = folder / "probe"
    if folder.is_dir():
        probe.touch()
    return _question()(str(probe), data_root and str(data_root), COMPARED, "127.0.0.1:1")


def test_a_machine_that_sees_everything_and_has_the_versions_is_fit(tmp_path: Path) -> None:
    _check([("10.0.0.2", ask(tmp_path, tmp_path))], tmp_path, tmp_path, shipped=True)


@pytest.mark.parametrize(
    ("folder", "data", "package", "message"),
    [
        ("away", ".", "", r"node 10\.0\.0\.2 does not see .* or cannot write it: take an --out that all nodes share"),
        (".", "away", "", r"node 10\.0\.0\.2 cannot read --data-root .*away: mount it there"),
        (".", ".", "torch", r"node 10\.0\.0\.2 has torch 0\.1, the driver has [\d.]+: install the same on all nodes"),
        (".", ".", "python", r"node 10\.0\.0\.2 has python 0\.1, the driver has 3"),
    ],
)
def test_a_machine_that_cannot_train_is_an_error_that_names_it(
    tmp_path: Path, folder: str, data: str, package: str, message: str
) -> None:
    found = ask(tmp_path / folder, tmp_path / data)
    if package:
        found["versions"][package] = "0.1"
    with pytest.raises(SweepError, match=message):
        _check([("10.0.0.2", found)], tmp_path / folder, tmp_path / data, shipped=True)


def test_another_build_of_the_same_release_is_no_other_version(tmp_path: Path) -> None:
    found = ask(tmp_path, None)
    found["versions"]["torch"] = facts.versions()["torch"].partition("+")[0] + "+cpu"
    _check([("10.0.0.2", found)], tmp_path, None, shipped=True)


def test_an_autoscaler_of_this_cluster_says_what_may_be_added(tmp_path: Path) -> None:
    """The monitor that Ray starts on the head has its address and its configuration on its command line."""
    config = tmp_path / "ray_bootstrap_config.yaml"
    worker = {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 4}
    types = {"head": {"resources": {"CPU": 0}}, "gpu_spot": worker}
    config.write_text(json.dumps({"max_workers": 8, "head_node_type": "head", "available_node_types": types}))
    for cluster, found in (
        ("127.0.0.1:1", {"max_workers": 8, "kinds": [{"CPU": 8, "GPU": 1, "max_workers": 4}]}),
        ("127.0.0.1:2", None),
    ):
        line = ["-c", "input()", f"--gcs-address={cluster}", f"--autoscaling-config={config}"]
        with subprocess.Popen([sys.executable, *line], stdin=subprocess.PIPE) as monitor:
            try:
                assert ask(tmp_path, None)["autoscaler"] == found
            finally:
                monitor.kill()


def test_our_packages_travel_and_so_do_plug_ins_that_no_node_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mylab"
    package.mkdir()
    (package / "ternary.py").write_text("class Method: ...\n")
    (tmp_path / "net.py").write_text("def build(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = {"method": "mylab.ternary", "model": str(tmp_path / "net.py"), "data": "tests.raysearch.fragile"}
    *ours, lab, net, data = modules(Sweep(**asked), tmp_path)
    assert ours == [str(ROOT / name) for name in PACKAGES]
    assert lab == str(package)
    assert Path(net).read_text() == "def build(): ...\n"
    assert data == str(ROOT / "tests")
    assert modules(Sweep(model="torchvision.models:resnet18"), tmp_path) == ours


def test_a_file_that_travelled_is_found_under_the_path_that_it_had(tmp_path: Path) -> None:
    """A node has the file's module on its path, not the file."""
    file = tmp_path / "here" / "net.py"
    file.parent.mkdir()
    file.write_text("def build():\n    return 7\n")
    modules(Sweep(model=str(file)), tmp_path)
    file.unlink()
    there = f"from trainables import plugins; print(plugins.attribute('models', {str(file)!r}, 'build')())"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run([sys.executable, "-c", there], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    assert done.stdout == b"7\n", done.stderr


def test_what_a_submitted_job_ships_is_not_said_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime_env(Sweep(), {"A": "1"}, tmp_path).keys() == {"py_modules", "excludes", "env_vars"}
    submitted = {"py_modules": ["gcs://x.zip"], "working_dir": "gcs://y.zip", "env_vars": {"A": "2"}}
    monkeypatch.setenv(JOB, json.dumps({"runtime_env": submitted}))
    monkeypatch.setenv("B", "3")
    assert runtime_env(Sweep(), {"A": "1", "B": "1"}, tmp_path) == {"excludes": ["__pycache__"], "env_vars": {"B": "3"}}
