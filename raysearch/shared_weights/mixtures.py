"""Which mixtures of widths a supernet is evaluated at: the first ones as given, then by a sampler, none of them twice.

Mixtures are proposed in batches, of a size that does not depend on how many workers there are. A batch is proposed
while the one before is evaluated, and so knows the results of all others. What is proposed thus follows from seed and
results alone, and a search that was killed is repeated from its beginning, with the results that are on disk.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Protocol

from raysearch.limits import limits_of
from raysearch.search.frontier import QUALITIES, Frontier, Tried, unsuited
from raysearch.search.proposals import Cost, Space, beside, cardinality, choices, configurations

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from raysearch.sweep import Sweep
    from trainables.method import Choices

ATTEMPTS = 20
"""Proposals of a sampler that may be refused in a row before random ones are tried."""
RANDOM_ATTEMPTS = 2000
POPULATION = 50
"""Of evolutionary samplers; as many random mixtures come before the others fit a model."""

Values = Mapping[str, Any]


def mixture_space(widths: Mapping[str, "Choices"]) -> "dict[str, BaseDistribution]":
    """A parameter for each width that can be chosen: addresses as in any sweep."""
    return {
        f"bits/{layer}/{role}": _distribution(getattr(each, role))
        for layer, each in widths.items()
        for role in ("weight", "activation")
        if len(getattr(each, role)) > 1
    }


def _distribution(widths: Sequence[int]) -> "BaseDistribution":
    """Ordered integers where they are evenly spaced."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    ascending = sorted(widths)
    steps = {b - a for a, b in pairwise(ascending)}
    if len(steps) == 1:
        return IntDistribution(ascending[0], ascending[-1], step=steps.pop())
    return CategoricalDistribution(tuple(ascending))


def mixture(values: Values, widths: Mapping[str, "Choices"]) -> dict[str, list[int]]:
    """Layer -> [weight bits, activation bits]; what is not searched has its only width."""
    return {
        layer: [
            int(values.get(f"bits/{layer}/weight", each.weight[0])),
            int(values.get(f"bits/{layer}/activation", each.activation[0])),
        ]
        for layer, each in widths.items()
    }


@dataclass(frozen=True, kw_only=True)
class Proposed:
    """A mixture to evaluate.

    Attributes:
        number: 0, 1, ... in the order of proposal.
        values: by address.
        source: who proposed it.
        cost: what it costs.
    """

    number: int
    values: dict[str, Any]
    source: str
    cost: Cost


class Asked(Protocol):
    """A sampler: proposes values, and hears what became of them."""

    name: str

    def ask(self, number: int, refused: Sequence[Values]) -> dict[str, Any] | None:
        """Values to evaluate next, none of `refused`; None if it has none."""
        ...

    def begin(self, values: Values) -> None:
        """These are being evaluated, whoever proposed them."""
        ...

    def end(self, values: Values, results: Mapping[str, float] | None) -> None:
        """What these returned, by objective; None if their loss is no number."""
        ...


class AtFrontier:
    """Mixtures from `raysearch.search.frontier`.

    Args:
        frontier: of the space.
        objectives: name to direction.
        seed: of the search.
    """

    name = "frontier"

    def __init__(self, frontier: Frontier, objectives: Mapping[str, str], seed: int) -> None:
        self._frontier, self._seed = frontier, seed
        self._quality = next(name for name in objectives if name in QUALITIES)
        self._ended: list[Tried] = []
        self._running: list[Values] = []

    def ask(self, number: int, refused: Sequence[Values]) -> dict[str, Any] | None:
        """The member of the pool that is predicted to gain most."""
        return self._frontier.propose(self._ended, self._running, self._seed, refused=refused)

    def begin(self, values: Values) -> None:
        """Counts with its predicted loss until it ends."""
        self._running.append(values)

    def end(self, values: Values, results: Mapping[str, float] | None) -> None:
        """Counts with its measured loss."""
        self._running.remove(values)
        quality = None if results is None else results[self._quality]
        self._ended.append(Tried(values=values, quality=quality, failed=results is None))


class OfStudy:
    """Mixtures from an Optuna sampler by name.

    Args:
        name: of the sampler.
        space: distributions by address.
        objectives: name to direction.
        seed: of the search.
    """

    def __init__(self, name: str, space: Space, objectives: Mapping[str, str], seed: int) -> None:
        import optuna

        from raysearch.search.samplers import make_sampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.name, self._space, self._objectives = name, dict(space), list(objectives)
        best = optuna.study.StudyDirection
        directions = [best.MAXIMIZE if way == "max" else best.MINIMIZE for way in objectives.values()]
        sampler = make_sampler(name, seed, POPULATION)
        self._study = optuna.create_study(directions=directions, sampler=sampler)
        self._asked: Any = None
        self._running: dict[tuple[Any, ...], Any] = {}
        self._known: dict[tuple[Any, ...], list[float]] = {}

    def ask(self, number: int, refused: Sequence[Values]) -> dict[str, Any] | None:
        """What the sampler suggests; it hears of what was refused, with its values where they are known."""
        import optuna

        if self._asked is not None:
            values = self._known.get(self._key(self._asked.params))
            state = optuna.trial.TrialState.FAIL if values is None else None
            self._study.tell(self._asked, values, state=state)
        self._asked = self._study.ask(self._space)
        return dict(self._asked.params)

    def begin(self, values: Values) -> None:
        """The study has it as running."""
        trial = self._asked
        if trial is None or trial.params != values:
            self._study.enqueue_trial(dict(values))
            trial = self._study.ask(self._space)
        else:
            self._asked = None
        self._running[self._key(values)] = trial

    def end(self, values: Values, results: Mapping[str, float] | None) -> None:
        """The study has it as complete."""
        import optuna

        key = self._key(values)
        if results is None:
            self._study.tell(self._running.pop(key), state=optuna.trial.TrialState.FAIL)
            return
        self._known[key] = [float(results[name]) for name in self._objectives]
        self._study.tell(self._running.pop(key), self._known[key])

    def _key(self, values: Values) -> tuple[Any, ...]:
        return tuple(values[name] for name in self._space)


def asked(
    space: Space,
    widths: Mapping[str, "Choices"],
    layers: Sequence[Any],
    sweep: "Sweep",
    cost: Callable[[Values], Cost],
    sensitivities: Mapping[str, float],
) -> Asked:
    """The sampler that a search asks: the frontier, unless another one is named or it has nothing to go by.

    Args:
        space: of `mixture_space`.
        widths: of the supernet's layers.
        layers: of its layer table.
        sweep: the question.
        cost: of values.
        sensitivities: by address, where they are known.
    """
    name = sweep.sampler
    if name in ("auto", "frontier") and not unsuited(space, sweep.objectives):
        fixed = mixture({}, widths)
        low, high = (cost({name: end(choices(d, limit=64)) for name, d in space.items()}) for end in (min, max))
        limits = {}
        for kind in ("bops", "relative_bops", "size_bytes"):
            limit, least, most = (
                getattr(each, key) for each, key in ((sweep, f"max_{kind}"), (low, kind), (high, kind))
            )
            if limit is not None and limit < most:
                limits[kind] = (limit - least) / (most - least)
        frontier = Frontier(space, layers, sweep.objectives, sensitivities=sensitivities, fixed=fixed, limits=limits)
        return AtFrontier(frontier, sweep.objectives, sweep.seed)
    return OfStudy("nsga2" if name in ("auto", "frontier") else name, space, sweep.objectives, sweep.seed)


class Mixtures:
    """Proposes batches.

    Args:
        space: of `mixture_space`.
        sweep: the question: `trials` are evaluations.
        cost: of values.
        first: sources and values of what is tried before the sampler is asked.
        sampler: who is asked then.

    Attributes:
        refused: proposals that were over a limit, or repeated.
    """

    def __init__(
        self,
        space: Space,
        sweep: "Sweep",
        cost: Callable[[Values], Cost],
        first: Iterable[tuple[str, Values]],
        sampler: Asked,
    ) -> None:
        self.space, self.sweep, self.cost, self.sampler = space, sweep, cost, sampler
        self._first = list(first)
        self._size = cardinality(space)
        self._seen: set[tuple[Any, ...]] = set()
        self.proposed = 0
        self.refused = 0

    def batch(self, count: int) -> list[Proposed]:
        """The next mixtures, at most so many; fewer when the search is at its end, or the space is exhausted."""
        found: list[Proposed] = []
        while len(found) < count and self.proposed < self.sweep.trials:
            proposal = self._next()
            if proposal is None:
                break
            self.sampler.begin(proposal.values)
            found.append(proposal)
        return found

    def tell(self, proposal: Proposed, results: Mapping[str, float] | None) -> None:
        """What a mixture returned, by objective; None if its loss is no number."""
        self.sampler.end(proposal.values, results)

    def _next(self) -> Proposed | None:
        while self._first:
            source, values = self._first.pop(0)
            proposal = self._accepted(values, source)
            if proposal is not None:
                return proposal
        refused: list[dict[str, Any]] = []
        while len(refused) < ATTEMPTS and len(self._seen) < self._size:
            wanted = self.sampler.ask(self.proposed, refused)
            if wanted is None:
                break
            proposal = self._accepted(wanted, self.sampler.name)
            if proposal is not None:
                return proposal
            refused.append(wanted)
        return self._random(refused[-1] if refused else None)

    def _random(self, wanted: Values | None) -> Proposed | None:
        """A random mixture, if possible one beside what was wanted."""
        generator = random.Random(self.sweep.seed * 100_003 + self.proposed)
        near = beside(self.space, wanted, generator) if wanted else ()
        for values in chain(near, configurations(self.space, generator, limit=RANDOM_ATTEMPTS)):
            if len(self._seen) >= self._size:
                break
            proposal = self._accepted(values, "random")
            if proposal is not None:
                return proposal
        return None

    def _accepted(self, values: Values, source: str) -> Proposed | None:
        key = tuple(values[name] for name in self.space)
        if key in self._seen:
            self.refused += 1
            return None
        self._seen.add(key)
        cost = self.cost(values)
        if cost.over(limits_of(self.sweep)):
            self.refused += 1
            return None
        self.proposed += 1
        return Proposed(number=self.proposed - 1, values=dict(values), source=source, cost=cost)
