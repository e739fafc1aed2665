"""DoReFa-Net: weights through tanh on the scale of their largest, activations clipped to 0..1.

Zhou et al. 2016, arXiv:1606.06160. Weights follow equation 9 (one bit: equation 7), activations equation 11; both have
fixed ranges, nothing but the weights is trained. Gradients are not quantized (the paper's G = 32).

The paper normalises weights to -1..1. Variant C multiplies the result by the largest |tanh w|, which keeps the
scale of a float start and is the default here; A is the paper's formula, B the authors' gradient
(`quantize.dorefa_weight`). Behind a batch norm the outputs of A and C train alike; without one, A changes the function.
The paper leaves the first and last layer float; here they have 8 bits, as everywhere. For signed tensors the range is
-1..1, an extension.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables import modules
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.method import Method as Base
from trainables.quantize import SMALLEST_SCALE, dorefa_weight, unit_quantize


class DorefaWeight(modules.Quantizer):
    """Equation 9 (one bit: equation 7) with one of the published gradients.

    Args:
        bits: width, 1..8.
        variant: `A`, `B` or `C`.
    """

    def __init__(self, bits: int, *, variant: str) -> None:
        super().__init__(bits, signed=False)
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        """The quantized weights, any shape."""
        return dorefa_weight(x, self.q_max, variant=self.variant)

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Levels from -scale to scale, 0 not among them; the scale is 1 or comes from the weights `x`."""
        assert x is not None
        scale = torch.ones((), device=x.device)
        if self.bits == 1:
            scale = x.abs().mean()
        elif self.variant == "C":
            scale = x.tanh().abs().max().clamp_min(SMALLEST_SCALE)
        steps = int(self.q_max)
        return Encoding(bits=self.bits, q_min=0, q_max=steps, scale=scale, divisor=steps / 2, offset=-1.0)


class UnitActivation(modules.Quantizer):
    """Equation 11: clip to 0..1 (signed: -1..1), round to equal steps."""

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__(bits, signed=signed, symmetric=True)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        return unit_quantize(x, self.q_min, self.q_max)

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Equal steps of 0..1 (signed: -1..1)."""
        steps = int(self.q_max)
        one = torch.ones((), device=self.q_max.device)
        return Encoding(bits=self.bits, q_min=int(self.q_min), q_max=steps, scale=one, divisor=steps)


class Method(Base):
    """DoReFa-Net on every convolution and linear layer."""

    weight_bits = range(1, 9)
    activation_bits = range(1, 9)

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of DoReFa-Net."""

        variant: Annotated[Literal["A", "B", "C"], Field(description="published variant of the weight quantizer")] = "C"

    def weight_quantizer(self, row: Layer, bits: int) -> DorefaWeight:
        """The chosen variant."""
        return DorefaWeight(bits, variant=self.settings.variant)

    def input_quantizer(self, row: Layer, bits: int) -> UnitActivation:
        """0..1 after a ReLU, -1..1 where the layer reads negative values."""
        return UnitActivation(bits, signed=row.signed)

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """One scale for each weight tensor with variant C or one bit; A and B are multiples of 1 / steps."""
        layers = [layer for _, layer in modules.quantized_layers(model)]
        return sum(self.settings.variant == "C" or bool(torch.eq(x.weight_quantizer.q_max, 1)) for x in layers)
