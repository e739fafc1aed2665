"""Codes of Double Rounding: low ones from high ones, stored ones, kernels in any layout, gradients, starting scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainables.switched_networks import bits_of, tensor
from trainables import modules
from trainables.methods import _stored_codes as stored_codes
from trainables.methods._double_round import double_round, high_codes, lower_codes, round_once
from trainables.methods._switched_quantizers import CodedWeight, ScaledInput


@given(code=st.integers(-128, 127), low=st.integers(2, 8))
def test_a_low_code_is_the_high_code_over_a_power_of_two_rounded_half_to_even(code, low):
    ratio, top = 2 ** (8 - low), 2 ** (low - 1)
    assert int(lower_codes(torch.tensor(code), 8, low)) == np.clip(np.rint(code / ratio), -top, top - 1)


@given(code=st.integers(0, 255), low=st.integers(1, 8))
def test_unsigned_codes_are_rounded_alike(code, low):
    wanted = np.clip(np.rint(code / 2 ** (8 - low)), 0, 2**low - 1)
    assert int(lower_codes(torch.tensor(code), 8, low, signed=False)) == wanted


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Weights around and beyond the range of a scale, many exactly on ties, the scale or scales, the highest width."""
    high, channels, per_channel = draw(st.integers(2, 8)), draw(st.integers(1, 4)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ratios = rng.choice([rng.normal(size=(channels, 9)) * 2**high / 4, rng.integers(-300, 300, (channels, 9)) / 2])
    scale = rng.uniform(1e-4, 2, (channels, 1) if per_channel else ())
    w = torch.tensor(ratios * scale, dtype=torch.float32)
    return w, torch.tensor(scale, dtype=torch.float32), high


@settings(max_examples=60)
@given(case=weights())
def test_stored_codes_give_the_weights_of_training_bit_for_bit_at_every_width(case):
    w, scale, high = case
    kept = {
        "w.codes": high_codes(w, scale, high),
        "w.weight_quantizer.scale": scale.flatten() if scale.dim() else scale,
    }
    for low in range(2, high + 1):
        top = 2.0 ** (low - 1)
        live = double_round(
            w, scale, tensor(2.0 ** (high - low))[0], tensor(-top)[0], tensor(top - 1)[0], tensor(1.0)[0]
        )
        again = stored_codes.switched(kept, {"w": high}, {"w": low})["w"]
        assert torch.equal(bits_of(live), bits_of(again))


@pytest.mark.parametrize("scale", [torch.tensor(0.013), torch.tensor([0.013, 0.02, 0.5]).view(3, 1, 1, 1)])
def test_compiled_and_eager_kernels_agree_with_the_plain_formula_in_any_layout(kernels, scale):
    torch.manual_seed(0)
    for layout in (torch.contiguous_format, torch.channels_last):
        w = (torch.randn(3, 4, 3, 3) * 0.5).contiguous(memory_format=layout).requires_grad_()
        g, s = torch.randn(3, 4, 3, 3), scale.clone().requires_grad_()
        ratio, low, top, factor = (torch.tensor(v) for v in (16.0, -8.0, 7.0, 0.25))
        y = double_round(w, s, ratio, low, top, factor)
        y.backward(g)
        kept = {"w.codes": high_codes(w, s, 8), "w.weight_quantizer.scale": scale.flatten() if scale.dim() else scale}
        assert torch.equal(bits_of(y), bits_of(stored_codes.switched(kept, {"w": 8}, {"w": 4})["w"]))
        with torch.no_grad():
            r = w / (s * ratio)
            inside = (r >= low) & (r <= top)
            jacobian = torch.where(inside, r.round() - r, r.clamp(low, top))
            wanted = (g * jacobian).sum(dim=(1, 2, 3), keepdim=True) if s.dim() else (g * jacobian).sum()
        torch.testing.assert_close(w.grad, torch.where(inside, g, 0.0))
        torch.testing.assert_close(s.grad, wanted * factor)


def test_compiled_and_eager_activations_agree(kernels):
    x = torch.tensor([-1.0, 0.0, 0.26, 1.5, 9.0]).requires_grad_()
    scale = torch.tensor(0.5).requires_grad_()
    y = round_once(x, scale, torch.tensor(0.0), torch.tensor(3.0), torch.tensor(1.0))
    y.backward(torch.ones(5))
    assert y.tolist() == [0.0, 0.0, 0.5, 1.5, 1.5]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]  # both edges inside
    assert float(scale.grad) == pytest.approx(0 + 0 + (1 - 0.52) + 0 + 3)


@settings(max_examples=30)
@given(case=weights())
def test_the_exact_gradient_is_the_slope_of_the_output_by_the_scale_with_rounding_errors_held(case):
    w, scale, high = case
    low = max(2, high - 2)
    ratio, top = torch.tensor(2.0 ** (high - low)).double(), torch.tensor(2.0 ** (low - 1)).double()
    s = scale.double().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    y = double_round(w.double(), s, ratio, -top, top - 1, one, chain=True)
    (found,) = torch.autograd.grad(y.sum(), s)
    s2 = scale.double().requires_grad_()
    r = w.double() / (s2 * ratio)
    held = (y.detach() / (s2 * ratio).detach()) - r.detach()
    inside = (r > -top) & (r < top - 1)
    surrogate = torch.where(inside, r + held, r.detach().clamp(-top, top - 1)) * s2 * ratio
    (wanted,) = torch.autograd.grad(surrogate.sum(), s2)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_activations_refuse_a_width_without_a_scale():
    reads = ScaledInput((8, 4), signed=False)
    with pytest.raises(ValueError, match="bits = 6: activations are trained at 8, 4"):
        reads.set_bits(6)


def test_signed_activations_start_at_the_larger_end():
    reads = ScaledInput((4,), signed=True)
    reads.calibrate(torch.linspace(-7.0, 3.5, 2001))
    assert float(reads.scale) == pytest.approx(7 / 7, rel=0.01)


def test_weights_of_one_column_start_at_a_scale_above_zero():
    quantizer = CodedWeight((4, 2), scales=3)
    quantizer.calibrate(torch.tensor([[1.0], [0.0], [-2.0]]))
    assert bool((quantizer.scale > 0).all())
    layer = modules.QuantizedLinear(nn.Linear(1, 3), quantizer, None)
    assert bool(layer(torch.ones(2, 1)).isfinite().all())
