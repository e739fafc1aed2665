"""Batch norm behind layers whose output channels have gates: two ways to keep its statistics free of pruning.

Batch norm undoes any factor on its input, so a gate on the weights in front of it would have no gradient until it is
closed. Its statistics must come from channels as if none was pruned, and the gates must act behind them.

- `GatedNorm` runs as usual on the unpruned quantized convolution and multiplies its scale by the gates. One
  convolution, and no pass over the activations more than without gates. A pruned channel emits its shift.
- `FoldedConv2d` and `FoldedLinear` are Bayesian Bits' published layers (Krishnamoorthi 2018, arXiv:1806.08342, section
  3.2.2): what is quantized, and pruned, are the weights with batch norm folded in, `weight * scale / sigma` with the
  running sigma. While training, the statistics come from a second convolution with the raw weights, and correct the
  output to those of the batch. Two convolutions a layer; a pruned channel emits `shift - scale * mean / sigma`.
"""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear, Quantizer
from trainables.shared_norm import batch_norm, moments

Norm = TypeVar("Norm", bound="TrackedNorm")


class TrackedNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with scale, shift and running statistics of a fixed momentum."""

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    kind: type[nn.modules.batchnorm._BatchNorm]

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""


def usable(norm: Any) -> TrackedNorm | None:
    """`norm` itself, if it is a batch norm with scale, shift and running statistics of a fixed momentum; else None."""
    known = isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    return norm if known and norm.affine and norm.track_running_stats and norm.momentum is not None else None


def _in_place_of(norm: Any, kind: type[Norm]) -> Norm:
    """A norm of another class with the same parameters and buffers."""
    new = kind(norm.num_features, eps=norm.eps, momentum=norm.momentum, device="meta")
    new._parameters.update(norm._parameters)
    new._buffers.update(norm._buffers)
    new.kind = type(norm)
    new.train(norm.training)
    return new


class GatedNorm(TrackedNorm):
    """Batch norm whose scale is multiplied by the channel gates of the layer before it."""

    layer: tuple[QuantizedLayer]  # in a tuple, because it is no child of this module

    @classmethod
    def behind(cls, layer: QuantizedLayer, norm: Any) -> "GatedNorm":
        """The gated norm to put in the place of `norm`, whose parameters it takes over."""
        new = _in_place_of(norm, cls)
        new.layer = (layer,)
        return new

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """A norm whose scale is that of the gates as they are, for exports."""
        norm: Any = _in_place_of(self, self.kind)  # type: ignore[type-var]
        norm.weight = nn.Parameter(self.weight * self.layer[0].weight_quantizer.channel_gates())  # type: ignore[operator]
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the norm that it replaces."""
        scale = self.weight * self.layer[0].weight_quantizer.channel_gates()  # type: ignore[operator]
        if self.training:
            self.num_batches_tracked.add_(1)
        return batch_norm(
            x, self.running_mean, self.running_var, scale, self.bias, self.training, self.momentum, self.eps
        )


class FoldedNorm(TrackedNorm):
    """Holds the parameters and statistics that a folded layer computes with; passes its input on."""

    def plain(self) -> nn.Module:
        """Nothing, for exports."""
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


class _Folded(nn.Module):
    """What the folded convolution and the folded linear layer share.

    Attributes:
        norm: parameters and statistics of the batch norm; in a tuple, because it is no child of this module.
        static: whether the norm has been multiplied into weight and bias for good.
    """

    weight: Tensor
    bias: Any
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    norm: tuple[FoldedNorm]
    static: bool

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self, nn.Conv2d):
            return self._conv_forward(x, weight, bias)
        return functional.linear(x, weight, bias)

    def _sigma(self) -> Tensor:
        return torch.sqrt(self.norm[0].running_var + self.norm[0].eps)

    def _per_row(self, factors: Tensor) -> Tensor:
        return factors.view(-1, *[1] * (self.weight.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the layer that this one replaces; includes the batch norm."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        norm = self.norm[0]
        if self.static:
            return self._multiply(x, self.weight_quantizer(self.weight), self.bias)
        sigma = self._sigma()
        weight = self.weight_quantizer(self.weight * self._per_row(norm.weight / sigma))
        if not norm.training:
            return self._multiply(x, weight, norm.bias - norm.weight * norm.running_mean / sigma)
        y = self._multiply(x, weight, None)
        raw = self._multiply(x, self.weight, None)
        mean, variance, counts = moments(raw.to(self.weight.dtype))
        batch_sigma = torch.sqrt(variance + norm.eps)
        self._track(mean.detach(), variance.detach(), counts)
        per_channel = (1, -1, *[1] * (raw.dim() - 2))
        shift = norm.bias - norm.weight * mean / batch_sigma
        return y * (sigma / batch_sigma).view(per_channel) + shift.view(per_channel)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, counts: Tensor) -> None:
        """Update the running statistics, as batch norm does."""
        norm = self.norm[0]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (counts / (counts - 1).clamp_min(1)), norm.momentum)

    def multiplied_in(self) -> Any:
        """A copy of this layer after `fold`."""
        twin = copy.copy(self)
        twin._parameters = {
            name: None if p is None else nn.Parameter(p.clone()) for name, p in self._parameters.items()
        }
        if not self.static:
            twin.fold()
        return twin

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the norm into weight and bias for good, with its running statistics."""
        norm, sigma = self.norm[0], self._sigma()
        self.weight.mul_(self._per_row(norm.weight / sigma))
        self.bias = nn.Parameter(norm.bias - norm.weight * norm.running_mean / sigma)
        norm.requires_grad_(False)
        self.static = True


class FoldedConv2d(_Folded, QuantizedConv2d):  # type: ignore[misc]
    """A quantized convolution without bias, and the batch norm behind it."""

    def plain(self) -> nn.Module:
        """The convolution with the norm multiplied in for good, for exports."""
        return QuantizedConv2d(self.multiplied_in(), self.weight_quantizer, self.input_quantizer)


class FoldedLinear(_Folded, QuantizedLinear):  # type: ignore[misc]
    """A quantized linear layer without bias, and the batch norm behind it."""

    def plain(self) -> nn.Module:
        """The layer with the norm multiplied in for good, for exports."""
        return QuantizedLinear(self.multiplied_in(), self.weight_quantizer, self.input_quantizer)


def folded(
    layer: nn.Module, norm: Any, weights: Quantizer, inputs: Quantizer | None
) -> tuple[FoldedConv2d | FoldedLinear, FoldedNorm]:
    """What to put in the place of a convolution or linear layer without bias, and of the batch norm that follows it.

    Args:
        layer: whose parameters the new one takes over.
        norm: likewise.
        weights: the quantizer of the folded weights.
        inputs: the quantizer of what the layer reads, if any.
    """
    kind: Any = FoldedConv2d if isinstance(layer, nn.Conv2d) else FoldedLinear
    new: FoldedConv2d | FoldedLinear = kind(layer, weights, inputs)
    rest = _in_place_of(norm, FoldedNorm)
    new.norm, new.static = (rest,), False
    return new, rest
