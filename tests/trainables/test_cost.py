"""The cost convention: its laws, and the figures of papers under their own conventions."""

import functools
import importlib
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden_vectors import cases, index, load
from trainables.cost import (
    HEADER_BYTES,
    Bits,
    Layer,
    LayerBits,
    LayerTable,
    bops,
    payload_bytes,
    relative_bops,
    size_bytes,
    uniform,
)
from trainables.layers import trace

MIB = 2**20

widths = st.integers(0, 32)
counts = st.integers(1, 10**6)
bits_of_a_layer = st.builds(LayerBits, weight=widths, activation=widths)


@st.composite
def tables(draw: st.DrawFn) -> LayerTable:
    """Tables of one to five layers, the first and last marked, some not quantizable."""
    count = draw(st.integers(1, 5))
    layers = [
        Layer(
            name=f"layer{i}",
            kind="conv",
            macs=draw(counts),
            weights=draw(counts),
            biases=draw(st.integers(0, 100)),
            channels=1,
            first=i == 0,
            last=i == count - 1,
            quantizable=draw(st.booleans()),
        )
        for i in range(count)
    ]
    return LayerTable(
        layers=tuple(layers), norm_channels=draw(st.integers(0, 9)), other_parameters=draw(st.integers(0, 9))
    )


@st.composite
def tables_with_bits(draw: st.DrawFn) -> tuple[LayerTable, Bits]:
    table = draw(tables())
    return table, {layer.name: draw(bits_of_a_layer) for layer in table.quantizable}


@functools.cache
def table_of(model: str, **fields: object) -> LayerTable:
    module = importlib.import_module(f"trainables.models.{model}")
    return trace(module.build(module.CLASSES, module.INPUT_SHAPE, **fields), module.INPUT_SHAPE)


def alone(layer: Layer) -> LayerTable:
    return LayerTable(layers=(layer,))


@given(tables())
def test_float_networks_cost_1024_bops_a_mac_and_are_100_percent(table):
    wide = {layer.name: LayerBits(weight=32, activation=32) for layer in table.quantizable}
    assert bops(table, {}) == bops(table, wide) == 1024 * table.macs
    assert relative_bops(table, {}) == relative_bops(table, wide) == 1


@given(tables_with_bits())
def test_bops_add_up_over_layers_and_size_over_layers_and_the_rest(table_and_bits):
    table, bits = table_and_bits
    assert bops(table, bits) == sum(bops(alone(layer), bits) for layer in table.layers)
    rest = 8 * table.norm_channels + 4 * table.other_parameters
    assert payload_bytes(table, bits) == sum(payload_bytes(alone(layer), bits) for layer in table.layers) + rest


@given(tables_with_bits(), st.data())
def test_no_narrower_layer_costs_more_bops_or_bytes(table_and_bits, data):
    table, bits = table_and_bits
    narrower = {
        name: LayerBits(
            weight=data.draw(st.integers(0, width.weight)), activation=data.draw(st.integers(0, width.activation))
        )
        for name, width in bits.items()
    }
    assert bops(table, narrower) <= bops(table, bits) <= bops(table, {})
    assert payload_bytes(table, narrower) <= payload_bytes(table, bits)
    assert 0 <= relative_bops(table, narrower) <= relative_bops(table, bits) <= 1


@given(tables(), st.integers(1, 32), st.integers(1, 32))
def test_a_layer_costs_its_macs_times_both_widths(table, weight, activation):
    layer = replace(table.layers[0], quantizable=True)
    assert (
        bops(alone(layer), {layer.name: LayerBits(weight=weight, activation=activation)})
        == layer.macs * weight * activation
    )


def test_the_size_is_codes_scales_biases_and_batch_norm():
    first = Layer(name="a", kind="conv", macs=9, weights=27, biases=0, channels=3, first=True)
    last = Layer(name="b", kind="linear", macs=9, weights=30, biases=10, channels=10, last=True)
    table = LayerTable(layers=(first, last), norm_channels=3, other_parameters=2)
    bits = {"a": LayerBits(weight=3, activation=8), "b": LayerBits(weight=4, activation=4)}
    codes, scales, biases, norms, others = 11 + 15, 4 + 8, 40, 24, 8  # 27 x 3 bits are 10 bytes and a bit
    assert payload_bytes(table, bits) == codes + scales + biases + norms + others
    assert payload_bytes(table, bits, extra_floats=0) == codes + biases + norms + others
    assert payload_bytes(table, {}) == 4 * (27 + 30 + 10 + 2) + 24
    assert size_bytes(table, bits) == payload_bytes(table, bits) + HEADER_BYTES


def test_a_pruned_layer_stores_and_computes_nothing_but_its_scales():
    layer = Layer(name="a", kind="conv", macs=9, weights=27, biases=0, channels=3)
    assert bops(alone(layer), {"a": LayerBits(weight=0, activation=8)}) == 0
    assert payload_bytes(alone(layer), {"a": LayerBits(weight=0, activation=8)}) == 8


@given(tables(), st.integers(1, 8), st.integers(1, 8), st.none() | st.integers(2, 8))
def test_uniform_widths_spare_the_ends_and_the_input(table, weight, activation, ends):
    bits = uniform(table, weight, activation, ends=ends)
    assert set(bits) == {layer.name for layer in table.quantizable}
    for layer in table.quantizable:
        end = ends is not None and (layer.first or layer.last)
        assert bits[layer.name].weight == (ends if end else weight)
        assert bits[layer.name].activation == (8 if layer.first else ends if end else activation)


# HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), table 1, ResNet-18. BOPs as ours; the first and last layer have 8 bits.


@pytest.mark.parametrize(("bits", "gbops"), [(32, "1858"), (8, "116"), (4, "34.7")])
def test_resnet_18_has_the_bops_of_hawq_v3(bits, gbops):
    table = table_of("resnet18")
    billions = bops(table, {} if bits == 32 else uniform(table, bits, bits, ends=8)) / 1e9
    assert f"{billions:.{len(gbops.partition('.')[2])}f}" == gbops


@pytest.mark.parametrize(("bits", "mib"), [(32, "44.6"), (8, "11.1"), (4, "5.8")])
def test_resnet_18_has_the_size_of_hawq_v3_which_counts_every_parameter_at_the_networks_bits(bits, mib):
    table = table_of("resnet18")
    layers = (replace(layer, weights=layer.weights + layer.biases, biases=0) for layer in table.layers)
    norms = Layer(name="norms", kind="conv", macs=0, weights=2 * table.norm_channels, biases=0, channels=0)
    theirs = LayerTable(layers=(*layers, norms))
    assert sum(layer.weights for layer in theirs.layers) == 11_689_512
    size = payload_bytes(theirs, uniform(theirs, bits, bits, ends=max(bits, 8)), extra_floats=0)
    assert f"{size / MIB:.1f}" == mib


# Bayesian Bits (van Baalen et al. 2020): BOPs as ours, times the share of channels kept on both sides of a layer.

BAYESIAN_BITS = {"lenet5": "lenet5", "vgg7": "vgg7", "resnet18": "resnet18", "mobilenetv2": "mobilenet_v2"}
RESNET_STAGE = re.compile(r"features\.(\d)\.(\d)\.(?:features\.(\d)|(downsample\.0))")


def our_name(network: str, theirs: str) -> str:
    """Our name of the layer that the released code calls `theirs`."""
    table = table_of(BAYESIAN_BITS[network])
    stage = RESNET_STAGE.fullmatch(theirs)
    if network == "resnet18" and stage:
        part = stage[4] or f"conv{int(stage[3]) + 1}"
        return f"layer{int(stage[1]) - 1}.{stage[2]}.{part}"
    if network == "resnet18":
        return {"features.0": "conv1", "fc": "fc"}[theirs]
    order = list(index("bayesian_bits")["networks"][network]["macs_per_layer"])
    return table.layers[order.index(theirs)].name


@pytest.mark.parametrize("network", BAYESIAN_BITS)
def test_layers_have_the_macs_of_bayesian_bits(network):
    published = index("bayesian_bits")["networks"][network]["macs_per_layer"]
    table = table_of(BAYESIAN_BITS[network])
    assert {layer.name: layer.macs for layer in table.layers} == {
        our_name(network, theirs): macs for theirs, macs in published.items()
    }


@pytest.mark.parametrize(
    ("settings", "arrays"), [pytest.param(s, a, id=name) for name, s, a in cases("bayesian_bits", "bops.npz")]
)
def test_relative_bops_are_those_of_bayesian_bits(settings, arrays):
    network = settings["network"]
    table = table_of(BAYESIAN_BITS[network])
    weight_bits = dict(zip(settings["weights"], arrays["weight_bits"].tolist(), strict=True))
    keep = dict(zip(settings["weights"], arrays["keep"].tolist(), strict=True))
    activation_bits = dict(zip(settings["activations"], arrays["act_bits"].tolist(), strict=True))
    total = 0.0
    for group in index("bayesian_bits")["networks"][network]["groups"]:
        for weight in group["weights"]:
            layer = table[our_name(network, weight.removesuffix(".weight_quantizer"))]
            activation = 8 if layer.first else activation_bits[group["activation"]]
            bits = {layer.name: LayerBits(weight=weight_bits[weight], activation=activation)}
            total += keep[weight] * bops(alone(layer), bits)
    np.testing.assert_allclose(100 * total / bops(table, {}), arrays["rel_bops_percent"], rtol=1e-9)


def uniform_cases() -> list[object]:
    """The cases without pruned channels whose weights all have one width, and whose activations do."""
    return [
        pytest.param(settings["network"], arrays, id=name)
        for name, settings, arrays in cases("bayesian_bits", "bops.npz")
        if arrays["keep"].min() == 1 and len({*arrays["weight_bits"]}) == len({*arrays["act_bits"]}) == 1
    ]


@pytest.mark.parametrize(("network", "arrays"), uniform_cases())
def test_uniform_relative_bops_are_those_of_bayesian_bits_as_they_stand(network, arrays):
    table = table_of(BAYESIAN_BITS[network])
    bits = uniform(table, int(arrays["weight_bits"][0]), int(arrays["act_bits"][0]), ends=None)
    np.testing.assert_allclose(100 * relative_bops(table, bits), arrays["rel_bops_percent"], rtol=1e-9)


# AdaBits (Jin et al. 2020, arXiv:1912.09666), the profiler of the released code. It differs from ours: the input of the
# first layer counts 32 bits, global pooling one 32 x 32 product for each value it reads, batch norm is not stored, and
# there is one clip level for each layer and width. First and last layer have the widest bits of the network, or 8.


def profiles() -> list[object]:
    """The totals of the networks that are also ours: ResNet-20 and -56, MobileNetV2."""
    entry, arrays = load("adabits", "profiling.npz")
    labels = entry["arrays"]["totals"]["settings"]["rows"]
    rows = zip(labels, arrays["totals"], strict=True)
    return [
        pytest.param(label, total, id=label) for label, total in rows if re.match(r"resnet\d|mobilenet-v2 224", label)
    ]


@pytest.mark.parametrize(("label", "total"), profiles())
def test_macs_bops_and_size_are_those_of_adabits_under_its_convention(label, total):
    network, width = label.split()[0], re.search(r"(\d+)(-bit| bits)", label)
    bits = 32 if "full precision" in label else int(width[1])
    adaptive = re.search(r"adaptive \[([\d,]+)\]", label)
    trained = [int(one) for one in adaptive[1].split(",")] if adaptive else [bits]
    if network == "mobilenet-v2":
        table, pooled, ends = table_of("mobilenet_v2"), 1280 * 7 * 7, max(8, bits)
    else:
        table, pooled, ends = table_of("resnet20", depth=int(network[6:])), 64 * 8 * 8, max(trained)
    widths = {
        layer.name: LayerBits(
            weight=ends if layer.first or layer.last else bits, activation=32 if layer.first else bits
        )
        for layer in table.layers
    }
    clip_levels = len(trained) * len(table.layers)
    found = (
        table.macs + pooled,
        sum(layer.weights + layer.biases for layer in table.layers),
        (bops(table, widths) + 1024 * pooled) / 1e9,
        payload_bytes(replace(table, norm_channels=0), widths, extra_floats=clip_levels) / 1e6,
    )
    np.testing.assert_allclose(found, total, rtol=1e-9)


def test_each_layer_of_resnet_20_has_the_macs_and_weights_of_adabits():
    entry, arrays = load("adabits", "profiling.npz")
    names = entry["arrays"]["per_layer"]["settings"]["rows"]
    kept = [
        row for name, row in zip(names, arrays["per_layer"], strict=True) if ".bn." not in name and name != "avgpool"
    ]
    ours = [(layer.macs, layer.weights + layer.biases) for layer in table_of("resnet20").layers]
    assert ours == [(int(macs), int(parameters)) for macs, parameters, _, _ in kept]


@given(st.floats(0, 1), st.floats(0, 1))
def test_pruned_channels_cost_neither_operations_nor_weights(outputs, inputs):
    layer = Layer(name="conv", kind="conv", macs=1000, weights=160, biases=16, channels=16)
    table = LayerTable(layers=(layer,))
    bits = {"conv": LayerBits(weight=4, activation=2)}
    left = {"output_share": {"conv": outputs}}
    assert bops(table, bits, **left, input_share={"conv": inputs}) == round(8000 * outputs * inputs)
    mask = 2 if outputs < 1 else 0
    assert payload_bytes(table, bits, extra_floats=0, **left) == (round(160 * outputs) * 4 + 7) // 8 + 64 + mask
