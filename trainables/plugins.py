"""Plug-ins: a file, its name, its first docstring line. No decorator, no central table.

A name is looked up as a module of a package (`trainables.methods` + `lsq`); a dotted path is imported as it stands, so
a person's own `mylab.ternary` works wherever a name does; and so does the path of a file (`ternary.py`, `net.py:wide`).
A file is run once in each process, under a name made of its path; a driver sends it to the nodes of its cluster.
"""

import ast
import difflib
import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trainables.errors import PluginError

KINDS = {
    "methods": "trainables.methods",
    "models": "trainables.models",
    "data": "trainables.data",
    "spaces": "search_spaces",
}


def describe(package: str) -> dict[str, str]:
    """Names of a package's plug-ins with the first line of their docstrings, read without importing them."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"package {package!r} is not installed")
    found = {}
    for folder in spec.submodule_search_locations:
        for path in sorted(Path(folder).glob("[!_]*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = doc.split("\n", 1)[0]
    return found


def nearest(name: str, names: list[str]) -> str:
    """` did you mean 'x'?` when something is near `name`, else an empty string."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def load(kind: str, name: str) -> ModuleType:
    """The module of a plug-in.

    Args:
        kind: `methods`, `models`, `data` or `spaces`; `measures`, of which there are none by name.
        name: a name of ours (`lsq`), or the dotted path (`mylab.ternary`) or file (`ternary.py`) of one's own.

    Raises:
        PluginError: no such plug-in (with the nearest name), or it does not import (with the reason).
    """
    if is_file(name):
        return _run(Path(split(name)[0]).resolve())
    if "." in name:
        return _import(name)
    package = KINDS[kind]
    if f"{package}.{name}" in sys.modules:
        return _import(f"{package}.{name}")
    names = list(describe(package))
    if name not in names:
        singular = {"methods": "method", "models": "model", "data": "data set", "spaces": "space"}[kind]
        raise PluginError(f"unknown {singular} {name!r}{nearest(name, names)} (raysearch list {kind})")
    return _import(f"{package}.{name}")


def attribute(kind: str, name: str, wanted: str) -> Any:
    """The object `wanted` of a plug-in's module; `package.module:object` or `FILE.py:object` names another object.

    Raises:
        PluginError: no such plug-in, or its module lacks the object.
    """
    path, other = split(name)
    module = _import(path) if other and "." not in path else load(kind, path)
    found = getattr(module, other or wanted, None)
    if found is None:
        raise PluginError(f"{path!r} does not define {other or wanted!r}; a plug-in of {kind} must")
    return found


def split(name: str) -> tuple[str, str]:
    """Module and object that a plug-in's name speaks of; the object is empty where the name leaves it out.

    >>> split("lsq"), split("mylab.nets:wide"), split("nets.py:wide")
    (('lsq', ''), ('mylab.nets', 'wide'), ('nets.py', 'wide'))
    """
    path, _, wanted = name.rpartition(":") if ":" in name else (name, "", "")
    return path, wanted


def is_file(name: str) -> bool:
    """Whether a plug-in's name is the path of a file."""
    return split(name)[0].endswith(".py")


def located(name: str) -> str:
    """The name with the path of a file made absolute: the same on any process of this machine.

    >>> located("lsq"), located("/home/me/nets.py:wide")
    ('lsq', '/home/me/nets.py:wide')
    """
    path, wanted = split(name)
    named = path.endswith((".py", ".json"))
    return ":".join([str(Path(path).resolve()), *([wanted] if wanted else [])]) if named else name


def label(name: str) -> str:
    """A short word for a plug-in, for titles and the names of folders.

    >>> label("lsq"), label("mylab.nets:wide"), label("/home/me/nets.py")
    ('lsq', 'wide', 'nets')
    """
    path, wanted = split(name)
    return wanted or (Path(path).stem if is_file(name) else path.rpartition(".")[2])


def module_name(path: Path) -> str:
    """The name under which the module of a file is known, and under which it travels to other machines."""
    return f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


def _run(path: Path) -> ModuleType:
    """The module that a file defines; where there is no such file, the module that was sent instead."""
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file() and importlib.util.find_spec(name):
        return _import(name)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PluginError(f"no file {path} on this machine: give the path of a plug-in's file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"cannot run {path}: {type(error).__name__}: {error}") from error
    return module


def _import(path: str) -> ModuleType:
    if path in sys.modules:
        return sys.modules[path]
    try:
        return importlib.import_module(path)
    except Exception as error:
        raise PluginError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
