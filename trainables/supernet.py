"""A trained switchable network, to be evaluated at thousands of mixtures of widths: search on shared weights.

`keep` writes a network with all its widths as one file, for Double Rounding the integers of the highest width and no
float weights. `Supernet` opens it, says which widths each layer has and what a mixture costs, and measures mixtures on
images that stay in memory. `prefix` says how they share their work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trainables import checkpoint
from trainables.config import parse
from trainables.cost import Bits, LayerBits
from trainables.errors import ConfigError
from trainables.fit import Session
from trainables.method import Choices, Point
from trainables.prefix import Prefixes, recalibrate
from trainables.splits import Split

FORMAT = "supernet/1"
BATCH = 500
"""Images evaluated at a time: what LeNet-5 makes of so many fits into a core's caches."""
CALIBRATION = 512
"""Training images that recalibrate batch norm."""
KEPT_BYTES = 1 << 30

Widths = Mapping[str, Sequence[int]]
"""Layer -> [weight bits, activation bits], as in records."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one mixture reaches.

    Attributes:
        accuracy: top-1, 0..1.
        loss: mean cross-entropy.
    """

    accuracy: float
    loss: float


def bits_of(widths: Widths) -> dict[str, LayerBits]:
    """Widths as records have them, as the methods take them."""
    return {name: LayerBits(weight=pair[0], activation=pair[1]) for name, pair in widths.items()}


def keep(session: Session, path: Path, **facts: Any) -> None:
    """Write a trained network with all its widths, atomically.

    Args:
        session: of the trial, with its weights.
        path: safetensors file to write.
        facts: anything JSON can hold.

    Raises:
        ConfigError: the network does not switch widths.
    """
    choices_of(session)
    tensors = {name: v.detach().cpu().contiguous().clone() for name, v in session.method.stored(session.model).items()}
    checkpoint.write(path, tensors, {"format": FORMAT, "config": session.config.tree(), **facts})


def choices_of(session: Session) -> Mapping[str, Choices]:
    """Widths that each layer was trained at.

    Raises:
        ConfigError: the network does not switch widths, or no layer has two.
    """
    found = session.method.choices(session.model)
    name = session.config.method.name
    if not found:
        raise ConfigError(
            f"method {name!r} trains a network of fixed widths, no supernet: take one of double_rounding or adabits"
        )
    if all(len(each.weight) == 1 and len(each.activation) == 1 for each in found.values()):
        raise ConfigError(
            f"method {name!r} was trained at one width for each layer and has nothing to switch: give method/widths "
            "two or more, and the network a layer between its ends"
        )
    return found


def opened(path: Path, *, data_root: Path | None = None, device: str = "cpu") -> Session:
    """The trained network of a file that `keep` wrote.

    Raises:
        ConfigError: the file is missing, torn, or holds no supernet.
    """
    tensors, state = checkpoint.read(path)
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} holds no supernet: give a file that `raysearch supernet search` wrote")
    session = Session(parse(state["config"]), data_root=data_root, device=device)
    session.method.restore(session.model, tensors)
    session.model.eval()
    return session


def fix(session: Session, widths: Widths, *, calibration: int = 0) -> None:
    """Make a mixture the only operating point of a session.

    Args:
        session: of a supernet.
        widths: of every quantized layer.
        calibration: training images that batch norms are recalibrated on; 0 leaves them.

    Raises:
        ConfigError: widths that the network was not trained at.
    """
    point = session.method.mixture(session.model, bits_of(widths))
    point.activate()
    if calibration:
        recalibrate(session.model, first_images(session.data.train, calibration, session.device)[0])
    session.fixed = point


def first_images(split: Split, count: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first images of a split in the order of evaluation, channels last, and their labels; None takes all."""
    images, labels, read = [], [], 0
    for x, y in split.batches(BATCH, device=device, seed=None, augment=False):
        images.append(x)
        labels.append(y)
        read += len(y)
        if count is not None and read >= count:
            break
    x, y = torch.cat(images)[:count], torch.cat(labels)[:count]
    return x.contiguous(memory_format=torch.channels_last), y


class Supernet:
    """Measures mixtures of widths on images that stay in memory.

    Args:
        session: with trained weights; see `opened`.
        images: validation images to evaluate on, the first so many; None takes all.
        calibration: training images that batch norms are recalibrated on for each mixture; 0 leaves them.
        kept_bytes: of intermediate values that mixtures share; 0 shares nothing.

    Raises:
        ConfigError: the network does not switch widths, has no batch norm to recalibrate, or there are fewer images.
    """

    def __init__(
        self,
        session: Session,
        *,
        images: int | None = None,
        calibration: int = 0,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.session = session
        self.choices = choices_of(session)
        check_recalibration(session.table.norm_channels, calibration)
        check_images(session.data.validation, images)
        x, self._labels = first_images(session.data.validation, images, session.device)
        self._batches = [batch.contiguous(memory_format=torch.channels_last) for batch in x.split(BATCH)]
        fed = first_images(session.data.train, calibration, session.device)[0] if calibration else None
        self._prefixes = Prefixes(session.model, self.choices, self._batches, fed, most_bytes=kept_bytes)
        session.model.eval()

    def point(self, widths: Widths) -> Point:
        """The operating point of a mixture.

        Raises:
            ConfigError: widths that the network was not trained at.
        """
        return self.session.method.mixture(self.session.model, bits_of(widths))

    @torch.no_grad()
    def measure(self, mixtures: Sequence[Widths]) -> list[Measured]:
        """What each of these mixtures reaches.

        They are evaluated in an order in which neighbours differ late in the network, batch by batch.
        """
        points = [self.point(widths) for widths in mixtures]
        order = sorted(range(len(points)), key=lambda i: self._place(points[i].bits))
        sums = torch.zeros(len(points), 2, dtype=torch.float64)
        for batch, labels in enumerate(self._labels.split(BATCH)):
            for i in order:
                points[i].activate()
                logits = self._prefixes.logits(points[i].bits, batch)
                sums[i, 0] += (logits.argmax(1) == labels).sum()
                sums[i, 1] += functional.cross_entropy(logits, labels, reduction="sum")
        count = len(self._labels)
        return [Measured(accuracy=correct / count, loss=loss / count) for correct, loss in sums.tolist()]

    def _place(self, bits: Bits) -> list[tuple[int, int]]:
        return [(bits[name].activation, bits[name].weight) for name in self._prefixes.steps.layers]


def check_recalibration(norm_channels: int, calibration: int) -> None:
    """Refuse to recalibrate what is not there.

    Raises:
        ConfigError: a number of images that cannot be, or a network without batch norm.
    """
    if calibration < 0 or calibration == 1:
        raise ConfigError(f"calibration = {calibration}: give 2 images or more, or 0")
    if calibration and not norm_channels:
        raise ConfigError("recalibration has no effect: the network has no batch norm; leave it out")


def check_images(split: Split, images: int | None) -> None:
    """Refuse to evaluate on more images than there are.

    Raises:
        ConfigError: how many there are.
    """
    if images is not None and not 1 <= images <= len(split):
        raise ConfigError(f"images = {images}: the validation split has 1..{len(split)}")
