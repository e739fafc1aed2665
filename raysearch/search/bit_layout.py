"""Which layers a space's bit parameters reach, what they cost, and the best widths for a budget of that cost.

Rows of widths are float arrays with a column for each address `bits/LAYER/ROLE` of the space, in its order. Parameters
that share a layer's BOPs form a group; between groups, losses and costs are sums, so an integer program separates
into groups once its budget has a price.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product

import numpy as np

from raysearch.search.proposals import Space, choices
from trainables.cost import INPUT_BITS, Layer

COSTS = {"bops": "bops", "relative_bops": "bops", "size_bytes": "size_bytes"}
"""Objectives whose value follows from the widths, and the sum that it is proportional to; a table is its own sum."""
KINDS = ("bops", "size_bytes")
ROLES = ("weight", "activation")
AT_ENDS = 4.0
"""Guessed sensitivity of the first and the last layer, in units of the others'."""
MOST_OPTIONS = 256
"""Joint choices of a group's parameters; of more, only those with equal widths are in the integer program."""
TINY = 1e-12
ROUNDING = 1e-9

Blend = Mapping[str, float]
"""Weights of costs, each as a share of its largest value: 0 is free, 1 are the widest widths."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Parameters that share layers: their columns, their joint choices (options, columns), and what each costs."""

    columns: list[int]
    options: np.ndarray
    amounts: dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Groups with as many columns and as many options each.

    Attributes:
        columns: (groups, columns).
        options: widths, (groups, options, columns).
        places: of the widths among those of their column, (groups, options, columns).
        amounts: what each option costs, by kind, (groups, options).
    """

    columns: np.ndarray
    options: np.ndarray
    places: np.ndarray
    amounts: dict[str, np.ndarray]


class BitLayout:
    """The bit parameters of a space on a network.

    Args:
        space: distributions by address; those outside of `bits/` are left alone.
        layers: the quantizable layers, in order.
        fixed: layer -> [weight bits, activation bits] where the space says nothing; 8 by default.
        limits: of objectives among `COSTS`, the largest that is allowed: 0 is the cost of the narrowest widths, 1 that
            of the widest.
        tables: further costs that are sums over layers: name -> (layers, weight bits, activation bits).
        bounds: of costs among `tables`, the largest sum that is allowed.

    Attributes:
        addresses: the columns.
        widths: possible values of each column, ascending.
        table: the same in one array, the last repeated where a column has fewer, (columns, widths).
        order: columns in the order of the layers that they reach first.
        prior: guessed sensitivity of each column.
        roles: which of `ROLES` each column is.
    """

    def __init__(
        self,
        space: Space,
        layers: Sequence[Layer],
        fixed: Mapping[str, Sequence[int]] | None = None,
        limits: Mapping[str, float] | None = None,
        tables: Mapping[str, np.ndarray] | None = None,
        bounds: Mapping[str, float] | None = None,
    ) -> None:
        self._tables = dict(tables or {})
        self.kinds = (*KINDS, *self._tables)
        self.addresses = [name for name in space if name.startswith("bits/")]
        self.widths = [np.array(sorted(choices(space[name], limit=64)), dtype=float) for name in self.addresses]
        self._macs = np.array([layer.macs for layer in layers], dtype=float)
        self._weights = np.array([layer.weights for layer in layers], dtype=float)
        self._constants: list[float] = []
        self._reach = np.array([[self._column(x, role, fixed or {}) for role in ROLES] for x in layers]).T
        ends = np.array([AT_ENDS if layer.first or layer.last else 1.0 for layer in layers])
        reached = [self._reach == column for column in range(len(self.addresses))]
        self.prior = np.array([max(float((r * ends).sum()), 1.0) for r in reached])
        self.roles = [ROLES.index(address.rpartition("/")[2]) for address in self.addresses]
        widest = self.extreme(-1)
        self._last = np.array([len(widths) - 1 for widths in self.widths])
        self.table = np.array([np.pad(w, (0, self._last.max() + 1 - len(w)), mode="edge") for w in self.widths])
        self.groups = self._grouped()
        self._batches = _batched(self.groups, self.table)
        self.scales = {kind: float(self.amount(kind, widest[None])[0]) for kind in KINDS}
        for kind in self._tables:  # where fewer bits may cost more, the largest sum is not that of the widest
            most = [float(np.ptp(group.amounts[kind]) + group.amounts[kind].min()) for group in self.groups]
            here = [float(self._at(group, kind, widest)) for group in self.groups]
            largest = float(self.amount(kind, widest[None])[0]) + sum(most) - sum(here)
            self.scales[kind] = max(largest, TINY)
        self._shares = dict.fromkeys(self.kinds, 1.0)
        for kind, bound in (bounds or {}).items():
            self._shares[kind] = min(1.0, bound / self.scales[kind])
        for name, limit in (limits or {}).items():
            kind = COSTS[name]
            least = float(self.cost({kind: 1.0}, self.extreme(0)[None])[0])
            self._shares[kind] = min(self._shares[kind], least + limit * (1 - least))

    def _column(self, layer: Layer, role: str, fixed: Mapping[str, Sequence[int]]) -> int:
        """The column that sets this width: by name, else by the longest pattern, else a constant behind the others."""
        by_name = f"bits/{layer.name}/{role}"
        if by_name in self.addresses:
            return self.addresses.index(by_name)
        fitting = [a for a in self.addresses if fnmatchcase(by_name, a)]
        input_codes = layer.first and role == "activation"
        if fitting and not (layer.first or layer.last):
            return self.addresses.index(max(fitting, key=len))
        given = fixed.get(layer.name, (INPUT_BITS, INPUT_BITS))[ROLES.index(role)]
        self._constants.append(INPUT_BITS if input_codes else given)
        return len(self.addresses) + len(self._constants) - 1

    @property
    def columns(self) -> int:
        """Number of bit parameters."""
        return len(self.addresses)

    def reached(self, column: int) -> list[tuple[int, str]]:
        """Layers, by number, and roles whose width a column sets."""
        return [
            (int(layer), role)
            for row, role in zip(self._reach, ROLES, strict=True)
            for layer in np.flatnonzero(row == column)
        ]

    def extreme(self, end: int) -> np.ndarray:
        """The row of the narrowest (0) or the widest (-1) widths."""
        return np.array([widths[end] for widths in self.widths])

    def cost(self, blend: Blend, bits: np.ndarray) -> np.ndarray:
        """Weighted cost of rows of widths, 0..1, (n,)."""
        return sum(
            (weight / self.scales[kind] * self.amount(kind, bits) for kind, weight in blend.items()),
            start=np.zeros(len(bits)),
        )

    def largest(self, blend: Blend) -> float:
        """Weighted cost beyond which a limit is broken; it may be broken below."""
        return sum(weight * self._shares[kind] for kind, weight in blend.items())

    def allowed(self, bits: np.ndarray) -> np.ndarray:
        """The rows that keep all limits."""
        for kind, share in self._shares.items():
            if share < 1:
                bits = bits[self.cost({kind: 1.0}, bits) <= share + ROUNDING]
        return bits

    def amount(self, kind: str, bits: np.ndarray, layers: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Sum of a cost over layers for rows of widths, (n,): BOPs, bytes of weights, or that of a table."""
        wide = np.concatenate([bits, np.broadcast_to(self._constants, (len(bits), len(self._constants)))], axis=1)
        weight, activation = (wide[:, columns[layers]] for columns in self._reach)
        if kind == "bops":
            return (weight * activation) @ self._macs[layers]
        if kind == "size_bytes":
            return np.ceil(weight * self._weights[layers] / 8).sum(axis=1)
        places = np.arange(len(self._macs))[layers]
        return self._tables[kind][places, weight.astype(int), activation.astype(int)].sum(axis=1)

    @staticmethod
    def _at(group: _Group, kind: str, row: np.ndarray) -> float:
        """What a group costs at a row of widths that is among its options."""
        return group.amounts[kind][(group.options == row[group.columns]).all(axis=1).argmax()]

    def _grouped(self) -> list[_Group]:
        """Columns joined where they share a layer."""
        leader = list(range(len(self.addresses) + len(self._constants)))
        for weight, activation in self._reach.T:
            if max(weight, activation) < len(self.addresses):
                old, new = leader[activation], leader[weight]
                leader = [new if name == old else name for name in leader]
        names = dict.fromkeys(leader[: len(self.addresses)])
        return [self._group([c for c in range(len(self.addresses)) if leader[c] == name]) for name in names]

    def _group(self, columns: list[int]) -> _Group:
        sets = [self.widths[column] for column in columns]
        if math.prod(len(widths) for widths in sets) <= MOST_OPTIONS:
            options = np.array(list(product(*sets)))
        else:
            every = sorted(set(np.concatenate(sets)))
            options = np.array([[widths[np.abs(widths - w).argmin()] for widths in sets] for w in every])
        rows = np.tile(self.extreme(0), (len(options), 1))
        rows[:, columns] = options
        touched = np.flatnonzero(np.isin(self._reach, columns).any(axis=0))
        amounts = {kind: self.amount(kind, rows, touched) for kind in self.kinds}
        return _Group(columns=columns, options=options, amounts=amounts)

    def best(self, noise: np.ndarray, blend: Blend, count: int) -> np.ndarray:
        """Rows of widths on the integer program's convex front, (count, columns), from the cheapest to the widest.

        Each has the least summed noise that its cost allows: it is the optimum of noise + price x cost, in
        which groups separate, for one of a ladder of prices (Everett 1963). Neighbouring prices may share an optimum.

        Args:
            noise: of each column at each of its widths, as in `table`, (columns, widths).
            blend: the cost.
            count: number of prices.
        """
        shares = {kind: weight / self.scales[kind] for kind, weight in blend.items()}
        tables = []
        high, low = TINY, np.inf
        for batch in self._batches:
            score = noise[batch.columns[:, None], batch.places].sum(axis=2)
            amount = sum((share * batch.amounts[kind] for kind, share in shares.items()), np.zeros(score.shape))
            tables.append((batch, score, amount))
            spans, reach = np.ptp(amount, axis=1), np.ptp(batch.options, axis=(1, 2))
            costs = spans > TINY
            ratios = np.ptp(score, axis=1)[costs] / spans[costs]
            # From where even the most sensitive group takes its narrowest option to where the least takes its widest.
            high = max(high, 64 * ratios.max(initial=0.0))
            low = min(low, (ratios * 4.0 ** -reach[costs] / 4).min(initial=np.inf))
        prices = np.geomspace(high, max(min(low, high), TINY), count)
        rows = np.empty((count, self.columns))
        for batch, score, amount in tables:
            taken = (score + prices[:, None, None] * amount).argmin(axis=2)
            rows[:, batch.columns] = batch.options[np.arange(len(score)), taken]
        return rows

    def neighbours(self, rows: np.ndarray, pairs: int, generator: np.random.Generator) -> np.ndarray:
        """Each column of each row one width up and one down; and of each row `pairs` random moves of two columns.

        Ends stay where they are.

        Args:
            rows: of widths, (n, columns).
            pairs: of each row.
            generator: of the pairs.
        """
        places = (self.table == rows[:, :, None]).argmax(axis=2).astype(np.int16)
        found = np.repeat(places[:, None], 2 * self.columns + pairs, axis=1)
        single = np.arange(self.columns)
        found[:, single, single] += 1
        found[:, self.columns + single, single] -= 1
        each, pair = np.ogrid[: len(rows), 2 * self.columns : 2 * self.columns + pairs]
        for _ in range(2):
            moved = generator.integers(self.columns, size=(len(rows), pairs))
            ways = 2 * generator.integers(2, size=(len(rows), pairs)) - 1
            found[each, pair, moved] = places[each, moved] + ways
        found = np.clip(found, 0, self._last).reshape(-1, self.columns)
        return self.table.ravel()[found + single * self.table.shape[1]]


def _batched(groups: Sequence[_Group], table: np.ndarray) -> list[_Batch]:
    """The groups, those of one shape together, so that one array operation serves them all."""
    alike: dict[tuple[int, ...], list[_Group]] = {}
    for group in groups:
        alike.setdefault(group.options.shape, []).append(group)
    return [
        _Batch(
            columns=np.array([group.columns for group in same]),
            options=np.array([group.options for group in same]),
            places=np.array([(table[g.columns] == g.options[:, :, None]).argmax(axis=2) for g in same]),
            amounts={kind: np.array([group.amounts[kind] for group in same]) for kind in same[0].amounts},
        )
        for same in alike.values()
    ]
