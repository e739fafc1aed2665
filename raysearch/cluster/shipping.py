"""What travels to the nodes of a cluster: the driver's own code, the plug-ins of a sweep, and the environment.

A driver that joins a cluster sends its own packages along, so that all nodes run the code that the driver runs,
whatever is installed there. What they must have installed are the packages that ours are built on; `nodes` compares
their versions.
Plug-ins by dotted path travel as the whole package that they are part of, unless that is installed; plug-ins by file
travel as that file.
"""

import json
import os
import shutil
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raysearch.sweep import Sweep
from trainables import plugins

PACKAGES = ("raysearch", "search_spaces", "trainables", "analysis")
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job: what that job ships already, which must not be said twice."""


def runtime_env(sweep: Sweep, environment: Mapping[str, str], scratch: Path) -> dict[str, Any]:
    """Ray's description of what a sweep ships.

    Args:
        sweep: names the plug-ins.
        environment: variables of all processes on the nodes; one that is set here goes over it.
        scratch: folder for files to ship, needed until Ray has sent them.
    """
    submitted = json.loads(os.environ.get(JOB, "{}")).get("runtime_env") or {}
    taken = submitted.get("env_vars", {})
    ours: dict[str, Any] = {"py_modules": modules(sweep, scratch), "excludes": ["__pycache__"]}
    return {name: value for name, value in ours.items() if name not in submitted} | {
        "env_vars": {name: os.environ.get(name, value) for name, value in environment.items() if name not in taken}
    }


def modules(sweep: Sweep, scratch: Path) -> list[str]:
    """Folders and files to ship: our packages, and plug-ins that are not ours and not installed."""
    found = [_location(package) for package in PACKAGES]
    functions = [source for source in sweep.measures.values() if not source.endswith(".json")]  # tables go with jobs
    for name in (sweep.method, sweep.model, sweep.data, *functions):  # spaces are asked by the driver alone
        path = Path(plugins.split(name)[0])
        if plugins.is_file(name):
            copy = scratch / f"{plugins.module_name(path)}.py"
            shutil.copyfile(path, copy)
            found.append(copy)
        elif "." in name or ":" in name:
            found.append(_location(path.name.partition(".")[0]))
    return list(dict.fromkeys(str(path) for path in found if path is not None))


def _location(package: str) -> Path | None:
    """Folder or file of a package to ship; None for what a node has to have installed."""
    spec = find_spec(package)
    place = next(iter(spec.submodule_search_locations or ()), spec.origin) if spec else None
    path = Path(place).resolve() if place else None
    return path if path is not None and (package in PACKAGES or not _installed(path)) else None


def _installed(path: Path) -> bool:
    folders = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "purelib", "platlib")}
    return any(path.is_relative_to(folder) for folder in folders)
