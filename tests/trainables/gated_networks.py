"""Networks with gates, for the tests of Bayesian Bits."""

from typing import Any

import torch
from torch import Tensor, nn

from trainables.build import build_model
from trainables.config import parse
from trainables.cost import LayerTable
from trainables.layers import trace
from trainables.methods.bayesian_bits import Method

Network = tuple[nn.Module, LayerTable]

SHAPES = {"lenet5": (1, 28, 28), "vgg7": (3, 32, 32), "resnet18": (3, 64, 64), "mobilenet_v2": (3, 32, 32)}


def network(name: str, shape: tuple[int, int, int] | None = None, **fields: Any) -> Network:
    shape = shape or SHAPES[name]
    config = parse({"method": "float", "model": {"name": name, **fields}, "data": "digits"})
    model = build_model(config, 10, shape, seed=0)
    return model, trace(model, shape)


def prepared(model: nn.Module, table: LayerTable, **settings: Any) -> Method:
    method = Method(Method.Settings(**settings))
    method.prepare(model, table, {})
    return method


def images(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def close_half(model: nn.Module, layer: str) -> None:
    logits = model.get_submodule(layer).weight_quantizer.pruning_logits
    logits.data[: len(logits) // 2] = -6.0
