"""The rows that count: from the records of sweeps to the complete points, in the order in which they finished.

A record is one outcome of one trial, with a status. Only `complete` ones are points; a pruned or failed one has no
accuracy to compare. Records come as they were read, from one sweep or several (then with the key `run`).
"""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

OBJECTIVES = {"accuracy": "max", "loss": "min", "bops": "min", "relative_bops": "min", "size_bytes": "min"}
"""What can be searched for, and which way is better."""

_COUNTS = ("trial", "bops", "size_bytes", "macs", "seed")


def check_objectives(objectives: Mapping[str, str], own: Collection[str] = ()) -> dict[str, str]:
    """The objectives as they were given, in their order.

    Args:
        objectives: name to direction.
        own: further names that are allowed, in either direction: a person's own measures.

    Raises:
        ValueError: there are none, one is unknown, or a direction is wrong.

    >>> check_objectives({"accuracy": "max", "bops": "min"})
    {'accuracy': 'max', 'bops': 'min'}
    """
    if not objectives:
        raise ValueError(f"objectives are empty: give at least one of {', '.join(OBJECTIVES)}")
    for name, direction in objectives.items():
        if name in own and name not in OBJECTIVES:
            if direction not in ("max", "min"):
                raise ValueError(f"objective {name} = {direction!r}: its direction is 'max' or 'min'")
            continue
        if name not in OBJECTIVES:
            allowed = [*OBJECTIVES, *own]
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}"
            raise ValueError(f"unknown objective {name!r}; {hint}")
        if direction != OBJECTIVES[name]:
            raise ValueError(f"objective {name} = {direction!r}: its direction is {OBJECTIVES[name]!r}")
    return dict(objectives)


def complete_rows(records: Iterable[Mapping[str, Any]] | pd.DataFrame, objectives: Mapping[str, str]) -> pd.DataFrame:
    """The complete points, one row each, by `finished_at`, then `trial`, then as they came.

    Rows of another status are left out, and so are rows whose objectives other than accuracy are missing or infinite;
    and those that break a limit of their sweep (`within_limits` is false), as long as there are others.

    Args:
        records: mappings or a frame with `status`, `trial`, `accuracy` (0..1) and a column for each objective.
        objectives: name to direction, such as `{"accuracy": "max", "bops": "min"}`.

    Raises:
        ValueError: a column is missing, or a complete row has no accuracy within 0..1.
    """
    frame = records if isinstance(records, pd.DataFrame) else pd.DataFrame([dict(record) for record in records])
    objectives = check_objectives(objectives, own=() if frame.empty else own_columns(frame))
    wanted = list(dict.fromkeys(["status", "trial", "accuracy", *objectives]))
    if frame.empty:
        return frame.reindex(columns=list(dict.fromkeys([*frame.columns, "status", "trial", *OBJECTIVES])))
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise ValueError(f"records lack {', '.join(missing)}; they have {', '.join(map(str, frame.columns))}")
    frame = frame[frame["status"] == "complete"].copy()
    _check_accuracy(frame)
    frame = frame[np.isfinite(numbers(frame, list(objectives))).all(axis=1)]
    if "within_limits" in frame:
        within = frame["within_limits"].ne(False)
        frame = frame[within] if within.any() else frame
    return _in_order(_counts_as_integers(frame))


def own_columns(frame: pd.DataFrame) -> list[str]:
    """Names of a person's own measures: what the records list under `measures`."""
    listed = frame.get("measures", ())
    return list(dict.fromkeys(name for names in listed if isinstance(names, list | np.ndarray) for name in names))


def numbers(frame: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """The columns as floats, shape (rows, columns); what is missing is NaN."""
    return frame[columns].apply(pd.to_numeric).to_numpy(dtype=float, na_value=math.nan)


def _check_accuracy(frame: pd.DataFrame) -> None:
    accuracy = numbers(frame, ["accuracy"])[:, 0]
    wrong = np.flatnonzero(~((accuracy >= 0) & (accuracy <= 1)))
    if wrong.size:
        row = frame.iloc[wrong[0]]
        where = f"run {row['run']}, trial {row['trial']}" if "run" in frame else f"trial {row['trial']}"
        raise ValueError(
            f"{where}: status is complete but accuracy is {accuracy[wrong[0]]:g}; a point has one within 0..1 "
            "(a training that diverged is recorded as failed)"
        )


def _counts_as_integers(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts that became floats because another record lacked them are integers again."""
    for name in _COUNTS:
        if name in frame:
            column = pd.to_numeric(frame[name])
            if column.notna().all() and (column == column.round()).all():
                frame[name] = column.astype("int64")
    return frame


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    if "finished_at" not in frame:
        return frame.sort_values("trial", kind="stable", ignore_index=True)
    finished = pd.to_datetime(frame["finished_at"], utc=True, format="ISO8601")
    order = frame.assign(_finished=finished).sort_values(["_finished", "trial"], kind="stable", ignore_index=True)
    return order.drop(columns="_finished")
