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

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from tests.laboratory.exact import exact_front, separable_front
from tests.laboratory.problem import BINS, Fidelity, Problem, Tables, layers_of
from trainables.cost import Layer

WIDTHS = (2, 3, 4, 5, 6, 8)
BEST_ERROR, WORST_ERROR = 0.3, 0.999
ERROR_SCALE = 0.2


@dataclass(frozen=True, kw_only=True)
class Chain(Problem):
    """ResNet-18, or other layers one after the other.

    Attributes:
        weight: SW of each layer, > 0.
        activation: SA of each layer, > 0.
        coupling: of each layer's weights with the next layer's, >= -1, (layers - 1,).
        decay: by what a further bit divides each parameter's noise, in the order of the space, (2 x layers,).
        power: S is the sum of the terms to this power, to the power of its inverse; couplings need 1.
        error: whether the loss is a top-1 error instead of log10 S.
        bits: that any parameter may have, ascending.
    """

    weight: np.ndarray
    activation: np.ndarray
    coupling: np.ndarray
    decay: np.ndarray
    power: float = 1.0
    error: bool = False
    bits: tuple[int, ...] = WIDTHS

    @property
    def choices(self) -> list[tuple[int, ...]]:
        return [self.bits] * (2 * len(self.layers))

    def losses(self, bits: np.ndarray) -> np.ndarray:
        weight, activation = bits[:, 0::2], bits[:, 1::2]
        noise = self.weight * self.decay[0::2] ** -weight
        total = (noise**self.power).sum(axis=1)
        total += ((self.activation * self.decay[1::2] ** -activation) ** self.power).sum(axis=1)
        total += np.sqrt(noise[:, :-1] * noise[:, 1:]) @ self.coupling
        return self.loss(total)

    def terms(self, layer: int) -> np.ndarray:
        """What a layer's weights, and its activations, add to S without coupling, for each width, (2, widths)."""
        sizes = np.array([[self.weight[layer]], [self.activation[layer]]])
        return (sizes * self.decay[2 * layer : 2 * layer + 2, None] ** -np.array(self.bits, dtype=float)) ** self.power

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
    def front(self) -> np.ndarray:
        """The exact front, columns as in `evaluate`; with coupling to within 1/20,000 of the cost's range."""
        if self.coupling.any():
            costs, sums = exact_front(self, bins=BINS)
        else:
            squares = np.outer(self.bits, self.bits).ravel()
            noise = [np.add.outer(*self.terms(layer)).ravel() for layer in range(len(self.layers))]
            costs, sums = separable_front([macs * squares for macs in self.macs], noise)
        return np.column_stack([self.loss(sums), costs / self.widest])


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


def additive(seed: int, layers: tuple[Layer, ...] | None = None) -> Chain:
    """Problem B1: independent layers, and a proposer that knows their sensitivities exactly."""
    layers = layers or resnet18()
    generator = np.random.default_rng([1, seed])
    weight = generator.lognormal(0.0, 1.3, len(layers))
    activation = generator.lognormal(0.0, 1.0, len(layers)) / 2
    weight[0], activation[0] = 8 * weight[0], 8 * activation[0]
    weight[-1] *= 4
    problem = Chain(
        layers=layers,
        weight=weight,
        activation=activation,
        coupling=np.zeros(len(layers) - 1),
        decay=np.full(2 * len(layers), 4.0),
    )
    return replace(problem, told=_true(problem))


def misinformed(seed: int, sigma: float = 1.0) -> Chain:
    """B1, where the told sensitivities are off by lognormal factors."""
    problem = additive(seed)
    generator = np.random.default_rng([2, seed])
    return replace(problem, told={a: s * generator.lognormal(0.0, sigma) for a, s in problem.told.items()})


def uninformed(seed: int) -> Chain:
    """B1, where no sensitivities are told."""
    return replace(additive(seed), told={})


def coupled(seed: int, layers: tuple[Layer, ...] | None = None) -> Chain:
    """B1 with strong interactions of neighbours; what is told are the sensitivities without them."""
    problem = additive(seed, layers)
    return replace(problem, coupling=np.random.default_rng([3, seed]).uniform(-0.9, 3.0, len(problem.layers) - 1))


def strange(seed: int) -> Chain:
    """B1 with decays from 2 to 6 and terms that add as squares; told are the sensitivities."""
    problem = additive(seed)
    generator = np.random.default_rng([4, seed])
    return replace(problem, decay=generator.uniform(2.0, 6.0, len(problem.decay)), power=2.0)


def noisy_error(seed: int) -> Chain:
    """A saturating top-1 error with noise of 0.3 %, and told sensitivities that are off by lognormal factors."""
    return replace(misinformed(seed), error=True, fidelity=Fidelity(epochs=1, noise=0.003), scale=ERROR_SCALE)


def mixed(seed: int) -> Tables:
    """Eight layers with choices and decays of their own, some of the same size, some of whose widths disappoint."""
    generator = np.random.default_rng([5, seed])
    sets = ((2, 4, 8), (3, 5, 6, 7), (2, 3, 4, 5, 6, 7, 8), (4, 8), (2, 8))
    widths = [(sets[generator.integers(5)], sets[generator.integers(5)]) for _ in range(8)]
    terms = []
    for pair in widths:
        sides = [
            generator.lognormal(0.0, 1.3) * generator.uniform(2.0, 6.0) ** -np.array(side, dtype=float) for side in pair
        ]
        terms.append(np.add.outer(*sides) * generator.lognormal(0.0, 0.2, (len(pair[0]), len(pair[1]))))
    layers = layers_of(1e6 * generator.choice((1, 4, 16), 8))
    return Tables(layers=layers, widths=widths, terms=terms, outer=np.log10)


def straight(seed: int) -> Tables:
    """Twenty layers of an error that falls by as much with each bit: nothing quarters."""
    generator = np.random.default_rng([6, seed])
    bits = np.array(WIDTHS, dtype=float)
    terms = [np.add.outer(*generator.lognormal(0.0, 1.3, (2, 1)) * (8 - bits)) for _ in range(20)]
    worst = sum(float(each.max()) for each in terms)
    return Tables(
        layers=layers_of(1e6 * generator.integers(1, 20, 20)),
        widths=[(WIDTHS, WIDTHS)] * 20,
        terms=terms,
        outer=lambda total: total / worst,
        scale=ERROR_SCALE,
    )


def cliff(seed: int) -> Tables:
    """Thirty layers, each of which ruins the accuracy below a width of its own, above it widths matter little."""
    generator = np.random.default_rng([7, seed])
    bits = np.arange(2.0, 9.0)
    terms = []
    for _ in range(30):
        needed, harm = generator.integers(2, 6, 2), generator.lognormal(0.0, 0.5, 2)
        sides = [h * np.where(bits < n, 1.0, 0.02 * 4.0 ** (n - bits)) for n, h in zip(needed, harm, strict=True)]
        terms.append(np.add.outer(*sides))
    return Tables(
        layers=layers_of(1e7 * generator.lognormal(0.0, 1.0, 30)),
        widths=[(tuple(range(2, 9)),) * 2] * 30,
        terms=terms,
        outer=lambda total: 0.1 - 0.9 * np.expm1(-total / 3),
        scale=ERROR_SCALE,
    )


def activations(seed: int) -> Tables:
    """Twenty layers of a saturating error, a hundred times as sensitive to their activations as to their weights."""
    generator = np.random.default_rng([8, seed])
    noise = 4.0 ** -np.array(WIDTHS, dtype=float)
    terms = [np.add.outer(*np.outer(generator.lognormal(0.0, 1.0, 2) * (1, 100), noise)) for _ in range(20)]
    return Tables(
        layers=layers_of(1e6 * generator.lognormal(0.0, 1.0, 20)),
        widths=[(WIDTHS, WIDTHS)] * 20,
        terms=terms,
        outer=lambda total: 0.08 - 0.82 * np.expm1(-total / 8),
        scale=ERROR_SCALE,
    )


def bumpy(seed: int) -> Tables:
    """Twenty layers, a third of whose parameters have a narrow width that is as good as their widest."""
    generator = np.random.default_rng([9, seed])
    noise = np.outer(generator.lognormal(0.0, 1.3, 40), 4.0 ** -np.array(WIDTHS, dtype=float))
    lucky = np.flatnonzero(generator.random(40) < 1 / 3)
    noise[lucky, generator.integers(0, 4, len(lucky))] = noise[lucky, -1] * generator.uniform(0.5, 2.0, len(lucky))
    return Tables(
        layers=layers_of(1e6 * generator.lognormal(0.0, 1.0, 20)),
        widths=[(WIDTHS, WIDTHS)] * 20,
        terms=[np.add.outer(*pair) for pair in noise.reshape(20, 2, -1)],
        outer=np.log10,
    )


CURVES = {
    "parallel": Fidelity(),
    "noisy": Fidelity(noise=0.1),
    "crossing": Fidelity(noise=0.03, crossing=0.5),
}
"""Learning curves by name; a problem is searched with one of them when trials may be stopped."""


def _true(problem: Chain) -> dict[str, float]:
    pairs = np.column_stack([problem.weight, problem.activation]).ravel()
    return dict(zip(problem.space, pairs.tolist(), strict=True))


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "exact": additive,
    "noise 1": misinformed,
    "coupled": coupled,
    "untold": uninformed,
    "strange": strange,
    "error": noisy_error,
    "mixed": mixed,
    "straight": straight,
    "cliff": cliff,
    "activations": activations,
    "bumpy": bumpy,
}


@cache
def problem_named(name: str, seed: int) -> Problem:
    """A problem of the laboratory, or that of a function in a file, as `FILE.py:FUNCTION`."""
    if name in PROBLEMS:
        return PROBLEMS[name](seed)
    path, _, function = name.rpartition(":")
    assert path, f"no problem {name!r}: one of {', '.join(PROBLEMS)}, or FILE.py:FUNCTION"
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec, f"{path} is no Python file"
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)(seed)
