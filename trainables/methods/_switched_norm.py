"""Batch norm with a set of parameters and statistics for each precision of the layers that feed it.

Two keys are in use. *Switchable* batch norm (Yu et al. 2018, arXiv:1812.08928) has a set for each width of the layer
that it follows. *Transitional* batch norm (Bulat and Tzimiropoulos 2021, Bit-Mixer, arXiv:2103.17267) has one for each
pair of widths: of that layer, and of the one before. A norm that follows no switched layer, such as that of a float
stem, goes by the width of the first one in both cases.

Which layers these are is seen when the network runs (`record_order`) and kept in the state dict. Layers that read the
same tensor, such as a block's first convolution and its shortcut, stand in the same place.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules
from trainables.modes import in_mode

OUTER = -1
"""In place of a layer's number: the network's own width."""


class SwitchedNorm(nn.Module, modules.NormSets):
    """One batch norm of several, chosen by `use`.

    The state dict of a plain batch norm loads into it: every set becomes a copy.

    Args:
        norm: what every set starts from.
        widths: of the layers, in bits.
        pairs: whether there is a set for each pair of widths.

    Attributes:
        order: numbers of the layer before and of the layer that feeds this norm, `OUTER` where there is none.
    """

    order: Tensor
    used: str

    def __init__(self, norm: _BatchNorm, widths: Sequence[int], *, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs
        keys = [(a, b) for a in widths for b in widths] if pairs else [(b, b) for b in widths]
        self.sets = nn.ModuleDict({self._name(before, own): copy.deepcopy(norm) for before, own in keys})
        self.used = self._name(widths[0], widths[0])
        self.register_buffer("order", torch.full((2,), OUTER))

    def _name(self, before: int, own: int) -> str:
        return f"{before}_{own}" if self.pairs else str(own)

    def use(self, before: int, own: int) -> None:
        """Take the set of these widths."""
        self.used = self._name(before, own)

    def plain(self) -> _BatchNorm:
        """The batch norm in use."""
        norm = self.sets[self.used]
        assert isinstance(norm, _BatchNorm)
        return norm

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What the set in use makes of `x` with these statistics."""
        norm = self.plain()
        return functional.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

    @torch.no_grad()
    def take(self, mean: Tensor, var: Tensor) -> None:
        """Replace the statistics of the set in use."""
        norm = self.plain()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)

    def plain_state(self) -> dict[str, Tensor]:
        """The set in use as the state of a plain batch norm."""
        return self.plain().state_dict()

    def spread(self, widths: Sequence[int]) -> None:
        """Start every transition into a width from the set of that width alone."""
        for before in widths:
            for own in widths:
                if before != own:
                    alone = self.sets[self._name(own, own)]
                    self.sets[self._name(before, own)].load_state_dict(alone.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """The normalized `x`, same shape."""
        return self.sets[self.used](x)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *others: Any
    ) -> None:
        """Hand the entries of a plain batch norm to every set."""
        names = list(next(iter(self.sets.values())).state_dict())
        plain = {name: state_dict.pop(prefix + name) for name in names if prefix + name in state_dict}
        for key in self.sets if plain else ():
            state_dict.update({f"{prefix}sets.{key}.{name}": value for name, value in plain.items()})
        if plain:
            state_dict.setdefault(f"{prefix}order", self.order)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)


def switch_norms(model: nn.Module, widths: Sequence[int], *, pairs: bool) -> None:
    """Replace every batch norm of `model` by one with a set for each width, or for each pair of widths."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(name, SwitchedNorm(module, widths, pairs=pairs))


def switched_norms(model: nn.Module) -> list[SwitchedNorm]:
    """All of them, in the order of definition."""
    return [module for module in model.modules() if isinstance(module, SwitchedNorm)]


def use_sets(norms: Sequence[SwitchedNorm], widths: Mapping[int, int], outer: int) -> None:
    """Let every norm take the set of the layers around it.

    Args:
        norms: of one network.
        widths: of its switched layers, by number.
        outer: of the network, for norms before the first switched layer.
    """
    for norm in norms:
        norm.use(*(outer if layer == OUTER else widths[layer] for layer in norm.order.tolist()))


@torch.no_grad()
def record_order(model: nn.Module, layers: Sequence[nn.Module], images: Tensor) -> list[tuple[int, int]]:
    """Run `model` once and note for every norm which switched layers it follows.

    Args:
        model: with switched norms; its mode and statistics are left as they are.
        layers: the switched layers.
        images: a batch of the network's input; a few are enough.

    Returns:
        for each layer its number in order of execution, and that of the first layer that reads the same tensor: the
        same number, for most.
    """
    numbers: dict[nn.Module, int] = {}
    read: list[Tensor] = []
    first_readers: list[int] = []
    leaders: dict[nn.Module, int] = {}
    latest = [(OUTER, OUTER)]

    def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        number = numbers.setdefault(layer, len(numbers))
        place = next((i for i, tensor in enumerate(read) if tensor is args[0]), len(read))
        if place == len(read):
            read.append(args[0])
            first_readers.append(number)
        leaders.setdefault(layer, first_readers[place])
        latest[0] = (first_readers[place - 1] if place else OUTER, number)

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, SwitchedNorm)
        norm.order.copy_(torch.tensor(latest[0]))

    with in_mode(model, training=False), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(enter))
        for norm in switched_norms(model):
            hooks.enter_context(norm.register_forward_pre_hook(note))
        model(images)
    return [(numbers.get(layer, i), leaders.get(layer, i)) for i, layer in enumerate(layers)]
