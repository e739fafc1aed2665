"""Packed files: a trained network in as many bytes as its codes need, readable without anybody's classes.

A safetensors file with one tensor of bytes, `packed`, as long as `cost.size_bytes` says. In it lie, in this order,

- two bytes, the length of the description; the description as JSON, deflated with `packed_header.DICTIONARY`; zeros, so
  that with safetensors' own header it takes `cost.HEADER_BYTES` (more, if it is of very many kinds of levels);
- float32 numbers (little-endian): scales that are not usual, biases, a scale and a shift for each channel of batch
  norm, other parameters;
- codes of the weights, each in exactly its width, the lowest bit first, a layer starting on a byte; of a layer with
  pruned channels a bit for each channel, then the codes of those that are left; float32 where weights have no codes.

`description` returns the JSON: what the network is built from, each layer's encodings, and facts about the point.

What is loaded gives the same logits as the trained network in evaluation mode, bit for bit, on a CPU in channels-last
layout: weights are decoded in the order in which the quantizers compute (`encoding`), and a batch norm with mean 0,
variance 1 and epsilon 0 multiplies and adds what torch makes of its statistics. Folding the norm into the weights would
not be exact. `export.packed_writer` reads every file back and compares before it hands it over.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainables import checkpoint, modules
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.export import packed_header
from trainables.export.bit_packing import packed_bytes, unpack
from trainables.export.coded import Decoded, Rounded
from trainables.export.packed_header import FORMAT, TENSOR
from trainables.export.packed_network import multiplying, norms, others, rebuilt, set_norm


def description(path: Path) -> dict[str, Any]:
    """What a packed file says of itself: configuration, encodings, facts.

    Raises:
        ConfigError: the file is missing, torn, or of another format.
    """
    return _open(path)[0]


def load_packed(path: Path) -> nn.Module:
    """The network of a packed file, in evaluation mode and channels-last layout; its widths are `read_bits` of it.

    Raises:
        ConfigError: the file is missing, torn, of another format, or of a model that is built otherwise now.
    """
    described, content = _open(path)
    plain = rebuilt(described, prepared=described.get("prepared", False))
    file = _Reader(path, content)
    rows = [packed_header.Row(row) for row in described["encodings"]]
    names = list(multiplying(plain))
    if len(names) != len(described["layers"]):
        raise ConfigError(
            f"packed file {path} has {len(described['layers'])} layers, its model has {len(names)}: "
            "the model is built otherwise now"
        )
    held: dict[str, tuple[Any, Encoding | None]] = {}
    readers: dict[int, modules.Quantizer] = {}
    for number, (name, row) in enumerate(zip(names, described["layers"], strict=True)):
        if row is None:
            continue
        layer: Any = plain.get_submodule(name)
        weight = rows[row["w"]].take(file, len(layer.weight))
        reads = (
            None if "r" not in row else readers[row["as"]] if "as" in row else _quantizer(rows[row["r"]], file, layer)
        )
        if reads is not None:
            readers[number] = reads
        if layer.bias is not None:
            layer.bias.data = file.floats(layer.bias.numel())
        place = Layer(name=name, kind="", macs=0, weights=0, biases=0, channels=0)
        modules.replace(plain, place, Decoded(weight), reads)
        held[name] = row, weight
    for name, number in described.get("sites", {}).items():
        _stand(
            plain,
            name,
            plain.get_submodule(number) if isinstance(number, str) else _quantizer(rows[number], file, None),
        )
    for norm in norms(plain):
        set_norm(norm, file.floats(norm.num_features), file.floats(norm.num_features))
    for tensor in others(plain).values():
        tensor.copy_(file.floats(tensor.numel()).view_as(tensor))
    for name, (row, weight) in held.items():
        _decode(plain.get_submodule(name), weight, file, pruned="p" in row)
    file.end()
    plain.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, (row, _) in held.items():
        if "strides" in row:
            layer = plain.get_submodule(name)
            layer.weight.data = torch.empty_strided(layer.weight.shape, row["strides"]).copy_(layer.weight)
    return plain


def _open(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Description and the rest of a packed file."""
    tensors, _ = checkpoint.read(path)
    if list(tensors) != [TENSOR]:
        raise ConfigError(f"{path} is no packed file: it has {len(tensors)} tensors, not one named {TENSOR!r}")
    described, content = packed_header.unpack(tensors[TENSOR])
    if described.get("format") != FORMAT:
        raise ConfigError(f"{path} is a packed file of format {described.get('format')!r}; this version reads {FORMAT}")
    return described, content


class _Reader:
    """Takes a flat tensor of bytes to pieces, from its beginning to its end."""

    def __init__(self, path: Path, content: Tensor) -> None:
        self.path, self.content, self.place = path, content, 0

    def take(self, count: int) -> Tensor:
        """The next bytes."""
        self.place += count
        if self.place > len(self.content):
            self._refuse("less")
        return self.content[self.place - count : self.place]

    def floats(self, count: int) -> Tensor:
        """The next numbers, (count,)."""
        return torch.from_numpy(np.frombuffer(self.take(4 * count).numpy().tobytes(), "<f4").copy())

    def end(self) -> None:
        """Refuse what is left."""
        if self.place < len(self.content):
            self._refuse("more")

    def _refuse(self, how: str) -> None:
        raise ConfigError(f"packed file {self.path} holds {how} than its model needs: the model is built otherwise now")


def _quantizer(row: packed_header.Row, file: _Reader, layer: Any) -> Rounded:
    """A quantizer of activations; `layer` is that of the rebuilt network, whose quantizer knows what goes before."""
    inputs = getattr(layer, "input_quantizer", None)
    before = None if inputs is None else inputs.before()
    return Rounded(row.take(file, 1), before, bits=row.bits)


def _stand(model: nn.Module, name: str, quantizer: nn.Module) -> None:
    """Put a quantizer into its place: that of another module, or behind what a module makes."""
    maker, _, last = name.rpartition(".")
    if last == modules.OUTPUT and not hasattr(model.get_submodule(maker), last):
        modules.quantize_output(model.get_submodule(maker), quantizer)  # type: ignore[arg-type]
    else:
        model.set_submodule(name, quantizer)


def _decode(layer: Any, encoding: Encoding | None, file: _Reader, *, pruned: bool) -> None:
    """Give a layer its weights; what is pruned is 0."""
    weight = layer.weight
    kept = torch.ones(len(weight), dtype=torch.bool)
    if pruned:
        kept = unpack(file.take(packed_bytes(len(weight), 1)), 1, len(weight)).bool()
        layer.weight_quantizer.left = kept
    count = int(kept.sum()) * weight[0].numel()
    codes = torch.zeros(weight.shape)
    if encoding is None:
        codes[kept] = file.floats(count).view(-1, *weight.shape[1:])
    elif encoding.bits:
        left = unpack(file.take(packed_bytes(count, encoding.bits)), encoding.bits, count) + encoding.q_min
        codes[kept] = left.float().view(-1, *weight.shape[1:])
    values = codes if encoding is None else encoding.decode(codes)
    layer.weight.data = values if not pruned else values.masked_fill(~kept.view(-1, *[1] * (values.dim() - 1)), 0.0)
