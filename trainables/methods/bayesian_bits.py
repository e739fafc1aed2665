"""Bayesian Bits: widths of 0, 2, 4, 8, 16 or 32 bits, learned by gates under a penalty on bit operations.

Van Baalen et al. 2020, arXiv:2005.07093. A tensor is rounded at 2 bits and refined to 4, 8, 16 and 32 by residuals,
each behind a gate (`gated_quantize`); gates of their own on the output channels of the weights prune. While training, a
gate is drawn from the hard concrete distribution (Louizos et al. 2018, arXiv:1712.01312), once a tensor and step; in
tests, and from `freeze` on, it is open if it is zero with a probability below 0.34. The loss is cross-entropy plus
`penalty_strength` (the paper's mu) times

    sum over tensors of  a * (2 q_2 + 4 q_2 q_4 + 8 q_2 q_4 q_8 + ...),

where q is the probability that a gate is not zero, averaged over channels for q_2, and `a` the MACs of the layers that
read the tensor over those of the largest layer.

| here | paper |
|---|---|
| `gate_logits`, `pruning_logits` | phi, of levels 4 to 32 and of the channels (z_2) |
| `clip_max` | beta, the learned range |
| `penalty_strength` | mu |

A level whose logit has come down to -2 is off for good, with all levels above it, as published. At the published rate
of 0.001 and start of 6 that takes 8000 steps, and no width changes before 6900: raise `gate_lr` or lower `gate_init`
for short trainings.

What we do otherwise than the published code, and how to get it:

- It quantizes what a layer makes, we what a layer reads. Max-pooling between makes no difference; behind an average
  pooling we quantize the average. Layers that read one tensor share its quantizer.
- `residual`: the paper says that tensors which enter a residual sum are not quantized; the code does quantize them
  (`quantized`), without counting them in the penalty's bit operations.
- `batch_norm`: the code folds batch norm into the weights while training, with a second convolution in each layer
  (`folded`). By default weights are quantized as they are, and the gates of channels multiply the scale of the batch
  norm (`gated_norm` tells why): half the time, and batch norm is that of every other method here.
- `calibration`: the code starts ranges at the largest value (not magnitude) of two images and moves the statistics of
  batch norm with them (`published`). By default they start at the largest magnitude of the first batch.
- Depthwise convolutions have no pruning gates, as the code means to but does not: their channels are those before.
- A range stays above a hundredth of its start; nothing in the paper keeps it positive.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from trainables import dataflow, modules
from trainables.cost import INPUT_BITS, Bits, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError
from trainables.method import Method as Base
from trainables.method import Point
from trainables.methods import _gated_norm as gated_norm
from trainables.methods._gates import GATE_INIT, GATED, OFF_BELOW, UNQUANTIZED, GatedQuantizer, penalties, quantizers
from trainables.modes import in_mode

if TYPE_CHECKING:
    from trainables.config import TrialConfig

INIT = dict(zip(map(str, GATED), GATE_INIT, strict=True))
"""Starting logits by level, keys as in an address."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What a mode does: widths (None: learned), and whether channels are pruned."""

    weight: int | None
    activation: int | None
    prunes: bool


MODES = {
    "full": Mode(weight=None, activation=None, prunes=True),
    "quantize": Mode(weight=None, activation=None, prunes=False),
    "prune": Mode(weight=UNQUANTIZED, activation=UNQUANTIZED, prunes=True),
    "prune_w8a8": Mode(weight=8, activation=8, prunes=True),
    "prune_w4a8": Mode(weight=4, activation=8, prunes=True),
    "w8a8": Mode(weight=8, activation=8, prunes=False),
    "w4a8": Mode(weight=4, activation=8, prunes=False),
}
ModeName = Literal["full", "quantize", "prune", "prune_w8a8", "prune_w4a8", "w8a8", "w4a8"]
Kind = Literal["adam", "adamw", "sgd"]


def _merged_with_defaults(given: Any) -> Any:
    """Logits of all levels from those given."""
    if not isinstance(given, Mapping):
        return given
    unknown = [str(level) for level in given if str(level) not in INIT]
    if unknown:
        raise ValueError(f"no gate for {', '.join(unknown)} bits: the levels with a gate are {', '.join(INIT)}")
    return INIT | {str(level): logit for level, logit in given.items()}


class Method(Base):
    """Bayesian Bits on every convolution and linear layer; the network's input keeps its 8 bits."""

    given_bits: ClassVar[frozenset[str]] = frozenset()
    learns_bits: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of Bayesian Bits."""

        mode: Annotated[ModeName, Field(description="what is learned: widths, channels, both; or fixed widths")] = (
            "full"
        )
        penalty_strength: Annotated[float, Field(ge=0, description="weight of the penalty (the paper's mu)")] = 0.01
        penalty: Annotated[Literal["bops", "constant"], Field(description="levels cost bit operations, or 1")] = "bops"
        gate_init: Annotated[
            dict[str, float],
            BeforeValidator(_merged_with_defaults),
            Field(description="starting logit of the gate of each level, as gate_init/8; -2 or less: never open"),
        ] = field(default_factory=lambda: dict(INIT))
        gate_noise: Annotated[bool, Field(description="draw gates while training; else deterministic")] = True
        gate_lr: Annotated[float, Field(gt=0, le=100, description="learning rate of gate logits")] = 1e-3
        gate_optimizer: Annotated[Kind, Field(description="optimizer of gate logits")] = "adam"
        scale_lr: Annotated[float, Field(gt=0, le=100, description="learning rate of ranges")] = 1e-3
        scale_optimizer: Annotated[Kind, Field(description="optimizer of ranges")] = "adam"
        schedule: Annotated[
            Literal["constant", "cosine", "linear", "steps"], Field(description="of the rates of gates and ranges")
        ] = "constant"
        batch_norm: Annotated[
            Literal["gated", "folded"], Field(description="channel gates on its scale, or folded into the weights")
        ] = "gated"
        residual: Annotated[Literal["float", "quantized"], Field(description="tensors that enter residual sums")] = (
            "float"
        )
        calibration: Annotated[
            Literal["batch", "published"], Field(description="starting ranges: magnitudes of a batch, or as published")
        ] = "batch"

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """Gates that the mode lacks or that can never open, and batch norm to fold where there is none."""
        settings = config.method.settings
        init = {level: float(logit) for level, logit in settings["gate_init"].items()}
        if settings["batch_norm"] == "folded" and not table.norm_channels:
            yield "method/batch_norm = 'folded': the network has no batch norm; leave it out"
        if MODES[settings["mode"]].weight is not None:
            for level in (level for level in INIT if init[level] != INIT[level]):
                yield (
                    f"method/gate_init/{level} = {init[level]:g}: mode {settings['mode']!r} has no gate for {level} "
                    "bits; leave it out, or use mode 'full' or 'quantize'"
                )
            return
        for lower, level in pairwise(INIT):
            if init[level] > OFF_BELOW >= init[lower]:
                yield (
                    f"method/gate_init/{level} = {init[level]:g}: it never opens, because level {lower} is off at "
                    f"{init[lower]:g} (<= {OFF_BELOW:g}); raise method/gate_init/{lower}, or lower this one"
                )

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Give every layer its quantizers; `bits` does not matter: they are learned, or the mode's."""
        rows = {row.name: row for row in table.quantizable}
        self.flow = dataflow.trace(model, rows)
        self.largest = max(row.macs for row in rows.values())
        at_source = self.flow.sums if self.settings.residual == "quantized" else frozenset()
        if self.settings.residual == "quantized" and not at_source:
            raise ConfigError("method/residual = 'quantized': the network has no residual sums; leave it out")
        bundles = {name: self.flow.bundle(name) for name, row in rows.items() if not row.first}
        shared = {bundle: self._input_quantizer(bundle, rows) for bundle in dict.fromkeys(bundles.values())}
        self.reads = {name: f"{name}.input_quantizer" for name in bundles}
        for tensor in sorted(at_source):
            for name in self.flow.readers([tensor]):
                self.reads[name] = f"{self._maker(tensor)}.output_quantizer"
        for name, row in rows.items():
            inside = not row.first and self.reads[name].endswith("input_quantizer")
            self._replace(model, row, shared[bundles[name]] if inside else None)
        for tensor in sorted(at_source):
            readers = self.flow.readers([tensor])
            quantizer = shared[bundles[readers[0]]] if readers else self._quantizer(signed=True, macs=None)
            quantizer.readers = 1
            modules.quantize_output(model.get_submodule(self._maker(tensor)), quantizer)

    def _input_quantizer(self, bundle: tuple[int, ...], rows: Mapping[str, Layer]) -> GatedQuantizer:
        """The quantizer of tensors that layers read; one tensor that several read is quantized once."""
        readers = self.flow.readers(bundle)
        return self._quantizer(
            signed=any(rows[name].signed for name in readers),
            macs=sum(rows[name].macs for name in set(readers)),
            readers=len(readers) if len(bundle) == 1 else 1,
        )

    def _quantizer(self, *, macs: int | None, **fields: Any) -> GatedQuantizer:
        """A quantizer of activations unless `fields` say otherwise."""
        init = INIT | self.settings.gate_init
        counted = macs is not None and self.settings.penalty == "bops"
        given = {
            "bits": MODES[self.settings.mode].activation,
            "noise": torch.rand if self.settings.gate_noise else None,
        }
        return GatedQuantizer(
            gate_init=init.values(),
            macs_share=(macs or 0) / self.largest if counted else None,
            **given | fields,
        )

    def _replace(self, model: nn.Module, row: Layer, reads: GatedQuantizer | None) -> None:
        """Put a quantized layer in the place of one, and tie the batch norm behind it to its channel gates."""
        mode, flow, layer = MODES[self.settings.mode], self.flow.layers[row.name], model.get_submodule(row.name)
        norm = None if flow.norm is None else gated_norm.usable(model.get_submodule(flow.norm))
        prunes = mode.prunes and not row.last and not flow.depthwise
        folds = norm is not None and self.settings.batch_norm == "folded" and layer.bias is None
        weights = self._quantizer(
            signed=True,
            bits=mode.weight,
            macs=row.macs,
            channels=row.channels if prunes else 0,
            prunes=norm is None or folds,
        )
        if norm is None or flow.norm is None:
            modules.replace(model, row, weights, reads)
        elif folds:
            new, rest = gated_norm.folded(layer, norm, weights, reads)
            model.set_submodule(row.name, new)
            model.set_submodule(flow.norm, rest)
        else:
            placed = modules.replace(model, row, weights, reads)
            if prunes:
                model.set_submodule(flow.norm, gated_norm.GatedNorm.behind(placed, norm))

    def _maker(self, tensor: int) -> str:
        """The innermost module that makes a tensor."""
        makers = self.flow.makers.get(tensor)
        if not makers:
            raise ConfigError(
                "method/residual = 'quantized': a tensor that enters a sum comes from no module that is called once; "
                "use method/residual = 'float'"
            )
        return makers[0]

    @torch.no_grad()
    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Start each range from the first tensor that its quantizer sees, layer after layer."""
        published = self.settings.calibration == "published"
        statistics = {n: b.clone() for n, b in model.named_buffers() if "running_" in n or "num_batches" in n}

        def start(quantizer: Any, inputs: tuple[Tensor]) -> None:
            quantizer.calibrate(inputs[0], magnitude=not published)

        with in_mode(model, training=True), ExitStack() as hooks:
            for quantizer in quantizers(model):
                hooks.enter_context(quantizer.register_forward_pre_hook(start))
            model(images[:2] if published else images)
        if not published:
            for name, value in statistics.items():
                model.get_buffer(name).copy_(value)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weights; gate logits; ranges. After `freeze` there are no gates to train and the ranges decay by cosine."""
        found = quantizers(model)
        ranges = [q.clip_max for q in found]
        gates = [p for q in found for p in (q.gate_logits, q.pruning_logits) if p is not None and p.requires_grad]
        own = {id(p) for q in found for p in q.parameters()}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        settings = self.settings
        of_ranges = {"lr": settings.scale_lr, "optimizer": settings.scale_optimizer, "weight_decay": 0.0}
        if not gates:
            return [{"params": weights, "schedule": "cosine"}, {"params": ranges, "schedule": "cosine", **of_ranges}]
        of_gates = {"lr": settings.gate_lr, "optimizer": settings.gate_optimizer, "weight_decay": 0.0}
        return [
            {"params": weights},
            {"params": gates, "schedule": settings.schedule, **of_gates},
            {"params": ranges, "schedule": settings.schedule, **of_ranges},
        ]

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Cross-entropy plus the penalty; without it once the gates are frozen."""
        for loss in super().losses(model, images, labels):
            gated = [q for q in quantizers(model) if not q.frozen]
            yield loss + self.settings.penalty_strength * penalties(gated).sum() if gated else loss

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Keep the ranges above their floors."""
        found = quantizers(model)
        torch._foreach_maximum_([q.clip_max for q in found], [q.clip_floor for q in found])

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Bring the codes of all quantizers up to date."""
        for quantizer in quantizers(model):
            quantizer.sync()
        return False

    def freeze(self, model: nn.Module) -> None:
        """Fix all gates as tests have them; fold the batch norm of folded convolutions for good, as published."""
        for quantizer in quantizers(model):
            quantizer.frozen = True
            quantizer.gate_logits.requires_grad_(False)
            if quantizer.pruning_logits is not None:
                quantizer.pruning_logits.requires_grad_(False)
            quantizer.sync()
        for module in model.modules():
            if isinstance(module, gated_norm.FoldedConv2d):
                module.fold()

    def points(self, model: nn.Module) -> list[Point]:
        """One point: widths as tests have them, and the channels that are left where the dataflow tells."""
        layers = dict(modules.quantized_layers(model))
        shares = {name: layer.weight_quantizer.open_share() for name, layer in layers.items()}  # type: ignore[operator]
        bits, output_share, input_share = {}, {}, {}
        for name, layer in layers.items():
            reads = self.reads.get(name)
            activation = INPUT_BITS if reads is None else model.get_submodule(reads).bits
            weight = layer.weight_quantizer.bits if shares[name] else 0
            bits[name] = LayerBits(weight=weight, activation=activation)  # type: ignore[arg-type]
            flow = self.flow.layers[name]
            grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1 and not flow.depthwise
            output_share[name] = shares[name]
            input_share[name] = 1.0 if flow.producer is None or grouped else shares[flow.producer]
        return [
            Point(
                label="final",
                bits=bits,
                output_share={name: share for name, share in output_share.items() if share < 1},
                input_share={name: share for name, share in input_share.items() if share < 1},
                extra_floats=sum(q.fixed_bits != UNQUANTIZED for q in quantizers(model)) - _folded_channels(model),
            )
        ]

    def details(self, model: nn.Module) -> Mapping[str, Mapping[str, Any]]:
        """How many output channels of each layer are left, of how many."""
        found = {}
        for name, layer in modules.quantized_layers(model):
            channels = layer.weight.shape[0]
            kept = round(channels * layer.weight_quantizer.open_share())  # type: ignore[operator]
            found[name] = {"channels": channels, "channels_left": kept}
        return found


def _folded_channels(model: nn.Module) -> int:
    """Channels of batch norms that are multiplied into weights: they store one number each, not two."""
    return sum(module.num_features for module in model.modules() if isinstance(module, gated_norm.FoldedNorm))
