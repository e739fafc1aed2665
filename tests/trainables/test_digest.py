"""The digest of a configuration tells computations apart, and nothing else."""

from typing import Any

import pytest
from hypothesis import given

from tests.trainables.configs import BASE, bit_trees, digest_of, widths
from trainables.build import layer_table
from trainables.config import digest, parse
from trainables.layer_bits import resolve_bits


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
