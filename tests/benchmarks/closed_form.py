"""A method, a network and a data set whose accuracy is a formula of the bits: a trial takes milliseconds.

The error of a network is the sum over its layers of a sensitivity times `4^-bits`, of weights and of activations. An
image is one pixel, and a network is right about those above its error, so accuracy is `1 - error` up to 1 / `IMAGES`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainables.cost import Bits, LayerTable
from trainables.methods.lsq import Method as Lsq
from trainables.splits import Images, Splits, TensorSplit

LAYERS = 12
IMAGES = 255
CLASSES = 2
INPUT_SHAPE = (1, 1, 1)


class Chain(nn.Module):
    """Linear layers of one weight, whose output counts for nothing beside the error."""

    error: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(LAYERS)))
        self.register_buffer("error", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 1, 1, 1) to (batch, 2)."""
        pixel = images.flatten(1)
        return torch.cat([self.error - pixel, pixel - self.error], dim=1) + 0 * self.layers(pixel)


def build(classes: int) -> nn.Module:
    """The network."""
    return Chain()


def splits(root: object = None, *, download: bool = False) -> Splits:
    """The data: each brightness once, all of class 1."""
    pixels = torch.arange(1, IMAGES + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = Images(pixels, torch.ones(IMAGES, dtype=torch.int64))
    split = TensorSplit(images, torch.arange(IMAGES), mean=[0.0], std=[1.0])
    return Splits(train=split, validation=split, test=split, classes=CLASSES, input_shape=INPUT_SHAPE)


class Method(Lsq):
    """Sets the error; what LSQ then trains has no effect."""

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Work out the formula."""
        super().prepare(model, table, bits)
        assert isinstance(model, Chain)
        sensitivities = {row.name: 1 + 0.5 * index for index, row in enumerate(table.quantizable)}
        error = sum(s * (4.0 ** -bits[n].weight + 4.0 ** -bits[n].activation) for n, s in sensitivities.items())
        model.error.fill_(min(1.0, error / 8))

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """One loss, of little consequence."""
        yield model(images).square().mean()
