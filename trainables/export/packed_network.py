"""The network that a packed file is put into: built anew from its configuration, and compared tensor by tensor."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules, plugins
from trainables.build import build_model
from trainables.config import TrialConfig, parse
from trainables.cost import LayerBits
from trainables.errors import ConfigError
from trainables.export.coded import at_this_point
from trainables.layers import trace


def source_of(config: TrialConfig) -> dict[str, Any]:
    """What a network is built from: settings of method, model and data that are not the defaults."""
    tree, found = config.tree(), {}
    for part in ("method", "model", "data"):
        name = tree[part]["name"]
        usual = parse({"method": "float", "model": "lenet5", "data": "digits", part: name}).tree()[part]
        changed = {key: value for key, value in tree[part].items() if key not in usual or usual[key] != value}
        found[part] = {"name": name, **changed} if changed else name
    return found


def rebuilt(network: Mapping[str, Any], *, prepared: bool) -> nn.Module:
    """The network of a configuration, `prepared` by its method or not; its weights come from elsewhere."""
    config = parse(network["config"])
    if config.model.settings.get("pretrained"):
        settings = {**config.model.settings, "pretrained": False}
        config = replace(config, model=replace(config.model, settings=settings))
    shape = tuple(network["input_shape"])
    model = build_model(config, network["classes"], shape, seed=0).eval()
    if not prepared:
        return model
    plugin = plugins.attribute("methods", config.method.name, "Method")
    table = trace(model, shape)
    bits = {row.name: LayerBits(weight=8, activation=8) for row in table.quantizable}
    plugin(plugin.Settings(**config.method.settings)).prepare(model, table, bits)
    return at_this_point(model)


def plain_like(twin: nn.Module, config: TrialConfig, network: Mapping[str, Any]) -> tuple[nn.Module, bool]:
    """The plain network if it has the tensors of `twin`, else the one that the method prepares, which is then said."""
    for prepared in (False, True):
        plain = rebuilt(network, prepared=prepared).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        wanted, own = ({name: tuple(t.shape) for name, t in _outside(m).items()} for m in (plain, twin))
        strange = [name for name in {**own, **wanted} if own.get(name) != wanted.get(name)]
        if not strange:
            break
    if strange:
        raise ConfigError(
            f"{strange[0]}: this network is not the one that method {config.method.name!r} makes of model "
            f"{config.model.name!r} ({len(strange)} tensors differ), and a packed file rebuilds that one"
        )
    for name, tensor in others(twin).items():
        if tensor.dtype != torch.float32:
            raise ConfigError(f"{name} is {tensor.dtype}: a packed file holds float32 beside the codes")
    return plain, prepared


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what belongs to quantizers themselves; what they read through does not."""
    quantizers = {name for name, module in model.named_modules() if isinstance(module, modules.Quantizer)}
    return {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in quantizers}


def multiplying(model: nn.Module) -> Iterator[str]:
    """Names of the layers that methods can quantize, in the order of definition."""
    return (name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))


def norms(model: nn.Module) -> Iterator[_BatchNorm]:
    """All batch norms, in the order of definition."""
    return (module for module in model.modules() if isinstance(module, _BatchNorm))


def others(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither weights or biases of quantized layers, nor in batch norms, nor of quantizers."""
    mine = {id(t) for _, layer in modules.quantized_layers(model) for t in (layer.weight, layer.bias) if t is not None}
    for norm in norms(model):
        mine |= {id(tensor) for tensor in [*norm.parameters(), *norm.buffers()]}
    for module in model.modules():
        if isinstance(module, modules.Quantizer):
            mine |= {id(t) for t in [*module.parameters(recurse=False), *module.buffers(recurse=False)]}
    state = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in state.items() if id(tensor) not in mine}


def set_norm(norm: _BatchNorm, scale: Tensor, shift: Tensor) -> None:
    """Let a batch norm multiply by `scale` and add `shift`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    norm.eps = 0.0
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
