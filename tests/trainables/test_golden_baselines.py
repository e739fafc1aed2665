"""LSQ, PACT and DoReFa-Net against arrays that public implementations of the papers computed.

Whatever `golden/baselines/index.json` lists goes through our quantizers, layers and methods, with eager and with
compiled kernels, within the tolerances that the index gives. Every stored array is an input or is compared, but for:

- `grad_kwang`, one implementation's identity over the whole weight formula, is no gradient of the paper and not ours.
  Its output `y_kwang` is the paper's, computed with a float32 tanh, so it is compared with `y_A` and ours alike.
- `y` of the one-bit DoReFa activation is that implementation's bug (sign, not rounding); `y_paper` stands beside it.
- `max_abs_tanh` is an intermediate value: variant C divided by variant A.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import Arrays, cases, load
from trainables import modules
from trainables.cost import Layer, LayerBits, uniform
from trainables.layers import trace
from trainables.method import Method
from trainables.methods import dorefa, lsq, pact
from trainables.methods.dorefa import DorefaWeight, UnitActivation
from trainables.methods.lsq import LearnedScale
from trainables.methods.pact import LearnedClip

METHOD = "baselines"

Settings = dict[str, Any]


def listed(file: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a file."""
    found = cases(METHOD, file)
    return pytest.mark.parametrize(
        ("settings", "arrays"), [case[1:] for case in found], ids=[name for name, _, _ in found]
    )


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def compare(file: str, stored: dict[str, Tensor], computed: dict[str, Tensor], *, given: set[str]) -> None:
    """Every stored array is given to the code under test or equals what it computed, within the file's tolerance."""
    assert set(stored) - given <= set(computed), "the index lists arrays that this test does not know"
    tolerance = load(METHOD, file)[0]["tolerance"]
    for name in set(stored) - given:
        dtype = str(stored[name].dtype).removeprefix("torch.")
        close = tolerance.get(dtype, {"rtol": 0, "atol": 0})  # integers are exact
        torch.testing.assert_close(
            computed[name].detach().to(stored[name].dtype).reshape(stored[name].shape),
            stored[name],
            **close,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def forward_and_backward(quantizer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of `sum(output * g)` for `x`; parameters keep theirs."""
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(g)
    assert x.grad is not None
    return y, x.grad


def filled(parameter: nn.Parameter, value: float | Tensor) -> None:
    """Set a parameter in its own precision; a float32 initial value would not do for float64 vectors."""
    parameter.data.copy_(torch.as_tensor(value, dtype=parameter.dtype).reshape(parameter.shape))


@listed("lsq.npz")
def test_lsq_gives_the_published_codes_outputs_gradients_and_initial_steps(kernels, settings, arrays):
    stored = tensors(arrays)
    x, step = stored["x"], stored["s"]
    quantizer = LearnedScale(
        settings["bits"],
        signed=settings["mode"] != "unsigned",
        symmetric=settings["mode"] == "signed_symmetric",
        scales=step.numel() if settings["per_channel"] else 1,
        shared=True,
    ).to(x.dtype)
    assert (float(quantizer.q_min), float(quantizer.q_max)) == (settings["Qn"], settings["Qp"])
    quantizer.calibrate(x)
    computed = {"s_init": quantizer.scale.detach().clone()}
    filled(quantizer.scale, step)
    computed["y"], computed["grad_x"] = forward_and_backward(quantizer, x, stored["g"])
    computed["grad_s"], computed["code"] = quantizer.scale.grad, quantizer.codes(x)
    compare("lsq.npz", stored, computed, given={"x", "g", "s"})


@listed("pact.npz")
def test_pact_gives_the_published_outputs_and_gradients(kernels, settings, arrays):
    stored = tensors(arrays)
    quantizer = LearnedClip(settings["bits"], signed=False, clip_init=settings["alpha"]).to(stored["x"].dtype)
    filled(quantizer.clip_max, settings["alpha"])
    y, grad_x = forward_and_backward(quantizer, stored["x"], stored["g"])
    computed = {"y": y, "grad_x": grad_x, "grad_alpha": quantizer.clip_max.grad}
    compare("pact.npz", stored, computed, given={"x", "g"})


@listed("dorefa_act.npz")
def test_dorefa_gives_the_published_activations_and_at_one_bit_those_of_the_paper(kernels, settings, arrays):
    stored = tensors(arrays)
    if "y_paper" in stored:
        stored["y"] = stored.pop("y_paper")
    quantizer = UnitActivation(settings["bits"], signed=False).to(stored["x"].dtype)
    y, grad_x = forward_and_backward(quantizer, stored["x"], stored["g"])
    compare("dorefa_act.npz", stored, {"y": y, "grad_x": grad_x}, given={"x", "g"})


@listed("dorefa_weight.npz")
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_dorefa_gives_the_published_weights_and_gradients_of_each_variant(kernels, settings, arrays, variant):
    stored = tensors(arrays)
    output, gradient = ("y", "grad") if "y" in stored else ("y_C" if variant == "C" else "y_A", f"grad_{variant}")
    wanted = {name: stored[name] for name in ("w", "g", output, gradient)}
    quantizer = DorefaWeight(settings["bits"], variant=variant).to(stored["w"].dtype)
    y, grad = forward_and_backward(quantizer, stored["w"], stored["g"])
    compare("dorefa_weight.npz", wanted, {output: y, gradient: grad}, given={"w", "g"})


@listed("dorefa_weight.npz")
def test_dorefa_variants_differ_by_the_largest_tanh_alone(kernels, settings, arrays):
    stored = tensors(arrays)
    y = {v: DorefaWeight(settings["bits"], variant=v).to(stored["w"].dtype)(stored["w"]) for v in "ABC"}
    assert torch.equal(y["A"], y["B"])
    if "y" in stored:  # one bit has a scale of its own
        assert torch.equal(y["A"], y["C"])
        return
    torch.testing.assert_close(y["C"], y["A"] * stored["max_abs_tanh"])
    torch.testing.assert_close(stored["y_kwang"].double(), y["A"].double(), rtol=0, atol=1e-6)


def row(**fields: Any) -> Layer:
    return Layer(**{"name": "layer", "kind": "conv", "macs": 1, "weights": 1, "biases": 0, "channels": 1, **fields})


def method_named(settings: Settings, **more: Any) -> Method:
    """The method that a case's free text names, with the settings it implies."""
    name = settings["method"]
    variant = re.search(r"variant ([ABC])", name)
    if name.startswith("LSQ"):
        return lsq.Method(lsq.Method.Settings(per_channel="per channel" in settings.get("weight", ""), **more))
    module: Any = pact if name.startswith("PACT") else dorefa
    assert name.startswith(("PACT", "DoReFa"))
    assert variant is not None
    return module.Method(module.Method.Settings(variant=variant[1], **more))


@listed("conv_layers.npz")
def test_a_quantized_convolution_gives_the_published_output_and_all_gradients(kernels, settings, arrays):
    stored = tensors(arrays)
    channels, inputs, height, width = stored["w"].shape
    plain = nn.Conv2d(
        inputs, channels, (height, width), stride=settings["stride"], padding=settings["padding"], bias=False
    )
    plain.weight.data = stored["w"].clone()
    method = method_named(settings)
    reads = row(channels=channels, signed=settings.get("act") == "signed")
    layer = modules.QuantizedConv2d(
        plain,
        method.weight_quantizer(reads, settings["bits_w"]),
        method.input_quantizer(reads, settings["bits_a"]),
    ).to(stored["x"].dtype)
    steps = {"s_w": (layer.weight_quantizer, "scale"), "s_a": (layer.input_quantizer, "scale")}
    parameters = {name: getattr(*place) for name, place in steps.items() if name in stored}
    for name, parameter in parameters.items():
        filled(parameter, stored[name])
    if "alpha" in settings:
        parameters["alpha"] = layer.input_quantizer.clip_max
        filled(parameters["alpha"], settings["alpha"])
    y, grad_x = forward_and_backward(layer, stored["x"], stored["g"])
    computed = {"y": y, "grad_x": grad_x, "grad_w": layer.weight.grad}
    computed |= {f"grad_{name}": parameter.grad for name, parameter in parameters.items()}
    compare("conv_layers.npz", stored, computed, given={"x", "g", "w", *steps})


class Tiny(nn.Module):
    """The net of `tiny_train.npz`; the second activation is a module of its own, because pooling lies behind it."""

    def __init__(self, arrays: dict[str, Tensor], first: nn.Module, second: nn.Module):
        super().__init__()
        channels, inputs = arrays["init_c1"].shape[:2]
        more, classes = arrays["init_c2"].shape[0], arrays["init_fc_w"].shape[0]
        self.conv1 = nn.Conv2d(inputs, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = first
        self.conv2 = nn.Conv2d(channels, more, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(more)
        self.act2_quantizer = second
        self.fc = nn.Linear(more, classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.act1(self.bn1(self.conv1(images)))
        features = self.act2_quantizer(self.bn2(self.conv2(features)))
        return self.fc(features.mean(dim=(2, 3)))


WEIGHTS = {
    "c1": "conv1.weight",
    "c2": "conv2.weight",
    "fc_w": "fc.weight",
    "fc_b": "fc.bias",
    **{f"bn{i}_{short}": f"bn{i}.{name}" for i in (1, 2) for short, name in (("w", "weight"), ("b", "bias"))},
}
STEPS = {
    "s1": "conv1.weight_quantizer.scale",
    "s2_w": "conv2.weight_quantizer.scale",
    "s2_a": "conv2.input_quantizer.scale",
    "s3_w": "fc.weight_quantizer.scale",
    "s3_a": "fc.input_quantizer.scale",
}
CLIPS = {"alpha1": "conv2.input_quantizer.clip_max", "alpha2": "act2_quantizer.clip_max"}


def lsq_net(settings: Settings, stored: dict[str, Tensor]) -> tuple[Tiny, Method]:
    """All three layers quantized, 8 bits at the ends."""
    model, method = Tiny(stored, nn.ReLU(), nn.ReLU()), method_named(settings)
    table = trace(model, tuple(stored["x"].shape[1:]))
    method.prepare(model, table, uniform(table, settings["bits"], settings["bits"]))
    return model, method


def pact_net(settings: Settings, stored: dict[str, Tensor]) -> tuple[Tiny, Method]:
    """Stem and classifier stay real; the first PACT is what the middle layer reads, the second stands alone."""
    penalty = re.search(r"lambda=([-+.e\d]+)", settings["alpha_penalty"])
    assert penalty is not None
    method = method_named(settings, clip_init=settings["alpha_init"], clip_penalty=float(penalty[1]))
    second = method.input_quantizer(row(), settings["bits"])
    model = Tiny(stored, nn.Identity(), second)
    reads = row(name="conv2")
    width = LayerBits(weight=settings["bits"], activation=settings["bits"])
    modules.replace(
        model, reads, method.weight_quantizer(reads, width.weight), method.input_quantizer(reads, width.activation)
    )
    return model, method


@listed("tiny_train.npz")
def test_training_a_small_net_gives_the_published_losses_and_parameters(kernels, settings, arrays):
    stored = tensors(arrays)
    is_lsq = settings["method"].startswith("LSQ")
    model, method = (lsq_net if is_lsq else pact_net)(settings, stored)
    model.to(stored["x"].dtype)
    places = WEIGHTS | (STEPS if is_lsq else CLIPS)
    parameters = {name: model.get_parameter(place) for name, place in places.items()}
    assert {name.removeprefix("init_") for name in stored if name.startswith("init_")} == set(parameters)
    for name in set(parameters) - set(STEPS):
        filled(parameters[name], stored[f"init_{name}"])
    method.calibrate(model, stored["x"])
    computed = {f"init_{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(
        [{"params": group["params"]} for group in method.groups(model)],
        lr=settings["lr"],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
    )
    losses = []
    for _ in stored["losses"]:
        optimizer.zero_grad()
        for loss in method.losses(model, stored["x"], stored["labels"]):
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    computed |= {f"final_{name}": parameter for name, parameter in parameters.items()}
    tolerance = load(METHOD, "tiny_train.npz")[0]["tolerance"][str(stored["x"].dtype).removeprefix("torch.")]
    torch.testing.assert_close(torch.stack(losses), stored["losses"], **{"atol": 0, **tolerance["losses"]})
    assert set(stored) - {"x", "labels", "losses"} == set(computed)
    for name, value in computed.items():
        torch.testing.assert_close(
            value.detach(), stored[name], **tolerance["params"], msg=lambda t, n=name: f"{n}: {t}"
        )
