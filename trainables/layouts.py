"""How the tensors of a network lie in memory while it is trained: channels last, but for some convolutions on a CPU.

Channels last is faster nearly everywhere: on one core max pooling takes an eighth of the time, batch norm half, a
convolution on large maps 0.6 to 0.9. Where many weights meet a small map, the time goes into moving the weights, and
there the convolutions of a CPU run faster on torch's default layout: 1.05 to 1.4 times, copies included, from 256
channels on maps of 4 x 4 pixels on; on larger maps they are slower.
"""

import torch
from torch import nn

from trainables.cost import Layer, LayerTable
from trainables.modules import QuantizedConv2d, quantized_layers

SMALL_MAP = 16
"""Output pixels of a map, 4 x 4, from which down .."""
MANY_WEIGHTS = 1 << 18
""".. a convolution with so many weights keeps them in torch's default layout."""


def lay_out(model: nn.Module, table: LayerTable, device: torch.device) -> None:
    """Move a prepared network to `device`, and lay out its parameters for training, in place.

    Args:
        model: with quantized layers, which take care of the layout of what they read.
        table: its layers.
        device: where it will be trained.
    """
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type != "cpu":
        return
    rows = {row.name: row for row in table.layers}
    for name, layer in quantized_layers(model):
        if isinstance(layer, QuantizedConv2d) and _is_heavy(rows[name], layer):
            layer.default_layout = True
            layer.weight.data = layer.weight.data.contiguous()


def forget_layout(layer: QuantizedConv2d) -> None:
    """Lay out the weights of one convolution as all others, in place."""
    if layer.default_layout:
        layer.default_layout = False
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _is_heavy(row: Layer, layer: nn.Conv2d) -> bool:
    return layer.kernel_size != (1, 1) and row.weights >= MANY_WEIGHTS and row.macs <= row.weights * SMALL_MAP
