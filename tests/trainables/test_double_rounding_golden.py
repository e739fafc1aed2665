"""Double Rounding against golden vectors of the authors' code: codes, gradients, starting scales."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.trainables.golden_double_rounding import (
    CASES,
    compare,
    double,
    input_quantizer,
    load,
    of_kind,
    weight_quantizer,
    widths_of,
)
from trainables import modules
from trainables.methods._double_round import lower_codes
from trainables.methods._stored_codes import switched
from trainables.methods._switched_quantizers import CodedWeight, ScaledInput
from trainables.quantize import codes


def test_every_kind_of_case_has_a_test():
    files = Path(__file__).parent.glob("test_double_rounding*_golden.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    tested = re.findall(r'^@of_kind\("(\w+)"\)', text, flags=re.MULTILINE)
    assert {case["kind"] for case in CASES} <= {*tested, "mini_train", "mini_train_alt"}


@of_kind("switch_table")
def test_every_high_code_is_rounded_to_the_published_low_code(case):
    stored, params = load(case), case["params"]
    names = {"even": "even", "halfup": "up", "away": "away", "floor": "floor"}
    computed = {
        f"code_{low}_{name}": lower_codes(stored["code_h"], params["h"], low, signed=params["signed"], ties=ties)
        for low in params["lows"]
        for name, ties in names.items()
    }
    compare(case, stored, computed)


@of_kind("weight_dr")
def test_weights_and_codes_of_every_width_come_from_float_weights_and_from_stored_codes_alike(case):
    stored, widths = load(case), widths_of(case, load(case))
    high, w = widths[0], stored["W"]
    quantizer = weight_quantizer(widths, stored["s_h"])
    kept = {"w.codes": quantizer.codes(w), "w.weight_quantizer.scale": quantizer.scale.detach()}
    computed: dict[str, Any] = {"code_h_int8": kept["w.codes"]}
    for bits in widths:
        quantizer.set_bits(bits)
        computed[f"deq_{bits}"] = quantizer(w)
        computed[f"code_{bits}"] = lower_codes(kept["w.codes"], high, bits)
        assert torch.equal(switched(kept, {"w": high}, {"w": bits})["w"], computed[f"deq_{bits}"])
    compare(case, stored, computed)


@of_kind("act_perbit")
def test_activations_of_every_width_have_the_published_codes(case):
    stored = load(case)
    widths = widths_of(case, stored)
    quantizer = input_quantizer(stored, widths)
    computed = {}
    for bits in widths:
        quantizer.set_bits(bits)
        computed[f"deq_{bits}"] = quantizer(stored["X"])
        computed[f"code_{bits}"] = codes(stored["X"], quantizer.scale, quantizer.q_min, quantizer.q_max)
    compare(case, stored, computed)


@of_kind("act_dr_ext")
def test_unsigned_codes_can_be_rounded_twice_too(case):
    stored, high = load(case), case["params"]["h"]
    top = codes(stored["X"], stored["s_h"], torch.tensor(0.0), torch.tensor(2.0**high - 1)).to(torch.int16)
    computed = {}
    for bits in widths_of(case, stored):
        low = lower_codes(top, high, bits, signed=False)
        computed |= {f"code_{bits}": low, f"deq_{bits}": low * stored["s_h"] * 2 ** (high - bits)}
    compare(case, stored, computed)


@of_kind("linear_forward")
def test_a_layer_equals_its_integer_path(case):
    stored = load(case)
    widths = widths_of(case, stored)
    plain = nn.Linear(*reversed(stored["W"].shape), bias=False).double()
    plain.weight.data.copy_(stored["W"])
    reads, weights = input_quantizer(stored, widths, "sx_"), weight_quantizer(widths, stored["s_h"])
    layer = modules.QuantizedLinear(plain, weights, reads)
    computed = {}
    for bits in widths:
        weights.set_bits(bits)
        reads.set_bits(bits)
        x = codes(stored["X"], reads.scale, reads.q_min, reads.q_max).to(torch.int64)
        w = lower_codes(weights.codes(stored["W"]), widths[0], bits).to(torch.int64)
        computed |= {f"acc_{bits}": x @ w.T, f"y_{bits}": layer(stored["X"])}
    compare(case, stored, computed)


def gradients(quantizer: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the tensor and for the scale as the optimizer gets it, and the factor in the second."""
    x = x.clone().requires_grad_()
    quantizer.scale.grad = None
    quantizer(x).backward(g)
    n = x.numel() / (quantizer.scale.numel() if isinstance(quantizer, CodedWeight) else 1)
    assert x.grad is not None
    return x.grad, quantizer.scale.grad, 1 / torch.sqrt(n * quantizer.q_max)


def each_summand(make: Callable[[Tensor], Any], x: Tensor, bits: int, factor: Callable[[Any], Tensor]) -> Tensor:
    """Derivative of each element by the scale, one at a time."""
    found = []
    for value in x.flatten():
        quantizer = make(value)
        quantizer.set_bits(bits)
        quantizer(value.reshape(1)).backward(torch.ones(1, dtype=x.dtype))
        found.append(quantizer.scale.grad / factor(quantizer))
    return torch.stack(found).reshape(x.shape)


@of_kind("grad_weight")
def test_weights_and_their_scale_get_the_published_gradients(case, kernels):
    stored = load(case)
    widths = widths_of(case, stored)
    quantizer = weight_quantizer(widths, stored["s_h"])
    exact = weight_quantizer(widths, stored["s_h"], gradient="chain")
    computed: dict[str, Any] = {}
    for bits in widths:
        quantizer.set_bits(bits)
        exact.set_bits(bits)
        grad, scaled, factor = gradients(quantizer, stored["W"], stored["G"])
        _, chain, _ = gradients(exact, stored["W"], stored["G"])
        highest = (stored["W"].numel() * (2 ** (widths[0] - 1) - 1)) ** -0.5
        computed |= {f"gW_{bits}": grad, f"gs_scaled_{bits}": scaled, f"gs_{bits}": scaled / factor}
        computed |= {f"lsq_scale_{bits}": factor, f"gs_chain_{bits}": chain / highest}
        computed[f"jac_s_{bits}"] = each_summand(
            lambda _: weight_quantizer(widths, stored["s_h"]), stored["W"], bits, lambda q: torch.rsqrt(q.q_max)
        )
    compare(case, stored, computed)


@of_kind("grad_weight_perchannel")
def test_each_channel_gets_its_own_gradient_and_as_published_that_of_all(case):
    stored = load(case)
    widths = widths_of(case, stored)
    computed: dict[str, Any] = {}
    for name, pooled in (("channel", False), ("shared", True)):
        quantizer = weight_quantizer(widths, stored["s_h"], pooled=pooled)
        for bits in widths:
            quantizer.set_bits(bits)
            grad, scaled, factor = gradients(quantizer, stored["W"], stored["G"])
            computed |= {f"gW_{bits}": grad, f"gs_{name}_{bits}": scaled / factor, f"lsq_scale_{bits}": factor}
    compare(case, stored, computed)


@of_kind("grad_weight_edges")
def test_both_edges_of_the_range_are_inside_and_for_the_exact_derivative_outside(case, kernels):
    stored = load(case)
    widths, w = widths_of(case, stored), stored["W"]
    computed: dict[str, Any] = {}
    for gradient, mask, jacobian in (("low", "mask", "jac_s"), ("chain", "mask_strict", "jac_chain_strict")):
        quantizer = weight_quantizer(widths, stored["s_h"], gradient=gradient)
        top = None if gradient == "low" else torch.tensor(2.0 ** (widths[0] - 1) - 1, dtype=w.dtype)
        for bits in widths:
            quantizer.set_bits(bits)
            computed[f"{mask}_{bits}"] = gradients(quantizer, w, torch.ones_like(w))[0]
            computed[f"deq_{bits}"] = quantizer(w)
            computed[f"code_{bits}"] = lower_codes(quantizer.codes(w), widths[0], bits)
            computed[f"{jacobian}_{bits}"] = each_summand(
                lambda _, gradient=gradient: weight_quantizer(widths, stored["s_h"], gradient=gradient),
                w,
                bits,
                lambda q, top=top: torch.rsqrt(q.q_max if top is None else top),
            )
    compare(case, stored, computed)


@of_kind("grad_act")
def test_activations_and_their_scales_get_the_published_gradients(case, kernels):
    stored = load(case)
    widths, x = widths_of(case, stored), stored["X"]
    quantizer = input_quantizer(stored, widths)
    literal = input_quantizer(stored, widths, gradient="chain")
    computed: dict[str, Any] = {}
    for bits in widths:
        quantizer.set_bits(bits)
        literal.set_bits(bits)
        grad, scaled, factor = gradients(quantizer, x, stored["G"])
        _, of_one, _ = gradients(literal, x, stored["G"])
        computed |= {f"gX_{bits}": grad, f"gs_{bits}": scaled / factor, f"lsq_scale_{bits}": factor}
        computed[f"lsq_scale_persample_{bits}"] = of_one / (scaled / factor)
        computed[f"jac_s_{bits}"] = each_summand(
            lambda _: input_quantizer(stored, widths), x, bits, lambda q: torch.rsqrt(q.q_max)
        )
    compare(case, stored, computed)


@of_kind("init")
def test_scales_start_where_the_rules_say(case):
    stored = load(case)
    computed: dict[str, Any] = {}
    for i in range(sum(name.startswith("W_") for name in stored)):
        widths, w = [int(b) for b in stored[f"bits_{i}"]], stored[f"W_{i}"]
        for name, options in {
            f"s_h_channel_{i}": {"scales": len(w)},
            f"s_h_tensor_{i}": {},
            f"s_h_alt_lsq_low_{i}": {"init": "lsq"},
        }.items():
            quantizer = double(CodedWeight(widths, **options))
            quantizer.calibrate(w)
            computed[name] = quantizer.scale
        for name, start in ((f"s_x_{i}", "spread"), (f"s_x_lsq_{i}", "lsq")):
            reads = double(ScaledInput(widths, signed=False, init=start))
            for bits in widths:
                reads.set_bits(bits)
                reads.calibrate(stored[f"X_{i}"])
                computed[f"{name}_{bits}"] = reads.scale.detach().clone()
    compare(case, stored, computed)
