"""`raysearch layers`: a trained network layer by layer."""

from pathlib import Path

import click

from raysearch.options import point, run_folder, trial


@click.command()
@run_folder
@trial
@point
@click.option("--json", "form", flag_value="json", help="one JSON object a layer and line")
@click.option("--csv", "form", flag_value="csv", help="CSV")
def command(run_folder: Path, trial: int, point: str, form: str | None) -> None:
    """A trained network layer by layer: widths, and what else its method has learned."""
    from raysearch.result import Result

    found = Result(run_folder).layers(trial, point)
    texts = {
        "json": lambda: found.to_json(orient="records", lines=True),
        "csv": lambda: found.to_csv(index=False),
        None: lambda: found.to_string(index=False),
    }
    click.echo(texts[form]().rstrip("\n"))
