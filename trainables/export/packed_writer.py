"""Writes packed files (`packed`): codes, floats and description of a trained network, read back before they count."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from trainables.build import data_shape
from trainables.config import TrialConfig
from trainables.cost import FLOAT_BITS, HEADER_BYTES
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.export import packed_header
from trainables.export.bit_packing import pack
from trainables.export.coded import Coded, Read, at_this_point, coded, scale_and_shift, standing
from trainables.export.packed_header import FORMAT, TENSOR
from trainables.export.packed_network import multiplying, norms, others, plain_like, source_of
from trainables.packed import load_packed

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
    network = {"config": source_of(config), "classes": classes, "input_shape": list(input_shape)}
    plain, prepared = plain_like(twin, config, network)
    names = list(multiplying(plain))
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
    for norm in norms(twin):
        yield from scale_and_shift(norm)
    yield from others(twin).values()


def _codes(layer: Coded) -> Iterator[Tensor]:
    """The codes of a layer as bytes, or its floats, with the channels that are left before them."""
    kept = torch.ones(len(layer.values), dtype=torch.bool) if layer.kept is None else layer.kept
    if layer.kept is not None:
        yield pack(kept.to(torch.int32), 1)
    if layer.codes is None or layer.weight is None:
        yield layer.values[kept].flatten().view(torch.uint8)
    elif layer.weight.bits:
        yield pack(layer.codes[kept] - layer.weight.q_min, layer.weight.bits)
