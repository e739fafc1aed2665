"""VGG-7 for CIFAR-10 (2x128C3-MP2-2x256C3-MP2-2x512C3-MP2-1024FC), 616 M MACs.

The network of ternary weight networks (Li et al. 2016, arXiv:1605.04711) in the form of Bayesian Bits (van Baalen et
al. 2020, arXiv:2005.07093): batch norm after every layer but the classifier, and biases only there.
"""

from collections import OrderedDict

from torch import nn

from trainables.errors import ConfigError
from trainables.models._kernels import check_kernel

INPUT_SHAPE = (3, 32, 32)
CLASSES = 10


def build(classes: int, input_shape: tuple[int, int, int], *, width: float = 1.0, kernel: int = 3) -> nn.Module:
    """VGG-7 for images of `input_shape` (channels, height, width), sides of 8 pixels or more.

    Args:
        classes: number of outputs.
        input_shape: of one input; 32 x 32 gives 8192 features after the convolutions, as published.
        width: factor on the 128, 256, 512 and 1024 channels, > 0.
        kernel: side of the convolutions, odd.

    Raises:
        ConfigError: a field out of range, or an image too small for three poolings.
    """
    if not width > 0:
        raise ConfigError(f"model/width = {width}: vgg7 takes a factor above 0")
    check_kernel("vgg7", kernel)
    channels, height, breadth = input_shape
    if min(height, breadth) < 8:
        raise ConfigError(f"input shape {input_shape}: vgg7 halves each side three times and takes 8 pixels or more")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, count in enumerate((128, 128, 256, 256, 512, 512), start=1):
        features = max(1, round(count * width))
        modules[f"conv{index}"] = nn.Conv2d(channels, features, kernel, padding=kernel // 2, bias=False)
        modules[f"bn{index}"] = nn.BatchNorm2d(features)
        modules[f"relu{index}"] = nn.ReLU()
        if index % 2 == 0:
            modules[f"pool{index // 2}"] = nn.MaxPool2d(2)
        channels = features
    hidden = max(1, round(1024 * width))
    modules["flatten"] = nn.Flatten()
    modules["fc1"] = nn.Linear(channels * (height // 8) * (breadth // 8), hidden, bias=False)
    modules["bn7"] = nn.BatchNorm1d(hidden)
    modules["relu7"] = nn.ReLU()
    modules["fc2"] = nn.Linear(hidden, classes)
    return nn.Sequential(modules)
