"""Widths, counts and sizes as people read them, short enough for a table."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np


def short_bits(bits: Mapping[str, Sequence[int] | None]) -> str:
    """Widths of a network in one line: `weight/activation` bits of each layer in order, equal neighbours counted.

    Args:
        bits: layer to (weight bits, activation bits); a layer that is None is not quantized and left out.

    >>> short_bits({"conv1": [8, 8], "conv2": [4, 3], "fc1": [4, 4], "fc2": [8, 8]})
    '8/8 4/3 4/4 8/8'
    >>> short_bits({"conv1": [8, 8], "conv2": [4, 4], "conv3": [4, 4], "fc": [8, 8]})
    '8/8 4/4x2 8/8'
    >>> short_bits({})
    'float'
    """
    widths = [f"{int(pair[0])}/{int(pair[1])}" for pair in bits.values() if pair is not None]
    runs = [(width, len(list(same))) for width, same in groupby(widths)]
    return " ".join(width if count == 1 else f"{width}x{count}" for width, count in runs) or "float"


def human_bytes(size: float) -> str:
    """A number of bytes in the largest unit of which it has at least one.

    >>> human_bytes(512), human_bytes(21811), human_bytes(11_700_000)
    ('512 B', '21.3 KiB', '11.2 MiB')
    """
    power = 3 if size >= 1024**3 else 2 if size >= 1024**2 else 1
    return f"{size:.0f} B" if size < 1024 else f"{size / 1024**power:.1f} {'KMG'[power - 1]}iB"


def human_count(count: float) -> str:
    """A count with three digits and a decimal unit.

    >>> human_count(999), human_count(1_234_567), human_count(41_200_000_000)
    ('999', '1.23 M', '41.2 G')
    """
    digits = len(f"{count:.0f}")
    power = min((digits - 1) // 3, 4)
    return f"{count:.0f}" if power == 0 else f"{three_digits(count / 1000**power)} {'kMGT'[power - 1]}"


def human_number(value: float) -> str:
    """A number with four digits, written out unless it is very large or very small.

    >>> human_number(18881.3), human_number(0.01234567), human_number(1.5e12)
    ('18880', '0.01235', '1.5e+12')
    """
    written_out = 1e-4 <= abs(value) < 1e9
    return np.format_float_positional(float(f"{value:.4g}"), trim="-") if written_out else f"{value:.4g}"


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "point"), counted(3, "point")
    ('1 point', '3 points')
    """
    return f"{count} {noun}{'s' * (count != 1)}"


def three_digits(value: float) -> str:
    """A number with three digits, zeros at the end too.

    >>> three_digits(1.2), three_digits(0.60449), three_digits(123.4)
    ('1.20', '0.604', '123')
    """
    return f"{value:#.3g}".rstrip(".")
