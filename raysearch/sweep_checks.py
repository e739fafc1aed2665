"""What a sweep may say: types, ranges, names and objectives, checked before anything else looks at it.

A sweep may come from a JSON file that a person wrote, so nothing about it is taken for granted. All faults are told at
once, each with what was given and what is allowed.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from raysearch.errors import SweepError
from raysearch.limits import FLAGS

if TYPE_CHECKING:
    from raysearch.sweep import Sweep

FIELDS = {
    "training/epochs": "epochs",
    "seed": "seed",
    "method/name": "method",
    "model/name": "model",
    "data/name": "data",
}
"""Addresses that a sweep has a field for; there is no second way to say the same thing."""
TAKEN = (
    *("schema", "sweep", "versions", "git", "trial", "point", "points", "status", "reason", "accuracy", "loss"),
    *("bops", "relative_bops", "size_bytes", "float_size_bytes", "macs", "bits", "epoch", "epochs", "seconds", "seed"),
    *("digest", "source", "method", "model", "data", "params", "config", "history", "checkpoint", "run", "started_at"),
    *("time", "finished_at", "timing", "measures", "within_limits", "repaired", "inherited", "train_loss"),
    *("test_accuracy", "trial_seconds", "rung", "other_points"),
)
"""Names of a record's own fields, which no measure may take."""
STOPPERS = ("auto", "none", "mo_asha", "front")
SAMPLERS = ("auto", "frontier", "tpe", "nsga2", "nsga3", "gp", "random", "qmc", "grid")


def check_types(sweep: "Sweep") -> None:
    """Refuse fields of another type than theirs.

    Raises:
        SweepError: all of them at once.
    """
    text, no_text = ("method", "model", "data", "sampler", "stopper"), ("data_root", "mlflow_uri", "seed_from")
    given = {f.name: getattr(sweep, f.name) for f in fields(sweep)}
    faults = [f"{name} = {given[name]!r}: text" for name in text if not isinstance(given[name], str)]
    faults += [f"{name} = {given[name]!r}: text" for name in no_text if not isinstance(given[name], str | None)]
    for name in ("download", "train"):
        if not isinstance(given[name], bool):
            faults.append(f"{name} = {given[name]!r}: true or false")
    if not (isinstance(sweep.space, str | Mapping) or callable(sweep.space)):
        faults.append(f"space = {sweep.space!r}: a name, a function, or distributions by address")
    for name in ("objectives", "measures", "reference", "settings"):
        if not isinstance(given[name], dict) or not all(isinstance(key, str) for key in given[name]):
            faults.append(f"{name} = {given[name]!r}: a dictionary by name")
        elif name == "measures" and not all(isinstance(source, str) for source in given[name].values()):
            faults.append(f"{name} = {given[name]!r}: text by name")
    if not isinstance(sweep.limits, list) or not all(isinstance(text, str) for text in sweep.limits):
        faults.append(f"limits = {sweep.limits!r}: a list of texts such as latency<=12.5")
    if faults:
        raise SweepError("; ".join(faults))


def check_values(sweep: "Sweep") -> None:
    """Refuse numbers, names and objectives that cannot be.

    Raises:
        SweepError: all of them at once.
    """
    from analysis.rows import check_objectives
    from trainables.plugins import nearest

    faults = _setting_faults(sweep.settings)
    for name, low, high in (
        ("trials", 1, 10**6),
        ("epochs", 1, 10**5),
        ("workers", 1, 4096),
        ("concurrent", 1, 10**5),
        ("cpus_per_worker", 1, 4096),
        ("grace_epochs", 1, 10**5),
        ("max_paused", 0, 10**5),
        ("epoch_budget", 1, 10**9),
        ("seed", 0, 2**31 - 1),
    ):
        value = getattr(sweep, name)
        if value is None and name in ("concurrent", "epoch_budget"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            faults.append(f"{name} = {value!r}: an integer from {low} to {high}")
    for name, top, words in (
        ("max_bops", sys.float_info.max, "a number >= 0"),
        ("max_relative_bops", 1, "a share of the 32x32-bit BOPs, 0..1"),
        ("max_size_bytes", sys.float_info.max, "a number >= 0"),
        ("max_checkpoint_bytes", sys.float_info.max, "a number >= 0"),
        ("min_accuracy", 1, "an accuracy, 0..1"),
        ("gpus_per_worker", sys.float_info.max, "a number >= 0"),
    ):
        value = getattr(sweep, name)
        if isinstance(value, bool) or not (isinstance(value, int | float | None) and 0 <= (value or 0) <= top):
            faults.append(f"{name} = {value!r}: {words}")
    limit = sweep.hang_timeout
    if isinstance(limit, bool) or not (isinstance(limit, int | float) and 15 <= limit <= sys.float_info.max):
        faults.append(f"hang_timeout = {limit!r}: a number of seconds >= 15, three signs of life")
    if sweep.sampler not in SAMPLERS:
        hint = nearest(sweep.sampler, list(SAMPLERS)) or f"; one of {', '.join(SAMPLERS)}"
        faults.append(f"unknown sampler {sweep.sampler!r}{hint}")
    if sweep.stopper not in STOPPERS:
        hint = nearest(sweep.stopper, list(STOPPERS)) or f"; one of {', '.join(STOPPERS)}"
        faults.append(f"unknown stopper {sweep.stopper!r}{hint}")
    factor = sweep.reduction_factor
    if isinstance(factor, bool) or not (isinstance(factor, int | float) and 1 < factor <= 1000):
        faults.append(f"reduction_factor = {factor!r}: a number over 1, up to 1000")
    if isinstance(sweep.epoch_budget, int) and isinstance(sweep.epochs, int) and sweep.epoch_budget < sweep.epochs:
        faults.append(
            f"epoch_budget = {sweep.epoch_budget}: one trial takes {sweep.epochs} epochs; give at least those"
        )
    faults += [f"settings: {a} is the field {name!r} of the sweep" for a, name in FIELDS.items() if a in sweep.settings]
    try:
        check_objectives(sweep.objectives, sweep.measures)
    except ValueError as error:
        faults.append(str(error))
    faults += _own_faults(sweep)
    if faults:
        raise SweepError("; ".join(faults))


def _own_faults(sweep: "Sweep") -> list[str]:
    """What is wrong with measures, limits on them, and the reference."""
    from analysis.pick import parsed
    from trainables.plugins import nearest

    faults = [f"measure {n!r}: a name of letters, digits and _, none of a record's own" for n in sweep.measures]
    faults = [f for f, n in zip(faults, sweep.measures, strict=True) if not n.isidentifier() or n in TAKEN]
    for text in sweep.limits:
        try:
            name = parsed(text).column
        except ValueError as error:
            faults.append(f"limits = {sweep.limits!r}: {error}")
            continue
        if name not in sweep.measures:
            other = {"accuracy": "; use min_accuracy"} | {flag[4:]: f"; use {flag}" for flag in FLAGS.values()}
            hint = other.get(name) or nearest(name, list(sweep.measures)) or "; name it among the measures"
            faults.append(f"limit {text!r}: {name} is no measure of this sweep{hint}")
    for name, value in sweep.reference.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if name not in sweep.objectives or not number:
            faults.append(f"reference {name} = {value!r}: a number for one of {', '.join(sweep.objectives)}")
    return faults


def _setting_faults(settings: Mapping[str, Any]) -> list[str]:
    from trainables.config import SECTIONS
    from trainables.plugin_settings import PLUGINS

    flags = {"training/epochs": "--epochs", "seed": "--seed"} | {f"{part}/name": f"--{part}" for part in PLUGINS}
    faults = [f"--set {address}: use {flags[address]}" for address in settings if address in flags]
    groups = settings.keys() & {*PLUGINS, *SECTIONS, "bits"}
    faults += [f"--set {group}: a group of settings; name one of them, as in {group}/..." for group in sorted(groups)]
    try:
        json.dumps(settings)
    except (TypeError, ValueError) as error:
        faults.append(f"settings: {error}; give numbers, text, true, false or null")
    return faults
