"""The training loop, as a generator: one `Report` an epoch. Whoever iterates decides what to do with it.

The same loop trains every method, alone or on several ranks (`world`), on CPU or GPU. Everything random comes from the
configuration's seed, so a trial gives the same numbers in whichever process and order it runs. Given a folder, each
epoch ends in an atomic checkpoint, and a later call with that folder goes on from it; an epoch that was saved but
perhaps never delivered is reported again.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables import checkpoint, modules, plugins, quantize, shared_norm, world
from trainables.build import build_model, data_shape, load_data
from trainables.config import TrialConfig
from trainables.cost import FLOAT_BITS, Bits, LayerTable, bops, size_bytes
from trainables.errors import ConfigError, DivergedError
from trainables.inherit import Inherited, inherit
from trainables.layer_bits import resolve_bits
from trainables.layers import trace
from trainables.layouts import lay_out
from trainables.measures import IMAGES, Measure, known
from trainables.method import Method, Point
from trainables.optimizers import Optimizers
from trainables.splits import Split, Splits
from trainables.step import training_step

EVALUATION_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class PointReport:
    """What one operating point reaches on the validation split, and what it costs.

    Attributes:
        accuracy: top-1, 0..1.
        loss: mean cross-entropy.
        bops: bit operations of one input.
        relative_bops: over those of the network at 32 x 32 bits, 0..1.
        size_bytes: as exported.
        bits: layer -> [weight bits, activation bits].
        measures: a person's own, by name (`trainables.measures`); those of the trained model with the last epoch only.
    """

    label: str
    accuracy: float
    loss: float
    bops: int
    relative_bops: float
    size_bytes: int
    bits: dict[str, list[int]]
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One epoch.

    Attributes:
        epoch: 1, 2, ... epochs.
        epochs: how many there will be.
        train_loss: mean over the epoch's steps.
        seconds: wall time of the epoch, evaluation included.
        first_step_at: Unix time of the trial's first optimizer step in this process.
        points: one for each operating point.
        inherited: tensors that a parent gave the trial's network, `whole` or in `part`, and `fresh` ones
            (`trainables.inherit`); None where it began with all of a float network, or from scratch.
    """

    epoch: int
    epochs: int
    train_loss: float
    seconds: float
    first_step_at: float
    points: list[PointReport]
    inherited: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON tree; `Report.from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Report":
        """The inverse of `to_json`."""
        return cls(**{**tree, "points": [PointReport(**point) for point in tree["points"]]})


class Session:
    """One trial in memory: model, method, data, optimizer. `fit` drives it; evaluation of a saved trial reuses it.

    Args:
        config: what to train.
        data_root: where the data set lies.
        start: float weights to start from.
        device: where to train.
        measures: a person's own, taken at each operating point.
    """

    def __init__(
        self,
        config: TrialConfig,
        *,
        data_root: Path | None = None,
        start: Path | None = None,
        device: str = "cpu",
        measures: Sequence[Measure] = (),
    ) -> None:
        self.config, self.measures = config, measures
        self.device = torch.device(device)
        torch.manual_seed(config.seed)
        quantize.use_compiled(config.training.compile == "quantizers")
        self.data_root = data_root
        self.classes, self.input_shape = data_shape(config)
        self.model = build_model(config, self.classes, self.input_shape, seed=config.seed)
        self.table: LayerTable = trace(self.model, self.input_shape)
        self.bits = resolve_bits(config, self.table)
        self._scales: dict[str, Tensor] = {}
        self.inherited: Inherited | None = None
        if start is not None and config.start.parent == "own":
            checkpoint.load_weights(start, self.model)
            self._scales = checkpoint.scales(start)
        elif start is not None:
            self.inherited = inherit(self.model, checkpoint.weights_of(start))
        self.method = self._method()
        self.method.prepare(self.model, self.table, self.bits)
        shared_norm.share(self.model)
        lay_out(self.model, self.device)
        self.fixed: Point | None = None
        if self.precision == torch.bfloat16:
            modules.keep_float32(self.model)
        self.forward: nn.Module = self.model
        if config.training.compile == "model":
            self.forward = torch.compile(self.model)  # type: ignore[assignment]

    @cached_property
    def data(self) -> Splits:
        """The splits, loaded when they are first asked for: a saved network is exported without them."""
        return load_data(self.config, self.data_root)

    def _method(self) -> Method:
        found = plugins.attribute("methods", self.config.method.name, "Method")
        smoothing = self.config.training.label_smoothing
        settings = found.Settings(**self.config.method.settings)
        return found(settings, label_smoothing=smoothing, epochs=self.config.search_epochs)

    @property
    def precision(self) -> torch.dtype:
        """Of matrix products and convolutions in training; evaluation is in float32."""
        return getattr(torch, self.config.training.precision)  # type: ignore[no-any-return]

    def optimizers(self, *, finetuning: bool = False) -> Optimizers:
        """Fresh optimizers over the method's parameter groups."""
        factor = self.config.optimizer.finetune_factor if finetuning else 1.0
        return Optimizers(self.method.groups(self.model), self.config.optimizer, lr_factor=factor)

    def calibrate(self) -> None:
        """Let the method set its scales from the first training batch: all of it on every rank, so that all agree."""
        images, _ = next(self.batches(epoch=0, rank=0, ranks=1))
        with world.seeing(1.0):
            self.method.calibrate(self.model, images)
        modules.take_scales(self.model, self._scales)

    def batches(
        self, epoch: int, *, rank: int | None = None, ranks: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the training batches of one epoch, or that of another rank."""
        batches = self.data.train.batches(
            self.config.training.batch_size,
            device=self.device,
            seed=self.config.seed * 1_000_003 + epoch,
            augment=True,
            rank=world.rank() if rank is None else rank,
            world=ranks or world.size(),
        )
        for images, labels in batches:
            yield images.contiguous(memory_format=torch.channels_last), labels

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; an incomplete last batch is dropped unless it is the only one."""
        return max(1, len(self.data.train) // self.config.training.batch_size)

    def load(self, path: Path) -> None:
        """Take the model from a trial's checkpoint, in the phase in which it was saved.

        Raises:
            ConfigError: the file is missing, torn, or of another model.
        """
        _, state = checkpoint.read(path)
        if state.get("epoch", 0) > self.config.search_epochs:
            self.method.freeze(self.model)
        checkpoint.load_weights(path, self.model)

    def points(self) -> list[Point]:
        """The operating points of the model: those of its method, or the one mixture of widths that was fixed."""
        return self.method.points(self.model) if self.fixed is None else [self.fixed]

    def layers(self, label: str) -> list[dict[str, Any]]:
        """A row for each quantized layer at one operating point: name, weights, MACs, widths, and the method's details.

        Raises:
            StopIteration: no point has this label.
        """
        point = next(point for point in self.points() if point.label == label)
        point.activate()
        details = self.method.details(self.model)
        return [
            {
                "layer": row.name,
                "weights": row.weights,
                "macs": row.macs,
                "weight_bits": point.bits[row.name].weight,
                "activation_bits": point.bits[row.name].activation,
                **details.get(row.name, {}),
            }
            for row in self.table.quantizable
            if row.name in point.bits
        ]

    def measure(self, split: Split, *, trained: bool = False) -> list[PointReport]:
        """Evaluate every operating point on a split; `trained` takes the measures of the trained model, too."""
        return [self._measured(point, split, trained=trained) for point in self.points()]

    def _own(self, bits: Bits, *, trained: bool) -> dict[str, float]:
        """A person's own measures of the active operating point."""
        values = known(self.measures, self.table, bits)
        learned = [m for m in self.measures if m.takes == "model"] if trained else []
        if learned:
            batches = self.data.validation.batches(IMAGES, device=self.device, seed=None, augment=False)
            images = next(iter(batches))[0]
            self.model.eval()
            values |= {m.name: m.of_model(self.table, bits, self.model, images) for m in learned}
        return {m.name: values[m.name] for m in self.measures if m.name in values}

    def _measured(self, point: Point, split: Split, *, trained: bool) -> PointReport:
        point.activate()
        accuracy, loss = evaluate(self.forward, split, self.device)
        return self.report(point, accuracy, loss, trained=trained)

    def report(self, point: Point, accuracy: float, loss: float, *, trained: bool = False) -> PointReport:
        """An operating point, which is active, with what it reaches and what it costs."""
        operations = bops(self.table, point.bits, output_share=point.output_share, input_share=point.input_share)
        return PointReport(
            label=point.label,
            accuracy=accuracy,
            loss=loss,
            bops=operations,
            relative_bops=operations / (self.table.macs * FLOAT_BITS**2),
            size_bytes=size_bytes(
                self.table, point.bits, extra_floats=point.extra_floats, output_share=point.output_share
            ),
            bits={name: [width.weight, width.activation] for name, width in point.bits.items()},
            measures=self._own(point.bits, trained=trained),
        )


def fit(
    config: TrialConfig,
    *,
    data_root: Path | None = None,
    start: Path | None = None,
    folder: Path | None = None,
    device: str = "cpu",
    measures: Sequence[Measure] = (),
) -> Iterator[Report]:
    """Train one trial and yield a report after each epoch.

    Args:
        config: what to train.
        data_root: where the data set lies.
        start: float weights to start from (`start.float_start` makes them).
        folder: where the trial's checkpoint is kept and looked for; None keeps nothing.
        device: `cpu` or `cuda`.
        measures: a person's own, for the reports.

    Raises:
        ConfigError, DataError, PluginError: before anything is trained.
        DivergedError: the loss is no longer finite.
    """
    session = Session(config, data_root=data_root, start=start, device=device, measures=measures)
    path = None if folder is None else folder / checkpoint.FILE
    done = 0
    state = None if path is None else _recovered(path)
    if path is not None and state is not None:
        if state.get("config") != config.tree():
            raise ConfigError(
                f"{path} is of another configuration: take another folder, or the settings it was made with"
            )
        done = state["epoch"]
        if done > config.search_epochs:
            session.method.freeze(session.model)
        optimizers = session.optimizers(finetuning=done > config.search_epochs)
        checkpoint.restore(path, session.model, *optimizers.parts)
        yield Report.from_json(state["report"])
    else:
        session.calibrate()
        optimizers = session.optimizers()
    first_step_at = 0.0
    for epoch in range(done + 1, config.training.epochs + 1):
        began = time.perf_counter()
        first_step_at = first_step_at or time.time()
        if epoch == config.search_epochs + 1:
            session.method.freeze(session.model)
            optimizers = session.optimizers(finetuning=True)
        train_loss = _train(session, optimizers, epoch)
        world.average(b for name, b in session.model.named_buffers() if "running_" in name)
        if epoch <= config.search_epochs and session.method.after_epoch(session.model, epoch):
            optimizers = session.optimizers()
        points = session.measure(session.data.validation, trained=epoch == config.training.epochs)
        report = Report(
            epoch=epoch,
            epochs=config.training.epochs,
            train_loss=train_loss,
            seconds=time.perf_counter() - began,
            first_step_at=first_step_at,
            points=points,
            inherited=None if session.inherited is None else asdict(session.inherited),
        )
        if path is not None and world.rank() == 0:
            checkpoint.save(
                path, session.model, *optimizers.parts, epoch=epoch, report=report.to_json(), config=config.tree()
            )
            if epoch == config.training.epochs:
                checkpoint.settle(path)
        yield report


def _recovered(path: Path) -> dict[str, Any] | None:
    """The state of the newest good checkpoint, the same on every rank."""
    if world.rank() == 0:
        checkpoint.recover(path)
    world.barrier()
    return checkpoint.read(path)[1] if path.exists() else None


def _train(session: Session, optimizers: Optimizers, epoch: int) -> float:
    """One epoch of steps; the mean loss, over all ranks. Both phases of a trial have a schedule of their own."""
    steps, config = session.steps_per_epoch(), session.config
    first, epochs = 1, config.search_epochs
    if epoch > config.search_epochs:
        first, epochs = config.search_epochs + 1, config.training.finetune_epochs
    session.model.train()
    total = torch.zeros((), device=session.device)
    for step, (images, labels) in enumerate(session.batches(epoch)):
        optimizers.set_rates((epoch - first) * steps + step, epochs * steps)
        total += training_step(
            session.method,
            session.model,
            session.forward,
            images,
            labels,
            optimizers,
            batch=min(config.training.batch_size, len(session.data.train)),
            parts=config.training.accumulate,
            precision=session.precision,
        )
    mean = float(world.mean(total)) / steps
    if not math.isfinite(mean):
        raise DivergedError(f"loss is {mean} after epoch {epoch} (optimizer/lr = {config.optimizer.lr:g})")
    return mean


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, device: torch.device) -> tuple[float, float]:
    """Top-1 accuracy (0..1) and mean cross-entropy of a model on a whole split, over all ranks.

    Raises:
        DivergedError: the loss is not finite.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for images, labels in split.batches(
        EVALUATION_BATCH, device=device, seed=None, augment=False, rank=world.rank(), world=world.size()
    ):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        sums[0] += (logits.argmax(1) == labels).sum()
        sums[1] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[2] += len(labels)
    model.train(training)
    correct, loss, count = world.total(sums).tolist()
    if not math.isfinite(loss):
        raise DivergedError(f"validation loss is {loss}")
    return correct / count, loss / count
