"""A Double Rounding network as it is stored: integers of the highest width in place of the weights, one file for all.

`store` takes a trained network apart into named tensors: for every quantized layer `LAYER.codes` (int8) and the scale,
and everything else as in its state dict. `switched` gives the weights of any lower width from these tensors alone, by
integer arithmetic (`double_round.lower_codes`), equal bit for bit to those of training. `restore` puts them into a
prepared network, which can then switch as before, though the float weights are gone.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from trainables import checkpoint
from trainables.errors import ConfigError
from trainables.methods._double_round import lower_codes
from trainables.methods._switched_quantizers import quantizers

FORMAT = "double_rounding/1"
CODES = ".codes"
SCALE = ".weight_quantizer.scale"

Tensors = Mapping[str, Tensor]


@torch.no_grad()
def store(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a trained network, with codes in place of the float weights of its quantized layers."""
    tensors = dict(model.state_dict())
    for name, weights, _ in quantizers(model):
        tensors[name + CODES] = weights.codes(tensors.pop(f"{name}.weight"))
    return tensors


def highest_widths(model: nn.Module) -> dict[str, int]:
    """Width of the stored codes of each quantized layer, in bits."""
    return {name: weights.widths[0] for name, weights, _ in quantizers(model)}


@torch.no_grad()
def switched(tensors: Tensors, highest: Mapping[str, int], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Weights of the layers named in `widths`, in bits, from stored tensors.

    Args:
        tensors: of `store` or `load`.
        highest: width of each layer's codes.
        widths: wanted widths, 2..highest; any, trained or not.

    Raises:
        ConfigError: a layer without codes, or a width that they do not hold.

    >>> codes = torch.tensor([-37, 96], dtype=torch.int8)
    >>> tensors = {"fc.codes": codes, "fc.weight_quantizer.scale": torch.tensor(0.5)}
    >>> switched(tensors, {"fc": 8}, {"fc": 4})["fc"]
    tensor([-16.,  48.])
    """
    found = {}
    for name, low in widths.items():
        if name + CODES not in tensors or name not in highest:
            raise ConfigError(f"{name!r} has no stored codes: give layers of {sorted(highest)}")
        high = highest[name]
        if not 2 <= low <= high:
            raise ConfigError(f"bits/{name}/weight = {low}: the stored codes have {high} bits; give 2..{high}")
        codes, scale = lower_codes(tensors[name + CODES], high, low), tensors[name + SCALE]
        shape = scale.shape if scale.dim() == 0 else (-1, *[1] * (codes.dim() - 1))
        found[name] = codes.to(scale.dtype) * (scale.reshape(shape) * 2 ** (high - low))
    return found


@torch.no_grad()
def restore(model: nn.Module, tensors: Tensors) -> None:
    """Load stored tensors into a network prepared as the stored one was; its weights are those of the highest width.

    Raises:
        ConfigError: tensors of another network.
    """
    state = dict(tensors)
    highest = highest_widths(model)
    if missing := [name for name in highest if name + CODES not in state]:
        raise ConfigError(f"stored network lacks the codes of {missing[:3]}: prepare the network that was stored")
    for name, weight in switched(tensors, highest, highest).items():
        del state[name + CODES]
        state[f"{name}.weight"] = weight
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"stored network is another one than was prepared: {error}") from error


def save(path: Path, model: nn.Module) -> None:
    """Write the stored form of `model` to a safetensors file, atomically."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in store(model).items()}
    checkpoint.write(path, tensors, {"format": FORMAT, "highest": highest_widths(model)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors and highest widths of a file that `save` wrote.

    Raises:
        ConfigError: the file is missing, torn, or not of this format.
    """
    tensors, state = checkpoint.read(path)
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path} holds no Double Rounding codes: give a file that was stored as such")
    return tensors, state["highest"]
