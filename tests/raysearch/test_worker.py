"""What runs where the training runs: messages of real trainings, and nothing left when the next trial begins."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raysearch.cluster.worker import Message, make_job, messages, prepare_process
from raysearch.records import RunFolder
from raysearch.resolve import trial_config
from tests.raysearch.builders import SMALL, job, small_sweep
from trainables import checkpoint
from trainables.config import merged
from trainables.fit import Report


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def tree(**changes: Any) -> dict[str, Any]:
    """A configuration that trains for two epochs in some hundredths of a second."""
    return merged(
        trial_config(small_sweep(settings=SMALL)).tree(), {k.replace("__", "/"): v for k, v in changes.items()}
    )


def say(folder: RunFolder, number: int = 0, **changes: Any) -> list[Message]:
    return list(messages(job(folder, number, tree(**changes))))


def test_a_trial_says_each_epoch_and_is_done_with_the_last(folder: RunFolder) -> None:
    said = say(folder, training__epochs=3)
    assert [message["report"]["epoch"] for message in said] == [1, 2, 3]
    assert [message["done"] for message in said] == [False, False, True]
    assert all(message["began_at"] <= message["reported_at"] for message in said)
    report = Report.from_json(said[-1]["report"])
    assert report.points[0].bits["conv2"] == [4, 4]
    assert 0 <= report.points[0].accuracy <= 1


def test_messages_survive_json(folder: RunFolder) -> None:
    said = say(folder)
    assert json.loads(json.dumps(said)) == said


def test_a_job_is_json_and_knows_where_things_lie(folder: RunFolder) -> None:
    made = make_job(7, {"seed": 0}, folder.trial(7), folder.starts, "/data", "cuda")
    assert json.loads(json.dumps(made)) == made
    assert (made["folder"], made["starts"]) == (str(folder.path / "trials/00007"), str(folder.path / "starts"))


def test_a_trial_leaves_its_checkpoint_and_a_repeated_job_goes_on_from_it(folder: RunFolder) -> None:
    whole = say(folder, 0)
    running: Any = messages(job(folder, 1, tree()))
    first = next(running)
    running.close()
    rest = say(folder, 1)
    assert (folder.trial(1) / checkpoint.FILE).is_file()
    assert rest[0]["report"] == first["report"]
    assert [message["report"]["points"] for message in rest] == [message["report"]["points"] for message in whole]


def test_the_same_job_gives_the_same_numbers_whatever_ran_before(folder: RunFolder) -> None:
    first = say(folder, 0)
    say(folder, 1, seed=9, optimizer__lr=0.5)
    torch.rand(17)
    again = say(folder, 2)
    assert [m["report"]["points"] for m in first] == [m["report"]["points"] for m in again]
    assert [m["report"]["train_loss"] for m in first] == [m["report"]["train_loss"] for m in again]


FAULTS = [
    ({"optimizer__lr": -1}, "ConfigError: optimizer/lr = -1: input should be greater than 0"),
    ({"method__name": "lqs"}, "PluginError: unknown method 'lqs'; did you mean 'lsq'?"),
    ({"start__checkpoint": "/no/such/file"}, "ConfigError: start/checkpoint = /no/such/file: no such file"),
    ({"bits__conv9__weight": 2}, "ConfigError: bits/conv9: model 'lenet5' has no such layer"),
    (
        {"method": {"name": "float"}, "optimizer__lr": 100, "optimizer__weight_decay": 1, "training__epochs": 4},
        "DivergedError: loss is nan after epoch ",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), FAULTS, ids=[reason for _, reason in FAULTS])
def test_whatever_a_trial_does_wrong_is_its_last_message_and_the_next_trial_runs(
    folder: RunFolder, changes: dict[str, Any], reason: str
) -> None:
    *_, last = say(folder, 0, **changes)
    assert last["done"] is True
    assert last["failed"].startswith(reason)
    assert "report" not in last
    text = (folder.trial(0) / "error.txt").read_text(encoding="utf-8")
    assert text.startswith("Traceback (most recent call last)")
    assert last["failed"] in text.replace("trainables.errors.", "")
    assert [message["done"] for message in say(folder, 1)] == [False, True]
    assert not (folder.trial(1) / "error.txt").exists()


def test_a_job_that_is_tried_again_and_ends_well_leaves_no_old_traceback(folder: RunFolder) -> None:
    say(folder, 0, optimizer__lr=-1)
    assert (folder.trial(0) / "error.txt").exists()
    say(folder, 0)
    assert not (folder.trial(0) / "error.txt").exists()


def test_trials_of_a_sweep_share_one_float_start(folder: RunFolder) -> None:
    say(folder, 0, start__epochs=1)
    (start,) = folder.starts.glob("*.safetensors")
    trained_at = start.stat().st_mtime_ns
    say(folder, 1, start__epochs=1, bits__conv2__weight=2)
    assert [path.stat().st_mtime_ns for path in folder.starts.glob("*.safetensors")] == [trained_at]


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def test_nothing_of_a_trial_is_left_when_the_next_one_begins(folder: RunFolder) -> None:
    say(folder, 0)
    after_one = live_tensors()
    say(folder, 1)
    say(folder, 2, optimizer__lr=-1)
    say(folder, 3, method__name="pact")
    dropped: Any = messages(job(folder, 4, tree()))
    next(dropped)
    dropped.close()
    del dropped
    assert live_tensors() == after_one


def test_a_prepared_process_has_the_threads_it_was_given() -> None:
    gc.unfreeze()
    prepare_process(2)
    assert torch.get_num_threads() == 2
    assert gc.get_freeze_count() > 0
    gc.unfreeze()
    torch.set_num_threads(1)
