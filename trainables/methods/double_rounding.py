"""Double Rounding: one training for several widths, whose weights are all rounded from the codes of the highest.

Huang et al. 2025, "Nearly lossless adaptive bit switching", arXiv:2502.01199. Weights share one scale (s_h) and are
rounded to the highest width first, then to the current one (equations 1 to 3, `double_round`), so an export holds
integers and serves every width (`stored_codes`). Activations have a scale of their own for each width (equations 4
and 5), batch norms a set each. For every batch the network is trained at each width in turn, from high to low, with an
optimizer step each (algorithm A.2). Since low widths give scales large gradients, adaptive learning-rate scaling (ALRS,
`adaptive_rates`) slows the scales down.

With `precision = mixed` the trained network becomes a supernet: after the warm-up each layer draws a width of its own
(`bit_switching`), batch norms become transitional (`switched_norm`). The warm-up is the training above; the ends of the
network take no part. The authors' supernet has no adaptive rates, at a learning rate of 1e-5; with ours, low widths
collapse without, so each layer's scales keep the factor of the layer's own width.

Gradients and starting scales are those of the authors' code by default (`double_round`; 3 sigma for weights, 99.9 %
percentiles for activations), `gradient = chain` and `init = lsq` are the literal reading. Self-distillation is PS-KD
(Kim et al. 2021) within the batch: lower widths learn from what the highest just said, with a weight that grows to
`distill`. The code's memory of each image's output in the previous epoch, for the highest width, is left out. The paper
keeps the ends of the network float (`ends_bits = 32`); here they have 8 bits, as everywhere.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional

from trainables import modules, sensitivity, world
from trainables.cost import FLOAT_BITS, INPUT_BITS, Bits, Layer, LayerBits, LayerTable
from trainables.method import Choices, Point, check_mixture, split_parameters
from trainables.method import Method as Base
from trainables.methods._adaptive_rates import Rule, ShortenedStep, alrs_rate
from trainables.methods._bit_switching import draw_widths, sensitive_layers, switch_probabilities, switch_rate
from trainables.methods._stored_codes import restore, store
from trainables.methods._switched_norm import record_order, switch_norms, switched_norms, use_sets
from trainables.methods._switched_quantizers import (
    CodedWeight,
    Gradient,
    ScaledInput,
    Start,
    epochs_done,
    quantizers,
    switched_layers,
)

if TYPE_CHECKING:
    from trainables.config import TrialConfig


def widths_as_text(given: Any) -> Any:
    """A list of widths as `8,6,4,2`; anything else as it is."""
    return ",".join(str(width) for width in given) if isinstance(given, list | tuple) else given


def parse_widths(text: str) -> tuple[int, ...]:
    """The widths of a text such as `8,6,4,2`.

    Raises:
        ValueError: it is no list of integers.
    """
    return tuple(int(width) for width in text.split(","))


def distillation_weight(peak: float, epoch: int, epochs: int) -> float:
    """Weight of the soft labels in epoch 0, 1, ..., epochs - 1, which grows evenly to `peak` (PS-KD)."""
    return peak * (epoch + 1) / epochs


def soft_targets(targets: Tensor, taught: Tensor, weight: float) -> Tensor:
    """(1 - weight) parts of the labels and `weight` parts of what was predicted, both (batch, classes)."""
    return torch.lerp(targets, taught, weight)


class Method(Base):
    """Double Rounding on every convolution and linear layer."""

    given_bits = frozenset()
    step_each_loss = True

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """Settings of Double Rounding."""

        widths: Annotated[
            str, BeforeValidator(widths_as_text), Field(description="widths to train, from high to low")
        ] = "8,6,4,2"
        ends_bits: Annotated[
            int, Field(ge=2, le=32, description="width of the first and the last layer; 32 is float, as published")
        ] = 8
        per_channel: Annotated[bool, Field(description="one weight scale for each output channel")] = False
        scale_lr: Annotated[float, Field(gt=0, description="learning rate of scales over that of weights")] = 0.1
        alrs: Annotated[Rule, Field(description="how much slower scales learn at lower widths")] = "eta"
        alrs_alpha: Annotated[float, Field(gt=0, le=1, description="factor for each width of alrs geometric")] = 0.1
        distill: Annotated[float, Field(ge=0, le=1, description="final weight of self-distillation; code: 0.7")] = 0.0
        gradient: Annotated[Gradient, Field(description="gradient of scales: of the authors' code, or exact")] = "low"
        init: Annotated[Start, Field(description="rule for starting scales")] = "spread"
        as_published: Annotated[
            bool, Field(description="give each channel's scale the gradient of all, as the authors' code does")
        ] = False
        precision: Annotated[
            Literal["uniform", "mixed"], Field(description="one width for all layers, or one for each (supernet)")
        ] = "uniform"
        switch_rate: Annotated[float, Field(gt=0, le=1, description="final share of layers that switch")] = 0.5
        warmup: Annotated[float, Field(ge=0, le=1, description="share of the epochs without switching")] = 0.11
        inherit: Annotated[bool, Field(description="layers that do not switch take the width before them")] = False
        probes: Annotated[int, Field(ge=1, le=10_000, description="Hutchinson probes of the first batch")] = 50
        traces: Annotated[
            dict[str, float], Field(description="average Hessian trace by layer; none: from the first batch")
        ] = field(default_factory=dict)

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """Widths that are none, a foreign set of traces, settings without effect."""
        given = cls.Settings(**config.method.settings)
        try:
            widths: tuple[int, ...] = parse_widths(given.widths)
        except ValueError:
            widths = ()
        if not widths or list(widths) != sorted(set(widths), reverse=True) or not {*widths} <= {*cls.weight_bits}:
            yield f"method/widths = {given.widths!r}: give widths from 8 to 2, each once, from high to low (8,6,4,2)"
        if given.ends_bits not in (*cls.weight_bits, FLOAT_BITS):
            yield f"method/ends_bits = {given.ends_bits}: give 2..8, or 32 for float layers"
        if given.as_published and not given.per_channel:
            yield "method/as_published = True: it has no effect without method/per_channel"
        inner = [row.name for row in table.quantizable if not (row.first or row.last)]
        if given.precision == "mixed":
            if not inner:
                yield "method/precision = 'mixed': there is no layer between the first and the last; use 'uniform'"
            if given.traces and (fault := sensitivity.other_network(given.traces, inner)):
                yield f"method/traces {fault}, or leave them out"
            if config.training.compile == "model":
                yield "training/compile = 'model': each mixture of widths would be compiled anew; use 'quantizers'"
        elif given.traces:
            yield "method/traces: they have no effect unless method/precision = 'mixed'"

    def __init__(self, settings: Any, *, label_smoothing: float = 0.0, epochs: int = 1) -> None:
        super().__init__(settings, label_smoothing=label_smoothing, epochs=epochs)
        self._step: ShortenedStep | None = None  # between a loss and the step that follows it
        self._widths: list[int] = []

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths from high to low."""
        return parse_widths(self.settings.widths)

    @property
    def mixed(self) -> bool:
        """Whether layers get widths of their own."""
        return bool(self.settings.precision == "mixed")

    @property
    def warmup_epochs(self) -> int:
        """First epochs of a supernet, in which all layers have the same width."""
        return round(self.settings.warmup * self.epochs)

    # -- The network

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Quantize every layer and multiply the batch norms."""
        number = 0
        for row in table.quantizable:
            if self._widths_of(row) == (FLOAT_BITS,):
                continue
            weights = self.weight_quantizer(row, 0)
            modules.replace(model, row, weights, None if row.first else self.input_quantizer(row, 0))
            if not (row.first or row.last):
                weights.order.fill_(number)
                weights.trace.fill_(self.settings.traces.get(row.name, math.inf))
                number += 1
        switch_norms(model, self.widths, pairs=self.mixed)

    def _widths_of(self, row: Layer) -> tuple[int, ...]:
        return (self.settings.ends_bits,) if row.first or row.last else self.widths

    def weight_quantizer(self, row: Layer, bits: int) -> CodedWeight:
        """For all widths at once; one scale or one for each output channel."""
        given = self.settings
        scales = row.channels if given.per_channel else 1
        pooled = given.per_channel and given.as_published
        return CodedWeight(
            self._widths_of(row),
            scales=scales,
            gradient=given.gradient,
            pooled=pooled,
            init=given.init,
            is_end=row.first or row.last,
        )

    def input_quantizer(self, row: Layer, bits: int) -> ScaledInput:
        """For all widths at once; unsigned after a ReLU, signed where the layer reads negative values."""
        given = self.settings
        return ScaledInput(self._widths_of(row), signed=row.signed, gradient=given.gradient, init=given.init)

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """See which layers surround each batch norm, then set each width's scales from one batch."""
        layers = switched_layers(model)
        order = record_order(model, [model.get_submodule(name) for name, _, _ in layers], images[:2])
        for (_, weights, _), numbers in zip(layers, order, strict=True):
            weights.order.copy_(torch.tensor(numbers))
        for bits in reversed(self.widths):
            self.switch(model, bits)
            modules.calibrate(model, images)

    def switch(self, model: nn.Module, bits: int | Bits) -> None:
        """Set the widths of all layers, in place.

        Args:
            model: prepared by this method.
            bits: one width for all but the ends, or the widths of every quantized layer, as in `Point.bits`.

        Raises:
            ConfigError: a width that the network was not trained at, or layers of another network.
        """
        wanted = self._bits_at(model, bits) if isinstance(bits, int) else bits
        check_mixture(wanted, self.choices(model))
        layers = switched_layers(model)
        by_number = {int(weights.order[0]): wanted[name].weight for name, weights, _ in layers}
        self._set(model, wanted, by_number, outer=bits if isinstance(bits, int) else by_number.get(0, self.widths[0]))

    def _set(self, model: nn.Module, bits: Bits, by_number: Mapping[int, int], *, outer: int) -> None:
        for name, weights, inputs in quantizers(model):
            weights.set_bits(bits[name].weight)
            if inputs is not None:
                inputs.set_bits(bits[name].activation)
        use_sets(switched_norms(model), by_number, outer)

    def _bits_at(self, model: nn.Module, width: int) -> dict[str, LayerBits]:
        """Widths of all quantized layers when the network as a whole has `width`; the ends keep theirs."""
        bits = {}
        for name, weights, inputs in quantizers(model):
            own = weights.widths[0] if weights.is_end else width
            bits[name] = LayerBits(weight=own, activation=INPUT_BITS if inputs is None else own)
        return bits

    # -- Training

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Weights, and scales with a learning rate of their own and without weight decay, as in the paper."""
        scales, others = split_parameters(model)
        in_sets = {id(p) for norm in switched_norms(model) for p in norm.parameters()}
        each = {"fused": False, "foreach": True}  # fused SGD wants the first steps of a group's parameters to coincide
        return [
            {"params": [p for p in others if id(p) not in in_sets]},
            {"params": [p for p in others if id(p) in in_sets], **each},
            {"params": scales, "lr_factor": self.settings.scale_lr, "weight_decay": 0.0, "momentum": 0.0, **each},
        ]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of one pass; targets are classes, or probabilities (batch, classes)."""
        return functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """The loss at each width, from high to low; the loop steps before it asks for the next one."""
        epoch = min(epochs_done(model), self.epochs - 1)
        rate, soft, taught = 0.0, 0.0, None
        if self.mixed:
            self._measure_traces(model, images, labels)
            rate = switch_rate(epoch, self.epochs, peak=self.settings.switch_rate, warmup=self.warmup_epochs)
        if self.settings.distill:
            soft = distillation_weight(self.settings.distill, epoch, self.epochs)
        for width in self.widths:
            if rate:
                self._mix(model, width, rate)
            else:
                self.switch(model, width)
            logits = model(images)
            targets = labels
            if taught is not None:
                targets = soft_targets(functional.one_hot(labels, logits.shape[1]).to(logits.dtype), taught, soft)
            elif soft:
                taught = logits.detach().softmax(dim=1)
            loss = self.loss(logits, targets)
            if self.settings.alrs != "off":
                self._begin_step(model, width)
            yield loss

    def _begin_step(self, model: nn.Module, outer: int) -> None:
        """Remember scales and widths until `after_step`. A layer goes by its own width, an end by that of the pass."""
        found = list(quantizers(model))
        layers = [[weights.scale, *([] if inputs is None else [inputs.scale])] for _, weights, inputs in found]
        self._widths = [outer if weights.is_end else weights.width for _, weights, _ in found]
        self._step = ShortenedStep(layers, clipped=self.settings.alrs == "scaled")

    def rates(self, gradient: float) -> list[float]:
        """What adaptive scaling leaves of the learning rate of each layer's scales in the current step."""
        given = self.settings
        return [
            alrs_rate(
                given.alrs,
                1.0,
                self.widths[0] - width,
                rank=self.widths.index(width),
                alpha=given.alrs_alpha,
                gradient=gradient,
            )
            for width in self._widths
        ]

    def before_step(self, model: nn.Module) -> None:
        """Clip the gradients of the scales, if their rates depend on them."""
        if self._step is not None:
            self._step.clip()

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Shorten the step that the scales made, then keep all of them above their floors."""
        if self._step is not None:
            self._step.finish(self.rates)
            self._step = None
        used = [q for _, weights, inputs in quantizers(model) for q in (weights, inputs) if q is not None]
        torch._foreach_maximum_(
            [scale for q in used for scale in q.scales], [floor for q in used for floor in q.scale_floor.unbind()]
        )

    def _measure_traces(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Fill in the average Hessian traces that are not known yet, over all ranks."""
        layers = switched_layers(model)
        if not any(bool(weights.trace.isinf()) for _, weights, _ in layers):
            return
        self.switch(model, self.widths[0])
        found = sensitivity.hessian_traces(
            model,
            [(images, labels)],
            layers=[name for name, _, _ in layers],
            probes=self.settings.probes,
            signs_in="weights",  # the same signs on every rank, so that ranks together find what one alone does
        ).average
        rows = torch.tensor([*(found[name] for name, _, _ in layers), 1.0], device=images.device) * world.share()
        *traces, shares = world.total(rows)  # a rank may see more of the batch than another
        for (_, weights, _), trace in zip(layers, traces, strict=True):
            weights.trace.copy_(trace / shares)

    def _mix(self, model: nn.Module, outer: int, rate: float) -> None:
        """Draw a width for every layer; layers that read the same tensor share one."""
        layers = switched_layers(model)
        orders = {name: tuple(weights.order.tolist()) for name, weights, _ in layers}
        traces = {orders[name][0]: float(weights.trace) for name, weights, _ in layers}
        leaders = sorted({leader for _, leader in orders.values()})
        chances = switch_probabilities(sensitive_layers(torch.tensor([traces[n] for n in leaders])), self.widths[::-1])
        drawn = draw_widths(chances, self.widths[::-1], outer, rate, inherit=self.settings.inherit)
        by_leader = dict(zip(leaders, drawn, strict=True))
        bits = self._bits_at(model, outer)
        for name, (_, leader) in orders.items():
            bits[name] = LayerBits(weight=by_leader[leader], activation=by_leader[leader])
        self._set(model, bits, {number: by_leader[leader] for number, leader in orders.values()}, outer=outer)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Count epochs; after the warm-up of a supernet, start all transitions from the widths that they lead to."""
        for _, weights, _ in quantizers(model):
            weights.epochs_done.fill_(epoch)
        if self.mixed and epoch == self.warmup_epochs:
            for norm in switched_norms(model):
                norm.spread(self.widths)
        return False

    def points(self, model: nn.Module) -> list[Point]:
        """One point for each width, all layers but the ends alike."""
        return [
            Point(
                label=f"{width}-bit",
                bits=self._bits_at(model, width),
                activate=partial(self.switch, model, width),
                extra_floats=self._floats(model),
            )
            for width in self.widths
        ]

    def _floats(self, model: nn.Module) -> int:
        """Scales that a network of fixed widths stores."""
        return sum(w.scale.numel() + (inputs is not None) for _, w, inputs in quantizers(model))

    # -- Any mixture of widths

    def choices(self, model: nn.Module) -> dict[str, Choices]:
        """All widths for each layer, weights and activations on their own; the ends keep theirs."""
        return {
            name: Choices(weight=weights.widths, activation=(INPUT_BITS,) if inputs is None else inputs.widths)
            for name, weights, inputs in quantizers(model)
        }

    def mixture(self, model: nn.Module, bits: Bits) -> Point:
        """These widths; batch norms go by those of the weights."""
        check_mixture(bits, self.choices(model))
        return Point(
            label="final", bits=bits, activate=partial(self.switch, model, bits), extra_floats=self._floats(model)
        )

    def stored(self, model: nn.Module) -> dict[str, Tensor]:
        """Integers of the highest width in place of the weights."""
        return store(model)

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """The weights become those of the highest width."""
        restore(model, tensors)
