"""Batch norm over the batches of all ranks: a step of two ranks with half the batch each is that of one with all of it.

`torch.nn.SyncBatchNorm` does the same on GPUs only. Here it is a function, `batch_norm`, that every batch norm of ours
calls in place of torch's, and `share` makes the plain ones of a network call it, too. With one rank it is torch's own.
Statistics and their gradients each take one all-reduce of two numbers a channel. Gradient accumulation shares nothing:
the statistics of each part are its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import world


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """As `functional.batch_norm`; while training over all ranks."""
    if training and world.size() > 1:
        assert weight is not None
        assert bias is not None
        y: Tensor = _over_ranks(x, running_mean, running_var, weight, bias, momentum, eps)
        return y
    return functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def share(model: nn.Module) -> None:
    """Let the plain batch norms of `model` take their statistics over all ranks, in place; nothing with one rank."""
    for module in model.modules():
        if world.size() > 1 and type(module) in SHARED and module.affine:  # type: ignore[union-attr]
            module.__class__ = SHARED[type(module)]


class _Shared(_BatchNorm):
    """A plain batch norm that calls our `batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a cumulative average
                momentum = 1 / float(self.num_batches_tracked)
        training = self.training or self.running_mean is None
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, momentum, self.eps)


class _Shared1d(_Shared, nn.BatchNorm1d):
    pass


class _Shared2d(_Shared, nn.BatchNorm2d):
    pass


SHARED: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm1d: _Shared1d, nn.BatchNorm2d: _Shared2d}


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (not corrected) of each channel over all ranks, differentiable, and its number of elements."""
    over = [dim for dim in range(x.dim()) if dim != 1]
    variance, mean = torch.var_mean(x, over, correction=0)
    counts = torch.full_like(mean, x.numel() // x.shape[1])
    if world.size() == 1:
        return mean, variance, counts
    rows = torch.stack([mean, variance + mean.square(), torch.ones_like(mean)]) * counts
    first, second, counts = world.differentiable_total(rows)
    mean = first / counts
    return mean, (second / counts - mean.square()).clamp_min(0), counts.detach()


class _SharedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        ctx.shape = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        wide = x.to(weight.dtype)
        mean, spread, ctx.counts = moments(wide)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(spread * (ctx.counts / (ctx.counts - 1).clamp_min(1)), momentum)
        inverse = torch.rsqrt(spread + eps)
        normal = (wide - mean.view(ctx.shape)) * inverse.view(ctx.shape)
        ctx.save_for_backward(normal, weight, inverse)
        return (normal * weight.view(ctx.shape) + bias.view(ctx.shape)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        normal, weight, inverse = ctx.saved_tensors
        over = [dim for dim in range(g.dim()) if dim != 1]
        wide = g.to(weight.dtype)
        grad_weight, grad_bias = (wide * normal).sum(over), wide.sum(over)
        along, level = (row.view(ctx.shape) for row in world.total(torch.stack([grad_weight, grad_bias])) / ctx.counts)
        grad = (wide - level - normal * along) * (weight * inverse).view(ctx.shape)
        return grad.to(g.dtype), None, None, grad_weight, grad_bias, None, None


@torch.compiler.disable
def _over_ranks(*arguments: Any) -> Tensor:
    normalised: Tensor = _SharedNorm.apply(*arguments)
    return normalised
