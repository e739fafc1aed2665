"""ONNX files with integer weights: QuantizeLinear and DequantizeLinear at every width from 1 to 8 bits.

torch's exporters refuse fake quantization below 8 bits. So the network is exported as if it were float, weights left
open, and the codes are put in afterwards: each quantized weight is an initializer of the smallest integer type that
holds it, behind a DequantizeLinear, and what a layer reads goes through a QuantizeLinear and a DequantizeLinear.

| width | type | opset | IR version |
|---|---|---|---|
| 1, 2 | INT2, UINT2 | 25 | 13 |
| 3, 4 | INT4, UINT4 | 21 | 10 |
| 5 to 8 | INT8, UINT8 | 20 | 9 |

What a layer reads is clipped to its levels first, unless they fill 8 bits: for odd widths by need, for 2 and 4 bits
because onnxruntime would otherwise move the QuantizeLinear to operators that do not take these types. A batch norm
behind a quantized layer is folded: its scale into the weights behind their codes, its shift into the bias. The IR
version is pinned, because onnx writes newer ones than onnxruntime reads.

Layers of 8 and 8 bits are written so that onnxruntime takes its integer kernels. These round the bias to the product of
the two steps, which would be coarse at fewer bits; there, and everywhere if the integer kernels change predictions, a
node behind the DequantizeLinear keeps it from doing so: the norm's scale as a factor, or a `Sum` of one term.

Pruned channels are removed where nothing but layers read them (`onnx_pruning`); what is left of them elsewhere, such as
in front of a residual sum, are weights of 0.

Sums are made in another order than in torch, which now and then moves a value across the border between two levels. So
logits agree to about 1e-6 unless one does; then they differ by what one level makes.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables.encoding import MOST_BITS, Clipped
from trainables.errors import ConfigError
from trainables.export.coded import Coded, Read, at_this_point, coded, standing, widths
from trainables.export.onnx_constants import dense_groups, storage
from trainables.export.onnx_graph import GRAPH_OPSET, INPUT, OUTPUT, Graph, float_graph, flows_of, plain_twin
from trainables.export.onnx_pruning import without_pruned

NEWEST = 25
IR_VERSIONS = {20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
DIFFERENT_CLASS = 0.001
"""Share of images for which onnxruntime may predict another class than torch; of few images, one."""
CLOSE = 1e-5
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far onnxruntime and torch agree on the same images.

    Attributes:
        images: how many.
        max_difference: largest difference of a logit when onnxruntime computes what is written.
        close: share of images whose logits then differ by at most 1e-5 times the largest logit (or 1), 0..1; in the
            others a value crossed the border between two levels.
        max_difference_fused: the largest difference with its default optimizations, integer kernels among them.
        other_class: number of images with another prediction; the larger of both.
    """

    images: int
    max_difference: float
    close: float
    max_difference_fused: float
    other_class: int


def save_onnx(
    path: Path,
    model: nn.Module,
    /,
    *,
    images: Tensor,
    opset: int | None = None,
    **facts: Any,
) -> Agreement:
    """Write `model` as it stands (at the operating point that is active) as ONNX, once onnxruntime agrees with it.

    The input is `images`, (batch, channels, height, width) with any batch; the output `logits`, (batch, classes).

    Args:
        path: file to write, in one atomic step.
        model: trained, with quantized layers; it is left as it is.
        images: to compare on, (count, channels, height, width), such as those of the test split; noise will not do,
            because a trained network says nothing about it that rounding does not change.
        opset: 20..25; None takes the oldest that has the types that the widths need.
        facts: anything JSON can hold, for the metadata.

    Raises:
        ConfigError: a layer that ONNX cannot express, an opset that is too old for a width, or onnxruntime predicts
            another class for more than 0.1 % of the images (and more than one). Nothing is written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        for integer in (True, False):
            write_onnx(temporary, model, tuple(images.shape[1:]), opset=opset, integer=integer, **facts)
            found = agreement(temporary, model, images)
            if found.other_class <= max(1, int(DIFFERENT_CLASS * found.images)):
                os.replace(temporary, path)
                return found
    finally:
        temporary.unlink(missing_ok=True)
    raise ConfigError(
        f"{path}: onnxruntime predicts another class than torch for {found.other_class} of {found.images} images, more "
        f"than {DIFFERENT_CLASS:.1%}; logits differ by up to {found.max_difference:g}; not written"
    )


def write_onnx(
    path: Path,
    model: nn.Module,
    input_shape: tuple[int, ...],
    /,
    *,
    opset: int | None = None,
    integer: bool = True,
    **facts: Any,
) -> None:
    """Write `model` as it stands as ONNX, without asking onnxruntime.

    Args:
        path: file to write; its folder exists.
        model: trained, with quantized layers; it is left as it is.
        input_shape: (channels, height, width).
        opset: as in `save_onnx`.
        integer: whether 8-bit layers are left to onnxruntime's integer kernels.
        facts: anything JSON can hold, for the metadata.

    Raises:
        ConfigError: a layer that ONNX cannot express, or an opset that is too old for a width.
    """
    twin = at_this_point(model)
    layers, sites = coded(twin), standing(twin)
    opset = _opset(layers, sites, opset)
    flows = flows_of(twin, layers)
    folded = plain_twin(twin, layers, sites, flows)
    layers, folded = without_pruned(twin, layers, folded, flows, input_shape)
    proto = float_graph(twin, input_shape)
    Graph(proto.graph, integer=integer).quantize(layers, sites, folded, dict(twin.state_dict()))
    _finish(proto, opset, layers, facts)
    path.write_bytes(proto.SerializeToString())


@torch.no_grad()
def agreement(path: Path, model: nn.Module, images: Tensor) -> Agreement:
    """Run an ONNX file in onnxruntime on the CPU, and `model` in evaluation mode beside it."""
    twin = at_this_point(model)
    ours = torch.cat([twin(batch) for batch in images.cpu().split(BATCH)])
    rows, other = [], []
    for fused in (False, True):
        session = open_session(path, fused=fused)
        parts = [session.run([OUTPUT], {INPUT: batch.numpy()})[0] for batch in images.cpu().contiguous().split(BATCH)]
        theirs = torch.from_numpy(np.concatenate(parts))
        rows.append((ours - theirs).abs().amax(1))
        other.append(int((ours.argmax(1) != theirs.argmax(1)).sum()))
    return Agreement(
        images=len(images),
        max_difference=float(rows[0].max()),
        close=float((rows[0] <= CLOSE * max(1.0, float(ours.abs().max()))).double().mean()),
        max_difference_fused=float(rows[1].max()),
        other_class=max(other),
    )


def open_session(path: Path, *, fused: bool = True, threads: int = 1) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: of an ONNX file.
        fused: with onnxruntime's default optimizations; without, quantizers are computed as written.
        threads: how many, within one operator.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturating products without VNNI
    if not fused:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _opset(layers: Mapping[str, Coded], sites: Mapping[str, Read], given: int | None) -> int:
    """The opset to write: the oldest that all types need, or the given one if it is none older."""
    needed = GRAPH_OPSET
    for what, bits in _typed(layers, sites):
        width, first = storage(bits)
        if given is not None and given < first:
            raise ConfigError(
                f"opset = {given}: the {bits}-bit {what} are stored in {width} bits, which needs opset {first} or newer"
            )
        needed = max(needed, first)
    if given is not None and not GRAPH_OPSET <= given <= NEWEST:
        raise ConfigError(f"opset = {given}: {GRAPH_OPSET}..{NEWEST} can be written")
    return needed if given is None else given


def _typed(layers: Mapping[str, Coded], sites: Mapping[str, Read]) -> Iterator[tuple[str, int]]:
    """What is kept in an integer type of ONNX, and its width."""
    unpacked = {name for group in dense_groups(layers) for name in group.codes}
    for name, layer in layers.items():
        if 0 < layer.weight_bits <= MOST_BITS:
            yield f"weights of layer {name}", max(8, layer.weight_bits) if name in unpacked else layer.weight_bits
    reads = {f"inputs of layer {name}": layer.reads for name, layer in layers.items() if layer.reads is not None}
    for what, read in {**reads, **{f"codes of {name}": read for name, read in sites.items()}}.items():
        if read.encoding is not None and not isinstance(read.encoding, Clipped):
            yield what, max(8, read.bits)


def _finish(proto: Any, opset: int, layers: Mapping[str, Coded], facts: Mapping[str, Any]) -> None:
    """Set versions and metadata, and check the model."""
    import onnx

    del proto.opset_import[:]
    proto.opset_import.add(domain="", version=opset)
    proto.ir_version = IR_VERSIONS[opset]
    proto.producer_name = "raysearch"
    proto.producer_version = ""
    for key, value in {"bits": widths(layers), **facts}.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(proto, full_check=True)
