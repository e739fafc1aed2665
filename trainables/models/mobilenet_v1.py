"""MobileNetV1, a depthwise and a pointwise convolution in turn, 0.57 G MACs at 224 x 224.

Howard et al. 2017, "MobileNets: efficient convolutional neural networks for mobile vision applications",
arXiv:1704.04861, table 1. The plainest network of depthwise convolutions: no shortcuts, no linear bottlenecks.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from trainables.errors import ConfigError
from trainables.models._kernels import check_kernel

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000

Stem = Literal["imagenet", "cifar"]
STEM_CHANNELS = 32
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Output channels and stride of each pair of convolutions."""


def build(
    classes: int, input_shape: tuple[int, int, int], *, width: float = 1.0, kernel: int = 3, stem: Stem = "imagenet"
) -> nn.Module:
    """MobileNetV1 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input; the network divides the sides by 32, with the stem `cifar` by 8.
        width: the paper's width multiplier, > 0; channels are rounded to multiples of 8.
        kernel: side of the depthwise convolutions, odd.
        stem: `imagenet` is the paper's; `cifar` has stride 1 in the first convolution and in the first pair that has 2.

    Raises:
        ConfigError: a field out of range.
    """
    if not width > 0:
        raise ConfigError(f"model/width = {width}: mobilenet_v1 takes a factor above 0")
    if stem not in get_args(Stem):
        raise ConfigError(f"model/stem = {stem!r}: mobilenet_v1 takes 'imagenet' or 'cifar'")
    check_kernel("mobilenet_v1", kernel)
    return MobileNet(input_shape[0], classes, width, kernel, stem)


class MobileNet(nn.Module):
    """(batch, channels, height, width) to (batch, classes)."""

    def __init__(self, channels: int, classes: int, width: float, kernel: int, stem: Stem):
        super().__init__()
        small = stem == "cifar"
        inputs = _scaled(STEM_CHANNELS, width)
        self.conv1 = nn.Conv2d(channels, inputs, 3, stride=1 if small else 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.blocks = nn.Sequential()
        for index, (count, stride) in enumerate(BLOCKS):
            outputs = _scaled(count, width)
            self.blocks.append(Separable(inputs, outputs, 1 if small and index == 1 else stride, kernel))
            inputs = outputs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (batch, classes)."""
        features = self.blocks(self.relu1(self.bn1(self.conv1(images))))
        return self.fc(self.pool(features).flatten(1))


class Separable(nn.Sequential):
    """A convolution of each channel by itself, then a 1 x 1 convolution of all of them."""

    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int):
        super().__init__()
        self.depthwise = nn.Conv2d(
            inputs, inputs, kernel, stride=stride, padding=kernel // 2, groups=inputs, bias=False
        )
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()


def _scaled(channels: int, width: float) -> int:
    return max(8, int(channels * width + 4) // 8 * 8)
