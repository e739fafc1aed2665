"""ResNet-18 of torchvision, for ImageNet or with a stem for small images, 1.8 G MACs at 224 x 224.

He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385.
"""

from torch import nn

from trainables.models._torchvision import Stem, torchvision_resnet

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000


def build(
    classes: int, input_shape: tuple[int, int, int], *, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """ResNet-18 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs; other than 1000, a pretrained network gets a fresh classifier.
        input_shape: of one input.
        stem: `imagenet` is a 7 x 7 convolution of stride 2 and a pooling of 3 x 3, `cifar` a 3 x 3 convolution.
        pretrained: start from torchvision's weights (IMAGENET1K_V1).

    Raises:
        ConfigError: an unknown stem, or weights that do not fit or cannot be loaded.
    """
    return torchvision_resnet("resnet18", classes, input_shape, stem=stem, pretrained=pretrained)
