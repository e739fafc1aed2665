"""How the parameters of a network lie in memory while it is trained: channels last, but for heavy convolutions.

Channels last is faster nearly everywhere: on one core max pooling takes an eighth of the time, batch norm half, a
convolution on large maps 0.6 to 0.9. Heavy convolutions (`heavy_convolution`) are the exception on a CPU: in torch's
default layout they are 1.05 to 1.4 times as fast, copies between the layouts included.
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
