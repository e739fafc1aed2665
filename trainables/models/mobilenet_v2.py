"""MobileNetV2 of torchvision, depthwise convolutions and linear bottlenecks, 0.3 G MACs at 224 x 224.

Sandler et al. 2018, "MobileNetV2: inverted residuals and linear bottlenecks", arXiv:1801.04381. A classic hard case of
quantization: a depthwise convolution has few weights a channel, and their ranges differ a lot.
"""

from typing import Any

from torch import nn

from trainables.errors import ConfigError
from trainables.models._torchvision import first_convolution, torchvision_model

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000


def build(
    classes: int, input_shape: tuple[int, int, int], *, width: float = 1.0, pretrained: bool = False
) -> nn.Module:
    """MobileNetV2 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs; other than 1000, a pretrained network gets a fresh classifier.
        input_shape: of one input; the network divides the sides by 32.
        width: the paper's width multiplier, > 0; channels are rounded to multiples of 8.
        pretrained: start from torchvision's weights (IMAGENET1K_V1), which have width 1.

    Raises:
        ConfigError: a width out of range, or weights that do not fit or cannot be loaded.
    """
    if not width > 0:
        raise ConfigError(f"model/width = {width}: mobilenet_v2 takes a factor above 0")
    if pretrained and width != 1:
        raise ConfigError(f"model/width = {width}: the weights of model/pretrained = True have width 1.0")
    model: Any = torchvision_model("mobilenet_v2", classes, input_shape, pretrained=pretrained, width_mult=width)
    if input_shape[0] != 3:
        model.features[0][0] = first_convolution(input_shape[0], model.features[0][0].out_channels, kernel=3, stride=2)
    if pretrained and classes != CLASSES:
        model.classifier[1] = nn.Linear(model.last_channel, classes)
    return model
