"""Flags and arguments that several commands share, and the sweep that the flags speak of."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from raysearch.errors import SweepError
from raysearch.sweep import Sweep

SPECIAL = ("objectives", "settings")
"""Fields of a sweep whose flags are not made from their types."""

run_folder = click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
trial = click.argument("trial", type=click.IntRange(min=0))
point = click.option("--point", default="final", show_default=True, help="which operating point of the trial")


def sweep_options(*names: str) -> Callable[[Any], Any]:
    """Flags for the fields of `Sweep` (all, or those named)."""
    hints = get_type_hints(Sweep, include_extras=True)

    def decorate(command: Any) -> Any:
        for f in reversed(dataclasses.fields(Sweep)):
            if f.name in SPECIAL or (names and f.name not in names):
                continue
            annotated, text = get_args(hints[f.name])
            kind = next((t for t in get_args(annotated) if t is not type(None)), annotated)
            flag = f"--{f.name.replace('_', '-')}"
            shown = f.default is not None and kind is not bool
            if f.name == "max_relative_bops":  # percent on the command line, as in every table
                kind, text = click.FloatRange(0, 100), "never train one over this % of the 32x32-bit BOPs"
            command = click.option(
                flag, type=kind, is_flag=kind is bool, default=f.default, show_default=shown, help=text
            )(command)
        command = click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="ADDRESS=VALUE",
            help="a setting of every trial; may be repeated",
        )(command)
        return click.option(
            "--from", "source", type=click.Path(), help="take the sweep from RUN or FILE; flags override"
        )(command)

    return decorate


def sweep_of(options: dict[str, Any]) -> Sweep:
    """The sweep that the flags speak of, over that of `--from`."""
    context = click.get_current_context()
    tree: dict[str, Any] = {}
    source = options.pop("source")
    if source is not None:
        tree = _read_sweep(Path(source))
    settings = _settings(options.pop("settings"))
    objectives = options.pop("objectives", None)
    for name, value in options.items():
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given or name not in tree:
            tree[name] = value / 100 if given and name == "max_relative_bops" else value
    if isinstance(tree.setdefault("settings", {}), dict):
        tree["settings"] = {**tree["settings"], **settings}
    if objectives is not None:
        tree["objectives"] = objectives_of(objectives)
    return Sweep.from_tree(tree)


def _read_sweep(path: Path) -> dict[str, Any]:
    file = path / "sweep.json" if path.is_dir() else path
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SweepError(f"--from {path}: {error}; give a run folder or a JSON file of a sweep's fields") from error
    if not isinstance(tree, dict):
        raise SweepError(f"--from {path}: holds no sweep; give a run folder or a JSON file of a sweep's fields")
    return dict(tree["sweep"]) if isinstance(tree.get("sweep"), dict) else tree


def _settings(given: tuple[str, ...]) -> dict[str, Any]:
    settings = {}
    for text in given:
        address, equals, value = text.partition("=")
        if not equals or not address:
            raise SweepError(f"--set {text}: write ADDRESS=VALUE, such as optimizer/lr=0.05")
        try:
            settings[address] = json.loads(value)
        except json.JSONDecodeError:
            settings[address] = value
    return settings


def objectives_of(text: str) -> dict[str, str]:
    """`accuracy:max,bops:min`; the direction may be left out.

    >>> objectives_of("accuracy,bops:min")
    {'accuracy': 'max', 'bops': 'min'}
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, direction = part.strip().partition(":")
        found[name] = direction or ("max" if name == "accuracy" else "min")
    return found
