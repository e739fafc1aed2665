"""A trained network as codes, encodings and floats: what every export starts from.

Each quantized layer tells its encodings, and the codes are checked to stand for exactly the weights that the quantizer
makes. What is left are quantizers that only round, and modules of torch's own.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainables import modules
from trainables.cost import FLOAT_BITS
from trainables.encoding import MOST_BITS, Encoding, codes_of
from trainables.errors import ConfigError
from trainables.layouts import forget_layout


class Rounded(modules.Quantizer):
    """Activations rounded to the levels of an encoding.

    Args:
        encoding: None rounds nothing.
        before: what x goes through first, if anything.
        bits: width where there is no encoding: quantized further up, or 32.
    """

    def __init__(self, encoding: Encoding | None, before: nn.Module | None = None, *, bits: int = FLOAT_BITS) -> None:
        super().__init__(2, signed=False)
        self.known = encoding
        self.width = bits if encoding is None else encoding.bits
        self.q_min.fill_(0.0 if encoding is None else encoding.q_min)
        self.q_max.fill_(2.0**bits - 1 if encoding is None else encoding.q_max)
        self.first = before

    @property
    def bits(self) -> int:
        """Width in bits."""
        return self.width

    def forward(self, x: Tensor) -> Tensor:
        """The rounded `x`, any shape."""
        x = x if self.first is None else self.first(x)
        return x if self.known is None else self.known.rounded(x)

    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """As given."""
        return self.known

    def before(self) -> nn.Module | None:
        """As given."""
        return self.first


class Decoded(Rounded):
    """Weights that are decoded codes already.

    Args:
        encoding: None for floats.
        kept: which output channels are left; None: all.
    """

    left: Tensor | None

    def __init__(self, encoding: Encoding | None, kept: Tensor | None = None) -> None:
        super().__init__(encoding)
        self.left = kept

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def kept(self) -> Tensor | None:
        """As given."""
        return self.left


@dataclass(frozen=True, kw_only=True)
class Read:
    """A quantizer of activations.

    Attributes:
        encoding: None where nothing is rounded.
        before: what a tensor goes through first; None: nothing.
        bits: width, 32 for floats.
        shared: name of the first layer, or place, with this very quantizer; None: it is this one.
    """

    encoding: Encoding | None
    before: nn.Module | None
    bits: int
    shared: str | None = None


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A quantized layer without its floats.

    Attributes:
        codes: of the weights, int32, in the shape of the weights; None when they are float.
        weight: encoding of the weights, None when they are float.
        values: the weights themselves, as the network computes with them. Their strides belong to what the last bit of
            the logits depends on: with one input channel two layouts look alike, but torch takes a kernel for each.
        reads: of what the layer reads, None when it reads what comes.
        kept: which output channels are left, bool; None: all.
    """

    codes: Tensor | None
    weight: Encoding | None
    values: Tensor
    reads: Read | None
    kept: Tensor | None

    @property
    def weight_bits(self) -> int:
        """Width of the weights, 32 for floats."""
        return FLOAT_BITS if self.weight is None else self.weight.bits


@torch.no_grad()
def coded(model: nn.Module) -> dict[str, Coded]:
    """Codes and encodings of all quantized layers of a model, by name.

    Raises:
        ConfigError: names a layer whose weights or inputs have no codes that a file could hold.
    """
    layers: dict[str, Coded] = {}
    readers: dict[nn.Module, str] = {}
    for name, layer in modules.quantized_layers(model):
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        try:
            weight = weights.encoding(layer.weight)
            reads = None if inputs is None else read(inputs, readers.get(inputs))
            if weight is not None and weight.bits > MOST_BITS:
                raise ConfigError(f"its weights have {weight.bits} bits; {HELD}")
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from error
        if inputs is not None:
            readers.setdefault(inputs, name)
        values, kept = weights(layer.weight).detach(), weights.kept()
        if kept is not None:
            kept = None if bool(kept.all()) else kept.cpu()
        if kept is not None:
            zeroed = values.masked_fill(~kept.view(-1, *[1] * (values.dim() - 1)), 0.0)
            values = torch.empty_strided(values.shape, values.stride()).copy_(zeroed)  # which masking may change
        if kept is not None and not bool(kept.any()):
            weight = NOTHING
        codes = None if weight is None else codes_of(name, values, weight).to(torch.int32).contiguous()
        layers[name] = Coded(codes=codes, weight=weight, values=values, reads=reads, kept=kept)
    return layers


HELD = f"files hold codes of 1..{MOST_BITS} bits, and floats: train at {MOST_BITS} bits or fewer, or at {FLOAT_BITS}"
NOTHING = Encoding(bits=0, q_min=0, q_max=0, scale=torch.ones(()))
"""The encoding of weights that are all 0."""


def read(quantizer: modules.Quantizer, shared: str | None = None) -> Read:
    """A quantizer of activations in words.

    Raises:
        ConfigError: it has no codes, or none that a file could hold.
    """
    encoding = quantizer.encoding()
    if encoding is not None and MOST_BITS < encoding.bits < FLOAT_BITS:
        raise ConfigError(f"its inputs have {encoding.bits} bits; {HELD}")
    return Read(encoding=encoding, before=quantizer.before(), bits=quantizer.bits, shared=shared)


def standing(model: nn.Module) -> dict[str, Read]:
    """Quantizers that belong to no quantized layer, by name: in the place of a ReLU, or of what a module makes.

    Raises:
        ConfigError: names one that has no codes.
    """
    of_layers = {
        quantizer
        for _, layer in modules.quantized_layers(model)
        for quantizer in (layer.weight_quantizer, layer.input_quantizer)
    }
    found: dict[str, Read] = {}
    places: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, modules.Quantizer) and module not in of_layers:
            try:
                found[name] = read(module, places.get(module))
                places.setdefault(module, name)
            except ConfigError as error:
                raise ConfigError(f"module {name}: {error}") from error
    return found


def at_this_point(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which modules that stand for one of several are replaced by the one in use.

    Such a module, and one that an export could not follow, has a method `plain() -> nn.Module`.
    """
    twin = copy.deepcopy(model).cpu().eval()
    for name, module in list(twin.named_modules()):
        if callable(getattr(module, "plain", None)):
            modules.put(twin, name, module.plain().eval())
    for _, layer in modules.quantized_layers(twin):
        layer._modules.pop("bias_quantizer", None)  # the bias holds what it makes
        if isinstance(layer, modules.QuantizedConv2d):
            forget_layout(layer)
    return twin


def fixed(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose weights are decoded and whose quantizers only round: no training code is left.

    Raises:
        ConfigError: as `coded` and `standing`.
    """
    twin = at_this_point(model)
    layers = coded(twin)
    for name, layer in layers.items():
        place: Any = twin.get_submodule(name)
        place.weight = nn.Parameter(layer.values)
        place.weight_quantizer = Decoded(layer.weight, layer.kept)
        place.input_quantizer = None if layer.reads is None else rounded(layer.reads)
    for name, reads in standing(twin).items():
        twin.set_submodule(name, rounded(reads))
    return twin.requires_grad_(False)


def rounded(reads: Read) -> Rounded:
    """A quantizer that does what is read."""
    return Rounded(reads.encoding, reads.before, bits=reads.bits)


def widths(layers: Mapping[str, Coded]) -> dict[str, list[int | None]]:
    """Bits of weights and of what a layer reads, None where that has no quantizer."""
    return {name: [layer.weight_bits, layer.reads.bits if layer.reads else None] for name, layer in layers.items()}


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
