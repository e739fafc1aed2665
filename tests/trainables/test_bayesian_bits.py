"""Networks under Bayesian Bits: what is quantized and pruned where, and what it costs."""

import copy

import pytest
import torch

from tests.trainables.gated_networks import SHAPES, close_half, images, network, prepared
from trainables.build import build_model
from trainables.config import parse
from trainables.cost import INPUT_BITS, LayerBits, bops, relative_bops
from trainables.layers import trace
from trainables.methods._gated_rounding import LEVELS
from trainables.methods._gates import GatedQuantizer, penalties, quantizers
from trainables.methods.bayesian_bits import MODES


@pytest.mark.parametrize(
    ("name", "shape", "settings", "gate_init", "expected"),
    [
        ("lenet5", (1, 28, 28), {}, (6.0, 6.0, -6.0, -6.0), 36.620846),
        ("vgg7", (3, 32, 32), {}, (6.0, 6.0, 6.0, 6.0), 503.314431),
        ("resnet18", (3, 224, 224), {"residual": "quantized"}, (6.0, 6.0, 6.0, -6.0), 935.913122),
    ],
)
def test_a_prepared_network_has_the_published_penalty_at_its_start(name, shape, settings, gate_init, expected):
    config = parse({"method": "float", "model": name, "data": "digits"})
    model = build_model(config, 1000 if name == "resnet18" else 10, shape, seed=0)
    gates = {str(level): logit for level, logit in zip(LEVELS[1:], gate_init, strict=True)}
    prepared(model, trace(model, shape), gate_init=gates, **settings)
    assert penalties(quantizers(model)).sum().item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("mode", "percent"), [("full", 6.25), ("quantize", 6.25), ("w8a8", 6.25), ("w4a8", 3.125), ("prune_w4a8", 3.125)]
)
def test_a_mode_starts_at_its_widths(mode, percent):
    model, table = network("lenet5")
    method = prepared(model, table, mode=mode)
    (point,) = method.points(model)
    assert 100 * relative_bops(table, point.bits) == pytest.approx(percent)
    mode_prunes = any(q.pruning_logits is not None for q in quantizers(model))
    assert mode_prunes == MODES[mode].prunes
    assert model.fc2.weight_quantizer.pruning_logits is None


def test_pruning_alone_leaves_values_as_they_are_and_counts_them_as_floats():
    model, table = network("lenet5")
    plain = copy.deepcopy(model)
    method = prepared(model, table, mode="prune")
    x = images(4, (1, 28, 28))
    method.calibrate(model, x)
    assert torch.equal(model.eval()(x), plain.eval()(x))
    (point,) = method.points(model)
    assert point.bits["conv2"] == LayerBits(weight=32, activation=32)
    assert point.bits["conv1"] == LayerBits(weight=32, activation=INPUT_BITS)
    assert point.extra_floats == 0


def test_pruned_channels_are_left_out_of_the_layer_and_of_what_reads_it():
    model, table = network("lenet5")
    method = prepared(model, table)
    close_half(model, "conv1")
    (point,) = method.points(model)
    assert dict(point.output_share) == {"conv1": 0.5}
    assert dict(point.input_share) == {"conv2": 0.5}
    left = bops(table, point.bits, output_share=point.output_share, input_share=point.input_share)
    assert left == 64 * (table["conv1"].macs // 2 + table["conv2"].macs // 2 + table["fc1"].macs + table["fc2"].macs)


def test_a_layer_without_open_channels_has_no_bits():
    model, table = network("lenet5")
    method = prepared(model, table)
    model.conv2.weight_quantizer.pruning_logits.data.fill_(-6.0)
    (point,) = method.points(model)
    assert point.bits["conv2"].weight == 0


def test_depthwise_convolutions_have_no_gates_of_their_own_and_hand_on_those_before():
    model, table = network("mobilenet_v2", width=0.25)
    method = prepared(model, table)
    expand, depthwise, project = (f"features.3.conv.{place}" for place in ("0.0", "1.0", "2"))
    assert model.get_submodule(depthwise).weight_quantizer.pruning_logits is None
    close_half(model, expand)
    (point,) = method.points(model)
    assert point.output_share == {expand: 0.5}
    assert point.input_share == {depthwise: 0.5, project: 0.5}


def test_a_tensor_that_two_layers_read_has_one_quantizer_and_is_quantized_once():
    model, table = network("resnet18")
    method = prepared(model, table)
    method.calibrate(model, images(2, SHAPES["resnet18"]))
    block = model.layer2[0]
    quantizer = block.conv1.input_quantizer
    assert block.downsample[0].input_quantizer is quantizer
    both = table["layer2.0.conv1"].macs + table["layer2.0.downsample.0"].macs
    assert quantizer.macs_share == pytest.approx(both / max(row.macs for row in table.layers))
    made = []
    noise = quantizer.noise
    quantizer.noise = lambda *args, **kwargs: made.append(1) or noise(*args, **kwargs)
    model.train()(images(2, SHAPES["resnet18"]))
    assert len(made) == 1
    copy.deepcopy(model)  # nothing of the forward pass is left behind


def test_residual_sums_are_float_unless_asked_for():
    counts = {}
    for residual in ("float", "quantized"):
        model, table = network("resnet18")
        method = prepared(model, table, residual=residual)
        counts[residual] = len(quantizers(model))
        method.calibrate(model, images(2, SHAPES["resnet18"]))
        block = model.layer1[1]
        seen = []
        block.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        model.eval()(images(2, SHAPES["resnet18"]))
        distinct = seen[0].unique().numel()
        assert (distinct <= 256) == (residual == "quantized")
        assert set(method.points(model)[0].bits.values()) == {LayerBits(weight=8, activation=8)}
    assert counts == {"float": 21 + 17, "quantized": 21 + 17 + 11}


def test_calibration_starts_at_the_largest_magnitude_or_as_published_at_the_largest_value():
    x = torch.tensor([-3.0, 2.0])
    for magnitude, expected in ((True, 3.0), (False, 2.0)):
        quantizer = GatedQuantizer(signed=True)
        quantizer.calibrate(x, magnitude=magnitude)
        assert quantizer.clip_max.item() == expected
    quantizer.calibrate(torch.tensor([-3.0, -1.0]), magnitude=False)  # the published start would be zero, and then nan
    assert quantizer.clip_max.item() == 3.0


def test_calibration_leaves_the_statistics_of_batch_norm_alone_unless_published():
    for calibration, moved in (("batch", False), ("published", True)):
        model, table = network("vgg7", width=0.05)
        method = prepared(model, table, calibration=calibration)
        method.calibrate(model, images(4, (3, 32, 32)))
        assert bool(model.bn1.running_mean.abs().sum() > 0) == moved
        assert int(model.bn1.num_batches_tracked) == moved


def test_a_range_cannot_leave_the_positive_side():
    model, table = network("lenet5")
    method = prepared(model, table)
    method.calibrate(model, images(2, (1, 28, 28)))
    quantizer = model.conv2.input_quantizer
    start = quantizer.clip_max.item()
    quantizer.clip_max.data.fill_(-1.0)
    method.after_step(model)
    assert quantizer.clip_max.item() == pytest.approx(0.01 * start)


def test_deterministic_gates_draw_nothing():
    model, table = network("lenet5")
    prepared(model, table, gate_noise=False)
    quantizer = model.conv1.weight_quantizer.train()
    quantizer.gate_logits.data.fill_(0.3)
    assert torch.equal(quantizer.gates(), quantizer.gates())
