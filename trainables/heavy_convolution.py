"""Convolutions that have more weights than they have work: many weights, on small maps, in small batches.

There the time goes into bringing weights and their gradients into the blocked layouts of the library below (oneDNN),
which it does fastest from torch's default layout. With few positions the gradient of the weights is a product of two
slim matrices, which needs no such layout at all.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from trainables.cost import Layer

SMALL_MAP = 16
"""Output pixels of a map, 4 x 4, from which down .."""
MANY_WEIGHTS = 1 << 18
""".. a convolution with so many weights is heavy, unless its kernel is a point."""
FEW_POSITIONS = 32
"""Output pixels of all images of a batch, up to which the product is faster."""


def is_heavy(row: Layer, layer: nn.Conv2d) -> bool:
    """Whether `convolve` is mostly faster on one core of a CPU, measured with batches of 8, 32 and 128.

    Args:
        row: of the layer table.
        layer: the convolution.
    """
    return layer.kernel_size != (1, 1) and row.weights >= MANY_WEIGHTS and row.macs <= row.weights * SMALL_MAP


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` makes of `x` with `weight` and `bias`, computed in torch's default layout.

    Args:
        layer: names stride, padding, dilation, groups.
        x: (batch, inputs, height, width).
        weight: (outputs, inputs / groups, height, width), best in the default layout.
        bias: (outputs,) or None.

    Returns:
        (batch, outputs, height, width), laid out as x.
    """
    around = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    x, weight = x.contiguous(), weight.contiguous()
    if _by_product(layer, x):
        made = _Convolution.apply(x, weight, layer.stride, layer.padding, layer.dilation)
        made = made if bias is None else made + bias.view(-1, 1, 1)
    else:
        made = nn.Conv2d._conv_forward(layer, x, weight, bias)
    return made.contiguous(memory_format=around)


def _by_product(layer: nn.Conv2d, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if layer.groups != 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return False
    positions = len(x)
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        positions *= (x.shape[2 + axis] + 2 * layer.padding[axis] - reach - 1) // layer.stride[axis] + 1
    return positions <= FEW_POSITIONS


class _Convolution(torch.autograd.Function):
    """`functional.conv2d`, whose gradient for the weights is one matrix product over all positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *places: Any) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight, None, *places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.places
        g = g.contiguous()
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (ctx.needs_input_grad[0], False, False)
        )
        read = functional.unfold(x, weight.shape[2:], dilation, padding, stride)  # (batch, inputs * kernel, positions)
        read, g = (by_row.transpose(0, 1).flatten(1) for by_row in (read, g.flatten(2)))
        return grad_x, (g @ read.T).view_as(weight), None, None, None
