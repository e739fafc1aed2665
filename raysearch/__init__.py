"""raysearch finds the best quantized networks: QAT on Ray, search with Optuna, the Pareto front in MLflow.

    import raysearch

    sweep = raysearch.Sweep(method="lsq", model="lenet5", data="digits", trials=24)
    result = raysearch.run(sweep, out="runs/first")
    front = result.front()
    front.pick(max_size_bytes=60_000)

Heavy libraries are imported where they are used, so that `raysearch --help` is instant.

Where to find what:

    the question      sweep, sweep_checks, asked_space, limits, resolve, seeds, knowledge, options, cli, commands/
    what to try       search/
    the run           driver, book, records, keep, facts, errors, single, result
    Ray               cluster/
    sensitivity       sensitivities
    shared weights    shared_weights/
    MLflow            tracking, mirror/, registered_model
    for people        watching, progress, overview, reporting, importance, repeat
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Result", "Sweep", "load", "resume", "run", "seeds_for", "sensitivity", "train"]

_HOMES = {
    "Sweep": "raysearch.sweep",
    "Result": "raysearch.result",
    "load": "raysearch.result",
    "run": "raysearch.driver",
    "resume": "raysearch.driver",
    "seeds_for": "raysearch.knowledge",
    "sensitivity": "raysearch.sensitivities",
    "train": "raysearch.single",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raysearch' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
