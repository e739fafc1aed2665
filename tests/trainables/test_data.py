"""Data sets: the contract of splits, on every data set in every layout."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainables.pictures import (
    cifar10_case,
    collect,
    digits_case,
    fashion_case,
    folders,
    imagenet_case,
    mnist_case,
    parquet,
    same,
    together,
    ubyte,
)
from trainables import plugins
from trainables.splits import Splits

CASES: dict[str, Callable[[Path], Splits]] = {
    "digits": digits_case,
    "mnist-ubyte": mnist_case(ubyte),
    "mnist-parquet": mnist_case(parquet),
    "mnist-folders": mnist_case(folders),
    "fashion_mnist-ubyte": fashion_case(ubyte, packed=True),
    "fashion_mnist-parquet": fashion_case(parquet),
    "fashion_mnist-folders": fashion_case(folders),
    "cifar10-parquet": cifar10_case(parquet, column="img"),
    "cifar10-folders": cifar10_case(folders),
    "imagenet-parquet": imagenet_case(parquet, "validation"),
    "imagenet-folders": imagenet_case(folders, "val"),
}


@pytest.fixture(scope="module", params=CASES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return CASES[request.param](tmp_path_factory.mktemp("data"))


def test_every_data_set_is_under_contract() -> None:
    assert {case.split("-")[0] for case in CASES} == set(plugins.describe("trainables.data"))


@pytest.mark.parametrize("name", plugins.describe("trainables.data"))
def test_a_data_set_says_what_it_is_and_its_classes_and_shape(name: str) -> None:
    module = plugins.load("data", name)
    assert plugins.describe("trainables.data")[name].endswith((".", ")"))
    assert module.CLASSES >= 2
    assert len(module.INPUT_SHAPE) == 3


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_batches_are_float_images_and_integer_labels_of_the_stated_shape(data: Splits, part: str) -> None:
    split = getattr(data, part)
    images, labels = together(collect(split))
    assert images.shape == (len(split), *data.input_shape)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert set(labels.tolist()) == set(range(data.classes))


def test_no_image_is_in_two_splits_or_twice_in_one(data: Splits) -> None:
    images = torch.cat([together(collect(split))[0] for split in (data.train, data.validation, data.test)])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_training_pixels_are_normalized_about_zero(data: Splits) -> None:
    images, _ = together(collect(data.train))
    assert images.min() < 0 < images.max() < 4


def test_the_same_seed_gives_the_same_epoch(data: Splits) -> None:
    assert same(collect(data.train, seed=3, augment=True), collect(data.train, seed=3, augment=True))


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_shuffled_epoch_holds_exactly_the_examples_of_its_split(data: Splits, part: str) -> None:
    split = getattr(data, part)
    epochs = [together(collect(split, 1, seed=seed)) for seed in (None, 6)]
    in_order, shuffled = (sorted((x.numpy().tobytes(), int(y)) for x, y in zip(*e, strict=True)) for e in epochs)
    assert in_order == shuffled


def test_another_seed_gives_another_epoch(data: Splits) -> None:
    assert not same(collect(data.train, seed=3), collect(data.train, seed=4))


def test_augmentation_changes_images_but_neither_order_nor_labels(data: Splits) -> None:
    plain, changed = (together(collect(data.train, seed=3, augment=augment)) for augment in (False, True))
    assert torch.equal(plain[1], changed[1])
    assert not torch.equal(plain[0], changed[0])


def test_one_worker_and_two_workers_train_on_the_same_pixels(data: Splits) -> None:
    whole = collect(data.train, seed=5, augment=True)
    halves = [collect(data.train, seed=5, augment=True, rank=rank, world=2) for rank in (0, 1)]
    rebuilt = []
    for (x0, y0), (x1, y1) in zip(*halves, strict=True):
        rebuilt.append((torch.stack((x0, x1), 1).flatten(0, 1), torch.stack((y0, y1), 1).flatten()))
    assert same(whole, rebuilt)


def test_the_workers_together_evaluate_each_example_once_in_order(data: Splits) -> None:
    shares = [batch for rank in range(3) for batch in collect(data.test, rank=rank, world=3)]
    assert same([together(shares)], [together(collect(data.test))])


def test_reading_leaves_the_global_random_states_alone(data: Splits) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    collect(data.train, seed=1, augment=True)
    collect(data.validation)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]
