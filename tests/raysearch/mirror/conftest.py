"""Run folders before and after their mirror, with a store that is made once."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raysearch.tracking import mirror_once
from tests.raysearch.mirror.swept import SWEEP, finished


@pytest.fixture(autouse=True)
def _no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The folder of a sweep that has just begun; it has no store yet."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "sweep.json").write_text(json.dumps(SWEEP))
    return run


@pytest.fixture
def run(fresh: Path, empty_store: Path) -> Path:
    """The folder of a sweep that is done, with a store that knows nothing of it."""
    shutil.copy(empty_store, fresh)
    return finished(fresh)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """The folder of a sweep that is done and in its store; to be read only."""
    run = tmp_path_factory.mktemp("mirrored")
    (run / "sweep.json").write_text(json.dumps(SWEEP))
    shutil.copy(empty_store, run)
    mirror_once(finished(run), f"sqlite:///{run / 'mlflow.db'}")
    return run
