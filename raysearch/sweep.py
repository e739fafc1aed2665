"""A sweep: what a person asks for. Frozen, JSON in and out, checked completely before anything expensive starts.

`Sweep` holds the question; `resolve` answers what follows from it without training: the base configuration of a trial,
the layer table, and the search space.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from raysearch.errors import SweepError
from raysearch.space import Asked, check, made, read, written
from raysearch.sweep_checks import check_types, check_values

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

    from trainables.config import TrialConfig
    from trainables.cost import LayerTable
    from trainables.measures import Measure

DEFAULT_OBJECTIVES = {"accuracy": "max", "bops": "min", "size_bytes": "min"}
GRID = 100_000
"""Configurations that the sampler `grid` walks at most."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The question a sweep answers; each field is a flag of `raysearch sweep`.

    In Python, `space` may also be a function `space(layers)`, or Optuna distributions by address.
    """

    method: Annotated[str, "quantization method: a name (raysearch list methods), a dotted path or FILE.py"] = "lsq"
    model: Annotated[str, "network: a name, package.module:factory or FILE.py:factory"] = "lenet5"
    data: Annotated[str, "data set: a name, a dotted path or FILE.py"] = "digits"
    data_root: Annotated[str | None, "where the data set lies"] = None
    download: Annotated[bool, "let torchvision download the data set into --data-root"] = False
    space: Annotated[Asked, "search space: a name, a dotted path or FILE.py"] = "all_layers"
    objectives: Annotated[dict[str, str], "what to search for, as accuracy:max,bops:min,..."] = field(
        default_factory=DEFAULT_OBJECTIVES.copy
    )
    measures: Annotated[
        dict[str, str], "measures of one's own by name: FILE.py, package.module:function, or a table FILE.json"
    ] = field(default_factory=dict)
    reference: Annotated[dict[str, float], "worst value of an objective that counts for the hypervolume"] = field(
        default_factory=dict
    )
    trials: Annotated[int, "number of trials"] = 32
    epochs: Annotated[int, "epochs of a trial"] = 5
    workers: Annotated[int, "Ray Train workers of a trial"] = 1
    concurrent: Annotated[int | None, "trials at the same time; default: what the cluster holds"] = None
    cpus_per_worker: Annotated[int, "CPU cores of a worker"] = 1
    gpus_per_worker: Annotated[float | None, "GPUs of a worker, also a share; default: 1 if there are any"] = None
    train: Annotated[bool, "use a Ray Train worker group also for one CPU worker"] = False
    hang_timeout: Annotated[float, "seconds without a sign of life after which a process is replaced"] = 900.0
    sampler: Annotated[str, "who proposes: auto, frontier, tpe, nsga2, nsga3, gp, random, qmc, grid"] = "auto"
    stopper: Annotated[str, "who stops trials early: auto, none, mo_asha, front"] = "auto"
    grace_epochs: Annotated[int, "epochs before a trial may be stopped"] = 1
    reduction_factor: Annotated[float, "mo_asha: one of so many goes on at a rung, with so many times the epochs"] = 3.0
    max_paused: Annotated[int, "stopped trials whose checkpoints are kept, so that they may go on later"] = 32
    epoch_budget: Annotated[int | None, "epochs of all trials together; --trials is then only an upper bound"] = None
    seed: Annotated[int, "seed of search, weights and data order"] = 0
    seed_from: Annotated[
        str | None, "try first what sensitivities suggest: a file of `raysearch sensitivity -o`, or `sensitivity`"
    ] = None
    max_bops: Annotated[float | None, "never train a configuration over so many BOPs"] = None
    max_relative_bops: Annotated[float | None, "never train one over this share of the 32x32-bit BOPs, 0..1"] = None
    max_size_bytes: Annotated[float | None, "never train one over so many bytes"] = None
    max_checkpoint_bytes: Annotated[
        float | None, "disk for the checkpoints of ended trials; the least accurate of the front go first"
    ] = None
    min_accuracy: Annotated[float | None, "look for points of at least this validation accuracy, 0..1"] = None
    limits: Annotated[list[str], "limits on measures of one's own, as latency<=12.5"] = field(default_factory=list)
    mlflow_uri: Annotated[str | None, "MLflow tracking URI; default: MLFLOW_TRACKING_URI, else the run folder"] = None
    settings: Annotated[
        dict[str, Any], "settings of every trial by address: optimizer/lr, training/batch_size, ..."
    ] = field(default_factory=dict)

    def tree(self) -> dict[str, Any]:
        """The JSON form. Credentials in `mlflow_uri` are left out.

        Raises:
            SweepError: the space is a function; `resolve(sweep).sweep` has its distributions instead.
        """
        from raysearch.mlflow_links import public

        tree = asdict(self) | {"space": written(self.space)}
        if self.mlflow_uri:
            tree["mlflow_uri"] = public(self.mlflow_uri)
        return tree

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Sweep":
        """The inverse of `tree`.

        Raises:
            SweepError: an unknown field, with the nearest one.
        """
        from trainables.plugins import nearest

        names = [f.name for f in fields(cls)]
        unknown = [f"unknown field {name!r} of a sweep{nearest(name, names)}" for name in tree if name not in names]
        if unknown:
            raise SweepError("; ".join(unknown))
        return cls(**{**tree, "space": read(tree["space"])} if "space" in tree else tree)


@dataclass(frozen=True)
class Resolved:
    """What follows from a sweep without training.

    Attributes:
        sweep: the question, with absolute paths, and distributions in place of a function for a space.
        base: JSON tree of a trial's configuration, before a proposal is merged into it.
        config: the same, validated.
        table: layer table of the base configuration's model.
        space: distributions by address.
        measures: of the person's own.
    """

    sweep: Sweep
    base: dict[str, Any]
    config: "TrialConfig"
    table: "LayerTable"
    space: dict[str, "BaseDistribution"]
    measures: tuple["Measure", ...] = ()


def resolve(sweep: Sweep, space: Mapping[str, "BaseDistribution"] | None = None) -> Resolved:
    """Check a sweep and work out what follows from it; nothing is loaded, trained or written.

    Args:
        sweep: the question.
        space: its distributions, where they are known already; None makes them.

    Raises:
        SweepError, ConfigError, PluginError: what is wrong, and what to do.
    """
    from raysearch.networks import CHANGING
    from raysearch.proposals import lookup
    from raysearch.rungs import rung_epochs
    from raysearch.stopping import judged
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
        from raysearch.choice import choose

        choice = choose(resolved)
        if choice.sampler != "frontier":
            raise SweepError(f"sampler 'frontier' cannot propose: {choice.reason}; take auto, tpe or nsga2")
    if sweep.sampler == "grid":
        from raysearch.proposals import cardinality

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


def default_name(sweep: Sweep, stamp: str) -> str:
    """Name of a sweep that was given none: `digits-lenet5-lsq-20261121-101500`."""
    from trainables.plugins import label

    return "-".join([*(label(part) for part in (sweep.data, sweep.model, sweep.method)), stamp])


def default_out(name: str) -> Path:
    """Run folder of a sweep that was given none."""
    return Path("runs") / name
