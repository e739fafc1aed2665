"""Size and speed of exported networks: packed, ONNX with codes, and the float ONNX model, in the same run.

    python -m tests.benchmarks.export [--networks lenet5,resnet20,resnet18] [--method lsq] [--bits 8,4] [--rounds 30]

Latency is that of one image in onnxruntime on the CPU, one thread; all files of a network take turns, and the table
gives medians of wall time: with onnxruntime's defaults, which decode weights at each run, and with the session entry
`session.disable_quant_qdq = 1`, which decodes them once and has no integer kernels. Weights are drawn, scales come from
noise: neither size nor speed depends on training.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trainables import plugins
from trainables.build import build_model
from trainables.config import merged, parse
from trainables.cost import size_bytes
from trainables.export.onnx_file import open_session, write_onnx
from trainables.export.onnx_graph import INPUT
from trainables.export.packed_writer import save_packed
from trainables.layer_bits import resolve_bits
from trainables.layers import trace

NETWORKS = {
    "lenet5": ((1, 28, 28), "mnist"),
    "resnet20": ((3, 32, 32), "cifar10"),
    "resnet18": ((3, 224, 224), "imagenet"),
}


def exported(name: str, method: str, bits: int, folder: Path) -> dict[str, Any]:
    """Files of one network at one width; 32 is float."""
    shape, data = NETWORKS[name]
    values: dict[str, Any] = {"bits/*/weight": bits, "bits/*/activation": bits} if bits < 32 else {}
    config = parse(merged({"method": method if bits < 32 else "float", "model": name, "data": data}, values))
    classes = 1000 if data == "imagenet" else 10
    model = build_model(config, classes, shape, seed=0)
    table = trace(model, shape)
    plugin = plugins.attribute("methods", config.method.name, "Method")
    trained = plugin(plugin.Settings(**config.method.settings))
    trained.prepare(model, table, resolve_bits(config, table))
    model.to(memory_format=torch.channels_last)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    trained.calibrate(model, images)
    model.eval()
    point = trained.points(model)[0]
    onnx, packed = folder / f"{name}-{bits}.onnx", folder / f"{name}-{bits}.safetensors"
    write_onnx(onnx, model, shape)
    header = save_packed(packed, model, config)
    return {
        "onnx": onnx,
        "counted": size_bytes(table, point.bits, extra_floats=point.extra_floats),
        "packed": packed.stat().st_size,
        "header": header,
        "images": images[:1].numpy(),
    }


def measure(files: dict[int, dict[str, Any]], rounds: int) -> dict[tuple[int, bool], float]:
    """Median seconds of one image for each width, fused or not, interleaved, after three warm-up rounds."""
    keys = [(bits, fused) for bits in files for fused in (True, False)]
    sessions = {(bits, fused): open_session(files[bits]["onnx"], fused=fused) for bits, fused in keys}
    times: dict[tuple[int, bool], list[float]] = {key: [] for key in keys}
    for turn in range(rounds + 3):
        for key, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {INPUT: files[key[0]]["images"]})
            if turn >= 3:
                times[key].append(time.perf_counter() - began)
    return {key: statistics.median(values) for key, values in times.items()}


def main() -> None:
    """Print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--method", default="lsq")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--bits", default="8,4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            widths = [32, *(int(text) for text in arguments.bits.split(","))]
            files = {bits: exported(name, arguments.method, bits, Path(folder)) for bits in widths}
            medians = measure(files, arguments.rounds)
            print(
                f"\n{name}, {arguments.method}, {NETWORKS[name][0]}, 1 thread, {arguments.rounds} rounds\n"
                f"{'bits':>6s} {'size_bytes':>12s} {'packed':>12s} {'header':>8s} {'ONNX':>12s} {'of float':>9s} "
                f"{'latency':>11s} {'of float':>9s} {'decoded once':>13s} {'of float':>9s}"
            )
            whole = files[32]["onnx"].stat().st_size
            for bits, file in files.items():
                size = file["onnx"].stat().st_size
                print(
                    f"{bits:6d} {file['counted']:12d} {file['packed']:12d} {file['header']:8d} {size:12d} "
                    f"{size / whole:9.1%} {medians[bits, True] * 1e3:8.2f} ms "
                    f"{medians[bits, True] / medians[32, True]:9.2f} {medians[bits, False] * 1e3:10.2f} ms "
                    f"{medians[bits, False] / medians[32, True]:9.2f}"
                )


if __name__ == "__main__":
    main()
