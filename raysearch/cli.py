"""The command line: data on stdout, log on stderr; exit code 0 ok, 1 failed, 2 a question that cannot be answered."""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from raysearch.errors import RaysearchError, RecordError, SweepError, TrialError
from raysearch.sweep import Sweep

KINDS = ("methods", "models", "data", "spaces")
SPECIAL = ("objectives", "settings")
PICKED = (
    *("trial", "point", "method", "model", "data", "accuracy", "bops", "relative_bops", "size_bytes", "macs", "bits"),
    *("params", "source", "seed", "digest", "checkpoint", "test_accuracy"),
)


class _Commands(click.Group):
    """Commands in the order in which a person meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of definition."""
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="raysearch")
def raysearch() -> None:
    """Find the best quantized networks: accuracy against BOPs and size."""


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    from raysearch.facts import THREADS
    from trainables.errors import ConfigError, DataError, DivergedError, PluginError

    for name, value in THREADS.items():  # read when torch is loaded
        os.environ.setdefault(name, value)
    try:
        code = raysearch.main(prog_name="raysearch", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (SweepError, RecordError, ConfigError, DataError, PluginError) as error:
        code = _say_error(error, 2)
    except (TrialError, DivergedError, RaysearchError, OSError) as error:  # OSError: a folder or a disk says no
        code = _say_error(error, 1)
    sys.exit(code or 0)


def _say_error(error: Exception, code: int) -> int:
    click.echo(f"error: {error}", err=True)
    return code


def _sweep_options(*names: str) -> Callable[[Any], Any]:
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


def _sweep(options: dict[str, Any]) -> Sweep:
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
        tree["objectives"] = _objectives(objectives)
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


def _objectives(text: str) -> dict[str, str]:
    """`accuracy:max,bops:min`; the direction may be left out.

    >>> _objectives("accuracy,bops:min")
    {'accuracy': 'max', 'bops': 'min'}
    """
    found = {}
    for part in filter(None, text.split(",")):
        name, _, direction = part.strip().partition(":")
        found[name] = direction or ("max" if name == "accuracy" else "min")
    return found


@raysearch.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.argument("name", required=False)
def list_(kind: str | None, name: str | None) -> None:
    """List methods, models, data sets and search spaces; with a NAME, the settings of one."""
    from trainables.plugins import KINDS as PACKAGES
    from trainables.plugins import describe

    if kind and name:
        _list_settings(kind, name)
        return
    for each in [kind] if kind else KINDS:
        found = describe(PACKAGES[each])
        width = max(map(len, found))
        if not kind:
            click.echo(f"{each}:")
        for plugin, text in found.items():
            click.echo(f"{'' if kind else '  '}{plugin:{width}s} {text}")


def _list_settings(kind: str, name: str) -> None:
    """A line for each setting: address, default, what it is."""
    from trainables.config import settings_of

    part = {"methods": "method", "models": "model", "data": "data"}.get(kind)
    if part is None:
        raise SweepError("a search space has no settings; `raysearch list spaces` says what each searches")
    for setting, (_, default, text) in settings_of(part, name).items():
        shown = "" if default is inspect.Parameter.empty else json.dumps(default, default=str)
        click.echo(f"{part}/{setting}={shown}  {text}".rstrip())


@raysearch.command()
@_sweep_options("method", "model", "data", "data_root", "download", "epochs", "seed")
@click.option("--out", type=click.Path(path_type=Path), help="folder for checkpoint and float start")
@click.option("--json", "as_json", is_flag=True, help="the last report as JSON on stdout")
def train(out: Path | None, as_json: bool, **options: Any) -> None:
    """Train one trial in this process, without Ray."""
    from raysearch.single import train as train_one

    last = None
    for report in train_one(_sweep(options), out):
        last = report
        for point in report.points:
            click.echo(
                f"epoch {report.epoch}/{report.epochs}: train loss {report.train_loss:.4f}, "
                f"validation accuracy {point.accuracy:.2%}, relative BOPs {point.relative_bops:.3%}, "
                f"{point.size_bytes} bytes, {report.seconds:.1f} s",
                err=as_json,
            )
    if as_json and last is not None:
        click.echo(json.dumps(last.to_json()))


@raysearch.command()
@_sweep_options()
@click.option("--objectives", help="what to search for  [default: accuracy:max,bops:min,size_bytes:min]")
@click.option("--out", type=click.Path(path_type=Path), help="run folder to make  [default: runs/NAME]")
def sweep(out: Path | None, **options: Any) -> None:
    """Search: train many configurations and show the front."""
    from raysearch.driver import run

    _watched(lambda watcher: run(_sweep(options), out, watcher=watcher))


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
def resume(run_folder: Path) -> None:
    """Go on with an interrupted sweep."""
    from raysearch.driver import resume as resume_run

    _watched(lambda watcher: resume_run(run_folder, watcher=watcher))


def _watched(run: Callable[[Any], Any]) -> None:
    """Run a sweep before the eyes of a person, and say what came of it."""
    from rich.console import Console

    from raysearch.progress import LiveProgress, PlainProgress

    console = Console(stderr=True)
    live = sys.stdout.isatty() and console.is_terminal
    watcher = _Remembering(LiveProgress(console) if live else PlainProgress(console))
    try:
        result = run(watcher)
    except KeyboardInterrupt:
        if watcher.path is not None:
            click.echo(f"\ninterrupted; everything is kept. Go on with: raysearch resume {watcher.path}", err=True)
        raise
    _show(result)


class _Remembering:
    """A watcher that remembers the run folder, for what is said after an interruption."""

    def __init__(self, watcher: Any) -> None:
        self._watcher = watcher
        self.path: Path | None = None

    def started(self, folder: Any, resolved: Any) -> None:
        self.path = folder.path
        self._watcher.started(folder, resolved)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watcher, name)


def _show(result: Any) -> None:
    from raysearch.mlflow_links import front_url, ui_command
    from raysearch.overview import size_of

    front = result.front()
    click.echo(f"\n{size_of(front, ' on the front')}\n")
    click.echo(front.table())
    click.echo(f"\nrun folder  {result.path}")
    uri = result.description["sweep"]["mlflow_uri"]
    command = ui_command(result.path, uri)
    if command:
        click.echo(f"MLflow      {command}")
    click.echo(f"{'then open' if command else 'MLflow':12s}{front_url(result.path, uri)}")
    click.echo(f"pick        raysearch pick {result.path} --max-relative-bops 2")
    if result.mirrored is not None and not result.mirrored.complete:
        click.echo(f"MLflow misses a part ({result.mirrored.error}); later: raysearch mirror {result.path}", err=True)


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
def status(run_folder: Path) -> None:
    """How far a sweep is."""
    import filelock

    from raysearch.overview import overview

    lock = filelock.FileLock(run_folder / ".lock", blocking=False)
    busy = False
    if (run_folder / ".lock").exists():
        try:
            lock.acquire()
            lock.release()
        except filelock.Timeout:
            busy = True
    click.echo(overview(run_folder, busy=busy))


@raysearch.command()
@click.argument("runs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "form", flag_value="json", help="one JSON object a point and line")
@click.option("--csv", "form", flag_value="csv", help="CSV")
@click.option("--plot", type=click.Path(path_type=Path), help="write a picture (PNG)")
def front(runs: tuple[Path, ...], form: str | None, plot: Path | None) -> None:
    """The Pareto front of one sweep, or of several together."""
    from raysearch.result import Result, front_of

    results = [Result(path) for path in runs]
    merged = front_of(results)
    if plot is not None:
        from analysis.plots import plot_front

        try:
            plot_front(merged, plot, title=", ".join(result.name for result in results))
        except (OSError, ValueError) as error:
            raise SweepError(f"--plot {plot}: {error}") from error
        click.echo(f"wrote {plot}", err=True)
    text = {"json": merged.to_json, "csv": merged.to_csv, None: merged.table}[form]()
    click.echo(text.rstrip("\n"))


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--max-bops", type=click.FloatRange(min=0), metavar="N", help="at most N BOPs")
@click.option(
    "--max-relative-bops", type=click.FloatRange(0, 100), metavar="P", help="at most P % of the 32x32-bit BOPs"
)
@click.option("--max-size-bytes", type=click.FloatRange(min=0), metavar="N", help="at most N bytes")
@click.option(
    "--min-accuracy", type=click.FloatRange(0, 1), metavar="A", help="validation accuracy of at least A, 0..1"
)
@click.option("--test/--no-test", "with_test", default=True, help="measure the test accuracy, once  [default: test]")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout")
def pick(run_folder: Path, with_test: bool, as_json: bool, max_relative_bops: float | None, **limits: Any) -> None:
    """The best point of the front within limits."""
    from raysearch.result import Result

    result = Result(run_folder)
    found = result.front()
    try:
        share = None if max_relative_bops is None else max_relative_bops / 100
        point = found.pick(max_relative_bops=share, **limits)
    except ValueError as error:
        raise TrialError(str(error)) from error
    where = (int(point["trial"]), point["point"])
    record = next(row for row in result.records() if (row["trial"], row["point"]) == where)
    chosen = {name: record.get(name) for name in PICKED}
    if with_test:
        chosen["test_accuracy"] = result.test(record)
    click.echo(json.dumps(chosen) if as_json else _describe(result, chosen))


def _describe(result: Any, chosen: dict[str, Any]) -> str:
    from analysis.front import human_bytes, human_count

    lines = [
        f"trial {chosen['trial']} ({chosen['method']} on {chosen['model']}, {chosen['data']})",
        f"  validation accuracy  {chosen['accuracy']:.2%}",
    ]
    if chosen["test_accuracy"] is not None:
        lines.append(f"  test accuracy        {chosen['test_accuracy']:.2%}")
    lines += [
        f"  BOPs                 {human_count(chosen['bops'])} ({chosen['relative_bops']:.3%} of 32x32 bits)",
        f"  size                 {human_bytes(chosen['size_bytes'])} ({chosen['size_bytes']} bytes)",
        f"  checkpoint           {result.path / chosen['checkpoint']}",
        "  bits (weight/activation)",
        *(f"    {layer:24s} {w}/{a}" for layer, (w, a) in chosen["bits"].items()),
    ]
    return "\n".join(lines)


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("trial", type=click.IntRange(min=0))
@click.option("--point", default="final", show_default=True, help="which operating point of the trial")
@click.option("--json", "form", flag_value="json", help="one JSON object a layer and line")
@click.option("--csv", "form", flag_value="csv", help="CSV")
def layers(run_folder: Path, trial: int, point: str, form: str | None) -> None:
    """A trained network layer by layer: widths, and what else its method has learned."""
    from raysearch.result import Result

    found = Result(run_folder).layers(trial, point)
    texts = {
        "json": lambda: found.to_json(orient="records", lines=True),
        "csv": lambda: found.to_csv(index=False),
        None: lambda: found.to_string(index=False),
    }
    click.echo(texts[form]().rstrip("\n"))


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("trial", type=click.IntRange(min=0))
@click.option("--point", default="final", show_default=True, help="which operating point of the trial")
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="file to write: .safetensors, .onnx or .pt2"
)
@click.option("--opset", type=int, metavar="N", help="ONNX opset, 20..25  [default: the oldest that has the types]")
def export(run_folder: Path, trial: int, point: str, output: Path, opset: int | None) -> None:
    """Write a trained network as a file that runs elsewhere."""
    from raysearch.result import Result

    found = Result(run_folder).export(trial, point, to=output, opset=opset)
    click.echo(f"{output}  {output.stat().st_size} bytes")
    if found is None:
        click.echo("logits are those of the trained network, bit for bit", err=True)
    else:
        click.echo(
            f"onnxruntime and torch on {found.images} test images: {found.other_class} other predictions, logits "
            f"differ by up to {found.max_difference:.2g} ({found.close:.1%} within 1e-5), with integer kernels "
            f"by up to {found.max_difference_fused:.2g}",
            err=True,
        )


@raysearch.command()
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--mlflow-uri", help="MLflow tracking URI  [default: that of the sweep]")
def mirror(run_folder: Path, mlflow_uri: str | None) -> None:
    """Send to MLflow what it missed."""
    from raysearch.result import Result
    from raysearch.tracking import mirror_once

    result = Result(run_folder)
    reached = mirror_once(run_folder, mlflow_uri or result.description["sweep"]["mlflow_uri"])
    if not reached.complete:
        raise TrialError(f"MLflow has {reached.trials} trials of this sweep; in the way: {reached.error}")
    click.echo(f"MLflow has all {reached.trials} trials")
