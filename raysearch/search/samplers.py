"""Optuna's samplers: one by name, a trial with the parameters that it has, and what must outlive a sampler."""

import warnings
from contextlib import suppress
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler

from raysearch.search.networks import BITS, changes, existing
from raysearch.search.proposals import Space
from trainables.config import Tree
from trainables.errors import ConfigError

QMC_POSITION = "qmc:"
"""Prefix under which Optuna's quasi-random sampler keeps its place in the sequence, as an attribute of the study."""


def make_sampler(name: str, seed: int, startup: int, *, conditional: bool = False) -> BaseSampler:
    """An Optuna sampler by name.

    Args:
        name: one of `raysearch.sweep_checks.SAMPLERS` that is Optuna's.
        seed: of its draws.
        startup: how many trials there are before a model is fitted.
        conditional: whether trials lack parameters; those that always come together are then modelled together.
    """
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "tpe":
            return samplers.TPESampler(
                seed=seed, n_startup_trials=startup, multivariate=True, group=conditional, constant_liar=True
            )
        if name == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(4, startup))
        if name == "nsga3":
            return samplers.NSGAIIISampler(seed=seed, population_size=max(4, startup))
        if name == "gp":
            return samplers.GPSampler(seed=seed, n_startup_trials=startup)
        if name == "qmc":
            return samplers.QMCSampler(seed=seed, warn_independent_sampling=False)
        return samplers.RandomSampler(seed=seed)


def _suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """A parameter's value in this trial."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    if isinstance(distribution, IntDistribution):
        ends = distribution.low, distribution.high
        return trial.suggest_int(name, *ends, step=distribution.step, log=distribution.log)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def ask(study: optuna.Study, space: Space, base: Tree) -> optuna.Trial:
    """A new trial with values for the parameters that it has: what makes the network is asked before its bits.

    Args:
        study: whose sampler proposes.
        space: distributions by address.
        base: JSON tree of the base configuration.
    """
    if not changes(space):
        return study.ask(dict(space))
    trial = study.ask({name: d for name, d in space.items() if not name.startswith(BITS)})
    with suppress(ConfigError):  # no such network: it has no cost either, and is refused for that
        for name in existing(space, base, trial.params):
            if name.startswith(BITS):
                _suggest(trial, name, space[name])
    return trial


def copy_qmc_position(source: optuna.Study, target: optuna.Study) -> None:
    """Let the quasi-random sequence of one study go on in the other; the other samplers have nothing of the kind."""
    for key, value in source._storage.get_study_system_attrs(source._study_id).items():
        if key.startswith(QMC_POSITION):
            target._storage.set_study_system_attr(target._study_id, key, value)
