"""Bayesian Bits: weight of its penalty, starting logits of its gates, learning rates of gates and ranges.

For method `bayesian_bits` in its modes that learn widths; the levels 16 and 32 stay as the configuration has them.
"""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """The paper's mu, and how soon gates can close: at a rate of 0.3 within thirty steps, at 0.001 in 8000."""
    return {
        "method/penalty_strength": FloatDistribution(1e-3, 1.0, log=True),
        "method/gate_init/4": FloatDistribution(0.0, 6.0),
        "method/gate_init/8": FloatDistribution(0.0, 6.0),
        "method/gate_lr": FloatDistribution(1e-3, 3e-1, log=True),
        "method/scale_lr": FloatDistribution(1e-4, 1e-2, log=True),
    }
