"""The configuration: addresses, patterns, all faults at once, and a digest that tells computations apart."""

import json
import math
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainables import plugins
from trainables.build import build_model, data_shape, layer_table
from trainables.config import TrialConfig, digest, merged, parse
from trainables.cost import INPUT_BITS, LayerBits
from trainables.errors import ConfigError, PluginError
from trainables.layer_bits import DEFAULT_BITS, ENDS_BITS, resolve_bits
from trainables.plugin_settings import settings_of

BASE: dict[str, Any] = {"method": "lsq", "model": "lenet5", "data": "digits"}
RESNET = {**BASE, "model": {"name": "resnet20", "depth": 8, "width": 4}}
LENET_LAYERS = ["conv1", "conv2", "fc1", "fc2"]


def configured(base: dict[str, Any] = BASE, /, **values: Any) -> TrialConfig:
    """The base with values at their addresses; `__` stands for a slash."""
    return parse(merged(base, {name.replace("__", "/"): value for name, value in values.items()}))


def at(values: dict[str, Any], base: dict[str, Any] = BASE) -> TrialConfig:
    return parse(merged(base, values))


def widths(values: dict[str, Any], base: dict[str, Any] = BASE) -> dict[str, LayerBits]:
    config = at(values, base)
    return resolve_bits(config, layer_table(config))


def digest_of(values: dict[str, Any], base: dict[str, Any] = BASE) -> str:
    config = at(values, base)
    return digest(config, resolve_bits(config, layer_table(config)))


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ("optimizer/lr", 0.3),
        ("optimizer/name", "adam"),
        ("training/epochs", 7),
        ("training/compile", "quantizers"),
        ("start/epochs", 0),
        ("start/checkpoint", "weights.safetensors"),
        ("method/per_channel", True),
        ("model/width", 0.5),
        ("data/train_limit", 100),
        ("bits/conv2/weight", 3),
        ("seed", 5),
    ],
)
def test_an_address_is_a_path_in_the_tree(address, value):
    node: Any = at({address: value}).tree()
    for step in address.split("/"):
        node = node[step]
    assert node == value


def test_an_address_below_a_value_is_an_error():
    with pytest.raises(ConfigError, match="seed/x: 'seed' is a value, not a group of settings"):
        merged({"seed": 0}, {"seed/x": 1})


def test_merging_leaves_the_base_alone():
    base = {"optimizer": {"lr": 0.1}}
    assert merged(base, {"optimizer/lr": 0.2, "optimizer/momentum": 0}) == {"optimizer": {"lr": 0.2, "momentum": 0}}
    assert base == {"optimizer": {"lr": 0.1}}


def test_a_plugin_may_be_a_name_or_a_tree_with_its_name():
    assert parse(BASE) == parse({**BASE, "method": {"name": "lsq"}})


def test_the_tree_of_a_config_is_complete_and_plain_json():
    tree = parse(BASE).tree()
    assert json.loads(json.dumps(tree)) == tree
    assert tree["method"] == {"name": "lsq", "per_channel": False, "symmetric": False, "scale_lr": 1.0}
    assert tree["optimizer"]["name"] == "sgd"


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        parse(BASE).seed = 1  # type: ignore[misc]


bit_trees = st.dictionaries(
    st.sampled_from(["*", "conv*", "fc?", *LENET_LAYERS]),
    st.fixed_dictionaries({}, optional={"weight": st.integers(2, 8), "activation": st.integers(2, 8)}),
)
addresses = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["lsq", "pact", "dorefa", "float"]),
        "optimizer/lr": st.floats(1e-6, 100),
        "optimizer/name": st.sampled_from(["sgd", "adam", "adamw"]),
        "optimizer/momentum": st.floats(0, 0.99),
        "optimizer/weight_decay": st.floats(0, 1),
        "optimizer/warmup": st.floats(0, 0.99),
        "training/epochs": st.integers(1, 1000),
        "training/batch_size": st.integers(1, 1000),
        "start/epochs": st.integers(0, 100),
        "start/checkpoint": st.none() | st.text(),
        "model/width": st.floats(0.1, 4),
        "data/validation_limit": st.none() | st.integers(1, 300),
        "bits": bit_trees,
        "seed": st.integers(0, 2**31 - 1),
    },
)


@given(values=addresses)
def test_a_config_survives_the_trip_through_its_tree_and_json(values):
    base = {**BASE, "model": {"name": "lenet5"}}
    config = at(values, base)
    assert parse(json.loads(json.dumps(config.tree()))) == config


# ---------------------------------------------------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"optimiser/lr": 0.1}, "unknown address 'optimiser'; did you mean 'optimizer'?"),
        ({"optimizer/lrr": 0.1}, "unknown address 'optimizer/lrr'; did you mean 'lr'?"),
        ({"method/per_chanel": True}, "unknown address 'method/per_chanel'; did you mean 'per_channel'?"),
        ({"method/zzz": 1}, "unknown address 'method/zzz'; method takes per_channel, symmetric, scale_lr"),
        ({"model/depth": 20}, "unknown address 'model/depth'"),
        ({"data/augmentation": "crop"}, "unknown address 'data/augmentation'; did you mean 'augment'?"),
        ({"data/download": True}, "unknown address 'data/download'"),
        ({"model/classes": 7}, "unknown address 'model/classes'"),
        ({"bits/conv1/wieght": 4}, "unknown address 'bits/conv1/wieght': a layer has weight and activation bits"),
        ({"bits/conv1": 4}, "bits/conv1 = 4: give bits/conv1/weight and bits/conv1/activation"),
        ({"bits/conv1/weight": 4.5}, "bits/conv1/weight = 4.5: an integer number of bits"),
        ({"bits/conv1/weight": True}, "bits/conv1/weight = True: an integer number of bits"),
        ({"bits": 4}, "bits = 4: give bits/LAYER/weight and bits/LAYER/activation"),
        ({"optimizer": 4}, "optimizer = 4"),
        ({"method": 4}, "method = 4: a name or a group of settings with one is needed"),
        ({"method": {"name": 4}}, "method = {'name': 4}: a name or a group of settings with one is needed"),
        ({"optimizer/lr": 0}, "optimizer/lr = 0: input should be greater than 0"),
        ({"optimizer/lr": float("nan")}, "optimizer/lr = nan"),
        ({"method/scale_lr": float("inf")}, "method/scale_lr = inf"),
        ({"optimizer/lr": "fast"}, "optimizer/lr = 'fast'"),
        ({"optimizer/name": "sdg"}, "optimizer/name = 'sdg': input should be 'sgd', 'adam' or 'adamw'"),
        ({"training/epochs": 0}, "training/epochs = 0: input should be greater than or equal to 1"),
        ({"training/epochs": 1.5}, "training/epochs = 1.5"),
        ({"training/compile": "all"}, "training/compile = 'all'"),
        ({"optimizer/momentum": 1.0}, "optimizer/momentum = 1.0: input should be less than 1"),
        ({"seed": -1}, "seed = -1: an integer from 0 to 2^31 - 1"),
        ({"seed": True}, "seed = True: an integer from 0 to 2^31 - 1"),
        ({"seed": 2**31}, "seed = 2147483648: an integer from 0 to 2^31 - 1"),
        ({"seed": "x"}, "seed = 'x': an integer from 0 to 2^31 - 1"),
    ],
    ids=str,
)
def test_a_fault_names_its_address_its_value_and_what_is_allowed(values, fault):
    with pytest.raises(ConfigError) as caught:
        at(values)
    assert fault in str(caught.value)


def test_all_faults_are_named_at_once():
    faults = {
        "optimizer/lr": -1,
        "training/epochs": 0,
        "start/lr": "x",
        "method/per_chanel": True,
        "model/widht": 2,
        "bits/conv1/wieght": 3,
        "seed": -1,
        "sede": 1,
    }
    with pytest.raises(ConfigError) as caught:
        at(faults)
    assert [address for address in faults if address not in str(caught.value)] == []
    assert str(caught.value).count(";") >= len(faults) - 1


@pytest.mark.parametrize("part", ["method", "model", "data"])
def test_a_missing_plugin_is_an_error_that_lists_them(part):
    tree = {name: value for name, value in BASE.items() if name != part}
    with pytest.raises(ConfigError, match=f"{part}/name is missing: one of .*{BASE[part]}"):
        parse(tree)


def test_an_unknown_plugin_is_an_error_with_the_nearest_name():
    with pytest.raises(PluginError, match="unknown method 'lsqq'; did you mean 'lsq'"):
        at({"method": "lsqq"})


@pytest.mark.parametrize(
    ("address", "given_value", "value"),
    [
        ("optimizer/lr", 1, 1.0),
        ("optimizer/lr", "0.5", 0.5),
        ("training/epochs", "3", 3),
        ("training/epochs", 3.0, 3),
        ("method/per_channel", "true", True),
        ("model/width", 2, 2.0),
        ("model/padding", None, None),
    ],
)
def test_values_from_a_command_line_get_the_type_of_their_setting(address, given_value, value):
    section, name = address.split("/")
    found = at({address: given_value}).tree()[section][name]
    assert found == value
    assert type(found) is type(value)


# ---------------------------------------------------------------------------------------------------------------------
# Bits


def test_by_default_the_ends_have_eight_bits_and_the_others_four():
    assert (ENDS_BITS, DEFAULT_BITS, INPUT_BITS) == (8, 4, 8)
    assert widths({}) == {
        "conv1": LayerBits(weight=8, activation=8),
        "conv2": LayerBits(weight=4, activation=4),
        "fc1": LayerBits(weight=4, activation=4),
        "fc2": LayerBits(weight=8, activation=8),
    }


def test_a_pattern_reaches_the_layers_between_the_ends():
    found = widths({"bits/*/weight": 2, "bits/*/activation": 3})
    assert found["conv2"] == found["fc1"] == LayerBits(weight=2, activation=3)
    assert found["conv1"] == found["fc2"] == LayerBits(weight=8, activation=8)


def test_an_end_named_in_full_gets_the_width_it_was_given():
    found = widths({"bits/conv1/weight": 3, "bits/fc2/weight": 2, "bits/fc2/activation": 5})
    assert found["conv1"] == LayerBits(weight=3, activation=INPUT_BITS)
    assert found["fc2"] == LayerBits(weight=2, activation=5)


def test_a_name_goes_before_a_pattern_and_a_longer_pattern_before_a_shorter():
    values = {
        "bits/*/weight": 2,
        "bits/layer*/weight": 3,
        "bits/layer1.*/weight": 5,
        "bits/layer1.0.conv2/weight": 6,
    }
    for order in (values, dict(reversed(values.items()))):
        found = widths(order, RESNET)
        assert found["layer2.0.conv1"].weight == 3
        assert found["layer1.0.conv1"].weight == 5
        assert found["layer1.0.conv2"].weight == 6
        assert found["conv1"].weight == found["fc"].weight == 8


def test_weight_and_activation_bits_are_looked_up_apart():
    found = widths({"bits/conv2/weight": 2, "bits/*/activation": 7})
    assert found["conv2"] == LayerBits(weight=2, activation=7)


@given(values=st.permutations([("bits/*1/weight", 2), ("bits/f*/weight", 3), ("bits/fc1/activation", 5)]))
def test_the_order_in_which_bits_are_given_does_not_matter(values):
    assert widths(dict(values)) == widths(dict(sorted(values)))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"bits/conv9/weight": 4}, "bits/conv9: model 'lenet5' has no such layer; did you mean 'conv2'?"),
        ({"bits/layer*/weight": 4}, "bits/layer*: model 'lenet5' has no such layer"),
        ({"bits/conv2/weight": 1}, "bits/conv2/weight = 1: method 'lsq' takes 2..8 (use 'dorefa' or 'n2uq' for 1 bit)"),
        ({"bits/conv2/weight": 9}, "bits/conv2/weight = 9: method 'lsq' takes 2..8"),
        ({"bits/conv2/activation": 0}, "bits/conv2/activation = 0: method 'lsq' takes 2..8"),
        ({"bits/conv1/activation": 4}, "bits/conv1/activation = 4: the network's input has 8 bits"),
        ({"method": "dorefa", "bits/*/weight": 0}, "bits/conv2/weight = 0: method 'dorefa' takes 1..8"),
        ({"method": "float", "bits/conv2/weight": 4}, "method 'float' has no bits"),
    ],
    ids=str,
)
def test_widths_and_layers_that_cannot_be_are_errors(values, fault):
    with pytest.raises(ConfigError) as caught:
        widths(values)
    assert fault in str(caught.value)


def test_all_faults_of_the_bits_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        widths({"bits/conv9/weight": 4, "bits/conv2/weight": 1, "bits/fc1/activation": 9})
    assert str(caught.value).count("bits/") == 3


def test_one_bit_is_for_unsigned_activations_only():
    base = {**BASE, "method": "dorefa", "model": {"name": "mobilenet_v2", "width": 0.25}, "data": "cifar10"}
    assert widths({"bits/features.1.conv.1/activation": 1}, base)["features.1.conv.1"].activation == 1
    with pytest.raises(
        ConfigError, match=r"activation = 1: method 'dorefa' takes 2\.\.8 where the layer reads negative"
    ):
        widths({"bits/features.2.conv.0.0/activation": 1}, base)


def test_the_float_network_has_no_bits():
    assert widths({"method": "float"}) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Digest


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({}, {"bits/*/weight": 4, "bits/*/activation": 4}),
        ({"bits/*/weight": 3}, {"bits/conv2/weight": 3, "bits/fc1/weight": 3}),
        ({"bits/fc*/weight": 3}, {"bits/fc1/weight": 3}),
        ({}, {"bits/conv1/activation": 8, "bits/conv1/weight": 8}),
        ({"optimizer/lr": 1}, {"optimizer/lr": 1.0}),
        ({"training/epochs": "4"}, {"training/epochs": 4}),
        ({}, {"optimizer/momentum": 0.9, "method/per_channel": False, "seed": 0, "data/train_limit": None}),
        ({"method": "lsq"}, {"method": {"name": "lsq"}}),
    ],
    ids=str,
)
def test_configurations_that_compute_the_same_share_a_digest(left, right):
    assert digest_of(left) == digest_of(right)


def test_the_order_of_layers_and_settings_does_not_change_the_digest():
    config = parse(BASE)
    bits = resolve_bits(config, layer_table(config))
    backwards = parse(dict(reversed(config.tree().items())))
    assert digest(backwards, dict(reversed(bits.items()))) == digest(config, bits)


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"method": "pact"},
    {"method": "dorefa"},
    {"method": "float"},
    {"method/per_channel": True},
    {"model/width": 0.5},
    {"data/train_limit": 100},
    {"data/augment": "crop"},
    {"optimizer/lr": 0.011},
    {"optimizer/name": "adam"},
    {"training/epochs": 4},
    {"training/batch_size": 65},
    {"start/epochs": 4},
    {"start/checkpoint": "x"},
    {"bits/*/weight": 3},
    {"bits/*/activation": 3},
    {"bits/conv2/weight": 3},
    {"bits/conv1/weight": 7},
    {"seed": 1},
]


def test_configurations_that_differ_anywhere_differ_in_their_digests():
    base = {**BASE, "method": {"name": "lsq"}, "model": {"name": "lenet5"}, "data": {"name": "digits"}}
    digests = [digest_of(values, base) for values in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    assert all(len(text) == 16 and int(text, 16) >= 0 for text in digests)


@given(left=bit_trees, right=bit_trees)
def test_digests_are_equal_exactly_when_the_resolved_bits_are(left, right):
    for tree in (left, right):
        tree.get("conv1", {}).pop("activation", None)  # the network's input has no choice
    same = widths({"bits": left}) == widths({"bits": right})
    assert (digest_of({"bits": left}) == digest_of({"bits": right})) == same


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins of one's own

LAB = '''
"""A method and models of a person's own."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from trainables.methods import lsq


class Method(lsq.Method):
    """LSQ with one more setting."""

    @dataclass(frozen=True, kw_only=True)
    class Settings(lsq.Method.Settings):
        """Those of LSQ, and a list."""

        needed: Annotated[int, Field(ge=1, description="has no default")]
        stages: Annotated[tuple[int, ...], Field(description="epochs of change")] = (1, 2)
        names: Annotated[list[str], Field(description="made anew each time")] = dataclasses.field(default_factory=list)


def build(classes, input_shape, *, hidden: int = 4):
    """A linear network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], hidden), nn.ReLU(),
                         nn.Linear(hidden, classes))


def by_keyword(*, num_classes: int, hidden: int = 4):
    """Takes the number of classes by another name, as a keyword."""
    return build(num_classes, (1, 8, 8), hidden=hidden)


def not_a_module(classes):
    return classes


def strict(classes, *, width: int):
    return build(classes, (1, 8, 8), hidden=width)
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a person's own: its dotted path."""
    package = tmp_path / "configlab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "own.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "configlab.own"
    for name in [name for name in sys.modules if name.split(".")[0] == "configlab"]:
        del sys.modules[name]


def test_a_method_of_ones_own_inherits_settings_and_adds_some(lab):
    config = at({"method": {"name": lab, "needed": 3, "scale_lr": 0.5}})
    assert config.method.settings == {
        "needed": 3,
        "stages": [1, 2],
        "names": [],
        "per_channel": False,
        "symmetric": False,
        "scale_lr": 0.5,
    }
    assert parse(config.tree()) == config
    assert set(resolve_bits(config, layer_table(config))) == set(LENET_LAYERS)


def test_a_required_setting_that_is_missing_is_a_fault(lab):
    with pytest.raises(ConfigError, match="method/needed is missing: it has no default"):
        at({"method": lab})
    assert settings_of("method", lab)["scale_lr"][1:] == (1.0, "learning rate of scales over that of weights")


def test_a_model_of_ones_own_has_its_keyword_only_parameters_as_settings(lab):
    config = at({"model": {"name": lab, "hidden": 6}})
    assert config.model.settings == {"hidden": 6}
    assert {row.name: row.weights for row in layer_table(config).layers} == {"1": 64 * 6, "3": 60}


def test_a_factory_may_take_the_number_of_classes_as_a_keyword(lab):
    config = at({"model": {"name": f"{lab}:by_keyword", "hidden": 5}})
    assert config.model.settings == {"hidden": 5}
    assert build_model(config, 10, (1, 8, 8), seed=0)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_factory_of_another_library_works_by_its_path():
    config = at({"model": "torchvision.models:shufflenet_v2_x0_5", "data": "cifar10"})
    assert parse(config.tree()) == config
    table = layer_table(config)
    assert len(table.layers) == 57
    assert table.layers[-1].channels == 10
    assert set(resolve_bits(config, table)) == {row.name for row in table.layers}


def test_a_factory_that_makes_no_module_or_lacks_a_setting_is_an_error(lab):
    with pytest.raises(PluginError, match=r"model 'configlab\.own:not_a_module' made a int"):
        build_model(at({"model": f"{lab}:not_a_module"}), 10, (1, 8, 8), seed=0)
    with pytest.raises(ConfigError, match="model/width is missing: it has no default"):
        at({"model": f"{lab}:strict"})


def test_building_a_model_draws_from_its_seed_and_not_from_the_global_state():
    config = parse(BASE)
    before = torch.get_rng_state()
    a, b, c = (build_model(config, 10, (1, 8, 8), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_a_model_that_does_not_take_the_images_is_an_error():
    with pytest.raises(ConfigError, match=r"model 'torchvision\.models:squeezenet1_1' does not accept 'digits' images"):
        layer_table(at({"model": "torchvision.models:squeezenet1_1"}))


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
def test_the_shape_of_a_data_set_is_known_without_loading_it(data):
    classes, shape = data_shape(at({"data": data}))
    assert classes == 10
    assert math.prod(shape) in (64, 784, 3072)


@pytest.mark.parametrize("kind", ["method", "model", "data"])
def test_settings_are_listed_with_their_types_defaults_and_texts(kind):
    for name in plugins.describe(
        {"method": "trainables.methods", "model": "trainables.models"}.get(kind, "trainables.data")
    ):
        tree = at({kind: {"name": name}}).tree()[kind]
        defaults = {key: default for key, (_, default, _) in settings_of(kind, name).items()}
        assert json.loads(json.dumps(defaults)) == {key: value for key, value in tree.items() if key != "name"}


def test_replacing_a_part_of_a_config_gives_a_new_one():
    config = parse(BASE)
    assert replace(config, seed=3) != config


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_method_whose_widths_are_given_has_none_to_fix(epochs):
    with pytest.raises(ConfigError, match=f"training/finetune_epochs = {epochs}: method 'lsq' learns no widths"):
        widths({"training/finetune_epochs": epochs, "training/epochs": 4})
