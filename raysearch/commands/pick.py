"""`raysearch pick`: one point, and its test accuracy."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from raysearch.errors import TrialError
from raysearch.options import run_folder

PICKED = (
    *("trial", "point", "method", "model", "data", "accuracy", "bops", "relative_bops", "size_bytes", "macs", "bits"),
    *("params", "source", "seed", "digest", "checkpoint"),
    *("test_accuracy", "test_images", "validation_images"),
)


@click.command()
@run_folder
@click.option("--max-bops", type=click.FloatRange(min=0), metavar="N", help="at most N BOPs")
@click.option(
    "--max-relative-bops", type=click.FloatRange(0, 100), metavar="P", help="at most P % of the 32x32-bit BOPs"
)
@click.option("--max-size-bytes", type=click.FloatRange(min=0), metavar="N", help="at most N bytes")
@click.option(
    "--min-accuracy", type=click.FloatRange(0, 1), metavar="A", help="validation accuracy of at least A, 0..1"
)
@click.option("--limit", "limits", multiple=True, metavar="NAME<=VALUE", help="a limit on any other column of records")
@click.option(
    "--within", type=click.FloatRange(0, 100), metavar="X", help="the cheapest within X points (%) of the best accuracy"
)
@click.option("--knee", is_flag=True, help="where more accuracy begins to cost much")
@click.option("--weights", metavar="NAME=W,...", help="the best under weights, such as accuracy=1,bops=0.5")
@click.option("--test/--no-test", "with_test", default=True, help="measure the test accuracy, once  [default: test]")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout")
def command(run_folder: Path, with_test: bool, as_json: bool, knee: bool, weights: str | None, **asked: Any) -> None:
    """One point of the front: the best within limits, under weights, the knee, or the cheapest near the best."""
    from raysearch.result import Result

    if sum((knee, weights is not None, asked["within"] is not None)) > 1:
        raise click.UsageError("--within, --knee and --weights are ways to choose one point: give one of them")
    result = Result(run_folder)
    found = result.front()
    given = None if weights is None else _weights(weights, result.description["sweep"].get("measures") or ())
    for name in ("max_relative_bops", "within"):
        asked[name] = None if asked[name] is None else asked[name] / 100
    try:
        point = found.pick(weights=found.knee_weights if knee else given, **asked)
    except ValueError as error:
        raise TrialError(str(error)) from error
    where = (int(point["trial"]), point["point"])
    record = next(row for row in result.records() if (row["trial"], row["point"]) == where)
    if with_test:
        record |= result.tested(record)
    chosen = {name: record.get(name) for name in (*PICKED, *record.get("measures", ()))}
    click.echo(json.dumps(chosen) if as_json else _describe(result, chosen))


def _weights(text: str, own: Iterable[str] = ()) -> dict[str, float]:
    """`accuracy=1,bops=0.5`.

    >>> _weights("accuracy=1, bops=0.5")
    {'accuracy': 1.0, 'bops': 0.5}
    """
    from analysis.tradeoff import check_weights

    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise click.UsageError(f"--weights {text}: write NAME=WEIGHT,..., such as accuracy=1,bops=0.5") from None
    try:
        check_weights(found, own)
    except ValueError as error:
        raise click.UsageError(f"--weights {text}: {error}") from error
    return found


def _describe(result: Any, chosen: dict[str, Any]) -> str:
    from analysis.confidence import in_words
    from analysis.wording import human_bytes, human_count

    named = "" if chosen["point"] == "final" else f" --point {chosen['point']}"
    lines = [
        f"trial {chosen['trial']} ({chosen['method']} on {chosen['model']}, {chosen['data']})",
        f"  validation accuracy  {in_words(chosen['accuracy'], chosen['validation_images'])}",
    ]
    if chosen["test_accuracy"] is not None:
        lines.append(f"  test accuracy        {in_words(chosen['test_accuracy'], chosen['test_images'])}")
    lines += [
        f"  BOPs                 {human_count(chosen['bops'])} ({chosen['relative_bops']:.3%} of 32x32 bits)",
        f"  size                 {human_bytes(chosen['size_bytes'])} ({chosen['size_bytes']} bytes)",
        *(f"  {name:19s}  {value:.6g}" for name, value in chosen.items() if name not in PICKED),
        f"  checkpoint           {result.path / chosen['checkpoint']}",
        "  bits (weight/activation)",
        *(f"    {layer:24s} {w}/{a}" for layer, (w, a) in chosen["bits"].items()),
        f"\nexport  raysearch export {result.path} {chosen['trial']}{named} -o net.onnx",
    ]
    return "\n".join(lines)
