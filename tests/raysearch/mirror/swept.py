"""Run folders of a sweep of six trials, and what MLflow knows of it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import ViewType

NAME = "digits-lenet5-lsq-20261121-101500"
START_S = 1_795_256_103
SWEEP = {
    "name": NAME,
    "method": "lsq",
    "model": "lenet5",
    "data": "digits",
    "space": "uniform",
    "objectives": {"accuracy": "max", "bops": "min"},
    "trials": 6,
    "seed": 0,
}


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(START_S + seconds, UTC).isoformat()


def epoch(trial: int, number: int, accuracy: float = 0.5) -> dict[str, Any]:
    line = {"epoch": number, "train_loss": 1 / number, "accuracy": accuracy, "loss": 0.5 / number, "bops": 100}
    return {"trial": trial, **line, "seconds": 1.5, "time": START_S + 10 * trial + 2.0 * number}


def record(trial: int, accuracy: float | None, bops: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "sweep": NAME,
        "trial": trial,
        "point": "final",
        "status": "complete",
        "reason": None,
        "accuracy": accuracy,
        "loss": 0.25,
        "bops": bops,
        "relative_bops": bops / 1000,
        "size_bytes": 64 * bops,
        "macs": 10,
        "bits": {"conv1": [8, 8], "fc": [4, 3]},
        "epoch": 2,
        "epochs": 2,
        "seconds": 4.0,
        "seed": 0,
        "digest": f"digest{trial}",
        "source": "tpe",
        "method": "lsq",
        "model": "lenet5",
        "data": "digits",
        "params": {"bits/fc/weight": 4, "optimizer/lr": 0.1},
        "config": {},
        "history": [{"epoch": 1, "accuracy": 0.5}, {"epoch": 2, "accuracy": accuracy}],
        "checkpoint": f"trials/{trial:05d}",
        "started_at": moment(10 * trial),
        "finished_at": moment(10 * trial + 4),
        "versions": {},
        "git": {"commit": "c0ffee", "dirty": False},
    } | changes


RECORDS = [
    record(0, 0.80, 100),
    record(1, 0.90, 200),
    record(2, None, 150, status="failed", reason="accuracy is nan after epoch 2"),
    record(3, 0.85, 300),
    record(4, 0.60, 120, status="pruned", reason="rung 1"),
    record(5, 0.95, 400),
]


def append(run: Path, name: str, *lines: dict[str, Any]) -> None:
    with (run / name).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def finished(run: Path) -> Path:
    append(run, "epochs.jsonl", *(epoch(line["trial"], number) for line in RECORDS for number in (1, 2)))
    append(run, "records.jsonl", *RECORDS)
    return run


def client_of(run: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run / 'mlflow.db'}")


def runs_of(client: MlflowClient, view: int = ViewType.ACTIVE_ONLY) -> dict[str, Any]:
    """Every run of the sweep by its name, which must be unique."""
    experiment = client.get_experiment_by_name(NAME)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "", view, 1000)
    names = [run.info.run_name for run in found]
    assert len(names) == len(set(names))
    return {run.info.run_name: run for run in found}


def on_front(client: MlflowClient) -> set[str]:
    return {name for name, run in runs_of(client).items() if run.data.tags.get("pareto") == "true"}


def everything(client: MlflowClient) -> dict[str, Any]:
    """All that MLflow knows of the sweep, except for the ids of its runs."""
    return {
        name: (
            (run.info.status, run.info.start_time, run.info.end_time),
            run.data.params,
            run.data.tags,
            {key: history(client, run, key) for key in run.data.metrics},
            [file.path for file in client.list_artifacts(run.info.run_id)],
        )
        for name, run in sorted(runs_of(client).items())
    }


def history(client: MlflowClient, run: Any, key: str) -> list[tuple[int, float, int]]:
    found = client.get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value, metric.timestamp) for metric in found)
