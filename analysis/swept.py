"""Sweeps as a report sees them: their records, their questions, and which of them differ by nothing but the seed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from analysis.front import Front
from analysis.pareto import bounded, hypervolume_history

UNASKED = ("seed", "data_root", "download", "workers", "concurrent", "cpus_per_worker", "gpus_per_worker", "train")
"""Fields of a sweep that do not belong to its question: where and how it ran, and the seed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Swept:
    """One sweep.

    Attributes:
        name: of the sweep.
        folder: its run folder, as commands name it.
        description: `RUN/sweep.json`.
        records: all records, also those without a point.
        importances: objective to parameter to its share of the objective's variance, 0..1; empty if unknown.
        kept: trials whose checkpoint is there.
        command: repeats it.
        over: whether it has ended, though it may have fewer trials than were asked for.
    """

    name: str
    folder: str
    description: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    kept: frozenset[int] = frozenset()
    command: str = ""
    over: bool = False

    @property
    def objectives(self) -> dict[str, str]:
        """Name to direction."""
        return dict(self.description["objectives"])

    @property
    def reference(self) -> dict[str, float]:
        """Worst values that count for the hypervolume, of the objectives that were given one."""
        return dict((self.description.get("sweep") or {}).get("reference") or {})

    @property
    def asked(self) -> dict[str, Any]:
        """The fields of the sweep, settings by address among them."""
        fields = dict(self.description.get("sweep") or self.description)
        settings = fields.pop("settings", None) or {}
        return fields | {f"settings {address}": value for address, value in settings.items()}

    @cached_property
    def front(self) -> Front:
        """The front of this sweep alone."""
        return Front.of(self.records, self.objectives, self.reference)

    @cached_property
    def history(self) -> pd.DataFrame | None:
        """Hypervolume after each completed trial; None where an objective has no worst value, as the loss."""
        known = bounded(self.objectives, self.reference)
        return hypervolume_history(self.records, self.objectives, self.reference) if known else None

    def count(self, status: str) -> int:
        """Trials that ended with this status."""
        return len({record["trial"] for record in self.records if record["status"] == status})


def groups(sweeps: Iterable[Swept]) -> dict[str, list[Swept]]:
    """Sweeps that ask the same but for the seed, under a name that tells the groups apart."""
    found: dict[str, list[Swept]] = {}
    for sweep in sweeps:
        question = {name: value for name, value in sweep.asked.items() if name not in (*UNASKED, "mlflow_uri")}
        found.setdefault(json.dumps(question, sort_keys=True), []).append(sweep)
    questions = [json.loads(question) for question in found]
    names = [_named(question, questions) for question in questions]
    return dict(zip(names, found.values(), strict=True))


def _named(question: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """Method, and whatever else differs among the questions."""
    names = dict.fromkeys(name for other in others for name in other)
    differing = [name for name in names if len({json.dumps(other.get(name)) for other in others}) > 1]
    told = [name for name in ("method", "model") if name in differing] or ["method"]
    rest = [name for name in differing if name not in told and not _follows(name, told, others)]
    words = [str(question.get(name, "")) for name in told]
    return " · ".join([*words, *(f"{name.removeprefix('settings ')} {_word(question.get(name))}" for name in rest)])


def _follows(name: str, told: Sequence[str], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the name says no more than those told already, as a method's own search space does."""
    groups_told = {json.dumps([other.get(each) for each in told]) for other in others}
    both = {json.dumps([other.get(each) for each in [*told, name]]) for other in others}
    return len(groups_told) == len(both)


def _word(value: Any) -> str:
    if value is None:
        return "default"
    return ", ".join(value) if isinstance(value, Mapping) else str(value)
