"""A sweep in MLflow's own pages, opened as `raysearch ui` says: what a person who picks there sees."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raysearch.records import RunFolder
from raysearch.result import Result
from tests.raysearch.builders import SMALL, by_training, drive, make_run, open_book, small_sweep

Opened = Callable[..., Any]
WAIT_MS = 30_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of six trials, really trained, of which MLflow knows nothing yet."""
    torch.set_num_threads(1)
    sweep = small_sweep(trials=6, epochs=2, settings=SMALL, max_relative_bops=0.05)
    folder, resolved = make_run(tmp_path_factory.mktemp("runs") / "a-sweep", sweep)
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    return folder


@pytest.fixture(scope="module")
def links(run: RunFolder) -> Iterator[dict[str, str]]:
    """What `raysearch ui` prints, while it runs; Ctrl-C ends it and its server."""
    command = [sys.executable, "-m", "raysearch.cli", "ui", str(run.path), "--port", "5600"]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        found |= dict(re.findall(r"^  (\w+) +(http\S+)", line))
        if "models" in found:
            break
    assert list(found) == ["front", "summary", "compare", "models"]
    yield found
    server = found["front"].partition("/#")[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server}/health")


def test_the_table_of_runs_shows_the_front_by_falling_accuracy(
    opened: Opened, links: dict[str, str], run: RunFolder, shots: Path
) -> None:
    page = opened(links["front"], ready="text=matching run", width=1600)
    front = Result(run.path).front().to_pandas()
    names = [f"trial-{trial:04d}" for trial in front["trial"]]
    page.wait_for_selector(f"text={names[0]}", timeout=WAIT_MS)
    page.screenshot(path=shots / "mlflow-runs.png")
    shown = page.locator("a", has_text=re.compile(r"^trial-\d{4}$")).all_inner_texts()
    assert sorted(shown) == sorted(names)
    assert [front.set_index("trial")["accuracy"][int(n[-4:])] for n in shown] == sorted(front["accuracy"])[::-1]
    assert f"{front['accuracy'][0]:.4g}" in page.locator("body").inner_text()


def test_the_summary_shows_the_page_inside_mlflow(opened: Opened, links: dict[str, str], shots: Path) -> None:
    page = opened(links["summary"], ready="iframe", width=1600)
    frame = page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for(timeout=WAIT_MS)
    page.screenshot(path=shots / "mlflow-summary.png")
    assert frame.locator("circle.knee").count() == 2
    assert frame.locator("text.budget").first.text_content() == "budget 5 %"
    frame.locator("circle.member").first.hover(force=True)
    assert "validation accuracy" in frame.locator("#tip").inner_text()
    assert all(url.startswith((links["front"].partition("/#")[0], "blob:", "data:")) for url in page.requests)


def test_a_trial_shows_the_command_that_repeats_it_its_configuration_and_its_curves(
    opened: Opened, links: dict[str, str], shots: Path
) -> None:
    runs = opened(links["front"], ready="text=matching run", width=1600)
    first = runs.locator("a", has_text=re.compile(r"^trial-\d{4}$")).first
    base = links["front"].partition("/#")[0]
    page = opened(f"{base}/{first.get_attribute('href').lstrip('/')}", ready="text=Description", width=1600)
    page.wait_for_selector("text=raysearch train --method lsq", timeout=WAIT_MS)
    page.locator("text=Show more").first.click()
    assert "Resolved configuration" in page.locator("body").inner_text()
    page.screenshot(path=shots / "mlflow-trial.png")
    page.locator("text=Model metrics").first.click()
    page.wait_for_selector("text=Add chart", timeout=WAIT_MS)
    page.wait_for_selector(r"text=/trial-\d{4} \(accuracy\)/", timeout=WAIT_MS)
    page.screenshot(path=shots / "mlflow-curves.png")


def test_runs_of_the_front_are_compared_in_parallel_coordinates(
    opened: Opened, links: dict[str, str], shots: Path
) -> None:
    page = opened(links["compare"], ready="text=Parallel Coordinates Plot", width=1600)
    page.wait_for_selector("text=bits/_/weight", timeout=WAIT_MS)
    page.wait_for_timeout(500)
    page.screenshot(path=shots / "mlflow-compare.png")
    assert re.search(r"Metrics:\s+accuracy", page.locator("body").inner_text())


def test_the_registry_shows_the_versions_with_their_aliases(
    opened: Opened, links: dict[str, str], run: RunFolder, shots: Path
) -> None:
    page = opened(links["models"], ready="text=Versions", width=1600)
    page.wait_for_selector("text=Version 1", timeout=WAIT_MS)
    page.screenshot(path=shots / "mlflow-models.png")
    text = " ".join(page.locator("body").inner_text().split())  # there is a hard space in each alias
    assert all(f"@ {alias}" in text for alias in ("knee", "smallest", "most-accurate"))
    assert len(set(re.findall(r"Version \d+", text))) == len(Result(run.path).front())
