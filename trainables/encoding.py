"""What integer codes stand for: the one thing that an exported file must know of a quantizer.

A file gives the same logits bit for bit only if it computes in the order in which the quantizer did, so there is a
class for each order. All levels are `scale * (code * unit_step + unit_offset)` in exact arithmetic; the classes differ
in how they round that, and in how they find the code of a number:

| class | a value is | a code is | of |
|---|---|---|---|
| `Encoding` | `scale * (code / divisor + offset)` | `round((x / scale - offset) * divisor)` | all others |
| `Bounded` | `code * step + base`, from a bound | `round(x / step - low)`, or floor | SAT, AdaBits |
| `Thresholds` | `scale * code` | how many thresholds lie below x | N2UQ |
| `Clipped` | x, clipped | | 32 bits with a range |
| `Dynamic` | `largest / steps * code` | as `Bounded`, `largest` from the tensor at hand | BSQ |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from trainables.errors import ConfigError

MOST_BITS = 16
"""Width of the widest codes that files hold."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The affine map between codes and numbers, `scale * (code / divisor + offset)`.

    Attributes:
        bits: width in which a code is stored, 0..16; 0 bits are all zeros.
        q_min: smallest code.
        q_max: largest code; at most `q_min + 2^bits - 1`.
        scale: in the units of the tensor; shape (), or (channels,) for channels first.
        divisor: of the codes, > 0.
        offset: added to the divided codes.
        multiplies_first: whether codes come from `x * divisor / scale`, which rounds otherwise.
    """

    bits: int
    q_min: int
    q_max: int
    scale: Tensor
    divisor: float = 1.0
    offset: float = 0.0
    multiplies_first: bool = False

    usual_scale: ClassVar[float] = 1.0
    """A scale that goes without saying: a file does not store it."""

    def _scale_like(self, x: Tensor) -> Tensor:
        return self.scale if self.scale.dim() == 0 else self.scale.view(-1, *[1] * (x.dim() - 1))

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, as floats: `round(clip((x / scale - offset) * divisor))`, half to even."""
        if self.multiplies_first:
            codes = (x * self.divisor).div_(self._scale_like(x))
        else:
            codes = x / self._scale_like(x)
            if self.offset:
                codes = codes.sub_(self.offset)
            if self.divisor != 1:
                codes = codes.mul_(self.divisor)
        return codes.clamp_(self.q_min, self.q_max).round_()

    def decode(self, codes: Tensor) -> Tensor:
        """What `codes` (floats) stand for, same shape.

        >>> import torch
        >>> half = torch.tensor(0.5)
        >>> Encoding(bits=2, q_min=0, q_max=3, scale=half, divisor=1.5, offset=-1).decode(torch.arange(4.0))
        tensor([-0.5000, -0.1667,  0.1667,  0.5000])
        """
        values = codes / self.divisor if self.divisor != 1 else codes
        if self.offset:
            values = values + self.offset
        return values * self._scale_like(values)

    def rounded(self, x: Tensor) -> Tensor:
        """`x` at the nearest levels."""
        return self.decode(self.codes(x))

    @property
    def unit_step(self) -> float:
        """Distance of two levels over the scale."""
        return 1 / self.divisor

    @property
    def unit_offset(self) -> float:
        """Value of the code 0 over the scale."""
        return self.offset

    @property
    def unit_shift(self) -> float:
        """The number over the scale whose code is 0 before rounding to the nearest."""
        return self.offset

    @property
    def step(self) -> Tensor:
        """Distance of two levels, as float64; shape of `scale`."""
        return self.scale.double() * self.unit_step

    @property
    def zero_point(self) -> float:
        """The code of the number 0; not an integer for DoReFa-Net's weights, which have no level there."""
        return -self.unit_offset / self.unit_step


@dataclass(frozen=True, kw_only=True)
class Bounded(Encoding):
    """Equal levels between 0, or minus a bound, and the bound: `code * step + base`.

    Attributes:
        scale: the bound, > 0; shape ().
        two_sided: whether the range is -bound..bound.
        steps: how many steps the range has: q_max, or q_max + 1 where all levels have an equal share of it.
        middle: whether a level stands for the middle of its share, not for its lower end.
        scales_last: whether the levels are those of the bound 1, multiplied by the scale afterwards.
    """

    two_sided: bool
    steps: int
    middle: bool
    scales_last: bool = False

    @property
    def _floors(self) -> bool:
        return self.steps > self.q_max

    @property
    def _span(self) -> int:
        return 2 if self.two_sided else 1

    @property
    def unit_step(self) -> float:
        """Distance of two levels over the bound."""
        return 1 / self.steps * self._span

    @property
    def unit_offset(self) -> float:
        """Value of the code 0 over the bound."""
        return -int(self.two_sided) + (self.unit_step / 2 if self.middle else 0.0)

    @property
    def unit_shift(self) -> float:
        """Rounding down is rounding half a step further down."""
        return -int(self.two_sided) + (self.unit_step / 2 if self._floors else 0.0)

    def _bound(self) -> Tensor:
        """float64, as numbers outside of tensors are."""
        return torch.ones_like(self.scale, dtype=torch.float64) if self.scales_last else self.scale.double()

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, as floats, by a product with the inverse of the step."""
        x = x / self.scale if self.scales_last else x
        step = self._bound() * self._span * (1 / self.steps)
        codes = x * (1 / step).to(x.dtype)
        if self.two_sided:
            codes = codes + (self._bound() / step).to(x.dtype)
        codes = codes.clamp(0, self.q_max)
        return codes.floor() if self._floors else codes.round()

    def decode(self, codes: Tensor) -> Tensor:
        """What `codes` (floats) stand for, same shape."""
        bound = self._bound()
        step = bound * self._span * (1 / self.steps)
        values = codes * step.to(codes.dtype)
        if self.two_sided or self.middle:
            base = step * (0.5 if self.middle else 0.0) - bound * int(self.two_sided)
            values = values + base.to(codes.dtype)
        return values * self.scale if self.scales_last else values


@dataclass(frozen=True, kw_only=True)
class Thresholds(Encoding):
    """Codes count the thresholds below a number.

    Attributes:
        thresholds: in the units of x, rising; shape (q_max,).
        falls: whether codes fall with x: they count the thresholds below -x.
    """

    thresholds: Tensor
    falls: bool = False

    @classmethod
    def of(
        cls,
        codes: Callable[[Tensor], Tensor],
        near: Tensor,
        within: float,
        *,
        bits: int,
        scale: Tensor,
        falls: bool = False,
    ) -> "Thresholds":
        """Thresholds of a quantizer, exactly as float32 rounds in it.

        Each is the largest number whose code is not above the threshold's; codes are monotone, so bisection finds it.

        Args:
            codes: of numbers, (count,).
            near: about where the thresholds are, rising; those of -x if codes fall with x.
            within: how far off they may be.
            bits: width of the codes.
            scale: what the code 1 stands for.
            falls: whether codes fall with x.

        >>> found = Thresholds.of(torch.floor, torch.tensor([1.0, 2.0, 3.0]), 0.1, bits=2, scale=torch.tensor(1.0))
        >>> (found.thresholds < torch.arange(1.0, 4)).tolist(), found.codes(torch.tensor([0.9, 1.0, 2.5, 9.0])).tolist()
        ([True, True, True], [0.0, 1.0, 2.0, 3.0])
        """
        low, high = (_order((near + side).float().cpu().numpy()) for side in (-within, within))
        numbers = torch.arange(len(near), dtype=torch.float32)
        while (high - low > 1).any():
            middle = (low + high) >> 1
            x = torch.from_numpy(_float_of_order(middle))
            below = (codes(-x if falls else x).cpu() <= numbers).numpy()
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        thresholds = torch.from_numpy(_float_of_order(low))
        return cls(bits=bits, q_min=0, q_max=len(near), scale=scale.cpu(), thresholds=thresholds, falls=falls)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, as floats; a number on a threshold gets the lower one."""
        read = (-x if self.falls else x).contiguous()
        return torch.empty_like(x).copy_(torch.bucketize(read, self.thresholds))


def _order(x: "np.ndarray") -> "np.ndarray":
    """Place of float32 numbers in the order of all, 0 for 0."""
    bits = x.view(np.uint32).astype(np.int64)
    return np.where(bits >= 0x80000000, 0x80000000 - bits, bits)


def _float_of_order(order: "np.ndarray") -> "np.ndarray":
    """The inverse of `_order`."""
    bits = np.where(order < 0, 0x80000000 - order, order)
    return bits.astype(np.uint32).view(np.float32)


@dataclass(frozen=True, kw_only=True)
class Dynamic(Encoding):
    """Multiples of `largest / q_max`, where `largest` is the largest magnitude of the whole tensor at hand.

    What a batch gives depends on all of its images, then. With `q_min` = 0, numbers are clipped to 0..`scale` first.
    """

    usual_scale: ClassVar[float] = 6.0

    def largest(self, x: Tensor) -> Tensor:
        """The range of `x`, shape ()."""
        if self.q_min < 0:
            return torch.maximum(-x.amin(), x.amax())
        return x.amax().clamp_min(0).minimum(self.scale)

    def rounded(self, x: Tensor) -> Tensor:
        """`x` at the nearest levels of its own range."""
        largest = self.largest(x)
        codes = (x * self.q_max) / torch.where(largest > 0, largest, 1.0)
        return codes.clamp(self.q_min, self.q_max).round() / self.q_max * largest


@dataclass(frozen=True, kw_only=True)
class Clipped(Encoding):
    """No codes: numbers are clipped to 0..`scale`, or with a `q_min` below 0 to `-scale..scale`."""

    def rounded(self, x: Tensor) -> Tensor:
        """`x` within the range."""
        low = -self.scale if self.q_min < 0 else torch.zeros_like(self.scale)
        return x.clamp(low, self.scale)


def codes_of(name: str, values: Tensor, encoding: Encoding) -> Tensor:
    """Codes of weights that are quantized already, as floats.

    Args:
        name: of the layer, for the error.
        values: what the weight quantizer made of the weights.
        encoding: that of the quantizer.

    Raises:
        ConfigError: the codes do not stand for exactly these weights.
    """
    if not encoding.bits:
        return torch.zeros_like(values)
    codes = encoding.codes(values)
    if isinstance(encoding, Bounded):  # a level that rounding down would miss by one rounding error
        codes = (((values / encoding.scale) - encoding.unit_offset) / encoding.unit_step).round()
    wrong = int((encoding.decode(codes) != values).sum())
    if wrong:
        raise ConfigError(
            f"layer {name}: {wrong} of {values.numel()} weights are none of the {encoding.q_max - encoding.q_min + 1} "
            f"levels of its {encoding.bits} bits, so codes cannot hold them (1 bit: weights that are exactly 0)"
        )
    return codes
