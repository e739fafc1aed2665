"""Adaptive learning-rate scaling (ALRS): quantization scales learn the slower, the lower the width.

Huang et al. 2025, arXiv:2502.01199, equations 6 and 7. Low widths give scales large gradients, and a scale shared by
several widths would follow the lowest. Equation 7 divides the learning rate by 1, 2, 10, 20, 100, ... for each bit
below the highest. Equation 6 as printed multiplies that by `lr - mean gradient`, mostly a negative number.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["eta", "geometric", "scaled", "off"]


def eta(lower: int) -> float:
    """Equation 7: 1, .5, .1, .05, ... for a width `lower` bits below the highest.

    >>> [eta(lower) for lower in range(4)]
    [1.0, 0.5, 0.1, 0.05]
    """
    return float(f"5e-{(lower + 1) // 2}") if lower % 2 else float(f"1e-{lower // 2}")


def alrs_rate(
    rule: Rule | Literal["literal"], lr: float, lower: int, *, rank: int = 0, alpha: float = 0.1, gradient: float = 0.0
) -> float:
    """Learning rate of the scales (lambda_b) in the pass at one width.

    Args:
        rule: `eta` is equation 7 alone, `scaled` times `1 - gradient`, our reading of equation 6; `geometric` the
            authors' code; `literal` equation 6 as printed, no lower than 0; `off` changes nothing.
        lr: learning rate (lambda), > 0.
        lower: bits below the highest width.
        rank: number of widths above this one.
        alpha: of `geometric`.
        gradient: `mean_gradient` of the pass.
    """
    if rule == "geometric":
        return lr * alpha**rank
    if rule == "literal":
        return max(0.0, eta(lower) * (lr - gradient))
    factor = {"eta": 1.0, "scaled": 1.0 - gradient}
    return lr * eta(lower) * factor[rule] if rule in factor else lr


def mean_gradient(gradients: Tensor) -> Tensor:
    """The m of equation 6: each layer's largest absolute gradient of a scale, at most 1, averaged; shape ().

    Args:
        gradients: of the scales, (layers, scales).
    """
    return gradients.abs().amax(dim=1).clamp_max(1.0).mean()


class ShortenedStep:
    """One optimizer step of scales, shortened afterwards: for SGD, Adam and AdamW a lower learning rate does just that.

    Args:
        layers: the scales that are about to be trained, layer by layer.
        clipped: clip their gradients to -1..1 before the step, and measure them.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], *, clipped: bool) -> None:
        self.layers = layers
        self.before = [[scale.detach().clone() for scale in layer] for layer in layers]
        self.clipped = clipped
        self.gradient = 0.0

    @torch.no_grad()
    def clip(self) -> None:
        """Clip the gradients, and measure their `mean_gradient`."""
        if not self.clipped:
            return
        largest = []
        for layer in self.layers:
            gradients = [scale.grad for scale in layer if scale.grad is not None]
            largest.append(torch.stack([gradient.clamp_(-1, 1).abs().amax() for gradient in gradients]).amax())
        self.gradient = float(mean_gradient(torch.stack(largest)[:, None]))

    @torch.no_grad()
    def finish(self, rates: Callable[[float], Sequence[float]]) -> None:
        """Shorten the step that was made.

        Args:
            rates: what each layer's step is multiplied by, from the mean gradient.
        """
        for rate, layer, starts in zip(rates(self.gradient), self.layers, self.before, strict=True):
            for scale, start in zip(layer, starts, strict=True):
                scale.copy_(start + (scale - start) * rate)
