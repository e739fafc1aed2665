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
not be exact. Every file is read back and compared before it is handed over.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import checkpoint, modules, packed_header, plugins
from trainables.bit_packing import pack, packed_bytes, unpack
from trainables.build import build_model, data_shape
from trainables.coded import Coded, Decoded, Read, Rounded, at_this_point, coded, scale_and_shift, standing
from trainables.config import TrialConfig, parse
from trainables.cost import FLOAT_BITS, HEADER_BYTES, Layer, LayerBits
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.layers import trace

TENSOR = "packed"
FORMAT = 2
"""Of the description."""
OWN_BATCH = 2
"""Images on which a file is compared with the network."""


def save_packed(path: Path, model: nn.Module, config: TrialConfig, /, **facts: Any) -> int:
    """Write `model` as it stands (at the operating point that is active) to a packed file, in one atomic step.

    Args:
        path: file to write.
        model: trained; it is left as it is.
        config: what it was built from.
        facts: anything JSON can hold, for the description.

    Returns:
        bytes that come on top of floats and codes: `cost.HEADER_BYTES`, or more.

    Raises:
        ConfigError: something in the network that the file cannot hold, or that does not come back bit by bit.
    """
    twin = at_this_point(model)
    layers, sites = coded(twin), standing(twin)
    classes, input_shape = data_shape(config)
    network = {"config": _source(config), "classes": classes, "input_shape": list(input_shape)}
    plain, prepared = _like(twin, config, network)
    names = list(_multiplying(plain))
    encodings = packed_header.Encodings()
    described = {
        "format": FORMAT,
        **network,
        **({"prepared": True} if prepared else {}),
        "layers": [_row(name, layers, names, encodings, plain) for name in names],
        **({"sites": _sites(sites, encodings)} if sites else {}),
        "encodings": encodings.rows,
        **({"facts": facts} if facts else {}),
    }
    floats = [tensor.float().flatten() for tensor in _floats(twin, layers, sites)]
    codes = [part for layer in layers.values() for part in _codes(layer)]
    payload = torch.cat([torch.cat([*floats, torch.empty(0)]).contiguous().view(torch.uint8), *codes])
    whole = HEADER_BYTES + len(payload)
    head = packed_header.pack(described, at_least=HEADER_BYTES - _header_bytes(whole))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(save({TENSOR: torch.cat([head, payload])}))  # save_file would hide it from others
        _check(model, load_packed(temporary), input_shape)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size - len(payload)


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
    plain = _rebuilt(described, prepared=described.get("prepared", False))
    file = _Reader(path, content)
    rows = [packed_header.Row(row) for row in described["encodings"]]
    names = list(_multiplying(plain))
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
    for norm in _norms(plain):
        _set_norm(norm, file.floats(norm.num_features), file.floats(norm.num_features))
    for tensor in _others(plain).values():
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


# ---------------------------------------------------------------------------------------------------------------------
# The network that a file is put into


def _source(config: TrialConfig) -> dict[str, Any]:
    """What a network is built from: settings of method, model and data that are not the defaults."""
    tree, found = config.tree(), {}
    for part in ("method", "model", "data"):
        name = tree[part]["name"]
        usual = parse({"method": "float", "model": "lenet5", "data": "digits", part: name}).tree()[part]
        changed = {key: value for key, value in tree[part].items() if key not in usual or usual[key] != value}
        found[part] = {"name": name, **changed} if changed else name
    return found


def _rebuilt(network: Mapping[str, Any], *, prepared: bool) -> nn.Module:
    """The network of a configuration, `prepared` by its method or not; its weights come from elsewhere."""
    config = parse(network["config"])
    if config.model.settings.get("pretrained"):
        settings = {**config.model.settings, "pretrained": False}
        config = replace(config, model=replace(config.model, settings=settings))
    shape = tuple(network["input_shape"])
    model = build_model(config, network["classes"], shape, seed=0).eval()
    if not prepared:
        return model
    plugin = plugins.attribute("methods", config.method.name, "Method")
    table = trace(model, shape)
    bits = {row.name: LayerBits(weight=8, activation=8) for row in table.quantizable}
    plugin(plugin.Settings(**config.method.settings)).prepare(model, table, bits)
    return at_this_point(model)


def _like(twin: nn.Module, config: TrialConfig, network: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    """The plain network if it has the tensors of `twin`, else the one that the method prepares, which is then said."""
    for prepared in (False, True):
        plain = _rebuilt(network, prepared=prepared).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wanted, own = ({name: tuple(t.shape) for name, t in _outside(m).items()} for m in (plain, twin))
        strange = [name for name in {**own, **wanted} if own.get(name) != wanted.get(name)]
        if not strange:
            break
    if strange:
        raise ConfigError(
            f"{strange[0]}: this network is not the one that method {config.method.name!r} makes of model "
            f"{config.model.name!r} ({len(strange)} tensors differ), and a packed file rebuilds that one"
        )
    for name, tensor in _others(twin).items():
        if tensor.dtype != torch.float32:
            raise ConfigError(f"{name} is {tensor.dtype}: a packed file holds float32 beside the codes")
    return plain, prepared


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what belongs to quantizers themselves; what they read through does not."""
    quantizers = {name for name, module in model.named_modules() if isinstance(module, modules.Quantizer)}
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in quantizers}


def _multiplying(model: nn.Module) -> Iterator[str]:
    """Names of the layers that methods can quantize, in the order of definition."""
    return (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither weights or biases of quantized layers, nor in batch norms, nor of quantizers."""
    mine = {id(t) for _, layer in modules.quantized_layers(model) for t in (layer.weight, layer.bias) if t is not None}
    for norm in _norms(model):
        mine |= {id(tensor) for tensor in [*norm.parameters(), *norm.buffers()]}
    for module in model.modules():
        if isinstance(module, modules.Quantizer):
            mine |= {id(t) for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]}
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in mine}


def _set_norm(norm: _BatchNorm, scale: Tensor, shift: Tensor) -> None:
    """Let a batch norm multiply by `scale` and add `shift`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 0.0
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)


@torch.no_grad()
def _check(model: nn.Module, loaded: nn.Module, input_shape: Iterable[int]) -> None:
    twin = at_this_point(model)
    images = torch.randn(OWN_BATCH, *input_shape, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    difference = float((twin(images) - loaded(images)).abs().max())
    if difference != 0:
        raise ConfigError(
            f"the packed network's logits differ by up to {difference:g} from the trained one's; not written"
        )


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def _header_bytes(stored: int) -> int:
    """Bytes that safetensors puts before one tensor of so many bytes: a length, and JSON padded to words of 8 bytes."""
    told = json.dumps({TENSOR: {"dtype": "U8", "shape": [stored], "data_offsets": [0, stored]}}, separators=(",", ":"))
    return 8 + -(-len(told) // 8) * 8


def _row(
    name: str, layers: Mapping[str, Coded], names: list[str], encodings: packed_header.Encodings, plain: nn.Module
) -> dict[str, Any] | None:
    """One layer of the description; None where it is not quantized."""
    if name not in layers:
        return None
    layer = layers[name]
    row: dict[str, Any] = {"w": encodings.number(layer.weight or FLOAT_BITS)}
    if layer.reads is not None:
        row["r"] = encodings.number(_site(layer.reads))
        if layer.reads.shared is not None:
            row["as"] = names.index(layer.reads.shared)
    if layer.kept is not None:
        row["p"] = 1
    if layer.values.stride() != plain.get_submodule(name).weight.stride():  # type: ignore[operator]
        row["strides"] = list(layer.values.stride())
    return row


def _sites(sites: Mapping[str, Read], encodings: packed_header.Encodings) -> dict[str, int | str]:
    """Encodings of the quantizers outside of layers; a name stands for the quantizer that is there already."""
    return {name: encodings.number(_site(read)) if read.shared is None else read.shared for name, read in sites.items()}


def _site(read: Read) -> Encoding | int:
    return read.encoding or read.bits


def _floats(twin: nn.Module, layers: Mapping[str, Coded], sites: Mapping[str, Read]) -> Iterator[Tensor]:
    """All floats of a network in the order of the file."""
    for name, layer in layers.items():
        yield from packed_header.stored(layer.weight or FLOAT_BITS)
        if layer.reads is not None and layer.reads.shared is None:
            yield from packed_header.stored(_site(layer.reads))
        bias = twin.get_submodule(name).bias
        if isinstance(bias, Tensor):
            yield bias.detach()
    for read in sites.values():
        if read.shared is None:
            yield from packed_header.stored(_site(read))
    for norm in _norms(twin):
        yield from scale_and_shift(norm)
    yield from _others(twin).values()


def _codes(layer: Coded) -> Iterator[Tensor]:
    """The codes of a layer as bytes, or its floats, with the channels that are left before them."""
    kept = torch.ones(len(layer.values), dtype=torch.bool) if layer.kept is None else layer.kept
    if layer.kept is not None:
        yield pack(kept.to(torch.int32), 1)
    if layer.codes is None or layer.weight is None:
        yield layer.values[kept].flatten().view(torch.uint8)
    elif layer.weight.bits:
        yield pack(layer.codes[kept] - layer.weight.q_min, layer.weight.bits)


# ---------------------------------------------------------------------------------------------------------------------
# What is read


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
