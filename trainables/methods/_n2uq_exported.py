"""Parts of an N2UQ network as exports have them: the same numbers bit for bit, of operators that exporters know."""

import torch
from torch import Tensor, nn


class PlainRPReLU(nn.Module):
    """`prelu(x + shift) + offset` of torch's operators, with the channels at `dim`."""

    def __init__(self, shift: nn.Parameter, slope: nn.Parameter, offset: nn.Parameter, dim: int) -> None:
        super().__init__()
        self.shift, self.slope, self.offset, self.dim = shift, slope, offset, dim

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels at `dim`."""
        shape = [-1, *[1] * (x.dim() - 1 - self.dim % x.dim())]
        moved = x + self.shift.view(shape)
        kinked = torch.where(moved > 0, moved, moved * self.slope.view(shape))
        return kinked + self.offset.view(shape)


class Strided(nn.Module):
    """Reads every so many pixels only."""

    def __init__(self, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width)."""
        return x[:, :, :: self.stride[0], :: self.stride[1]].contiguous(memory_format=torch.channels_last)
