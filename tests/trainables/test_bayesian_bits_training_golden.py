"""Trainings of Bayesian Bits against those of the authors' published code; see `golden_bayesian_bits`."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.golden_vectors import cases, index
from tests.trainables.golden_bayesian_bits import (
    AFTER_ADAM,
    DTYPES,
    EXACT,
    METHOD,
    TEST_AFTER_ADAM,
    TRAINING,
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
from trainables import modules
from trainables.config import Optimizer
from trainables.methods import _gated_norm as gated_norm
from trainables.methods._gates import PRUNING_INIT, GatedQuantizer, penalties
from trainables.methods.bayesian_bits import Method
from trainables.optimizers import Optimizers
from trainables.step import training_step


class Net(nn.Module):
    """A golden network, from a description such as `conv3x3(1,3) relu pool2 fc(16,8) relu fc(8,10); no padding`.

    Its modules have the names of the golden set: `features.0`, `classifier.1`.
    """

    def __init__(self, layers: str, quantizer: Callable[[str, int], GatedQuantizer]) -> None:
        super().__init__()
        self.features, self.classifier = nn.ModuleList(), nn.ModuleList()
        tokens = layers.partition(";")[0].split()
        for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
            kind, *rest = re.findall(r"[a-zA-Z]+|\d+", token)
            numbers = [int(number) for number in rest if number.isdigit()]
            part = self.classifier if kind.startswith("fc") else self.features
            place = f"{'classifier' if kind.startswith('fc') else 'features'}.{len(part)}"
            if kind == "pool":
                part.append(nn.MaxPool2d(numbers[0]))
            elif kind != "relu":
                part.append(GoldenLayer(kind, numbers, place, quantizer, acts=following == "relu"))

    def forward(self, x: Tensor) -> Tensor:
        for module in self.features:
            x = module(x)
        x = x.flatten(1)
        for module in self.classifier:
            x = module(x)
        return x

    def named_layers(self) -> Iterator[tuple[str, "GoldenLayer"]]:
        for name, module in self.named_modules():
            if isinstance(module, GoldenLayer):
                yield name, module


class GoldenLayer(nn.Module):
    """One layer with its batch norm, if it has one, and where it acts ReLU and a quantizer of what it makes."""

    def __init__(
        self, kind: str, numbers: list[int], place: str, quantizer: Callable[[str, int], GatedQuantizer], *, acts: bool
    ) -> None:
        super().__init__()
        plain: nn.Module
        norm: Any
        if kind.startswith("fc"):
            inputs, outputs = numbers
            plain, norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)
        else:
            side, _, inputs, outputs, *padding = numbers
            plain, norm = nn.Conv2d(inputs, outputs, side, padding=sum(padding)), nn.BatchNorm2d(outputs)
        weights = quantizer(f"{place}.weight_quantizer", outputs)
        self.layer: Any
        self.norm: Any = nn.Identity()
        if kind.endswith("BN"):
            plain.bias = None
            self.layer, self.norm = gated_norm.folded(plain, norm, weights, None)
        else:
            made: Any = modules.QuantizedLinear if kind.startswith("fc") else modules.QuantizedConv2d
            self.layer = made(plain, weights, None)
        self.activation_quantizer = quantizer(f"{place}.activation_quantizer", 0) if acts else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        return x if self.activation_quantizer is None else self.activation_quantizer(torch.relu(x))

    def named_state(self) -> dict[str, Tensor]:
        """Parameters and statistics under their published names."""
        found = {"weight": self.layer.weight}
        if self.layer.bias is not None:
            found["bias"] = self.layer.bias
        elif isinstance(self.norm, gated_norm.FoldedNorm):
            found |= {"gamma": self.norm.weight, "beta": self.norm.bias}
            found |= {"running_mean": self.norm.running_mean, "running_var": self.norm.running_var}
        roles = {"weight_quantizer": self.layer.weight_quantizer, "activation_quantizer": self.activation_quantizer}
        places = {"x_max": "clip_max", "gammas": "gate_logits", "gamma_2": "pruning_logits"}
        for role, quantizer in roles.items():
            for name, place in places.items():
                if quantizer is not None and getattr(quantizer, place) is not None:
                    found[f"{role}:{name}"] = getattr(quantizer, place)
        return found


def state_of(net: Net) -> dict[str, Tensor]:
    return {
        f"{place}.{name}": value for place, layer in net.named_layers() for name, value in layer.named_state().items()
    }


def load(net: Net, stored: State) -> None:
    """Fill the whole net; every stored value has a place."""
    places = state_of(net)
    assert set(stored) == set(places)
    for name, value in stored.items():
        places[name].data.copy_(value.reshape(places[name].shape))


def quantizers_of(net: Net) -> dict[str, GatedQuantizer]:
    found = {}
    for place, layer in net.named_layers():
        found[f"{place}.weight_quantizer"] = layer.layer.weight_quantizer
        if layer.activation_quantizer is not None:
            found[f"{place}.activation_quantizer"] = layer.activation_quantizer
    return found


def macs_of(settings: Settings) -> dict[str, int]:
    """MACs of the layers that read each tensor: of its own layer for weights, of the next for what a layer makes."""
    macs = settings["macs"]
    own = {f"{place}.weight_quantizer": count for place, count in macs.items()}
    following = zip(macs, list(macs.values())[1:], strict=False)
    return own | {f"{place}.activation_quantizer": count for place, count in following}


def golden_net(settings: Settings, layers: str, *, pruned: bool, gate_init: list[float]) -> Net:
    macs = macs_of(settings) if "macs" in settings else {}
    weights = [token for token in layers.partition(";")[0].split() if token.startswith(("conv", "fc"))]
    made: list[str] = []

    def quantizer(place: str, channels: int) -> GatedQuantizer:
        activation = place.endswith("activation_quantizer")
        made.extend([] if activation else [place])
        return GatedQuantizer(
            signed=not activation,
            channels=channels if pruned and len(made) < len(weights) and not activation else 0,
            gate_init=gate_init,
            bits=fixed_bits(settings, activation=activation),
            macs_share=macs[place] / max(settings["macs"].values()) if macs else None,
            noise=Stored(),
        )

    net = Net(layers, quantizer).to(DTYPES[settings["dtype"]])
    signs = settings["signed"]
    expected = dict(zip(settings["quantizers"], signs, strict=True)) if isinstance(signs, list) else signs
    assert {name: quantizer.signed for name, quantizer in quantizers_of(net).items()} == expected
    return net


def under(stored: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def give_noise(net: Net, stored: State, prefix: str) -> None:
    noise = under(stored, prefix)
    for name, quantizer in quantizers_of(net).items():
        quantizer.noise = Stored(noise[name])


def optimizers_of(method: Method, net: Net, settings: Settings) -> Optimizers:
    """The published rates: 0.001 for all, or what the case says of the weights."""
    sgd = settings.get("optimizer_weights") == "SGD"
    config = Optimizer(
        name="sgd" if sgd else "adam",
        lr=settings.get("lr_weights", 1e-3),
        momentum=0.9,
        nesterov=sgd,
        weight_decay=0.0,
        schedule="constant",
    )
    return Optimizers(method.groups(net), config)


def observed_step(method: Method, net: Net, x: Tensor, y: Tensor, optimizers: Optimizers) -> State:
    """One step of the training loop: logits, losses and gradients under their published names."""
    seen: list[Tensor] = []
    hook = net.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    live = [quantizer for quantizer in quantizers_of(net).values() if not quantizer.frozen]
    penalty = penalties(live).sum().detach() if live else torch.zeros(())
    total = training_step(method, net, net, x, y, optimizers)
    hook.remove()
    entropy = nn.functional.cross_entropy(seen[0], y)
    computed = {"logits": seen[0], "losses": torch.stack([entropy, penalty.to(entropy.dtype), total.to(entropy.dtype)])}
    for name, value in state_of(net).items():
        if isinstance(value, nn.Parameter):
            computed[f"grad/{name}"] = torch.zeros_like(value) if value.grad is None else value.grad
        computed[f"after/{name}"] = value.detach()
    return computed


def hashed(salt: int, bound: float, shape: list[int]) -> Tensor:
    """Weights that the index describes by a hash of their position (`conventions`, `hash_weights`)."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(salt)
    mask, low = np.uint64(0xFFFFFFFF), np.uint64
    h &= mask
    h ^= h >> low(16)
    h = (h * low(0x7FEB352D)) & mask
    h ^= h >> low(15)
    h = (h * low(0x846CA68B)) & mask
    h ^= h >> low(16)
    u = h.astype(np.float64) / 2**32
    return torch.from_numpy((bound * (2 * u - 1)).astype(np.float32).reshape(shape))


def compare_step(stored: State, computed: State, settings: Settings, what: str) -> None:
    """Everything stored of a step is computed alike; of large tensors, samples and sums are stored."""
    kind, stride = settings["dtype"], settings.get("subsample_stride", 1)
    for key, value in stored.items():
        part, _, name = key.partition("/")
        tolerance = (AFTER_ADAM if part.startswith("after") else TRAINING)[kind]
        if part.endswith("_sub"):
            found = computed[f"{part.removesuffix('_sub')}/{name}"].flatten()[::stride]
        elif part == "grad_stats":
            grad = computed[f"grad/{name}"]
            found = torch.stack([grad.sum(), grad.norm(), grad.abs().max()])
        else:
            found = computed[key]
        close(found, value, tolerance, f"{what} {key}")


def percent_of(net: Net, settings: Settings) -> Tensor:
    """Relative bit operations of the net in tests."""
    found = quantizers_of(net)
    weights = [f"{place}.weight_quantizer" for place in settings["macs"]]
    keep = {name: found[name].open_share() for name in weights}
    factors = input_factors("lenet5", weights, keep)
    reads = [None, *(f"{place}.activation_quantizer" for place in settings["macs"])]
    network = {
        "groups": [{"activation": act, "weights": [name]} for act, name in zip(reads, weights, strict=False)],
        "macs_per_layer": settings["macs"],
    }
    shares = {name: (found[name].bits, keep[name] * factor) for name, factor in zip(weights, factors, strict=True)}
    widths = {name: quantizer.bits for name, quantizer in found.items()}
    return torch.tensor([relative_bops(network, shares, widths)], dtype=torch.float64)


LENET5 = "conv5x5(1,32) relu pool2 conv5x5(32,64) relu pool2 fc(1024,512) relu fc(512,10)"


def is_training(name: str, settings: Settings) -> bool:
    return "lambda" in settings


def start_of(settings: Settings, stored: State) -> Net:
    """The net before its first step."""
    pruned = any(name.endswith("gamma_2") for name in stored)
    net = golden_net(settings, settings.get("layers", LENET5), pruned=pruned, gate_init=[0.0] * 4)
    made = {name: hashed(**how) for name, how in settings.get("hash_weights", {}).items()}
    initial = under(stored, "init/")
    assert all(torch.equal(initial[name], made[name]) for name in set(initial) & set(made))
    load(net, made | initial)
    return net


def check_training(settings: Settings, stored: State) -> None:
    """Every step, and the net in tests after the last one."""
    net, kind = start_of(settings, stored), settings["dtype"]
    method = Method(Method.Settings(penalty_strength=settings["lambda"]))
    optimizers = optimizers_of(method, net, settings)
    x = stored["x"].to(DTYPES[kind])
    for step in sorted({name.split("/")[0] for name in stored if name.startswith("step")}):
        give_noise(net, stored, f"{step}/noise/")
        computed = observed_step(method, net.train(), x, stored["y"], optimizers)
        wanted = {key: value for key, value in under(stored, f"{step}/").items() if not key.startswith("noise/")}
        compare_step(wanted, computed, settings, step)
    with torch.no_grad():
        close(net.eval()(x), stored["eval_after/logits"], TEST_AFTER_ADAM[kind], "eval_after/logits")
    close(percent_of(net, settings), stored["eval_after/rel_bops_percent"], EXACT, "rel_bops_percent")


@listed("train_steps.npz", is_training)
def test_training_steps_give_the_published_losses_gradients_and_parameters(kernels, name, settings, arrays):
    check_training(settings, tensors(arrays))


@listed("train_step_lenet5.npz", is_training)
def test_a_step_of_lenet5_gives_the_published_losses_gradients_and_parameters(name, settings, arrays):
    check_training(settings, tensors(arrays))


@listed("train_steps.npz", lambda name, settings: "gate_init" in settings)
def test_calibration_as_published_starts_ranges_and_statistics_alike(name, settings, arrays):
    stored = tensors(arrays)
    ((_, sibling, _),) = [case for case in cases(METHOD, "train_steps.npz") if f"calibration_{case[0]}" == name]
    described = {**sibling, **settings}
    net = golden_net(described, sibling["layers"], pruned=True, gate_init=settings["gate_init"])
    assert settings["pruning_init"] == PRUNING_INIT
    for place, layer in net.named_layers():
        for key, value in under(stored, f"weights/{place}.").items():
            layer.named_state()[key].data.copy_(value)
    give_noise(net, stored, "noise/")
    method = Method(Method.Settings(calibration="published"))
    method.calibrate(net, stored["x"].to(DTYPES[settings["dtype"]]))
    found = quantizers_of(net)
    ranges = torch.stack([found[place].clip_max.detach() for place in settings["quantizers"]])
    close(ranges, stored["x_max"], TRAINING[settings["dtype"]], "x_max")
    for key, value in under(stored, "after/").items():
        close(state_of(net)[key], value, TRAINING[settings["dtype"]], key)


@listed("train_steps.npz", lambda name, settings: name.startswith("freeze_"))
def test_freezing_and_a_step_of_fine_tuning_give_the_published_network(name, settings, arrays):
    stored = tensors(arrays)
    source, step = re.search(r"(\S+)/(step\d+)/after", settings["start"]).groups()  # type: ignore[union-attr]
    ((_, before, first),) = [case for case in cases(METHOD, "train_steps.npz") if case[0] == source]
    start = tensors(first)
    net = golden_net(before, before["layers"], pruned=True, gate_init=[0.0] * 4)
    load(net, under(start, f"{step}/after/"))
    x, kind = start["x"].to(DTYPES[settings["dtype"]]), settings["dtype"]
    assert {name: quantizer.bits for name, quantizer in quantizers_of(net).items()} == settings["bits"]
    close(net.eval()(x), stored["before/logits"], TRAINING[kind], "before/logits")
    method = Method(Method.Settings(scale_lr=1e-4))
    method.freeze(net)
    close(net(x), stored["after/logits"], TRAINING[kind], "after/logits")
    for place, mask in under(stored, "mask/").items():
        close(quantizers_of(net)[place].channel_gates(), mask, EXACT, place)
    for key, value in under(stored, "after/").items():
        if key != "logits":
            close(state_of(net)[key], value, TRAINING[kind], f"after/{key}")
    config = Optimizer(name="sgd", lr=1e-4, momentum=0.9, nesterov=True, weight_decay=0.0)
    computed = observed_step(method, net.train(), x, start["y"], Optimizers(method.groups(net), config))
    computed["loss"] = computed["losses"][2]
    compare_step(under(stored, "step1/"), computed, settings, "step1")


def test_every_file_and_case_of_the_index_is_put_through_a_test():
    known = {
        "quantizer_eval.npz",
        "quantizer_train.npz",
        "gates.npz",
        "penalty.npz",
        "bops.npz",
        "folded_bn.npz",
        "train_steps.npz",
        "train_step_lenet5.npz",
    }
    assert set(index(METHOD)["files"]) == known
    for name, settings, _ in cases(METHOD, "train_steps.npz"):
        assert is_training(name, settings) or "gate_init" in settings or name.startswith("freeze_"), name
