"""What N2UQ puts into a network: RPReLU, trained thresholds, weights of the largest entropy, residual blocks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainables import modules
from trainables.encoding import Encoding, Thresholds
from trainables.errors import ConfigError
from trainables.methods._n2uq_exported import PlainRPReLU, Strided
from trainables.methods._n2uq_kernels import Memory, entropy_levels, entropy_weight, rprelu
from trainables.methods._threshold_kernels import (
    NARROWEST,
    OUTPUT_RANGE,
    Prepared,
    knots,
    look_up,
    prepare,
    threshold_quantize,
)
from trainables.methods.pact import LearnedClip
from trainables.quantize import SMALLEST_SCALE

MOST_BITS = 8


class RPReLU(nn.Module):
    """`prelu(x + shift) + offset` with a slope, a shift and an offset for each channel.

    Args:
        channels: how many.
        dim: which dimension of the input they are.
        slope: where the slopes start.
    """

    def __init__(self, channels: int, *, dim: int = 1, slope: float = 0.25) -> None:
        super().__init__()
        self.dim = dim
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels at `dim`."""
        return rprelu(x, self.shift, self.slope, self.offset, self.dim)

    def plain(self) -> nn.Module:
        """The same of torch's operators, for exports."""
        return PlainRPReLU(self.shift, self.slope, self.offset, self.dim)


class LearnedThresholds(modules.Quantizer):
    """Trained thresholds, equal output levels from 0 to `2 * output_scale`.

    At first it rounds `clip(x, 0, 2)` to equal steps; a change of width starts the thresholds anew. The parameter
    `widths` has the length of `MOST_BITS`, so that the state dict has one shape; only the first `q_max` are used.

    Args:
        bits: width, 1..8.
        activation: what x goes through first, if anything.
        from_batch: start the range from the first batch instead.
        stride: read every so many pixels only, those that a strided 1 x 1 convolution reads.

    Attributes:
        prepared: what follows from the parameters, while somebody else computes it (`prepared_thresholds`).
    """

    def __init__(
        self, bits: int, *, activation: RPReLU | None = None, from_batch: bool = False, stride: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__(bits, signed=False)
        self.activation = activation
        self.from_batch = from_batch
        self.stride = stride
        self.prepared: Prepared | None = None
        self.start = nn.Parameter(torch.zeros(()))
        self.widths = nn.Parameter(torch.zeros(2**MOST_BITS - 1))
        self.input_scale = nn.Parameter(torch.ones(()))
        self.output_scale = nn.Parameter(torch.ones(()))
        self.set_bits(bits)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the width; the segments become equal."""
        super().set_bits(bits)
        if "widths" in self._parameters:
            self.widths.fill_(OUTPUT_RANGE / float(self.q_max))

    @property
    def thresholds(self) -> Tensor:
        """The thresholds in use, in the units of `input_scale * x`, rising; shape (2^bits - 1,)."""
        return knots(self.start, self.widths, self.q_max)[1].detach()

    def _read(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)
        return x if self.activation is None else self.activation(x)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """With `from_batch`, let the range be `2 * mean |x| * sqrt(q_max)` (as `pact`) instead of 2."""
        if self.from_batch:
            reach = 2 * self._read(x).relu().mean() * self.q_max.sqrt()
            self.output_scale.copy_((reach / OUTPUT_RANGE).clamp_min(SMALLEST_SCALE))
            self.input_scale.copy_(1 / self.output_scale)

    def before(self) -> nn.Module | None:
        """Stride and activation."""
        parts = [Strided(self.stride)] if self.stride != (1, 1) else []
        return nn.Sequential(*parts, *([] if self.activation is None else [self.activation])) or None

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Thresholds of what is read, and the distance of the levels."""
        level = self.output_scale.detach() * OUTPUT_RANGE / self.q_max
        factor = self.input_scale.detach()
        if 0 in (float(factor), float(level)):
            raise ConfigError("one of its scales is 0, so that its codes do not depend on the input; train it again")
        return Thresholds.of(
            lambda read: (threshold_quantize(read, *self.arguments()) / level).round(),
            near=self.thresholds / factor.abs(),
            within=NARROWEST / 4 / float(factor.abs()),
            falls=bool(factor < 0),
            bits=self.bits,
            scale=level,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape (4 dimensions with a stride)."""
        x = self._read(x)
        if self.prepared is not None:
            return look_up(x, self.prepared)
        return threshold_quantize(x, *self.arguments())

    def arguments(self) -> tuple[Tensor, ...]:
        """What `threshold_quantize` takes beside x."""
        return self.start, self.widths, self.input_scale, self.output_scale, self.q_max


@contextmanager
def prepared_thresholds(model: nn.Module) -> Iterator[None]:
    """Prepare all quantizers of an eager network on a CPU together, for every forward inside: a fifth of the time."""
    found = [module for module in model.modules() if isinstance(module, LearnedThresholds)]
    if found and found[0].start.is_cpu and not isinstance(model, torch._dynamo.OptimizedModule):
        for module, prepared in zip(found, prepare([module.arguments() for module in found]), strict=True):
            module.prepared = prepared
    try:
        yield
    finally:
        for module in found:
            module.prepared = None


class EntropyWeight(modules.Quantizer):
    """Equal levels around 0 for each filter, scaled by its mean size; bits 1..8.

    Args:
        bits: width.
        rescale: divide gradients by the scale, as the authors' code does.
    """

    clip_range: Tensor

    def __init__(self, bits: int, *, rescale: bool = False) -> None:
        super().__init__(bits, signed=False)
        self.rescale = rescale
        self.register_buffer("clip_range", torch.tensor(2.0), persistent=False)
        self._memory = Memory()

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Levels around 0, with a scale for each filter."""
        assert x is not None
        steps = int(self.q_max)
        scale = entropy_levels(x, self.q_max, self.clip_range)
        return Encoding(bits=self.bits, q_min=0, q_max=steps, scale=scale.flatten(), offset=-steps / 2)

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weights, channels first."""
        return entropy_weight(w, self.q_max, self.clip_range, rescale=self.rescale, memory=self._memory)


class PublishedClip(LearnedClip):
    """PACT with the gradient that the authors' MobileNetV2 gives the clip level: `code / N` more for every element."""

    def forward(self, x: Tensor) -> Tensor:
        """The values of `LearnedClip`."""
        y = super().forward(x)
        return y + (y / self.clip_max).detach() * (self.clip_max - self.clip_max.detach())


class ResidualBlock(nn.Module):
    """A residual block without ReLUs: convolutions with batch norm, a shortcut beside them, an RPReLU after the sum.

    It takes over the parts of `block` under their names, so a float network's state dict fits. The RPReLUs within the
    body belong to the quantizers of its convolutions.
    """

    def __init__(self, block: Any, *, slope: float) -> None:
        super().__init__()
        self.depth = 3 if hasattr(block, "conv3") else 2
        for name, module in block.named_children():
            if not isinstance(module, nn.ReLU):
                self.add_module(name, module)
        if block.downsample is None:
            self.downsample = nn.Identity()
        self.activation = RPReLU(getattr(block, f"bn{self.depth}").num_features, slope=slope)
        self.train(block.training)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = images
        for i in range(1, self.depth + 1):
            features = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(features))
        return self.activation(features + self.downsample(images))
