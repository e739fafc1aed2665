"""`raysearch sensitivity`: how much each layer of a network suffers from quantization."""

import json
from pathlib import Path
from typing import Any

import click

from raysearch.options import sweep_of, sweep_options

ASKED = ("data", "data_root", "download", "seed")


def _widths(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        widths = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give widths such as 2,4,8") from error
    if not widths or min(widths) < 2 or max(widths) > 16:
        raise click.BadParameter(f"{text!r}: give widths from 2 to 16 bits")
    return widths


@click.command()
@click.argument("model")
@sweep_options(*ASKED)
@click.option("--widths", callback=_widths, default="2,3,4,6,8", show_default=True, help="widths in bits")
@click.option("--probes", type=click.IntRange(min=1), default=10, show_default=True, help="random vectors of a batch")
@click.option("--batches", type=click.IntRange(min=1), default=4, show_default=True, help="of training images")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="images of each")
@click.option(
    "--images", type=click.IntRange(min=0), default=512, show_default=True, help="validation images; 0: no drops"
)
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Ray tasks; 0: this process")
@click.option("--out", type=click.Path(path_type=Path), help="folder for the float network")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="write a file for `sweep --seed-from`")
@click.option("--plot", type=click.Path(path_type=Path), help="write a picture (PNG)")
@click.option("--json", "form", flag_value="json", help="JSON, as -o writes it")
@click.option("--csv", "form", flag_value="csv", help="CSV")
def command(
    model: str,
    workers: int,
    out: Path | None,
    output: Path | None,
    plot: Path | None,
    form: str | None,
    **options: Any,
) -> None:
    """Hessian and Fisher traces, quantization errors, and the drop of accuracy, layer by layer."""
    from dataclasses import replace

    from analysis.sensitivity_plot import plot_sensitivity, sensitivity_table
    from raysearch.sensitivities import sensitivity, to_json, write
    from trainables.layer_profile import Plan

    measure = {name: options.pop(name) for name in ("widths", "probes", "batches", "batch_size", "images")}
    sweep = replace(sweep_of(options), model=model)
    frame = sensitivity(sweep, Plan(**measure, seed=sweep.seed), out=out, workers=workers)
    if output is not None:
        write(frame, output)
        click.echo(f"wrote {output}; next: raysearch sweep --model {model} --seed-from {output}", err=True)
    if plot is not None:
        plot_sensitivity(frame, plot, title=f"{model}, {frame.attrs['data']}")
        click.echo(f"wrote {plot}", err=True)
    texts = {
        "json": lambda: json.dumps(to_json(frame)),
        "csv": lambda: frame.to_csv(index=False),
        None: lambda: sensitivity_table(frame),
    }
    click.echo(texts[form]().rstrip("\n"))
