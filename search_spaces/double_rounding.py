"""Double Rounding: lists of widths, learning rates of scales and their scaling, weight of self-distillation.

For method `double_rounding`.
"""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

WIDTHS = ("8,6,4,2", "8,6,4", "8,4", "4,3,2", "8,4,2")
"""The lists of the paper, and two between them."""


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """What is trained together, and how: a trial gives one point for each of its widths."""
    return {
        "method/widths": CategoricalDistribution(WIDTHS),
        "method/alrs": CategoricalDistribution(("eta", "geometric", "scaled", "off")),
        "method/scale_lr": FloatDistribution(1e-3, 1.0, log=True),
        "method/distill": FloatDistribution(0.0, 0.9),
        "method/per_channel": CategoricalDistribution((False, True)),
    }
