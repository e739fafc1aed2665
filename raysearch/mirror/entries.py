"""What MLflow is told about a sweep: its records as metrics, params, tags and a description. Pure, without MLflow.

The same line of a file always gives the same entries with the same time, so sending it twice changes nothing: MLflow
keeps one metric for each (key, step, time, value), refuses a param only when its value differs, and overwrites tags.
"""

import json
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple

import pandas as pd

from analysis.wording import human_bytes, human_count, human_number, short_bits
from raysearch.asked_space import words

NAME_MAX = 250
PARAM_MAX = 6000
TAG_MAX = 5000
FACTS = ("method", "model", "data", "seed", "epochs", "source")
FINAL = ("accuracy", "loss", "bops", "relative_bops", "size_bytes", "macs")
READABLE = {
    "accuracy": "{:.2%}".format,
    "loss": "{:.4g}".format,
    "bops": human_count,
    "relative_bops": "{:.3%}".format,
    "size_bytes": human_bytes,
}
OUTCOME = {
    "accuracy": "validation accuracy",
    "relative_bops": "relative BOPs",
    "bops": "BOPs",
    "size_bytes": "as exported",
}
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


class Metric(NamedTuple):
    """One value of one curve.

    Attributes:
        key: its name.
        value: finite.
        time_ms: since 1970.
        step: the epoch.
    """

    key: str
    value: float
    time_ms: int
    step: int


def entry_name(text: str) -> str:
    """A name that MLflow takes: letters, digits and `_-. :/`, a path that needs no tidying, at most 250 characters.

    >>> entry_name("bits/layer1.0.conv1/weight"), entry_name("../lr[0]")
    ('bits/layer1.0.conv1/weight', 'lr_0_')
    """
    return posixpath.normpath("/" + re.sub(r"[^\w.\- :/]", "_", text)[:NAME_MAX]).strip("/") or "_"


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping with their addresses.

    >>> dict(flat({"optimizer": {"lr": 0.1}, "seed": 3}))
    {'optimizer/lr': 0.1, 'seed': 3}
    """
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def params(nested: Mapping[str, Any]) -> dict[str, str]:
    """A nested mapping as MLflow's params: addresses and texts, cut to what MLflow takes."""
    return {entry_name(name): _text(value)[:PARAM_MAX] for name, value in flat(nested)}


def record_params(record: Mapping[str, Any]) -> dict[str, str]:
    """What the trial was: its parameters by address, and the facts that records share."""
    facts = {name: record[name] for name in FACTS if record.get(name) is not None}
    return params({**facts, **(record.get("params") or {})})


def record_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """How the trial ended, what it is, and where its checkpoint lies."""
    point = "" if record.get("point", "final") == "final" else f".{record['point']}"
    texts = {
        "raysearch.status": record["status"],
        "raysearch.reason": record.get("reason"),
        "raysearch.digest": record.get("digest"),
        f"raysearch.bits{point}": short_bits(record["bits"]) if record.get("bits") else None,
        "raysearch.checkpoint": record.get("checkpoint"),
        "mlflow.source.git.commit": (record.get("git") or {}).get("commit"),
    }
    return {entry_name(name): str(text)[:TAG_MAX] for name, text in texts.items() if text}


def epoch_metrics(line: Mapping[str, Any], time_ms: int | None = None) -> list[Metric]:
    """The finite numbers of one epoch, at the time when it ended."""
    moment = round(line["time"] * 1000) if time_ms is None else time_ms
    # MLflow's pages offer metrics in the order in which they came, and compare runs by the first one.
    keys = sorted((key for key in line if key not in ("trial", "epoch", "time")), key=lambda key: key not in FINAL)
    return _metrics(line, keys, moment, line["epoch"])


def history_metrics(record: Mapping[str, Any]) -> list[Metric]:
    """The epochs as the record has them, spread evenly between its start and its end."""
    history = record.get("history") or []
    start, end = span_ms(record)
    times = [start + (end - start) * (index + 1) // len(history) for index in range(len(history))]
    return [metric for line, time in zip(history, times, strict=True) for metric in epoch_metrics(line, time)]


def record_metrics(record: Mapping[str, Any]) -> list[Metric]:
    """The outcome where it differs from the last epoch's; that of a named operating point as `POINT/accuracy`."""
    history = record.get("history") or [{}]
    final = record.get("point", "final") == "final"
    prefix = "" if final else f"{entry_name(record['point'])}/"
    step, end = record.get("epoch") or 0, span_ms(record)[1]
    known = history[-1] if final and history[-1].get("epoch") == step else {}
    names = (*FINAL, *record.get("measures", ()))
    outcome = {prefix + key: record.get(key) for key in names if key not in known or known[key] != record.get(key)}
    return _metrics({**outcome, "trial_seconds": record.get("seconds")}, None, end, step)


def moment_ms(text: str) -> int:
    """An ISO 8601 time in milliseconds since 1970.

    >>> moment_ms("2026-11-21T10:15:03+00:00")
    1795256103000
    """
    return round(datetime.fromisoformat(text).timestamp() * 1000)


def span_ms(record: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end of the trial in milliseconds since 1970; one that never started has its end as start."""
    return moment_ms(record.get("started_at") or record["finished_at"]), moment_ms(record["finished_at"])


def epoch_start_ms(line: Mapping[str, Any]) -> int:
    """Start of an epoch in milliseconds since 1970."""
    return round(1000 * (line["time"] - (line.get("seconds") or 0)))


def trial_note(sweep: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """A trial's description as Markdown: outcome, the command that repeats it (or its search on shared weights), its
    resolved configuration.

    The configuration is left out, for `RUN/records.jsonl` has it, where all of it would not fit.
    """
    from raysearch.repeat import search_command, train_command

    head = outcome(record) if record["status"] == "complete" else f"{record['status']}: {record.get('reason')}"
    if not record.get("config") or not sweep.get("sweep"):
        return head
    command = search_command(sweep["search"]) if "search" in sweep else train_command(sweep["sweep"], record)
    blocks = [head, f"```sh\n{command}\n```"]
    config = f"Resolved configuration:\n\n```json\n{json.dumps(record['config'], indent=1)}\n```"
    if len("\n\n".join([*blocks, config])) > TAG_MAX:
        config = f"Resolved configuration: the line of trial {record['trial']} in records.jsonl"
    return "\n\n".join([*blocks, config])


def outcome(record: Mapping[str, Any]) -> str:
    """What a complete point reaches and costs, in a line."""
    parts = [f"{READABLE[name](record[name])} {words}" for name, words in OUTCOME.items() if record.get(name)]
    own = [name for name in record.get("measures") or () if record.get(name) is not None]
    return ", ".join([*parts, *(f"{name} {human_number(record[name])}" for name in own)])


def description(sweep: Mapping[str, Any], front: pd.DataFrame, completed: int) -> str:
    """The front as Markdown, most accurate first; rows that would not fit are counted instead."""
    goals = ", ".join(f"{name} {direction}" for name, direction in sweep["objectives"].items())
    asked = {**sweep, **(sweep.get("sweep") or {})}
    asked["space"] = words(asked.get("space") or {})
    head = f"**{len(front)} points on the front** of {completed} completed trials: {goals}; " + ", ".join(
        f"{name} {asked.get(name)}" for name in ("method", "model", "data", "space")
    )
    columns = list(dict.fromkeys(["trial", "accuracy", *sweep["objectives"], "bits"]))
    shown = front.sort_values("accuracy", ascending=False, kind="stable")[[c for c in columns if c in front]]
    rows = ["| " + " | ".join(_cell(*pair) for pair in row.items()) + " |" for row in shown.to_dict(orient="records")]
    table = ["| " + " | ".join(shown.columns) + " |", "|" + " --- |" * len(shown.columns)]
    left = TAG_MAX - len(head) - sum(len(line) + 1 for line in table) - 60
    for index, row in enumerate(rows):
        left -= len(row) + 1
        if left < 0:
            return "\n".join([head, "", *table, "", f"... and {len(rows) - index} more in front.csv"])
        table.append(row)
    return "\n".join([head, "", *table])


def _metrics(values: Mapping[str, Any], keys: Iterable[str] | None, time_ms: int, step: int) -> list[Metric]:
    found = [(key, values[key]) for key in (values if keys is None else keys)]
    return [
        Metric(entry_name(key), float(value), time_ms, int(step))
        for key, value in found
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(name: Any, value: Any) -> str:
    text = READABLE[name](value) if name in READABLE else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
