"""What a sweep is told before its first trial: proposals to try first, each with its source, and known sensitivities.

They lie in RUN/seeds.json, so that a resumed sweep needs neither the file nor the measurement that they came from. The
ledger takes them in order, before the uniform configurations; those that break a limit or repeat another are refused
there, like any proposal.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysearch.errors import RecordError, SweepError
from raysearch.records import write_json
from raysearch.search.proposals import Space, contains, lookup, middle


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What is known before the first trial.

    Attributes:
        first: source and values by address of what is tried first, in order; each names all parameters of the space.
        sensitivities: of bit parameters, by address, up to a common factor.
    """

    first: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    sensitivities: Mapping[str, float] = field(default_factory=dict)

    def and_then(self, other: "Seeds") -> "Seeds":
        """The first proposals of both, ours before the other's; of sensitivities that both know, ours."""
        return Seeds(first=self.first + other.first, sensitivities={**other.sensitivities, **self.sensitivities})

    def write(self, path: Path) -> None:
        """Write the file of a run folder, atomically."""
        first = [{"source": source, "values": dict(values)} for source, values in self.first]
        write_json(path, {"first": first, "sensitivities": dict(self.sensitivities)})

    @classmethod
    def read(cls, path: Path) -> "Seeds":
        """Those of a run folder; without the file, none.

        Raises:
            RecordError: the file is damaged.
        """
        if not path.exists():
            return cls()
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            first = tuple((each["source"], each["values"]) for each in tree["first"])
            return cls(first=first, sensitivities=tree["sensitivities"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"cannot read {path}: {error}") from error


def proposed(source: str, configurations: Iterable[Mapping[str, Any]], space: Space, base: Mapping[str, Any]) -> Seeds:
    """Configurations as first proposals of a space; what they leave open is as in the base configuration.

    Args:
        source: who proposes them, as the records will say.
        configurations: values by address.
        space: distributions by address.
        base: JSON tree of the base configuration.

    Raises:
        SweepError: an address that is not searched, or a value that the space does not have.
    """
    rest = {name: middle(distribution, lookup(base, name)) for name, distribution in space.items()}
    first = []
    for number, values in enumerate(configurations, start=1):
        faults = [f"{name} is not searched" for name in values if name not in space]
        faults += [
            f"{name} = {value!r}: the space has {space[name]}"
            for name, value in values.items()
            if name in space and not contains(space[name], value)
        ]
        if faults:
            raise SweepError(f"configuration {number} from {source}: {'; '.join(faults[:3])} ({len(faults)} in all)")
        first.append((source, {**rest, **values}))
    return Seeds(first=tuple(first))
