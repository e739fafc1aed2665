"""LeNet-5 in its Caffe form (32C5-MP2-64C5-MP2-512FC), 4.3 M MACs; a quarter as wide for 8 x 8 digits.

After LeCun et al. 1998, "Gradient-based learning applied to document recognition"; the widths are those that the
quantization literature uses on MNIST, for one Bayesian Bits (van Baalen et al. 2020, arXiv:2005.07093). No batch norm.
"""

from collections import OrderedDict

from torch import nn

from trainables.errors import ConfigError

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10


def build(
    classes: int, input_shape: tuple[int, int, int], *, width: float | None = None, padding: int | None = None
) -> nn.Module:
    """LeNet-5 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input; 28 x 28 gives 1024 features after the convolutions, as published.
        width: factor on the 32, 64 and 512 channels, > 0; None is 1, or 1/4 for images with a side below 16 pixels.
        padding: of both convolutions, 0..4 pixels; None is 0, or 2 for images with a side below 16 pixels.

    Raises:
        ConfigError: a width or padding out of range, or an image too small for it.
    """
    channels, *sides = input_shape
    small = min(sides) < 16
    if width is None:
        width = 0.25 if small else 1.0
    if padding is None:
        padding = 2 if small else 0
    if not width > 0:
        raise ConfigError(f"model/width = {width}: lenet5 takes a factor above 0")
    if not 0 <= padding <= 4:
        raise ConfigError(f"model/padding = {padding}: lenet5 takes 0..4")
    height, breadth = (_after_pools(side, padding) for side in sides)
    if min(height, breadth) < 1:
        raise ConfigError(f"input shape {input_shape}: too small for lenet5 with model/padding = {padding}; pad more")
    few, many, hidden = (max(1, round(count * width)) for count in (32, 64, 512))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, few, 5, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(few, many, 5, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(many * height * breadth, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, classes),
        )
    )


def _after_pools(side: int, padding: int) -> int:
    """Pixels that are left of a side after two convolutions of 5 and two poolings of 2."""
    for _ in range(2):
        side = (side + 2 * padding - 4) // 2
    return side
