"""How tensors lie in memory: which weights stay in torch's default layout, and that no result depends on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.trainables.exporting import Exported
from trainables import plugins
from trainables.cost import LayerBits
from trainables.export.packed_writer import save_packed
from trainables.heavy_convolution import convolve
from trainables.layers import trace
from trainables.layouts import lay_out
from trainables.method import Method
from trainables.modules import quantized_layers
from trainables.packed import load_packed

CHANNELS_LAST = torch.channels_last
SHAPE = (256, 8, 8)


class Network(nn.Module):
    """A convolution on maps of 8 x 8, one that makes maps of 4 x 4, and a block of two on those."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(256, 128, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(128)
        self.down = nn.Conv2d(128, 256, 3, stride=2, padding=1)
        self.heavy = nn.Conv2d(256, 256, 3, padding=1)
        self.pointwise = nn.Conv2d(256, 1024, 1)
        self.classifier = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        read = torch.relu(self.norm(self.wide(images)))
        read = torch.relu(self.down(read))
        read = read + torch.relu(self.heavy(read))
        return self.classifier(torch.relu(self.pointwise(read)).mean((2, 3)))


def prepared(device: str = "cpu", method: str = "lsq") -> tuple[Method, Any]:
    torch.manual_seed(0)
    model = Network()
    table = trace(model, SHAPE)
    plugin = plugins.attribute("methods", method, "Method")
    instance = plugin(plugin.Settings())
    instance.prepare(model, table, {row.name: LayerBits(weight=4, activation=4) for row in table.layers})
    lay_out(model, torch.device(device))
    return instance, model


def default_layout(model: nn.Module) -> set[str]:
    return {
        name.removesuffix(".weight")
        for name, weight in model.named_parameters()
        if weight.dim() == 4 and not weight.is_contiguous(memory_format=CHANNELS_LAST)
    }


def test_convolutions_with_many_weights_on_small_maps_keep_the_default_layout():
    assert default_layout(prepared()[1]) == {"down", "heavy"}  # not `wide`, on a large map, and 1 x 1 is both


def test_on_other_devices_everything_is_channels_last():
    assert default_layout(prepared("meta")[1]) == set()


def images_and_labels(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return images.contiguous(memory_format=CHANNELS_LAST), torch.randint(0, 10, (count,), generator=generator)


def order(tensor: Tensor) -> list[int]:
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@torch.no_grad()
def off_the_clip(model: nn.Module) -> None:
    """Percentiles put clip levels on an element; the last bit of a sum would decide whether it has a gradient."""
    for name, parameter in model.named_parameters():
        if "scale" in name:
            parameter.mul_(0.97)


@pytest.mark.parametrize("count", [2, 3])  # 32 positions of a map of 4 x 4, and more
@pytest.mark.parametrize("method", ["lsq", "n2uq", "double_rounding"])
def test_a_training_step_gives_the_gradients_of_channels_last(method: str, count: int):
    images, labels = images_and_labels(count)
    (instance, mixed), (other, plain) = prepared(method=method), prepared(method=method)
    plain.to(memory_format=CHANNELS_LAST)
    for _, layer in quantized_layers(plain):
        layer.heavy = False
    for method_of_it, model in ((instance, mixed.double()), (other, plain.double())):
        method_of_it.calibrate(model, images)
        off_the_clip(model)
        model.train()
        for loss in method_of_it.losses(model, images, labels):
            loss.backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in mixed.named_parameters():
        expected = gradients[name].grad
        assert (parameter.grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
            assert order(parameter.grad) == order(parameter)  # torch's fused optimizers rely on it


def test_what_a_heavy_convolution_makes_is_channels_last_again():
    instance, model = prepared()
    images, _ = images_and_labels()
    instance.calibrate(model, images.float())
    made: list[Tensor] = []
    model.heavy.register_forward_hook(lambda layer, inputs, output: made.append(output))
    model.train()(images.float())
    model.eval()(images.float())
    assert all(output.is_contiguous(memory_format=CHANNELS_LAST) for output in made)
    assert len(made) == 2


@pytest.mark.parametrize("method", ["lsq", "sat", "n2uq"])
def test_a_packed_network_of_any_layout_has_the_size_and_the_logits_of_the_trained_one(method: str, tmp_path: Path):
    network = Exported({"method": method, "model": "resnet18", "data": "cifar10"}, {})
    assert "layer4.1.conv2" in default_layout(network.model)
    path = tmp_path / "network.safetensors"
    save_packed(path, network.model, network.config)
    assert path.stat().st_size == network.size_bytes
    images = network.noise(17)
    assert torch.equal(load_packed(path)(images), network.logits(images))


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.sampled_from([torch.contiguous_format, CHANNELS_LAST]),
)
def test_a_heavy_convolution_is_a_convolution(maps, kernel, stride, padding, dilation, bias, layout):  # type: ignore[no-untyped-def]
    assume(all(s + 2 * p > d * (k - 1) for s, p, d, k in zip(maps[1:], padding, dilation, kernel, strict=True)))
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, bias=bias).double()
    x = torch.randn(maps[0], 3, *maps[1:], dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    expected = layer(x)
    made = convolve(layer, x, layer.weight, layer.bias)
    torch.testing.assert_close(made, expected)
    assert made.is_contiguous(memory_format=layout) or x.is_contiguous()
    g = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(made, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
