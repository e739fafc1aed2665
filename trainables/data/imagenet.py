"""Photographs of a thousand things (ImageNet-1k, ILSVRC 2012), 224x224 colour, streamed from disk by loader workers.

Layouts: folders train/CLASS/*.JPEG and val/CLASS/*.JPEG, or parquet files named train... and val..., as on Hugging
Face. The official validation images are the test split here; validation is ten training images of each class.

Rows are shuffled by row group, then within windows of `WINDOW` rows, because parquet is read by row group; files in
folders are groups of one, so theirs is a plain shuffle. Each worker keeps the row groups of one window (about 250 MB
for ImageNet's photographs); parquet files whose rows are sorted by class are shuffled poorly by this and should be
rewritten. Each image's crop has a seed of its own, so that the number of loader workers changes nothing.

Russakovsky et al. 2015, arXiv:1409.0575; crops and flips as in torchvision's reference training.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainables import image_files, parquet_files
from trainables.errors import ConfigError, DataError
from trainables.splits import SPLIT_SEED, VALIDATION_SHARE, Batch, Splits, batch_slices

CLASSES = 1000
INPUT_SHAPE = (3, 224, 224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION_PER_CLASS = 10
WINDOW = 2048


def splits(
    root: Path | None,
    *,
    download: bool = False,
    workers: int = 8,
    resolution: int = 224,
    classes_limit: int | None = None,
) -> Splits:
    """About 1.27 million training, 10000 validation and 50000 test images.

    Args:
        root: the folder that holds train and val, or its parent (then the folder is named imagenet).
        download: refused when nothing is there, since the photographs need a licence: image-net.org.
        workers: loader processes of each split that is being read; 0 reads in this process.
        resolution: height and width of the crops in pixels, at least 1.
        classes_limit: the first so many classes only, 2..1000; needed for a copy that has fewer than a thousand.

    Raises:
        ConfigError: a setting out of range.
        DataError: nothing found, or what was found is corrupt or has other classes.
    """
    if workers < 0:
        raise ConfigError(f"workers = {workers}: it is at least 0")
    classes, input_shape = shape({"resolution": resolution, "classes_limit": classes_limit})
    train, test = _sources(image_files.checked_root("imagenet", root), classes)
    held_out, learnt = _held_out(train, classes)
    return Splits(
        train=StreamSplit(train, learnt, workers=workers, resolution=resolution),
        validation=StreamSplit(train, held_out, workers=workers, resolution=resolution),
        test=StreamSplit(
            test, torch.from_numpy(np.flatnonzero(test.labels < classes)), workers=workers, resolution=resolution
        ),
        classes=classes,
        input_shape=input_shape,
    )


def shape(settings: Mapping[str, Any]) -> tuple[int, tuple[int, int, int]]:
    """Number of classes and input shape under these settings of `splits`, without looking at any file.

    Raises:
        ConfigError: `resolution` or `classes_limit` out of range.
    """
    resolution, limit = settings.get("resolution", INPUT_SHAPE[1]), settings.get("classes_limit")
    if resolution < 1:
        raise ConfigError(f"resolution = {resolution}: it is at least 1")
    if limit is not None and not 2 <= limit <= CLASSES:
        raise ConfigError(f"classes_limit = {limit}: it is 2..{CLASSES} (leave it out for all)")
    return CLASSES if limit is None else limit, (3, resolution, resolution)


class Source(Protocol):
    """Encoded images on disk.

    Attributes:
        labels: int64 (n,).
        groups: int64 (g,), sizes of the groups of rows that are read together; their sum is n.
    """

    labels: np.ndarray
    groups: np.ndarray

    def image(self, row: int) -> tuple[bytes | Path | None, str]:
        """The encoded image, or where it lies, and words for where it was."""
        ...


class FolderSource:
    """Folders of classes. Paths are one block of bytes, which forked loader workers share instead of copying."""

    def __init__(self, folders: list[Path]) -> None:
        files = [image_files.images_in(folder) for folder in folders]
        self.labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
        self.groups = np.ones_like(self.labels)
        self._paths = np.array([os.fsencode(path) for paths in files for path in paths], dtype=bytes)

    def image(self, row: int) -> tuple[Path, str]:
        """See `Source`."""
        path = os.fsdecode(self._paths[row])
        return Path(path), path


class ParquetSource:
    """Parquet files; a row group is read as a whole, and those of the last `WINDOW` rows are kept."""

    def __init__(self, paths: list[Path]) -> None:
        self.files = [parquet_files.ParquetFile.open(path) for path in paths]
        self.labels = np.concatenate([file.labels(CLASSES) for file in self.files])
        self.groups = np.array([size for file in self.files for size in file.groups], dtype=np.int64)
        self._owners = [(file, group) for file in self.files for group in range(len(file.groups))]
        self._starts = np.cumsum(self.groups) - self.groups
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()

    def image(self, row: int) -> tuple[bytes | None, str]:
        """See `Source`."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        file, group = self._owners[index]
        data = self._group(index)[row - self._starts[index]]
        return data, f"{file.path}, row {row - self._starts[index - group]}"

    def _group(self, index: int) -> list[bytes | None]:
        if index not in self._kept:
            file, group = self._owners[index]
            self._kept[index] = file.images(group)
            while len(self._kept) > 2 and sum(map(len, self._kept.values())) > WINDOW + len(self._kept[index]):
                self._kept.popitem(last=False)
        self._kept.move_to_end(index)
        return self._kept[index]


@lru_cache(maxsize=2)
def _sources(root: Path, classes: int) -> tuple[Source, Source]:
    official = image_files.TEST_NAMES[1:]  # the files named test have no labels
    for place in image_files.places("imagenet", root):
        if (place / "train").is_dir() and any(path.is_dir() for path in (place / "train").iterdir()):
            train = image_files.class_folders(place, ["train"])
            if len(train) < classes:
                raise DataError(
                    f"{place / 'train'} has {len(train)} classes; set classes_limit = {len(train)} or lower"
                )
            test = image_files.class_folders(place, official)
            image_files.check_same_classes(place, test, len(train))
            return FolderSource(train[:classes]), FolderSource(test[:classes])
        files = parquet_files.find("imagenet", place, "train")
        if files:
            return ParquetSource(files), ParquetSource(parquet_files.find_beside("imagenet", place, *official))
    raise image_files.missing("imagenet", root)


def _held_out(source: Source, classes: int) -> tuple[Tensor, Tensor]:
    """Rows of validation (of each class the first few in a fixed order of groups) and of training, both ascending."""
    labels = torch.from_numpy(source.labels)
    order = group_order(torch.from_numpy(source.groups), torch.Generator().manual_seed(SPLIT_SEED))
    by_class = order[torch.argsort(labels[order], stable=True)]
    sizes = torch.bincount(labels, minlength=classes)
    member = torch.arange(len(labels)) - (torch.cumsum(sizes, 0) - sizes)[labels[by_class]]
    first = member < torch.clamp(sizes // VALIDATION_SHARE, max=VALIDATION_PER_CLASS)[labels[by_class]]
    wanted = labels[by_class] < classes
    return by_class[first & wanted].sort().values, by_class[~first & wanted].sort().values


def group_order(groups: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of groups, each group's rows together and in order.

    Args:
        groups: int64 (g,), number of rows of each.
        generator: draws the order.

    Returns:
        int64 (sum of groups,), a permutation of the rows.

    >>> group_order(torch.tensor([2, 1, 3]), torch.Generator().manual_seed(0)).tolist()
    [3, 4, 5, 0, 1, 2]
    """
    place = torch.argsort(torch.randperm(len(groups), generator=generator))
    return torch.argsort(torch.repeat_interleave(place, groups), stable=True)


class StreamSplit:
    """Rows of a source, decoded, cropped and batched by loader workers.

    Args:
        source: where the images are.
        rows: int64 (n,), those that belong to this split, ascending.
        workers: loader processes, 0 for none.
        resolution: height and width of the crops in pixels.

    Raises:
        DataError: no rows.
    """

    def __init__(self, source: Source, rows: Tensor, *, workers: int, resolution: int) -> None:
        if len(rows) == 0:
            raise DataError("a split of imagenet has no examples; each class needs at least six training images")
        self.source = source
        self.rows = rows
        self.workers = workers
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.rows)

    def batches(
        self, batch_size: int, *, device: torch.device, seed: int | None, augment: bool, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """See `trainables.splits.Split.batches`."""
        shares = batch_slices(len(self), batch_size, seed=seed, augment=augment, rank=rank, world=world)
        return self._read(shares, device, seed, augment)

    def _read(self, shares: list[slice], device: torch.device, seed: int | None, augment: bool) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed or 0)
        rows = self.rows if seed is None else self._shuffled(generator)
        seeds = torch.randint(0, 2**62, (len(rows),), generator=generator) if augment else None
        loader = DataLoader(
            _EncodedBatches(self.source, rows, seeds, self.resolution),
            sampler=shares,
            batch_size=None,
            num_workers=self.workers,
            generator=generator,
            pin_memory=device.type == "cuda",
        )
        offset = 255 * torch.tensor(MEAN, device=device)[:, None, None]
        factor = 1 / (255 * torch.tensor(STD, device=device)[:, None, None])
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            pixels, labels = (part.to(device, non_blocking=True) for part in batch)
            yield pixels.float().sub_(offset).mul_(factor), labels

    def _shuffled(self, generator: torch.Generator) -> Tensor:
        """This split's rows in a random order of groups, then shuffled within windows."""
        order = group_order(torch.from_numpy(self.source.groups), generator)
        mine = torch.zeros(len(order), dtype=torch.bool)
        mine[self.rows] = True
        order = order[mine[order]]
        window = torch.arange(len(order)) // WINDOW
        return order[torch.argsort(window + torch.rand(len(order), generator=generator, dtype=torch.float64))]


class _EncodedBatches(Dataset[Batch | DataError]):
    """What a loader worker runs: a slice of the epoch in, a decoded batch out, or the error that ended it."""

    def __init__(self, source: Source, rows: Tensor, seeds: Tensor | None, resolution: int) -> None:
        from torchvision import transforms

        self.source, self.rows, self.seeds = source, rows, seeds
        self.augmented = transforms.Compose(
            [transforms.RandomResizedCrop(resolution), transforms.RandomHorizontalFlip()]
        )
        self.plain = transforms.Compose(
            [transforms.Resize(round(resolution * 256 / 224)), transforms.CenterCrop(resolution)]
        )

    def __getitem__(self, share: slice) -> Batch | DataError:
        rows = self.rows[share].tolist()
        seeds = [None] * len(rows) if self.seeds is None else self.seeds[share].tolist()
        try:
            images = [self._pixels(row, seed) for row, seed in zip(rows, seeds, strict=True)]
        except DataError as error:  # as a value: raised here, the loader would bury it in a traceback of the worker
            return error
        return torch.stack(images), torch.from_numpy(self.source.labels[rows])

    def _pixels(self, row: int, seed: int | None) -> Tensor:
        image = image_files.decode(*self.source.image(row), mode="RGB")
        if seed is None:
            image = self.plain(image)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed would touch the GPU's
                image = self.augmented(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
