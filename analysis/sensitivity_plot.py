"""A table of sensitivities for people: as text, and as a picture of traces and drops, layer by layer."""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.plots import COLORS, save, style


def widths_of(frame: pd.DataFrame) -> list[int]:
    """Widths that were measured, ascending."""
    return sorted(int(str(name).rsplit("_", 1)[1]) for name in frame if str(name).startswith("weight_error_"))


def drops_of(frame: pd.DataFrame, role: str) -> pd.DataFrame:
    """Drop of accuracy by layer (rows) and width (columns), 0..1; empty if none was measured.

    Args:
        frame: of `raysearch.sensitivity`.
        role: `weight` or `activation`.
    """
    names = {f"{role}_drop_{bits}": bits for bits in widths_of(frame) if f"{role}_drop_{bits}" in frame}
    return frame.set_index("layer")[list(names)].rename(columns=names)


def sensitivity_table(frame: pd.DataFrame) -> str:
    """Traces with their errors, and drops of accuracy at every width, as text for a terminal."""
    text = pd.DataFrame({"layer": frame["layer"], "weights": frame["weights"].map(str)})
    text["Hessian trace / weight"] = [
        f"{mean:.3g} ± {error:.1g}" for mean, error in zip(frame["hessian"], frame["hessian_error"], strict=True)
    ]
    text["Fisher"] = frame["fisher"].map("{:.3g}".format)
    text["Fisher, input"] = frame["fisher_read"].map("{:.3g}".format)
    for role, short in (("weight", "W"), ("activation", "A")):
        for bits, drops in drops_of(frame, role).items():
            text[f"{short}{bits}"] = [f"{100 * drop:+.1f}" for drop in drops]
    note = "\n\nW4: points of accuracy lost with the layer's weights alone at 4 bits, A4: with what it reads at 4 bits"
    return str(text.to_string(index=False)) + (note if len(drops_of(frame, "weight").columns) else "")


def plot_sensitivity(frame: pd.DataFrame, path: str | Path, *, title: str | None = None) -> Path:
    """Draw the traces of all layers with their error bars, and the drop of accuracy of each layer and width.

    Args:
        frame: of `raysearch.sensitivity`.
        path: file to write; a PNG 1800 pixels wide, and higher the more layers there are.
        title: stands above the panels.
    """
    from matplotlib.figure import Figure

    layers, places = list(frame["layer"]), np.arange(len(frame))
    drops = [(name, drops_of(frame, role)) for name, role in (("weights", "weight"), ("inputs", "activation"))]
    drops = [(name, each) for name, each in drops if len(each.columns)]
    figure = Figure(figsize=(12, 1.8 + 0.26 * len(layers)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 1 + len(drops), sharey=True))
    hessian = frame["hessian"].clip(lower=0)
    axes = panels[0]
    axes.barh(places - 0.2, hessian, 0.4, xerr=frame["hessian_error"], color=COLORS[0], label="Hessian")
    axes.barh(places + 0.2, frame["fisher"], 0.4, xerr=frame["fisher_error"], color=COLORS[1], label="Fisher")
    style(axes)
    axes.set_xlabel("trace / number of weights")
    axes.legend(frameon=False, fontsize=8)
    axes.set_yticks(places, layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    worst = max((float(np.nanmax(each.to_numpy())) for _, each in drops), default=0.0)
    for axes, (name, each) in zip(panels[1:], drops, strict=True):
        values = 100 * each.to_numpy()
        image = axes.imshow(values, aspect="auto", cmap="viridis_r", vmin=0, vmax=max(100 * worst, 1e-9))
        axes.set_xticks(range(len(each.columns)), [str(bits) for bits in each.columns])
        axes.set_xlabel("bits")
        axes.set_title(f"{name} alone", fontsize=10)
        for (row, column), value in np.ndenumerate(values):
            axes.annotate(f"{value:.1f}", (column, row), ha="center", va="center", fontsize=6, color="#888888")
    if drops:
        figure.colorbar(image, ax=list(panels[1:]), label="points of accuracy lost")
    return save(figure, path, title)
