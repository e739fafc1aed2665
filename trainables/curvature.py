"""Hessian and Fisher traces of every layer of a network, estimated with random signs.

**Hessian** by Hutchinson's estimator: with random signs v in all weights at once, the mean of `v_l . (H v)_l` is the
trace of layer l's block (Dong et al. 2020, HAWQ-V2, arXiv:1911.03852). One pass over the doubly differentiated graph
gives all layers. That pass is written out here instead of left to autograd. Give each layer the weights `w_l + e_l v_l`
with a number `e_l` at 0: then `v_l . (H v)_l` is the derivative by `e_l` of the sum of all first derivatives by the
`e`. It has terms in which the product of a layer's gradient with v_l meets the signs of layers before it: blocks off
the diagonal, whose mean is zero. Left out, they take a quarter of the work and most of the noise with them; only a
layer that runs more than once needs them. Three convolutions a layer remain; autograd takes six for `H v`, two of
them with kernels as large as the image.

**Fisher**, the empirical one (`sum_n |grad loss_n|^2 / n`): with random signs z, the gradient of `sum_n z_n loss_n` has
that squared norm on average, so one plain backward pass a probe gives all layers.

The network stays in evaluation mode, batch norm with its running statistics, and unquantized: a quantized layer is
measured by its float weights. Weights count, biases and batch norm do not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables.errors import ConfigError

Batch = tuple[Tensor, Tensor]
FEWEST_PROBES = 3
"""Error bars from fewer say nothing, so the stop rule waits for these."""


@dataclass(frozen=True, kw_only=True)
class Traces:
    """Estimated traces of all layers.

    Attributes:
        layers: their names.
        weights: number of weights of each layer.
        values: float64, (probes, layers); each row is an unbiased estimate of all traces.
    """

    layers: tuple[str, ...]
    weights: tuple[int, ...]
    values: Tensor

    @property
    def mean(self) -> Tensor:
        """The traces, (layers,)."""
        return self.values.mean(dim=0)

    @property
    def error(self) -> Tensor:
        """Standard error of each trace, (layers,); infinite after a single probe."""
        if len(self.values) < 2:
            return torch.full_like(self.values[0], math.inf)
        return self.values.std(dim=0) / math.sqrt(len(self.values))

    @property
    def average(self) -> dict[str, float]:
        """Trace over number of weights, by layer: the mean curvature, which HAWQ-V2 and HASB compare layers by."""
        return dict(zip(self.layers, (self.mean / torch.tensor(self.weights)).tolist(), strict=True))

    @property
    def average_error(self) -> dict[str, float]:
        """Standard error of `average`."""
        return dict(zip(self.layers, (self.error / torch.tensor(self.weights)).tolist(), strict=True))

    def settled(self, tolerance: float) -> bool:
        """Whether every layer's error is within `tolerance` of its trace, or of the mean trace if that is larger."""
        if len(self.values) < FEWEST_PROBES:
            return False
        size = self.mean.abs()
        return bool((self.error <= tolerance * size.clamp_min(float(size.mean()))).all())


def pooled(parts: Sequence[Traces]) -> Traces:
    """One estimate from several of the same network, such as of different batches on different machines.

    Raises:
        ValueError: nothing to pool, or parts with other layers.
    """
    if not parts or any(part.layers != parts[0].layers or part.weights != parts[0].weights for part in parts):
        raise ValueError("traces of one network are needed: give one part or more, all with the same layers")
    return Traces(layers=parts[0].layers, weights=parts[0].weights, values=torch.cat([part.values for part in parts]))


def hessian_traces(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: Sequence[str] | None = None,
    probes: int = 50,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Traces:
    """Traces of the diagonal blocks of the Hessian of the mean cross-entropy.

    Each batch gets its own probes, so error bars hold the spread of both. The pass over a batch keeps its activations.

    Args:
        model: from images to logits; left as it is.
        batches: (images, labels), best of equal sizes. About 1000 training images in all are usual.
        layers: names of convolutions and linear layers; None takes all that run.
        probes: random vectors for each batch, >= 1.
        tolerance: stop before when every layer's error is this share of its trace; 0 never stops.
        generator: of the random signs, on the CPU; None takes the global one.

    Raises:
        ConfigError: an unknown layer, one that never runs, or no batch.
    """
    return _estimated(
        model, batches, layers, probes, tolerance, lambda x, y: _curvatures(model, x, y, generator), "nudge"
    )


def fisher_traces(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    layers: Sequence[str] | None = None,
    probes: int = 10,
    tolerance: float = 0.0,
    generator: torch.Generator | None = None,
) -> Traces:
    """Traces of the diagonal blocks of the empirical Fisher information; never negative, arguments as above."""
    return _estimated(
        model, batches, layers, probes, tolerance, lambda x, y: _squared(model, x, y, generator), "weight"
    )


def hutchinson(loss: Tensor, parameters: Sequence[Tensor], probes: Iterable[Sequence[Tensor]]) -> Iterator[Tensor]:
    """`v_l . (H v)_l` of any twice differentiable loss, (parameters,) float64 for each probe; by autograd alone.

    Args:
        loss: with a graph; shape ().
        parameters: what it depends on, any shapes.
        probes: vectors, each a tensor for each parameter.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    for probe in probes:
        product = torch.autograd.grad(gradients, parameters, probe, retain_graph=True, materialize_grads=True)
        yield torch.stack([(v * hv).sum().double() for v, hv in zip(probe, product, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# Probing a network

Probe = Callable[["list[_Probed]"], list[Tensor]]


def _estimated(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[str] | None,
    probes: int,
    tolerance: float,
    prepared: Callable[[Tensor, Tensor], Probe],
    variable: str,
) -> Traces:
    """Repeat probes of each batch until the stop rule or their number ends them, and pool the batches."""
    parts = []
    for images, labels in batches:
        with _unquantized(model, layers, variable) as probed:
            probe = prepared(images, labels)
            used = {name: layer for name, layer in probed.items() if layer.calls}
            if set(layers or ()) - set(used):
                raise ConfigError(f"layers {sorted(set(layers or ()) - set(used))} do not run: leave them out")
            rows: list[Tensor] = []
            part = None
            while len(rows) < probes and not (part is not None and part.settled(tolerance)):
                rows.append(torch.stack(probe(list(used.values()))).double().cpu())
                part = Traces(
                    layers=tuple(used),
                    weights=tuple(layer.weight.numel() for layer in used.values()),
                    values=torch.stack(rows),
                )
        if part is None:
            raise ConfigError(f"probes = {probes}: give 1 or more")
        parts.append(part)
    if not parts:
        raise ConfigError("no batch of images to measure sensitivities on: give one or more")
    return pooled(parts)


def _curvatures(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None) -> Probe:
    """Probes of the Hessian; the first and second derivatives share one graph."""
    loss = functional.cross_entropy(model(images), labels)
    first: list[Tensor] = []

    def probe(layers: list[_Probed]) -> list[Tensor]:
        nudges = [layer.nudge for layer in layers]
        if not first:
            first.append(torch.stack(torch.autograd.grad(loss, nudges, create_graph=True)).sum())
        for layer in layers:
            layer.turn(signs_like(layer.weight, generator))
        return list(torch.autograd.grad(first[0], nudges, retain_graph=True))

    return probe


def _squared(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None) -> Probe:
    """Probes of the Fisher information: squared norms of gradients with random signs."""
    losses = functional.cross_entropy(model(images), labels, reduction="none")

    def probe(layers: list[_Probed]) -> list[Tensor]:
        mixed = (losses * signs_like(losses, generator)).sum()
        gradients = torch.autograd.grad(mixed, [layer.weight for layer in layers], retain_graph=True)
        return [gradient.square().sum() / len(losses) for gradient in gradients]

    return probe


def signs_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random -1 and 1 in the shape, type, layout and place of `x`; drawn on the CPU."""
    bits = torch.empty(x.shape, dtype=torch.float32).random_(0, 2, generator=generator)
    return torch.empty_like(x, requires_grad=False).copy_(bits.mul_(2).sub_(1))


class _Probed:
    """A layer whose weights are `weight + nudge * direction`, with the number `nudge` at 0.

    Args:
        layer: whose weights these are.
        variable: what to differentiate by: `nudge` or `weight`.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, variable: str) -> None:
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
        self.calls += 1
        bias = self.layer.bias
        y = _Product.apply(x, self.weight, self.nudge, _Call(self))
        return y if bias is None else y + bias.detach().view(-1, *[1] * (2 * isinstance(self.layer, nn.Conv2d)))


class _Call:
    """One call of a layer: its product with weights, and with the current direction kept between two uses."""

    def __init__(self, probed: _Probed) -> None:
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
def _unquantized(model: nn.Module, names: Sequence[str] | None, variable: str) -> Iterator[dict[str, _Probed]]:
    """The float network in evaluation mode, with probes in its layers, for as long as the context lasts."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    if names is not None:
        unknown = sorted(set(names) - set(layers))
        if unknown:
            raise ConfigError(f"layers {unknown} are no convolutions or linear layers of the network: {list(layers)}")
    probed = {name: _Probed(layer, variable) for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    changed: list[nn.Module] = []
    try:
        for layer in probed.values():
            layer.layer.forward = layer.forward  # type: ignore[method-assign, assignment]
            changed.append(layer.layer)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.forward = _affine(module)  # type: ignore[method-assign, assignment]
                changed.append(module)
        with torch.enable_grad():
            yield {name: layer for name, layer in probed.items() if names is None or name in names}
    finally:
        for module in changed:
            del module.forward
        for module, training in modes:
            module.training = training


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
