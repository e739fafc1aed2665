"""One contract of all methods: two ranks with half the batch each make the steps of one rank with all of it.

In float64, where a sum in another order flips no rounding within a few steps, so that the tolerance is tight. Batches
are shared evenly and unevenly; the networks have batch norm and have none.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.trainables.ranks import on_two_ranks
from trainables import modules, plugins, world
from trainables.config import TrialConfig, merged, parse
from trainables.fit import Session, fit
from trainables.splits import Split
from trainables.step import training_step

METHODS = list(plugins.describe("trainables.methods"))
STEPS = 2
BASE: dict[str, Any] = {
    "data": {"name": "digits", "train_limit": 99, "validation_limit": 60, "augment": "crop"},
    "optimizer": {"lr": 0.01},
    "training": {"epochs": 2, "batch_size": 32},
    "seed": 1,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "lenet5": {"name": "lenet5", "width": 0.25},
    "resnet20": {"name": "resnet20", "depth": 8, "width": 4},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{method: (method, {}) for method in METHODS},
    "lsq per channel": ("lsq", {"per_channel": True}),
    "bayesian_bits folded": ("bayesian_bits", {"batch_norm": "folded"}),
    "double_rounding scaled": ("double_rounding", {"alrs": "scaled"}),
    "double_rounding mixed": ("double_rounding", {"precision": "mixed", "probes": 2}),
}
CASES = [
    f"{variant}, {network}, {size}"
    for variant, (_, settings) in VARIANTS.items()
    for network, size in (("lenet5", 32), ("resnet20", 33))
    if not (network == "lenet5" and "batch_norm" in settings)
]


def configured(case: str, **values: Any) -> TrialConfig:
    variant, network, size = case.split(", ")
    method, settings = VARIANTS[variant]
    if method == "double_rounding":
        # Elements on the edge of a range have the gradient that rounding errors give them. By default one starts there,
        # and with few bits sums of a few integers are often just 0.
        settings = settings | {"init": "lsq", "widths": "8,6"}
    tree = {**BASE, "method": {"name": method, **settings}, "model": NETWORKS[network]}
    return parse(merged(tree, {"training/batch_size": int(size), **values}))


class DoubleSplit:
    """A split whose images are float64."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, batch_size: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.split.batches(batch_size, **options):
            yield images.double(), labels


def course(config: TrialConfig) -> dict[str, Tensor]:
    """Losses and gradients of the first steps, and what they lead to: parameters, statistics and quantized weights."""
    session = Session(config)
    model = session.model.double().train()
    session.data = replace(session.data, train=DoubleSplit(session.data.train))
    session.calibrate()
    optimizers = session.optimizers()
    found: dict[str, Tensor] = {}
    for step, (images, labels) in enumerate(islice(session.batches(1), STEPS)):
        batch, parts = config.training.batch_size, config.training.accumulate
        loss = training_step(session.method, model, model, images, labels, optimizers, batch=batch, parts=parts)
        found[f"loss {step}"] = world.mean(loss.double())
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"gradient {step} {name}": grad.clone() for name, grad in grads.items()}
    found |= {f"state {name}": value.clone() for name, value in model.eval().state_dict().items()}
    for name, layer in modules.quantized_layers(model):
        found[f"codes {name}"] = layer.weight_quantizer(layer.weight).detach()
    return {name: value.detach().contiguous().clone() for name, value in found.items()}


def save_courses(cases: list[str], out: Path) -> None:
    """What each rank runs."""
    for number, case in enumerate(cases):
        save_file(course(configured(case)), out / f"{number}-{world.rank()}.safetensors")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    on_two_ranks(save_courses, CASES, out)
    return out


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert set(found) == set(wanted)
    apart = {
        name: float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-12))
        for name, value in wanted.items()
        if value.is_floating_point() and not torch.equal(value, found[name])  # infinite where nothing is known yet
    }
    assert {name: share for name, share in apart.items() if not share <= tolerance} == {}
    assert [n for n, v in wanted.items() if not v.is_floating_point() and not torch.equal(v, found[n])] == []


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_make_the_steps_of_one(two_ranks, case):
    first, second = (load_file(two_ranks / f"{CASES.index(case)}-{rank}.safetensors") for rank in (0, 1))
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    assert_close(first, course(configured(case)), 1e-6)


ACCUMULATED = [case for case in CASES if "lenet5" in case and not case.startswith("bsq") and "mixed" not in case]


@pytest.mark.parametrize("case", ACCUMULATED)
def test_a_batch_in_parts_makes_the_steps_of_the_whole_batch(case):
    """But where something is computed of a batch as a whole, of a part then: batch norm, BSQ's ranges, and traces."""
    parts = configured(case, **{"training/accumulate": 3})
    assert_close(course(parts), course(configured(case)), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Whole trainings, in float32


TRAININGS: dict[str, dict[str, Any]] = {
    "batches and validation shared unevenly": {"training/batch_size": 33, "data/validation_limit": 61},
    "fewer examples than a batch": {"training/batch_size": 64, "data/train_limit": 33},
    "in parts": {"training/accumulate": 2},
}


def training(values: dict[str, Any]) -> TrialConfig:
    tree = merged({**BASE, "method": "lsq", "model": NETWORKS["resnet20"]}, values)
    return parse(tree)


def train(trees: list[dict[str, Any]], out: Path) -> list[list[dict[str, Any]]]:
    """What each rank reports; and its final state on disk."""
    answers = []
    for number, tree in enumerate(trees):
        trial, reports = fit(parse(tree), folder=out / f"trial{number}"), []
        for report in trial:
            reports.append(report.to_json())
            state = trial.gi_frame.f_locals["session"].model.state_dict()  # only rank 0 writes a checkpoint
        contiguous = {name: value.contiguous().clone() for name, value in state.items()}
        save_file(contiguous, out / f"trained{number}-{world.rank()}.safetensors")
        answers.append(reports)
    return answers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    out = tmp_path_factory.mktemp("trained")
    return out, on_two_ranks(train, [training(values).tree() for values in TRAININGS.values()], out)


@pytest.mark.parametrize("number", range(len(TRAININGS)), ids=TRAININGS)
def test_ranks_end_with_equal_states_and_reports_near_those_of_one(trained, number):
    out, answers = trained
    first, second = (load_file(out / f"trained{number}-{rank}.safetensors") for rank in (0, 1))
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []
    untimed = [
        [{k: v for k, v in report.items() if k not in ("seconds", "first_step_at")} for report in answer[number]]
        for answer in answers
    ]
    assert untimed[0] == untimed[1]
    alone = [report.to_json() for report in fit(training(TRAININGS[list(TRAININGS)[number]]))]
    for one, two in zip(alone, untimed[0], strict=True):
        # Sums in another order flip a rounding now and then; parts have batch statistics of their own.
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.01)
        assert two["points"][0]["loss"] == pytest.approx(one["points"][0]["loss"], rel=0.05)
        assert {k: two["points"][0][k] for k in ("bops", "bits")} == {k: one["points"][0][k] for k in ("bops", "bits")}
