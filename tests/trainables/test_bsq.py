"""BSQ, the method: settings, placement of quantizers, parameter groups, schemes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.trainables.bsq_cases import SMALL, config, random
from trainables.build import build_model, layer_table
from trainables.config import TrialConfig, parse
from trainables.cost import INPUT_BITS, LayerBits
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.layer_bits import resolve_bits
from trainables.methods._bit_planes import bit_tensors
from trainables.methods._bit_report import PlaneRow, float_state, plane_table, save_float, scheme
from trainables.methods.bsq import Method


def prepared(given: TrialConfig) -> tuple[Method, nn.Module]:
    table = layer_table(given)
    shape = (3, 32, 32) if given.data.name == "cifar10" else (1, 8, 8)
    model = build_model(given, 10, shape, seed=0)
    method = Method(Method.Settings(**given.method.settings), epochs=given.search_epochs)
    method.prepare(model, table, resolve_bits(given, table))
    method.calibrate(model, random((4, *shape), 0))
    return method, model


def test_settings_have_the_papers_defaults_and_a_strength_of_zero_is_allowed():
    assert (Method.Settings().start_planes, Method.Settings().interval, Method.Settings().threshold) == (8, 100, 0.0)
    assert config(method={"penalty_strength": 0}).method.settings["penalty_strength"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"penalty_strength": -0.1}, "method/penalty_strength = -0.1: input should be greater than or equal to 0"),
        ({"interval": 0}, "method/interval = 0: input should be greater than or equal to 1"),
        ({"start_planes": 9}, "method/start_planes = 9: input should be less than or equal to 8"),
        ({"threshold": 100}, "method/threshold = 100: input should be less than 100"),
        ({"placement": "outputs"}, "method/placement = 'outputs'"),
        ({"scheme": "no/such/file.json"}, "method/scheme = 'no/such/file.json': .*give a JSON file"),
        ({"scheme": {"conv1": [9, 0]}}, "method/scheme/conv1/0 = 9: input should be less than or equal to 8"),
        ({"alpha": 1.0}, "unknown address 'method/alpha'"),
    ],
)
def test_a_bad_setting_is_a_clear_error(given, message):
    with pytest.raises(ConfigError, match=message):
        config(method=given)


LENET = {"conv1": (3, 2), "conv2": (2, 2), "fc1": (2, 0), "fc2": (4, 3)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": {"conv1": [2, 0]}}, r"method/scheme: is of another network: lacks conv2 \(3 layers differ\)"),
        ({"scheme": {**LENET, "conv3": [1, 0]}}, r"is of another network: has conv3; did you mean 'conv\d'\?"),
        ({"scheme": LENET, "penalty_strength": 0.1}, "method/penalty_strength = 0.1: has no effect with method/scheme"),
        ({"float_layers": ["fc9"]}, "method/float_layers = 'fc9': no such layer; did you mean 'fc"),
        ({"float_inputs": ["block*"]}, r"method/float_inputs = 'block\*': no such layer"),
        ({"float_layers": ["*"]}, "leaves nothing to quantize; take method 'float'"),
        ({"float_inputs": ["fc1"], "placement": "relus"}, "method/float_inputs: has no effect with method/placement"),
    ],
)
def test_a_setting_of_another_network_or_without_effect_is_an_error(given, message):
    trial = config(method={"interval": Method.Settings().interval, **given})
    with pytest.raises(ConfigError, match=message):
        resolve_bits(trial, layer_table(trial))


def test_planes_for_biases_that_a_layer_lacks_are_an_error():
    names = [row.name for row in layer_table(config(SMALL, "cifar10")).quantizable]
    trial = config(SMALL, "cifar10", method={"interval": 100, "scheme": dict.fromkeys(names, (2, 2))})
    with pytest.raises(ConfigError, match=r"method/scheme/conv1 = 2 planes for biases: the layer has none; give 0"):
        resolve_bits(trial, layer_table(trial))


def test_weight_bits_cannot_be_given():
    trial = config(bits={"conv2": {"weight": 4}})
    with pytest.raises(ConfigError, match="bits/conv2/weight: method 'bsq' learns its weight bits; leave it out"):
        resolve_bits(trial, layer_table(trial))


def test_a_scheme_file_is_read_into_the_configuration(tmp_path: Path):
    path = tmp_path / "scheme.json"
    path.write_text(json.dumps(LENET))
    given = config(method={"interval": 100, "scheme": str(path)})
    assert {name: tuple(widths) for name, widths in given.method.settings["scheme"].items()} == LENET
    assert parse(json.loads(json.dumps(given.tree()))) == given
    path.write_text("{")
    with pytest.raises(ConfigError, match="give a JSON file"):
        config(method={"scheme": str(path)})


def test_a_float_checkpoint_that_lacks_tensors_is_an_error(tmp_path: Path):
    model = build_model(config(), 10, (1, 8, 8), seed=0)
    path = tmp_path / "start.safetensors"
    save_float(path, nn.ModuleDict({"conv1": model.get_submodule("conv1")}))
    with pytest.raises(ConfigError, match=r"of another model: lacks conv2\.weight"):
        next(fit(config(), start=path))


def test_relus_are_needed_where_quantizers_are_put_at_them():
    trial = config(method={"placement": "relus"})
    table = layer_table(trial)
    with pytest.raises(ConfigError, match="the model has no two ReLU modules; take 'inputs'"):
        Method(Method.Settings(placement="relus")).prepare(nn.Sequential(), table, resolve_bits(trial, table))


def test_the_published_placement_reads_floats_after_the_first_relu_and_the_pool():
    trial = config(
        SMALL,
        "cifar10",
        method={"placement": "relus", "float_layers": ["*.downsample.0"]},
        bits={"fc": {"activation": 4}},
    )
    method, model = prepared(trial)
    (point,) = method.points(model)
    reads = {name: width.activation for name, width in point.bits.items()}
    assert reads.pop("conv1") == INPUT_BITS
    assert (reads.pop("layer1.0.conv1"), reads.pop("fc")) == (32, 32)
    assert set(reads.values()) == {4}
    assert not [name for name in reads if "downsample" in name]


def test_layers_can_stay_float_or_read_floats():
    trial = config(SMALL, "cifar10", method={"float_layers": ["*.downsample.0"], "float_inputs": ["fc"]})
    method, model = prepared(trial)
    (point,) = method.points(model)
    assert "layer2.0.downsample.0" not in point.bits
    assert point.bits["fc"] == LayerBits(weight=9, activation=32)
    assert type(model.get_submodule("layer2.0.downsample.0")) is nn.Conv2d


def test_the_leaves_are_what_ranks_average_and_every_parameter_is_in_one_group():
    method, model = prepared(config(SMALL, "cifar10"))
    planes, others = method.groups(model)
    assert {id(p) for p in planes["params"]} == {id(leaf) for _, _, _, leaf in bit_tensors(model)}
    assert {id(p) for p in [*planes["params"], *others["params"]]} == {id(p) for p in model.parameters()}


def test_a_dead_layer_has_no_bits_and_no_planes_in_its_scheme():
    method, model = prepared(config())
    for layer, role, tensor, leaf in bit_tensors(model):
        if (layer, role) == ("conv2", "weight"):
            tensor.calibrate(leaf.data.zero_())
            tensor.adjust(leaf)
    (point,) = method.points(model)
    assert point.bits["conv2"].weight == 0
    assert point.bits["conv1"].weight > 0
    assert scheme(model)["conv2"][0] == 0
    assert point.extra_floats == 3


def test_details_tell_planes_and_ones():
    method, model = prepared(config())
    details = method.details(model)
    assert set(details) == {name for name, _ in method.points(model)[0].bits.items()}
    assert details["conv1"]["planes"] == 8
    assert len(details["conv1"]["ones_percent"].split()) == 8
    assert plane_table(model)[0] == PlaneRow(
        layer="conv1", role="weight", planes=8, shares=tuple(map(float, next(bit_tensors(model))[2].shares()))
    )


def test_the_public_clamp_hits_parameters_by_their_names():
    found = {}
    for as_published in (False, True):
        method, model = prepared(
            config(SMALL, "cifar10", method={"float_layers": ["*.downsample.0"], "as_published": as_published})
        )
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.get_parameter("bn1.weight").data.fill_(-1.0)
        before["bn1.weight"].fill_(-1.0)
        method.after_step(model)
        found[as_published] = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert found[False] == set()
    assert found[True] == {"layer2.0.downsample.0.weight", "layer3.0.downsample.0.weight"}


@pytest.mark.parametrize("as_published", [False, True])
def test_fine_tuning_keeps_the_biases_unless_as_published(as_published):
    method, model = prepared(config(method={"as_published": as_published}))
    before = float_state(model)["fc2.bias"].clone()
    method.freeze(model)
    assert bool(model.get_parameter("fc2.bias").any()) != as_published
    trained_leaves = {id(p) for p in method.groups(model)[0]["params"]}
    assert (id(model.get_parameter("fc2.bias")) in trained_leaves) != as_published
    torch.testing.assert_close(float_state(model)["fc2.bias"], before)
