"""The ranks of one training: who am I, and sums over all. One process alone is a world of size 1.

Gradients are averaged in one flat all-reduce after the last backward pass of a step, which serves every method, also
those with several losses a step; nothing is registered on the model, so nothing outlives a trial.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def size() -> int:
    """Number of ranks of this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0..size-1."""
    return dist.get_rank() if size() > 1 else 0


def total(tensor: Tensor) -> Tensor:
    """Sum of `tensor` over all ranks, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Mean of `tensor` over all ranks, in place."""
    return total(tensor).div_(size()) if size() > 1 else tensor


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
