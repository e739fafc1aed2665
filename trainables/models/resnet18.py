"""ResNet-18 of torchvision, for ImageNet or with a stem for small images, 1.8 G MACs at 224 x 224.

He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385. With another depth, width, kernel or
block it is a network of the same names in `trainables.models._residual`.
"""

from torch import nn

from trainables.errors import ConfigError
from trainables.models._residual import Block, ResNet, blocks_of, check_fields
from trainables.models._torchvision import Stem, check_stem, torchvision_resnet

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000


def build(
    classes: int,
    input_shape: tuple[int, int, int],
    *,
    stem: Stem = "imagenet",
    pretrained: bool = False,
    depth: int = 18,
    width: int = 64,
    kernel: int = 3,
    block: Block = "basic",
) -> nn.Module:
    """ResNet-18 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs; other than 1000, a pretrained network gets a fresh classifier.
        input_shape: of one input.
        stem: `imagenet` is a 7 x 7 convolution of stride 2 and a pooling of 3 x 3, `cifar` a 3 x 3 convolution.
        pretrained: start from torchvision's weights (IMAGENET1K_V1).
        depth: 8n + 2 for n >= 1 blocks in each stage.
        width: channels of the first stage, >= 1; each other stage has twice as many as the one before.
        kernel: side of the convolutions in the blocks that are not 1 x 1, odd.
        block: `basic`, `preactivation`, `bottleneck` (with four times the channels between blocks) or `inverted`.

    Raises:
        ConfigError: a field out of range, or weights that do not fit or cannot be loaded.
    """
    check_fields("resnet18", width, block, kernel, "conv")
    blocks = blocks_of("resnet18", depth, stages=4)
    if (depth, width, kernel, block) == (18, 64, 3, "basic"):
        return torchvision_resnet("resnet18", classes, input_shape, stem=stem, pretrained=pretrained)
    if pretrained:
        raise ConfigError(
            "model/pretrained = True: the weights have model/depth = 18, model/width = 64, model/kernel = 3 and "
            "model/block = basic; leave those out"
        )
    check_stem("resnet18", stem)
    return ResNet(input_shape[0], classes, stages=4, blocks=blocks, width=width, block=block, kernel=kernel, stem=stem)
