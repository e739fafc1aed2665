"""Layers whose weights carry a direction, so that a network can be differentiated twice along it at little cost.

See `curvature`, whose double-backward pass this is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.errors import ConfigError
from trainables.modes import in_mode

Variable = Literal["nudge", "weight"]
"""What a network is differentiated by."""


class Probed:
    """A layer whose weights are `weight + nudge * direction`, with the number `nudge` at 0.

    Args:
        layer: whose weights these are.
        variable: what to differentiate by.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, variable: Variable) -> None:
        self.layer = layer
        self.weight = layer.weight.detach().requires_grad_(variable == "weight")
        self.nudge = self.weight.new_zeros(()).requires_grad_(variable == "nudge")
        self.direction = torch.zeros_like(self.weight)
        self.turns = 0
        self.calls = 0

    def turn(self, direction: Tensor) -> None:
        """Take another direction."""
        self.direction = direction
        self.turns += 1

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`, in its own shapes."""
        self.calls += 1
        bias = self.layer.bias
        y = _Product.apply(x, self.weight, self.nudge, _Call(self))
        return y if bias is None else y + bias.detach().view(-1, *[1] * (2 * isinstance(self.layer, nn.Conv2d)))


class _Call:
    """One call of a layer: its product with weights, and with the current direction kept between two uses."""

    def __init__(self, probed: Probed) -> None:
        self.probed = probed
        self.turn = -1
        self.kept: Tensor | None = None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer makes of `x` without its bias."""
        layer = self.probed.layer
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, None)
        return functional.linear(x, weight)

    def along(self, x: Tensor) -> Tensor:
        """The product with the direction."""
        if self.kept is None or self.turn != self.probed.turns:
            self.kept, self.turn = self.product(x, self.probed.direction), self.probed.turns
        return self.kept

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, *, to_input: bool, to_weight: bool) -> list[Any]:
        """Gradients of the product for its input and its weights."""
        layer = self.probed.layer
        if isinstance(layer, nn.Linear):
            flat = g.flatten(0, -2)
            return [g @ weight if to_input else None, flat.T @ x.flatten(0, -2) if to_weight else None]
        return list(
            torch.ops.aten.convolution_backward(
                g, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups,
                [to_input, to_weight, False],
            )[:2]
        )  # fmt: skip


class _Product(torch.autograd.Function):
    """y = x * (w + e v) at e = 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, nudge: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x, weight, nudge)
        return call.product(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, nudge = ctx.saved_tensors
        to_input, to_weight, to_nudge, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            grad_x, grad_nudge = _ProductBackward.apply(g, x, weight, nudge, ctx.call, to_input)
            return grad_x if to_input else None, None, grad_nudge, None
        grad_x, grad_weight = ctx.call.backward(g, x, weight, to_input=to_input, to_weight=to_weight)
        return grad_x, grad_weight, _dot(g, ctx.call.along(x)) if to_nudge else None, None


class _ProductBackward(torch.autograd.Function):
    """From g = dL/dy: dL/dx = g * (w + e v)^T and dL/de = g . (x * v). The value of the second is nowhere used."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, nudge: Tensor, call: _Call, to_input: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.call, ctx.to_input = call, to_input
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        grad_x = call.backward(g, x, weight, to_input=True, to_weight=False)[0] if to_input else g.new_zeros(())
        return grad_x, torch.zeros_like(nudge)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h: Tensor | None, unit: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        call, probed = ctx.call, ctx.call.probed
        grad_g = grad_x = grad_nudge = None
        if unit is not None:  # 1: the sum of all first derivatives is differentiated
            grad_g = call.along(x)
        if h is not None:
            grad_g = call.product(h, weight) if grad_g is None else grad_g + call.product(h, weight)
        if ctx.to_input and probed.calls > 1:
            grad_x = call.backward(g, x, probed.direction, to_input=True, to_weight=False)[0]
            grad_nudge = None if h is None else _dot(h, grad_x)
        return grad_g, grad_x, None, grad_nudge, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


@contextmanager
def unquantized(model: nn.Module, names: Sequence[str] | None, variable: Variable) -> Iterator[dict[str, Probed]]:
    """The float network in evaluation mode, with probes in its layers, for as long as the context lasts."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if names is not None:
        unknown = sorted(set(names) - set(layers))
        if unknown:
            raise ConfigError(f"layers {unknown} are no convolutions or linear layers of the network: {list(layers)}")
    probed = {name: Probed(layer, variable) for name, layer in layers.items()}
    changed: list[nn.Module] = []
    try:
        for layer in probed.values():
            layer.layer.forward = layer.forward  # type: ignore[method-assign, assignment]
            changed.append(layer.layer)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.forward = _affine(module)  # type: ignore[method-assign, assignment]
                changed.append(module)
        with in_mode(model, training=False), torch.enable_grad():
            yield {name: layer for name, layer in probed.items() if names is None or name in names}
    finally:
        for module in changed:
            del module.forward


@torch.no_grad()
def _affine(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    """Batch norm in evaluation mode as a product and a sum, which differentiate twice at no cost."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    slope = torch.rsqrt(norm.running_var + norm.eps)
    slope = slope if norm.weight is None else slope * norm.weight
    shift = -norm.running_mean * slope
    shift = shift if norm.bias is None else shift + norm.bias
    return lambda x: x * _channels(slope, x) + _channels(shift, x)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.detach().view(1, -1, *[1] * (x.dim() - 2))
