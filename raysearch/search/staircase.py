"""A front of two objectives as a staircase: its members, and what a further point would add. Both are minimised.

Costs are shares: 1 is the largest.
"""

import numpy as np

WORST_COST = 1.1
"""Reference of the hypervolume, in units of the largest cost that is allowed."""


def staircase(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Positions of the front's members, those beside its largest steps first.

    >>> staircase(np.array([0.1, 0.5, 0.6, 1.0]), np.array([3.0, 4.0, 1.0, 0.9])).tolist()
    [0, 2, 3]
    """
    order = np.lexsort((quality, cost))
    lowest = np.minimum.accumulate(quality[order])
    front = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if len(order) else order
    largest = np.argsort(np.diff(cost[front]) * np.diff(quality[front]), kind="stable")
    places = [0] if len(front) == 1 else []
    places += np.column_stack([largest, largest + 1]).ravel().tolist()
    return front[list(dict.fromkeys(places))[: len(front)]]


def gains(
    cost: np.ndarray,
    quality: np.ndarray,
    front_cost: np.ndarray,
    front_quality: np.ndarray,
    largest: float = 1.0,
    worst: float | None = None,
) -> np.ndarray:
    """By how much each candidate enlarges the hypervolume of the points; where it does not, how far it is from it.

    The reference is the worst quality of the points and a tenth of their range more, and 1.1 times the largest cost.
    Where some quality is the worst that counts, and a point reaches it, it is the reference; until then the candidates
    are compared by how near they come to it.

    Args:
        cost, quality: of the candidates, (n,).
        front_cost, front_quality: of the points, (m,); they may dominate each other.
        largest: cost that is allowed; no cost is above it.
        worst: quality that counts.

    >>> gains(np.array([0.5, 0.7]), np.array([2.0, 5.0]), np.array([0.1, 0.6]), np.array([4.0, 3.0])).round(3).tolist()
    [0.7, -2.0]
    """
    every = front_quality if len(front_quality) else quality
    floor = float(every.max() + 0.1 * np.ptp(every)) if len(every) else 0.0
    if worst is not None and worst < floor:
        if (quality > worst).all():  # none is expected to reach it: the nearest first
            return worst - quality
        floor = worst
        counts = front_quality <= worst
        front_cost, front_quality = front_cost[counts], front_quality[counts]
    order = np.lexsort((front_quality, front_cost))
    levels = np.concatenate([[floor], np.minimum.accumulate(front_quality[order])])
    edges = np.concatenate([[0.0], front_cost[order], [WORST_COST * largest]])
    volume = np.concatenate([[0.0], np.cumsum(levels * np.diff(edges))])  # under the staircase, up to each edge
    # A candidate's quality is below the staircase from its own cost to the first step that is as low.
    end = edges[np.searchsorted(-levels, -quality, side="left")]
    gain = np.interp(end, edges, volume) - np.interp(cost, edges, volume) - quality * (end - cost)
    here = levels[np.searchsorted(edges[1:-1], cost, side="right")]
    return np.where((end > cost) & (gain > 0), gain, np.minimum(here - quality, 0.0))
