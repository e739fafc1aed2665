"""What is asked of a supernet: the question of a search on shared weights, checked against what was trained.

    Search(run=...) -> trained_network: that of a run -> checked: choices, space and sweep of its mixtures

Nothing is evaluated or written here; what cannot be is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysearch.errors import RecordError, SweepError
from raysearch.result import Result
from raysearch.sweep import DEFAULT_OBJECTIVES, Resolved, Sweep
from raysearch.sweep_checks import check_values

if TYPE_CHECKING:
    from raysearch.search.proposals import Cost
    from trainables.fit import Session
    from trainables.method import Choices


@dataclass(frozen=True, kw_only=True)
class Search:
    """The question of a search on shared weights.

    Attributes:
        run: folder of the run that trained the network.
        trial: its number; None where there is one alone.
        evaluations: how many mixtures.
        objectives: name to direction.
        sampler: `auto` (the frontier), or as in a sweep.
        seed: of the search.
        widths: those to choose from; None takes all that were trained.
        images: validation images, the first so many; None takes all.
        calibration: training images that batch norm is recalibrated on for each mixture; 0 leaves it.
        max_bops, max_relative_bops, max_size_bytes: never evaluate a mixture over these.
        workers: at the same time; None takes one for each GPU, or each CPU core.
        mlflow_uri: as in a sweep.
    """

    run: str
    trial: int | None = None
    evaluations: int = 5000
    objectives: dict[str, str] = field(default_factory=DEFAULT_OBJECTIVES.copy)
    sampler: str = "auto"
    seed: int = 0
    widths: tuple[int, ...] | None = None
    images: int | None = None
    calibration: int = 0
    max_bops: float | None = None
    max_relative_bops: float | None = None
    max_size_bytes: float | None = None
    workers: int | None = None
    mlflow_uri: str | None = None


@dataclass(frozen=True)
class Opened:
    """A supernet, and what is asked of it."""

    session: "Session"
    choices: "Mapping[str, Choices]"
    resolved: Resolved
    calibration: int
    images: int | None

    def cost(self, values: Mapping[str, Any]) -> "Cost":
        """What a mixture costs."""
        from raysearch.search.proposals import Cost
        from raysearch.shared_weights.mixtures import mixture
        from trainables.config import digest
        from trainables.supernet import bits_of

        widths = mixture(values, self.choices)
        bits = bits_of(widths)
        report = self.session.report(self.session.method.mixture(self.session.model, bits), 0.0, 0.0)
        name = digest(self.session.config, bits) + (f"-{self.calibration}" if self.calibration else "")
        return Cost(name, report.bops, report.relative_bops, report.size_bytes, widths)


def trained_network(question: Search) -> tuple["Session", dict[str, Any]]:
    """The trained network that a search is about, and the sweep that trained it."""
    from trainables import checkpoint
    from trainables.config import parse
    from trainables.fit import Session

    result = Result(question.run)
    if "search" in result.description:
        raise SweepError(f"{question.run} is a search already: give the run that trained its network")
    trials = {row["trial"]: row for row in result.records() if row["status"] == "complete"}
    kept = {n: row for n, row in trials.items() if (result.folder.trial(n) / checkpoint.FILE).exists()}
    if question.trial is None and len(kept) == 1:
        number = next(iter(kept))
    elif question.trial in kept:
        number = question.trial
    else:
        if not kept:
            raise RecordError(
                f"{question.run} has no trial with a checkpoint: give a run of `raysearch supernet train`"
            )
        asked = "several trials" if question.trial is None else f"no trial {question.trial} with a checkpoint"
        raise RecordError(f"{question.run} has {asked}: name one of {', '.join(map(str, sorted(kept)))}")
    session = Session(parse(kept[number]["config"]), data_root=root_of(result.description["sweep"]))
    session.load(result.folder.trial(number) / checkpoint.FILE)
    return session, {"sweep": result.description["sweep"], "name": result.name, "trial": number}


def root_of(sweep: Mapping[str, Any]) -> Path | None:
    """Where the data of a sweep lies, which is given as JSON."""
    return None if sweep["data_root"] is None else Path(sweep["data_root"])


def checked(session: "Session", question: Search, trained: Mapping[str, Any]) -> Opened:
    """Check a question against a network, and work out what follows.

    Raises:
        SweepError, ConfigError: what cannot be.
    """
    from raysearch.search.proposals import cheapest
    from raysearch.shared_weights.mixtures import mixture_space
    from trainables.supernet import check_images, check_recalibration, choices_of

    choices = narrowed(choices_of(session), question.widths)
    check_recalibration(session.table.norm_channels, question.calibration)
    check_images(session.data.validation, question.images)
    space = mixture_space(choices)
    if not space:
        raise SweepError(f"widths = {question.widths}: nothing is left to choose; give two or more")
    limits = {name: getattr(question, name) for name in ("max_bops", "max_relative_bops", "max_size_bytes")}
    sweep = replace(
        Sweep.from_tree(trained["sweep"]),
        space=space,
        objectives=question.objectives,
        trials=question.evaluations,
        sampler=question.sampler,
        seed=question.seed,
        concurrent=question.workers,
        workers=1,
        cpus_per_worker=1,
        mlflow_uri=question.mlflow_uri,
        **limits,
    )
    check_values(sweep)
    if sweep.sampler == "grid":
        raise SweepError("sampler 'grid' is for sweeps that train; take random or qmc for mixtures")
    resolved = Resolved(sweep, session.config.tree(), session.config, session.table, space)
    opened = Opened(session, choices, resolved, question.calibration, question.images)
    _check_limits(opened.cost(cheapest(space)), sweep)
    return opened


def narrowed(choices: "Mapping[str, Choices]", widths: Sequence[int] | None) -> "Mapping[str, Choices]":
    """Only these widths where a layer has several; a layer that has one keeps it.

    Raises:
        SweepError: widths that the network was not trained at, or a layer that none of them is left for.
    """
    if widths is None:
        return choices
    trained = sorted({w for each in choices.values() for w in (*each.weight, *each.activation)}, reverse=True)
    unknown = [width for width in widths if width not in trained]
    if unknown:
        raise SweepError(
            f"widths {', '.join(map(str, unknown))}: the network was not trained at them; "
            f"it has {', '.join(map(str, trained))}"
        )
    found = {}
    for layer, each in choices.items():
        kept = {}
        for role in ("weight", "activation"):
            have = getattr(each, role)
            kept[role] = tuple(w for w in have if w in widths) if len(have) > 1 else have
            if not kept[role]:
                raise SweepError(
                    f"layer {layer} has no legal {role} width: it was trained at {', '.join(map(str, have))}, "
                    f"and --widths has none of them"
                )
        found[layer] = replace(each, **kept)
    return found


def _check_limits(least: "Cost", sweep: Sweep) -> None:
    for name in ("bops", "relative_bops", "size_bytes"):
        limit, have = getattr(sweep, f"max_{name}"), getattr(least, name)
        if limit is not None and have > limit:
            raise SweepError(
                f"max_{name} = {limit:g} leaves nothing to evaluate: the cheapest mixture has {have:g}, "
                f"{have - limit:g} more"
            )
