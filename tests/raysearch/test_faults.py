"""Everything that can die or fail during a sweep, on a real Ray: trials, their processes, the driver, MLflow.

Trials that nothing happened to are the reference: one that was killed and went on must give the same numbers.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import raysearch
from raysearch.book import Book, Live
from raysearch.driver import Watcher
from raysearch.result import Result
from raysearch.sweep import Sweep
from tests.kills.victims import find, processes
from tests.raysearch.cluster import ROOT, check_books, cluster, command, epochs_of, lines, numbers
from tests.raysearch.fragile import DIARY, read_diary

__all__ = ["cluster"]

EPOCHS = 4
PATIENCE_S = 180
BASE: dict[str, Any] = {
    "start/epochs": 1,
    "optimizer/lr": 0.005,
    "training/batch_size": 8,  # an epoch takes long enough to be killed in the middle of a trial
    "data/train_limit": 640,
    "data/validation_limit": 300,
}
UNIFORM = ["8", "2", "4", "3", "6", "5", "7"]
"""Widths of the first trials of a sweep over the space `uniform`."""
FAILING = {"method/raises": "3", "method/diverges": "5"}


def question(trials: int, settings: dict[str, str], **changes: Any) -> Sweep:
    fields: dict[str, Any] = {"method": "tests.raysearch.fragile", "space": "uniform", "epochs": EPOCHS}
    return Sweep(**fields | changes, trials=trials, settings=BASE | settings)


def ends(result: Result) -> dict[str, tuple[str, str | None]]:
    """Width -> status and reason of the uniform trials."""
    rows = {row["trial"]: row for row in result.records()}
    return {width: (rows[n]["status"], rows[n]["reason"]) for n, width in enumerate(UNIFORM) if n in rows}


def pids(diary: Path, width: str, rank: int = 0) -> dict[int, list[int]]:
    """Process -> epochs that it trained of the trial of a width, in the order in which it happened."""
    found: dict[int, list[int]] = {}
    for line in read_diary(diary):
        if (line["width"], line["rank"]) == (int(width), rank):
            found.setdefault(line["pid"], []).append(line["epoch"])
    return found


class Killer(Watcher):
    """Kills a process, once, after the first epoch of a trial.

    Args:
        victims: trial -> which process.
    """

    def __init__(self, victims: dict[int, Callable[[Live], int]]) -> None:
        self.victims = dict(victims)
        self.killed: dict[int, int] = {}

    def event(self, book: Book) -> None:
        """After each epoch."""
        for number in [n for n in self.victims if n in book.live and book.live[n].history]:
            self.killed[number] = self.victims.pop(number)(book.live[number])
            os.kill(self.killed[number], signal.SIGKILL)


def slot(live: Live) -> int:
    """The process of the slot in which a trial runs."""
    return int(str(live.timing["slot"]).split("-")[0])


@dataclass(frozen=True)
class Run:
    """A sweep, and what the processes wrote into the diary meanwhile."""

    result: Result
    diary: Path
    killed: dict[int, int]


@pytest.fixture(scope="module")
def ask(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs a sweep with a diary of its own."""

    def run(sweep: Sweep, victims: dict[int, Callable[[Live], int]] | None = None) -> Run:
        folder = tmp_path_factory.mktemp("sweep")
        killer, before = Killer(victims or {}), len(read_diary(cluster))
        result = raysearch.run(sweep, folder / "run", watcher=killer)
        diary = folder / "diary.jsonl"
        diary.write_text("".join(cluster.read_text().splitlines(keepends=True)[before:]))
        return Run(result, diary, killer.killed)

    return run


@pytest.fixture(scope="module")
def inline(ask: Callable[..., Run]) -> Run:
    """Some trials fail, no process dies."""
    return ask(question(7, FAILING))


@pytest.fixture(scope="module")
def group(ask: Callable[..., Run]) -> Run:
    """The same in a group of two workers."""
    return ask(question(7, FAILING, workers=2))


@pytest.fixture(scope="module")
def inline_killed(ask: Callable[..., Run]) -> Run:
    """The slot is killed in the trial of 2 bits, and kills itself whenever it has 4."""
    return ask(question(4, {"method/dies": "4"}, concurrent=1), {1: slot})


@pytest.fixture(scope="module")
def group_killed(ask: Callable[..., Run], cluster: Path) -> Run:
    """Rank 0 is killed in the trial of 2 bits, the slot in that of 4; one rank alone fails at 3."""

    def reporting_rank(live: Live) -> int:
        return next(line["pid"] for line in reversed(read_diary(cluster)) if line["rank"] == 0)

    return ask(question(5, {"method/alone": "3"}, workers=2), {1: reporting_rank, 2: slot})


@pytest.fixture(scope="module")
def controller_killed(ask: Callable[..., Run]) -> Run:
    """Ray Train's controller is killed in the trial of 2 bits."""

    def controller(live: Live) -> int:
        return find("controller", os.getsid(0), lambda: None)[0]

    return ask(question(3, {}, workers=2), {1: controller})


@pytest.mark.parametrize("kind", ["inline", "group"])
def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_others_are_unaffected(
    kind: str, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue(kind).result
    check_books(result, 7)
    found = ends(result)
    assert found["3"] == ("failed", "ValueError: no 3 bits today")
    assert found["5"][0] == "failed"
    assert str(found["5"][1]).startswith("DivergedError: loss is nan after epoch 1")
    assert [found[width] for width in "82467"] == [("complete", None)] * 5
    assert "raise ValueError" in result.folder.trial(3).joinpath("error.txt").read_text()
    assert set(result.front().to_pandas()["trial"]) <= {0, 1, 2, 4, 6}


def test_one_worker_group_serves_all_trials_also_behind_those_that_failed(group: Run) -> None:
    trained = [pids(group.diary, width, rank) for width in "82467" for rank in (0, 1)]
    assert [list(found.values()) for found in trained] == [[[1, 2, 3, 4]]] * 10
    assert len({pid for found in trained[0::2] for pid in found}) == 1
    assert len({pid for found in trained[1::2] for pid in found}) == 1
    assert {*trained[0]} != {*trained[1]}


def test_two_workers_reach_the_accuracy_of_one(inline: Run, group: Run) -> None:
    accuracies = [
        {row["trial"]: row["accuracy"] for row in run.result.records() if row["status"] == "complete"}
        for run in (inline, group)
    ]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.1)
    assert min(accuracies[0].values()) > 0.5


def test_a_trial_whose_slot_is_killed_goes_on_from_its_checkpoint(inline_killed: Run) -> None:
    check_books(inline_killed.result, 4)
    assert ends(inline_killed.result)["2"] == ("complete", None)
    before, after = pids(inline_killed.diary, "2").items()
    assert before[0] == inline_killed.killed[1]
    assert before[1][0] == 1
    assert after[1][0] > 1
    assert after[1][-1] == EPOCHS


def test_a_trial_that_was_killed_gives_the_numbers_of_one_that_was_not(inline: Run, inline_killed: Run) -> None:
    expected, found = (numbers(run.result.records(), by="bits") for run in (inline, inline_killed))
    assert len(found) == 3
    common = expected.keys() & found.keys()
    assert len(common) == 2
    assert {bits: found[bits] for bits in common} == {bits: expected[bits] for bits in common}


def test_a_trial_that_kills_its_process_again_and_again_has_failed_and_the_sweep_goes_on(inline_killed: Run) -> None:
    found = ends(inline_killed.result)
    assert found["4"] == ("failed", "its process died again and again; see the Ray logs")
    assert found["3"] == ("complete", None)


def test_a_trial_goes_on_when_a_rank_or_the_slot_of_its_group_is_killed(group_killed: Run) -> None:
    check_books(group_killed.result, 5)
    assert group_killed.killed.keys() == {1, 2}
    assert [ends(group_killed.result)[width] for width in "24"] == [("complete", None)] * 2
    before, after = pids(group_killed.diary, "2").values()
    assert before[0] == 1
    assert after[0] > 1
    assert after[-1] == EPOCHS
    assert list(pids(group_killed.diary, "4").values()) == [list(range(1, EPOCHS + 1))]  # the group outlives its slot


def test_a_trial_goes_on_when_the_train_run_of_its_group_dies(controller_killed: Run) -> None:
    check_books(controller_killed.result, 3)
    assert {status for status, _ in ends(controller_killed.result).values()} == {"complete"}
    before, after = pids(controller_killed.diary, "2").values()
    assert before[0] == 1
    assert after[0] > 1
    assert after[-1] == EPOCHS


def test_when_one_rank_fails_alone_the_trial_has_failed_and_the_group_is_restarted(group_killed: Run) -> None:
    found = ends(group_killed.result)
    assert found["3"] == ("failed", "ValueError: no 3 bits on rank 1")
    assert found["6"] == ("complete", None)
    assert not pids(group_killed.diary, "6").keys() & pids(group_killed.diary, "8").keys()


def test_a_group_that_was_killed_gives_the_numbers_of_one_that_was_not(group: Run, group_killed: Run) -> None:
    expected, found = (numbers(run.result.records(), by="bits") for run in (group, group_killed))
    assert len(found) == 4
    assert {bits: found[bits] for bits in found} == {bits: expected[bits] for bits in found}


def test_a_sweep_whose_trials_all_fail_says_so_with_exit_code_1(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["sweep", "--method", "tests.raysearch.fragile", "--space", "uniform", "--trials", "2"]
    for name, value in {**BASE, "method/raises": '"2345678"'}.items():
        arguments += ["--set", f"{name}={value}"]
    assert command(monkeypatch, *arguments, "--out", str(run)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: all 2 trials failed: ValueError: no 2 bits today; ValueError: no 8 bits today")
    assert [row["status"] for row in lines(run / "records.jsonl")] == ["failed"] * 2


DEAD = "http://127.0.0.1:9"
"""Nobody listens there."""
TRIALS = 9


@dataclass(frozen=True)
class Ended:
    """A driver that was stopped.

    Attributes:
        seconds: from the signal to its end.
        left: processes of its session some seconds after that.
        records: how many there were.
        open: trials without a record -> their last epoch.
    """

    code: int
    out: str
    err: str
    seconds: float
    left: dict[int, str]
    records: int
    open: dict[int, int]


@dataclass(frozen=True)
class Life:
    """One sweep in three drivers: interrupted, killed, left alone on a terminal."""

    result: Result
    diary: Path
    second: subprocess.CompletedProcess[str]
    interrupted: Ended
    killed: Ended
    code: int
    screen: str


def start(*arguments: str, **streams: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from raysearch.cli import main; main()", *arguments]
    return subprocess.Popen(command, text=True, start_new_session=True, cwd=ROOT, **streams)


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)


def open_trials(run: Path) -> dict[int, int]:
    ended = {row["trial"] for row in lines(run / "records.jsonl")}
    return {trial: epochs[-1] for trial, epochs in epochs_of(run).items() if trial not in ended}


def stopped(process: subprocess.Popen[str], run: Path, trials: int, how: Callable[[], None]) -> Ended:
    """Stop a driver when so many trials have ended and another one is under way."""
    wait_until(lambda: len(lines(run / "records.jsonl")) >= trials and open_trials(run), process)
    began = time.monotonic()
    how()
    code = process.wait(PATIENCE_S)
    seconds = time.monotonic() - began
    until = time.monotonic() + 5
    while processes(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    left, records, unfinished = processes(process.pid), len(lines(run / "records.jsonl")), open_trials(run)
    out, err = process.communicate(timeout=PATIENCE_S)
    return Ended(code, out, err, seconds, left, records, unfinished)


def on_a_terminal(*arguments: str) -> tuple[int, str]:
    """Exit code and everything that a command wrote on a terminal."""
    ours, theirs = os.openpty()
    process = start(*arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = b""
    while True:
        try:
            screen += os.read(ours, 65536)
        except OSError:  # all who could write have closed it
            break
    os.close(ours)
    return process.wait(PATIENCE_S), screen.decode()


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Each driver starts a Ray of its own; MLflow is away all the time."""
    folder = tmp_path_factory.mktemp("life")
    run = folder / "run"
    asked = question(TRIALS, FAILING, concurrent=2, mlflow_uri=DEAD)
    (folder / "sweep.json").write_text(json.dumps(asked.tree()))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        patch.setenv(DIARY, str(folder / "diary.jsonl"))
        first = start("sweep", "--from", str(folder / "sweep.json"), "--out", str(run), **pipes)
        wait_until((run / "sweep.json").exists, first)
        resume = [sys.executable, "-c", "from raysearch.cli import main; main()", "resume", str(run)]
        second = subprocess.run(resume, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S)
        interrupted = stopped(first, run, 2, lambda: os.killpg(first.pid, signal.SIGINT))
        third = start("resume", str(run), **pipes)
        killed = stopped(third, run, 4, third.kill)
        code, screen = on_a_terminal("resume", str(run))
    return Life(Result(run), folder / "diary.jsonl", second, interrupted, killed, code, screen)


def test_a_second_driver_is_turned_away_and_disturbs_nothing(life: Life) -> None:
    assert life.second.returncode == 2
    assert life.second.stdout == ""
    run = life.result.path
    assert life.second.stderr == f"error: {run} is being worked on by another driver: wait for it, or end it\n"


def test_ctrl_c_ends_a_sweep_soon_and_says_how_to_go_on(life: Life) -> None:
    ended = life.interrupted
    assert ended.code == 130
    assert ended.seconds < 30  # 7 on quiet cores
    assert ended.left == {}
    assert f"interrupted; everything is kept. Go on with: raysearch resume {life.result.path}\n" in ended.err
    assert ended.records >= 2
    assert ended.open


def test_only_our_own_lines_are_on_the_terminal_and_data_alone_on_stdout(life: Life) -> None:
    ours = rf"""{re.escape(str(life.result.path))}: {TRIALS} trials of .* \(2 parameters\)
|sampler frontier: 2 bit parameters, .*
|stopper none: .*
|trial \d+ (complete: accuracy .*|failed: ValueError: no 3 bits today .*|failed: DivergedError: loss is nan .*)
|interrupted; everything is kept\. .*
|"""
    for ended in (life.interrupted, life.killed):
        assert ended.out == ""
        assert [line for line in ended.err.splitlines() if not re.fullmatch(ours.replace("\n", ""), line)] == []


def test_after_an_interruption_and_a_kill_the_books_agree(life: Life) -> None:
    assert life.killed.code == -signal.SIGKILL
    assert life.killed.records >= 4
    assert life.code == 0
    check_books(life.result, TRIALS)
    failed = {row["trial"] for row in life.result.records() if row["status"] == "failed"}
    assert failed >= {3, 5}
    assert failed <= {3, 5, 7, 8}


def test_after_an_interruption_and_a_kill_the_numbers_are_those_of_an_undisturbed_sweep(
    life: Life, inline: Run
) -> None:
    rows, undisturbed = ([r for r in found.records() if r["trial"] < 7] for found in (life.result, inline.result))
    assert {row["digest"] for row in rows} == {row["digest"] for row in undisturbed}
    assert numbers(rows) == numbers(undisturbed)
    assert len(numbers(rows)) == 5


def test_a_terminal_shows_a_live_view_and_then_the_result(life: Life) -> None:
    assert "\x1b[1A" in life.screen  # drawn in place
    assert re.search(rf"\d/{TRIALS} done, \d running, 0 pruned, \d failed", life.screen)
    assert "on lenet5, digits" in life.screen
    assert re.search(r"\d+ points? on the front, hypervolume", life.screen)
    assert life.screen.rindex("run folder") > life.screen.rindex("running")
    assert "\x1b" not in life.interrupted.err


def test_what_a_dead_mlflow_missed_is_delivered_later(
    life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = life.result.path
    assert "MLflow misses a part" in life.screen
    assert f"raysearch mirror {run}" in life.screen.replace("\r\n", "")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert command(monkeypatch, "mirror", str(run), "--mlflow-uri", uri) == 0
    assert capsys.readouterr().out == f"MLflow has all {TRIALS} trials\n"
    client = MlflowClient(uri)
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id], "tags.`raysearch.kind` = 'trial'")
    assert {int(found.data.tags["raysearch.trial"]) for found in runs} == set(range(TRIALS))


def test_a_cluster_that_is_not_there_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    process = start("sweep", "--out", str(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: RAY_ADDRESS = 127.0.0.1:9: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
