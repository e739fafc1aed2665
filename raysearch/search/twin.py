"""The twin in memory of a sweep's study: what a sampler sees, and where a proposal costs no writes.

It has a trial for each one of the study on disk, for each of its further operating points, and for each proposal that
was refused. What failed is pruned here, so that a sampler learns to stay away from what diverges, and so is what is
paused, until it goes on and has ended.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from raysearch.search.networks import trimmed
from raysearch.search.proposals import Space
from raysearch.search.samplers import ask
from trainables.config import Tree

CONSTRAINTS = "constraints"
"""Prefix under which Optuna keeps a trial's constraints, as `Trial.set_constraint` does while it runs."""
NONE_MISSED: Mapping[str, float] = {}


class Shared(dict[str, BaseDistribution]):
    """The distributions of all trials: Optuna copies each trial deeply, but nobody changes these."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self


class Twin:
    """See the module. Trials have the numbers that they have on disk.

    Args:
        directions: of the objectives.
        space: distributions by address.
        base: JSON tree of the base configuration.

    Attributes:
        study: the twin itself.
        shared: the distributions, for every trial that has all parameters.
    """

    def __init__(self, directions: Sequence[StudyDirection], space: Space, base: Tree) -> None:
        self.study = optuna.create_study(directions=list(directions))
        self.shared = Shared(space)
        self._base = base
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        """How many trials of the study on disk it has."""
        return len(self._places)

    def asked(self, sampler: BaseSampler) -> optuna.Trial:
        """A proposal of the sampler, to be accepted or refused."""
        self.study.sampler = sampler
        return ask(self.study, self.shared, self._base)

    def fixed(self, values: Mapping[str, Any]) -> optuna.Trial:
        """A proposal of these values, to be accepted."""
        self.study.enqueue_trial(trimmed(self._base, values))
        return ask(self.study, self.shared, self._base)

    def refuse(self, proposal: optuna.Trial) -> None:
        """It is not trained. Samplers ignore failures: a repeated proposal is no worse than its first training was."""
        self.study.tell(proposal, state=TrialState.FAIL)

    def accept(self, proposal: optuna.Trial) -> int:
        """It is trained; returns its number, the next one."""
        number = len(self)
        self._places[number] = proposal.number
        return number

    def frozen(self, proposal: optuna.Trial) -> FrozenTrial:
        """The trial of a proposal, not copied."""
        return self.study.get_trials(deepcopy=False)[proposal.number]

    def take_in(
        self, trial: FrozenTrial, others: Sequence[list[float]], excesses: Sequence[Mapping[str, float]]
    ) -> None:
        """Take in a trial of the study on disk and its further points; its distributions become the shared ones."""
        copy = optuna.trial.create_trial(
            state=_seen(trial.state),
            values=trial.values,
            params=trial.params,
            distributions=trial.distributions,
            system_attrs=trial.system_attrs,
        )
        if trial.distributions == self.shared:
            trial.distributions = copy.distributions = self.shared
        self.study.add_trial(copy)
        self._places[trial.number] = len(self.study.get_trials(deepcopy=False)) - 1
        self._add_points(copy, others, excesses)

    def end(
        self,
        number: int,
        state: TrialState,
        points: Sequence[list[float]],
        excesses: Sequence[Mapping[str, float]],
    ) -> None:
        """A trial ended, as `Ledger.tell` is told; one that was paused has its points beside it."""
        trial = self._trial(number)
        if trial.state.is_finished():
            self._add_points(trial, points, excesses)
            return
        for name, excess in (excesses[0] if excesses else NONE_MISSED).items():
            self.study._storage.set_trial_system_attr(trial._trial_id, f"{CONSTRAINTS}:{name}", excess)
        self.study.tell(trial.number, list(points[0]) if points else None, state=_seen(state))
        self._add_points(self._trial(number), points[1:], excesses[1:])

    def pause(self, number: int) -> None:
        """A trial was stopped, and may go on later."""
        trial = self._trial(number)
        if not trial.state.is_finished():  # else it was paused before
            self.study.tell(trial.number, state=TrialState.PRUNED)

    def _trial(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[self._places[number]]

    def _add_points(
        self, first: FrozenTrial, points: Sequence[list[float]], excesses: Sequence[Mapping[str, float]]
    ) -> None:
        """Further points of a trial, as trials with its parameters."""
        attrs = {key: value for key, value in first.system_attrs.items() if not key.startswith(CONSTRAINTS)}
        for values, missed in zip(points, [*excesses, *[NONE_MISSED] * len(points)], strict=False):
            constraints = {f"{CONSTRAINTS}:{name}": excess for name, excess in missed.items()}
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=first.params,
                    distributions=first.distributions,
                    values=values,
                    system_attrs={**attrs, **constraints},
                )
            )


def _seen(state: TrialState) -> TrialState:
    """How a sampler sees the state of a trial on disk."""
    return TrialState.PRUNED if state == TrialState.FAIL else state
