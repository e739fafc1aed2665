"""BSQ: bit planes are trained under a group Lasso, and planes that empty are dropped; widths come out layer by layer.

Yang, Duan, Chen, Li 2021, "BSQ: exploring bit-level sparsity for mixed-precision neural network quantization", ICLR,
arXiv:2102.10462. Every convolution and linear layer, the first, the last and biases included, becomes bit planes
(`trainables/bit_planes.py`; equations 2 to 4). The loss gets

    penalty_strength * sum over layers of  (elements * planes / all elements) * sum over planes of the plane's norm,

equation 5, whose alpha is `penalty_strength`: planes empty as groups, those of large and wide layers first. At the
start, every `interval` epochs and after the last epoch of the search, planes are made binary again and empty ones
dropped at both ends (section 3.3), and momentum starts afresh. `training/finetune_epochs` then train under the found
widths. The paper: 350 epochs of SGD at 0.1 (a tenth after 250), interval 100, then 300 epochs from 0.01.

Widths. A tensor of n planes has 2^(n+1) - 1 values, and its codes take n + 1 bits: that is what `points` report, as for
any other method, and 0 for a layer whose weights are all zero. The paper counts n, without the sign, and counts no
shortcut convolution: `bit_report` gives its numbers.

Activations, `bits/LAYER/activation`, are quantized where a layer reads them, on the range of the mini-batch at hand
(`trainables/dynamic_range.py`), also in evaluation, whose numbers then depend on its batch; `activation_range =
running` evaluates on a running mean instead. The published network places its quantizers at the ReLUs, so that sums
and shortcuts carry quantized values too, leaves the output of the first ReLU and the pooled features float, and keeps
its 1 x 1 shortcut convolutions float. For its numbers: `placement = relus`, `float_layers = ["*.downsample.0"]` and
`bits/fc/activation = 4`. What a layer then reads is found on the first batch and counted so, 32 bits where it is float.

The public code (github.com/yanghr/BSQ) differs from the paper in three places, kept by `as_published` for comparison.
Its clamp of planes to 0..2 also hits every other parameter without `scale` or `bn` in its name: shortcut
convolutions, their batch norm, PACT's bound; in fine-tuning, the clamp to -1..1 those named `weight`. Fine-tuning
loses the biases of quantized layers, which come back in the exported network. And of several planes folded in a row
(`threshold` > 0) it forgets all but the last. A `scheme` from that code lists dead layers with 1, not 0.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from trainables import modules
from trainables.cost import FLOAT_BITS, INPUT_BITS, Bits, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError
from trainables.method import Method as Base
from trainables.method import Point
from trainables.methods._bit_plane_sgd import BitPlaneSGD, one_block
from trainables.methods._bit_planes import LARGEST, MAX_PLANES, BitPlanes, bit_tensors, penalty
from trainables.methods._bit_report import plane_table
from trainables.methods._dynamic_range import AsItComes, CodedConv2d, DynamicRange, put_at_relus, relus
from trainables.methods._lean_layers import LeanReLU
from trainables.plugins import nearest

if TYPE_CHECKING:
    from trainables.config import TrialConfig


def read_scheme(given: Any) -> Any:
    """A scheme as it is, or the content of the JSON file that a string names."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"give a JSON file {{layer: [weight planes, bias planes]}} ({error})") from error


Planes = Annotated[int, Field(ge=0, le=MAX_PLANES)]
Patterns = tuple[str, ...]


class Method(Base):
    """Bit planes under a group Lasso, on every convolution and linear layer."""

    activation_bits = range(1, 17)
    given_bits = frozenset({"activation"})
    learns_bits = True

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of BSQ."""

        penalty_strength: Annotated[float, Field(ge=0, description="weight of the group Lasso (alpha); 0: none")] = 5e-3
        interval: Annotated[int, Field(ge=1, description="epochs from one precision adjustment to the next")] = 100
        start_planes: Annotated[
            int, Field(ge=1, le=MAX_PLANES, description="planes at the start, without the sign")
        ] = 8
        threshold: Annotated[
            float, Field(ge=0, lt=100, description="drop planes that fewer percent of the weights use; lossy above 0")
        ] = 0.0
        scheme: Annotated[
            dict[str, tuple[Planes, Planes]] | None,
            BeforeValidator(read_scheme),
            Field(description="train at these fixed widths: JSON file {layer: [weight planes, bias planes]}"),
        ] = None
        placement: Annotated[
            Literal["inputs", "relus"], Field(description="quantize what layers read, or what ReLUs give (published)")
        ] = "inputs"
        activation_range: Annotated[
            Literal["batch", "running"], Field(description="range in evaluation: of its batch, or of the training")
        ] = "batch"
        float_layers: Annotated[Patterns, Field(description="layers that stay float, by name or pattern")] = ()
        float_inputs: Annotated[Patterns, Field(description="layers that read unquantized values, likewise")] = ()
        as_published: Annotated[bool, Field(description="keep what is wrong in the public code, to compare")] = False

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """Schemes and patterns of another network, and settings without effect."""
        settings = cls.Settings(**config.method.settings)
        names = [row.name for row in table.quantizable]
        for setting in ("float_layers", "float_inputs"):
            for pattern in getattr(settings, setting):
                if not any(fnmatchcase(name, pattern) for name in names):
                    yield f"method/{setting} = {pattern!r}: no such layer{nearest(pattern, names)}"
        if not any(_quantized(row, settings) for row in table.quantizable):
            yield "method/float_layers: leaves nothing to quantize; take method 'float'"
        if settings.placement == "relus" and settings.float_inputs:
            yield "method/float_inputs: has no effect with method/placement = 'relus'; leave one of them out"
        if settings.scheme is not None:
            yield from _scheme_faults(settings, table)

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Put weights and biases into bit representation, and quantizers before the layers or at the ReLUs.

        Raises:
            ConfigError: quantizers at ReLUs, in a network that has no two ReLU modules.
        """
        rows = [row for row in table.quantizable if _quantized(row, self.settings)]
        sites = self._sites(model, table, bits)
        elements = sum(row.weights + row.biases for row in rows)
        for row in rows:
            planes = (self.settings.scheme or {}).get(row.name, (self.settings.start_planes,) * 2)
            weight = model.get_submodule(row.name).weight
            layer = modules.replace(
                model, row, self._planes(weight, planes[0], elements), self._reads(row, bits, sites)
            )
            if isinstance(layer, modules.QuantizedConv2d):
                layer = CodedConv2d(layer, layer.weight_quantizer, layer.input_quantizer)
                model.set_submodule(row.name, layer)
            if layer.bias is not None:
                layer.add_module("bias_quantizer", self._planes(layer.bias, planes[1], elements))
        for name in relus(model):
            if type(model.get_submodule(name)) is nn.ReLU:
                model.set_submodule(name, LeanReLU())
        self.first = [row.name for row in rows if row.first]
        tensors = [tensor for _, _, tensor, _ in bit_tensors(model)]
        for tensor, block in zip(
            tensors, one_block([t.bit_planes.shape for t in tensors], like=[t.bit_planes for t in tensors]), strict=True
        ):
            tensor.bit_planes = block
        for _, _, tensor, leaf in bit_tensors(model):
            tensor.calibrate(leaf)
        if self.settings.scheme is not None:
            self.freeze(model)

    def _planes(self, weight: Any, planes: int, elements: int) -> BitPlanes:
        share = weight.numel() / elements
        return BitPlanes(weight.shape, planes, penalty=self.settings.penalty_strength * share).to(weight.device)

    def _sites(self, model: nn.Module, table: LayerTable, bits: Bits) -> list[int]:
        if self.settings.placement == "inputs":
            return []
        widths = {row.name: bits[row.name].activation for row in table.quantizable}
        sites = put_at_relus(model, widths, running=self.settings.activation_range == "running")
        if not sites:
            raise ConfigError("method/placement = 'relus': the model has no two ReLU modules; take 'inputs'")
        return sites

    def _reads(self, row: Layer, bits: Bits, sites: list[int]) -> modules.Quantizer | None:
        """What quantizes the input of one layer."""
        if row.first or any(fnmatchcase(row.name, pattern) for pattern in self.settings.float_inputs):
            return None
        width = bits[row.name].activation
        if sites:
            return AsItComes([width, *sorted(set(sites))])
        return DynamicRange(width, signed=row.signed, running=self.settings.activation_range == "running")

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Convert the weights as they are now, adjust once, and see what layers read on the first batch."""
        for _, _, tensor, leaf in bit_tensors(model):
            tensor.calibrate(leaf)
            if not tensor.frozen:
                self._adjust(tensor, leaf)
        modules.calibrate(model, images)

    def _adjust(self, tensor: BitPlanes, leaf: Tensor) -> None:
        tensor.adjust(leaf, self.settings.threshold, as_published=self.settings.as_published)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Tensors in bit representation with the optimizer of their planes, and all other parameters.

        Learning rate, momentum and weight decay are the same for both, as published.
        """
        tensors = [(tensor, leaf) for _, _, tensor, leaf in bit_tensors(model)]
        leaves = {id(leaf) for _, leaf in tensors}
        trained = [(tensor, leaf) for tensor, leaf in tensors if not tensor.muted]
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in leaves]
        planes = {
            "params": [leaf for _, leaf in trained],
            "bit_planes": [tensor for tensor, _ in trained],
            "optimizer": BitPlaneSGD,
        }
        return [planes, {"params": others}] if others else [planes]

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Cross-entropy plus the penalty, whose gradient `BitPlaneSGD` adds in closed form."""
        for loss in super().losses(model, images, labels):
            yield loss + penalty(m for m in model.modules() if isinstance(m, BitPlanes))

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Nothing, but for `as_published`: the clamp of everything with the wrong name."""
        if not self.settings.as_published:
            return
        frozen = any(tensor.frozen for _, _, tensor, _ in bit_tensors(model))
        planes = {id(leaf) for _, _, _, leaf in bit_tensors(model)}
        for name, parameter in model.named_parameters():
            if id(parameter) in planes or "bn" in name:
                continue
            if frozen and "weight" in name:
                parameter.clamp_(-1, 1)
            elif not frozen and "scale" not in name:
                parameter.clamp_(0, LARGEST)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Adjust the widths, at every interval and at the end of the search; momentum is lost then, as published."""
        if self.settings.scheme is not None or (epoch % self.settings.interval and epoch != self.epochs):
            return False
        for _, _, tensor, leaf in bit_tensors(model):
            self._adjust(tensor, leaf)
        return True

    def freeze(self, model: nn.Module) -> None:
        """Fix the widths; what is trained from here are normalized weights, rounded at those widths."""
        for _, role, tensor, leaf in bit_tensors(model):
            if not tensor.frozen and self.settings.scheme is None:
                tensor.adjust(leaf)
            tensor.freeze(leaf, mute=self.settings.as_published and role == "bias")

    def points(self, model: nn.Module) -> list[Point]:
        """One point: codes with their signs, 0 bits where all weights are zero."""
        bits, floats = {}, 0
        for name, layer in modules.quantized_layers(model):
            live = bool(layer.weight.any())
            floats += live
            reads = layer.input_quantizer
            activation = reads.bits if reads is not None else INPUT_BITS if name in self.first else FLOAT_BITS
            bits[name] = LayerBits(weight=layer.weight_quantizer.bits if live else 0, activation=activation)
        for module in model.modules():
            if isinstance(module, DynamicRange):
                floats += module.running or isinstance(module.clip_max, nn.Parameter)
        return [Point(label="final", bits=bits, extra_floats=floats)]

    def details(self, model: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        """Planes without the sign, and the percentage of ones in each, most significant first."""
        found: dict[str, dict[str, Any]] = {}
        for row in plane_table(model):
            role = "" if row.role == "weight" else "bias_"
            ones = " ".join(f"{share:.2f}" for share in row.shares)
            found.setdefault(row.layer, {}).update({f"{role}planes": row.planes, f"{role}ones_percent": ones})
        return found


def _quantized(row: Layer, settings: Any) -> bool:
    return not any(fnmatchcase(row.name, pattern) for pattern in settings.float_layers)


def _scheme_faults(settings: Any, table: LayerTable) -> Iterator[str]:
    """What of a scheme does not fit the network, and what has no effect beside it."""
    rows = {row.name: row for row in table.quantizable if _quantized(row, settings)}
    strange = [f"{name}{nearest(name, list(rows))}" for name in settings.scheme if name not in rows]
    lacking = [name for name in rows if name not in settings.scheme]
    if strange or lacking:
        what = f"has {strange[0]}" if strange else f"lacks {lacking[0]}"
        yield f"method/scheme: is of another network: {what} ({len(strange) + len(lacking)} layers differ)"
    for name, (_, biases) in settings.scheme.items():
        if biases and name in rows and not rows[name].biases:
            yield f"method/scheme/{name} = {biases} planes for biases: the layer has none; give 0"
    for setting in ("penalty_strength", "interval", "start_planes", "threshold"):
        value = getattr(settings, setting)
        if value != getattr(Method.Settings(), setting):
            yield f"method/{setting} = {value}: has no effect with method/scheme, which fixes the widths; leave it out"
