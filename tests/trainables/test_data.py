"""Data sets: the contract of splits on every data set in every layout, the laws behind it, and what failure says.

The images are random and written by the tests, tiny copies of each data set in each layout that people have on disk.
"""

import gzip
import hashlib
import io
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainables import plugins
from trainables.build import data_shape
from trainables.config import parse
from trainables.data import cifar10, digits, fashion_mnist, imagenet, mnist
from trainables.errors import ConfigError, DataError
from trainables.splits import Images, Splits, TensorSplit, batch_slices, crop, stratified_order

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


def collect(split: object, batch_size: int = 8, **reading: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    options = {"device": CPU, "seed": None, "augment": False} | reading
    return list(split.batches(batch_size, **options))


def same(one: list, two: list) -> bool:
    return len(one) == len(two) and all(
        torch.equal(x, y) for a, b in zip(one, two, strict=True) for x, y in zip(a, b, strict=True)
    )


def together(batches: list) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


# The contract, on every data set in every layout


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


# The laws behind it


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    world=st.integers(1, 5),
    seed=st.sampled_from([None, 0]),
)
def test_ranks_read_disjoint_positions_and_all_that_are_due(
    length: int, batch_size: int, world: int, seed: int | None
) -> None:
    if seed is not None and min(batch_size, length) < world:
        with pytest.raises(ConfigError, match="cannot be shared"):
            batch_slices(length, batch_size, seed=seed, augment=False, rank=0, world=world)
        return
    shares = [
        batch_slices(length, batch_size, seed=seed, augment=False, rank=rank, world=world) for rank in range(world)
    ]
    read = [[place for part in share for place in range(length)[part]] for share in shares]
    due = length if seed is None or batch_size > length else length // batch_size * batch_size
    assert sorted(place for places in read for place in places) == list(range(due))
    if seed is None:
        assert max(map(len, read)) - min(map(len, read)) <= 1
    else:
        assert len({len(share) for share in shares}) == 1


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80))
def test_every_beginning_of_the_stratified_order_is_in_proportion(labels: list[int]) -> None:
    tensor = torch.tensor(labels)
    order = stratified_order(tensor)
    assert order.sort().values.tolist() == list(range(len(labels)))
    present = tensor.unique().tolist()
    for label in present:
        share = labels.count(label) / len(labels)
        counted = (tensor[order] == label).cumsum(0)
        fair = torch.arange(1, len(labels) + 1) * share
        assert (counted - fair).abs().max() <= 0.5 + share * len(present) / 2 + 1e-4


def test_the_validation_set_is_the_same_for_ever() -> None:
    assert stratified_order(torch.arange(12) % 3).tolist() == [3, 7, 11, 0, 1, 5, 9, 4, 2, 6, 10, 8]


@given(groups=st.lists(st.integers(0, 6), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_the_order_of_groups_keeps_each_group_together(groups: list[int], seed: int) -> None:
    order = imagenet.group_order(torch.tensor(groups), torch.Generator().manual_seed(seed))
    owners = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    assert order.sort().values.tolist() == list(range(sum(groups)))
    assert len(torch.unique_consecutive(owners[order])) == sum(size > 0 for size in groups)


@given(size=st.integers(1, 6), pad=st.integers(0, 3), place=st.data())
def test_a_crop_is_a_window_of_the_image_on_black(size: int, pad: int, place: st.DataObject) -> None:
    row, column = (place.draw(st.integers(0, 2 * pad)) for _ in range(2))
    image = torch.arange(1, size * size + 1).reshape(1, 1, size, size)
    canvas = torch.zeros(1, 1, size + 2 * pad, size + 2 * pad, dtype=torch.int64)
    canvas[:, :, pad : pad + size, pad : pad + size] = image
    wanted = canvas[:, :, row : row + size, column : column + size]
    assert torch.equal(crop(image, torch.tensor([[row, column]]), pad), wanted)


def tensor_split(count: int = 64, **options: object) -> TensorSplit:
    images, labels = pictures(count, (3, 8, 8), 4, 9)
    stored = Images(torch.from_numpy(images), torch.from_numpy(labels))
    return TensorSplit(stored, torch.arange(count), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), **options)


def test_normalizing_is_value_minus_mean_over_deviation() -> None:
    split = tensor_split()
    wanted = split.images.pixels.double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    torch.testing.assert_close(together(collect(split))[0].double(), (wanted - mean) / std, atol=1e-5, rtol=0)


def test_without_padding_crop_flip_only_mirrors_about_half_of_the_images() -> None:
    split = tensor_split(augmentation="crop-flip", pad=0)
    plain, changed = (together(collect(split, seed=0, augment=augment))[0] for augment in (False, True))
    mirrored = [torch.equal(image, other.flip(2)) for image, other in zip(plain, changed, strict=True)]
    kept = [torch.equal(image, other) for image, other in zip(plain, changed, strict=True)]
    assert sum(mirrored) + sum(kept) == 64
    assert 16 < sum(mirrored) < 48


def test_the_incomplete_last_batch_is_dropped_unless_it_is_the_only_one() -> None:
    assert [len(labels) for _, labels in collect(tensor_split(20), 8, seed=0)] == [8, 8]
    assert [len(labels) for _, labels in collect(tensor_split(5), 8, seed=0)] == [5]
    assert [len(labels) for _, labels in collect(tensor_split(20), 8)] == [8, 8, 4]


def test_splits_of_one_data_set_share_one_copy_of_the_pixels() -> None:
    data = digits.splits(None)
    assert data.train.images.on(CPU)[0] is digits.splits(None, train_limit=9).test.images.on(CPU)[0]


# Sizes, limits, layouts


def test_digits_are_split_in_three_fifths_and_two_fifths() -> None:
    data = digits.splits(None)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1079, 359, 359]


def test_a_small_copy_gives_a_sixth_to_validation_and_large_ones_five_thousand(tmp_path: Path) -> None:
    small = mnist_case(ubyte)(tmp_path / "small")
    assert [len(part) for part in (small.train, small.validation, small.test)] == [50, 10, 20]
    parts = {"train": pictures(60_000, (1, 1), 10, 0), "test": pictures(10, GREY, 10, 0)}
    parts["train"] = (np.broadcast_to(parts["train"][0], (60_000, *GREY)), parts["train"][1])
    ubyte(tmp_path / "large", "mnist", parts)
    large = mnist.splits(tmp_path / "large")
    assert [len(part) for part in (large.train, large.validation)] == [55_000, 5_000]
    assert torch.bincount(large.validation.images.labels[large.validation.rows]).tolist() == [500] * 10


def test_limits_take_the_beginning_of_the_fixed_stratified_order() -> None:
    whole, few = digits.splits(None), digits.splits(None, train_limit=20, validation_limit=30)
    assert few.train.rows.tolist() == whole.train.rows[:20].tolist()
    assert few.validation.rows.tolist() == whole.validation.rows[:30].tolist()
    assert few.test.rows.tolist() == whole.test.rows.tolist()


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


# ImageNet's stream


def test_the_number_of_loader_workers_changes_nothing(tmp_path: Path) -> None:
    imagenet_case(parquet, "validation")(tmp_path)
    alone, helped = (imagenet.splits(tmp_path, **SMALL | {"workers": workers}) for workers in (0, 2))
    assert same(collect(alone.train, seed=2, augment=True), collect(helped.train, seed=2, augment=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_photograph_is_named_from_inside_a_loader_worker(tmp_path: Path, workers: int) -> None:
    imagenet_case(folders, "val")(tmp_path)
    broken = sorted((tmp_path / "imagenet" / "val" / "class1").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=rf"^{broken}: not a readable image"):
        collect(imagenet.splits(tmp_path, **SMALL | {"workers": workers}).test)


def test_a_stream_of_parquet_keeps_few_row_groups_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "WINDOW", 10)
    data = imagenet_case(parquet, "validation")(tmp_path)
    collect(data.train, seed=0)
    assert sum(map(len, data.train.source._kept.values())) <= 15


def test_classes_limit_takes_the_first_classes_only(tmp_path: Path) -> None:
    imagenet_case(folders, "val")(tmp_path)
    data = imagenet.splits(tmp_path, **SMALL | {"classes_limit": 2})
    assert (data.classes, len(data.train), len(data.validation), len(data.test)) == (2, 24, 4, 8)
    assert set(together(collect(data.train))[1].tolist()) == {0, 1}


# What is said when it fails


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "flip"}, "augment = 'flip': it is one of none, crop, crop-flip"),
        ({"train_limit": 0}, r"train_limit = 0: this data set has 1\.\.1079"),
        ({"train_limit": 1080}, r"train_limit = 1080: this data set has 1\.\.1079"),
        ({"validation_limit": 360}, r"validation_limit = 360: this data set has 1\.\.359"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_range(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits.splits(None, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers = -1"),
        ({"resolution": 0}, "resolution = 0"),
        ({"classes_limit": 1}, r"classes_limit = 1: it is 2\.\.1000"),
        ({"classes_limit": 1001}, "classes_limit = 1001"),
    ],
)
def test_a_setting_of_imagenet_out_of_range_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        imagenet.splits(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, (1000, (3, 224, 224))),
        ({"resolution": 64}, (1000, (3, 64, 64))),
        ({"classes_limit": 3, "workers": 0}, (3, (3, 224, 224))),
        ({"classes_limit": None, "resolution": 1}, (1000, (3, 1, 1))),
    ],
)
def test_classes_and_shape_of_imagenet_follow_its_settings_before_any_file_is_there(
    settings: dict, known: tuple[int, tuple[int, int, int]]
) -> None:
    config = parse({"method": "float", "model": "resnet18", "data": {"name": "imagenet", **settings}})
    assert imagenet.shape(settings) == data_shape(config) == known


def test_classes_and_shape_of_imagenet_known_beforehand_are_those_of_its_splits(tmp_path: Path) -> None:
    data = imagenet_case(folders, "val")(tmp_path)
    assert imagenet.shape(SMALL) == (data.classes, data.input_shape) == (3, (3, 32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"resolution": 0}, "resolution = 0: it is at least 1"), ({"classes_limit": 0}, r"classes_limit = 0: it is 2")],
)
def test_a_shape_of_imagenet_out_of_range_is_refused_before_any_file_is_there(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        imagenet.shape(settings)


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"rank": 2, "world": 2}, "rank = 2"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"augment": True}, "augment needs a seed"),
        ({"seed": 0, "batch_size": 1, "world": 2}, "cannot be shared by 2 workers"),
    ],
)
def test_a_reading_that_makes_no_sense_is_refused_at_once(reading: dict, message: str) -> None:
    options = {"batch_size": 8, "device": CPU, "seed": None, "augment": False} | reading
    with pytest.raises(ConfigError, match=message):
        tensor_split().batches(**options)


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


def test_imagenet_says_how_many_classes_it_found(tmp_path: Path) -> None:
    imagenet_case(folders, "val")(tmp_path)
    with pytest.raises(DataError, match="train has 3 classes; set classes_limit = 3 or lower"):
        imagenet.splits(tmp_path)


def test_imagenet_needs_enough_images_of_a_class_for_validation(tmp_path: Path) -> None:
    folders(tmp_path, "imagenet", {"train": pictures(9, COLOUR, 3, 1), "val": pictures(3, COLOUR, 3, 1)})
    with pytest.raises(DataError, match="each class needs at least six training images"):
        imagenet.splits(tmp_path, **SMALL)


# Resolution


@pytest.mark.parametrize("side", [4, 6, 12])
def test_digits_of_another_resolution_are_the_same_digits_in_the_same_splits(side: int) -> None:
    native, other = digits.splits(), digits.splits(resolution=side)
    config = parse({"method": "float", "model": "lenet5", "data": {"name": "digits", "resolution": side}})
    assert other.input_shape == data_shape(config)[1] == (1, side, side)
    for part in ("train", "validation", "test"):
        ((one, labels),), ((two, same),) = (collect(getattr(data, part), 2000) for data in (native, other))
        assert torch.equal(labels, same)
        assert two.shape[1:] == other.input_shape
        near = torch.corrcoef(torch.stack([one.mean((1, 2, 3)), two.mean((1, 2, 3))]))[0, 1]
        assert near > 0.9


def test_images_of_one_colour_stay_that_colour_at_any_resolution_and_are_made_once() -> None:
    images = Images(torch.full((3, 2, 8, 8), 77, dtype=torch.uint8), torch.arange(3))
    assert torch.equal(images.resized(5).pixels, torch.full((3, 2, 5, 5), 77, dtype=torch.uint8))
    assert images.resized(5) is images.resized(5)
    assert images.resized(8) is images


@pytest.mark.parametrize("side", [0, 33])
def test_a_resolution_out_of_range_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match=rf"data/resolution = {side}: these images take 1..32 pixels"):
        digits.splits(resolution=side)
