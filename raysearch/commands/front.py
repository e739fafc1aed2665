"""`raysearch front`: the Pareto front."""

from pathlib import Path

import click

from raysearch.errors import SweepError


@click.command()
@click.argument("runs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "form", flag_value="json", help="one JSON object a point and line")
@click.option("--csv", "form", flag_value="csv", help="CSV")
@click.option("--plot", type=click.Path(path_type=Path), help="write a picture (PNG)")
def command(runs: tuple[Path, ...], form: str | None, plot: Path | None) -> None:
    """The Pareto front of one sweep, or of several together."""
    from raysearch.result import Result, front_of

    results = [Result(path) for path in runs]
    merged = front_of(results)
    if plot is not None:
        from analysis.plots import plot_front

        try:
            plot_front(merged, plot, title=", ".join(result.name for result in results))
        except (OSError, ValueError) as error:
            raise SweepError(f"--plot {plot}: {error}") from error
        click.echo(f"wrote {plot}", err=True)
    text = {"json": merged.to_json, "csv": merged.to_csv, None: merged.table}[form]()
    click.echo(text.rstrip("\n"))
