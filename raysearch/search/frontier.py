"""The default proposer: it knows that a network is layers, that noise quarters with each bit, and what bits cost.

After the uniform configurations it keeps a model of the loss (`loss_model`), and from it a pool:

    ladder       the integer program's convex front over the estimated sensitivities: for each of a ladder of budgets
                 the widths with the least predicted loss (`bit_layout`); also for sensitivities drawn from their
                 posterior
    neighbours   members of the front so far with one or two widths raised, lowered or exchanged

The proposal is the member of the pool that is predicted to enlarge the hypervolume most, where trials that still run
count with their predicted loss. With several costs the hypervolume is that of loss and one weighted cost; the weights
take turns. A proposal is a function of seed, history and pending trials alone: what is kept between calls only saves
time. Not for widths that the method learns, nor for architectures: there, costs are not known before training.
"""

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from operator import is_
from typing import Any

import numpy as np

from raysearch.search.bit_layout import COSTS, BitLayout, Blend
from raysearch.search.loss_model import LossModel, fit, guess, one_thread
from raysearch.search.networks import changes
from raysearch.search.proposals import Space, random_values
from raysearch.search.staircase import gains, staircase
from trainables.cost import Layer

QUALITIES = ("accuracy", "loss")
PRICES = 64
"""Of a ladder."""
PARENTS = 8
"""Members of the front, those beside the widest gaps, whose neighbours are looked at."""
PAIRS = 16
"""Random neighbours of each that differ in two widths."""
POOL = 512
REFITS = 5
"""The model is fitted anew when the history has grown by one fifth at most."""
PRIOR_PAIRS = 3
"""How many pairs the belief that all trainings gain the same from a rung to the end is worth."""
FEWEST = 4
"""Results before the model is fitted; with fewer, what is believed beforehand is as good."""
WIDENED = 8
"""How often the pool is widened by neighbours when all of it is taken."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A trial that has ended.

    Attributes:
        values: by address.
        quality: what it returned for the sweep's quality, in its own direction; None if it was stopped or failed.
        failed: it diverged, and counts as the worst quality seen.
        course: what it had reached after some epochs before its last one. Of a stopped trial the last of them tells
            what would have become of it (`extrapolated`); that teaches the model, but is no point of the front.
    """

    values: Mapping[str, Any]
    quality: float | None = None
    failed: bool = False
    course: Mapping[int, float] = field(default_factory=dict)


def unsuited(space: Space, objectives: Mapping[str, str], sums: Collection[str] = ()) -> str:
    """Why the frontier cannot propose for this sweep, in words; empty if it can.

    Args:
        space: distributions by address.
        objectives: name to direction.
        sums: further costs that are sums over layers of what their widths cost.
    """
    if not any(name.startswith("bits/") for name in space):
        return "the space has no bits"
    if changes(space):
        return "the space changes the network, so its costs are no sums over known layers"
    if not any(name in QUALITIES for name in objectives):
        return f"no objective is one of {', '.join(QUALITIES)}"
    if not any(name in COSTS or name in sums for name in objectives):
        return f"no objective is one of {', '.join([*COSTS, *sums])}"
    unknown = sorted(set(objectives) - {*QUALITIES, *COSTS, *sums})
    unknown += [f"{name}:max" for name in sums if objectives.get(name) == "max"]
    return f"objective {unknown[0]} does not follow from the bits" if unknown else ""


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """Candidates: their widths and costs, and the quality that the model predicts."""

    model: LossModel
    bits: np.ndarray
    keys: list[bytes]
    cost: np.ndarray
    predicted: np.ndarray


class Frontier:
    """Proposes configurations of a space over bits.

    Args:
        space: distributions by address, for which `unsuited` has no objection.
        layers: the model's quantizable layers.
        objectives: name to direction; the first quality counts, and all costs.
        sensitivities: by address, what is known before training, up to a common factor; the others are guessed.
        fixed: layer -> [weight bits, activation bits] where the space says nothing; 8 by default.
        limits: of costs, the largest that is allowed: 0 is the cost of the narrowest widths, 1 that of the widest.
        tables, bounds: further costs and the largest that are allowed, as in `BitLayout`.
        worst: quality that a point must reach to count, in the quality's own direction; None is any.
    """

    def __init__(
        self,
        space: Space,
        layers: Sequence[Layer],
        objectives: Mapping[str, str],
        *,
        sensitivities: Mapping[str, float] | None = None,
        fixed: Mapping[str, Sequence[int]] | None = None,
        limits: Mapping[str, float] | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        bounds: Mapping[str, float] | None = None,
        worst: float | None = None,
    ) -> None:
        self.space = space
        self.layout = BitLayout(space, layers, fixed, limits, tables, bounds)
        self.others = [name for name in space if not name.startswith("bits/")]
        self.sign = next(-1.0 if way == "max" else 1.0 for name, way in objectives.items() if name in QUALITIES)
        self.prior = _blended(self.layout.prior, [(sensitivities or {}).get(a) for a in self.layout.addresses])
        self.worst = None if worst is None else self.sign * worst
        kinds = list(dict.fromkeys(COSTS.get(name, name) for name in objectives if name not in QUALITIES))
        self.blends: list[Blend] = [{kind: 1.0} for kind in kinds]
        if len(kinds) > 1:
            self.blends.append({kind: 1 / len(kinds) for kind in kinds})
        self._seen: list[Tried] = []
        self._keys: list[bytes] = []
        self._bits = np.zeros((0, self.layout.columns))
        self._fitted: tuple[Tried, ...] = ()
        self._model = guess(self.prior)
        self._pools: dict[tuple[Any, ...], _Pool] = {}

    @one_thread
    def propose(
        self,
        history: Sequence[Tried],
        pending: Iterable[Mapping[str, Any]],
        seed: int,
        *,
        refused: Iterable[Mapping[str, Any]] = (),
    ) -> dict[str, Any] | None:
        """Values by address of the next configuration; None if nothing new lies near the front.

        It is none of those in history, pending and refused.

        Args:
            history: trials that have ended, in the order of their ends.
            pending: values of trials that still run.
            seed: the same for all proposals of a sweep, >= 0.
            refused: values that are not to be trained.
        """
        running, barred = list(pending), list(refused)
        number = len(history) + len(running)
        generator = np.random.default_rng([seed, number, len(barred)])
        blend = self.blends[number % len(self.blends)]
        self._read(history)
        beside = self._rows(running)
        pool = self._pool(history[: checkpoint(len(history))], blend, seed)
        bits = np.concatenate([self._bits, beside])
        quality = np.concatenate([self._qualities(history), pool.model.predict(beside)])
        known = np.flatnonzero(np.isfinite(quality))
        cost, quality = self.layout.cost(blend, bits[known]), quality[known]
        taken = {*self._keys, *_row_keys(beside), *_row_keys(self._rows(barred))}
        fresh = np.array([bool(self.others) or key not in taken for key in pool.keys], dtype=bool)
        if fresh.any():
            score = gains(pool.cost, pool.predicted, cost, quality, self.layout.largest(blend), self.worst)
            score[~fresh] = -np.inf
            row = pool.bits[int(score.argmax())]
        else:
            found = self._widened(np.concatenate([pool.bits, bits]), taken, generator)
            if found is None:
                return None
            row = found
        values = {a: int(width) for a, width in zip(self.layout.addresses, row, strict=True)}
        if not self.others:
            return values
        members = known[staircase(cost, quality)]
        donors = [history[i].values for i in members if i < len(history)]
        return self._completed(values, donors, [*(t.values for t in history), *running, *barred], generator)

    def _read(self, history: Sequence[Tried]) -> None:
        """Encode the trials; those of the last call are kept as long as the history only grows."""
        same = sum(takewhile(bool, map(is_, self._seen, history)))
        if same < len(self._seen):
            self._seen, self._keys = self._seen[:same], self._keys[:same]
            self._bits = self._bits[:same]
        rows = self._rows([tried.values for tried in history[same:]])
        self._seen += history[same:]
        self._keys += _row_keys(rows)
        self._bits = np.concatenate([self._bits, rows])

    def _rows(self, many: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Widths of each, (n, columns)."""
        rows = [[values[address] for address in self.layout.addresses] for values in many]
        return np.array(rows, dtype=float).reshape(-1, self.layout.columns)

    def _qualities(self, history: Sequence[Tried]) -> np.ndarray:
        """To be minimised: infinite if unknown, the worst if they failed, (n,)."""
        known = [self.sign * t.quality for t in history if t.quality is not None]
        worst = max(known, default=np.inf)
        return np.array(
            [self.sign * t.quality if t.quality is not None else worst if t.failed else np.inf for t in history]
        )

    def _hopes(self, history: Sequence[Tried]) -> np.ndarray:
        """As `_qualities`; of a stopped trial what would have become of it, (n,)."""
        qualities = self._qualities(history)
        stopped = [i for i, t in enumerate(history) if t.quality is None and not t.failed and t.course]
        lasts = {i: max(history[i].course) for i in stopped}
        for epoch in set(lasts.values()):
            pairs = [(t.course[epoch], t.quality) for t in history if t.quality is not None and epoch in t.course]
            if pairs:
                mine = [i for i in stopped if lasts[i] == epoch]
                early = np.array([history[i].course[epoch] for i in mine])
                qualities[mine] = self.sign * extrapolated(early, np.array(pairs))
        return qualities

    def _pool(self, history: Sequence[Tried], blend: Blend, seed: int) -> _Pool:
        """What is worth trying after this history; kept until another one is asked for."""
        if len(self._fitted) != len(history) or not all(map(is_, self._fitted, history)):
            self._fitted, self._pools = tuple(history), {}
            self._model = self._learnt(history)
        key = (seed, *blend.items())
        if key not in self._pools:
            generator = np.random.default_rng([seed, len(history), len(self.blends)])
            self._pools[key] = self._made(self._model, self._qualities(history), blend, generator)
        return self._pools[key]

    def _learnt(self, history: Sequence[Tried]) -> LossModel:
        """How the quality depends on the widths."""
        hopes = self._hopes(history)
        told = np.flatnonzero(np.isfinite(hopes))
        if len(told) < FEWEST:
            return guess(self.prior)
        return fit(self._bits[told], hopes[told], self.prior, self.layout.roles)

    def _made(self, model: LossModel, quality: np.ndarray, blend: Blend, generator: np.random.Generator) -> _Pool:
        """The ladder and the neighbours of the front, as far as they are not taken; the most promising come first."""
        ended = np.isfinite(quality)
        taken = set() if self.others else set(self._keys[: len(quality)])
        bits, quality = self._bits[: len(quality)][ended], quality[ended]
        cost = self.layout.cost(blend, bits)
        members = bits[staircase(cost, quality)]
        ladders = [each.noise(self.layout.table) for each in (model, model.sample(generator))]
        found = [self.layout.best(noise, blend, PRICES) for noise in ladders]
        found += [self.layout.neighbours(members[:PARENTS], PAIRS, generator)]
        found += [members] if self.others else []
        rows = self.layout.allowed(np.concatenate(found))
        costs, predicted, keys = self.layout.cost(blend, rows), model.predict(rows), _row_keys(rows)
        gain = gains(costs, predicted, cost, quality, self.layout.largest(blend), self.worst)
        first = {keys[i]: i for i in gain.argsort(kind="stable").tolist() if keys[i] not in taken}
        kept = list(first.values())[: -POOL - 1 : -1]
        return _Pool(
            model=model,
            bits=rows[kept],
            keys=[keys[i] for i in kept],
            cost=costs[kept],
            predicted=predicted[kept],
        )

    def _widened(self, rows: np.ndarray, taken: set[bytes], generator: np.random.Generator) -> np.ndarray | None:
        """A random neighbour of one of these rows, or of its neighbours, and so on, that is not taken."""
        rows = np.concatenate([rows, self.layout.extreme(0)[None]])
        for _ in range(WIDENED):
            found = self.layout.neighbours(rows[generator.integers(len(rows), size=8)], PAIRS, generator)
            allowed = self.layout.allowed(generator.permutation(found))
            for row, key in zip(allowed, _row_keys(allowed), strict=True):
                if key not in taken:
                    return row
            rows = np.concatenate([rows, found])
        return None

    def _completed(
        self,
        bits: dict[str, Any],
        donors: Sequence[Mapping[str, Any]],
        taken: Sequence[Mapping[str, Any]],
        generator: np.random.Generator,
    ) -> dict[str, Any] | None:
        """With parameters beside bits from a member of the front, one of them drawn anew half of the time."""
        chance = random.Random(int(generator.integers(2**32)))
        drawn = random_values({name: self.space[name] for name in self.others}, chance)
        donor = chance.choice(donors) if donors else drawn
        values = bits | {name: donor[name] for name in self.others}
        for attempt in range(WIDENED):
            if (attempt or chance.random() < 0.5) and donors:
                name = chance.choice(self.others)
                values |= random_values({name: self.space[name]}, chance)
            if values not in taken:
                return values
        return None


def _row_keys(rows: np.ndarray) -> list[bytes]:
    """What tells rows of widths apart."""
    size, text = rows.shape[1], rows.astype(np.uint8).tobytes()
    return [text[start : start + size] for start in range(0, len(text), size)]


def extrapolated(early: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """What trainings that were at `early`, (n,), would have reached, by what others were at and did reach, (m, 2).

    A line through the pairs' centre. Few pairs say little of its slope, which is then near 1: all gain the same.

    >>> extrapolated(np.array([0.5]), np.array([[0.6, 0.7]])).round(3).tolist()
    [0.6]
    """
    centre = pairs.mean(axis=0)
    off = pairs - centre
    weight = PRIOR_PAIRS * (off[:, 0] ** 2).mean()
    total = weight + off[:, 0] @ off[:, 0]
    slope = (weight + off[:, 0] @ off[:, 1]) / total if total > 0 else 1.0
    return centre[1] + slope * (early - centre[0])


def _blended(guessed: np.ndarray, known: Sequence[float | None]) -> np.ndarray:
    """What is known; elsewhere the guess, scaled to the known ones' geometric mean."""
    told = np.array([value is not None and value > 0 for value in known], dtype=bool)
    if not told.any():
        return guessed
    values = np.array([value or 1.0 for value in known])
    scale = np.exp((np.log(values[told]) - np.log(guessed[told])).mean())
    return np.where(told, values, scale * guessed)


def checkpoint(ended: int) -> int:
    """How much of a history the model is fitted to: all of a short one, then each so much more.

    >>> [checkpoint(n) for n in (3, 15, 16, 33, 34, 100)]
    [3, 14, 16, 32, 32, 96]
    """
    step = 1 << max(0, (ended // REFITS).bit_length() - 1)
    return ended // step * step
