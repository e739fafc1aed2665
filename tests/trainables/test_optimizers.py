"""Parameter groups become torch optimizers, each with its kind, its rate and its schedule."""

import itertools

import pytest
import torch
from torch import nn

from trainables.config import Optimizer
from trainables.optimizers import Optimizers, learning_rate_factor


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5]),
        ({"schedule": "linear", "hold": 0.5}, [1, 1, 1, 0.5]),
        ({"schedule": "steps", "milestones": (0.5, 0.75)}, [1, 1, 0.1, 0.01]),
        ({"schedule": "steps", "milestones": (0.25,), "warmup": 0.25}, [0.5, 0.1, 0.1, 0.1]),
    ],
)
def test_the_learning_rate_follows_its_schedule(settings, factors):
    optimizer = Optimizer(**settings)
    assert [learning_rate_factor(optimizer, optimizer.schedule, step, 4) for step in range(4)] == pytest.approx(factors)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("hold", [0.0, 0.5])
def test_warmup_rises_to_the_peak_and_then_only_falls(schedule, hold):
    settings = Optimizer(warmup=0.25, hold=hold)
    factors = [learning_rate_factor(settings, schedule, step, 40) for step in range(40)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10] == 1
    assert all(a >= b > 0 for a, b in itertools.pairwise(factors[10:]))


def test_each_group_has_its_kind_rate_and_schedule():
    first, second, third, fourth = parameters(4)
    groups = [
        {"params": [first]},
        {"params": [second], "lr_factor": 0.5, "weight_decay": 0.0},
        {"params": [third], "optimizer": "adam", "lr": 0.001, "schedule": "constant"},
        {"params": [fourth], "optimizer": torch.optim.Rprop},
    ]
    made = Optimizers(groups, Optimizer(lr=0.1, schedule="linear", weight_decay=0.01, nesterov=True))
    made.set_rates(step=1, steps=2)
    assert [type(part).__name__ for part in made.parts] == ["SGD", "Adam", "Rprop"]
    assert [group["lr"] for group in made.groups] == pytest.approx([0.05, 0.025, 0.001, 0.05])
    assert [group.get("weight_decay") for group in made.groups] == [0.01, 0.0, 0.01, 0.01]
    assert [group.get("nesterov") for group in made.groups][:2] == [True, True]
    assert [id(p) for p in made.parameters()] == [id(p) for p in (first, second, third, fourth)]


def test_a_step_moves_the_parameters_of_every_kind_and_gradients_are_forgotten():
    first, second = parameters(2)
    made = Optimizers([{"params": [first]}, {"params": [second], "optimizer": "adamw"}], Optimizer())
    (first.sum() + second.sum()).backward()
    made.step()
    assert (first < 1).all()
    assert (second < 1).all()
    made.zero_grad()
    assert first.grad is None
    assert second.grad is None


def test_the_factor_multiplies_every_rate():
    groups = [{"params": parameters(1)}, {"params": parameters(1), "lr": 0.001}]
    made = Optimizers(groups, Optimizer(lr=0.1), lr_factor=0.1)
    assert [group["initial_lr"] for group in made.groups] == pytest.approx([0.01, 0.0001])
