"""What travels to the nodes of a cluster: the driver's own code, the plug-ins of a sweep, and the environment.

A driver that joins a cluster sends its own packages along, so that all nodes run the code that the driver runs,
whatever is installed there. What they must have installed are the packages that ours are built on; `nodes` compares
their versions.
Plug-ins by dotted path travel as the whole package that they are part of, unless that is installed.
"""

import json
import os
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysearch.sweep import Sweep

PACKAGES = ("raysearch", "search_spaces", "trainables", "analysis")
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job: what that job ships already, which must not be said twice."""


def runtime_env(sweep: Sweep, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray's description of what a sweep ships.

    Args:
        sweep: names the plug-ins.
        environment: variables of all processes on the nodes; one that is set here goes over it.
    """
    submitted = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    taken = submitted.get("env_vars", {})
    env: dict[str, Any] = {
        "env_vars": {name: os.environ.get(name, value) for name, value in environment.items() if name not in taken}
    }
    if "py_modules" not in submitted:
        env |= {"py_modules": modules(sweep), "excludes": ["__pycache__"]}
    return {name: value for name, value in env.items() if name == "env_vars" or name not in submitted}


def modules(sweep: Sweep) -> list[str]:
    """Folders and files of the packages to ship."""
    names = dict.fromkeys([*PACKAGES, *(_top(name) for name in _plugins(sweep))])
    return [str(path) for path in map(_location, names) if path is not None]


def _plugins(sweep: Sweep) -> list[str]:
    """Plug-ins that are not ours: dotted paths."""
    named = (sweep.method, sweep.model, sweep.data, sweep.space)
    return [name for name in named if "." in name or ":" in name]


def _top(name: str) -> str:
    return name.partition(":")[0].partition(".")[0]


def _location(package: str) -> Path | None:
    """Folder or file of a package to ship; None for what a node has to have installed."""
    spec = find_spec(package)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ([spec.origin] if spec.origin else []))
    path = Path(places[0]).resolve() if places else None
    if path is None or (package not in PACKAGES and _installed(path)):
        return None
    return path


def _installed(path: Path) -> bool:
    folders = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")}
    return any(path.is_relative_to(folder) for folder in folders)
