"""The description within a packed file, small: JSON, deflated with a dictionary of what such descriptions say.

An encoding is a row: a letter for its class, bits, range, and what else its class has. Equal rows are listed once. Of
its numbers that differ from layer to layer (`scale`, thresholds) the row says only how many there are; they lie among
the floats of the file.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trainables.encoding import Bounded, Clipped, Dynamic, Encoding, Thresholds
from trainables.errors import ConfigError

TENSOR = "packed"
"""The one tensor of a packed file."""
FORMAT = 2
"""Of the description."""
KINDS: dict[str, type[Encoding]] = {"a": Encoding, "b": Bounded, "t": Thresholds, "d": Dynamic, "c": Clipped}
EXTRAS = {
    "a": ("divisor", "offset", "multiplies_first"),
    "b": ("two_sided", "steps", "middle", "scales_last"),
    "t": ("falls",),
    "d": (),
    "c": (),
}
"""Fields of each class, in the order of a row, behind letter, bits, q_min, q_max and the kind of scale."""
USUAL, ONE, EACH = 0, 1, 2
"""Kinds of scale: the usual one, one that is stored, one for each channel."""

DICTIONARY = (
    b'"mobilenet_v1""mobilenet_v2""resnet50""resnet34""vgg7""fashion_mnist""imagenet","input_shape":[3,224,224]'
    b'"depth":,"width":,"per_channel":true,"variant":"widths":"8,6,4""mode":"double_rounding""bayesian_bits""adabits"'
    b'"bsq""sat""n2uq""dorefa""pact"{"format":2,"config":{"method":{"name":"lsq"},"method":"lsq","model":{"name":'
    b'"resnet18","model":"resnet20","model":"lenet5","data":"cifar10","data":"mnist","data":"digits"},"classes":1000,'
    b'"classes":10,"input_shape":[3,32,32],"input_shape":[1,28,28],"input_shape":[1,8,8],"prepared":true,"layers":['
    b'null,{"w":0,"r":1,"as":2,"p":1},{"w":0},{"w":1,"r":2},{"w":3,"r":4},{"w":5,"r":6},"strides":[9,9,3,1],{"w":2,"r"'
    b':2}],"sites":{},"encodings":[[32],["t",2,0,3,1],["d",4,0,15,0],["b",4,0,15,1,true,16,true,true],["a",4,0,15,2,1,'
    b'-7.5],["a",7,-64,63,1],["a",7,0,127,1],["a",6,-32,31,1],["a",6,0,63,1],["a",5,-16,15,1],["a",5,0,31,1],["a",3,-4,'
    b'3,1],["a",3,0,7,1],["a",2,-2,1,1],["a",2,0,3,1],["a",4,-8,7,1],["a",4,0,15,1],["a",8,0,255,1],["a",8,-128,127,1]]'
    b',"facts":{"accuracy":0.9,"bops":,"relative_bops":0.0,"size_bytes":,"sweep":"-lsq-2026","trial":1,"point":"final"}}'
)
"""Part of the format: it never changes."""


class Floats(Protocol):
    """Where the numbers of a file come from."""

    def floats(self, count: int) -> Tensor:
        """The next ones, (count,)."""


@dataclass(frozen=True)
class Row:
    """One encoding of a description, without its numbers.

    Attributes:
        values: as in the list of encodings; a width alone where nothing is rounded.
    """

    values: list[Any]

    @property
    def bits(self) -> int:
        """Width."""
        return int(self.values[0] if len(self.values) == 1 else self.values[1])

    def take(self, file: Floats, channels: int) -> Encoding | None:
        """The encoding, with its numbers from the file; None where nothing is rounded."""
        if len(self.values) == 1:
            return None
        letter, bits, q_min, q_max, kind, *extras = self.values
        cls = KINDS[letter]
        scale = torch.full((), cls.usual_scale) if kind == USUAL else file.floats(channels if kind == EACH else 1)
        fields: dict[str, Any] = dict(zip(EXTRAS[letter], extras, strict=False))
        if cls is Thresholds:
            fields["thresholds"] = file.floats(q_max)
        return cls(bits=bits, q_min=q_min, q_max=q_max, scale=scale if kind == EACH else scale.view(()), **fields)


class Encodings:
    """The list of encodings of a description."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def number(self, encoding: Encoding | int) -> int:
        """Place in the list, to which it is added if it is new; a number of bits stands for no rounding."""
        values = _values(encoding)
        if values not in self.rows:
            self.rows.append(values)
        return self.rows.index(values)


def _values(encoding: Encoding | int) -> list[Any]:
    if isinstance(encoding, int):
        return [encoding]
    letter = next(letter for letter, kind in KINDS.items() if kind is type(encoding))
    kind = EACH if encoding.scale.dim() else ONE if float(encoding.scale) != encoding.usual_scale else USUAL
    usual = {"divisor": 1.0, "offset": 0.0, "multiplies_first": False, "scales_last": False, "falls": False}
    extras = [getattr(encoding, name) for name in EXTRAS[letter]]
    while extras and extras[-1] == usual.get(EXTRAS[letter][len(extras) - 1]):
        extras.pop()
    return [letter, encoding.bits, encoding.q_min, encoding.q_max, kind, *extras]


def stored(encoding: Encoding | int) -> Iterator[Tensor]:
    """The numbers of an encoding that go to the floats of the file, in the order in which `Row.take` reads them."""
    if isinstance(encoding, int):
        return
    if _values(encoding)[4] != USUAL:
        yield encoding.scale
    if isinstance(encoding, Thresholds):
        yield encoding.thresholds


def pack(described: dict[str, Any], *, at_least: int = 0) -> Tensor:
    """The description as bytes, its length in front, with zeros behind if it is shorter than `at_least`.

    Raises:
        ConfigError: it is too long.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    text = json.dumps(described, separators=(",", ":")).encode()
    content = (packer.compress(text) + packer.flush()).ljust(at_least - 2, b"\0")
    if len(content) >= 1 << 16:
        raise ConfigError(f"the description takes {len(content)} bytes; 65535 fit: give shorter facts")
    return torch.from_numpy(np.frombuffer(len(content).to_bytes(2, "little") + content, np.uint8).copy())


def unpack(content: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The description, and the bytes behind it.

    Raises:
        ConfigError: there is none.
    """
    data = content.numpy().tobytes()
    length = int.from_bytes(data[:2], "little")
    try:
        text = zlib.decompressobj(-15, zdict=DICTIONARY).decompress(data[2 : 2 + length])
        return json.loads(text), content[2 + length :]
    except (zlib.error, ValueError) as error:
        raise ConfigError(f"no packed network: its description cannot be read ({error})") from error
