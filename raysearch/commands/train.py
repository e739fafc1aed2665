"""`raysearch train`: one trial, without Ray."""

import json
from pathlib import Path
from typing import Any

import click

from raysearch.options import sweep_of, sweep_options


@click.command()
@sweep_options("method", "model", "data", "data_root", "download", "epochs", "seed")
@click.option("--out", type=click.Path(path_type=Path), help="folder for checkpoint and float start")
@click.option("--json", "as_json", is_flag=True, help="the last report as JSON on stdout")
def command(out: Path | None, as_json: bool, **options: Any) -> None:
    """Train one trial in this process, without Ray."""
    from raysearch.single import train as train_one

    last = None
    for report in train_one(sweep_of(options), out):
        last = report
        for point in report.points:
            click.echo(
                f"epoch {report.epoch}/{report.epochs}: train loss {report.train_loss:.4f}, "
                f"validation accuracy {point.accuracy:.2%}, relative BOPs {point.relative_bops:.3%}, "
                f"{point.size_bytes} bytes, {report.seconds:.1f} s",
                err=as_json,
            )
    if as_json and last is not None:
        click.echo(json.dumps(last.to_json()))
