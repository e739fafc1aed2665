"""What a search problem of the laboratory is: layers, widths to choose from, a loss in closed form, a known front.

A problem of your own is one file with a function of the seed; no other file changes. If the loss is a rising function
of a sum over layers, `Tables` works out the exact front whatever the tables say:

    # mine.py
    import numpy as np
    from tests.laboratory.problem import Tables, layers_of

    def make(seed):
        generator = np.random.default_rng(seed)
        widths = [((2, 4, 8), (4, 8)), ((3, 5), (3, 5, 8))]          # of each layer's weights, and activations
        terms = [generator.random((3, 2)), generator.random((2, 3))]  # what each pair of them adds to the sum
        return Tables(layers=layers_of([3e6, 1e6]), widths=widths, terms=terms, outer=np.log10)

Any other loss is a `Formula`: a function of rows of widths, whose front is given, or counted out if the space is small.

    python -m tests.benchmarks.search --problems mine.py:make
    python -m tests.benchmarks.stopping --problems mine.py:make
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from analysis.pareto import hypervolume, non_dominated
from tests.laboratory.exact import separable_front
from trainables.cost import Layer

ROLES = ("weight", "activation")
OBJECTIVES = {"loss": "min", "relative_bops": "min"}
COUNTED = 2**20
"""Configurations of a space that are counted out at most."""
BINS = 20_000
"""Parts of the range of costs; of each, an exact front of many layers keeps one point."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What shorter trainings show, and how long they take.

    Attributes:
        epochs: of a whole training.
        excess: of the loss before the first epoch; it shrinks by `rate` with each epoch.
        rate: factor of the excess from one epoch to the next, 0..1.
        noise: standard deviation of each reported loss.
        crossing: how much the curves of configurations differ, as the standard deviation of the logarithms of their
            excess and of the epochs that they take; above 0 they cross, and an early loss may mislead.
        epoch_s: mean length of an epoch in seconds of the simulated clock.
        spread: standard deviation of the logarithm of a trial's speed.
    """

    epochs: int = 9
    excess: float = 1.0
    rate: float = 0.6
    noise: float = 0.0
    crossing: float = 0.0
    epoch_s: float = 60.0
    spread: float = 0.3


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """A network of layers whose loss is a formula; both objectives are minimised.

    The cost is that in BOPs as a share of the widest widths'. A child defines `choices`, `losses` and `front`.

    Attributes:
        layers: rows of a layer table.
        told: sensitivities that a proposer may know, by address; they need not be true.
        fidelity: what its epochs show.
        scale: of the loss: learning curves that are not its own are drawn in this unit.
    """

    layers: tuple[Layer, ...]
    told: Mapping[str, float] = field(default_factory=dict)
    fidelity: Fidelity = Fidelity()
    scale: float = 1.0

    @property
    @abstractmethod
    def choices(self) -> list[tuple[int, ...]]:
        """Widths of each parameter, ascending, in the order of the space."""

    @abstractmethod
    def losses(self, bits: np.ndarray) -> np.ndarray:
        """Of rows of widths, (n,)."""

    @property
    @abstractmethod
    def front(self) -> np.ndarray:
        """The exact front, columns as in `evaluate`."""

    @cached_property
    def space(self) -> dict[str, BaseDistribution]:
        """Two parameters a layer."""
        addresses = [f"bits/{layer.name}/{role}" for layer in self.layers for role in ROLES]
        return {name: CategoricalDistribution(c) for name, c in zip(addresses, self.choices, strict=True)}

    def array(self, values: Mapping[str, Any]) -> np.ndarray:
        """Widths in the order of the space, shape (2 x layers,)."""
        return np.array([values[address] for address in self.space])

    def extreme(self, end: int) -> np.ndarray:
        """The row of the narrowest (0) or the widest (-1) widths."""
        return np.array([widths[end] for widths in self.choices], dtype=float)

    def evaluate(self, bits: np.ndarray) -> np.ndarray:
        """Columns loss and cost, shape (n, 2); `bits` is (n, 2 x layers)."""
        bits = np.asarray(bits, dtype=float)
        return np.column_stack([self.losses(bits), (bits[:, 0::2] * bits[:, 1::2]) @ self.macs / self.widest])

    @cached_property
    def macs(self) -> np.ndarray:
        """Of each layer."""
        return np.array([layer.macs for layer in self.layers], dtype=float)

    @cached_property
    def widest(self) -> float:
        """BOPs of the widest widths."""
        row = self.extreme(-1)
        return float((row[0::2] * row[1::2]) @ self.macs)

    @cached_property
    def reference(self) -> np.ndarray:
        """The loss of the narrowest widths and 0.1 more; a cost of 1.1."""
        return np.array([self.losses(self.extreme(0)[None])[0] + 0.1, 1.1])

    @cached_property
    def best(self) -> float:
        """Hypervolume of the exact front."""
        return hypervolume(self.front, self.reference)

    def share(self, points: np.ndarray) -> float:
        """Hypervolume of evaluated points as a share of the exact front's."""
        return hypervolume(points, self.reference) / self.best if len(points) else 0.0


@dataclass(frozen=True, kw_only=True)
class Tables(Problem):
    """The loss is a rising function of a sum over layers.

    Attributes:
        widths: of each layer's weights, and of its activations, ascending.
        terms: what each pair of widths adds to the sum, of each layer (weight widths, activation widths).
        outer: from sums to losses.
    """

    widths: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    terms: Sequence[np.ndarray]
    outer: Callable[[np.ndarray], np.ndarray]

    @property
    def choices(self) -> list[tuple[int, ...]]:
        return [widths for pair in self.widths for widths in pair]

    def losses(self, bits: np.ndarray) -> np.ndarray:
        total = np.zeros(len(bits))
        for layer, ((weight, activation), terms) in enumerate(zip(self.widths, self.terms, strict=True)):
            total += terms[
                np.searchsorted(weight, bits[:, 2 * layer]), np.searchsorted(activation, bits[:, 2 * layer + 1])
            ]
        return self.outer(total)

    @cached_property
    def front(self) -> np.ndarray:
        costs = [m * np.outer(*pair).ravel() for m, pair in zip(self.macs, self.widths, strict=True)]
        edge = self.widest / BINS if math.prod(map(len, costs)) > COUNTED else 0.0
        found, sums = separable_front(costs, [terms.ravel() for terms in self.terms], edge)
        return np.column_stack([self.outer(sums), found / self.widest])

    @cached_property
    def reference(self) -> np.ndarray:
        worst = np.array([sum(float(terms.max()) for terms in self.terms)])
        return np.array([self.outer(worst)[0] + 0.1, 1.1])


@dataclass(frozen=True, kw_only=True)
class Formula(Problem):
    """Any loss.

    Attributes:
        widths: of each parameter in the order of the space, ascending.
        formula: losses of rows of widths, (n, 2 x layers) to (n,).
        known: its front; None counts out all configurations.
    """

    widths: Sequence[tuple[int, ...]]
    formula: Callable[[np.ndarray], np.ndarray]
    known: np.ndarray | None = None

    @property
    def choices(self) -> list[tuple[int, ...]]:
        return list(self.widths)

    def losses(self, bits: np.ndarray) -> np.ndarray:
        return self.formula(bits)

    @cached_property
    def front(self) -> np.ndarray:
        if self.known is not None:
            return self.known
        count = math.prod(map(len, self.widths))
        assert count <= COUNTED, f"{count} configurations are too many to count out: give the front, or use Tables"
        values = self.evaluate(np.array(list(product(*self.widths))))
        return values[non_dominated(values)]


def layers_of(macs: Sequence[float]) -> tuple[Layer, ...]:
    """Convolutions with so many multiply-accumulates each."""
    return tuple(
        Layer(
            name=f"layer{place}",
            kind="conv",
            macs=int(each),
            weights=max(1, int(each) // 100),
            biases=0,
            channels=0,
            first=place == 0,
            last=place == len(macs) - 1,
        )
        for place, each in enumerate(macs)
    )
