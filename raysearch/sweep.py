"""A sweep: what a person asks for. Frozen, JSON in and out, checked completely before anything expensive starts.

`Sweep` holds the question; `Resolved` what follows from it without training, which `raysearch.resolve` works out.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from raysearch.asked_space import Asked, read, written
from raysearch.errors import SweepError

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
        from raysearch.mirror.links import public

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


def default_name(sweep: Sweep, stamp: str) -> str:
    """Name of a sweep that was given none: `digits-lenet5-lsq-20261121-101500`."""
    from trainables.plugins import label

    return "-".join([*(label(part) for part in (sweep.data, sweep.model, sweep.method)), stamp])


def default_out(name: str) -> Path:
    """Run folder of a sweep that was given none."""
    return Path("runs") / name
