"""SAT and AdaBits against arrays that the authors' own code computed.

Whatever `golden/adabits/index.json` lists goes through our kernels, quantizers, layers and methods, within the
tolerances that it recommends, which are shares of the largest magnitude of an array. Left out, because nothing of ours
corresponds: the clip level of the first layer, which reads the image and never uses it. Evaluation arrays of linear
layers go through `evaluation_as_published`; ours agree with training.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.golden_vectors import Arrays, index, load
from trainables import modules
from trainables.config import Optimizer
from trainables.cost import FLOAT_BITS, LayerBits, bops, payload_bytes
from trainables.layers import trace
from trainables.methods import adabits, sat
from trainables.methods._norm_sets import SwitchableNorm
from trainables.methods._sat_as_published import evaluation_as_published, published_rates
from trainables.methods._sat_kernels import unit_levels
from trainables.methods._sat_quantizers import SatClip, SatWeight
from trainables.methods._switchable_clip import SwitchableClip, position
from trainables.methods.sat import CLIP_INIT
from trainables.models import mobilenet_v1, mobilenet_v2, resnet20
from trainables.optimizers import Optimizers

METHOD = "adabits"
FILES = index(METHOD)["files"]

Settings = dict[str, Any]


def tolerance(file: str) -> float:
    """What the index recommends: a share of the largest magnitude, or relative; 0 is exact."""
    for files, text in index(METHOD)["recommended_tolerance"].items():
        if any(re.fullmatch(part.strip().replace("*", ".*"), file) for part in files.split("/")):
            found = re.search(r"\d+e-\d+", text)
            return float(found[0]) if found else 0.0
    raise KeyError(f"{file} has no tolerance")


def arrays_of(file: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in load(METHOD, file)[1].items()}


def settings_of(file: str, array: str) -> Settings:
    return FILES[file]["arrays"][array].get("settings", {})


def assert_close(found: Tensor | None, wanted: Tensor, file: str, *, like: Tensor | None = None) -> None:
    """`like` is the whole array of which `wanted` is a part."""
    assert found is not None
    largest = float((wanted if like is None else like).double().abs().max())
    torch.testing.assert_close(
        found.detach().reshape(wanted.shape).to(wanted.dtype), wanted, rtol=0, atol=tolerance(file) * largest
    )


def prefixes(file: str, of: str) -> list[str]:
    """What stands before `.of` in the names of a file's arrays."""
    return [name.removesuffix(f".{of}") for name in FILES[file]["arrays"] if name.endswith(f".{of}")]


# ---------------------------------------------------------------------------------------------------------------------
# The quantizers


def test_the_scalar_quantizer_gives_the_published_levels_and_gradients_exactly():
    stored, axes = arrays_of("quantizer.npz"), settings_of("quantizer.npz", "y")
    for i, scheme in enumerate(axes["schemes"]):
        for j, bits in enumerate(axes["bits"]):
            x = stored["x"].clone().requires_grad_()
            y = unit_levels(x, torch.tensor(2.0**bits - 1), scheme=scheme)
            y.backward(stored["upstream"])
            assert_close(y, stored["y"][i, j], "quantizer.npz")
            assert_close(x.grad, stored["grad_x"][i, j], "quantizer.npz")


def target_of(rescale: str) -> Any:
    return None if rescale == "off" else rescale


def effective(quantizer: SatWeight, w: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor | None]:
    w = w.clone().requires_grad_()
    y = quantizer(w)
    y.backward(upstream)
    return y, w.grad


@pytest.mark.parametrize("rescale", ["off", "constant", "stddev"])
@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "w"))
def test_weights_and_their_gradients_are_the_published_ones(layer, rescale):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.w_eff")
    assert rescale in axes["rescale"]
    outputs, gradients = stored[f"{layer}.w_eff"], stored[f"{layer}.grad_w"]
    i = axes["rescale"].index(rescale)
    for j, scheme in enumerate(axes["schemes"]):
        for k, bits in enumerate(axes["bits"]):
            quantizer = SatWeight(bits, scheme=scheme, target=target_of(rescale))
            y, grad = effective(quantizer, stored[f"{layer}.w"], stored[f"{layer}.upstream"])
            assert_close(y, outputs[i, j, k], file, like=outputs)
            assert_close(grad, gradients[i, j, k], file, like=gradients)


@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "fp_w_eff"))
def test_float_weights_and_their_gradients_are_the_published_ones(layer):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.fp_w_eff")
    outputs, gradients = stored[f"{layer}.fp_w_eff"], stored[f"{layer}.fp_grad_w"]
    for i, clamp in enumerate(axes["clamp"]):
        for j, rescale in enumerate(axes["rescale"]):
            quantizer = SatWeight(axes["bits"], scheme="modified", target=target_of(rescale), clamp=clamp)
            y, grad = effective(quantizer, stored[f"{layer}.w"], stored[f"{layer}.upstream"])
            assert_close(y, outputs[i, j], file, like=outputs)
            assert_close(grad, gradients[i, j], file, like=gradients)


def linear(stored: dict[str, Tensor], layer: str, quantizer: SatWeight) -> modules.QuantizedLinear:
    outputs, inputs = stored[f"{layer}.w"].shape
    plain = nn.Linear(inputs, outputs)
    plain.weight.data, plain.bias.data = stored[f"{layer}.w"].clone(), stored[f"{layer}.bias"].clone()
    return modules.QuantizedLinear(plain, quantizer, None)


@pytest.mark.parametrize("layer", prefixes("weight_quant.npz", "eval_w_eff"))
def test_the_published_evaluation_of_a_linear_layer_can_be_had(layer):
    file, stored = "weight_quant.npz", arrays_of("weight_quant.npz")
    axes = settings_of(file, f"{layer}.eval_w_eff")
    weights, biases = stored[f"{layer}.eval_w_eff"], stored[f"{layer}.eval_bias_eff"]
    for i, rescale in enumerate(axes["rescale"]):
        for j, scheme in enumerate(axes["schemes"]):
            for k, bits in enumerate(axes["bits"]):
                quantizer = SatWeight(bits, scheme=scheme, target=target_of(rescale))
                weight, bias = evaluation_as_published(linear(stored, layer, quantizer))
                assert_close(weight, weights[i, j, k], file, like=weights)
                assert_close(bias, biases[i, j, k], file, like=biases)
    axes = settings_of(file, f"{layer}.fp_eval_w_eff")
    weights, biases = stored[f"{layer}.fp_eval_w_eff"], stored[f"{layer}.fp_eval_bias_eff"]
    for i, clamp in enumerate(axes["clamp"]):
        for j, rescale in enumerate(axes["rescale"]):
            quantizer = SatWeight(axes["bits"], scheme="modified", target=target_of(rescale), clamp=clamp)
            weight, bias = evaluation_as_published(linear(stored, layer, quantizer))
            assert_close(weight, weights[i, j], file, like=weights)
            assert_close(bias, biases[i, j], file, like=biases)


def compare_clip(quantizer: SatClip, x: Tensor, upstream: Tensor, wanted: dict[str, Tensor], part: Any) -> None:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(upstream)
    for found, array in zip((y, x.grad, quantizer.clip_max.grad), wanted.values(), strict=True):
        assert_close(found, array[part], "act_quant.npz", like=array)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scheme", settings_of("act_quant.npz", "y")["schemes"])
def test_activations_and_their_gradients_are_the_published_ones(scheme, signed):
    stored, axes = arrays_of("act_quant.npz"), settings_of("act_quant.npz", "y")
    wanted = {name: stored[name] for name in ("y", "grad_x", "grad_alpha")}
    for i, clip_max in enumerate(axes["alpha"]):
        for j, bits in enumerate(axes["bits"]):
            quantizer = SatClip(bits, signed=signed, scheme=scheme, clip_init=clip_max)
            part = (i, axes["double_side"].index(signed), axes["schemes"].index(scheme), j)
            compare_clip(quantizer, stored["x"], stored["upstream"], wanted, part)


@pytest.mark.parametrize("signed", [False, True])
def test_float_activations_are_clipped_as_published(signed):
    stored, axes = arrays_of("act_quant.npz"), settings_of("act_quant.npz", "fp_y")
    wanted = {name: stored[name] for name in ("fp_y", "fp_grad_x", "fp_grad_alpha")}
    for i, clip_max in enumerate(axes["alpha"]):
        quantizer = SatClip(
            axes["bits"], signed=signed, scheme="original", clip_init=clip_max, clip_float=axes["pact_fp"]
        )
        part = (i, axes["double_side"].index(signed))
        compare_clip(quantizer, stored["x"], stored["upstream"], wanted, part)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def method_settings(options: Settings) -> Settings:
    """Ours, of the published options and their defaults."""
    return {
        "weight_scheme": options.get("weight_quant_scheme", "modified"),
        "activation_scheme": options.get("act_quant_scheme", "original"),
        "rescale": options.get("rescale", True),
        "rescale_conv": options.get("rescale_conv", False),
        "rescale_target": options.get("rescale_type", "constant"),
        "clamp": options.get("clamp", True),
    }


def weight_quantizer(kind: str, bits: int, options: Settings) -> SatWeight:
    given = method_settings(options)
    on = given["rescale" if kind == "linear" else "rescale_conv"]
    return SatWeight(
        bits, scheme=given["weight_scheme"], target=given["rescale_target"] if on else None, clamp=given["clamp"]
    )


def plain_layer(kind: str, shape: Settings, arguments: Settings) -> nn.Conv2d | nn.Linear:
    if kind == "linear":
        return nn.Linear(shape["ci"], shape["co"])
    padding = 0 if arguments.get("same_padding") else shape["p"]
    return nn.Conv2d(
        shape["ci"],
        shape["co"],
        shape["k"],
        stride=shape["s"],
        padding=padding,
        groups=shape.get("groups", 1),
        bias=shape.get("bias", False),
    )


def padded_as_tensorflow(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around, the odd one to the right and below, so that a stride divides the sides, rounded up."""
    missing = max(0, (-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1])
    before, after = missing // 2, missing - missing // 2
    return functional.pad(x, (before, after, before, after))


@pytest.mark.parametrize("case", prefixes("layers.npz", "x"))
def test_a_layer_gives_the_published_outputs_and_all_gradients(case, kernels):
    file = "layers.npz"
    stored = {
        name.removeprefix(f"{case}."): value for name, value in arrays_of(file).items() if name.startswith(f"{case}.")
    }
    given = settings_of(file, f"{case}.x")
    kind, options, arguments = given["kind"], given["options"], given["layer_args"]
    both = given["bits"] if isinstance(given["bits"], list) else [given["bits"]] * 2
    weight_bits, activation_bits = (max(b, arguments.get(f"bit{x}_min", 0)) for b, x in zip(both, "wa", strict=True))
    clip = SatClip(
        activation_bits,
        signed=arguments.get("double_side", False),
        scheme=method_settings(options)["activation_scheme"],
        clip_init=given["alpha"],
        clip_float=arguments.get("pact_fp", False),
    )
    unread = arguments.get("weight_only", False) or options.get("weight_only", False)
    plain = plain_layer(kind, given["geometry"], arguments)
    plain.weight.data = stored["w"].clone()
    if "bias" in stored:
        plain.bias.data = stored["bias"].clone()
    wrap = modules.QuantizedLinear if kind == "linear" else modules.QuantizedConv2d
    layer: Any = wrap(plain, weight_quantizer(kind, weight_bits, options), None if unread else clip)  # type: ignore[arg-type]
    x = stored["x"].float().clone().requires_grad_()
    read = x
    if arguments.get("same_padding"):
        read = padded_as_tensorflow(x, given["geometry"]["k"], given["geometry"]["s"])
    clipped: list[Tensor] = []
    clip.register_forward_hook(lambda _, args, output: clipped.append(output))
    y = layer(read)
    for output in clipped:
        output.retain_grad()
    y.backward(stored["upstream"])
    found = {"y": y, "grad_x": x.grad, "grad_w": layer.weight.grad, "grad_alpha": clip.clip_max.grad}
    if layer.bias is not None:
        found["grad_bias"] = layer.bias.grad
    weight, bias = evaluation_as_published(layer)
    with torch.no_grad():
        inputs = read if unread else clip(read)
        found["y_eval"] = (
            functional.linear(inputs, weight, bias) if kind == "linear" else layer._conv_forward(inputs, weight, bias)
        )
    assert set(stored) - {"x", "w", "bias", "upstream"} <= set(found)
    for name in set(stored) & set(found):
        like = summands(clip, read, clipped[0]) if name == "grad_alpha" else None
        assert_close(found[name], stored[name], file, like=like)


def summands(clip: SatClip, x: Tensor, y: Tensor) -> Tensor:
    """The two sums whose difference is the gradient of a clip level, and by which its rounding errors go.

    A difference of sums that nearly cancel has errors above a share of itself: those of the stored one, too, which
    float64 contradicts by more than the tolerance where the sums are 17 times their difference.
    """
    bound = clip.clip_max.detach().abs()
    x, g = x.detach(), y.grad
    inside = (x > (-bound if clip.signed else 0)) & (x < bound)
    assert g is not None
    return torch.stack([(g * y.detach()).sum(), (g * x * inside).sum()]) / bound


# ---------------------------------------------------------------------------------------------------------------------
# Switching


@pytest.mark.parametrize("case", prefixes("switching.npz", "running_mean"))
def test_sets_of_batch_norm_give_the_published_outputs_gradients_and_statistics(case):
    file = "switching.npz"
    stored = {n.removeprefix(f"{case}."): v for n, v in arrays_of(file).items() if n.startswith(f"{case}.")}
    given = settings_of(file, f"{case}.weight")
    widths, options = tuple(given["bits_list"]), given["options"]
    plain = nn.BatchNorm2d(stored["x"].shape[2], eps=given["eps"], momentum=given["momentum"])
    norm = SwitchableNorm(plain, len(widths), shared_affine=options.get("stats_sharing", False))
    norm.weight.data, norm.bias.data = stored["weight"].clone(), stored["bias"].clone()

    def use(bits: int) -> None:
        norm.index.fill_(position(bits, widths, as_published=True) if options.get("switchbn", True) else 0)

    steps = settings_of(file, f"{case}.x")["bits_sequence"]
    for i, bits in enumerate(steps):
        use(bits)
        x = stored["x"][i].clone().requires_grad_()
        y = norm(x)
        y.backward(stored["upstream"][i])
        assert_close(y, stored["y"][i], file, like=stored["y"])
        assert_close(x.grad, stored["grad_x"][i], file, like=stored["grad_x"])
    assert_close(norm.running_mean, stored["running_mean"], file)
    assert_close(norm.running_var, stored["running_var"], file)
    assert torch.equal(norm.num_batches_tracked, stored["num_batches"])
    assert_close(norm.weight.grad, stored["grad_weight"], file)
    assert_close(norm.bias.grad, stored["grad_bias"], file)
    norm.eval()
    for i, bits in enumerate(settings_of(file, f"{case}.y_eval")["bits"]):
        use(bits)
        assert_close(norm(stored["x"][0]), stored["y_eval"][i], file, like=stored["y_eval"])


@pytest.mark.parametrize("case", prefixes("switching.npz", "alpha_init"))
def test_switched_clip_levels_give_the_published_outputs_and_gradients(case):
    file = "switching.npz"
    stored = {n.removeprefix(f"{case}."): v for n, v in arrays_of(file).items() if n.startswith(f"{case}.")}
    given = settings_of(file, f"{case}.alpha_init")
    widths, passes = tuple(given["bits_list"]), settings_of(file, f"{case}.y")
    kind = "linear" if stored["w"].dim() == 2 else "conv"
    options: Settings = {"signed": False, "scheme": passes["act_scheme"], "clip_init": CLIP_INIT[kind]}
    switched = given["switch_alpha"]
    clip = SwitchableClip(widths[-1], levels=len(widths), **options) if switched else SatClip(widths[-1], **options)
    assert_close(clip.clip_max, stored["alpha_init"], file)
    clip.clip_max.data = stored["alpha"].clone()
    weights = weight_quantizer(kind, widths[-1], {"weight_quant_scheme": passes["weight_scheme"]})
    for i, bits in enumerate(passes["bits"]):
        weights.set_bits(bits)
        clip.set_bits(bits)
        if isinstance(clip, SwitchableClip):
            clip.index.fill_(position(bits, widths, as_published=True))
        x, w = (stored[name].clone().requires_grad_() for name in ("x", "w"))
        clip.clip_max.grad = None
        if kind == "linear":
            y = functional.linear(clip(x), weights(w), stored["bias"])
        else:
            y = functional.conv2d(clip(x), weights(w), padding=(stored["y"].shape[-1] - x.shape[-1] + 2) // 2)
        y.backward(stored["upstream"])
        found = {"y": y, "grad_x": x.grad, "grad_w": w.grad, "grad_alpha": clip.clip_max.grad}
        for name, value in found.items():
            assert_close(value, stored[name][i], file, like=stored[name])


# ---------------------------------------------------------------------------------------------------------------------
# Steps of small networks


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


# ---------------------------------------------------------------------------------------------------------------------
# Cost and schedules


def network(label: str) -> tuple[nn.Module, tuple[int, int, int], int, int | None]:
    """Model, input shape, elements that the last pooling reads, and width of the ends (None: the highest)."""
    if found := re.match(r"resnet(\d+)", label):
        return resnet20.build(10, (3, 32, 32), depth=int(found[1])), (3, 32, 32), 64 * 8 * 8, None
    if label.startswith("mobilenet-v1"):
        return mobilenet_v1.build(1000, (3, 224, 224)), (3, 224, 224), 1024 * 7 * 7, 8
    return mobilenet_v2.build(1000, (3, 224, 224)), (3, 224, 224), 1280 * 7 * 7, 8


def profiled(label: str, bits: int, widths: list[int]) -> tuple[Any, dict[str, LayerBits], int]:
    """Layer table, widths of the layers at `bits` as our method has them, and pooled elements."""
    model, shape, pooled, ends = network(label)
    table = trace(model, shape)
    method = adabits.Method(adabits.Method.Settings(widths=",".join(map(str, widths)), ends_bits=ends))
    method.prepare(model, table, {})
    ours = method.bits_at(bits)
    first = table.layers[0].name  # where the published count takes 32 bits for the pixels
    return table, {**ours, first: LayerBits(weight=ours[first].weight, activation=FLOAT_BITS)}, pooled


LABELS = settings_of("profiling.npz", "totals")["rows"]


@pytest.mark.parametrize("label", LABELS)
def test_the_cost_of_every_network_is_the_published_one_under_its_convention(label):
    """Batch norm left out, pooling counted at 32 x 32 bits, a clip level for each layer and trained width."""
    found = re.search(r"(\d+)(-bit| bits)", label.split(" ", 1)[1])
    bits = FLOAT_BITS if "full precision" in label or found is None else int(found[1])
    listed = re.search(r"adaptive \[([\d,]+)\]", label)
    widths = [int(width) for width in listed[1].split(",")] if listed else [bits]
    table, ours, pooled = profiled(label, bits, widths)
    counted = (
        table.macs + pooled,
        sum(layer.weights + layer.biases for layer in table.layers),
        (bops(table, ours) + FLOAT_BITS**2 * pooled) / 1e9,
        (payload_bytes(table, ours, extra_floats=len(widths) * len(table.layers)) - 8 * table.norm_channels) / 1e6,
    )
    np.testing.assert_allclose(
        counted, load(METHOD, "profiling.npz")[1]["totals"][LABELS.index(label)], rtol=tolerance("profiling.npz")
    )


def test_the_cost_of_every_layer_is_the_published_one():
    axes, arrays = settings_of("profiling.npz", "per_layer"), load(METHOD, "profiling.npz")[1]
    text = FILES["profiling.npz"]["arrays"]["per_layer"]["meaning"]
    found = re.search(r"for: ((\S+) adaptive \[([\d,]+)\] running at (\d+) bits)", text)
    assert found is not None
    widths, bits = [int(width) for width in found[3].split(",")], int(found[4])
    table, ours, pooled = profiled(found[1], bits, widths)
    rows = [
        (
            layer.macs,
            layer.weights + layer.biases,
            layer.macs * ours[layer.name].weight * ours[layer.name].activation / 1e9,
            (layer.weights * ours[layer.name].weight / 8 + 4 * layer.biases + 4 * len(widths)) / 1e6,
        )
        for layer in table.layers
    ]
    rows.insert(-1, (pooled, 0, FLOAT_BITS**2 * pooled / 1e9, 0))
    kept = [i for i, name in enumerate(axes["rows"]) if ".bn." not in name]
    np.testing.assert_allclose(rows, arrays["per_layer"][kept], rtol=tolerance("profiling.npz"))


SCHEDULES = {"cos_annealing_iter": "cosine", "exp_decaying_iter": "exponential", "multistep": "multistep"}


def rates(arrays: Arrays, name: str) -> tuple[Settings, np.ndarray]:
    return settings_of("schedules.npz", name), arrays[name]


@pytest.mark.parametrize("name", FILES["schedules.npz"]["arrays"])
def test_learning_rates_are_the_published_ones(name):
    given, wanted = rates(load(METHOD, "schedules.npz")[1], name)
    found = published_rates(
        SCHEDULES[given["lr_scheduler"]],
        lr=given["base_lr_in_config"],
        batch_size=given["batch_size"],
        epochs=given["num_epochs"],
        steps_per_epoch=given["iterations_per_epoch"] or 1,
        milestones=given.get("milestones", ()),
        gamma=given.get("gamma", 0.1),
    )
    np.testing.assert_allclose(found, wanted, rtol=tolerance("schedules.npz"), atol=1e-15)


@pytest.mark.parametrize("name", FILES["schedules.npz"]["arrays"])
def test_the_platforms_own_schedules_give_the_published_rates_where_it_has_them(name):
    given, wanted = rates(load(METHOD, "schedules.npz")[1], name)
    if given["batch_size"] > 256 or given["lr_scheduler"] == "exp_decaying_iter":
        assert SCHEDULES[given["lr_scheduler"]] in ("cosine", "exponential")  # a rise, or a decay, that we do not have
        return
    shares = tuple(epoch / given["num_epochs"] for epoch in given.get("milestones", ()))
    schedule = "steps" if given["lr_scheduler"] == "multistep" else "cosine"
    settings = Optimizer(lr=given["base_lr_in_config"], schedule=schedule, milestones=shares)
    optimizers = Optimizers([{"params": [nn.Parameter(torch.zeros(()))]}], settings)
    found = []
    for step in range(len(wanted)):
        optimizers.set_rates(step, len(wanted))
        found += [group["lr"] for group in optimizers.groups]
    np.testing.assert_allclose(found, wanted, rtol=tolerance("schedules.npz"), atol=1e-15)
