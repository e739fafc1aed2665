"""N2UQ: one width for all weights and one for all activations, 1 to 8, learning rate of thresholds, share of a teacher.

For method `n2uq`. The share is searched where the configuration names a teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution


def space(layers: Sequence[Any], config: Mapping[str, Any] | None = None) -> dict[str, BaseDistribution]:
    """Two ordered integers, a factor around the paper's 0.1, and from equal shares to the teacher alone.

    Args:
        layers: any; the first and the last layer keep 8 bits.
        config: the tree of the configuration that the search starts from, if there is one.
    """
    found: dict[str, BaseDistribution] = {
        "bits/*/weight": IntDistribution(1, 8),
        "bits/*/activation": IntDistribution(1, 8),
        "method/threshold_lr": FloatDistribution(1e-2, 1.0, log=True),
    }
    method = (config or {}).get("method", {})
    if isinstance(method, Mapping) and method.get("teacher") is not None:
        found["method/teacher_weight"] = FloatDistribution(0.5, 1.0)
    return found
