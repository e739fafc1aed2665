"""Plug-ins in a configuration, our own and a person's: their settings, and what is built from them."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tests.trainables.configs import BASE, LENET_LAYERS, at
from trainables import plugins
from trainables.build import build_model, data_shape, layer_table
from trainables.config import parse
from trainables.errors import ConfigError, PluginError
from trainables.layer_bits import resolve_bits
from trainables.plugin_settings import settings_of

LAB = '''
"""A method and models of a person's own."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import nn

from trainables.methods import lsq


class Method(lsq.Method):
    """LSQ with one more setting."""

    @dataclass(frozen=True, kw_only=True)
    class Settings(lsq.Method.Settings):
        """Those of LSQ, and a list."""

        needed: Annotated[int, Field(ge=1, description="has no default")]
        stages: Annotated[tuple[int, ...], Field(description="epochs of change")] = (1, 2)
        names: Annotated[list[str], Field(description="made anew each time")] = dataclasses.field(default_factory=list)


def build(classes, input_shape, *, hidden: int = 4):
    """A linear network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0] * input_shape[1] * input_shape[2], hidden), nn.ReLU(),
                         nn.Linear(hidden, classes))


def by_keyword(*, num_classes: int, hidden: int = 4):
    """Takes the number of classes by another name, as a keyword."""
    return build(num_classes, (1, 8, 8), hidden=hidden)


def not_a_module(classes):
    return classes


def strict(classes, *, width: int):
    return build(classes, (1, 8, 8), hidden=width)
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a person's own: its dotted path."""
    package = tmp_path / "configlab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "own.py").write_text(LAB)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "configlab.own"
    for name in [name for name in sys.modules if name.split(".")[0] == "configlab"]:
        del sys.modules[name]


def test_a_method_of_ones_own_inherits_settings_and_adds_some(lab):
    config = at({"method": {"name": lab, "needed": 3, "scale_lr": 0.5}})
    assert config.method.settings == {
        "needed": 3,
        "stages": [1, 2],
        "names": [],
        "per_channel": False,
        "symmetric": False,
        "scale_lr": 0.5,
    }
    assert parse(config.tree()) == config
    assert set(resolve_bits(config, layer_table(config))) == set(LENET_LAYERS)


def test_a_required_setting_that_is_missing_is_a_fault(lab):
    with pytest.raises(ConfigError, match="method/needed is missing: it has no default"):
        at({"method": lab})
    assert settings_of("method", lab)["scale_lr"][1:] == (1.0, "learning rate of scales over that of weights")


def test_a_model_of_ones_own_has_its_keyword_only_parameters_as_settings(lab):
    config = at({"model": {"name": lab, "hidden": 6}})
    assert config.model.settings == {"hidden": 6}
    assert {row.name: row.weights for row in layer_table(config).layers} == {"1": 64 * 6, "3": 60}


def test_a_factory_may_take_the_number_of_classes_as_a_keyword(lab):
    config = at({"model": {"name": f"{lab}:by_keyword", "hidden": 5}})
    assert config.model.settings == {"hidden": 5}
    assert build_model(config, 10, (1, 8, 8), seed=0)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_factory_of_another_library_works_by_its_path():
    config = at({"model": "torchvision.models:shufflenet_v2_x0_5", "data": "cifar10"})
    assert parse(config.tree()) == config
    table = layer_table(config)
    assert len(table.layers) == 57
    assert table.layers[-1].channels == 10
    assert set(resolve_bits(config, table)) == {row.name for row in table.layers}


def test_a_factory_that_makes_no_module_or_lacks_a_setting_is_an_error(lab):
    with pytest.raises(PluginError, match=r"model 'configlab\.own:not_a_module' made a int"):
        build_model(at({"model": f"{lab}:not_a_module"}), 10, (1, 8, 8), seed=0)
    with pytest.raises(ConfigError, match="model/width is missing: it has no default"):
        at({"model": f"{lab}:strict"})


def test_building_a_model_draws_from_its_seed_and_not_from_the_global_state():
    config = parse(BASE)
    before = torch.get_rng_state()
    a, b, c = (build_model(config, 10, (1, 8, 8), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.conv1.weight, b.conv1.weight)
    assert not torch.equal(a.conv1.weight, c.conv1.weight)


def test_a_model_that_does_not_take_the_images_is_an_error():
    with pytest.raises(ConfigError, match=r"model 'torchvision\.models:squeezenet1_1' does not accept 'digits' images"):
        layer_table(at({"model": "torchvision.models:squeezenet1_1"}))


@pytest.mark.parametrize("data", ["digits", "mnist", "cifar10"])
def test_the_shape_of_a_data_set_is_known_without_loading_it(data):
    classes, shape = data_shape(at({"data": data}))
    assert classes == 10
    assert math.prod(shape) in (64, 784, 3072)


@pytest.mark.parametrize("kind", ["method", "model", "data"])
def test_settings_are_listed_with_their_types_defaults_and_texts(kind):
    for name in plugins.describe(
        {"method": "trainables.methods", "model": "trainables.models"}.get(kind, "trainables.data")
    ):
        tree = at({kind: {"name": name}}).tree()[kind]
        defaults = {key: default for key, (_, default, _) in settings_of(kind, name).items()}
        assert json.loads(json.dumps(defaults)) == {key: value for key, value in tree.items() if key != "name"}
