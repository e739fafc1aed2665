"""Bayesian Bits against arrays that the authors' published code computed: gates, quantizers, layers, networks."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import index
from tests.trainables.golden_bayesian_bits import (
    DTYPES,
    EXACT,
    FIXED,
    METHOD,
    Settings,
    State,
    Stored,
    close,
    fixed_bits,
    input_factors,
    listed,
    relative_bops,
    tensors,
)
from trainables.methods import _gated_norm as gated_norm
from trainables.methods._gated_rounding import LEVELS
from trainables.methods._gates import (
    OPEN_ABOVE,
    UNQUANTIZED,
    GatedQuantizer,
    hard_concrete,
    penalties,
    probability_open,
)
from trainables.modules import quantize_output

ONE_LAYER = {"f64": {"rtol": 1e-8, "atol": 1e-10}, "f32": {"rtol": 0.0, "atol": 3e-6}}
ONE_LAYER_GRADIENT = {"f64": {"rtol": 1e-8, "atol": 1e-10}, "f32": {"rtol": 1e-4, "atol": 1e-5}}


def prunes(settings: Settings) -> bool:
    """Whether channel gates act: not with a fixed width, unless pruning is all that is learned."""
    fixed = any(settings.get(flag) for flag in FIXED)
    return bool(settings.get("pruning")) and (not fixed or bool(settings.get("prune_only")))


def quantizer_of(settings: Settings, stored: State, prefix: str = "") -> GatedQuantizer:
    """One quantizer with the stored range and logits."""
    channels = len(stored[f"{prefix}gamma_2"]) if f"{prefix}gamma_2" in stored and prunes(settings) else 0
    quantizer = GatedQuantizer(
        signed=settings["signed"],
        channels=channels,
        bits=fixed_bits(settings),
        noise=None if settings.get("gating_method") == "fixed" else Stored(),
    ).to(DTYPES[settings["dtype"]])
    fill(quantizer, {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)})
    return quantizer


def fill(quantizer: GatedQuantizer, values: State) -> None:
    """Set range and logits from what is stored under the published names."""
    places = {"x_max": "clip_max", "gammas": "gate_logits", "gamma_2": "pruning_logits"}
    for name, place in places.items():
        parameter = getattr(quantizer, place)
        if name in values and parameter is not None:
            parameter.data.copy_(values[name].reshape(parameter.shape))


@listed("gates.npz", lambda name, settings: name == "probabilities")
def test_a_logit_gives_the_published_probabilities_and_gates_of_tests(name, settings, arrays):
    stored = tensors(arrays)
    logits = stored["logit"]
    close(probability_open(logits), stored["p_open"], EXACT, "p_open")
    close(1 - probability_open(logits), stored["p_closed"], EXACT, "p_closed")
    assert torch.equal((logits > OPEN_ABOVE).to(torch.uint8), stored["open_at_test"])
    close(hard_concrete(logits, torch.full_like(logits, 0.5)), stored["deterministic"], EXACT, "deterministic")


@listed("gates.npz", lambda name, settings: name == "samples")
def test_noise_gives_the_published_gates_and_their_slopes(name, settings, arrays):
    stored = tensors(arrays)
    logits = stored["logit"].clone().requires_grad_()
    gates = hard_concrete(logits, stored["u"].double())
    gates.sum().backward()
    close(gates, stored["z"], EXACT, "z")
    assert logits.grad is not None
    close(logits.grad, stored["dz"], EXACT, "dz")


def is_frozen(name: str, settings: Settings) -> bool:
    return "bits" in settings


def tolerance_of_frozen(settings: Settings, stored: State) -> dict[str, float]:
    """In float32 a code of 16 or 32 bits may differ by one."""
    if settings["dtype"] == "f64" or settings["bits"] < 16:
        return ONE_LAYER[settings["dtype"]]
    step = float(stored["x_max"]) * (2 if settings["signed"] else 1) / (2 ** settings["bits"] - 1)
    return {"rtol": 0.0, "atol": max(step * 1.01, 3e-6)}


def frozen_quantizer(settings: Settings, stored: State) -> GatedQuantizer:
    mask = stored.get("mask")
    gates = {} if mask is None else {"gamma_2": torch.where(mask > 0, 6.0, -6.0)}
    quantizer = quantizer_of({**settings, "pruning": True}, {**stored, **gates})
    quantizer.set_bits(settings["bits"])
    assert quantizer.bits == settings["bits"]
    quantizer.frozen = True
    return quantizer


@listed("quantizer_eval.npz", lambda name, settings: not is_frozen(name, settings))
def test_a_quantizer_gives_the_published_values_of_tests(kernels, name, settings, arrays):
    stored = tensors(arrays)
    variants = settings.get("gate_logits", {"": [6.0] * 4})
    for label, logits in variants.items():
        quantizer = quantizer_of(settings, {**stored, "gammas": torch.tensor(logits)}).eval()
        output = "out_" + label if label else "out"
        y = quantizer(stored["x"].to(DTYPES[settings["dtype"]]))
        close(y, stored.pop(output), ONE_LAYER[settings["dtype"]], f"{name} {output}")
        if "gate_2" in stored:
            close(quantizer.channel_gates(), stored["gate_2"], EXACT, "gate_2")
    assert set(stored) - {"x", "x_max", "gamma_2", "gate_2"} == set()


@listed("quantizer_eval.npz", is_frozen)
@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_quantizer_gives_the_published_values(kernels, training, name, settings, arrays):
    stored = tensors(arrays)
    y = frozen_quantizer(settings, stored).train(training)(stored["x"].to(DTYPES[settings["dtype"]]))
    close(y, stored["out"], tolerance_of_frozen(settings, stored), name)


def backward(quantizer: nn.Module, x: Tensor, upstream: Tensor) -> State:
    """Output and gradients under their published names; a parameter without effect has the gradient zero."""
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(upstream.to(y.dtype))
    assert x.grad is not None
    return {"out": y, "d_x": x.grad, **{f"d_{name}": grad for name, grad in gradients(quantizer).items()}}


def gradients(quantizer: Any) -> State:
    places = {"x_max": "clip_max", "gammas": "gate_logits", "gamma_2": "pruning_logits"}
    found = {name: getattr(quantizer, place) for name, place in places.items()}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in found.items() if p is not None}


@listed("quantizer_train.npz", lambda name, settings: not is_frozen(name, settings))
def test_a_quantizer_gives_the_published_gates_values_and_gradients(kernels, name, settings, arrays):
    stored = tensors(arrays)
    quantizer = quantizer_of(settings, stored)
    noise = {level: stored.pop(f"u_{level}") for level in LEVELS if f"u_{level}" in stored}
    of_levels, of_channels = (
        [u for level, u in noise.items() if level > 2],
        [u for level, u in noise.items() if level == 2],
    )
    kind = settings["dtype"]

    def replay(*parts: Tensor) -> None:
        quantizer.noise = None if settings.get("gating_method") == "fixed" else Stored(*parts)

    replay(*of_levels)
    gates = quantizer.gates().detach()
    for position, level in enumerate(LEVELS[1:]):
        gate = stored.pop(f"z_{level}", torch.zeros(1))
        if quantizer.fixed_bits is None:
            close(gates[position], gate, ONE_LAYER[kind], f"z_{level}")
    replay(*(of_channels if quantizer.pruning_logits is not None else []), *of_levels)
    computed = backward(quantizer, stored["x"].to(DTYPES[kind]), stored["upstream"])
    if quantizer.pruning_logits is not None:
        replay(*of_channels)
        computed["z_2"] = quantizer.channel_gates()
    given = {"x", "x_max", "upstream", "gammas", "gamma_2"}
    for key in sorted(set(stored) - given):
        close(computed[key], stored[key], (ONE_LAYER if key == "out" else ONE_LAYER_GRADIENT)[kind], f"{name} {key}")


@listed("quantizer_train.npz", is_frozen)
def test_a_frozen_quantizer_gives_the_published_gradients(kernels, name, settings, arrays):
    stored = tensors(arrays)
    dtype = DTYPES[settings["dtype"]]
    computed = backward(frozen_quantizer(settings, stored), stored["x"].to(dtype), stored["upstream"])
    for key in ("out", "d_x", "d_x_max"):
        close(computed[key], stored[key], ONE_LAYER_GRADIENT[settings["dtype"]], f"{name} {key}")


def folded_layer(
    weight: Tensor, quantizer: GatedQuantizer, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> tuple[Any, gated_norm.FoldedNorm]:
    """A folded layer for weights of a shape, and the norm that holds its statistics."""
    norm: Any
    layer: nn.Module
    if weight.dim() == 4:
        outputs, inputs, *kernel = weight.shape
        layer = nn.Conv2d(inputs * groups, outputs, tuple(kernel), stride, padding, groups=groups, bias=False)
        norm = nn.BatchNorm2d(outputs)
    else:
        layer, norm = nn.Linear(weight.shape[1], weight.shape[0], bias=False), nn.BatchNorm1d(weight.shape[0])
    return gated_norm.folded(layer, norm, quantizer, None)


class Folded(nn.Module):
    """One published layer: folded batch norm, activation, quantizer of what it makes."""

    def __init__(self, layer: nn.Module, norm: nn.Module, activation: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm, self.activation, self.activation_quantizer = layer, norm, activation, quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_quantizer(self.activation(self.norm(self.layer(x))))


def fill_layer(layer: nn.Module, norm: Any, values: State) -> None:
    """Weights, and batch norm under its published names."""
    places = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
    with torch.no_grad():
        layer.weight.copy_(values["weight"])
        for name, place in places.items():
            getattr(norm, place).copy_(values[name])


@listed("folded_bn.npz", lambda name, settings: "kind" in settings)
def test_a_folded_layer_gives_the_published_outputs_gradients_and_statistics(name, settings, arrays):
    stored = tensors(arrays)
    quantized = {"signed": True, "dtype": settings["dtype"], "pruning": settings["pruning"]}
    if settings["quantized"]:
        weights = quantizer_of(quantized, stored, "q/weight:")
        reads = quantizer_of({**quantized, "signed": False}, stored, "q/act:")
    else:
        weights, reads = (GatedQuantizer(signed=True, bits=UNQUANTIZED) for _ in range(2))
    layer, norm = folded_layer(
        stored["weight"], weights, stride=settings["stride"], padding=settings["padding"], groups=settings["groups"]
    )
    activation = {"relu": nn.ReLU(), "relu6": nn.ReLU6()}[settings["activation"]]
    block = Folded(layer, norm, activation, reads).to(DTYPES[settings["dtype"]])
    assert (norm.eps, norm.momentum) == (settings["eps"], settings["momentum"])
    fill_layer(layer, norm, stored)
    tolerance = ONE_LAYER_GRADIENT[settings["dtype"]]
    x = stored["x"].to(DTYPES[settings["dtype"]])
    close(block.eval()(x), stored["eval_out"], ONE_LAYER[settings["dtype"]], "eval_out")
    for role, quantizer in (("weight", weights), ("act", reads)):
        drawn = [
            stored[f"noise/{role}:u_{level}"] for level in (2, 4, 8, 16, 32) if f"noise/{role}:u_{level}" in stored
        ]
        quantizer.noise = Stored(*drawn)
    x = x.requires_grad_()
    y = block.train()(x)
    y.backward(stored["upstream"].to(y.dtype))
    assert x.grad is not None
    computed = {
        "out": y,
        "d_x": x.grad,
        "d_weight": layer.weight.grad,
        "d_gamma": norm.weight.grad,
        "d_beta": norm.bias.grad,
        "running_mean_after": norm.running_mean,
        "running_var_after": norm.running_var,
    }
    for role, quantizer in (("weight", weights), ("act", reads)):
        computed |= {f"d_q/{role}:{key}": value for key, value in gradients(quantizer).items()}
    given = {"x", "weight", "gamma", "beta", "running_mean", "running_var", "eval_out", "upstream"}
    for key in sorted(set(stored) - given):
        if not key.startswith(("q/", "noise/")):
            close(computed[key], stored[key], tolerance, f"{name} {key}")


class ResidualBlock(nn.Module):
    """The published block: both tensors that enter the sum are quantized where they are made."""

    def __init__(self, main: nn.Module, shortcut: nn.Module, quantizer: nn.Module) -> None:
        super().__init__()
        self.main, self.shortcut, self.activation_quantizer = main, shortcut, quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_quantizer(torch.relu(self.main(x) + self.shortcut(x)))


@listed("folded_bn.npz", lambda name, settings: "kind" not in settings)
def test_a_residual_block_gives_the_published_output_with_quantized_sums(name, settings, arrays):
    stored = {key.removeprefix("param/"): value for key, value in tensors(arrays).items()}

    def quantizer(place: str) -> GatedQuantizer:
        described = {"signed": settings["signed"][place], "dtype": settings["dtype"], "pruning": True}
        made = quantizer_of(described, stored, f"{place}:")
        assert made.bits == settings["bits"][place]
        return made

    def folded(place: str, activation: nn.Module, **shape: int) -> nn.Module:
        weight = stored[f"{place}.weight"]
        layer, norm = folded_layer(weight, quantizer(f"{place}.weight_quantizer"), **shape)
        fill_layer(layer, norm, {key.removeprefix(f"{place}."): value for key, value in stored.items()})
        block = nn.Sequential(layer, norm, activation)
        quantize_output(block, quantizer(f"{place}.activation_quantizer"))
        return block

    main = nn.Sequential(
        folded("features.0", nn.ReLU(), stride=settings["stride"], padding=1),
        folded("features.1", nn.Identity(), padding=1),
    )
    shortcut = nn.Identity()
    if "downsample.0.weight" in stored:
        shortcut = folded("downsample.0", nn.Identity(), stride=settings["stride"])
    block = ResidualBlock(main, shortcut, quantizer("activation_quantizer")).to(DTYPES[settings["dtype"]]).eval()
    y = block(stored["x"].to(DTYPES[settings["dtype"]]))
    close(y, stored["eval_out"], ONE_LAYER[settings["dtype"]], name)


def network_quantizers(network: str, names: list[str], pruning: bool, **fields: Any) -> dict[str, GatedQuantizer]:
    """The quantizers of a network as the index describes them, in double precision."""
    described = index(METHOD)["networks"][network]
    found = {}
    for name in names:
        entry = described["live_quantizers"][name]
        found[name] = GatedQuantizer(
            signed=entry["signed"],
            channels=entry["prunable_channels"] if pruning else 0,
            macs_share=None if entry["macs"] is None else entry["macs"] / described["max_macs"],
            **fields,
        ).double()
    return found


def readme_logits(text: str) -> dict[str, Tensor]:
    """`all gamma_2=6, (g4,g8,g16,g32)=(6, 6, -6, -6)`"""
    numbers = re.fullmatch(r"all gamma_2=(\S+), \(g4,g8,g16,g32\)=\((.*)\)", text)
    assert numbers is not None
    return {
        "gamma_2": torch.tensor(float(numbers[1])),
        "gammas": torch.tensor([float(number) for number in numbers[2].split(",")]),
    }


def fill_by_name(quantizers: dict[str, GatedQuantizer], stored: State, default: State) -> None:
    for name, quantizer in quantizers.items():
        values = {key: stored.get(f"{name}:{key}", default.get(key)) for key in ("gammas", "gamma_2", "x_max")}
        for key, value in values.items():
            if value is not None and key == "gamma_2" and quantizer.pruning_logits is not None:
                quantizer.pruning_logits.data.copy_(value)
            elif value is not None and key != "gamma_2":
                fill(quantizer, {key: value})


@listed("penalty.npz")
def test_a_network_gives_the_published_penalty_and_gradients(name, settings, arrays):
    stored = tensors(arrays)
    quantizers = network_quantizers(settings["network"], settings["quantizers"], settings["pruning"])
    default = {} if settings["gammas"] == "stored" else readme_logits(settings["gammas"])
    fill_by_name(quantizers, stored, default)
    for quantizer in quantizers.values():
        if settings["reg_type"] == "const":
            quantizer.macs_share = None
    each = penalties(list(quantizers.values()))
    close(each, stored.pop("per_quantizer"), EXACT, "per_quantizer")
    close(each.sum(), stored.pop("penalty"), EXACT, "penalty")
    each.sum().backward()
    for key in (key for key in stored if ":d_" in key):
        quantizer, _, what = key.partition(":d_")
        close(gradients(quantizers[quantizer])[what], stored[key], EXACT, key)


@listed("bops.npz")
def test_gates_give_the_published_widths_channels_and_bit_operations(name, settings, arrays):
    stored = tensors(arrays)
    network = index(METHOD)["networks"][settings["network"]]
    names = [*settings["weights"], *settings["activations"]]
    quantizers = network_quantizers(settings["network"], names, settings["pruning"])
    spec = settings["spec"]
    for role in ("weights", "activations"):
        logits = spec[role[0]]
        for position, place in enumerate(settings[role]):
            if isinstance(logits, list):
                fill(quantizers[place], {"gammas": torch.tensor(logits)})
            elif logits == "bits":
                quantizers[place].set_bits(int(stored[{"w": "weight_bits", "a": "act_bits"}[role[0]]][position]))
    fill_by_name(quantizers, stored, {})
    output_keep = {place: quantizers[place].open_share() for place in settings["weights"]}
    factors = input_factors(settings["network"], settings["weights"], output_keep)
    keep = [output_keep[place] * factor for place, factor in zip(settings["weights"], factors, strict=True)]
    assert [quantizers[place].bits for place in settings["weights"]] == stored["weight_bits"].tolist()
    assert [quantizers[place].bits for place in settings["activations"]] == stored["act_bits"].tolist()
    close(torch.tensor(keep, dtype=torch.float64), stored["keep"], EXACT, "keep")
    weights = {place: (quantizers[place].bits, share) for place, share in zip(settings["weights"], keep, strict=True)}
    activations = {place: quantizers[place].bits for place in settings["activations"]}
    percent = relative_bops(network, weights, activations)
    close(torch.tensor([percent], dtype=torch.float64), stored["rel_bops_percent"], EXACT, "rel_bops_percent")
