"""What to try before a sampler knows anything, and what a proposal costs before it is trained.

The first proposals of any bit-width sweep are the uniform configurations: alone they beat a thousand trials of a
generic sampler on per-layer problems, and with them no front is worse than uniform bits. Diagonal ones (weights and
activations alike) come first, then the rest, nearest to the diagonal first; together at most half of the trials, but
always the diagonal.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raysearch.limits import FLAGS, Limit, broken
from trainables.build import layer_table, settled
from trainables.config import digest, parse
from trainables.cost import FLOAT_BITS, bops, relative_bops, size_bytes
from trainables.layer_bits import resolve_bits
from trainables.measures import Measure, known

Space = Mapping[str, BaseDistribution]
ORDER = (8, 2, 4, 3, 6, 5, 7)
"""Widths in the order in which uniform configurations are tried: the ends of a front first."""


@dataclass(frozen=True)
class Cost:
    """Cost of a configuration before training; None where only training tells: widths are learned, or several.

    Attributes:
        measures: a person's own that follow from the widths, by name.
        digest: of the resolved configuration; equal for equal computations.
        bits: layer -> [weight bits, activation bits].
    """

    digest: str
    bops: int | None = None
    relative_bops: float | None = None
    size_bytes: int | None = None
    bits: dict[str, list[int]] | None = None
    measures: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """What records and limits call by name."""
        return {name: getattr(self, name) for name in FLAGS} | self.measures

    def over(self, limits: tuple[Limit, ...]) -> str:
        """Which limits this breaks, in words; empty if none, or if the cost is not known yet."""
        return ", ".join(limit.words(value) for limit, value in broken(limits, self.values()).items())


def cost_of(tree: dict[str, Any], measures: Sequence[Measure] = (), macs: int | None = None) -> Cost:
    """Cost of a configuration's JSON tree.

    Args:
        tree: of the configuration.
        measures: a person's own.
        macs: of the network that relative BOPs refer to; None: the configuration's own.

    Raises:
        ConfigError: the tree is no valid configuration, or a measure gives no finite number.
    """
    config = settled(parse(tree))
    table = layer_table(config)
    bits = resolve_bits(config, table)
    if any(FLOAT_BITS in (width.weight, width.activation) for width in bits.values()):
        return Cost(digest=digest(config, bits))
    return Cost(
        digest=digest(config, bits),
        bops=bops(table, bits),
        relative_bops=relative_bops(table, bits) * (table.macs / (macs or table.macs)),
        size_bytes=size_bytes(table, bits),
        bits={name: [width.weight, width.activation] for name, width in bits.items()},
        measures=known(measures, table, bits),
    )


def uniform_proposals(space: Space, base: Mapping[str, Any], trials: int) -> list[dict[str, Any]]:
    """Uniform configurations of a space over bits, in the order to try them; none if it has no bits.

    Args:
        space: distributions by address; those outside of `bits/` stay at the base configuration's value.
        base: JSON tree of the base configuration.
        trials: how many trials there will be.
    """
    weights = [name for name in space if name.startswith("bits/") and name.endswith("/weight")]
    activations = [name for name in space if name.startswith("bits/") and name.endswith("/activation")]
    if not weights and not activations:
        return []
    rest = {name: middle(d, lookup(base, name)) for name, d in space.items() if name not in weights + activations}
    widths = _widths(space)
    pairs = sorted(
        ((w, a) for w in widths for a in (widths if weights and activations else [w])),
        key=lambda pair: (abs(pair[0] - pair[1]), _rank(pair[0]), _rank(pair[1])),
    )
    diagonal = sum(w == a for w, a in pairs)
    proposals = [
        {
            **{name: _nearest_width(space[name], w) for name in weights},
            **{name: _nearest_width(space[name], a) for name in activations},
            **rest,
        }
        for w, a in pairs[: max(diagonal, trials // 2)]
    ]
    return [p for i, p in enumerate(proposals) if p not in proposals[:i]]


def _rank(width: int) -> int:
    return ORDER.index(width) if width in ORDER else len(ORDER) + width


def _widths(space: Space) -> list[int]:
    """Every width that some layer can have."""
    found: set[int] = set()
    for name, distribution in space.items():
        if name.startswith("bits/"):
            found.update(int(value) for value in choices(distribution, limit=64))
    return sorted(found, key=_rank)


def _nearest_width(distribution: BaseDistribution, width: int) -> int:
    return min((int(value) for value in choices(distribution, limit=64)), key=lambda value: (abs(value - width), value))


def choices(distribution: BaseDistribution, *, limit: int) -> list[Any]:
    """The values of a distribution, or its ends if it is continuous or has more than `limit`."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, step = distribution.low, distribution.step
    if step is None or _count(distribution) > limit:
        return [low, distribution.high]
    return [_contained(distribution, low + i * step) for i in range(int(_count(distribution)))]


def _count(distribution: BaseDistribution) -> float:
    """Number of values; infinite if continuous."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    step = distribution.step
    return math.inf if step is None else 1 + round((distribution.high - distribution.low) / step)


def lookup(tree: Mapping[str, Any], address: str) -> Any:
    """The value at an address of a JSON tree; None where there is none."""
    node: Any = tree
    for step in address.split("/"):
        node = node.get(step) if isinstance(node, Mapping) else None
    return node


def middle(distribution: BaseDistribution, value: Any) -> Any:
    """The base configuration's value if the distribution contains it, else the middle of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return value if value in distribution.choices else distribution.choices[0]
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high = distribution.low, distribution.high
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return _contained(distribution, value)
    return _contained(distribution, (low * high) ** 0.5 if distribution.log else (low + high) / 2)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isclose(_contained(distribution, value), value, rel_tol=1e-12, abs_tol=1e-12)


def _contained(distribution: IntDistribution | FloatDistribution, value: float) -> float:
    """The value of the distribution that is nearest to `value`."""
    low, high, step = distribution.low, distribution.high, distribution.step
    on_grid = value if step is None else low + round((value - low) / step) * step
    return min(max(on_grid, low), high)


def corners(space: Space) -> Iterator[dict[str, Any]]:
    """The lowest and the highest values, and each choice of each categorical parameter beside either."""
    ends = [{name: choices(d, limit=64)[end] for name, d in space.items()} for end in (0, -1)]
    yield from ends
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            yield from ({**end, name: choice} for end in ends for choice in distribution.choices if choice != end[name])


def cheapest(space: Space) -> dict[str, Any]:
    """The configuration with the fewest bits; other parameters at their lowest value."""
    return {
        name: min(choices(d, limit=64)) if name.startswith("bits/") else choices(d, limit=64)[0]
        for name, d in space.items()
    }


def cardinality(space: Space) -> float:
    """Number of configurations; infinite with a continuous parameter."""
    return math.prod(map(_count, space.values()))


def configurations(space: Space, generator: random.Random, *, limit: int) -> Iterator[dict[str, Any]]:
    """All configurations of a space in random order if there are at most `limit`, else `limit` random ones."""
    if cardinality(space) > limit:
        yield from (random_values(space, generator) for _ in range(limit))
        return
    every = list(product(*(choices(distribution, limit=limit) for distribution in space.values())))
    generator.shuffle(every)
    yield from (dict(zip(space, values, strict=True)) for values in every)


def beside(space: Space, values: Mapping[str, Any], generator: random.Random) -> Iterator[dict[str, Any]]:
    """`values` with one parameter drawn anew: each parameter once, in random order.

    A parameter of the space that `values` lack, because their network does, is drawn too: the other one may have it.
    """
    lacking = {name: d for name, d in space.items() if name not in values}
    for name in generator.sample(list(space), len(space)):
        yield {**random_values(lacking, generator), **values, **random_values({name: space[name]}, generator)}


def random_values(space: Space, generator: random.Random) -> dict[str, Any]:
    """One random configuration."""
    values = {}
    for name, distribution in space.items():
        if isinstance(distribution, FloatDistribution):
            low, high = distribution.low, distribution.high
            u = generator.random()
            drawn = low * (high / low) ** u if distribution.log else low + (high - low) * u
            values[name] = _contained(distribution, drawn)
        elif isinstance(distribution, IntDistribution):
            values[name] = generator.randrange(distribution.low, distribution.high + 1, distribution.step)
        else:
            values[name] = generator.choice(choices(distribution, limit=64))
    return values
