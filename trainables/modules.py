"""Quantized convolution and linear layers, and the quantizer that they hold two of.

A quantized layer quantizes what it reads, then its weights, and computes as before. It takes over the parameters of the
layer that it replaces, so the state dict of the float network loads into the quantized one.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trainables import heavy_convolution
from trainables.cost import Layer
from trainables.encoding import Encoding
from trainables.errors import ConfigError
from trainables.modes import in_mode


class Quantizer(nn.Module):
    """A map from a tensor to what its integer codes stand for. Its width is data: two buffers, never a branch.

    Attributes:
        q_min: smallest code; shape ().
        q_max: largest code; shape ().
        signed: whether codes below zero exist; a property of the tensor's place in the network, not of the width.
    """

    q_min: Tensor
    q_max: Tensor

    def __init__(self, bits: int, *, signed: bool, symmetric: bool = False) -> None:
        super().__init__()
        self.signed = signed
        self.symmetric = symmetric
        self.register_buffer("q_min", torch.zeros(()))
        self.register_buffer("q_max", torch.zeros(()))
        self.set_bits(bits)

    def set_bits(self, bits: int) -> None:
        """Change the width, in place, without a new graph.

        Raises:
            ValueError: `bits` below 1, or below 2 when signed: codes -1, 0 and 1 take two bits.
        """
        lowest = 2 if self.signed else 1
        if bits < lowest:
            raise ValueError(f"bits = {bits}: a quantizer with signed = {self.signed} takes {lowest} or more")
        if self.signed:
            self.q_max.fill_(2 ** (bits - 1) - 1)
            self.q_min.copy_(-self.q_max if self.symmetric else -self.q_max - 1)
        else:
            self.q_max.fill_(2**bits - 1)
            self.q_min.zero_()

    @property
    def bits(self) -> int:
        """Width in bits; reads the buffers, so not for the hot loop."""
        return math.ceil(math.log2(float(self.q_max - self.q_min) + 1))

    def calibrate(self, x: Tensor) -> None:
        """Set initial scales from the first tensor seen; nothing by default."""

    def take_scale(self, scale: Tensor) -> None:
        """Start from a scale that was trained before, shape (); ignored by default.

        Args:
            scale: what one step of the codes is worth.
        """

    def forward(self, x: Tensor) -> Tensor:
        """The quantized `x`, same shape."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it quantizes")

    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """What the codes stand for, for exports; None where `forward` changes nothing (32 bits).

        Args:
            x: the float weights, for quantizers whose scale comes from them; None for activations.

        Raises:
            ConfigError: the levels are not affine, or the quantizer does not tell.
        """
        raise ConfigError(f"{type(self).__name__} has no affine codes that an exported file could hold")

    def before(self) -> nn.Module | None:
        """What `x` goes through before it is rounded, as a module for exports; None: nothing."""
        return None

    def kept(self) -> Tensor | None:
        """Which output channels pruning has left of weights, for exports; bool, shape (channels,); None: all."""
        return None


class NormSets:
    """What a batch norm of several sets has in common, whatever chooses the set.

    Attributes:
        used: which set is in use.
    """

    used: Hashable

    def normalised(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """What the set in use makes of `x` with these statistics, (channels,) each, in place of its own."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it normalises")

    def take(self, mean: Tensor, var: Tensor) -> None:
        """Replace the statistics of the set in use."""
        raise NotImplementedError(f"{type(self).__name__} keeps no statistics")

    def plain_state(self) -> dict[str, Tensor]:
        """The set in use as the state of a plain batch norm."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its sets hold")


def _take(new: "QuantizedLayer", layer: nn.Module, weights: Quantizer, inputs: Quantizer | None) -> None:
    """Give a new quantized layer the parameters of `layer`, and its quantizers."""
    new.weight, new.bias = layer.weight, layer.bias  # type: ignore[assignment]
    new.weight_quantizer, new.input_quantizer = weights, inputs
    new.train(layer.training)


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose input and weights are quantized; bias and accumulation stay float.

    Attributes:
        heavy: whether it has many weights for its work, and trains in another way for it (`heavy_convolution`).
    """

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None
    heavy = False

    def __init__(self, layer: nn.Conv2d, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> None:
        nn.Conv2d.__init__(
            self,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        _take(self, layer, weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in `nn.Conv2d`."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.heavy and self.training and x.is_cpu:
            return heavy_convolution.convolve(self, x, weight, bias)
        return super()._conv_forward(x, weight, bias)


class QuantizedLinear(nn.Linear):
    """A linear layer whose input and weights are quantized; bias and accumulation stay float."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    def __init__(self, layer: nn.Linear, weight_quantizer: Quantizer, input_quantizer: Quantizer | None) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        _take(self, layer, weight_quantizer, input_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in `nn.Linear`."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return nn.functional.linear(x, self.weight_quantizer(self.weight), self.bias)


QuantizedLayer = QuantizedConv2d | QuantizedLinear


def replace(
    model: nn.Module, row: Layer, weight_quantizer: Quantizer, input_quantizer: Quantizer | None
) -> QuantizedLayer:
    """Put a quantized layer in the place of the one named `row.name`, with the same parameters.

    Raises:
        TypeError: the layer is neither a convolution nor a linear layer.
    """
    layer = model.get_submodule(row.name)
    new: QuantizedLayer
    if isinstance(layer, nn.Conv2d):
        new = QuantizedConv2d(layer, weight_quantizer, input_quantizer)
        new.heavy = heavy_convolution.is_heavy(row, layer)
    elif isinstance(layer, nn.Linear):
        new = QuantizedLinear(layer, weight_quantizer, input_quantizer)
    else:
        raise TypeError(f"{row.name} is a {type(layer).__name__}; only Conv2d and Linear can be quantized")
    model.set_submodule(row.name, new)
    return new


def keep_float32(model: nn.Module) -> None:
    """Let quantizers compute in float32 where the rest of the network does not, and the network return float32.

    Wraps their `forward`, in place; under `torch.autocast` only matrix products and convolutions are left to it.
    """
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.forward = MethodType(_in_float32, module)  # type: ignore[method-assign]
    model.register_forward_hook(lambda _, images, logits: logits.float())


def _in_float32(quantizer: Quantizer, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return type(quantizer).forward(quantizer, x.float())


OUTPUT = "output_quantizer"


def quantize_output(module: nn.Module, quantizer: Quantizer) -> None:
    """Let `module` quantize what it makes; the quantizer becomes its child `output_quantizer`."""
    module.add_module(OUTPUT, quantizer)
    module.register_forward_hook(_through_output_quantizer)


def _through_output_quantizer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return module.get_submodule(OUTPUT)(output)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one named `name`, whose output is quantized as before."""
    quantizer = getattr(model.get_submodule(name), OUTPUT, None)
    model.set_submodule(name, module)
    if quantizer is not None:
        quantize_output(module, quantizer)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """Names and modules of all quantized layers, in the order of definition."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedConv2d | QuantizedLinear):
            yield name, module


def scale_key(layer: str, role: str, bits: int) -> str:
    """Name of a trained scale in the file that a trial starts from; `role` is `weight` or `input`."""
    return f"scale/{layer}/{role}/{bits}"


def take_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Let the quantizers start from trained scales, where there is one for their layer, role and width."""
    for name, layer in quantized_layers(model):
        for role, quantizer in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
            scale = None if quantizer is None else scales.get(scale_key(name, role, quantizer.bits))
            if quantizer is not None and scale is not None:
                quantizer.take_scale(scale.to(quantizer.q_max.device))


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Let every quantizer set its scales from one batch, layer after layer, each seeing quantized inputs already.

    Batch norm runs on batch statistics, and its running statistics are left as they were.

    Args:
        model: with quantized layers.
        images: one batch of the network's input, (batch, channels, height, width).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms if norm.num_batches_tracked is not None]
    for norm in norms:
        norm.momentum = 0.0
    try:
        with in_mode(model, training=True), ExitStack() as hooks:
            for _, layer in quantized_layers(model):
                layer.weight_quantizer.calibrate(layer.weight)
                if layer.input_quantizer is not None:
                    hooks.enter_context(layer.input_quantizer.register_forward_pre_hook(_calibrate_input))
            model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for norm, count in zip((n for n in norms if n.num_batches_tracked is not None), counts, strict=True):
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]


def _calibrate_input(quantizer: Any, args: tuple[Tensor, ...]) -> None:
    quantizer.calibrate(args[0])
