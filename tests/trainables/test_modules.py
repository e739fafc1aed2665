"""Quantized layers: what replacing keeps, what calibrating leaves alone, and widths as data."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables import modules
from trainables.cost import Layer
from trainables.methods.dorefa import DorefaWeight, UnitActivation
from trainables.methods.lsq import LearnedScale
from trainables.methods.pact import LearnedClip
from trainables.modules import QuantizedConv2d, QuantizedLinear, Quantizer

IMAGES = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Identity(Quantizer):
    """Quantizes nothing and notes what it was calibrated with."""

    def __init__(self) -> None:
        super().__init__(8, signed=True)
        self.seen: list[Tensor] = []

    def calibrate(self, x: Tensor) -> None:
        self.seen.append(x.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return x


def row(name: str) -> Layer:
    return Layer(name=name, kind="conv", macs=1, weights=1, biases=0, channels=1)


def network() -> nn.Sequential:
    """Convolution, batch norm, ReLU, dropout, convolution, linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(6, 6, 3, groups=3), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(96, 5),
    )


def quantized(model: nn.Module, names: tuple[str, ...] = ("0", "4.0", "6")) -> nn.Module:
    """Every layer with LSQ quantizers of 4 bits, the first without one for its input."""
    for name in names:
        reads = None if name == "0" else LearnedScale(4, signed=False, shared=False)
        modules.replace(model, row(name), LearnedScale(4, signed=True, shared=True), reads)
    return model


CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"groups": 2, "bias": False},
    {"groups": 4, "padding": (2, 0)},
    {"padding": 2, "padding_mode": "reflect"},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_whose_quantizers_change_nothing_computes_as_before(options):
    options: dict[str, Any] = dict(options)
    plain = nn.Conv2d(4, 8, 3, **options)
    assert torch.equal(QuantizedConv2d(plain, Identity(), Identity())(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_whose_quantizers_change_nothing_computes_as_before(bias):
    plain = nn.Linear(8, 3, bias=bias)
    assert torch.equal(QuantizedLinear(plain, Identity(), None)(IMAGES), plain(IMAGES))


def test_a_quantized_layer_computes_with_quantized_inputs_and_weights_and_a_float_bias():
    plain = nn.Conv2d(4, 8, 3)
    reads, weighs = UnitActivation(3, signed=True), DorefaWeight(2, variant="C")
    wanted = nn.functional.conv2d(reads(IMAGES), weighs(plain.weight), plain.bias)
    assert torch.equal(QuantizedConv2d(plain, weighs, reads)(IMAGES), wanted)


def test_replacing_keeps_the_parameters_themselves_and_their_names():
    model = network()
    before = dict(model.named_parameters())
    quantized(model)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all("_quantizer." in name for name in set(after) - set(before))


def test_replacing_keeps_the_names_of_the_state_dict_so_that_float_weights_load():
    plain, model = network(), quantized(network())
    state = plain.state_dict()
    missing, unexpected = model.load_state_dict({name: value + 1 for name, value in state.items()}, strict=False)
    assert not unexpected
    assert all("_quantizer." in name for name in missing)
    assert all(torch.equal(model.state_dict()[name], value + 1) for name, value in state.items())


@pytest.mark.parametrize("training", [True, False])
def test_replacing_keeps_the_mode_and_every_attribute_of_the_layer(training):
    model = network().train(training)
    plain = model.get_submodule("4.0")
    new = modules.replace(model, row("4.0"), Identity(), None)
    assert model.get_submodule("4.0") is new
    assert [m.training for m in new.modules()] == [training] * 2
    assert new.extra_repr() == plain.extra_repr()


def test_only_a_convolution_or_a_linear_layer_that_exists_can_be_replaced():
    model = network()
    with pytest.raises(TypeError, match="1 is a BatchNorm2d; only Conv2d and Linear can be quantized"):
        modules.replace(model, row("1"), Identity(), None)
    with pytest.raises(AttributeError, match="nowhere"):
        modules.replace(model, row("nowhere"), Identity(), None)


def test_quantized_layers_come_by_name_in_the_order_of_definition():
    names = [name for name, _ in modules.quantized_layers(quantized(network(), ("6", "0")))]
    assert names == ["0", "6"]


def test_calibrating_shows_every_quantizer_its_tensor_once_and_quantized_inputs_upstream():
    model = quantized(network(), ("0",))
    spy, weight_spy = Identity(), Identity()
    modules.replace(model, row("4.0"), weight_spy, spy)
    model.get_submodule("3").p = 0.0  # type: ignore[assignment]
    modules.calibrate(model, IMAGES)
    model.train()
    assert len(spy.seen) == len(weight_spy.seen) == 1
    assert torch.equal(spy.seen[0], model[:4](IMAGES))  # with the scales that calibration has just set
    assert torch.equal(weight_spy.seen[0], model.get_submodule("4.0").weight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_calibrating_changes_the_scales_and_nothing_else(training, momentum):
    model = quantized(network()).train(training)
    norm = model.get_submodule("1")
    norm.momentum = momentum  # type: ignore[assignment]
    norm.running_mean.fill_(0.3)  # type: ignore[operator, union-attr]
    norm.num_batches_tracked.fill_(7)  # type: ignore[operator, union-attr]
    before = copy.deepcopy(model.state_dict())
    modules.calibrate(model, IMAGES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(("quantizer.scale", "quantizer.scale_floor"))}
    assert norm.momentum == momentum
    assert {m.training for m in model.modules()} == {training}
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_calibrating_keeps_the_mode_of_each_part():
    model = quantized(network())
    frozen = model.get_submodule("1").eval()
    modules.calibrate(model, IMAGES)
    assert not frozen.training
    assert model.training


def test_calibrating_leaves_no_trace_when_the_forward_pass_fails():
    model = quantized(network())
    before = copy.deepcopy(dict(model.named_buffers()))
    with pytest.raises(RuntimeError, match="channels"):
        modules.calibrate(model, IMAGES[:, :3])
    kept = {name: buffer for name, buffer in model.named_buffers() if not name.endswith("scale_floor")}
    assert all(torch.equal(buffer, before[name]) for name, buffer in kept.items())
    assert model.get_submodule("1").momentum == 0.1
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_calibrating_twice_gives_the_same_scales():
    model = quantized(network())
    model.get_submodule("3").p = 0.0  # type: ignore[assignment]
    modules.calibrate(model, IMAGES)
    once = copy.deepcopy(model.state_dict())
    modules.calibrate(model, IMAGES)
    torch.testing.assert_close(model.state_dict(), once, rtol=0, atol=0)


QUANTIZERS = {
    "lsq unsigned": lambda bits: LearnedScale(bits, signed=False, shared=True),
    "lsq signed": lambda bits: LearnedScale(bits, signed=True, shared=True),
    "lsq symmetric": lambda bits: LearnedScale(bits, signed=True, symmetric=True, shared=True),
    "pact unsigned": lambda bits: LearnedClip(bits, signed=False),
    "pact signed": lambda bits: LearnedClip(bits, signed=True),
    "dorefa unsigned": lambda bits: UnitActivation(bits, signed=False),
    "dorefa signed": lambda bits: UnitActivation(bits, signed=True),
    "dorefa weight": lambda bits: DorefaWeight(bits, variant="A"),
}
SIGNED = [name for name in QUANTIZERS if "signed" in name.split() or "symmetric" in name]
ALL_WIDTHS = [(name, bits) for name in QUANTIZERS for bits in range(2 if name in SIGNED else 1, 17)]


@pytest.mark.parametrize(("name", "bits"), ALL_WIDTHS)
def test_the_bits_read_back_are_the_bits_set(name, bits):
    assert QUANTIZERS[name](bits).bits == bits
    quantizer = QUANTIZERS[name](5)
    quantizer.set_bits(bits)
    assert quantizer.bits == bits


@pytest.mark.parametrize("name", QUANTIZERS)
def test_too_few_bits_are_refused_and_the_width_stays(name):
    quantizer = QUANTIZERS[name](4)
    with pytest.raises(ValueError, match=r"takes [12] or more"):
        quantizer.set_bits(1 if name in SIGNED else 0)
    assert quantizer.bits == 4


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("lsq unsigned", 0, 7), ("lsq signed", -4, 3), ("lsq symmetric", -3, 3), ("pact signed", -3, 3)],
)
def test_three_bits_are_these_codes(name, low, high):
    quantizer = QUANTIZERS[name](3)
    assert (float(quantizer.q_min), float(quantizer.q_max)) == (low, high)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_bits_are_set_in_place_and_travel_with_the_state_dict(name):
    quantizer = QUANTIZERS[name](8)
    places = quantizer.q_min.data_ptr(), quantizer.q_max.data_ptr()
    quantizer.set_bits(3)
    assert (quantizer.q_min.data_ptr(), quantizer.q_max.data_ptr()) == places
    other = QUANTIZERS[name](8)
    other.load_state_dict(quantizer.state_dict())
    assert other.bits == 3


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_new_width_acts_at_once(name):
    x = torch.linspace(-1, 1, 400)
    changed = QUANTIZERS[name](8)
    changed.set_bits(2)
    assert torch.equal(changed(x), QUANTIZERS[name](2)(x))


def test_a_quantizer_that_does_not_say_how_it_quantizes_is_an_error():
    with pytest.raises(NotImplementedError, match="Quantizer does not say how it quantizes"):
        Quantizer(4, signed=False)(IMAGES)
