"""Hessian and Fisher traces of every layer of a network, estimated with random signs.

**Hessian, signs in the weights** (Hutchinson's estimator): with random signs v in all weights at once, the mean of
`v_l . (H v)_l` is the trace of layer l's block (Dong et al. 2020, HAWQ-V2, arXiv:1911.03852). One pass over the doubly
differentiated graph gives all layers. That pass is written out in `probed_layers` instead of left to autograd. Give
each layer the weights `w_l + e_l v_l` with a number `e_l` at 0: then `v_l . (H v)_l` is the derivative by `e_l` of the
sum of all first derivatives by the `e`. It has terms in which the product of a layer's gradient with v_l meets the
signs of layers before it: blocks off the diagonal, whose mean is zero. Left out, they take a quarter of the work and
most of the noise with them; only a layer that runs more than once needs them. Three convolutions a layer remain;
autograd takes six for `H v`, two of them with kernels as large as the image.

**Hessian, signs in the outputs**: where the logits are piecewise linear in the weights of each single layer (ReLU,
max-pooling, batch norm in evaluation mode, each layer run once), the block of layer l is `J^T A A^T J` without a rest,
with J the derivative of the logits and A A^T the second derivative of the cross-entropy by them, which is known. Its
trace is then the mean of `|J^T A s|^2` over random signs s: a plain backward pass a probe, two convolutions a layer.
There are as many signs as logits instead of as weights, and what a probe scatters by is off the diagonal of that
smaller matrix: fewer probes say as much. `linear_by_layer` tells from the graph whether a network is of this kind.

**Fisher**, the empirical one (`sum_n |grad loss_n|^2 / n`): with random signs z, the gradient of `sum_n z_n loss_n` has
that squared norm on average, so one plain backward pass a probe gives all layers.

The network stays in evaluation mode, batch norm with its running statistics, and unquantized: a quantized layer is
measured by its float weights. Weights count, biases and batch norm do not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.errors import ConfigError
from trainables.probed_layers import Probed, Variable, unquantized

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
    signs_in: Literal["auto", "outputs", "weights"] = "auto",
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
        signs_in: what the random signs multiply; `auto` takes the outputs of a network that is `linear_by_layer`, the
            weights of any other, whose traces the signs in the outputs would miss a part of.

    Raises:
        ConfigError: an unknown layer, one that never runs, no batch, or signs in the outputs of another network.
    """
    batches = list(batches)
    suited = signs_in != "weights" and bool(batches) and linear_by_layer(model, batches[0][0][:1])
    if signs_in == "outputs" and batches and not suited:
        raise ConfigError("signs_in = outputs: the network is not linear_by_layer; give weights")
    if suited:
        return _estimated(model, batches, layers, probes, tolerance, partial(_squared, model, generator), "weight")
    return _estimated(model, batches, layers, probes, tolerance, partial(_doubled, model, generator), "nudge")


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
    return _estimated(model, batches, layers, probes, tolerance, partial(_mixed, model, generator), "weight")


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

Probe = Callable[[list[Probed]], list[Tensor]]


def _estimated(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[str] | None,
    probes: int,
    tolerance: float,
    prepared: Callable[[Tensor, Tensor], Probe],
    variable: Variable,
) -> Traces:
    """Repeat probes of each batch until the stop rule or their number ends them, and pool the batches."""
    parts = []
    for images, labels in batches:
        with unquantized(model, layers, variable) as probed:
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


def _doubled(model: nn.Module, generator: torch.Generator | None, images: Tensor, labels: Tensor) -> Probe:
    """Probes of the Hessian with signs in the weights; the first and second derivatives share one graph."""
    loss = functional.cross_entropy(model(images), labels)
    first: list[Tensor] = []

    def probe(layers: list[Probed]) -> list[Tensor]:
        nudges = [layer.nudge for layer in layers]
        if not first:
            first.append(torch.stack(torch.autograd.grad(loss, nudges, create_graph=True)).sum())
        for layer in layers:
            layer.turn(signs_like(layer.weight, generator))
        return list(torch.autograd.grad(first[0], nudges, retain_graph=True))

    return probe


def _squared(model: nn.Module, generator: torch.Generator | None, images: Tensor, labels: Tensor) -> Probe:
    """Probes of the Hessian with signs s in the outputs: squared norms of `J^T A s`, A = diag(sqrt p) - p sqrt(p)^T."""
    logits = model(images)
    share = logits.detach().softmax(dim=-1)

    def probe(layers: list[Probed]) -> list[Tensor]:
        turned = share.sqrt() * signs_like(share, generator)
        mixed = turned - share * turned.sum(dim=-1, keepdim=True)
        gradients = torch.autograd.grad(logits, [layer.weight for layer in layers], mixed, retain_graph=True)
        return [gradient.square().sum() / len(logits) for gradient in gradients]

    return probe


def _mixed(model: nn.Module, generator: torch.Generator | None, images: Tensor, labels: Tensor) -> Probe:
    """Probes of the Fisher information: squared norms of gradients with random signs."""
    losses = functional.cross_entropy(model(images), labels, reduction="none")

    def probe(layers: list[Probed]) -> list[Tensor]:
        mixed = (losses * signs_like(losses, generator)).sum()
        gradients = torch.autograd.grad(mixed, [layer.weight for layer in layers], retain_graph=True)
        return [gradient.square().sum() / len(losses) for gradient in gradients]

    return probe


def signs_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random -1 and 1 in the shape, type, layout and place of `x`; drawn on the CPU."""
    bits = torch.empty(x.shape, dtype=torch.float32).random_(0, 2, generator=generator)
    return torch.empty_like(x, requires_grad=False).copy_(bits.mul_(2).sub_(1))


# ---------------------------------------------------------------------------------------------------------------------
# Which networks are linear

SUMS = {"Add", "Sub", "Rsub", "Cat", "Stack"}
PIECES = {
    "Mul", "Div", "Neg", "Relu", "LeakyRelu", "PreluKernel", "Threshold", "Hardtanh", "Clamp", "MaxPool2DWithIndices",
    "AvgPool2D", "AdaptiveAvgPool2D", "Mean", "Sum", "View", "UnsafeView", "ReshapeAlias", "Clone", "Permute",
    "Transpose", "T", "Slice", "Select", "Squeeze", "Unsqueeze", "Expand", "ConstantPadNd", "Index", "ToCopy",
}  # fmt: skip
"""Nodes of autograd's graph that are piecewise linear in the one input that depends on a layer's weights."""


def linear_by_layer(model: nn.Module, images: Tensor) -> bool:
    """Whether the logits are piecewise linear in the weights of each convolution and linear layer alone.

    Args:
        model: from images to logits; left as it is.
        images: a batch, of one image or more; the graph of its pass is read.
    """
    with unquantized(model, None, "weight") as probed:
        logits = model(images)
        return all(layer.calls <= 1 for layer in probed.values()) and _linear(logits.grad_fn, {})


def _linear(node: Any, depends: dict[Any, bool]) -> bool:
    """Whether the graph under `node` holds layers, and only what is piecewise linear after each."""
    linear = True
    stack = [(node, False)]
    while stack:
        node, seen = stack.pop()
        before = [parent for parent, _ in node.next_functions if parent is not None]
        if not seen:
            stack.append((node, True))
            stack.extend((parent, False) for parent in before if parent not in depends)
            continue
        name, moving = node.name().partition("Backward")[0], [depends[parent] for parent in before]
        depends[node] = name == "_Product" or any(moving)
        single = name in PIECES and sum(moving) == 1 and (name != "Div" or len(moving) == 1)
        linear &= name == "_Product" or name in SUMS or not any(moving) or single
    return linear and any(depends.values())
