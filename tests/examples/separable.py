"""A model of one's own: three depthwise separable blocks (Howard et al. 2017, arXiv:1704.04861) and a linear layer.

    raysearch sweep --model tests/examples/separable.py --set model/width=24

Any `nn.Module` does: its convolutions and linear layers are found by tracing, with their MACs, and get the quantizers
of whichever method. What `build` takes beyond `classes` and `input_shape` are addresses: `model/width`.
"""

from itertools import pairwise

from torch import nn

INPUT_SHAPE = (1, 8, 8)
CLASSES = 10


def build(classes: int, input_shape: tuple[int, int, int], *, width: int = 16) -> nn.Module:
    """The network for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input.
        width: channels of the first block; the others have two and four times as many.
    """
    channels = (input_shape[0], width, 2 * width, 4 * width)
    blocks = [_block(few, many) for few, many in pairwise(channels)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def _block(few: int, many: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(few, few, 3, padding=1, groups=few, bias=False),
        nn.BatchNorm2d(few),
        nn.ReLU(),
        nn.Conv2d(few, many, 1, bias=False),
        nn.BatchNorm2d(many),
        nn.ReLU(),
    )
