"""Batch norm with a set for each width (switchable batch norm, Yu et al. 2019, arXiv:1812.08928), all in one module.

The sets are rows of stacked parameters and buffers, and the row in use is data, so one graph serves all widths. A state
without rows, such as that of the float network, loads into every row; one with fewer rows loads into the first ones.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules
from trainables.quantize import by_number
from trainables.shared_norm import batch_norm


class SwitchableNorm(_BatchNorm, modules.NormSets):
    """A batch norm over dimension 1 whose scale, shift and statistics are those of one of several sets.

    Args:
        norm: what it replaces; every set starts with its values.
        sets: how many sets of statistics.
        shared_affine: one scale and shift for all sets.

    Attributes:
        index: the set in use; shape ().
        weight, bias: shape (sets, channels), shared (channels,).
        running_mean, running_var: shape (sets, channels).
        num_batches_tracked: shape (sets,).
    """

    index: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: _BatchNorm, sets: int, *, shared_affine: bool = False) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.register_buffer("index", torch.zeros((), dtype=torch.long))
        self.shared_affine = shared_affine
        self.kind = type(norm)
        for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
            rows = value if shared_affine and name in ("weight", "bias") else torch.stack([value.data] * sets)
            parameter = isinstance(value, nn.Parameter)
            setattr(self, name, nn.Parameter(rows.data.clone()) if parameter else rows)
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (batch, channels, ...) with the set in use."""
        if not by_number(x):
            return self._forward_by_tensor(x)
        row = int(self.index)
        weight, bias = (p if self.shared_affine else p[row] for p in (self.weight, self.bias))
        if self.training:
            self.num_batches_tracked[row] += 1
        return self._normalise(x, self.running_mean[row], self.running_var[row], weight, bias, row)

    def _forward_by_tensor(self, x: Tensor) -> Tensor:
        """The same without reading the index: statistics are copied out and back."""
        at = self.index.unsqueeze(0)
        weight, bias = (p if self.shared_affine else p.index_select(0, at)[0] for p in (self.weight, self.bias))
        mean, var = (b.index_select(0, at)[0] for b in (self.running_mean, self.running_var))
        if self.training:
            self.num_batches_tracked.index_add_(0, at, torch.ones_like(at))
        y = self._normalise(x, mean, var, weight, bias, at)
        if self.training:
            self.running_mean.index_copy_(0, at, mean.detach().unsqueeze(0))
            self.running_var.index_copy_(0, at, var.detach().unsqueeze(0))
        return y

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, row: Any) -> Tensor:
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 1 / float(self.num_batches_tracked[row])
        return batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)

    @property
    def used(self) -> int:  # type: ignore[override]
        """The row in use."""
        return int(self.index)

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What the set in use makes of `x` with these statistics."""
        weight, bias = (p if self.shared_affine else p[self.used] for p in (self.weight, self.bias))
        return batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)

    @torch.no_grad()
    def take(self, mean: Tensor, var: Tensor) -> None:
        """Replace the statistics of the set in use."""
        self.running_mean[self.used] = mean
        self.running_var[self.used] = var

    def plain_state(self) -> dict[str, Tensor]:
        """The set in use as the state of a plain batch norm."""
        shared = ("weight", "bias") if self.shared_affine else ()
        state = {name: value for name, value in self.state_dict().items() if name != "index"}
        return {name: value if name in shared else value[self.used] for name, value in state.items()}

    def adopt(self, row: int, source: int) -> None:
        """Start the set `row` from the values of the set `source`."""
        with torch.no_grad():
            for rows in (
                self.running_mean,
                self.running_var,
                *([] if self.shared_affine else [self.weight, self.bias]),
            ):
                rows[row] = rows[source]
            self.num_batches_tracked[row] = 0

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """The batch norm in use, for exports."""
        norm = self.kind(self.num_features, self.eps, self.momentum)
        row = int(self.index)
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            if name != "index":
                shared = self.shared_affine and name in ("weight", "bias")
                getattr(norm, name).data.copy_(value if shared else value[row])
        return norm

    def is_fed(self, row: int) -> bool:
        """Whether the set `row` has statistics of its own."""
        return int(self.num_batches_tracked[row]) > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}index", self.index)
        load_rows(self, state_dict, prefix, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sets and the rest."""
        return f"sets={len(self.num_batches_tracked)}, {super().extra_repr()}"


def load_rows(module: nn.Module, state_dict: dict[str, Any], prefix: str, names: tuple[str, ...]) -> None:
    """Let values without rows fill every row of the module's own, and values with fewer rows the first ones."""
    for name in names:
        own, key = getattr(module, name), prefix + name
        if key not in state_dict or own is None or own.dim() == 0:
            continue
        given = state_dict[key]
        if given.dim() == own.dim() - 1:
            state_dict[key] = given.expand_as(own)
        elif given.shape[1:] == own.shape[1:] and len(given) < len(own):
            state_dict[key] = torch.cat([given, own.detach()[len(given) :].to(given)])


def switchable_norms(model: nn.Module) -> list[SwitchableNorm]:
    """All of a model, in the order of definition."""
    return [module for module in model.modules() if isinstance(module, SwitchableNorm)]


def norm_widths(model: nn.Module, widths: Mapping[str, int], *, beside: int) -> Iterator[tuple[SwitchableNorm, int]]:
    """Every switchable norm, and the width of the layer that is defined before it.

    Args:
        model: with quantized layers.
        widths: of layers, by name.
        beside: width for norms before the first layer, or after one that is not among them.
    """
    width = beside
    for name, module in model.named_modules():
        if isinstance(module, modules.QuantizedConv2d | modules.QuantizedLinear):
            width = widths.get(name, beside)
        elif isinstance(module, SwitchableNorm):
            yield module, width


def replace_norms(model: nn.Module, sets: int, *, shared_affine: bool = False) -> None:
    """Put a switchable one in the place of every batch norm that has scale, shift and statistics, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm) and module.affine and module.track_running_stats:
            model.set_submodule(name, SwitchableNorm(module, sets, shared_affine=shared_affine))
