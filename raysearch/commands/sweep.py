"""`raysearch sweep`: the search."""

from pathlib import Path
from typing import Any

import click

from raysearch.options import sweep_of, sweep_options
from raysearch.watching import watched


@click.command()
@sweep_options()
@click.option("--out", type=click.Path(path_type=Path), help="run folder to make  [default: runs/NAME]")
def command(out: Path | None, **options: Any) -> None:
    """Search: train many configurations and show the front."""
    from raysearch.driver import run

    watched(lambda watcher: run(sweep_of(options), out, watcher=watcher))
