"""Double Rounding, the method: a point for each width, stored networks, trainings, bad input."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainables.switched_networks import RESNET, WIDTHS, bits_of, config, prepared
from trainables.build import layer_table
from trainables.config import parse
from trainables.cost import LayerBits
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.layer_bits import resolve_bits
from trainables.methods import _stored_codes as stored_codes
from trainables.methods._switched_norm import switched_norms
from trainables.methods._switched_quantizers import epochs_done, quantizers


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
