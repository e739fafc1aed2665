"""The settings of a plug-in: where they are defined, their types, defaults and descriptions.

A method's are the fields of its `Settings`; a model's and a data set's the keyword parameters of `build` and `splits`.
"""

import inspect
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints

from trainables import plugins

PLUGINS = {"method": "methods", "model": "models", "data": "data"}
"""Parts of a configuration that name a plug-in, and its kind."""
GIVEN_BY_CALLERS = ("download", "classes", "num_classes", "input_shape")
"""Keyword parameters of a factory that whoever calls it fills in."""


def settings_of(part: str, name: str) -> dict[str, tuple[Any, Any, str]]:
    """Type, default and description of each setting of a plug-in: address -> (type, default, text)."""
    return {
        key: (annotation, default, _description(annotation))
        for key, (annotation, default) in fields_of(owner_of(part, name)).items()
    }


def _description(annotation: Any) -> str:
    for extra in getattr(annotation, "__metadata__", ()):
        if getattr(extra, "description", None):
            return str(extra.description)
    return ""


def owner_of(part: str, name: str) -> Any:
    """What defines the settings of a plug-in: a dataclass, or a function with keyword parameters."""
    wanted = {"method": "Method", "model": "build", "data": "splits"}[part]
    found = plugins.attribute(PLUGINS[part], name, wanted)
    return found.Settings if part == "method" else found


@cache
def fields_of(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Type and default of each setting that `owner` defines."""
    if is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)  # inherited ones too
        return {f.name: (hints[f.name], _default(f)) for f in fields(owner)}
    hints = inspect.get_annotations(owner, eval_str=True)
    return {
        p.name: (hints.get(p.name, Any), p.default)
        for p in inspect.signature(owner).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN_BY_CALLERS
    }


def _default(setting: Any) -> Any:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return inspect.Parameter.empty if setting.default is MISSING else setting.default
