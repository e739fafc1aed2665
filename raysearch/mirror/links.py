"""Where a sweep is found in MLflow, and how far its mirror got. Reads RUN/mlflow.json and never imports MLflow.

`RUN/mlflow.json` is the mirror's memory (see `raysearch.tracking`): which experiment and runs are this sweep's, and how
many bytes of its files have been sent. It names the store without credentials; no file of ours ever holds them.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, urlsplit, urlunsplit

UI_PORT = 5000
VIEW = "front"
"""A view of the runs table that the mirror leaves with the experiment: the front, with the columns to pick by."""
MOST_COMPARED = 12
PICKED_BY = ("accuracy", "relative_bops", "bops", "size_bytes")
FRONT_FILTER = 'tags.pareto = "true"'
PROGRESS = "mlflow.json"
SQLITE = "sqlite:///"
"""A store in a file of this machine."""


def tracking_uri(run: Path, uri: str | None = None) -> str:
    """The store to write to: `uri`, else MLFLOW_TRACKING_URI, else a database in the sweep's own folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path(run).resolve() / 'mlflow.db'}"


def is_served(uri: str) -> bool:
    """Whether `uri` is a server with a page of its own, rather than a database that `raysearch ui` must open."""
    return uri.startswith(("http://", "https://"))


def redact(text: str) -> str:
    """The text without what could be a secret in an address: user, password and query.

    >>> redact("cannot reach http://ann:s3cret@host:5000/ml?token=abc")
    'cannot reach http://***@host:5000/ml?***'
    >>> redact("(host='host'): url: /ml?token=abc/api (refused)")
    "(host='host'): url: /ml?*** (refused)"
    """
    text = re.sub(r"(?<=://)[^\s/]*@", "***@", text)
    # A query loses its address in some messages: "url: /ml?token=abc".
    return re.sub(r"((?:://|/)[^\s?]*)\?[^\s'\")]+", r"\1?***", text)


def public(uri: str) -> str:
    """The address alone: scheme, host, port and path.

    >>> public("http://ann:s3cret@host:5000/ml?token=abc")
    'http://host:5000/ml'
    """
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if parts.netloc else uri


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far the mirror of a sweep got.

    Attributes:
        complete: every complete line on disk is in MLflow, and so are the front and the summary of them.
        trials: trials that have a run in MLflow.
        error: what stands or stood in the way, without credentials; None if nothing did.
    """

    complete: bool
    trials: int
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What RUN/mlflow.json says: what of the sweep is in MLflow already.

    Attributes:
        uri: the store, without credentials.
        sweep: name of the sweep.
        experiment_id: of its experiment; None before the first contact.
        summary: run id of the summary.
        runs: trial number (as text) to run id.
        records_sent: bytes of records.jsonl that have been dealt with.
        epochs_sent: bytes of epochs.jsonl that have been dealt with.
        published: `records_sent` when front and summary were last written.
        front: run ids of the trials on the front when it was last written, the most accurate first.
        refused: the last thing that MLflow would not take, without credentials.
        error: why the store cannot be written to at present, without credentials.
        ended: whether the runs were told how they ended, after everything else.
    """

    uri: str = ""
    sweep: str = ""
    experiment_id: str | None = None
    summary: str | None = None
    runs: dict[str, str] = field(default_factory=dict)
    records_sent: int = 0
    epochs_sent: int = 0
    published: int = 0
    front: list[str] = field(default_factory=list)
    refused: str | None = None
    error: str | None = None
    ended: bool = False

    @classmethod
    def load(cls, run: Path) -> Self:
        """What is in the file; nothing without a file, or with a damaged one: MLflow itself is asked then."""
        try:
            found: dict[str, Any] = json.loads((Path(run) / PROGRESS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return cls()
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})

    def save(self, run: Path, **changes: Any) -> "Progress":
        """Write it with these changes, whole or not at all; returns what was written."""
        changed = replace(self, **changes)
        path = Path(run) / PROGRESS
        fresh = path.with_name(f".{PROGRESS}.{os.getpid()}")
        fresh.write_text(json.dumps(asdict(changed), indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, path)
        return changed


def view_tag(own: Iterable[str] = ()) -> dict[str, str]:
    """The tag of an experiment under which MLflow's pages find the view `front`, as their "share" button writes it.

    Args:
        own: names of a person's own measures, for which there are columns too.
    """
    names = dict.fromkeys((*PICKED_BY, *own))
    columns = [*(f"metrics.`{name}`" for name in names), "tags.`raysearch.bits`", "attributes.`Created`"]
    state = {
        "searchFilter": FRONT_FILTER,
        "orderByKey": "metrics.`accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
    }
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps(state)}


def front_url(run: Path, uri: str | None = None, *, port: int = UI_PORT) -> str:
    """The page with the runs on the front and no others; before MLflow has the sweep, the page of experiments."""
    return pages(run, uri, f"http://127.0.0.1:{port}")["front"]


def pages(run: Path, uri: str | None = None, url: str | None = None) -> dict[str, str]:
    """Where to click in MLflow's pages; before MLflow has the sweep, only the page of experiments.

    `front` has the runs on the front and no others, the most accurate first; `summary` is the sweep's own page; in
    `compare` are up to twelve runs of the front side by side, as parallel coordinates; `models` is the registry.

    Args:
        run: the sweep's folder.
        uri: the store, as in `tracking_uri`.
        url: of the server on a store that is a database; a store that is a server has its own.
    """
    store = tracking_uri(run, uri)
    base = public(store).rstrip("/") if is_served(store) else url or f"http://127.0.0.1:{UI_PORT}"
    known = Progress.load(run)
    if known.experiment_id is None or known.uri != public(store):
        return {"front": f"{base}/#/experiments"}
    home, mode = f"{base}/#/experiments/{known.experiment_id}/runs", "workflowType=machine_learning"
    found = {"front": f"{home}?{mode}&viewStateShareKey={VIEW}"}
    if known.summary is not None:
        found["summary"] = f"{home}/{known.summary}/artifacts/summary.html?{mode}"
    if len(known.front) > 1:
        runs, experiments = (
            quote(json.dumps(ids), safe="") for ids in (known.front[:MOST_COMPARED], [known.experiment_id])
        )
        found["compare"] = f"{base}/#/compare-runs?runs={runs}&experiments={experiments}&{mode}"
    return found | {"models": f"{base}/#/models/{quote(known.sweep, safe='')}?{mode}"}
