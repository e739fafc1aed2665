"""`torch.export` programs (.pt2): the network as a graph of ATen operators, for torch without this package.

Weights are decoded floats and quantizers a division, a clip, a rounding and a product, so the file is as large as that
of a float network; a packed file is the small one. The batch can have any size from 1.
"""

import os
import warnings
from pathlib import Path

import torch
from torch import nn

from trainables.errors import ConfigError
from trainables.export.coded import fixed


@torch.no_grad()
def save_program(path: Path, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    """Write `model` as it stands (at the operating point that is active), read it back and compare the logits.

    Args:
        path: file to write, in one atomic step; its name ends in `.pt2`.
        model: trained, with quantized layers; it is left as it is.
        input_shape: (channels, height, width).

    Raises:
        ConfigError: a quantizer without affine codes, or logits that are not the same bit by bit.
    """
    twin = fixed(model)
    images = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(twin, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # torch wants the ending
    try:
        with warnings.catch_warnings():  # of channels-last weights, that they may cause issues on other devices
            warnings.filterwarnings("ignore", message="No complete tensor")
            torch.export.save(program, temporary)
        difference = float((torch.export.load(temporary).module()(images) - twin(images)).abs().max())
        if difference != 0:
            raise ConfigError(
                f"{path}: the program's logits differ by up to {difference:g} from the network's; not written"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
