"""The laws behind splits: shares of ranks, the stratified order, crops, sizes, limits and resolutions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainables.pictures import CPU, GREY, collect, mnist_case, pictures, tensor_split, together, ubyte
from trainables.build import data_shape
from trainables.config import parse
from trainables.data import digits, imagenet, mnist
from trainables.errors import ConfigError
from trainables.splits import Images, batch_slices, crop, stratified_order


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
