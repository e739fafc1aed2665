"""What N2UQ makes of a network: where it quantizes and bends, what is stored, who is trained how."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables import checkpoint, modules
from trainables.build import build_model
from trainables.config import parse
from trainables.cost import LayerBits, LayerTable, uniform
from trainables.layers import trace
from trainables.methods._n2uq_modules import EntropyWeight, LearnedThresholds, ResidualBlock, RPReLU
from trainables.methods.n2uq import Method

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "lenet5": ({"width": 0.25}, (1, 8, 8)),
    "vgg7": ({"width": 0.05}, (3, 8, 8)),
    "resnet20": ({"depth": 8, "width": 8}, (3, 16, 16)),
    "resnet18": ({"stem": "cifar"}, (3, 8, 8)),
    "resnet50": ({}, (3, 32, 32)),
    "mobilenet_v2": ({"width": 0.25}, (3, 32, 32)),
}
CLASSES = 5


def float_network(name: str) -> tuple[nn.Module, LayerTable]:
    settings, shape = NETWORKS[name]
    config = parse({"method": "float", "model": {"name": name, **settings}, "data": "digits"})
    model = build_model(config, CLASSES, shape, seed=0)
    return model, trace(model, shape)


def prepared(name: str, bits: int = 3, **settings: Any) -> tuple[Method, nn.Module, LayerTable]:
    model, table = float_network(name)
    method = Method(Method.Settings(**settings))
    method.prepare(model, table, uniform(table, bits, bits))
    return method, model, table


@pytest.mark.parametrize(
    ("name", "rprelus", "relus"),
    [
        ("lenet5", 3, 0),
        ("vgg7", 7, 0),
        ("resnet20", 9, 1),
        ("resnet18", 24, 1),
        ("resnet50", 64, 1),
        ("mobilenet_v2", 50, 2),
    ],
)
def test_a_network_has_an_rprelu_where_a_relu_gave_way_and_in_its_blocks(name, rprelus, relus):
    _, model, _ = prepared(name)
    found = list(model.modules())
    assert sum(isinstance(module, RPReLU) for module in found) == rprelus
    assert sum(isinstance(module, nn.ReLU | nn.ReLU6) for module in found) == relus


@pytest.mark.parametrize("name", ["lenet5", "vgg7", "resnet20", "resnet18", "resnet50"])
def test_with_slopes_of_0_and_no_rounding_the_network_is_the_float_one(name):
    _, model, _ = prepared(name, slope_init=0.0)
    plain = float_network(name)[0].double()
    images = torch.randn(4, *NETWORKS[name][1], generator=torch.Generator().manual_seed(0)).double()
    for _, layer in modules.quantized_layers(model):
        layer.weight_quantizer = nn.Identity()
        if isinstance(layer.input_quantizer, LearnedThresholds):
            layer.input_quantizer.forward = layer.input_quantizer._read
    with torch.no_grad():
        torch.testing.assert_close(model.double()(images), plain(images), rtol=1e-9, atol=1e-9)


class Reused(nn.Module):
    """One ReLU for several places, and layers outside of any sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 2)
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv3(self.conv2(self.relu(self.conv1(images))))
        return self.fc(self.relu(features).mean(dim=(2, 3)))


def test_a_relu_in_several_places_stays_and_negative_values_are_read_through_an_rprelu():
    model = Reused()
    table = trace(model, (3, 8, 8))
    Method(Method.Settings()).prepare(model, table, uniform(table, 4, 4))
    assert isinstance(model.relu, nn.ReLU)
    read_through = {
        name for name, layer in modules.quantized_layers(model) if getattr(layer.input_quantizer, "activation", None)
    }
    assert read_through == {"conv3"}


@pytest.mark.parametrize("padding", [0, "valid"])
def test_a_strided_convolution_of_one_pixel_quantizes_only_what_it_reads(padding):
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(6, 4, 1, stride=2, padding=padding)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), conv, nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 5, 5))
    table = trace(model, (3, 5, 5))
    plain = LearnedThresholds(3, activation=RPReLU(6))
    weights = EntropyWeight(3)
    x = torch.randn(2, 6, 5, 5, generator=generator)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    Method(Method.Settings()).prepare(model, table, uniform(table, 3, 3))
    ours: Any = model[2]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = ours(a), functional.conv2d(plain(b), weights(weight), bias, stride=2)
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for one, other in zip(ours.input_quantizer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert (ours.stride, ours.input_quantizer.stride) == ((1, 1), (2, 2))


def test_shortcuts_read_the_raw_input_of_their_block():
    _, model, _ = prepared("resnet18")
    for block in model.modules():
        if isinstance(block, ResidualBlock) and isinstance(block.downsample, nn.Sequential):
            conv: Any = block.downsample[0]
            assert conv.input_quantizer.activation is None


def test_shortcuts_and_ends_can_stay_float_and_then_have_no_bits():
    method, model, table = prepared("resnet18", quantize_downsample=False, quantize_ends=False)
    (point,) = method.points(model)
    missing = {row.name for row in table.quantizable} - set(point.bits)
    assert missing == {"conv1", "fc", *(f"layer{i}.0.downsample.0" for i in (2, 3, 4))}
    assert set(point.bits.values()) == {LayerBits(weight=3, activation=3)}


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_state_has_one_shape_at_every_width(bits):
    shapes = [{k: v.shape for k, v in prepared("resnet20", b)[1].state_dict().items()} for b in (bits, 8)]
    assert shapes[0] == shapes[1]


def test_a_new_width_starts_equal_segments():
    quantizer = LearnedThresholds(8)
    quantizer.set_bits(2)
    torch.testing.assert_close(quantizer.thresholds, torch.tensor([1.0, 3.0, 5.0]) / 3)
    assert quantizer.bits == 2


def test_an_export_stores_thresholds_levels_scales_and_rprelus():
    method, model, _ = prepared("lenet5", bits=2)
    thresholds = 2 * (3 + 1) + (255 + 1)  # two inner layers at 2 bits, the last at 8
    scales = 8 + 16 + 128 + CLASSES
    rprelus = 3 * (8 + 16 * 2 * 2 + 128)
    assert method.points(model)[0].extra_floats == thresholds + scales + rprelus


def test_the_range_can_start_from_a_batch():
    quantizer = LearnedThresholds(2, from_batch=True)
    quantizer.calibrate(torch.tensor([-5.0, 1.0, 7.0, 1.0]))
    reach = 2 * 9 / 4 * 3**0.5
    assert float(quantizer(torch.tensor(100.0))) == pytest.approx(reach)
    assert float(quantizer(torch.tensor(0.9 * reach))) == pytest.approx(reach)


def test_groups_are_weights_thresholds_and_the_rest_and_only_weights_decay():
    method, model, _ = prepared("resnet20", threshold_lr=0.3)
    weights, thresholds, others = method.groups(model)
    assert {p.dim() for p in weights["params"]} == {4}
    assert len(thresholds["params"]) == 4 * sum(isinstance(m, LearnedThresholds) for m in model.modules())
    assert (thresholds["lr_factor"], thresholds["weight_decay"], others["weight_decay"]) == (0.3, 0.0, 0.0)
    assert "weight_decay" not in weights


def test_as_published_widths_of_shortcuts_train_at_the_full_rate():
    sizes = [
        len(prepared("resnet20", as_published=published)[0].groups(prepared("resnet20")[1])[1]["params"])
        for published in (False, True)
    ]
    method, model, _ = prepared("resnet20", as_published=True)
    slow = {id(p) for p in method.groups(model)[1]["params"]}
    fast = {name for name, p in model.named_parameters() if name.endswith("widths") and id(p) not in slow}
    assert fast == {f"layer{i}.0.downsample.0.input_quantizer.widths" for i in (2, 3)}
    assert sizes[0] - sizes[1] == 2


def test_a_saved_network_gives_the_same_answers_in_a_fresh_one(tmp_path: Path):
    _, model, _ = prepared("mobilenet_v2", 2)
    _, other, _ = prepared("mobilenet_v2", 5)
    for p in model.parameters():
        p.data.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    checkpoint.save(tmp_path / "trial", model)
    checkpoint.load_weights(tmp_path / "trial", other)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), other.eval()(images))
