"""Images on disk: what is read from each layout, and where it may lie."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainables.pictures import (
    COLOUR,
    GREY,
    cifar10_case,
    collect,
    encoded,
    folders,
    mnist_case,
    parquet,
    pictures,
    together,
    ubyte,
    write_mnist,
    write_parquet,
)
from trainables.data import cifar10, fashion_mnist, imagenet, mnist
from trainables.errors import DataError


@pytest.mark.parametrize("write", [ubyte, parquet], ids=["ubyte", "parquet"])
def test_pixels_and_labels_are_read_as_they_were_written(tmp_path: Path, write: Callable) -> None:
    images, labels = pictures(60, GREY, 10, 1)
    data = mnist_case(write)(tmp_path)
    assert np.array_equal(data.train.images.pixels[:, 0].numpy(), images)
    assert np.array_equal(data.train.images.labels.numpy(), labels)


def test_folders_of_classes_are_numbered_in_order_of_name(tmp_path: Path) -> None:
    images, labels = pictures(60, COLOUR, 10, 5)
    data = cifar10_case(folders)(tmp_path)
    order = np.argsort(labels, kind="stable")
    assert np.array_equal(data.train.images.pixels.permute(0, 2, 3, 1).numpy(), images[order])
    assert np.array_equal(data.train.images.labels.numpy(), labels[order])


def test_folders_named_by_numbers_are_in_order_of_number(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for label in range(11):
            (tmp_path / part / str(label)).mkdir(parents=True)
            count = 6 if part == "train" else 1
            for row in range(count):
                image = np.full((40, 40, 3), 20 * label + row, dtype=np.uint8)
                (tmp_path / part / str(label) / f"{row}.png").write_bytes(encoded(image))
    data = imagenet.splits(tmp_path, resolution=8, workers=0, classes_limit=11)
    images, labels = together(collect(data.test))
    assert labels.tolist() == list(range(11))
    assert torch.equal(images.mean((1, 2, 3)).argsort(), torch.arange(11))


@pytest.mark.parametrize("place", ["{root}", "{root}/mnist", "{root}/mnist/default"])
def test_the_root_is_the_data_set_or_its_parent(tmp_path: Path, place: str) -> None:
    mnist_case(parquet)(tmp_path)
    assert len(mnist.splits(Path(place.format(root=tmp_path))).train) == 50


def test_parquet_splits_may_be_folders(tmp_path: Path) -> None:
    for part, count in (("train", 60), ("test", 20)):
        images, labels = pictures(count, GREY, 10, 1)
        write_parquet(tmp_path / part / "0000.parquet", [encoded(image) for image in images], labels.tolist())
    assert len(mnist.splits(tmp_path).test) == 20


def test_the_same_folder_is_read_once_in_a_process(tmp_path: Path) -> None:
    first = mnist_case(ubyte)(tmp_path)
    again = mnist.splits(tmp_path / "MNIST" / "..", train_limit=5)
    assert again.train.images is first.train.images


def cifar_pickles(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """A small cifar-10-batches-py, its md5 put into torchvision's list."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    images, labels = pictures(80, COLOUR, 10, 5)
    rows = images.transpose(0, 3, 1, 2).reshape(80, -1)
    contents = {
        "data_batch_1": {"data": rows[:60], "labels": labels[:60].tolist()},
        "test_batch": {"data": rows[60:], "labels": labels[60:].tolist()},
        "batches.meta": {"label_names": [str(label) for label in range(10)]},
    }
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    return images, labels


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_torchvision_s_cifar_is_read_through_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    images, labels = cifar_pickles(tmp_path, monkeypatch)
    data = cifar10.splits(tmp_path / place)
    assert np.array_equal(data.train.images.pixels.permute(0, 2, 3, 1).numpy(), images[:60])
    assert data.test.images.labels.tolist() == labels[60:].tolist()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_unknown_md5_is_never_opened(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="differs from the published files"):
        cifar10.splits(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("module", [mnist, fashion_mnist, cifar10, imagenet], ids=lambda module: module.__name__)
def test_a_data_set_on_disk_needs_a_folder_that_holds_it(tmp_path: Path, module: object) -> None:
    with pytest.raises(DataError, match="needs a folder: none was given"):
        module.splits(None)
    with pytest.raises(DataError, match="is not a folder"):
        module.splits(tmp_path / "absent")
    with pytest.raises(DataError, match=r"no \w+ in .*: looked for torchvision's files, train and test parquet files"):
        module.splits(tmp_path)


def test_mnist_is_not_taken_for_fashion_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path, parquet)
    with pytest.raises(DataError, match="no fashion_mnist in"):
        fashion_mnist.splits(tmp_path)


def test_a_download_that_fails_is_a_data_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(DataError, match="cifar10 could not be downloaded into"):
        cifar10.splits(tmp_path / "new", download=True)


def test_what_is_there_is_not_downloaded_again(tmp_path: Path) -> None:
    write_mnist(tmp_path, parquet)
    before = sorted(tmp_path.rglob("*"))
    assert len(mnist.splits(tmp_path, download=True).train) == 50
    assert sorted(tmp_path.rglob("*")) == before
