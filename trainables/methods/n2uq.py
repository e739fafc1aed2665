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
from trainables.errors import ConfigError, PluginError
from trainables.method import Method as Base
from trainables.methods._n2uq_modules import (
    MOST_BITS,
    EntropyWeight,
    LearnedThresholds,
    PublishedClip,
    ResidualBlock,
    RPReLU,
    prepared_thresholds,
)
from trainables.methods._n2uq_places import RESIDUAL_BLOCKS, body_layers, is_shortcut, relus_before
from trainables.methods.pact import LearnedClip
from trainables.teachers import build_teacher, distillation_loss

if TYPE_CHECKING:
    from trainables.config import TrialConfig

CLIP_INIT = 2.0
"""Where the clip level in front of MobileNetV2's last convolution starts."""


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
