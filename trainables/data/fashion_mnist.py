"""Clothes (Fashion-MNIST), 28x28 grey, 60000 training and 10000 test images.

Read from torchvision's files, Hugging Face parquet or folders of classes: see `trainables.image_files`.
Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747.
"""

from pathlib import Path

from trainables import image_files
from trainables.splits import Splits, in_memory

CLASSES = 10
INPUT_SHAPE = (1, 28, 28)
MEAN, STD = (0.2860,), (0.3530,)


def splits(
    root: Path | None,
    *,
    download: bool = False,
    augment: str = "none",
    resolution: int = 28,
    train_limit: int | None = None,
    validation_limit: int | None = None,
) -> Splits:
    """55000 training, 5000 validation and 10000 test images.

    Args:
        root: the folder that holds the data set, or its parent.
        download: when nothing is there, let torchvision download it into `root`.
        augment: of training images: `none`, `crop` (padded by 2) or `crop-flip`.
        resolution: pixels on a side that the images are resized to.
        train_limit: train on the first so many images only, stratified; all when left out.
        validation_limit: validate on the first so many images only, stratified; all when left out.

    Raises:
        ConfigError: an unknown augmentation, or a number out of range.
        DataError: nothing found, or what was found is corrupt or of another shape.
    """
    train, test = image_files.read("fashion_mnist", root, classes=CLASSES, shape=INPUT_SHAPE, download=download)
    return in_memory(
        train,
        test,
        validation=5000,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        pad=2,
        augment=augment,
        resolution=resolution,
        train_limit=train_limit,
        validation_limit=validation_limit,
    )
