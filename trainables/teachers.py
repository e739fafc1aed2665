"""Teachers: trained networks whose answers a student learns to give. A teacher is frozen and no part of its student.

Hinton et al. 2015, "Distilling the knowledge in a neural network", arXiv:1503.02531, at temperature 1.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables import checkpoint, plugins
from trainables.errors import ConfigError, PluginError
from trainables.models._torchvision import IMAGENET_CLASSES, torchvision_model


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's softmax against the teacher's, mean over the batch.

    The teacher's entropy is not subtracted, so the smallest value is not 0.

    Args:
        student: logits, (batch, classes).
        teacher: logits, (batch, classes); they get no gradient.

    >>> float(distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 90.0]])))  # log 2
    0.6931471824645996
    """
    return functional.cross_entropy(student, teacher.detach().softmax(1))


def build_teacher(
    name: str,
    classes: int,
    input_shape: tuple[int, int, int],
    *,
    settings: Mapping[str, Any],
    pretrained: bool = False,
    weights: Path | None = None,
) -> nn.Module:
    """A teacher with its weights, in evaluation mode; the global random state is left alone.

    Args:
        name: a model of ours, a dotted path to one of one's own, or else a model of torchvision.
        classes: number of outputs that the student has.
        input_shape: of one image, (channels, height, width).
        settings: keyword arguments of the model.
        pretrained: take torchvision's weights; only for its 1000 classes.
        weights: take those of this file, a checkpoint of ours or a plain safetensors state dict.

    Raises:
        ConfigError: no weights or two kinds of them, other classes, or a file of another model.
        PluginError: no such model.
    """
    if pretrained == (weights is not None):
        have = "has no weights" if weights is None else "has two kinds of weights"
        raise ConfigError(
            f"method/teacher = {name!r} {have}: give method/teacher_checkpoint or method/teacher_pretrained"
        )
    if pretrained and classes != IMAGENET_CLASSES:
        raise ConfigError(
            f"method/teacher_pretrained = True: the weights of {name!r} are for {IMAGENET_CLASSES} classes, the data "
            f"set has {classes}; give a teacher of {classes} classes by method/teacher_checkpoint"
        )
    with torch.random.fork_rng(devices=[]):
        network = _network(name, classes, input_shape, {**settings, **({"pretrained": True} if pretrained else {})})
    if weights is not None:
        _load(weights, network, classes)
    return network.requires_grad_(False).eval()


def _network(name: str, classes: int, input_shape: tuple[int, int, int], settings: dict[str, Any]) -> nn.Module:
    ours = plugins.describe(plugins.KINDS["models"])
    try:
        if "." in name or name in ours:
            return plugins.attribute("models", name, "build")(classes, input_shape, **settings)
        from torchvision.models import list_models

        if name not in list_models():
            near = plugins.nearest(name, [*ours, *list_models()])
            raise PluginError(f"method/teacher = {name!r}: neither a model of ours nor of torchvision{near}")
        return torchvision_model(name, classes, input_shape, **{"pretrained": False, **settings})
    except TypeError as error:
        raise ConfigError(f"method/teacher = {name!r} cannot be built: {error}") from error


def _load(path: Path, network: nn.Module, classes: int) -> None:
    """Load the file, after a look at the number of classes, which is the likeliest fault."""
    tensors, _ = checkpoint.read(path)
    layers = [key for key, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = f"{layers[-1]}.weight"
    found = tensors.get(f"model/{last}", tensors.get(last))
    if found is not None and len(found) != classes:
        raise ConfigError(
            f"method/teacher_checkpoint = {str(path)!r}: a teacher of {len(found)} classes, the data set has "
            f"{classes}; give one that was trained on the same classes"
        )
    checkpoint.load_weights(path, network)
