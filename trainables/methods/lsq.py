"""Learned step size quantization (LSQ): the scale of each weight and activation tensor is trained.

Esser et al. 2020, arXiv:1902.08153. The scale (the paper's step size s) is a parameter with the gradient of equation 3
times `1 / sqrt(N * q_max)` (section 2.2), N the number of elements of the tensor, for activations with the batch (of
all ranks). It starts at `2 * mean |x| / sqrt(q_max)`, from the weights and from the first batch (section 2.1). One
scale for each tensor; the first and last layer keep 8 bits unless the sweep says otherwise.

Not from the paper, as settings: one weight scale for each output channel, and the range without its lowest code.
"""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables import modules, world
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.method import Method as Base
from trainables.method import split_parameters
from trainables.quantize import SMALLEST_SCALE, codes, fake_quantize

SCALE_FLOOR = 0.01
"""Scales stay above this share of their start: nothing in the paper keeps them positive, and a step can cross zero."""


class LearnedScale(modules.Quantizer):
    """Multiples of a trained scale within `q_min..q_max`.

    Args:
        bits: width, 2..8.
        signed: whether codes below zero exist.
        symmetric: leave out the lowest code of a signed range.
        scales: 1, or the number of output channels for one scale each.
        shared: whether all ranks see the same tensor (weights) or a share of it (activations).
    """

    scale_floor: Tensor

    def __init__(self, bits: int, *, signed: bool, symmetric: bool = False, scales: int = 1, shared: bool) -> None:
        super().__init__(bits, signed=signed, symmetric=symmetric)
        self.shared = shared
        self.scale = nn.Parameter(torch.ones(()) if scales == 1 else torch.ones(scales))
        self.register_buffer("scale_floor", torch.zeros_like(self.scale.data))

    def _scale_like(self, x: Tensor) -> Tensor:
        return self.scale if self.scale.dim() == 0 else self.scale.view(-1, *[1] * (x.dim() - 1))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the scale at `2 * mean |x| / sqrt(q_max)`."""
        size = x.abs()
        average = size.mean() if self.scale.dim() == 0 else size.flatten(1).mean(dim=1)
        self.scale.copy_((2 * average / self.q_max.sqrt()).clamp_min(SMALLEST_SCALE))
        self.scale_floor.copy_(self.scale * SCALE_FLOOR)

    @torch.no_grad()
    def take_scale(self, scale: Tensor) -> None:
        """Start at a scale that was trained before, for all channels alike."""
        self.scale.copy_(scale.clamp_min(SMALLEST_SCALE).expand_as(self.scale))
        self.scale_floor.copy_(self.scale * SCALE_FLOOR)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized `x`, any shape; channels first when there are several scales."""
        elements = x.numel() / (1 if self.shared else world.share())
        factor = torch.rsqrt(self.q_max * elements)
        return fake_quantize(x, self._scale_like(x), self.q_min, self.q_max, factor)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of `x`, as floats."""
        return codes(x, self._scale_like(x), self.q_min, self.q_max)

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Multiples of the scale."""
        scale = self.scale.detach().clamp_min(SMALLEST_SCALE)
        return Encoding(bits=self.bits, q_min=int(self.q_min), q_max=int(self.q_max), scale=scale)


class Method(Base):
    """LSQ on every convolution and linear layer."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of LSQ."""

        per_channel: Annotated[bool, Field(description="one weight scale for each output channel")] = False
        symmetric: Annotated[bool, Field(description="weights without the lowest code (2 bits: ternary)")] = False
        scale_lr: Annotated[float, Field(gt=0, description="learning rate of scales over that of weights")] = 1.0

    def weight_quantizer(self, row: Layer, bits: int) -> LearnedScale:
        """Signed, one scale or one for each output channel."""
        scales = row.channels if self.settings.per_channel else 1
        return LearnedScale(bits, signed=True, symmetric=self.settings.symmetric, scales=scales, shared=True)

    def input_quantizer(self, row: Layer, bits: int) -> LearnedScale:
        """Unsigned after a ReLU, signed where the layer reads negative values."""
        return LearnedScale(bits, signed=row.signed, shared=False)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weights, and scales with a learning rate of their own. Weight decay acts on both, as published."""
        scales, weights = split_parameters(model)
        return [{"params": weights}, {"params": scales, "lr_factor": self.settings.scale_lr}]

    def after_step(self, model: nn.Module) -> None:
        """Keep the scales above their floors."""
        quantizers = [m for m in model.modules() if isinstance(m, LearnedScale)]
        with torch.no_grad():
            torch._foreach_maximum_([q.scale for q in quantizers], [q.scale_floor for q in quantizers])
