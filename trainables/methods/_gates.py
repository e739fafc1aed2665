"""Gates of Bayesian Bits: their distribution, the quantizer that has them, and what open gates cost.

Van Baalen et al. 2020, arXiv:2005.07093; the distribution is the hard concrete one of Louizos et al. 2018,
arXiv:1712.01312. Paper symbols: `gate_logits` and `pruning_logits` are phi, of the levels 4 to 32 and of the channels;
gates are z, `clip_max` is beta.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables import modules
from trainables.cost import FLOAT_BITS
from trainables.encoding import Clipped, Encoding
from trainables.methods._gated_rounding import LEVELS, gated_quantize, level_step, range_end
from trainables.quantize import SMALLEST_SCALE

GATED = LEVELS[1:]
TEMPERATURE, STRETCH_LOW, STRETCH_HIGH = 2 / 3, -0.1, 1.1
"""Of the hard concrete distribution: the paper's beta, gamma and zeta."""
SHIFT = TEMPERATURE * math.log(-STRETCH_HIGH / STRETCH_LOW)
"""A gate with logit phi is not zero with probability sigmoid(phi + SHIFT)."""
OPEN_ABOVE = math.log(0.66 / 0.34) - SHIFT
"""The logit of a gate that is zero with probability 0.34."""
OFF_BELOW = -2.0
"""A level with this logit or a lower one is off for good."""
GATE_INIT = (6.0, 6.0, -6.0, -6.0)
"""Starting logits of the levels 4, 8, 16 and 32, as published for MNIST: at most 8 bits."""
PRUNING_INIT = 6.0
"""Starting logit of the gates of channels."""
RANGE_FLOOR = 0.01
"""Ranges stay above this share of their start."""
UNQUANTIZED = FLOAT_BITS
"""The fixed width that leaves a tensor as it is."""


def hard_concrete(logits: Tensor, noise: Tensor) -> Tensor:
    """Gates drawn from the stretched and clamped concrete distribution, 0..1, differentiable in `logits`.

    Args:
        logits: any shape.
        noise: uniform in 0..1, same shape; 0.5 gives the deterministic gate.
    """
    s = torch.sigmoid((noise.logit() + logits) / TEMPERATURE)
    return (s * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def probability_open(logits: Tensor) -> Tensor:
    """Probability that a drawn gate is not zero (the paper's q)."""
    return torch.sigmoid(logits + SHIFT)


class GatedQuantizer(modules.Quantizer):
    """The quantizer of one tensor, with one range and one gate a level.

    `q_min` and `q_max` are those of the width that tests use; `sync` brings them up to date.

    Args:
        signed: whether values below zero exist.
        gate_init: logits of the levels 4, 8, 16 and 32.
        channels: number of output channels with a pruning gate each, 0 for none.
        prunes: whether this quantizer multiplies by its channel gates; else whoever asks for `channel_gates` does.
        bits: None learns the width; 2, 4, 8 or 16 fixes it; 32 leaves the tensor as it is.
        macs_share: MACs of the layers that read the tensor over those of the largest layer; None counts levels as 1.
        readers: how often one tensor is read in a forward pass; it is quantized once.
        noise: draws uniform numbers 0..1, `noise(count)`; None for deterministic gates.
    """

    clip_floor: Tensor

    def __init__(
        self,
        *,
        signed: bool,
        gate_init: Iterable[float] = GATE_INIT,
        channels: int = 0,
        prunes: bool = True,
        bits: int | None = None,
        macs_share: float | None = None,
        readers: int = 1,
        noise: Callable[..., Tensor] | None = torch.rand,
    ) -> None:
        super().__init__(LEVELS[0], signed=signed, symmetric=True)
        self.fixed_bits, self.prunes, self.noise = bits, prunes, noise
        self.macs_share, self.readers = macs_share, readers
        self.frozen = False
        self._kept: tuple[Tensor, Tensor, int] | None = None
        self.clip_max = nn.Parameter(torch.ones(()))
        self.gate_logits = nn.Parameter(torch.tensor(list(gate_init)))
        self.pruning_logits = nn.Parameter(torch.full((channels,), PRUNING_INIT)) if channels else None
        self.register_buffer("clip_floor", torch.zeros(()))
        self.sync()

    @property
    def bits(self) -> int:
        """Width in tests: doubled from 2 by each open gate up to the first closed one."""
        if self.fixed_bits is not None:
            return self.fixed_bits
        opened = (self.gate_logits.detach() > OPEN_ABOVE).tolist()
        return LEVELS[[*opened, False].index(False)]

    def set_bits(self, bits: int) -> None:
        """Set the gates to a width, far open up to it and off above, and the codes with them.

        Raises:
            ValueError: no level has this width, or the width is fixed.
        """
        if "gate_logits" not in self._parameters:  # the constructor of the base class calls this
            super().set_bits(bits)
            return
        allowed = LEVELS if self.fixed_bits is None else (self.fixed_bits,)
        if bits not in allowed:
            raise ValueError(f"bits = {bits}: this quantizer takes {', '.join(map(str, allowed))}")
        super().set_bits(bits)
        wanted = [PRUNING_INIT if level <= bits else -PRUNING_INIT for level in GATED]
        self.gate_logits.data.copy_(torch.tensor(wanted))

    def sync(self) -> None:
        """Give `q_min` and `q_max` the values of the width that tests use."""
        super().set_bits(self.bits)

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, magnitude: bool = True) -> None:
        """Start the range at the largest magnitude, or at the largest value as published."""
        largest = x.abs().max() if magnitude else x.max()
        largest = torch.where(largest > 0, largest, x.abs().max())
        self.clip_max.copy_(largest.clamp_min(SMALLEST_SCALE))
        self.clip_floor.copy_(self.clip_max * RANGE_FLOOR)

    def _draw(self, logits: Tensor) -> Tensor:
        """Gates of a training step, or those of tests."""
        if not self.training or self.frozen:
            return (logits > OPEN_ABOVE).to(logits.dtype)
        if self.noise is None:
            return hard_concrete(logits, torch.full_like(logits, 0.5))
        return hard_concrete(logits, self.noise(len(logits), device=logits.device, dtype=logits.dtype))

    def gates(self) -> Tensor:
        """Gates of the levels 4, 8, 16 and 32, each 0..1; shape (4,)."""
        if self.fixed_bits is not None:
            return self.clip_max.new_tensor([float(level <= self.fixed_bits) for level in GATED])
        on = (self.gate_logits.detach() > OFF_BELOW).cumprod(0)
        return self._draw(self.gate_logits) * on

    def channel_gates(self) -> Tensor:
        """Gates of the output channels, each 0..1; shape (channels,)."""
        assert self.pruning_logits is not None
        return self._draw(self.pruning_logits)

    def kept(self) -> Tensor | None:
        """Which output channels tests keep, bool, shape (channels,); None: all."""
        return None if self.pruning_logits is None else self.pruning_logits.detach() > OPEN_ABOVE

    def open_share(self) -> float:
        """Share of the output channels that tests keep."""
        kept = self.kept()
        return 1.0 if kept is None else float(kept.double().mean())

    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """Multiples of the step of the width that tests use; at 32 bits the range alone, or None for weights."""
        bits, clip_max = self.bits, max(float(self.clip_max.detach()), SMALLEST_SCALE)
        q_max = 2 ** (bits - 1) - 1 if self.signed else 2**bits - 1
        q_min = -q_max if self.signed else 0
        if bits < FLOAT_BITS:
            step = level_step(LEVELS.index(bits), self.signed) * clip_max
            return Encoding(bits=bits, q_min=q_min, q_max=q_max, scale=torch.tensor(step))
        if x is not None or self.fixed_bits == UNQUANTIZED:
            return None
        end = clip_max * range_end(self.clip_max.dtype)
        return Clipped(bits=bits, q_min=q_min, q_max=q_max, scale=torch.tensor(end))

    def forward(self, x: Tensor) -> Tensor:
        """The quantized `x`, any shape; channels first when they are pruned."""
        if self.readers == 1:
            return self._quantize(x)
        kept, self._kept = self._kept, None
        _, y, left = kept if kept is not None and kept[0] is x else (x, self._quantize(x), self.readers)
        if left > 1:
            self._kept = (x, y, left - 1)
        return y

    def _quantize(self, x: Tensor) -> Tensor:
        factors = None
        if self.pruning_logits is not None and self.prunes:
            factors = self.channel_gates().view(-1, *[1] * (x.dim() - 1))
        if self.fixed_bits != UNQUANTIZED:
            x = gated_quantize(x, self.clip_max, self.gates(), signed=self.signed)
        return x if factors is None else x * factors


def penalties(quantizers: list[GatedQuantizer]) -> Tensor:
    """The penalty of each quantizer, before `penalty_strength`; shape (quantizers,)."""
    like = quantizers[0].gate_logits
    logits = torch.stack([q.gate_logits for q in quantizers])
    reached = functional.logsigmoid(logits + SHIFT).cumsum(1).exp()  # q_4, q_4 q_8, ...
    factors = like.new_tensor([_factors(q) for q in quantizers])
    total = factors[:, 0] + (factors[:, 1:] * reached).sum(1)
    pruned = [i for i, q in enumerate(quantizers) if q.pruning_logits is not None]
    if not pruned:
        return total
    channels = [quantizers[i].pruning_logits for i in pruned]
    kept = probability_open(torch.cat(channels)).split([len(c) for c in channels])  # type: ignore[arg-type]
    shares = torch.ones_like(total).index_copy(0, torch.tensor(pruned, device=like.device), _means(kept))
    return total * shares


def _means(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack([part.mean() for part in parts])


def _factors(quantizer: GatedQuantizer) -> list[float]:
    """What each level costs. Where no channel is pruned the first is a constant, 1 as published."""
    if quantizer.macs_share is None:
        return [1.0] * len(LEVELS)
    first = LEVELS[0] * quantizer.macs_share if quantizer.pruning_logits is not None else 1.0
    return [first, *(level * quantizer.macs_share for level in GATED)]


def quantizers(model: nn.Module) -> list[GatedQuantizer]:
    """All quantizers, each once."""
    return [module for module in model.modules() if isinstance(module, GatedQuantizer)]
