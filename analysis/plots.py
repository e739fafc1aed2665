"""Pictures of fronts, of their growth, and of a trial's widths: figure objects of matplotlib, no window, no state.

Each function writes one file and returns its path. Accuracy and BOPs are in per cent, sizes in KiB, costs on
logarithmic axes: a point with a cost of 0 has no place there.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.pareto import non_dominated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from analysis.front import Front

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind readers too: Okabe and Ito 2008."""
_MARKERS = "osD^vPX"
_INK = "#333333"
_DPI = 150
_COSTS = ("relative BOPs (%)", "size (KiB)")


def plot_front(front_or_fronts: "Front | Mapping[str, Front]", path: str | Path, *, title: str | None = None) -> Path:
    """Draw accuracy against relative BOPs and against size: fronts as staircases, dominated points faint.

    Each staircase is the best accuracy at no more than that cost. A point that is on the front by its other cost lies
    below it and is hollow.

    Args:
        front_or_fronts: one front, its points coloured by run (or else method, or else model) when there are several,
            or a name for each of several fronts, one colour each.
        path: file to write, a PNG of 1650 x 750 pixels; another suffix, such as `.svg`, writes that format.
        title: stands above both panels.

    Raises:
        ValueError: there is no point to draw.
    """
    return save(draw_front(front_or_fronts, title=title), path)


def draw_front(front_or_fronts: "Front | Mapping[str, Front]", *, title: str | None = None) -> "Figure":
    """The picture of `plot_front` as a figure of 11 x 5 inches, which a notebook shows.

    Raises:
        ValueError: there is no point to draw.
    """
    from matplotlib.figure import Figure

    fronts = dict(front_or_fronts) if isinstance(front_or_fronts, Mapping) else {"": front_or_fronts}
    if not any(len(front) for front in fronts.values()):
        raise ValueError("there is no point to draw: no trial is complete")
    points = _points(fronts)
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, cost in zip(panels, _COSTS, strict=True):
        _draw_panel(axes, points, cost)
    panels[0].set_ylabel("validation accuracy (%)")
    _name_points(panels[0], points)
    _legend(figure, panels[0])
    if title:
        figure.suptitle(title)
    return figure


def plot_hypervolume(
    history: pd.DataFrame | Mapping[str, pd.DataFrame], path: str | Path, *, title: str | None = None
) -> Path:
    """Draw the hypervolume after each completed trial.

    Args:
        history: what `analysis.pareto.hypervolume_history` returned, or a name for each of several.
        path: file to write, a PNG of 1050 x 675 pixels; another suffix writes that format.
        title: stands above.

    Raises:
        ValueError: there is no completed trial to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    histories = {"": history} if isinstance(history, pd.DataFrame) else dict(history)
    if all(each.empty for each in histories.values()):
        raise ValueError("there is no hypervolume to draw: no trial is complete")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, each), (color, marker) in zip(histories.items(), _looks(), strict=False):
        axes.plot(each.index, each["hypervolume"], drawstyle="steps-post", color=color, linewidth=1.8)
        axes.plot(each.index[-1:], each["hypervolume"][-1:], marker, color=color, label=name)
    style(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("completed trials")
    axes.set_ylabel("hypervolume")
    _legend(figure, axes)
    return save(figure, path, title)


def plot_bits(history: Sequence[Mapping[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draw the widths of a network's weights and activations, layer by layer, over the epochs of one trial.

    Args:
        history: epochs, each with `epoch` and `bits` (layer -> [weight bits, activation bits]); those without are left
            out.
        path: file to write; a PNG 1200 pixels wide, and higher the more layers there are.
        title: stands above both panels.

    Raises:
        ValueError: no epoch has bits.
    """
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = [line for line in history if line.get("bits")]
    if not lines:
        raise ValueError("there are no bits to draw: the epochs hold none")
    epochs, layers = [line["epoch"] for line in lines], list(lines[0]["bits"])
    figure = Figure(figsize=(8, 1.6 + 0.22 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    bounds = [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 16.5, 32.5]
    for axes, name, role in zip(panels, ("weights", "activations"), (0, 1), strict=True):
        widths = np.array([[line["bits"][layer][role] for line in lines] for layer in layers])
        extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(layers) - 0.5, -0.5)
        image = axes.imshow(
            widths,
            aspect="auto",
            interpolation="nearest",
            extent=extent,
            norm=BoundaryNorm(bounds, 256),
            cmap="viridis",
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for row, final in enumerate(widths[:, -1]):
            axes.annotate(f"{final}", (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    bar = figure.colorbar(image, ax=panels, pad=0.06, ticks=[0, 1, 2, 3, 4, 5, 6, 7, 8, 12.5, 24.5])
    bar.ax.set_yticklabels(["0", "1", "2", "3", "4", "5", "6", "7", "8", "9-16", "17-32"])
    bar.set_label("bits")
    return save(figure, path, title)


def _points(fronts: Mapping[str, "Front"]) -> pd.DataFrame:
    """All points of all fronts, with the front they belong to, the name their colour stands for, and whether they are
    on the front; in the units of the axes.
    """
    frames = [
        frame.assign(front=name, on_front=on_front)
        for name, front in fronts.items()
        for frame, on_front in ((front.to_pandas(), True), (front.dominated(), False))
    ]
    points = pd.concat([frame for frame in frames if len(frame)], ignore_index=True)
    names = ["front", *(name for name in ("run", "method", "model") if name in points)]
    telling = next((name for name in names if points[name].nunique() > 1), "front")
    return pd.DataFrame(
        {
            "front": points["front"],
            "name": points[telling].astype(str),
            "on_front": points["on_front"].astype(bool),
            "accuracy (%)": 100 * points["accuracy"].astype(float),
            "relative BOPs (%)": 100 * points["relative_bops"].astype(float),
            "size (KiB)": points["size_bytes"].astype(float) / 1024,
        }
    )


def _draw_panel(axes: "Axes", points: pd.DataFrame, cost: str) -> None:
    """Accuracy against one cost: dominated points faint, staircases, front points full on a staircase, else hollow."""
    points = points[points[cost] > 0]
    looks = dict(zip(points["name"].unique(), _looks(), strict=False))
    for name, rows in points[~points["on_front"]].groupby("name", sort=False):
        axes.scatter(rows[cost], rows["accuracy (%)"], s=18, color=looks[name][0], alpha=0.25, linewidths=0, zorder=2)
    on_stairs = _on_stairs(points, cost)
    for _, rows in points[on_stairs].groupby("front", sort=False):
        color = looks[rows["name"].iloc[0]][0] if rows["name"].nunique() == 1 else _INK
        steps = rows.sort_values(cost)
        axes.plot(steps[cost], steps["accuracy (%)"], drawstyle="steps-post", color=color, linewidth=1.4, zorder=3)
    for (member, full), rows in points[points["on_front"]].groupby(["name", on_stairs], sort=False):
        color, marker = looks[member]
        face = color if full else "white"
        axes.scatter(rows[cost], rows["accuracy (%)"], s=32, color=face, marker=marker, edgecolors=color, zorder=4)
    style(axes)
    _log_axis(axes, points[cost])
    axes.set_xlabel(cost)


def _on_stairs(points: pd.DataFrame, cost: str) -> pd.Series:
    """Which points give the best accuracy, within their front, at no more than their cost."""
    on_stairs = pd.Series(False, index=points.index)
    for _, rows in points[points["on_front"] & (points[cost] > 0)].groupby("front", sort=False):
        on_stairs[rows.index] = non_dominated(np.column_stack([rows[cost], -rows["accuracy (%)"]]))
    return on_stairs


def _name_points(axes: "Axes", points: pd.DataFrame) -> None:
    """Entries of the legend, drawn without points: the names, and what hollow and faint stand for if they occur."""
    names = points["name"].unique()
    several = len(names) > 1
    color = _INK if several else COLORS[0]
    for name, look in zip(names, _looks(), strict=False):
        axes.scatter([], [], s=32, color=look[0], marker=look[1], label=name if several else "front")
    stairs = [_on_stairs(points, cost) for cost in _COSTS]
    if not all(on_stairs[points["on_front"]].all() for on_stairs in stairs):
        axes.scatter([], [], s=32, color="white", edgecolors=color, label="front, by the other cost")
    if not points["on_front"].all():
        axes.scatter([], [], s=18, color=color, alpha=0.3, linewidths=0, label="dominated")


def _looks() -> Iterator[tuple[str, str]]:
    """A colour and a marker for each of any number of names."""
    return zip(cycle(COLORS), cycle(_MARKERS), strict=False)


def _log_axis(axes: "Axes", values: pd.Series) -> None:
    """A logarithmic axis whose labels are plain numbers, the denser the fewer decades it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    span = values.max() / values.min() if len(values) else 1.0
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if span < 10 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def style(axes: "Axes") -> None:
    """A light grid behind the points, no frame above and to the right."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: "Figure", axes: "Axes") -> None:
    """A legend below the panels, where there is more than one thing to name."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        characters = int(11 * figure.get_figwidth())
        columns = max(1, min(len(labels), characters // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def save(figure: "Figure", path: str | Path, title: str | None = None) -> Path:
    """Write a figure to a file, below a title if there is one."""
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)
    return Path(path)
