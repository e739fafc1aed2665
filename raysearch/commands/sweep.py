"""`raysearch sweep`: the search."""

from pathlib import Path
from typing import Any

import click

from raysearch.options import sweep_of, sweep_options
from raysearch.watching import watched

REGISTER_HELP = (
    "put the front into MLflow's model registry at the end  [default: if MLflow is a server; otherwise "
    "`raysearch ui` does]"
)
WARM_HELP = "start from the front of an earlier sweep, also of another model or data set; may be repeated"


@click.command()
@sweep_options()
@click.option("--out", type=click.Path(path_type=Path), help="run folder to make  [default: runs/NAME]")
@click.option(
    "--try", "tries", type=click.Path(path_type=Path), help="JSON or CSV of settings by address, to be tried first"
)
@click.option("--warm-start", multiple=True, type=click.Path(path_type=Path), metavar="RUN", help=WARM_HELP)
@click.option("--register/--no-register", default=None, help=REGISTER_HELP)
def command(
    out: Path | None, tries: Path | None, warm_start: tuple[Path, ...], register: bool | None, **options: Any
) -> None:
    """Search: train many configurations and show the front."""
    from raysearch.driver import run
    from raysearch.knowledge import seeds_for

    sweep = sweep_of(options)
    seeds = seeds_for(sweep, tries=tries, warm_start=warm_start) if tries or warm_start else None
    watched(lambda watcher: run(sweep, out, watcher=watcher, seeds=seeds), register=register)
