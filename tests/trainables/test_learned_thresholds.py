"""N2UQ's kernels: codes, the line whose gradient they take, layouts and memory, weights and RPReLU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainables import modules
from trainables.methods import _threshold_kernels as threshold_kernels
from trainables.methods._n2uq_kernels import entropy_weight, rprelu
from trainables.methods._n2uq_modules import EntropyWeight, LearnedThresholds, RPReLU, prepared_thresholds
from trainables.methods._threshold_kernels import NARROWEST, knots, threshold_quantize

widths_in_bits = st.integers(1, 8)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@st.composite
def quantizers(draw: Any) -> dict[str, Tensor]:
    """Arguments of `threshold_quantize` in float64, with widths from below the floor to wide."""
    steps = 2 ** draw(widths_in_bits) - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1e-3, 1.0, 100.0]))
    number = st.floats(-2, 2).filter(lambda value: abs(value) > 0.05)
    return {
        "start": torch.tensor(draw(st.floats(-1, 1)), dtype=torch.float64),
        "widths": torch.rand(steps, dtype=torch.float64, generator=generator) * 2 * scale / steps,
        "input_scale": torch.tensor(draw(number), dtype=torch.float64),
        "output_scale": torch.tensor(draw(number), dtype=torch.float64),
        "q_max": torch.tensor(float(steps), dtype=torch.float64),
    }


def elements(arguments: dict[str, Tensor], seed: int) -> Tensor:
    """Random elements over the range and beyond it."""
    ends = knots(arguments["start"], arguments["widths"], arguments["q_max"])[0]
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    return (ends[0] + spread * (ends[-1] - ends[0])) / arguments["input_scale"]


def line(x: Tensor, arguments: dict[str, Tensor]) -> Tensor:
    """The curve whose gradients the quantizer has, segment by segment, for autograd."""
    step = 2 / arguments["q_max"]
    widths = torch.where(arguments["widths"] > NARROWEST, arguments["widths"], NARROWEST)
    z, left, result = arguments["input_scale"] * x, arguments["start"], 0 * x
    for i, width in enumerate(widths):
        rising = step * i + step * (z - left) / width
        result = torch.where((z > left) & (z <= left + width), rising, result)
        left = left + width
    return arguments["output_scale"] * torch.where(z > left, torch.full_like(z, 2.0), result)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_code_is_the_number_of_thresholds_below(arguments, seed):
    x = elements(arguments, seed)
    thresholds = knots(arguments["start"], arguments["widths"], arguments["q_max"])[1]
    counted = (arguments["input_scale"] * x[..., None] > thresholds).sum(-1)
    step = arguments["output_scale"] * 2 / arguments["q_max"]
    torch.testing.assert_close(threshold_quantize(x, **arguments), counted * step, rtol=1e-12, atol=1e-12)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_gradients_are_those_of_the_line_through_the_levels(arguments, seed):
    names = ["start", "widths", "input_scale"]
    g = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    found = []
    for function in (lambda x, a: threshold_quantize(x, **a), line):
        x = elements(arguments, seed).requires_grad_()
        copied = {name: value.clone().requires_grad_(name in names) for name, value in arguments.items()}
        inputs = [x, *(copied[name] for name in names)]
        found.append(torch.autograd.grad((function(x, copied) * g).sum(), inputs))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()) + 1e-12)


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_gradient_of_the_output_scale_is_that_of_the_quantized_value(arguments, seed):
    x = elements(arguments, seed)
    scale = arguments["output_scale"].clone().requires_grad_()
    y = threshold_quantize(x, **{**arguments, "output_scale": scale})
    (gradient,) = torch.autograd.grad((y * x).sum(), [scale])
    torch.testing.assert_close(gradient, (y.detach() / scale.detach() * x).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_on_a_threshold_gets_the_lower_level_and_a_rounding_error_more_the_higher(bits, dtype):
    quantizer = LearnedThresholds(bits).to(dtype)
    quantizer.widths.data.mul_(torch.rand(255, generator=torch.Generator().manual_seed(bits)) + 0.5)
    thresholds = quantizer.thresholds
    higher = thresholds + 4 * torch.finfo(dtype).eps  # the range is 2 to 3
    codes = [(quantizer(x).detach() * (2**bits - 1) / 2).round() for x in (thresholds, higher)]
    expected = torch.arange(2**bits - 1, dtype=dtype)
    assert torch.equal(codes[0], expected)
    assert torch.equal(codes[1], expected + 1)


@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_a_range_too_wide_for_a_table_is_searched_instead(spread):
    widths = torch.tensor([0.0, spread, spread])
    x = torch.tensor([-1.0, 4e-4, 6e-4, 0.4 * spread, 0.6 * spread, 1.4 * spread, 9 * spread], requires_grad=True)
    one = torch.tensor(1.0)
    y = threshold_quantize(x, torch.tensor(0.0), widths, one, one, torch.tensor(3.0))
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0, 1, 1, 2, 2, 3]) * 2 / 3)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0, 1e3, 1e3, 1 / spread, 1 / spread, 1 / spread, 0]) * 2 / 3)


def test_values_that_are_no_numbers_stay_and_infinite_ones_get_the_outer_levels():
    y = LearnedThresholds(3)(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3]))
    assert bool(y[0].isnan())
    torch.testing.assert_close(y.detach()[1:], torch.tensor([2.0, 0.0, 2 / 7]))


@layouts
def test_the_layout_of_memory_changes_no_number(layout):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 8, 5, 6, generator=generator)
    found = []
    for memory in (torch.contiguous_format, layout):
        quantizer = LearnedThresholds(3, activation=RPReLU(8))
        images = x.clone(memory_format=memory).requires_grad_()
        y = quantizer(images)
        y.backward(g)
        found.append([y, images.grad, *(p.grad for p in quantizer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bits", [2, 8])
def test_what_is_kept_for_the_backward_pass_is_the_input_and_a_small_integer_an_element(bits):
    kept: list[Tensor] = []
    x = torch.randn(4, 8, 4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        LearnedThresholds(bits)(x)
    large = [t for t in kept if t.numel() == x.numel()]
    assert [t.dtype for t in large] == [torch.float32, torch.int16]


@given(arguments=quantizers(), seed=st.integers(0, 2**16))
def test_the_straight_formulas_give_what_the_table_gives(arguments, seed):
    x = elements(arguments, seed)
    y, below = threshold_kernels._threshold_forward(x, **arguments)
    torch.testing.assert_close(y, threshold_quantize(x, **arguments), rtol=1e-12, atol=1e-12)
    found = threshold_kernels._threshold_backward(x.cos(), x, below, **arguments)
    names = ["start", "widths", "input_scale", "output_scale"]
    copied = {name: value.clone().requires_grad_(name in names) for name, value in arguments.items()}
    inputs = [x.requires_grad_(), *(copied[name] for name in names)]
    wanted = torch.autograd.grad(threshold_quantize(x, **copied), inputs, x.detach().cos())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7 * float(theirs.abs().max()) + 1e-12)


def test_quantizers_of_any_widths_prepared_together_are_those_prepared_alone():
    generator = torch.Generator().manual_seed(0)
    quantizers = nn.ModuleList(LearnedThresholds(bits) for bits in (3, 8, 1, 2, 5))
    for quantizer in quantizers:
        for p in quantizer.parameters():
            p.data.mul_(torch.rand(p.shape, generator=generator) + 0.5)
    quantizers[3].widths.data[1] = 1e5  # too wide for a table
    x = torch.randn(5, 2, 3, 4, 4, generator=generator) * 2
    found = []
    for together in (prepared_thresholds(quantizers), nullcontext()):
        with together:
            y = torch.stack([quantizer(images) for quantizer, images in zip(quantizers, x, strict=True)])
        assert all(quantizer.prepared is None for quantizer in quantizers)
        found.append([y, *torch.autograd.grad((y * x.cos()).sum(), list(quantizers.parameters()))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_quantized_weights_take_the_same_memory_again_once_nobody_holds_them():
    quantizer, w = EntropyWeight(2), torch.randn(3, 4, requires_grad=True)
    first, second = quantizer(w), quantizer(w * 2)
    assert first.data_ptr() != second.data_ptr()  # the first one is still there
    address = second.data_ptr()
    assert torch.equal(first, entropy_weight(w, quantizer.q_max, quantizer.clip_range))
    loss = (second @ torch.randn(4, 4, requires_grad=True)).sum()
    del second
    assert quantizer(w).data_ptr() != address  # the graph holds it
    address = quantizer(w).data_ptr()
    loss.backward()
    assert quantizer(w).data_ptr() == address


def test_a_compiled_model_gives_the_numbers_of_the_eager_one():
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for compiled in (False, True):
        layer = modules.QuantizedConv2d(
            nn.Conv2d(3, 2, 1), EntropyWeight(3), LearnedThresholds(3, activation=RPReLU(3))
        )
        with torch.no_grad():
            for p in layer.parameters():
                p.fill_(0.3)
        layer.weight.data.copy_(torch.tensor([[0.5, -0.2, 0.1], [-0.7, 0.3, 0.4]])[..., None, None])
        images = x.clone().requires_grad_()
        y = (torch.compile(layer, fullgraph=True) if compiled else layer)(images)
        y.square().sum().backward()
        found.append([y, images.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_single_precision_is_enough_for_the_sums_of_a_large_tensor(bits):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 1 << 20, generator=generator)
    found = []
    for dtype in (torch.float32, torch.float64):
        quantizer = LearnedThresholds(bits).to(dtype)
        quantizer(x.to(dtype)).backward(g.to(dtype))
        found.append([p.grad.double() for p in quantizer.parameters()])
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 2e-4 * float(other.norm())


@given(bits=widths_in_bits, seed=st.integers(0, 2**16), factor=st.floats(1e-3, 1e3))
def test_quantized_weights_follow_the_size_of_their_filter_and_have_no_level_0(bits, seed, factor):
    w = torch.randn(3, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q_max, clip = torch.tensor(2.0**bits - 1, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    y = entropy_weight(w, q_max, clip)
    torch.testing.assert_close(entropy_weight(w * factor, q_max, clip), y * factor)
    assert all(
        len(levels.unique()) <= 2**bits for levels in (y / w.abs().mean(dim=(1, 2, 3), keepdim=True)).round(decimals=6)
    )
    assert bool((y != 0).all())


@pytest.mark.parametrize("bits", range(1, 9))
def test_evenly_spread_weights_fill_all_levels_alike(bits):
    w = torch.linspace(-1, 1, 2**14 + 1, dtype=torch.float64).view(1, -1)
    y = EntropyWeight(bits).double()(w)
    counts = y.unique(return_counts=True)[1].double()
    assert len(counts) == 2**bits
    assert float((counts / counts.mean() - 1).abs().max()) < 0.02


def test_a_filter_of_zeros_stays_finite_and_small():
    y = EntropyWeight(2)(torch.zeros(2, 3, 3, 3))
    assert float(y.abs().max()) < 1e-6


@pytest.mark.parametrize("rescale", [False, True])
def test_the_gradient_of_a_weight_passes_as_it_is_or_over_its_scale(rescale):
    w = torch.tensor([[1.0, -3.0], [0.5, 0.5]], requires_grad=True)
    EntropyWeight(2, rescale=rescale)(w).backward(torch.ones(2, 2))
    scales = 1.5 * torch.tensor([[2.0], [0.5]])
    torch.testing.assert_close(w.grad, (1 / scales if rescale else torch.ones(2, 1)).expand(2, 2))


@layouts
@pytest.mark.parametrize("dim", [1, -1])
def test_rprelu_is_a_prelu_between_two_shifts_with_all_gradients(kernels, layout, dim):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    x[0] = 0  # with a shift of 0 this is the kink
    shape = [-1 if axis == dim % 4 else 1 for axis in range(4)]
    parameters = torch.randn(3, x.shape[dim], generator=generator, dtype=torch.float64)
    parameters[0, 0] = 0
    g = torch.randn_like(x)
    found = []
    for ours in (True, False):
        inputs = [x.clone().requires_grad_(), *(p.clone().requires_grad_() for p in parameters)]
        shift, slope, offset = inputs[1:]
        if ours:
            y = rprelu(*inputs, dim)
        else:
            moved = inputs[0] + shift.view(shape)
            y = torch.where(moved > 0, moved, moved * slope.view(shape)) + offset.view(shape)
        found.append([y, *torch.autograd.grad(y, inputs, g)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
