"""ResNet-34 of torchvision, for ImageNet or with a stem for small images, 3.7 G MACs at 224 x 224.

He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385.
"""

from torch import nn

from trainables.models._torchvision import Stem, torchvision_resnet

INPUT_SHAPE = (3, 224, 224)
CLASSES = 1000


def build(
    classes: int, input_shape: tuple[int, int, int], *, stem: Stem = "imagenet", pretrained: bool = False
) -> nn.Module:
    """ResNet-34 for images of `input_shape`; fields and errors are those of `trainables.models.resnet18.build`."""
    return torchvision_resnet("resnet34", classes, input_shape, stem=stem, pretrained=pretrained)
