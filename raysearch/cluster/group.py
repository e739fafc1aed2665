"""A Ray Train worker group that outlives its trials.

A Train run costs 8 to 35 s to start; a trial may take less. So the driver starts one `TorchTrainer` run for each
concurrent trial, before anything else, and trial after trial is handed to its ranks through a mailbox, a small actor:

    Desk.post(job) -> Mailbox -> every rank trains it -> rank 0 reports each epoch -> Mailbox -> Desk.next_message

All ranks fetch jobs by number from the mailbox, so they need no collective between trials. When a rank dies, Train
restarts the group, and when the Train run itself dies, the driver starts another; the new ranks ask for the unfinished
job again and go on from its checkpoint. After `ATTEMPTS` starts of the same job the job has failed. A trial that raises
has failed. When all ranks raised in the same epoch, as they do when the loss diverges, the loop just goes on; when one
raised alone, the others may wait for it in a collective, and the group is restarted.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from raysearch.cluster.worker import Job, Message

ATTEMPTS = 3
WAIT_S = 20.0
BEAT_S = 5.0
"""Whoever waits for a message hears after so many seconds that there is none yet."""
TOGETHER_S = 3.0
"""How long a rank that raised waits for the others to raise too."""
COLLECTIVE_TIMEOUT_S = 1800
MEMORY_BYTES = 1_000_000
"""What each rank of the first group reserves; later groups one more each, which tells them apart."""
_group_numbers = itertools.count()


class Mailbox:
    """Jobs to the ranks, messages back; an async actor that lives as long as its slot.

    Args:
        ranks: how many there are.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._broken = ""
        self._failures: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self._job: Job | None = None
        self._number = 0
        self._open = True
        self._finished = True
        self._starts = 0
        self._messages: list[Message] = []
        self._asked = 0

    async def post(self, job: Job) -> None:
        """Hand over the next job; an unfinished one is dropped. The same job again, from a slot whose predecessor died,
        changes nothing: its messages are all still there.
        """
        async with self._changed:
            if job == self._job:
                return
            self._number += 1
            self._job, self._finished, self._starts, self._messages, self._failures = job, False, 0, [], {}
            self._asked = 0
            if self._broken:
                self._close_job(self._broken, 0)
            self._changed.notify_all()

    async def give_up(self, reason: str) -> None:
        """There will be no more ranks: this job and all later ones fail."""
        async with self._changed:
            self._broken = reason
            if not self._finished:
                self._close_job(reason, self._starts)

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
        """A message of rank 0; the answer says whether the job goes on. At a rung it comes when somebody asks for the
        next message, which is how a slot whose trial goes on says so, or when the job is no more.
        """

        def is_over() -> bool:
            return number != self._number or self._finished or not self._open

        async with self._changed:
            if number != self._number or self._finished:
                return False
            self._messages.append(message)
            self._finished = message["done"]
            self._changed.notify_all()
            told = len(self._messages)
            if message.get("rung"):
                await self._changed.wait_for(lambda: is_over() or self._asked >= told)
            return not is_over()

    async def drop(self) -> None:
        """The job is no more: its trial is paused."""
        async with self._changed:
            self._job, self._finished = None, True
            self._changed.notify_all()

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

    async def message(self, index: int) -> Message | None:
        """Message number `index` (from 0) of the current job; None when it did not come for a while."""
        async with self._changed:
            self._asked = max(self._asked, index)
            self._changed.notify_all()
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: len(self._messages) > index), BEAT_S)
            except TimeoutError:
                return None
            return self._messages[index]

    def _close_job(self, reason: str, starts: int) -> None:
        self._messages.append({"failed": reason, "done": True, "starts": starts})
        self._finished = True
        self._changed.notify_all()


class RankError(RuntimeError):
    """Raised out of the loop of a rank, so that Train restarts the group."""


def rank_loop(settings: dict[str, Any]) -> None:
    """What each rank runs until the slot ends: job after job."""
    import torch

    from raysearch.cluster.worker import prepare_process
    from trainables import world

    prepare_process(settings["cpus"])
    mailbox, rank = settings["mailbox"], world.rank()
    done = 0
    with contextlib.suppress(ray.exceptions.RayActorError):  # the driver has ended the group in the middle of a job
        while True:
            word, number, job = ray.get(mailbox.next_job.remote(done, rank))
            if word == "end":
                return
            if word == "job":
                _train(mailbox, number, job, rank, torch.device(job["device"]))
            done = number


def _train(mailbox: Any, number: int, job: Job, rank: int, device: Any) -> None:
    import torch

    from raysearch.cluster.worker import messages
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
    """One worker group, from the side of the driver.

    Args:
        workers: number of ranks.
        cpus: CPU cores of each.
        gpus: GPUs of each; 0 trains on CPUs.
        storage: folder for Ray Train's own files.
        name: of the group's mailbox, unique in the cluster.
    """

    def __init__(self, workers: int, *, cpus: int, gpus: float, storage: str, name: str) -> None:
        # Imported here, because it imports torch, and the processes of slots and mailboxes can do without.
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        options = {"num_cpus": 0, "name": name, "max_concurrency": 4 * workers + 16}
        self._mailbox: Any = ray.remote(Mailbox).options(**options).remote(workers)
        self._closing = False
        self._memory = MEMORY_BYTES + next(_group_numbers)
        resources = {"CPU": cpus, "memory": self._memory, **({"GPU": gpus} if gpus else {})}

        def trainer() -> Any:
            return TorchTrainer(
                rank_loop,
                train_loop_config={"mailbox": self._mailbox, "cpus": cpus},
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources),
                torch_config=TorchConfig(
                    backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
                ),
                run_config=RunConfig(
                    name=f"{name}-{time.time_ns()}",
                    storage_path=storage,
                    failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),  # type: ignore[call-arg]
                ),
            )

        self._thread = threading.Thread(target=self._fit, args=[trainer], daemon=True, name=f"train-run-{name}")
        self._thread.start()

    def _fit(self, trainer: Callable[[], Any]) -> None:
        reason = ""
        for _ in range(ATTEMPTS):
            if self._closing:
                return
            try:
                trainer().fit()
                return
            except Exception as error:  # told to the trials, which fail with it
                reason = f"the Ray Train run has ended: {error}"
                self._free_places()
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(self._mailbox.give_up.remote(reason))

    def _free_places(self) -> None:
        """Remove what a dead Train controller has reserved; Train's own helper for that needs Ray's dashboard."""
        job = ray.get_runtime_context().get_job_id()
        for identifier, place in ray.util.placement_group_table().items():
            # An identifier ends in that of its job; groups of one job differ in the memory they reserve.
            mine = identifier.endswith(job) and all(b.get("memory") == self._memory for b in place["bundles"].values())
            if mine and place["state"] != "REMOVED":
                ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identifier))))

    def end(self) -> None:
        """Let the ranks end, and with them the Train run, when they have finished or reported an epoch."""
        self._closing = True
        self._mailbox.close.remote()

    def close(self, wait_s: float) -> None:
        """End as `end` does, and wait; what is still busy after `wait_s` finds nobody to report to and ends."""
        self.end()
        self._thread.join(timeout=wait_s)
        ray.kill(self._mailbox)


def drop_job(name: str) -> None:
    """Let a group's job be, whose trial is paused.

    Args:
        name: of the group's mailbox.
    """
    ray.get(ray.get_actor(name).drop.remote())


class Desk:
    """One worker group, from the side of whoever hands it jobs.

    Args:
        name: of the group's mailbox.
    """

    def __init__(self, name: str) -> None:
        self._mailbox = ray.get_actor(name)
        self._read = 0

    def post(self, job: Job) -> None:
        """Hand the group its next job."""
        ray.get(self._mailbox.post.remote(job))
        self._read = 0

    def next_message(self) -> Message | None:
        """The next message of the current job; None when it did not come for a while."""
        message: Any = ray.get(self._mailbox.message.remote(self._read))
        if message is None:
            return None
        self._read += 1
        return dict(message)
