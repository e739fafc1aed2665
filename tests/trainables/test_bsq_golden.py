"""BSQ against arrays that the authors' code computed: everything that `golden/bsq/index.json` lists, case by case.

Planes after a conversion or an adjustment are compared exactly, other floats of a layer and the regularizer to 1e-5 of
their size, short trainings to 1e-3 absolute, logits of ResNet-20 to 1e-4 (float) and 5e-2 with the same class
(quantized), as the index says. Its networks place quantizers at the ReLUs and keep shortcut convolutions float; the
short trainings run with the public code's slips. The float ResNet-20 is not in this repository (see `arrays`).
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import ROOT, index
from trainables import modules
from trainables.config import Optimizer
from trainables.cost import Bits, LayerBits, LayerTable
from trainables.layers import trace
from trainables.methods._binary_digits import place_values, used
from trainables.methods._bit_plane_sgd import BitPlaneSGD
from trainables.methods._bit_planes import BitPlanes, bit_tensors, penalty
from trainables.methods._bit_report import bit_state, count, float_state, scheme
from trainables.methods._dynamic_range import CodedConv2d, DynamicRange, put_at_relus
from trainables.methods.bsq import Method
from trainables.models import resnet20
from trainables.optimizers import Optimizers

Tensors = dict[str, Tensor]
Settings = dict[str, Any]

LAYER = {"rtol": 1e-5, "atol": 1e-7}
TRAINING = {"rtol": 0.0, "atol": 1e-3}
FLOAT_NETWORK = Path(os.environ.get("RAYSEARCH_BSQ_CHECKPOINT", ROOT / "bsq" / "resnet20_cifar10_fp32.npz"))
"""The released float network; too large for this repository."""


def arrays(file: str) -> Tensors:
    """All arrays of a file by their stored keys."""
    with np.load(ROOT / "bsq" / file) as archive:
        return {name: torch.from_numpy(np.array(value)) for name, value in archive.items()}


def part(tensors: Tensors, prefix: str) -> Tensors:
    """What lies below a prefix."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def listed(file: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a file: its settings, and its arrays without the case's name."""
    stored, cases = arrays(file), index("bsq")["files"][file]["cases"]
    parameters = [(settings, part(stored, name)) for name, settings in cases.items()]
    return pytest.mark.parametrize(("settings", "stored"), parameters, ids=list(cases))


def compare(computed: Mapping[str, Tensor], stored: Tensors, *, exact: tuple[str, ...] = (), **close: float) -> None:
    """Every stored array equals what was computed under its name."""
    assert set(stored) <= set(computed), sorted(set(stored) - set(computed))
    for name, wanted in stored.items():
        tolerance = {"rtol": 0.0, "atol": 0.0} if name.rpartition(".")[2] in exact else close
        found = computed[name].detach().to(wanted.dtype)
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, **tolerance, msg=lambda t, n=name: f"{n}: {t}")


PLANES = ("pweight", "nweight", "pbias", "nbias")


def tensor_of(stored: Tensors, role: str = "weight", **options: Any) -> BitPlanes:
    """The stored planes in our form."""
    positive, negative = stored[f"p{role}"], stored[f"n{role}"]
    planes = positive.shape[-1]
    tensor = BitPlanes(positive.shape[:-1], planes, **options)
    for sign, whole in enumerate((positive, negative)):
        tensor.bit_planes[:planes, sign] = whole.movedim(-1, 0).reshape(planes, -1)
    tensor.scale.copy_(stored["scale" if role == "weight" else "biasscale"].reshape(()))
    return tensor


def raw(tensor: BitPlanes, role: str, trained: Tensor | None = None) -> Tensors:
    """Planes (or something of their shape) and scale in the stored form, whatever their values."""
    width = max(1, tensor.planes)
    whole = tensor.bit_planes[:width].clone() if trained is None else trained
    whole = whole.view(width, 2, *tensor.shape).movedim(0, -1)
    scale = "scale" if role == "weight" else "biasscale"
    return {f"p{role}": whole[0], f"n{role}": whole[1], scale: tensor.scale.clone()}


def roles(stored: Tensors) -> list[str]:
    return ["weight", "bias"] if "pbias" in stored or "bias" in stored else ["weight"]


def layer_of(tensors: dict[str, BitPlanes], settings: Settings) -> nn.Module:
    """A quantized layer around the tensors."""
    shape, bias = tensors["weight"].shape, "bias" in tensors
    if settings["layer"] == "linear":
        linear = nn.Linear(shape[1], shape[0], bias=bias)
        layer: Any = modules.QuantizedLinear(linear, tensors["weight"], None)
    else:
        groups = settings.get("groups", 1)
        options = {"groups": groups, "stride": settings.get("stride", 1), "padding": settings.get("padding", 0)}
        conv = nn.Conv2d(shape[1] * groups, shape[0], shape[2:], bias=bias, **options)
        layer = CodedConv2d(conv, tensors["weight"], None)
    for role, tensor in tensors.items():
        tensor.compose(getattr(layer, role))
    return layer


@listed("convert.npz")
def test_a_float_tensor_becomes_the_published_planes_and_comes_back(settings, stored):
    computed: Tensors = {}
    for role in roles(stored):
        planes = settings["bits"] if role == "weight" else settings["bias_bits"]
        tensor = BitPlanes(stored[role].shape, planes)
        tensor.calibrate(stored[role].clone())
        assert max(1, tensor.planes) == settings["bits_after" if role == "weight" else "bias_bits_after"]
        computed |= raw(tensor, role) | {role: stored[role], f"{role}_effective": tensor.values()}
        if role == "weight":
            assert tensor.planes == settings["bits_after_back_to_float"]
            assert (tensor.planes == 0) == settings["zero_flag"]
            computed |= {"plane_value": place_values(tensor.planes), "weight_back": tensor.values()}
            computed["percent_nonzero"] = used(tensor.bit_planes[: max(1, planes)])
    compare(computed, stored, exact=PLANES, rtol=1e-6, atol=0)


@listed("forward.npz")
def test_float_planes_give_the_published_output_and_gradients(settings, stored):
    tensors = {role: tensor_of(stored, role) for role in roles(stored)}
    layer = layer_of(tensors, settings)
    x = stored["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(stored["upstream_y"])
    computed = {"y": y, "dy.x": x.grad, "weight_unquantized": tensors["weight"].normalized()}
    for role, tensor in tensors.items():
        gradients = {"dy": getattr(layer, role).grad}
        if role == "weight":
            gradients["dW"] = stored["upstream_W"]
        for name, gradient in gradients.items():
            for_planes, for_scale = tensor.gradients(gradient)
            scale = {"weight": "scale", "bias": "biasscale"}[role]
            computed |= {f"{name}.{key}": g for key, g in raw(tensor, role, for_planes).items()}
            computed[f"{name}.{scale}"] = for_scale
        computed |= raw(tensor, role) | {f"{role}_effective": getattr(layer, role)}
    given = {"x": stored["x"], "upstream_W": stored["upstream_W"], "upstream_y": stored["upstream_y"]}
    compare(computed | given, stored, rtol=1e-5, atol=1e-5)
    saturated = float((tensors["weight"].normalized().abs() > 1).float().mean())
    assert saturated == pytest.approx(settings["fraction_saturated"], abs=1e-6)


@pytest.mark.parametrize("case", index("bsq")["files"]["reg.npz"]["cases"])
def test_the_penalty_and_its_gradients_are_the_published_ones(case):
    settings, stored = index("bsq")["files"]["reg.npz"]["cases"][case], arrays("reg.npz")
    total = 0.0
    tensors, computed = [], {}
    for name in settings["layers"]:
        layer = part(stored, name)
        for role in roles(layer):
            elements = layer[f"p{role}"][..., 0].numel()
            share = elements / settings["total_param"]
            tensor = tensor_of(layer, role, penalty=settings["alpha"] * share)
            leaf = torch.zeros(tensor.shape)
            tensor.compose(leaf)
            assert tensor.planes == settings["layers"][name][f"{role}_bits"]
            tensors.append(tensor)
            total += elements
            for_planes, _ = tensor.gradients(torch.zeros_like(leaf))
            computed |= {f"{name}.{key}": x for key, x in raw(tensor, role).items()}
            if role == "weight":
                computed[f"{name}.group_norm"] = tensor.plane_norms[: tensor.planes]
            for key, x in raw(tensor, role, for_planes).items():
                if "scale" not in key:
                    computed[f"{name}.dpen.{key}"] = x
    assert total == settings["total_param"]
    computed[f"{case}.penalty"] = penalty(tensors)
    computed[f"{case}.reg"] = computed[f"{case}.penalty"] * settings["total_param"] / settings["alpha"]
    compare(computed, stored, rtol=1e-5, atol=1e-9)


@listed("adjust.npz")
def test_requantization_and_pruning_give_the_published_planes(settings, stored):
    before, computed = part(stored, "before"), {}
    bits = []
    for role in roles(before):
        tensor = tensor_of(before, role)
        scale = "scale" if role == "weight" else "biasscale"
        computed |= {f"before.{name}": x for name, x in before.items() if name.endswith(role) or name == scale}
        computed[f"before.{role}_effective"] = tensor.values()
        tensor.requantize()
        assert tensor.planes == settings["bits_after_quant" if role == "weight" else "bias_bits_after_quant"]
        computed |= {f"quant.{name}": x for name, x in raw(tensor, role).items()}
        computed[f"quant.{role}_effective"] = tensor.values()
        if role == "weight":
            computed["quant.percent_nonzero"] = used(tensor.bit_planes[: tensor.planes])
        tensor.prune(settings["threshold_percent"], as_published=True)
        bits.append(tensor.planes)
        computed |= {f"prune.{name}": x for name, x in raw(tensor, role).items()}
        computed[f"prune.{role}_effective"] = tensor.values()
        if role == "weight":
            computed["prune.plane_value"] = place_values(tensor.planes)
        tensor.freeze(torch.zeros(tensor.shape))
        computed[f"finetune.{role}"] = tensor.latent
        assert tensor.planes == settings["bits_in_finetune_mode" if role == "weight" else "bias_bits_in_finetune_mode"]
    assert [*bits, 0][:2] == settings["scheme_entry"]
    compare(computed, stored, exact=PLANES, **LAYER)


@listed("act.npz")
def test_activations_are_clipped_and_rounded_as_published(settings, stored):
    x, bits = stored["x"].clone().requires_grad_(), settings["bits"]
    computed = {"x": stored["x"], "upstream": stored["upstream"]}
    if bits == 0:
        y = x * 1  # no quantizer: `method/float_inputs`
    elif "max_abs" in settings:  # the rounding alone, without a clip: the sign takes a bit
        quantizer = DynamicRange(bits + 1, signed=True)
        y = quantizer(x)
        assert float(quantizer._range(stored["x"])[0]) == pytest.approx(settings["max_abs"])
    else:
        quantizer = DynamicRange(bits)
        if "alpha" in settings:
            quantizer.clip_max.data.fill_(settings["alpha"])
        y = quantizer(x)
        assert isinstance(quantizer.clip_max, nn.Parameter) == ("alpha" in settings)
        computed["clipped"] = stored["x"].clamp(0, quantizer.clip_max.item())
    y.backward(stored["upstream"])
    computed |= {"y": y, "dx": x.grad}
    if "dalpha" in stored:
        computed["dalpha"] = quantizer.clip_max.grad
    compare(computed, stored, **LAYER)


@listed("finetune.npz")
def test_a_layer_at_fixed_width_gives_the_published_values_gradients_and_exports(settings, stored):
    bits = part(stored, "bits")
    tensors = {role: tensor_of(bits, role) for role in roles(bits)}
    layer = layer_of(tensors, settings)
    computed = {f"bits.{name}": x for name, x in bits.items()}
    for role, tensor in tensors.items():
        tensor.freeze(getattr(layer, role), mute=role == "bias")
        computed[f"ft.{role}"] = tensor.latent.clone()
    weight = tensors["weight"]
    assert weight.planes == settings["bits_ft"]
    assert "bias" not in tensors or tensors["bias"].planes == settings["bias_bits_ft"]
    weight.latent.copy_(stored["train.weight"].reshape(-1))
    weight.compose(layer.weight)
    x = stored["train.x"].clone().requires_grad_()
    y = layer(x)
    y.backward(stored["train.upstream"])
    for_latent, for_scale = weight.gradients(layer.weight.grad)
    computed |= {f"train.{name}": stored[f"train.{name}"] for name in ("weight", "x", "upstream")}
    computed |= {"train.weight_effective": layer.weight, "train.y": y, "train.dx": x.grad}
    computed |= {"train.dweight": for_latent, "train.dscale": for_scale, "ft.scale": weight.scale}
    assert max(1, weight.planes) == settings["bits_bin"]
    assert weight.planes == settings["bits_float"]
    assert (weight.planes == 0) == settings["zero_flag_bin"]
    for role, tensor in tensors.items():
        positive, negative = tensor.binary_planes()
        scale = {"weight": "scale", "bias": "biasscale"}[role]
        computed |= {f"bin.p{role}": positive, f"bin.n{role}": negative, f"bin.{scale}": tensor.scale}
        computed |= {f"bin.{role}_effective": tensor.values(), f"float.{role}": tensor.values()}
        computed[f"ft.{scale}"] = tensor.scale
    compare(computed, stored, exact=PLANES, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Short trainings


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, down: bool):
        super().__init__()
        stride = 2 if down else 1
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if down:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        features = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(features)) + self.downsample(x))


class Small(nn.Module):
    """The network of `train_small.npz`."""

    def __init__(self, settings: Settings):
        super().__init__()
        c1, c2 = settings["c1"], settings["c2"]
        self.conv1 = nn.Conv2d(3, c1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU()
        self.block = Block(c1, c2, down=settings["down"])
        self.fc = nn.Linear(c2, settings["ncls"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.relu(self.bn1(self.conv1(x)))).mean(dim=(2, 3)))


def state_of(model: nn.Module) -> Tensors:
    """The model's tensors under the stored names: planes as they are, or normalized weights once frozen."""
    state = dict(model.state_dict())
    for layer, role, tensor, _ in bit_tensors(model):
        scale = "scale" if role == "weight" else "biasscale"
        if tensor.frozen:
            state |= {f"{layer}.{role}": tensor.latent, f"{layer}.{scale}": tensor.scale}
        else:
            state |= {f"{layer}.{name}": x for name, x in raw(tensor, role).items()}
    return {name: x.clone() for name, x in state.items()}


def planes_of(model: nn.Module) -> dict[str, list[int]]:
    """Planes of weights and biases, a dead layer with 1."""
    found: dict[str, list[int]] = {}
    for layer, role, tensor, _ in bit_tensors(model):
        found.setdefault(layer, [0, 0])[role == "bias"] = tensor.planes
    return found


class Run:
    """One short training as the public loop does it, with its slips."""

    def __init__(self, settings: Settings, stored: Tensors):
        self.settings, self.stored = settings, stored
        self.model = Small(settings)
        self.model.load_state_dict(part(stored, "float"), strict=False)
        table = trace(self.model, tuple(stored["x"].shape[2:]))
        bits = {row.name: LayerBits(weight=32, activation=settings["act"]) for row in table.quantizable}
        shortcuts = ("block.downsample.0",) if settings["down"] else ()
        self.method = Method(
            Method.Settings(
                penalty_strength=settings["alpha"],
                interval=1,
                start_planes=settings["N"],
                placement="relus",
                float_layers=shortcuts,
                as_published=True,
            ),
            epochs=2,
        )
        self.method.prepare(self.model, table, bits)
        self.method.calibrate(self.model, stored["x"][0])
        counted = [row for row in table.quantizable if row.name not in shortcuts]
        self.parameters = sum(row.weights + row.biases for row in counted)
        self.losses: list[float] = []
        self.penalties: list[float] = []
        self.states: dict[str, Tensors] = {}
        self.schemes: list[dict[str, list[int]]] = []
        self.adjusted("start")

    def optimizers(self, lr: float) -> Optimizers:
        keys = {name: self.settings[name] for name in ("momentum", "weight_decay")}
        groups = [group | keys for group in self.method.groups(self.model)]
        return Optimizers(groups, Optimizer(lr=lr, schedule="constant"))

    def keep(self, name: str) -> None:
        self.states[name] = state_of(self.model)

    def adjusted(self, name: str) -> None:
        self.keep(name)
        self.schemes.append(planes_of(self.model))

    def train(self, optimizers: Optimizers, batches: range) -> None:
        self.model.train()
        for number in batches:
            optimizers.zero_grad()
            share = float(penalty(tensor for _, _, tensor, _ in bit_tensors(self.model)))
            (loss,) = self.method.losses(self.model, self.stored["x"][number], self.stored["target"][number])
            loss.backward()
            self.penalties.append(share / self.settings["alpha"])
            self.losses.append(float(loss.detach()) - share)
            optimizers.step()
            self.method.after_step(self.model)
            if number == 0:
                self.keep("step1")

    def search(self) -> None:
        """Both stretches of steps, each with an optimizer of its own, and an adjustment after each."""
        first, second = self.settings["steps1"], self.settings["steps2"]
        for epoch, batches in ((1, range(first)), (2, range(first, first + second))):
            self.train(self.optimizers(self.settings["lr"]), batches)
            self.keep(f"before_adjust{epoch}")
            assert self.method.after_epoch(self.model, epoch)
            self.adjusted("adjust1" if epoch == 1 else "end")

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.model.eval()(self.stored["x"][0])


@listed("train_small.npz")
def test_a_short_training_gives_the_published_planes_losses_and_schemes(settings, stored):
    run = Run(settings, stored)
    run.search()
    assert run.schemes == settings["schemes_after_each_adjustment"]
    assert run.parameters == settings["total_param"]
    for stage, state in run.states.items():
        compare(state, part(stored, stage) if stage != "end" else without_logits(stored), **TRAINING)
    for stage in ("start", "adjust1", "end"):
        planes = {name: x for name, x in part(stored, stage).items() if name.rpartition(".")[2] in PLANES}
        assert planes
        compare(run.states[stage], planes, rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), stored["task_loss"], **TRAINING)
    torch.testing.assert_close(
        torch.tensor(run.penalties, dtype=torch.float64), stored["reg_over_total"], rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(run.logits(), stored["end.eval_logits"], **TRAINING)
    sizes = {f"{layer}.{role}": leaf.numel() for layer, role, _, leaf in bit_tensors(run.model)}
    planes = {f"{layer}.{role}": tensor.planes for layer, role, tensor, _ in bit_tensors(run.model)}
    assert sum(sizes[name] * planes[name] for name in sizes) == settings["total_bit_end"]


def without_logits(stored: Tensors) -> Tensors:
    return {name: x for name, x in part(stored, "end").items() if name != "eval_logits"}


@listed("finetune_small.npz")
def test_a_short_fine_tuning_gives_the_published_weights_and_both_exports(settings, stored, request):
    name = request.node.callspec.id
    searched = index("bsq")["files"]["train_small.npz"]["cases"][name]
    run = Run(searched, part(arrays("train_small.npz"), name))
    run.search()
    run.losses.clear()
    run.method.freeze(run.model)
    compare(state_of(run.model), part(stored, "start"), **TRAINING)
    run.settings = settings | {"alpha": 1.0}
    run.train(run.optimizers(settings["lr"]), range(settings["steps"]))
    run.keep("end")
    compare(run.states["step1"], part(stored, "step1"), **TRAINING)
    compare(run.states["end"], without_logits(stored), **TRAINING)
    torch.testing.assert_close(torch.tensor(run.losses, dtype=torch.float64), stored["task_loss"], **TRAINING)
    torch.testing.assert_close(run.logits(), stored["end.eval_logits"], **TRAINING)
    found = {layer: list(widths) for layer, widths in scheme(run.model).items()}
    assert found == settings["scheme"] == settings["scheme_float"]
    bits = sum(tensor.planes * leaf.numel() for _, _, tensor, leaf in bit_tensors(run.model))
    assert (run.parameters, bits) == (settings["total_param"], settings["total_bit"])
    for kind, state in (("best_bin", bit_state(run.model)), ("best_float", float_state(run.model))):
        wanted = part(stored, kind)
        logits = wanted.pop("eval_logits")
        compare(state, wanted, exact=PLANES, **TRAINING)
        run.model.load_state_dict(float_state(run.model), strict=False)  # with the biases
        torch.testing.assert_close(run.logits(), logits, **TRAINING)


# ---------------------------------------------------------------------------------------------------------------------
# ResNet-20


def float_resnet20() -> tuple[nn.Module, LayerTable]:
    """The released float network."""
    model = resnet20.build(10, (3, 32, 32))
    table = trace(model, (3, 32, 32))
    stored = {name.removeprefix("module."): x for name, x in arrays(str(FLOAT_NETWORK.resolve())).items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return model.eval(), table


def widths(table: LayerTable, activation: int) -> Bits:
    return {row.name: LayerBits(weight=32, activation=activation) for row in table.quantizable}


def published(table: LayerTable, model: nn.Module, activation: int, **settings: Any) -> Method:
    """The published placement on the published network."""
    method = Method(Method.Settings(placement="relus", float_layers=("*.downsample.0",), **settings))
    method.prepare(model, table, widths(table, activation))
    return method


@torch.no_grad()
def nearer_layout(model: nn.Module, images: Tensor, wanted: Tensor) -> Tensor:
    """The images in the memory layout in which the logits come nearer to those wanted.

    Sums round differently in the last bit in each, and one activation at the edge of a rounding moves all logits.
    """
    layouts = [images, images.contiguous(memory_format=torch.channels_last)]
    return min(layouts, key=lambda x: float((model(x) - wanted).abs().max()))


def listed_logits() -> list[str]:
    names = index("bsq")["files"]["resnet20.npz"]["arrays"]
    return [name.removesuffix(".logits") for name in names if name.endswith(".logits")]


@torch.no_grad()
@pytest.mark.parametrize("name", listed_logits())
def test_resnet20_gives_the_published_logits(name):
    stored = arrays("resnet20.npz")
    model, table = float_resnet20()
    activation = re.search(r"act(\d+)", name)
    if name.startswith("w32_act"):
        assert activation is not None
        put_at_relus(model, {row.name: int(activation[1]) for row in table.quantizable})
    elif name != "fp32_relu":
        assert activation is not None
        layers = index("bsq")["schemes"][name.partition(".")[0]]["layers"]
        published(table, model, int(activation[1]), scheme=layers)
    model.eval()
    wanted = stored[f"{name}.logits"]
    logits = model(nearer_layout(model, stored["batch.x"], wanted))
    atol = 1e-4 if name == "fp32_relu" else 5e-2
    torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
    assert torch.equal(logits.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", index("bsq")["schemes"])
@pytest.mark.parametrize(("convention", "dead"), [("count_true", 0), ("count_bit_representation", 1)])
def test_the_size_of_a_scheme_is_the_published_one(name, convention, dead):
    table = trace(resnet20.build(10, (3, 32, 32)), (3, 32, 32))
    entry = index("bsq")["schemes"][name]
    found, wanted = count(table, entry["layers"], dead=dead), entry[convention]
    assert (found.parameters, found.bits) == (wanted["total_param"], wanted["total_bit"])
    assert found.average_bits == pytest.approx(wanted["avg_bits"], rel=1e-12)
    assert found.compression == pytest.approx(wanted["compression"], rel=1e-12)


def test_the_first_step_of_resnet20_has_the_published_losses_and_gradients():
    settings, stored = index("bsq")["files"]["resnet20.npz"]["cases"]["step"], arrays("resnet20.npz")
    model, table = float_resnet20()
    method = published(table, model, 4, penalty_strength=settings["alpha"])
    method.calibrate(model, stored["batch.x"])
    assert planes_of(model) == settings["scheme_after_initial_adjustment"]
    model.train()
    images = nearer_layout(model, stored["batch.x"], stored["step.logits_train"])
    tensors = list(bit_tensors(model))
    (loss,) = method.losses(model, images, stored["batch.target"])
    share = float(penalty(tensor for _, _, tensor, _ in tensors))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(settings["total_loss"], abs=1e-3)
    assert float(loss.detach()) - share == pytest.approx(settings["cross_entropy"], abs=1e-3)
    assert share == pytest.approx(settings["penalty"], rel=1e-5)
    assert share / settings["alpha"] * settings["total_param"] == pytest.approx(settings["reg"], rel=1e-5)
    regularizers: dict[str, float] = {}
    gradients: Tensors = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for layer, role, tensor, leaf in tensors:
        own = float(penalty([tensor])) / settings["alpha"] * settings["total_param"]
        regularizers[layer] = regularizers.get(layer, 0.0) + own
        assert leaf.grad is not None
        for_planes, for_scale = tensor.gradients(leaf.grad)
        gradients |= {f"{layer}.{name}": x for name, x in raw(tensor, role, for_planes).items()}
        gradients[f"{layer}.{'scale' if role == 'weight' else 'biasscale'}"] = for_scale
    assert regularizers == pytest.approx(settings["reg_per_layer"], rel=1e-5)
    for name, wanted in settings["grad_norm_per_parameter"].items():
        # What batch norm divides out has no gradient but for rounding.
        assert float(gradients[name].norm()) == pytest.approx(wanted, rel=2e-2, abs=1e-4), name
    with torch.no_grad():
        torch.testing.assert_close(model(images), stored["step.logits_train"], rtol=0, atol=5e-2)
    for name, wanted in part(stored, "step.grad").items():
        torch.testing.assert_close(gradients[name], wanted, rtol=2e-2, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


if not FLOAT_NETWORK.exists():  # then there is nothing to compare with
    del test_resnet20_gives_the_published_logits, test_the_first_step_of_resnet20_has_the_published_losses_and_gradients


def test_the_optimizer_of_planes_is_the_one_that_was_tested():
    model = resnet20.build(10, (3, 32, 32))
    table = trace(model, (3, 32, 32))
    planes, _ = published(table, model, 4).groups(model)
    assert planes["optimizer"] is BitPlaneSGD
    assert len(planes["params"]) == len(planes["bit_planes"]) == 21
