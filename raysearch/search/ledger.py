"""The Optuna study of a sweep, on disk: every proposal and its true end. Who proposes, and what may be trained.

It is an ordinary Optuna study (`optuna-dashboard sqlite:///RUN/study.db`) with one trial for each training: complete
with its values, pruned, or failed with its reason. Optuna's samplers work on a twin in memory (`twin`), rebuilt from
the disk: a proposal with many parameters then costs one write instead of one for each parameter. The `frontier` needs
no study: it works on the trials that ended, in the order of their ends, and on those that run. Each proposal gets a
sampler of its own, seeded by the sweep's seed and the trial's number, so a proposal depends on the history alone and a
resumed sweep needs no saved sampler.
"""

import random
import time
import warnings
from bisect import bisect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DatabaseError

from raysearch.errors import RecordError
from raysearch.limits import limits_of
from raysearch.records import RunFolder
from raysearch.search.choice import FRONTIER, choose, frontier_of
from raysearch.search.frontier import QUALITIES, Tried
from raysearch.search.networks import changes, configured, trimmed
from raysearch.search.proposals import Cost, beside, cardinality, cheapest, configurations, cost_of, uniform_proposals
from raysearch.search.repair import Repair
from raysearch.search.samplers import copy_qmc_position, make_sampler
from raysearch.search.twin import CONSTRAINTS, NONE_MISSED, Twin
from raysearch.seeds import Seeds
from raysearch.sweep import GRID, Resolved
from trainables.config import merged
from trainables.errors import ConfigError
from trainables.storage import patiently

STUDY = "sweep"
ATTEMPTS = 20
"""Proposals of the sampler that may be refused in a row before random ones are tried."""
RANDOM_ATTEMPTS = 2000
OTHER_POINTS = "other_points"
"""Attribute of a trial on disk: the values of its operating points beyond the first."""
OTHER_EXCESSES = "other_excesses"
"""Attribute of a trial on disk: by how much those points miss the limits."""


@dataclass(frozen=True)
class Proposal:
    """A configuration to train, accepted and on disk.

    Attributes:
        number: of the Optuna trial, and of the trial everywhere else.
        params: values by address.
        source: who proposed it: that of a seed (`raysearch.seeds`), `uniform`, the sampler's name, `random`.
        tree: JSON tree of the trial's configuration.
        repaired: whether it was over a limit as proposed, and is the nearest configuration within it.
    """

    number: int
    params: dict[str, Any]
    source: str
    cost: Cost
    tree: dict[str, Any]
    repaired: bool = False


class Ledger:
    """Proposes configurations and keeps the study.

    Args:
        folder: the run folder; an existing study there is continued.
        resolved: the sweep.

    Attributes:
        limits: of the sweep.
        learned: those of them that only training tells.
    """

    def __init__(self, folder: RunFolder, resolved: Resolved) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.resolved, self.sweep, self.space = resolved, resolved.sweep, resolved.space
        directions = [
            StudyDirection.MAXIMIZE if direction == "max" else StudyDirection.MINIMIZE
            for direction in self.sweep.objectives.values()
        ]
        self._file = folder.study.resolve()
        try:
            self._disk = optuna.create_study(
                storage=f"sqlite:///{self._file}",
                study_name=STUDY,
                directions=directions,
                load_if_exists=True,
            )
        except DatabaseError as error:
            raise RecordError(
                f"cannot read {folder.study}: {error.orig}; bring back the study of this sweep"
            ) from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._disk.set_metric_names(list(self.sweep.objectives))
        self._twin = Twin(directions, self.space, resolved.base)
        self.choice = choose(resolved)
        seeds = Seeds.read(folder.seeds)
        self._frontier = frontier_of(resolved, seeds.sensitivities) if self.choice.sampler == FRONTIER else None
        self._conditional = changes(self.space)
        # The frontier needs no more than the diagonal: each further uniform configuration is worse than what it knows.
        # Nor do spaces that change the network: the uniform configurations are those of one network.
        diagonal = self._frontier or self._conditional
        uniform = uniform_proposals(self.space, resolved.base, 0 if diagonal else self.sweep.trials)
        self.limits = limits_of(self.sweep)
        least = configured(resolved.base, cheapest(self.space))
        before = cost_of(least, resolved.measures).values() if self.limits else {}
        self.learned = tuple(limit for limit in self.limits if before.get(limit.name) is None)
        self._repair = Repair(self.space, resolved.base, resolved.measures, seeds.sensitivities)
        self._first = [*seeds.first, *(("uniform", values) for values in uniform)]
        self._ended: list[Tried] = []
        self._ends: list[tuple[float, int]] = []
        self._courses: dict[int, dict[int, float]] = {}
        self._running: dict[int, Mapping[str, Any]] = {}
        self._size = cardinality(self.space)
        self._seen: dict[str, int] = {}
        self.refused = 0
        self.interrupted: list[Proposal] = []
        self._grid = self._walk() if self.choice.sampler == "grid" else iter(())
        trials = self._disk.get_trials(deepcopy=False)
        for trial in trials:
            self._remember(trial)
            if trial.state == TrialState.RUNNING:
                self.interrupted.append(self._proposal(trial))
        for trial in sorted((t for t in trials if t.datetime_complete), key=lambda t: (t.datetime_complete, t.number)):
            assert trial.datetime_complete
            ended_at = trial.datetime_complete.timestamp()
            self._learn_end(trial.number, ended_at, trial.params, trial.state, trial.values)
        copy_qmc_position(self._disk, self._twin.study)

    @property
    def started(self) -> int:
        """How many trials have been started so far."""
        return len(self._twin)

    def propose(self) -> Proposal | None:
        """The next configuration to train, written to the study as running; None when there is none left.

        Interrupted trials of an earlier run come first, under their old numbers. A configuration over a limit of the
        sweep, equal to an earlier one, or invalid is refused here and never trained.
        """
        if self.interrupted:
            return self.interrupted.pop(0)
        if self.started >= self.sweep.trials or len(self._seen) >= self._size:
            return None
        while self._first:
            source, values = self._first.pop(0)
            cost = self._acceptable(values)
            if cost is not None:
                return self._accept(self._twin.fixed(values), source, cost)
        if self.choice.sampler == "grid":
            return self._drawn(self._grid, "grid")
        return self._at_the_frontier() if self._frontier else self._sampled()

    def tell(
        self,
        number: int,
        state: TrialState,
        points: Sequence[list[float]] = (),
        reason: str = "",
        excesses: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Tell both studies how a trial ended; telling twice changes nothing.

        Args:
            number: of the trial.
            state: COMPLETE, PRUNED, or FAIL.
            points: of a complete trial, the values of each of its operating points in the order of the objectives. The
                study on disk holds the first as the trial's values; the sampler learns all of them.
            reason: why it was pruned or failed.
            excesses: of each point, by how much it misses each limit that only training tells; above 0 where it does.
                Optuna's samplers take them as constraints.
        """
        trial_id = self._trial_id(number)
        if self._storage.get_trial(trial_id).state.is_finished():
            return
        if reason:
            self._write(lambda: self._storage.set_trial_user_attr(trial_id, "reason", reason[:2000]))
        if state != TrialState.COMPLETE:
            points = ()
        values = list(points[0]) if points else None
        if points[1:]:
            self._write(lambda: self._storage.set_trial_user_attr(trial_id, OTHER_POINTS, list(points[1:])))
            missed = [dict(each) for each in excesses[1:]]
            self._write(lambda: self._storage.set_trial_user_attr(trial_id, OTHER_EXCESSES, missed))
        for name, excess in (excesses[0] if excesses else NONE_MISSED).items():
            self._write(partial(self._storage.set_trial_system_attr, trial_id, f"{CONSTRAINTS}:{name}", excess))
        self._write(lambda: self._disk.tell(number, values, state=state))
        if number in self._running:
            self._learn_end(number, time.time(), self._running.pop(number), state, values)
        self._twin.end(number, state, points, excesses)

    def pause(self, number: int, at: float) -> None:
        """A trial was stopped, and may go on later; until then it is pruned to the sampler, and running on disk.

        Args:
            number: of the trial.
            at: when, in Unix time.
        """
        self._learn_end(number, at, self._running.pop(number), TrialState.PRUNED, None)
        self._twin.pause(number)

    def go_on(self, number: int) -> None:
        """A paused trial runs again."""
        place = next(i for i, (_, other) in enumerate(self._ends) if other == number)
        del self._ends[place]
        self._running[number] = self._ended.pop(place).values

    def learn_course(self, number: int, row: Mapping[str, Any]) -> None:
        """What a trial had reached at a rung, as its epoch's line says."""
        quality = next((row.get(name) for name in self.sweep.objectives if name in QUALITIES), None)
        if "rung" in row and quality is not None:
            self._courses.setdefault(number, {})[row["epoch"]] = quality

    def _learn_end(
        self, number: int, at: float, params: Mapping[str, Any], state: TrialState, values: Sequence[float] | None
    ) -> None:
        """What the frontier knows of a trial that has ended or is paused, in the order in which that happened."""
        place = next((i for i, name in enumerate(self.sweep.objectives) if name in QUALITIES), None)
        quality = values[place] if place is not None and values and state == TrialState.COMPLETE else None
        course = self._courses.setdefault(number, {})
        index = bisect(self._ends, (at, number))
        self._ends.insert(index, (at, number))
        failed = state == TrialState.FAIL
        self._ended.insert(index, Tried(values=params, quality=quality, failed=failed, course=course))

    def ended_beside(self, known: Container[int]) -> Iterator[tuple[Proposal, TrialState, str]]:
        """Trials with an end and another number: their proposals, how they ended, and why if not complete."""
        for trial in self._disk.get_trials(deepcopy=False):
            if trial.state.is_finished() and trial.number not in known:
                yield self._proposal(trial), trial.state, trial.user_attrs.get("reason", "")

    def running(self) -> list[int]:
        """Numbers of trials without an end."""
        return [t.number for t in self._disk.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]

    def _write(self, write: Callable[[], Any]) -> None:
        patiently(write, self._file)

    @property
    def _storage(self) -> Any:
        return self._disk._storage

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._disk._study_id, number)

    def _at_the_frontier(self) -> Proposal | None:
        assert self._frontier
        running = list(self._running.values())
        refused: list[dict[str, Any]] = []
        for _ in range(ATTEMPTS):
            values = self._frontier.propose(self._ended, running, self.sweep.seed, refused=refused)
            if values is None:
                break
            cost = self._acceptable(values)
            if cost is not None:
                return self._accept(self._twin.fixed(values), FRONTIER, cost)
            refused.append(values)
        return self._drawn(self._near(refused[-1] if refused else {}), "random")

    def _sampled(self) -> Proposal | None:
        number = self.started
        finished = self.started - len(self._running)
        seed, startup = self.sweep.seed * 100_003 + number, min(10, max(2, finished))
        sampler = make_sampler(self.choice.sampler, seed, startup, conditional=self._conditional)
        wanted: dict[str, Any] = {}
        for _ in range(ATTEMPTS):
            trial = self._twin.asked(sampler)
            cost = self._acceptable(trial.params)
            if cost is not None:
                return self._accept(trial, self.choice.sampler, cost)
            repaired = self._repaired(trial.params)
            if repaired is not None:
                self._twin.refuse(trial)
                return self._accept(self._twin.fixed(repaired[0]), self.choice.sampler, repaired[1], repaired=True)
            self._twin.refuse(trial)
            if trial.params == wanted:  # as a sampler without chance does: gp, of what has failed
                break
            wanted = trial.params
        return self._drawn(self._near(wanted), "random")

    def _near(self, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Random configurations, first those beside what was wanted."""
        generator = random.Random(self.sweep.seed * 100_003 + self.started)
        near = beside(self.space, wanted, generator) if wanted else ()
        return chain(near, configurations(self.space, generator, limit=RANDOM_ATTEMPTS))

    def _walk(self) -> Iterator[dict[str, Any]]:
        """The whole grid in an order that belongs to the seed, without what a trial has; begun anew after a resume."""
        had = {tuple(trial.params.get(name) for name in self.space) for trial in self._disk.get_trials(deepcopy=False)}
        every = configurations(self.space, random.Random(self.sweep.seed), limit=GRID)
        return (values for values in every if tuple(values.values()) not in had)

    def _drawn(self, wanted: Iterator[dict[str, Any]], source: str) -> Proposal | None:
        """The first of these configurations that can be trained, or be repaired."""
        for values in wanted:
            cost = self._acceptable(values)
            if cost is not None:
                return self._accept(self._twin.fixed(values), source, cost)
            repaired = self._repaired(values)
            if repaired is not None:
                return self._accept(self._twin.fixed(repaired[0]), source, repaired[1], repaired=True)
        return None

    def _cost(self, values: Mapping[str, Any]) -> Cost:
        """Relative to the base configuration's network, so that architectures compare."""
        return cost_of(configured(self.resolved.base, values), self.resolved.measures, self.resolved.table.macs)

    def _repaired(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], Cost] | None:
        """The nearest configuration within the limits and its cost, for one that breaks them; None if it is not new."""
        if not self.limits:
            return None
        try:
            values = trimmed(self.resolved.base, values)
            cost = self._cost(values)
        except ConfigError:
            return None
        better = self._repair(values, cost, self.limits) if cost.over(self.limits) else None
        found = None if better is None else self._acceptable(better)
        return None if better is None or found is None else (better, found)

    def _acceptable(self, values: Mapping[str, Any]) -> Cost | None:
        try:
            cost = self._cost(values)
        except ConfigError:
            self.refused += 1
            return None
        if cost.digest in self._seen or cost.over(self.limits):
            self.refused += 1
            return None
        return cost

    def _accept(self, trial: optuna.Trial, source: str, cost: Cost, *, repaired: bool = False) -> Proposal:
        twin = self._twin.frozen(trial)
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=twin.params,
            distributions=twin.distributions,
            user_attrs={"source": source, "repaired": repaired, **asdict(cost)},
            system_attrs=twin.system_attrs,
        )
        if len(template.params) == len(self._twin.shared):
            template.distributions = self._twin.shared
        self._write(lambda: self._storage.create_new_trial(self._disk._study_id, template_trial=template))
        self._write(lambda: copy_qmc_position(self._twin.study, self._disk))
        number = self._twin.accept(trial)
        self._seen[cost.digest] = number
        self._running[number] = dict(twin.params)
        tree = merged(self.resolved.base, twin.params)
        return Proposal(number, dict(twin.params), source, cost, tree, repaired)

    def _remember(self, trial: FrozenTrial) -> None:
        """Take a trial of the study on disk into the twin."""
        self._twin.take_in(trial, *(trial.user_attrs.get(key, ()) for key in (OTHER_POINTS, OTHER_EXCESSES)))
        if trial.state == TrialState.RUNNING:
            self._running[trial.number] = trial.params
        self._seen[trial.user_attrs["digest"]] = trial.number

    def _proposal(self, trial: FrozenTrial) -> Proposal:
        attrs = dict(trial.user_attrs)
        cost = Cost(**{part.name: attrs[part.name] for part in fields(Cost) if part.name in attrs})
        tree = merged(self.resolved.base, trial.params)
        return Proposal(trial.number, dict(trial.params), attrs["source"], cost, tree, attrs.get("repaired", False))
