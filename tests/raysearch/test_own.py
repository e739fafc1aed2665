"""A space, a model, a method of a person's own: each in one file outside of the project, or an object in Python."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

import raysearch
from raysearch.asked_space import read, written
from raysearch.driver import resume
from raysearch.errors import SweepError
from raysearch.resolve import check_files, files_of, resolve
from raysearch.sweep import Sweep, default_name
from tests.raysearch.builders import law, make_run
from tests.raysearch.cluster import cluster
from trainables.errors import ConfigError, PluginError

__all__ = ["cluster"]

SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

def space(layers):
    space = {f"bits/{row.name}/weight": CategoricalDistribution((2, 4, 8)) for row in layers}
    space |= {"optimizer/lr": FloatDistribution(1e-3, 1e-1, log=True), "model/hidden": IntDistribution(4, 16, step=4)}
    return space
"""
MODEL = """
from torch import nn

def net(classes, input_shape, *, hidden: int = 8):
    features = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
"""

names = st.text("abcxyz/*", min_size=1, max_size=8)
numbers = st.floats(-1e6, 1e6)
distributions = st.one_of(
    st.tuples(numbers, numbers).map(sorted).map(lambda ends: FloatDistribution(*ends)),
    st.tuples(st.floats(1e-6, 1), st.floats(1, 1e6)).map(lambda ends: FloatDistribution(*ends, log=True)),
    st.builds(lambda low, count, step: IntDistribution(low, low + count * step, step=step), *[st.integers(1, 9)] * 3),
    st.lists(st.none() | st.booleans() | st.integers() | st.text(), min_size=1).map(CategoricalDistribution),
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside of the project, the current one."""
    (tmp_path / "wide.py").write_text(SPACE)
    (tmp_path / "nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def narrow(layers: Any) -> dict[str, Any]:
    return {f"bits/{row.name}/weight": IntDistribution(2, 3) for row in layers if row.last}


def test_a_space_and_a_model_are_named_by_their_files(files: Path) -> None:
    found = resolve(Sweep(space="wide.py", model="nets.py:net", settings={"start/epochs": 0}))
    assert [row.name for row in found.table.quantizable] == ["1", "3"]
    assert list(found.space) == ["bits/1/weight", "bits/3/weight", "optimizer/lr", "model/hidden"]
    assert found.base["model"] == {"name": f"{files / 'nets.py'}:net", "hidden": 8}
    assert default_name(found.sweep, "now") == "digits-net-lsq-now"


def test_a_resolved_sweep_means_the_same_from_any_folder(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve(Sweep(space="wide.py", model="nets.py:net"))
    monkeypatch.chdir("/")
    again = resolve(Sweep.from_tree(json.loads(json.dumps(found.sweep.tree()))))
    assert (again.sweep, again.base, again.space) == (found.sweep, found.base, found.space)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{'bits/cnv2/weight': IntDistribution(2, 4)}", "model 'lenet5' has no such layer; did you mean 'conv2'?"),
        ("{'model/widht': FloatDistribution(0.5, 1)}", "unknown address 'model/widht'; did you mean 'width'?"),
        ("{'bit/conv2/weight': IntDistribution(2, 4)}", "unknown address 'bit'; did you mean 'bits'?"),
    ],
)
def test_a_misspelt_address_is_an_error_with_the_nearest_one(files: Path, body: str, words: str) -> None:
    (files / "wide.py").write_text(f"from optuna.distributions import *\ndef space(layers):\n    return {body}\n")
    with pytest.raises(ConfigError) as caught:
        resolve(Sweep(space="wide.py"))
    assert words in str(caught.value)
    assert str(files / "wide.py") in str(caught.value)


def test_a_function_or_distributions_are_a_space_in_python() -> None:
    given = {"bits/fc2/weight": IntDistribution(2, 3)}
    by_function, by_value = resolve(Sweep(space=narrow)), resolve(Sweep(space=given))
    assert by_function.space == by_value.space == given
    assert by_function.sweep == by_value.sweep == Sweep(space=given)
    assert Sweep.from_tree(json.loads(json.dumps(by_function.sweep.tree()))) == by_value.sweep


def test_a_function_has_no_json_before_it_is_resolved() -> None:
    with pytest.raises(SweepError, match="space 'narrow' is a function: only a resolved sweep"):
        Sweep(space=narrow).tree()


@law
@given(space=st.dictionaries(names, distributions, min_size=1))
def test_any_distribution_survives_the_way_through_json(space: dict[str, Any]) -> None:
    assert read(json.loads(json.dumps(written(space)))) == space


@pytest.mark.parametrize("bad", [{"a": "{}"}, {"a": "no json"}, {"a": '{"name": "IntDistribution"}'}])
def test_what_is_no_distribution_is_an_error_that_says_where(bad: dict[str, str]) -> None:
    with pytest.raises(SweepError, match=r"^space: a = .* is no Optuna distribution"):
        Sweep.from_tree({"space": bad})


def test_choices_that_json_cannot_hold_are_an_error() -> None:
    with pytest.warns(UserWarning, match="persistent"):
        space = {"optimizer/milestones": CategoricalDistribution([(0.5, 0.75), (0.3, 0.6)])}
    with pytest.raises(SweepError, match=r"optimizer/milestones offers \(0.5, 0.75\), which is neither text"):
        resolve(Sweep(space=space))


def test_a_resumed_sweep_keeps_the_distributions_it_began_with(files: Path) -> None:
    folder, resolved = make_run(files / "run", Sweep(space="wide.py", model="nets.py:net"))
    (files / "wide.py").unlink()
    described = folder.read_sweep()
    assert resolve(Sweep.from_tree(described["sweep"]), read(described["space"])).space == resolved.space


@pytest.mark.parametrize("change", ["edited", "gone"])
def test_a_sweep_does_not_go_on_with_other_code(files: Path, change: str) -> None:
    folder, resolved = make_run(files / "run", Sweep(model="nets.py:net"))
    assert list(files_of(resolved.sweep)) == [str(files / "nets.py")]
    check_files(folder.read_sweep()["files"])
    (files / "nets.py").write_text(MODEL + "# faster") if change == "edited" else (files / "nets.py").unlink()
    with pytest.raises(SweepError, match=r"nets\.py (has changed since the sweep began|is gone): put it back"):
        resume(folder.path)


def test_a_file_that_is_not_there_is_an_error(files: Path) -> None:
    with pytest.raises(PluginError, match=r"no file .*none\.py on this machine"):
        resolve(Sweep(space="none.py"))


ENERGY = """
def measure(layer, bits):
    return layer.macs * (bits.weight + bits.activation) / 1e6
"""
SECONDS = """
import time

def measure(model, images):
    began = time.perf_counter()
    model(images)
    return time.perf_counter() - began
"""


@pytest.fixture(scope="module")
def result(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep over a space, a model and two objectives of one's own, each in one file."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in {"wide.py": SPACE, "nets.py": MODEL, "energy.py": ENERGY, "runtime.py": SECONDS}.items():
        (folder / name).write_text(text)
    sweep = Sweep(
        model=f"{folder}/nets.py:net",
        space=f"{folder}/wide.py",
        objectives={"accuracy": "max", "energy": "min", "runtime": "min"},
        measures={"energy": f"{folder}/energy.py", "runtime": f"{folder}/runtime.py"},
        limits=["energy<=0.02"],
        reference={"energy": 0.02, "runtime": 1.0},
        trials=6,
        epochs=2,
        concurrent=1,
        stopper="none",
        settings={"data/train_limit": 128, "data/validation_limit": 64, "start/epochs": 0},
    )
    return raysearch.run(sweep, folder / "run")


def test_a_sweep_over_a_space_a_model_and_objectives_of_ones_own(result: Any) -> None:
    rows = result.records()
    assert [row["status"] for row in rows] == ["complete"] * 6
    macs = {"1": 64, "3": 10}
    for row in rows:
        hidden = row["params"]["model/hidden"]
        energy = sum(macs[name] * hidden * (w + a) / 1e6 for name, (w, a) in row["bits"].items())
        assert row["energy"] == pytest.approx(energy)
        assert row["energy"] <= 0.02
        assert 0 < row["runtime"] < 10
        assert ["runtime" in epoch for epoch in row["history"]] == [False, True]
    front = result.front()
    assert 0 < front.hypervolume() <= 1
    assert {"energy", "runtime"} <= set(front.to_pandas().columns)
    assert front.pick(limits=["energy<=0.02"])["accuracy"] == max(row["accuracy"] for row in rows)
    with pytest.raises(ValueError, match="no point fits energy <= 0: the least is energy"):
        front.pick(limits=["energy<=0"])


def test_the_mirror_has_the_measures_of_ones_own(result: Any) -> None:
    assert result.mirrored is not None
    client = MlflowClient(f"sqlite:///{result.path.resolve() / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id], "tags.`raysearch.kind` = 'trial'")
    energies = {int(run.data.tags["raysearch.trial"]): run.data.metrics["energy"] for run in runs}
    assert energies == {row["trial"]: row["energy"] for row in result.records()}
    (summary,) = client.search_runs([experiment.experiment_id], "tags.`raysearch.kind` = 'sweep'")
    assert summary.data.metrics["hypervolume"] == pytest.approx(result.front().hypervolume())
