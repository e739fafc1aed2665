"""Reads images and labels from the layouts that people have on disk, and says precisely what is wrong with them.

Looked for, in this order, in a folder of the data set's name in `root` and then in `root` itself:

    torchvision   MNIST/raw/train-images-idx3-ubyte[.gz] and its three companions, or cifar-10-batches-py
    parquet       *.parquet, as on Hugging Face, named train..., test... or val...; see `trainables.parquet_files`
    folders       train/CLASS/*.png and test/CLASS/*.png (or val/, validation/); classes are numbered in order of name

Nothing is written, and no pickle is opened except through torchvision, which checks the md5 of CIFAR-10's first.
Images are decoded one by one on purpose: at 0.1 ms each, threads wait for the interpreter's lock (measured: slower).
"""

import gzip
import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainables import parquet_files
from trainables.errors import DataError
from trainables.parquet_files import ParquetFile, check_labels, plain
from trainables.splits import Images

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = tuple[int, int, int]

TEST_NAMES = ("test", "val", "validation")  # the first that is there
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # its classes and folders
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # PIL tries no other, of which some start programs
IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # 8 bits a channel or fewer
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)  # what PIL raises


def read(name: str, root: Path | None, *, classes: int, shape: Shape, download: bool = False) -> tuple[Images, Images]:
    """The official training and test set; read once in a process, whoever asks.

    Args:
        name: the data set, such as `fashion_mnist`.
        root: folder that holds the data set, or its parent.
        classes: number of classes.
        shape: channels, height and width of every image.
        download: when nothing is there, let torchvision download it into `root`.

    Raises:
        DataError: nothing found, or what was found is corrupt, of another shape, or has labels outside 0..classes - 1.
    """
    folder = checked_root(name, root, download=download)
    if download and not _has_layout(name, folder):
        _download(name, folder)
    return _read(name, folder, classes, shape)


def checked_root(name: str, root: Path | None, *, download: bool = False) -> Path:
    """The folder, absolute; it must exist unless it is to be downloaded into."""
    if root is None:
        raise DataError(f"{name} needs a folder: none was given; name the folder that holds it, or its parent")
    folder = Path(root).expanduser().resolve()
    if not folder.is_dir() and not (download and not folder.exists()):
        raise DataError(f"{name}: {folder} is not a folder; name the folder that holds the data set, or its parent")
    return folder


def missing(name: str, folder: Path) -> DataError:
    """The error for a folder in which no layout was found."""
    hint = ", or let it be downloaded there" if name in TORCHVISION else ""
    return DataError(
        f"no {name} in {folder}: looked for torchvision's files, train and test parquet files, and folders train/CLASS "
        f"and test/CLASS; name the folder that holds the data set, or its parent{hint}"
    )


def places(name: str, root: Path) -> list[Path]:
    """Where to look: folders in `root` of the data set's name (`cifar10`, `CIFAR-10`), then `root` itself."""
    if not root.is_dir():
        return []
    return [*(path for path in sorted(root.iterdir()) if path.is_dir() and plain(path.name) == plain(name)), root]


def _has_layout(name: str, root: Path) -> bool:
    return any(
        _torchvision_folder(name, place) or parquet_files.find(name, place, "train") or (place / "train").is_dir()
        for place in places(name, root)
    )


@lru_cache(maxsize=4)
def _read(name: str, root: Path, classes: int, shape: Shape) -> tuple[Images, Images]:
    for place in places(name, root):
        raw = _torchvision_folder(name, place)
        if raw is not None:
            parts = _read_cifar(raw) if name == "cifar10" else (_read_idx(raw, "train"), _read_idx(raw, "t10k"))
            return _checked(*parts[0], raw, classes, shape), _checked(*parts[1], raw, classes, shape)
        train = parquet_files.find(name, place, "train")
        if train:
            test = parquet_files.find_beside(name, place, *TEST_NAMES)
            return _read_parquet(train, classes, shape), _read_parquet(test, classes, shape)
        if (place / "train").is_dir():
            return _read_folder(place, ["train"], classes, shape), _read_folder(place, TEST_NAMES, classes, shape)
    raise missing(name, root)


def _checked(pixels: np.ndarray, labels: np.ndarray, source: Path, classes: int, shape: Shape) -> Images:
    if len(labels) == 0:
        raise DataError(f"{source} holds no images; it must hold at least one")
    if pixels.shape[1:] != shape:
        raise DataError(
            f"images in {source} have shape {pixels.shape[1:]}; {shape} (channels, height, width) is needed"
        )
    if len(pixels) != len(labels):
        raise DataError(f"{source} holds {len(pixels)} images and {len(labels)} labels; the numbers must be equal")
    check_labels(labels, source, classes)
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


# torchvision's files


def _torchvision_folder(name: str, place: Path) -> Path | None:
    if name == "cifar10":
        folders = [place, place / "cifar-10-batches-py"]
        return next((folder for folder in folders if (folder / "data_batch_1").is_file()), None)
    folders = [place, place / "raw", place / TORCHVISION.get(name, name) / "raw"]
    return next((folder for folder in folders if _idx_file(folder, "train-images-idx3-ubyte")), None)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_idx(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _idx_array(folder, f"{part}-images-idx3-ubyte", 3)
    return images[:, None], _idx_array(folder, f"{part}-labels-idx1-ubyte", 1)


def _idx_array(folder: Path, name: str, dimensions: int) -> np.ndarray:
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}[.gz] is missing beside its companions; add it")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    start = 4 * (1 + dimensions)
    shape = tuple(np.frombuffer(data[4:start], dtype=">u4").tolist()) if len(data) >= start else ()
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != int(np.prod(shape)):
        raise DataError(f"{path} is not a whole idx file of bytes with {dimensions} dimensions; fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()


def _read_cifar(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    from torchvision.datasets import CIFAR10

    if folder.name != CIFAR10.base_folder:
        raise DataError(
            f"{folder} holds CIFAR-10's batches; rename it to {CIFAR10.base_folder}, where they are looked for"
        )
    try:
        parts = [CIFAR10(folder.parent, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise DataError(
            f"{folder} differs from the published files (md5) and was not opened; fetch it again"
        ) from error
    return [(part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in parts]


def _download(name: str, root: Path) -> None:
    if name not in TORCHVISION:
        raise DataError(f"{name} cannot be downloaded by torchvision; put its files into {root}")
    from torchvision import datasets

    try:
        getattr(datasets, TORCHVISION[name])(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} could not be downloaded into {root} ({reason}); put its files there") from error


# Parquet


def _read_parquet(paths: list[Path], classes: int, shape: Shape) -> Images:
    files = [ParquetFile.open(path) for path in paths]
    labels = np.concatenate([file.labels(classes) for file in files])
    images = chain.from_iterable(file.images_with_rows() for file in files)
    return _checked(_stack(images, len(labels), shape), labels, paths[0].parent, classes, shape)


# Folders of classes


def class_folders(place: Path, splits: Iterable[str]) -> list[Path]:
    """Folders of classes of the first of the splits that is there; in order of number if all are numbers, else of name.

    Raises:
        DataError: no such folder, or nothing in it.
    """
    tried = [place / split for split in splits]
    above = next((folder for folder in tried if folder.is_dir()), None)
    if above is None:
        raise DataError(f"no folder {' or '.join(map(str, tried))}; add it, with a folder of images for each class")
    folders = sorted(path for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise DataError(f"{above} has no folders of classes; it must have one for each class, with its images")
    if all(path.name.isdecimal() for path in folders):
        folders.sort(key=lambda path: int(path.name))
    return folders


def images_in(folder: Path) -> list[Path]:
    """Image files in a folder of a class, in order of name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)


def check_same_classes(place: Path, found: list[Path], classes: int) -> None:
    """Refuses folders whose number is not that of the classes, or whose names are not those of train/."""
    if len(found) != classes:
        raise DataError(f"{found[0].parent} has {len(found)} folders of classes; {classes} are needed")
    names = [folder.name for folder in class_folders(place, ["train"])]
    if [folder.name for folder in found] != names:
        raise DataError(f"the folders in {found[0].parent} are not named as those in {place / 'train'}; they must be")


def _read_folder(place: Path, splits: Sequence[str], classes: int, shape: Shape) -> Images:
    folders = class_folders(place, splits)
    check_same_classes(place, folders, classes)
    files = [(path, label) for label, folder in enumerate(folders) for path in images_in(folder)]
    labels = np.array([label for _, label in files], dtype=np.int64)
    pixels = _stack(((path, str(path)) for path, _ in files), len(files), shape)
    return _checked(pixels, labels, folders[0].parent, classes, shape)


# Decoding


def _stack(sources: Iterable[tuple[bytes | Path | None, str]], count: int, shape: Shape) -> np.ndarray:
    channels, height, width = shape
    pixels = np.empty((count, height, width, channels), dtype=np.uint8)
    for place, (source, where) in zip(pixels, sources, strict=True):
        image = decode(source, where, mode="L" if channels == 1 else "RGB")
        if image.size != (width, height):
            raise DataError(f"{where}: an image of {image.height}x{image.width} pixels; {height}x{width} is needed")
        place[:] = np.asarray(image).reshape(place.shape)
    return pixels.transpose(0, 3, 1, 2)


def decode(source: bytes | Path | None, where: str, *, mode: str) -> "Image":
    """An image from encoded bytes or a file, as `L` (grey) or `RGB`, 8 bits a channel.

    Raises:
        DataError: no or corrupt data, or more than 8 bits a channel; the message begins with `where`.
    """
    from PIL import Image

    if not source:
        raise DataError(f"{where}: no image; store its bytes in the file")
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if image.mode not in IMAGE_MODES:
                raise DataError(f"{where}: an image of mode {image.mode}; convert it to 8 bits a channel")
            return image.convert(mode)
    except DataError:
        raise
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable image ({error}); fetch the file again") from error
