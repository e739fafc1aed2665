"""A Ray Train worker group that outlives its trials.

A Train run costs 8 to 35 s to start; a trial may take less. So one `TorchTrainer` run is kept for each slot, and
trial after trial is handed to its ranks through a mailbox, a small actor:

    Group.post(job) -> Mailbox -> every rank trains it -> rank 0 reports each epoch -> Mailbox -> Group.next_message

All ranks fetch jobs by number from the mailbox, so they need no collective between trials. When a rank dies, Train
restarts the group, which asks for the unfinished job again and goes on from its checkpoint; after `ATTEMPTS` deaths at
the same job the job has failed. A trial that raises has failed. When all ranks raised in the same epoch, as they do
when the loss diverges, the loop just goes on; when one raised alone, the others may wait for it in a collective, and
the group is restarted.
"""

import asyncio
import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import ray

from raysearch.errors import TrialError
from raysearch.worker import Job, Message

ATTEMPTS = 3
WAIT_S = 20.0
TOGETHER_S = 3.0
"""How long a rank that raised waits for the others to raise too."""
COLLECTIVE_TIMEOUT_S = 1800


class Mailbox:
    """Jobs to the ranks, messages back; an async actor that lives as long as its slot.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._failures: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self._job: Job | None = None
        self._number = 0
        self._open = True
        self._finished = True
        self._starts = 0
        self._messages: list[Message] = []

    async def post(self, job: Job) -> None:
        """Hand over the next job; an unfinished one is dropped."""
        async with self._changed:
            self._number += 1
            self._job, self._finished, self._starts, self._messages, self._failures = job, False, 0, [], {}
            self._changed.notify_all()

    async def close(self) -> None:
        """Let the ranks end."""
        async with self._changed:
            self._open = False
            self._changed.notify_all()

    async def next_job(self, after: int, rank: int) -> tuple[str, int, Job | None]:
        """`job` behind number `after`, `end`, or `wait` when nothing happened for a while."""
        async with self._changed:
            try:
                ready = self._changed.wait_for(lambda: not self._open or (self._number > after and not self._finished))
                await asyncio.wait_for(ready, WAIT_S)
            except TimeoutError:
                return "wait", after, None
            if not self._open:
                return "end", after, None
            if rank == 0:
                self._starts += 1
                self._failures = {}
                if self._starts > ATTEMPTS:
                    self._close_job(f"its workers died {ATTEMPTS} times", self._starts)
                    return "wait", self._number, None
            return "job", self._number, self._job

    async def report(self, number: int, message: Message) -> bool:
        """A message of rank 0; the answer says whether the job goes on."""
        async with self._changed:
            if number != self._number or self._finished:
                return False
            self._messages.append(message)
            self._finished = message["done"]
            self._changed.notify_all()
            return self._open and not self._finished

    async def fail(self, number: int, rank: int, epoch: int, reason: str) -> bool:
        """A rank raised in an epoch: the job has failed. The answer says whether all ranks raised there."""
        async with self._changed:
            if number != self._number or self._finished:
                return False
            failures = self._failures
            failures[rank] = epoch
            self._changed.notify_all()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: len(failures) == self._ranks), TOGETHER_S)
            if number == self._number and not self._finished:
                self._close_job(reason, self._starts)
            return len(failures) == self._ranks and len(set(failures.values())) == 1

    async def next_message(self) -> Message | None:
        """The next message of the current job; None when there was none for a while."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: bool(self._messages)), WAIT_S)
            except TimeoutError:
                return None
            return self._messages.pop(0)

    def _close_job(self, reason: str, starts: int) -> None:
        self._messages.append({"failed": reason, "done": True, "starts": starts})
        self._finished = True
        self._changed.notify_all()


class RankError(RuntimeError):
    """Raised out of the loop of a rank, so that Train restarts the group."""


def rank_loop(settings: dict[str, Any]) -> None:
    """What each rank runs until the slot ends: job after job."""
    import torch

    from raysearch.worker import prepare_process
    from trainables import world

    prepare_process(settings["cpus"])
    mailbox, rank = settings["mailbox"], world.rank()
    done = 0
    while True:
        word, number, job = ray.get(mailbox.next_job.remote(done, rank))
        if word == "end":
            return
        if word == "job":
            _train(mailbox, number, job, rank, torch.device(job["device"]))
        done = number


def _train(mailbox: Any, number: int, job: Job, rank: int, device: Any) -> None:
    import torch

    from raysearch.worker import messages
    from trainables import world

    for epoch, message in enumerate(messages(job)):
        if "failed" in message and world.size() > 1:
            reason = message["failed"]
            if not _says_peer_died(reason) and ray.get(mailbox.fail.remote(number, rank, epoch, reason)):
                return
            raise RankError(reason)
        goes_on = torch.zeros((), device=device)
        if rank == 0:
            goes_on += ray.get(mailbox.report.remote(number, message))
        if world.size() > 1:
            torch.distributed.broadcast(goes_on, src=0)
        if not goes_on:
            return


def _says_peer_died(reason: str) -> bool:
    """Whether a rank failed because a collective lost another rank: then the job is not to blame and goes on."""
    return any(sign in reason for sign in ("gloo", "Gloo", "NCCL", "DistBackendError", "DistNetworkError"))


class Group:
    """One worker group, from the side of its slot.

    Args:
        workers: number of ranks.
        cpus: CPU cores of each.
        gpus: GPUs of each; 0 trains on CPUs.
        storage: folder for Ray Train's own files.
        name: of the Train run, unique among the sweep's slots.
    """

    def __init__(self, workers: int, *, cpus: int, gpus: float, storage: str, name: str) -> None:
        # Imported here, because they import torch, and the mailbox's process can do without.
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        self._mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, max_concurrency=4 * workers + 16).remote(workers)
        self._error: BaseException | None = None
        resources = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        self._trainer = TorchTrainer(
            rank_loop,
            train_loop_config={"mailbox": self._mailbox, "cpus": cpus},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources),
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
            run_config=RunConfig(
                name=f"group-{name}-{time.time_ns()}",
                storage_path=str(Path(storage)),
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),  # type: ignore[call-arg]
            ),
        )
        self._thread = threading.Thread(target=self._fit, daemon=True, name="train-run")
        self._thread.start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # handed to the slot, which raises it in its next step
            self._error = error

    def post(self, job: Job) -> None:
        """Hand the group its next job."""
        ray.get(self._mailbox.post.remote(job))

    def next_message(self) -> Message:
        """Wait for the next message of the current job.

        Raises:
            TrialError: the Train run has ended.
        """
        while True:
            message: Message | None = ray.get(self._mailbox.next_message.remote())
            if message is not None:
                return message
            if not self._thread.is_alive():
                raise TrialError(f"the Ray Train run of this slot has ended: {self._error}")

    def close(self) -> None:
        """End the loop of the ranks and the Train run."""
        ray.get(self._mailbox.close.remote())
        self._thread.join(timeout=30)
        ray.kill(self._mailbox)
