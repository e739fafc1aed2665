"""SAT and AdaBits against golden arrays: the cost of whole networks, and learning rates."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.golden_vectors import Arrays, load
from tests.trainables.golden_adabits import FILES, METHOD, Settings, settings_of, tolerance
from trainables.config import Optimizer
from trainables.cost import FLOAT_BITS, LayerBits, bops, payload_bytes
from trainables.layers import trace
from trainables.methods import adabits
from trainables.methods._sat_as_published import published_rates
from trainables.models import mobilenet_v1, mobilenet_v2, resnet20
from trainables.optimizers import Optimizers


def network(label: str) -> tuple[nn.Module, tuple[int, int, int], int, int | None]:
    """Model, input shape, elements that the last pooling reads, and width of the ends (None: the highest)."""
    if found := re.match(r"resnet(\d+)", label):
        return resnet20.build(10, (3, 32, 32), depth=int(found[1])), (3, 32, 32), 64 * 8 * 8, None
    if label.startswith("mobilenet-v1"):
        return mobilenet_v1.build(1000, (3, 224, 224)), (3, 224, 224), 1024 * 7 * 7, 8
    return mobilenet_v2.build(1000, (3, 224, 224)), (3, 224, 224), 1280 * 7 * 7, 8


def profiled(label: str, bits: int, widths: list[int]) -> tuple[Any, dict[str, LayerBits], int]:
    """Layer table, widths of the layers at `bits` as our method has them, and pooled elements."""
    model, shape, pooled, ends = network(label)
    table = trace(model, shape)
    method = adabits.Method(adabits.Method.Settings(widths=",".join(map(str, widths)), ends_bits=ends))
    method.prepare(model, table, {})
    ours = method.bits_at(bits)
    first = table.layers[0].name  # where the published count takes 32 bits for the pixels
    return table, {**ours, first: LayerBits(weight=ours[first].weight, activation=FLOAT_BITS)}, pooled


LABELS = settings_of("profiling.npz", "totals")["rows"]


@pytest.mark.parametrize("label", LABELS)
def test_the_cost_of_every_network_is_the_published_one_under_its_convention(label):
    """Batch norm left out, pooling counted at 32 x 32 bits, a clip level for each layer and trained width."""
    found = re.search(r"(\d+)(-bit| bits)", label.split(" ", 1)[1])
    bits = FLOAT_BITS if "full precision" in label or found is None else int(found[1])
    listed = re.search(r"adaptive \[([\d,]+)\]", label)
    widths = [int(width) for width in listed[1].split(",")] if listed else [bits]
    table, ours, pooled = profiled(label, bits, widths)
    counted = (
        table.macs + pooled,
        sum(layer.weights + layer.biases for layer in table.layers),
        (bops(table, ours) + FLOAT_BITS**2 * pooled) / 1e9,
        (payload_bytes(table, ours, extra_floats=len(widths) * len(table.layers)) - 8 * table.norm_channels) / 1e6,
    )
    np.testing.assert_allclose(
        counted, load(METHOD, "profiling.npz")[1]["totals"][LABELS.index(label)], rtol=tolerance("profiling.npz")
    )


def test_the_cost_of_every_layer_is_the_published_one():
    axes, arrays = settings_of("profiling.npz", "per_layer"), load(METHOD, "profiling.npz")[1]
    text = FILES["profiling.npz"]["arrays"]["per_layer"]["meaning"]
    found = re.search(r"for: ((\S+) adaptive \[([\d,]+)\] running at (\d+) bits)", text)
    assert found is not None
    widths, bits = [int(width) for width in found[3].split(",")], int(found[4])
    table, ours, pooled = profiled(found[1], bits, widths)
    rows = [
        (
            layer.macs,
            layer.weights + layer.biases,
            layer.macs * ours[layer.name].weight * ours[layer.name].activation / 1e9,
            (layer.weights * ours[layer.name].weight / 8 + 4 * layer.biases + 4 * len(widths)) / 1e6,
        )
        for layer in table.layers
    ]
    rows.insert(-1, (pooled, 0, FLOAT_BITS**2 * pooled / 1e9, 0))
    kept = [i for i, name in enumerate(axes["rows"]) if ".bn." not in name]
    np.testing.assert_allclose(rows, arrays["per_layer"][kept], rtol=tolerance("profiling.npz"))


SCHEDULES = {"cos_annealing_iter": "cosine", "exp_decaying_iter": "exponential", "multistep": "multistep"}


def rates(arrays: Arrays, name: str) -> tuple[Settings, np.ndarray]:
    return settings_of("schedules.npz", name), arrays[name]


@pytest.mark.parametrize("name", FILES["schedules.npz"]["arrays"])
def test_learning_rates_are_the_published_ones(name):
    given, wanted = rates(load(METHOD, "schedules.npz")[1], name)
    found = published_rates(
        SCHEDULES[given["lr_scheduler"]],
        lr=given["base_lr_in_config"],
        batch_size=given["batch_size"],
        epochs=given["num_epochs"],
        steps_per_epoch=given["iterations_per_epoch"] or 1,
        milestones=given.get("milestones", ()),
        gamma=given.get("gamma", 0.1),
    )
    np.testing.assert_allclose(found, wanted, rtol=tolerance("schedules.npz"), atol=1e-15)


@pytest.mark.parametrize("name", FILES["schedules.npz"]["arrays"])
def test_the_platforms_own_schedules_give_the_published_rates_where_it_has_them(name):
    given, wanted = rates(load(METHOD, "schedules.npz")[1], name)
    if given["batch_size"] > 256 or given["lr_scheduler"] == "exp_decaying_iter":
        assert SCHEDULES[given["lr_scheduler"]] in ("cosine", "exponential")  # a rise, or a decay, that we do not have
        return
    shares = tuple(epoch / given["num_epochs"] for epoch in given.get("milestones", ()))
    schedule = "steps" if given["lr_scheduler"] == "multistep" else "cosine"
    settings = Optimizer(lr=given["base_lr_in_config"], schedule=schedule, milestones=shares)
    optimizers = Optimizers([{"params": [nn.Parameter(torch.zeros(()))]}], settings)
    found = []
    for step in range(len(wanted)):
        optimizers.set_rates(step, len(wanted))
        found += [group["lr"] for group in optimizers.groups]
    np.testing.assert_allclose(found, wanted, rtol=tolerance("schedules.npz"), atol=1e-15)
