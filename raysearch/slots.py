"""Slots: the Tune trainables that trials run through, one after the other, without starting a process for each.

`InlineSlot` trains in its own process: one worker, the cheapest. `GroupSlot` hands trials to a Ray Train worker group
that outlives them and itself (`group`). Both take the next trial in `reset_config`, so Tune reuses their actors.
"""

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

from ray import tune

from raysearch.group import Desk
from raysearch.worker import Message, messages, prepare_process


def _result(message: Message) -> dict[str, Any]:
    """A Tune result; the message travels as text, because Tune flattens what is nested."""
    return {"message": json.dumps(message), "done": message["done"]}


class InlineSlot(tune.Trainable):
    """Trains trial after trial in this process; a Tune step is an epoch."""

    _messages: Iterator[Message]

    def setup(self, config: dict[str, Any]) -> None:
        """Prepare the process and take the first trial."""
        prepare_process(config["cpus"])
        self._messages = messages(config["job"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Drop what is left of the last trial and take the next one."""
        self._messages.close()  # type: ignore[attr-defined]
        self._messages = messages(new_config["job"])
        return True

    def step(self) -> dict[str, Any]:
        """One epoch."""
        message = next(self._messages)
        message["slot"] = os.getpid()
        return _result(message)

    def cleanup(self) -> None:
        """Drop what is left of the last trial."""
        self._messages.close()  # type: ignore[attr-defined]


class GroupSlot(tune.Trainable):
    """Hands trials to the worker group that each names; a Tune step is an epoch."""

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
        """Wait for the next epoch."""
        message = self._desk.next_message()
        message["slot"] = f"{os.getpid()}-{threading.get_native_id()}"
        return _result(message)
