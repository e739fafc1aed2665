"""Rungs: early stopping by several objectives, as asynchronous successive halving (MO-ASHA).

After `grace`, `grace x factor`, `grace x factor^2`, ... epochs a trial stands on a rung. There it is ranked among all
trials that have stood on it so far, by what each of them had reached at that epoch: first by layers of non-dominated
sorting (Goldberg 1989), within a layer by diversity. It goes on if it is among the best n / factor of n, rounded up,
and waits otherwise: paused, not thrown away. As others reach the rung its rank may become good enough, and it goes on
from where it was. Whoever is on the current front, that of all trials by their latest values, goes on in any case.

Diversity is an epsilon-net (Schmucker et al. 2021, arXiv:2106.12639, section 4): starting from the best of the first
objective, always the trial that lies farthest from those already taken. Distances are between ranks instead of values,
so no decision depends on the unit or the scale of an objective, nor on the order in which trials came to the rung.

Successive halving: Jamieson and Talwalkar 2016; asynchronous: Li et al. 2020, arXiv:1810.05934. Pure arithmetic: what
is reported here in the same order gives the same decisions, which is how a resumed sweep knows what a killed one did.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

Order = Callable[[np.ndarray], np.ndarray]
"""From the values of a layer, (n, k), to the positions of its members, the most wanted first, (n,)."""


@dataclass(frozen=True)
class Standing:
    """What a rung says of a trial.

    Attributes:
        epoch: of the rung.
        rank: 1 is the best.
        of: how many stood on the rung so far.
        on_front: whether no trial's latest values dominate it.
        goes_on: whether it may train on.
    """

    epoch: int
    rank: int
    of: int
    on_front: bool
    goes_on: bool


@dataclass
class _Layer:
    """Points of which none dominates another.

    Attributes:
        owners: the trial of each, (n,).
        values: (n, k).
        order: the owners, the most wanted first; None until somebody asks.
    """

    owners: np.ndarray
    values: np.ndarray
    order: list[int] | None = None

    def split(self, out: np.ndarray) -> "tuple[_Layer, _Layer]":
        """Those that stay and those that go."""
        return _Layer(self.owners[~out], self.values[~out]), _Layer(self.owners[out], self.values[out])

    def joined(self, other: "_Layer") -> "_Layer":
        """Both."""
        return _Layer(np.concatenate([self.owners, other.owners]), np.concatenate([self.values, other.values]))

    def ordered(self, order: Order) -> list[int]:
        """The owners in this order, which must not be that of their arrival."""
        if self.order is None:
            sorted_ = np.lexsort(self.values.T[::-1])
            self.order = self.owners[sorted_[order(self.values[sorted_])]].tolist()
        return self.order


class Layers:
    """Non-dominated layers of points that come one after the other: the first is the front, the next the front of
    the rest, and so on. A point that comes moves what it dominates one layer down (Li et al. 2014: ENLU).

    Args:
        order: who comes first in a layer.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._layers: list[_Layer] = []

    def add(self, owner: int, value: np.ndarray) -> None:
        """Take in a point.

        Args:
            owner: the trial that it belongs to.
            value: every column is minimised, finite, (k,).
        """
        low, high = 0, len(self._layers)  # the first layer in which nothing dominates the point is between them
        while low < high:
            middle = (low + high) // 2
            if dominated(value[None], self._layers[middle].values)[0]:
                low = middle + 1
            else:
                high = middle
        new = _Layer(np.array([owner]), value[None])
        while low < len(self._layers):
            pushed = dominated(self._layers[low].values, new.values)
            if pushed.all():  # the layer moves down as a whole, and with it all that follow
                break
            stay, out = self._layers[low].split(pushed)
            self._layers[low] = stay.joined(new)
            if not len(out.owners):
                return
            new, low = out, low + 1
        self._layers.insert(low, new)

    def order(self) -> list[int]:
        """All owners, the best first, each where its best point is."""
        return list(dict.fromkeys(chain.from_iterable(layer.ordered(self._order) for layer in self._layers)))

    def fronts(self) -> list[set[int]]:
        """The owners of each layer."""
        return [set(layer.owners.tolist()) for layer in self._layers]


@dataclass
class _Rung:
    """Who stood at an epoch, and who waits there."""

    layers: Layers
    stood: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)


class Rungs:
    """Ranks trials and says who goes on.

    Args:
        epochs: of a whole training.
        grace: the first rung's epoch, >= 1.
        factor: one of so many goes on, > 1.
        order: who comes first in a layer.
        front_only: whether the first layer goes on, however many they are, instead of a share.
    """

    def __init__(
        self,
        epochs: int,
        *,
        grace: int = 1,
        factor: float = 3,
        order: Order | None = None,
        front_only: bool = False,
    ) -> None:
        self.factor, self._whole, self._front_only = factor, epochs, front_only
        self._rungs = {epoch: _Rung(Layers(order or epsilon_net)) for epoch in rung_epochs(epochs, grace, factor)}
        self._latest: dict[int, np.ndarray] = {}
        self._waits: dict[int, int] = {}

    @property
    def epochs(self) -> list[int]:
        """Epochs of the rungs, ascending."""
        return list(self._rungs)

    @property
    def waiting(self) -> dict[int, int]:
        """Paused trials and the epochs at which they stand."""
        return dict(self._waits)

    def report(self, trial: int, epoch: int, points: np.ndarray) -> Standing | None:
        """A trial has finished an epoch; its standing if there is a rung. One that does not go on waits from now on.

        Args:
            trial: number.
            epoch: 1, 2, ...
            points: its operating points, every column is minimised, finite, (points, k). A trial stands where its best
                point stands.
        """
        self._latest[trial] = points
        self._leave(trial)
        rung = self._rungs.get(epoch)
        if rung is None:
            return None
        if trial not in rung.stood:
            rung.stood.add(trial)
            for point in points:
                rung.layers.add(trial, point)
        standing = self._standing(trial, epoch)
        if not standing.goes_on:
            rung.waiting.add(trial)
            self._waits[trial] = epoch
        return standing

    def restore(self, trial: int, epoch: int, points: np.ndarray, goes_on: bool) -> None:
        """A report whose answer is known, from a sweep that is resumed."""
        self.report(trial, epoch, points)
        self._leave(trial)
        if not goes_on:
            self._rungs[epoch].waiting.add(trial)
            self._waits[trial] = epoch

    def end(self, trial: int, *, counts: bool) -> None:
        """A trial has ended: it waits no longer; one that does not count is on no front any more."""
        self._leave(trial)
        if not counts:
            self._latest.pop(trial, None)

    def promotable(self, room: float = np.inf) -> int | None:
        """The paused trial that may go on: of the last rung that has one, the best.

        Args:
            room: how many epochs it may need to its end.
        """
        for epoch, rung in reversed(self._rungs.items()):
            if not rung.waiting or self._whole - epoch > room:
                continue
            order = rung.layers.order()
            for trial in order[: self._survivors(rung)]:
                if trial in rung.waiting:
                    return trial
            fronted = self._on_front(rung.waiting)
            if fronted:
                return next(trial for trial in order if trial in fronted)
        return None

    def promote(self, trial: int) -> None:
        """A paused trial goes on."""
        self._leave(trial)

    def hopeless(self) -> int:
        """The paused trial that is least likely to go on: the worst for its rung's size, of the first such rung."""
        shares = {
            trial: -(1 + place) / len(order)
            for rung in self._rungs.values()
            if rung.waiting
            for order in [rung.layers.order()]
            for place, trial in enumerate(order)
            if trial in rung.waiting
        }
        return min(shares, key=lambda trial: (shares[trial], trial))

    def standing(self, trial: int) -> Standing:
        """Of a paused trial, as it is now."""
        return self._standing(trial, self._waits[trial])

    def _leave(self, trial: int) -> None:
        epoch = self._waits.pop(trial, None)
        if epoch is not None:
            self._rungs[epoch].waiting.discard(trial)

    def _standing(self, trial: int, epoch: int) -> Standing:
        order = self._rungs[epoch].layers.order()
        rank, on_front = 1 + order.index(trial), bool(self._on_front({trial}))
        goes_on = on_front or rank <= self._survivors(self._rungs[epoch])
        return Standing(epoch=epoch, rank=rank, of=len(order), on_front=on_front, goes_on=goes_on)

    def _survivors(self, rung: _Rung) -> int:
        return len(rung.layers.fronts()[0]) if self._front_only else -int(-len(rung.stood) // self.factor)

    def _on_front(self, trials: set[int]) -> set[int]:
        """Those of the trials that have a point on the current front."""
        owners = [trial for trial in trials for _ in self._latest[trial]]
        mine = np.concatenate([self._latest[trial] for trial in trials])
        beaten = dominated(mine, np.concatenate(list(self._latest.values())))
        return {trial for trial, below in zip(owners, beaten, strict=True) if not below}


def rung_epochs(epochs: int, grace: int, factor: float) -> list[int]:
    """Epochs at which trials are ranked: `grace`, `grace x factor`, ... below `epochs`.

    >>> rung_epochs(9, 1, 3), rung_epochs(30, 2, 3), rung_epochs(3, 4, 3)
    ([1, 3], [2, 6, 18], [])
    """
    found, power = [], 0
    while round(grace * factor**power) < epochs:
        found.append(round(grace * factor**power))
        power += 1
    return list(dict.fromkeys(found))


def dominated(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of `values`, (n, k), one of `others`, (m, k), dominates; (n,). Every column is minimised.

    >>> dominated(np.array([[1, 2], [3, 3]]), np.array([[1, 3], [2, 3]])).tolist()
    [False, True]
    """
    no_worse = np.ones((len(values), len(others)), dtype=bool)
    better = np.zeros_like(no_worse)
    for mine, theirs in zip(values.T, others.T, strict=True):
        no_worse &= theirs[None] <= mine[:, None]
        better |= theirs[None] < mine[:, None]
    return np.asarray((no_worse & better).any(axis=1))


def ranks(values: np.ndarray) -> np.ndarray:
    """Each column as its values' places among the different ones, over their number less one: 0..1, (n, k)."""
    columns = []
    for column in values.T:
        different, places = np.unique(column, return_inverse=True)
        columns.append(places / max(1, len(different) - 1))
    return np.column_stack(columns)


def epsilon_net(values: np.ndarray) -> np.ndarray:
    """The best of the first column, then always what lies farthest from all that is taken.

    >>> epsilon_net(np.array([[0, 9], [1, 5], [2, 4], [3, 3], [9, 0]])).tolist()
    [0, 4, 2, 1, 3]
    """
    places = ranks(values)
    taken = [int(places[:, 0].argmin())] if len(places) else []
    nearest = np.full(len(places), np.inf)
    while len(taken) < len(places):
        nearest = np.minimum(nearest, ((places - places[taken[-1]]) ** 2).sum(axis=1))
        nearest[taken[-1]] = -1.0
        taken.append(int(nearest.argmax()))
    return np.array(taken, dtype=int)
