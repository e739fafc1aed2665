"""SAT and AdaBits against golden arrays: training steps of small networks."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.trainables.golden_adabits import FILES, Settings, arrays_of, assert_close, method_settings, settings_of
from trainables.config import Optimizer
from trainables.cost import LayerBits
from trainables.layers import trace
from trainables.methods import adabits, sat
from trainables.methods._norm_sets import SwitchableNorm
from trainables.methods._sat_as_published import evaluation_as_published
from trainables.optimizers import Optimizers


class Residual(nn.Module):
    """`relu(body(x) + shortcut(x))`."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class Separable(nn.Module):
    """A depthwise and a pointwise convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Small(nn.Module):
    """The networks of the `step_*` files, with their names."""

    def __init__(self, entry: Settings):
        super().__init__()
        few, many, classes = (entry["channels_and_classes"][name] for name in ("c0", "c1", "classes"))
        text = entry["architecture"]
        stride = re.search(r"head: conv 3->c0 3x3 stride (\d)", text)
        assert stride is not None
        self.head = nn.Sequential(
            nn.Conv2d(3, few, 3, stride=int(stride[1]), padding=1, bias=False), nn.BatchNorm2d(few), nn.ReLU()
        )
        self.names = [name for name in ("b1", "b2", "d1") if f" {name}: " in text]
        for name in self.names:
            block = {"b1": (Residual, few, few, 1), "b2": (Residual, few, many, 2), "d1": (Separable, few, many)}[name]
            self.add_module(name, block[0](*block[1:]))  # type: ignore[operator]
        self.classifier = nn.Sequential(nn.Linear(many, classes))

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(images)
        for name in self.names:
            features = self.get_submodule(name)(features)
        return self.classifier(features.mean(dim=(2, 3)))


def prepared(entry: Settings, shape: tuple[int, int, int]) -> tuple[Small, sat.Method]:
    """The network of an entry, made by our method: AdaBits, or SAT where a single width is trained."""
    options, widths = entry["options"], entry["options"]["bits_list"]
    model = Small(entry)
    table = trace(model, shape)
    ends = None if "max(bits_list)" in entry["architecture"] else 8
    given = method_settings(options)
    if not options["adaptive_training"]:
        single = sat.Method(sat.Method.Settings(**given))
        edge = max(widths[-1], ends or 0)
        bits = {
            row.name: LayerBits(weight=edge if row.first or row.last else widths[-1], activation=widths[-1])
            for row in table.layers
        }
        single.prepare(model, table, bits)
        return model, single
    text = ",".join(map(str, widths))
    switched = adabits.Method(
        adabits.Method.Settings(**given, widths=text, switch_clip=options["switch_alpha"], ends_bits=ends)
    )
    switched.prepare(model, table, {})
    return model, switched


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Our tensor of a published name."""
    if norm := re.fullmatch(r"(.*)\.bn\.(\d+)\.(\w+)", name):
        module, value = model.get_submodule(norm[1]), getattr(model.get_submodule(norm[1]), norm[3])
        return value[int(norm[2])] if isinstance(module, SwitchableNorm) else value
    if name.endswith(".alpha"):
        return model.get_parameter(name.removesuffix("alpha") + "input_quantizer.clip_max")
    return model.get_parameter(name)


def gradient_of(model: nn.Module, name: str) -> Tensor | None:
    if norm := re.fullmatch(r"(.*)\.bn\.(\d+)\.(\w+)", name):
        grad = model.get_parameter(f"{norm[1]}.{norm[3]}").grad
        switched = isinstance(model.get_submodule(norm[1]), SwitchableNorm)
        return grad[int(norm[2])] if switched and grad is not None else grad
    return tensor_of(model, name).grad


def part(stored: dict[str, Tensor], prefix: str, without: list[str]) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name not in without}


def published_logits(model: Small, images: Tensor) -> Tensor:
    """Logits of evaluation as the authors' code computes them."""
    layer: Any = model.classifier[0]
    read: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model.eval()(images)
        hook.remove()
        return functional.linear(layer.input_quantizer(read[0]), *evaluation_as_published(layer))


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("step_")])
def test_steps_of_a_small_network_give_the_published_losses_gradients_and_states(file):
    entry, stored = FILES[file], arrays_of(file)
    options, absent = entry["options"], entry["parameters_without_gradient"]
    model, method = prepared(entry, tuple(stored["x"].shape[2:]))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in part(stored, "init/", absent).items():
            tensor_of(model, name).copy_(value)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, *others = method.groups(model)
    assert {names[id(parameter)] for parameter in decayed["params"]} == set(entry["decayed_parameters"])
    assert all(group["weight_decay"] == 0 for group in others)
    settings = Optimizer(
        lr=options["lr"], momentum=0.9, nesterov=True, weight_decay=options["weight_decay"], schedule="constant"
    )
    optimizers = Optimizers(method.groups(model), settings)
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, args, output: logits.append(output.detach()))
    model.train()
    for step in range(len(stored["x"])):
        optimizers.zero_grad()
        logits.clear()
        losses = []
        for loss in method.losses(model, stored["x"][step].float(), stored["y"][step]):
            loss.backward()
            losses.append(loss.detach())
        assert len(losses) == len(entry["passes_per_step"])
        wanted = part(stored, f"step{step + 1}/", absent)
        found = {"loss": torch.stack(losses), "logits": torch.stack(logits)}
        for name in wanted:
            if "/" not in name:
                assert_close(found[name], wanted[name], file)
        for name, value in part(stored, f"step{step + 1}/grad/", absent).items():
            assert_close(gradient_of(model, name), value, file)
        optimizers.step()
        for name, value in part(stored, f"step{step + 1}/state/", absent).items():
            assert_close(tensor_of(model, name), value, file)
    hook.remove()
    for i, bits in enumerate(settings_of(file, "eval_logits")["bits"]):
        if isinstance(method, adabits.Method):
            method.switch(model, bits)
        assert_close(published_logits(model, stored["x"][0].float()), stored["eval_logits"][i], file)
