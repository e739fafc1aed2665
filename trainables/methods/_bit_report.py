"""What BSQ found: planes of each layer, ones in each plane, the paper's compression, and both artefacts as files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from trainables.cost import FLOAT_BITS, LayerTable
from trainables.methods._bit_planes import bit_tensors
from trainables.modules import Quantizer

Scheme = Mapping[str, tuple[int, int]]
"""Planes of a layer's weights and of its biases, without signs; 0 biases: there are none, or all are zero."""


@dataclass(frozen=True, kw_only=True)
class PlaneRow:
    """Weights or biases of one layer.

    Attributes:
        layer: name.
        role: `weight` or `bias`.
        planes: width without the sign; 0 if all values are zero.
        shares: percent of elements with a one in each plane, most significant first.
    """

    layer: str
    role: str
    planes: int
    shares: tuple[float, ...]


def plane_table(model: nn.Module) -> list[PlaneRow]:
    """One row for each tensor in bit representation, in the order of definition."""
    rows = []
    for layer, role, tensor, _ in bit_tensors(model):
        shares = tuple(tensor.shares())
        rows.append(PlaneRow(layer=layer, role=role, planes=tensor.planes if any(shares) else 0, shares=shares))
    return rows


def scheme(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Planes of each layer's weights and biases as `method/scheme` takes them; dead ones are 0."""
    found: dict[str, dict[str, int]] = {}
    for row in plane_table(model):
        found.setdefault(row.layer, {})[row.role] = row.planes
    return {layer: (roles["weight"], roles.get("bias", 0)) for layer, roles in found.items()}


@dataclass(frozen=True, kw_only=True)
class PlaneCount:
    """Size in the paper's convention: magnitude bits of weights and biases in bit representation, nothing else.

    Attributes:
        parameters: how many weights and biases.
        bits: their planes, summed.
    """

    parameters: int
    bits: int

    @property
    def average_bits(self) -> float:
        """Planes of a parameter."""
        return self.bits / self.parameters

    @property
    def compression(self) -> float:
        """32 bits over the average."""
        return FLOAT_BITS * self.parameters / self.bits


def count(table: LayerTable, planes: Scheme, *, dead: int = 0) -> PlaneCount:
    """The paper's size of a scheme.

    Args:
        table: of the network; layers that the scheme lacks are float and not counted.
        planes: the scheme.
        dead: what a layer of zeros counts: 0, as the paper's figures below one bit need, or 1 as the public code logs.
    """
    rows = [(table[layer], *widths) for layer, widths in planes.items()]
    return PlaneCount(
        parameters=sum(row.weights + row.biases for row, _, _ in rows),
        bits=sum(row.weights * max(weight, dead) + row.biases * max(bias, dead) for row, weight, bias in rows),
    )


def float_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict of the plain network with the quantized values as weights; it loads as any float network."""
    quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(quantizers)}
    for layer, role, tensor, _ in bit_tensors(model):
        state[_key(layer, role)] = tensor.values()
    return state


def bit_state(model: nn.Module) -> dict[str, Tensor]:
    """The network with planes in the place of weights, under the names of the public code.

    `LAYER.pweight` and `LAYER.nweight` are the positive and negative planes, (*shape, planes), 0 or 1 as bytes, most
    significant first, with `LAYER.scale`; `LAYER.pbias`, `LAYER.nbias` and `LAYER.biasscale` likewise. A tensor of 0
    planes has one, empty. All else is as in `float_state`.
    """
    state = float_state(model)
    for layer, role, tensor, _ in bit_tensors(model):
        del state[_key(layer, role)]
        positive, negative = tensor.binary_planes()
        state[_key(layer, f"p{role}")], state[_key(layer, f"n{role}")] = positive.byte(), negative.byte()
        state[_key(layer, "scale" if role == "weight" else "biasscale")] = tensor.scale
    return state


def save_float(path: Path, model: nn.Module) -> None:
    """Write `float_state` as safetensors; `start/checkpoint` takes the file."""
    _save(path, model, float_state(model))


def save_bits(path: Path, model: nn.Module) -> None:
    """Write `bit_state` as safetensors, with the scheme as JSON in its header."""
    _save(path, model, bit_state(model))


def _save(path: Path, model: nn.Module, state: dict[str, Tensor]) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, path, metadata={"scheme": json.dumps(scheme(model))})


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name
