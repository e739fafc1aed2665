"""The pictures are files with something in them: size, colours, names."""

import sys

import numpy as np
import pytest
from PIL import Image

from analysis.front import Front
from analysis.pareto import hypervolume_history
from analysis.plots import plot_bits, plot_front, plot_hypervolume
from tests.analysis.records import OBJECTIVES, record

BLUE, RED = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def sweep(seed, **changes):
    """Twenty trials: the more bits, the more accurate, more or less."""
    random = np.random.default_rng(seed)
    bits = random.integers(2, 9, size=(20, 2))
    return [
        record(
            trial,
            accuracy=1 - 0.5 * float(np.exp(-0.4 * (weight + activation))) - 0.05 * float(random.random()),
            bops=1000 * int(weight * activation),
            size_bytes=1024 * int(weight) + int(random.integers(100)),
            digest=f"{seed} {trial}",
            **changes,
        )
        for trial, (weight, activation) in enumerate(bits)
    ]


def pixels(path, color, within=0):
    """How many pixels have this colour, each channel up to `within`."""
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(image - color) <= within).all(axis=2).sum())


def test_a_front_is_drawn_in_one_colour_on_two_panels(tmp_path):
    path = plot_front(Front.of(sweep(0), OBJECTIVES), tmp_path / "front.png")
    image = Image.open(path)
    assert (image.format, image.size) == ("PNG", (1650, 750))
    colored = (np.asarray(image.convert("RGB")) == BLUE).all(axis=2)
    assert min(colored[:650, :825].sum(), colored[:650, 825:].sum()) > 500
    assert pixels(path, RED) == 0


def test_two_runs_on_one_front_have_two_colours(tmp_path):
    front = Front.of(sweep(0, run="a") + sweep(1, run="b"), OBJECTIVES)
    path = plot_front(front, tmp_path / "front.png")
    assert min(pixels(path, BLUE), pixels(path, RED)) > 200


def test_two_fronts_have_two_colours_and_a_title(tmp_path):
    fronts = {name: Front.of(sweep(seed), OBJECTIVES) for seed, name in enumerate(("lsq", "pact"))}
    plain = plot_front(fronts, tmp_path / "plain.png")
    titled = plot_front(fronts, str(tmp_path / "titled.png"), title="two methods")
    assert min(pixels(plain, BLUE), pixels(plain, RED)) > 200
    assert (np.asarray(Image.open(titled))[:30] < 128).any()
    assert not (np.asarray(Image.open(plain).convert("L"))[:8, 200:600] < 128).any()


def test_names_stand_in_the_legend(tmp_path):
    fronts = {name: Front.of(sweep(seed), OBJECTIVES) for seed, name in enumerate(("lsq", "pact"))}
    path = plot_front(fronts, tmp_path / "front.svg")
    text = path.read_text(encoding="utf-8")
    assert all(f"<!-- {words} -->" in text for words in ("lsq", "pact", "dominated", "relative BOPs (%)", "size (KiB)"))


def test_one_point_can_be_drawn(tmp_path):
    assert pixels(plot_front(Front.of([record()], OBJECTIVES), tmp_path / "front.png"), BLUE) > 50


def test_dominated_points_are_fainter(tmp_path):
    lone = plot_front(Front.of([record(0)], OBJECTIVES), tmp_path / "lone.png")
    dominated = [
        record(i, accuracy=0.4 + 0.0037 * i, bops=17_000 + 170 * i, size_bytes=3000 + 70 * i) for i in range(1, 9)
    ]
    front = Front.of([record(0), *dominated], OBJECTIVES)
    both = plot_front(front, tmp_path / "both.png")
    faint = tuple(round(255 - 0.25 * (255 - channel)) for channel in BLUE)
    assert pixels(lone, faint, within=2) < 10
    assert pixels(both, faint, within=2) > 50


def test_an_empty_front_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="no trial is complete"):
        plot_front(Front.of([], OBJECTIVES), tmp_path / "front.png")
    with pytest.raises(ValueError, match="no trial is complete"):
        plot_front({}, tmp_path / "front.png")
    assert list(tmp_path.iterdir()) == []


def test_a_hypervolume_is_drawn(tmp_path):
    path = plot_hypervolume(hypervolume_history(sweep(0), OBJECTIVES), tmp_path / "hypervolume.png", title="digits")
    image = Image.open(path)
    assert (image.format, image.size) == ("PNG", (1050, 675))
    assert pixels(path, BLUE) > 500


def test_hypervolumes_of_several_sweeps_have_a_colour_each(tmp_path):
    histories = {name: hypervolume_history(sweep(seed), OBJECTIVES) for seed, name in enumerate("ab")}
    path = plot_hypervolume(histories, tmp_path / "hypervolume.png")
    assert min(pixels(path, BLUE), pixels(path, RED)) > 200


def test_no_completed_trial_has_no_hypervolume_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no trial is complete"):
        plot_hypervolume(hypervolume_history([], OBJECTIVES), tmp_path / "hypervolume.png")


def test_drawing_needs_no_pyplot_and_leaves_none_behind(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plot_front(Front.of([record()], OBJECTIVES), tmp_path / "front.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_widths_over_epochs_are_drawn_with_a_colour_for_each(tmp_path):
    history = [{"epoch": e, "bits": {"conv1": [8 - e, 8], "fc": [0, 8]}} for e in (1, 2, 3)]
    path = plot_bits([{"epoch": 0}, *history], tmp_path / "bits.png", title="trial 3")
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape[1] == 1200
    zero, eight = (68, 1, 84), (122, 209, 81)  # viridis, at its two values
    assert pixels(path, zero, within=6) > 10_000
    assert pixels(path, eight, within=30) > 30_000


def test_without_widths_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="there are no bits to draw"):
        plot_bits([{"epoch": 1}], tmp_path / "bits.png")
