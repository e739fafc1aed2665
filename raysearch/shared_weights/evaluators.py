"""Ray workers that keep a supernet's weights and images in memory, and measure mixtures of widths.

A worker is an actor of one thread. A batch of mixtures is sorted by their widths, layer after layer, and each worker
gets a stretch of it, so that what neighbours share is computed once. Which worker measures what changes no number.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysearch.errors import TrialError

SUPERNET = "supernet.safetensors"
"""File of a run folder that holds the weights."""
Mixture = dict[str, list[int]]
Outcome = tuple[float, float]
RETRIES = 3
"""How often a worker that dies is replaced, and its mixtures are measured again."""


class Evaluator:
    """A worker: everything is loaded once.

    Args:
        path: of the supernet.
        data_root: where its data set lies.
        threads: CPU threads.
        options: of `trainables.supernet.Supernet`.
    """

    def __init__(self, path: str, data_root: str | None, threads: int, device: str, options: dict[str, Any]) -> None:
        import torch

        from trainables.supernet import Supernet, opened

        torch.set_num_threads(threads)
        session = opened(Path(path), data_root=None if data_root is None else Path(data_root), device=device)
        self._net = Supernet(session, **options)

    def ready(self) -> bool:
        """Whether everything is loaded: it is, when this answers."""
        return True

    def measure(self, mixtures: list[Mixture]) -> list[Outcome]:
        """Accuracy and loss of each."""
        return [(each.accuracy, each.loss) for each in self._net.measure(mixtures)]


class Workers:
    """Evaluators on Ray.

    Args:
        count: how many.
        gpus: of each; 0 takes a CPU core.
        arguments: of `Evaluator`, after which come threads and device.
        options: of `trainables.supernet.Supernet`.
    """

    def __init__(self, count: int, gpus: float, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        import ray

        self.count = count
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(Evaluator)
        device = "cuda" if gpus else "cpu"
        self._actors: list[Any] = [actor.remote(*arguments, 1, device, options) for _ in range(count)]

    def wait(self) -> None:
        """Until all workers have loaded the network and its images.

        Raises:
            TrialError: one of them cannot.
        """
        import ray

        try:
            ray.get([actor.ready.remote() for actor in self._actors])
        except ray.exceptions.RayError as error:
            raise TrialError(f"a worker cannot load the supernet: {str(error).strip().splitlines()[-1]}") from error

    def submit(self, mixtures: Sequence[Mixture]) -> list[tuple[list[int], Any]]:
        """Begin to measure; `collect` waits for it."""
        order = sorted(range(len(mixtures)), key=lambda i: [(pair[1], pair[0]) for pair in mixtures[i].values()])
        share = -(-len(order) // self.count) or 1
        stretches = [order[first : first + share] for first in range(0, len(order), share)]
        return [
            (places, actor.measure.remote([mixtures[i] for i in places]))
            for places, actor in zip(stretches, self._actors, strict=False)
        ]

    def collect(self, begun: list[tuple[list[int], Any]]) -> list[Outcome]:
        """Accuracy and loss in the order in which the mixtures were submitted.

        Raises:
            TrialError: a worker failed, or died again and again.
        """
        import ray

        found: dict[int, Outcome] = {}
        try:
            for places, answer in begun:
                found.update(zip(places, ray.get(answer), strict=True))
        except ray.exceptions.RayError as error:
            raise TrialError(f"an evaluation failed: {str(error).strip().splitlines()[-1]}") from error
        return [found[i] for i in range(len(found))]

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
