"""Slots: the Tune trainables that trials run through, one after the other, without starting a process for each.

`InlineSlot` trains in its own process: one worker, the cheapest. `GroupSlot` hands trials to a Ray Train worker group
that outlives them and itself (`group`). Both take the next trial in `reset_config`, so Tune reuses their actors.

A step ends with an epoch, or without one after `BEAT_S`: a slot that has nothing to say says that it lives. `Watchdog`
kills one that says nothing at all, and Tune replaces it.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray import tune

from raysearch.cluster.group import BEAT_S, Desk
from raysearch.cluster.worker import Message, messages, prepare_process


def _result(message: Message | None, slot: Any) -> dict[str, Any]:
    """A Tune result; the message travels as text, because Tune flattens what is nested. None is a sign of life."""
    if message is None:
        return {"message": None, "done": False}
    return {"message": json.dumps(message | {"slot": slot}), "done": message["done"]}


class InlineSlot(tune.Trainable):
    """Trains trial after trial in this process; a Tune step is an epoch, or a part of one."""

    _messages: Iterator[Message]
    _next: Future[Message] | None

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the process and take the first trial."""
        # One thread for all trials: the number of cores that it computes with is a setting of its own.
        self._thread = ThreadPoolExecutor(1, initializer=prepare_process, initargs=(config["cpus"],))
        self._messages, self._next = messages(config["job"]), None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Drop what is left of the last trial and take the next one."""
        self.cleanup()
        self._messages, self._next = messages(new_config["job"]), None
        return True

    def step(self) -> dict[str, Any]:
        """One epoch, or a sign of life."""
        self._next = self._next or self._thread.submit(next, self._messages)
        try:
            message = self._next.result(BEAT_S)
        except TimeoutError:
            return _result(None, None)
        self._next = None
        return _result(message, os.getpid())

    def cleanup(self) -> None:
        """Drop what is left of the last trial, behind the epoch that is under way."""
        self._thread.submit(self._messages.close)  # type: ignore[attr-defined]


class GroupSlot(tune.Trainable):
    """Hands trials to the worker group that each names; a Tune step is an epoch, or a part of one."""

    _desk: Desk

    def setup(self, config: dict[str, Any]) -> None:
        """Hand over the first trial."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Hand over the next trial; one that the group still works on is stopped at its next epoch."""
        self._desk = Desk(new_config["group"])
        self._desk.post(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        """The next epoch, or a sign of life."""
        return _result(self._desk.next_message(), f"{os.getpid()}-{threading.get_native_id()}")


WATCHED = ("RUNNING", "PENDING")
"""A pending trial that has a slot is being handed to it, which may hang as well as in training."""


class Watchdog(tune.Callback):
    """Kills a slot's process that has been silent for too long; its trial goes on in another one.

    Args:
        limit_s: how long a slot may be silent, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._heard: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has been handed to a slot."""
        self._heard[trial.trial_id] = time.monotonic()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """A sign of life."""
        self._heard[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at the clock; Tune calls this all the time."""
        for trial in trials:
            slot = trial.temporary_state.ray_actor
            if slot is None or trial.status not in WATCHED:
                continue
            if time.monotonic() - self._heard.setdefault(trial.trial_id, time.monotonic()) > self._limit_s:
                del self._heard[trial.trial_id]
                ray.kill(slot)
