"""SAT, scale-adjusted training: normalised weights brought back to scale, PACT with its exact gradient.

Jin et al. 2020, "Neural network quantization with scale-adjusted training" (BMVC; arXiv:1912.10207). Weights are
`2 q((t / m + 1) / 2) - 1` with `t = tanh(w)`, `m = max |t|` (as in DoReFa-Net), which makes them about ten times as
large as they were. A batch norm absorbs that, a layer without one does not: its result would saturate the softmax. So
linear layers are multiplied by `s = target / std(W)`, a constant for the gradient. The target is the spread of the
float weights (`rescale_target` = `stddev`) or `1 / sqrt(outputs)` (`constant`; of a convolution: output channels x
kernel size, groups ignored as in the authors' code). The paper prefers `constant`, made for 1000 classes and training
from scratch; with ten it makes the logits large, so the default keeps the function of the float start. Convolutions
are rescaled with `rescale_conv`; by default in networks without batch norm.

Activations are clipped at `clip_max` (alpha), whose gradient counts the rounding error (`sat_kernels.calibrated_clip`).
The rounding has three schemes (`sat_kernels`), one for all weights, one for all activations; weights are `centered` by
default, which the authors recommend for few bits, not their `modified`, whose mean is half a level too low. Weight
decay acts on weights with more than one input channel alone, neither on depthwise convolutions nor on biases, batch
norm and clip levels: the rule of the authors' code.

Where the authors' code differs. It divides a linear layer's bias by `s` in evaluation, instead of multiplying the
weights; its evaluation logits are those of training divided by `s`. Here both agree; `evaluation_as_published` gives
the other. It starts clip levels at 8 (convolutions) and 10 (linear layers) and reads signed tensors one-sided, which
zeroes half of what a linear bottleneck makes. Here they start from the first batch unless `clip_init` says `published`,
and signed tensors are clipped at both ends (its option `double_side`). 32 bits are float: weights are normalised
(`clamp`) but not rounded, activations are clipped only with `clip_float` (`pact_fp`).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trainables import modules
from trainables.cost import FLOAT_BITS, Bits, Layer, LayerTable
from trainables.encoding import Bounded, Clipped, Encoding
from trainables.method import Method as Base
from trainables.method import read_bits, split_parameters
from trainables.methods._sat_kernels import (
    FLOAT_CODES,
    Scheme,
    calibrated_clip,
    factor_for,
    normalise,
    rescale_weight,
    round_weight,
)
from trainables.quantize import SMALLEST_SCALE

if TYPE_CHECKING:
    from trainables.config import TrialConfig

CLIP_INIT = {"conv": 8.0, "linear": 10.0}
"""Where clip levels start in the authors' code."""

Target = Literal["constant", "stddev"]


class UnitQuantizer(modules.Quantizer):
    """Codes 0..2^bits - 1 for the levels of 0..1, or of -1..1 where `signed`; 32 bits are float.

    Args:
        bits: width, 1..32.
        signed: whether values below zero exist.
        scheme: which levels.
    """

    def __init__(self, bits: int, *, signed: bool, scheme: Scheme) -> None:
        self.scheme = scheme
        super().__init__(bits, signed=signed)

    def set_bits(self, bits: int) -> None:
        """Change the width, in place, without a new graph.

        Raises:
            ValueError: `bits` out of range.
        """
        if not 1 <= bits <= FLOAT_BITS:
            raise ValueError(f"bits = {bits}: this quantizer takes 1..{FLOAT_BITS}")
        self.q_max.fill_(2.0**bits - 1)

    @property
    def bits(self) -> int:
        """Width in bits."""
        return round(torch.log2(self.q_max.double() + 1).item())

    def _levels(self, scale: Tensor, *, two_sided: bool, scales_last: bool = False) -> Bounded:
        """The levels of the scheme at the present width."""
        top = int(self.q_max)
        return Bounded(
            bits=self.bits,
            q_min=0,
            q_max=top,
            scale=scale,
            two_sided=two_sided,
            steps=top if self.scheme == "original" else top + 1,
            middle=self.scheme == "centered",
            scales_last=scales_last,
        )


class SatWeight(UnitQuantizer):
    """Weights normalised, rounded and, with a target, rescaled.

    Args:
        bits: width, 1..32.
        scheme: which levels.
        target: what the spread of the result is set to; None leaves it.
        clamp: whether weights are normalised at 32 bits, too.

    Attributes:
        normalised: the normalised weights, while somebody else computes them (`normalised_once`).
    """

    def __init__(self, bits: int, *, scheme: Scheme, target: Target | None, clamp: bool = True) -> None:
        super().__init__(bits, signed=True, scheme=scheme)
        self.target = target
        self.clamp = clamp
        self.normalised: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The effective weights, (outputs, inputs, ...)."""
        return self._effective(x, self._wanted(x))

    def _effective(self, x: Tensor, target: Tensor | None) -> Tensor:
        u = normalise(x) if self.normalised is None else self.normalised
        y = round_weight(u, self.q_max, target, scheme=self.scheme)
        return y if self.clamp else torch.where(self.q_max >= FLOAT_CODES, rescale_weight(x, target), y)

    def _wanted(self, x: Tensor) -> Tensor | None:
        if self.target is None:
            return None
        if self.target == "stddev":
            return x.detach().std()
        return x.new_full((), (x.numel() // x.shape[1]) ** -0.5)  # outputs x kernel size

    @torch.no_grad()
    def factor(self, x: Tensor) -> Tensor:
        """What the normalised weights are multiplied by (s); shape ()."""
        return self(x).abs().max() / self._effective(x, None).abs().max()

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """Levels of -1..1, then the scale; None at 32 bits."""
        assert x is not None
        if float(self.q_max) >= FLOAT_CODES:
            return None
        target = self._wanted(x)
        scale = torch.ones(()) if target is None else factor_for(self._effective(x, None), target)
        return self._levels(scale, two_sided=True, scales_last=True)


class SatClip(UnitQuantizer):
    """Activations between 0 (signed: -clip_max) and a trained `clip_max` of either sign.

    Args:
        bits: width, 1..32.
        signed: whether values below zero exist.
        scheme: which levels.
        clip_init: starting bound; None takes it from the first batch.
        clip_float: whether activations are clipped at 32 bits, too.
    """

    def __init__(
        self, bits: int, *, signed: bool, scheme: Scheme, clip_init: float | None = None, clip_float: bool = False
    ) -> None:
        super().__init__(bits, signed=signed, scheme=scheme)
        self.from_batch = clip_init is None
        self.clip_float = clip_float
        self.clip_max = nn.Parameter(torch.tensor(1.0 if clip_init is None else clip_init))

    def level(self) -> Tensor:
        """The bound in use, shape ()."""
        return self.clip_max

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the bound at LSQ's range of the first batch, `2 * mean |x| * sqrt(q_max)`, unless it has a number."""
        if self.from_batch:
            codes = self.q_max.clamp_max(255) / (2 if self.signed else 1)
            self.start((2 * x.abs().mean() * codes.sqrt()).clamp_min(SMALLEST_SCALE))

    def start(self, bound: Tensor) -> None:
        """Set the bound in use."""
        self.clip_max.copy_(bound)

    def encoding(self, x: Tensor | None = None) -> Encoding | None:
        """Levels up to the bound in use; at 32 bits the bound alone, or None."""
        bound = self.level().detach().abs().clamp_min(SMALLEST_SCALE)
        if float(self.q_max) < FLOAT_CODES:
            return self._levels(bound, two_sided=self.signed)
        if not self.clip_float:
            return None
        return Clipped(bits=FLOAT_BITS, q_min=-int(self.signed), q_max=1, scale=bound)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape."""
        return calibrated_clip(
            x, self.level(), self.q_max, scheme=self.scheme, signed=self.signed, clip_float=self.clip_float
        )


@contextmanager
def normalised_once(model: nn.Module) -> Iterator[None]:
    """Normalise all weights now, for every forward inside, and carry the sum of the gradients through on leaving.

    What the widths of a joint step share. Until then the weights have no gradient.
    """
    held = []
    for _, layer in modules.quantized_layers(model):
        assert isinstance(layer.weight_quantizer, SatWeight)
        whole = normalise(layer.weight)
        part = whole.detach().requires_grad_(whole.requires_grad)
        layer.weight_quantizer.normalised = part
        held.append((layer.weight_quantizer, whole, part))
    try:
        yield
    finally:
        for quantizer, _, _ in held:
            quantizer.normalised = None
    reached = [(whole, part.grad) for _, whole, part in held if part.grad is not None]
    torch.autograd.backward([whole for whole, _ in reached], [grad for _, grad in reached])


@torch.no_grad()
def evaluation_as_published(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that the authors' code computes with in evaluation: a linear layer's are divided by its scale.

    Args:
        layer: a quantized layer of this method.
    """
    quantizer: Any = layer.weight_quantizer
    weight, bias = quantizer(layer.weight), layer.bias
    if isinstance(layer, nn.Conv2d):
        return weight, bias
    factor = quantizer.factor(layer.weight)
    return weight / factor, None if bias is None else bias / factor


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


WARMUP_EPOCHS = 5
USUAL_BATCH = 256


def published_rates(
    schedule: str,
    *,
    lr: float,
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
) -> list[float]:
    """Learning rate of every step in the authors' script (of every epoch for `multistep`), for comparison.

    Batches above 256 raise the rate in proportion, and the first five epochs go up to it from the rate as given. The
    platform has `cosine` and `steps` (`optimizer/schedule`); its rise starts at 0, and it has no `exponential`.

    Args:
        schedule: `cosine`, `exponential` (to e^-8) or `multistep` (times `gamma` at each milestone).
        lr: of batches of 256 or less.
        batch_size: examples of a step.
        epochs: of the training.
        steps_per_epoch: optimizer steps of one epoch.
        milestones: epochs, for `multistep`.
        gamma: for `multistep`.
    """
    if schedule == "multistep":
        return [lr * gamma ** sum(epoch >= milestone for milestone in milestones) for epoch in range(epochs)]
    large = batch_size > USUAL_BATCH
    warmup, steps = WARMUP_EPOCHS * steps_per_epoch if large else 0, epochs * steps_per_epoch
    start = USUAL_BATCH / batch_size if large else 1.0

    def factor(step: int) -> float:
        if step < warmup:
            return start + (1 - start) * step / warmup
        progress = (step - warmup) / (steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else math.exp(-8 * progress)

    return [lr / start * factor(step) for step in range(steps)]
