"""Price of one training step: quantized over plain eager float, same network, same run, one thread, CPU time.

    python -m tests.benchmarks.step [--rounds 30] [--methods lsq,pact,dorefa] [--networks lenet5,resnet20]
        [--bits 2,4,8] [--set method/ADDRESS=VALUE ...] [--layout contiguous]

All variants take turns within each round, so a busy machine slows them alike. The table gives medians of CPU time and
two ratios: to the plain float step, and to the float step in the memory layout of the quantized ones. That is the
training loop's (`trainables.layouts`; the float step: channels last), unless `--layout contiguous` asks for torch's
default. Beside them stands the memory kept for the backward pass, of several passes in one step together. Brevitas, in
torch's default layout, joins when it is installed (`pip install ".[benchmarks]"`).
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from trainables import plugins, quantize
from trainables.build import build_model
from trainables.config import merged, parse
from trainables.cost import LayerTable
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.layouts import lay_out
from trainables.optimizers import Optimizers
from trainables.step import training_step

NETWORKS = {
    "lenet5": ((1, 28, 28), 128, "mnist"),
    "resnet20": ((3, 32, 32), 32, "cifar10"),
    "vgg7": ((3, 32, 32), 32, "cifar10"),
    "resnet18": ((3, 64, 64), 8, "imagenet"),
}
"""Input shape, batch size, and a data set with such images; the images here are noise."""
Step = Callable[[], object]


def float_network(name: str) -> tuple[nn.Module, LayerTable]:
    """The plain network and its layer table."""
    shape, _, data = NETWORKS[name]
    model = build_model(parse({"method": "float", "model": name, "data": data}), 10, shape, seed=0)
    return model, trace(model, shape)


def training_step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward, loss, backward and update of an ordinary network."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def quantized_step(
    name: str, options: Mapping[str, Any], compiled: str, images: Tensor, labels: Tensor, layout: torch.memory_format
) -> Step:
    """The training loop's step of a method; `options` are values by address, of the method and its bits."""
    data = NETWORKS[name][2]
    config = parse(merged({"model": name, "data": data, "optimizer": {"lr": 0.01}}, options))
    model, table = float_network(name)
    plugin = plugins.attribute("methods", config.method.name, "Method")
    method = plugin(plugin.Settings(**config.method.settings))
    method.prepare(model, table, resolve_bits(config, table))
    if layout == torch.channels_last:
        lay_out(model, torch.device("cpu"))
    method.calibrate(model, images)
    model.train()
    optimizers = Optimizers(method.groups(model), config.optimizer)
    forward = torch.compile(model) if compiled == "model" else model

    def step() -> None:
        quantize.use_compiled(compiled == "quantizers")
        training_step(method, model, forward, images, labels, optimizers)

    return step


def brevitas_step(name: str, bits: int, images: Tensor, labels: Tensor) -> Step:
    """The same network with Brevitas' quantized layers: learned-scale weights and activations of `bits`."""
    from brevitas import nn as brevitas_nn
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat, Uint8ActPerTensorFloat

    model, table = float_network(name)
    for row in table.quantizable:
        layer = model.get_submodule(row.name)
        width = 8 if row.first or row.last else bits
        options = {
            "weight_quant": Int8WeightPerTensorFloat,
            "weight_bit_width": width,
            "input_quant": None if row.first else Int8ActPerTensorFloat if row.signed else Uint8ActPerTensorFloat,
            "bias": layer.bias is not None,
        }
        if not row.first:
            options["input_bit_width"] = width
        if isinstance(layer, nn.Conv2d):
            new = brevitas_nn.QuantConv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                groups=layer.groups,
                **options,
            )
        else:
            new = brevitas_nn.QuantLinear(layer.in_features, layer.out_features, **options)
        model.set_submodule(row.name, new)
    return training_step_of(model, images, labels)


def variants(name: str, arguments: argparse.Namespace, layout: torch.memory_format) -> dict[str, Step]:
    """All steps to compare on one network; the first two are the references of the two ratios."""
    shape, batch, _ = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(batch, *shape, generator=generator)
    images = plain.contiguous(memory_format=layout)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    same_layout = float_network(name)[0].to(memory_format=layout)
    steps = {
        "float, eager, plain": training_step_of(float_network(name)[0], plain, labels),
        "float, eager, same layout": training_step_of(same_layout, images, labels),
    }
    given = dict(text.split("=", 1) for text in arguments.set)
    settings = {address: json.loads(value) for address, value in given.items()}
    for method in arguments.methods.split(","):
        roles = plugins.attribute("methods", method, "Method").given_bits
        for bits in [int(text) for text in arguments.bits.split(",")] if roles else [0]:
            widths = {f"bits/*/{role}": bits for role in roles}
            options = {"method": method, **widths, **settings}
            for compiled in ("off", "quantizers"):
                label = f"{method}{f' {bits} bits' if roles else ''}, {'eager' if compiled == 'off' else 'compiled'}"
                steps[label] = quantized_step(name, options, compiled, images, labels, layout)
    if arguments.compile_model:
        label = f"{method}{f' {bits} bits' if roles else ''}, compiled model"
        steps[label] = quantized_step(name, options, "model", images, labels, layout)
    if importlib.util.find_spec("brevitas"):
        steps["brevitas 4 bits, eager"] = brevitas_step(name, 4, plain, labels)
    return steps


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each step, `rounds` times, interleaved, after three warm-up rounds."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(rounds + 3):
        for label, step in steps.items():
            began = time.process_time()
            step()
            if turn >= 3:
                times[label].append(time.process_time() - began)
    return times


def kept_bytes(step: Step) -> int:
    """Bytes of the distinct memory that autograd saves in one step for its backward passes, parameters included."""
    kept: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        step()
    return sum(saved.untyped_storage().nbytes() for saved in kept.values())


def main() -> None:
    """Print one table for each network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--methods", default="lsq")
    parser.add_argument("--networks", default="lenet5,resnet20")
    parser.add_argument("--bits", default="2,4,8")
    parser.add_argument("--set", nargs="*", default=[], metavar="ADDRESS=JSON")
    parser.add_argument("--compile-model", action="store_true")
    parser.add_argument("--layout", choices=["channels_last", "contiguous"], default="channels_last")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layout = torch.channels_last if arguments.layout == "channels_last" else torch.contiguous_format
    for name in arguments.networks.split(","):
        steps = variants(name, arguments, layout)
        times = measure(steps, arguments.rounds)
        kept = {label: kept_bytes(step) for label, step in steps.items()}
        of_plain = next(iter(kept.values()))
        medians = {label: statistics.median(values) for label, values in times.items()}
        plain, same = list(medians.values())[:2]
        print(
            f"\n{name}, batch {NETWORKS[name][1]}, torch {torch.__version__}, 1 thread, {arguments.rounds} rounds, "
            f"{arguments.layout}\n{'':34s} {'CPU time':>11s}  / plain  / same layout   memory kept  / plain"
        )
        for label, median in medians.items():
            print(
                f"  {label:32s} {median * 1e3:8.1f} ms {median / plain:8.2f} {median / same:14.2f} "
                f"{kept[label] / 2**20:9.1f} MiB {kept[label] / of_plain:8.2f}"
            )


if __name__ == "__main__":
    main()
