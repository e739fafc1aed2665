"""What a data set is to the rest: three splits that yield batches, the same for the same seed on any number of workers.

A `Split` is read in one of two ways. Without a seed (evaluation) the examples come in order, each exactly once over all
ranks. With a seed (training) one shuffled order and one set of random crops are drawn for the *global* batch on the
CPU, and each rank takes its rows of it. So one worker with batch B and two workers with B/2 each train on the same
pixels, and the global random state is neither read nor changed.

`TensorSplit` holds small images as bytes on the device and makes batches there by indexing; the idea is that of
Jordan's fast CIFAR-10 training (2024, arXiv:2404.00498). What does not fit in memory is streamed: `data/imagenet.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize
from torch.nn.functional import pad as pad_image

from trainables.errors import ConfigError, DataError

SPLIT_SEED = (
    20200229  # draws validation sets; a constant, so that every trial of every sweep is judged on the same images
)
VALIDATION_SHARE = 6  # a small copy gives at most one in six of its training images to validation
AUGMENTATIONS = ("none", "crop", "crop-flip")

Batch = tuple[Tensor, Tensor]


class Split(Protocol):
    """Examples that can be read in batches."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batches(
        self, batch_size: int, *, device: torch.device, seed: int | None, augment: bool, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """One pass over the examples, as batches on the device.

        Args:
            batch_size: examples of a batch. With a seed, of the global batch, of which a rank gets its share; without,
                of this rank's batch.
            device: where the batches are to be.
            seed: None reads in order, each example once over all ranks, the last batch possibly shorter. A number
                shuffles by that number alone and drops the incomplete last global batch, unless it is the only one.
            augment: whether images are randomly changed, as the split was told; needs a seed.
            rank: this worker, 0..world - 1. With a seed it takes rows rank::world of each global batch.
            world: number of workers.

        Yields:
            images, float32 (N, C, H, W), normalized; labels, int64 (N,), 0..classes - 1.

        Raises:
            ConfigError: a batch that cannot be shared among the workers, or `augment` without a seed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set: what is trained on, what the search is judged by, and what is read once, for picked points.

    Attributes:
        train: training examples.
        validation: held out of the official training set, the same ones in every trial.
        test: the official test set.
        classes: number of classes.
        input_shape: channels, height, width.
    """

    train: Split
    validation: Split
    test: Split
    classes: int
    input_shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Images:
    """Images and labels as tensors, with one copy on each device that asked, shared by the splits made of them.

    Attributes:
        pixels: uint8 (n, C, H, W).
        labels: int64 (n,).
    """

    pixels: Tensor
    labels: Tensor
    _copies: dict[torch.device, Batch] = field(default_factory=dict, repr=False)
    _sizes: dict[int, "Images"] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise DataError(f"images must be uint8 (n, C, H, W), not {pixels.dtype} {tuple(pixels.shape)}")
        if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
            raise DataError(f"labels must be int64 ({len(pixels)},), not {labels.dtype} {tuple(labels.shape)}")

    def on(self, device: torch.device) -> Batch:
        """Pixels and labels on the device, moved there at most once."""
        if device not in self._copies:
            self._copies[device] = (self.pixels.to(device), self.labels.to(device))
        return self._copies[device]

    def resized(self, side: int) -> "Images":
        """The same images with `side` x `side` pixels, made once: bilinear, and averaging where they shrink."""
        if self.pixels.shape[2:] == (side, side):
            return self
        if side not in self._sizes:
            parts = (resize(p.float(), (side, side), mode="bilinear", antialias=True) for p in self.pixels.split(4096))
            pixels = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
            self._sizes[side] = Images(pixels, self.labels)
        return self._sizes[side]


class TensorSplit:
    """Rows of `Images`, batched on the device.

    Args:
        images: where the pixels are.
        rows: int64 (n,), the rows that belong to this split, in the order of evaluation.
        mean: of each channel, in units of full scale, 0..1.
        std: of each channel, in units of full scale, > 0.
        augmentation: what `augment=True` does. `none`: nothing. `crop`: pads with black, then crops at random.
            `crop-flip`: also mirrors every second image left to right, on average.
        pad: pixels of padding on each side for the crops.

    Raises:
        DataError: no rows.
        ConfigError: an unknown augmentation.
    """

    def __init__(
        self,
        images: Images,
        rows: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: str = "none",
        pad: int = 0,
    ) -> None:
        if augmentation not in AUGMENTATIONS:
            raise ConfigError(f"augment = {augmentation!r}: it is one of {', '.join(AUGMENTATIONS)}")
        if len(rows) == 0:
            raise DataError("a split has no examples; give it at least one")
        self.images = images
        self.rows = rows
        self.augmentation = augmentation
        self.pad = pad
        self._offset = 255 * torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._factor = 1 / (255 * torch.tensor(std, dtype=torch.float32)[:, None, None])

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, *, device: torch.device, seed: int | None, augment: bool, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """See `Split.batches`."""
        shares = batch_slices(len(self), batch_size, seed=seed, augment=augment, rank=rank, world=world)
        return self._read(shares, device, seed, augment and self.augmentation != "none")

    def _read(self, shares: list[slice], device: torch.device, seed: int | None, augment: bool) -> Iterator[Batch]:
        pixels, labels = self.images.on(device)
        offset, factor = self._offset.to(device), self._factor.to(device)
        rows = self.rows
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        if augment:  # drawn for every position of the epoch, whoever reads it
            shifts = torch.randint(0, 2 * self.pad + 1, (len(rows), 2), generator=generator).to(device)
            flips = (torch.rand(len(rows), generator=generator) < 0.5).to(device)
        rows = rows.to(device)
        for share in shares:
            batch = pixels[rows[share]]
            if augment:
                batch = crop(batch, shifts[share], self.pad)
            if augment and self.augmentation == "crop-flip":
                batch = torch.where(flips[share, None, None, None], batch.flip(3), batch)
            yield batch.float().sub_(offset).mul_(factor), labels[rows[share]]


def crop(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Each image padded with zeros and cropped back to its size, at its own place.

    Args:
        images: (N, C, H, W).
        shifts: int64 (N, 2), row and column of the crop in the padded image, 0..2 * pad; `pad` changes nothing.
        pad: pixels added on each side.

    >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
    >>> crop(image, torch.tensor([[0, 2]]), pad=1)
    tensor([[[[0, 0],
              [2, 0]]]])
    """
    height, width = images.shape[2:]
    windows = pad_image(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, shifts[:, 0], shifts[:, 1]]


def batch_slices(
    length: int, batch_size: int, *, seed: int | None, augment: bool, rank: int, world: int
) -> list[slice]:
    """Which positions of an epoch one rank reads, batch by batch; the arithmetic of `Split.batches`.

    >>> batch_slices(10, 4, seed=0, augment=True, rank=1, world=2)
    [slice(1, 4, 2), slice(5, 8, 2)]
    >>> batch_slices(10, 4, seed=None, augment=False, rank=1, world=2)
    [slice(5, 9, None), slice(9, 10, None)]
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank = {rank}: it is 0..{world - 1} with {world} workers")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: it is at least 1")
    if seed is None:
        if augment:
            raise ConfigError("augment needs a seed: evaluation reads the images as they are")
        start, stop = length * rank // world, length * (rank + 1) // world
        return [slice(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]
    batch_size = min(batch_size, length)
    if batch_size < world:
        raise ConfigError(
            f"a batch of {batch_size} cannot be shared by {world} workers; give each at least one example"
        )
    return [slice(first + rank, first + batch_size, world) for first in range(0, length - batch_size + 1, batch_size)]


def stratified_order(labels: Tensor, seed: int = SPLIT_SEED) -> Tensor:
    """A fixed shuffled order of all rows in which every beginning holds the classes in proportion.

    Member i of a class of m, in shuffled order, sorts at (i + 1/2) / m. So the first k of n rows hold k m / n
    members of that class, give or take 1/2 + (m / n) * classes / 2: one when the classes are equally large.

    Args:
        labels: int64 (n,).
        seed: draws the order; nothing else does.

    Returns:
        int64 (n,), a permutation of 0..n - 1.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> labels[stratified_order(labels)]
    tensor([0, 1, 0, 0, 1, 0])
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    _, sizes = torch.unique_consecutive(labels[by_class], return_counts=True)
    starts = torch.cumsum(sizes, 0) - sizes
    member = torch.arange(len(labels)) - torch.repeat_interleave(starts, sizes)
    place = (member.double() + 0.5) / torch.repeat_interleave(sizes, sizes)
    return by_class[torch.argsort(place, stable=True)]


def limited(rows: Tensor, limit: int | None, setting: str) -> Tensor:
    """The first `limit` rows, all when it is None.

    Raises:
        ConfigError: a limit below 1 or above the number of rows.
    """
    if limit is not None and not 1 <= limit <= len(rows):
        raise ConfigError(f"{setting} = {limit}: this data set has 1..{len(rows)} (leave it out for all)")
    return rows[:limit]


def at_resolution(input_shape: tuple[int, int, int], resolution: int) -> tuple[int, int, int]:
    """The shape of images that are resized to `resolution` x `resolution` pixels.

    Raises:
        ConfigError: none at all, or more than four times as many on a side as there were.
    """
    channels, height, width = input_shape
    most = 4 * max(height, width)
    if not 1 <= resolution <= most:
        raise ConfigError(f"data/resolution = {resolution}: these images take 1..{most} pixels on a side")
    return channels, resolution, resolution
