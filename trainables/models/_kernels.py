"""Kernels of another size: the odd sides that keep an image's size, in a network that was built with 3 x 3."""

from torch import nn

from trainables.errors import ConfigError


def check_kernel(model: str, kernel: int) -> None:
    """Refuse a side that cannot keep an image's size.

    Raises:
        ConfigError: an even side, or one out of range.
    """
    if not (1 <= kernel <= 15 and kernel % 2):
        raise ConfigError(f"model/kernel = {kernel}: {model} takes an odd number of pixels, 1..15")


def set_depthwise_kernels(model: nn.Module, kernel: int) -> None:
    """Give all depthwise convolutions of a network, in place, a kernel of this side and fresh weights."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    for name, old in found.items():
        conv = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel,
            stride=old.stride[0],
            padding=kernel // 2,
            groups=old.groups,
            bias=old.bias is not None,
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, conv)
