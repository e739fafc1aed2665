"""What the authors' code of SAT does otherwise than here, for comparison: logits in evaluation, learning rates."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARMUP_EPOCHS = 5
USUAL_BATCH = 256


@torch.no_grad()
def evaluation_as_published(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the authors' code computes with in evaluation: a linear layer's are divided by its scale.

    Args:
        layer: a quantized layer of this method.
    """
    quantizer: Any = layer.weight_quantizer
    weight, bias = quantizer(layer.weight), layer.bias
    if isinstance(layer, nn.Conv2d):
        return weight, bias
    factor = quantizer.factor(layer.weight)
    return weight / factor, None if bias is None else bias / factor


def published_rates(
    schedule: str,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> list[float]:
    """Learning rate of every step in the authors' script (of every epoch for `multistep`), for comparison.

    Batches above 256 raise the rate in proportion, and the first five epochs go up to it from the rate as given. The
    platform has `cosine` and `steps` (`optimizer/schedule`); its rise starts at 0, and it has no `exponential`.

    Args:
        schedule: `cosine`, `exponential` (to e^-8) or `multistep` (times `gamma` at each milestone).
        lr: of batches of 256 or less.
        batch_size: examples of a step.
        epochs: of the training.
        steps_per_epoch: optimizer steps of one epoch.
        milestones: epochs, for `multistep`.
        gamma: for `multistep`.
    """
    if schedule == "multistep":
        return [lr * gamma ** sum(epoch >= milestone for milestone in milestones) for epoch in range(epochs)]
    large = batch_size > USUAL_BATCH
    warmup, steps = WARMUP_EPOCHS * steps_per_epoch if large else 0, epochs * steps_per_epoch
    start = USUAL_BATCH / batch_size if large else 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * step / warmup
        progress = (step - warmup) / (steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else math.exp(-8 * progress)

    return [lr / start * factor(step) for step in range(steps)]
