"""Progressive training of several widths: where it is, and batch norm calibrated for the widths that do not train.

Calibration, which the paper of AdaBits names and its code lacks: statistics start anew and become the plain average
over some training batches, at the width in question, without gradients.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainables.methods._norm_sets import switchable_norms
from trainables.modes import in_mode


class Stage(nn.Module):
    """Which width progressive training is at: a buffer, so that a resumed trial knows.

    Attributes:
        current: position in the order of training; shape ().
    """

    current: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("current", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself: in an `nn.Sequential` this runs, too."""
        return x

    def plain(self) -> nn.Module:
        """Nothing, for exports."""
        return nn.Identity()


STAGE = "stage_quantizer"
"""Where a model holds its `Stage`; the ending marks it as no part of the float network."""


def stage_of(model: nn.Module) -> Stage:
    """The stage of a model in progressive training."""
    stage = model.get_submodule(STAGE)
    assert isinstance(stage, Stage)
    return stage


@torch.no_grad()
def calibrate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Batch-norm calibration: set the statistics in use to the average over `batches`, at the width in use.

    Nothing else changes: the rest of the model runs in evaluation mode, and the random state is left alone.

    Args:
        model: with switchable norms, switched to a width.
        batches: images, (batch, channels, height, width) each.
    """
    norms = switchable_norms(model)
    momenta = [norm.momentum for norm in norms]
    with in_mode(model, training=False):
        for norm in norms:
            norm.num_batches_tracked[norm.index] = 0  # type: ignore[index]
            norm.momentum = None  # a plain average; its first batch replaces what there was
            norm.train()
        try:
            for images in batches:
                model(images)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
