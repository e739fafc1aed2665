"""N2UQ against arrays that the authors' code computed: quantizers, layers, blocks, distillation, rates."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from tests.trainables.golden_n2uq import (
    Settings,
    Tensors,
    block_parts,
    compare,
    filled,
    gradient,
    listed,
    part_parameters,
    published,
    set_thresholds,
    shortcut,
    tensors,
    threshold_parameters,
)
from trainables.config import Optimizer
from trainables.cost import LayerTable, uniform
from trainables.layers import trace
from trainables.methods import _threshold_kernels as threshold_kernels
from trainables.methods._n2uq_kernels import entropy_weight, filter_scale
from trainables.methods._n2uq_modules import LearnedThresholds, PublishedClip
from trainables.methods._threshold_kernels import knots
from trainables.methods.n2uq import Method, published_rate
from trainables.methods.pact import LearnedClip
from trainables.optimizers import Optimizers
from trainables.teachers import distillation_loss


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


def prepared_block(block: nn.Module, bits: int, **settings: Any) -> nn.Module:
    """The block as the method makes it, when it is neither the first nor the last of a network."""
    channels = next(p for p in block.parameters() if p.dim() == 4).shape[1]
    model = nn.Sequential(nn.Conv2d(3, channels, 1), block, nn.Conv2d(last_norm(block).num_features, 2, 1))
    table = trace(model, (3, 6, 6))
    published(**settings).prepare(model, table, uniform(table, bits, bits))
    return model.double()[1]


def last_norm(block: nn.Module) -> nn.BatchNorm2d:
    return [m for name, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and "downsample" not in name][-1]


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
