"""An objective of one's own: the energy of one input's multiplications and additions, in picojoules.

    raysearch sweep --measure energy=tests/examples/energy.py --objectives accuracy:max,energy:min

After Horowitz 2014, doi:10.1109/ISSCC.2014.6757323, at 45 nm: an 8-bit integer multiplication takes 0.2 pJ and grows
with the product of the widths, a 32-bit addition 0.1 pJ. Memory, which takes most of a real device's energy, is left
out. The parameters' names say that this is one layer's part, known before training.
"""

from trainables.cost import Layer, LayerBits

MULTIPLICATION_PJ, ADDITION_PJ = 0.2 / (8 * 8), 0.1


def measure(layer: Layer, bits: LayerBits) -> float:
    """Picojoules of one layer."""
    return layer.macs * (MULTIPLICATION_PJ * bits.weight * bits.activation + ADDITION_PJ)
