"""N2UQ against arrays that the authors' code computed.

Whatever `golden/n2uq/index.json` lists goes through our kernels, modules and method, within the tolerances that it
gives, on all paths of the kernels. Every stored array is an input or is compared.
Where the arrays hold a slip of the public code, `as_published` gives it.
"""

import copy
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import get_model
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation

from tests.golden_vectors import Arrays, cases, index, load
from trainables import modules
from trainables.config import Optimizer
from trainables.cost import LayerTable, uniform
from trainables.layers import trace
from trainables.methods import _threshold_kernels as threshold_kernels
from trainables.methods._n2uq_kernels import entropy_weight, filter_scale
from trainables.methods._n2uq_modules import LearnedThresholds, PublishedClip, ResidualBlock, RPReLU
from trainables.methods._threshold_kernels import knots
from trainables.methods.n2uq import Method, published_rate
from trainables.methods.pact import LearnedClip
from trainables.optimizers import Optimizers
from trainables.teachers import distillation_loss

METHOD = "n2uq"

Settings = dict[str, Any]
Tensors = dict[str, Tensor]


def listed(file: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a file."""
    found = cases(METHOD, file)
    return pytest.mark.parametrize(
        ("settings", "arrays"), [case[1:] for case in found], ids=[name for name, _, _ in found]
    )


def tensors(arrays: Arrays) -> Tensors:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def compare(file: str, stored: Tensors, computed: Tensors, *, given: set[str]) -> None:
    """Every stored array is given to the code under test or equals what it computed, within the file's tolerance."""
    assert set(stored) - given == set(computed)
    tolerance = load(METHOD, file)[0]["tolerance"]
    for name, value in computed.items():
        dtype = str(stored[name].dtype).removeprefix("torch.")
        close = {key: number for key, number in tolerance.get(dtype, {}).items() if key in ("rtol", "atol")}
        torch.testing.assert_close(
            value.detach().to(stored[name].dtype).reshape(stored[name].shape),
            stored[name],
            **{"rtol": 0, "atol": 0, **close},  # integers are exact
            msg=lambda text, name=name: f"{name}: {text}",
        )


def filled(parameter: Tensor, value: Tensor) -> None:
    """Set the entries in use of a parameter; those of `widths` are its first."""
    value = value.to(parameter.dtype)
    parameter.data.view(-1)[: value.numel()].copy_(value.reshape(-1))


def set_thresholds(quantizer: LearnedThresholds, stored: Tensors, prefix: str = "") -> dict[str, nn.Parameter]:
    """Give a quantizer its stored parameters; returns them by the names of the arrays."""
    parameters = threshold_parameters(quantizer, prefix)
    for name, parameter in parameters.items():
        filled(parameter, stored[name])
    return parameters


def threshold_parameters(quantizer: LearnedThresholds, prefix: str = "") -> dict[str, nn.Parameter]:
    parts = {"start": "start", "a": "widths", "beta1": "input_scale", "beta2": "output_scale"}
    return {prefix + theirs: getattr(quantizer, ours) for theirs, ours in parts.items()}


def gradient(parameter: nn.Parameter, like: Tensor) -> Tensor:
    """The gradient of the entries in use; those of the others are 0."""
    assert parameter.grad is not None
    flat = parameter.grad.view(-1)
    assert not bool(flat[like.numel() :].any())
    return flat[: like.numel()]


@pytest.fixture(params=["by table", "straight"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once by table, as on a CPU, and once by the straight formulas, as elsewhere."""
    if request.param == "straight":
        monkeypatch.setattr(threshold_kernels, "by_number", lambda x: False)
    return request.param


@listed("act_quant.npz")
def test_thresholds_give_the_published_codes_outputs_and_all_gradients(path, settings, arrays):
    stored = tensors(arrays)
    quantizer = LearnedThresholds(settings["bits"]).to(stored["x"].dtype)
    if settings["kind"].endswith("initial values"):
        for name, parameter in threshold_parameters(quantizer).items():
            torch.testing.assert_close(
                parameter.data.view(-1)[: stored[name].numel()], stored[name], rtol=1e-6, atol=1e-7
            )
    parameters = set_thresholds(quantizer, stored)
    ends, thresholds = knots(quantizer.start, quantizer.widths, quantizer.q_max)
    assert torch.equal(thresholds, quantizer.thresholds)
    x = stored["x"].clone().requires_grad_()
    y = quantizer(x)
    y.backward(stored["g"])
    code = (y / (stored["beta2"] * settings["step"])).round().long()
    computed = {"y": y, "code": code, "grad_x": x.grad, "knots": ends, "thresholds": thresholds}
    computed |= {f"grad_{name}": gradient(p, stored[name]) for name, p in parameters.items()}
    compare("act_quant.npz", stored, computed, given={"x", "g", *parameters})


@listed("weight_quant.npz")
def test_weights_give_the_published_codes_levels_and_gradients(kernels, settings, arrays):
    stored = tensors(arrays)
    w = stored["w"].clone().requires_grad_()
    clip_range = torch.tensor(settings["clip_range"], dtype=w.dtype)
    q_max = torch.tensor(2.0 ** settings["bits"] - 1, dtype=w.dtype)
    wq = entropy_weight(w, q_max, clip_range, rescale=True)
    wq.backward(stored["g"])
    scale = filter_scale(w.detach(), q_max)
    code = (wq / (scale * clip_range / q_max) + q_max / 2).round().long()
    computed = {"wq": wq, "grad_w": w.grad, "scale": scale, "code": code}
    compare("weight_quant.npz", stored, computed, given={"w", "g"})


@listed("quant_conv.npz")
def test_a_quantized_convolution_gives_the_published_output_and_all_gradients(path, kernels, settings, arrays):
    stored = tensors(arrays)
    channels, _, height, width = stored["w"].shape
    plain = nn.Conv2d(
        stored["x"].shape[1],
        channels,
        (height, width),
        stride=settings["stride"],
        padding=settings["padding"],
        groups=settings["groups"],
        bias=False,
    )
    plain.weight.data = stored["w"].clone()
    model = nn.Sequential(nn.Identity(), plain, nn.Identity())
    table = trace(model, tuple(stored["x"].shape[1:]))
    row = table.layers[0]
    rows = (row.__class__(**{**row.__dict__, "first": False, "last": False, "signed": False}),)
    bits = uniform(LayerTable(layers=rows), settings["bits"], settings["bits"])
    Method(Method.Settings(as_published=True)).prepare(model, LayerTable(layers=rows), bits)
    layer: Any = model.to(stored["x"].dtype)[1]
    assert layer.stride == ((1, 1) if height == 1 else (settings["stride"],) * 2)
    parameters = set_thresholds(layer.input_quantizer, stored)
    x = stored["x"].clone().requires_grad_()
    y = model(x)
    y.backward(stored["g"])
    computed = {"y": y, "grad_x": x.grad, "grad_w": layer.weight.grad}
    computed |= {f"grad_{name}": gradient(p, stored[name]) for name, p in parameters.items()}
    compare("quant_conv.npz", stored, computed, given={"x", "g", "w", *parameters})


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def published(**settings: Any) -> Method:
    return Method(Method.Settings(as_published=True, quantize_ends=False, **settings))


def prepared_block(block: nn.Module, bits: int, **settings: Any) -> nn.Module:
    """The block as the method makes it, when it is neither the first nor the last of a network."""
    channels = next(p for p in block.parameters() if p.dim() == 4).shape[1]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), block, nn.Conv2d(last_norm(block).num_features, 2, 1))
    table = trace(model, (3, 6, 6))
    published(**settings).prepare(model, table, uniform(table, bits, bits))
    return model.double()[1]


def last_norm(block: nn.Module) -> nn.BatchNorm2d:
    return [m for name, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and "downsample" not in name][-1]


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def float_block(settings: Settings, stored: Tensors) -> nn.Module:
    """The block before it is quantized, of the shapes of the stored weights."""
    convs = [stored[f"p_conv{i}"] for i in (1, 2, 3) if f"p_conv{i}" in stored]
    inputs, outputs, stride = convs[0].shape[1], convs[-1].shape[0], settings["stride"]
    if settings["block"].endswith("inverted residual"):
        assert convs[0].shape[0] == settings["mid"] == inputs * (settings["mid"] // inputs)
        return InvertedResidual(inputs, outputs, stride, settings["mid"] // inputs)
    down = shortcut(inputs, outputs, stride) if "p_ds_conv" in stored else None
    if settings["block"] == "basic":
        return BasicBlock(inputs, outputs, stride, down)
    assert settings["block"] == "bottleneck"
    assert settings["stride_at"] == "3x3 conv"
    return Bottleneck(inputs, convs[0].shape[0], stride, down)


def block_parts(block: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that arrays begin with: `conv1`, `bn1`, `quan1`, `prelu1`, `ds_q`, `ds_conv`, `ds_bn`."""
    found: dict[str, nn.Module] = {}
    body = [
        (n, m) for n, m in block.named_modules() if isinstance(m, modules.QuantizedConv2d) and "downsample" not in n
    ]
    norms = [m for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and "downsample" not in n]
    for i, ((_, conv), norm) in enumerate(zip(body, norms, strict=True), start=1):
        quantizer: Any = conv.input_quantizer
        found |= {f"conv{i}": conv, f"bn{i}": norm, f"quan{i}": quantizer, f"prelu{i}": quantizer.activation}
    if isinstance(block, ResidualBlock):
        found["prelu3" if len(body) == 2 else "prelu0"] = block.activation
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            found |= {"ds_conv": conv, "ds_bn": norm}
            if isinstance(conv, modules.QuantizedConv2d):
                found["ds_q"] = conv.input_quantizer
    return found


def part_parameters(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by the names of their arrays."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, RPReLU):
            number = name.removeprefix("prelu")
            found |= {f"bias{number}1": part.shift, name: part.slope, f"bias{number}2": part.offset}
        elif isinstance(part, LearnedThresholds):
            found |= threshold_parameters(part, f"{name}_")
        elif isinstance(part, nn.BatchNorm2d):
            found |= {f"{name}_w": part.weight, f"{name}_b": part.bias}
        else:
            found[name] = part.weight
    return found


@listed("blocks.npz")
def test_a_block_gives_the_published_output_statistics_and_all_gradients(settings, arrays):
    stored = tensors(arrays)
    plain = float_block(settings, stored)
    block = prepared_block(plain, settings["bits"], quantize_downsample=not settings["shortcut"].startswith("real"))
    parts = block_parts(block)
    parameters = part_parameters(parts)
    for name, parameter in parameters.items():
        filled(parameter, stored[f"p_{name}"])
    x = stored["x"].clone().requires_grad_()
    y = block.train()(x)
    y.backward(stored["g"])
    computed: Any = {"y": y, "grad_x": x.grad}
    for name, parameter in parameters.items():
        computed[f"grad_{name}"] = gradient(parameter, stored[f"p_{name}"])
    for name, part in parts.items():
        if isinstance(part, nn.BatchNorm2d):
            computed |= {f"buf_after_{name}_mean": part.running_mean, f"buf_after_{name}_var": part.running_var}
    compare("blocks.npz", stored, computed, given={"x", "g", *(f"p_{name}" for name in parameters)})


@listed("mbv2_last_pact.npz")
def test_the_clip_of_the_last_convolution_gives_the_published_gradient_and_that_of_pact(settings, arrays):
    stored = tensors(arrays)
    computed: Any = {}
    for kind, name in ((PublishedClip, "grad_alpha"), (LearnedClip, "grad_alpha_pact_paper")):
        clip = kind(settings["bits"], signed=False, clip_init=1.0).to(stored["x"].dtype)
        filled(clip.clip_max, stored["alpha"])
        x = stored["x"].clone().requires_grad_()
        y = clip(x)
        y.backward(stored["g"])
        computed |= {"y": y, "grad_x": x.grad, name: clip.clip_max.grad}
    compare("mbv2_last_pact.npz", stored, computed, given={"x", "g", "alpha"})


@listed("kd_loss.npz")
def test_the_distillation_loss_is_the_published_one(settings, arrays):
    stored = tensors(arrays)
    student = stored["student"].clone().requires_grad_()
    loss = distillation_loss(student, stored["teacher"])
    loss.backward()
    computed: Any = {"loss": loss, "grad_student": student.grad}
    compare("kd_loss.npz", stored, computed, given={"student", "teacher"})


@listed("schedule.npz")
def test_the_published_schedule_has_the_published_rates_and_ends_at_0(settings, arrays):
    epochs, lr = settings["epochs"], settings["base_lr"]
    rates = torch.tensor([published_rate(epoch, epochs, lr) for epoch in range(1, epochs + 1)], dtype=torch.float64)
    compare("schedule.npz", tensors(arrays), {"lr": rates}, given=set())
    assert rates[-1] == 0


@listed("schedule.npz")
def test_our_linear_schedule_begins_at_the_peak_and_ends_above_0(settings, arrays):
    epochs, lr = settings["epochs"], settings["base_lr"]
    optimizers = Optimizers([{"params": [nn.Parameter(torch.zeros(()))]}], Optimizer(lr=lr, schedule="linear"))
    rates = []
    for epoch in range(epochs):
        optimizers.set_rates(epoch, epochs)
        rates.append(next(iter(optimizers.groups))["lr"])
    assert rates == pytest.approx([lr, *arrays["lr"][:-1]], rel=1e-12)
    assert rates[-1] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Networks


class TinyNet(nn.Module):
    """The net of `tiny_train.npz`, before it is quantized."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.block1 = BasicBlock(channels, channels)
        self.block2 = BasicBlock(channels, 2 * channels, 2, shortcut(channels, 2 * channels, 2))
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.block2(self.block1(functional.relu(self.bn(self.stem(images)))))
        return self.fc(features.mean(dim=(2, 3)))


def tiny_parameters(model: Any) -> dict[str, nn.Parameter]:
    found: dict[str, Any] = {"stem": model.stem.weight, "stembn_w": model.bn.weight, "stembn_b": model.bn.bias}
    for number, block in ((1, model.block1), (2, model.block2)):
        found |= {f"b{number}_{name}": p for name, p in part_parameters(block_parts(block)).items()}
    return found | {"fc_w": model.fc.weight, "fc_b": model.fc.bias}


class GivenTeacher(Method):
    """The method with a teacher's logits instead of the teacher."""

    logits: Tensor

    def teacher_logits(self, images: Tensor, classes: int) -> Tensor:
        assert self.logits.shape == (len(images), classes)
        return self.logits


def with_given_teacher(logits: Tensor, **settings: Any) -> Method:
    method = GivenTeacher(Method.Settings(as_published=True, quantize_ends=False, teacher="resnet20", **settings))
    method.logits = logits
    return method


@listed("tiny_train.npz")
def test_five_steps_give_the_published_losses_groups_and_parameters(settings, arrays):
    stored = tensors(arrays)
    classes = stored["teacher"].shape[1]
    model: Any = TinyNet(settings["channels"], classes)
    table = trace(model, tuple(stored["x"].shape[1:]))
    method = with_given_teacher(stored["teacher"])
    method.prepare(model, table, uniform(table, settings["bits"], settings["bits"]))
    model.double().train()
    parameters = tiny_parameters(model)
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters()}
    for name, parameter in parameters.items():
        filled(parameter, stored[f"init_{name}"])
    labels = torch.zeros(len(stored["x"]), dtype=torch.long)
    names = {id(p): name for name, p in parameters.items()}
    roles = ["weight", "quantizer (lr/10)", "other"]
    found = {names[id(p)]: roles[i] for i, group in enumerate(method.groups(model)) for p in group["params"]}
    assert found == settings["groups"]
    optimizers = Optimizers(
        method.groups(model), Optimizer(name="adam", lr=settings["lr"], weight_decay=0.0, schedule="constant")
    )
    losses = []
    logits = model(stored["x"]).detach()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    for _ in stored["losses"]:
        optimizers.zero_grad()
        for loss in method.losses(model, stored["x"], labels):
            loss.backward()
            losses.append(loss.detach())
        optimizers.step()
    tolerance = load(METHOD, "tiny_train.npz")[0]["tolerance"]["float64"]
    torch.testing.assert_close(torch.stack(losses), stored["losses"], **{"atol": 0, **tolerance["losses"]})
    torch.testing.assert_close(logits, stored["logits0"], **{"atol": 1e-9, **tolerance["losses"]})
    for name, parameter in parameters.items():
        final = stored[f"final_{name}"]
        torch.testing.assert_close(
            parameter.data.view(-1)[: final.numel()].view(final.shape),
            final,
            **tolerance["params"],
            msg=lambda text, name=name: f"{name}: {text}",
        )
    known = {"x", "teacher", "logits0", "losses", *(f"{part}_{n}" for n in parameters for part in ("init", "final"))}
    assert set(stored) == known


def uniform_numbers(count: int, salt: int) -> Tensor:
    """The index's integer hash `u(k, L)` for k = 0 .. count - 1."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(0x9E3779B9) * np.uint64(salt + 1)) & np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return torch.from_numpy((x ^ (x >> np.uint64(16))).astype(np.float64) / 2**32)


def drawn(parameter: Tensor, salt: int, low: float, width: float, count: int | None = None) -> None:
    """Fill (the first entries of) a parameter with `low + width * u`."""
    count = parameter.numel() if count is None else count
    parameter.data.copy_(
        torch.cat([low + width * uniform_numbers(count, salt), parameter.data.reshape(-1)[count:]]).view(
            parameter.shape
        )
    )


def blocks_of(model: nn.Module) -> Iterator[ResidualBlock]:
    yield from (module for module in model.modules() if isinstance(module, ResidualBlock))


def fill_by_formula(model: Any, conv_order: list[str], salt: int) -> None:
    """Weights and parameters of a prepared ResNet, as `formula` of the index says."""
    for position, name in enumerate(conv_order):
        drawn(model.get_submodule(name.replace("shortcut", "downsample.0")).weight, salt + position, -0.05, 0.1)
    drawn(model.fc.weight, salt + 50, -0.1, 0.2)
    drawn(model.fc.bias, salt + 51, -0.1, 0.2)
    drawn(model.bn1.weight, salt + 62, 0.7, 0.6)
    drawn(model.bn1.bias, salt + 63, -0.1, 0.2)
    for number, block in enumerate(blocks_of(model)):
        parts: Any = block_parts(block)
        base = salt + 100 + 20 * number
        for unit, first in ((1, base), (2, base + 6), (3, base + 12)):
            activation = parts[f"prelu{unit}"]
            drawn(activation.shift, first, -0.1, 0.2)
            drawn(activation.slope, first + 1, 0.05, 0.4)
            drawn(activation.offset, first + 2, -0.1, 0.2)
        quantizers = [(parts["quan1"], base + 3), (parts["quan2"], base + 9)]
        norms = [(parts["bn1"], base + 4), (parts["bn2"], base + 10)]
        if "ds_bn" in parts:
            norms.append((parts["ds_bn"], base + 16))
        if "ds_q" in parts:
            quantizers.append((parts["ds_q"], base + 15))
        for norm, first in norms:
            drawn(norm.weight, first, 0.7, 0.6)
            drawn(norm.bias, first + 1, -0.1, 0.2)
        starts, scales = uniform_numbers(3, base + 18), uniform_numbers(6, base + 19)
        for i, (quantizer, first) in enumerate(quantizers):
            steps = int(quantizer.q_max)
            drawn(quantizer.widths, first, 2 / steps * 0.6, 2 / steps * 0.8, steps)
            quantizer.start.data.copy_(0.1 * (starts[i] - 0.5))
            quantizer.input_scale.data.copy_(0.8 + 0.4 * scales[i])
            quantizer.output_scale.data.copy_(0.8 + 0.4 * scales[3 + i])


def gradient_sum(model: Any, name: str) -> float:
    """Sum of the sizes of the gradients of what the index calls `name`."""
    every: dict[str, Callable[[], list[nn.Parameter]]] = {
        "stem_conv": lambda: [model.conv1.weight],
        "fc_w": lambda: [model.fc.weight],
        "all_prelu": lambda: [m.slope for m in model.modules() if isinstance(m, RPReLU)],
        "all_bias_pairs": lambda: [p for m in model.modules() if isinstance(m, RPReLU) for p in (m.shift, m.offset)],
        "all_beta1": lambda: [m.input_scale for m in model.modules() if isinstance(m, LearnedThresholds)],
        "all_beta2": lambda: [m.output_scale for m in model.modules() if isinstance(m, LearnedThresholds)],
        "all_start": lambda: [m.start for m in model.modules() if isinstance(m, LearnedThresholds)],
    }
    if name in every:
        found = every[name]()
    elif match := re.fullmatch(r"(.*)\.quan(\d)\.a", name):
        found = [model.get_submodule(f"{match[1]}.conv{match[2]}.input_quantizer").widths]
    else:
        found = [model.get_submodule(name).weight]
    return sum(float(p.grad.abs().sum()) for p in found if p.grad is not None)


@listed("resnet18_formula.npz")
def test_a_whole_resnet_gives_the_published_logits_loss_means_and_gradient_sums(settings, arrays):
    stored = tensors(arrays)
    batch, classes = stored["logits"].shape
    size, salt = settings["size"], settings["salt"]
    model: Any = get_model("resnet18", num_classes=classes)
    table = trace(model, (3, size, size))
    images = (4 * (uniform_numbers(batch * 3 * size * size, salt + 60) - 0.5)).view(batch, 3, size, size)
    teacher = (4 * (uniform_numbers(batch * classes, salt + 61) - 0.5)).view(batch, classes)
    method = with_given_teacher(teacher, quantize_downsample=settings["quantize_shortcut"])
    method.prepare(model, table, uniform(table, settings["bits"], settings["bits"]))
    model.double().train()
    fill_by_formula(model, settings["conv_order"], salt)
    means: list[Tensor] = []
    for module in (model.maxpool, *blocks_of(model)):
        module.register_forward_hook(lambda m, args, output: means.append(output.detach().mean()))
    logits: list[Tensor] = []
    model.register_forward_hook(lambda m, args, output: logits.append(output.detach()))
    (loss,) = method.losses(model, images, torch.zeros(batch, dtype=torch.long))
    loss.backward()
    sums = torch.tensor([gradient_sum(model, name) for name in settings["gradient_sums"]], dtype=torch.float64)
    computed = {"logits": logits[0], "loss": loss, "stage_means": torch.stack(means), "grad_abs_sums": sums}
    compare("resnet18_formula.npz", stored, computed, given=set())


@cache
def float_network(name: str) -> tuple[nn.Module, LayerTable]:
    """torchvision's network; the published MobileNetV2 has an expansion in the first block, too."""
    model: Any = get_model(name)
    if name == "mobilenet_v2":
        block = model.features[1]
        hidden = block.conv[0][0].in_channels
        first = Conv2dNormActivation(hidden, hidden, kernel_size=1, activation_layer=nn.ReLU6)
        block.conv = nn.Sequential(first, *block.conv)
    return model, trace(model, (3, 64, 64))


@pytest.mark.parametrize(
    ("name", "facts"), index(METHOD)["model_facts"]["models"].items(), ids=list(index(METHOD)["model_facts"]["models"])
)
def test_a_network_has_as_many_parameters_in_each_group_as_published(name, facts):
    match = re.fullmatch(r"(\w+?)_?b(\d)(?:_(qdown|realdown))?", name)
    assert match is not None
    bits = int(match[2])
    plain, table = float_network(match[1].replace("mobilenetv2", "mobilenet_v2"))
    model = copy.deepcopy(plain)
    method = published(quantize_downsample=match[3] != "realdown")
    method.prepare(model, table, uniform(table, bits, bits))
    names = {id(p): name for name, p in model.named_parameters()}
    counts = [0, 0, 0]
    for i, group in enumerate(method.groups(model)):
        for parameter in group["params"]:
            counts[i] += 2**bits - 1 if names[id(parameter)].endswith(".widths") else parameter.numel()
    idle = facts["never_updated_clip_scalars_counted_in_other"]
    assert counts == [facts["weight_group"], facts["quantizer_group"], facts["other_group"] - idle]
    assert sum(counts) == facts["trainable_total"] - idle
