"""Residual networks of four kinds of blocks, any depth, width and kernel size: what ResNet-20 and ResNet-18 share.

    basic          two convolutions; He et al. 2015, arXiv:1512.03385, figure 5 left
    preactivation  the same, batch norm and ReLU before each; He et al. 2016, arXiv:1603.05027, figure 1b
    bottleneck     1 x 1, convolution, 1 x 1 to four times the channels; He et al. 2015, figure 5 right
    inverted       1 x 1 to six times the channels, depthwise, linear 1 x 1; Sandler et al. 2018, arXiv:1801.04381

Convolutions have torchvision's names in every kind (`layer1.0.conv2`), so that a search can say the same of all. The
underscore says that this file is no model itself.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from trainables.errors import ConfigError
from trainables.models._kernels import check_kernel

Block = Literal["basic", "preactivation", "bottleneck", "inverted"]
Shortcut = Literal["conv", "pad"]
Stem = Literal["imagenet", "cifar"]


def blocks_of(model: str, depth: int, stages: int) -> int:
    """Blocks of each stage of a network whose depth is 2 x stages x n + 2.

    Raises:
        ConfigError: another depth.
    """
    if depth < 2 * stages + 2 or (depth - 2) % (2 * stages):
        some = ", ".join(str(2 * stages * n + 2) for n in (1, 2, 3))
        raise ConfigError(f"model/depth = {depth}: {model} takes {2 * stages}n + 2, such as {some}")
    return (depth - 2) // (2 * stages)


def check_fields(model: str, width: int, block: str, kernel: int, shortcut: str) -> None:
    """Refuse fields out of range.

    Raises:
        ConfigError: the first of them.
    """
    if width < 1:
        raise ConfigError(f"model/width = {width}: {model} takes 1 channel or more")
    if block not in get_args(Block):
        raise ConfigError(f"model/block = {block!r}: {model} takes one of {', '.join(get_args(Block))}")
    check_kernel(model, kernel)
    if shortcut not in get_args(Shortcut):
        raise ConfigError(f"model/shortcut = {shortcut!r}: {model} takes 'conv' or 'pad'")


class ResNet(nn.Module):
    """(batch, channels, height, width) to (batch, classes).

    Args:
        channels: of the images.
        classes: number of outputs.
        stages: each but the first halves the sides and doubles the channels.
        blocks: of each stage.
        width: channels of the first stage.
        block: kind of the blocks.
        kernel: side of the convolutions in the blocks that are not 1 x 1.
        shortcut: where the shape changes, a 1 x 1 convolution or zeros for the new channels.
        stem: a 3 x 3 convolution, or ImageNet's 7 x 7 of stride 2 and a pooling.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        stages: int,
        blocks: int,
        width: int,
        block: Block = "basic",
        kernel: int = 3,
        shortcut: Shortcut = "conv",
        stem: Stem = "cifar",
    ):
        super().__init__()
        kind = KINDS[block]
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, width, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1: nn.Module = nn.Identity() if kind.normalizes_first else nn.BatchNorm2d(width)
        self.relu: nn.Module = nn.Identity() if kind.normalizes_first else nn.ReLU()
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        outputs = [width, *(width * 2**i * kind.expansion for i in range(stages))]
        for number, (before, after) in enumerate(pairwise(outputs), start=1):
            stride = 1 if number == 1 else 2
            first = kind(before, after, stride, kernel, shortcut)
            rest = (kind(after, after, 1, kernel, shortcut) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.stages = stages
        self.final: nn.Module = nn.Identity()
        if kind.normalizes_first:
            self.final = nn.Sequential(nn.BatchNorm2d(outputs[-1]), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(outputs[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        features = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number in range(1, self.stages + 1):
            features = self.get_submodule(f"layer{number}")(features)
        return self.fc(self.pool(self.final(features)).flatten(1))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    expansion: ClassVar[int] = 1
    normalizes_first: ClassVar[bool] = False

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, kernel, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, kernel)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = self.relu1(self.bn1(self.conv1(images)))
        return self.relu2(self.bn2(self.conv2(features)) + self.downsample(images))


class PreactivationBlock(nn.Module):
    """Two convolutions beside a shortcut that nothing interrupts: batch norm and ReLU come before each convolution."""

    expansion: ClassVar[int] = 1
    normalizes_first: ClassVar[bool] = True

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int, shortcut: Shortcut):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(inputs, outputs, kernel, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, kernel)
        self.downsample = _shortcut(inputs, outputs, stride, shortcut, norm=False)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        active = self.relu1(self.norm1(images))
        kept = images if isinstance(self.downsample, nn.Identity) else self.downsample(active)
        return self.conv2(self.relu2(self.norm2(self.conv1(active)))) + kept


class Bottleneck(nn.Module):
    """A convolution of a quarter of the channels between two of 1 x 1, beside a shortcut."""

    expansion: ClassVar[int] = 4
    normalizes_first: ClassVar[bool] = False

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int, shortcut: Shortcut):
        super().__init__()
        inner = outputs // self.expansion
        self.conv1 = _conv(inputs, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(inner, inner, kernel, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(inner, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = self.relu1(self.bn1(self.conv1(images)))
        features = self.relu2(self.bn2(self.conv2(features)))
        return self.relu3(self.bn3(self.conv3(features)) + self.downsample(images))


class InvertedBlock(nn.Module):
    """A convolution of each channel by itself, of six times the channels, between two of 1 x 1; the last is linear.

    There is a shortcut where the shape stays.
    """

    expansion: ClassVar[int] = 1
    normalizes_first: ClassVar[bool] = False
    FACTOR = 6

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int, shortcut: Shortcut):
        super().__init__()
        hidden = self.FACTOR * inputs
        self.conv1 = _conv(inputs, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU6()
        self.conv2 = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU6()
        self.conv3 = _conv(hidden, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = self.relu1(self.bn1(self.conv1(images)))
        features = self.relu2(self.bn2(self.conv2(features)))
        features = self.bn3(self.conv3(features))
        return features + images if self.adds else features


KINDS: Mapping[str, Any] = {
    "basic": BasicBlock,
    "preactivation": PreactivationBlock,
    "bottleneck": Bottleneck,
    "inverted": InvertedBlock,
}


class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and `channels` channels of zeros around the others."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.before = channels // 2
        self.after = channels - self.before
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, inputs + channels, height / stride, width / stride)."""
        images = images[:, :, :: self.stride, :: self.stride]
        return F.pad(images, (0, 0, 0, 0, self.before, self.after))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int, shortcut: Shortcut, *, norm: bool = True) -> nn.Module:
    """Option B (`conv`) or A (`pad`) where the shape changes."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if shortcut == "pad":
        return PadShortcut(outputs - inputs, stride)
    conv = _conv(inputs, outputs, 1, stride)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs)) if norm else nn.Sequential(conv)
