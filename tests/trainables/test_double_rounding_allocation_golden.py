"""Double Rounding against golden vectors: Hessian traces, and the integer programs that spend bits by them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis.allocate import allocate, alternatives, linear_scores
from analysis.integer_program import Limit
from tests.trainables.golden_double_rounding import compare, load, of_kind, widths_of
from trainables import sensitivity
from trainables.curvature import Traces, hessian_traces, hutchinson
from trainables.methods._double_round import high_codes
from trainables.methods._stored_codes import switched


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
