"""The configuration: addresses, its trip through JSON, and all faults at once."""

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given

from tests.trainables.configs import BASE, addresses, at
from trainables.config import merged, parse
from trainables.errors import ConfigError, PluginError


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


@given(values=addresses)
def test_a_config_survives_the_trip_through_its_tree_and_json(values):
    base = {**BASE, "model": {"name": "lenet5"}}
    config = at(values, base)
    assert parse(json.loads(json.dumps(config.tree()))) == config


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


def test_replacing_a_part_of_a_config_gives_a_new_one():
    config = parse(BASE)
    assert replace(config, seed=3) != config
