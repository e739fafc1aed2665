"""A search space of one's own: 2, 4 or 8 bits for the weights of each layer and for what it reads.

    raysearch sweep --space tests/examples/narrow_or_wide.py

A space maps addresses in the configuration of a trial to Optuna's distributions: the widths of each layer, and here the
learning rate, too. `layers` are the rows of the traced model (`trainables.cost.Layer`).
"""

from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution


def space(layers: Sequence[Any]) -> dict[str, BaseDistribution]:
    """Three widths a layer and role, and the learning rate, as a logarithm; the first layer reads 8-bit pixels."""
    found: dict[str, BaseDistribution] = {"optimizer/lr": FloatDistribution(1e-3, 1e-1, log=True)}
    for row in layers:
        found[f"bits/{row.name}/weight"] = CategoricalDistribution((2, 4, 8))
        if not row.first:
            found[f"bits/{row.name}/activation"] = CategoricalDistribution((2, 4, 8))
    return found
