"""Binary digits of signed integers, each split in a positive and a negative part: what bit planes are made of.

Digits are in the layout of `_bit_planes`: (planes, 2, elements), most significant first, positive part first.
"""

import functools

import torch
from torch import Tensor


def place_values(planes: int) -> Tensor:
    """What one unit of each plane is worth, most significant first; they sum to 1."""
    return torch.exp2(torch.arange(planes - 1, -1, -1.0)) / max(1, 2**planes - 1)


@functools.cache
def signed_place_values(planes: int, device: torch.device) -> Tensor:
    """(2 x planes): the value of each positive part, and minus that of each negative part."""
    values = place_values(planes)
    return torch.stack([values, -values], dim=1).flatten().to(device)


def binary(codes: Tensor, planes: int) -> Tensor:
    """Integers in -(2^planes - 1)..2^planes - 1 as zeros and ones, (planes, 2, elements), most significant first."""
    places = torch.arange(planes - 1, -1, -1, device=codes.device, dtype=torch.int32).view(-1, 1, 1)
    signed = torch.stack([codes, -codes]).clamp_min(0).to(torch.int32)
    return ((signed >> places) & 1).to(codes.dtype)


def used(planes: Tensor) -> Tensor:
    """Percent of elements for which each of (planes, 2, elements) is not zero, its two parts subtracted; (planes)."""
    return (planes[:, 0] != planes[:, 1]).sum(dim=1).double() * 100 / planes.shape[2]
