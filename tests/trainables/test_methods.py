"""One contract that every method passes unasked, on a plain network, one with batch norm, and one with signed layers.

A new file in `trainables/methods` is found here by its name. The ends of a network have other widths than the rest.
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainables import checkpoint, modules, plugins
from trainables.build import build_model
from trainables.config import Optimizer, parse
from trainables.cost import FLOAT_BITS, INPUT_BITS, Bits, Layer, LayerBits, LayerTable, bops, payload_bytes, uniform
from trainables.layers import trace
from trainables.layouts import lay_out
from trainables.method import Method, is_quantizer_parameter
from trainables.methods.lsq import LearnedScale
from trainables.optimizers import Optimizers
from trainables.plugin_settings import settings_of
from trainables.step import training_step

METHODS = list(plugins.describe("trainables.methods"))
QUANTIZING = [name for name in METHODS if name != "float"]
GIVEN = [
    name for name in QUANTIZING if len(plugins.attribute("methods", name, "Method").given_bits) == 2
]  # a person gives the widths; the others learn them, or train several
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "lenet5": ({"width": 0.25}, (1, 8, 8)),
    "resnet20": ({"depth": 8, "width": 8}, (3, 16, 16)),
    "mobilenet_v2": ({"width": 0.25}, (3, 32, 32)),
}
CLASSES = 5
BATCH = 16

every_method = pytest.mark.parametrize("method", METHODS)
every_quantizing_method = pytest.mark.parametrize("method", QUANTIZING)
every_method_of_given_widths = pytest.mark.parametrize("method", GIVEN)
OTHER_FUNCTION = {"sat", "adabits", "n2uq"}
"""Methods that rescale weights or replace activations, so that a prepared network computes something else."""
every_network = pytest.mark.parametrize("network", NETWORKS)


@functools.cache
def traced(network: str) -> tuple[nn.Module, LayerTable]:
    fields_given, shape = NETWORKS[network]
    config = parse({"method": "float", "model": {"name": network, **fields_given}, "data": "digits"})
    model = build_model(config, CLASSES, shape, seed=0)
    return model, trace(model, shape)


@functools.cache
def batch(network: str) -> tuple[Tensor, Tensor]:
    """A fixed batch whose classes can be told apart: each has an image of its own under the noise."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(BATCH) % CLASSES
    prototypes = torch.randn(CLASSES, *NETWORKS[network][1], generator=generator)
    return prototypes[labels] + 0.1 * torch.randn(BATCH, *NETWORKS[network][1], generator=generator), labels


@dataclass
class Trial:
    """A prepared network and what was asked for."""

    method: Method
    model: nn.Module
    table: LayerTable
    bits: Bits
    images: Tensor
    labels: Tensor

    def losses(self) -> Iterator[Tensor]:
        return self.method.losses(self.model, self.images, self.labels)

    def optimizers(self, lr: float = 0.002, name: str = "sgd") -> Optimizers:
        settings = Optimizer(name=name, lr=lr, weight_decay=0.0)  # type: ignore[arg-type]
        return Optimizers(self.method.groups(self.model), settings)

    def train(self, optimizers: Optimizers, steps: int) -> list[float]:
        self.model.train()
        batch = (self.images, self.labels)
        return [float(training_step(self.method, self.model, self.model, *batch, optimizers)) for _ in range(steps)]


def asked(method: Method, table: LayerTable, weight: int, activation: int) -> Bits:
    """Uniform widths; 32 for those that the method does not take."""
    uniform_bits = uniform(table, weight, activation)
    weights, activations = ("weight" in method.given_bits, "activation" in method.given_bits)
    return {
        row.name: LayerBits(
            weight=uniform_bits[row.name].weight if weights else FLOAT_BITS,
            activation=uniform_bits[row.name].activation if activations or row.first else FLOAT_BITS,
        )
        for row in table.quantizable
    }


def prepared(method: str, network: str, width: int = 4, **settings: Any) -> Trial:
    """Dropout is off, so that a loss on a fixed batch depends on the weights alone."""
    plugin = plugins.attribute("methods", method, "Method")
    instance = plugin(plugin.Settings(**settings))
    model, table = traced(network)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    bits = {} if method == "float" else asked(instance, table, width, max(2, width - 1))
    instance.prepare(model, table, bits)
    lay_out(model, torch.device("cpu"))
    images, labels = batch(network)
    images = images.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)  # of noise that a method draws
    instance.calibrate(model, images)
    return Trial(instance, model, table, bits, images, labels)


@every_method
def test_every_method_derives_from_the_protocol_and_describes_itself(method):
    plugin = plugins.attribute("methods", method, "Method")
    assert issubclass(plugin, Method)
    assert len(plugins.describe("trainables.methods")[method]) > 20
    assert plugin.__doc__


@every_method
def test_every_setting_has_a_default_a_type_and_a_text(method):
    settings = plugins.attribute("methods", method, "Method").Settings
    assert settings() == settings()
    listed = settings_of("method", method)
    assert set(listed) == {field.name for field in fields(settings)}
    for address, (_, default, text) in listed.items():
        assert getattr(settings(), address) == default
        assert len(text) > 5, f"method/{address} has no description"


@every_method
@every_network
@pytest.mark.parametrize("width", [2, 4, 8])
def test_every_trainable_parameter_gets_a_finite_gradient(method, network, width):
    trial = prepared(method, network, width)
    for loss in trial.losses():
        assert loss.dim() == 0
        assert bool(loss.isfinite())
        loss.backward()
    gradients = {name: p.grad for name, p in trial.model.named_parameters() if p.requires_grad}
    assert [name for name, grad in gradients.items() if grad is None or not bool(grad.isfinite().all())] == []


@every_method
@every_network
def test_every_trainable_parameter_is_in_exactly_one_group(method, network):
    trial = prepared(method, network)
    listed = [p for group in trial.method.groups(trial.model) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed})
    assert {id(p) for p in listed} == {id(p) for p in trial.model.parameters() if p.requires_grad}


@every_quantizing_method
@every_network
def test_every_point_has_a_label_of_its_own_and_the_widths_of_every_layer(method, network):
    trial = prepared(method, network)
    points = trial.method.points(trial.model)
    assert len({point.label for point in points}) == len(points) > 0
    for point in points:
        assert set(point.bits) == {row.name for row in trial.table.quantizable}
        assert all(0 <= width.weight <= 32 and 1 <= width.activation <= 32 for width in point.bits.values())
        assert all(0 <= share <= 1 for share in (*point.output_share.values(), *point.input_share.values()))
        assert point.extra_floats is None or point.extra_floats >= 0
        point.activate()
        assert bool(trial.model.eval()(trial.images).isfinite().all())


@every_method_of_given_widths
@every_network
@pytest.mark.parametrize("width", [2, 3, 8])
def test_the_points_report_the_widths_asked_for_and_cost_what_the_table_says(method, network, width):
    trial = prepared(method, network, width)
    points = trial.method.points(trial.model)
    assert len({point.label for point in points}) == len(points)
    (point,) = [point for point in points if dict(point.bits) == dict(trial.bits)]
    assert bops(trial.table, point.bits) == sum(
        layer.macs * trial.bits[layer.name].weight * trial.bits[layer.name].activation for layer in trial.table.layers
    )
    floats = point.extra_floats
    assert floats is not None
    codes = sum((layer.weights * trial.bits[layer.name].weight + 7) // 8 for layer in trial.table.layers)
    others = 4 * sum(layer.biases for layer in trial.table.layers) + 8 * trial.table.norm_channels
    assert payload_bytes(trial.table, point.bits, extra_floats=floats) == codes + others + 4 * floats


def test_the_point_of_the_float_network_is_the_reference():
    trial = prepared("float", "resnet20")
    (point,) = trial.method.points(trial.model)
    assert bops(trial.table, point.bits) == trial.table.macs * 1024
    parameters = sum(p.numel() for p in trial.model.parameters())
    assert payload_bytes(trial.table, point.bits, extra_floats=point.extra_floats) == 4 * parameters


@every_method_of_given_widths
@every_network
def test_widths_are_tensors_that_can_change_under_a_trained_network(method, network):
    trial = prepared(method, network, 8)
    buffers = dict(trial.model.named_buffers())
    for name, layer in modules.quantized_layers(trial.model):
        assert f"{name}.weight_quantizer.q_max" in buffers
        layer.weight_quantizer.set_bits(3)
        if layer.input_quantizer is not None:
            assert f"{name}.input_quantizer.q_max" in buffers
            layer.input_quantizer.set_bits(2)
    changed = trial.method.points(trial.model)[0].bits
    assert set(changed.values()) == {LayerBits(weight=3, activation=INPUT_BITS), LayerBits(weight=3, activation=2)}


@every_method_of_given_widths
@every_network
def test_every_quantizable_layer_is_quantized_and_only_the_network_input_is_not(method, network):
    trial = prepared(method, network)
    layers = dict(modules.quantized_layers(trial.model))
    assert set(layers) == {row.name for row in trial.table.quantizable}
    for row in trial.table.quantizable:
        reads = layers[row.name].input_quantizer
        assert (reads is None) == row.first
        assert reads is None or reads.signed == row.signed or method in OTHER_FUNCTION


def without_penalty(method: str) -> dict[str, Any]:
    """Settings that leave cross-entropy alone in the loss."""
    names = settings_of("method", method)
    return {name: 0.0 for name in ("penalty_strength",) if name in names}


@functools.cache
def float_start(network: str) -> dict[str, Tensor]:
    """Weights of the float network after eight steps."""
    trial = prepared("float", network)
    trial.train(trial.optimizers(0.001, "adam"), 8)
    return trial.model.state_dict()


@every_method
@every_network
def test_a_few_steps_from_a_float_start_lower_the_loss_on_a_fixed_batch(method, network):
    trial = prepared(method, network, 8, **without_penalty(method))
    trial.model.load_state_dict(float_start(network), strict=False)
    trial.method.calibrate(trial.model, trial.images)
    losses = trial.train(trial.optimizers(0.0003, "adam"), 25)
    assert min(losses[1:]) < 0.97 * losses[0]


@every_quantizing_method
def test_training_moves_all_weights_and_the_quantizers(method):
    """Not every quantizer parameter: a clip level moves when something is clipped, a scale behind batch norm hardly."""
    trial = prepared(method, "resnet20")
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    trial.train(trial.optimizers(0.02), 3)
    moved = {name for name, value in trial.model.state_dict().items() if not torch.equal(value, before[name])}
    parameters = {name for name, _ in trial.model.named_parameters()}
    still = parameters - moved
    for name in (name for name in still if not is_quantizer_parameter(name)):  # a weight made of others may round alike
        layer = name.rpartition(".")[0]
        assert any(other.startswith(f"{layer}.weight_quantizer.") for other in moved), name
    scales = {name for name in parameters if is_quantizer_parameter(name) and "clip_max" not in name}
    assert len(still & scales) <= len(scales) / 2


@every_method
@every_network
def test_the_same_start_gives_the_same_numbers(method, network):
    first, second = prepared(method, network), prepared(method, network)
    losses = []
    for trial in (first, second):
        torch.manual_seed(0)  # of noise that a method draws
        losses.append(trial.train(trial.optimizers(), 3))
    assert losses[0] == losses[1]
    assert_equal_states(first.model, second.model)


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert set(state) == set(other)
    assert [name for name, value in state.items() if not torch.equal(value, other[name])] == []


@every_method
@every_network
def test_evaluation_changes_no_state_and_is_repeatable(method, network):
    trial = prepared(method, network)
    trial.train(trial.optimizers(), 1)
    before = copy.deepcopy(trial.model)
    trial.model.eval()
    with torch.no_grad():
        once, twice = trial.model(trial.images), trial.model(trial.images)
    assert torch.equal(once, twice)
    assert_equal_states(trial.model, before)
    for point in trial.method.points(trial.model):
        point.activate()
    assert_equal_states(trial.model, before)


@every_method
@every_network
def test_a_checkpoint_restores_a_trial_that_then_goes_on_alike(method, network, tmp_path: Path):
    trial, other = prepared(method, network, 5), prepared(method, network, 8)  # other widths: bits are in the file
    optimizers, other_optimizers = trial.optimizers(), other.optimizers()
    trial.train(optimizers, 2)
    checkpoint.save(tmp_path / "trial", trial.model, *optimizers.parts)
    ahead = trial.train(optimizers, 2)
    reached = copy.deepcopy(trial.model.state_dict())
    checkpoint.restore(tmp_path / "trial", other.model, *other_optimizers.parts)
    assert other.train(other_optimizers, 2) == ahead
    assert [name for name, value in other.model.state_dict().items() if not torch.equal(value, reached[name])] == []
    assert [point.bits for point in other.method.points(other.model)] == [
        point.bits for point in trial.method.points(trial.model)
    ]


@every_method
@every_network
def test_a_float_network_loads_into_the_prepared_one(method, network):
    model, _ = traced(network)
    trial = prepared(method, network)
    assert trial.model.load_state_dict(model.state_dict(), strict=False).unexpected_keys == []


@pytest.mark.parametrize("method", [name for name in QUANTIZING if name not in OTHER_FUNCTION])
def test_at_eight_bits_a_quantized_network_is_near_the_float_one(method):
    """Not equal: the tanh of variant C bends large weights, and 8 bits round."""
    trial = prepared(method, "resnet20", 8)
    float_trial = prepared("float", "resnet20")
    if method == "dorefa":  # clips activations at 1, so compare where nothing is clipped
        for t in (trial, float_trial):
            for module in t.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.data.fill_(0.15)
                    module.bias.data.fill_(0.2)
    with torch.no_grad():
        a, b = trial.model.eval()(trial.images), float_trial.model.eval()(trial.images)
    assert float((a - b).norm() / b.norm()) < 0.2


@every_method
@every_network
def test_the_hooks_of_an_epoch_leave_a_working_network(method, network):
    trial = prepared(method, network)
    assert trial.method.after_epoch(trial.model, 1) in (True, False)
    trial.method.freeze(trial.model)
    assert bool(trial.model(trial.images).isfinite().all())


@every_quantizing_method
def test_label_smoothing_reaches_the_loss(method):
    plain, smooth = prepared(method, "lenet5"), prepared(method, "lenet5")
    smooth.method.label_smoothing = 0.5
    values = []
    for trial in (plain, smooth):
        torch.manual_seed(0)
        values.append([float(loss.detach()) for loss in trial.losses()])
    assert all(b > a + 1e-4 or b < a - 1e-4 for a, b in zip(*values, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# What only one method has


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("lsq", {}, 4 + 3),  # a scale for each weight tensor and each input but the image
        ("lsq", {"per_channel": True}, 8 + 16 + 128 + 5 + 3),  # a scale for each output channel
        ("pact", {}, 3 + 4),  # clip levels, and the largest weights
        ("pact", {"variant": "A"}, 3),
        ("dorefa", {}, 4),
        ("dorefa", {"variant": "B"}, 0),
    ],
)
def test_an_export_stores_as_many_floats_as_the_method_needs(method, settings, expected):
    trial = prepared(method, "lenet5", **settings)
    assert trial.method.points(trial.model)[0].extra_floats == expected


def test_lsq_with_a_scale_for_each_channel_trains_them_all():
    trial = prepared("lsq", "resnet20", per_channel=True)
    layer = trial.model.get_submodule("layer1.0.conv1")
    assert layer.weight_quantizer.scale.shape == (8,)
    losses = trial.train(trial.optimizers(0.02), 12)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(("method", "setting"), [("lsq", "scale_lr"), ("pact", "clip_lr")])
def test_the_learning_rate_of_quantizers_is_that_of_weights_times_a_factor(method, setting):
    trial = prepared(method, "lenet5", **{setting: 0.25})
    weights, quantizers = trial.method.groups(trial.model)
    assert "lr_factor" not in weights
    assert quantizers["lr_factor"] == 0.25
    names = {id(p): name for name, p in trial.model.named_parameters()}
    assert all(is_quantizer_parameter(names[id(p)]) for p in quantizers["params"])
    assert not any(is_quantizer_parameter(names[id(p)]) for p in weights["params"])


def test_the_clip_levels_of_pact_start_at_a_number_or_from_the_batch():
    clips = {
        start: [
            p.item() for n, p in prepared("pact", "lenet5", clip_init=start).model.named_parameters() if "clip" in n
        ]
        for start in (10.0, None)
    }
    assert clips[10.0] == [10.0] * 3
    assert all(0 < clip != 1.0 for clip in clips[None])


def test_the_penalty_of_pact_adds_the_squares_of_its_clip_levels():
    plain, penalized = (prepared("pact", "lenet5", clip_init=2.0, clip_penalty=p) for p in (0.0, 0.5))
    (a,), (b,) = plain.losses(), penalized.losses()
    assert float((b - a).detach()) == pytest.approx(0.5 * 3 * 2.0**2, rel=1e-5)


def test_dorefa_goes_down_to_one_bit():
    method = plugins.attribute("methods", "dorefa", "Method")
    model, table = traced("resnet20")
    model = copy.deepcopy(model)
    instance = method(method.Settings())
    instance.prepare(model, table, uniform(table, 1, 1))
    trial = Trial(instance, model, table, uniform(table, 1, 1), *batch("resnet20"))
    losses = trial.train(trial.optimizers(0.02), 12)
    assert losses[-1] < losses[0]
    assert instance.points(model)[0].bits == trial.bits
    levels = {
        name: layer.weight_quantizer(layer.weight).unique().numel() for name, layer in _inner_layers(model, table)
    }
    assert set(levels.values()) == {2}


def _inner_layers(model: nn.Module, table: LayerTable) -> list[tuple[str, modules.QuantizedLayer]]:
    ends = {row.name for row in table.layers if row.first or row.last}
    return [(name, layer) for name, layer in modules.quantized_layers(model) if name not in ends]


def test_a_method_without_quantizers_says_what_it_lacks():
    model, table = traced("lenet5")
    with pytest.raises(NotImplementedError, match=r"trainables\.method defines neither prepare nor weight_quantizer"):
        Method(Method.Settings()).prepare(copy.deepcopy(model), table, uniform(table, 4, 4))


def test_the_scale_of_lsq_starts_at_the_published_value():
    quantizer = LearnedScale(3, signed=False, shared=False)
    quantizer.calibrate(torch.tensor([1.0, 3.0]))
    assert quantizer.scale.item() == pytest.approx(2 * 2 / 7**0.5)


def test_an_input_of_zeros_starts_a_scale_above_zero():
    row = Layer(name="x", kind="conv", macs=1, weights=1, biases=0, channels=1)
    for name in ("lsq", "pact"):
        plugin = plugins.attribute("methods", name, "Method")
        quantizer = plugin(plugin.Settings()).input_quantizer(row, 4)
        quantizer.calibrate(torch.zeros(4, 4))
        assert all(float(p) > 0 for p in quantizer.parameters())
        assert bool((quantizer(torch.zeros(4, 4)) == 0).all())
