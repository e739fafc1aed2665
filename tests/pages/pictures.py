"""The README's pictures, made by the program itself: the front, the report, and MLflow's table of the front.

    python -m tests.pages.pictures RUN --out tests/pages

Needs Chromium. Each picture is smaller than 150 kB.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from raysearch.result import load
from tests.pages.conftest import CHROMIUM, FLAGS

WAIT_MS = 60_000


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.pages.pictures", description="Make the README's pictures.")
    parser.add_argument("run", type=Path, help="a run folder with a front")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    load(given.run).plot().savefig(given.out / "front.png", dpi=110)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        _report(browser, given.run, Path(folder), given.out / "report.png")
        _mlflow(browser, given.run, given.out / "mlflow.png")
        browser.close()
    for name in ("front", "report", "mlflow"):
        path = given.out / f"{name}.png"
        Image.open(path).convert("RGB").save(path, optimize=True)
        print(f"{path}  {path.stat().st_size} bytes")


def _report(browser: Any, run: Path, folder: Path, path: Path) -> None:
    """The top of the report, down to the legend, with the mouse on a point of the front."""
    page = browser.new_page(viewport={"width": 1160, "height": 760})
    page.goto(load(run).report(folder / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]")
    members = page.locator("figure").first.locator("circle.member")
    members.nth(members.count() // 2).hover(force=True)
    page.screenshot(path=path)
    page.close()


def _mlflow(browser: Any, run: Path, path: Path) -> None:
    """MLflow's table of the runs on the front, as `raysearch ui` opens it."""
    command = [sys.executable, "-m", "raysearch.cli", "ui", str(run), "--port", "5700"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = next(found[1] for line in server.stdout if (found := re.match(r"  front +(\S+)", line)))
    page = browser.new_page(viewport={"width": 1700, "height": 640})
    page.goto(url)
    page.wait_for_selector("text=matching run", timeout=WAIT_MS)
    page.wait_for_selector("text=raysearch.bits", timeout=WAIT_MS)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    page.close()
    server.terminate()
    server.wait()


if __name__ == "__main__":
    main()
