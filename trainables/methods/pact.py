"""PACT: each activation is clipped at a trained bound; weights as in DoReFa-Net.

Choi et al. 2018, arXiv:1805.06085. The bound `clip_max` (the paper's alpha) has the gradient of equation 3 and is
decayed like a weight. The clip replaces the ReLU: it is the quantizer of what the next layer reads, and after a ReLU it
is the same function. Where a layer reads negative values the range is -clip_max..clip_max, an extension.

The paper starts `clip_max` at a large constant (10 for CIFAR ResNet-20) and trains from scratch. By default it starts
here at `2 * mean |x| * sqrt(q_max)` of the first batch (LSQ's rule), which suits short trainings from a float start;
`method/clip_init` sets a number. `method/clip_penalty` adds `clip_penalty * sum clip_max^2` to the loss, on top of
weight decay, as one public implementation does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables import modules
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.method import Method as Base
from trainables.method import split_parameters
from trainables.methods.dorefa import DorefaWeight
from trainables.quantize import SMALLEST_SCALE, clip_quantize


class LearnedClip(modules.Quantizer):
    """Equal levels between 0 (signed: -clip_max) and a trained `clip_max`.

    Args:
        bits: width, 2..8.
        signed: whether values below zero exist.
        clip_init: starting bound, > 0; None takes it from the first batch.
    """

    def __init__(self, bits: int, *, signed: bool, clip_init: float | None = None) -> None:
        super().__init__(bits, signed=signed, symmetric=True)
        self.from_batch = clip_init is None
        self.clip_max = nn.Parameter(torch.tensor(1.0 if clip_init is None else clip_init))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the bound from the first batch, unless it has a number."""
        if self.from_batch:
            bound = 2 * x.abs().mean() * self.q_max.sqrt()
            self.clip_max.copy_(bound.clamp_min(SMALLEST_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        return clip_quantize(x, self.clip_max, self.q_min, self.q_max)

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Multiples of `clip_max / q_max`."""
        scale = self.clip_max.detach().clamp_min(SMALLEST_SCALE) / self.q_max
        return Encoding(bits=self.bits, q_min=int(self.q_min), q_max=int(self.q_max), scale=scale)


class Method(Base):
    """PACT activations and DoReFa weights on every convolution and linear layer."""

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of PACT."""

        clip_init: Annotated[float | None, Field(gt=0, description="starting clip level; None: from a batch")] = None
        clip_lr: Annotated[float, Field(gt=0, description="learning rate of clip levels over that of weights")] = 1.0
        clip_penalty: Annotated[float, Field(ge=0, description="factor of sum clip_max^2 in the loss")] = 0.0
        variant: Annotated[Literal["A", "B", "C"], Field(description="variant of the DoReFa weight quantizer")] = "C"

    def weight_quantizer(self, row: Layer, bits: int) -> DorefaWeight:
        """DoReFa's, at the same settings."""
        return DorefaWeight(bits, variant=self.settings.variant)

    def input_quantizer(self, row: Layer, bits: int) -> LearnedClip:
        """Unsigned after a ReLU, signed where the layer reads negative values."""
        return LearnedClip(bits, signed=row.signed, clip_init=self.settings.clip_init)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weights, and clip levels with a learning rate of their own; weight decay acts on both."""
        clips, weights = split_parameters(model)
        return [{"params": weights}, {"params": clips, "lr_factor": self.settings.clip_lr}]

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Cross-entropy, plus the penalty when there is one."""
        penalty = self.settings.clip_penalty
        for loss in super().losses(model, images, labels):
            yield loss + penalty * sum(p.square() for p in split_parameters(model)[0]) if penalty else loss

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """The clip levels, and a scale for each weight tensor with variant C."""
        layers = sum(1 for _ in modules.quantized_layers(model))
        return len(scales) + (layers if self.settings.variant == "C" else 0)
