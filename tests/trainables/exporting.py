"""Networks to export: quantized and calibrated, with batch norm statistics of their own, but not trained further."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainables import plugins
from trainables.build import build_model, data_shape, load_data
from trainables.config import TrialConfig, merged, parse
from trainables.cost import LayerTable, size_bytes
from trainables.fit import Session
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.layouts import lay_out
from trainables.method import Method, Point

METHODS: dict[str, dict[str, Any]] = {
    "lsq": {"method": "lsq"},
    "lsq, per channel": {"method": {"name": "lsq", "per_channel": True, "symmetric": True}},
    "pact": {"method": "pact"},
    "dorefa": {"method": "dorefa"},
    "dorefa, variant A": {"method": {"name": "dorefa", "variant": "A"}},
}
"""The baselines, with the settings that change what is stored."""

MIXED = {
    "lenet5": {"bits/conv2/weight": 3, "bits/conv2/activation": 5, "bits/fc1/weight": 2, "bits/fc1/activation": 2},
    "resnet20": {
        "bits/layer1.*/weight": 2,
        "bits/layer1.*/activation": 3,
        "bits/layer2.*/weight": 5,
        "bits/layer2.*/activation": 6,
        "bits/layer3.*/weight": 7,
        "bits/layer3.*/activation": 4,
    },
}
"""Widths that differ from layer to layer."""


class Exported:
    """A network with all that an export needs to know.

    Args:
        tree: a configuration without `model` and `data` left out.
        values: by address, over `tree`.
        start: float weights; None draws them.
    """

    def __init__(self, tree: Mapping[str, Any], values: Mapping[str, Any], start: Mapping[str, Tensor] | None = None):
        self.config: TrialConfig = parse(merged(dict(tree), values))
        classes, self.shape = data_shape(self.config)
        self.model: nn.Module = build_model(self.config, classes, self.shape, seed=0)
        if start is not None:
            self.model.load_state_dict(start)
        self.table: LayerTable = trace(self.model, self.shape)
        plugin = plugins.attribute("methods", self.config.method.name, "Method")
        self.method: Method = plugin(plugin.Settings(**self.config.method.settings))
        self.method.prepare(self.model, self.table, resolve_bits(self.config, self.table))
        lay_out(self.model, torch.device("cpu"))
        images = self.noise(16) if start is None else digits()[:64]
        self.method.calibrate(self.model, images)
        if start is None:
            self._shake(images)
        self.model.eval()

    @torch.no_grad()
    def _shake(self, images: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
        self.model.train()(images)

    def noise(self, count: int) -> Tensor:
        images = torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(count))
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return self.model(images)

    @property
    def size_bytes(self) -> int:
        """As the search counts."""
        return self.size_of(self.method.points(self.model)[0])

    def size_of(self, point: Point) -> int:
        """As the search counts."""
        return size_bytes(self.table, point.bits, extra_floats=point.extra_floats, output_share=point.output_share)


def baseline(name: str, model: str, data: str, values: Mapping[str, Any]) -> Exported:
    """One of `METHODS`."""
    return Exported({**METHODS[name], "model": model, "data": data}, values)


@cache
def digits() -> Tensor:
    """Images of handwritten digits, (count, 1, 8, 8)."""
    config = parse({"method": "float", "model": "lenet5", "data": "digits"})
    split = load_data(config, None).train
    batches = split.batches(512, device=torch.device("cpu"), seed=None, augment=False)
    return torch.cat([images for images, _ in batches])[:1000]


@cache
def trained(model: str) -> dict[str, Tensor]:
    """State of a float network that tells digits apart, trained for two epochs (about a second)."""
    small = {"lenet5": {}, "resnet20": {"model/depth": 8, "model/width": 8}}[model]
    tree = {"method": "float", "model": model, "data": "digits", "training": {"epochs": 2}}
    session = Session(parse(merged(tree, small)))
    optimizer = torch.optim.Adam(session.model.parameters(), lr=0.01)
    session.model.train()
    for epoch in (1, 2):
        for images, labels in session.batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(session.model(images), labels).backward()
            optimizer.step()
    return session.model.state_dict()


def trained_baseline(name: str, model: str, values: Mapping[str, Any]) -> Exported:
    """One of `METHODS`, from trained float weights, on digits."""
    small = {"lenet5": {}, "resnet20": {"model/depth": 8, "model/width": 8}}[model]
    return Exported({**METHODS[name], "model": model, "data": "digits"}, {**small, **values}, trained(model))
