"""CIFAR ResNet-20 and its deeper, wider and otherwise built kin, 41 M MACs.

He et al. 2015, "Deep residual learning for image recognition", arXiv:1512.03385, section 4.2: a convolution and three
stages of n blocks with 16, 32 and 64 channels, batch norm after each convolution, ReLU after each sum.
"""

from torch import nn

from trainables.models._residual import Block, ResNet, Shortcut, blocks_of, check_fields

INPUT_SHAPE = (3, 32, 32)
CLASSES = 10


def build(
    classes: int,
    input_shape: tuple[int, int, int],
    *,
    depth: int = 20,
    width: int = 16,
    kernel: int = 3,
    block: Block = "basic",
    shortcut: Shortcut = "conv",
) -> nn.Module:
    """A CIFAR ResNet for images of `input_shape` (channels, height, width).

    Args:
        classes: number of outputs.
        input_shape: of one input.
        depth: 6n + 2 for n >= 1 blocks in each stage: 20, 32, 44, 56, 110; with blocks of two convolutions, those are
            the layers with weights along the longest path.
        width: channels of the first stage, >= 1; the others have twice and four times as many.
        kernel: side of the convolutions in the blocks that are not 1 x 1, odd.
        block: `basic`, `preactivation`, `bottleneck` (with four times the channels between blocks) or `inverted`.
        shortcut: where the shape changes, `conv` is the paper's option B, a 1 x 1 convolution with batch norm, and
            `pad` its option A, every second pixel and zeros for the new channels.

    Raises:
        ConfigError: a field out of range.
    """
    check_fields("resnet20", width, block, kernel, shortcut)
    blocks = blocks_of("resnet20", depth, stages=3)
    return ResNet(
        input_shape[0], classes, stages=3, blocks=blocks, width=width, block=block, kernel=kernel, shortcut=shortcut
    )
