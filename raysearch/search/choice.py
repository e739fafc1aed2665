"""Which sampler proposes for a sweep, and why; and the frontier of a sweep."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raysearch.limits import limits_of
from raysearch.search.frontier import QUALITIES, Frontier, unsuited
from raysearch.search.layer_sums import summed, tables_of
from raysearch.search.networks import configured
from raysearch.search.proposals import Cost, cheapest, choices, cost_of
from trainables.config import merged
from trainables.cost import Layer, LayerBits

if TYPE_CHECKING:
    from raysearch.sweep import Resolved

FRONTIER, FALLBACK = "frontier", "tpe"


@dataclass(frozen=True)
class Choice:
    """A sampler by name, and why it was taken."""

    sampler: str
    reason: str


def choose(resolved: "Resolved") -> Choice:
    """What `auto` means for this sweep; any other name means itself."""
    if resolved.sweep.sampler not in ("auto", FRONTIER):
        return Choice(resolved.sweep.sampler, "as asked for")
    reason = unsuited(resolved.space, resolved.sweep.objectives, list(summed(resolved.measures)))
    if not reason and cost_of(configured(resolved.base, cheapest(resolved.space))).bits is None:
        reason = f"method {resolved.sweep.method!r} decides widths itself"
    if reason:
        return Choice(FALLBACK, reason)
    bits = sum(name.startswith("bits/") for name in resolved.space)
    return Choice(FRONTIER, f"{bits} bit parameters, whose costs are known before training")


def frontier_of(resolved: "Resolved", sensitivities: Mapping[str, float] | None = None) -> Frontier:
    """The frontier of a sweep that `choose` gives to it, within the sweep's limits.

    Args:
        resolved: the sweep.
        sensitivities: of bit parameters, by address, where they are known.
    """
    sweep, space = resolved.sweep, resolved.space
    low = cost_of(merged(resolved.base, cheapest(space)), resolved.measures)
    asked = {name: getattr(sweep, f"max_{name}") for name in ("bops", "relative_bops", "size_bytes")}
    limits = {}
    if any(limit is not None for limit in asked.values()):
        widest = {name: max(choices(space[name], limit=64)) for name in space if name.startswith("bits/")}
        high = cost_of(merged(resolved.base, cheapest(space) | widest))
        for name, limit in asked.items():
            least, most = getattr(low, name), getattr(high, name)
            if limit is not None and limit < most:
                limits[name] = (limit - least) / (most - least)
    layers = resolved.table.quantizable
    tables = tables_of(resolved.measures, layers, space, low.bits or {})
    rest = {
        name: low.measures[name] - sum(measure.of_layer(x, _widths(low, x)) for x in layers)
        for name, measure in summed(resolved.measures).items()
    }
    bounds = {x.name: x.bound - rest[x.name] for x in limits_of(sweep) if x.name in tables and x.at_most}
    quality = next(name for name in sweep.objectives if name in QUALITIES)
    return Frontier(
        space,
        layers,
        sweep.objectives,
        sensitivities=sensitivities,
        fixed=low.bits,
        limits=limits,
        tables={name: tables[name] for name in {*sweep.objectives, *bounds} if name in tables},
        bounds=bounds,
        worst=sweep.min_accuracy if quality == "accuracy" else None,
    )


def _widths(cost: Cost, layer: Layer) -> LayerBits:
    weight, activation = (cost.bits or {})[layer.name]
    return LayerBits(weight=weight, activation=activation)
