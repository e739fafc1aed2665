"""The sections of a report that compare questions: hypervolume, attainment, accuracy at equal cost."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from analysis import confidence
from analysis.compare import Attained, at_equal_cost, attainment, hypervolume_bands, levels
from analysis.page import Page, color, panels, table
from analysis.swept import Swept
from analysis.wording import human_bytes

COSTS = {"relative_bops": ("relative BOPs", "percent", 0.01), "size_bytes": ("size", "bytes", 1024.0)}
"""Column to its name, the unit of its axis, and what a round number of it counts."""


def sections(page: Page, groups: Mapping[str, Sequence[Swept]]) -> None:
    """Add them to a page; `groups` has the sweeps of each question, one for each seed."""
    seeds = max(map(len, groups.values()))
    lead = "Attainment: the accuracy that at least half of a question's seeds reach at no more than that cost"
    lead += "; the band reaches from the worst seed to the best." if seeds > 1 else "."
    page.section(
        "Comparison",
        panels(*(_attainment_chart(page, groups, cost) for cost in COSTS)),
        _legend(groups),
        lead=lead,
    )
    if all(sweep.history is not None for members in groups.values() for sweep in members):
        page.section(
            "Hypervolume",
            _hypervolume_table(groups),
            lead="Of each question after all its trials, over its seeds. The interval is Student's, 95 %, of the mean.",
        )
    for cost, (name, _, _) in COSTS.items():
        page.section(
            f"Accuracy at equal {name}",
            _equal_table(groups, cost),
            lead=f"The best validation accuracy of a point with no more than this {name}: mean over the seeds, and the "
            "95 % interval of the mean where there are several.",
        )


def hypervolume_chart(page: Page, groups: Mapping[str, Sequence[Swept]]) -> str:
    """The hypervolume after each completed trial: a curve for each question, with a band over its seeds."""
    curves = []
    for number, (name, members) in enumerate(groups.items()):
        histories = [sweep.history for sweep in members if sweep.history is not None and len(sweep.history)]
        if not histories:
            continue
        bands = hypervolume_bands(histories)
        curve: dict[str, Any] = {"name": name if len(groups) > 1 else "hypervolume", "color": color(number)}
        curve |= {"x": bands.index.tolist(), "y": bands["mean"].tolist()}
        if len(histories) > 1:
            curve |= {"low": bands["low"].tolist(), "high": bands["high"].tolist()}
        curves.append(curve)
    return page.chart(
        "curves",
        "Hypervolume after each completed trial",
        x={"label": "completed trials", "unit": "plain", "whole": True},
        y={"label": "hypervolume", "unit": "plain"},
        curves=curves,
    )


def _attainment_chart(page: Page, groups: Mapping[str, Sequence[Swept]], cost: str) -> str:
    name, unit, _ = COSTS[cost]
    last = max(float(sweep.front.rows[cost].max()) for sweep in _with_points(groups))
    curves = []
    for number, (group, members) in enumerate(groups.items()):
        runs = [sweep.front.rows for sweep in members if len(sweep.front)]
        if not runs:
            continue
        surfaces = attainment(runs, cost)
        surfaces = surfaces[surfaces.index > 0]
        if surfaces.index[-1] < last:
            surfaces.loc[last] = surfaces.iloc[-1]
        curve: dict[str, Any] = {"name": group, "color": color(number), "x": surfaces.index.tolist()}
        curve["y"] = _known(surfaces["median"])
        if len(runs) > 1:
            curve |= {"low": _known(surfaces["worst"]), "high": _known(surfaces["best"])}
        curves.append(curve)
    return page.chart(
        "curves",
        f"Attained accuracy against {name}",
        x={"label": name, "unit": unit, "log": True},
        y={"label": "validation accuracy", "unit": "percent"},
        curves=curves,
    )


def _hypervolume_table(groups: Mapping[str, Sequence[Swept]]) -> str:
    rows: list[list[str | tuple[str, float]]] = []
    for name, members in groups.items():
        histories = [sweep.history for sweep in members if sweep.history is not None and len(sweep.history)]
        volumes = [float(history["hypervolume"].iloc[-1]) for history in histories]
        if not volumes:
            continue
        interval = confidence.of_mean(volumes)
        words = "–" if interval is None else f"{interval.low:.4f}..{interval.high:.4f}"
        trials = [sweep.count("complete") for sweep in members]
        rows.append(
            [
                html.escape(name),
                (str(len(volumes)), len(volumes)),
                f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)}..{max(trials)}",
                (f"{np.mean(volumes):.4f}", float(np.mean(volumes))),
                words,
                f"{min(volumes):.4f}..{max(volumes):.4f}" if len(volumes) > 1 else "–",
            ]
        )
    columns = {"question": True, "seeds": False, "completed trials": False, "mean": False}
    return table({**columns, "95 % interval of the mean": False, "worst..best seed": False}, rows)


def _equal_table(groups: Mapping[str, Sequence[Swept]], cost: str) -> str:
    frames = [sweep.front.rows[sweep.front.on_front] for sweep in _with_points(groups)]
    rows: list[list[str | tuple[str, float]]] = []
    for level in levels(frames, cost, COSTS[cost][2]):
        words = human_bytes(level) if cost == "size_bytes" else f"{100 * level:.3g} %"
        found = [at_equal_cost([sweep.front.rows for sweep in members], cost, level) for members in groups.values()]
        rows.append([(words, level), *map(_attained_cell, found)])
    return table({f"at most ({COSTS[cost][0]})": False, **dict.fromkeys(groups, False)}, rows)


def _attained_cell(found: Attained) -> tuple[str, float]:
    if found.mean is None:
        some = f"{len(found.accuracies)} of {found.runs} seeds" if found.accuracies else "–"
        return some, 0.0
    interval = found.interval
    words = "" if interval is None else f" ({100 * interval.low:.2f}..{100 * interval.high:.2f})"
    return f"{found.mean:.2%}{words}", found.mean


def _legend(groups: Mapping[str, Sequence[Swept]]) -> str:
    parts = [
        f'<span><svg width="18" height="8"><path d="M0,4H18" stroke="{color(number)}" stroke-width="2"/>'
        f"</svg>{html.escape(name)} ({len(members)} seed{'s' * (len(members) > 1)})</span>"
        for number, (name, members) in enumerate(groups.items())
    ]
    return f'<p class="legend">{"".join(parts)}</p>'


def _with_points(groups: Mapping[str, Sequence[Swept]]) -> list[Swept]:
    return [sweep for members in groups.values() for sweep in members if len(sweep.front)]


def _known(column: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in column]
