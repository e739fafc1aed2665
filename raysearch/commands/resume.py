"""`raysearch resume`: an interrupted sweep goes on."""

from pathlib import Path

import click

from raysearch.options import run_folder
from raysearch.watching import searched, watched


@click.command()
@run_folder
def command(run_folder: Path) -> None:
    """Go on with an interrupted sweep, or search on shared weights."""
    from raysearch.driver import resume as resume_run
    from raysearch.shared_weights import supernet

    if supernet.is_search(run_folder):
        searched(lambda watcher: supernet.resume(run_folder, watcher=watcher))
    else:
        watched(lambda watcher: resume_run(run_folder, watcher=watcher))
