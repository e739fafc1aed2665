"""LeNet-5 in its Caffe form (32C5-MP2-64C5-MP2-512FC), 4.3 M MACs; a quarter as wide for 8 x 8 digits.

After LeCun et al. 1998, "Gradient-based learning applied to document recognition"; the widths are those that the
quantization literature uses on MNIST, for one Bayesian Bits (van Baalen et al. 2020, arXiv:2005.07093). No batch norm.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

from trainables.errors import ConfigError
from trainables.models._kernels import check_kernel

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10


def build(
    classes: int,
    input_shape: tuple[int, int, int],
    *,
    width: float | None = None,
    kernel: int = 5,
    padding: int | None = None,
) -> nn.Module:
    """LeNet-5 for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input; 28 x 28 gives 1024 features after the convolutions, as published.
        width: factor on the 32, 64 and 512 channels, > 0; None is 1, or 1/4 for images with a side below 16 pixels.
        kernel: side of both convolutions, odd.
        padding: of both convolutions, 0..kernel - 1 pixels; None is what leaves as many pixels as 5 x 5 without padding
            does, or, for images with a side below 16 pixels, what keeps their sides.

    Raises:
        ConfigError: a field out of range, or an image too small for it.
    """
    check_kernel("lenet5", kernel)
    settings = settled({"width": width, "kernel": kernel, "padding": padding}, input_shape)
    width, padding = settings["width"], settings["padding"]
    channels, *sides = input_shape
    if not width > 0:
        raise ConfigError(f"model/width = {width}: lenet5 takes a factor above 0")
    if not 0 <= padding < kernel:
        raise ConfigError(f"model/padding = {padding}: lenet5 takes 0..{kernel - 1} with model/kernel = {kernel}")
    height, breadth = (_after_pools(side, kernel, padding) for side in sides)
    if min(height, breadth) < 1:
        raise ConfigError(f"input shape {input_shape}: too small for lenet5 with model/padding = {padding}; pad more")
    few, many, hidden = (max(1, round(count * width)) for count in (32, 64, 512))
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, few, kernel, padding=padding),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(few, many, kernel, padding=padding),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(many * height * breadth, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, classes),
        )
    )


def settled(settings: Mapping[str, Any], input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """The settings with numbers where None leaves them to the images."""
    small = min(input_shape[1:]) < 16
    half = settings["kernel"] // 2
    defaults = {"width": 0.25 if small else 1.0, "padding": half if small else max(0, half - 2)}
    return {name: defaults[name] if value is None else value for name, value in settings.items()}


def _after_pools(side: int, kernel: int, padding: int) -> int:
    """Pixels that are left of a side after two convolutions and two poolings of 2."""
    for _ in range(2):
        side = (side + 2 * padding - kernel + 1) // 2
    return side
