"""Networks of torchvision, fresh or with its weights, made to fit other numbers of classes and channels.

What ResNet-18, -34, -50 and MobileNetV2 share; the underscore says that it is no model itself.
"""

from pickle import UnpicklingError
from typing import Any

from torch import nn

from trainables.errors import ConfigError
from trainables.models._residual import Stem

IMAGENET_CLASSES = 1000


def check_stem(name: str, stem: str) -> None:
    """Refuse an unknown stem.

    Raises:
        ConfigError: it is neither of the two.
    """
    if stem not in ("imagenet", "cifar"):
        raise ConfigError(f"model/stem = {stem!r}: {name} takes 'imagenet' or 'cifar'")


def torchvision_resnet(
    name: str, classes: int, input_shape: tuple[int, int, int], *, stem: Stem, pretrained: bool
) -> nn.Module:
    """The ResNet that torchvision calls `name`, with a classifier and a stem that fit; see `resnet18.build`."""
    check_stem(name, stem)
    if pretrained and stem == "cifar":
        raise ConfigError("model/pretrained = True: the weights are those of model/stem = 'imagenet', not of 'cifar'")
    model: Any = torchvision_model(name, classes, input_shape, pretrained=pretrained)
    if stem == "cifar":
        model.conv1 = first_convolution(input_shape[0], model.conv1.out_channels, kernel=3, stride=1)
        model.maxpool = nn.Identity()
    elif input_shape[0] != 3:
        model.conv1 = first_convolution(input_shape[0], model.conv1.out_channels, kernel=7, stride=2)
    if pretrained and classes != IMAGENET_CLASSES:
        model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def torchvision_model(
    name: str, classes: int, input_shape: tuple[int, int, int], *, pretrained: bool, **fields: Any
) -> nn.Module:
    """The network that torchvision calls `name`; pretrained, it still has ImageNet's 1000 outputs.

    Raises:
        ConfigError: pretrained weights for other than 3 channels, or that cannot be loaded.
    """
    from torchvision.models import get_model, get_model_weights

    if not pretrained:
        return get_model(name, num_classes=classes, **fields)
    if input_shape[0] != 3:
        raise ConfigError(
            f"model/pretrained = True: the weights of {name} read 3 channels, the images have {input_shape[0]}"
        )
    weights = get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return get_model(name, weights=weights, **fields)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # unreachable, no space, wrong hash, corrupt
        raise ConfigError(
            f"model/pretrained = True: cannot load {weights.url} ({error}); put that file into the folder "
            "checkpoints of torch.hub.get_dir(), or use pretrained = False"
        ) from error


def first_convolution(inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Conv2d:
    """A first convolution that keeps or halves the sides, initialized as torchvision does."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
