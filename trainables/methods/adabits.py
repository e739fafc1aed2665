"""AdaBits: one network for several widths, trained together, each with its own batch norm and clip levels.

Jin et al. 2020, "AdaBits: neural network quantization with adaptive bit-widths" (CVPR; arXiv:1912.09666). All widths
share the weights; quantizers are those of SAT. Switching a width changes the number of levels, the set of batch norm
(`method/norms`) and, with switchable clip levels (`switch_clip`, the paper's S-CL), the entry of each `clip_max`.

- Joint training (`training` = `joint`): a step sums the gradients of all widths, then makes one update.
- Progressive training (`descending`, `ascending`): the epochs are dealt out to the widths in that order; each goes on
  from the one before. Batch norm of all widths but the one that trains is calibrated after each epoch.
- Direct adaptation: `extra_widths` are evaluated without having been trained. Each borrows scale, shift and clip levels
  of the nearest trained width (the higher of two) and has its batch norm calibrated after each epoch.

Calibration, which the paper names and its code lacks: statistics start anew and become the plain average over the last
`calibration_batches` training batches of the epoch, at the width in question, without gradients.

Every layer runs at the width of the network, weights and activations; the weights of the first and of the last layer at
no less than `ends_bits` (None: the highest of `widths`, as the authors' CIFAR networks do; their MobileNets have 8).
The last layer's input has the running width. There is a point for each width, `4-bit`, which is the network as exported
for this width alone: one set of batch norm, one clip level for each input, the scale of each rescaled tensor.

The authors' code takes the first set and clip level for a width that it was not trained at. Here that is an error;
`as_published` of `position` gives the other. Its order of the widths (high to low) is ours.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from trainables import modules
from trainables.cost import FLOAT_BITS, INPUT_BITS, Bits, Layer, LayerBits, LayerTable
from trainables.errors import ConfigError
from trainables.method import Choices, Point, check_mixture
from trainables.methods import sat
from trainables.methods._norm_sets import norm_widths, replace_norms, switchable_norms
from trainables.methods._progressive import STAGE, Stage, calibrate_norms, stage_of
from trainables.methods._sat_quantizers import SatClip, normalised_once
from trainables.methods._switchable_clip import SwitchableClip, position
from trainables.methods._width_lists import Widths, parse_widths

if TYPE_CHECKING:
    from trainables.config import TrialConfig


class Method(sat.Method):
    """AdaBits on every convolution and linear layer."""

    given_bits = frozenset()

    @dataclass(frozen=True, kw_only=True)
    class Settings(sat.Method.Settings):
        """Settings of AdaBits; the quantizers' are those of SAT."""

        widths: Annotated[Widths, Field(description="widths to train, from high to low")] = "8,6,5,4"
        extra_widths: Annotated[Widths, Field(description="widths to evaluate untrained, from high to low")] = ""
        training: Annotated[
            Literal["joint", "descending", "ascending"], Field(description="all widths at once, or one after another")
        ] = "joint"
        norms: Annotated[
            Literal["separate", "shared_affine", "shared"],
            Field(description="batch norm: a set for each width, statistics for each width, or one set"),
        ] = "separate"
        switch_clip: Annotated[bool, Field(description="a clip level for each width (S-CL)")] = True
        ends_bits: Annotated[
            int | None, Field(ge=1, le=FLOAT_BITS, description="least width of the ends' weights; None: the highest")
        ] = 8
        calibration_batches: Annotated[int, Field(ge=1, description="batches that calibrate batch norm")] = 16

    def __init__(self, settings: Any, *, label_smoothing: float = 0.0, epochs: int = 1) -> None:
        super().__init__(settings, label_smoothing=label_smoothing, epochs=epochs)
        self.widths = parse_widths(settings.widths)
        self.extra_widths = parse_widths(settings.extra_widths)
        self.recent: deque[Tensor] = deque(maxlen=settings.calibration_batches)

    @property
    def order(self) -> tuple[int, ...]:
        """Widths in the order of training."""
        return self.widths[::-1] if self.settings.training == "ascending" else self.widths

    @property
    def progressive(self) -> bool:
        """Whether one width trains at a time."""
        return self.settings.training != "joint" and len(self.widths) > 1

    @classmethod
    def faults(cls, config: "TrialConfig", table: LayerTable) -> Iterator[str]:
        """Widths that contradict each other, and settings without effect."""
        yield from super().faults(config, table)
        method = cls(cls.Settings(**config.method.settings), epochs=config.training.epochs)
        given, widths = method.settings, method.widths
        if not widths:
            yield f"method/widths = {given.widths!r}: give one width or more, such as 8,6,5,4"
            return
        both = [width for width in method.extra_widths if width in widths]
        if both:
            yield f"method/extra_widths = {given.extra_widths!r}: {both[0]} is trained already (method/widths)"
        if given.training != "joint" and len(widths) == 1:
            yield f"method/training = {given.training!r}: one width has no order; give more in method/widths"
        if method.progressive and given.norms == "shared" and table.norm_channels:
            yield f"method/norms = 'shared': method/training = {given.training!r} calibrates a set for each width"
        if method.progressive and method.epochs < len(widths):
            yield f"training/epochs = {method.epochs}: {len(widths)} widths, one after another, take as many epochs"
        for row in table.quantizable:
            if row.signed and not row.first and 1 in (*widths, *method.extra_widths):
                yield f"method/widths: 1 is too low for {row.name}, which reads negative values; take 2 or more"
                break

    # -----------------------------------------------------------------------------------------------------------------
    # The network

    def prepare(self, model: nn.Module, table: LayerTable, bits: Bits) -> None:
        """Make `model` switchable, in place, and switch it to the last width; `bits` are the method's own."""
        self.table = table
        super().prepare(model, table, self.bits_at(self.widths[-1]))
        shared = self.settings.norms == "shared"
        sets = len(self.extra_widths) + (1 if shared else len(self.widths))
        replace_norms(model, sets, shared_affine=self.settings.norms == "shared_affine")
        if self.progressive:
            model.add_module(STAGE, Stage())
        self.switch(model, self.widths[-1])

    def bits_at(self, width: int) -> dict[str, LayerBits]:
        """Widths of all layers when the network runs at `width`."""
        ends = max(width, self.settings.ends_bits or max(self.widths))
        return {
            row.name: LayerBits(
                weight=ends if row.first or row.last else width, activation=INPUT_BITS if row.first else width
            )
            for row in self.table.quantizable
        }

    def input_quantizer(self, row: Layer, bits: int) -> SatClip:
        """SAT's, with a level for each width if they switch."""
        if not self.settings.switch_clip:
            return super().input_quantizer(row, bits)
        return SwitchableClip(bits, levels=len(self.widths) + len(self.extra_widths), **self._clip_options(row))

    def switch(self, model: nn.Module, width: int) -> None:
        """Change the width that `model` runs at, in place; nothing but buffers change.

        Raises:
            ConfigError: `width` is neither trained nor extra, or extra and not calibrated yet.
        """
        row = self._norm_row(position(width, self.widths + self.extra_widths))
        if width in self.extra_widths and any(not norm.is_fed(row) for norm in switchable_norms(model)):
            raise ConfigError(
                f"width {width} is not calibrated: train for an epoch, or call adapt(model, {width}, ...)"
            )
        self._switch(model, width)

    def _norm_row(self, place: int) -> int:
        if self.settings.norms != "shared":
            return place
        return max(0, place - len(self.widths) + 1)

    def _switch(self, model: nn.Module, width: int) -> None:
        self._set_bits(model, self.bits_at(width))
        row = self._norm_row(position(width, self.widths + self.extra_widths))
        for norm in switchable_norms(model):
            norm.index.fill_(row)

    def _set_bits(self, model: nn.Module, bits: Bits) -> None:
        """Widths of all quantizers; clip levels go by those of the activations."""
        places = self.widths + self.extra_widths
        for name, layer in modules.quantized_layers(model):
            layer.weight_quantizer.set_bits(bits[name].weight)
            clip = layer.input_quantizer
            if clip is not None:
                clip.set_bits(bits[name].activation)
                if isinstance(clip, SwitchableClip):
                    clip.index.fill_(position(bits[name].activation, places))

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def calibrate(self, model: nn.Module, images: Tensor) -> None:
        """Start clip levels from one batch, each at its width; a shared level ends with that of the lowest."""
        for width in self.widths:
            self._switch(model, width)
            super().calibrate(model, images)

    def training_widths(self, model: nn.Module) -> tuple[int, ...]:
        """Those that a step trains, in order; the last is in use afterwards."""
        if not self.progressive:
            return self.widths
        return (self.order[int(stage_of(model).current)],)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Cross-entropy at each width; gradients add up, those of weights after the last one. Then comes one step."""
        plain = getattr(model, "_orig_mod", model)
        if self.progressive or self.extra_widths:
            self.recent.append(images)
        with nullcontext() if model is not plain else normalised_once(plain):
            for width in self.training_widths(plain):
                self._switch(plain, width)
                yield functional.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def after_epoch(self, model: nn.Module, epoch: int) -> bool:
        """Calibrate the widths that did not train; with progressive training go on to the next width when it is due.

        True with a new width: momenta of the one before would go on moving it.
        """
        if not (self.progressive or self.extra_widths):
            return False
        batches, trained = list(self.recent), self.widths
        self.recent.clear()
        if self.progressive:
            current = int(stage_of(model).current)
            trained = self.order[: current + 1]
            for width in self.order:
                if width in trained[:-1]:
                    self._switch(model, width)
                    calibrate_norms(model, batches)
                elif width not in trained:
                    self._adapt(model, width, batches, trained)
        for width in self.extra_widths:
            self._adapt(model, width, batches, trained)
        self._switch(model, self.widths[-1])
        return self.progressive and self._goes_on(model, epoch)

    def _goes_on(self, model: nn.Module, epoch: int) -> bool:
        """Set the stage of the next epoch; whether it is another one."""
        stage = stage_of(model)
        due = min(epoch * len(self.order) // self.epochs, len(self.order) - 1)
        changes = due != int(stage.current)
        stage.current.fill_(due)
        return changes

    def adapt(self, model: nn.Module, width: int, batches: Iterable[Tensor]) -> None:
        """Direct adaptation: make the untrained `width` one of the model's, in place, and switch to it.

        Args:
            model: prepared by this method, trained.
            width: one of `extra_widths`.
            batches: training images that calibrate batch norm.

        Raises:
            ConfigError: `width` has no place in the model, or it is one that was trained.
        """
        position(width, self.extra_widths)
        self._adapt(model, width, list(batches), self.widths)

    def _adapt(self, model: nn.Module, width: int, batches: list[Tensor], trained: tuple[int, ...]) -> None:
        places = self.widths + self.extra_widths
        nearest = min(trained, key=lambda other: (abs(other - width), -other))
        to, source = position(width, places), position(nearest, places)
        for module in model.modules():
            if isinstance(module, SwitchableClip):
                module.adopt(to, source)
        for norm in switchable_norms(model):
            norm.adopt(self._norm_row(to), self._norm_row(source))
        self._switch(model, width)
        calibrate_norms(model, batches)

    # -----------------------------------------------------------------------------------------------------------------
    # What comes out

    def choices(self, model: nn.Module) -> dict[str, Choices]:
        """All widths that have statistics, weights and activations on their own; the ends keep their least width."""
        rows = {width: self._norm_row(i) for i, width in enumerate(self.widths + self.extra_widths)}
        fed = [w for w in rows if w in self.widths or all(norm.is_fed(rows[w]) for norm in switchable_norms(model))]
        at = [self.bits_at(width) for width in sorted(fed, reverse=True)]
        return {
            row.name: Choices(
                weight=tuple(dict.fromkeys(bits[row.name].weight for bits in at)),
                activation=tuple(dict.fromkeys(bits[row.name].activation for bits in at)),
            )
            for row in self.table.quantizable
        }

    def mixture(self, model: nn.Module, bits: Bits) -> Point:
        """These widths. Batch norms go by the layer defined before; where that is an end, by the first inner one."""
        check_mixture(bits, self.choices(model))
        return Point(
            label="final",
            bits=bits,
            activate=partial(self._mix, model, bits),
            extra_floats=self.floats_at(model, bits),
        )

    def _mix(self, model: nn.Module, bits: Bits) -> None:
        self._set_bits(model, bits)
        places = self.widths + self.extra_widths
        inner = [row.name for row in self.table.quantizable if not (row.first or row.last)]
        by_layer = {name: bits[name].weight for name in inner}
        for norm, width in norm_widths(model, by_layer, beside=by_layer[inner[0]] if inner else self.widths[0]):
            norm.index.fill_(self._norm_row(position(width, places)))

    def points(self, model: nn.Module) -> list[Point]:
        """One for each width, extra ones first, so that the model is left at the lowest trained one."""
        return [self._point(model, width) for width in self.extra_widths + self.widths]

    def _point(self, model: nn.Module, width: int) -> Point:
        bits = self.bits_at(width)
        return Point(
            label=f"{width}-bit",
            bits=bits,
            activate=partial(self.switch, model, width),
            extra_floats=self.floats_at(model, bits),
        )
