"""Training on real digits: reproducible, resumable, alone or on two ranks; and the float start that trials share."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainables import checkpoint, modules, plugins
from trainables.config import TrialConfig, merged, parse
from trainables.errors import ConfigError, DivergedError
from trainables.fit import Report, Session, evaluate, fit
from trainables.start import float_start, start_config

METHODS = ["float", "lsq", "pact", "dorefa"]
QUANTIZING = METHODS[1:]
ROOT = Path(__file__).parents[2]

BASE: dict[str, Any] = {
    "method": "lsq",
    "model": {"name": "lenet5", "width": 0.25},
    "data": {"name": "digits", "train_limit": 256, "validation_limit": 100},
    "optimizer": {"lr": 0.01},
    "training": {"epochs": 3, "batch_size": 32},
    "start": {"epochs": 1},
}
MODELS: dict[str, dict[str, Any]] = {
    "lenet5": {"name": "lenet5", "width": 0.25},
    "resnet20": {"name": "resnet20", "depth": 8, "width": 4},
}


def configured(**values: Any) -> TrialConfig:
    """The base with values at their addresses; `__` stands for a slash."""
    return parse(merged(BASE, {name.replace("__", "/"): value for name, value in values.items()}))


def outcome(report: Report) -> dict[str, Any]:
    """What a report says, but for the times it took."""
    return {key: value for key, value in report.to_json().items() if key not in ("seconds", "first_step_at")}


def outcomes(config: TrialConfig, **options: Any) -> list[dict[str, Any]]:
    return [outcome(report) for report in fit(config, **options)]


def weights(folder: Path) -> dict[str, Tensor]:
    tensors, _ = checkpoint.read(folder / checkpoint.FILE)
    return tensors


def assert_same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def test_a_training_reports_each_epoch_with_the_cost_and_the_bits():
    reports = list(fit(configured(bits__conv2__weight=2)))
    assert [(report.epoch, report.epochs) for report in reports] == [(1, 3), (2, 3), (3, 3)]
    for report in reports:
        (point,) = report.points
        assert point.label == "final"
        assert 0 <= point.accuracy <= 1
        assert point.bits == {"conv1": [8, 8], "conv2": [2, 4], "fc1": [4, 4], "fc2": [8, 8]}
        assert 0 < point.relative_bops < 0.1
        assert 0 < point.size_bytes < 20_000
        assert report.seconds > 0
    assert len({report.first_step_at for report in reports}) == 1


def test_a_report_survives_the_trip_through_json():
    report = next(fit(configured()))
    assert Report.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_nothing_is_trained_before_the_first_report_is_asked_for():
    fit(configured(model__width=-1))  # a generator: the fault shows when it starts
    with pytest.raises(ConfigError, match="model/width = -1"):
        next(fit(configured(model__width=-1)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits_from_the_float_start(method, tmp_path):
    config = configured(
        method=method,
        model__width=0.5,
        data={"name": "digits"},
        training__epochs=2,
        start__epochs=3,
        start__batch_size=16,
        bits={} if method == "float" else {"*": {"weight": 4, "activation": 4}},
    )
    start = float_start(config, tmp_path)
    if method == "float":
        config = start_config(replace(config, start=replace(config.start, epochs=5)))
    *_, last = fit(config, start=start)
    assert last.points[0].accuracy > 0.9


@pytest.mark.parametrize("method", QUANTIZING)
def test_a_trial_from_the_float_start_begins_where_the_float_network_ended(method, tmp_path):
    config = configured(method=method, start__epochs=3, bits={"*": {"weight": 8, "activation": 8}})
    start = float_start(config, tmp_path)
    assert start is not None
    _, state = checkpoint.read(start)
    session = Session(config, start=start)
    session.calibrate()
    accuracy, _ = evaluate(session.model, session.data.validation, session.device)
    assert accuracy > state["history"][-1]["points"][0]["accuracy"] - 0.15
    fresh, _ = evaluate(Session(config).model, session.data.validation, session.device)
    assert fresh < 0.5


def test_compiled_quantizers_train_to_the_same_losses_as_eager_ones():
    eager, compiled = (outcomes(configured(training__epochs=2, training__compile=how)) for how in ("off", "quantizers"))
    for a, b in zip(eager, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["points"][0]["loss"] == pytest.approx(b["points"][0]["loss"], rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers, whenever and wherever


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_trial_gives_the_same_numbers_in_any_order_and_after_any_other(model, method, tmp_path):
    """Between two runs of it come trials of every other method, in one process, with another random state."""
    config = configured(method=method, model=MODELS[model], training__epochs=2, data__augment="crop-flip")
    first = outcomes(config, folder=tmp_path / "first")
    for other in METHODS:
        if other != method:
            next(fit(configured(method=other, model=MODELS[model], training__epochs=1, seed=7)))
    torch.manual_seed(123)
    assert outcomes(config, folder=tmp_path / "second") == first
    assert_same_tensors(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_two_trials_that_take_turns_do_not_disturb_each_other():
    one, two = configured(seed=1), configured(seed=2, method="pact")
    alone = outcomes(one), outcomes(two)
    turns = [(outcome(a), outcome(b)) for a, b in zip(fit(one), fit(two), strict=True)]
    assert ([a for a, _ in turns], [b for _, b in turns]) == alone


def test_another_process_gives_the_same_numbers():
    configs = [configured(method=method, training__epochs=1) for method in QUANTIZING]
    code = """
import json, sys, torch
torch.set_num_threads(1)
from trainables.config import parse
from trainables.fit import fit
print(json.dumps([[report.to_json() for report in fit(parse(tree))] for tree in json.loads(sys.stdin.read())]))
"""
    trees = json.dumps([config.tree() for config in configs])
    done = subprocess.run(
        [sys.executable, "-c", code], input=trees, capture_output=True, text=True, check=True, cwd=ROOT
    )
    elsewhere = [[outcome(Report.from_json(tree)) for tree in trial] for trial in json.loads(done.stdout)]
    assert elsewhere == [outcomes(config) for config in configs]


def test_another_seed_gives_other_numbers():
    assert outcomes(configured(seed=0)) != outcomes(configured(seed=1))


@pytest.mark.parametrize(
    "change", [{"optimizer__lr": 0.02}, {"bits__conv2__weight": 2}, {"training__label_smoothing": 0.1}]
)
def test_a_setting_that_is_changed_acts(change):
    assert outcomes(configured(**change)) != outcomes(configured())


# ---------------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint


RESUMED: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in plugins.describe("trainables.methods")},
    "lsq on lenet5": {"method": "lsq", "model": MODELS["lenet5"]},
    "lsq with adamw": {"method": "lsq", "optimizer__name": "adamw"},
    "dorefa with adam": {"method": "dorefa", "optimizer__name": "adam"},
    "lsq in parts": {"method": "lsq", "training__accumulate": 2},
    "lsq in bfloat16": {"method": "lsq", "training__precision": "bfloat16"},
    "bayesian_bits with noise": {"method": {"name": "bayesian_bits", "gate_noise": True}},
    "bayesian_bits with fine-tuning": {"method": "bayesian_bits", "training__finetune_epochs": 1},
    "bayesian_bits folded": {"method": {"name": "bayesian_bits", "batch_norm": "folded"}},
    "bsq with fine-tuning": {"method": {"name": "bsq", "interval": 1}, "training__finetune_epochs": 1},
    "adabits with extra widths": {"method": {"name": "adabits", "widths": "8,4", "extra_widths": "3"}},
    "adabits, one width after another": {"method": {"name": "adabits", "widths": "8,4", "training": "descending"}},
    "double_rounding mixed": {"method": {"name": "double_rounding", "precision": "mixed", "probes": 2}},
}


@pytest.mark.parametrize("closed_after", [1, 2, 3])
@pytest.mark.parametrize("case", RESUMED)
def test_a_trial_closed_at_any_epoch_goes_on_bit_by_bit(case, closed_after, tmp_path):
    values = {"model": MODELS["resnet20"], "data__train_limit": 64, "optimizer__lr": 0.003, **RESUMED[case]}
    config = configured(data__augment="crop", **values)
    whole = outcomes(config, folder=tmp_path / "whole")
    trial = fit(config, folder=tmp_path / "parts")
    for _ in range(closed_after):
        next(trial)
    trial.close()
    torch.manual_seed(99)
    parts = outcomes(config, folder=tmp_path / "parts")
    assert parts == whole[closed_after - 1 :]  # the saved epoch is reported again
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_finished_trial_is_reported_again_without_training(tmp_path):
    config = configured()
    *_, last = fit(config, folder=tmp_path)
    before = (tmp_path / checkpoint.FILE).stat().st_mtime_ns
    assert list(fit(config, folder=tmp_path)) == [last]
    assert (tmp_path / checkpoint.FILE).stat().st_mtime_ns == before


def test_a_checkpoint_is_on_disk_before_its_epoch_is_reported(tmp_path):
    for report in fit(configured(), folder=tmp_path):
        _, state = checkpoint.read(tmp_path / checkpoint.FILE)
        assert (state["epoch"], state["report"]) == (report.epoch, report.to_json())
    assert parse(state["config"]) == configured()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    next(fit(configured()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [0, 1])
def test_a_trial_goes_on_from_the_last_good_checkpoint_or_starts_again(tmp_path, good):
    whole = outcomes(configured(), folder=tmp_path / "whole")
    trial = fit(configured(), folder=tmp_path)
    for _ in range(1 + good):
        next(trial)
    trial.close()
    path = tmp_path / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert outcomes(configured(), folder=tmp_path) == whole
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Divergence


@pytest.mark.parametrize("method", METHODS)
def test_a_training_whose_loss_is_not_finite_raises(method):
    config = configured(
        method=method, optimizer={"lr": 100, "weight_decay": 1}, training__epochs=8
    )  # grows 99-fold a step
    with pytest.raises(DivergedError, match=r"loss is (nan|inf)"):
        list(fit(config))


def test_a_trial_after_a_diverged_one_gives_the_numbers_it_always_gives():
    wanted = outcomes(configured(training__epochs=1))
    with pytest.raises(DivergedError):
        list(fit(configured(method="pact", optimizer={"lr": 100, "weight_decay": 1}, training__epochs=8)))
    assert outcomes(configured(training__epochs=1)) == wanted


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_counts_every_example_once_and_keeps_the_mode():
    session = Session(configured())
    session.model.train()
    accuracy, loss = evaluate(session.model, session.data.validation, session.device)
    assert session.model.training
    ((images, labels),) = session.data.validation.batches(100, device=session.device, seed=None, augment=False)
    with torch.no_grad():
        logits = session.model.eval()(images)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The float start


def test_the_float_start_is_trained_once(tmp_path):
    first = float_start(configured(), tmp_path)
    assert first is not None
    before = first.stat().st_mtime_ns
    again = float_start(configured(method="pact", optimizer__lr=0.3, bits__conv2__weight=2), tmp_path)
    assert again == first
    assert first.stat().st_mtime_ns == before
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock") == [".safetensors"]


def test_the_float_start_holds_the_float_network_and_its_history(tmp_path):
    config = configured(start__epochs=2)
    path = float_start(config, tmp_path)
    assert path is not None
    tensors, state = checkpoint.read(path)
    session = Session(start_config(config))
    assert {name.removeprefix("model/") for name in tensors} == set(session.model.state_dict())
    assert [report["epoch"] for report in state["history"]] == [1, 2]
    assert parse(state["config"]) == start_config(config)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"model__width": 0.5}, {"data__train_limit": 128}, {"start__epochs": 2}, {"start__lr": 0.01}],
)
def test_another_model_data_set_seed_or_start_has_a_float_start_of_its_own(tmp_path, change):
    assert float_start(configured(**change), tmp_path) != float_start(configured(), tmp_path)


@pytest.mark.parametrize("values", [{"method": "float"}, {"start__epochs": 0}], ids=["float", "from scratch"])
def test_a_float_trial_and_one_from_scratch_have_no_start(tmp_path, values):
    assert float_start(configured(**values), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_threads_that_ask_at_once_train_one_float_start(tmp_path):
    found: list[Path | None] = []
    threads = [threading.Thread(target=lambda: found.append(float_start(configured(), tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".safetensors"] == [found[0].name]  # type: ignore[union-attr]


START = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from trainables.config import parse
from trainables.start import float_start
path = float_start(parse(json.loads(sys.stdin.read())), Path(sys.argv[1]))
print(json.dumps([str(path), path.stat().st_mtime_ns]))
"""


def test_processes_that_ask_at_once_train_one_float_start(tmp_path):
    tree = json.dumps(configured(start__epochs=2).tree())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate(tree, timeout=120)[0]) for process in started]
    assert answers[0] == answers[1]  # a second training would have written the file anew


def test_a_start_whose_trainer_was_killed_is_taken_over(tmp_path):
    """What a killed process leaves behind: a lock file that nobody holds, and a checkpoint of its first epoch."""
    config = configured(start__epochs=2)
    wanted = float_start(config, tmp_path / "whole")
    assert wanted is not None
    left = (tmp_path / "left" / wanted.name).with_suffix(".training")
    next(trial := fit(start_config(config), folder=left))
    trial.close()
    left.with_suffix(".lock").touch()
    found = float_start(config, tmp_path / "left")
    assert found is not None
    assert_same_tensors(checkpoint.read(found)[0], checkpoint.read(wanted)[0])


def test_a_start_checkpoint_is_used_as_given(tmp_path):
    path = float_start(configured(), tmp_path)
    assert float_start(configured(start__checkpoint=str(path)), tmp_path / "unused") == path
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_start_may_hold_scales_that_were_trained_before(tmp_path, per_channel):
    config = parse(merged(BASE, {"method/per_channel": per_channel, "bits/conv2/weight": 3, "bits/fc1/activation": 8}))
    plain = Session(start_config(config)).model.state_dict()
    scales = {
        modules.scale_key("conv2", "weight", 3): torch.tensor(0.125),
        modules.scale_key("conv2", "weight", 4): torch.tensor(0.5),
        modules.scale_key("fc1", "input", 8): torch.tensor(2.0),
    }
    path = tmp_path / "start.safetensors"
    checkpoint.write(path, {f"model/{name}": value.contiguous() for name, value in plain.items()} | scales, {})
    with_scales, without = Session(config, start=path), Session(config)
    with_scales.calibrate()
    without.calibrate()
    found, fresh = (dict(modules.quantized_layers(session.model)) for session in (with_scales, without))
    assert bool((found["conv2"].weight_quantizer.scale == 0.125).all())
    assert float(found["fc1"].input_quantizer.scale) == 2
    assert torch.equal(found["fc1"].weight_quantizer.scale, fresh["fc1"].weight_quantizer.scale)


def test_a_start_checkpoint_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="start/checkpoint = nowhere: no such file"):
        float_start(configured(start__checkpoint="nowhere"), tmp_path)


def test_a_start_checkpoint_of_another_model_is_refused(tmp_path):
    start = float_start(configured(model__width=0.5), tmp_path)
    with pytest.raises(ConfigError, match=r"is of another model: .* has shape"):
        next(fit(configured(), start=start))


# ---------------------------------------------------------------------------------------------------------------------
# Parts, precision, sharing


def test_a_batch_in_parts_trains_to_the_losses_of_the_whole_batch():
    whole, parts = (outcomes(configured(training__accumulate=parts)) for parts in (1, 4))
    for a, b in zip(whole, parts, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["points"][0]["loss"] == pytest.approx(b["points"][0]["loss"], rel=1e-2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", plugins.describe("trainables.methods"))
def test_bfloat16_trains_to_nearly_the_losses_of_float32_and_keeps_weights_in_float32(method, model, tmp_path):
    values = {"method": method, "model": MODELS[model], "training__epochs": 1, "data__train_limit": 64}
    wide = outcomes(configured(**values))
    narrow = outcomes(configured(**values, training__precision="bfloat16"), folder=tmp_path)
    assert narrow != wide
    assert narrow[0]["train_loss"] == pytest.approx(wide[0]["train_loss"], rel=0.05)
    assert {value.dtype for value in weights(tmp_path).values()} <= {torch.float32, torch.int64, torch.uint8}


def test_quantizers_compute_in_float32_under_bfloat16():
    session = Session(configured(training__precision="bfloat16"))
    session.calibrate()
    seen = {}
    for name, layer in modules.quantized_layers(session.model):
        for role in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(layer, role)
            if quantizer is not None:
                place = f"{name}.{role}"
                quantizer.register_forward_hook(lambda _, args, y, place=place: seen.update({place: y.dtype}))
        layer.register_forward_hook(lambda _, args, y, place=name: seen.update({place: y.dtype}))
    images, _ = next(session.batches(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert session.model(images).dtype == torch.float32
    assert {dtype for place, dtype in seen.items() if "quantizer" in place} == {torch.float32}
    assert {dtype for place, dtype in seen.items() if "quantizer" not in place} == {torch.bfloat16}


def test_a_batch_that_cannot_be_shared_is_an_error():
    from trainables.splits import batch_slices

    with pytest.raises(ConfigError, match="cannot be shared by 4 workers"):
        batch_slices(100, 3, seed=0, augment=False, rank=0, world=4)
