"""Quantizers of Double Rounding: weights of all widths from one set of codes, activations with a scale for each.

Their current width is no state of the network: a state dict holds what every width needs and not which one is in use.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from trainables import modules, world
from trainables.encoding import Encoding
from trainables.methods._double_round import double_round, high_codes, round_once
from trainables.quantize import SMALLEST_SCALE, fake_quantize

SCALE_FLOOR = 1e-4
"""Scales stay above this share of their start."""
PERCENTILE = 0.999
"""Share of a batch's activations within the starting range."""

Gradient = Literal["low", "chain"]
Start = Literal["spread", "lsq"]


class _Switched(modules.Quantizer):
    """A quantizer for several widths, whose current one is no state of the network.

    Attributes:
        widths: that it is trained for, from high to low; one alone is fixed.
        scale_floor: what each of its scales stays above.
    """

    scale_floor: Tensor

    def __init__(self, widths: Sequence[int], *, signed: bool) -> None:
        self.widths = tuple(widths)
        self.width = self.widths[0]
        super().__init__(self.width, signed=signed)
        for name in ("q_min", "q_max"):
            self.register_buffer(name, getattr(self, name), persistent=False)

    def set_bits(self, bits: int) -> None:
        """Change the width, in place."""
        super().set_bits(bits)
        self.width = bits


class CodedWeight(_Switched):
    """Weights of any width up to the highest, from one set of codes; signed.

    Args:
        widths: from high to low.
        scales: 1, or the number of output channels for one scale each.
        gradient: `low` or `chain`; see `double_round`.
        pooled: give every channel's scale the gradient of all, as the authors' code does.
        init: `spread` or `lsq`.
        is_end: whether its layer is the first or the last, which never switches.

    Attributes:
        order: number of its layer in order of execution, and of the first layer that reads the same tensor.
        trace: average Hessian trace of its layer; infinite where it is not known.
        epochs_done: that the network was trained for.
    """

    order: Tensor
    trace: Tensor
    epochs_done: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        *,
        scales: int = 1,
        gradient: Gradient = "low",
        pooled: bool = False,
        init: Start = "spread",
        is_end: bool = False,
    ) -> None:
        super().__init__(widths, signed=True)
        self.gradient, self.pooled, self.init, self.is_end = gradient, pooled, init, is_end
        self.scale = nn.Parameter(torch.ones(()) if scales == 1 else torch.ones(scales))
        self.register_buffer("scale_floor", torch.zeros_like(self.scale.data)[None])
        self.register_buffer("order", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("trace", torch.tensor(math.inf))
        self.register_buffer("epochs_done", torch.tensor(0))

    @property
    def scales(self) -> list[nn.Parameter]:
        """One parameter for each entry of `scale_floor`."""
        return [self.scale]

    def scale_like(self, w: Tensor) -> Tensor:
        """The scale in a shape that multiplies `w`."""
        return self.scale if self.scale.dim() == 0 else self.scale.view(-1, *[1] * (w.dim() - 1))

    @torch.no_grad()
    def calibrate(self, w: Tensor) -> None:
        """Start the range of the highest width at 3 sigma, or (`lsq`) the scale of the lowest at LSQ's start."""
        rows = w.reshape(1, -1) if self.scale.dim() == 0 else w.flatten(1)
        if self.init == "spread":
            mean, spread = rows.mean(dim=1), 3 * (rows.std(dim=1) if rows.shape[1] > 1 else rows.new_zeros(len(rows)))
            start = torch.maximum((mean - spread).abs(), (mean + spread).abs()) / 2 ** (self.widths[0] - 1)
        else:
            low = self.widths[-1]
            start = 2 * rows.abs().mean(dim=1) / math.sqrt(2 ** (low - 1) - 1) / 2 ** (self.widths[0] - low)
        self.scale.copy_(start.reshape(self.scale.shape).clamp_min(SMALLEST_SCALE))
        self.scale_floor.copy_(self.scale[None] * SCALE_FLOOR)

    def forward(self, w: Tensor) -> Tensor:
        """The weights at the current width, any shape; channels first when there are several scales."""
        top = self.q_max if self.gradient == "low" else self.q_max.new_full((), 2 ** (self.widths[0] - 1) - 1)
        return double_round(
            w,
            self.scale_like(w),
            2 ** (self.widths[0] - 1) / (self.q_max + 1),
            self.q_min,
            self.q_max,
            torch.rsqrt(top * (w.numel() // self.scale.numel())),
            chain=self.gradient == "chain",
            pooled=self.pooled,
        )

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Multiples of the scale at the current width."""
        ratio = 2 ** (self.widths[0] - 1) / (float(self.q_max) + 1)
        scale = self.scale.detach().clamp_min(SMALLEST_SCALE) * ratio
        return Encoding(bits=self.width, q_min=int(self.q_min), q_max=int(self.q_max), scale=scale)

    def codes(self, w: Tensor) -> Tensor:
        """Codes of the highest width, int8."""
        return high_codes(w, self.scale_like(w), self.widths[0])


class ScaledInput(_Switched):
    """Activations with a trained scale for each width.

    Args:
        widths: from high to low.
        signed: whether values below zero exist; an extension, as the paper has ReLUs everywhere.
        gradient: `low` counts the edges as inside, and the elements of the whole batch in the gradient factor; `chain`
            is LSQ as published, with those of one example.
        init: `spread` (percentiles) or `lsq`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        signed: bool,
        gradient: Gradient = "low",
        init: Start = "spread",
    ) -> None:
        super().__init__(widths, signed=signed)
        self.gradient, self.init = gradient, init
        for bits in self.widths:
            self.register_parameter(f"scale_{bits}", nn.Parameter(torch.ones(())))
        self.register_buffer("scale_floor", torch.zeros(len(self.widths)))

    @property
    def scales(self) -> list[nn.Parameter]:
        """One parameter for each entry of `scale_floor`."""
        return [self.get_parameter(f"scale_{bits}") for bits in self.widths]

    def set_bits(self, bits: int) -> None:
        """Change the width, in place.

        Raises:
            ValueError: there is no scale for this width.
        """
        if bits not in self.widths:
            raise ValueError(f"bits = {bits}: activations are trained at {', '.join(map(str, self.widths))}")
        super().set_bits(bits)

    @property
    def scale(self) -> nn.Parameter:
        """The scale of the current width, shape ()."""
        return self.get_parameter(f"scale_{self.width}")

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the current width's scale from the first tensor seen."""
        if self.init == "spread":
            flat = x.flatten()
            k = round(PERCENTILE * flat.numel())
            low, high = -(-flat).kthvalue(k).values, flat.kthvalue(k).values
            start = torch.maximum(high, -low) / self.q_max if self.signed else (high - low) / self.q_max
        else:
            start = 2 * x.abs().mean() / self.q_max.sqrt()
        self.scale.copy_(start.clamp_min(SMALLEST_SCALE))
        self.scale_floor[self.widths.index(self.width)] = self.scale * SCALE_FLOOR

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Multiples of the scale of the current width."""
        scale = self.scale.detach().clamp_min(SMALLEST_SCALE)
        return Encoding(bits=self.width, q_min=int(self.q_min), q_max=int(self.q_max), scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        if self.gradient == "chain":
            factor = torch.rsqrt(self.q_max * (x.numel() // len(x)))
            return fake_quantize(x, self.scale, self.q_min, self.q_max, factor)
        factor = torch.rsqrt(self.q_max * (x.numel() / world.share()))
        return round_once(x, self.scale, self.q_min, self.q_max, factor)


def quantizers(model: nn.Module) -> Iterator[tuple[str, CodedWeight, ScaledInput | None]]:
    """Names and quantizers of all quantized layers, in the order of definition."""
    for name, layer in modules.quantized_layers(model):
        assert isinstance(layer.weight_quantizer, CodedWeight)
        assert layer.input_quantizer is None or isinstance(layer.input_quantizer, ScaledInput)
        yield name, layer.weight_quantizer, layer.input_quantizer


def epochs_done(model: nn.Module) -> int:
    """Epochs that a prepared network was trained for."""
    return next((int(weights.epochs_done) for _, weights, _ in quantizers(model)), 0)


def switched_layers(model: nn.Module) -> list[tuple[str, CodedWeight, ScaledInput | None]]:
    """All quantized layers but the ends."""
    return [found for found in quantizers(model) if not found[1].is_end]
