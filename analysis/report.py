"""The report of one sweep or several as a page: fronts, comparisons, tables, configuration, and what to be careful of.

The same page is the summary of a sweep in MLflow. Sweeps that differ by their seed alone are runs of one question and
get one colour; what is said of a question is said with the spread over its seeds.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import comparison, confidence
from analysis.caveats import caveats
from analysis.front import Front
from analysis.page import COLORS, Page, color, panels, table
from analysis.pareto import bounded, non_dominated
from analysis.pick import bound, parsed
from analysis.rows import numbers, own_columns
from analysis.swept import Swept, groups
from analysis.wording import counted, human_bytes, human_count, human_number, short_bits

MARKS = {"knee": "Knee", "most-accurate": "Most accurate", "fewest-bops": "Fewest BOPs", "smallest": "Smallest"}
MOST_COLUMNS = 60
"""Points of the front in the picture of bits; of more, as many are chosen evenly."""


@dataclass(frozen=True, eq=False)
class _Content:
    """What is shown: all complete points with the group (`series`) and sweep (`run`) they belong to, and the front."""

    groups: Mapping[str, Sequence[Swept]]
    sweeps: Sequence[Swept]
    front: Front
    points: pd.DataFrame
    marks: Mapping[int, list[str]]
    networks: list[list[str]]

    @property
    def own(self) -> list[str]:
        """Names of a person's own measures, and of other objectives that are not among the usual ones."""
        asked = [
            name for name in self.front.objectives if name not in ("accuracy", "bops", "relative_bops", "size_bytes")
        ]
        return list(dict.fromkeys([*asked, *own_columns(self.points)]))


def report(sweeps: Sequence[Swept], title: str) -> str:
    """The page as HTML.

    Args:
        sweeps: of one data set; at least one of them has a complete trial.
        title: its first line.

    Raises:
        ValueError: no trial is complete, or the sweeps are of several data sets.
    """
    content = _content(sweeps)
    page = Page(title, _data(content))
    page.add(f"<h1>{html.escape(title)}</h1>", f"<p class='lead'>{html.escape(_lead(content))}</p>", _cards(content))
    _front_section(page, content)
    if len(sweeps) > 1:
        comparison.sections(page, content.groups)
    page.section(
        "Points of the front",
        _front_table(content),
        lead="Click a title to sort, a row to see the network. Accuracy is top-1 on the validation split.",
    )
    _bits_section(page, content)
    _progress_section(page, content)
    page.section("Read with care", _list(caveats(content.groups)))
    page.section("Configuration", *(_configuration(sweep) for sweep in sweeps))
    return page.render()


def _content(sweeps: Sequence[Swept]) -> _Content:
    grouped = groups(sweeps)
    order = [sweep for members in grouped.values() for sweep in members]
    rows = [{**row, "run": number} for number, sweep in enumerate(order) for row in sweep.records]
    objectives = sweeps[0].objectives
    front = Front.of(rows, objectives, sweeps[0].reference)
    if not len(front):
        raise ValueError(f"there is nothing to report: no trial is complete in {', '.join(s.folder for s in sweeps)}")
    series = {id(sweep): number for number, members in enumerate(grouped.values()) for sweep in members}
    points = front.rows.assign(
        best=front.on_front, series=[series[id(order[run])] for run in front.rows["run"]], front=False
    )
    for number in range(len(grouped)):
        mine = points.index[points["series"] == number]
        points.loc[mine, "front"] = Front.of(points.loc[mine], objectives).on_front
    members = front.to_pandas()
    place = {key: index for index, key in zip(points.index, _keys(points), strict=True)}
    marks: dict[int, list[str]] = {}
    for mark, position in front.marks().items():
        marks.setdefault(place[_keys(members)[position]], []).append(mark)
    networks: list[list[str]] = []
    for bits in points["bits"]:
        if isinstance(bits, Mapping) and (layers := _layers(bits)) not in networks:
            networks.append(layers)
    return _Content(grouped, order, front, points, marks, networks)


def _data(content: _Content) -> dict[str, Any]:
    points = content.points
    return {
        "points": {
            "trial": points["trial"].tolist(),
            "label": [_label(point) for point in points["point"]],
            "run": points["run"].tolist(),
            "series": points["series"].tolist(),
            "front": [int(flag) for flag in points["front"]],
            "accuracy": points["accuracy"].astype(float).tolist(),
            "test": [_test_words(row) for row in points.to_dict(orient="records")],
            "relative_bops": points["relative_bops"].astype(float).tolist(),
            "bops": points["bops"].tolist(),
            "size_bytes": points["size_bytes"].tolist(),
            "own": {name: numbers(points, [name])[:, 0].tolist() for name in content.own},
            "network": [
                content.networks.index(_layers(bits)) if isinstance(bits, Mapping) else 0 for bits in points["bits"]
            ],
            "bits": [_flat(bits) for bits in points["bits"]],
            "kept": [int(t in content.sweeps[r].kept) for r, t in zip(points["run"], points["trial"], strict=True)],
        },
        "networks": content.networks or [[]],
        "series": [{"name": name, "color": color(number)} for number, name in enumerate(content.groups)],
        "runs": [sweep.folder for sweep in content.sweeps],
        "marks": {str(index): marks for index, marks in content.marks.items()},
    }


def _lead(content: _Content) -> str:
    sweeps = content.sweeps
    parts = [", ".join(dict.fromkeys(str(sweep.description.get(name, "")) for sweep in sweeps)) for name in _FACTS]
    trials = sum(sweep.count("complete") for sweep in sweeps)
    members, ended = counted(len(content.front), "point"), counted(trials, "completed trial")
    head = f"{parts[0]} on {parts[1]}, {parts[2]}: {members} on the front of {ended}"
    front = content.front
    volume = f", hypervolume {front.hypervolume():.4f}" if bounded(front.objectives, front.reference) else ""
    return head + (f" in {len(sweeps)} sweeps" if len(sweeps) > 1 else "") + volume + "."


_FACTS = ("method", "model", "data")
_NAMES = {"bops": "BOPs", "relative_bops": "relative BOPs", "size_bytes": "size"}


def _cards(content: _Content) -> str:
    """The points that people ask for by name; a click shows the network."""
    made = []
    for mark, title in MARKS.items():
        index = next(index for index, marks in content.marks.items() if mark in marks)
        row = content.points.loc[index].to_dict()
        accuracy, bops = f"{row['accuracy']:.2%}", f"{100 * row['relative_bops']:.3g} % BOPs"
        size = human_bytes(row["size_bytes"])
        big, small = {"fewest-bops": (bops, (accuracy, size)), "smallest": (size, (accuracy, bops))}.get(
            mark, (accuracy, (bops, size))
        )
        made.append(
            f'<button class="card {mark}" data-point="{index}"><small>{title}</small><b>{big}</b>'
            f"<small>{' · '.join(small)} · trial {row['trial']}</small></button>"
        )
    return f'<div class="cards">{"".join(made)}</div>'


def _front_section(page: Page, content: _Content) -> None:
    budgets = _budgets(content.sweeps)
    legend = [_swatch(s["color"], s["name"]) for s in page.data["series"]] if len(content.groups) > 1 else []
    points = content.points
    costs = {"relative_bops": ("relative BOPs", "percent"), "size_bytes": ("size", "bytes")}
    costs |= {name: (name, "plain") for name in content.own if name in content.front.objectives}
    gray_or_blue = "#5b6675" if len(content.groups) > 1 else COLORS[0]
    legend.append(_swatch(gray_or_blue, "on the front"))
    if any(_below_a_staircase(points[points["front"]], cost) for cost in costs):
        legend.append(_swatch(gray_or_blue, "on the front by another cost", "hollow"))
    if not points["front"].all():
        legend.append(_swatch(gray_or_blue, "dominated", "faint"))
    legend.append('<label><input type="checkbox" class="all"> all points</label>')
    charts = [
        page.chart(
            "front",
            f"Validation accuracy against {label}",
            cost=cost,
            x={"label": label, "unit": unit, "log": cost not in content.own or bool((points[cost] > 0).all())},
            less=content.front.objectives.get(cost) != "max",
            budget=budgets.get(cost),
            budget_words=_words(cost, budgets[cost]) if cost in budgets else None,
        )
        for cost, (label, unit) in costs.items()
    ]
    page.section(
        "Accuracy against cost",
        panels(*charts),
        f'<p class="legend">{"".join(legend)}</p>',
        '<p class="note below"></p>',
        '<div id="chosen"></div>',
        lead="Each dot is a trained network, each staircase the best accuracy at no more than that cost. "
        "Point at one to see its bits, click to keep it below.",
    )


def _below_a_staircase(members: pd.DataFrame, cost: str) -> bool:
    """Whether a point of a front is there by another cost than this one."""
    fronts = (numbers(rows, [cost, "accuracy"]) * (1, -1) for _, rows in members.groupby("series"))
    return not all(non_dominated(values).all() for values in fronts)


def _front_table(content: _Content) -> str:
    points = content.points[content.points["best"]].sort_values(
        ["accuracy", "bops", "size_bytes", "trial"], ascending=[False, True, True, True], kind="stable"
    )
    several, labelled = len(content.sweeps) > 1, any(_label(point) for point in points["point"])
    tested = "test_accuracy" in points and bool(points["test_accuracy"].notna().any())
    columns = {"": True, "sweep": True, "trial": False, "point": True, "validation accuracy": False}
    columns |= {"test accuracy": False, "relative BOPs": False, "BOPs": False, "size": False}
    columns |= dict.fromkeys(content.own, False)
    columns |= {"bits (weights/activations)": True, "source": True}
    shown = {"sweep": several, "point": labelled, "test accuracy": tested}
    rows = []
    for index, row in zip(points.index, points.to_dict(orient="records"), strict=True):
        bits = short_bits(row["bits"]) if isinstance(row["bits"], Mapping) else ""
        tags = "".join(
            f'<span class="tag {mark}">{MARKS[mark][0].lower()}{MARKS[mark][1:]}</span>'
            for mark in content.marks.get(index, [])
        )
        cells: dict[str, str | tuple[str, float]] = {
            "": tags,
            "sweep": html.escape(content.sweeps[row["run"]].name),
            "trial": (str(row["trial"]), row["trial"]),
            "point": html.escape(_label(row["point"])),
            "validation accuracy": (f"{row['accuracy']:.2%}", row["accuracy"]),
            "test accuracy": (html.escape(_test_words(row) or "–"), row.get("test_accuracy") or 0.0),
            "relative BOPs": (f"{100 * row['relative_bops']:.3g} %", row["relative_bops"]),
            "BOPs": (human_count(row["bops"]), row["bops"]),
            "size": (human_bytes(row["size_bytes"]), row["size_bytes"]),
            **{name: _own_cell(row[name]) for name in content.own},
            "bits (weights/activations)": f'<span title="{html.escape(bits)}">{html.escape(bits)}</span>',
            "source": html.escape(str(row.get("source") or "")),
        }
        rows.append([cell for name, cell in cells.items() if shown.get(name, True)])
    kept = {name: text for name, text in columns.items() if shown.get(name, True)}
    return table(kept, rows, points=list(points.index))


def _bits_section(page: Page, content: _Content) -> None:
    points = content.points[content.points["best"] & content.points["bits"].map(lambda bits: isinstance(bits, Mapping))]
    if points.empty:
        return
    network = pd.Series([content.networks.index(_layers(bits)) for bits in points["bits"]], index=points.index)
    most = int(network.mode().iloc[0])
    shown = points[network == most].sort_values(["relative_bops", "trial"], kind="stable").index
    places = np.unique(np.linspace(0, len(shown) - 1, min(MOST_COLUMNS, len(shown))).round().astype(int))
    note = f" {len(places)} of {len(points)} points are shown." if len(places) < len(points) else ""
    columns = [int(index) for index in shown[places]]
    roles = ("weights", "activations that a layer reads")
    page.section(
        "Bits of each layer",
        panels(
            *(
                page.chart("bits", f"Bits of {role}, layer by layer", network=most, points=columns, role=number)
                for number, role in enumerate(roles)
            )
        ),
        lead="A column for each point of the front, a row for each layer; darker is wider, the triangle is the knee."
        + note,
    )


def _progress_section(page: Page, content: _Content) -> None:
    charts, lead = [], []
    if all(sweep.history is not None and len(sweep.history) > 1 for sweep in content.sweeps):
        charts.append(comparison.hypervolume_chart(page, content.groups))
        lead.append(
            "Hypervolume: how much of the space between a useless network and a perfect free one a front covers."
        )
    if len(content.sweeps) == 1 and content.sweeps[0].importances:
        lead.append("Importance: which share of an objective's variance over the trials a parameter explains.")
        for objective, shares in content.sweeps[0].importances.items():
            top = sorted(shares.items(), key=lambda pair: -pair[1])[:12]
            charts.append(
                page.chart(
                    "bars",
                    f"Importance of the parameters for {objective}",
                    title=f"importance for {_NAMES.get(objective, objective)}",
                    names=[name for name, _ in top],
                    values=[share for _, share in top],
                    color=COLORS[0],
                )
            )
    if charts:
        page.section("Progress", panels(*charts), lead=" ".join(lead))


def _configuration(sweep: Swept) -> str:
    fields = {**sweep.asked, **{f"version of {k}": v for k, v in (sweep.description.get("versions") or {}).items()}}
    git = sweep.description.get("git") or {}
    if git:
        fields["commit"] = f"{git['commit']}{' with changes' if git.get('dirty') else ''}"
    rows = [[html.escape(name), html.escape(_text(value))] for name, value in fields.items() if value is not None]
    return (
        f"<details><summary>{html.escape(sweep.name)}</summary><pre><code>{html.escape(sweep.command)}</code></pre>"
        f"{table({'field': True, 'value': True}, rows)}</details>"
    )


def _budgets(sweeps: Sequence[Swept]) -> dict[str, float]:
    """The limits that all sweeps share, by the cost that they bound."""
    found = [_budget(sweep) for sweep in sweeps]
    return {cost: limit for cost, limit in found[0].items() if all(other.get(cost) == limit for other in found)}


def _budget(sweep: Swept) -> dict[str, float]:
    asked, macs = sweep.asked, sweep.description.get("macs")
    shares = [asked.get("max_relative_bops")]
    if asked.get("max_bops") is not None and macs:
        shares.append(asked["max_bops"] / (1024 * macs))
    share = min((share for share in shares if share is not None), default=None)
    limits = {"relative_bops": share, "size_bytes": asked.get("max_size_bytes")}
    limits |= {parsed(text).column: bound(text) for text in asked.get("limits") or ()}
    return {cost: float(limit) for cost, limit in limits.items() if limit}


def _words(cost: str, value: float) -> str:
    if cost == "size_bytes":
        return human_bytes(value)
    return f"{100 * value:.3g} %" if cost == "relative_bops" else human_number(value)


def _own_cell(value: float | None) -> str | tuple[str, float]:
    return "–" if value is None or pd.isna(value) else (human_number(value), value)


def _test_words(row: Mapping[Any, Any]) -> str:
    """Test accuracy and its interval; empty before it was measured."""
    accuracy, images = row.get("test_accuracy"), row.get("test_images")
    if accuracy is None or pd.isna(accuracy):
        return ""
    return confidence.in_words(float(accuracy), None if images is None or pd.isna(images) else int(images))


def _swatch(paint: str, words: str, kind: str = "full") -> str:
    look = {
        "full": f'r="4.5" fill="{paint}"',
        "hollow": f'r="4.5" fill="#fff" stroke="{paint}" stroke-width="1.6"',
        "faint": f'r="3.5" fill="{paint}" fill-opacity="0.3"',
    }[kind]
    return f'<span><svg width="12" height="12"><circle cx="6" cy="6" {look}/></svg>{html.escape(words)}</span>'


def _keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    return list(frame[["run", "trial", "point"]].itertuples(index=False, name=None))


def _label(point: Any) -> str:
    return "" if point == "final" else str(point)


def _layers(bits: Mapping[str, Any]) -> list[str]:
    return [layer for layer, pair in bits.items() if pair is not None]


def _flat(bits: Any) -> list[int] | None:
    if not isinstance(bits, Mapping):
        return None
    return [int(width) for pair in bits.values() if pair is not None for width in pair]


def _list(lines: Sequence[str]) -> str:
    shown = (re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(line)) for line in lines)
    return f'<ul class="caveats">{"".join(f"<li>{line}</li>" for line in shown)}</ul>'


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
