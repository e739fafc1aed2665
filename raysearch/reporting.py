"""What the pages of a sweep are made from: its folder, as `analysis.report` wants it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch.errors import RecordError
from raysearch.records import RunFolder
from raysearch.repeat import search_command
from raysearch.shared_weights.evaluators import SUPERNET

if TYPE_CHECKING:
    from analysis.swept import Swept
    from raysearch.result import Result

SUMMARY_PAGE = "summary.html"


def swept(run: Path, description: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> "Swept":
    """A sweep as a report sees it.

    Args:
        run: its folder.
        description: `RUN/sweep.json`.
        records: those to show.
    """
    from analysis.swept import Swept
    from raysearch.importance import importances

    shared = (run / SUPERNET).exists()
    return Swept(
        name=str(description["name"]),
        folder=str(run),
        description=description,
        records=records,
        importances=importances(RunFolder(run).study, description["objectives"]),
        kept=frozenset(
            [int(record["trial"]) for record in records]
            if shared
            else [int(path.parent.name) for path in run.glob("trials/[0-9]*/*.safetensors")]
        ),
        command=search_command(description["search"]) if "search" in description else f"raysearch sweep --from {run}",
        over=RunFolder(run).end.exists(),
    )


def report_of(results: Sequence["Result"], title: str | None = None) -> str:
    """The report of several sweeps as one self-contained HTML page.

    Raises:
        RecordError: none of them has a complete trial, or they are of several data sets.
    """
    from analysis.report import report

    sweeps = [swept(result.path, result.description, result.records()) for result in results]
    try:
        return report(sweeps, title or ", ".join(dict.fromkeys(result.name for result in results)))
    except ValueError as error:
        raise RecordError(str(error)) from error
