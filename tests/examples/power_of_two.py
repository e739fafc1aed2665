"""A method of one's own: weights on scales that are powers of two, so that a device shifts where others multiply.

    raysearch sweep --method tests/examples/power_of_two.py

Nothing is trained but the weights: the scale is the smallest power of two at which the largest weight has a code, and
the gradient passes straight through the rounding. What layers read is quantized as in DoReFa-Net.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables import modules
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.method import Method as Base
from trainables.methods.dorefa import UnitActivation


class ShiftWeight(modules.Quantizer):
    """Codes times a power of two.

    Args:
        bits: width, 2 or more.
        largest: the share of the largest weight that shall still have a code of its own, 0..1.
    """

    def __init__(self, bits: int, *, largest: float) -> None:
        super().__init__(bits, signed=True, symmetric=True)
        self.largest = largest

    def scale(self, weights: Tensor) -> Tensor:
        """The smallest power of two with which `q_max` reaches far enough, shape ()."""
        return torch.exp2(torch.ceil(torch.log2(self.largest * weights.detach().abs().max() / self.q_max)))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized weights, any shape; the gradient is that of the identity."""
        scale = self.scale(x)
        rounded = scale * (x / scale).round().clamp(self.q_min, self.q_max)
        return x + (rounded - x).detach() if torch.is_grad_enabled() else rounded

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """What a code stands for, so that every export works."""
        assert x is not None
        return Encoding(bits=self.bits, q_min=int(self.q_min), q_max=int(self.q_max), scale=self.scale(x))


class Method(Base):
    """Two quantizers for each layer; `prepare`, `losses` and all other hooks are the usual ones."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Addresses `method/...`, flags `--set method/...=` and their help."""

        largest: Annotated[float, Field(gt=0, le=1, description="share of the largest weight that has a code")] = 1.0

    def weight_quantizer(self, row: Layer, bits: int) -> ShiftWeight:
        """One scale for each layer."""
        return ShiftWeight(bits, largest=self.settings.largest)

    def input_quantizer(self, row: Layer, bits: int) -> UnitActivation:
        """0..1 after a ReLU, -1..1 where the layer reads negative values."""
        return UnitActivation(bits, signed=row.signed)

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """An export stores one scale for each layer, though none of them is a parameter."""
        return len(list(modules.quantized_layers(model)))
