"""Gates: when they are open, what they cost, and batch norm behind them."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.trainables.gated_networks import images, network, prepared
from trainables import modules
from trainables.methods import _gated_norm as gated_norm
from trainables.methods._gated_rounding import LEVELS
from trainables.methods._gates import OFF_BELOW, OPEN_ABOVE, GatedQuantizer, hard_concrete, penalties, probability_open

logits = st.floats(-8, 8)


@given(logit=logits)
def test_the_gate_of_tests_is_open_when_it_is_zero_with_a_probability_below_a_third(logit):
    closed = 1 - float(probability_open(torch.tensor(logit, dtype=torch.float64)))
    assert (logit > OPEN_ABOVE) == (closed < 0.34) or closed == pytest.approx(0.34, abs=1e-12)


@given(logit=st.floats(-3, 3))
def test_as_many_drawn_gates_are_zero_as_the_probability_says(logit):
    drawn = hard_concrete(torch.full((4000,), logit), torch.rand(4000, generator=torch.Generator().manual_seed(1)))
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    open_share = float((drawn > 0).float().mean())
    assert open_share == pytest.approx(float(probability_open(torch.tensor(logit))), abs=0.04)


@given(initial=st.lists(logits, min_size=4, max_size=4))
def test_the_width_doubles_with_each_open_gate_up_to_the_first_closed_one(initial):
    quantizer = GatedQuantizer(signed=True, gate_init=initial)
    expected = 2
    for logit in initial:
        if logit <= OPEN_ABOVE:
            break
        expected *= 2
    assert quantizer.bits == expected
    assert float(quantizer.q_max) == pytest.approx(2 ** (expected - 1) - 1)


@given(initial=st.lists(st.floats(-4, 4), min_size=4, max_size=4))
def test_a_level_below_the_cut_off_closes_itself_and_all_above_in_training_too(initial):
    quantizer = GatedQuantizer(signed=True, gate_init=initial).train()
    gates = quantizer.gates()
    off = next((index for index, logit in enumerate(initial) if logit <= OFF_BELOW), 4)
    assert bool((gates[off:] == 0).all())


@given(initial=st.lists(st.floats(-1.9, 4), min_size=4, max_size=4), share=st.floats(0.01, 1))
def test_the_penalty_is_the_expected_cost_of_the_open_levels(initial, share):
    quantizer = GatedQuantizer(signed=True, gate_init=initial, channels=5, macs_share=share).double()
    q = probability_open(quantizer.gate_logits.detach()).tolist()
    keep = float(probability_open(quantizer.pruning_logits.detach()).mean())
    reached = [keep * math.prod(q[:count]) for count in range(5)]
    expected = share * sum(level * chance for level, chance in zip(LEVELS, reached, strict=True))
    assert penalties([quantizer]).item() == pytest.approx(expected, rel=1e-6)


@given(initial=st.lists(logits, min_size=4, max_size=4), level=st.integers(0, 3), raised=st.floats(0.1, 3))
def test_the_penalty_grows_with_every_logit(initial, level, raised):
    higher = [logit + raised * (index == level) for index, logit in enumerate(initial)]
    both = [GatedQuantizer(signed=True, gate_init=logits, macs_share=0.5) for logits in (initial, higher)]
    low, high = (penalties([quantizer]).item() for quantizer in both)
    assert high >= low


def test_a_fixed_width_has_no_other_and_a_learned_one_takes_the_levels():
    with pytest.raises(ValueError, match=r"bits = 3: this quantizer takes 2, 4, 8, 16, 32"):
        GatedQuantizer(signed=True).set_bits(3)
    with pytest.raises(ValueError, match=r"bits = 4: this quantizer takes 8"):
        GatedQuantizer(signed=True, bits=8).set_bits(4)


@pytest.mark.parametrize("bits", LEVELS)
def test_set_bits_opens_the_gates_to_a_width(bits):
    quantizer = GatedQuantizer(signed=False)
    quantizer.set_bits(bits)
    assert quantizer.bits == bits
    assert float(quantizer.q_max) == pytest.approx(2**bits - 1)


def normed(kind: str, gate_logit: float) -> tuple[nn.Sequential, nn.Sequential]:
    """The same convolution and batch norm twice: as they are, and with gates that are all alike; unquantized."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
    plain[1].weight.data.uniform_(0.5, 1.5)
    plain[1].bias.data.uniform_(-1, 1)
    other = copy.deepcopy(plain)
    quantizer = GatedQuantizer(signed=True, channels=6, bits=32, prunes=kind == "folded")
    quantizer.pruning_logits.data.fill_(gate_logit)
    quantizer.frozen = True  # gates as in tests, statistics as in training
    if kind == "folded":
        return plain, nn.Sequential(*gated_norm.folded(other[0], other[1], quantizer, None))
    layer = modules.QuantizedConv2d(other[0], quantizer, None)
    return plain, nn.Sequential(layer, gated_norm.GatedNorm.behind(layer, other[1]))


@pytest.mark.parametrize("kind", ["gated", "folded"])
@pytest.mark.parametrize("training", [True, False])
def test_with_open_gates_and_no_rounding_both_norms_are_batch_norm(kind, training):
    plain, gated = normed(kind, 6.0)
    for seed in range(3):
        plain.train(), gated.train()
        plain(images(4, (3, 8, 8), seed)), gated(images(4, (3, 8, 8), seed))
    x = images(4, (3, 8, 8), 9)
    torch.testing.assert_close(gated.train(training)(x), plain.train(training)(x), rtol=1e-4, atol=1e-5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(gated[1], name), getattr(plain[1], name))


@pytest.mark.parametrize("kind", ["gated", "folded"])
def test_a_pruned_channel_is_constant_and_its_statistics_go_on(kind):
    plain, gated = normed(kind, -6.0)
    x = images(4, (3, 8, 8))
    y = gated.train()(x)
    plain.train()(x)
    assert float(y.detach().std(dim=(0, 2, 3)).max()) < 1e-6
    torch.testing.assert_close(gated[1].running_var, plain[1].running_var)
    if kind == "gated":
        torch.testing.assert_close(y.mean(dim=(0, 2, 3)), gated[1].bias)


def test_gates_behind_the_norm_feel_the_loss_and_gates_before_it_would_not():
    torch.manual_seed(0)
    model, table = network("vgg7", width=0.05)
    method = prepared(model, table, penalty_strength=0.0)
    method.calibrate(model, images(4, (3, 32, 32)))
    quantizer = model.conv2.weight_quantizer
    quantizer.pruning_logits.data.zero_()  # gates between 0 and 1
    (loss,) = method.losses(model.train(), images(8, (3, 32, 32)), torch.arange(8))
    loss.backward()
    assert quantizer.pruning_logits.grad.abs().max() > 1e-5
