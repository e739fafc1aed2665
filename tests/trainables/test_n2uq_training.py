"""Trainings with N2UQ: teachers, settings that do not fit together, resumed and saved networks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from trainables import checkpoint
from trainables.build import build_model
from trainables.config import TrialConfig, parse
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.methods import n2uq
from trainables.methods.n2uq import Method
from trainables.teachers import build_teacher, distillation_loss


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """Weights of a LeNet-5 for digits."""
    config = parse({"method": "float", "model": "lenet5", "data": "digits"})
    checkpoint.save(tmp_path / "teacher.safetensors", build_model(config, 10, (1, 8, 8), seed=3))
    return tmp_path / "teacher.safetensors"


def configuration(bits: dict[str, Any] | None = None, model: str = "lenet5", **settings: Any) -> TrialConfig:
    return parse(
        {
            "method": {"name": "n2uq", **settings},
            "model": model,
            "data": "digits",
            "training": {"epochs": 2},
            "bits": bits or {},
        }
    )


def faults(config: TrialConfig) -> str:
    model, shape = build_model(config, 10, (1, 8, 8), seed=0), (1, 8, 8)
    with pytest.raises(ConfigError) as caught:
        resolve_bits(config, trace(model, shape))
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"teacher": "lenet5"}, "method/teacher = 'lenet5' has no weights: give method/teacher_checkpoint"),
        ({"teacher": "lenet5", "teacher_pretrained": True, "teacher_checkpoint": "x"}, "has two kinds of weights"),
        ({"teacher": "resnet18", "teacher_pretrained": True}, "are for 1000 classes, the data set has 10"),
        (
            {"teacher": "resnet19", "teacher_checkpoint": "x"},
            "neither a model of ours nor of torchvision; did you mean",
        ),
        ({"teacher": "lenet5", "teacher_checkpoint": "/none"}, "cannot read checkpoint /none"),
        ({"teacher": "lenet5", "teacher_checkpoint": "x", "teacher_settings": {"deep": 1}}, "cannot be built"),
        ({"teacher_weight": 0.5}, "method/teacher_weight = 0.5: has no effect without method/teacher"),
        ({"quantize_downsample": False}, "method/quantize_downsample = False: model 'lenet5' has no convolution"),
        ({"quantize_ends": False, "bits": {"conv1": {"weight": 4}}}, "bits/conv1: this layer stays float"),
    ],
)
def test_settings_that_do_not_fit_together_are_one_clear_error(settings, text):
    given_bits = settings.get("bits")
    config = configuration(given_bits, **{k: v for k, v in settings.items() if k != "bits"})
    assert text in faults(config)


def test_a_teacher_of_other_classes_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "teacher.safetensors"
    config = parse({"method": "float", "model": "lenet5", "data": "digits"})
    checkpoint.save(path, build_model(config, 7, (1, 8, 8), seed=0))
    text = faults(configuration(teacher="lenet5", teacher_checkpoint=str(path)))
    assert "a teacher of 7 classes, the data set has 10; give one that was trained on the same classes" in text
    assert text.count("classes") == 2


def test_smoothed_labels_beside_a_teacher_that_replaces_them_are_an_error(teacher_file):
    config = parse(
        {
            **configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file)).tree(),
            "training": {"label_smoothing": 0.1},
        }
    )
    assert "training/label_smoothing = 0.1: labels play no part" in faults(config)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_loss_is_a_share_of_the_teachers_and_the_rest_of_the_labels(teacher_file, weight):
    config = configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file), teacher_weight=weight)
    method = Method(Method.Settings(**config.method.settings))
    model = build_model(config, 10, (1, 8, 8), seed=0)
    table = trace(model, (1, 8, 8))
    method.prepare(model, table, resolve_bits(config, table))
    images, labels = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    teacher = build_teacher("lenet5", 10, (1, 8, 8), settings={}, weights=teacher_file)
    (loss,) = method.losses(model, images, labels)
    hard = functional.cross_entropy(model(images), labels)
    soft = distillation_loss(model(images), teacher(images))
    torch.testing.assert_close(loss, (1 - weight) * hard + weight * soft)


def test_the_teacher_is_no_part_of_the_student_and_draws_no_random_numbers(teacher_file):
    plain, taught = (
        list(fit(configuration(**settings)))[-1].points[0]
        for settings in ({}, {"teacher": "lenet5", "teacher_checkpoint": str(teacher_file)})
    )
    assert (plain.size_bytes, plain.bops) == (taught.size_bytes, taught.bops)
    config = configuration(teacher="lenet5", teacher_checkpoint=str(teacher_file))
    method = Method(Method.Settings(**config.method.settings))
    model = build_model(config, 10, (1, 8, 8), seed=0)
    table = trace(model, (1, 8, 8))
    method.prepare(model, table, resolve_bits(config, table))
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method.teacher_logits(torch.zeros(1, 1, 8, 8), 10)
    assert list(model.state_dict()) == list(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not any(p.requires_grad for p in method._teacher.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(("bits", "accuracy"), [(1, 0.25), (2, 0.5), (8, 0.5)])
def test_a_short_training_on_digits_learns_and_ends_in_a_point(bits, accuracy):
    tree = configuration({"*": {"weight": bits, "activation": bits}}).tree()
    adam = {"name": "adam", "lr": 3e-3, "schedule": "linear", "weight_decay": 0.0}
    reports = list(fit(parse({**tree, "optimizer": adam, "training": {"epochs": 3}})))
    (point,) = reports[-1].points
    assert point.accuracy > accuracy
    assert {tuple(point.bits[name]) for name in ("conv2", "fc1")} == {(bits, bits)}
    assert reports[-1].train_loss < reports[0].train_loss


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path, teacher_file):
    settings = {"teacher": "lenet5", "teacher_checkpoint": str(teacher_file), "teacher_weight": 0.5}
    tree = {**configuration(**settings).tree(), "optimizer": {"name": "adam", "lr": 1e-3, "schedule": "linear"}}
    whole = [report.points for report in fit(parse(tree))]
    next(iter(fit(parse(tree), folder=tmp_path / "trial")))
    resumed = [report.points for report in fit(parse(tree), folder=tmp_path / "trial")]
    assert resumed == whole


def test_the_published_rate_falls_in_a_line_to_0():
    assert [n2uq.published_rate(epoch, 4, 1.0) for epoch in (1, 2, 3, 4)] == [0.75, 0.5, 0.25, 0.0]
