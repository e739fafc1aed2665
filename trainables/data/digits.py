"""Handwritten digits, 8x8 grey, 1797 images (scikit-learn's copy of UCI's optical recognition data); no files needed.

Values 0..16 become bytes 0..255. A fifth of the images is validation and a fifth is test, both stratified by class and
fixed, because this data set comes without an official split. Alpaydin and Kaynak 1998, doi:10.24432/C50P49.
"""

from functools import lru_cache
from pathlib import Path

from trainables.splits import Images, Splits, TensorSplit, at_resolution, limited, stratified_order

CLASSES = 10
INPUT_SHAPE = (1, 8, 8)
MEAN, STD = (0.3053,), (0.3759,)


def splits(
    root: Path | None = None,
    *,
    download: bool = False,
    augment: str = "none",
    resolution: int = 8,
    train_limit: int | None = None,
    validation_limit: int | None = None,
) -> Splits:
    """1079 training, 359 validation and 359 test images.

    Args:
        root: ignored, the images come with scikit-learn.
        download: ignored, nothing is ever downloaded.
        augment: of training images: `none`, `crop` (padded by 1) or `crop-flip`.
        resolution: pixels on a side that the images are resized to.
        train_limit: train on the first so many images only, stratified; all when left out.
        validation_limit: validate on the first so many images only, stratified; all when left out.

    Raises:
        ConfigError: an unknown augmentation, or a number out of range.
    """
    input_shape = at_resolution(INPUT_SHAPE, resolution)
    images = _images().resized(resolution)
    order = stratified_order(images.labels)
    fifth = len(order) // 5
    train = limited(order[2 * fifth :], train_limit, "train_limit")
    validation = limited(order[fifth : 2 * fifth], validation_limit, "validation_limit")
    return Splits(
        train=TensorSplit(images, train, mean=MEAN, std=STD, augmentation=augment, pad=1),
        validation=TensorSplit(images, validation, mean=MEAN, std=STD),
        test=TensorSplit(images, order[:fifth], mean=MEAN, std=STD),
        classes=CLASSES,
        input_shape=input_shape,
    )


@lru_cache(maxsize=1)
def _images() -> Images:
    import numpy as np
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Images(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target.astype(np.int64)))
