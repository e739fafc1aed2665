"""Search on shared weights on a real Ray: trained once, searched, picked and exported from, resumed, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raysearch import driver
from raysearch.errors import RecordError, SweepError
from raysearch.mirror.entries import trial_note
from raysearch.result import Result
from raysearch.seeds import Seeds
from raysearch.sensitivities import FORMAT
from raysearch.shared_weights.evaluators import SUPERNET
from raysearch.shared_weights.finetune import CORRELATION, correlation_text, finetune
from raysearch.shared_weights.question import Search, narrowed
from raysearch.shared_weights.supernet import resume, search
from raysearch.sweep import Sweep
from tests.raysearch.builders import finished_run
from tests.raysearch.cluster import cluster, command, lines
from trainables.errors import ConfigError
from trainables.method import Choices

__all__ = ["cluster"]

SMALL: dict[str, Any] = {"data/train_limit": 320, "data/validation_limit": 120, "start/epochs": 1}
MEASURED = ("trial", "params", "source", "accuracy", "loss", "bops", "size_bytes", "bits", "digest", "calibration")


class Silent:
    """Watches; interrupts a search once so many mixtures are evaluated."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit

    def started(self, path: Path, text: str, known: int) -> None:
        pass

    def evaluated(self, rows: Any, evaluations: int) -> None:
        if self.limit is not None and len(rows) >= self.limit:
            raise KeyboardInterrupt


def train(folder: Path, **fields: Any) -> Result:
    settings = {**SMALL, **fields.pop("settings", {})}
    sweep = Sweep(trials=1, space={}, epochs=2, settings=settings, **{"method": "double_rounding", **fields})
    return driver.run(sweep, folder, seeds=Seeds(first=(("given", {}),)))


@pytest.fixture(scope="module")
def trained(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with batch norm, of three widths."""
    small = {"model/depth": 8, "model/width": 4, "method/widths": "8,4,2"}
    return train(tmp_path_factory.mktemp("trained") / "net", model="resnet20", settings=small).path


@pytest.fixture(scope="module")
def found(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A whole search, with recalibration."""
    question = Search(run=str(trained), evaluations=96, calibration=64, images=100)
    return search(question, tmp_path_factory.mktemp("found") / "run", watcher=Silent())


def measured(run: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in MEASURED} for row in lines(run / "records.jsonl")]


def test_the_trained_network_is_one_trial_as_it_was_asked_for(trained: Path) -> None:
    rows = Result(trained).records()
    assert [(row["trial"], row["point"], row["source"]) for row in rows] == [
        (0, "8-bit", "given"),
        (0, "4-bit", "given"),
        (0, "2-bit", "given"),
    ]


def test_every_mixture_has_a_record_and_none_has_two(found: Result) -> None:
    rows = found.records()
    assert [row["trial"] for row in rows] == list(range(96))
    assert len({row["digest"] for row in rows}) == len({json.dumps(row["bits"]) for row in rows}) == 96
    assert {row["status"] for row in rows} == {"complete"}
    assert {row["source"] for row in rows[3:]} == {"frontier"}
    end = json.loads(found.folder.end.read_text())
    assert end["trials"] == 96
    assert end["evaluations_per_second"] > 0


def test_a_picked_mixture_is_rebuilt_measured_and_exported_from_the_run_alone(
    found: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = found.front().to_pandas().iloc[0]
    record = next(row for row in found.records() if row["trial"] == point["trial"])
    layers = found.layers(int(point["trial"])).set_index("layer")
    assert layers[["weight_bits", "activation_bits"]].T.to_dict("list") == record["bits"]
    assert command(monkeypatch, "pick", str(found.path), "--json") == 0
    picked = json.loads(capsys.readouterr().out)
    assert 0 <= picked["test_accuracy"] <= 1
    assert picked["checkpoint"] == SUPERNET
    assert command(monkeypatch, "export", str(found.path), str(picked["trial"]), "-o", str(tmp_path / "n.onnx")) == 0
    assert command(monkeypatch, "front", str(found.path), "--csv") == 0
    assert command(monkeypatch, "status", str(found.path)) == 0
    assert "finished" in capsys.readouterr().out


def test_mlflow_has_the_front_and_the_summary_alone(found: Result) -> None:
    assert found.mirrored is not None
    client = MlflowClient(tracking_uri=f"sqlite:///{found.path.resolve() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(found.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    trials = {int(run.data.tags["raysearch.trial"]) for run in runs if "raysearch.trial" in run.data.tags}
    assert trials == set(found.front().to_pandas()["trial"])
    assert len(runs) == len(trials) + 1


def test_the_report_of_a_search_says_whose_weights_these_are_and_how_to_export(found: Result, tmp_path: Path) -> None:
    page = found.report(tmp_path / "report.html").read_text()
    assert "accuracies on 100 validation images are those of the shared weights of one network" in page
    command = f"raysearch supernet search {found.description['search']['run']} --evaluations 96 "
    assert command in page
    assert command in trial_note(found.description, found.records()[0])
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["points"]["kept"] == [1] * 96


def test_an_interrupted_search_goes_on_as_the_same_search(trained: Path, found: Result, tmp_path: Path) -> None:
    question = Search(run=str(trained), evaluations=96, calibration=64, images=100, workers=1)
    with pytest.raises(KeyboardInterrupt):
        search(question, tmp_path / "run", watcher=Silent(limit=48))
    records = tmp_path / "run" / "records.jsonl"
    torn = records.read_bytes()
    assert 0 < torn.count(b"\n") < 96
    records.write_bytes(torn[:-40])  # killed within a line
    resume(tmp_path / "run", watcher=Silent())
    ours, theirs = measured(tmp_path / "run"), measured(found.path)
    for row, other in zip(ours, theirs, strict=True):
        assert row.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)
        assert row == other


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"widths": (8, 3)}, SweepError, "widths 3: the network was not trained at them; it has 8, 4, 2"),
        ({"widths": (4,)}, SweepError, "nothing is left to choose"),
        ({"max_bops": 1000.0}, SweepError, r"max_bops = 1000 leaves nothing to evaluate: .* has \d+, \d+ more"),
        ({"images": 121}, ConfigError, r"images = 121: the validation split has 1\.\.120"),
        ({"trial": 3}, RecordError, "no trial 3 with a checkpoint: name one of 0"),
        ({"evaluations": 0}, SweepError, "trials = 0"),
        ({"sampler": "frontir"}, SweepError, "did you mean 'frontier'"),
        ({"objectives": {"latency": "min"}}, SweepError, "unknown objective 'latency'"),
        ({"run": "nowhere"}, RecordError, "nowhere is no run folder"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        search(Search(**{"run": str(trained), **changes}), tmp_path / "run", watcher=Silent())
    assert not (tmp_path / "run").exists()


def test_a_search_of_a_search_and_of_a_sweep_without_checkpoints_is_refused(found: Result, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is a search already"):
        search(Search(run=str(found.path)), tmp_path / "run", watcher=Silent())
    plain = finished_run(tmp_path / "plain")
    with pytest.raises(RecordError, match="has no trial with a checkpoint"):
        search(Search(run=str(plain.path)), tmp_path / "run", watcher=Silent())
    with pytest.raises(RecordError, match="holds no search on shared weights"):
        resume(plain.path, watcher=Silent())
    with pytest.raises(RecordError, match="is a search on shared weights"):
        driver.resume(found.path)


def test_points_are_trained_alone_at_their_widths_and_compared(found: Result, trained: Path) -> None:
    tuned, compared = finetune(found, 3)
    rows = tuned.records()
    assert {(row["source"], row["method"], row["status"]) for row in rows} == {("finetune", "lsq", "complete")}
    chosen = {json.dumps(point["bits"], sort_keys=True) for point in compared["points"]}
    assert {json.dumps(row["bits"], sort_keys=True) for row in rows} == chosen
    assert chosen <= {json.dumps(row["bits"], sort_keys=True) for row in found.records()}
    assert set(compared["correlation"]) == {"shared", "recalibrated"}
    assert json.loads((found.path / CORRELATION).read_text()) == compared
    assert "rank correlation, recalibrated and fine-tuned: Spearman" in correlation_text(compared)
    with pytest.raises(RecordError, match="holds no search on shared weights"):
        finetune(Result(trained), 3)
    with pytest.raises(SweepError, match="already holds a sweep"):
        finetune(found, 3)


def test_a_layer_with_no_legal_width_is_named() -> None:
    choices = {
        "conv1": Choices(weight=(8,), activation=(8,)),
        "conv2": Choices(weight=(8, 4), activation=(8, 4)),
        "conv3": Choices(weight=(4, 2), activation=(8, 4)),
    }
    assert narrowed(choices, (4,))["conv1"] == choices["conv1"]
    with pytest.raises(SweepError, match="layer conv3 has no legal weight width: it was trained at 4, 2, and --widths"):
        narrowed(choices, (8,))


def test_sensitivities_of_another_network_are_refused(trained: Path, tmp_path: Path) -> None:
    tree = {"format": FORMAT, "model": "lenet5", "data": "digits", "widths": [2], "layers": [{"layer": "conv9"}]}
    (tmp_path / "s.json").write_text(json.dumps(tree))
    with pytest.raises(SweepError, match=r"are of another network: they lack .* and have conv9"):
        search(Search(run=str(trained)), tmp_path / "run", seed_from=tmp_path / "s.json", watcher=Silent())
