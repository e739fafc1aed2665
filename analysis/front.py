"""The front of one sweep or several: the complete points that no other dominates, as a frame, a table, JSON or CSV.

A point is one outcome of one trial, so a trial with several operating points may have several. Points of several
sweeps share a front when their records have the key `run`; accuracies on different data sets never do.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis import pareto
from analysis.pick import limited_columns, parsed, pick
from analysis.rows import OBJECTIVES, complete_rows, own_columns
from analysis.tradeoff import balanced
from analysis.wording import human_bytes, human_count, human_number, short_bits, three_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "run",
    "trial",
    "point",
    "method",
    "model",
    "data",
    "accuracy",
    "test_accuracy",
    "test_images",
    "validation_images",
    "loss",
    "bops",
    "relative_bops",
    "size_bytes",
    "macs",
    "bits",
    "source",
    "seed",
    "digest",
    "checkpoint",
)
"""Columns of a front, in order. `run` and what a test measures: if a record has it; `loss`: if it is an objective."""

_OPTIONAL = ("run", "test_accuracy", "test_images", "validation_images", "loss")
_WIDEST_BITS = 60


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Front:
    """The points of a search that no other point dominates. Made by `Front.of`.

    Of points equal in all objectives the one that finished first is on the front (then the smaller trial). Of repeats,
    such as the same configuration (`digest`) and operating point in two runs, at most one is on it: the one that
    dominates, otherwise the one that finished first.

    Attributes:
        objectives: name to direction, in the order of the search.
        rows: all complete points with everything their records say, in the order of finish.
        on_front: bool, one for each of `rows`.
        reference: worst values that count for the hypervolume, by objective; see `analysis.pareto.scaled`.
    """

    objectives: Mapping[str, str]
    rows: pd.DataFrame
    on_front: np.ndarray
    reference: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: Iterable[Mapping[str, Any]] | pd.DataFrame,
        objectives: Mapping[str, str],
        reference: Mapping[str, float] | None = None,
    ) -> "Front":
        """The front of all complete records.

        Records that are not complete, or lack an objective other than the accuracy, are left out.

        Args:
            records: one mapping or row for each point, of one sweep or of several (then with `run`), with at least
                `status`, `trial`, `accuracy` (0..1) and the objectives.
            objectives: name to direction, such as `{"accuracy": "max", "bops": "min"}`.
            reference: worst values that count for the hypervolume, by objective; None takes the shared ones.

        Raises:
            ValueError: an unknown objective, a missing column, a complete record without accuracy, or several data
                sets.
        """
        rows = complete_rows(records, objectives)
        data = sorted(set(rows["data"].dropna())) if "data" in rows else []
        if len(data) > 1:
            raise ValueError(f"records are of {', '.join(data)}: accuracies compare on one data set, make a front each")
        mask = _front_mask(rows, objectives)
        return cls(objectives=dict(objectives), rows=rows, on_front=mask, reference=dict(reference or {}))

    def to_pandas(self) -> pd.DataFrame:
        """One row for each point of the front, by falling accuracy (then fewer BOPs, fewer bytes, smaller trial).

        Columns as in `COLUMNS`; `bits` is short text; accuracies and relative BOPs are shares 0..1.
        """
        return _with_short_bits(self._points(self.on_front))

    def dominated(self) -> pd.DataFrame:
        """The complete points that are not on the front, with the columns and in the order of `to_pandas`."""
        return _with_short_bits(self._points(~self.on_front))

    def hypervolume(self, reference: Mapping[str, float] | None = None) -> float:
        """Hypervolume of the front: 0..1 with the reference point that all sweeps share, see `analysis.pareto`.

        Args:
            reference: the worst value of an objective that counts, in its own unit; None takes the front's own.

        Raises:
            ValueError: an objective has no upper end and no reference, or the rows lack `relative_bops`.
        """
        values, worst = pareto.scaled(self.rows, self.objectives, self.reference if reference is None else reference)
        return pareto.hypervolume(values[self.on_front], worst)

    def pick(
        self,
        *,
        max_bops: float | None = None,
        max_relative_bops: float | None = None,
        max_size_bytes: float | None = None,
        min_accuracy: float | None = None,
        within: float | None = None,
        weights: Mapping[str, float] | None = None,
        limits: Sequence[str] = (),
    ) -> pd.Series:
        """The most accurate point that fits every limit; with `min_accuracy` alone, the point with the fewest BOPs.

        A limit on something that was not searched for is honoured too: it then counts as a further objective, so that
        no point is overlooked. Limits, `within`, `weights` and errors as in `analysis.pick`.
        """
        given = {
            "max_bops": max_bops,
            "max_relative_bops": max_relative_bops,
            "max_size_bytes": max_size_bytes,
            "min_accuracy": min_accuracy,
        }
        own = {limit.column: "min" if limit.at_most else "max" for limit in map(parsed, limits)}
        needed = [*limited_columns(**given), *(("accuracy", "bops") if weights is None else weights)]
        wanted = dict.fromkeys(name for name in needed if name in self.rows)
        further = {name: "max" if name == "accuracy" else "min" for name in wanted if name not in self.objectives}
        further |= {name: way for name, way in own.items() if name in self.rows and name not in self.objectives}
        front = Front.of(self.rows, {**self.objectives, **further}) if further else self
        measures = {name: self.objectives.get(name, "min") for name in own_columns(self.rows)}
        return pick(front.to_pandas(), **given, within=within, weights=weights, limits=limits, own=measures)

    def knee(self) -> pd.Series:
        """The point behind which each objective gains little for what the others lose, see `analysis.tradeoff`.

        Raises:
            ValueError: the front is empty.
        """
        return pick(self.to_pandas(), weights=self.knee_weights)

    @property
    def knee_weights(self) -> dict[str, float]:
        """Weights of the knee: of the usual objectives, for nobody said what a person's own measures are worth."""
        return balanced([name for name in self.objectives if name in OBJECTIVES] or ["accuracy"])

    def marks(self) -> dict[str, int]:
        """Positions in `to_pandas` of the points that people ask for by name; none for an empty front.

        `most-accurate`, `fewest-bops`, `smallest` and `knee`; several may be one point.
        """
        if not len(self):
            return {}
        frame = self.to_pandas()
        smallest = frame.sort_values(["size_bytes", "bops"], kind="stable").index[0]
        return {
            "most-accurate": 0,
            "fewest-bops": int(str(pick(frame, within=1.0).name)),
            "smallest": int(smallest),
            "knee": int(str(self.knee().name)),
        }

    def to_json(self) -> str:
        """A JSON array, a line for each point: the columns of `to_pandas`, `bits` in full, what is missing as null."""
        points = self._points(self.on_front).to_dict(orient="records")
        lines = [
            json.dumps({name: _plain(value) for name, value in point.items()}, allow_nan=False) for point in points
        ]
        return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"

    def to_csv(self) -> str:
        """The frame of `to_pandas` as comma-separated values with a header line."""
        return self.to_pandas().to_csv(index=False)

    def table(self) -> str:
        """The front as plain text for a terminal: a header, one line a point, shares in %, sizes in KiB or MiB."""
        return _aligned(_readable(self.to_pandas()))

    def __len__(self) -> int:
        return int(self.on_front.sum())

    def __iter__(self) -> Iterator[pd.Series]:
        """The rows of `to_pandas`, one Series a point."""
        return (row for _, row in self.to_pandas().iterrows())

    def __repr__(self) -> str:
        return f"Front({len(self)} of {len(self.rows)} points, {', '.join(self.objectives)})"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + _readable(self.to_pandas()).to_html(index=False, border=0)

    def plot(self, title: str | None = None) -> "Figure":
        """The front against relative BOPs and against size as a matplotlib figure, which a notebook shows.

        Raises:
            ValueError: the front is empty.
        """
        from analysis.plots import draw_front

        return draw_front(self, title=title)

    def _points(self, mask: np.ndarray) -> pd.DataFrame:
        shown = {name: name in self.rows for name in _OPTIONAL} | {"loss": "loss" in self.objectives}
        columns = [name for name in COLUMNS if shown.get(name, True)]
        own = [name for name in dict.fromkeys([*self.objectives, *own_columns(self.rows)]) if name not in columns]
        place = columns.index("bits")
        points = self.rows[mask].reindex(columns=[*columns[:place], *own, *columns[place:]])
        return points.sort_values(
            ["accuracy", "bops", "size_bytes", "trial"],
            ascending=[False, True, True, True],
            kind="stable",
            ignore_index=True,
        )


def _front_mask(rows: pd.DataFrame, objectives: Mapping[str, str]) -> np.ndarray:
    """Dominance among `rows`; while repeats of one another are left, the later ones leave the contest."""
    values = pareto.oriented(rows, objectives)
    contest = np.arange(len(rows))
    while True:
        front = contest[pareto.non_dominated(values[contest])]
        repeats = front[_repeats(rows.iloc[front])]
        if not repeats.size:
            mask = np.zeros(len(rows), dtype=bool)
            mask[front] = True
            return mask
        contest = np.setdiff1d(contest, repeats)


def _repeats(rows: pd.DataFrame) -> np.ndarray:
    """Which rows have the digest and the operating point of an earlier row."""
    if not {"digest", "point"} <= set(rows):
        return np.zeros(len(rows), dtype=bool)
    return (rows.duplicated(["digest", "point"]) & rows["digest"].notna()).to_numpy(dtype=bool)


def _with_short_bits(points: pd.DataFrame) -> pd.DataFrame:
    texts = [short_bits(bits) if isinstance(bits, Mapping) else None for bits in points["bits"]]
    return points.assign(bits=pd.Series(texts, index=points.index, dtype=object))


def _plain(value: Any) -> Any:
    """A value of a frame as JSON has it: widths as lists of integers, numbers as Python's, what is missing as None."""
    if isinstance(value, Mapping):
        return {layer: [int(width) for width in pair] for layer, pair in value.items() if pair is not None}
    if pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def _readable(points: pd.DataFrame) -> pd.DataFrame:
    """The columns that tell points apart, as text with units."""
    telling = [name for name in ("run", "method", "model", "point") if name in points and points[name].nunique() > 1]
    text = points[[name for name in ("run", "trial", "point", "method", "model") if name in ("trial", *telling)]].copy()
    own = [str(name) for name in points if name not in COLUMNS]
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "accuracy": ("accuracy", lambda value: f"{100 * value:.2f} %"),
        "test_accuracy": ("test accuracy", lambda value: f"{100 * value:.2f} %"),
        "loss": ("loss", lambda value: f"{value:.4g}"),
        "relative_bops": ("relative BOPs", lambda value: f"{three_digits(100 * value)} %"),
        "bops": ("BOPs", human_count),
        "size_bytes": ("size", human_bytes),
        **{name: (name, human_number) for name in own},
        "bits": ("bits", _elided),
        "source": ("source", str),
    }
    for name, (title, words) in columns.items():
        if name in points and points[name].notna().any():
            text[title] = ["-" if pd.isna(value) else words(value) for value in points[name]]
    return text.astype(str)


def _elided(bits: str) -> str:
    """The first and the last layers where all of them are too wide for a terminal."""
    if len(bits) <= _WIDEST_BITS:
        return bits
    half = _WIDEST_BITS // 2
    return f"{bits[:half].rpartition(' ')[0]} … {bits[-half:].partition(' ')[2]}"


def _aligned(text: pd.DataFrame) -> str:
    """Columns padded to their widest entry: numbers to the right, names and widths to the left."""
    lines = [list(text.columns), *text.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"run", "point", "method", "model", "bits", "source"}
    pads = [str.ljust if title in left else str.rjust for title in text.columns]
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)).rstrip()
        for line in lines
    )
