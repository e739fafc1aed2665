"""Bit-width problems in closed form: the front is known, an evaluation takes microseconds.

The network is ResNet-18 at 224 x 224: 20 convolutions and a linear layer, each with a weight and an activation width
of 2, 3, 4, 5, 6 or 8 bits: 42 ordered parameters. Rounding noise quarters with each bit, so the summed noise is

    S = sum_l (SW_l 4^-bw_l + SA_l 4^-ba_l)  +  sum_l coupling_l sqrt(SW_l 4^-bw_l  SW_l+1 4^-bw_l+1)

and the objectives are log10 S and the BOPs as a share of those at 8 x 8 bits. A coupling above 0 is noise of neighbours
that adds up, below 0 noise that cancels. Variants that no model of this formula expects: noise may decay at a rate
of its own for each parameter, terms may add as powers (the worst layers count most), and the loss may be a top-1 error,
which saturates at both ends. With a fidelity, early epochs show an excess that shrinks with each epoch, and results may
carry noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution

from analysis.pareto import hypervolume
from tests.laboratory.exact import exact_front
from trainables.cost import Layer

WIDTHS = (2, 3, 4, 5, 6, 8)
ROLES = ("weight", "activation")
BEST_ERROR, WORST_ERROR = 0.3, 0.999
OBJECTIVES = {"loss": "min", "relative_bops": "min"}


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What shorter trainings show, and how long they take.

    Attributes:
        epochs: of a whole training.
        excess: of log10 S before the first epoch; it shrinks by `rate` with each epoch.
        rate: factor of the excess from one epoch to the next, 0..1.
        noise: standard deviation of each reported log10 S.
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
class Problem:
    """A network of layers whose loss is a formula.

    Attributes:
        layers: rows of a layer table.
        weight: SW of each layer, > 0.
        activation: SA of each layer, > 0.
        coupling: of each layer's weights with the next layer's, >= -1, (layers - 1,).
        decay: by what a further bit divides each parameter's noise, in the order of the space, (2 x layers,).
        power: S is the sum of the terms to this power, to the power of its inverse; couplings need 1.
        error: whether the loss is a top-1 error instead of log10 S.
        told: sensitivities that a proposer may know, by address; they need not be true.
        widths: in bits, ascending.
    """

    layers: tuple[Layer, ...]
    weight: np.ndarray
    activation: np.ndarray
    coupling: np.ndarray
    decay: np.ndarray
    power: float = 1.0
    error: bool = False
    told: Mapping[str, float] = field(default_factory=dict)
    widths: tuple[int, ...] = WIDTHS
    fidelity: Fidelity = Fidelity()

    @cached_property
    def space(self) -> dict[str, BaseDistribution]:
        """Two parameters a layer."""
        return {
            f"bits/{layer.name}/{role}": CategoricalDistribution(self.widths) for layer in self.layers for role in ROLES
        }

    def array(self, values: Mapping[str, int]) -> np.ndarray:
        """Widths in the order of the space, shape (2 x layers,)."""
        return np.array([values[address] for address in self.space])

    def evaluate(self, bits: np.ndarray) -> np.ndarray:
        """Columns loss and cost, both to be minimised, shape (n, 2); `bits` is (n, 2 x layers)."""
        bits = np.asarray(bits, dtype=float)
        weight, activation = bits[:, 0::2], bits[:, 1::2]
        noise = self.weight * self.decay[0::2] ** -weight
        total = (noise**self.power).sum(axis=1)
        total += ((self.activation * self.decay[1::2] ** -activation) ** self.power).sum(axis=1)
        total += np.sqrt(noise[:, :-1] * noise[:, 1:]) @ self.coupling
        return np.column_stack([self.loss(total), (weight * activation) @ self.macs / (64 * self.macs.sum())])

    def loss(self, total: np.ndarray) -> np.ndarray:
        """Of a sum of terms; rises with it."""
        noise = total ** (1 / self.power)
        if not self.error:
            return np.log10(noise)
        return BEST_ERROR + (WORST_ERROR - BEST_ERROR) * -np.expm1(-noise / self.three_bits)

    @cached_property
    def three_bits(self) -> float:
        """S of a typical network at 3 bits."""
        return 4.0**-3 * float(self.weight.sum() + self.activation.sum())

    @cached_property
    def macs(self) -> np.ndarray:
        """Of each layer."""
        return np.array([layer.macs for layer in self.layers], dtype=float)

    @cached_property
    def reference(self) -> np.ndarray:
        """The worst loss of all configurations, and 0.1 more; a cost of 1.1."""
        return np.array([self.evaluate(np.full((1, 2 * len(self.layers)), self.widths[0]))[0, 0] + 0.1, 1.1])

    @cached_property
    def front(self) -> np.ndarray:
        """The exact front, columns as in `evaluate`; with coupling to within 1/20,000 of the cost's range."""
        costs, sums = exact_front(self, bins=20_000 if self.coupling.any() else None)
        return np.column_stack([self.loss(sums), costs / (64 * self.macs.sum())])

    @cached_property
    def best(self) -> float:
        """Hypervolume of the exact front."""
        return hypervolume(self.front, self.reference)

    def share(self, points: np.ndarray) -> float:
        """Hypervolume of evaluated points as a share of the exact front's."""
        return hypervolume(points, self.reference) / self.best if len(points) else 0.0


def resnet18() -> tuple[Layer, ...]:
    """Multiply-accumulates and weights of the 21 layers, in order of execution."""
    rows = [("conv1", 112 * 112, 3 * 64 * 49)]
    before, side = 64, 56
    for stage, channels in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            rows.append((f"{name}.conv1", side * side, before * channels * 9))
            rows.append((f"{name}.conv2", side * side, channels * channels * 9))
            if before != channels:
                rows.append((f"{name}.downsample.0", side * side, before * channels))
            before = channels
        side //= 2
    # The stages beyond the first begin with a stride of 2, so their side is that of their output.
    rows.append(("fc", 1, 512_000))
    return tuple(
        Layer(
            name=name,
            kind="linear" if name == "fc" else "conv",
            macs=places * weights,
            weights=weights,
            biases=0,
            channels=0,
            first=name == "conv1",
            last=name == "fc",
        )
        for name, places, weights in rows
    )


def additive(seed: int, layers: tuple[Layer, ...] | None = None) -> Problem:
    """Problem B1: independent layers, and a proposer that knows their sensitivities exactly."""
    layers = layers or resnet18()
    generator = np.random.default_rng([1, seed])
    weight = generator.lognormal(0.0, 1.3, len(layers))
    activation = generator.lognormal(0.0, 1.0, len(layers)) / 2
    weight[0], activation[0] = 8 * weight[0], 8 * activation[0]
    weight[-1] *= 4
    problem = Problem(
        layers=layers,
        weight=weight,
        activation=activation,
        coupling=np.zeros(len(layers) - 1),
        decay=np.full(2 * len(layers), 4.0),
    )
    return replace(problem, told=_true(problem))


def misinformed(seed: int, sigma: float = 1.0) -> Problem:
    """B1, where the told sensitivities are off by lognormal factors."""
    problem = additive(seed)
    generator = np.random.default_rng([2, seed])
    return replace(problem, told={a: s * generator.lognormal(0.0, sigma) for a, s in problem.told.items()})


def uninformed(seed: int) -> Problem:
    """B1, where no sensitivities are told."""
    return replace(additive(seed), told={})


def coupled(seed: int, layers: tuple[Layer, ...] | None = None) -> Problem:
    """B1 with strong interactions of neighbours; what is told are the sensitivities without them."""
    problem = additive(seed, layers)
    return replace(problem, coupling=np.random.default_rng([3, seed]).uniform(-0.9, 3.0, len(problem.layers) - 1))


def strange(seed: int) -> Problem:
    """B1 with decays from 2 to 6 and terms that add as squares; told are the sensitivities."""
    problem = additive(seed)
    generator = np.random.default_rng([4, seed])
    return replace(problem, decay=generator.uniform(2.0, 6.0, len(problem.decay)), power=2.0)


def noisy_error(seed: int) -> Problem:
    """A saturating top-1 error with noise of 0.3 %, and told sensitivities that are off by lognormal factors."""
    return replace(misinformed(seed), error=True, fidelity=Fidelity(epochs=1, noise=0.003))


CURVES = {
    "parallel": Fidelity(),
    "noisy": Fidelity(noise=0.1),
    "crossing": Fidelity(noise=0.03, crossing=0.5),
}
"""Learning curves by name; a problem is searched with one of them when trials may be stopped."""


def _true(problem: Problem) -> dict[str, float]:
    pairs = np.column_stack([problem.weight, problem.activation]).ravel()
    return dict(zip(problem.space, pairs.tolist(), strict=True))


PROBLEMS = {
    "exact": additive,
    "noise 1": misinformed,
    "coupled": coupled,
    "untold": uninformed,
    "strange": strange,
    "error": noisy_error,
}
