"""Codes of any width up to 16 bits in exactly as many bits, the lowest first, without gaps between codes."""

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 21
"""Codes packed at once, a multiple of 8: bounds the memory that the bits take on the way."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` each in `ceil(count * bits / 8)` bytes, the lowest bit first.

    Args:
        codes: integers, 0..2^bits - 1; any shape.
        bits: width, 1..16.

    Raises:
        ValueError: a code or the width is out of range.

    >>> pack(torch.tensor([1, 2, 3]), 2).tolist()  # 0b111001
    [57]
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits = {bits}: codes are packed at 1..16 bits")
    flat = codes.flatten()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < 2**bits:
        raise ValueError(f"codes from {int(flat.min())} to {int(flat.max())} do not fit into {bits} unsigned bits")
    places = np.arange(bits, dtype=np.uint16)
    parts = [np.zeros(0, np.uint8)]
    for chunk in flat.split(CHUNK):
        ones = chunk.cpu().numpy().astype(np.uint16)[:, None] >> places & 1
        parts.append(np.packbits(ones.astype(np.uint8), bitorder="little"))
    return torch.from_numpy(np.concatenate(parts))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `count` codes as int32, in one dimension.

    Raises:
        ValueError: `packed` does not have the bytes of so many codes.

    >>> unpack(torch.tensor([57], dtype=torch.uint8), 2, 3).tolist()
    [1, 2, 3]
    """
    if len(packed) != packed_bytes(count, bits):
        raise ValueError(f"{len(packed)} bytes do not hold {count} codes of {bits} bits")
    weights = (1 << np.arange(bits)).astype(np.int32)
    parts = [np.zeros(0, np.int32)]
    step = CHUNK * bits // 8
    for begin in range(0, len(packed), step):
        ones = np.unpackbits(packed[begin : begin + step].numpy(), bitorder="little")
        whole = len(ones) // bits * bits
        parts.append(ones[:whole].reshape(-1, bits) @ weights)
    return torch.from_numpy(np.concatenate(parts)[:count])


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return (count * bits + 7) // 8
