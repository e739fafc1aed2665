"""`raysearch latency`: a table of this machine's latency, layer by layer."""

import json
import platform
from pathlib import Path
from typing import Any

import click

from raysearch.errors import SweepError
from raysearch.options import sweep_of, sweep_options


@click.command()
@sweep_options("method", "model", "data")
@click.option("--widths", default="2,4,8", show_default=True, help="widths to time, each with each, 1..8")
@click.option("--runs", default=30, show_default=True, type=click.IntRange(1, 10_000), help="runs; the median counts")
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="file to write, .json")
def command(widths: str, runs: int, output: Path, **options: Any) -> None:
    """Time each layer at each width on this machine: a table for --objectives accuracy,FILE.json.

    Each layer runs by itself in onnxruntime on one CPU thread, as the ONNX export writes it; the network's latency is
    taken as the sum. It speaks of this machine and of onnxruntime only: there, fewer bits are not faster.
    """
    from raysearch.records import write_json
    from raysearch.resolve import trial_config
    from trainables.build import build_model, data_shape
    from trainables.latency import measured

    try:
        asked = [int(text) for text in widths.split(",")]
    except ValueError:
        raise SweepError(f"--widths {widths}: integers, such as 2,4,8") from None
    if output.suffix != ".json":
        raise SweepError(f"-o {output}: the name of a table ends in .json")
    config = trial_config(sweep_of(options))
    classes, shape = data_shape(config)
    table = measured(build_model(config, classes, shape, seed=config.seed), shape, widths=asked, runs=runs)
    about = {"model": config.tree()["model"], "data": config.data.name, "machine": platform.processor()}
    write_json(output, {**about, **table})
    rows = {
        name: json.dumps({key: round(value, 4) for key, value in row.items()}) for name, row in table["layers"].items()
    }
    for name, row in rows.items():
        click.echo(f"{name:24s} {row}")
    click.echo(f"whole float network {table['whole_float']:.4f} ms; wrote {output}", err=True)
