"""Sensitivity as a service: per-layer tables of a float network, and the first proposals of a sweep that follow.

    sensitivity(sweep)     -> a DataFrame, measured here or on Ray tasks
    write, read            -> as a JSON file
    seeds_of(frame, ...)   -> the integer program's solutions under a ladder of budgets, and the sensitivities

The integer program (`analysis.allocate`) chooses widths for the parameters of a space, whatever layers each reaches;
its scores are the rises of the loss that the table expects. Budgets run evenly, in ratio, from the narrowest to the
widest configuration, of each cost that the sweep searches.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysearch.errors import SweepError
from raysearch.records import RunFolder, write_json
from raysearch.resolve import trial_config
from raysearch.seeds import Seeds, proposed
from raysearch.sweep import Resolved, Sweep

if TYPE_CHECKING:
    import pandas as pd

    from raysearch.search.proposals import Space
    from trainables.config import TrialConfig
    from trainables.cost import Layer
    from trainables.layer_profile import Plan

FORMAT = "raysearch/sensitivity/1"
SOURCE = "sensitivity"
FILE = "sensitivity.json"
BUDGETS = 6
"""Of each cost; the ends are uniform configurations anyway, and left out."""
SCORES = ("fisher", "hessian", "rise")


def sensitivity(
    sweep: Sweep, plan: "Plan | None" = None, *, out: str | Path | None = None, workers: int = 0
) -> "pd.DataFrame":
    """Measure how much each layer suffers from quantization.

    Args:
        sweep: model, data, seed and settings are used (`start/epochs`, `start/checkpoint`, ...).
        plan: what is measured.
        out: folder where the float network is kept and looked for; None keeps nothing.
        workers: Ray tasks at the same time; 0 measures in this process. The numbers are the same.

    Returns:
        a row for each layer; `trainables.layer_profile` says what the columns are. `attrs` say of which network.

    Raises:
        SweepError, ConfigError, DataError, PluginError: what cannot be.
    """
    import contextlib
    import tempfile

    from trainables.layer_profile import Plan
    from trainables.start import float_start

    config, plan = trial_config(sweep), plan or Plan(seed=sweep.seed)
    root = None if sweep.data_root is None else Path(sweep.data_root)
    with contextlib.ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = float_start(config, folder.resolve() / "starts", data_root=root)
        if not workers:
            return measured(config, start, root, plan)
        from raysearch.cluster.connection import ray_for

        stack.enter_context(ray_for(sweep))
        return on_ray(config, start, root, plan)


def measured(config: "TrialConfig", start: Path | None, data_root: Path | None, plan: "Plan") -> "pd.DataFrame":
    """The table, measured in this process."""
    from trainables.layer_profile import curvature_part, drop_part, float_session, rows_of

    session = float_session(config, start, data_root=data_root)
    curvatures = [curvature_part(session, plan, part) for part in range(plan.batches)]
    names = [row.name for row in session.table.quantizable] if plan.images else []
    return _frame(rows_of(session, plan, curvatures, {n: drop_part(session, plan, n) for n in names}), config, plan)


def on_ray(config: "TrialConfig", start: Path | None, data_root: Path | None, plan: "Plan") -> "pd.DataFrame":
    """The table, measured by Ray tasks of one core: one for each batch, one for each layer."""
    import ray

    from trainables.build import layer_table
    from trainables.layer_profile import float_session, rows_of

    given = (config.tree(), None if start is None else str(start.resolve()))
    root = None if data_root is None else str(data_root.resolve())
    task = ray.remote(num_cpus=1)(_part)
    names = [row.name for row in layer_table(config).quantizable] if plan.images else []
    curvatures = [task.remote(*given, root, plan, part) for part in range(plan.batches)]
    drops = [task.remote(*given, root, plan, name) for name in names]
    session = float_session(config, start, data_root=data_root)
    rows = rows_of(session, plan, ray.get(curvatures), dict(zip(names, ray.get(drops), strict=True)))
    return _frame(rows, config, plan)


def _part(tree: dict[str, Any], start: str | None, root: str | None, plan: "Plan", part: int | str) -> Any:
    """One part: that of a batch by its number, or of a layer by its name."""
    import torch

    from trainables.config import parse
    from trainables.layer_profile import curvature_part, drop_part, float_session

    torch.set_num_threads(1)
    session = float_session(
        parse(tree), None if start is None else Path(start), data_root=None if root is None else Path(root)
    )
    return drop_part(session, plan, part) if isinstance(part, str) else curvature_part(session, plan, part)


def _frame(rows: Sequence[Mapping[str, Any]], config: "TrialConfig", plan: "Plan") -> "pd.DataFrame":
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame.attrs = {"model": config.model.name, "data": config.data.name, "widths": list(plan.widths)}
    return frame


def to_json(frame: "pd.DataFrame") -> dict[str, Any]:
    """The table as the JSON tree that `--seed-from` reads."""
    rows = json.loads(frame.to_json(orient="records", double_precision=15))
    return {"format": FORMAT, **{str(key): value for key, value in frame.attrs.items()}, "layers": rows}


def write(frame: "pd.DataFrame", path: str | Path) -> None:
    """Write the table as a JSON file, atomically."""
    write_json(Path(path), to_json(frame))


def read(path: str | Path) -> "pd.DataFrame":
    """A table that `write` wrote.

    Raises:
        SweepError: no such file, or none of this format.
    """
    import pandas as pd

    hint = "give a file of `raysearch sensitivity -o FILE`, or `sensitivity` to measure now"
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SweepError(f"--seed-from {path}: {error}; {hint}") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise SweepError(f"--seed-from {path}: holds no sensitivities; {hint}")
    frame = pd.DataFrame(tree["layers"])
    frame.attrs = {name: tree[name] for name in ("model", "data", "widths")}
    return frame


def read_seeds(resolved: Resolved) -> Seeds:
    """What the file of `--seed-from` says; none if none is given, or the sensitivities are yet to be measured.

    Raises:
        SweepError: the file cannot be read, is of another network, or the sweep has no use for it.
    """
    given = resolved.sweep.seed_from
    if given is None:
        return Seeds()
    fixed = _fixed(resolved)
    if given == SOURCE:
        return Seeds()
    return _for_sweep(read(given), resolved, fixed)


def seed(folder: RunFolder, resolved: Resolved, known: Seeds) -> None:
    """Write `RUN/seeds.json`, unless it is there; sensitivities that a sweep asks for are measured on Ray now."""
    if folder.seeds.exists():
        return
    if resolved.sweep.seed_from == SOURCE:
        import ray

        from trainables.layer_profile import Plan

        root = None if resolved.sweep.data_root is None else Path(resolved.sweep.data_root)
        begun = ray.remote(num_cpus=1)(_float_start).remote(resolved.config, folder.starts.resolve(), root)
        start = ray.get(begun)
        frame = on_ray(resolved.config, start, root, Plan(images=0, seed=resolved.sweep.seed))
        write(frame, folder.path / FILE)
        known = known.and_then(_for_sweep(frame, resolved, _fixed(resolved)))
    known.write(folder.seeds)


def _float_start(config: "TrialConfig", folder: Path, root: Path | None) -> Path | None:
    from trainables.start import float_start

    return float_start(config, folder, data_root=root)


def _fixed(resolved: Resolved) -> Mapping[str, Sequence[int]]:
    """Widths of the narrowest configuration, which are those of what the space leaves alone."""
    from raysearch.search.networks import changes
    from raysearch.search.proposals import cheapest, cost_of
    from trainables.config import merged

    if changes(resolved.space):
        raise SweepError("--seed-from: the space changes the network, and sensitivities are those of one; leave it out")
    widths = cost_of(merged(resolved.base, cheapest(resolved.space))).bits
    if widths is None:
        raise SweepError(f"--seed-from: method {resolved.sweep.method!r} decides widths itself; leave it out")
    return widths


def _for_sweep(frame: "pd.DataFrame", resolved: Resolved, fixed: Mapping[str, Sequence[int]]) -> Seeds:
    from raysearch.search.layer_sums import tables_of

    layers = resolved.table.quantizable
    tables = tables_of(resolved.measures, layers, resolved.space, fixed)
    return seeds_of(frame, resolved.space, layers, resolved.base, resolved.sweep.objectives, fixed=fixed, tables=tables)


def seeds_of(
    frame: "pd.DataFrame",
    space: "Space",
    layers: Sequence["Layer"],
    base: Mapping[str, Any],
    objectives: Mapping[str, str],
    *,
    fixed: Mapping[str, Sequence[int]] | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
    score: str = "fisher",
) -> Seeds:
    """What a table of sensitivities says to try first, and its sensitivities by address.

    Args:
        frame: of `sensitivity`.
        space: distributions by address.
        layers: the network's quantizable layers.
        base: JSON tree of the base configuration.
        objectives: of the sweep: a ladder of budgets for each cost among them that follows from the widths; of BOPs if
            there is none.
        fixed: layer -> [weight bits, activation bits] where the space says nothing; 8 by default.
        tables: costs of a person's own that are sums over layers, as in `BitLayout`.
        score: `fisher` or `hessian` traces times errors (activations always go by Fisher's), or the measured `rise`.

    Raises:
        SweepError: the space has no bits, or the table is of another network.
    """
    from analysis.integer_program import Limit
    from analysis.ladder import ladder
    from raysearch.search.bit_layout import COSTS, BitLayout
    from trainables.sensitivity import other_network

    if not any(name.startswith("bits/") for name in space):
        raise SweepError("--seed-from: the space has no bits, which sensitivities could choose; leave it out")
    fault = other_network(frame["layer"], [layer.name for layer in layers])
    if fault:
        raise SweepError(f"--seed-from: these sensitivities {fault}")
    layout = BitLayout(space, layers, fixed, tables=tables)
    rises = expected_rises(frame, score)
    by_column = [
        {int(b): sum(_at(rises[layers[i].name, role], int(b)) for i, role in layout.reached(column)) for b in widths}
        for column, widths in enumerate(layout.widths)
    ]
    scores = [
        [sum(by_column[c][int(b)] for c, b in zip(g.columns, option, strict=True)) for option in g.options]
        for g in layout.groups
    ]
    found: dict[tuple[int, ...], None] = {}
    kinds = [COSTS.get(name, name) for name in objectives if name in COSTS or name in (tables or {})]
    for kind in dict.fromkeys(kinds or ["bops"]):
        amounts = [group.amounts[kind].tolist() for group in layout.groups]
        least, most = (sum(float(end(each)) for each in amounts) for end in (np.min, np.max))
        budgets = np.geomspace(max(least, 1e-9), max(most, 1e-9), BUDGETS + 2)[1:-1]
        for allocation in ladder(scores, Limit(name=kind, amounts=amounts), [max(b, least) for b in budgets]):
            row = np.zeros(layout.columns, dtype=int)
            for group, option in zip(layout.groups, allocation.options, strict=True):
                row[group.columns] = group.options[option]
            found[tuple(row.tolist())] = None
    configurations = [dict(zip(layout.addresses, row, strict=True)) for row in found]
    known = {
        address: float(np.exp(np.mean([np.log(max(rise, 1e-30)) + b * np.log(4.0) for b, rise in column.items()])))
        for address, column in zip(layout.addresses, by_column, strict=True)
    }
    return Seeds(first=proposed(SOURCE, configurations, space, base).first, sensitivities=known)


def expected_rises(frame: "pd.DataFrame", score: str = "fisher") -> dict[tuple[str, str], dict[int, float]]:
    """Expected rise of the loss, by layer and role, then by width.

    Raises:
        SweepError: an unknown score, or one that was not measured.
    """
    if score not in SCORES:
        raise SweepError(f"score = {score!r}: one of {', '.join(SCORES)}")
    found = {}
    for row in frame.to_dict("records"):
        for role, trace in (("weight", "hessian" if score == "hessian" else "fisher"), ("activation", "fisher_read")):
            values = {}
            for bits in frame.attrs["widths"]:
                if score == "rise" and f"{role}_rise_{bits}" not in row:
                    raise SweepError("score = 'rise': it was not measured; measure with --images above 0")
                values[int(bits)] = (
                    row[f"{role}_rise_{bits}"]
                    if score == "rise"
                    else 0.5 * max(row[trace], 0.0) * row[f"{role}_error_{bits}"]
                )
            found[row["layer"], role] = _falling(values)
    return found


def _falling(values: Mapping[int, float]) -> dict[int, float]:
    """Never below zero, and never more at a higher width: what rises there is noise."""
    least, found = np.inf, {}
    for bits in sorted(values):
        least = min(least, max(values[bits], 0.0))
        found[bits] = float(least)
    return found


def _at(values: Mapping[int, float], bits: int) -> float:
    """At a width that was not measured, by the law of rounding noise, which quarters with each bit."""
    near = min(values, key=lambda known: (abs(known - bits), known))
    return float(values[near] * 4.0 ** (near - bits))
