"""A data set of one's own: 8 x 8 images of stripes in four directions, under noise, drawn from a fixed seed.

    raysearch sweep --data tests/examples/stripes.py

A data set gives three disjoint splits that are the same in every process. Its settings beyond `root` and `download`
are addresses: `data/noise`.
"""

from pathlib import Path

import torch

from trainables.splits import Images, Splits, TensorSplit

CLASSES = 4
INPUT_SHAPE = (1, 8, 8)
MEAN, STD = (0.5,), (0.4,)
COUNTS = (800, 200, 200)


def splits(root: Path | None = None, *, download: bool = False, noise: float = 0.3) -> Splits:
    """800 training, 200 validation and 200 test images.

    Args:
        root: ignored, the images are drawn here.
        download: ignored, nothing is ever downloaded.
        noise: standard deviation of what is added to each pixel, in units of full scale.
    """
    images = _draw(sum(COUNTS), noise)
    train, validation, test = torch.arange(sum(COUNTS)).split(COUNTS)
    return Splits(
        train=TensorSplit(images, train, mean=MEAN, std=STD),
        validation=TensorSplit(images, validation, mean=MEAN, std=STD),
        test=TensorSplit(images, test, mean=MEAN, std=STD),
        classes=CLASSES,
        input_shape=INPUT_SHAPE,
    )


def _draw(count: int, noise: float) -> Images:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    directions = torch.stack([x, y, x + y, x - y])[labels]
    phases = torch.rand(count, 1, 1, generator=generator) * 4
    stripes = ((directions + phases) % 4 < 2).float()
    pixels = stripes + noise * torch.randn(stripes.shape, generator=generator)
    return Images((pixels.clamp(0, 1) * 255).round().to(torch.uint8).unsqueeze(1), labels)
