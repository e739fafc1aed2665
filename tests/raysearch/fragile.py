"""LSQ that fails on purpose where its settings say so, and writes down who trained what.

Widths are those of the space `uniform`: one for all layers between the ends, which keep 8 bits.
"""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from trainables import world
from trainables.method import read_bits
from trainables.methods.lsq import Method as Lsq

DIARY = "FRAGILE_DIARY"
"""Environment variable: the file that every rank writes a line to after each of its epochs."""


class Method(Lsq):
    """Fails at some weight widths; the settings are strings of digits."""

    @dataclass(frozen=True, kw_only=True)
    class Settings(Lsq.Settings):
        """Settings of LSQ, and where to fail."""

        raises: Annotated[str, Field(description="widths at which every rank raises")] = ""
        alone: Annotated[str, Field(description="widths at which the last rank raises alone")] = ""
        diverges: Annotated[str, Field(description="widths at which the loss becomes nan")] = ""
        dies: Annotated[str, Field(description="widths at which the process is killed")] = ""

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Those of LSQ, or a failure."""
        width = str(_width(model))
        if width in self.settings.raises:
            raise ValueError(f"no {width} bits today")
        if width in self.settings.alone and world.rank() == world.size() - 1:
            raise ValueError(f"no {width} bits on rank {world.rank()}")
        if width in self.settings.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        for loss in super().losses(model, images, labels):
            yield loss * float("nan") if width in self.settings.diverges else loss

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Write a line."""
        line = {"width": _width(model), "epoch": epoch, "rank": world.rank(), "pid": os.getpid()}
        with Path(os.environ[DIARY]).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return False


def _width(model: nn.Module) -> int:
    return min(bits.weight for bits in read_bits(model).values())


def read_diary(path: Path) -> list[dict[str, Any]]:
    """The lines so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
