"""What integer codes stand for: the one thing that an exported file must know of a quantizer.

Every affine quantizer here computes `scale * (code / divisor + offset)`, in this order: LSQ and PACT with divisor 1 and
offset 0, DoReFa-Net's weights with divisor `(2^bits - 1) / 2` and offset -1, its activations with scale 1. A file that
keeps these numbers and decodes in the same order gives the same floats, bit for bit, which (code - zero point) * step
does not.
"""

from dataclasses import dataclass

from torch import Tensor

from trainables.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The affine map between codes and numbers, `scale * (code / divisor + offset)`.

    Attributes:
        bits: width in which a code is stored, 1..16.
        q_min: smallest code.
        q_max: largest code; at most `q_min + 2^bits - 1`.
        scale: in the units of the tensor; shape (), or (channels,) for channels first.
        divisor: of the codes, > 0.
        offset: added to the divided codes.
    """

    bits: int
    q_min: int
    q_max: int
    scale: Tensor
    divisor: float = 1.0
    offset: float = 0.0

    def _scale_like(self, x: Tensor) -> Tensor:
        return self.scale if self.scale.dim() == 0 else self.scale.view(-1, *[1] * (x.dim() - 1))

    def codes(self, x: Tensor) -> Tensor:
        """Codes of `x`, as floats: `round(clip((x / scale - offset) * divisor))`, half to even."""
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

    @property
    def step(self) -> Tensor:
        """Distance of two levels, as float64; shape of `scale`."""
        return self.scale.double() / self.divisor

    @property
    def zero_point(self) -> float:
        """The code of the number 0; not an integer for DoReFa-Net's weights, which have no level there."""
        return -self.offset * self.divisor


def codes_of(name: str, values: Tensor, encoding: Encoding) -> Tensor:
    """Codes of weights that are quantized already, as floats.

    Args:
        name: of the layer, for the error.
        values: what the weight quantizer made of the weights.
        encoding: that of the quantizer.

    Raises:
        ConfigError: the codes do not stand for exactly these weights.
    """
    codes = encoding.codes(values)
    wrong = int((encoding.decode(codes) != values).sum())
    if wrong:
        raise ConfigError(
            f"layer {name}: {wrong} of {values.numel()} weights are none of the {encoding.q_max - encoding.q_min + 1} "
            f"levels of its {encoding.bits} bits, so codes cannot hold them (1 bit: weights that are exactly 0)"
        )
    return codes
