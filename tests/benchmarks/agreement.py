"""Do exported networks predict what the trained ones do? Every width from 2 to 8 bits, and widths that differ by layer.

    python -m tests.benchmarks.agreement --data-root DATA [--start resnet20=FILE] [--networks lenet5,resnet20]

A network of LSQ is trained for a moment at each width, from float weights, and exported; the table compares torch and
onnxruntime on the whole test set, and the sizes of the files with what the search counts. `itself` is how many images
torch predicts otherwise in another memory layout: as many as sums in another order change. `graph` are the bytes of an
ONNX file that are no constants.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch

from raysearch.resolve import trial_config
from raysearch.single import train
from raysearch.sweep import Sweep
from tests.trainables.exporting import MIXED
from trainables import checkpoint
from trainables.errors import ConfigError
from trainables.export.onnx_file import save_onnx
from trainables.export.packed_writer import save_packed
from trainables.fit import Session

DATA = {"lenet5": "mnist", "resnet20": "cifar10"}
WIDTHS = ("2", "3", "4", "5", "6", "7", "8", "mixed")


def trained(network: str, widths: str, given: argparse.Namespace, folder: Path) -> Session:
    """A network at these widths."""
    bits = MIXED[network] if widths == "mixed" else {f"bits/*/{role}": int(widths) for role in ("weight", "activation")}
    start = {"start/checkpoint": given.start[network]} if network in given.start else {}
    sweep = Sweep(
        method="lsq",
        model=network,
        data=DATA[network],
        data_root=str(given.data_root),
        epochs=1,
        settings={
            "data/train_limit": given.train,
            "data/validation_limit": 500,
            "optimizer/lr": 0.005,
            **start,
            **bits,
        },
    )
    list(train(sweep, folder, threads=1))
    session = Session(trial_config(sweep), data_root=given.data_root)
    session.load(folder / checkpoint.FILE)
    session.points()[0].activate()
    return session


def compared(network: str, widths: str, given: argparse.Namespace, folder: Path) -> str:
    """One line of the table."""
    session = trained(network, widths, given, folder)
    batches = session.data.test.batches(1000, device=torch.device("cpu"), seed=None, augment=False)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    images, labels = images[: given.images], labels[: given.images]
    packed, graph = folder / "network.safetensors", folder / "network.onnx"
    save_packed(packed, session.model, session.config)
    try:
        found = save_onnx(graph, session.model, images=images)
    except ConfigError as error:
        return f"{network:9s} {widths:>6s} {error}"
    point = session.report(session.points()[0], 0.0, 0.0)
    constants = sum(len(tensor.raw_data) for tensor in onnx.load(graph).graph.initializer)
    right = predictions(session.model, images)
    other = predictions(session.model.to(memory_format=torch.contiguous_format), images.contiguous())
    sizes = (point.size_bytes, packed.stat().st_size, constants, graph.stat().st_size - constants)
    return (
        f"{network:9s} {widths:>6s} {float((right == labels).double().mean()):9.2%} {found.images:7d} "
        f"{int((right != other).sum()):6d} {found.other_class:6d} "
        f"{found.close:12.1%} {found.max_difference:10.2g} {found.max_difference_fused:10.2g} "
        + " ".join(f"{size:10d}" for size in sizes)
    )


@torch.no_grad()
def predictions(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Classes, (images,)."""
    return torch.cat([model.eval()(part).argmax(1) for part in images.split(500)])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--networks", default=",".join(DATA))
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--train", type=int, default=3200, help="training images, once each")
    parser.add_argument("--start", action="append", default=[], metavar="NETWORK=FILE", help="float weights")
    given: Any = parser.parse_args()
    given.start = dict(text.split("=", 1) for text in given.start)
    torch.set_num_threads(1)
    print(
        f"{'network':9s} {'bits':>6s} {'test':>9s} {'images':>7s} {'itself':>6s} {'other':>6s} "
        f"{'within 1e-5':>12s} {'largest':>10s} {'fused':>10s} "
        + " ".join(f"{name:>10s}" for name in ("size_bytes", "packed", "constants", "graph"))
        + f" {'seconds':>8s}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for network in given.networks.split(","):
            for widths in given.widths.split(","):
                began = time.monotonic()
                line = compared(network, widths, given, Path(scratch) / network / widths)
                print(f"{line} {time.monotonic() - began:8.0f}", flush=True)


if __name__ == "__main__":
    main()
