"""Looking at a sweep and picking from it: rules of picking, the report, the command that repeats a trial."""

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import click
import pytest

from raysearch.importance import importances
from raysearch.options import sweep_of, sweep_options
from raysearch.records import RunFolder, write_json
from raysearch.repeat import train_command
from raysearch.resolve import trial_config
from raysearch.result import Result, load
from raysearch.search.proposals import cost_of
from tests.raysearch.builders import finished_run, make_run, small_sweep
from tests.raysearch.conftest import Cli

RATES = {"space": "training", "settings": {"training/compile": "off", "optimizer/schedule": "linear"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of twelve trials that ran by the formula; to be read only."""
    return finished_run(tmp_path_factory.mktemp("runs") / "by-formula", small_sweep(seed=3))


def picked(cli: Cli, run: RunFolder, *rule: Any) -> int:
    outcome = cli("pick", run.path, "--no-test", "--json", *rule)
    assert (outcome.code, outcome.err) == (0, "")
    return int(json.loads(outcome.out)["trial"])


def test_pick_takes_the_knee_or_what_weights_prefer(cli: Cli, run: RunFolder) -> None:
    front = Result(run.path).front()
    assert picked(cli, run, "--knee") == front.knee()["trial"]
    assert picked(cli, run, "--weights", "accuracy=1,bops=0.5, size_bytes=0.5") == front.knee()["trial"]
    assert picked(cli, run, "--weights", "accuracy=1") == front.pick()["trial"]
    assert picked(cli, run, "--weights", "size_bytes=1") == front.to_pandas()["trial"][front.marks()["smallest"]]


def test_pick_takes_the_cheapest_within_so_many_points_of_the_best(cli: Cli, run: RunFolder) -> None:
    frame = Result(run.path).front().to_pandas()
    near = frame[frame["accuracy"] >= frame["accuracy"].max() - 0.01]
    assert picked(cli, run, "--within", 1) == near.sort_values("bops")["trial"].iloc[0]


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        (["--knee", "--within", "1"], "ways to choose one point: give one of them"),
        (["--weights", "accuracy"], "--weights accuracy: write NAME=WEIGHT,..., such as accuracy=1,bops=0.5"),
        (["--weights", "speed=1"], "--weights speed=1: weights name speed: give accuracy"),
        (["--weights", "bops=-1"], "--weights bops=-1: weights bops = -1: give numbers >= 0"),
        (["--within", "101"], "Invalid value for '--within'"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_a_wrong_question(
    cli: Cli, run: RunFolder, rule: list[str], fault: str
) -> None:
    outcome = cli("pick", run.path, *rule)
    assert (outcome.code, outcome.out) == (2, "")
    assert fault in outcome.err


def test_report_writes_one_page(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", small_sweep(trials=3, method="pact"))
    page = tmp_path / "page.html"
    outcome = cli("report", run.path, other.path, "-o", page, "--title", "Two methods")
    assert (outcome.code, outcome.out) == (0, f"{page}  {page.stat().st_size} bytes\n")
    text = page.read_text(encoding="utf-8")
    assert "<h1>Two methods</h1>" in text
    assert "in 2 sweeps" in text
    assert "<title>by-formula</title>" in _page(cli, run, tmp_path)


def _page(cli: Cli, run: RunFolder, folder: Path) -> str:
    assert cli("report", run.path, "-o", folder / "one.html").code == 0
    return (folder / "one.html").read_text(encoding="utf-8")


def test_what_cannot_be_reported_is_one_clear_error(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    empty, _ = make_run(tmp_path / "empty")
    old, _ = make_run(tmp_path / "old")
    write_json(old.sweep, old.read_sweep() | {"schema": 0})
    page = tmp_path / "page.html"
    for folder, fault in (
        (tmp_path, "is no run folder: it has no sweep.json"),
        (empty.path, "nothing to report: no trial is complete in"),
        (old.path, "has schema 0; this version reads 1"),
    ):
        outcome = cli("report", folder, "-o", page)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert fault in outcome.err
    assert cli("report", run.path, "-o", tmp_path / "no" / "page.html").code == 1
    assert not page.exists()


@pytest.mark.parametrize("changes", [{}, RATES, {"model": "resnet20", "trials": 2}])
def test_the_command_of_a_trial_trains_the_same_configuration(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = finished_run(tmp_path / "run", small_sweep(**{"trials": 3, "seed": 7, **changes}))
    fields = folder.read_sweep()["sweep"]
    for record in folder.read_records():
        words = shlex.split(train_command(fields, record))
        assert words[:2] == ["raysearch", "train"]

        @click.command()
        @sweep_options("method", "model", "data", "data_root", "download", "epochs", "seed")
        def train(**options: Any) -> Any:
            return trial_config(sweep_of(options)).tree()

        tree = train.main(words[2:], standalone_mode=False)
        assert tree == record["config"]
        assert cost_of(tree).digest == record["digest"]


def test_importances_are_shares_of_what_was_searched(run: RunFolder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importances(run.study, load(run.path).objectives)
    assert list(found) == ["accuracy", "bops", "size_bytes"]
    for shares in found.values():
        assert sum(shares.values()) == pytest.approx(1)
    assert max(found["size_bytes"], key=found["size_bytes"].__getitem__).endswith("weight")


def test_without_enough_trials_nothing_is_said_of_importance(tmp_path: Path) -> None:
    few = finished_run(tmp_path / "few", small_sweep(trials=3))
    assert importances(few.study, ["accuracy"]) == {}
    assert importances(tmp_path / "no.db", ["accuracy"]) == {}


def test_fronts_and_results_show_themselves_in_a_notebook(run: RunFolder, tmp_path: Path) -> None:
    result = load(run.path)
    assert repr(result) == "Result('by-formula', 12 of 12 trials complete)"
    for shown in (result, result.front()):
        assert "<table" in shown._repr_html_()
        figure = shown.plot()
        assert [axes.get_xlabel() for axes in figure.axes] == ["relative BOPs (%)", "size (KiB)"]
    assert "12 of 12 trials complete" in result._repr_html_()
    assert result.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    empty, _ = make_run(tmp_path / "empty")
    assert (
        load(empty.path)._repr_html_() == f"<p>Result(&#x27;empty&#x27;, 0 of 12 trials complete) in {empty.path}</p>"
    )
