"""Data sets of small images that fit into memory, with an official test set: `splits` from a name and a few numbers.

The validation set is drawn from the training images, stratified, the same for everybody (`splits.stratified_order`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from trainables import image_files
from trainables.errors import DataError
from trainables.splits import VALIDATION_SHARE, Splits, TensorSplit, at_resolution, limited, stratified_order

VALIDATION = 5000
"""Training images held out; one in `VALIDATION_SHARE` of a smaller copy."""


def splits_of(
    name: str,
    *,
    classes: int,
    shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    pad: int,
    augment: str = "none",
) -> Callable[..., Splits]:
    """The function `splits` of a data set.

    Args:
        name: of the data set, as `image_files.read` knows it.
        classes: number of classes.
        shape: channels, height and width of an image.
        mean: see `TensorSplit`.
        std: see `TensorSplit`.
        pad: see `TensorSplit`.
        augment: default of its setting.
    """

    def splits(
        root: Path | None,
        *,
        download: bool = False,
        augment: str = augment,
        resolution: int = shape[1],
        train_limit: int | None = None,
        validation_limit: int | None = None,
    ) -> Splits:
        """Training, validation and test images.

        Args:
            root: the folder that holds the data set, or its parent.
            download: when nothing is there, let torchvision download it into `root`.
            augment: of training images: `none`, `crop` (padded) or `crop-flip`.
            resolution: pixels on a side that the images are resized to.
            train_limit: train on the first so many images only, stratified; all when left out.
            validation_limit: validate on the first so many images only, stratified; all when left out.

        Raises:
            ConfigError: an unknown augmentation, or a number out of range.
            DataError: nothing found, or what was found is corrupt, of another shape, or too few images.
        """
        train, test = image_files.read(name, root, classes=classes, shape=shape, download=download)
        input_shape = at_resolution(shape, resolution)
        train, test = train.resized(resolution), test.resized(resolution)
        order = stratified_order(train.labels)
        held_out = min(VALIDATION, len(order) // VALIDATION_SHARE)
        if held_out == 0:
            raise DataError(
                f"{len(order)} training images are too few; a validation set takes one in {VALIDATION_SHARE}"
            )
        validation = limited(order[:held_out], validation_limit, "validation_limit")
        learnt = limited(order[held_out:], train_limit, "train_limit")
        return Splits(
            train=TensorSplit(train, learnt, mean=mean, std=std, augmentation=augment, pad=pad),
            validation=TensorSplit(train, validation, mean=mean, std=std),
            test=TensorSplit(test, torch.arange(len(test.labels)), mean=mean, std=std),
            classes=classes,
            input_shape=input_shape,
        )

    return splits
