"""`raysearch status`: how far a sweep is."""

from pathlib import Path

import click

from raysearch.options import run_folder


@click.command()
@run_folder
def command(run_folder: Path) -> None:
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
