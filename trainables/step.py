"""One training step: the losses of a method, alone or on several ranks, in one piece or in several.

Gradient accumulation (`parts` > 1) cuts a rank's share of the batch and adds up the gradients. A part is to a step what
a rank is: gradients are those of the mean over the whole batch, whatever the sizes of the shares; all draw the same
random numbers; a method that steps after each of its losses gets each loss of all parts before it steps. Only what is
computed from a batch as a whole differs: the statistics of batch norm, BSQ's ranges, and traces are those of a part.
"""

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor, nn

from trainables import world
from trainables.method import Method
from trainables.optimizers import Optimizers


def training_step(
    method: Method,
    model: nn.Module,
    forward: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizers: Optimizers,
    *,
    batch: int | None = None,
    parts: int = 1,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """One training step, or one for each loss if the method says so; the sum of its losses, detached.

    Args:
        method: of the trial.
        model: what is trained.
        forward: `model`, or its compiled twin.
        images, labels: this rank's share of the batch.
        optimizers: of the trial.
        batch: examples of the whole batch; None: as many on every rank as here.
        parts: in how many pieces the share goes through the network.
        precision: of matrix products and convolutions; bfloat16 needs a model of `use_bfloat16`.
    """

    def update() -> None:
        world.average(p.grad for p in optimizers.parameters() if p.grad is not None)
        method.before_step(model)
        optimizers.step()
        method.after_step(model)

    batch = batch or len(images) * world.size()
    total = torch.zeros((), device=images.device)
    optimizers.zero_grad()
    for loss, examples, last in _losses(method, forward, images, labels, batch, parts, precision):
        if examples * world.size() != batch:
            loss = loss * (examples * world.size() / batch)
        loss.backward()
        total += loss.detach()
        if last and method.step_each_loss:
            update()
            optimizers.zero_grad()
    if not method.step_each_loss:
        update()
    return total


def _losses(
    method: Method, forward: nn.Module, images: Tensor, labels: Tensor, batch: int, parts: int, precision: torch.dtype
) -> Iterator[tuple[Tensor, int, bool]]:
    """Each loss of each part, how many examples it is of, and whether it is the last part's."""
    pieces = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
    passes = [method.losses(forward, *piece) for piece in pieces]
    sizes, last = [len(piece[0]) for piece in pieces], len(pieces) - 1
    states: list[list[Tensor]] = []  # of the random numbers, before each loss of the first part

    def advance(part: int, turn: int) -> Tensor | None:
        if last and not part:
            states.append(_random_state(images.device))
        elif last:
            _set_random_state(images.device, states[turn])
        mixed = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)
        with world.seeing(sizes[part] / batch), mixed:
            return next(passes[part], None)

    if method.step_each_loss:
        for turn in count():
            for part, size in enumerate(sizes):
                loss = advance(part, turn)
                if loss is None:
                    return
                yield loss, size, part == last
    for part, size in enumerate(sizes):
        for turn in count():
            loss = advance(part, turn)
            if loss is None:
                break
            yield loss, size, part == last


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
