"""A sweep is checked completely before anything is written: every fault is one sentence that helps."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution

import raysearch
from raysearch.errors import RaysearchError, SweepError
from raysearch.resolve import resolve, trial_config
from raysearch.sweep import Sweep, default_name, default_out
from raysearch.sweep_checks import SAMPLERS
from tests.raysearch.builders import law
from trainables.errors import ConfigError, PluginError

_numbers = itertools.count()
OBJECTIVES = "accuracy, loss, bops, relative_bops, size_bytes"


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test of this file runs in an empty folder, which stays empty but for modules of the test's own."""
    monkeypatch.chdir(tmp_path)
    yield
    assert {path.name for path in tmp_path.iterdir()} <= {"modules"}


@pytest.fixture
def space_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a search space with the given body of `space`, and gives the name to ask for."""

    def write(body: str) -> str:
        name = f"a_space_of_{next(_numbers)}"
        (tmp_path / "modules").mkdir(exist_ok=True)
        header = "from optuna.distributions import *\n\ndef space(layers):\n    "
        (tmp_path / "modules" / f"{name}.py").write_text(header + body + "\n")
        return f"{name}:space"

    monkeypatch.syspath_prepend(tmp_path / "modules")
    return write


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "lqs"}, PluginError, "unknown method 'lqs'; did you mean 'lsq'? (raysearch list methods)"),
    ({"model": "lenet"}, PluginError, "unknown model 'lenet'; did you mean 'lenet5'? (raysearch list models)"),
    ({"data": "digit"}, PluginError, "unknown data set 'digit'; did you mean 'digits'? (raysearch list data)"),
    ({"space": "perlayer"}, PluginError, "unknown space 'perlayer'; did you mean 'per_layer'? (raysearch list spaces)"),
    ({"method": "no.such"}, PluginError, "cannot import 'no.such': ModuleNotFoundError: No module named 'no'"),
    ({"space": "trainables.cost"}, PluginError, "'trainables.cost' does not define 'space'; a plug-in of spaces must"),
    ({"sampler": "tpee"}, SweepError, "unknown sampler 'tpee'; did you mean 'tpe'?"),
    ({"sampler": "x"}, SweepError, f"unknown sampler 'x'; one of {', '.join(SAMPLERS)}"),
    ({"trials": 0}, SweepError, "trials = 0: an integer from 1 to 1000000"),
    ({"trials": True}, SweepError, "trials = True: an integer from 1 to 1000000"),
    ({"epochs": 1.5}, SweepError, "epochs = 1.5: an integer from 1 to 100000"),
    ({"workers": -1}, SweepError, "workers = -1: an integer from 1 to 4096"),
    ({"concurrent": 0}, SweepError, "concurrent = 0: an integer from 1 to 100000"),
    ({"cpus_per_worker": 0}, SweepError, "cpus_per_worker = 0: an integer from 1 to 4096"),
    ({"seed": -1}, SweepError, "seed = -1: an integer from 0 to 2147483647"),
    ({"seed": 2**31}, SweepError, "seed = 2147483648: an integer from 0 to 2147483647"),
    ({"gpus_per_worker": -0.5}, SweepError, "gpus_per_worker = -0.5: a number >= 0"),
    ({"max_bops": -1.0}, SweepError, "max_bops = -1.0: a number >= 0"),
    ({"max_bops": float("nan")}, SweepError, "max_bops = nan: a number >= 0"),
    ({"max_bops": float("inf")}, SweepError, "max_bops = inf: a number >= 0"),
    ({"max_size_bytes": "60k"}, SweepError, "max_size_bytes = '60k': a number >= 0"),
    ({"max_size_bytes": True}, SweepError, "max_size_bytes = True: a number >= 0"),
    ({"max_relative_bops": 2}, SweepError, "max_relative_bops = 2: a share of the 32x32-bit BOPs, 0..1"),
    ({"objectives": {}}, SweepError, f"objectives are empty: give at least one of {OBJECTIVES}"),
    ({"objectives": {"acc": "max"}}, SweepError, "unknown objective 'acc'; did you mean 'accuracy'?"),
    ({"objectives": {"latency": "min"}}, SweepError, f"unknown objective 'latency'; allowed are {OBJECTIVES}"),
    ({"objectives": {"bops": "max"}}, SweepError, "objective bops = 'max': its direction is 'min'"),
    ({"settings": {"optimiser/lr": 1}}, ConfigError, "unknown address 'optimiser'; did you mean 'optimizer'?"),
    ({"settings": {"optimizer/zzz": 1}}, ConfigError, "unknown address 'optimizer/zzz'; optimizer takes name, lr,"),
    ({"settings": {"optimizer/lrr": 1}}, ConfigError, "unknown address 'optimizer/lrr'; did you mean 'lr'?"),
    ({"settings": {"method/scale": 1}}, ConfigError, "unknown address 'method/scale'; did you mean 'scale_lr'?"),
    ({"settings": {"bits/conv9/weight": 2}}, ConfigError, "bits/conv9: model 'lenet5' has no such layer; did you mean"),
    ({"settings": {"bits/conv1/weigth": 2}}, ConfigError, "'bits/conv1/weigth': a layer has weight and activation"),
    (
        {"settings": {"bits/conv1/weight": 1}},
        ConfigError,
        "bits/conv1/weight = 1: method 'lsq' takes 2..8 (use 'dorefa'",
    ),
    ({"settings": {"bits/conv1/weight": 40}}, ConfigError, "bits/conv1/weight = 40: method 'lsq' takes 2..8"),
    ({"settings": {"bits/conv1/weight": 2.5}}, ConfigError, "bits/conv1/weight = 2.5: an integer number of bits"),
    ({"settings": {"optimizer/lr": -3}}, ConfigError, "optimizer/lr = -3: input should be greater than 0"),
    ({"settings": {"optimizer/lr": float("nan")}}, ConfigError, "optimizer/lr = nan: input should be a finite number"),
    ({"settings": {"optimizer/lr": "fast"}}, ConfigError, "optimizer/lr = 'fast': input should be a valid number"),
    ({"settings": {"optimizer/name": "sdg"}}, ConfigError, "optimizer/name = 'sdg': input should be 'sgd', 'adam' or"),
    ({"settings": {"model/width": 0}}, ConfigError, "model/width = 0.0: lenet5 takes a factor above 0"),
    ({"settings": {"training/epochs": 9}}, SweepError, "--set training/epochs: use --epochs"),
    ({"settings": {"seed": 9}}, SweepError, "--set seed: use --seed"),
    ({"settings": {"method/name": "pact"}}, SweepError, "--set method/name: use --method"),
    (
        {"settings": {"model": "vgg7"}},
        SweepError,
        "--set model: a group of settings; name one of them, as in model/...",
    ),
    ({"settings": {"training": {"epochs": 9}}}, SweepError, "--set training: a group of settings; name one of them"),
    ({"settings": {"bits": {}}}, SweepError, "--set bits: a group of settings; name one of them, as in bits/..."),
    (
        {"settings": {"start/checkpoint": Path("x")}},
        SweepError,
        "settings: Object of type PosixPath is not JSON serializable; give numbers, text, true, false or null",
    ),
    (
        {"settings": {"bits/*/weight": 4}},
        SweepError,
        "bits/*/weight: set by --set and searched by space 'uniform'; leave one out",
    ),
    ({"method": "float"}, ConfigError, "space 'uniform': method 'float' has no bits; take lsq, pact, dorefa"),
    ({"workers": 3}, SweepError, "training/batch_size = 64 cannot be shared by 3 workers: take a multiple of 3"),
    (
        {"max_bops": 1000},
        SweepError,
        "the budget leaves nothing to train: the cheapest configuration of the space has 1.13869e+06 BOPs (limit 1000)",
    ),
    ({"max_bops": 0}, SweepError, "the budget leaves nothing to train: the cheapest configuration"),
    ({"max_size_bytes": 100, "max_bops": 100}, SweepError, "1.13869e+06 BOPs (limit 100), 5260 bytes (limit 100)"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), BAD, ids=[str(changes) for changes, _, _ in BAD])
def test_a_question_that_cannot_be_answered_is_one_sentence_that_helps(
    changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)) as caught:
        resolve(Sweep(**{"space": "uniform"} | changes))
    assert "\n" not in str(caught.value)


def test_all_faults_of_a_sweep_are_named_at_once() -> None:
    with pytest.raises(SweepError) as caught:
        resolve(Sweep(trials=0, epochs=0, sampler="tpa", objectives={"bops": "max"}, settings={"seed": 1}))
    for fault in ("trials = 0", "epochs = 0", "sampler 'tpa'", "objective bops", "--set seed"):
        assert fault in str(caught.value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Sweep)])
@pytest.mark.parametrize("value", [["a", "list"], object()], ids=["list", "object"])
def test_a_value_of_the_wrong_kind_is_an_error_that_names_its_field(name: str, value: Any) -> None:
    with pytest.raises(SweepError, match=f"^{name} = "):
        resolve(Sweep(**{name: value}))


SPACES = [
    ("return [IntDistribution(2, 8)]", SweepError, "must return a dict of Optuna distributions by address"),
    ("return {'bits/conv2/weight': (2, 8)}", SweepError, "must return a dict of Optuna distributions by address"),
    ("return {}", SweepError, "has nothing to search on model 'lenet5': take another space"),
    ("return layers + 1", PluginError, "cannot be made of a model's layers: can only concatenate tuple"),
    (
        "return {'bits/convv2/weight': IntDistribution(2, 8)}",
        ConfigError,
        "bits/convv2: model 'lenet5' has no such layer; did you mean 'conv2'?",
    ),
    (
        "return {'bits/conv2/weight': IntDistribution(1, 8)}",
        ConfigError,
        "bits/conv2/weight = 1: method 'lsq' takes 2..8 (use 'dorefa' or 'n2uq' for 1 bit)",
    ),
    (
        "return {'bits/conv2/activation': CategoricalDistribution([4, 2, 9])}",
        ConfigError,
        "bits/conv2/activation = 9: method 'lsq' takes 2..8",
    ),
    (
        "return {'bits/conv2/weight': FloatDistribution(2, 8)}",
        ConfigError,
        "bits/conv2/weight = 2.0: an integer number of bits",
    ),
    (
        "return {'bits/conv1/activation': IntDistribution(2, 8)}",
        ConfigError,
        "bits/conv1/activation = 2: the network's input has 8 bits",
    ),
    (
        "return {'optimizer/lr': FloatDistribution(0, 1)}",
        ConfigError,
        "optimizer/lr = 0.0: input should be greater than 0",
    ),
    ("return {'optimizer/lrr': FloatDistribution(0, 1)}", ConfigError, "unknown address 'optimizer/lrr'; did you mean"),
    (
        "return {'optimizer/name': CategoricalDistribution(['sgd', 'sdg'])}",
        ConfigError,
        "optimizer/name = 'sdg': input should be 'sgd', 'adam' or 'adamw'",
    ),
]


@pytest.mark.parametrize(("body", "kind", "words"), SPACES, ids=[body for body, _, _ in SPACES])
def test_a_space_of_ones_own_is_checked_at_its_corners(
    space_module: Callable[[str], str], body: str, kind: type[Exception], words: str
) -> None:
    name = space_module(body)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        resolve(Sweep(space=name))
    assert repr(name) in str(caught.value)


def test_a_space_of_ones_own_is_searched(space_module: Callable[[str], str]) -> None:
    name = space_module("return {f'bits/{row.name}/weight': IntDistribution(3, 5) for row in layers if row.last}")
    assert resolve(Sweep(space=name)).space == {"bits/fc2/weight": IntDistribution(3, 5)}


def test_what_follows_from_a_sweep_is_known_without_training() -> None:
    found = resolve(Sweep(space="uniform", epochs=7, seed=3, settings={"optimizer/lr": 0.1, "bits/conv1/weight": 6}))
    assert list(found.space) == ["bits/*/weight", "bits/*/activation"]
    assert [row.name for row in found.table.quantizable] == ["conv1", "conv2", "fc1", "fc2"]
    assert (found.config.training.epochs, found.config.seed, found.config.optimizer.lr) == (7, 3, 0.1)
    assert found.base == found.config.tree()
    assert found.base["bits"] == {"conv1": {"weight": 6}}


def test_the_configuration_of_a_single_training_needs_no_search_space() -> None:
    assert trial_config(Sweep(method="float")).method.name == "float"
    fixed = trial_config(Sweep(space="per_layer", settings={"bits/conv2/weight": 3}))
    assert fixed.bits == {"conv2": {"weight": 3}}


SWEEPS = st.builds(
    Sweep,
    method=st.sampled_from(["lsq", "mylab.ternary"]),
    objectives=st.sampled_from([{"accuracy": "max"}, {"bops": "min", "accuracy": "max"}]),
    trials=st.integers(1, 10**6),
    concurrent=st.none() | st.integers(1, 9),
    gpus_per_worker=st.none() | st.floats(0, 8),
    train=st.booleans(),
    max_bops=st.none() | st.floats(0, 1e12),
    settings=st.dictionaries(st.text(), st.integers() | st.text() | st.none(), max_size=3),
)


@law
@given(sweep=SWEEPS)
def test_a_sweep_survives_json(sweep: Sweep) -> None:
    copy = Sweep.from_tree(json.loads(json.dumps(sweep.tree())))
    assert copy == sweep
    assert list(copy.objectives) == list(sweep.objectives)


def test_the_tree_holds_all_fields_in_their_order() -> None:
    assert list(Sweep().tree()) == [f.name for f in dataclasses.fields(Sweep)]


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("https://ann:s3cret@host:5000/ml?token=abc", "https://host:5000/ml"),
        ("postgresql://ann:s3cret@host/db", "postgresql://host/db"),
        ("http://token@host", "http://host"),
        ("sqlite:////runs/mlflow.db", "sqlite:////runs/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_credentials_in_the_address_of_mlflow_are_never_written(uri: str, written: str) -> None:
    assert Sweep(mlflow_uri=uri).tree()["mlflow_uri"] == written


def test_an_unknown_field_is_named_with_the_nearest_one() -> None:
    with pytest.raises(SweepError) as caught:
        Sweep.from_tree({"trial": 3, "zzz": 1})
    assert (
        str(caught.value) == "unknown field 'trial' of a sweep; did you mean 'trials'?; unknown field 'zzz' of a sweep"
    )


def test_a_sweep_cannot_be_changed_by_who_holds_it() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sweep().trials = 3  # type: ignore[misc]
    assert Sweep().objectives is not Sweep().objectives


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits-lenet5-lsq-now"),
        ({"method": "mylab.ternary", "model": "torchvision.models:resnet18"}, "digits-resnet18-ternary-now"),
    ],
)
def test_a_sweep_is_named_after_what_it_asks(changes: dict[str, Any], name: str) -> None:
    assert default_name(Sweep(**changes), "now") == name
    assert default_out(name) == Path("runs") / name


def test_the_errors_of_the_platform_have_one_root_and_are_caught_as_values() -> None:
    assert issubclass(SweepError, RaysearchError)
    assert issubclass(SweepError, ValueError)


def test_the_package_names_what_it_offers_and_refuses_the_rest() -> None:
    assert raysearch.Sweep is Sweep
    assert {name for name in raysearch.__all__ if hasattr(raysearch, name)} == set(raysearch.__all__)
    with pytest.raises(AttributeError, match="module 'raysearch' has no attribute 'sweeps'"):
        raysearch.sweeps  # noqa: B018
