"""Pages in a real Chromium. Without one on the machine these tests are not collected.

Each test may leave pictures of what it saw: in the folder that RAYSEARCH_SCREENSHOTS names, else in pytest's own
temporary folder of the run.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
collect_ignore_glob = [] if CHROMIUM else ["test_*.py"]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
"""As root in a container, and without the requests that a browser makes of itself."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = [*FLAGS, "--disable-component-update", "--disable-sync"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for screenshots."""
    named = os.environ.get("RAYSEARCH_SCREENSHOTS")
    if named is None:
        return tmp_path_factory.mktemp("screenshots")
    Path(named).mkdir(parents=True, exist_ok=True)
    return Path(named)


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens an address in a page and waits for `ready`; requests and errors are in `page.requests`, `page.faults`."""
    pages = []

    def open_page(url: str, ready: str = "html[data-ready]", width: int = 1200, height: int = 900) -> Any:
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.requests, page.faults = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield open_page
    for page in pages:
        page.close()
