"""Images on disk that cannot be used: each file, row and folder is refused with the reason."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainables.pictures import GREY, encoded, folders, parquet, pictures, ubyte, write_mnist, write_parquet
from trainables.data import mnist
from trainables.errors import DataError


def good_row() -> bytes:
    return encoded(np.zeros(GREY, dtype=np.uint8))


@pytest.mark.parametrize(
    ("row", "label", "message"),
    [
        (b"not an image", 1, "row 7: not a readable image"),
        (encoded(pictures(1, GREY, 1, 0)[0][0])[:400], 1, "row 7: not a readable image"),
        (None, 1, "row 7: no image; store its bytes in the file"),
        (encoded(np.zeros((27, 28), dtype=np.uint8)), 1, "row 7: an image of 27x28 pixels; 28x28 is needed"),
        (encoded(np.zeros(GREY, dtype=np.uint16)), 1, "row 7: an image of mode I;16; convert it to 8 bits a channel"),
        (good_row(), 10, r"row 7: label 10 is outside 0\.\.9"),
        (good_row(), -1, r"row 7: label -1 is outside 0\.\.9"),
        (good_row(), None, r"row 7: no label; it is one of 0\.\.9"),
    ],
    ids=["no image", "cut off", "null", "wrong size", "16 bits", "label too high", "negative label", "null label"],
)
def test_a_bad_row_of_parquet_is_named(tmp_path: Path, row: bytes | None, label: int | None, message: str) -> None:
    images, labels = [good_row()] * 12, [row % 10 for row in range(12)]
    write_parquet(tmp_path / "test.parquet", images, labels)
    images[7], labels[7] = row, label
    path = tmp_path / "train.parquet"
    write_parquet(path, images, labels)
    with pytest.raises(DataError, match=f"^{path}, {message}"):
        mnist.splits(tmp_path)


def spoil_parquet(root: Path) -> None:
    write_mnist(root, parquet)
    for path in (root / "mnist" / "default").iterdir():
        path.write_bytes(path.read_bytes()[:500])


def spoil_shards(root: Path) -> None:
    write_mnist(root, parquet)
    (root / "mnist" / "default" / "train-00001-of-00002.parquet").unlink()


def spoil_test_split(root: Path) -> None:
    write_parquet(root / "train.parquet", [good_row()] * 12, [*range(10), 0, 1])


def spoil_columns(root: Path) -> None:
    for part in ("train", "test"):
        pq.write_table(pa.table({"pixels": [1.5], "label": [1]}), root / f"{part}.parquet")


def spoil_rows(root: Path) -> None:
    for part in ("train", "test"):
        write_parquet(root / f"{part}.parquet", [], [])


def spoil_few(root: Path) -> None:
    for part in ("train", "test"):
        write_parquet(root / f"{part}.parquet", [good_row()] * 5, [0, 1, 2, 3, 4])


def spoil_two_homes(root: Path) -> None:
    for config in ("one", "two"):
        write_parquet(root / config / "train.parquet", [good_row()], [0])


def spoil_ubyte(root: Path) -> None:
    write_mnist(root, ubyte)
    path = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_gzip(root: Path) -> None:
    write_mnist(root, ubyte, packed=True)
    path = root / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])


def spoil_companion(root: Path) -> None:
    write_mnist(root, ubyte)
    (root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()


def spoil_shape(root: Path) -> None:
    ubyte(root, "mnist", {"train": pictures(60, (8, 8), 10, 1), "test": pictures(20, (8, 8), 10, 2)})


def spoil_count(root: Path) -> None:
    images, labels = pictures(60, GREY, 10, 1)
    ubyte(root, "mnist", {"train": (images, labels[:50]), "test": (images, labels)})


def spoil_class_count(root: Path) -> None:
    folders(root, "mnist", {"train": pictures(54, GREY, 9, 1), "test": pictures(20, GREY, 10, 2)})


def spoil_class_names(root: Path) -> None:
    write_mnist(root, folders)
    (root / "mnist" / "test" / "class3").rename(root / "mnist" / "test" / "klass3")


def spoil_test_folder(root: Path) -> None:
    folders(root, "mnist", {"train": pictures(60, GREY, 10, 1)})


def spoil_no_classes(root: Path) -> None:
    (root / "train").mkdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_parquet, "is not a readable parquet file"),
        (spoil_shards, "holds 1 of the 2 files of train-00000-of-00002.parquet"),
        (spoil_test_split, "no parquet file named test or val or validation in"),
        (spoil_columns, "has no image column among pixels, label; name it 'image'"),
        (spoil_rows, "holds no images"),
        (spoil_few, "5 training images are too few"),
        (spoil_two_homes, "train parquet files of mnist lie in .*one and .*two; name one of them"),
        (spoil_ubyte, "train-images-idx3-ubyte is not a whole idx file"),
        (spoil_gzip, "train-labels-idx1-ubyte.gz cannot be read"),
        (spoil_companion, r"t10k-labels-idx1-ubyte\[.gz\] is missing beside its companions"),
        (spoil_shape, r"have shape \(1, 8, 8\); \(1, 28, 28\)"),
        (spoil_count, "holds 60 images and 50 labels"),
        (spoil_class_count, "train has 9 folders of classes; 10 are needed"),
        (spoil_class_names, "are not named as those in"),
        (spoil_test_folder, "no folder .*test or .*val or .*validation"),
        (spoil_no_classes, "train has no folders of classes"),
    ],
)
def test_files_that_cannot_be_used_are_refused_with_the_reason(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        mnist.splits(tmp_path)
