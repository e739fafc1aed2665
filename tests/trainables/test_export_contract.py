"""One contract that every method passes unasked: its networks run elsewhere, as files of every format.

A new file in `trainables/methods` is found here by its name. Networks start from trained float weights; where widths
and channels are learned, they are set to differ from layer to layer.
"""

from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from tests.trainables.exporting import Exported, digits, trained
from trainables import modules, plugins
from trainables.export.onnx_file import save_onnx
from trainables.export.packed_writer import save_packed
from trainables.export.program_file import save_program
from trainables.method import Point, read_bits
from trainables.methods._bit_planes import BitPlanes, bit_tensors
from trainables.methods._gates import GatedQuantizer
from trainables.packed import load_packed

METHODS = list(plugins.describe("trainables.methods"))
VARIANTS: dict[str, dict[str, Any]] = {
    "lsq, per channel": {"per_channel": True, "symmetric": True},
    "sat, original levels": {"weight_scheme": "original", "activation_scheme": "centered", "rescale_conv": True},
    "sat, nested levels": {"weight_scheme": "modified", "activation_scheme": "modified"},
    "bayesian_bits, folded": {"batch_norm": "folded"},
    "bayesian_bits, quantized sums": {"residual": "quantized"},
    "bayesian_bits, channels alone": {"mode": "prune"},
    "bsq, running ranges": {"activation_range": "running"},
    "bsq, at ReLUs": {"placement": "relus"},
    "n2uq, float ends and shortcuts": {"quantize_ends": False, "quantize_downsample": False},
}
"""Settings that change what is stored, for the residual network."""
CASES = [(name, model) for name in METHODS for model in ("lenet5", "resnet20")]
CASES += [(name, "resnet20") for name in VARIANTS]
WIDTHS = (8, 4, 2, 16, 32)
FACTS = {"trial": 11, "point": "final", "method": "lsq", "model": "resnet20", "data": "cifar10", "size_bytes": 43_894}
FACTS |= {"accuracy": 0.9554316997528076, "bops": 447_231, "relative_bops": 0.005954861111111111}
FACTS |= {"sweep": "cifar10-resnet20-lsq-20261121-132850"}
"""What an export of a sweep's point says of it."""
IMAGES = 300

every_case = pytest.mark.parametrize(("name", "model"), CASES)


@cache
def network(name: str, model: str) -> Exported:
    """Calibrated on digits, its ends at 8 bits; what a method learns is set by hand."""
    method = {"name": name.partition(",")[0], **VARIANTS.get(name, {})}
    small = {"model/depth": 8, "model/width": 8} if model == "resnet20" else {}
    found = Exported({"method": method, "model": model, "data": "digits"}, small, trained(model))
    gated = [module for module in found.model.modules() if isinstance(module, GatedQuantizer)]
    generator = torch.Generator().manual_seed(0)
    for number, quantizer in enumerate(gated):
        if quantizer.pruning_logits is not None:
            quantizer.pruning_logits.data.normal_(1, 2, generator=generator)
        if quantizer.fixed_bits is None:
            quantizer.set_bits(WIDTHS[number % 5])
    vary_planes(found.model)
    return found


def vary_planes(model: nn.Module) -> None:
    """Other widths for BSQ: 9 bits are left, some have fewer, and the second layer has none."""
    weights = [(planes, leaf) for _, role, planes, leaf in bit_tensors(model) if role == "weight"]
    for number, (planes, leaf) in enumerate(weights):
        if number % 2 == 0:
            planes.set_bits(3 + number % 5)
            planes.compose(leaf)
        if number == 1:
            planes.bit_planes.zero_()
            planes.compose(leaf)


def points(found: Exported) -> list[Point]:
    return found.method.points(found.model)


@every_case
def test_packed_files_give_the_same_logits_and_have_the_size_that_is_searched(
    name: str, model: str, tmp_path: Path
) -> None:
    found = network(name, model)
    for point in points(found):
        point.activate()
        path = tmp_path / f"{point.label}.safetensors"
        save_packed(path, found.model, found.config, **FACTS)
        loaded = load_packed(path)
        assert torch.equal(loaded(found.noise(7)), found.logits(found.noise(7)))
        assert path.stat().st_size == pytest.approx(found.size_of(point), rel=0.01)
        widths = read_bits(loaded)
        assert {n: bits.activation for n, bits in widths.items()} == {
            n: bits.activation for n, bits in read_bits(found.model).items()
        }
        for layer, bits in widths.items():
            assert bits.weight == point.bits[layer].weight


@every_case
def test_onnx_files_predict_what_torch_predicts(name: str, model: str, tmp_path: Path) -> None:
    found = network(name, model)
    first, *rest = points(found)
    for point in [first, *rest[-1:]]:  # of a switchable network the widest and the narrowest
        point.activate()
        agreed = save_onnx(tmp_path / f"{point.label}.onnx", found.model, images=digits()[:IMAGES])
        assert agreed.close >= 0.97
        assert agreed.other_class <= 1


@pytest.mark.parametrize(
    ("name", "model"), [(name, "lenet5") for name in METHODS] + [("n2uq", "resnet20"), ("bayesian_bits", "resnet20")]
)
def test_programs_give_the_same_logits_at_any_batch_size(name: str, model: str, tmp_path: Path) -> None:
    found = network(name, model)
    points(found)[-1].activate()
    path = tmp_path / "network.pt2"
    save_program(path, found.model, found.shape)
    images = found.noise(5)
    assert torch.equal(torch.export.load(path).module()(images), found.logits(images))
    assert [file.name for file in tmp_path.iterdir()] == ["network.pt2"]


@pytest.mark.parametrize("name", ["adabits", "double_rounding"])
def test_each_point_of_a_switchable_network_is_a_network_of_its_own(name: str, tmp_path: Path) -> None:
    found = network(name, "resnet20")
    loaded = {}
    for point in points(found):
        point.activate()
        save_packed(tmp_path / "network.safetensors", found.model, found.config)
        loaded[point.label] = load_packed(tmp_path / "network.safetensors")
    outputs = {label: each(digits()[:8]) for label, each in loaded.items()}
    assert len(outputs) > 2
    assert len({tuple(map(tuple, logits.tolist())) for logits in outputs.values()}) == len(outputs)


def test_channels_that_only_layers_read_are_gone_from_onnx_files(tmp_path: Path) -> None:
    found = network("bayesian_bits", "lenet5")
    save_onnx(tmp_path / "network.onnx", found.model, images=digits()[:IMAGES])
    shapes = {tensor.name: list(tensor.dims) for tensor in onnx.load(tmp_path / "network.onnx").graph.initializer}
    left = {name: row["channels_left"] for name, row in found.method.details(found.model).items()}
    assert left["conv1"] < 8
    assert shapes["conv1.bias"] == [left["conv1"]]
    assert shapes["conv2.codes"][:2] == [left["conv2"], left["conv1"]]
    assert shapes["fc1.bias"] == [left["fc1"]]
    counted = found.size_of(points(found)[0])
    assert sum(len(t.raw_data) for t in onnx.load(tmp_path / "network.onnx").graph.initializer) < 0.9 * counted


def test_bsq_stores_no_codes_of_a_layer_without_bits(tmp_path: Path) -> None:
    found = network("bsq", "lenet5")
    path = tmp_path / "network.safetensors"
    save_packed(path, found.model, found.config)
    loaded = load_packed(path)
    dead = [name for name, layer in modules.quantized_layers(found.model) if not bool(layer.weight.any())]
    assert len(dead) == 1
    assert read_bits(loaded)[dead[0]].weight == 0
    assert not bool(loaded.get_submodule(dead[0]).weight.any())  # type: ignore[operator, union-attr]
    assert isinstance(found.model.get_submodule(dead[0]).weight_quantizer, BitPlanes)
