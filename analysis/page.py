"""One self-contained HTML page: text, tables, and charts that page.js draws from JSON. No network, no library.

What a page says is made elsewhere (`analysis.report`); here is how it is put together. Everything that comes from
outside goes through `html.escape` or JSON, in which `<` is written as an escape, so that nothing ends the script.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

COLORS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
"""Told apart by colour-blind readers too: Okabe and Ito 2008, without the red that marks the knee."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


@dataclass
class Page:
    """A page in the making; what is added appears in that order.

    Attributes:
        title: of the window.
        data: what page.js reads: `points` (columns), `networks`, `series`, `runs`, `marks`, `charts`.
    """

    title: str
    data: dict[str, Any]
    parts: list[str] = field(default_factory=list)
    charts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """Append HTML."""
        self.parts += parts

    def section(self, title: str, *parts: str, lead: str = "") -> None:
        """Append a section with a title and a line below it, both plain text."""
        head = f"<h2>{html.escape(title)}</h2>"
        note = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
        self.add("<section>", head, note, *parts, "</section>")

    def chart(self, kind: str, label: str, **values: Any) -> str:
        """HTML of a chart that page.js draws, one of its `charts`."""
        self.charts.append({"kind": kind, "label": label, **values})
        return f'<figure data-chart="{len(self.charts) - 1}"></figure>'

    def render(self) -> str:
        """The whole page."""
        source = files("analysis")
        return _PAGE.format(
            title=html.escape(self.title),
            style=(source / "page.css").read_text("utf-8"),
            body="\n".join(self.parts),
            data=_json({**self.data, "charts": self.charts}),
            script=(source / "page.js").read_text("utf-8"),
        )


def color(number: int) -> str:
    """The colour of the series with this number; more than there are colours begin again."""
    return COLORS[number % len(COLORS)]


def panels(*parts: str) -> str:
    """Things that stand side by side where there is room."""
    return f'<div class="panels">{"".join(parts)}</div>'


def table(
    columns: Mapping[str, bool],
    rows: Iterable[Sequence[str | tuple[str, float]]],
    *,
    points: Sequence[int] | None = None,
) -> str:
    """A table that a click on a title sorts.

    Args:
        columns: title, and whether the column is text (to the left) rather than numbers (to the right).
        rows: cells as HTML, or as HTML and the number to sort by.
        points: the point that each row stands for; a click chooses it.
    """
    kinds = [' class="text"' if is_text else "" for is_text in columns.values()]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    lines = []
    for number, row in enumerate(rows):
        made = "".join(map(_cell, row, kinds))
        lines.append(f"<tr>{made}</tr>" if points is None else f'<tr data-point="{points[number]}">{made}</tr>')
    body = "\n".join(lines)
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="sortable">{inner}</table></div>'


def _cell(cell: str | tuple[str, float], kind: str) -> str:
    if isinstance(cell, str):
        return f"<td{kind}>{cell}</td>"
    return f'<td{kind} data-value="{cell[1]:.9g}">{cell[0]}</td>'


def _json(value: Any) -> str:
    text = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """As JSON has it: floats with six digits, what is no number as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
