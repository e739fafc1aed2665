"""`raysearch resume`: an interrupted sweep goes on."""

from pathlib import Path

import click

from raysearch.options import run_folder
from raysearch.watching import watched


@click.command()
@run_folder
def command(run_folder: Path) -> None:
    """Go on with an interrupted sweep."""
    from raysearch.driver import resume as resume_run

    watched(lambda watcher: resume_run(run_folder, watcher=watcher))
