"""A trained network as codes, encodings and floats: what every export starts from.

Each quantized layer tells its encodings, and the codes are checked to stand for exactly the weights that the quantizer
makes. What is left are quantizers that only round, and batch norms that only multiply and add.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules
from trainables.encoding import Encoding, codes_of
from trainables.errors import ConfigError


class Rounded(modules.Quantizer):
    """Activations rounded to the levels of an encoding."""

    scale: Tensor

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(encoding.bits, signed=encoding.q_min < 0)
        self.q_min.fill_(encoding.q_min)
        self.q_max.fill_(encoding.q_max)
        self.register_buffer("scale", encoding.scale)
        self.fixed = replace(encoding, scale=torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        """The rounded `x`, any shape."""
        encoding = self.encoding()
        return encoding.decode(encoding.codes(x))

    def encoding(self, x: Tensor | None = None) -> Encoding:
        """As given."""
        return replace(self.fixed, scale=self.scale)


class Decoded(Rounded):
    """Weights that are decoded codes already."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A quantized layer without its floats.

    Attributes:
        codes: of the weights, int32, in the shape of the weights; None when they are float.
        weight: encoding of the weights, None when they are float.
        reads: encoding of what the layer reads, None when it reads floats.
        strides: of the quantized weights. With one input channel two layouts look alike, and torch takes another
            kernel for each, so that they belong to what the last bit of the logits depends on.
    """

    codes: Tensor | None
    weight: Encoding | None
    reads: Encoding | None
    strides: tuple[int, ...]


@torch.no_grad()
def coded(model: nn.Module) -> dict[str, Coded]:
    """Codes and encodings of all quantized layers of a model, by name.

    Raises:
        ConfigError: names a layer whose weights or inputs have no affine codes, or a quantizer outside of a layer.
    """
    layers = {}
    known: set[nn.Module] = set()
    for name, layer in modules.quantized_layers(model):
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        known |= {weights} if inputs is None else {weights, inputs}
        try:
            weight = weights.encoding(layer.weight)
            reads = None if inputs is None else inputs.encoding()
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from error
        values = weights(layer.weight)
        codes = None if weight is None else codes_of(name, values, weight).to(torch.int32).contiguous().cpu()
        layers[name] = Coded(codes=codes, weight=weight, reads=reads, strides=values.stride())
    for name, module in model.named_modules():
        if isinstance(module, modules.Quantizer) and module not in known:
            raise ConfigError(
                f"module {name}: a {type(module).__name__} that belongs to no quantized layer cannot be exported; only "
                "weights and what layers read can"
            )
    return layers


def at_this_point(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which modules that stand for one of several are replaced by the one in use.

    Such a module has a method `plain() -> nn.Module`.
    """
    twin = copy.deepcopy(model).cpu().eval()
    for name, module in list(twin.named_modules()):
        if callable(getattr(module, "plain", None)):
            twin.set_submodule(name, module.plain().eval())
    return twin


def fixed(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are decoded and whose quantizers only round: no training code is left.

    Raises:
        ConfigError: as `coded`.
    """
    twin = at_this_point(model)
    for name, layer in coded(twin).items():
        place: Any = twin.get_submodule(name)
        if layer.weight is not None and layer.codes is not None:
            values = torch.empty_strided(layer.codes.shape, layer.strides)
            place.weight = nn.Parameter(values.copy_(layer.weight.decode(layer.codes.float())))
            place.weight_quantizer = Decoded(layer.weight)
        if layer.reads is not None:
            place.input_quantizer = Rounded(layer.reads)
    return twin.requires_grad_(False)


def scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies by and adds in evaluation, as torch computes them; shape (channels,) each.

    Raises:
        ConfigError: it has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError("a batch norm without running statistics depends on the batch and cannot be exported")
    # In numpy: torch's vectorised square root is off in the last bit now and then, that of its batch norm is not.
    inverse = np.float32(1) / np.sqrt(norm.running_var.float().numpy() + np.float32(norm.eps))
    scale = torch.from_numpy(inverse)
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    nothing = scale.new_zeros(1, len(scale))
    shift = functional.batch_norm(nothing, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return scale, shift.detach()[0]  # what torch adds to 0: it may compute it with a fused multiplication
