"""A sweep before the eyes of a person: a live view while it runs, and what came of it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from raysearch.errors import RaysearchError


def watched(run: Callable[[Any], Any], *, register: bool | None = None) -> None:
    """Run a sweep before the eyes of a person, and say what came of it.

    Args:
        run: what runs it, given a watcher.
        register: whether its front goes into the model registry at the end; None: if MLflow is a server. A database is
            looked at through `raysearch ui`, which registers.
    """
    from rich.console import Console

    from raysearch.progress import LiveProgress, PlainProgress

    console = Console(stderr=True)
    live = sys.stdout.isatty() and console.is_terminal
    watcher = _Remembering(LiveProgress(console) if live else PlainProgress(console))
    with _resumable(watcher):
        result = run(watcher)
    _show(result, register)


def searched(run: Callable[[Any], Any]) -> Any:
    """Run a search on shared weights before the eyes of a person, and say what came of it: its result."""
    from rich.console import Console

    from raysearch.progress import SearchProgress

    watcher = SearchProgress(Console(stderr=True))
    with _resumable(watcher):
        result = run(watcher)
    _show(result, None)
    return result


@contextmanager
def _resumable(watcher: Any) -> Iterator[None]:
    """Say how to go on after an interruption, if there is a run folder already."""
    try:
        yield
    except KeyboardInterrupt:
        if watcher.path is not None:
            click.echo(f"\ninterrupted; everything is kept. Go on with: raysearch resume {watcher.path}", err=True)
        raise


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


def put_into_registry(result: Any) -> None:
    """Register the front, and say what is not registered, and why."""
    from raysearch.mirror.registry import register

    try:
        found = register(result.path, result.description["sweep"]["mlflow_uri"])
    except RaysearchError as error:  # such as a sweep without a complete trial: everything else is there all the same
        click.echo(f"nothing is registered: {error}", err=True)
        return
    for point, reason in found.refused.items():
        click.echo(f"{point} is not registered: {reason}", err=True)


def _show(result: Any, register: bool | None) -> None:
    from raysearch.mirror.links import front_url
    from raysearch.mirror.pages import is_own
    from raysearch.overview import size_of

    front = result.front()
    click.echo(f"\n{size_of(front, ' on the front')}\n")
    click.echo(front.table())
    click.echo(f"\nrun folder  {result.path}")
    uri = result.description["sweep"]["mlflow_uri"]
    own = is_own(result.path, uri)
    click.echo(f"look        {f'raysearch ui {result.path}' if own else front_url(result.path, uri)}")
    click.echo(f"pick        raysearch pick {result.path} --max-relative-bops 2")
    if result.mirrored is not None and not result.mirrored.complete:
        click.echo(f"MLflow misses a part ({result.mirrored.error}); later: raysearch mirror {result.path}", err=True)
    elif register or (register is None and not own):
        put_into_registry(result)
