"""Weights of one network taken over by another that differs in width, depth, kernels, blocks or resolution.

Tensors go by the name of their module, to the same place: channel 0 to channel 0. Of a narrower network that leaves the
first channels, as in slimmable networks (Yu et al. 2019, arXiv:1812.08928). A wider one gets zeros where an inherited
channel reads a new one, so that the network begins by computing what its parent does (Chen et al. 2016,
arXiv:1511.05641). Of larger kernels the centre is taken, smaller ones are surrounded by zeros; 1 x 1 convolutions and
larger ones have nothing in common. A batch norm follows the layer before it: it is inherited if that is, and if no
layer is between them. What has no counterpart keeps its fresh weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """How many tensors of a network, running statistics included, came from another.

    Attributes:
        whole: with all of their values.
        part: cut, or set among fresh values or zeros.
        fresh: not at all.
    """

    whole: int = 0
    part: int = 0
    fresh: int = 0


@torch.no_grad()
def inherit(model: nn.Module, parent: Mapping[str, Tensor]) -> Inherited:
    """Give `model`, in place, the weights that `parent` has for it.

    Args:
        model: with fresh weights.
        parent: the state dict of the other network.
    """
    state = model.state_dict()
    counts = dict.fromkeys(("whole", "part", "fresh"), 0)
    inherits, channels = False, (1, 1)
    for path, module in model.named_modules():
        names = [name for name in state if name.rpartition(".")[0] == path and state[name].dim()]
        fits = all(name in parent and parent[name].dim() == state[name].dim() for name in names)
        if isinstance(module, LAYERS):
            fits = inherits = fits and _fits(module, parent[f"{path}.weight"], channels)
            if fits:
                channels = (len(module.weight), len(parent[f"{path}.weight"]))
        elif isinstance(module, _BatchNorm):
            fits &= inherits
        else:
            fits = fits and all(parent[name].shape == state[name].shape for name in names)
        for name in names:
            if fits:
                _place(state[name], parent[name])
            counts["fresh" if not fits else "whole" if parent[name].shape == state[name].shape else "part"] += 1
    return Inherited(**counts)


def _fits(layer: nn.Conv2d | nn.Linear, weight: Tensor, channels: tuple[int, int]) -> bool:
    """Whether a layer can take a part of this weight.

    Args:
        layer: of the new network.
        weight: of the parent's layer of the same name, of as many dimensions.
        channels: outputs of the latest inherited layer before it, in the new network and in the parent.
    """
    own = layer.weight
    if isinstance(layer, nn.Linear):  # each channel before it must give it as many values
        return own.shape[1] * channels[1] == weight.shape[1] * channels[0]
    if (own[0, 0].numel() == 1) != (weight[0, 0].numel() == 1):
        return False
    depthwise = own.shape[1] == weight.shape[1] == 1 and layer.groups == layer.in_channels
    return depthwise or layer.groups == 1 or own.shape == weight.shape


def _place(own: Tensor, old: Tensor) -> None:
    """Write the part that two tensors have in common into the first, outputs and inputs first, kernels centred."""
    outputs, inputs = min(len(own), len(old)), min(own.shape[1:2] + old.shape[1:2], default=0)
    if own.dim() < 2:
        own[:outputs] = old[:outputs]
        return
    sides = list(zip(own.shape[2:], old.shape[2:], strict=True))
    here, there = ([_middle(n, m) for n, m in sides], [_middle(m, n) for n, m in sides])
    own[:outputs] = 0.0
    own[(slice(outputs), slice(inputs), *here)] = old[(slice(outputs), slice(inputs), *there)]


def _middle(side: int, other: int) -> slice:
    """The middle of a side that is as long as the other, or all of it.

    >>> _middle(5, 3), _middle(3, 5)
    (slice(1, 4, None), slice(0, 3, None))
    """
    margin = max(0, side - other) // 2
    return slice(margin, margin + min(side, other))
