"""The command line: data on stdout, log on stderr, and an exit code that says whose fault it was."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import filelock
import pytest
import torch
from click.testing import CliRunner

from analysis.confidence import of_share
from raysearch.commands.list import KINDS
from raysearch.options import sweep_of, sweep_options
from raysearch.records import RunFolder, write_json
from raysearch.sweep import Sweep
from tests.raysearch.builders import (
    SMALL,
    by_training,
    drive,
    finished_run,
    make_run,
    open_book,
    small_sweep,
)
from tests.raysearch.conftest import Cli, Outcome
from trainables import checkpoint, plugins

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG\r\n\x1a\n"
QUICK = [part for address, value in SMALL.items() for part in ("--set", f"{address}={value}")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of twelve trials that ran by the formula; to be read only."""
    return finished_run(tmp_path_factory.mktemp("runs") / "by-formula", small_sweep(seed=3))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A sweep of one trial that was really trained."""
    torch.set_num_threads(1)
    folder, resolved = make_run(
        tmp_path_factory.mktemp("runs") / "trained", small_sweep(trials=1, epochs=1, settings=SMALL)
    )
    book = open_book(folder, resolved)
    drive(book, trial=by_training(folder))
    book.close()
    return folder


def rows_of(outcome: Outcome) -> list[dict[str, Any]]:
    return json.loads(outcome.out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_names_each_plug_in_with_its_first_line(cli: Cli, kind: str) -> None:
    outcome = cli("list", kind)
    expected = plugins.describe(plugins.KINDS[kind])
    assert [line.split(maxsplit=1) for line in outcome.out.splitlines()] == [[n, t] for n, t in expected.items()]
    assert (outcome.code, outcome.err) == (0, "")
    assert all(expected.values())


def test_a_list_of_everything_has_a_heading_for_each_kind(cli: Cli) -> None:
    lines = cli("list").out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [f"{kind}:" for kind in KINDS]
    assert len(lines) == len(KINDS) + sum(len(plugins.describe(plugins.KINDS[kind])) for kind in KINDS)


def test_train_reports_each_epoch_on_stdout(cli: Cli) -> None:
    outcome = cli("train", "--epochs", 2, *QUICK)
    assert outcome.code == 0
    assert outcome.err == ""
    assert [line.partition(":")[0] for line in outcome.out.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    assert "validation accuracy" in outcome.out


def test_train_with_json_has_the_last_report_on_stdout_and_the_log_on_stderr(cli: Cli) -> None:
    outcome = cli("train", "--epochs", 1, "--json", "--set", "start/epochs=1", "--set", "bits/conv2/weight=3")
    report = json.loads(outcome.out)
    assert (outcome.code, report["epoch"], report["epochs"]) == (0, 1, 1)
    assert report["points"][0]["bits"]["conv2"] == [3, 4]
    assert 0.1 < report["points"][0]["accuracy"] <= 1
    assert outcome.err.startswith("epoch 1/1: train loss ")
    assert len(outcome.out.splitlines()) == 1


def test_train_gives_the_same_numbers_again(cli: Cli) -> None:
    first, again = (json.loads(cli("train", "--epochs", 1, "--json", *QUICK).out)["points"] for _ in range(2))
    assert first == again


def test_train_trains_the_float_network_too(cli: Cli) -> None:
    outcome = cli("train", "--method", "float", "--epochs", 1, "--json", *QUICK)
    assert outcome.code == 0
    assert json.loads(outcome.out)["points"][0]["relative_bops"] == 1.0


def test_train_keeps_a_checkpoint_in_a_folder_and_goes_on_from_it(cli: Cli, tmp_path: Path) -> None:
    cli("train", "--epochs", 1, "--out", tmp_path / "one", *QUICK)
    assert (tmp_path / "one" / checkpoint.FILE).is_file()
    again = cli("train", "--epochs", 1, "--out", tmp_path / "one", *QUICK)
    assert again.code == 0
    assert again.out.startswith("epoch 1/1")


def test_a_training_that_diverges_has_failed(cli: Cli) -> None:
    extreme = ("--method", "float", "--set", "optimizer/lr=100", "--set", "optimizer/weight_decay=1")
    outcome = cli("train", "--epochs", 4, *QUICK, *extreme)
    assert outcome.code == 1
    assert outcome.err.startswith("error: loss is nan after epoch ")


def test_status_counts_trials_and_ends_with_the_front(cli: Cli, run: RunFolder) -> None:
    outcome = cli("status", run.path)
    assert outcome.out.startswith("by-formula: finished\n  12/12 done, 0 pruned, 0 failed\n  front: ")
    assert (outcome.code, outcome.err) == (0, "")


def test_status_says_whether_a_driver_is_at_work(cli: Cli, tmp_path: Path) -> None:
    folder, _ = make_run(tmp_path / "a-run")
    assert cli("status", folder.path).out.startswith("a-run: interrupted\n")
    with filelock.FileLock(folder.lock):
        assert cli("status", folder.path).out.startswith("a-run: running\n")
    assert cli("status", folder.path).out.startswith("a-run: interrupted\n")


def test_front_is_a_table_json_or_csv(cli: Cli, run: RunFolder) -> None:
    points = rows_of(cli("front", run.path, "--json"))
    accuracies = [point["accuracy"] for point in points]
    assert accuracies == sorted(accuracies, reverse=True)
    lines = list(csv.DictReader(io.StringIO(cli("front", run.path, "--csv").out)))
    assert [int(line["trial"]) for line in lines] == [point["trial"] for point in points]
    table = cli("front", run.path)
    assert len(table.out.splitlines()) == 1 + len(points)
    assert (table.code, table.err) == (0, "")


def test_front_draws_a_picture(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    outcome = cli("front", run.path, "--json", "--plot", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(PNG)
    assert outcome.err == f"wrote {tmp_path / 'front.png'}\n"
    assert rows_of(outcome) == rows_of(cli("front", run.path, "--json"))


def test_front_takes_several_sweeps(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", small_sweep(trials=3, method="pact"))
    assert {point["run"] for point in rows_of(cli("front", run.path, other.path, "--json"))} <= {"by-formula", "other"}


def pick(cli: Cli, run: RunFolder, *limits: Any) -> dict[str, Any]:
    outcome = cli("pick", run.path, "--no-test", "--json", *limits)
    assert (outcome.code, outcome.err) == (0, "")
    return json.loads(outcome.out)


@pytest.mark.parametrize(
    ("flag", "name", "share"),
    [
        ("--max-bops", "bops", 1.0),
        ("--max-size-bytes", "size_bytes", 1.0),
        ("--max-relative-bops", "relative_bops", 100),
    ],
)
def test_pick_is_the_most_accurate_point_within_the_limit(
    cli: Cli, run: RunFolder, flag: str, name: str, share: float
) -> None:
    points = rows_of(cli("front", run.path, "--json"))
    for limit in sorted(point[name] for point in points):
        chosen = pick(cli, run, flag, limit * share * 1.000001)
        assert chosen["accuracy"] == max(point["accuracy"] for point in points if point[name] <= limit)


def test_pick_under_an_accuracy_is_the_cheapest_point(cli: Cli, run: RunFolder) -> None:
    points = rows_of(cli("front", run.path, "--json"))
    chosen = pick(cli, run, "--min-accuracy", 0.98)
    assert chosen["bops"] == min(point["bops"] for point in points if point["accuracy"] >= 0.98)
    record = next(row for row in run.read_records() if row["trial"] == chosen["trial"])
    assert chosen == {name: record.get(name) for name in chosen}
    assert chosen["test_accuracy"] is None


def test_pick_tells_a_person_what_was_chosen(cli: Cli, run: RunFolder) -> None:
    outcome = cli("pick", run.path, "--no-test")
    lines = outcome.out.splitlines()
    best = max(run.read_records(), key=lambda row: row["accuracy"])
    assert lines[0] == f"trial {best['trial']} (lsq on lenet5, digits)"
    assert f"  validation accuracy  {best['accuracy']:.2%}" in lines  # nobody has counted the images yet
    assert f"  checkpoint           {run.path / best['checkpoint']}" in lines
    assert lines[-6:-2] == [f"    {layer:24s} {w}/{a}" for layer, (w, a) in best["bits"].items()]
    assert lines[-1] == f"export  raysearch export {run.path} {best['trial']} -o net.onnx"
    assert "test accuracy" not in outcome.out


def test_pick_measures_the_test_accuracy(cli: Cli, trained: RunFolder) -> None:
    chosen = json.loads(cli("pick", trained.path, "--json").out)
    assert 0 <= chosen["test_accuracy"] <= 1
    low, high = of_share(chosen["test_accuracy"], chosen["test_images"])
    said = f"  test accuracy        {chosen['test_accuracy']:.2%} (95 %: {100 * low:.2f}..{100 * high:.2f})"
    assert said in cli("pick", trained.path).out.splitlines()
    assert (chosen["test_images"], chosen["validation_images"]) == (359, 64)
    assert len(trained.tests.read_text().splitlines()) == 1


def test_list_with_a_name_prints_its_settings_with_their_defaults(cli: Cli) -> None:
    outcome = cli("list", "methods", "lsq")
    assert outcome.code == 0
    assert "method/per_channel=false  " in outcome.out
    assert cli("list", "methods", "lqs").code == 2
    assert cli("list", "spaces", "uniform").err.startswith("error: a search space has no settings")


def test_layers_prints_a_table_or_lines_of_a_trial(cli: Cli, trained: RunFolder) -> None:
    trial = json.loads(cli("pick", trained.path, "--json", "--no-test").out)["trial"]
    rows = [json.loads(line) for line in cli("layers", trained.path, trial, "--json").out.splitlines()]
    assert [row["layer"] for row in rows] == ["conv1", "conv2", "fc1", "fc2"]
    assert cli("layers", trained.path, trial, "--csv").out.splitlines()[0] == ",".join(rows[0])
    assert len(cli("layers", trained.path, trial).out.splitlines()) == 5


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (["--max-bops", "1"], "no point fits max_bops = 1: the cheapest point has "),
        (["--max-size-bytes", "10"], "no point fits max_size_bytes = 10: the smallest point has "),
        (["--min-accuracy", "1"], "no point fits min_accuracy = 1: the most accurate point has accuracy "),
        (["--min-accuracy", "0.999", "--max-size-bytes", "8000"], "together: the nearest has "),
    ],
)
def test_when_nothing_fits_the_answer_is_what_comes_nearest(
    cli: Cli, run: RunFolder, limits: list[str], words: str
) -> None:
    outcome = cli("pick", run.path, "--no-test", *limits)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_point_without_a_checkpoint_is_picked_without_a_test(cli: Cli, run: RunFolder) -> None:
    outcome = cli("pick", run.path)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: trial ")
    assert "has no checkpoint in" in outcome.err


BAD_CALLS = [
    (["front", "{empty}"], "is no run folder: it has no sweep.json"),
    (["status", "{empty}"], "is no run folder: it has no sweep.json"),
    (["pick", "{empty}"], "is no run folder: it has no sweep.json"),
    (["resume", "{empty}"], "is no run folder: it has no sweep.json"),
    (["mirror", "{empty}"], "is no run folder: it has no sweep.json"),
    (["front", "{new}"], "no complete trial in"),
    (["pick", "{new}"], "no complete trial in"),
    (["front", "{run}", "--plot", "{empty}/no/such/folder.png"], "--plot "),
    (["train", "--method", "lqs"], "unknown method 'lqs'; did you mean 'lsq'? (raysearch list methods)"),
    (["train", "--set", "optimizer/lr"], "--set optimizer/lr: write ADDRESS=VALUE, such as optimizer/lr=0.05"),
    (["train", "--set", "=3"], "--set =3: write ADDRESS=VALUE"),
    (["train", "--set", "optimizer/lr=NaN"], "optimizer/lr = nan: input should be a finite number"),
    (["train", "--data", "mnist", "--data-root", "{empty}"], "mnist"),
    (["train", "--from", "{empty}"], "give a run folder or a JSON file of a sweep's fields"),
    (["train", "--from", "{empty}/nothing.json"], "give a run folder or a JSON file of a sweep's fields"),
    (["train", "--from", "{list}"], "holds no sweep; give a run folder or a JSON file of a sweep's fields"),
    (["train", "--from", "{misspelt}"], "unknown field 'trial' of a sweep; did you mean 'trials'?"),
    (["train", "--from", "{nulls}"], "settings = None: a dictionary by name"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_CALLS, ids=[" ".join(arguments) for arguments, _ in BAD_CALLS])
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    cli: Cli, run: RunFolder, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "new")
    write_json(tmp_path / "list.json", ["lsq"])
    write_json(tmp_path / "misspelt.json", {"trial": 3})
    write_json(tmp_path / "nulls.json", {"settings": None})
    places = {name: tmp_path / name for name in ("empty", "new")} | {"run": run.path}
    places |= {name: tmp_path / f"{name}.json" for name in ("list", "misspelt", "nulls")}
    outcome = cli(*(argument.format(**places) for argument in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


MISUSES = [
    ([], "Usage: raysearch"),
    (["sweeep"], "No such command 'sweeep'"),
    (["list", "method"], "'method' is not one of 'methods', 'models', 'data', 'spaces'"),
    (["sweep", "--trails", "3"], "--trails"),
    (["sweep", "--trials", "many"], "'many' is not a valid integer"),
    (["pick"], "Missing argument 'DIR'"),
    (["pick", "x", "--max-bops", "-1"], "Invalid value for '--max-bops': -1.0 is not in the range x>=0"),
    (["pick", "x", "--max-relative-bops", "101"], "Invalid value for '--max-relative-bops': 101.0 is not in the range"),
    (["pick", "x", "--min-accuracy", "97"], "Invalid value for '--min-accuracy': 97.0 is not in the range 0<=x<=1"),
]


@pytest.mark.parametrize(("arguments", "words"), MISUSES, ids=[" ".join(arguments) for arguments, _ in MISUSES])
def test_a_misuse_says_what_is_allowed_on_stderr(cli: Cli, arguments: list[str], words: str) -> None:
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err


def test_a_disk_that_says_no_is_one_line_and_exit_code_1(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = cli("train", "--epochs", 1, "--out", tmp_path / "file", *QUICK)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: [Errno ")
    assert outcome.err.count("\n") == 1


@click.command()
@sweep_options()
def show(**options: Any) -> None:
    """What the flags say, for the tests."""
    click.echo(json.dumps(sweep_of(options).tree()))


def asked(*arguments: Any) -> Sweep:
    """The sweep that `raysearch sweep` would run."""
    outcome = CliRunner().invoke(show, list(map(str, arguments)), catch_exceptions=False)
    return Sweep.from_tree(json.loads(outcome.output))


def test_without_flags_a_sweep_is_the_default_one() -> None:
    assert asked() == Sweep()


def test_flags_are_the_fields_of_a_sweep() -> None:
    flags = (
        "--method",
        "pact",
        "--trials",
        7,
        "--train",
        "--gpus-per-worker",
        0.5,
        "--max-bops",
        1e6,
        "--concurrent",
        2,
    )
    expected = Sweep(method="pact", trials=7, train=True, gpus_per_worker=0.5, max_bops=1e6, concurrent=2)
    assert asked(*flags) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.05", 0.05),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("adam", "adam"),
        ('"3"', "3"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_setting_is_json_or_else_text(text: str, value: Any) -> None:
    assert asked("--set", f"optimizer/lr={text}").settings == {"optimizer/lr": value}


def test_several_settings_add_up_and_the_last_of_an_address_counts() -> None:
    sweep = asked("--set", "optimizer/lr=1", "--set", "start/epochs=2", "--set", "optimizer/lr=3")
    assert sweep.settings == {"optimizer/lr": 3, "start/epochs": 2}


@pytest.mark.parametrize(
    ("text", "objectives"),
    [
        ("accuracy:max,bops:min", {"accuracy": "max", "bops": "min"}),
        ("size_bytes, accuracy", {"size_bytes": "min", "accuracy": "max"}),
        ("accuracy:min", {"accuracy": "min"}),
    ],
)
def test_objectives_are_read_in_their_order(text: str, objectives: dict[str, str]) -> None:
    found = asked("--objectives", text).objectives
    assert list(found.items()) == list(objectives.items())


def test_a_sweep_is_repeated_from_its_run_folder(run: RunFolder) -> None:
    assert asked("--from", run.path) == small_sweep(seed=3)
    assert asked("--from", run.path / "sweep.json") == small_sweep(seed=3)


def test_flags_override_the_sweep_that_is_repeated(tmp_path: Path) -> None:
    write_json(
        tmp_path / "s.json",
        {"trials": 5, "epochs": 9, "train": True, "settings": {"optimizer/lr": 1, "start/epochs": 1}},
    )
    flags = ("--trials", 24, "--set", "optimizer/lr=2", "--objectives", "accuracy")
    expected = Sweep(
        trials=24, epochs=9, train=True, settings={"optimizer/lr": 2, "start/epochs": 1}, objectives={"accuracy": "max"}
    )
    assert asked("--from", tmp_path / "s.json", *flags) == expected


PROBE = """
import contextlib, io, json, sys
from raysearch.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["raysearch", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    answers.append([code, out.getvalue(), err.getvalue(), sorted(sys.modules.keys() & HEAVY)])
print(json.dumps(answers))
"""


def in_a_process(calls: list[list[str]], heavy: set[str]) -> list[tuple[int, str, str, list[str]]]:
    """Code, stdout, stderr of each call in one fresh process, and which of the heavy modules are loaded after it."""
    command = [sys.executable, "-c", f"HEAVY = {heavy}\n{PROBE}", json.dumps(calls)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [tuple(each) for each in json.loads(answer.stdout)]


COMMANDS = ("list", "train", "sweep", "resume", "status", "front", "pick", "report", "mirror")


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    heavy = {"ray", "torch", "torchvision", "optuna", "mlflow", "pandas", "numpy", "rich", "sklearn", "matplotlib"}
    calls = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS), ["list"]]
    for code, out, err, loaded in in_a_process(calls, heavy):
        assert (code, err, loaded) == (0, "", [])
        assert out != ""


def test_the_help_of_sweep_names_every_field() -> None:
    ((_, out, _, _),) = in_a_process([["sweep", "--help"]], {"ray"})
    flags = {"settings": "set", "measures": "measure", "limits": "limit"}
    for name in Sweep().tree():
        assert f"--{flags.get(name, name).replace('_', '-')}" in out
    assert "--from" in out
    assert "--out" in out


def test_a_sweep_that_cannot_be_run_is_refused_before_ray_starts(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    calls = {
        ("--out", str(run.path)): "already holds a sweep: `raysearch resume",
        ("--out", str(tmp_path / "full")): "exists and is not an empty folder: take another --out",
        ("--out", str(tmp_path / "file")): "exists and is not an empty folder: take another --out",
        ("--out", str(tmp_path / "file" / "below")): "take another --out",
        ("--out", "/proc/nothing/here"): "take another --out",
        ("--out", str(tmp_path / "what?")): "a path with a question mark cannot hold the study's database",
        ("--space", "per-layer"): "unknown space 'per-layer'; did you mean 'per_layer'?",
        ("--trials", "0"): "trials = 0: an integer from 1 to 1000000",
        ("--objectives", "accuracy,latency"): "unknown objective 'latency'",
        ("--max-bops", "10"): "the budget leaves nothing to train",
        ("--workers", "5"): "cannot be shared by 5 workers",
        ("--data", "mnist", "--data-root", str(tmp_path)): "mnist",
    }
    answers = in_a_process([["sweep", *arguments] for arguments in calls], {"ray"})
    for words, (code, out, err, loaded) in zip(calls.values(), answers, strict=True):
        assert (code, out, loaded) == (2, "", [])
        assert err.startswith("error: ")
        assert words in err
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
