"""SAT, scale-adjusted training: normalised weights brought back to scale, PACT with its exact gradient.

Jin et al. 2020, "Neural network quantization with scale-adjusted training" (BMVC; arXiv:1912.10207). Weights are
`2 q((t / m + 1) / 2) - 1` with `t = tanh(w)`, `m = max |t|` (as in DoReFa-Net), which makes them about ten times as
large as they were. A batch norm absorbs that, a layer without one does not: its result would saturate the softmax. So
linear layers are multiplied by `s = target / std(W)`, a constant for the gradient. The target is the spread of the
float weights (`rescale_target` = `stddev`) or `1 / sqrt(outputs)` (`constant`; of a convolution: output channels x
kernel size, groups ignored as in the authors' code). The paper prefers `constant`, made for 1000 classes and training
from scratch; with ten it makes the logits large, so the default keeps the function of the float start. Convolutions
are rescaled with `rescale_conv`; by default in networks without batch norm.

Activations are clipped at `clip_max` (alpha), whose gradient counts the rounding error (`calibrated_clip`). The
rounding has three schemes (`_sat_kernels`), one for all weights, one for all activations; weights are `centered` by
default, which the authors recommend for few bits, not their `modified`, whose mean is half a level too low. Weight
decay acts on weights with more than one input channel alone, neither on depthwise convolutions nor on biases, batch
norm and clip levels: the rule of the authors' code.

Where the authors' code differs. It divides a linear layer's bias by `s` in evaluation, instead of multiplying the
weights; its evaluation logits are those of training divided by `s`. Here both agree; `_sat_as_published` has the other.
It starts clip levels at 8 (convolutions) and 10 (linear layers) and reads signed tensors one-sided, which zeroes half
of what a linear bottleneck makes. Here they start from the first batch unless `clip_init` says `published`, and signed
tensors are clipped at both ends (its option `double_side`). 32 bits are float: weights are normalised (`clamp`) but not
rounded, activations are clipped only with `clip_float` (`pact_fp`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import nn

from trainables import modules
from trainables.cost import FLOAT_BITS, Bits, Layer, LayerTable
from trainables.method import Method as Base
from trainables.method import read_bits, split_parameters
from trainables.methods._sat_kernels import Scheme
from trainables.methods._sat_quantizers import SatClip, SatWeight, Target

if TYPE_CHECKING:
    from trainables.config import TrialConfig

CLIP_INIT = {"conv": 8.0, "linear": 10.0}
"""Where clip levels start in the authors' code."""


class Method(Base):
    """SAT on every convolution and linear layer, each with a width of its own: the individual run."""

    weight_bits = range(1, FLOAT_BITS + 1)
    activation_bits = range(1, FLOAT_BITS + 1)

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of SAT."""

        weight_scheme: Annotated[Scheme, Field(description="levels of the weights")] = "centered"
        activation_scheme: Annotated[Scheme, Field(description="levels of the activations")] = "original"
        rescale: Annotated[bool, Field(description="scale adjustment of linear layers")] = True
        rescale_conv: Annotated[
            bool | None, Field(description="scale adjustment of convolutions; None: if there is no batch norm")
        ] = None
        rescale_target: Annotated[
            Target, Field(description="spread of rescaled weights: that of the float ones, or 1 / sqrt(outputs)")
        ] = "stddev"
        clip_init: Annotated[
            Literal["batch", "published"], Field(description="starting clip levels; published: 8, linear layers 10")
        ] = "batch"
        clip_lr: Annotated[float, Field(gt=0, description="learning rate of clip levels over that of weights")] = 1.0
        clamp: Annotated[bool, Field(description="normalise weights of 32 bits, too")] = True
        clip_float: Annotated[bool, Field(description="clip activations of 32 bits, too")] = False

    has_norm = True

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """Settings without effect."""
        method = cls(cls.Settings(**config.method.settings))
        method.has_norm = table.norm_channels > 0
        given = method.settings
        if given.rescale_target != cls.Settings.rescale_target and not any(map(method._target, table.quantizable)):
            yield f"method/rescale_target = {given.rescale_target!r}: nothing is rescaled; set method/rescale_conv"

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Make `model` trainable at `bits`, in place."""
        self.has_norm = table.norm_channels > 0
        super().prepare(model, table, bits)

    def _target(self, row: Layer) -> Target | None:
        convolutions = self.settings.rescale_conv
        if convolutions is None:
            convolutions = not self.has_norm
        if not (self.settings.rescale if row.kind == "linear" else convolutions):
            return None
        target: Target = self.settings.rescale_target
        return target

    def weight_quantizer(self, row: Layer, bits: int) -> SatWeight:
        """Of the chosen scheme, rescaled where the settings say so."""
        given = self.settings
        return SatWeight(bits, scheme=given.weight_scheme, target=self._target(row), clamp=given.clamp)

    def input_quantizer(self, row: Layer, bits: int) -> SatClip:
        """One-sided after a ReLU, two-sided where the layer reads negative values."""
        return SatClip(bits, **self._clip_options(row))

    def _clip_options(self, row: Layer) -> dict[str, Any]:
        given = self.settings
        return {
            "signed": row.signed,
            "scheme": given.activation_scheme,
            "clip_init": None if given.clip_init == "batch" else CLIP_INIT[row.kind],
            "clip_float": given.clip_float,
        }

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Decayed weights, all other parameters of the network, and clip levels."""
        clips, others = split_parameters(model)
        decayed = {id(layer.weight) for _, layer in modules.quantized_layers(model) if layer.weight.shape[1] > 1}
        return [
            {"params": [p for p in others if id(p) in decayed]},
            {"params": [p for p in others if id(p) not in decayed], "weight_decay": 0.0},
            {"params": clips, "weight_decay": 0.0, "lr_factor": self.settings.clip_lr},
        ]

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """As many as `floats_at` the widths of the model as it stands."""
        return self.floats_at(model, read_bits(model))

    def floats_at(self, model: nn.Module, bits: Bits) -> int:
        """A clip level for each input that is clipped, and a scale for each rescaled weight tensor of codes."""
        count = 0
        for name, layer in modules.quantized_layers(model):
            weights, clip, width = layer.weight_quantizer, layer.input_quantizer, bits[name]
            assert isinstance(weights, SatWeight)
            assert clip is None or isinstance(clip, SatClip)
            count += weights.target is not None and width.weight < FLOAT_BITS
            count += clip is not None and (clip.clip_float or width.activation < FLOAT_BITS)
        return count
