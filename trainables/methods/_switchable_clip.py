"""Clip levels that switch with the width (S-CL of AdaBits), and which place of a network a width has."""

from typing import Any

import torch
from torch import Tensor, nn

from trainables.errors import ConfigError
from trainables.methods._norm_sets import load_rows
from trainables.methods._sat_quantizers import SatClip


def position(width: int, widths: tuple[int, ...], *, as_published: bool = False) -> int:
    """Which set and clip level a width has.

    Args:
        width: in bits.
        widths: those that have one.
        as_published: the first for all others, as in the authors' code.

    Raises:
        ConfigError: `width` is none of `widths`.
    """
    if width in widths:
        return widths.index(width)
    if as_published:
        return 0
    known = ", ".join(str(known) for known in widths)
    raise ConfigError(f"width {width} was neither trained nor calibrated (there are {known}): add it to extra_widths")


class SwitchableClip(SatClip):
    """SAT's clip with a level for each width (S-CL).

    Args:
        bits: width, 1..32.
        levels: how many.
        options: those of `SatClip`.

    Attributes:
        index: the level in use; shape ().
        clip_max: shape (levels,).
    """

    index: Tensor

    def __init__(self, bits: int, *, levels: int, **options: Any) -> None:
        super().__init__(bits, **options)
        self.register_buffer("index", torch.zeros((), dtype=torch.long))
        self.clip_max = nn.Parameter(self.clip_max.detach().repeat(levels))

    def level(self) -> Tensor:
        """The bound in use, shape (); the others get a gradient of 0."""
        if self.clip_max.is_cpu and not torch.compiler.is_compiling():
            return self.clip_max[int(self.index)]
        return self.clip_max.index_select(0, self.index.unsqueeze(0))[0]

    def start(self, bound: Tensor) -> None:
        """Set the bound in use."""
        self.clip_max.index_copy_(0, self.index.unsqueeze(0), bound.unsqueeze(0))

    @torch.no_grad()
    def adopt(self, row: int, source: int) -> None:
        """Start the level `row` from the level `source`."""
        self.clip_max[row] = self.clip_max[source]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        load_rows(self, state_dict, prefix, ("clip_max",))
        super()._load_from_state_dict(state_dict, prefix, *args)
