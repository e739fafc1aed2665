"""What the pages of a sweep are made from: its folder, as `analysis.report` wants it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch.records import RunFolder
from raysearch.repeat import search_command
from raysearch.shared_weights.evaluators import SUPERNET

if TYPE_CHECKING:
    from analysis.swept import Swept

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
