"""The optimizer of tensors in bit representation: SGD on planes and scales, from the gradients of the leaves alone.

What a step does to one tensor is `BitPlanes.update`; here are the widths, the momenta and the groups.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainables.methods._bit_planes import BitPlanes


def one_block(shapes: Sequence[Sequence[int]], *, like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of several shapes in one block of memory: many large ones apart leave gaps that nothing else fits."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    block = like[0].new_zeros(sum(sizes)) if sizes else torch.zeros(0)
    return [part.view(tuple(shape)) for part, shape in zip(block.split(sizes), shapes, strict=True)]


class BitPlaneSGD(torch.optim.Optimizer):
    """SGD with momentum and weight decay on tensors in bit representation, from the gradients of their leaves.

    Each tensor is passed over once: momentum, data gradient, penalty, weight decay, step, clamp, composition.

    Args:
        groups: as for `torch.optim.SGD`, with the key `bit_planes` beside `params`: the `BitPlanes` of each leaf.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        groups = [dict(group) for group in groups]
        # Not in the groups: loading a state would copy what lies there.
        self.tensors: dict[Tensor, BitPlanes] = {
            leaf: tensor
            for group in groups
            for leaf, tensor in zip(group["params"], group.pop("bit_planes"), strict=True)
        }
        self.widths: dict[Tensor, int] = {}
        super().__init__(groups, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4})

    def _begin(self) -> None:
        """Read the widths, and allot the momenta that no loaded state has brought: one block of memory for all."""
        self.widths = {leaf: tensor.planes for leaf, tensor in self.tensors.items()}
        new = [leaf for leaf in self.tensors if not self.state[leaf]]
        rows = [self.tensors[leaf]._trained(self.widths[leaf]) for leaf in new]
        for leaf, momentum in zip(new, one_block([row.shape for row in rows], like=rows), strict=True):
            self.state[leaf] |= {"momentum": momentum, "scale_momentum": torch.zeros_like(self.tensors[leaf].scale)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; widths are read once, at the first: whoever changes them makes a new optimizer."""
        if not self.widths:
            self._begin()
        for group in self.param_groups:
            for leaf in group["params"]:
                tensor = self.tensors[leaf]
                if leaf.grad is not None:
                    tensor.update(
                        leaf,
                        self.state[leaf],
                        planes=self.widths[leaf],
                        lr=group["lr"],
                        momentum=group["momentum"],
                        weight_decay=group["weight_decay"],
                    )
