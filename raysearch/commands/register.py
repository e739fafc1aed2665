"""`raysearch register`: the front in MLflow's model registry."""

from pathlib import Path

import click

from raysearch.options import run_folder


@click.command()
@run_folder
@click.option("--mlflow-uri", help="MLflow tracking URI  [default: that of the sweep]")
def command(run_folder: Path, mlflow_uri: str | None) -> None:
    """Put the points of the front into MLflow's model registry."""
    from raysearch.mirror.registry import register
    from raysearch.result import Result

    found = register(run_folder, mlflow_uri or Result(run_folder).description["sweep"]["mlflow_uri"])
    for point, reason in found.refused.items():
        click.echo(f"{point} is not registered: {reason}", err=True)
    click.echo(f"{len(found.versions)} versions of {found.name}; load one with")
    click.echo(f"  mlflow.set_tracking_uri('{found.uri}')")
    click.echo(f"  mlflow.pyfunc.load_model('models:/{found.name}@knee').predict(images)")
