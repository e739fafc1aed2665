"""How to train: learning rate, weight decay and label smoothing, with uniform bits 2 to 8 beside them."""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Logarithmic rates around the defaults of `sgd`, and one width for weights and one for activations."""
    return {
        "bits/*/weight": IntDistribution(2, 8),
        "bits/*/activation": IntDistribution(2, 8),
        "optimizer/lr": FloatDistribution(1e-3, 1e-1, log=True),
        "optimizer/weight_decay": FloatDistribution(1e-6, 1e-3, log=True),
        "training/label_smoothing": FloatDistribution(0.0, 0.2),
    }
