"""AdaBits: switching, joint and progressive training, adaptation to untrained widths, and what is refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables import checkpoint
from trainables.config import TrialConfig, merged, parse
from trainables.cost import LayerTable, size_bytes
from trainables.errors import ConfigError
from trainables.fit import Session, fit
from trainables.layers import trace
from trainables.methods import _norm_sets as norm_sets
from trainables.methods._norm_sets import SwitchableNorm, switchable_norms
from trainables.methods._progressive import calibrate_norms, stage_of
from trainables.methods._sat_quantizers import SatWeight
from trainables.methods._switchable_clip import SwitchableClip, position
from trainables.methods._width_lists import parse_widths
from trainables.methods.adabits import Method
from trainables.models import mobilenet_v1, mobilenet_v2, resnet20

ROOT = Path(__file__).parents[2]
SHAPE = (3, 16, 16)
BASE: dict[str, Any] = {
    "method": {"name": "adabits", "widths": "8,4,2"},
    "model": {"name": "resnet20", "depth": 8, "width": 8},
    "data": {"name": "digits", "train_limit": 256, "validation_limit": 100},
    "optimizer": {"lr": 0.02},
    "training": {"epochs": 3, "batch_size": 32},
    "start": {"epochs": 0},
}


def configured(**values: Any) -> TrialConfig:
    """The base with values at their addresses; `__` stands for a slash."""
    return parse(merged(BASE, {name.replace("__", "/"): value for name, value in values.items()}))


def network() -> tuple[nn.Module, LayerTable]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = resnet20.build(5, SHAPE, depth=8, width=4)
    return model, trace(model, SHAPE)


def prepared(epochs: int = 1, **settings: Any) -> tuple[nn.Module, Method]:
    model, table = network()
    method = Method(Method.Settings(**{"widths": "8,4,2", **settings}), epochs=epochs)
    method.prepare(model, table, {})
    method.calibrate(model, images())
    return model, method


def images(seed: int = 1, count: int = 8) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 8) -> Tensor:
    return torch.arange(count) % 5


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Lists of widths


@given(st.sets(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 32]), min_size=1))
def test_a_list_of_widths_is_read_from_its_text_and_from_numbers_alike(chosen):
    widths = sorted(chosen, reverse=True)
    assert parse_widths(",".join(map(str, widths))) == parse_widths(widths) == tuple(widths)
    assert configured(method__widths=widths) == configured(method__widths=", ".join(map(str, widths)))


@pytest.mark.parametrize(
    ("given_widths", "message"),
    [
        ([4, 8], r"method/widths = \[4, 8\]: (value error, )?give widths from high to low, each once: 8,4"),
        ([8, 8, 4], r"method/widths = \[8, 8, 4\]: (value error, )?give widths from high to low, each once: 8,4"),
        ("8,6,4,6", "method/widths = '8,6,4,6': (value error, )?give widths from high to low, each once: 8,6,4"),
        ([9, 4], r"method/widths = \[9, 4\]: (value error, )?a width is 1..8, or 32 for float"),
        ("8,four", "method/widths = '8,four': (value error, )?give a list of widths, such as 8,6,5,4"),
        ([4.5], r"method/widths = \[4.5\]: (value error, )?give a list of widths"),
    ],
)
def test_a_list_that_is_none_of_falling_widths_is_refused(given_widths, message):
    with pytest.raises(ConfigError, match=message):
        configured(method__widths=given_widths)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method__widths": ""}, "method/widths = '': give one width or more"),
        ({"method__extra_widths": "4,3"}, "method/extra_widths = '4,3': 4 is trained already"),
        ({"method__widths": "4", "method__training": "descending"}, "one width has no order"),
        (
            {"method__training": "ascending", "method__norms": "shared"},
            "method/norms = 'shared': method/training = 'ascending' calibrates a set for each width",
        ),
        (
            {"method__training": "descending", "training__epochs": 2},
            "training/epochs = 2: 3 widths, one after another, take as many epochs",
        ),
        (
            {"method__widths": "4,1", "model": {"name": "mobilenet_v2", "width": 0.25}, "data": "cifar10"},
            r"method/widths: 1 is too low for features.2.conv.0.0, which reads negative values",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    config = configured(**values)
    model, shape = network()[0], SHAPE
    if config.model.name == "mobilenet_v2":
        model, shape = mobilenet_v2.build(10, (3, 32, 32), width=0.25), (3, 32, 32)
    assert any(message in fault for fault in Method.faults(config, trace(model, shape)))


def test_a_sound_configuration_has_no_faults():
    assert list(Method.faults(configured(), network()[1])) == []


def test_bits_of_layers_cannot_be_given():
    with pytest.raises(ConfigError, match="bits"):
        next(fit(configured(bits={"*": {"weight": 4}})))


def test_an_untrained_width_has_no_place_unless_as_published():
    with pytest.raises(ConfigError, match=r"width 3 was neither trained nor calibrated \(there are 8, 4\)"):
        position(3, (8, 4))
    assert position(3, (8, 4), as_published=True) == 0
    assert position(4, (8, 4)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Sets of batch norm


def test_every_set_starts_with_the_values_of_the_norm():
    plain = nn.BatchNorm2d(3)
    plain.weight.data.uniform_()
    plain.running_mean.uniform_()  # type: ignore[union-attr]
    plain.eval()
    norm, x = SwitchableNorm(plain, 4), torch.randn(2, 3, 4, 4)
    for row in range(4):
        norm.index.fill_(row)
        assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("shared_affine", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_way_by_tensor_gives_what_the_way_by_number_gives(shared_affine, training, monkeypatch):
    x, results = torch.randn(4, 3, 5, 5), []
    for by_number in (True, False):
        monkeypatch.setattr(norm_sets, "by_number", lambda x, answer=by_number: answer)
        norm = SwitchableNorm(nn.BatchNorm2d(3), 3, shared_affine=shared_affine).train(training)
        norm.index.fill_(1)
        y = norm(x)
        y.square().sum().backward()
        results.append([y, norm.weight.grad, *norm.state_dict().values()])
    torch.testing.assert_close(*results)


def test_a_state_without_sets_fills_all_of_them_and_one_with_fewer_the_first():
    plain = nn.BatchNorm2d(3)
    plain.weight.data.uniform_()
    norm = SwitchableNorm(nn.BatchNorm2d(3), 2)
    norm.load_state_dict(plain.state_dict())
    assert torch.equal(norm.weight.data, torch.stack([plain.weight.data] * 2))
    wider = SwitchableNorm(nn.BatchNorm2d(3), 3)
    wider.load_state_dict(norm.state_dict())
    assert torch.equal(wider.weight.data[:2], norm.weight.data)
    assert torch.equal(wider.weight.data[2], torch.ones(3))


def test_calibration_makes_the_statistics_the_average_over_the_batches_and_changes_nothing_else():
    model, method = prepared()
    method.switch(model, 4)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    batches = [images(seed) for seed in range(5)]
    calibrate_norms(model, batches)
    after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    first = model.get_submodule("bn1")
    with torch.no_grad():
        means = torch.stack([model.get_submodule("conv1")(batch).mean(dim=(0, 2, 3)) for batch in batches])
    torch.testing.assert_close(first.running_mean[1], means.mean(0))  # type: ignore[index]
    assert torch.equal(first.running_mean[0], before["bn1.running_mean"][0])  # type: ignore[index]
    assert first.num_batches_tracked.tolist() == [0, 5, 0]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training


# ---------------------------------------------------------------------------------------------------------------------
# Switching and joint training


def test_a_joint_step_has_the_sum_of_the_gradients_of_each_width():
    model, method = prepared()
    model.train()
    parts = []
    for width in (8, 4, 2):
        single = copy.deepcopy(model)
        method.switch(single, width)
        nn.functional.cross_entropy(single(images()), labels()).backward()
        parts.append(gradients(single))
    count = 0
    for loss in method.losses(model, images(), labels()):
        loss.backward()
        count += 1
    assert count == 3
    for name, found in gradients(model).items():
        torch.testing.assert_close(found, parts[0][name] + parts[1][name] + parts[2][name])


def test_weights_are_normalised_once_a_step_and_by_themselves_again_afterwards():
    model, method = prepared()
    losses = method.losses(model.train(), images(), labels())
    next(losses).backward()
    quantizers = [module for module in model.modules() if isinstance(module, SatWeight)]
    assert all(quantizer.normalised is not None for quantizer in quantizers)
    losses.close()
    assert all(quantizer.normalised is None for quantizer in quantizers)
    assert all(p.grad is None for name, p in model.named_parameters() if name.endswith("conv1.weight"))


def test_each_width_feeds_its_own_norms_and_clip_levels():
    model, method = prepared()
    model.train()
    losses = method.losses(model, images(), labels())
    for row in range(3):
        model.zero_grad()
        next(losses).backward()
        for module in model.modules():
            if isinstance(module, SwitchableNorm | SwitchableClip):
                grad = module.weight.grad if isinstance(module, SwitchableNorm) else module.clip_max.grad
                assert grad is not None
                used = grad.abs().flatten(1).sum(1).nonzero() if grad.dim() > 1 else grad.nonzero()
                assert used.flatten().tolist() in ([row], [])
    assert all(norm.num_batches_tracked.tolist() == [1, 1, 1] for norm in switchable_norms(model))  # type: ignore[union-attr]


def test_switching_changes_buffers_alone():
    model, method = prepared()
    before = copy.deepcopy(model.state_dict())
    method.switch(model, 8)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"q_max", "index"}


@pytest.mark.parametrize(
    ("ends_bits", "widths", "first", "last"),
    [(8, "8,4", (8, 8), (8, 4)), (8, "5,4", (8, 8), (8, 4)), (None, "5,4", (5, 8), (5, 4)), (2, "8,4", (4, 8), (4, 4))],
)
def test_the_ends_have_the_least_width_asked_for_and_all_others_that_of_the_network(ends_bits, widths, first, last):
    _, method = prepared(ends_bits=ends_bits, widths=widths)
    found = {name: (bits.weight, bits.activation) for name, bits in method.bits_at(4).items()}
    assert (found.pop("conv1"), found.pop("fc")) == (first, last)
    assert set(found.values()) == {(4, 4)}


def test_a_point_costs_what_the_network_of_its_width_costs_alone():
    model, method = prepared(extra_widths="3")
    _, table = network()
    alone, single = prepared(widths="4")
    (point,) = [point for point in method.points(model) if point.label == "4-bit"]
    (wanted,) = single.points(alone)
    assert point.extra_floats == wanted.extra_floats == 9 + 1
    sizes = [size_bytes(table, p.bits, extra_floats=p.extra_floats) for p in (point, wanted)]
    assert sizes[0] == sizes[1]


def test_one_shared_norm_and_clip_level_are_those_of_every_width():
    model, method = prepared(norms="shared", switch_clip=False)
    assert all(len(norm.running_mean) == 1 for norm in switchable_norms(model))  # type: ignore[arg-type]
    assert not any(isinstance(module, SwitchableClip) for module in model.modules())
    for loss in method.losses(model.train(), images(), labels()):
        loss.backward()
    assert all(norm.num_batches_tracked.tolist() == [3] for norm in switchable_norms(model))  # type: ignore[union-attr]


def test_depthwise_networks_train_jointly():
    model = mobilenet_v1.build(5, SHAPE, width=0.25, stem="cifar")
    method, table = Method(Method.Settings(widths="8,4")), trace(model, SHAPE)
    method.prepare(model, table, {})
    method.calibrate(model, images())
    for loss in method.losses(model.train(), images(), labels()):
        loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


def outcomes(config: TrialConfig, **options: Any) -> list[dict[str, Any]]:
    trees = [report.to_json() for report in fit(config, **options)]
    return [{key: value for key, value in tree.items() if key not in ("seconds", "first_step_at")} for tree in trees]


def test_joint_training_learns_every_width():
    *_, last = fit(configured(data={"name": "digits"}, training__epochs=4))
    assert [point.label for point in last.points] == ["8-bit", "4-bit", "2-bit"]
    assert min(point.accuracy for point in last.points) > 0.85
    assert last.points[0].size_bytes > last.points[1].size_bytes > last.points[2].size_bytes


def test_direct_adaptation_gives_a_point_between_those_of_its_neighbours():
    config = configured(data={"name": "digits"}, training__epochs=3, method__widths="8,4", method__extra_widths="6,3")
    *_, last = fit(config)
    points = {point.label: point for point in last.points}
    assert set(points) == {"6-bit", "3-bit", "8-bit", "4-bit"}
    assert points["6-bit"].accuracy > 0.8
    assert points["3-bit"].accuracy > 0.5
    assert points["8-bit"].size_bytes > points["6-bit"].size_bytes > points["4-bit"].size_bytes


def test_an_extra_width_is_refused_until_it_is_calibrated():
    model, method = prepared(extra_widths="3")
    with pytest.raises(ConfigError, match=r"width 3 is not calibrated: train for an epoch, or call adapt\(model, 3"):
        method.switch(model, 3)
    method.adapt(model, 3, [images()])
    method.switch(model, 4)
    method.switch(model, 3)
    with pytest.raises(ConfigError, match=r"width 5 was neither trained nor calibrated"):
        method.switch(model, 5)


def test_a_trained_network_takes_on_a_width_later():
    """Its state loads into a network with one more place, which is then calibrated."""
    model, method = prepared()
    wider, adapting = prepared(extra_widths="3")
    wider.load_state_dict(model.state_dict())
    adapting.adapt(wider, 3, [images()])
    for width in (8, 4, 2):
        method.switch(model, width)
        adapting.switch(wider, width)
        assert torch.equal(wider.eval()(images(5)), model.eval()(images(5)))


@pytest.mark.parametrize(("training", "order"), [("descending", [8, 4, 2]), ("ascending", [2, 4, 8])])
def test_progressive_training_deals_the_epochs_out_to_the_widths(training, order):
    model, method = prepared(epochs=6, training=training)
    trained, rebuilt = [], []
    for epoch in range(1, 7):
        trained += method.training_widths(model)
        for loss in method.losses(model.train(), images(epoch), labels()):
            loss.backward()
        rebuilt.append(method.after_epoch(model, epoch))
    assert trained == [width for width in order for _ in range(2)]
    assert rebuilt == [False, True, False, True, False, False]
    assert all(min(norm.num_batches_tracked.tolist()) > 0 for norm in switchable_norms(model))  # type: ignore[union-attr]


def test_the_next_width_goes_on_from_the_one_before():
    model, method = prepared(epochs=3, training="descending")
    for loss in method.losses(model.train(), images(), labels()):
        loss.backward()
    for norm in switchable_norms(model):
        norm.weight.data[0] += 0.5
    method.after_epoch(model, 1)
    assert int(stage_of(model).current) == 1
    for norm in switchable_norms(model):
        assert torch.equal(norm.weight[1], norm.weight[0])


@pytest.mark.parametrize(
    "values",
    [{}, {"method__extra_widths": "3"}, {"method__training": "descending", "method__widths": "8,4"}],
    ids=["joint", "extra", "progressive"],
)
@pytest.mark.parametrize("closed_after", [1, 2])
def test_a_trial_closed_at_an_epoch_goes_on_bit_by_bit(values, closed_after, tmp_path):
    config = configured(data__train_limit=128, **values)
    whole = outcomes(config, folder=tmp_path / "whole")
    trial = fit(config, folder=tmp_path / "parts")
    for _ in range(closed_after):
        next(trial)
    trial.close()
    torch.manual_seed(99)
    assert outcomes(config, folder=tmp_path / "parts") == whole[closed_after - 1 :]


EVALUATE = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from trainables import checkpoint
from trainables.config import parse
from trainables.fit import Session, evaluate
tensors, state = checkpoint.read(Path(sys.argv[1]))
session = Session(parse(state["config"]))
session.model.load_state_dict({n.removeprefix("model/"): v for n, v in tensors.items() if n.startswith("model/")})
points = {point.label: point for point in session.method.points(session.model)}
found = {}
for label in sys.argv[2:]:
    points[label].activate()
    found[label] = evaluate(session.model, session.data.validation, session.device)
print(json.dumps(found))
"""


def test_a_saved_checkpoint_gives_each_width_its_accuracy_in_a_fresh_process_in_any_order(tmp_path):
    *_, last = fit(configured(method__extra_widths="3"), folder=tmp_path)
    labels_asked = ["2-bit", "8-bit", "3-bit", "4-bit", "8-bit"]
    command = [sys.executable, "-c", EVALUATE, str(tmp_path / checkpoint.FILE), *labels_asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert found == {point.label: [point.accuracy, point.loss] for point in last.points}


def test_every_point_can_be_switched_to_after_any_other():
    session = Session(configured())
    points = session.method.points(session.model)
    reference = {}
    for point in points:
        point.activate()
        reference[point.label] = session.model.eval()(torch.zeros(1, 1, 8, 8))
    for point in reversed(points):
        point.activate()
        assert torch.equal(session.model(torch.zeros(1, 1, 8, 8)), reference[point.label])
