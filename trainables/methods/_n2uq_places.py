"""Where N2UQ puts its RPReLUs: in front of the convolutions of residual blocks, and where a ReLU leads to a layer."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock, Bottleneck

from trainables.models import _residual

RESIDUAL_BLOCKS = (BasicBlock, Bottleneck, _residual.BasicBlock, _residual.Bottleneck)
INVERTED_BLOCKS = (InvertedResidual, _residual.InvertedBlock)
PASSED_BY_RPRELU = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity)


def is_shortcut(layer: str) -> bool:
    """Whether a layer stands in a shortcut, by its name."""
    return "downsample" in layer.split(".")


def body_layers(model: nn.Module) -> set[str]:
    """Names of the convolutions in the bodies of residual blocks, shortcuts left out."""
    return {
        f"{name}.{part}"
        for name, block in model.named_modules()
        if type(block) in (*RESIDUAL_BLOCKS, *INVERTED_BLOCKS)
        for part, module in block.named_modules()
        if isinstance(module, nn.Conv2d) and not is_shortcut(part)
    }


def relus_before(model: nn.Module, layers: set[str]) -> dict[str, str]:
    """ReLUs within an `nn.Sequential` that one of `layers` follows, with nothing but `PASSED_BY_RPRELU` between."""
    found = {}
    for name, sequence in model.named_modules():
        if isinstance(sequence, nn.Sequential):
            waiting: str | None = None
            for part, module in _in_order(sequence, f"{name}." if name else ""):
                if isinstance(module, nn.ReLU | nn.ReLU6):
                    waiting = part
                elif not isinstance(module, PASSED_BY_RPRELU):
                    if waiting is not None and part in layers:
                        found[waiting] = part
                    waiting = None
    return found


def _in_order(sequence: nn.Sequential, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a sequence as they run, those of sequences within it in their place."""
    for key, module in sequence._modules.items():
        if isinstance(module, nn.Sequential):
            yield from _in_order(module, f"{prefix}{key}.")
        elif module is not None:
            yield f"{prefix}{key}", module
