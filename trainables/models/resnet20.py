"""CIFAR ResNet-20 and its deeper kin (depth 6n + 2), 41 M MACs.

He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385, section 4.2: a convolution and three
stages of n blocks with 16, 32 and 64 channels, batch norm after each convolution, ReLU after each sum.
"""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F

from trainables.errors import ConfigError

INPUT_SHAPE = (3, 32, 32)
CLASSES = 10

Shortcut = Literal["conv", "pad"]


def build(
    classes: int, input_shape: tuple[int, int, int], *, depth: int = 20, width: int = 16, shortcut: Shortcut = "conv"
) -> nn.Module:
    """A CIFAR ResNet for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input.
        depth: layers with weights along the longest path, 6n + 2 with n >= 1: 20, 32, 44, 56, 110.
        width: channels of the first stage, >= 1; the others have twice and four times as many.
        shortcut: where the shape changes, `conv` is the paper's option B, a 1 x 1 convolution with batch norm, and
            `pad` its option A, every second pixel and zeros for the new channels.

    Raises:
        ConfigError: a field out of range.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"model/depth = {depth}: resnet20 takes 6n + 2, such as 20, 32, 44, 56 or 110")
    if width < 1:
        raise ConfigError(f"model/width = {width}: resnet20 takes 1 channel or more")
    if shortcut not in get_args(Shortcut):
        raise ConfigError(f"model/shortcut = {shortcut!r}: resnet20 takes 'conv' or 'pad'")
    return ResNet(input_shape[0], classes, (depth - 2) // 6, width, shortcut)


class ResNet(nn.Module):
    """(batch, channels, height, width) to (batch, classes)."""

    def __init__(self, channels: int, classes: int, blocks: int, width: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, 1, blocks, shortcut)
        self.layer2 = _stage(width, 2 * width, 2, blocks, shortcut)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.fc(self.pool(features).flatten(1))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 and shortcut == "conv":
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )
        elif stride != 1:
            self.downsample = PadShortcut(outputs - inputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = self.relu1(self.bn1(self.conv1(images)))
        return self.relu2(self.bn2(self.conv2(features)) + self.downsample(images))


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


def _stage(inputs: int, outputs: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))
