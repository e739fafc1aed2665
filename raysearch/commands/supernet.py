"""`raysearch supernet`: train one network for many widths, then search their mixtures on its weights."""

from pathlib import Path
from typing import Any

import click

from raysearch.options import objectives_of, run_folder, sweep_of, sweep_options
from raysearch.sweep_checks import SAMPLERS

TRAINED = (
    *("method", "model", "data", "data_root", "download", "epochs", "workers", "cpus_per_worker", "gpus_per_worker"),
    *("train", "seed", "mlflow_uri"),
)
CALIBRATION = 512
LR = 0.005


@click.group()
def command() -> None:
    """Train once, search thousands: mixtures of widths on the weights of one switchable network."""


@command.command()
@sweep_options(*TRAINED, method="double_rounding")
@click.option("--out", type=click.Path(path_type=Path), help="run folder to make  [default: runs/NAME]")
def train(out: Path | None, **options: Any) -> None:
    """Train one network for several widths: double_rounding (the default), or adabits."""
    from dataclasses import replace

    from raysearch.driver import run
    from raysearch.seeds import Seeds
    from raysearch.watching import watched

    sweep = replace(sweep_of(options), trials=1, space={})
    watched(lambda watcher: run(sweep, out, watcher=watcher, seeds=Seeds(first=(("given", {}),))))


def _widths(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}: give widths such as 8,4,2") from error


@command.command()
@run_folder
@click.argument("trial", type=click.IntRange(min=0), required=False)
@click.option("--evaluations", type=click.IntRange(min=1), default=5000, show_default=True, help="mixtures to evaluate")
@click.option("--objectives", help="what to search for  [default: accuracy:max,bops:min,size_bytes:min]")
@click.option(
    "--sampler",
    type=click.Choice([name for name in SAMPLERS if name != "grid"]),
    default="auto",
    show_default=True,
    help="who proposes",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the search")
@click.option("--widths", callback=_widths, metavar="LIST", help="widths to choose from  [default: all trained]")
@click.option("--images", type=click.IntRange(min=1), help="validation images to evaluate on  [default: all]")
@click.option("--recalibrate", is_flag=True, help=f"batch norm of each mixture from {CALIBRATION} training images")
@click.option("--max-bops", type=click.FloatRange(min=0), help="never evaluate a mixture over so many BOPs")
@click.option("--max-relative-bops", type=click.FloatRange(0, 100), help="nor one over this % of 32x32-bit BOPs")
@click.option("--max-size-bytes", type=click.FloatRange(min=0), help="nor one over so many bytes")
@click.option("--workers", type=click.IntRange(min=1), help="at the same time  [default: all cores, or GPUs]")
@click.option("--mlflow-uri", help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else the run folder")
@click.option(
    "--seed-from", type=click.Path(path_type=Path), help="try first what a file of `raysearch sensitivity -o` suggests"
)
@click.option("--finetune", "points", type=click.IntRange(min=1), metavar="N", help="then train N front points alone")
@click.option("--out", type=click.Path(path_type=Path), help="run folder to make  [default: runs/NAME]")
def search(
    run_folder: Path,
    objectives: str | None,
    recalibrate: bool,
    max_relative_bops: float | None,
    seed_from: Path | None,
    points: int | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Search the mixtures of a trained network's widths: weights and activations of each layer on their own."""
    from raysearch.shared_weights.question import Search
    from raysearch.shared_weights.supernet import search as run
    from raysearch.watching import searched

    if objectives is not None:
        options["objectives"] = objectives_of(objectives)[0]
    question = Search(
        run=str(run_folder),
        calibration=CALIBRATION if recalibrate else 0,
        max_relative_bops=None if max_relative_bops is None else max_relative_bops / 100,
        **options,
    )
    result = searched(lambda watcher: run(question, out, seed_from=seed_from, watcher=watcher))
    if points is not None:
        _finetuned(result, points)


@command.command()
@run_folder
@click.option("--points", type=click.IntRange(min=1), default=5, show_default=True, help="points of the front")
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="epochs of each")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=LR, show_default=True, help="learning rate")
def finetune(run_folder: Path, points: int, epochs: int, lr: float) -> None:
    """Train points of a search's front alone, and say how far the shared accuracies are to be trusted."""
    from raysearch.result import Result

    _finetuned(Result(run_folder), points, epochs=epochs, lr=lr)


def _finetuned(result: Any, points: int, **options: Any) -> None:
    from raysearch.shared_weights.finetune import correlation_text
    from raysearch.shared_weights.finetune import finetune as train_points
    from raysearch.watching import watched

    found: list[Any] = []

    def train_them(watcher: Any) -> Any:
        tuned, compared = train_points(result, points, watcher=watcher, **options)
        found.append(compared)
        return tuned

    watched(train_them)
    click.echo(f"\n{correlation_text(found[0])}")
