"""Plug-ins: a file, its name, its first docstring line. No decorator, no central table.

A name is looked up as a module of a package (`trainables.methods` + `lsq`); a dotted path is imported as it stands, so
a person's own `mylab.ternary` works wherever a name does.
"""

import ast
import difflib
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
        kind: `methods`, `models`, `data` or `spaces`.
        name: a name of ours (`lsq`) or the dotted path of a module of one's own (`mylab.ternary`).

    Raises:
        PluginError: no such plug-in (with the nearest name), or it does not import (with the reason).
    """
    package = KINDS[kind]
    if "." in name or f"{package}.{name}" in sys.modules:
        return _import(name if "." in name else f"{package}.{name}")
    names = list(describe(package))
    if name not in names:
        singular = {"methods": "method", "models": "model", "data": "data set", "spaces": "space"}[kind]
        raise PluginError(f"unknown {singular} {name!r}{nearest(name, names)} (raysearch list {kind})")
    return _import(f"{package}.{name}")


def attribute(kind: str, name: str, wanted: str) -> Any:
    """The object `wanted` of a plug-in's module; `package.module:object` names another object.

    Raises:
        PluginError: no such plug-in, or its module lacks the object.
    """
    path, _, other = name.partition(":")
    module = _import(path) if other and "." not in path else load(kind, path)
    found = getattr(module, other or wanted, None)
    if found is None:
        raise PluginError(f"{path!r} does not define {other or wanted!r}; a plug-in of {kind} must")
    return found


def _import(path: str) -> ModuleType:
    if path in sys.modules:
        return sys.modules[path]
    try:
        return importlib.import_module(path)
    except Exception as error:
        raise PluginError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error
