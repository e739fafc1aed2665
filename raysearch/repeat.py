"""The commands that repeat: one trial of a sweep, alone and without Ray; a search on shared weights."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

FLAGS = {
    "method": "method/name",
    "model": "model/name",
    "data": "data/name",
    "epochs": "training/epochs",
    "seed": "seed",
}
"""What `raysearch train` has a flag for, and its address in the trial's configuration."""


def train_command(sweep: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """`raysearch train ...`: the same configuration, so on the same machine the same numbers.

    Args:
        sweep: the fields of the sweep.
        record: of the trial.
    """
    config = record["config"]
    words = ["raysearch", "train"]
    for flag, address in FLAGS.items():
        words += [f"--{flag}", str(_at(config, address))]
    if sweep.get("data_root") is not None:
        words += ["--data-root", str(sweep["data_root"])]
    parent = config["start"].get("parent", "own")
    given = {"start/parent": parent} if parent != "own" else {}
    given |= {**(sweep.get("settings") or {}), **(record.get("params") or {})}
    for address, value in given.items():
        if address not in FLAGS.values():
            words += ["--set", f"{address}={value if _is_plain(value) else json.dumps(value)}"]
    return shlex.join(words)


def search_command(search: Mapping[str, Any]) -> str:
    """`raysearch supernet search ...`: the same mixtures of the same network, so the same front.

    Args:
        search: the fields of `raysearch.shared_weights.question.Search`.
    """
    words = ["raysearch", "supernet", "search", str(search["run"])]
    words += [] if search["trial"] is None else [str(search["trial"])]
    objectives = ",".join(f"{name}:{way}" for name, way in search["objectives"].items())
    share = search["max_relative_bops"]
    given = {
        **{name: search[name] for name in ("evaluations", "sampler", "seed", "images", "max_bops", "max_size_bytes")},
        "objectives": objectives,
        "max_relative_bops": None if share is None else 100 * share,
        "widths": None if search["widths"] is None else ",".join(map(str, search["widths"])),
    }
    for name, value in given.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, *(["--recalibrate"] if search["calibration"] else [])])


def _at(tree: Mapping[str, Any], address: str) -> Any:
    found: Any = tree
    for name in address.split("/"):
        found = found[name]
    return found


def _is_plain(value: Any) -> bool:
    """Whether the value is text that the command line reads back as the same text."""
    if not isinstance(value, str):
        return False
    try:
        json.loads(value)
    except ValueError:
        return True
    return False
