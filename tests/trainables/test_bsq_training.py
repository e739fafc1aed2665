"""Trainings with BSQ: widths fall, checkpoints and both artefacts hold the same network."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.trainables.bsq_cases import SMALL
from trainables import checkpoint
from trainables.build import build_model, layer_table
from trainables.config import TrialConfig, parse
from trainables.fit import Report, Session, fit
from trainables.methods._binary_digits import place_values
from trainables.methods._bit_planes import bit_tensors
from trainables.methods._bit_report import bit_state, count, save_bits, save_float, scheme


def last(reports: Iterator[Report]) -> Report:
    return list(reports)[-1]


def states(path: Path) -> dict[str, Tensor]:
    return checkpoint.read(path / checkpoint.FILE)[0]


def digits(method: dict[str, Any], **training: int) -> TrialConfig:
    rates = {"lr": 0.1, "finetune_factor": 0.5}
    return parse(
        {
            "method": {"name": "bsq", **method},
            "model": SMALL,
            "data": "digits",
            "optimizer": rates,
            "training": {"batch_size": 64, **training},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrialConfig, list[Report], Path]:
    """Two epochs of search under a strong penalty, two of fine-tuning."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    given = digits({"interval": 1, "penalty_strength": 1.0}, epochs=4, finetune_epochs=2)
    return given, list(fit(given, folder=folder)), folder


def test_a_training_ends_in_a_point_with_fewer_bits(run):
    _, reports, _ = run
    sizes = [report.points[0].size_bytes for report in reports]
    assert sizes[0] > sizes[1] == sizes[2] == sizes[3]  # fixed from the end of the search
    weights = {width for width, _ in reports[-1].points[0].bits.values()}
    assert len(weights) > 2
    assert weights <= set(range(10))
    assert reports[-1].points[0].accuracy > 0.5


def test_the_reported_loss_has_the_penalty_in_it_during_the_search(run):
    _, reports, _ = run
    assert reports[1].train_loss > 10 > 3 > reports[2].train_loss


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_training_is_the_uninterrupted_one(run, after, tmp_path: Path):
    given, reports, folder = run
    training = fit(given, folder=tmp_path)
    for _ in range(after):
        next(training)
    training.close()
    resumed = list(fit(given, folder=tmp_path))
    assert [r.points for r in resumed] == [r.points for r in reports[after - 1 :]]
    ours, wanted = states(tmp_path), states(folder)
    assert set(ours) == set(wanted)
    assert [name for name in ours if not torch.equal(ours[name], wanted[name])] == []


def test_a_saved_training_gives_its_points_again(run):
    given, reports, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    assert session.measure(session.data.validation) == reports[-1].points
    assert [row["planes"] for row in session.layers("final")] == [w for w, _ in scheme(session.model).values()]


def test_both_artefacts_hold_the_same_network(run, tmp_path: Path):
    given, _, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    save_float(tmp_path / "float", session.model)
    save_bits(tmp_path / "bits", session.model)
    plain = build_model(given, 10, session.data.input_shape, seed=1)
    checkpoint.load_weights(tmp_path / "float", plain)
    with safe_open(tmp_path / "bits", framework="pt") as file:
        bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = json.loads(file.metadata()["scheme"])
    assert found == {layer: list(pair) for layer, pair in scheme(session.model).items()}
    for layer, role, tensor, leaf in bit_tensors(session.model):
        planes = max(1, tensor.planes)
        values = (bits[f"{layer}.p{role}"].float() - bits[f"{layer}.n{role}"].float()) @ place_values(planes)
        rebuilt = values * bits[f"{layer}.{'scale' if role == 'weight' else 'biasscale'}"]
        torch.testing.assert_close(rebuilt, plain.get_parameter(f"{layer}.{role}").data, rtol=1e-5, atol=1e-7)
        assert torch.equal(leaf.data, plain.get_parameter(f"{layer}.{role}").data)
    assert set(bits) == set(bit_state(session.model))


def test_a_found_scheme_can_be_trained_from_the_float_start(run):
    given, reports, folder = run
    session = Session(given)
    session.load(folder / checkpoint.FILE)
    found = scheme(session.model)
    again = digits({"scheme": found}, epochs=1)
    (report,) = list(fit(again))
    assert {n: w for n, (w, _) in report.points[0].bits.items()} == {
        n: w for n, (w, _) in reports[-1].points[0].bits.items()
    }
    table = layer_table(again)
    assert count(table, found).bits <= count(table, found, dead=1).bits


def test_without_a_penalty_the_network_stays_larger(run):
    _, reports, _ = run
    report = last(fit(digits({"interval": 1, "penalty_strength": 0.0}, epochs=1)))
    assert report.points[0].size_bytes > reports[0].points[0].size_bytes
