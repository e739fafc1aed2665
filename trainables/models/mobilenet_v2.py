"""MobileNetV2 of torchvision, depthwise convolutions and linear bottlenecks, 0.3 G MACs at 224 x 224.

Sandler et al. 2018, "MobileNetV2: inverted residuals and linear bottlenecks", arXiv:1801.04381. A classic hard case of
quantization: a depthwise convolution has few weights a channel, and their ranges differ a lot.
"""

from typing import Any

from torch import nn

from trainables.errors import ConfigError
from trainables.models._kernels import check_kernel, set_depthwise_kernels
from trainables.models._torchvision import first_convolution, torchvision_model

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000


STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""The paper's table 2: expansion t, output channels c, blocks n and stride s of each stage."""


def build(
    classes: int,
    input_shape: tuple[int, int, int],
    *,
    width: float = 1.0,
    kernel: int = 3,
    expansion: int = 6,
    pretrained: bool = False,
) -> nn.Module:
    """MobileNetV2 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs; other than 1000, a pretrained network gets a fresh classifier.
        input_shape: of one input; the network divides the sides by 32.
        width: the paper's width multiplier, > 0; channels are rounded to multiples of 8.
        kernel: side of the depthwise convolutions, odd.
        expansion: how many times more channels a block has inside than outside, >= 1; the first block has as many.
        pretrained: start from torchvision's weights (IMAGENET1K_V1), which have width 1, kernel 3 and expansion 6.

    Raises:
        ConfigError: a field out of range, or weights that do not fit or cannot be loaded.
    """
    if not width > 0:
        raise ConfigError(f"model/width = {width}: mobilenet_v2 takes a factor above 0")
    check_kernel("mobilenet_v2", kernel)
    if expansion < 1:
        raise ConfigError(f"model/expansion = {expansion}: mobilenet_v2 takes 1 or more")
    for name, value, published in (("width", width, 1.0), ("kernel", kernel, 3), ("expansion", expansion, 6)):
        if pretrained and value != published:
            raise ConfigError(f"model/{name} = {value}: the weights of model/pretrained = True have {name} {published}")
    fields: dict[str, Any] = {"width_mult": width}
    if expansion != 6:
        fields["inverted_residual_setting"] = [[expansion if t > 1 else t, *rest] for t, *rest in STAGES]
    model: Any = torchvision_model("mobilenet_v2", classes, input_shape, pretrained=pretrained, **fields)
    if kernel != 3:
        set_depthwise_kernels(model, kernel)
    if input_shape[0] != 3:
        model.features[0][0] = first_convolution(input_shape[0], model.features[0][0].out_channels, kernel=3, stride=2)
    if pretrained and classes != CLASSES:
        model.classifier[1] = nn.Linear(model.last_channel, classes)
    return model
