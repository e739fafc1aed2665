"""`raysearch pick`: one point, and its test accuracy."""

import json
from pathlib import Path
from typing import Any

import click

from raysearch.errors import TrialError
from raysearch.options import run_folder

PICKED = (
    *("trial", "point", "method", "model", "data", "accuracy", "bops", "relative_bops", "size_bytes", "macs", "bits"),
    *("params", "source", "seed", "digest", "checkpoint", "test_accuracy"),
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
@click.option("--test/--no-test", "with_test", default=True, help="measure the test accuracy, once  [default: test]")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout")
def command(run_folder: Path, with_test: bool, as_json: bool, max_relative_bops: float | None, **limits: Any) -> None:
    """The best point of the front within limits."""
    from raysearch.result import Result

    result = Result(run_folder)
    found = result.front()
    try:
        share = None if max_relative_bops is None else max_relative_bops / 100
        point = found.pick(max_relative_bops=share, **limits)
    except ValueError as error:
        raise TrialError(str(error)) from error
    where = (int(point["trial"]), point["point"])
    record = next(row for row in result.records() if (row["trial"], row["point"]) == where)
    chosen = {name: record.get(name) for name in (*PICKED, *record.get("measures", ()))}
    if with_test:
        chosen["test_accuracy"] = result.test(record)
    click.echo(json.dumps(chosen) if as_json else _describe(result, chosen))


def _describe(result: Any, chosen: dict[str, Any]) -> str:
    from analysis.front import human_bytes, human_count

    lines = [
        f"trial {chosen['trial']} ({chosen['method']} on {chosen['model']}, {chosen['data']})",
        f"  validation accuracy  {chosen['accuracy']:.2%}",
    ]
    if chosen["test_accuracy"] is not None:
        lines.append(f"  test accuracy        {chosen['test_accuracy']:.2%}")
    lines += [
        f"  BOPs                 {human_count(chosen['bops'])} ({chosen['relative_bops']:.3%} of 32x32 bits)",
        f"  size                 {human_bytes(chosen['size_bytes'])} ({chosen['size_bytes']} bytes)",
        *(f"  {name:19s}  {value:.6g}" for name, value in chosen.items() if name not in PICKED),
        f"  checkpoint           {result.path / chosen['checkpoint']}",
        "  bits (weight/activation)",
        *(f"    {layer:24s} {w}/{a}" for layer, (w, a) in chosen["bits"].items()),
    ]
    return "\n".join(lines)
