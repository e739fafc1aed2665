"""Checkpoints come back bit by bit, are never torn, and say what is wrong with a file."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from trainables import checkpoint
from trainables.errors import ConfigError

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
    "sgd with momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, fused=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}
IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """Two layers that are one, behind a convolution in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.norm(self.conv(x)).relu().mean((2, 3)), 0.5, self.training)
        return self.second(self.first(x))


def network(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """Losses of steps whose dropout draws from the global generator."""
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(IMAGES).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_training_goes_on_bit_by_bit(tmp_path, name):
    path = tmp_path / "a" / "b" / checkpoint.FILE
    model = network()
    optimizer = OPTIMIZERS[name](model)
    steps(model, optimizer, 3)
    checkpoint.save(path, model, optimizer, epoch=3)
    wanted = steps(model, optimizer, 3)
    other = network(seed=1)
    other_optimizer = OPTIMIZERS[name](other)
    assert checkpoint.restore(path, other, other_optimizer) == {"epoch": 3}
    assert steps(other, other_optimizer, 3) == wanted
    assert_equal_states(model, other)


def test_the_state_comes_back_as_json(tmp_path):
    state = {"epoch": 3, "report": {"loss": 0.1 + 0.2, "bits": {"conv1": [8, 8]}}, "text": "é\n", "none": None}
    checkpoint.save(tmp_path / "x", network(), **state)
    assert checkpoint.read(tmp_path / "x")[1] == state


def test_saving_changes_neither_the_model_nor_the_random_state(tmp_path):
    model = network()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    checkpoint.save(tmp_path / "x", model, OPTIMIZERS["adam"](model))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.second.weight is model.first.weight


def test_layouts_and_ties_of_the_model_survive_restoring(tmp_path):
    model, other = network(), network(seed=1)
    checkpoint.save(tmp_path / "x", model, OPTIMIZERS["adam"](model))
    checkpoint.restore(tmp_path / "x", other, OPTIMIZERS["adam"](other))
    assert_equal_states(model, other)
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert other.second.weight is other.first.weight


def test_the_file_is_plain_safetensors_with_prefixed_names(tmp_path):
    model = network()
    optimizer = OPTIMIZERS["sgd with momentum"](model)
    steps(model, optimizer, 1)
    checkpoint.save(tmp_path / "x", model, optimizer)
    tensors, _ = checkpoint.read(tmp_path / "x")
    prefixes = {name.split("/")[0] for name in tensors}
    assert prefixes == {"model", "optimizer", "rng"}
    assert {name.removeprefix("model/") for name in tensors if name.startswith("model/")} == set(model.state_dict())


def test_saving_again_keeps_the_one_before_until_the_trial_is_over(tmp_path):
    path = tmp_path / "x"
    for epoch in (1, 2, 3):
        checkpoint.save(path, network(epoch), epoch=epoch)
    assert sorted(tmp_path.iterdir()) == [path, checkpoint.previous(path)]
    assert checkpoint.read(path)[1] == {"epoch": 3}
    assert checkpoint.read(checkpoint.previous(path))[1] == {"epoch": 2}
    assert checkpoint.size_bytes(path) == sum(file.stat().st_size for file in tmp_path.iterdir())
    checkpoint.settle(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [0, 8, 60, -1, "digest", "state", "tensors"])
def test_a_single_flipped_bit_anywhere_is_noticed(tmp_path, place):
    path = tmp_path / "x"
    checkpoint.save(path, network(), note="n" * 40)
    data = bytearray(path.read_bytes())
    marks = {"digest": b'"sha256":"', "state": b"nnnn", "tensors": b"model/conv"}
    at = data.index(marks[place]) + len(marks[place]) if isinstance(place, str) else place
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"cannot read checkpoint {path}"):
        checkpoint.read(path)


def test_the_last_good_checkpoint_is_recovered_and_damaged_ones_are_set_aside(tmp_path):
    path = tmp_path / "x"
    assert checkpoint.recover(path) is None
    for epoch in (1, 2):
        checkpoint.save(path, network(epoch), epoch=epoch)
    assert checkpoint.recover(path) == {"epoch": 2}
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoint.recover(path) == {"epoch": 1}
    assert checkpoint.read(path)[1] == {"epoch": 1}
    path.write_bytes(b"")
    assert checkpoint.recover(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["x.damaged"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, network(), epoch=1)
    os.replace(path, checkpoint.previous(path))
    assert checkpoint.recover(path) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


class Payload:
    """What a pickle from elsewhere would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


def header(tree: object) -> bytes:
    text = json.dumps(tree).encode() if not isinstance(tree, bytes) else tree
    return len(text).to_bytes(8, "little") + text


FOREIGN = {
    "pickle": pickle.dumps(Payload()),
    "header longer than the file": (2**62).to_bytes(8, "little") + b"{}",
    "nested header": header(b"[" * 100_000 + b"]" * 100_000),
    "nested state": header({"__metadata__": {"state": "[" * 100_000}}),
    "state of another kind": header({"__metadata__": {"state": "[1]"}}),
    "tensor beyond the file": header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "tensors that overlap": header({n: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]} for n in "ab"}) + b"1",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_from_elsewhere_runs_no_code_and_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for name in ("x.safetensors", "x.npz"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot read checkpoint {path}"):
            checkpoint.load_weights(path, network())
    assert not (tmp_path / "owned").exists()


def test_a_file_being_written_while_the_process_is_killed_is_always_whole(tmp_path):
    path = tmp_path / checkpoint.FILE
    writer = f"""
import torch
from pathlib import Path
from trainables import checkpoint
model = torch.nn.Linear(700, 700)
for epoch in range(1_000_000):
    torch.nn.init.constant_(model.weight, float(epoch))
    torch.nn.init.constant_(model.bias, float(epoch))
    checkpoint.save(Path({str(path)!r}), model, epoch=epoch)
"""
    process = subprocess.Popen([sys.executable, "-c", writer])
    try:
        wait_for(path, process)
        for _ in range(50):  # readable while it is written
            assert_whole(path)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert_whole(path)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the writer ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_whole(path: Path) -> None:
    tensors, state = checkpoint.read(path)
    assert float(tensors["model/weight"].min()) == float(tensors["model/weight"].max()) == state["epoch"]
    assert float(tensors["model/bias"].min()) == float(tensors["model/bias"].max()) == state["epoch"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_torn_file_is_refused_by_its_name(tmp_path, share):
    path = tmp_path / "x"
    checkpoint.save(path, network())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConfigError, match=f"cannot read checkpoint {path}"):
        checkpoint.read(path)


def test_a_missing_file_a_folder_and_another_format_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a checkpoint" * 100)
    for name in ("missing", "folder", "text"):
        with pytest.raises(ConfigError, match=f"cannot read checkpoint {tmp_path / name}"):
            checkpoint.read(tmp_path / name)


def test_weights_alone_can_be_copied_out_and_loaded(tmp_path):
    model, other = network(), network(seed=1)
    checkpoint.save(tmp_path / "all", model, OPTIMIZERS["adam"](model), epoch=3)
    checkpoint.copy_weights(tmp_path / "all", tmp_path / "new" / "weights", history=[1])
    tensors, state = checkpoint.read(tmp_path / "new" / "weights")
    assert {name.split("/")[0] for name in tensors} == {"model"}
    assert state == {"history": [1]}
    checkpoint.load_weights(tmp_path / "new" / "weights", other)
    assert_equal_states(model, other)


@pytest.mark.parametrize("counted", [True, False])
def test_a_plain_state_dict_loads_also_without_the_counts_of_batch_norm(tmp_path, counted):
    model, other = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    )
    state = {k: v for k, v in model.state_dict().items() if counted or not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "plain")
    checkpoint.load_weights(tmp_path / "plain", other)
    assert_equal_states(model, other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 4, bias=False), "lacks bias (1 in all)"),
        (nn.Linear(3, 5), "bias has shape (5,) instead of (4,)"),
        (nn.Sequential(nn.Linear(3, 4)), "lacks weight; lacks bias; has 0.bias, which the model lacks (4 in all)"),
    ],
    ids=["missing", "misshapen", "renamed"],
)
def test_weights_of_another_model_are_refused_with_the_first_faults(tmp_path, other, message):
    checkpoint.save(tmp_path / "x", other)
    model = nn.Linear(3, 4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_weights(tmp_path / "x", model)
    assert f"checkpoint {tmp_path / 'x'} is of another model: " in str(caught.value)
    assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_arrays_of_numpy_load_with_the_prefix_of_data_parallel_training(tmp_path):
    model, other = network(), network(seed=1)
    np.savez(tmp_path / "x.npz", **{f"module.{name}": value.numpy() for name, value in model.state_dict().items()})
    checkpoint.load_weights(tmp_path / "x.npz", other)
    assert_equal_states(model, other)


@pytest.mark.parametrize("content", [{"module.first.weight": np.array([object()])}, b"no archive"])
def test_arrays_of_objects_and_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ConfigError, match=f"cannot read checkpoint {path}"):
        checkpoint.load_weights(path, network())
