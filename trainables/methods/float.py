"""Full precision: no quantizers, 32 bits everywhere; the reference, and the start of every other method."""

from torch import nn

from trainables.cost import Bits, LayerTable
from trainables.method import Method as Base
from trainables.method import Point


class Method(Base):
    """Trains the network as it is."""

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Leave the model alone."""

    def points(self, model: nn.Module) -> list[Point]:
        """One point without bits: every layer counts 32 x 32."""
        return [Point(label="final", bits={}, extra_floats=0)]
