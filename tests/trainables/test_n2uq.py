"""Laws of N2UQ: its kernels against the plain formulas, what becomes of a network, and what a teacher may do."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from trainables import checkpoint, modules
from trainables.build import build_model
from trainables.config import TrialConfig, parse
from trainables.cost import LayerBits, LayerTable, uniform
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.methods import _threshold_kernels as threshold_kernels
from trainables.methods import n2uq
from trainables.methods._n2uq_kernels import entropy_weight, rprelu
from trainables.methods._n2uq_modules import (
    EntropyWeight,
    LearnedThresholds,
    ResidualBlock,
    RPReLU,
    prepared_thresholds,
)
from trainables.methods._threshold_kernels import NARROWEST, knots, threshold_quantize
from trainables.methods.n2uq import Method
from trainables.teachers import build_teacher, distillation_loss

widths_in_bits = st.integers(1, 8)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@st.composite
def quantizers(draw: Any) -> dict[str, Tensor]:
    """Arguments of `threshold_quantize` in float64, with widths from below the floor to wide."""
    steps = 2 ** draw(widths_in_bits) - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    number = st.floats(-2, 2).filter(lambda value: abs(value) > 0.05)
    return {
        "start": torch.tensor(draw(st.floats(-1, 1)), dtype=torch.float64),
        "widths": torch.rand(steps, dtype=torch.float64, generator=generator) * 2 * scale / steps,
        "input_scale": torch.tensor(draw(number), dtype=torch.float64),
        "output_scale": torch.tensor(draw(number), dtype=torch.float64),
        "q_max": torch.tensor(float(steps), dtype=torch.float64),
    }


def elements(arguments: dict[str, Tensor], seed: int) -> Tensor:
    """Random elements over the range and beyond it."""
    ends = knots(arguments["start"], arguments["widths"], arguments["q_max"])[0]
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    return (ends[0] + spread * (ends[-1] - ends[0])) / arguments["input_scale"]


def line(x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    """The curve whose gradients the quantizer has, segment by segment, for autograd."""
    step = 2 / arguments["q_max"]
    widths = torch.where(arguments["widths"] > NARROWEST, arguments["widths"], NARROWEST)
    z, left, result = arguments["input_scale"] * x, arguments["start"], 0 * x
    for i, width in enumerate(widths):
        rising = step * i + step * (z - left) / width
        result = torch.where((z > left) & (z <= left + width), rising, result)
        left = left + width
    return arguments["output_scale"] * torch.where(z > left, torch.full_like(z, 2.0), result)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_code_is_the_number_of_thresholds_below(arguments, seed):
    x = elements(arguments, seed)
    thresholds = knots(arguments["start"], arguments["widths"], arguments["q_max"])[1]
    counted = (arguments["input_scale"] * x[..., None] > thresholds).sum(-1)
    step = arguments["output_scale"] * 2 / arguments["q_max"]
    torch.testing.assert_close(threshold_quantize(x, **arguments), counted * step, rtol=1e-12, atol=1e-12)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_gradients_are_those_of_the_line_through_the_levels(arguments, seed):
    names = ["start", "widths", "input_scale"]
    g = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    found = []
    for function in (lambda x, a: threshold_quantize(x, **a), line):
        x = elements(arguments, seed).requires_grad_()
        copied = {name: value.clone().requires_grad_(name in names) for name, value in arguments.items()}
        inputs = [x, *(copied[name] for name in names)]
        found.append(torch.autograd.grad((function(x, copied) * g).sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()) + 1e-12)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_gradient_of_the_output_scale_is_that_of_the_quantized_value(arguments, seed):
    x = elements(arguments, seed)
    scale = arguments["output_scale"].clone().requires_grad_()
    y = threshold_quantize(x, **{**arguments, "output_scale": scale})
    (gradient,) = torch.autograd.grad((y * x).sum(), [scale])
    torch.testing.assert_close(gradient, (y.detach() / scale.detach() * x).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_on_a_threshold_gets_the_lower_level_and_a_rounding_error_more_the_higher(bits, dtype):
    quantizer = LearnedThresholds(bits).to(dtype)
    quantizer.widths.data.mul_(torch.rand(255, generator=torch.Generator().manual_seed(bits)) + 0.5)
    thresholds = quantizer.thresholds
    higher = thresholds + 4 * torch.finfo(dtype).eps  # the range is 2 to 3
    codes = [(quantizer(x).detach() * (2**bits - 1) / 2).round() for x in (thresholds, higher)]
    expected = torch.arange(2**bits - 1, dtype=dtype)
    assert torch.equal(codes[0], expected)
    assert torch.equal(codes[1], expected + 1)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_range_too_wide_for_a_table_is_searched_instead(spread):
    widths = torch.tensor([0.0, spread, spread])
    x = torch.tensor([-1.0, 4e-4, 6e-4, 0.4 * spread, 0.6 * spread, 1.4 * spread, 9 * spread], requires_grad=True)
    one = torch.tensor(1.0)
    y = threshold_quantize(x, torch.tensor(0.0), widths, one, one, torch.tensor(3.0))
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0, 1, 1, 2, 2, 3]) * 2 / 3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0, 1e3, 1e3, 1 / spread, 1 / spread, 1 / spread, 0]) * 2 / 3)


def test_values_that_are_no_numbers_stay_and_infinite_ones_get_the_outer_levels():
    y = LearnedThresholds(3)(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3]))
    assert bool(y[0].isnan())
    torch.testing.assert_close(y.detach()[1:], torch.tensor([2.0, 0.0, 2 / 7]))


@layouts
def test_the_layout_of_memory_changes_no_number(layout):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 8, 5, 6, generator=generator)
    found = []
    for memory in (torch.contiguous_format, layout):
        quantizer = LearnedThresholds(3, activation=RPReLU(8))
        images = x.clone(memory_format=memory).requires_grad_()
        y = quantizer(images)
        y.backward(g)
        found.append([y, images.grad, *(p.grad for p in quantizer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bits", [2, 8])
def test_what_is_kept_for_the_backward_pass_is_the_input_and_a_small_integer_an_element(bits):
    kept: list[Tensor] = []
    x = torch.randn(4, 8, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LearnedThresholds(bits)(x)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.dtype for t in large] == [torch.float32, torch.int16]


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_straight_formulas_give_what_the_table_gives(arguments, seed):
    x = elements(arguments, seed)
    y, below = threshold_kernels._threshold_forward(x, **arguments)
    torch.testing.assert_close(y, threshold_quantize(x, **arguments), rtol=1e-12, atol=1e-12)
    found = threshold_kernels._threshold_backward(x.cos(), x, below, **arguments)
    names = ["start", "widths", "input_scale", "output_scale"]
    copied = {name: value.clone().requires_grad_(name in names) for name, value in arguments.items()}
    inputs = [x.requires_grad_(), *(copied[name] for name in names)]
    wanted = torch.autograd.grad(threshold_quantize(x, **copied), inputs, x.detach().cos())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()) + 1e-12)


def test_quantizers_of_any_widths_prepared_together_are_those_prepared_alone():
    generator = torch.Generator().manual_seed(0)
    quantizers = nn.ModuleList(LearnedThresholds(bits) for bits in (3, 8, 1, 2, 5))
    for quantizer in quantizers:
        for p in quantizer.parameters():
            p.data.mul_(torch.rand(p.shape, generator=generator) + 0.5)
    quantizers[3].widths.data[1] = 1e5  # too wide for a table
    x = torch.randn(5, 2, 3, 4, 4, generator=generator) * 2
    found = []
    for together in (prepared_thresholds(quantizers), nullcontext()):
        with together:
            y = torch.stack([quantizer(images) for quantizer, images in zip(quantizers, x, strict=True)])
        assert all(quantizer.prepared is None for quantizer in quantizers)
        found.append([y, *torch.autograd.grad((y * x.cos()).sum(), list(quantizers.parameters()))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_quantized_weights_take_the_same_memory_again_once_nobody_holds_them():
    quantizer, w = EntropyWeight(2), torch.randn(3, 4, requires_grad=True)
    first, second = quantizer(w), quantizer(w * 2)
    assert first.data_ptr() != second.data_ptr()  # the first one is still there
    address = second.data_ptr()
    assert torch.equal(first, entropy_weight(w, quantizer.q_max, quantizer.clip_range))
    loss = (second @ torch.randn(4, 4, requires_grad=True)).sum()
    del second
    assert quantizer(w).data_ptr() != address  # the graph holds it
    address = quantizer(w).data_ptr()
    loss.backward()
    assert quantizer(w).data_ptr() == address


def test_a_compiled_model_gives_the_numbers_of_the_eager_one():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        layer = modules.QuantizedConv2d(
            nn.Conv2d(3, 2, 1), EntropyWeight(3), LearnedThresholds(3, activation=RPReLU(3))
        )
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(0.3)
        layer.weight.data.copy_(torch.tensor([[0.5, -0.2, 0.1], [-0.7, 0.3, 0.4]])[..., None, None])
        images = x.clone().requires_grad_()
        y = (torch.compile(layer, fullgraph=True) if compiled else layer)(images)
        y.square().sum().backward()
        found.append([y, images.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_single_precision_is_enough_for_the_sums_of_a_large_tensor(bits):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1 << 20, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        quantizer = LearnedThresholds(bits).to(dtype)
        quantizer(x.to(dtype)).backward(g.to(dtype))
        found.append([p.grad.double() for p in quantizer.parameters()])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 2e-4 * float(other.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Weights and RPReLU


@given(bits=widths_in_bits, seed=st.integers(0, 2**16), factor=st.floats(1e-3, 1e3))
def test_quantized_weights_follow_the_size_of_their_filter_and_have_no_level_0(bits, seed, factor):
    w = torch.randn(3, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q_max, clip = torch.tensor(2.0**bits - 1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    y = entropy_weight(w, q_max, clip)
    torch.testing.assert_close(entropy_weight(w * factor, q_max, clip), y * factor)
    assert all(
        len(levels.unique()) <= 2**bits for levels in (y / w.abs().mean(dim=(1, 2, 3), keepdim=True)).round(decimals=6)
    )
    assert bool((y != 0).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_evenly_spread_weights_fill_all_levels_alike(bits):
    w = torch.linspace(-1, 1, 2**14 + 1, dtype=torch.float64).view(1, -1)
    y = EntropyWeight(bits).double()(w)
    counts = y.unique(return_counts=True)[1].double()
    assert len(counts) == 2**bits
    assert float((counts / counts.mean() - 1).abs().max()) < 0.02


def test_a_filter_of_zeros_stays_finite_and_small():
    y = EntropyWeight(2)(torch.zeros(2, 3, 3, 3))
    assert float(y.abs().max()) < 1e-6


@pytest.mark.parametrize("rescale", [False, True])
def test_the_gradient_of_a_weight_passes_as_it_is_or_over_its_scale(rescale):
    w = torch.tensor([[1.0, -3.0], [0.5, 0.5]], requires_grad=True)
    EntropyWeight(2, rescale=rescale)(w).backward(torch.ones(2, 2))
    scales = 1.5 * torch.tensor([[2.0], [0.5]])
    torch.testing.assert_close(w.grad, (1 / scales if rescale else torch.ones(2, 1)).expand(2, 2))


@layouts
@pytest.mark.parametrize("dim", [1, -1])
def test_rprelu_is_a_prelu_between_two_shifts_with_all_gradients(kernels, layout, dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    x[0] = 0  # with a shift of 0 this is the kink
    shape = [-1 if axis == dim % 4 else 1 for axis in range(4)]
    parameters = torch.randn(3, x.shape[dim], generator=generator, dtype=torch.float64)
    parameters[0, 0] = 0
    g = torch.randn_like(x)
    found = []
    for ours in (True, False):
        inputs = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
        shift, slope, offset = inputs[1:]
        if ours:
            y = rprelu(*inputs, dim)
        else:
            moved = inputs[0] + shift.view(shape)
            y = torch.where(moved > 0, moved, moved * slope.view(shape)) + offset.view(shape)
        found.append([y, *torch.autograd.grad(y, inputs, g)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a network

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


# ---------------------------------------------------------------------------------------------------------------------
# Teachers


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """Weights of a LeNet-5 for digits."""
    config = parse({"method": "float", "model": "lenet5", "data": "digits"})
    checkpoint.save(tmp_path / "teacher.safetensors", build_model(config, 10, (1, 8, 8), seed=3))
    return tmp_path / "teacher.safetensors"


def configuration(bits: dict[str, Any] | None = None, model: str = "lenet5", **settings: Any) -> TrialConfig:
    return parse(
        {
            "method": {"name": "n2uq", **settings},
            "model": model,
            "data": "digits",
            "training": {"epochs": 2},
            "bits": bits or {},
        }
    )


def faults(config: TrialConfig) -> str:
    model, shape = build_model(config, 10, (1, 8, 8), seed=0), (1, 8, 8)
    with pytest.raises(ConfigError) as caught:
        resolve_bits(config, trace(model, shape))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"teacher": "lenet5"}, "method/teacher = 'lenet5' has no weights: give method/teacher_checkpoint"),
        ({"teacher": "lenet5", "teacher_pretrained": True, "teacher_checkpoint": "x"}, "has two kinds of weights"),
        ({"teacher": "resnet18", "teacher_pretrained": True}, "are for 1000 classes, the data set has 10"),
        (
            {"teacher": "resnet19", "teacher_checkpoint": "x"},
            "neither a model of ours nor of torchvision; did you mean",
        ),
        ({"teacher": "lenet5", "teacher_checkpoint": "/none"}, "cannot read checkpoint /none"),
        ({"teacher": "lenet5", "teacher_checkpoint": "x", "teacher_settings": {"deep": 1}}, "cannot be built"),
        ({"teacher_weight": 0.5}, "method/teacher_weight = 0.5: has no effect without method/teacher"),
        ({"quantize_downsample": False}, "method/quantize_downsample = False: model 'lenet5' has no convolution"),
        ({"quantize_ends": False, "bits": {"conv1": {"weight": 4}}}, "bits/conv1: this layer stays float"),
    ],
)
def test_settings_that_do_not_fit_together_are_one_clear_error(settings, text):
    given_bits = settings.get("bits")
    config = configuration(given_bits, **{k: v for k, v in settings.items() if k != "bits"})
    assert text in faults(config)


def test_a_teacher_of_other_classes_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "teacher.safetensors"
    config = parse({"method": "float", "model": "lenet5", "data": "digits"})
    checkpoint.save(path, build_model(config, 7, (1, 8, 8), seed=0))
    text = faults(configuration(teacher="lenet5", teacher_checkpoint=str(path)))
    assert "a teacher of 7 classes, the data set has 10; give one that was trained on the same classes" in text
    assert text.count("classes") == 2


def test_smoothed_labels_beside_a_teacher_that_replaces_them_are_an_error(teacher_file):
    config = parse(
        {
            **configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file)).tree(),
            "training": {"label_smoothing": 0.1},
        }
    )
    assert "training/label_smoothing = 0.1: labels play no part" in faults(config)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_a_share_of_the_teachers_and_the_rest_of_the_labels(teacher_file, weight):
    config = configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file), teacher_weight=weight)
    method = Method(Method.Settings(**config.method.settings))
    model = build_model(config, 10, (1, 8, 8), seed=0)
    table = trace(model, (1, 8, 8))
    method.prepare(model, table, resolve_bits(config, table))
    images, labels = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    teacher = build_teacher("lenet5", 10, (1, 8, 8), settings={}, weights=teacher_file)
    (loss,) = method.losses(model, images, labels)
    hard = functional.cross_entropy(model(images), labels)
    soft = distillation_loss(model(images), teacher(images))
    torch.testing.assert_close(loss, (1 - weight) * hard + weight * soft)


def test_the_teacher_is_no_part_of_the_student_and_draws_no_random_numbers(teacher_file):
    plain, taught = (
        list(fit(configuration(**settings)))[-1].points[0]
        for settings in ({}, {"teacher": "lenet5", "teacher_checkpoint": str(teacher_file)})
    )
    assert (plain.size_bytes, plain.bops) == (taught.size_bytes, taught.bops)
    config = configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file))
    method = Method(Method.Settings(**config.method.settings))
    model = build_model(config, 10, (1, 8, 8), seed=0)
    table = trace(model, (1, 8, 8))
    method.prepare(model, table, resolve_bits(config, table))
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method.teacher_logits(torch.zeros(1, 1, 8, 8), 10)
    assert list(model.state_dict()) == list(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(p.requires_grad for p in method._teacher.parameters())  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(("bits", "accuracy"), [(1, 0.25), (2, 0.5), (8, 0.5)])
def test_a_short_training_on_digits_learns_and_ends_in_a_point(bits, accuracy):
    tree = configuration({"*": {"weight": bits, "activation": bits}}).tree()
    adam = {"name": "adam", "lr": 3e-3, "schedule": "linear", "weight_decay": 0.0}
    reports = list(fit(parse({**tree, "optimizer": adam, "training": {"epochs": 3}})))
    (point,) = reports[-1].points
    assert point.accuracy > accuracy
    assert {tuple(point.bits[name]) for name in ("conv2", "fc1")} == {(bits, bits)}
    assert reports[-1].train_loss < reports[0].train_loss


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, teacher_file):
    settings = {"teacher": "lenet5", "teacher_checkpoint": str(teacher_file), "teacher_weight": 0.5}
    tree = {**configuration(**settings).tree(), "optimizer": {"name": "adam", "lr": 1e-3, "schedule": "linear"}}
    whole = [report.points for report in fit(parse(tree))]
    next(iter(fit(parse(tree), folder=tmp_path / "trial")))
    resumed = [report.points for report in fit(parse(tree), folder=tmp_path / "trial")]
    assert resumed == whole


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


def test_the_published_rate_falls_in_a_line_to_0():
    assert [n2uq.published_rate(epoch, 4, 1.0) for epoch in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]
