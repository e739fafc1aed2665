"""A formula for how a network's loss depends on its bits.

Rounding noise quarters with each bit, so a quality y (lower is better: loss, or 1 - accuracy) is modelled as

    y = a + c log(t / (1 + e1 t)),    t = e0 + sum_j s_j 4^-b_j exp(shape_j(b_j) + own_j(b_j))

with a sensitivity s_j > 0 for each bit parameter. With a large e0 this is a sum of independent losses, with a small one
their logarithm; e0 and e1 make it saturate at both ends, as accuracy does between that of the float network and chance.
Where noise does not quarter, shape_j says how it falls for all parameters and for those of a kind, which may all be
more sensitive than guessed, and own_j for one. Each is a line through width 5 and a random walk from width to width: a
line is noise that falls by another factor, a step of the walk a width below which a layer fails.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

LOG4 = np.log(4.0)
OUTER = 4
"""Parameters of the formula outside of the sum: a, log c, log e0, log e1."""
SHAPE, KIND = (0.0, 0.3, 0.3), (1.0, 0.2, 0.0)
"""Widths of the priors of height, slope and steps: of the shape that all share, and of that of a kind."""
MIDDLE = 5.0
"""Bits at which a parameter's noise is s_j 4^-b_j."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """What the vector of all values means: a, log c, log e0, log e1; shapes; and of all parameters log s, lines, walks.

    Attributes:
        kinds: the shapes that each bit parameter has: 1 that of all, then those of its kind, (parameters, shapes).
        edges, gaps: where walks have their steps, and the square roots of how far apart the widths beside them are.
    """

    kinds: np.ndarray
    edges: np.ndarray
    gaps: np.ndarray

    @classmethod
    def of(cls, kinds: Sequence[int], widths: np.ndarray) -> "Formula":
        """For each parameter's kind; a walk has a step between any two of these widths, which ascend."""
        own = np.array(kinds)[:, None] == np.unique(kinds)
        return cls(
            kinds=np.column_stack([np.ones(len(kinds)), own]),
            edges=(widths[:-1] + widths[1:]) / 2,
            gaps=np.sqrt(np.diff(widths)),
        )

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where the vector's parts end: outer, shapes, log s, lines, walks."""
        (count, shapes), steps = self.kinds.shape, len(self.edges)
        return tuple(accumulate([OUTER, shapes * (2 + steps), count, count, count * steps]))

    def priors(self, spread: float, own: tuple[float, float, float]) -> np.ndarray:
        """Widths of the priors of all values, for those of log s, lines and walks."""
        (count, shapes), steps = self.kinds.shape, len(self.edges)
        outer = [10 * spread, 1.0, 3.0, 3.0]
        parts = [SHAPE, *[KIND] * (shapes - 1)]
        return np.concatenate(
            [outer, *(np.repeat(part, [1, 1, steps]) for part in parts), np.repeat(own, [count, count, count * steps])]
        )

    def features(self, widths: np.ndarray) -> np.ndarray:
        """1, the distance from the middle, and what lies beyond each step, (widths, features)."""
        beyond = (widths[:, None] > self.edges).astype(float) - (self.edges < MIDDLE)
        return np.column_stack([np.ones(len(widths)), widths - MIDDLE, self.gaps * beyond])

    def noise(self, values: np.ndarray, widths: np.ndarray, features: np.ndarray) -> np.ndarray:
        """What each parameter adds to the sum at each of these widths, (parameters, widths)."""
        count, shapes = self.kinds.shape
        shape, own = values[OUTER : self.ends[1]], values[self.ends[1] :]
        weights = own.reshape(-1, count).T + self.kinds @ shape.reshape(shapes, -1)
        return np.exp(weights @ features.T - LOG4 * widths)


class Curve:
    """The formula without r at rows of widths, for some values, and what it is made of.

    Attributes:
        terms: of the sum, (n, parameters).
        total: t, (n,).
        full: 1 + e1 t, (n,).
        log: log(t / (1 + e1 t)), (n,).
        heights: the curve, (n,).
    """

    def __init__(self, values: np.ndarray, terms: np.ndarray) -> None:
        self.values, self.terms = values, terms
        self.scale, self.floor, self.ceiling = np.exp(values[1:OUTER]).tolist()
        self.total = self.floor + terms.sum(axis=1)
        self.full = 1 + self.ceiling * self.total
        self.log = np.log(self.total / self.full)
        self.heights = values[0] + self.scale * self.log

    def slopes(self, kinds: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Derivatives by all values, (n, values); `features` are those of the rows, (n, features, parameters)."""
        count, gain = len(self.terms), self.scale / (self.total * self.full)
        own = (gain[:, None] * self.terms)[:, None, :] * features
        outer = [np.ones(count), self.scale * self.log, gain * self.floor, -gain * self.ceiling * self.total**2]
        shapes = (own @ kinds).transpose(0, 2, 1)
        return np.concatenate([np.array(outer).T, shapes.reshape(count, -1), own.reshape(count, -1)], axis=1)
