"""How the parameters of a network lie in memory while it is trained: channels last, but for heavy convolutions.

Channels last is faster nearly everywhere: on one core max pooling takes an eighth of the time, batch norm 0.55 to 0.65
of it, convolutions on large maps mostly 0.6 to 0.95. Heavy convolutions (`heavy_convolution`) are the exception on a
CPU: alone they are 0.96 to 1.4 times as fast in torch's default layout, copies between the layouts included, and a step
of N2UQ's ResNet-18 (8 images of 64 x 64) takes 1.3 times a plain float step instead of 1.55.
"""

import torch
from torch import nn

from trainables.modules import QuantizedConv2d


def lay_out(model: nn.Module, device: torch.device) -> None:
    """Move a prepared network to `device`, and lay out its parameters for training, in place."""
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in model.modules():
        if isinstance(layer, QuantizedConv2d) and layer.heavy and device.type == "cpu":
            layer.weight.data = layer.weight.data.contiguous()


def forget_layout(layer: QuantizedConv2d) -> None:
    """Lay out the weights of one convolution as all others, in place."""
    if layer.heavy:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
