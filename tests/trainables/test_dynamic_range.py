"""BSQ's activations, and layers that keep codes: ranges, packed masks and codes, bit for bit the ordinary ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainables.bsq_cases import random, seeds
from trainables.methods._bit_planes import BitPlanes
from trainables.methods._dynamic_range import AsItComes, CodedConv2d, DynamicRange, put_at_relus
from trainables.methods._lean_layers import (
    PIECE,
    LeanReLU,
    codes_per_byte,
    masked,
    pack_codes,
    pack_mask,
    pieces,
    unpack_codes,
)
from trainables.modules import QuantizedConv2d


@given(st.integers(1, 8), seeds, st.booleans(), st.sampled_from([0.5, 3.0]))
def test_activations_have_as_many_levels_as_their_width_and_are_within_half_a_step(bits, seed, signed, scale):
    bits = max(2, bits) if signed else bits
    x = random((6, 50), seed, scale)
    quantizer = DynamicRange(bits, signed=signed)
    y = quantizer(x).detach()
    clipped = x if signed else x.clamp(0, quantizer.clip_max.item())
    assert y.unique().numel() <= 2**bits
    steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    assert float((y - clipped).abs().max()) <= float(clipped.abs().max()) / steps * 0.5001
    torch.testing.assert_close(quantizer(y).detach(), y)


@pytest.mark.parametrize("signed", [False, True])
def test_zeros_stay_zeros(signed):
    assert torch.equal(DynamicRange(4, signed=signed)(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_a_running_range_makes_evaluation_independent_of_the_batch():
    x, large = random((8, 4), 0), random((8, 4), 1, 3.0)
    outputs = {}
    for running in (False, True):
        quantizer = DynamicRange(4, running=running)
        quantizer(x)
        quantizer.eval()
        outputs[running] = torch.equal(quantizer(x), quantizer(torch.cat([x, large]))[:8])
    assert outputs == {False: False, True: True}


def test_the_running_range_follows_the_batches():
    quantizer = DynamicRange(4, running=True)
    quantizer(torch.tensor([1.0]))
    assert float(quantizer.running_largest) == 1.0
    quantizer(torch.tensor([2.0]))
    assert float(quantizer.running_largest) == pytest.approx(1.1)


@pytest.mark.parametrize("length", [1, 7, 8, 24, PIECE, PIECE + 8, 2 * PIECE + 3])
def test_a_packed_mask_keeps_what_is_not_zero(length):
    x, g = random((length,), 0).clamp_min(0), random((length,), 1)
    packed = pack_mask(iter(pieces(x)), length, x)
    assert packed.numel() == (length // 8 if length % 8 == 0 else length)
    assert torch.equal(masked(g, packed, (x.shape, x.stride())), g * (x > 0))


@given(st.integers(1, 255), st.integers(1, 30), seeds)
def test_packed_codes_come_back(steps, length, seed):
    codes = torch.randint(0, steps + 1, (length,), generator=torch.Generator().manual_seed(seed)).float()
    packed = torch.empty(length // codes_per_byte(steps, length), dtype=torch.uint8)
    assert packed.numel() == (length // 2 if steps <= 15 and length % 2 == 0 else length)
    pack_codes(codes, packed, steps)
    assert torch.equal(unpack_codes(packed, torch.empty(length)), codes)


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(2, 3) if layout == "transposed" else x


layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])


@layouts
@pytest.mark.parametrize("height", [4, 5])
def test_a_lean_relu_is_a_relu_bit_for_bit(layout, height):
    x = laid_out(random((2, 3, height, 3), 0), layout)
    results = []
    for relu in (LeanReLU(), nn.ReLU()):
        leaf = x.clone().requires_grad_()
        y = relu(leaf * 1)
        y.backward(torch.ones_like(y) * 1.5)
        results.append((y, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@layouts
@pytest.mark.parametrize("bits", [2, 4, 7, 8, 9])
@pytest.mark.parametrize("signed", [False, True])
def test_a_convolution_that_keeps_codes_is_the_ordinary_one_bit_for_bit(layout, bits, signed):
    x = laid_out(random((3, 4, 80, 80), 1, 3.0), layout)  # more than a piece
    results = []
    for kind in (CodedConv2d, QuantizedConv2d):
        conv = nn.Conv2d(4, 5, 3)
        tensor = BitPlanes(conv.weight.shape, 6)
        conv.weight.data, conv.bias.data = random(tuple(conv.weight.shape), 2), torch.ones(5)
        layer = kind(conv, tensor, DynamicRange(bits, signed=signed))
        tensor.calibrate(layer.weight)
        leaf = x.clone().requires_grad_()
        y = layer(leaf * 1)
        y.square().sum().backward()
        grads = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y, leaf.grad, *grads])
    assert len(results[0]) == 4 + (bits <= 3 and not signed)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_quantizers_at_relus_leave_the_first_alone_and_take_the_width_of_the_next_layer():
    relu, conv = nn.ReLU, nn.Conv2d
    model = nn.Sequential(conv(1, 2, 3), relu(), conv(2, 2, 3), relu(), conv(2, 2, 3), relu(), conv(2, 2, 3), relu())
    assert put_at_relus(model, {"0": 8, "2": 3, "4": 4, "6": 5}) == [4, 5, 5]
    assert type(model[1]) is nn.ReLU
    assert [model[i].bits for i in (3, 5, 7)] == [4, 5, 5]


@pytest.mark.parametrize(("levels", "expected"), [(2, 4), (16, 4), (17, 8), (256, 8), (257, 32)])
def test_what_a_layer_reads_has_the_first_width_that_suffices(levels, expected):
    reads = AsItComes([4, 8])
    reads.calibrate(torch.arange(levels).float())
    assert reads.bits == expected
    assert torch.equal(reads(torch.ones(2)), torch.ones(2))
