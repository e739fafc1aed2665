"""Which parameters decide an objective: importances from the Optuna study of a sweep."""

import math
import warnings
from collections.abc import Iterable
from pathlib import Path

FEWEST = 8
"""Completed trials below which a forest would learn noise."""


def importances(study: Path, objectives: Iterable[str]) -> dict[str, dict[str, float]]:
    """Share of each parameter in what a random forest learns about each objective (mean decrease of impurity), 0..1.

    Only parameters that every trial has count. An objective that is the same for all trials is left out, and so is
    everything when there is no study or fewer than eight completed trials.

    Args:
        study: RUN/study.db; it may be in use.
        objectives: in the order of the study.
    """
    if not study.exists():
        return {}
    import optuna
    from optuna.importance import MeanDecreaseImpurityImportanceEvaluator, get_param_importances
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    disk = optuna.load_study(study_name=None, storage=f"sqlite:///{study.resolve()}")
    trials = disk.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < FEWEST:
        return {}
    memory = optuna.create_study(directions=disk.directions)
    memory.add_trials(trials)
    found = {}
    for number, name in enumerate(objectives):
        if len({trial.values[number] for trial in trials}) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            shares = get_param_importances(
                memory,
                evaluator=MeanDecreaseImpurityImportanceEvaluator(seed=0),
                target=lambda trial, number=number: float(trial.values[number]),  # type: ignore[misc]
            )
        if all(math.isfinite(share) for share in shares.values()):
            found[name] = {parameter: float(share) for parameter, share in shares.items()}
    return found
