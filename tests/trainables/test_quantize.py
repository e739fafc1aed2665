"""The quantizer primitives: their laws, their gradients against plain autograd, compiled against eager kernels."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from trainables import quantize
from trainables.methods.dorefa import DorefaWeight, UnitActivation
from trainables.methods.lsq import LearnedScale
from trainables.methods.pact import LearnedClip
from trainables.modules import Quantizer

DTYPES = [torch.float32, torch.float64]


@dataclass(frozen=True)
class Kind:
    """One way to quantize: makes the quantizer, knows the width of a level and the clipping range of its formula."""

    name: str
    make: Callable[[int], Quantizer]
    lowest_bits: int = 2  # 1 where the paper has binary values

    def quantizer(self, bits: int, level: float, dtype: torch.dtype = torch.float64) -> Quantizer:
        """Of `bits`, with levels of width `level` where the formula leaves it free."""
        made = self.make(bits).to(dtype)
        for name, parameter in made.named_parameters():
            parameter.data.fill_(level * (float(made.q_max) if name == "clip_max" else 1))
        return made


KINDS = [
    Kind("lsq unsigned", lambda bits: LearnedScale(bits, signed=False, shared=True)),
    Kind("lsq signed", lambda bits: LearnedScale(bits, signed=True, shared=True)),
    Kind("lsq symmetric", lambda bits: LearnedScale(bits, signed=True, symmetric=True, shared=True)),
    Kind("pact unsigned", lambda bits: LearnedClip(bits, signed=False)),
    Kind("pact signed", lambda bits: LearnedClip(bits, signed=True)),
    Kind("dorefa unsigned", lambda bits: UnitActivation(bits, signed=False), lowest_bits=1),
    Kind("dorefa signed", lambda bits: UnitActivation(bits, signed=True)),
]


def level_of(quantizer: Quantizer) -> Tensor:
    """Width of one level."""
    if isinstance(quantizer, LearnedScale):
        return quantizer.scale.detach()
    if isinstance(quantizer, LearnedClip):
        return quantizer.clip_max.detach() / quantizer.q_max
    return 1 / quantizer.q_max


every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
bits_given = st.integers(2, 8)
levels = st.sampled_from([2.0**-6, 0.1, 0.25, 1 / 3, 1.0, 1.7])
values = hnp.arrays(
    "float64",
    hnp.array_shapes(max_dims=4, max_side=4),
    elements=st.one_of(
        st.floats(-20, 20, width=32), st.sampled_from([0.0, -0.0, 0.125, 0.5, 1.0, -1.0, 1.5, 2.5, 1e-30])
    ),
).map(torch.from_numpy)


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_quantizing_twice_changes_nothing(kind, bits, level, x):
    quantizer = kind.quantizer(bits, level)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_the_output_is_a_level_times_an_integer_code_in_range(kind, bits, level, x):
    quantizer = kind.quantizer(bits, level)
    codes = (quantizer(x) / level_of(quantizer)).detach()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
    assert bool((codes.round() >= quantizer.q_min).all())
    assert bool((codes.round() <= quantizer.q_max).all())


@given(bits=bits_given, level=levels, x=values, signed=st.booleans(), symmetric=st.booleans())
def test_the_codes_of_lsq_times_the_scale_are_its_output(bits, level, x, signed, symmetric):
    quantizer = LearnedScale(bits, signed=signed, symmetric=symmetric, shared=True).double()
    quantizer.scale.data.fill_(level)
    codes = quantizer.codes(x)
    assert torch.equal(codes, codes.round())
    assert torch.equal(codes * quantizer.scale, quantizer(x))


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_inside_the_range_the_error_is_at_most_half_a_level(kind, bits, level, x):
    quantizer = kind.quantizer(bits, level)
    width = level_of(quantizer)
    inside = (x >= quantizer.q_min * width) & (x <= quantizer.q_max * width)
    assert bool(((quantizer(x) - x).abs()[inside] <= width / 2 * (1 + 1e-9)).all())


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_outside_the_range_the_output_is_the_nearer_end(kind, bits, level, x):
    quantizer = kind.quantizer(bits, level)
    low, high = quantizer.q_min * level_of(quantizer), quantizer.q_max * level_of(quantizer)
    y = quantizer(x)
    torch.testing.assert_close(y[x < low], low.expand_as(y[x < low]))
    torch.testing.assert_close(y[x > high], high.expand_as(y[x > high]))


@every_kind
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_one_of_the_codes_is_reached_and_no_other_value(kind, bits, dtype):
    bits = max(bits, kind.lowest_bits)
    quantizer = kind.quantizer(bits, 0.01, dtype)
    reach = 1.1 * float(-quantizer.q_min + quantizer.q_max) * float(level_of(quantizer))
    found = quantizer(torch.linspace(-reach, reach, 20_000, dtype=dtype)).unique()
    assert len(found) == int(quantizer.q_max - quantizer.q_min) + 1 <= 2**bits


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_a_larger_input_never_gives_a_smaller_output(kind, bits, level, x):
    y = kind.quantizer(bits, level)(x.flatten().sort().values)
    assert bool((y.diff() >= 0).all())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dorefa" not in kind.name], ids=lambda kind: kind.name)
@given(bits=bits_given, level=levels, x=values, power=st.integers(-8, 8))
def test_scaling_input_and_level_alike_scales_the_output(kind, bits, level, x, power):
    factor = 2.0**power  # a power of two changes no rounding
    assert torch.equal(
        kind.quantizer(bits, level * factor)(x * factor),
        kind.quantizer(bits, level)(x) * factor,
    )


@every_kind
@given(bits=bits_given, level=levels, x=values)
def test_an_odd_symmetric_range_gives_an_odd_function(kind, bits, level, x):
    quantizer = kind.quantizer(bits, level)
    inside = x.abs() <= quantizer.q_max * level_of(quantizer)
    if quantizer.signed:
        assert torch.equal(quantizer(-x)[inside], -quantizer(x)[inside])
    else:
        assert bool((quantizer(-x.abs()) == 0).all())


def rounded(v: Tensor) -> Tensor:
    """Round half to even, gradient 1."""
    return v + (v.round() - v).detach()


def clipped(v: Tensor, inside: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clip with gradient 1 for `inside` and 0 elsewhere."""
    return torch.where(inside, v, v.detach().clamp(low, high))


def lsq_by_autograd(x: Tensor, scale: Tensor, q_min: Tensor, q_max: Tensor, factor: Tensor) -> Tensor:
    scale = scale * factor + (scale * (1 - factor)).detach()
    v = x / scale
    return rounded(clipped(v, (v > q_min) & (v < q_max), q_min, q_max)) * scale


def pact_by_autograd(x: Tensor, clip_max: Tensor, q_min: Tensor, q_max: Tensor) -> Tensor:
    low = -clip_max if q_min < 0 else torch.zeros_like(clip_max)
    held = torch.where(x >= clip_max, clip_max, torch.where(x < low, low, x))
    held = held + torch.where(x == clip_max, x - x.detach(), 0.0)  # exactly at the bound both get it
    level = (clip_max / q_max).detach()
    return rounded(held / level) * level


def dorefa_by_autograd(w: Tensor, steps: Tensor, variant: str) -> Tensor:
    if steps == 1:
        return w + (w.sign() * w.abs().mean() - w).detach()
    t = w.tanh()
    largest = t.abs().max() if variant == "B" else t.abs().max().detach()
    y = 2 * rounded((t / (2 * largest) + 0.5) * steps) / steps - 1
    return y * largest if variant == "C" else y


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Output, then gradients of a fixed random weighting of it for each tensor."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*inputs)
    g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    return y.detach(), *torch.autograd.grad(y, inputs, g)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(bits=bits_given, level=levels, x=values, signed=st.booleans(), symmetric=st.booleans())
def test_the_gradients_of_lsq_are_those_of_its_formula(bits, level, x, signed, symmetric):
    q = LearnedScale(bits, signed=signed, symmetric=symmetric, shared=True).double()
    factor, scale = torch.tensor(0.3, dtype=x.dtype), torch.tensor(level, dtype=x.dtype)
    assert_same(
        gradients(lambda x, s: quantize.fake_quantize(x, s, q.q_min, q.q_max, factor), x, scale),
        gradients(lambda x, s: lsq_by_autograd(x, s, q.q_min, q.q_max, factor), x, scale),
    )


@given(bits=bits_given, x=values.filter(lambda x: x.dim() > 1), data=st.data())
def test_lsq_with_one_scale_a_channel_quantizes_each_channel_by_itself(bits, x, data):
    scales = torch.tensor(data.draw(st.lists(levels, min_size=len(x), max_size=len(x))), dtype=x.dtype)
    q = LearnedScale(bits, signed=True, scales=len(x), shared=True).double()
    factor = torch.tensor(0.3, dtype=x.dtype)

    def whole(x: Tensor, scales: Tensor) -> Tensor:
        shaped = scales.view(-1, *[1] * (x.dim() - 1))
        return quantize.fake_quantize(x, shaped, q.q_min, q.q_max, factor)

    def channel_by_channel(x: Tensor, scales: Tensor) -> Tensor:
        parts = zip(x, scales, strict=True)
        return torch.stack([quantize.fake_quantize(part, s, q.q_min, q.q_max, factor) for part, s in parts])

    assert_same(gradients(whole, x, scales), gradients(channel_by_channel, x, scales))


@given(bits=bits_given, level=levels, x=values, signed=st.booleans())
@example(bits=2, level=0.5, x=torch.tensor([1.5, 0.0, -1.5, 1.0], dtype=torch.float64), signed=False)
def test_the_gradients_of_pact_are_those_of_its_formula(bits, level, x, signed):
    q = LearnedClip(bits, signed=signed).double()
    clip_max = torch.tensor(level, dtype=x.dtype) * q.q_max
    assert_same(
        gradients(lambda x, c: quantize.clip_quantize(x, c, q.q_min, q.q_max), x, clip_max),
        gradients(lambda x, c: pact_by_autograd(x, c, q.q_min, q.q_max), x, clip_max),
    )


@given(bits=bits_given, x=values, signed=st.booleans())
def test_dorefa_activations_pass_the_gradient_strictly_inside_the_range_only(bits, x, signed):
    q = UnitActivation(bits, signed=signed).double()
    _, grad = gradients(lambda x: quantize.unit_quantize(x, q.q_min, q.q_max), x)
    _, passed = gradients(lambda x: x * 1, x)
    assert torch.equal(grad, torch.where((x > (-1 if signed else 0)) & (x < 1), passed, 0.0))


@pytest.mark.parametrize("variant", ["A", "B", "C"])
@given(bits=st.integers(1, 8), x=values.filter(lambda x: bool((x.tanh().abs() > 1e-3).any())))
def test_the_gradients_of_dorefa_weights_are_those_of_their_formula(variant, bits, x):
    largest = x.abs() == x.abs().max()
    x = torch.where(largest & (largest.flatten().cumsum(0).view_as(x) > 1), x / 2, x)  # autograd shares a tied maximum
    steps = torch.tensor(2.0**bits - 1, dtype=x.dtype)
    assert_same(
        gradients(lambda w: quantize.dorefa_weight(w, steps, variant=variant), x),
        gradients(lambda w: dorefa_by_autograd(w, steps, variant), x),
    )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_dorefa_weights_are_odd_multiples_of_a_step_from_minus_one_to_one(bits, dtype):
    w = torch.linspace(-3, 3, 4001, dtype=dtype)
    found = DorefaWeight(bits, variant="A").to(dtype)(w).unique().double() * (2**bits - 1)
    assert torch.equal(found.round(), torch.arange(1 - 2**bits, 2**bits, 2, dtype=torch.float64))
    torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-4)


def test_one_bit_dorefa_weights_are_the_sign_times_the_mean_size_and_zero_stays_zero():
    w = torch.tensor([3.0, -1.0, 0.0, 2.0])
    assert DorefaWeight(1, variant="A")(w).tolist() == [1.5, -1.5, 0.0, 1.5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_round_to_even(kernels, dtype):
    quantizer = KINDS[1].quantizer(4, 1.0, dtype)
    assert quantizer(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5], dtype=dtype)).tolist() == [0, 2, 2, 0, -2]


@every_kind
def test_a_scale_that_training_drove_below_zero_is_floored_and_gives_no_nan(kernels, kind):
    quantizer = kind.quantizer(4, 0.1, torch.float32)
    for parameter in quantizer.parameters():
        parameter.data.fill_(-1.0)
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-9, 2.0], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert x.grad is not None
    if any(True for _ in quantizer.parameters()):
        assert bool((y.abs() <= 1e-6).all())
    assert all(bool(p.grad.isfinite().all()) for p in [x, *quantizer.parameters()])


@every_kind
def test_eager_and_compiled_kernels_agree_about_a_floored_scale(kind):
    quantizer = kind.quantizer(4, 0.1, torch.float32)
    for parameter in quantizer.parameters():
        parameter.data.fill_(-1.0)
    eager, compiled = both_ways(quantizer, torch.tensor([-1.0, 0.0, 1e-9, 1e-8, 2.0]), torch.ones(5))
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=0)


@every_kind
def test_a_nan_in_the_input_is_not_hidden(kernels, kind):
    y = kind.quantizer(4, 0.1, torch.float32)(torch.tensor([0.1, float("nan"), 0.3, 0.4, 0.5]))
    assert y.isnan().tolist() == [False, True, False, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Compiled kernels


def in_layouts(x: Tensor) -> dict[str, Tensor]:
    """The same four-dimensional values in different memory."""
    padded = torch.zeros(x.shape[0], x.shape[1], x.shape[2], x.shape[3] + 3, dtype=x.dtype)
    padded[..., 1:-2] = x
    return {
        "contiguous": x.contiguous(),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "a window of a larger one": padded[..., 1:-2],
        "behind an offset": torch.cat([x[:1], x])[1:],
    }


def both_ways(quantizer: Quantizer, x: Tensor, g: Tensor) -> list[dict[str, Tensor]]:
    """Output and all gradients with eager, then with compiled kernels."""
    results = []
    for compiled in (False, True):
        quantize.use_compiled(compiled)
        quantizer.zero_grad()
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = quantizer(leaf)
        y.backward(g)
        grads = {name: parameter.grad for name, parameter in quantizer.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad, **grads})
    return results


WEIGHTS = [Kind(f"dorefa weight {v}", lambda bits, v=v: DorefaWeight(bits, variant=v), lowest_bits=1) for v in "ABC"]


@pytest.mark.parametrize("kind", KINDS + WEIGHTS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(
    bits=bits_given,
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    seed=st.integers(0, 99),
    layouts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_compiled_kernels_compute_what_eager_ones_do_in_every_layout(kind, dtype, bits, shape, seed, layouts):
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(2))
    x, g = (list(in_layouts(t).values())[i] for t, i in zip((x, g), layouts, strict=True))
    eager, compiled = both_ways(kind.quantizer(bits, 0.1, dtype), x, g)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-5, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("kind", KINDS + WEIGHTS, ids=lambda kind: kind.name)
def test_values_do_not_depend_on_their_layout(kernels, kind):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    quantizer = kind.quantizer(3, 0.2, torch.float32)
    outputs = [quantizer(same) for same in in_layouts(x).values()]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("kind", KINDS + WEIGHTS, ids=lambda kind: kind.name)
def test_a_dense_input_keeps_its_layout_and_is_not_changed(kernels, kind):
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    assert kind.quantizer(3, 0.2, torch.float32)(x).stride() == x.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS + WEIGHTS, ids=lambda kind: kind.name)
def test_widths_shapes_layouts_and_new_trials_compile_no_further_graph(kind):
    def use(bits: int, shape: tuple[int, ...], *, train: bool) -> None:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for same in in_layouts(x).values() if x.dim() == 4 else [x]:
            leaf = same.detach().requires_grad_(train)
            y = kind.quantizer(bits, 0.1, torch.float32)(leaf)  # a new quantizer, as in a new trial
            if train:
                y.backward(torch.ones_like(y))

    quantize.use_compiled(True)
    use(4, (2, 3, 4, 5), train=True)
    before = quantize.graphs_compiled()
    assert before > 0
    shapes = [(2, 3, 4, 5), (7, 1, 2, 2), (64, 10), (3, 4, 1, 1), (6,)]
    for bits, shape, train in itertools.product(range(2, 9), shapes, [True, False]):
        use(bits, shape, train=train)
    assert quantize.graphs_compiled() == before


def test_eager_kernels_compile_nothing():
    before = quantize.graphs_compiled()
    for kind in KINDS + WEIGHTS:
        kind.quantizer(4, 0.1)(torch.randn(3, 5, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert quantize.graphs_compiled() == before
