"""What follows from a sweep without training: its configuration, layer table, space and measures; and what cannot be.

    resolve(sweep)      -> Resolved: everything, for whoever is about to train
    trial_config(sweep) -> the configuration of a trial alone; the search space is not looked at

Nothing is loaded, trained or written.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from raysearch.errors import SweepError
from raysearch.search.space import check, made
from raysearch.sweep import GRID, Resolved, Sweep
from raysearch.sweep_checks import check_types, check_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from trainables.config import TrialConfig


def resolve(sweep: Sweep, space: Mapping[str, "BaseDistribution"] | None = None) -> Resolved:
    """Check a sweep and work out what follows from it; nothing is loaded, trained or written.

    Args:
        sweep: the question.
        space: its distributions, where they are known already; None makes them.

    Raises:
        SweepError, ConfigError, PluginError: what is wrong, and what to do.
    """
    from raysearch.search.networks import CHANGING
    from raysearch.search.proposals import lookup
    from raysearch.search.rungs import rung_epochs
    from raysearch.search.stopping import judged
    from trainables.build import layer_table
    from trainables.config import parse
    from trainables.measures import load_all

    config = trial_config(sweep)
    sweep = _located(sweep)
    for address, size in (("training", config.training.batch_size), ("start", config.start.batch_size)):
        if size % sweep.workers:
            raise SweepError(
                f"{address}/batch_size = {size} cannot be shared by {sweep.workers} workers: "
                f"take a multiple of {sweep.workers}"
            )
    table = layer_table(config)
    base = config.tree()
    found = made(sweep.space, table.quantizable, base) if space is None else dict(space)
    measures = load_all(sweep.measures)
    parent = {address: lookup(base, address) for address in found if address.startswith(CHANGING)}
    if parent and "start/parent" not in sweep.settings:
        base["start"]["parent"] = parent
        config = parse(base)
    check(sweep, base, table, found, measures)
    if callable(sweep.space):
        sweep = replace(sweep, space=found)
    resolved = Resolved(sweep, base, config, table, found, measures)
    if sweep.stopper not in ("auto", "none") and not rung_epochs(sweep.epochs, sweep.grace_epochs, 2):
        raise SweepError(
            f"stopper {sweep.stopper!r} would stop nobody: trials have {sweep.epochs} epochs, none of them before "
            f"epoch {sweep.grace_epochs} is stopped; raise --epochs or lower --grace-epochs"
        )
    if sweep.stopper not in ("auto", "none") and not judged(resolved):
        raise SweepError(
            f"stopper {sweep.stopper!r} would stop nobody: all objectives are measured at the end of a training; "
            "add one that each epoch tells, such as accuracy, or leave the stopper out"
        )
    if sweep.sampler == "frontier":
        from raysearch.search.choice import choose

        choice = choose(resolved)
        if choice.sampler != "frontier":
            raise SweepError(f"sampler 'frontier' cannot propose: {choice.reason}; take auto, tpe or nsga2")
    if sweep.sampler == "grid":
        from raysearch.search.proposals import cardinality

        count = cardinality(found)
        if count > GRID:
            raise SweepError(
                f"sampler 'grid' cannot walk {count:.3g} configurations, at most {GRID:,}: give the space "
                "fewer choices, float parameters a step, or take qmc"
            )
    return resolved


def trial_config(sweep: Sweep) -> "TrialConfig":
    """The configuration of a trial before any proposal; the search space is not looked at.

    Raises:
        SweepError, ConfigError, PluginError: what is wrong, and what to do.
    """
    from trainables.config import merged, parse

    check_types(sweep)
    check_values(sweep)
    sweep = _located(sweep)
    tree = {"method": {"name": sweep.method}, "model": {"name": sweep.model}, "data": {"name": sweep.data}}
    return parse(merged(tree, {"training/epochs": sweep.epochs, "seed": sweep.seed, **sweep.settings}))


def _located(sweep: Sweep) -> Sweep:
    """With absolute paths of files."""
    from trainables.plugins import located

    space = located(sweep.space) if isinstance(sweep.space, str) else sweep.space
    names = [located(name) for name in (sweep.method, sweep.model, sweep.data)]
    measures = {name: located(source) for name, source in sweep.measures.items()}
    return replace(sweep, method=names[0], model=names[1], data=names[2], space=space, measures=measures)


def files_of(sweep: Sweep) -> dict[str, str]:
    """SHA-256 of each file that training takes code from, by path. What a space gave is in `sweep.json` itself."""
    from trainables.plugins import is_file, split

    names = (sweep.method, sweep.model, sweep.data, *sweep.measures.values())
    paths = [split(name)[0] for name in names if is_file(name) or name.endswith(".json")]
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def check_files(known: Mapping[str, str]) -> None:
    """Refuse to go on with other code than the sweep began with.

    Raises:
        SweepError: a file is gone, or is not the one that `files_of` saw.
    """
    for path, digest in known.items():
        if not Path(path).is_file():
            raise SweepError(f"{path} is gone: put it back, the sweep takes code from it")
        if hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
            raise SweepError(f"{path} has changed since the sweep began: put it back as it was, or begin another sweep")
