"""`raysearch mirror`: MLflow gets what it missed."""

from pathlib import Path

import click

from raysearch.errors import TrialError
from raysearch.options import run_folder


@click.command()
@run_folder
@click.option("--mlflow-uri", help="MLflow tracking URI  [default: that of the sweep]")
def command(run_folder: Path, mlflow_uri: str | None) -> None:
    """Send to MLflow what it missed."""
    from raysearch.result import Result
    from raysearch.tracking import mirror_once

    result = Result(run_folder)
    reached = mirror_once(run_folder, mlflow_uri or result.description["sweep"]["mlflow_uri"])
    if not reached.complete:
        raise TrialError(f"MLflow has {reached.trials} trials of this sweep; in the way: {reached.error}")
    click.echo(f"MLflow has all {reached.trials} trials")
