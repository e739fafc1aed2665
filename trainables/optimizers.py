"""The optimizers of one trial: parameter groups of a method, each with its kind, rate and schedule.

A method says in `groups` how its parameters are trained. The keys of a group, all but `params` optional:

| key | what | default |
|---|---|---|
| `params` | the parameters | |
| `lr_factor` | times `optimizer/lr` | 1 |
| `lr` | peak learning rate, in place of the configuration's | `optimizer/lr` x `lr_factor` |
| `optimizer` | `sgd`, `adam`, `adamw`, or a subclass of `torch.optim.Optimizer` made of groups | `optimizer/name` |
| `schedule` | `cosine`, `linear`, `steps`, `constant` | `optimizer/schedule` |
| others | for the optimizer as they are: `weight_decay`, `momentum`, `nesterov` | the configuration's |
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from trainables.config import Optimizer

STEP_FACTOR = 0.1
"""What each milestone of the schedule `steps` multiplies the learning rate by."""


class Optimizers:
    """One torch optimizer for each kind that the groups ask for, stepped together.

    Args:
        groups: parameter groups; see the module's table.
        settings: what the configuration says; a group's own keys go before it.
        lr_factor: times every peak rate, also those that groups give themselves.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], settings: Optimizer, *, lr_factor: float = 1.0) -> None:
        self.settings = settings
        kinds: dict[Any, list[dict[str, Any]]] = {}
        for given in groups:
            group = dict(given)
            kind = group.pop("optimizer", settings.name)
            rate = group.pop("lr", settings.lr) * group.pop("lr_factor", 1.0) * lr_factor
            group |= {"lr": rate, "initial_lr": rate, "schedule": group.get("schedule", settings.schedule)}
            kinds.setdefault(kind, []).append(group)
        self.parts = [_make(kind, groups, settings) for kind, groups in kinds.items()]

    @property
    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of all kinds."""
        for part in self.parts:
            yield from part.param_groups

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are trained, in a fixed order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def set_rates(self, step: int, steps: int) -> None:
        """Set the learning rates of step number `step` (from 0) of `steps`."""
        for group in self.groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(self.settings, group["schedule"], step, steps)


def _make(kind: Any, groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer:
    decay = settings.weight_decay
    if isinstance(kind, type):
        made: torch.optim.Optimizer = kind([{"momentum": settings.momentum, "weight_decay": decay} | g for g in groups])
        return made
    if kind == "sgd":
        return torch.optim.SGD(
            groups, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=decay, fused=True
        )
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    beta1 = settings.momentum if settings.name != "sgd" else 0.9
    return adam(groups, betas=(beta1, 0.999), weight_decay=decay, fused=True)


def learning_rate_factor(settings: Optimizer, schedule: str, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by at `step` of `steps`: a linear rise, a hold, then the decay."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "steps":
        return STEP_FACTOR ** sum(step >= round(share * steps) for share in settings.milestones)
    held = max(warmup, round(settings.hold * steps))
    progress = max(0, step - held) / max(1, steps - held)
    return {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[schedule]
