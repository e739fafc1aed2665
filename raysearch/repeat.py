"""The command that trains one trial of a sweep again, alone and without Ray."""

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
    given = {**(sweep.get("settings") or {}), **(record.get("params") or {})}
    for address, value in given.items():
        if address not in FLAGS.values():
            words += ["--set", f"{address}={value if _is_plain(value) else json.dumps(value)}"]
    return shlex.join(words)


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
