"""`raysearch ui`: MLflow's pages, and where to click."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from raysearch.watching import put_into_registry

if TYPE_CHECKING:
    from raysearch.mirror.pages import Server
    from raysearch.result import Result


@click.command()
@click.argument("runs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--port", default=5000, show_default=True, help="the first port of this machine to try")
@click.option(
    "--register/--no-register", default=True, help="put the front into the model registry  [default: register]"
)
def command(runs: tuple[Path, ...], port: int, register: bool) -> None:
    """Open MLflow's pages of one sweep or several on this machine, until Ctrl-C."""
    from raysearch.mirror.pages import free_ports, is_own, is_running, start_server
    from raysearch.result import Result

    results = [Result(path) for path in runs]
    ports = free_ports(port)
    with _until_told(), contextlib.ExitStack() as stack:
        servers: dict[Path, Server] = {}
        for result in results:
            at_rest = not is_running(result.path)
            if at_rest:
                _catch_up(result)
            if is_own(result.path, _uri(result)):
                servers[result.path] = start_server(result.path, _uri(result), next(ports))
                stack.callback(servers[result.path].stop)
            if at_rest and register:  # while the server starts
                put_into_registry(result)
        for result in results:
            server = servers.get(result.path)
            if server is not None:
                server.wait_until_ready()
            _say(result, None if server is None else server.url)
        if servers:
            click.echo("\nCtrl-C ends it", err=True)
            for server in servers.values():
                server.process.wait()


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """Within, SIGTERM is what Ctrl-C is: a way to end, not an error."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        click.echo("", err=True)
    finally:
        signal.signal(signal.SIGTERM, before)


def _uri(result: "Result") -> str | None:
    uri: str | None = result.description["sweep"]["mlflow_uri"]
    return uri


def _catch_up(result: "Result") -> None:
    from raysearch.tracking import mirror_once, status

    if not status(result.path).complete:
        found = mirror_once(result.path, _uri(result))
        if not found.complete:
            click.echo(f"MLflow misses a part of {result.path}: {found.error}", err=True)


def _say(result: "Result", url: str | None) -> None:
    from raysearch.mirror.links import pages

    click.echo(f"\n{result.name}")
    for words, address in pages(result.path, _uri(result), url).items():
        click.echo(f"  {words:10s}{address}")
        if words == "models":
            server = address.partition("/#")[0]
            click.echo(f"  {'load':10s}mlflow.set_tracking_uri('{server}')")
            click.echo(f"  {'':10s}mlflow.pyfunc.load_model('models:/{result.name}@knee').predict(images)")
