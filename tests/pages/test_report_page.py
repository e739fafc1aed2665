"""The report in a browser: what it shows, what it answers to a mouse, how fast it opens, and that it asks nobody."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.front import Front
from analysis.report import report
from tests.analysis.records import OBJECTIVES, sweep

Opened = Callable[..., Any]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of one sweep with budgets, two of whose points were tested."""
    made = sweep("digits-lsq", seed=0, trials=40, asked={"max_relative_bops": 0.05, "max_size_bytes": 5000}, tested=2)
    return written(tmp_path_factory.mktemp("pages") / "single.html", report([made], "Digits with LSQ"))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two methods with three seeds each."""
    sweeps = [sweep(f"{m}-{s}", seed=s, trials=30, method=m) for m in ("lsq", "pact") for s in (0, 1, 2)]
    return written(tmp_path_factory.mktemp("pages") / "several.html", report(sweeps, "LSQ and PACT"))


def written(path: Path, page: str) -> str:
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


def test_a_page_opens_without_a_request_or_an_error(opened: Opened, single: str, several: str, shots: Path) -> None:
    for name, url in (("report", single), ("comparison", several)):
        page = opened(url)
        page.screenshot(path=shots / f"{name}.png", full_page=True)
        assert (page.requests, page.faults) == ([url], [])


def test_the_front_is_drawn_against_bops_and_size_with_knee_and_budgets(opened: Opened, single: str) -> None:
    page = opened(single)
    front = Front.of(sweep("digits-lsq", seed=0, trials=40).records, OBJECTIVES)
    for chart in page.locator("figure").all()[:2]:
        assert chart.locator("circle.member").count() == len(front)
        assert chart.locator("path.stairs").count() == 1
        assert chart.locator("circle.knee").count() == 1
        assert chart.locator("text.mark").text_content() == "knee"
    assert page.locator("text.budget").all_text_contents() == ["budget 5 %", "budget 4.9 KiB"]
    assert "relative BOPs (%)" in page.locator("figure").nth(0).text_content()
    assert "size (KiB)" in page.locator("figure").nth(1).text_content()
    faint = page.locator("circle.dominated").first
    assert float(faint.get_attribute("fill-opacity")) < 0.3


def test_all_points_are_shown_on_demand(opened: Opened, single: str) -> None:
    page = opened(single)
    page.check("input.all")
    first = page.locator("figure").nth(0)
    assert first.locator("circle.member, circle.dominated").count() == 40
    assert page.locator(".below").text_content() == ""


def test_a_point_under_the_mouse_tells_its_bits_layer_by_layer(opened: Opened, single: str, shots: Path) -> None:
    page = opened(single)
    member = page.locator("figure").nth(0).locator("circle.member").first
    member.hover(force=True)
    tip = page.locator("#tip")
    assert tip.is_visible()
    said = tip.inner_text()
    assert re.search(r"trial \d+", said)
    assert "conv1" in said
    assert "validation accuracy" in said
    assert tip.locator(".widths b").count() == 2 * 4
    page.screenshot(path=shots / "hover.png")
    page.mouse.move(5, 5)
    assert not tip.is_visible()


def test_a_click_on_a_row_shows_the_network_below_the_front(opened: Opened, single: str) -> None:
    page = opened(single)
    assert "knee" in page.locator("#chosen h3").inner_text()
    row = page.locator("tr[data-point]").first
    row.click()
    trial = row.locator("td").nth(1).inner_text()
    assert page.locator("#chosen h3").inner_text().startswith(f"trial {trial} · most-accurate")
    assert f"raysearch export runs/digits-lsq {trial} -o net.onnx" in page.locator("#chosen pre").inner_text()
    assert "chosen" in row.get_attribute("class")


def test_a_click_on_a_title_sorts(opened: Opened, single: str) -> None:
    page = opened(single)
    table = page.locator("table").first
    for _ in range(2):
        table.locator("th", has_text="relative BOPs").click()
    assert table.locator("th", has_text="relative BOPs").get_attribute("aria-sort") == "descending"
    shares = [float(text.rstrip(" %")) for text in table.locator("tbody td:nth-child(5)").all_inner_texts()]
    assert shares == sorted(shares, reverse=True)


def test_bits_of_the_front_are_a_heat_map(opened: Opened, single: str) -> None:
    page = opened(single)
    points = page.locator("tr[data-point]").count()
    heat = page.locator("figure", has=page.locator("rect.cell"))
    assert [chart.locator("rect.cell").count() for chart in heat.all()] == [4 * points, 4 * points]
    heat.first.locator("rect.cell").first.hover(force=True)
    assert re.search(r"conv1: \d+ bits of its weights", page.locator("#tip").inner_text())


def test_methods_are_compared_with_bands_over_seeds(opened: Opened, several: str) -> None:
    page = opened(several)
    attainment = page.locator("figure", has=page.locator("path.band"))
    assert [chart.locator("path.band").count() for chart in attainment.all()] == [2, 2, 2]
    titles = page.locator("h2").all_inner_texts()
    assert {"Comparison", "Hypervolume", "Accuracy at equal relative BOPs", "Accuracy at equal size"} <= set(titles)
    assert "Few seeds (lsq: 3, pact: 3)" in page.locator("ul.caveats").inner_text()


def test_nothing_overlaps_or_leaves_the_page_at_any_width(opened: Opened, single: str, several: str) -> None:
    for width in (380, 760, 1440):
        for url in (single, several):
            page = opened(url, width=width)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(OVERLAPPING) == []


OVERLAPPING = """() => [...document.querySelectorAll('figure svg')].flatMap((svg) => {
  const boxes = [...svg.querySelectorAll('text')].map((each) => [each.textContent, each.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
    .filter(([, q]) => p.left + 1 < q.right && q.left + 1 < p.right && p.top + 3 < q.bottom && q.top + 3 < p.bottom)
    .map(([b]) => `${a} / ${b}`));
})"""


def test_a_thousand_trials_of_a_deep_network_open_within_two_seconds_in_two_megabytes(
    opened: Opened, tmp_path: Path, shots: Path
) -> None:
    made = sweep("resnet50", seed=3, trials=1000, layers=54)
    url = written(tmp_path / "large.html", report([made], "A thousand trials"))
    assert (tmp_path / "large.html").stat().st_size < 2_000_000
    began = time.monotonic()
    page = opened(url)
    took = time.monotonic() - began
    page.screenshot(path=shots / "thousand.png")
    assert page.faults == []
    assert took < 2 or page.evaluate("performance.now()") < 2000
