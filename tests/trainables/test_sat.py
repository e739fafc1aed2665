"""SAT's kernels and quantizers: laws of the three schemes, gradients against plain formulas, what the method adds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from trainables import modules
from trainables.config import Optimizer, merged, parse
from trainables.cost import LayerBits, uniform
from trainables.errors import ConfigError
from trainables.fit import Session, fit
from trainables.layers import trace
from trainables.methods import _sat_kernels as sat_kernels
from trainables.methods._sat_as_published import evaluation_as_published, published_rates
from trainables.methods._sat_kernels import FLOAT_CODES, SCHEMES, calibrated_clip, normalise, round_weight, unit_levels
from trainables.methods._sat_quantizers import SatClip, SatWeight
from trainables.methods.sat import CLIP_INIT, Method
from trainables.models import lenet5, mobilenet_v1, resnet20
from trainables.optimizers import learning_rate_factor

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
widths = st.integers(1, 8)
units = hnp.arrays("float64", st.integers(1, 30), elements=st.floats(0, 1)).map(torch.from_numpy)
reals = hnp.arrays("float64", st.tuples(st.integers(2, 5), st.integers(1, 6)), elements=st.floats(-3, 3, width=32)).map(
    torch.from_numpy
)


def normalised_weight(w: Tensor, q_max: Tensor, target: Tensor | None, *, scheme: sat_kernels.Scheme) -> Tensor:
    return round_weight(normalise(w), q_max, target, scheme=scheme)


def codes(bits: int) -> Tensor:
    return torch.tensor(2.0**bits - 1, dtype=torch.float64)


@pytest.fixture(params=["by number", "by tensor"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of a CPU, and the one of an accelerator, which reads no number back."""
    if request.param == "by tensor":
        monkeypatch.setattr(sat_kernels, "by_number", lambda x: False)
    return request.param


# ---------------------------------------------------------------------------------------------------------------------
# Levels


@every_scheme
@given(x=units, bits=widths)
def test_levels_are_at_most_two_to_the_bits_and_rounding_them_again_changes_nothing(scheme, x, bits):
    y = unit_levels(x, codes(bits), scheme=scheme)
    assert len(y.unique()) <= 2**bits
    assert torch.equal(unit_levels(y, codes(bits), scheme=scheme), y)


@pytest.mark.parametrize(
    ("scheme", "error"),
    [("original", lambda b: 0.5 / (2**b - 1)), ("modified", lambda b: 0.5**b), ("centered", lambda b: 0.5 ** (b + 1))],
)
@given(x=units, bits=widths)
def test_the_error_is_bounded_by_the_distance_of_the_levels(scheme, error, x, bits):
    assert float((unit_levels(x, codes(bits), scheme=scheme) - x).abs().max()) <= error(bits) * (1 + 1e-12)


@pytest.mark.parametrize(("scheme", "offset"), [("modified", 0.0), ("centered", 0.5)])
@given(x=units, bits=widths)
def test_the_codes_of_fewer_bits_are_the_first_bits_of_those_of_eight(scheme, offset, x, bits):
    eight = (unit_levels(x, codes(8), scheme=scheme) * 2**8 - offset).long()
    few = (unit_levels(x, codes(bits), scheme=scheme) * 2**bits - offset).long()
    assert torch.equal(eight >> (8 - bits), few)


@pytest.mark.parametrize(
    ("scheme", "bits", "levels"),
    [
        ("original", 1, [-1, 1]),
        ("modified", 1, [-1, 0]),
        ("centered", 1, [-1 / 2, 1 / 2]),
        ("original", 2, [-1, -1 / 3, 1 / 3, 1]),
        ("modified", 2, [-1, -1 / 2, 0, 1 / 2]),
        ("centered", 2, [-3 / 4, -1 / 4, 1 / 4, 3 / 4]),
    ],
)
def test_the_levels_of_weights_are_those_of_the_papers_page(scheme, bits, levels, path):
    w = torch.linspace(-1, 1, 101, dtype=torch.float64)
    found = normalised_weight(w, codes(bits), None, scheme=scheme).unique()
    torch.testing.assert_close(found, torch.tensor(levels, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@given(w=reals, bits=widths, scheme=st.sampled_from(SCHEMES), target=st.sampled_from([0.01, 1.0, 3.0]))
def test_rescaled_weights_have_the_spread_asked_for_and_else_stay_within_one(w, bits, scheme, target):
    plain = normalised_weight(w, codes(bits), None, scheme=scheme)
    scaled = normalised_weight(w, codes(bits), torch.tensor(target, dtype=torch.float64), scheme=scheme)
    assert float(plain.abs().max()) <= 1
    if float(plain.std()) > 1e-9:
        assert float(scaled.std()) == pytest.approx(target, rel=1e-9)
    else:
        assert torch.equal(scaled, plain)  # no scale spreads equal weights


def test_the_gradient_of_float_weights_is_that_of_the_formula(path):
    w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w: normalised_weight(w, torch.tensor(FLOAT_CODES), None, scheme="modified"), w
    )


@every_scheme
@pytest.mark.parametrize("target", [None, 0.3])
@given(w=reals, bits=widths)
def test_the_gradient_of_weights_is_that_of_the_plain_formula_with_the_rounding_left_out(scheme, target, w, bits):
    if float(w.abs().max()) < 1e-3:
        return
    g = torch.linspace(-1, 1, w.numel(), dtype=torch.float64).reshape(w.shape)
    given_w, plain_w = w.clone().requires_grad_(), w.clone().requires_grad_()
    aim = None if target is None else torch.tensor(target, dtype=torch.float64)
    y = normalised_weight(given_w, codes(bits), aim, scheme=scheme)
    y.backward(g)
    t = plain_w.tanh()
    plain = normalised_weight(w, codes(bits), None, scheme=scheme)
    spread = float(plain.std())
    factor = 1.0 if target is None or spread == 0 else target / spread
    (factor * t / t.abs().max()).backward(g)
    wanted = plain_w.grad
    torch.testing.assert_close(given_w.grad, wanted, rtol=1e-6, atol=1e-8)


def test_weights_that_tie_for_the_maximum_share_its_gradient(path):
    w = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    normalised_weight(w, codes(4), None, scheme="original").backward(torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert w.grad is not None
    assert float(w.grad[0]) == pytest.approx(-float(w.grad[1]))
    assert float(w.grad[0]) < 0


@pytest.mark.parametrize("value", [0.0, 0.3])
@every_scheme
def test_equal_weights_give_finite_weights_and_gradients(scheme, value, path):
    w = torch.full((3, 4), value, requires_grad=True)
    y = normalised_weight(w, torch.tensor(15.0), torch.tensor(0.1), scheme=scheme)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert w.grad is not None
    assert bool(w.grad.isfinite().all())


@pytest.mark.parametrize("target", ["constant", "stddev"])
def test_a_layers_target_is_that_of_its_shape_or_of_its_float_weights(target):
    w = torch.randn(6, 4, 3, 3) * 0.05
    y = SatWeight(4, scheme="centered", target=target)(w)
    assert float(y.std()) == pytest.approx((6 * 9) ** -0.5 if target == "constant" else float(w.std()), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def plain_clip(x: Tensor, clip_max: Tensor, q_max: Tensor, scheme: sat_kernels.Scheme, signed: bool) -> Tensor:
    """The formula of the paper in plain autograd, clipping included; the rounding is the identity for gradients."""
    bound = clip_max.abs()
    low = -bound if signed else torch.zeros_like(bound)
    clipped = torch.where(x >= bound, bound, torch.where(x <= low, low, x))
    unit = (clipped - low) / (bound - low)
    rounded = unit + (unit_levels(unit, q_max, scheme=scheme) - unit).detach()
    return rounded * (bound - low) + low


@every_scheme
@pytest.mark.parametrize("signed", [False, True])
@given(x=reals, clip_max=st.sampled_from([0.3, 1.0, -1.7, 40.0]), bits=widths)
def test_clipping_and_its_gradients_are_those_of_the_plain_formula(scheme, signed, x, clip_max, bits):
    """Exactly on a boundary of two codes either is right, so only values off the boundaries are compared."""
    bound = abs(clip_max)
    steps = 2**bits - 1 if scheme == "original" else 2**bits
    position = (x + (bound if signed else 0)) / (bound * (2 if signed else 1)) * steps + (
        0.5 if scheme == "original" else 0
    )
    x = torch.where((position - position.round()).abs() < 1e-6, x + 1e-3, x)
    g = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape)
    results = []
    for function in (calibrated_clip, plain_clip):
        xs = x.clone().requires_grad_()
        level = torch.tensor(clip_max, dtype=torch.float64, requires_grad=True)
        if function is plain_clip:
            y = plain_clip(xs, level, codes(bits), scheme, signed)
        else:
            y = calibrated_clip(xs, level, codes(bits), scheme=scheme, signed=signed)
        y.backward(g)
        results.append((y.detach(), xs.grad, level.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)


@every_scheme
@pytest.mark.parametrize("signed", [False, True])
def test_the_way_by_tensor_gives_what_the_way_by_number_gives(scheme, signed, monkeypatch):
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    for bits in (2, 8, 32):
        results = []
        for by_number in (True, False):
            monkeypatch.setattr(sat_kernels, "by_number", lambda x, answer=by_number: answer)
            clip = SatClip(bits, signed=signed, scheme=scheme, clip_init=1.1, clip_float=True)
            weights = SatWeight(bits, scheme=scheme, target="stddev")
            given_x = x.clone().requires_grad_()
            y, w = clip(given_x), weights(given_x)
            (y.square().sum() + w.square().sum()).backward()
            results.append((y.detach(), w.detach(), given_x.grad, clip.clip_max.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_activations_of_32_bits_pass_unless_they_are_to_be_clipped(path):
    x = torch.tensor([-1.0, 0.123, 9.0], requires_grad=True)
    free = SatClip(32, signed=False, scheme="original", clip_init=2.0)
    y = free(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(3))  # type: ignore[arg-type]
    clipped = SatClip(32, signed=False, scheme="original", clip_init=2.0, clip_float=True)(x)
    torch.testing.assert_close(clipped, torch.tensor([0.0, 0.123, 2.0]))


def test_what_is_not_a_number_is_not_hidden(path):
    y = SatClip(4, signed=False, scheme="original", clip_init=2.0)(torch.tensor([math.nan, 1.0]))
    assert y.isnan().tolist() == [True, False]


@pytest.mark.parametrize("bits", [0, 33])
def test_a_width_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match=rf"bits = {bits}: this quantizer takes 1..32"):
        SatClip(bits, signed=True, scheme="original")


@given(bits=st.integers(1, 32))
def test_a_quantizer_knows_its_width(bits):
    quantizer = SatClip(4, signed=True, scheme="original")
    quantizer.set_bits(bits)
    assert quantizer.bits == bits


# ---------------------------------------------------------------------------------------------------------------------
# The method


def prepared(model: nn.Module, shape: tuple[int, int, int], **settings: object) -> tuple[nn.Module, Method]:
    method, table = Method(Method.Settings(**settings)), trace(model, shape)  # type: ignore[arg-type]
    method.prepare(model, table, uniform(table, 4, 4))
    return model, method


def targets(model: nn.Module) -> dict[str, str | None]:
    return {name: layer.weight_quantizer.target for name, layer in modules.quantized_layers(model)}  # type: ignore[misc]


def test_linear_layers_are_rescaled_and_convolutions_where_no_batch_norm_follows():
    with_norm, _ = prepared(resnet20.build(10, (3, 8, 8), depth=8, width=4), (3, 8, 8))
    assert {name for name, target in targets(with_norm).items() if target} == {"fc"}
    without, _ = prepared(lenet5.build(10, (1, 8, 8)), (1, 8, 8))
    assert set(targets(without).values()) == {"stddev"}
    every, _ = prepared(
        resnet20.build(10, (3, 8, 8), depth=8, width=4), (3, 8, 8), rescale_conv=True, rescale_target="constant"
    )
    assert set(targets(every).values()) == {"constant"}


def test_weight_decay_spares_depthwise_weights_norms_biases_and_clip_levels():
    model, method = prepared(mobilenet_v1.build(5, (3, 32, 32), width=0.25), (3, 32, 32))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain, clips = ({names[id(p)] for p in group["params"]} for group in method.groups(model))
    assert decayed == {"conv1.weight", "fc.weight", *(f"blocks.{i}.pointwise.weight" for i in range(13))}
    assert clips == {name for name in names.values() if name.endswith("clip_max")}
    assert decayed | plain | clips == set(names.values())


def test_clip_levels_start_as_published_when_asked():
    model, method = prepared(resnet20.build(10, (3, 8, 8), depth=8, width=4), (3, 8, 8), clip_init="published")
    method.calibrate(model, torch.randn(4, 3, 8, 8))
    clips = {name.rsplit(".", 2)[0]: p.item() for name, p in model.named_parameters() if name.endswith("clip_max")}
    assert clips.pop("fc") == CLIP_INIT["linear"]
    assert set(clips.values()) == {CLIP_INIT["conv"]}


@pytest.mark.parametrize(
    ("settings", "floats"),
    [
        ({}, 9 + 1),
        ({"rescale": False}, 9),
        ({"rescale_conv": True}, 9 + 10),
        ({"rescale": False, "rescale_conv": True}, 9 + 9),
    ],
)
def test_an_export_stores_clip_levels_and_the_scales_of_rescaled_layers(settings, floats):
    model, method = prepared(resnet20.build(10, (3, 8, 8), depth=8, width=4), (3, 8, 8), **settings)
    assert method.points(model)[0].extra_floats == floats


def test_layers_of_32_bits_store_neither_clip_level_nor_scale():
    model = lenet5.build(10, (1, 8, 8))
    method, table = Method(Method.Settings()), trace(model, (1, 8, 8))
    method.prepare(model, table, {row.name: LayerBits(weight=32, activation=32) for row in table.layers})
    assert method.points(model)[0].extra_floats == 0


def test_training_and_evaluation_compute_the_same_and_the_published_evaluation_is_a_scale_apart():
    layer = nn.Linear(6, 3)
    quantized = modules.QuantizedLinear(layer, SatWeight(4, scheme="original", target="constant"), None)
    x = torch.randn(5, 6)
    ours = quantized.train()(x)
    assert torch.equal(quantized.eval()(x), ours)
    factor = quantized.weight_quantizer.factor(layer.weight)  # type: ignore[operator]
    torch.testing.assert_close(nn.functional.linear(x, *evaluation_as_published(quantized)) * factor, ours)


BASE = {
    "method": "sat",
    "model": {"name": "lenet5", "width": 0.5},
    "data": {"name": "digits"},
    "optimizer": {"lr": 0.05},
    "training": {"epochs": 4, "batch_size": 32},
    "start": {"epochs": 0},
    "bits": {"*": {"weight": 4, "activation": 4}},
}


def test_sat_learns_digits_from_scratch():
    *_, last = fit(parse(BASE))
    assert last.points[0].accuracy > 0.9


def test_a_target_without_anything_to_rescale_is_refused():
    tree = merged({**BASE, "model": "resnet20"}, {"method/rescale": False, "method/rescale_target": "constant"})
    with pytest.raises(ConfigError, match="method/rescale_target = 'constant': nothing is rescaled"):
        Session(parse(tree))


@pytest.mark.parametrize("batch", [64, 256])
def test_the_published_rates_of_small_batches_are_those_of_our_cosine(batch):
    rates = published_rates("cosine", lr=0.1, batch_size=batch, epochs=3, steps_per_epoch=4)
    ours = [0.1 * learning_rate_factor(Optimizer(), "cosine", step, 12) for step in range(12)]
    assert rates == pytest.approx(ours)


def test_large_batches_rise_from_the_rate_of_a_small_one():
    rates = published_rates("cosine", lr=0.05, batch_size=1024, epochs=10, steps_per_epoch=2)
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[10] == pytest.approx(0.2)
