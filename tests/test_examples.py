"""The examples in tests/examples are what their docstrings say: each sweep, exports and learns."""

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from raysearch.records import RunFolder
from raysearch.resolve import resolve
from raysearch.result import load
from raysearch.sweep import Sweep
from tests.raysearch.builders import by_training, drive, make_run, open_book, small_sweep
from trainables.packed import load_packed

EXAMPLES = Path(__file__).parent / "examples"
QUICK = {"start/epochs": 0, "optimizer/lr": 0.05}
SWEEPS: dict[str, dict[str, Any]] = {
    "power_of_two": {"method": "{}", "settings": {**QUICK, "method/largest": 0.9}},
    "narrow_or_wide": {"space": "{}", "settings": {"start/epochs": 0}},
    "separable": {
        "model": "{}",
        "settings": {"start/epochs": 0, "optimizer/lr": 0.1, "training/batch_size": 16, "model/width": 8},
    },
    "stripes": {"data": "{}", "settings": {**QUICK, "data/noise": 0.2}},
    "energy": {"measures": {"energy": "{}"}, "objectives": {"accuracy": "max", "energy": "min"}, "settings": QUICK},
}


def asked(name: str) -> Sweep:
    """The sweep of an example, two trials of two epochs."""
    path = str(EXAMPLES / f"{name}.py")
    fields = {key: _filled(value, path) for key, value in SWEEPS[name].items()}
    return small_sweep(**{"trials": 2, "epochs": 2, **fields})


def _filled(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(each, path) for key, each in value.items()}
    return path if value == "{}" else value


@pytest.fixture(scope="module", params=SWEEPS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    torch.set_num_threads(1)
    folder, resolved = make_run(tmp_path_factory.mktemp("examples") / request.param, asked(request.param))
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    return folder


def test_an_example_learns(run: RunFolder) -> None:
    records = run.read_records()
    assert [record["status"] for record in records] == ["complete", "complete"]
    assert max(record["accuracy"] for record in records) > 0.15
    if run.path.name == "stripes":
        assert max(record["accuracy"] for record in records) > 0.5
    if run.path.name == "energy":
        assert all(record["energy"] > 0 for record in records)


def test_an_example_is_exported_in_as_many_bytes_as_it_was_said_to_take(run: RunFolder, tmp_path: Path) -> None:
    result = load(run.path)
    best = result.front().pick()
    record = next(row for row in run.read_records() if row["trial"] == best["trial"])
    packed = tmp_path / "net.safetensors"
    result.export(int(best["trial"]), to=packed)
    assert packed.stat().st_size == pytest.approx(record["size_bytes"], rel=0.01)
    session = result.session(int(best["trial"]))
    images, _ = next(session.data.test.batches(8, device=torch.device("cpu"), seed=None, augment=False))
    with torch.inference_mode():
        images = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(load_packed(packed)(images), session.model.eval()(images))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_example_is_run_and_names_the_command_that_runs_it(path: Path) -> None:
    assert path.stem in SWEEPS
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    (command,) = [line.strip() for line in text.splitlines() if line.strip().startswith("raysearch sweep")]
    assert f"tests/examples/{path.name}" in command
    assert shlex.split(command)[:2] == ["raysearch", "sweep"]


def test_what_an_example_adds_can_be_searched() -> None:
    assert set(resolve(asked("narrow_or_wide")).space) == {
        "optimizer/lr",
        *(f"bits/{layer}/weight" for layer in ("conv1", "conv2", "fc1", "fc2")),
        *(f"bits/{layer}/activation" for layer in ("conv2", "fc1", "fc2")),
    }
