"""`raysearch export`: a file that runs elsewhere."""

from pathlib import Path

import click

from raysearch.options import point, run_folder, trial


@click.command()
@run_folder
@trial
@point
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), help="file to write: .safetensors, .onnx or .pt2"
)
@click.option("--opset", type=int, metavar="N", help="ONNX opset, 20..25  [default: the oldest that has the types]")
@click.option(
    "--check",
    type=click.IntRange(min=0),
    default=2000,
    metavar="N",
    show_default=True,
    help="test images on which onnxruntime must predict what torch predicts, for .onnx; 0: all",
)
def command(run_folder: Path, trial: int, point: str, output: Path, opset: int | None, check: int) -> None:
    """Write a trained network as a file that runs elsewhere."""
    from raysearch.result import Result

    found = Result(run_folder).export(trial, point, to=output, opset=opset, checked=check)
    click.echo(f"{output}  {output.stat().st_size} bytes")
    if found is None:
        click.echo("logits are those of the trained network, bit for bit", err=True)
    else:
        click.echo(
            f"onnxruntime and torch on {found.images} test images: {found.other_class} other predictions, logits "
            f"differ by up to {found.max_difference:.2g} ({found.close:.1%} within 1e-5), with integer kernels "
            f"by up to {found.max_difference_fused:.2g}",
            err=True,
        )
