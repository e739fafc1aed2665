"""Configurations from values at their addresses, for tests."""

from typing import Any

from hypothesis import strategies as st

from trainables.build import layer_table
from trainables.config import TrialConfig, digest, merged, parse
from trainables.cost import LayerBits
from trainables.layer_bits import resolve_bits

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
