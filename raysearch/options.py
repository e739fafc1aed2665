"""Flags and arguments that several commands share, and the sweep that the flags speak of."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from raysearch.errors import SweepError
from raysearch.sweep import Sweep

SPECIAL = ("objectives", "measures", "reference", "limits", "settings")
"""Fields of a sweep whose flags are not made from their types."""

OBJECTIVES_HELP = (
    "what to search for; also one's own, as accuracy,latency.json or accuracy,energy.py:min  "
    "[default: accuracy:max,bops:min,size_bytes:min]"
)
MEASURE_HELP = "a measure of one's own in every record: FILE.py, package.module:function or FILE.json; may be repeated"
LIMIT_HELP = "a limit on such a measure, as latency<=12.5; may be repeated"
run_folder = click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
trial = click.argument("trial", type=click.IntRange(min=0))
point = click.option("--point", default="final", show_default=True, help="which operating point of the trial")


def sweep_options(*names: str, **defaults: Any) -> Callable[[Any], Any]:
    """Flags for the fields of `Sweep` (all, or those named), with their defaults or these."""
    hints = get_type_hints(Sweep, include_extras=True)

    def decorate(command: Any) -> Any:
        for f in reversed(dataclasses.fields(Sweep)):
            if f.name in SPECIAL or (names and f.name not in names):
                continue
            annotated, text = get_args(hints[f.name])
            kind = next((t for t in get_args(annotated) if t is not type(None)), annotated)
            flag = f"--{f.name.replace('_', '-')}"
            default = defaults.get(f.name, f.default)
            shown = default is not None and kind is not bool
            if f.name == "max_relative_bops":  # percent on the command line, as in every table
                kind, text = click.FloatRange(0, 100), "never train one over this % of the 32x32-bit BOPs"
            command = click.option(
                flag, type=kind, is_flag=kind is bool, default=default, show_default=shown, help=text
            )(command)
        if not names:
            command = _own_options(command)
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


def _own_options(command: Any) -> Any:
    """Flags of objectives, and of what is a person's own beside them."""
    command = click.option(
        "--reference", multiple=True, metavar="NAME=VALUE", help="worst value of an objective, for the hypervolume"
    )(command)
    command = click.option("--limit", "limits", multiple=True, metavar="NAME<=VALUE", help=LIMIT_HELP)(command)
    command = click.option("--measure", "measures", multiple=True, metavar="[NAME=]SOURCE", help=MEASURE_HELP)(command)
    return click.option("--objectives", help=OBJECTIVES_HELP)(command)


def sweep_of(options: dict[str, Any]) -> Sweep:
    """The sweep that the flags speak of, over that of `--from`."""
    context = click.get_current_context()
    tree: dict[str, Any] = {}
    source = options.pop("source")
    if source is not None:
        tree = _read_sweep(Path(source))
    settings = _settings(options.pop("settings"))
    objectives = options.pop("objectives", None)
    own = {name: options.pop(name, ()) for name in ("measures", "limits", "reference")}
    for name, value in options.items():
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given or name not in tree:
            tree[name] = value / 100 if given and name == "max_relative_bops" else value
    if isinstance(tree.setdefault("settings", {}), dict):
        tree["settings"] = {**tree["settings"], **settings}
    if objectives is not None:
        tree["objectives"], sources = objectives_of(objectives)
        tree["measures"] = {**tree.get("measures", {}), **sources}
    if own["measures"]:
        tree["measures"] = {**tree.get("measures", {}), **dict(map(measure_of, own["measures"]))}
    if own["limits"]:
        tree["limits"] = list(own["limits"])
    if own["reference"]:
        tree["reference"] = dict(map(_reference, own["reference"]))
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


def _reference(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise SweepError(f"--reference {text}: write NAME=VALUE, such as latency=12.5") from None


def measure_of(text: str) -> tuple[str, str]:
    """Name and source of a measure: `watts=energy.py`, or the source alone, which then names it.

    >>> measure_of("watts=mylab.energy:of_layer"), measure_of("tables/latency.json"), measure_of("cost.py:joules")
    (('watts', 'mylab.energy:of_layer'), ('latency', 'tables/latency.json'), ('joules', 'cost.py:joules'))
    """
    from trainables.plugins import label

    name, equals, source = text.partition("=")
    return (name, source) if equals else (Path(text).stem if text.endswith(".json") else label(text), text)


def objectives_of(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Objectives with their directions, which may be left out; and the sources of those that are one's own.

    >>> objectives_of("accuracy,bops:min")
    ({'accuracy': 'max', 'bops': 'min'}, {})
    >>> objectives_of("accuracy,latency.json,cost.py:joules:min")
    ({'accuracy': 'max', 'latency': 'min', 'joules': 'min'}, {'latency': 'latency.json', 'joules': 'cost.py:joules'})
    """
    found, sources = {}, {}
    for part in filter(None, text.split(",")):
        name, colon, direction = part.strip().rpartition(":")
        if not colon or direction not in ("max", "min"):
            name, direction = part.strip(), ""
        if "." in name:
            name, source = measure_of(name)
            sources[name] = source
        elif ":" in name:
            name, _, direction = name.partition(":")
        found[name] = direction or ("max" if name == "accuracy" else "min")
    return found, sources
