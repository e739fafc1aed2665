"""`raysearch report`: everything about one sweep or several on one page."""

from pathlib import Path

import click


@click.command()
@click.argument("runs", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="page to write",
)
@click.option("--title", help="its first line  [default: the names of the sweeps]")
def command(runs: tuple[Path, ...], output: Path, title: str | None) -> None:
    """Write one HTML page: front, comparisons, tables, configuration. It needs no network."""
    from raysearch.result import Result, report_of

    page = report_of([Result(path) for path in runs], title)
    output.write_text(page, encoding="utf-8")
    click.echo(f"{output}  {len(page.encode())} bytes")
