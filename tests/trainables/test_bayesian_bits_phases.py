"""Phases of a training with Bayesian Bits: search, freezing, fixed widths; and the settings of both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from search_spaces.bayesian_bits import space
from tests.trainables.gated_networks import close_half, images, network, prepared
from trainables.build import layer_table
from trainables.config import merged, parse
from trainables.cost import INPUT_BITS, LayerBits
from trainables.errors import ConfigError
from trainables.fit import Report, Session, fit
from trainables.layer_bits import resolve_bits
from trainables.methods._gates import quantizers


@pytest.mark.parametrize("batch_norm", ["gated", "folded"])
def test_freezing_keeps_the_network_of_tests_and_trains_no_gate(batch_norm):
    torch.manual_seed(0)
    model, table = network("vgg7", width=0.05)
    method = prepared(model, table, batch_norm=batch_norm)
    x = images(4, (3, 32, 32))
    method.calibrate(model, x)
    model.train()(x)
    close_half(model, "conv3")
    before = model.eval()(x)
    bits = method.points(model)[0].bits
    method.freeze(model)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-3, atol=1e-4)
    assert method.points(model)[0].bits == bits
    trained = {id(p) for group in method.groups(model) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(q.gate_logits.requires_grad for q in quantizers(model))
    losses = [list(method.losses(model.train(), x, torch.arange(4))) for _ in range(2)]
    if batch_norm == "gated":
        assert losses[0][0].item() == losses[1][0].item()  # no noise, no penalty


def test_three_groups_have_their_own_optimizers_and_rates():
    model, table = network("lenet5")
    method = prepared(model, table, gate_lr=0.5, scale_lr=0.25, gate_optimizer="sgd", schedule="cosine")
    weights, gates, scales = method.groups(model)
    assert "lr" not in weights
    assert (gates["lr"], gates["optimizer"], gates["schedule"], gates["weight_decay"]) == (0.5, "sgd", "cosine", 0.0)
    assert (scales["lr"], scales["optimizer"]) == (0.25, "adam")
    sizes = [sum(p.numel() for p in group["params"]) for group in (gates, scales)]
    assert sizes == [7 * 4 + 32 + 64 + 512, 7]


def configured(**settings: Any) -> Any:
    tree = {"method": {"name": "bayesian_bits", **settings.pop("method", {})}, "model": "lenet5", "data": "digits"}
    return parse(merged(tree, settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method/gate_init/64": 6.0}, "no gate for 64 bits: the levels with a gate are 4, 8, 16, 32"),
        ({"method/gate_init/8": "open"}, "method/gate_init/8 = 'open'"),
        ({"method/gate_init": 6.0}, "method/gate_init = 6.0"),
        (
            {"method/penalty_strength": -0.1},
            "method/penalty_strength = -0.1: input should be greater than or equal to 0",
        ),
        ({"method/gate_lr": 0.0}, "method/gate_lr = 0.0: input should be greater than 0"),
        ({"method/mode": "w4a4"}, "method/mode = 'w4a4'"),
        ({"method/mu": 0.1}, "unknown address 'method/mu'"),
    ],
)
def test_a_setting_out_of_range_is_one_clear_error(settings, message):
    with pytest.raises(ConfigError) as caught:
        configured(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method/mode": "w8a8", "method/gate_init/8": 3.0},
            "method/gate_init/8 = 3: mode 'w8a8' has no gate for 8 bits; leave it out, or use mode 'full' or "
            "'quantize'",
        ),
        (
            {"method/gate_init/32": 6.0},
            "method/gate_init/32 = 6: it never opens, because level 16 is off at -6 (<= -2); raise "
            "method/gate_init/16, or lower this one",
        ),
        ({"method/batch_norm": "folded"}, "method/batch_norm = 'folded': the network has no batch norm; leave it out"),
        ({"bits/conv1/weight": 4}, "bits/conv1/weight: method 'bayesian_bits' learns its weight bits; leave it out"),
    ],
)
def test_settings_that_do_not_fit_together_are_one_clear_error(settings, message):
    config = configured(**settings)
    with pytest.raises(ConfigError) as caught:
        resolve_bits(config, layer_table(config))
    assert str(caught.value) == message


def test_quantized_sums_in_a_network_without_sums_are_an_error():
    model, table = network("lenet5")
    with pytest.raises(ConfigError, match="method/residual = 'quantized': the network has no residual sums"):
        prepared(model, table, residual="quantized")


def test_given_gate_inits_are_merged_with_the_others():
    config = configured(**{"method/gate_init/4": 1.5})
    assert config.method.settings["gate_init"] == {"4": 1.5, "8": 6.0, "16": -6.0, "32": -6.0}
    model, table = network("lenet5")
    prepared(model, table, gate_init={"4": 1.5})
    assert model.conv1.weight_quantizer.gate_logits.tolist() == [1.5, 6.0, -6.0, -6.0]


@pytest.mark.parametrize("end", ["low", "high"])
def test_the_ends_of_the_search_space_are_valid_settings(end):
    config = configured(**{address: getattr(asked, end) for address, asked in space([]).items()})
    assert set(resolve_bits(config, layer_table(config)).values()) == {
        LayerBits(weight=32, activation=INPUT_BITS),
        LayerBits(weight=32, activation=32),
    }


SHORT = {
    "method/gate_lr": 0.1,
    "method/gate_init/4": 1.0,
    "method/gate_init/8": 1.0,
    "method/penalty_strength": 0.05,
    "optimizer/name": "adam",
    "optimizer/lr": 0.003,
    "training/epochs": 4,
    "training/finetune_epochs": 1,
}


def reports(folder: Path | None = None, upto: int = 4, **more: Any) -> list[Report]:
    found = []
    for report in fit(configured(**SHORT | more), folder=folder):
        found.append(report)
        if report.epoch == upto:
            break
    return found


def told(report: Report) -> tuple[Any, ...]:
    (point,) = report.points
    return report.epoch, report.train_loss, point.accuracy, point.bops, point.size_bytes, point.bits


def test_a_short_training_learns_digits_and_narrower_widths():
    *_, last = reports()
    (point,) = last.points
    assert point.accuracy > 0.5
    assert point.relative_bops < 0.03
    assert {width for widths in point.bits.values() for width in widths} - {0, 2, 4, 8} == set()


def test_a_stronger_penalty_costs_fewer_bit_operations():
    weak, strong = (reports(**{"method/penalty_strength": mu})[-1].points[0] for mu in (1e-4, 1.0))
    assert strong.bops < weak.bops


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_trial_is_the_uninterrupted_one_also_across_freezing(stop, tmp_path):
    whole = [told(report) for report in reports()]
    first = [told(report) for report in reports(tmp_path, upto=stop)]
    again, *rest = [told(report) for report in reports(tmp_path)]
    assert [*first, *rest] == whole
    assert again == first[-1]


def test_equal_states_have_equal_points():
    config = configured(**SHORT)
    trained, fresh = Session(config), Session(config)
    for quantizer in quantizers(trained.model):
        quantizer.set_bits(4)
    close_half(trained.model, "conv2")
    fresh.model.load_state_dict(trained.model.state_dict())
    one, other = (session.method.points(session.model)[0] for session in (trained, fresh))
    assert (one.bits, one.output_share, one.input_share) == (other.bits, other.output_share, other.input_share)
