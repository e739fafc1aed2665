"""Widths of layers: by name, by pattern, by default; and those that cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainables.configs import BASE, RESNET, widths
from trainables.cost import INPUT_BITS, LayerBits
from trainables.errors import ConfigError
from trainables.layer_bits import DEFAULT_BITS, ENDS_BITS


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


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_a_method_whose_widths_are_given_has_none_to_fix(epochs):
    with pytest.raises(ConfigError, match=f"training/finetune_epochs = {epochs}: method 'lsq' learns no widths"):
        widths({"training/finetune_epochs": epochs, "training/epochs": 4})
