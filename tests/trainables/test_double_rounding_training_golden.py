"""Double Rounding against golden vectors: rates, losses, trajectories, and switching at random."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainables.golden_double_rounding import CASES, compare, load, of_kind, widths_of
from trainables import modules
from trainables.config import Optimizer
from trainables.cost import Layer
from trainables.methods._adaptive_rates import alrs_rate, eta, mean_gradient
from trainables.methods._bit_switching import (
    layer_widths,
    roulette,
    sensitive_layers,
    switch_probabilities,
    switch_rate,
    transitions,
)
from trainables.methods.double_rounding import Method, distillation_weight, soft_targets
from trainables.optimizers import Optimizers
from trainables.step import training_step


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
