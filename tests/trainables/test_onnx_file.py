"""ONNX files hold codes in the types that their widths need, and onnxruntime computes with them what torch does."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tests.trainables.exporting import METHODS, MIXED, Exported, digits, trained_baseline
from trainables import modules
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.export.coded import Rounded
from trainables.export.onnx_file import Agreement, agreement, open_session, save_onnx, write_onnx
from trainables.export.packed_writer import save_packed
from trainables.packed import load_packed

TYPES = {2: ("INT2", 25, 13), 4: ("INT4", 21, 10), 8: ("INT8", 20, 9)}
"""Widths that ONNX has. Others are unpacked from bytes, by nodes of any opset."""


def widths(bits: int) -> dict[str, int]:
    """The same everywhere but at the ends, which keep 8 bits."""
    return {"bits/*/weight": bits, "bits/*/activation": bits}


def written(network: Exported, path: Path, **options: Any) -> tuple[Agreement, Any]:
    found = save_onnx(path, network.model, images=digits(), **options)
    return found, onnx.load(path)


def kind(model: Any, name: str) -> str:
    return TensorProto.DataType.Name(next(t.data_type for t in model.graph.initializer if t.name == name))


def constant(model: Any, name: str) -> Any:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def weights_of(path: Path, name: str, tmp_path: Path) -> Any:
    """What onnxruntime multiplies by in the layer of that name: the graph is cut there."""
    model = onnx.load(path)
    bias = next(node for node in model.graph.node if f"{name}.bias" in node.input)
    model.graph.output.append(helper.make_tensor_value_info(bias.input[1], TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "cut.onnx")
    return open_session(tmp_path / "cut.onnx", fused=False).run([bias.input[1]], {"images": digits()[:1].numpy()})[0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["lsq", "pact", "dorefa"])
def test_onnxruntime_agrees_at_every_width(name: str, bits: int, tmp_path: Path) -> None:
    network = trained_baseline(name, "lenet5", widths(bits))
    found, model = written(network, tmp_path / "network.onnx")
    integer, opset, ir_version = TYPES.get(bits, TYPES[8])
    if bits in TYPES:
        assert kind(model, "conv2.codes") == (integer if name == "lsq" else f"U{integer}")
    else:
        assert kind(model, f"codes{bits}{'s' if name == 'lsq' else 'u'}") == "UINT8"
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)
    assert found.images == len(digits())
    assert found.close >= 0.97
    assert found.other_class <= 1


@pytest.mark.parametrize("name", METHODS)
def test_onnxruntime_agrees_on_residual_networks_of_mixed_widths(name: str, tmp_path: Path) -> None:
    network = trained_baseline(name, "resnet20", MIXED["resnet20"])
    found, model = written(network, tmp_path / "network.onnx")
    assert found.close >= 0.9
    assert found.other_class <= 1
    assert Counter(node.op_type for node in model.graph.node)["BatchNormalization"] == 0
    assert model.opset_import[0].version == 25


def test_without_rounding_after_a_sum_logits_agree_to_the_last_digits(tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", widths(4))
    linear = nn.Sequential(network.model.get_submodule("flatten"), network.model.get_submodule("fc1"))
    found = save_onnx(tmp_path / "layer.onnx", linear, images=torch.rand(1000, 16, 2, 2))
    assert found.max_difference <= 1e-5
    assert found.max_difference_fused <= 1e-5
    assert found.close == 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["lsq", "lsq, per channel", "dorefa"])
def test_constants_take_the_bytes_that_the_search_counts(name: str, bits: int, tmp_path: Path) -> None:
    network = Exported(
        {**METHODS[name], "model": "resnet20", "data": "digits"},
        {"model/depth": 8, "model/width": 16, **widths(bits)},
    )
    path = tmp_path / "network.onnx"
    write_onnx(path, network.model, network.shape)
    model = onnx.load(path)
    of_graph = (".shape", ".sizes", ".rows", ".places", ".zero")
    stored = sum(len(t.raw_data) for t in model.graph.initializer if not t.name.endswith(of_graph))
    assert stored <= 1.02 * network.size_bytes
    graph = path.stat().st_size - stored
    assert graph <= 150 * len(model.graph.node) + 100 * len(model.graph.initializer)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", ["lsq", "dorefa"])
def test_codes_and_steps_make_the_weights(name: str, bits: int, tmp_path: Path) -> None:
    network = trained_baseline(name, "lenet5", widths(bits))
    path = tmp_path / "network.onnx"
    written(network, path)
    layer = network.model.get_submodule("conv2")
    assert isinstance(layer, modules.QuantizedConv2d)
    weights = layer.weight_quantizer(layer.weight).detach().numpy()
    np.testing.assert_allclose(weights_of(path, "conv2", tmp_path), weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_has_any_size(batch: int, tmp_path: Path) -> None:
    network = trained_baseline("lsq", "resnet20", widths(4))
    path = tmp_path / "network.onnx"
    written(network, path)
    assert open_session(path).run(None, {"images": digits()[:batch].numpy()})[0].shape == (batch, 10)


def test_facts_and_widths_are_in_the_metadata(tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", MIXED["lenet5"])
    _, model = written(network, tmp_path / "network.onnx", trial=7)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {
        "bits": {"conv1": [8, None], "conv2": [3, 5], "fc1": [2, 2], "fc2": [8, 8]},
        "trial": 7,
    }


def test_a_packed_file_becomes_the_same_graph(tmp_path: Path) -> None:
    network = trained_baseline("pact", "resnet20", MIXED["resnet20"])
    direct, packed = tmp_path / "direct.onnx", tmp_path / "packed.onnx"
    save_packed(tmp_path / "network.safetensors", network.model, network.config)
    save_onnx(direct, network.model, images=digits()[:64])
    save_onnx(packed, load_packed(tmp_path / "network.safetensors"), images=digits()[:64])
    ours, theirs = (onnx.load(path) for path in (direct, packed))
    constants = [t.name for t in ours.graph.initializer]
    assert [t.name for t in theirs.graph.initializer] == constants
    assert all(np.array_equal(constant(ours, name), constant(theirs, name)) for name in constants if "codes" in name)


def test_a_layer_that_is_called_twice_reads_codes_both_times(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x.flatten(1)).relu())

    encodings = {"bits": 4, "scale": torch.tensor(0.1)}
    layer = nn.Linear(9, 9)
    torch.nn.init.uniform_(layer.weight, -0.5, 0.5)
    weights = Rounded(Encoding(q_min=-8, q_max=7, **encodings))  # type: ignore[arg-type]
    inputs = Rounded(Encoding(q_min=0, q_max=15, **encodings))  # type: ignore[arg-type]
    model = Twice(modules.QuantizedLinear(layer, weights, inputs))
    path = tmp_path / "twice.onnx"
    found = save_onnx(path, model, images=torch.rand(100, 1, 3, 3))
    assert Counter(node.op_type for node in onnx.load(path).graph.node)["QuantizeLinear"] == 2
    assert found.other_class <= 1


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be expressed


@pytest.mark.parametrize(
    ("values", "opset", "message"),
    [
        (widths(2), 24, r"opset = 24: the 2-bit weights of layer conv2 are stored in 2 bits, which needs opset 25"),
        (widths(4), 20, r"opset = 20: the 4-bit weights of layer conv2 are stored in 4 bits, which needs opset 21"),
        (widths(8), 17, r"opset = 17: .*needs opset 20"),
        (widths(8), 26, r"opset = 26: 20..25 can be written"),
    ],
)
def test_an_opset_without_the_type_is_refused(values: dict[str, int], opset: int, message: str, tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", values)
    with pytest.raises(ConfigError, match=message):
        written(network, tmp_path / "network.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", range(20, 26))
def test_every_opset_from_the_first_on_can_be_written(opset: int, tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", widths(8))
    _, model = written(network, tmp_path / "network.onnx", opset=opset)
    assert model.opset_import[0].version == opset


class Staircase(modules.Quantizer):
    """Levels that are not on a line."""

    def forward(self, x: Tensor) -> Tensor:
        return x.round() ** 3


def test_levels_that_are_not_affine_are_refused_by_the_name_of_the_layer(tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", {})
    network.model.get_submodule("fc1").weight_quantizer = Staircase(4, signed=True)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="layer fc1: Staircase has no affine codes"):
        written(network, tmp_path / "network.onnx")


class Spare(nn.Module):
    """A network with a layer that it does not call."""

    def __init__(self, network: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.network, self.spare = network, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_a_layer_that_forward_does_not_call_is_refused(tmp_path: Path) -> None:
    network = trained_baseline("lsq", "lenet5", {})
    model = Spare(network.model, copy.deepcopy(network.model.get_submodule("fc2")))
    with pytest.raises(ConfigError, match="layer spare: no product with its weights is in the graph"):
        save_onnx(tmp_path / "network.onnx", model, images=digits())


def test_a_file_that_predicts_other_classes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = trained_baseline("lsq", "lenet5", widths(4))
    path = tmp_path / "network.onnx"
    written(network, path)
    other = trained_baseline("lsq", "lenet5", widths(2))
    found = agreement(path, other.model, digits())
    assert found.other_class > 1
    monkeypatch.setattr(Encoding, "step", property(lambda self: self.scale.double() * 3))
    path.unlink()
    with pytest.raises(ConfigError, match=r"another class than torch for \d+ of 1000 images"):
        written(network, path)
    assert list(tmp_path.iterdir()) == []
