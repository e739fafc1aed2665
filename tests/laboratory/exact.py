"""The exact Pareto front of a chain of layers, by dynamic programming over its layers.

A partial front of (cost, S) is kept for each weight width of the last layer, because that is all the next layer's
coupling asks for; without coupling one partial front serves all. A partial point that another one equals or beats in
both columns cannot become part of the front.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tests.laboratory.problems import Problem

Points = tuple[np.ndarray, np.ndarray]


def exact_front(problem: "Problem", *, bins: int | None = None) -> Points:
    """Costs (ascending, in macs x bits x bits) and S (descending) of all configurations that none dominates.

    Args:
        problem: any number of layers.
        bins: keep only the best point in each of so many equal parts of the cost's range; None keeps all. What is kept
            can be reached, so the front is at most one bin off for each layer, and in practice far less.
    """
    widths = np.array(problem.widths, dtype=float)
    edge = 64 * float(problem.macs.sum()) / bins if bins else 0.0
    joined = bool(problem.coupling.any())
    fronts: list[Points] = []
    for layer, macs in enumerate(problem.macs):
        noise = _terms(problem, layer)
        rest = (problem.activation[layer] * problem.decay[2 * layer + 1] ** -widths) ** problem.power
        before = _merged(fronts, edge) if fronts and not joined else None
        current = []
        for i, width in enumerate(widths):
            if not fronts:
                start = np.zeros(1), np.zeros(1)
            elif before is not None:
                start = before
            else:
                last = np.sqrt(_terms(problem, layer - 1) * noise[i]) * problem.coupling[layer - 1]
                start = _merged([(cost, sums + term) for (cost, sums), term in zip(fronts, last, strict=True)], edge)
            costs = (start[0][:, None] + macs * width * widths).ravel()
            sums = (start[1][:, None] + noise[i] + rest).ravel()
            current.append(_pruned(costs, sums, edge))
        fronts = current
    return _merged(fronts, edge)


def _terms(problem: "Problem", layer: int) -> np.ndarray:
    """What the layer's weights add to S, for each width."""
    return (problem.weight[layer] * problem.decay[2 * layer] ** -np.array(problem.widths, dtype=float)) ** problem.power


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
