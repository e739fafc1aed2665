"""Repair: a proposal over the budget becomes the nearest configuration within it.

Nearest is what hurts least: a width that is lowered adds rounding noise, which quarters with each bit, weighted by the
layer's sensitivity (a guess where it is not known), and a width that moves at all costs a little besides. Under limits
on sums over layers (BOPs, bytes, measures of one's own that are such sums) that is one integer program over the layers'
joint choices (`analysis.allocate`), solved exactly. Where parameters of all layers hang together, as one activation
width beside a weight width for each layer, the choices are too many for it: there, steps are taken down greedily.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from analysis.allocate import allocate
from analysis.integer_program import InfeasibleError
from analysis.integer_program import Limit as Bound
from analysis.ladder import ladder
from raysearch.limits import Limit
from raysearch.search.bit_layout import MOST_OPTIONS, BitLayout
from raysearch.search.layer_sums import tables_of
from raysearch.search.networks import trimmed
from raysearch.search.proposals import Cost, Space, cost_of
from trainables.build import layer_table
from trainables.config import merged, parse
from trainables.measures import Measure

MOVED = 1e-9
"""What a width costs for each bit that it is away from the proposal, in units of a layer's noise at 0 bits."""


class Repair:
    """Repairs proposals of a space under limits.

    Args:
        space: distributions by address.
        base: JSON tree of the base configuration.
        measures: of the person's own.
        sensitivities: of bit parameters, by address, where they are known.
    """

    def __init__(
        self,
        space: Space,
        base: dict[str, Any],
        measures: Sequence[Measure] = (),
        sensitivities: Mapping[str, float] | None = None,
    ) -> None:
        self.space, self.base, self.measures = space, base, tuple(measures)
        self.sensitivities = dict(sensitivities or {})
        self._layouts: dict[str, BitLayout] = {}

    def __call__(self, values: Mapping[str, Any], cost: Cost, limits: Sequence[Limit]) -> dict[str, Any] | None:
        """The nearest configuration within the limits; None if no widths keep them.

        Args:
            values: by address; other parameters than bits stay as they are.
            cost: of these values.
            limits: those that no sum over layers tells are not looked at.
        """
        if cost.bits is None or not any(name.startswith("bits/") for name in values):
            return None
        tree = merged(self.base, values)
        layout = self._layout(tree, values, cost)
        row = np.array([values[address] for address in layout.addresses], dtype=float)
        bounds = _bounds(layout, row, cost, limits)
        found = self._program(layout, row, bounds) if _separable(layout) else _stepped(layout, row, bounds)
        if found is None:
            return None
        return dict(values) | {a: int(width) for a, width in zip(layout.addresses, found, strict=True)}

    def _layout(self, tree: dict[str, Any], values: Mapping[str, Any], cost: Cost) -> BitLayout:
        """The layout of the proposal's own network, made once for each."""
        assert cost.bits is not None
        addresses = [name for name in values if name.startswith("bits/")]
        key = json.dumps([tree["model"], tree["data"], addresses], sort_keys=True)
        if key not in self._layouts:
            space = {name: self.space[name] for name in addresses}
            layers = layer_table(parse(tree)).quantizable
            tables = tables_of(self.measures, layers, space, cost.bits)
            self._layouts[key] = BitLayout(space, layers, cost.bits, tables=tables)
        return self._layouts[key]

    def _program(self, layout: BitLayout, row: np.ndarray, bounds: Mapping[str, float]) -> np.ndarray | None:
        """The exact optimum over the layout's groups."""
        if not layout.groups or not bounds:
            return None
        harm = self._harm(layout)
        scores: Any = [_damage(g.options, row[g.columns], harm[g.columns]) for g in layout.groups]
        least = layout.extreme(0)[None]
        limits = []
        for kind, most in bounds.items():
            amounts = [group.amounts[kind] for group in layout.groups]
            # What no group reaches is the same for all rows.
            rest = float(layout.amount(kind, least)[0]) - sum(
                g.amounts[kind][(g.options == layout.extreme(0)[g.columns]).all(axis=1).argmax()] for g in layout.groups
            )
            scale = max(most - rest, 1.0)
            limits.append(Bound(name=kind, amounts=[a / scale for a in amounts], at_most=(most - rest) / scale))
        try:
            if len(limits) == 1:
                (found,) = ladder(scores, limits[0], [limits[0].at_most * (1 - 1e-12)])
            else:
                found = allocate(scores, limits)
        except InfeasibleError:
            return None
        repaired = row.copy()
        for group, option in zip(layout.groups, found.options, strict=True):
            repaired[group.columns] = group.options[option]
        return repaired

    def _harm(self, layout: BitLayout) -> np.ndarray:
        """Sensitivity of each column: as known, else guessed."""
        return np.array(
            [self.sensitivities.get(a, guess) for a, guess in zip(layout.addresses, layout.prior, strict=True)]
        )


def _bounds(layout: BitLayout, row: np.ndarray, cost: Cost, limits: Sequence[Limit]) -> dict[str, float]:
    """The largest sums that the layout's columns and constants may reach, by kind."""
    values = cost.values()
    bounds: dict[str, float] = {}
    for limit in limits:
        kind, most = limit.name, limit.bound
        if kind == "relative_bops":  # a share of the macs of the network that counts as 1
            kind, most = "bops", limit.bound * values["bops"] / values["relative_bops"]
        if limit.at_most and kind in layout.kinds and values.get(kind) is not None:
            beside = values[kind] - float(layout.amount(kind, row[None])[0])
            bounds[kind] = min(bounds.get(kind, np.inf), most - beside)
    return bounds


def _damage(options: np.ndarray, row: np.ndarray, harm: np.ndarray) -> np.ndarray:
    """What each option adds in noise to a row of widths, and how far it is from it; 0 for the row itself."""
    noise = np.maximum(4.0**-options - 4.0**-row, 0.0) @ harm
    return noise + MOVED * np.abs(options - row).sum(axis=1)


def _separable(layout: BitLayout) -> bool:
    """Whether every group's choices are all in the layout."""
    sizes = [np.prod([float(len(layout.widths[c])) for c in group.columns]) for group in layout.groups]
    return all(size <= MOST_OPTIONS for size in sizes)


def _stepped(layout: BitLayout, row: np.ndarray, bounds: Mapping[str, float]) -> np.ndarray | None:
    """One width one step down at a time, where a unit of the missed limits costs the least noise."""
    row = row.copy()

    def missed(rows: np.ndarray) -> np.ndarray:
        over = [np.maximum(layout.amount(k, rows) - most, 0.0) / max(abs(most), 1.0) for k, most in bounds.items()]
        return np.sum(over, axis=0)

    while (now := float(missed(row[None])[0])) > 0:
        rows, noise = [], []
        for column, widths in enumerate(layout.widths):
            narrower = widths[widths < row[column]]
            if len(narrower):
                rows.append(row.copy())
                rows[-1][column] = narrower[-1]
                noise.append(layout.prior[column] * (4.0 ** -narrower[-1] - 4.0 ** -row[column]))
        if not rows:
            return None
        saved = now - missed(np.array(rows))
        if saved.max() <= 0:
            return None
        row = rows[int(np.argmax(saved / np.maximum(noise, 1e-12)))]
    return row


def within_reach(
    space: Space,
    base: dict[str, Any],
    limits: Sequence[Limit],
    measures: Sequence[Measure],
    values: Mapping[str, Any],
    macs: int,
) -> str:
    """Which limits no widths of the space keep, in words, from the configuration that comes nearest; empty if none."""
    values = trimmed(base, values)
    cost = cost_of(merged(base, values), measures, macs)
    over = cost.over(tuple(limits))
    if not over:
        return ""
    repaired = Repair(space, base, measures)(values, cost, limits)
    return over if repaired is None else ""
