"""N2UQ: trained thresholds in front of equal output levels, with RPReLU blocks and a teacher.

Liu et al. 2022, "Nonuniform-to-uniform quantization: towards accurate quantization via generalized straight-through
estimation", CVPR, arXiv:2111.14826. Activations are quantized at trained thresholds (equations 4 to 8), weights at
equal levels of the largest entropy (section 3.3). Trained are the widths between the ends of the segments (the paper's
a), where the first begins (s), and a factor before (beta1) and after (beta2). Formulas and gradients are in
`threshold_kernels` and `n2uq_kernels`.

The network changes too. In residual blocks (torchvision's ResNets and MobileNetV2, our `resnet20`) ReLUs give way to an
RPReLU before each quantizer of the body and, but for MobileNetV2, one after the sum; shortcuts read the raw block
input. Elsewhere a ReLU in an `nn.Sequential` gives way where a quantized layer follows, at most behind max pooling,
dropout or flattening; where a ReLU stays, layers read its output as it is. What has negative values is read through an
RPReLU, since no code is below zero.

The authors' recipe is `optimizer/name=adam optimizer/lr=1.25e-3 optimizer/schedule=linear optimizer/weight_decay=0`,
batch 256, 128 epochs, a float start, `method/teacher=resnet101 method/teacher_pretrained=true` and
`method/quantize_ends=false`. Where their code surprises, and what is done here:

- The gradient of a weight is divided by the scale of its filter. Behind batch norm the paper has no such factor;
  Adam does not notice it, SGD diverges. Here the gradient passes as it is, unless `as_published`.
- The schedule is stepped before each epoch, so the last one runs at rate 0 (`published_rate`). Our `linear` begins at
  the peak and ends above 0. Resuming loses Adam's state there, not here.
- Groups are chosen by name, and some widths miss the pattern: those of shortcuts and of third convolutions train at the
  full rate. Here all have `threshold_lr`, unless `as_published`.
- The last convolution of MobileNetV2 has a PACT quantizer whose clip level gets a second gradient, `code / N`; here
  only with `as_published`. An expansion in its first block and the fixed 7 x 7 pooling are not copied.
- The first and the last layer are float. Here they are quantized, by default to 8 bits, as with other methods.
- The loss knows the teacher alone. `teacher_weight` below 1 gives the labels the rest.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import MobileNetV2

from trainables import modules
from trainables.cost import Bits, Layer, LayerTable
from trainables.encoding import Encoding, Thresholds
from trainables.errors import ConfigError, PluginError
from trainables.method import Method as Base
from trainables.methods._n2uq_exported import PlainRPReLU, Strided
from trainables.methods._n2uq_kernels import Memory, entropy_levels, entropy_weight, rprelu
from trainables.methods._n2uq_places import RESIDUAL_BLOCKS, body_layers, is_shortcut, relus_before
from trainables.methods._threshold_kernels import (
    NARROWEST,
    OUTPUT_RANGE,
    Prepared,
    knots,
    look_up,
    prepare,
    threshold_quantize,
)
from trainables.methods.pact import LearnedClip
from trainables.quantize import SMALLEST_SCALE
from trainables.teachers import build_teacher, distillation_loss

if TYPE_CHECKING:
    from trainables.config import TrialConfig

MOST_BITS = 8
CLIP_INIT = 2.0
"""Where the clip level in front of MobileNetV2's last convolution starts."""


class RPReLU(nn.Module):
    """`prelu(x + shift) + offset` with a slope, a shift and an offset for each channel.

    Args:
        channels: how many.
        dim: which dimension of the input they are.
        slope: where the slopes start.
    """

    def __init__(self, channels: int, *, dim: int = 1, slope: float = 0.25) -> None:
        super().__init__()
        self.dim = dim
        self.shift = nn.Parameter(torch.zeros(channels))
        self.slope = nn.Parameter(torch.full((channels,), slope))
        self.offset = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels at `dim`."""
        return rprelu(x, self.shift, self.slope, self.offset, self.dim)

    def plain(self) -> nn.Module:
        """The same of torch's operators, for exports."""
        return PlainRPReLU(self.shift, self.slope, self.offset, self.dim)


class LearnedThresholds(modules.Quantizer):
    """Trained thresholds, equal output levels from 0 to `2 * output_scale`.

    At first it rounds `clip(x, 0, 2)` to equal steps; a change of width starts the thresholds anew. The parameter
    `widths` has the length of `MOST_BITS`, so that the state dict has one shape; only the first `q_max` are used.

    Args:
        bits: width, 1..8.
        activation: what x goes through first, if anything.
        from_batch: start the range from the first batch instead.
        stride: read every so many pixels only, those that a strided 1 x 1 convolution reads.

    Attributes:
        prepared: what follows from the parameters, while somebody else computes it (`prepared_thresholds`).
    """

    def __init__(
        self, bits: int, *, activation: RPReLU | None = None, from_batch: bool = False, stride: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__(bits, signed=False)
        self.activation = activation
        self.from_batch = from_batch
        self.stride = stride
        self.prepared: Prepared | None = None
        self.start = nn.Parameter(torch.zeros(()))
        self.widths = nn.Parameter(torch.zeros(2**MOST_BITS - 1))
        self.input_scale = nn.Parameter(torch.ones(()))
        self.output_scale = nn.Parameter(torch.ones(()))
        self.set_bits(bits)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the width; the segments become equal."""
        super().set_bits(bits)
        if "widths" in self._parameters:
            self.widths.fill_(OUTPUT_RANGE / float(self.q_max))

    @property
    def thresholds(self) -> Tensor:
        """The thresholds in use, in the units of `input_scale * x`, rising; shape (2^bits - 1,)."""
        return knots(self.start, self.widths, self.q_max)[1].detach()

    def _read(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)
        return x if self.activation is None else self.activation(x)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """With `from_batch`, let the range be `2 * mean |x| * sqrt(q_max)` (as `pact`) instead of 2."""
        if self.from_batch:
            reach = 2 * self._read(x).relu().mean() * self.q_max.sqrt()
            self.output_scale.copy_((reach / OUTPUT_RANGE).clamp_min(SMALLEST_SCALE))
            self.input_scale.copy_(1 / self.output_scale)

    def before(self) -> nn.Module | None:
        """Stride and activation."""
        parts = [Strided(self.stride)] if self.stride != (1, 1) else []
        return nn.Sequential(*parts, *([] if self.activation is None else [self.activation])) or None

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Thresholds of what is read, and the distance of the levels."""
        level = self.output_scale.detach() * OUTPUT_RANGE / self.q_max
        factor = self.input_scale.detach()
        if 0 in (float(factor), float(level)):
            raise ConfigError("one of its scales is 0, so that its codes do not depend on the input; train it again")
        return Thresholds.of(
            lambda read: (threshold_quantize(read, *self.arguments()) / level).round(),
            near=self.thresholds / factor.abs(),
            within=NARROWEST / 4 / float(factor.abs()),
            falls=bool(factor < 0),
            bits=self.bits,
            scale=level,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The quantized activations, any shape (4 dimensions with a stride)."""
        x = self._read(x)
        if self.prepared is not None:
            return look_up(x, self.prepared)
        return threshold_quantize(x, *self.arguments())

    def arguments(self) -> tuple[Tensor, ...]:
        """What `threshold_quantize` takes beside x."""
        return self.start, self.widths, self.input_scale, self.output_scale, self.q_max


@contextmanager
def prepared_thresholds(model: nn.Module) -> Iterator[None]:
    """Prepare all quantizers of an eager network on a CPU together, for every forward inside: a fifth of the time."""
    found = [module for module in model.modules() if isinstance(module, LearnedThresholds)]
    if found and found[0].start.is_cpu and not isinstance(model, torch._dynamo.OptimizedModule):
        for module, prepared in zip(found, prepare([module.arguments() for module in found]), strict=True):
            module.prepared = prepared
    try:
        yield
    finally:
        for module in found:
            module.prepared = None


class EntropyWeight(modules.Quantizer):
    """Equal levels around 0 for each filter, scaled by its mean size; bits 1..8.

    Args:
        bits: width.
        rescale: divide gradients by the scale, as the authors' code does.
    """

    clip_range: Tensor

    def __init__(self, bits: int, *, rescale: bool = False) -> None:
        super().__init__(bits, signed=False)
        self.rescale = rescale
        self.register_buffer("clip_range", torch.tensor(2.0), persistent=False)
        self._memory = Memory()

    @torch.no_grad()
    def encoding(self, x: Tensor | None = None) -> Encoding:
        """Levels around 0, with a scale for each filter."""
        assert x is not None
        steps = int(self.q_max)
        scale = entropy_levels(x, self.q_max, self.clip_range)
        return Encoding(bits=self.bits, q_min=0, q_max=steps, scale=scale.flatten(), offset=-steps / 2)

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weights, channels first."""
        return entropy_weight(w, self.q_max, self.clip_range, rescale=self.rescale, memory=self._memory)


class PublishedClip(LearnedClip):
    """PACT with the gradient that the authors' MobileNetV2 gives the clip level: `code / N` more for every element."""

    def forward(self, x: Tensor) -> Tensor:
        """The values of `LearnedClip`."""
        y = super().forward(x)
        return y + (y / self.clip_max).detach() * (self.clip_max - self.clip_max.detach())


class ResidualBlock(nn.Module):
    """A residual block without ReLUs: convolutions with batch norm, a shortcut beside them, an RPReLU after the sum.

    It takes over the parts of `block` under their names, so a float network's state dict fits. The RPReLUs within the
    body belong to the quantizers of its convolutions.
    """

    def __init__(self, block: Any, *, slope: float) -> None:
        super().__init__()
        self.depth = 3 if hasattr(block, "conv3") else 2
        for name, module in block.named_children():
            if not isinstance(module, nn.ReLU):
                self.add_module(name, module)
        if block.downsample is None:
            self.downsample = nn.Identity()
        self.activation = RPReLU(getattr(block, f"bn{self.depth}").num_features, slope=slope)
        self.train(block.training)

    def forward(self, images: Tensor) -> Tensor:
        """(batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        features = images
        for i in range(1, self.depth + 1):
            features = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(features))
        return self.activation(features + self.downsample(images))


class Method(Base):
    """N2UQ on every convolution and linear layer, or all but the ends and the shortcuts."""

    weight_bits = range(1, MOST_BITS + 1)
    activation_bits = range(1, MOST_BITS + 1)
    signed_codes = False

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of N2UQ."""

        threshold_lr: Annotated[float, Field(gt=0, description="learning rate of thresholds over that of weights")] = (
            0.1
        )
        quantize_downsample: Annotated[bool, Field(description="quantize the convolutions of shortcuts")] = True
        quantize_ends: Annotated[bool, Field(description="quantize the first and last layer (paper: false)")] = True
        slope_init: Annotated[float, Field(ge=0, le=1, description="where the slopes of RPReLU start; 0: ReLU")] = 0.25
        range_from_batch: Annotated[bool, Field(description="start ranges from a batch instead of 0..2")] = False
        teacher: Annotated[str | None, Field(description="model of ours or torchvision's to learn from")] = None
        teacher_checkpoint: Annotated[str | None, Field(description="safetensors file of the teacher's weights")] = None
        teacher_pretrained: Annotated[bool, Field(description="take torchvision's weights for the teacher")] = False
        teacher_settings: Annotated[dict[str, Any], Field(description="settings of the teacher's model")] = field(
            default_factory=dict
        )
        teacher_weight: Annotated[
            float, Field(gt=0, le=1, description="share of the teacher's loss, the labels' has the rest; paper: 1")
        ] = 1.0
        as_published: Annotated[bool, Field(description="gradients and groups with the slips of the public code")] = (
            False
        )

    def __init__(self, settings: Any, *, label_smoothing: float = 0.0, epochs: int = 1) -> None:
        super().__init__(settings, label_smoothing=label_smoothing, epochs=epochs)
        self._teacher: nn.Module | None = None

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """A teacher that cannot teach, settings of one that is not there, and widths of layers that stay float."""
        from trainables.build import data_shape

        settings = cls.Settings(**config.method.settings)
        if settings.teacher is not None:
            try:
                _teacher_of(settings, *data_shape(config))
            except (ConfigError, PluginError) as error:
                yield str(error)
            if settings.teacher_weight == 1 and config.training.label_smoothing:
                yield (
                    f"training/label_smoothing = {config.training.label_smoothing}: labels play no part at "
                    "method/teacher_weight = 1.0; take a smaller weight, or no smoothing"
                )
        else:
            for part in fields(settings):
                value = getattr(settings, part.name)
                if part.name.startswith("teacher_") and value != getattr(cls.Settings(), part.name):
                    yield f"method/{part.name} = {value!r}: has no effect without method/teacher; name one"
        if not settings.quantize_downsample and not any(is_shortcut(row.name) for row in table.quantizable):
            yield (
                f"method/quantize_downsample = False: model {config.model.name!r} has no convolution in a shortcut; "
                "leave it out"
            )
        for row in table.quantizable:
            if row.name in config.bits and not _is_quantized(row, settings):
                yield f"bits/{row.name}: this layer stays float by the settings of method 'n2uq'; leave it out"

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Quantize the layers, put RPReLUs in front of them and after residual sums, and take ReLUs out."""
        rows = [row for row in table.quantizable if _is_quantized(row, self.settings)]
        relus = relus_before(model, {row.name for row in rows if not row.first})
        bodies = body_layers(model)
        clipped = f"features.{len(model.features) - 1}.0" if isinstance(model, MobileNetV2) else None
        for row in rows:
            layer: Any = model.get_submodule(row.name)
            inputs: modules.Quantizer | None = None
            if row.first:
                pass
            elif row.name == clipped:
                clip = PublishedClip if self.settings.as_published else LearnedClip
                inputs = clip(bits[row.name].activation, signed=False, clip_init=CLIP_INIT)
            else:
                through = row.name in bodies or row.name in relus.values() or (row.signed and not is_shortcut(row.name))
                inputs = self._thresholds(layer, bits[row.name].activation, through)
            weights = EntropyWeight(bits[row.name].weight, rescale=self.settings.as_published)
            new = modules.replace(model, row, weights, inputs)
            if isinstance(inputs, LearnedThresholds) and inputs.stride != (1, 1):
                new.stride = (1, 1)
        for name in relus:
            model.set_submodule(name, nn.Identity())
        for name, block in list(model.named_modules()):
            if type(block) in RESIDUAL_BLOCKS:
                model.set_submodule(name, ResidualBlock(block, slope=self.settings.slope_init))

    def _thresholds(self, layer: Any, bits: int, through_rprelu: bool) -> LearnedThresholds:
        """The quantizer of what `layer` reads. A strided 1 x 1 convolution leaves its stride to the quantizer."""
        conv = isinstance(layer, nn.Conv2d)
        activation = None
        if through_rprelu:
            channels, dim = (layer.in_channels, 1) if conv else (layer.in_features, -1)
            activation = RPReLU(channels, dim=dim, slope=self.settings.slope_init)
        skips = conv and layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid")
        return LearnedThresholds(
            bits,
            activation=activation,
            from_batch=self.settings.range_from_batch,
            stride=layer.stride if skips else (1, 1),
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weights of convolutions, which alone decay; thresholds and their scales; everything else."""
        slow = []
        for name, module in model.named_modules():
            if isinstance(module, LearnedThresholds):
                missed = self.settings.as_published and re.search(r"(downsample\.\d+|\bconv3)\.input_quantizer$", name)
                slow += [p for p in module.parameters(recurse=False) if not (missed and p is module.widths)]
        known = {id(p) for p in slow}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.dim() == 4]},
            {"params": slow, "lr_factor": self.settings.threshold_lr, "weight_decay": 0.0},
            {"params": [p for p in rest if p.dim() != 4], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Cross-entropy with the labels, with the teacher's answers, or a share of each."""
        with prepared_thresholds(model):
            logits = model(images)
        share = self.settings.teacher_weight if self.settings.teacher is not None else 0.0
        loss = torch.zeros((), device=logits.device)
        if share < 1:
            hard = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            loss = (1 - share) * hard
        if share > 0:
            loss = loss + share * distillation_loss(logits, self.teacher_logits(images, logits.shape[1]))
        yield loss

    @torch.no_grad()
    def teacher_logits(self, images: Tensor, classes: int) -> Tensor:
        """What the teacher says, (batch, classes). It is made at the first call, and lives outside of the student."""
        if self._teacher is None:
            channels, height, width = images.shape[1:]
            teacher = _teacher_of(self.settings, classes, (channels, height, width))
            self._teacher = teacher.to(images.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._teacher(images)

    def stored_floats(self, model: nn.Module, scales: list[nn.Parameter]) -> int:
        """Thresholds and one level of each activation, a scale a filter, three numbers a channel of RPReLU."""
        total = 0
        for module in model.modules():
            if isinstance(module, modules.QuantizedConv2d | modules.QuantizedLinear):
                total += len(module.weight)
            elif isinstance(module, LearnedThresholds):
                total += int(module.q_max) + 1
            elif isinstance(module, RPReLU | LearnedClip):
                total += sum(p.numel() for p in module.parameters())
        return total


def published_rate(epoch: int, epochs: int, lr: float) -> float:
    """Learning rate that the authors' code uses in `epoch` (1, 2, .. `epochs`); 0 in the last."""
    return lr * (1 - epoch / epochs)


def _teacher_of(settings: Any, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    return build_teacher(
        settings.teacher,
        classes,
        input_shape,
        settings=settings.teacher_settings,
        pretrained=settings.teacher_pretrained,
        weights=None if settings.teacher_checkpoint is None else Path(settings.teacher_checkpoint),
    )


def _is_quantized(row: Layer, settings: Any) -> bool:
    if row.first or row.last:
        return bool(settings.quantize_ends)
    return bool(settings.quantize_downsample) or not is_shortcut(row.name)
