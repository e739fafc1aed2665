"""The quantizers of SAT and AdaBits: weights normalised and rescaled, activations clipped at a trained bound.

Levels are those of a scheme (`_sat_kernels`) between 0 and 1, or -1 and 1; the width is data. 32 bits are float:
weights are normalised (`clamp`) but not rounded, activations are clipped only with `clip_float`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from trainables import modules
from trainables.cost import FLOAT_BITS
from trainables.encoding import Bounded, Clipped, Encoding
from trainables.methods._sat_kernels import (
    FLOAT_CODES,
    Scheme,
    calibrated_clip,
    factor_for,
    normalise,
    rescale_weight,
    round_weight,
)
from trainables.quantize import SMALLEST_SCALE

Target = Literal["constant", "stddev"]


class UnitQuantizer(modules.Quantizer):
    """Codes 0..2^bits - 1 for the levels of 0..1, or of -1..1 where `signed`; 32 bits are float.

    Args:
        bits: width, 1..32.
        signed: whether values below zero exist.
        scheme: which levels.
    """

    def __init__(self, bits: int, *, signed: bool, scheme: Scheme) -> None:
        self.scheme = scheme
        super().__init__(bits, signed=signed)

    def set_bits(self, bits: int) -> None:
        """Change the width, in place, without a new graph.

        Raises:
            ValueError: `bits` out of range.
        """
        if not 1 <= bits <= FLOAT_BITS:
            raise ValueError(f"bits = {bits}: this quantizer takes 1..{FLOAT_BITS}")
        self.q_max.fill_(2.0**bits - 1)

    @property
    def bits(self) -> int:
        """Width in bits."""
        return round(torch.log2(self.q_max.double() + 1).item())

    def _levels(self, scale: Tensor, *, two_sided: bool, scales_last: bool = False) -> Bounded:
        """The levels of the scheme at the present width."""
        top = int(self.q_max)
        return Bounded(
            bits=self.bits,
            q_min=0,
            q_max=top,
            scale=scale,
            two_sided=two_sided,
            steps=top if self.scheme == "original" else top + 1,
            middle=self.scheme == "centered",
            scales_last=scales_last,
        )


class SatWeight(UnitQuantizer):
    """Weights normalised, rounded and, with a target, rescaled.

    Args:
        bits: width, 1..32.
        scheme: which levels.
        target: what the spread of the result is set to; None leaves it.
        clamp: whether weights are normalised at 32 bits, too.

    Attributes:
        normalised: the normalised weights, while somebody else computes them (`normalised_once`).
    """

    def __init__(self, bits: int, *, scheme: Scheme, target: Target | None, clamp: bool = True) -> None:
        super().__init__(bits, signed=True, scheme=scheme)
        self.target = target
        self.clamp = clamp
        self.normalised: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The effective weights, (outputs, inputs, ...)."""
        return self._effective(x, self._wanted(x))

    def _effective(self, x: Tensor, target: Tensor | None) -> Tensor:
        u = normalise(x) if self.normalised is None else self.normalised
        y = round_weight(u, self.q_max, target, scheme=self.scheme)
        return y if self.clamp else torch.where(self.q_max >= FLOAT_CODES, rescale_weight(x, target), y)

    def _wanted(self, x: Tensor) -> Tensor | None:
        if self.target is None:
            return None
        if self.target == "stddev":
            return x.detach().std()
        return x.new_full((), (x.numel() // x.shape[1]) ** -0.5)  # outputs x kernel size

    @torch.no_grad()
    def factor(self, x: Tensor) -> Tensor:
        """What the normalised weights are multiplied by (s); shape ()."""
        return self(x).abs().max() / self._effective(x, None).abs().max()

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """Levels of -1..1, then the scale; None at 32 bits."""
        assert x is not None
        if float(self.q_max) >= FLOAT_CODES:
            return None
        target = self._wanted(x)
        scale = torch.ones(()) if target is None else factor_for(self._effective(x, None), target)
        return self._levels(scale, two_sided=True, scales_last=True)


class SatClip(UnitQuantizer):
    """Activations between 0 (signed: -clip_max) and a trained `clip_max` of either sign.

    Args:
        bits: width, 1..32.
        signed: whether values below zero exist.
        scheme: which levels.
        clip_init: starting bound; None takes it from the first batch.
        clip_float: whether activations are clipped at 32 bits, too.
    """

    def __init__(
        self, bits: int, *, signed: bool, scheme: Scheme, clip_init: float | None = None, clip_float: bool = False
    ) -> None:
        super().__init__(bits, signed=signed, scheme=scheme)
        self.from_batch = clip_init is None
        self.clip_float = clip_float
        self.clip_max = nn.Parameter(torch.tensor(1.0 if clip_init is None else clip_init))

    def level(self) -> Tensor:
        """The bound in use, shape ()."""
        return self.clip_max

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the bound at LSQ's range of the first batch, `2 * mean |x| * sqrt(q_max)`, unless it has a number."""
        if self.from_batch:
            codes = self.q_max.clamp_max(255) / (2 if self.signed else 1)
            self.start((2 * x.abs().mean() * codes.sqrt()).clamp_min(SMALLEST_SCALE))

    def start(self, bound: Tensor) -> None:
        """Set the bound in use."""
        self.clip_max.copy_(bound)

    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """Levels up to the bound in use; at 32 bits the bound alone, or None."""
        bound = self.level().detach().abs().clamp_min(SMALLEST_SCALE)
        if float(self.q_max) < FLOAT_CODES:
            return self._levels(bound, two_sided=self.signed)
        if not self.clip_float:
            return None
        return Clipped(bits=FLOAT_BITS, q_min=-int(self.signed), q_max=1, scale=bound)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        return calibrated_clip(
            x, self.level(), self.q_max, scheme=self.scheme, signed=self.signed, clip_float=self.clip_float
        )


@contextmanager
def normalised_once(model: nn.Module) -> Iterator[None]:
    """Normalise all weights now, for every forward inside, and carry the sum of the gradients through on leaving.

    What the widths of a joint step share. Until then the weights have no gradient.
    """
    held = []
    for _, layer in modules.quantized_layers(model):
        assert isinstance(layer.weight_quantizer, SatWeight)
        whole = normalise(layer.weight)
        part = whole.detach().requires_grad_(whole.requires_grad)
        layer.weight_quantizer.normalised = part
        held.append((layer.weight_quantizer, whole, part))
    try:
        yield
    finally:
        for quantizer, _, _ in held:
            quantizer.normalised = None
    reached = [(whole, part.grad) for _, whole, part in held if part.grad is not None]
    torch.autograd.backward([whole for whole, _ in reached], [grad for _, grad in reached])
