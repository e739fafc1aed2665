"""Pruned channels, removed for good from a network that is about to become an ONNX graph.

An output channel without weights makes the same number everywhere: its bias. Where nothing but layers that sum over the
channels read it, the layer goes without the channel, and its readers without the weights for it. What they made of the
number goes into their biases, unless they pad with zeros, which are another number at the edges: then only channels go
that are read as 0, such as those with a negative bias in front of a ReLU.

Channels that meet others in a residual sum stay, as weights of 0. One could go only if all branches of its stage had
pruned it, the layer in front of the stage among them, and methods prune each layer for itself; and a shortcut that pads
or strides over channels, as ResNet-20's, knows them by their numbers. Packed files store no weights of theirs.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainables.dataflow import Flow
from trainables.export.coded import Coded


@torch.no_grad()
def without_pruned(
    twin: nn.Module,
    layers: Mapping[str, Coded],
    factors: Mapping[str, Tensor],
    flows: Mapping[str, Flow],
    input_shape: tuple[int, ...],
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Remove channels from the ordinary layers of `twin`, in place.

    Args:
        twin: of ordinary layers, whose quantizers are in place.
        layers: codes of its layers.
        factors: of output channels, from folded norms.
        flows: where the layers stand.
        input_shape: (channels, height, width).

    Returns:
        layers and factors without those channels.
    """
    found, scales = dict(layers), dict(factors)
    pruned = [name for name, layer in layers.items() if layer.kept is not None and bool(layer.kept.any())]
    pruned = [name for name in pruned if name in flows and flows[name].removable]
    if not pruned:
        return found, scales
    reads = _read_values(twin, list(layers), input_shape)
    for name in pruned:
        readers = [reader for reader, flow in flows.items() if flow.producer == name]
        left = layers[name].kept
        assert left is not None
        for reader in readers:
            left = left | ~_can_go(twin.get_submodule(reader), reads[reader], len(left))
        if not readers or bool(left.all()):
            continue
        for reader in readers:
            _narrow_inputs(twin.get_submodule(reader), reader, left, reads[reader], found, scales)
        _narrow_outputs(twin.get_submodule(name), name, left, found, scales)
    return found, scales


def _read_values(twin: nn.Module, names: list[str], input_shape: tuple[int, ...]) -> dict[str, Tensor]:
    """What each layer reads, quantized: the number in each of its input channels, NaN where it is not the same."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            x = args[0].transpose(0, 1).flatten(1)
            constant = (x == x[:, :1]).all(1)
            found[name] = torch.where(constant, x[:, 0], torch.nan)

        hooks.append(twin.get_submodule(name).register_forward_hook(note))
    try:
        twin(torch.randn(4, *input_shape, generator=torch.Generator().manual_seed(0)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _can_go(reader: Any, values: Tensor, channels: int) -> Tensor:
    """Which channels of a producer a reader can do without; bool, (channels,)."""
    by_channel = values.view(channels, -1)
    padded = isinstance(reader, nn.Conv2d) and (isinstance(reader.padding, str) or any(reader.padding))
    return (by_channel == 0 if padded else ~by_channel.isnan()).all(1)


def _narrow_inputs(
    reader: Any, name: str, left: Tensor, values: Tensor, layers: dict[str, Coded], factors: Mapping[str, Tensor]
) -> None:
    """Take input channels from a layer; what it made of them goes into its bias."""
    layer = layers[name]
    inputs = left.repeat_interleave(layer.values.shape[1] // len(left))
    gone = layer.values[:, ~inputs]
    numbers = values[~inputs].view(1, -1, *[1] * (gone.dim() - 2))
    constant = (gone * numbers).flatten(1).sum(1) * factors.get(name, 1.0)
    if bool(constant.any()):
        reader.bias = nn.Parameter(constant if reader.bias is None else reader.bias + constant)
    codes = None if layer.codes is None else layer.codes[:, inputs]
    layers[name] = replace(layer, codes=codes, values=layer.values[:, inputs])
    reader.weight = nn.Parameter(reader.weight[:, inputs])
    _resize(reader)


def _narrow_outputs(maker: Any, name: str, left: Tensor, layers: dict[str, Coded], factors: dict[str, Tensor]) -> None:
    """Take output channels from a layer."""
    layer = layers[name]
    weight = layer.weight
    if weight is not None and weight.scale.dim():
        weight = replace(weight, scale=weight.scale[left])
    codes = None if layer.codes is None else layer.codes[left]
    layers[name] = replace(layer, codes=codes, weight=weight, values=layer.values[left])
    if name in factors:
        factors[name] = factors[name][left]
    maker.weight = nn.Parameter(maker.weight[left])
    if maker.bias is not None:
        maker.bias = nn.Parameter(maker.bias[left])
    _resize(maker)


def _resize(layer: Any) -> None:
    """Let a layer tell the shape of its weights."""
    names = ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
    for name, size in zip(names, layer.weight.shape[:2], strict=True):
        setattr(layer, name, size)
