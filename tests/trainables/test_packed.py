"""Packed files hold what the search counts, come back bit by bit, and refuse what they cannot hold."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from tests.trainables.exporting import METHODS, MIXED, Exported, baseline
from trainables import checkpoint, modules
from trainables.cost import HEADER_BYTES
from trainables.encoding import Encoding, codes_of
from trainables.errors import ConfigError
from trainables.export.bit_packing import CHUNK, pack, packed_bytes, unpack
from trainables.export.packed_writer import _header_bytes, save_packed
from trainables.method import read_bits
from trainables.packed import description, load_packed


@st.composite
def codes_with_their_width(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=40)), bits


@given(codes_with_their_width())
def test_unpacking_gives_the_codes_that_were_packed(case: tuple[list[int], int]) -> None:
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@given(codes_with_their_width())
def test_a_code_begins_where_the_one_before_ends(case: tuple[list[int], int]) -> None:
    codes, bits = case
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits)
    number = int.from_bytes(bytes(packed.tolist()), "little")
    assert number == sum(code << (i * bits) for i, code in enumerate(codes))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_more_codes_than_one_chunk_are_packed_without_a_seam(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (CHUNK + 5,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack(pack(codes, bits), bits, len(codes)), codes.int())


@pytest.mark.parametrize(("codes", "bits"), [([4], 2), ([-1], 2), ([0], 0), ([0], 17)])
def test_codes_that_do_not_fit_are_refused(codes: list[int], bits: int) -> None:
    with pytest.raises(ValueError, match="bits"):
        pack(torch.tensor(codes), bits)


def test_bytes_of_another_count_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bytes do not hold 9 codes of 2 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 2, 9)


LINES = [(1.0, 0.0), (1.5, -1.0), (127.5, -1.0), (7.0, 0.0)]


@given(st.integers(1, 8), st.floats(2.0**-10, 2.0**10, width=32), st.sampled_from(LINES))
def test_the_codes_of_decoded_codes_are_those_codes(bits: int, scale: float, line: tuple[float, float]) -> None:
    encoding = Encoding(
        bits=bits, q_min=0, q_max=2**bits - 1, scale=torch.tensor(scale), divisor=line[0], offset=line[1]
    )
    codes = torch.arange(2.0**bits)
    assert torch.equal(encoding.codes(encoding.decode(codes)), codes)


def test_the_zero_point_is_the_code_of_zero() -> None:
    encoding = Encoding(bits=2, q_min=0, q_max=3, scale=torch.tensor(2.0), divisor=1.5, offset=-1.0)
    assert encoding.zero_point == 1.5
    assert float(encoding.step) == pytest.approx(4 / 3)
    assert encoding.decode(torch.tensor(encoding.zero_point)) == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("model", "data"), [("lenet5", "mnist"), ("resnet20", "cifar10")])
def test_a_network_comes_back_with_the_same_logits_bit_for_bit(
    name: str, model: str, data: str, tmp_path: Path
) -> None:
    network = baseline(name, model, data, MIXED[model])
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    loaded = load_packed(path)
    images = network.noise(17)
    assert torch.equal(loaded(images), network.logits(images))
    assert read_bits(loaded) == read_bits(network.model)
    assert path.stat().st_size == network.size_bytes


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_file_has_the_bytes_that_the_search_counts(bits: int, tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {"bits/*/weight": bits, "bits/*/activation": bits})
    path = tmp_path / "network.safetensors"
    assert save_packed(path, network.model, network.config, accuracy=0.25) == HEADER_BYTES
    assert path.stat().st_size == network.size_bytes
    with safe_open(path, "pt") as file:
        assert file.keys() == ["packed"]


@pytest.mark.parametrize("digits", range(1, 9))
def test_the_header_of_safetensors_is_as_long_as_we_think(digits: int) -> None:
    for count in (10 ** (digits - 1), 10**digits - 1) if digits < 7 else (10 ** (digits - 1),):
        assert len(save({"packed": torch.zeros(count, dtype=torch.uint8)})) - count == _header_bytes(count)


def test_a_description_that_needs_more_bytes_gets_them(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    words = "".join(hashlib.sha256(bytes([i])).hexdigest() for i in range(8))
    header = save_packed(tmp_path / "network.safetensors", network.model, network.config, words=words)
    assert header > HEADER_BYTES
    assert (tmp_path / "network.safetensors").stat().st_size == network.size_bytes - HEADER_BYTES + header
    assert description(tmp_path / "network.safetensors")["facts"] == {"words": words}


def test_one_bit_weights_are_signs(tmp_path: Path) -> None:
    network = baseline("dorefa", "lenet5", "digits", {"bits/fc1/weight": 1})
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    assert torch.equal(load_packed(path)(network.noise(4)), network.logits(network.noise(4)))


def test_a_float_network_is_stored_as_floats(tmp_path: Path) -> None:
    network = Exported({"method": "float", "model": "lenet5", "data": "digits"}, {})
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    assert torch.equal(load_packed(path)(network.noise(4)), network.logits(network.noise(4)))
    assert path.stat().st_size == network.size_bytes


def test_what_is_loaded_can_be_exported_again(tmp_path: Path) -> None:
    network = baseline("pact", "resnet20", "cifar10", MIXED["resnet20"])
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_packed(first, network.model, network.config, trial=3)
    save_packed(second, load_packed(first), network.config, trial=3)
    assert second.read_bytes() == first.read_bytes()


def test_a_trained_network_is_left_as_it_is(tmp_path: Path) -> None:
    network = baseline("lsq", "resnet20", "cifar10", {})
    network.model.train()
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    save_packed(tmp_path / "network.safetensors", network.model, network.config)
    assert network.model.training
    assert all(torch.equal(value, before[name]) for name, value in network.model.state_dict().items())


def test_a_fresh_process_loads_a_file_without_methods_and_pickle(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", MIXED["lenet5"])
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    np.save(tmp_path / "images.npy", network.noise(3).numpy())
    code = (
        "import numpy, pickle, torch; from pathlib import Path; from trainables.packed import load_packed\n"
        f"images = torch.from_numpy(numpy.load({str(tmp_path / 'images.npy')!r})); torch.set_num_threads(1)\n"
        "def refuse(*args, **kwargs): raise AssertionError('pickle')\n"
        "pickle.load = pickle.loads = torch.load = refuse\n"
        f"print(load_packed(Path({str(path)!r}))(images).double().tolist())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == network.logits(network.noise(3)).double().tolist()


def test_the_header_names_configuration_widths_and_facts(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", MIXED["lenet5"])
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config, trial=7, accuracy=0.5)
    state = description(path)
    assert state["config"] == {"method": "lsq", "model": "lenet5", "data": "digits"}
    assert state["facts"] == {"trial": 7, "accuracy": 0.5}
    widths = [state["encodings"][row["w"]][1] for row in state["layers"]]
    assert widths == [bits.weight for bits in read_bits(network.model).values()]


def test_only_settings_that_are_not_the_defaults_are_described(tmp_path: Path) -> None:
    tree = {
        "method": {"name": "lsq", "per_channel": True, "symmetric": False},
        "model": {"name": "lenet5", "width": 0.5},
    }
    network = Exported({**tree, "data": "digits"}, {})
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    found = description(path)["config"]
    assert found == {
        "method": {"name": "lsq", "per_channel": True},
        "model": {"name": "lenet5", "width": 0.5},
        "data": "digits",
    }


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be held


class Cubes(modules.Quantizer):
    """Levels that are not on a line."""

    def forward(self, x: Tensor) -> Tensor:
        return x.round() ** 3


def test_levels_that_are_not_affine_are_refused_by_the_name_of_the_layer(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    network.model.get_submodule("fc1").input_quantizer = Cubes(4, signed=True)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"layer fc1: Cubes has no affine codes"):
        save_packed(tmp_path / "network.safetensors", network.model, network.config)
    assert list(tmp_path.iterdir()) == []


def test_weights_off_their_levels_are_counted() -> None:
    encoding = Encoding(bits=2, q_min=-2, q_max=1, scale=torch.tensor(0.5))
    with pytest.raises(ConfigError, match="layer conv2: 2 of 4 weights are none of the 4 levels of its 2 bits"):
        codes_of("conv2", torch.tensor([-1.0, 0.5, 0.3, 9.0]), encoding)


def test_a_quantizer_outside_of_layers_must_have_codes(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    network.model.set_submodule("relu3", Cubes(4, signed=True))
    with pytest.raises(ConfigError, match="module relu3: Cubes has no affine codes"):
        save_packed(tmp_path / "network.safetensors", network.model, network.config)


def test_a_network_with_more_than_quantizers_is_refused(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    network.model.set_submodule("relu3", nn.PReLU())
    with pytest.raises(ConfigError, match=r"relu3.weight: this network is not the one that method 'lsq' makes of"):
        save_packed(tmp_path / "network.safetensors", network.model, network.config)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path, network.model)
    with pytest.raises(ConfigError, match=r"is no packed file: it has \d+ tensors, not one named 'packed'"):
        load_packed(path)


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_file_with_too_few_or_too_many_bytes_is_refused(extra: int, tmp_path: Path) -> None:
    network = baseline("lsq", "lenet5", "digits", {})
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    content = checkpoint.read(path)[0]["packed"]
    longer = torch.cat([content, torch.zeros(1, dtype=torch.uint8)])
    save_file({"packed": longer[: len(content) + extra]}, path)
    with pytest.raises(ConfigError, match="less" if extra < 0 else "more"):
        load_packed(path)


def test_a_description_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_file({"packed": torch.full((50,), 255, dtype=torch.uint8)}, path)
    with pytest.raises(ConfigError, match="its description cannot be read"):
        load_packed(path)
