"""Golden vectors: arrays that the authors' own code computed, one folder a method, described by its `index.json`.

The root is `golden` beside this file; the environment variable RAYSEARCH_GOLDEN names another one, such as a held-out
set of the same format (a relative path starts at this folder).
"""

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent / os.environ.get("RAYSEARCH_GOLDEN", "golden")

Arrays = dict[str, np.ndarray]


@functools.cache
def index(method: str) -> dict[str, Any]:
    """The whole `index.json` of a method."""
    return json.loads((ROOT / method / "index.json").read_text(encoding="utf-8"))


def load(method: str, file: str) -> tuple[dict[str, Any], Arrays]:
    """What the index says of `file` (such as `bops.npz`), and all its arrays by their stored keys."""
    with np.load(ROOT / method / file) as archive:
        return index(method)["files"][file], dict(archive)


def cases(method: str, file: str) -> list[tuple[str, dict[str, Any], Arrays]]:
    """(name, settings, arrays) of each case, in the index's order; array names without the case's name.

    An index lists cases by name or as a list, and stores arrays as `CASE__ARRAY` or `CASE/ARRAY`. A file without cases
    is one case, named after the file, whose settings are those of its arrays by array.
    """
    entry, stored = load(method, file)
    if "cases" not in entry:
        settings = {name: array.get("settings", {}) for name, array in entry["arrays"].items()}
        return [(Path(file).stem, settings, stored)]
    listed = entry["cases"]
    named = listed.items() if isinstance(listed, dict) else [(case["name"], case) for case in listed]
    separator = "__" if isinstance(listed, dict) else "/"
    return [
        (name, case["settings"], {array: stored[f"{name}{separator}{array}"] for array in case["arrays"]})
        for name, case in named
    ]
