"""From names to objects: the data set, the model and its layer table that a configuration speaks of."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainables import plugins
from trainables.config import Plugin, TrialConfig
from trainables.cost import LayerTable
from trainables.errors import ConfigError, PluginError
from trainables.layers import trace
from trainables.splits import Splits, at_resolution

_tables: dict[str, LayerTable] = {}


def load_data(config: TrialConfig, root: Path | None, *, download: bool = False) -> Splits:
    """The splits of the configured data set; loaded once a process for each root and settings.

    Raises:
        DataError: missing, corrupt or misshapen data.
    """
    return plugins.attribute("data", config.data.name, "splits")(root, download=download, **config.data.settings)


def data_shape(config: TrialConfig) -> tuple[int, tuple[int, int, int]]:
    """Number of classes and input shape of the configured data set, without loading it.

    A setting `resolution` is the images' side in pixels. A data set where settings change more than that defines
    `shape(settings) -> (classes, input_shape)`.

    Raises:
        ConfigError: a setting out of range.
    """
    module = plugins.load("data", plugins.split(config.data.name)[0])
    if hasattr(module, "shape"):
        return module.shape(config.data.settings)
    for wanted in ("CLASSES", "INPUT_SHAPE"):
        if not hasattr(module, wanted):
            raise PluginError(f"{module.__name__!r} does not define {wanted!r}; a data set must")
    side = config.data.settings.get("resolution")
    return module.CLASSES, module.INPUT_SHAPE if side is None else at_resolution(module.INPUT_SHAPE, side)


def normalisation(config: TrialConfig) -> dict[str, list[float]]:
    """How a network's input is made from pixels of 0..1, by channel: minus `mean`, over `std`.

    Empty for a data set of a person's own that does not say so with `MEAN` and `STD`.
    """
    module = plugins.load("data", plugins.split(config.data.name)[0])
    found = {name.lower(): getattr(module, name, None) for name in ("MEAN", "STD")}
    return {name: list(values) for name, values in found.items() if values is not None}


def build_model(config: TrialConfig, classes: int, input_shape: tuple[int, int, int], *, seed: int) -> nn.Module:
    """The configured network with fresh weights drawn from `seed`; the global random state is left alone.

    A factory of one's own is called with whichever of `classes`, `num_classes` and `input_shape` it takes.

    Raises:
        ConfigError: the factory refuses its settings.
    """
    build = plugins.attribute("models", config.model.name, "build")
    parameters = inspect.signature(build).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    offered = {"classes": classes, "num_classes": classes, "input_shape": input_shape}
    given = {name: value for name, value in offered.items() if name in parameters}
    if not given and takes_any:
        given = {"num_classes": classes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = build(**given, **config.model.settings)
        except TypeError as error:
            raise ConfigError(f"model {config.model.name!r} cannot be built: {error}") from error
    if not isinstance(model, nn.Module):
        raise PluginError(f"model {config.model.name!r} made a {type(model).__name__}, not a torch.nn.Module")
    return model


def settled(config: TrialConfig) -> TrialConfig:
    """The configuration with numbers where settings of the model leave them to the images: the same computation.

    A model with such settings defines `settled(settings, input_shape) -> settings`.
    """
    name = config.model.name
    path, other = plugins.split(name)
    module = plugins.load("models", path)
    if other or not hasattr(module, "settled"):
        return config
    settings = module.settled(config.model.settings, data_shape(config)[1])
    return replace(config, model=Plugin(name=name, settings=settings))


def layer_table(config: TrialConfig) -> LayerTable:
    """The layer table of the configured model on its data set's input shape; traced once a process for each.

    Raises:
        ConfigError: the model does not accept the input shape.
    """
    key = json.dumps([config.tree()["model"], config.tree()["data"]], sort_keys=True)
    if key not in _tables:
        classes, shape = data_shape(config)
        network = build_model(config, classes, shape, seed=0)
        try:
            _tables[key] = trace(network, shape)
        except RuntimeError as error:
            name = config.model.name
            raise ConfigError(f"model {name!r} does not accept {config.data.name!r} images {shape}: {error}") from error
    return _tables[key]
