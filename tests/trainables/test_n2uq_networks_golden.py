"""N2UQ against golden arrays: steps of a tiny network, whole ResNets, and the size of their groups."""

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
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation

from tests.golden_vectors import index, load
from tests.trainables.golden_n2uq import (
    METHOD,
    block_parts,
    compare,
    filled,
    listed,
    part_parameters,
    published,
    shortcut,
    tensors,
)
from trainables.config import Optimizer
from trainables.cost import LayerTable, uniform
from trainables.layers import trace
from trainables.methods._n2uq_modules import LearnedThresholds, ResidualBlock, RPReLU
from trainables.methods.n2uq import Method
from trainables.optimizers import Optimizers


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
