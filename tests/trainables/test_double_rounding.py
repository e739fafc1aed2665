"""Double Rounding: laws of its codes and gradients, switching, the stored form, training, the supernet, bad input."""

import copy
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables import modules
from trainables.build import build_model, layer_table
from trainables.config import TrialConfig, parse
from trainables.cost import LayerBits, LayerTable
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.methods import _stored_codes as stored_codes
from trainables.methods._adaptive_rates import ShortenedStep
from trainables.methods._bit_switching import draw_widths, roulette, switch_probabilities
from trainables.methods._double_round import double_round, high_codes, lower_codes, round_once
from trainables.methods._switched_norm import SwitchedNorm, record_order, switch_norms, switched_norms
from trainables.methods._switched_quantizers import CodedWeight, ScaledInput, epochs_done, quantizers
from trainables.methods.double_rounding import Method

WIDTHS = (8, 6, 4, 2)
RESNET = {"name": "resnet20", "depth": 8, "width": 4}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values)


# ---------------------------------------------------------------------------------------------------------------------
# Codes


@given(code=st.integers(-128, 127), low=st.integers(2, 8))
def test_a_low_code_is_the_high_code_over_a_power_of_two_rounded_half_to_even(code, low):
    ratio, top = 2 ** (8 - low), 2 ** (low - 1)
    assert int(lower_codes(torch.tensor(code), 8, low)) == np.clip(np.rint(code / ratio), -top, top - 1)


@given(code=st.integers(0, 255), low=st.integers(1, 8))
def test_unsigned_codes_are_rounded_alike(code, low):
    wanted = np.clip(np.rint(code / 2 ** (8 - low)), 0, 2**low - 1)
    assert int(lower_codes(torch.tensor(code), 8, low, signed=False)) == wanted


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Weights around and beyond the range of a scale, many exactly on ties, the scale or scales, the highest width."""
    high, channels, per_channel = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ratios = rng.choice([rng.normal(size=(channels, 9)) * 2**high / 4, rng.integers(-300, 300, (channels, 9)) / 2])
    scale = rng.uniform(1e-4, 2, (channels, 1) if per_channel else ())
    w = torch.tensor(ratios * scale, dtype=torch.float32)
    return w, torch.tensor(scale, dtype=torch.float32), high


def bits_of(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@settings(max_examples=60)
@given(case=weights())
def test_stored_codes_give_the_weights_of_training_bit_for_bit_at_every_width(case):
    w, scale, high = case
    kept = {
        "w.codes": high_codes(w, scale, high),
        "w.weight_quantizer.scale": scale.flatten() if scale.dim() else scale,
    }
    for low in range(2, high + 1):
        top = 2.0 ** (low - 1)
        live = double_round(
            w, scale, tensor(2.0 ** (high - low))[0], tensor(-top)[0], tensor(top - 1)[0], tensor(1.0)[0]
        )
        again = stored_codes.switched(kept, {"w": high}, {"w": low})["w"]
        assert torch.equal(bits_of(live), bits_of(again))


@pytest.mark.parametrize("scale", [torch.tensor(0.013), torch.tensor([0.013, 0.02, 0.5]).view(3, 1, 1, 1)])
def test_compiled_and_eager_kernels_agree_with_the_plain_formula_in_any_layout(kernels, scale):
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        w = (torch.randn(3, 4, 3, 3) * 0.5).contiguous(memory_format=layout).requires_grad_()
        g, s = torch.randn(3, 4, 3, 3), scale.clone().requires_grad_()
        ratio, low, top, factor = (torch.tensor(v) for v in (16.0, -8.0, 7.0, 0.25))
        y = double_round(w, s, ratio, low, top, factor)
        y.backward(g)
        kept = {"w.codes": high_codes(w, s, 8), "w.weight_quantizer.scale": scale.flatten() if scale.dim() else scale}
        assert torch.equal(bits_of(y), bits_of(stored_codes.switched(kept, {"w": 8}, {"w": 4})["w"]))
        with torch.no_grad():
            r = w / (s * ratio)
            inside = (r >= low) & (r <= top)
            jacobian = torch.where(inside, r.round() - r, r.clamp(low, top))
            wanted = (g * jacobian).sum(dim=(1, 2, 3), keepdim=True) if s.dim() else (g * jacobian).sum()
        torch.testing.assert_close(w.grad, torch.where(inside, g, 0.0))
        torch.testing.assert_close(s.grad, wanted * factor)


def test_compiled_and_eager_activations_agree(kernels):
    x = torch.tensor([-1.0, 0.0, 0.26, 1.5, 9.0]).requires_grad_()
    scale = torch.tensor(0.5).requires_grad_()
    y = round_once(x, scale, torch.tensor(0.0), torch.tensor(3.0), torch.tensor(1.0))
    y.backward(torch.ones(5))
    assert y.tolist() == [0.0, 0.0, 0.5, 1.5, 1.5]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]  # both edges inside
    assert float(scale.grad) == pytest.approx(0 + 0 + (1 - 0.52) + 0 + 3)


@settings(max_examples=30)
@given(case=weights())
def test_the_exact_gradient_is_the_slope_of_the_output_by_the_scale_with_rounding_errors_held(case):
    w, scale, high = case
    low = max(2, high - 2)
    ratio, top = torch.tensor(2.0 ** (high - low)).double(), torch.tensor(2.0 ** (low - 1)).double()
    s = scale.double().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    y = double_round(w.double(), s, ratio, -top, top - 1, one, chain=True)
    (found,) = torch.autograd.grad(y.sum(), s)
    s2 = scale.double().requires_grad_()
    r = w.double() / (s2 * ratio)
    held = (y.detach() / (s2 * ratio).detach()) - r.detach()
    inside = (r > -top) & (r < top - 1)
    surrogate = torch.where(inside, r + held, r.detach().clamp(-top, top - 1)) * s2 * ratio
    (wanted,) = torch.autograd.grad(surrogate.sum(), s2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_activations_refuse_a_width_without_a_scale():
    reads = ScaledInput((8, 4), signed=False)
    with pytest.raises(ValueError, match="bits = 6: activations are trained at 8, 4"):
        reads.set_bits(6)


def test_signed_activations_start_at_the_larger_end():
    reads = ScaledInput((4,), signed=True)
    reads.calibrate(torch.linspace(-7.0, 3.5, 2001))
    assert float(reads.scale) == pytest.approx(7 / 7, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Batch norms


class Block(nn.Module):
    """A stem, two layers beside a shortcut, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.short, self.short_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)  # defined first, run last
        self.a, self.a_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.b, self.b_norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        y = self.b_norm(self.b(self.a_norm(self.a(x)).relu()))
        return self.head((y + self.short_norm(self.short(x))).relu().mean(dim=(2, 3)))


def test_each_norm_knows_the_layers_around_it_and_a_shortcut_stands_beside_the_first_layer():
    model = Block()
    switch_norms(model, WIDTHS, pairs=True)
    order = record_order(model, [model.short, model.a, model.b], torch.randn(2, 1, 4, 4))
    assert order == [(2, 0), (0, 0), (1, 1)]
    found = {name: module.order.tolist() for name, module in model.named_modules() if isinstance(module, SwitchedNorm)}
    assert found == {"stem_norm": [-1, -1], "a_norm": [-1, 0], "b_norm": [0, 1], "short_norm": [-1, 2]}


@pytest.mark.parametrize(("pairs", "count"), [(False, 4), (True, 16)])
def test_the_state_of_a_plain_norm_loads_into_every_set(pairs, count):
    plain = nn.BatchNorm2d(3)
    plain.weight.data.uniform_()
    plain.running_mean.uniform_()
    norm = SwitchedNorm(nn.BatchNorm2d(3), WIDTHS, pairs=pairs)
    norm.load_state_dict(plain.state_dict())
    assert len(norm.sets) == count
    for each in norm.sets.values():
        assert torch.equal(each.weight, plain.weight)
        assert torch.equal(each.running_mean, plain.running_mean)


def test_transitions_start_from_the_set_of_the_width_that_they_lead_to():
    norm = SwitchedNorm(nn.BatchNorm2d(1), (8, 2), pairs=True)
    for value, name in enumerate(norm.sets):
        norm.sets[name].weight.data.fill_(value)
    norm.spread((8, 2))
    weights_by_key = {name: float(each.weight) for name, each in norm.sets.items()}
    assert weights_by_key == {"8_8": 0.0, "8_2": 3.0, "2_8": 0.0, "2_2": 3.0}


# ---------------------------------------------------------------------------------------------------------------------
# Rates and draws


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_shortened_step_is_that_of_a_lower_learning_rate(kind):
    found = []
    for lr, rate in ((0.1, 0.25), (0.025, 1.0)):
        scale = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = kind([scale], lr=lr)
        for gradient in ([0.3, -4.0], [1.0, 0.5]):
            step = ShortenedStep([[scale]], clipped=False)
            scale.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.step()
            step.finish(lambda mean, rate=rate: [rate])
        found.append(scale.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("clipped", "gradient", "mean"), [(True, 1.0, 1.0), (False, 5.0, 0.0)])
def test_a_step_that_is_measured_clips_gradients(clipped, gradient, mean):
    scale = nn.Parameter(torch.tensor(1.0))
    step = ShortenedStep([[scale]], clipped=clipped)
    (5 * scale).backward()
    step.clip()
    assert float(scale.grad) == gradient
    seen = []
    step.finish(lambda mean: seen.append(mean) or [1.0])
    assert seen == [mean]


def test_the_roulette_returns_the_ends_for_the_ends():
    chances = switch_probabilities(torch.tensor([True, False]), [2, 4, 6, 8])
    assert roulette(chances, torch.tensor([0.0, 0.0])).tolist() == [0, 0]
    assert roulette(chances * (1 - 1e-9), torch.tensor([1.0, 1.0])).tolist() == [3, 3]


def test_draws_follow_their_probabilities_and_the_seed():
    chances = switch_probabilities(torch.tensor([True] * 4000), [2, 6])
    torch.manual_seed(1)
    drawn = draw_widths(chances, [2, 6], outer=2, rate=0.5)
    torch.manual_seed(1)
    assert drawn == draw_widths(chances, [2, 6], outer=2, rate=0.5)
    assert drawn.count(6) / 4000 == pytest.approx(0.5 * 0.75, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def config(model: Any = "lenet5", epochs: int = 2, **method: Any) -> TrialConfig:
    return parse(
        {
            "method": {"name": "double_rounding", **method},
            "model": model,
            "data": "digits",
            "training": {"epochs": epochs, "batch_size": 128},
            "optimizer": {"lr": 0.05},
        }
    )


def prepared(
    model: Any = RESNET, shape: tuple[int, int, int] = (1, 8, 8), **given: Any
) -> tuple[Method, nn.Module, LayerTable]:
    chosen = config(model, **given)
    net = build_model(chosen, 10, shape, seed=0)
    table = trace(net, shape)
    method = Method(Method.Settings(**chosen.method.settings), epochs=2)
    method.prepare(net, table, resolve_bits(chosen, table))
    method.calibrate(net, torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)))
    return method, net.eval(), table


def test_every_width_is_a_point_and_the_ends_keep_eight_bits():
    method, model, table = prepared()
    points = method.points(model)
    assert [point.label for point in points] == ["8-bit", "6-bit", "4-bit", "2-bit"]
    inner = [row.name for row in table.quantizable if not (row.first or row.last)]
    for point, width in zip(points, WIDTHS, strict=True):
        assert {point.bits[name] for name in inner} == {LayerBits(weight=width, activation=width)}
        assert point.bits["conv1"] == point.bits["fc"] == LayerBits(weight=8, activation=8)
        assert point.extra_floats == 2 * len(point.bits) - 1  # the network's input needs no scale
    outputs = []
    for point in points:
        point.activate()
        outputs.append(model(torch.ones(1, 1, 8, 8)))
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 4


def test_ends_can_stay_float_as_published():
    method, model, table = prepared(ends_bits=32)
    assert type(model.conv1) is nn.Conv2d
    assert "conv1" not in method.points(model)[0].bits
    assert len(method.points(model)[0].bits) == len(table.quantizable) - 2


def test_activating_points_leaves_no_trace_in_the_state():
    method, model, _ = prepared()
    before = copy.deepcopy(model.state_dict())
    for point in method.points(model):
        point.activate()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_step_at_one_width_moves_only_what_that_width_uses():
    method, model, _ = prepared()
    model.train()
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    losses = method.losses(model, images, labels)
    next(losses).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name in touched if "_quantizer.scale_" in name} == {
        f"{name}.input_quantizer.scale_8" for name, _, inputs in quantizers(model) if inputs is not None
    }
    assert all(name.split(".sets.")[1].startswith("8.") for name in touched if ".sets." in name)
    losses.close()


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"widths": "4,3,2", "ends_bits": 4}, {"init": "lsq"}])
def test_a_stored_network_switches_to_the_same_outputs_and_holds_no_float_weights(options, tmp_path):
    method, model, _ = prepared(**options)
    images = torch.randn(3, 1, 8, 8)
    stored_codes.save(tmp_path / "net", model)
    tensors, highest = stored_codes.load(tmp_path / "net")
    assert not [name for name, _, _ in quantizers(model) if f"{name}.weight" in tensors]
    assert {tensors[f"{name}.codes"].dtype for name in highest} == {torch.int8}
    again_method, again, _ = prepared(**options)
    for parameter in again.parameters():
        parameter.data.fill_(0.5)
    stored_codes.restore(again, tensors)
    for point, other in zip(method.points(model), again_method.points(again), strict=True):
        point.activate()
        other.activate()
        assert torch.equal(model(images), again(images))
        widths = {name: bits.weight for name, bits in point.bits.items()}
        for name, weight in stored_codes.switched(tensors, highest, widths).items():
            layer: Any = model.get_submodule(name)
            assert torch.equal(bits_of(layer.weight_quantizer(layer.weight).detach()), bits_of(weight))


def test_a_stored_network_is_read_and_switched_by_a_fresh_process(tmp_path):
    _, model, _ = prepared()
    stored_codes.save(tmp_path / "net", model)
    layer: Any = model.get_submodule("layer1.0.conv1")
    layer.weight_quantizer.set_bits(4)
    code = (
        "import json, sys; from pathlib import Path; from trainables.methods import _stored_codes as stored_codes\n"
        "tensors, highest = stored_codes.load(Path(sys.argv[1]))\n"
        "weight = stored_codes.switched(tensors, highest, {'layer1.0.conv1': 4})['layer1.0.conv1']\n"
        "print(json.dumps(weight.flatten().tolist()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "net")], capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout) == layer.weight_quantizer(layer.weight).flatten().tolist()


def test_stored_networks_of_other_kinds_are_refused(tmp_path):
    from trainables import checkpoint

    _, model, _ = prepared()
    checkpoint.save(tmp_path / "other", model)
    with pytest.raises(ConfigError, match="holds no Double Rounding codes"):
        stored_codes.load(tmp_path / "other")
    tensors = stored_codes.store(model)
    _, other, _ = prepared({**RESNET, "width": 8})
    with pytest.raises(ConfigError, match="another one than was prepared"):
        stored_codes.restore(other, tensors)
    _, lenet, _ = prepared("lenet5")
    with pytest.raises(ConfigError, match="lacks the codes of"):
        stored_codes.restore(lenet, tensors)
    with pytest.raises(ConfigError, match=r"codes have 8 bits; give 2\.\.8"):
        stored_codes.switched(tensors, stored_codes.highest_widths(model), {"fc": 9})
    with pytest.raises(ConfigError, match="'nowhere' has no stored codes"):
        stored_codes.switched(tensors, stored_codes.highest_widths(model), {"nowhere": 4})


# ---------------------------------------------------------------------------------------------------------------------
# Supernets


def test_a_supernet_takes_any_mixture_of_its_widths_and_its_norms_follow():
    method, model, _ = prepared(precision="mixed")
    bits = dict(method.points(model)[0].bits)
    bits["layer1.0.conv1"] = LayerBits(weight=4, activation=6)
    bits["layer1.0.conv2"] = LayerBits(weight=2, activation=2)
    method.switch(model, bits)
    used = {name: module.used for name, module in model.named_modules() if isinstance(module, SwitchedNorm)}
    assert used["bn1"] == "4_4"  # before the first switched layer, by its width
    assert used["layer1.0.bn1"] == "4_4"
    assert used["layer1.0.bn2"] == "4_2"
    assert used["layer2.0.bn1"] == "2_8"
    assert model.get_submodule("layer1.0.conv1").input_quantizer.bits == 6


@pytest.mark.parametrize(
    ("layer", "width", "message"),
    [
        (
            "layer1.0.conv1",
            LayerBits(weight=3, activation=8),
            r"layer1.0.conv1/weight = 3: the network is trained at 8, 6",
        ),
        (
            "layer1.0.conv1",
            LayerBits(weight=8, activation=5),
            r"layer1.0.conv1/activation = 5: the network is trained at",
        ),
        ("fc", LayerBits(weight=4, activation=8), r"fc/weight = 4: the network is trained at 8;"),
        ("nowhere", LayerBits(weight=4, activation=4), r"bits of \['nowhere'\] are missing or of no quantized layer"),
    ],
)
def test_a_supernet_refuses_what_it_was_not_trained_at_and_stays_as_it_was(layer, width, message):
    method, model, _ = prepared(precision="mixed")
    method.switch(model, 6)
    with pytest.raises(ConfigError, match=message):
        method.switch(model, {**method.points(model)[0].bits, layer: width})
    assert model.get_submodule("layer1.0.conv1").weight_quantizer.bits == 6


def test_an_untrained_width_for_all_layers_is_refused():
    method, model, _ = prepared()
    with pytest.raises(ConfigError, match="= 5: the network is trained at 8, 6, 4, 2"):
        method.switch(model, 5)


def test_layers_draw_widths_once_switching_begins_and_a_shortcut_goes_with_its_block():
    method, model, _ = prepared(precision="mixed", probes=3, warmup=0.0, switch_rate=1.0)
    model.train()
    method.after_epoch(model, 1)  # the last epoch has the full rate
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    seen = set()
    torch.manual_seed(0)
    for loss in method.losses(model, images, labels):
        widths = {name: weights.bits for name, weights, _ in quantizers(model)}
        assert widths["layer2.0.downsample.0"] == widths["layer2.0.conv1"]
        assert widths["conv1"] == widths["fc"] == 8
        seen |= set(widths.values())
        loss.backward()
        method.after_step(model)
    assert len(seen) > 2
    assert all(bool(weights.trace.isfinite()) for _, weights, _ in quantizers(model) if not weights.is_end)


def test_given_traces_are_taken_and_decide_who_draws_high_widths():
    names = [row.name for row in layer_table(config(RESNET)).quantizable if not (row.first or row.last)]
    traces = {name: float(i) for i, name in enumerate(names)}
    _, model, _ = prepared(precision="mixed", traces=traces)
    assert {name: float(w.trace) for name, w, _ in quantizers(model) if not w.is_end} == traces


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_a_short_training_gives_a_good_point_for_every_width():
    *_, last = fit(config(epochs=4))
    assert [point.label for point in last.points] == ["8-bit", "6-bit", "4-bit", "2-bit"]
    assert all(point.accuracy > 0.8 for point in last.points)
    assert [point.bops for point in last.points] == sorted([point.bops for point in last.points], reverse=True)
    assert [point.size_bytes for point in last.points] == sorted([p.size_bytes for p in last.points], reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"distill": 0.7, "alrs": "scaled"},
        {"precision": "mixed", "warmup": 0.34, "probes": 3, "widths": "8,4"},
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one(options, tmp_path):
    chosen = config(RESNET, epochs=3, **options)
    straight = [report.points for report in fit(chosen)]
    interrupted = fit(chosen, folder=tmp_path)
    next(interrupted)
    next(interrupted)
    interrupted.close()
    resumed = [report.points for report in fit(chosen, folder=tmp_path)]
    assert resumed == straight[1:]


def test_distillation_changes_the_losses_of_lower_widths_alone():
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    found = []
    for weight in (0.0, 0.9):
        method, model, _ = prepared("lenet5", distill=weight)
        method.after_epoch(model, 1)
        found.append([float(loss.detach()) for loss in method.losses(model, images, labels)])
    assert found[0][0] == found[1][0]
    assert all(a != b for a, b in zip(found[0][1:], found[1][1:], strict=True))


def test_epochs_are_counted_in_the_state():
    method, model, _ = prepared()
    method.after_epoch(model, 7)
    _, other, _ = prepared()
    other.load_state_dict(model.state_dict())
    assert (epochs_done(other), epochs_done(nn.Linear(1, 1))) == (7, 0)


def test_after_the_warm_up_of_a_supernet_its_transitions_start():
    method, model, _ = prepared(precision="mixed", warmup=0.5)
    norm = switched_norms(model)[0]
    norm.sets["4_4"].weight.data.fill_(3.0)
    method.after_epoch(model, 1)
    assert float(norm.sets["8_4"].weight.mean()) == 3.0
    norm.sets["4_4"].weight.data.fill_(5.0)
    method.after_epoch(model, 2)
    assert float(norm.sets["8_4"].weight.mean()) == 3.0


def test_scales_stay_above_their_floors():
    method, model, _ = prepared()
    for _, weights, inputs in quantizers(model):
        weights.scale.data.fill_(-1.0)
        if inputs is not None:
            inputs.get_parameter("scale_8").data.fill_(-1.0)
    method.after_step(model)
    found = [scale for _, w, inputs in quantizers(model) for q in (w, inputs) if q is not None for scale in q.scales]
    assert all(float(scale) > 0 for scale in found)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": "4,8"}, r"method/widths = '4,8': give widths from 8 to 2, each once, from high to low"),
        ({"widths": [8, 8]}, r"method/widths = '8,8'"),
        ({"widths": "8,one"}, r"method/widths = '8,one'"),
        ({"widths": [9, 1]}, r"method/widths = '9,1'"),
        ({"ends_bits": 16}, r"method/ends_bits = 16: give 2..8, or 32"),
        ({"as_published": True}, r"method/as_published = True: it has no effect without method/per_channel"),
        ({"traces": {"conv2": 1.0}}, r"method/traces: they have no effect unless"),
        ({"precision": "mixed", "traces": {"x": 1.0}}, r"method/traces are of another network: they lack conv2, fc1"),
    ],
)
def test_settings_that_cannot_be_used_are_named(options, message):
    chosen = config(**options)
    with pytest.raises(ConfigError, match=message):
        resolve_bits(chosen, layer_table(chosen))


def test_bits_cannot_be_given():
    chosen = parse({**config().tree(), "bits": {"conv2": {"weight": 4}}})
    with pytest.raises(ConfigError, match="bits/conv2"):
        resolve_bits(chosen, layer_table(chosen))


def test_widths_are_text_or_a_list():
    assert config(widths=[8, 4]).method.settings["widths"] == config(widths="8,4").method.settings["widths"] == "8,4"


def test_weights_of_one_column_start_at_a_scale_above_zero():
    quantizer = CodedWeight((4, 2), scales=3)
    quantizer.calibrate(torch.tensor([[1.0], [0.0], [-2.0]]))
    assert bool((quantizer.scale > 0).all())
    layer = modules.QuantizedLinear(nn.Linear(1, 3), quantizer, None)
    assert bool(layer(torch.ones(2, 1)).isfinite().all())
