"""Hessian-aware stochastic bit switching (HASB): which layer trains at which width in a mixed-precision supernet.

Huang et al. 2025, arXiv:2502.01199, algorithms 1 and A.3. A layer whose average Hessian trace reaches the mean of all
layers is *sensitive* and draws a width b with probability `b / sum of all widths`; the others draw evenly. In a pass at
width b each layer draws with probability sigma, which grows over the epochs, and otherwise keeps b.

The pseudo-code of A.3 overwrites b, so that a layer that does not draw inherits the width of the layer before
(`inherit`); the authors' code keeps the pass's own b, the default here. It also holds sigma at 0 in the first epochs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def sensitive_layers(sensitivities: Tensor) -> Tensor:
    """Which layers reach the mean sensitivity, bool; any shape."""
    return sensitivities >= sensitivities.mean()


def switch_probabilities(sensitive: Tensor, widths: Sequence[int]) -> Tensor:
    """Probability of each width for each layer, float64 (layers, widths); algorithm 1.

    Args:
        sensitive: bool, (layers,).
        widths: in bits, any order.

    >>> switch_probabilities(torch.tensor([False, True]), [2, 6]).tolist()
    [[0.5, 0.5], [0.25, 0.75]]
    """
    by_width = torch.tensor(widths, dtype=torch.float64)
    even = torch.full_like(by_width, 1 / len(widths))
    return torch.where(sensitive[:, None], by_width / by_width.sum(), even)


def roulette(probabilities: Tensor, spins: Tensor) -> Tensor:
    """Index of the first entry whose cumulative probability reaches the spin; the last if rounding keeps it below.

    Args:
        probabilities: (layers, widths), rows sum to 1.
        spins: 0..1, (layers,).
    """
    reached = probabilities.cumsum(dim=1) >= spins[:, None]
    reached[:, -1] = True
    return reached.to(torch.int64).argmax(dim=1)


def switch_rate(epoch: int, epochs: int, *, peak: float, warmup: int) -> float:
    """Sigma: the probability that a layer draws its width.

    Args:
        epoch: 0, 1, ..., epochs - 1.
        epochs: of the whole training; the last one has the peak.
        peak: 0..1, the paper's sigma_0.
        warmup: first epochs without any switching; the ramp goes on counting meanwhile.
    """
    return peak * (epoch + 1) / epochs if epoch >= warmup else 0.0


def layer_widths(
    outer: int, picks: Sequence[int], gates: Sequence[float], rate: float, *, inherit: bool = False
) -> list[int]:
    """Width of each layer in one pass; algorithm A.3.

    Args:
        outer: width of the pass, in bits.
        picks: what each layer draws, in bits, in order of execution.
        gates: 0..1, one for each layer; below `rate` it draws.
        rate: 0..1, sigma.
        inherit: let a layer that does not draw take the width of the layer before, as printed.
    """
    widths: list[int] = []
    for pick, gate in zip(picks, gates, strict=True):
        kept = widths[-1] if inherit and widths else outer
        widths.append(pick if gate < rate else kept)
    return widths


def transitions(outer: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """Keys of the transitional batch norms that the layers feed: width of the layer before, and its own."""
    return list(zip([outer, *widths], widths, strict=False))


def draw_widths(
    probabilities: Tensor, widths: Sequence[int], outer: int, rate: float, *, inherit: bool = False
) -> list[int]:
    """Draw one pass's widths from torch's global generator of the CPU, the same on all ranks.

    Args: as above.
    """
    gates, spins = torch.rand(2, len(probabilities), dtype=torch.float64)
    picks = [widths[i] for i in roulette(probabilities, spins).tolist()]
    return layer_widths(outer, picks, gates.tolist(), rate, inherit=inherit)
