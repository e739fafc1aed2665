"""The ranks of one training: who am I, and sums over all. One process alone is a world of size 1.

Gradients are averaged in one flat all-reduce after the last backward pass of a step, which serves every method, also
those with several losses a step; nothing is registered on the model, so nothing outlives a trial.

A forward pass sees a share of the step's batch: one over the number of ranks, less when gradients are accumulated, more
or less when the batch cannot be shared evenly. What depends on the size of the whole batch asks `share`.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_share: float | None = None


def size() -> int:
    """Number of ranks of this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0..size-1."""
    return dist.get_rank() if size() > 1 else 0


def share() -> float:
    """The share of the batch that the current forward pass sees, 0..1."""
    return 1 / size() if _share is None else _share


@contextlib.contextmanager
def seeing(part: float) -> Iterator[None]:
    """Let forward passes see this share of the batch."""
    global _share
    before, _share = _share, part
    try:
        yield
    finally:
        _share = before


def total(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Largest `tensor` of all ranks, element by element, in place."""
    if size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over all ranks, in place."""
    return total(tensor).div_(size()) if size() > 1 else tensor


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return total(g.clone())


def differentiable_total(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks; its gradient is the sum of those of all ranks' losses."""
    total_: Tensor = _Total.apply(tensor)
    return total_


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks; one message for each dtype."""
    if size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    for group in groups.values():
        flat = mean(torch.cat([tensor.reshape(-1) for tensor in group]))
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def barrier() -> None:
    """Wait for all ranks."""
    if size() > 1:
        dist.barrier()
