"""ImageNet's stream of photographs: workers, memory, classes, and what is refused."""

from pathlib import Path

import pytest

from tests.trainables.pictures import COLOUR, SMALL, collect, folders, imagenet_case, parquet, pictures, same, together
from trainables.build import data_shape
from trainables.config import parse
from trainables.data import imagenet
from trainables.errors import ConfigError, DataError


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


def test_imagenet_says_how_many_classes_it_found(tmp_path: Path) -> None:
    imagenet_case(folders, "val")(tmp_path)
    with pytest.raises(DataError, match="train has 3 classes; set classes_limit = 3 or lower"):
        imagenet.splits(tmp_path)


def test_imagenet_needs_enough_images_of_a_class_for_validation(tmp_path: Path) -> None:
    folders(tmp_path, "imagenet", {"train": pictures(9, COLOUR, 3, 1), "val": pictures(3, COLOUR, 3, 1)})
    with pytest.raises(DataError, match="each class needs at least six training images"):
        imagenet.splits(tmp_path, **SMALL)
