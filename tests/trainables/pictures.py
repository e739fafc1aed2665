"""Tiny copies of data sets, random, in each layout that people have on disk."""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from trainables.data import cifar10, digits, fashion_mnist, imagenet, mnist
from trainables.splits import Images, Splits, TensorSplit

CPU = torch.device("cpu")
GREY, COLOUR = (28, 28), (32, 32, 3)


def pictures(count: int, shape: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images, uint8 (count, H, W[, 3]), and labels, each class equally often, shuffled."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % classes)
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8), labels


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[int | None], *, column: str = "image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(cells, kind), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=5)


def parquet(root: Path, name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], column: str = "image") -> None:
    for part, (images, labels) in parts.items():
        half = len(images) // 2
        for shard, rows in enumerate((slice(half), slice(half, None))):
            path = root / name / "default" / f"{part}-0000{shard}-of-00002.parquet"
            write_parquet(path, [encoded(image) for image in images[rows]], labels[rows].tolist(), column=column)


def folders(root: Path, name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for part, (images, labels) in parts.items():
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / name / part / f"class{label}" / f"{row:04}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def ubyte(root: Path, name: str, parts: dict[str, tuple[np.ndarray, np.ndarray]], *, packed: bool = False) -> None:
    folder = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    folder.mkdir(parents=True)
    for part, (images, labels) in parts.items():
        prefix = {"train": "train", "test": "t10k"}[part]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            path = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)


SMALL = {"resolution": 32, "classes_limit": 3, "workers": 0}
AUGMENTED = {"augment": "crop-flip"}


def digits_case(root: Path) -> Splits:
    return digits.splits(None, **AUGMENTED)


def write_mnist(root: Path, write: Callable, **options: object) -> None:
    write(root, "mnist", {"train": pictures(60, GREY, 10, 1), "test": pictures(20, GREY, 10, 2)}, **options)


def mnist_case(write: Callable) -> Callable[[Path], Splits]:
    def make(root: Path) -> Splits:
        write_mnist(root, write)
        return mnist.splits(root, **AUGMENTED)

    return make


def fashion_case(write: Callable, **options: object) -> Callable[[Path], Splits]:
    def make(root: Path) -> Splits:
        write(root, "fashion_mnist", {"train": pictures(60, GREY, 10, 3), "test": pictures(20, GREY, 10, 4)}, **options)
        return fashion_mnist.splits(root, **AUGMENTED)

    return make


def cifar10_case(write: Callable, **options: object) -> Callable[[Path], Splits]:
    def make(root: Path) -> Splits:
        write(root, "cifar10", {"train": pictures(60, COLOUR, 10, 5), "test": pictures(20, COLOUR, 10, 6)}, **options)
        return cifar10.splits(root)

    return make


def imagenet_case(write: Callable, part: str) -> Callable[[Path], Splits]:
    def make(root: Path) -> Splits:
        shape = (40, 50, 3)
        write(root, "imagenet", {"train": pictures(42, shape, 3, 7), part: pictures(12, shape, 3, 8)})
        return imagenet.splits(root, **SMALL)

    return make


def collect(split: object, batch_size: int = 8, **reading: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"device": CPU, "seed": None, "augment": False} | reading
    return list(split.batches(batch_size, **options))


def same(one: list, two: list) -> bool:
    return len(one) == len(two) and all(
        torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True)
    )


def together(batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def tensor_split(count: int = 64, **options: object) -> TensorSplit:
    images, labels = pictures(count, (3, 8, 8), 4, 9)
    stored = Images(torch.from_numpy(images), torch.from_numpy(labels))
    return TensorSplit(stored, torch.arange(count), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **options)
