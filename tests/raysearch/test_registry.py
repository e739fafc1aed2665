"""The front in MLflow's registry: versions, tags, aliases, and models that load in a fresh process without a pickle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from raysearch.errors import TrialError
from raysearch.mirror.registry import register
from raysearch.records import Log, RunFolder
from raysearch.result import Result, load
from raysearch.tracking import mirror_once
from raysearch.watching import watched
from tests.raysearch.builders import SMALL, by_training, drive, finished_run, make_run, open_book, small_sweep
from tests.raysearch.conftest import Cli
from trainables import checkpoint

ROOT = Path(__file__).parents[2]
FRESH = """
import json, sys
import mlflow
import numpy as np

pickles = []
sys.addaudithook(lambda event, given: pickles.append(str(given)) if event == "pickle.find_class" else None)
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
logits = model.predict(np.load(sys.argv[3]))
example = model.input_example
print(json.dumps([logits.tolist(), list(model.predict(example).shape), str(example.dtype), pickles]))
"""


@pytest.fixture(autouse=True)
def _no_store_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of three trials, really trained, mirrored, and registered at its end."""
    torch.set_num_threads(1)
    sweep = small_sweep(trials=3, epochs=1, settings=SMALL)
    folder, resolved = make_run(tmp_path_factory.mktemp("runs") / "a-sweep", sweep)
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    assert mirror_once(folder.path).complete
    watched(lambda watcher: load(folder.path), register=True)
    return folder


def client_of(run: RunFolder) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run.path / 'mlflow.db'}")


def versions_of(run: RunFolder) -> dict[int, Any]:
    return {int(v.tags["trial"]): v for v in client_of(run).search_model_versions("name = 'a-sweep'")}


def test_each_point_of_the_front_is_a_version_that_says_what_it_costs(run: RunFolder) -> None:
    found = versions_of(run)
    front = Result(run.path).front().to_pandas().set_index("trial")
    assert set(found) == set(front.index)
    for trial, version in found.items():
        row = front.loc[trial]
        facts = {name: str(row[name]) for name in ("accuracy", "bops", "size_bytes", "bits", "method")}
        assert {name: version.tags[name] for name in facts} == facts
        assert version.tags["pareto"] == "true"
        assert version.description.startswith(f"{row['accuracy']:.2%} validation accuracy, ")
        run_of_trial = client_of(run).get_run(version.run_id)
        assert run_of_trial.data.tags["raysearch.trial"] == str(trial)


def test_the_registered_model_says_how_its_input_is_made(run: RunFolder) -> None:
    said = client_of(run).get_registered_model("a-sweep").description
    assert "of digits, normalised from pixels of 0..1 with mean [0.3053] and std [0.3759]" in said


def test_aliases_lead_to_the_points_that_people_ask_for(run: RunFolder) -> None:
    front = Result(run.path).front()
    frame, marks = front.to_pandas(), front.marks()
    aliases = client_of(run).get_registered_model("a-sweep").aliases
    found = versions_of(run)
    wanted = {mark: found[int(frame["trial"][position])].version for mark, position in marks.items()}
    assert {alias: str(version) for alias, version in aliases.items()} == {m: str(v) for m, v in wanted.items()}
    assert set(wanted) == {"knee", "smallest", "most-accurate", "fewest-bops"}


def test_a_registered_model_gives_the_trained_logits_in_a_fresh_process_without_a_pickle(
    run: RunFolder, tmp_path: Path
) -> None:
    trial = int(Result(run.path).front().knee()["trial"])
    session = load(run.path).session(trial)
    images, _ = next(session.data.test.batches(16, device=torch.device("cpu"), seed=None, augment=False))
    images = images.contiguous(memory_format=torch.channels_last)
    np.save(tmp_path / "images.npy", images.numpy())
    with torch.inference_mode():
        expected = session.model.eval()(images)
    uri = f"sqlite:///{run.path / 'mlflow.db'}"
    command = [sys.executable, "-c", FRESH, uri, "models:/a-sweep@knee", str(tmp_path / "images.npy")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    logits, shape, kind, pickles = json.loads(answer.stdout.splitlines()[-1])
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
    assert (shape, kind, pickles) == ([2, 10], "float32", [])
    assert not list(run.path.glob("mlartifacts/**/*.pkl"))


def test_registering_again_adds_nothing(run: RunFolder) -> None:
    before = {trial: (v.version, v.tags) for trial, v in versions_of(run).items()}
    found = register(run.path)
    assert {trial: (v.version, v.tags) for trial, v in versions_of(run).items()} == before
    assert set(found.versions) == {f"trial {trial}" for trial in before}
    assert found.refused == {}


def test_the_command_says_how_to_load_and_what_it_could_not_register(cli: Cli, run: RunFolder) -> None:
    best = Result(run.path).front().to_pandas().iloc[0]
    rows = run.read_records()
    newcomer = next(row for row in rows if row["trial"] == best["trial"]) | {"trial": 9, "accuracy": 1.0, "digest": "x"}
    log = Log(run.records)
    log.append(newcomer)
    log.close()
    assert mirror_once(run.path).complete
    outcome = cli("register", run.path)
    assert outcome.code == 0
    assert "trial 9 is not registered: trial 9 has no checkpoint in" in outcome.err
    assert f"mlflow.set_tracking_uri('sqlite:///{run.path / 'mlflow.db'}')" in outcome.out
    assert "mlflow.pyfunc.load_model('models:/a-sweep@knee').predict(images)" in outcome.out
    left = versions_of(run)[int(best["trial"])]
    assert "pareto" not in left.tags  # the newcomer dominates it; the version stays, for somebody may use it


def test_a_store_that_is_away_or_knows_nothing_is_one_error(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    unknown = finished_run(tmp_path / "other", small_sweep(trials=2))
    with pytest.raises(TrialError, match=r"has no runs of .*: first `raysearch mirror"):
        register(unknown.path)
    outcome = cli("register", run.path, "--mlflow-uri", "http://127.0.0.1:9")
    assert (outcome.code, outcome.out) == (1, "")
    assert "MLflow at http://127.0.0.1:9 has no runs of" in outcome.err


@pytest.mark.parametrize(("register", "tried"), [(None, True), (False, False)])
def test_the_end_of_a_sweep_whose_mlflow_is_a_server_registers_unless_told_otherwise(
    run: RunFolder, capsys: pytest.CaptureFixture[str], register: bool | None, tried: bool
) -> None:
    shown = load(run.path)
    shown.description["sweep"]["mlflow_uri"] = "http://127.0.0.1:9"
    watched(lambda watcher: shown, register=register)
    assert ("nothing is registered: MLflow at http://127.0.0.1:9 has no runs" in capsys.readouterr().err) == tried


def test_no_checkpoint_of_the_front_is_lost_by_registering(run: RunFolder) -> None:
    kept = {trial for trial in versions_of(run) if (run.trial(trial) / checkpoint.FILE).exists()}
    assert kept == set(versions_of(run))
