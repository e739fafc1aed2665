"""The limits of a sweep: what a configuration or a trained point may cost at most, and what it must reach.

A limit on what follows from the widths is kept before training: a configuration over it is repaired (`repair`) or
refused, never trained. What only training tells (accuracy, learned widths, a measure of the trained model) is judged
afterwards: points over a limit stay in the records, off the front, and the sampler hears by how much they miss it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raysearch.sweep import Sweep

FLAGS = {"bops": "max_bops", "relative_bops": "max_relative_bops", "size_bytes": "max_size_bytes"}
"""Fields of a sweep that limit a cost from above."""
UNITS = {"bops": "BOPs", "relative_bops": "relative BOPs", "size_bytes": "bytes"}


@dataclass(frozen=True)
class Limit:
    """A bound on one value of a point."""

    name: str
    bound: float
    at_most: bool = True

    def excess(self, value: float) -> float:
        """By which share of the bound a value misses it; at most 0 where it is kept."""
        missed = value - self.bound if self.at_most else self.bound - value
        return missed / (abs(self.bound) or 1.0)

    def words(self, value: float) -> str:
        """How a value misses it."""
        return f"{value:.6g} {UNITS.get(self.name, self.name)} (limit {self.bound:.6g})"


def limits_of(sweep: "Sweep") -> tuple[Limit, ...]:
    """All limits of a sweep.

    Raises:
        ValueError: one of `limits` is not written as `NAME<=VALUE` or `NAME>=VALUE`.
    """
    from analysis.pick import bound, parsed

    found = [Limit(n, getattr(sweep, flag)) for n, flag in FLAGS.items() if getattr(sweep, flag) is not None]
    if sweep.min_accuracy is not None:
        found.append(Limit("accuracy", sweep.min_accuracy, at_most=False))
    return tuple(found) + tuple(Limit(parsed(t).column, bound(t), parsed(t).at_most) for t in sweep.limits)


def broken(limits: tuple[Limit, ...], values: Mapping[str, Any]) -> dict[Limit, float]:
    """The limits that these values break, with the value that does; what is not known yet breaks none."""
    known = ((limit, values.get(limit.name)) for limit in limits)
    return {limit: value for limit, value in known if value is not None and limit.excess(value) > 0}


def excesses(limits: tuple[Limit, ...], values: Mapping[str, Any]) -> dict[str, float]:
    """By how much a trained point misses each limit, by name and side: above 0 where it does."""
    known = ((limit, values.get(limit.name)) for limit in limits)
    return {f"{x.name}{'<=' if x.at_most else '>='}": x.excess(value) for x, value in known if value is not None}
