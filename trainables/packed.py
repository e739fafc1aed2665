"""Packed files: a trained network in as many bytes as its codes need, readable without anybody's classes.

A safetensors file with two tensors. `codes` holds the weights of every quantized layer, each code in exactly its width,
the lowest bit first, a layer starting on a byte. `floats` holds all else: scales (those that are all 1 are left out),
biases, a scale and a shift for each channel of batch norm, other parameters. The JSON header names the configuration,
from which the plain network is rebuilt, and each layer's encodings. Beside the header the file has the bytes that
`cost.size_bytes` counts.

What is loaded gives the same logits as the trained network in evaluation mode, bit for bit, on a CPU in channels-last
layout: weights are decoded in the order in which the quantizers compute (`encoding`), and a batch norm with mean 0,
variance 1 and epsilon 0 multiplies and adds what torch makes of its statistics. Folding the norm into the weights would
not be exact. Every file is read back and compared before it is handed over.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import checkpoint, modules
from trainables.bit_packing import pack, packed_bytes, unpack
from trainables.build import build_model, data_shape
from trainables.coded import Coded, Decoded, Rounded, at_this_point, coded, scale_and_shift
from trainables.config import TrialConfig, parse
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.errors import ConfigError

FORMAT = "raysearch packed 1"


def save_packed(path: Path, model: nn.Module, config: TrialConfig, /, **facts: Any) -> int:
    """Write `model` as it stands (at the operating point that is active) to a packed file, in one atomic step.

    Args:
        path: file to write.
        model: trained, with quantized layers; it is left as it is.
        config: what it was built from.
        facts: anything JSON can hold, for the header.

    Returns:
        bytes of the header, which come on top of those that `cost.size_bytes` counts.

    Raises:
        ConfigError: something in the network that the file cannot hold, or that does not come back bit by bit.
    """
    twin = at_this_point(model)
    layers = coded(twin)
    classes, input_shape = data_shape(config)
    plain = _rebuilt(config.tree(), classes, input_shape).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _compare(plain, twin, config)
    encodings: list[dict[str, Any]] = []
    table: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        table[name] = [_number(layer.weight, encodings), _number(layer.reads, encodings)]
        if layer.strides != plain.get_submodule(name).weight.stride():  # type: ignore
            table[name].append(list(layer.strides))
    state = {
        "format": FORMAT,
        "config": config.tree(),
        "classes": classes,
        "input_shape": list(input_shape),
        "encodings": encodings,
        "layers": table,
        "facts": facts,
    }
    codes = [
        pack(layer.codes - w.q_min, w.bits)
        for layer in layers.values()
        if (w := layer.weight) and layer.codes is not None
    ]
    floats = [tensor.float().flatten() for tensor in _floats(twin, layers)]
    tensors = {"codes": torch.cat([torch.zeros(0, dtype=torch.uint8), *codes]), "floats": torch.cat(floats)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"state": json.dumps(state, separators=(",", ":"))})
        _check(twin, load_packed(temporary), input_shape)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size - sum(tensor.nbytes for tensor in tensors.values())


def load_packed(path: Path) -> nn.Module:
    """The network of a packed file, in evaluation mode and channels-last layout; its widths are `read_bits` of it.

    Raises:
        ConfigError: the file is missing, torn, of another format, or of a model that is built otherwise now.
    """
    tensors, state = checkpoint.read(path)
    if state.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is no packed file of this version: its format is {state.get('format')!r}, not {FORMAT!r}"
        )
    plain = _rebuilt(state["config"], state["classes"], tuple(state["input_shape"]))
    codes, floats = _Reader(path, tensors["codes"]), _Reader(path, tensors["floats"])
    for name, (weight, reads, *_) in state["layers"].items():
        layer = _layer(path, plain, name)
        encoded = None if weight is None else _encoding(state["encodings"][weight], floats)
        read = None if reads is None else _encoding(state["encodings"][reads], floats)
        if encoded is None:
            layer.weight.data = floats.take(layer.weight.numel()).view_as(layer.weight)
        else:
            count = layer.weight.numel()
            whole = unpack(codes.take(packed_bytes(count, encoded.bits)), encoded.bits, count) + encoded.q_min
            layer.weight.data = encoded.decode(whole.float().view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.data = floats.take(layer.bias.numel())
        row = Layer(name=name, kind="", macs=0, weights=0, biases=0, channels=0)
        reader = None if read is None else Rounded(read)
        modules.replace(plain, row, _Float() if encoded is None else Decoded(encoded), reader)
    for norm in _norms(plain):
        _set_norm(norm, floats.take(norm.num_features), floats.take(norm.num_features))
    for tensor in _others(plain).values():
        tensor.copy_(floats.take(tensor.numel()).view_as(tensor))
    codes.end()
    floats.end()
    plain.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, (_, _, *strides) in state["layers"].items():
        if strides:
            weights = plain.get_submodule(name).weight
            weights.data = torch.empty_strided(weights.shape, strides[0]).copy_(weights)  # type: ignore
    return plain


class _Float(modules.Quantizer):
    """Weights that were not quantized."""

    def __init__(self) -> None:
        super().__init__(2, signed=True)
        self.q_min.fill_(-(2.0**31))
        self.q_max.fill_(2.0**31)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def encoding(self, x: Tensor | None = None) -> None:
        return None


class _Reader:
    """Takes a flat tensor to pieces, from its beginning to its end."""

    def __init__(self, path: Path, tensor: Tensor) -> None:
        self.path, self.tensor, self.place = path, tensor, 0

    def take(self, count: int) -> Tensor:
        self.place += count
        if self.place > len(self.tensor):
            self._refuse("less")
        return self.tensor[self.place - count : self.place].clone()

    def end(self) -> None:
        if self.place < len(self.tensor):
            self._refuse("more")

    def _refuse(self, how: str) -> None:
        raise ConfigError(f"packed file {self.path} holds {how} than its model needs: the model is built otherwise now")


def _rebuilt(tree: Mapping[str, Any], classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """The plain network of a configuration; its weights come from elsewhere."""
    config = parse(tree)
    if config.model.settings.get("pretrained"):
        settings = {**config.model.settings, "pretrained": False}
        config = replace(config, model=replace(config.model, settings=settings))
    return build_model(config, classes, input_shape, seed=0).eval()


def _layer(path: Path, model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.Conv2d | nn.Linear):
        raise ConfigError(f"packed file {path} has a layer {name}, which its model does not have")
    return found


def _compare(plain: nn.Module, twin: nn.Module, config: TrialConfig) -> None:
    """Refuse a network that is more than the plain one with quantizers."""
    quantizers = [name for name, module in twin.named_modules() if isinstance(module, modules.Quantizer)]
    own = {name: t for name, t in twin.state_dict().items() if not name.startswith(tuple(f"{q}." for q in quantizers))}
    wanted = plain.state_dict()
    strange = [name for name in own if name not in wanted or wanted[name].shape != own[name].shape]
    strange += [name for name in wanted if name not in own]
    if strange:
        raise ConfigError(
            f"{strange[0]}: method {config.method.name!r} changes model {config.model.name!r} beyond its quantizers "
            f"({len(strange)} tensors), and a packed file rebuilds the plain network; export to .onnx or .pt2 instead"
        )
    for name, tensor in _others(twin).items():
        if tensor.dtype != torch.float32:
            raise ConfigError(f"{name} is {tensor.dtype}: a packed file holds float32 beside the codes")


def _floats(twin: nn.Module, layers: Mapping[str, Coded]) -> Iterator[Tensor]:
    """All floats of a network in the order of the file."""
    for name, layer in modules.quantized_layers(twin):
        for encoding in (layers[name].weight, layers[name].reads):
            if encoding is not None and _stored(encoding):
                yield encoding.scale
        if layers[name].weight is None:
            yield layer.weight.detach()
        if layer.bias is not None:
            yield layer.bias.detach()
    for norm in _norms(twin):
        yield from scale_and_shift(norm)
    yield from _others(twin).values()


def _stored(encoding: Encoding) -> int:
    """Scales that the file holds: none if all are 1."""
    return 0 if bool((encoding.scale == 1).all()) else encoding.scale.numel()


def _number(encoding: Encoding | None, known: list[dict[str, Any]]) -> int | None:
    """Number of an encoding in the header's list, to which it is added if it is new."""
    if encoding is None:
        return None
    row = {
        **asdict(replace(encoding, scale=torch.empty(0))),
        "scale": list(encoding.scale.shape),
        "stored": _stored(encoding),
    }
    if row not in known:
        known.append(row)
    return known.index(row)


def _encoding(row: Mapping[str, Any], floats: _Reader) -> Encoding:
    fields = {name: value for name, value in row.items() if name != "stored"}
    count = math.prod(row["scale"])
    scale = floats.take(count) if row["stored"] else torch.ones(count)
    return Encoding(**{**fields, "scale": scale.view(row["scale"])})


def _set_norm(norm: _BatchNorm, scale: Tensor, shift: Tensor) -> None:
    """Let a batch norm multiply by `scale` and add `shift`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 0.0
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)


@torch.no_grad()
def _check(twin: nn.Module, loaded: nn.Module, input_shape: Iterable[int]) -> None:
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    difference = float((twin(images) - loaded(images)).abs().max())
    if difference != 0:
        raise ConfigError(
            f"the packed network's logits differ by up to {difference:g} from the trained one's; not written"
        )


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither weights or biases of quantized layers, nor in quantizers or batch norms."""
    mine = {id(t) for _, layer in modules.quantized_layers(model) for t in (layer.weight, layer.bias) if t is not None}
    for module in model.modules():
        if isinstance(module, modules.Quantizer | _BatchNorm):
            mine |= {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in mine}


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))
