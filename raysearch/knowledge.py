"""What is known before the first trial: settings that a person wants tried, and what earlier sweeps found.

Both become first proposals (`raysearch.seeds`), which the records tell apart by their source: `person`, `warm-start`.
An earlier sweep may be of another data set or model. Widths go from layer to layer: to the one of the same name, else
to the one of the same kind at the same relative depth, ends to ends; where one parameter sets several layers, it gets
their middle width; a width that the space lacks becomes its nearest. A sweep of the same data and model also says how
sensitive each layer is: the loss model fitted to its trials is where the default proposer starts from.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np

from raysearch.errors import SweepError
from raysearch.limits import limits_of
from raysearch.resolve import resolve
from raysearch.result import Result
from raysearch.search.networks import configured, layers_of
from raysearch.search.proposals import choices, contains, cost_of
from raysearch.seeds import Seeds, proposed
from raysearch.sweep import Resolved, Sweep
from trainables.build import layer_table
from trainables.config import parse
from trainables.cost import INPUT_BITS, Layer

PERSON, WARM = "person", "warm-start"
FEWEST = 4
"""Complete trials of an earlier sweep before sensitivities are read from them."""


def seeds_for(sweep: Sweep, *, tries: str | Path | None = None, warm_start: Iterable[str | Path] = ()) -> Seeds:
    """What a sweep is to try first, for `raysearch.run(sweep, seeds=...)`.

    Args:
        sweep: the question.
        tries: JSON or CSV file of settings, see `read_tries`.
        warm_start: run folders of earlier sweeps.

    Raises:
        SweepError: a setting that the space does not have, or that breaks a limit.
        RecordError: no run folder.
    """
    resolved = resolve(sweep)
    found = Seeds()
    if tries is not None:
        found = proposed(PERSON, read_tries(Path(tries), resolved), resolved.space, resolved.base)
        _check(found, resolved)
    for run in warm_start:
        found = found.and_then(warm(Result(run), resolved))
    return found


def read_tries(path: Path, resolved: Resolved) -> list[dict[str, Any]]:
    """The settings of a file, by address.

    JSON is a list of objects, CSV a line for each under a header of addresses. A JSON object maps addresses to values,
    or layers to [weight bits, activation bits].

    Raises:
        SweepError: it cannot be read.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows: Any = [{k: _value(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        else:
            rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise SweepError(f"--try {path}: {error}; give a JSON list of settings by address, or a CSV of them") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SweepError(f"--try {path}: give a JSON list of settings by address, or of layers with [8, 4]")
    first = {layer.name for layer in resolved.table.layers if layer.first}
    return [_by_address(row, first) for row in rows]


def _by_address(row: Mapping[str, Any], first: set[str]) -> dict[str, Any]:
    """Layers with two widths as two addresses; the network's input keeps its bits."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if "/" not in name and isinstance(value, list) and len(value) == 2:
            found[f"bits/{name}/weight"] = value[0]
            if not (name in first and value[1] == INPUT_BITS):
                found[f"bits/{name}/activation"] = value[1]
        else:
            found[name] = value
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check(seeds: Seeds, resolved: Resolved) -> None:
    for number, (_, values) in enumerate(seeds.first, start=1):
        over = cost_of(configured(resolved.base, values), resolved.measures).over(limits_of(resolved.sweep))
        if over:
            raise SweepError(f"configuration {number} from {PERSON} has {over}: leave it out, or raise the limit")


def warm(earlier: Result, resolved: Resolved) -> Seeds:
    """First proposals from the front of an earlier sweep, at most a quarter of the trials; and sensitivities.

    Raises:
        RecordError: it has no complete trial.
    """
    description = earlier.description
    rows = [row for row in earlier.records() if row["status"] == "complete"]
    on_front = set(zip(*(earlier.front().to_pandas()[name] for name in ("trial", "point")), strict=True))
    points = sorted((row for row in rows if (row["trial"], row["point"]) in on_front), key=lambda row: row["bops"])
    most = max(1, resolved.sweep.trials // 4)
    if len(points) > most:
        points = [points[round(i)] for i in np.linspace(0, len(points) - 1, most)]
    first = proposed(WARM, [_carried(row, resolved) for row in points], resolved.space, resolved.base)
    same = all(description[part] == getattr(resolved.sweep, part) for part in ("model", "data"))
    return Seeds(first=first.first, sensitivities=_sensitivities(rows, resolved) if same else {})


def _carried(row: Mapping[str, Any], resolved: Resolved) -> dict[str, Any]:
    """What a record says about the parameters of this space, as far as the space has such values."""
    values = {a: v for a, v in row["params"].items() if not a.startswith("bits/") and a in resolved.space}
    values = {address: value for address, value in values.items() if contains(resolved.space[address], value)}
    bits = row["bits"] or {}
    old = [layer for layer in layer_table(parse(row["config"])).quantizable if layer.name in bits]
    layers = layers_of(resolved.base, values)
    for address, distribution in resolved.space.items():
        if not address.startswith("bits/"):
            continue
        _, pattern, role = address.split("/")
        own = [x for x in layers if x.name == pattern] or [
            x for x in layers if fnmatchcase(x.name, pattern) and not (x.first or x.last)
        ]
        place = ("weight", "activation").index(role)
        widths = [bits[twin.name][place] for layer in own if (twin := counterpart(layer, layers, old)) is not None]
        if widths:
            wanted = median_low(widths)
            values[address] = min(choices(distribution, limit=64), key=lambda width: (abs(width - wanted), width))
    return values


def counterpart(layer: Layer, layers: Sequence[Layer], others: Sequence[Layer]) -> Layer | None:
    """The layer of another network that takes the place of this one: by name, else by kind and relative depth."""
    for other in others:
        if other.name == layer.name:
            return other
    ends = [x for x in others if (x.first, x.last) == (layer.first, layer.last)]
    alike = [x for x in ends if x.kind == layer.kind] or ends
    if not alike:
        return None
    mine = [x for x in layers if (x.first, x.last, x.kind) == (layer.first, layer.last, layer.kind)]
    depth = mine.index(layer) / max(1, len(mine) - 1)
    return alike[round(depth * (len(alike) - 1))]


def _sensitivities(rows: Sequence[Mapping[str, Any]], resolved: Resolved) -> dict[str, float]:
    """Of the space's bit parameters, from a loss model fitted to all trials of a sweep of the same network."""
    from raysearch.search.bit_layout import BitLayout
    from raysearch.search.loss_model import fit

    space = {address: d for address, d in resolved.space.items() if address.startswith("bits/")}
    carried = [(_carried(row, resolved), 1 - row["accuracy"]) for row in rows]
    known = [(values, loss) for values, loss in carried if all(address in values for address in space)]
    if not space or len(known) < FEWEST:
        return {}
    layout = BitLayout(space, resolved.table.quantizable)
    bits = np.array([[values[address] for address in layout.addresses] for values, _ in known], dtype=float)
    model = fit(bits, np.array([loss for _, loss in known]), layout.prior)
    return dict(zip(layout.addresses, map(float, model.sensitivities), strict=True))
