"""The rounding of Bayesian Bits: gated residuals, their gradients, grids and layouts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainables import quantize
from trainables.methods._gated_rounding import LEVELS, gated_quantize

ranges = st.floats(0.1, 10)
signs = st.booleans()
gate_values = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99))
gate_lists = st.lists(gate_values, min_size=4, max_size=4)


def values(seed: int, count: int = 200, spread: float = 6.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


seeds = st.integers(0, 1000)


def direct(x: Tensor, clip_max: float, bits: int, signed: bool) -> Tensor:
    """Rounding to `2^bits - 1` steps of the range, without residuals."""
    high = clip_max * (1 - 1e-7)
    step = clip_max * (2 if signed else 1) / (2**bits - 1)
    return (x.clamp(-high if signed else 0.0, high) / step).round() * step


def published(x: Tensor, clip_max: Tensor, gates: Tensor, signed: bool) -> Tensor:
    """Equation 6 as it stands, with straight-through rounding by autograd."""

    def rounded(v: Tensor) -> Tensor:
        return v + (v.round() - v).detach()

    high = clip_max * (1 - 1e-7)
    clipped = torch.minimum(torch.maximum(x, -high if signed else torch.zeros_like(high)), high)
    step = clip_max * ((2 if signed else 1) / 3)
    parts = [step * rounded(clipped / step)]
    for ratio in (5, 17, 257, 65537):
        step = step / ratio
        parts.append(step * rounded((clipped - sum(parts)) / step))
    total = parts[-1]
    for part, gate in zip(parts[-2::-1], gates.flip(0), strict=True):
        total = part + gate * total
    return total


@given(seed=seeds, clip_max=ranges, signed=signs, level=st.integers(0, 4))
def test_open_gates_up_to_a_level_are_plain_rounding_at_its_width(seed, clip_max, signed, level):
    x = values(seed)
    gates = torch.tensor([float(index < level) for index in range(4)], dtype=torch.float64)
    y = gated_quantize(x, torch.tensor(clip_max, dtype=torch.float64), gates, signed=signed)
    torch.testing.assert_close(y, direct(x, clip_max, LEVELS[level], signed), rtol=0, atol=1e-9)


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_values_and_gradients_are_those_of_the_gated_residuals(seed, clip_max, signed, gates):
    results = []
    for function in (published, lambda x, c, z, s: gated_quantize(x, c, z, signed=s)):
        x = values(seed).requires_grad_()
        c = torch.tensor(clip_max, dtype=torch.float64, requires_grad=True)
        z = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
        y = function(x, c, z, signed)
        y.backward(values(seed + 1, spread=1.0))
        results.append((y.detach(), x.grad, c.grad, z.grad))
    (y, grad_x, grad_c, grad_z), ours = results
    free = torch.tensor([0 < gate < 1 for gate in gates])
    for computed, wanted in zip(ours, (y, grad_x, grad_c, torch.where(free, grad_z, 0.0)), strict=True):
        torch.testing.assert_close(computed, wanted, rtol=1e-7, atol=1e-7)


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_rounding_keeps_order_so_that_max_pooling_may_come_before_it(seed, clip_max, signed, gates):
    x = values(seed).sort().values
    y = gated_quantize(x, torch.tensor(clip_max), torch.tensor(gates), signed=signed)
    assert bool((y.diff() >= -1e-6).all())


@given(seed=seeds, clip_max=ranges, signed=signs, level=st.integers(0, 2))
def test_a_width_has_no_more_values_than_its_grid_and_signed_grids_are_symmetric(seed, clip_max, signed, level):
    bits = LEVELS[level]
    x = values(seed, 2000).float()
    gates = torch.tensor([float(index < level) for index in range(4)])
    y = gated_quantize(x, torch.tensor(clip_max), gates, signed=signed)
    codes = (y / (clip_max * (2 if signed else 1) / (2**bits - 1))).round()
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert codes.unique().numel() <= 2**bits - signed
    assert (float(codes.min()), float(codes.max())) == (-limit if signed else 0, limit)


@given(clip_max=st.floats(2**-10, 2**10, width=32), signed=signs, level=st.integers(0, 3))
def test_the_largest_value_never_rounds_out_of_the_grid_in_single_precision(clip_max, signed, level):
    bits = LEVELS[level]
    gates = torch.tensor([float(index < level) for index in range(4)])
    y = float(gated_quantize(torch.tensor([2 * clip_max]), torch.tensor(clip_max), gates, signed=signed))
    limit = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert round(y / (clip_max * (2 if signed else 1) / (2**bits - 1))) == limit


@given(seed=seeds, clip_max=ranges, signed=signs, gates=gate_lists)
def test_quantizing_twice_changes_nothing_once_gates_are_open_or_closed(seed, clip_max, signed, gates):
    z, c = torch.tensor(gates, dtype=torch.float64).round(), torch.tensor(clip_max, dtype=torch.float64)
    once = gated_quantize(values(seed), c, z, signed=signed)
    torch.testing.assert_close(gated_quantize(once, c, z, signed=signed), once, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gates", [[1, 1, 0, 0], [1, 1, 1, 1], [0.3, 1, 0.6, 0], [0.5, 0.5, 0.5, 0.5], [0, 1, 1, 1]])
def test_compiled_and_eager_kernels_agree_in_every_layout(gates):
    x = (values(3, 120).view(2, 3, 4, 5).float() * 0.5).contiguous(memory_format=torch.channels_last)
    g = values(4, 120, 1.0).view(2, 3, 4, 5).float()
    found = []
    for compiled in (False, True):
        quantize.use_compiled(compiled)
        leaf, clip_max = x.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
        z = torch.tensor(gates, dtype=torch.float32, requires_grad=True)
        y = gated_quantize(leaf, clip_max, z, signed=True)
        y.backward(g)
        assert y.stride() == x.stride()
        found.append((y.detach(), leaf.grad, clip_max.grad, z.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
