"""The exact Pareto front of a sum over layers, by dynamic programming over the layers.

In a chain of layers a partial front of (cost, S) is kept for each weight width of the last layer, because that is all
the next layer's coupling asks for; without coupling one partial front serves all. A partial point that another one
equals or beats in both columns cannot become part of the front.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.laboratory.problems import Chain

Points = tuple[np.ndarray, np.ndarray]


def separable_front(costs: Sequence[np.ndarray], sums: Sequence[np.ndarray], edge: float = 0.0) -> Points:
    """Costs (ascending) and sums (descending) of all choices of one option a layer that none dominates.

    Args:
        costs, sums: of each layer's options, (options,).
        edge: width of the parts of the cost's range of which only the best point is kept; 0 keeps all.
    """
    front: Points = np.zeros(1), np.zeros(1)
    for cost, term in zip(costs, sums, strict=True):
        front = _pruned((front[0][:, None] + cost).ravel(), (front[1][:, None] + term).ravel(), edge)
    return front


def exact_front(problem: "Chain", *, bins: int | None = None) -> Points:
    """Costs (ascending, in macs x bits x bits) and S (descending) of a chain's configurations that none dominates.

    Args:
        problem: any number of layers.
        bins: keep only the best point in each of so many equal parts of the cost's range; None keeps all. What is kept
            can be reached, so the front is at most one bin off for each layer, and in practice far less.
    """
    widths = np.array(problem.bits, dtype=float)
    edge = problem.widest / bins if bins else 0.0
    fronts: list[Points] = []
    before = np.zeros(len(widths))
    for layer, macs in enumerate(problem.macs):
        noise, rest = problem.terms(layer)
        current = []
        for i, width in enumerate(widths):
            start: Points = np.zeros(1), np.zeros(1)
            if fronts:
                last = np.sqrt(before * noise[i]) * problem.coupling[layer - 1]
                start = _merged([(cost, sums + term) for (cost, sums), term in zip(fronts, last, strict=True)], edge)
            costs = (start[0][:, None] + macs * width * widths).ravel()
            sums = (start[1][:, None] + noise[i] + rest).ravel()
            current.append(_pruned(costs, sums, edge))
        fronts, before = current, noise
    return _merged(fronts, edge)


def _merged(fronts: list[Points], edge: float) -> Points:
    costs, sums = (np.concatenate(column) for column in zip(*fronts, strict=True))
    return _pruned(costs, sums, edge)


def _pruned(costs: np.ndarray, sums: np.ndarray, edge: float) -> Points:
    order = np.lexsort((sums, costs))
    costs, sums = costs[order], sums[order]
    lowest = np.minimum.accumulate(sums)
    kept = np.concatenate([[True], sums[1:] < lowest[:-1]])
    costs, sums = costs[kept], sums[kept]
    if edge:  # of a bin the last, which has the least S; and the cheapest of all
        last = np.append(np.diff(np.floor(costs / edge)) > 0, True)
        last[0] = True
        costs, sums = costs[last], sums[last]
    return costs, sums
