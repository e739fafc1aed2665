"""Double Rounding against the golden vectors: formulas of the paper, conventions of the authors' code.

Whatever `golden/double_rounding/index.json` lists is put through our code, case by case and within its tolerance, by
the function below that carries its kind. Not compared, because nothing of ours computes them: `gs_alt_hbit_*` (a third
reading of the scale's gradient, which the index calls reference only) and `lam_literal_*` (equation 6 as printed gives
negative learning rates; `lam_literal_floor0_*` is compared), and the spread of a single probe, which is a property of
the matrix.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.allocate import allocate, alternatives, linear_scores
from analysis.integer_program import Limit
from tests.golden_vectors import ROOT, index
from trainables import modules, sensitivity
from trainables.config import Optimizer
from trainables.cost import Layer
from trainables.curvature import Traces, hessian_traces, hutchinson
from trainables.methods._adaptive_rates import alrs_rate, eta, mean_gradient
from trainables.methods._bit_switching import (
    layer_widths,
    roulette,
    sensitive_layers,
    switch_probabilities,
    switch_rate,
    transitions,
)
from trainables.methods._double_round import high_codes, lower_codes
from trainables.methods._stored_codes import switched
from trainables.methods._switched_quantizers import CodedWeight, ScaledInput
from trainables.methods.double_rounding import Method, distillation_weight, soft_targets
from trainables.optimizers import Optimizers
from trainables.quantize import codes
from trainables.step import training_step

METHOD = "double_rounding"
REFERENCE_ONLY = re.compile(r"gs_alt_hbit_\d+|lam_literal_\d+|variance_layerwise_theory")
CASES = index(METHOD)["cases"]

Case = dict[str, Any]
Arrays = dict[str, Tensor]


def load(case: Case) -> Arrays:
    with np.load(ROOT / METHOD / case["file"]) as archive:
        return {name: torch.from_numpy(np.array(value)) for name, value in archive.items()}


def tolerance(case: Case) -> dict[str, float]:
    """What the case's text says of floats: `rtol 1e-12`, `rtol 1e-10, atol 1e-12`, or `exact`."""
    stated = {name: float(value) for name, value in re.findall(r"(rtol|atol) ([\d.e+-]+\d)", case["tolerance"])}
    return {"rtol": 0.0, "atol": 0.0, **stated}


def compare(case: Case, stored: Arrays, computed: dict[str, Any]) -> None:
    """Every output that the index lists is among what was computed, and equal to it."""
    outputs = [name for name in case["outputs"] if not REFERENCE_ONLY.fullmatch(name)]
    assert set(outputs) <= set(computed), "the index lists outputs that this test does not know"
    for name in outputs:
        wanted = stored[name]
        found = torch.as_tensor(computed[name]).detach()
        exact = not wanted.is_floating_point()
        torch.testing.assert_close(
            found.to(wanted.dtype).reshape(wanted.shape),
            wanted,
            **({"rtol": 0, "atol": 0} if exact else tolerance(case)),
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert not exact or bool((found == wanted.reshape(found.shape)).all()), name  # no rounding on the way


def of_kind(kind: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a kind."""
    found = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", found, ids=[case["id"] for case in found])


def double(module: nn.Module) -> Any:
    return module.to(torch.float64)


def weight_quantizer(widths: Iterable[int], scale: Tensor, **options: Any) -> CodedWeight:
    quantizer = double(CodedWeight(list(widths), scales=scale.numel() if scale.dim() else 1, **options))
    quantizer.scale.data.copy_(scale.reshape(quantizer.scale.shape))
    return quantizer


def input_quantizer(stored: Arrays, widths: list[int], prefix: str = "s_", **options: Any) -> ScaledInput:
    quantizer = double(ScaledInput(widths, signed=False, **options))
    for bits in widths:
        quantizer.get_parameter(f"scale_{bits}").data.copy_(stored[f"{prefix}{bits}"])
    return quantizer


def widths_of(case: Case, stored: Arrays) -> list[int]:
    return [int(b) for b in (stored["bits"] if "bits" in stored else case["params"]["bits"])]


def test_every_kind_of_case_has_a_test():
    tested = re.findall(r'^@of_kind\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {case["kind"] for case in CASES} <= {*tested, "mini_train", "mini_train_alt"}


# ---------------------------------------------------------------------------------------------------------------------
# Codes


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


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and starting scales


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


# ---------------------------------------------------------------------------------------------------------------------
# Training


@of_kind("alrs")
def test_scales_have_the_published_learning_rates(case):
    stored, params = load(case), case["params"]
    widths, lr = widths_of(case, stored), float(stored["lam"])
    computed: dict[str, Any] = {"eta_table": [eta(int(lower)) for lower in stored["eta_table_delta"]]}
    computed["eta_table"] = torch.tensor(computed["eta_table"], dtype=torch.float64)
    rules = {"default": "eta", "geometric": "geometric", "scaled": "scaled", "literal_floor0": "literal"}
    for rank, bits in enumerate(sorted(widths, reverse=True)):
        m = float(mean_gradient(stored[f"grad_{bits}"]))
        lower = params["h"] - bits
        computed |= {f"m_{bits}": m, f"eta_{bits}": eta(lower)}
        for name, rule in rules.items():
            rate = alrs_rate(rule, lr, lower, rank=rank, alpha=params["alpha"], gradient=m)
            computed[f"lam_{name}_{bits}"] = rate
    compare(case, stored, {name: torch.as_tensor(value, dtype=torch.float64) for name, value in computed.items()})


@of_kind("pskd")
def test_soft_labels_and_their_losses_are_those_of_self_distillation(case):
    stored, params = load(case), case["params"]
    weight = distillation_weight(params["alpha_T"], params["epoch"], params["epochs"])
    hard = nn.functional.one_hot(stored["y"], params["classes"]).double()
    method = Method(Method.Settings())
    high = soft_targets(hard, stored["memory"], weight)
    taught = stored["logits_high"].softmax(dim=1)
    low = soft_targets(hard, taught, weight)
    computed = {
        "alpha_t": torch.tensor(weight, dtype=torch.float64),
        "target_high": high,
        "memory_after": taught,
        "target_low": low,
        "loss_high": method.loss(stored["logits_high"], high),
        "loss_low": method.loss(stored["logits_low"], low),
    }
    compare(case, stored, computed)


class Watched(Method):
    """The method with the loss of the golden training, which notes what every update leaves behind."""

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.rows: dict[str, list[Any]] = {}

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (logits - targets).square().mean()

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Any:
        for loss in super().losses(model, images, labels):
            self.note(loss=loss.detach())
            layer: Any = model[0]  # type: ignore[index]
            scales = [layer.weight_quantizer.scale, layer.input_quantizer.scale]
            grads: dict[Any, Tensor] = {}
            hooks = [s.register_post_accumulate_grad_hook(lambda s, g=grads: g.update({s: s.grad})) for s in scales]
            yield loss
            self.note(step_grads=torch.stack([grads[scale].detach() for scale in scales]))
            for hook in hooks:
                hook.remove()
            self.note_state(model)

    def note_state(self, model: nn.Module) -> None:
        layer: Any = model[0]  # type: ignore[index]
        reads = layer.input_quantizer
        steps = torch.stack([reads.get_parameter(f"scale_{bits}") for bits in self.widths])
        self.note(W=layer.weight, s_h=layer.weight_quantizer.scale, s_x=steps)

    def note(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.rows.setdefault(name, []).append(value.detach().clone())

    def rates(self, gradient: float) -> list[float]:
        (rate,) = super().rates(gradient)
        self.note(rate=torch.tensor(rate, dtype=torch.float64), m_b=torch.tensor(gradient, dtype=torch.float64))
        return [rate]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        pytest.param(
            case, {"gradient": "chain", "alrs": "scaled"} if case["kind"] == "mini_train_alt" else {}, id=case["id"]
        )
        for case in CASES
        if case["kind"] in ("mini_train", "mini_train_alt")
    ],
)
def test_training_one_layer_by_the_loops_own_step_follows_the_published_trajectory(case, settings):
    stored, params = load(case), case["params"]
    widths = list(params["bits"])
    method = Watched(Watched.Settings(widths=",".join(map(str, widths)), scale_lr=1.0, **settings))
    model: Any = nn.Sequential(nn.Linear(*reversed(stored["W0"].shape), bias=False))
    row = Layer(name="0", kind="linear", macs=1, weights=1, biases=0, channels=len(stored["W0"]))
    modules.replace(model, row, method.weight_quantizer(row, 0), method.input_quantizer(row, 0))
    model.double()
    model[0].weight.data.copy_(stored["W0"])
    model[0].weight_quantizer.scale.data.copy_(stored["s_h0"])
    for bits, start in zip(widths, stored["s_x0"], strict=True):
        model[0].input_quantizer.get_parameter(f"scale_{bits}").data.copy_(start)
    config = Optimizer(name="sgd", lr=params["lam"], momentum=0.0, weight_decay=0.0, schedule="constant")
    optimizers = Optimizers(method.groups(model), config)
    for _ in range(params["iters"]):
        training_step(method, model, model, stored["X"], stored["T"], optimizers)
    computed = {name: torch.stack(values) for name, values in method.rows.items()}
    computed["lam_b"] = computed["rate"] * params["lam"]
    compare(case, stored, computed)


# ---------------------------------------------------------------------------------------------------------------------
# Sensitivities


@of_kind("hutchinson_quadratic")
def test_probes_of_a_quadratic_give_the_products_with_its_matrix(case):
    stored = load(case)
    a, sizes = stored["A"], stored["sizes"].tolist()

    def per_probe(matrix: Tensor, probes: Iterable[Tensor]) -> Tensor:
        parts = [part.clone().requires_grad_() for part in stored["w"].split(sizes)]
        w = torch.cat(parts)
        return torch.stack(list(hutchinson(0.5 * w @ matrix @ w, parts, [probe.split(sizes) for probe in probes])))

    def alone(probe: Tensor, layer: int) -> Tensor:
        return torch.cat([p if i == layer else torch.zeros_like(p) for i, p in enumerate(probe.split(sizes))])

    joint = per_probe(a, stored["probes"])
    layerwise = torch.stack(
        [per_probe(a, [alone(probe, i) for probe in stored["probes"]])[:, i] for i in range(len(sizes))], dim=1
    )
    unit = torch.eye(len(a), dtype=a.dtype)
    exact = per_probe(a, unit).sum(dim=0)
    traces = Traces(layers=tuple("abc"[: len(sizes)]), weights=tuple(sizes), values=exact[None])
    w = stored["w"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * w @ a @ w, w, create_graph=True)
    computed = {
        "Hv": torch.stack([torch.autograd.grad(gradient, w, v, retain_graph=True)[0] for v in stored["probes"]]),
        "exact_block_trace": exact,
        "exact_total_trace": exact.sum(),
        "joint_per_probe": joint,
        "joint_mean": joint.mean(dim=0),
        "layerwise_per_probe": layerwise,
        "layerwise_mean": layerwise.mean(dim=0),
        "avg_trace_exact": torch.tensor(list(traces.average.values()), dtype=a.dtype),
        "diag_case_block_trace": per_probe(torch.diag(stored["D_diag"]), stored["probes"][:1])[0],
    }
    compare(case, stored, {"D_diag": stored["D_diag"], **computed})


@of_kind("hutchinson_softmax")
def test_probes_of_softmax_regression_give_the_published_values_by_our_pass_and_by_autograd(case, monkeypatch):
    stored = load(case)
    net = nn.Sequential(nn.Linear(*reversed(stored["W"].shape), bias=False)).double()
    net[0].weight.data.copy_(stored["W"])
    probes = iter(stored["probes"])
    monkeypatch.setattr("trainables.curvature.signs_like", lambda x, generator: next(probes))
    traces = hessian_traces(net, [(stored["X"], stored["y"])], probes=len(stored["probes"]), signs_in="weights")
    w = stored["W"].clone().requires_grad_()
    loss = nn.functional.cross_entropy(stored["X"] @ w.T, stored["y"])
    by_autograd = torch.stack(list(hutchinson(loss, [w], [[v] for v in stored["probes"]])))
    torch.testing.assert_close(traces.values, by_autograd)
    units = torch.eye(w.numel(), dtype=w.dtype).reshape(-1, *w.shape)
    exact = torch.stack(list(hutchinson(loss, [w], [[unit] for unit in units]))).sum()
    computed = {
        "loss": loss,
        "exact_trace": exact,
        "avg_trace": exact / w.numel(),
        "per_probe": traces.values[:, 0],
        "mean": traces.mean,
    }
    compare(case, stored, computed)


@of_kind("omega")
def test_sensitivities_are_average_traces_times_squared_errors(case):
    stored = load(case)
    widths = widths_of(case, stored)
    weights = {str(i): stored[f"W{i}"] for i in range(case["params"]["L"])}

    def quantized(name: str, weight: Tensor, bits: int) -> Tensor:
        highest = max(widths)
        tensors = {
            "w.codes": high_codes(weight, stored[f"s{name}"], highest),
            "w.weight_quantizer.scale": stored[f"s{name}"],
        }
        return switched(tensors, {"w": highest}, {"w": bits})["w"]

    numel = torch.tensor([w.numel() for w in weights.values()])
    average = dict(zip(weights, (stored["trace"] / numel).tolist(), strict=True))
    table = sensitivity.weighted(average, sensitivity.quantization_errors(weights, widths, quantized))
    omega = torch.tensor([[row[bits] for bits in widths] for row in table.values()], dtype=torch.float64)
    compare(case, stored, {"numel": numel, "omega": omega})


# ---------------------------------------------------------------------------------------------------------------------
# Switching at random


@of_kind("hasb")
def test_sensitive_layers_draw_high_widths_more_often(case):
    stored = load(case)
    widths = widths_of(case, stored)
    computed: dict[str, Any] = {}
    for name, traces in (("avg", stored["trace"] / stored["numel"]), ("raw", stored["trace"])):
        sensitive = sensitive_layers(traces)
        chances = switch_probabilities(sensitive, widths)
        computed |= {f"sensitive_{name}": sensitive, f"threshold_{name}": traces.mean(), f"P_{name}": chances}
        computed[f"expected_bits_{name}"] = chances @ torch.tensor(widths, dtype=torch.float64)
    for name, flag in (("insensitive", False), ("sensitive", True)):
        chances = switch_probabilities(torch.tensor([flag]), widths).expand(len(stored["r"]), -1)
        computed[f"pick_{name}"] = torch.tensor([widths[i] for i in roulette(chances, stored["r"])])
    compare(case, stored, computed)


@of_kind("hasb_resnet20")
def test_the_shipped_traces_tell_sensitive_layers_apart(case):
    stored = load(case)
    inner = stored["avg_trace_all20"][1:-1]
    compare(case, stored, {"threshold": inner.mean(), "sensitive": sensitive_layers(inner)})


@of_kind("hasb_switch")
def test_layers_switch_and_norms_follow_as_published(case):
    stored = load(case)
    widths, epochs, epoch = widths_of(case, stored), int(stored["epochs"]), int(stored["epoch"])
    peak, warmup = float(stored["sigma0"]), int(stored["warmup"])
    rates = [switch_rate(e, epochs, peak=peak, warmup=warmup) for e in range(epochs)]
    ramp = [switch_rate(e, epochs, peak=peak, warmup=0) for e in range(epochs)]
    computed: dict[str, Any] = {
        "sigma_schedule": torch.tensor(rates, dtype=torch.float64),
        "sigma_ramp_paper": torch.tensor(ramp, dtype=torch.float64),
    }
    chances = switch_probabilities(stored["sensitive"], widths)
    picks = [widths[i] for i in roulette(chances, stored["rou"])]
    for outer in widths:
        for name, inherit in (("fresh", False), ("inherit", True)):
            drawn = layer_widths(outer, picks, stored["gate"].tolist(), rates[epoch], inherit=inherit)
            computed[f"layer_bits_{name}_outer{outer}"] = torch.tensor(drawn)
            computed[f"tbn_keys_{name}_outer{outer}"] = torch.tensor(transitions(outer, drawn))
    kept = torch.eye(len(widths), dtype=torch.float64)[:, None, :]
    computed["marginal_fresh"] = rates[epoch] * chances + (1 - rates[epoch]) * kept
    compare(case, stored, computed)


# ---------------------------------------------------------------------------------------------------------------------
# Integer programs


def fixed_sum(widths: list[int], layers: int, total: float) -> Limit:
    return Limit(name="sum_bits", amounts=np.tile(widths, (layers, 1)), at_most=total, at_least=total)


def chosen(widths: list[int], options: Iterable[int]) -> list[int]:
    return [widths[k] for k in options]


@of_kind("ilp")
def test_integer_programs_have_the_optima_that_brute_force_found(case):
    stored = load(case)
    widths, layers = widths_of(case, stored), len(stored["mac"])
    bits, omega = np.array(widths), stored["omega"].numpy()
    tables = {
        "avg_bits_max": np.tile(bits / layers, (layers, 1)),
        "weight_bits_max": np.outer(stored["params"], bits),
        "bops_max": np.outer(stored["mac"], bits**2),
    }
    rows, scores, counts, seconds = [], [], [], []
    every = np.stack(np.meshgrid(*[range(len(widths))] * layers, indexing="ij"), axis=-1).reshape(-1, layers)
    for given in case["params"]["constraints"]:
        limits = [
            fixed_sum(widths, layers, bound)
            if name == "sum_bits_equal"
            else Limit(name=name, amounts=tables[name], at_most=bound)
            for name, bound in given.items()
        ]
        best = allocate(omega, limits)
        rows.append(chosen(widths, best.options))
        scores.append(best.score)
        fits = np.ones(len(every), dtype=bool)
        for limit in limits:
            used = np.take_along_axis(np.asarray(limit.amounts)[None], every[:, :, None], axis=2)[..., 0].sum(axis=1)
            fits &= (used <= limit.at_most + 1e-9) & (used >= limit.at_least - 1e-9)
        objectives = np.sort(np.take_along_axis(omega[None], every[fits][:, :, None], axis=2)[..., 0].sum(axis=1))
        counts.append(int(fits.sum()))
        seconds.append(objectives[1])
        assert best.score == pytest.approx(objectives[0], rel=1e-12)
    computed = {"best_bits": rows, "best_obj": scores, "n_feasible": counts, "second_obj": seconds}
    compare(case, stored, {name: torch.from_numpy(np.array(value)) for name, value in computed.items()})


@of_kind("ilp_paper_linear")
def test_the_linear_program_has_its_optima_in_both_senses(case):
    stored = load(case)
    widths, trace = widths_of(case, stored), stored["avg_trace"].numpy()
    computed: dict[str, Any] = {}
    for name, printed in (("min", True), ("max", False)):
        scores = linear_scores(trace, widths, printed=printed)
        found = [allocate(scores, [fixed_sum(widths, len(trace), int(total))]) for total in stored["sums"]]
        computed[f"{name}_bits"] = torch.tensor([chosen(widths, best.options) for best in found])
        computed[f"{name}_obj"] = torch.tensor([abs(best.score) for best in found], dtype=torch.float64)
    compare(case, stored, computed)


@of_kind("ilp_alg2_pool")
def test_forcing_layers_finds_the_published_pool(case):
    stored = load(case)
    widths, omega = widths_of(case, stored), stored["omega"].numpy()
    found, _ = alternatives(omega, [fixed_sum(widths, len(omega), case["params"]["sum_bits_equal"])])
    computed = {
        "pool_bits": torch.tensor([chosen(widths, each.options) for each in found]),
        "pool_obj": torch.tensor([each.score for each in found], dtype=torch.float64),
    }
    compare(case, stored, computed)


@of_kind("ilp_linear_pool")
def test_forcing_layers_of_the_linear_program_finds_the_published_pool(case):
    stored = load(case)
    widths, trace = widths_of(case, stored), stored["avg_trace"].numpy()
    limit = fixed_sum(widths, len(trace), case["params"]["sum_bits_equal"])
    found, skipped = alternatives(linear_scores(trace, widths), [limit])
    computed = {
        "pool_bits": torch.tensor([chosen(widths, each.options) for each in found]),
        "pool_obj": torch.tensor([-each.score for each in found], dtype=torch.float64),
        "infeasible_skipped": torch.tensor(skipped),
    }
    compare(case, stored, computed)


@of_kind("ilp_resnet20")
def test_the_shipped_traces_have_the_published_linear_optima(case):
    stored = load(case)
    widths, traces = widths_of(case, stored), stored["avg_trace_all20"].numpy()
    computed: dict[str, Any] = {}
    for name, used in (("all20", traces), ("inner18", traces[1:-1])):
        scores = linear_scores(used, widths)
        found = [allocate(scores, [fixed_sum(widths, len(used), int(t))]) for t in stored[f"sums_{name}"]]
        computed[f"best_{name}"] = torch.tensor([chosen(widths, best.options) for best in found])
    compare(case, stored, computed)
