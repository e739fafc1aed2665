"""Small photographs of ten things (CIFAR-10), 32x32 colour, 50000 training and 10000 test images.

Read from torchvision's files, Hugging Face parquet or folders of classes: see `trainables.image_files`. The files in
`cifar-10-batches-py` are pickles: only torchvision opens them, after it has checked their md5 against its own list.
Krizhevsky 2009, "Learning multiple layers of features from tiny images".
"""

from pathlib import Path

from trainables import image_files
from trainables.splits import Splits, in_memory

CLASSES = 10
INPUT_SHAPE = (3, 32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def splits(
    root: Path | None,
    *,
    download: bool = False,
    augment: str = "crop-flip",
    resolution: int = 32,
    train_limit: int | None = None,
    validation_limit: int | None = None,
) -> Splits:
    """45000 training, 5000 validation and 10000 test images.

    Args:
        root: the folder that holds the data set, or its parent.
        download: when nothing is there, let torchvision download it into `root`.
        augment: of training images: `none`, `crop` (padded by 4) or `crop-flip`.
        resolution: pixels on a side that the images are resized to.
        train_limit: train on the first so many images only, stratified; all when left out.
        validation_limit: validate on the first so many images only, stratified; all when left out.

    Raises:
        ConfigError: an unknown augmentation, or a number out of range.
        DataError: nothing found, or what was found is corrupt or of another shape.
    """
    train, test = image_files.read("cifar10", root, classes=CLASSES, shape=INPUT_SHAPE, download=download)
    return in_memory(
        train,
        test,
        validation=5000,
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        pad=4,
        augment=augment,
        resolution=resolution,
        train_limit=train_limit,
        validation_limit=validation_limit,
    )
