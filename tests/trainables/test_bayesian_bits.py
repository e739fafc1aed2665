"""Bayesian Bits: laws of its rounding and gates, what it does to a network, its settings, and real trainings."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from search_spaces.bayesian_bits import space
from trainables import modules, quantize
from trainables.build import build_model, layer_table
from trainables.config import merged, parse
from trainables.cost import INPUT_BITS, LayerBits, LayerTable, bops, relative_bops
from trainables.errors import ConfigError
from trainables.fit import Report, Session, fit
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.methods import _gated_norm as gated_norm
from trainables.methods._gated_rounding import LEVELS, gated_quantize
from trainables.methods._gates import (
    OFF_BELOW,
    OPEN_ABOVE,
    GatedQuantizer,
    hard_concrete,
    penalties,
    probability_open,
    quantizers,
)
from trainables.methods.bayesian_bits import MODES, Method

Network = tuple[nn.Module, LayerTable]

SHAPES = {"lenet5": (1, 28, 28), "vgg7": (3, 32, 32), "resnet18": (3, 64, 64), "mobilenet_v2": (3, 32, 32)}


def network(name: str, shape: tuple[int, int, int] | None = None, **fields: Any) -> Network:
    shape = shape or SHAPES[name]
    config = parse({"method": "float", "model": {"name": name, **fields}, "data": "digits"})
    model = build_model(config, 10, shape, seed=0)
    return model, trace(model, shape)


def prepared(model: nn.Module, table: LayerTable, **settings: Any) -> Method:
    method = Method(Method.Settings(**settings))
    method.prepare(model, table, {})
    return method


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Rounding

ranges = st.floats(0.1, 10)
signs = st.booleans()
gate_values = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))
gate_lists = st.lists(gate_values, min_size=4, max_size=4)


def values(seed: int, count: int = 200, spread: float = 6.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


seeds = st.integers(0, 1000)


def direct(x: Tensor, clip_max: float, bits: int, signed: bool) -> Tensor:
    """Rounding to `2^bits - 1` steps of the range, without residuals."""
    high = clip_max * (1 - 1e-7)
    step = clip_max * (2 if signed else 1) / (2**bits - 1)
    return (x.clamp(-high if signed else 0.0, high) / step).round() * step


def published(x: Tensor, clip_max: Tensor, gates: Tensor, signed: bool) -> Tensor:
    """Equation 6 as it stands, with straight-through rounding by autograd."""

    def rounded(v: Tensor) -> Tensor:
        return v + (v.round() - v).detach()

    high = clip_max * (1 - 1e-7)
    clipped = torch.minimum(torch.maximum(x, -high if signed else torch.zeros_like(high)), high)
    step = clip_max * ((2 if signed else 1) / 3)
    parts = [step * rounded(clipped / step)]
    for ratio in (5, 17, 257, 65537):
        step = step / ratio
        parts.append(step * rounded((clipped - sum(parts)) / step))
    total = parts[-1]
    for part, gate in zip(parts[-2::-1], gates.flip(0), strict=True):
        total = part + gate * total
    return total


@given(seed=seeds, clip_max=ranges, signed=signs, level=st.integers(0, 4))
def test_open_gates_up_to_a_level_are_plain_rounding_at_its_width(seed, clip_max, signed, level):
    x = values(seed)
    gates = torch.tensor([float(index < level) for index in range(4)], dtype=torch.float64)
    y = gated_quantize(x, torch.tensor(clip_max, dtype=torch.float64), gates, signed=signed)
    torch.testing.assert_close(y, direct(x, clip_max, LEVELS[level], signed), rtol=0, atol=1e-9)


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_values_and_gradients_are_those_of_the_gated_residuals(seed, clip_max, signed, gates):
    results = []
    for function in (published, lambda x, c, z, s: gated_quantize(x, c, z, signed=s)):
        x = values(seed).requires_grad_()
        c = torch.tensor(clip_max, dtype=torch.float64, requires_grad=True)
        z = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        y = function(x, c, z, signed)
        y.backward(values(seed + 1, spread=1.0))
        results.append((y.detach(), x.grad, c.grad, z.grad))
    (y, grad_x, grad_c, grad_z), ours = results
    free = torch.tensor([0 < gate < 1 for gate in gates])
    for computed, wanted in zip(ours, (y, grad_x, grad_c, torch.where(free, grad_z, 0.0)), strict=True):
        torch.testing.assert_close(computed, wanted, rtol=1e-7, atol=1e-7)


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_rounding_keeps_order_so_that_max_pooling_may_come_before_it(seed, clip_max, signed, gates):
    x = values(seed).sort().values
    y = gated_quantize(x, torch.tensor(clip_max), torch.tensor(gates), signed=signed)
    assert bool((y.diff() >= -1e-6).all())


@given(seed=seeds, clip_max=ranges, signed=signs, level=st.integers(0, 2))
def test_a_width_has_no_more_values_than_its_grid_and_signed_grids_are_symmetric(seed, clip_max, signed, level):
    bits = LEVELS[level]
    x = values(seed, 2000).float()
    gates = torch.tensor([float(index < level) for index in range(4)])
    y = gated_quantize(x, torch.tensor(clip_max), gates, signed=signed)
    codes = (y / (clip_max * (2 if signed else 1) / (2**bits - 1))).round()
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert codes.unique().numel() <= 2**bits - signed
    assert (float(codes.min()), float(codes.max())) == (-limit if signed else 0, limit)


@given(clip_max=st.floats(2**-10, 2**10, width=32), signed=signs, level=st.integers(0, 3))
def test_the_largest_value_never_rounds_out_of_the_grid_in_single_precision(clip_max, signed, level):
    bits = LEVELS[level]
    gates = torch.tensor([float(index < level) for index in range(4)])
    y = float(gated_quantize(torch.tensor([2 * clip_max]), torch.tensor(clip_max), gates, signed=signed))
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert round(y / (clip_max * (2 if signed else 1) / (2**bits - 1))) == limit


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_quantizing_twice_changes_nothing_once_gates_are_open_or_closed(seed, clip_max, signed, gates):
    z, c = torch.tensor(gates, dtype=torch.float64).round(), torch.tensor(clip_max, dtype=torch.float64)
    once = gated_quantize(values(seed), c, z, signed=signed)
    torch.testing.assert_close(gated_quantize(once, c, z, signed=signed), once, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gates", [[1, 1, 0, 0], [1, 1, 1, 1], [0.3, 1, 0.6, 0], [0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1]])
def test_compiled_and_eager_kernels_agree_in_every_layout(gates):
    x = (values(3, 120).view(2, 3, 4, 5).float() * 0.5).contiguous(memory_format=torch.channels_last)
    g = values(4, 120, 1.0).view(2, 3, 4, 5).float()
    found = []
    for compiled in (False, True):
        quantize.use_compiled(compiled)
        leaf, clip_max = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
        z = torch.tensor(gates, dtype=torch.float32, requires_grad=True)
        y = gated_quantize(leaf, clip_max, z, signed=True)
        y.backward(g)
        assert y.stride() == x.stride()
        found.append((y.detach(), leaf.grad, clip_max.grad, z.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Gates and their penalty

logits = st.floats(-8, 8)


@given(logit=logits)
def test_the_gate_of_tests_is_open_when_it_is_zero_with_a_probability_below_a_third(logit):
    closed = 1 - float(probability_open(torch.tensor(logit, dtype=torch.float64)))
    assert (logit > OPEN_ABOVE) == (closed < 0.34) or closed == pytest.approx(0.34, abs=1e-12)


@given(logit=st.floats(-3, 3))
def test_as_many_drawn_gates_are_zero_as_the_probability_says(logit):
    drawn = hard_concrete(torch.full((4000,), logit), torch.rand(4000, generator=torch.Generator().manual_seed(1)))
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    open_share = float((drawn > 0).float().mean())
    assert open_share == pytest.approx(float(probability_open(torch.tensor(logit))), abs=0.04)


@given(initial=st.lists(logits, min_size=4, max_size=4))
def test_the_width_doubles_with_each_open_gate_up_to_the_first_closed_one(initial):
    quantizer = GatedQuantizer(signed=True, gate_init=initial)
    expected = 2
    for logit in initial:
        if logit <= OPEN_ABOVE:
            break
        expected *= 2
    assert quantizer.bits == expected
    assert float(quantizer.q_max) == pytest.approx(2 ** (expected - 1) - 1)


@given(initial=st.lists(st.floats(-4, 4), min_size=4, max_size=4))
def test_a_level_below_the_cut_off_closes_itself_and_all_above_in_training_too(initial):
    quantizer = GatedQuantizer(signed=True, gate_init=initial).train()
    gates = quantizer.gates()
    off = next((index for index, logit in enumerate(initial) if logit <= OFF_BELOW), 4)
    assert bool((gates[off:] == 0).all())


@given(initial=st.lists(st.floats(-1.9, 4), min_size=4, max_size=4), share=st.floats(0.01, 1))
def test_the_penalty_is_the_expected_cost_of_the_open_levels(initial, share):
    quantizer = GatedQuantizer(signed=True, gate_init=initial, channels=5, macs_share=share).double()
    q = probability_open(quantizer.gate_logits.detach()).tolist()
    keep = float(probability_open(quantizer.pruning_logits.detach()).mean())
    reached = [keep * math.prod(q[:count]) for count in range(5)]
    expected = share * sum(level * chance for level, chance in zip(LEVELS, reached, strict=True))
    assert penalties([quantizer]).item() == pytest.approx(expected, rel=1e-6)


@given(initial=st.lists(logits, min_size=4, max_size=4), level=st.integers(0, 3), raised=st.floats(0.1, 3))
def test_the_penalty_grows_with_every_logit(initial, level, raised):
    higher = [logit + raised * (index == level) for index, logit in enumerate(initial)]
    both = [GatedQuantizer(signed=True, gate_init=logits, macs_share=0.5) for logits in (initial, higher)]
    low, high = (penalties([quantizer]).item() for quantizer in both)
    assert high >= low


def test_a_fixed_width_has_no_other_and_a_learned_one_takes_the_levels():
    with pytest.raises(ValueError, match=r"bits = 3: this quantizer takes 2, 4, 8, 16, 32"):
        GatedQuantizer(signed=True).set_bits(3)
    with pytest.raises(ValueError, match=r"bits = 4: this quantizer takes 8"):
        GatedQuantizer(signed=True, bits=8).set_bits(4)


@pytest.mark.parametrize("bits", LEVELS)
def test_set_bits_opens_the_gates_to_a_width(bits):
    quantizer = GatedQuantizer(signed=False)
    quantizer.set_bits(bits)
    assert quantizer.bits == bits
    assert float(quantizer.q_max) == pytest.approx(2**bits - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm behind gates


def normed(kind: str, gate_logit: float) -> tuple[nn.Sequential, nn.Sequential]:
    """The same convolution and batch norm twice: as they are, and with gates that are all alike; unquantized."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
    plain[1].weight.data.uniform_(0.5, 1.5)
    plain[1].bias.data.uniform_(-1, 1)
    other = copy.deepcopy(plain)
    quantizer = GatedQuantizer(signed=True, channels=6, bits=32, prunes=kind == "folded")
    quantizer.pruning_logits.data.fill_(gate_logit)
    quantizer.frozen = True  # gates as in tests, statistics as in training
    if kind == "folded":
        return plain, nn.Sequential(*gated_norm.folded(other[0], other[1], quantizer, None))
    layer = modules.QuantizedConv2d(other[0], quantizer, None)
    return plain, nn.Sequential(layer, gated_norm.GatedNorm.behind(layer, other[1]))


@pytest.mark.parametrize("kind", ["gated", "folded"])
@pytest.mark.parametrize("training", [True, False])
def test_with_open_gates_and_no_rounding_both_norms_are_batch_norm(kind, training):
    plain, gated = normed(kind, 6.0)
    for seed in range(3):
        plain.train(), gated.train()
        plain(images(4, (3, 8, 8), seed)), gated(images(4, (3, 8, 8), seed))
    x = images(4, (3, 8, 8), 9)
    torch.testing.assert_close(gated.train(training)(x), plain.train(training)(x), rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(gated[1], name), getattr(plain[1], name))


@pytest.mark.parametrize("kind", ["gated", "folded"])
def test_a_pruned_channel_is_constant_and_its_statistics_go_on(kind):
    plain, gated = normed(kind, -6.0)
    x = images(4, (3, 8, 8))
    y = gated.train()(x)
    plain.train()(x)
    assert float(y.detach().std(dim=(0, 2, 3)).max()) < 1e-6
    torch.testing.assert_close(gated[1].running_var, plain[1].running_var)
    if kind == "gated":
        torch.testing.assert_close(y.mean(dim=(0, 2, 3)), gated[1].bias)


def test_gates_behind_the_norm_feel_the_loss_and_gates_before_it_would_not():
    torch.manual_seed(0)
    model, table = network("vgg7", width=0.05)
    method = prepared(model, table, penalty_strength=0.0)
    method.calibrate(model, images(4, (3, 32, 32)))
    quantizer = model.conv2.weight_quantizer
    quantizer.pruning_logits.data.zero_()  # gates between 0 and 1
    (loss,) = method.losses(model.train(), images(8, (3, 32, 32)), torch.arange(8))
    loss.backward()
    assert quantizer.pruning_logits.grad.abs().max() > 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Networks


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


def close_half(model: nn.Module, layer: str) -> None:
    logits = model.get_submodule(layer).weight_quantizer.pruning_logits
    logits.data[: len(logits) // 2] = -6.0


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


# ---------------------------------------------------------------------------------------------------------------------
# Phases


@pytest.mark.parametrize("batch_norm", ["gated", "folded"])
def test_freezing_keeps_the_network_of_tests_and_trains_no_gate(batch_norm):
    torch.manual_seed(0)
    model, table = network("vgg7", width=0.05)
    method = prepared(model, table, batch_norm=batch_norm)
    x = images(4, (3, 32, 32))
    method.calibrate(model, x)
    model.train()(x)
    close_half(model, "conv3")
    before = model.eval()(x)
    bits = method.points(model)[0].bits
    method.freeze(model)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-3, atol=1e-4)
    assert method.points(model)[0].bits == bits
    trained = {id(p) for group in method.groups(model) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(q.gate_logits.requires_grad for q in quantizers(model))
    losses = [list(method.losses(model.train(), x, torch.arange(4))) for _ in range(2)]
    if batch_norm == "gated":
        assert losses[0][0].item() == losses[1][0].item()  # no noise, no penalty


def test_three_groups_have_their_own_optimizers_and_rates():
    model, table = network("lenet5")
    method = prepared(model, table, gate_lr=0.5, scale_lr=0.25, gate_optimizer="sgd", schedule="cosine")
    weights, gates, scales = method.groups(model)
    assert "lr" not in weights
    assert (gates["lr"], gates["optimizer"], gates["schedule"], gates["weight_decay"]) == (0.5, "sgd", "cosine", 0.0)
    assert (scales["lr"], scales["optimizer"]) == (0.25, "adam")
    sizes = [sum(p.numel() for p in group["params"]) for group in (gates, scales)]
    assert sizes == [7 * 4 + 32 + 64 + 512, 7]


def configured(**settings: Any) -> Any:
    tree = {"method": {"name": "bayesian_bits", **settings.pop("method", {})}, "model": "lenet5", "data": "digits"}
    return parse(merged(tree, settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method/gate_init/64": 6.0}, "no gate for 64 bits: the levels with a gate are 4, 8, 16, 32"),
        ({"method/gate_init/8": "open"}, "method/gate_init/8 = 'open'"),
        ({"method/gate_init": 6.0}, "method/gate_init = 6.0"),
        (
            {"method/penalty_strength": -0.1},
            "method/penalty_strength = -0.1: input should be greater than or equal to 0",
        ),
        ({"method/gate_lr": 0.0}, "method/gate_lr = 0.0: input should be greater than 0"),
        ({"method/mode": "w4a4"}, "method/mode = 'w4a4'"),
        ({"method/mu": 0.1}, "unknown address 'method/mu'"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_error(settings, message):
    with pytest.raises(ConfigError) as caught:
        configured(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method/mode": "w8a8", "method/gate_init/8": 3.0},
            "method/gate_init/8 = 3: mode 'w8a8' has no gate for 8 bits; leave it out, or use mode 'full' or "
            "'quantize'",
        ),
        (
            {"method/gate_init/32": 6.0},
            "method/gate_init/32 = 6: it never opens, because level 16 is off at -6 (<= -2); raise "
            "method/gate_init/16, or lower this one",
        ),
        ({"method/batch_norm": "folded"}, "method/batch_norm = 'folded': the network has no batch norm; leave it out"),
        ({"bits/conv1/weight": 4}, "bits/conv1/weight: method 'bayesian_bits' learns its weight bits; leave it out"),
    ],
)
def test_settings_that_do_not_fit_together_are_one_clear_error(settings, message):
    config = configured(**settings)
    with pytest.raises(ConfigError) as caught:
        resolve_bits(config, layer_table(config))
    assert str(caught.value) == message


def test_quantized_sums_in_a_network_without_sums_are_an_error():
    model, table = network("lenet5")
    with pytest.raises(ConfigError, match="method/residual = 'quantized': the network has no residual sums"):
        prepared(model, table, residual="quantized")


def test_given_gate_inits_are_merged_with_the_others():
    config = configured(**{"method/gate_init/4": 1.5})
    assert config.method.settings["gate_init"] == {"4": 1.5, "8": 6.0, "16": -6.0, "32": -6.0}
    model, table = network("lenet5")
    prepared(model, table, gate_init={"4": 1.5})
    assert model.conv1.weight_quantizer.gate_logits.tolist() == [1.5, 6.0, -6.0, -6.0]


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_the_search_space_are_valid_settings(end):
    config = configured(**{address: getattr(asked, end) for address, asked in space([]).items()})
    assert set(resolve_bits(config, layer_table(config)).values()) == {
        LayerBits(weight=32, activation=INPUT_BITS),
        LayerBits(weight=32, activation=32),
    }


SHORT = {
    "method/gate_lr": 0.1,
    "method/gate_init/4": 1.0,
    "method/gate_init/8": 1.0,
    "method/penalty_strength": 0.05,
    "optimizer/name": "adam",
    "optimizer/lr": 0.003,
    "training/epochs": 4,
    "training/finetune_epochs": 1,
}


def reports(folder: Path | None = None, upto: int = 4, **more: Any) -> list[Report]:
    found = []
    for report in fit(configured(**SHORT | more), folder=folder):
        found.append(report)
        if report.epoch == upto:
            break
    return found


def told(report: Report) -> tuple[Any, ...]:
    (point,) = report.points
    return report.epoch, report.train_loss, point.accuracy, point.bops, point.size_bytes, point.bits


def test_a_short_training_learns_digits_and_narrower_widths():
    *_, last = reports()
    (point,) = last.points
    assert point.accuracy > 0.5
    assert point.relative_bops < 0.03
    assert {width for widths in point.bits.values() for width in widths} - {0, 2, 4, 8} == set()


def test_a_stronger_penalty_costs_fewer_bit_operations():
    weak, strong = (reports(**{"method/penalty_strength": mu})[-1].points[0] for mu in (1e-4, 1.0))
    assert strong.bops < weak.bops


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_trial_is_the_uninterrupted_one_also_across_freezing(stop, tmp_path):
    whole = [told(report) for report in reports()]
    first = [told(report) for report in reports(tmp_path, upto=stop)]
    again, *rest = [told(report) for report in reports(tmp_path)]
    assert [*first, *rest] == whole
    assert again == first[-1]


def test_equal_states_have_equal_points():
    config = configured(**SHORT)
    trained, fresh = Session(config), Session(config)
    for quantizer in quantizers(trained.model):
        quantizer.set_bits(4)
    close_half(trained.model, "conv2")
    fresh.model.load_state_dict(trained.model.state_dict())
    one, other = (session.method.points(session.model)[0] for session in (trained, fresh))
    assert (one.bits, one.output_share, one.input_share) == (other.bits, other.output_share, other.input_share)
