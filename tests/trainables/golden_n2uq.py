"""Golden arrays of N2UQ: how they are loaded, compared, and put into quantizers and blocks.

Whatever `golden/n2uq/index.json` lists goes through our kernels, modules and method, within the tolerances that it
gives, on all paths of the kernels. Every stored array is an input or is compared. Where the arrays hold a slip of the
public code, `as_published` gives it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import Arrays, cases, load
from trainables import modules
from trainables.methods._n2uq_modules import LearnedThresholds, ResidualBlock, RPReLU
from trainables.methods.n2uq import Method

METHOD = "n2uq"

Settings = dict[str, Any]
Tensors = dict[str, Tensor]


def listed(file: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a file."""
    found = cases(METHOD, file)
    return pytest.mark.parametrize(
        ("settings", "arrays"), [case[1:] for case in found], ids=[name for name, _, _ in found]
    )


def tensors(arrays: Arrays) -> Tensors:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def compare(file: str, stored: Tensors, computed: Tensors, *, given: set[str]) -> None:
    """Every stored array is given to the code under test or equals what it computed, within the file's tolerance."""
    assert set(stored) - given == set(computed)
    tolerance = load(METHOD, file)[0]["tolerance"]
    for name, value in computed.items():
        dtype = str(stored[name].dtype).removeprefix("torch.")
        close = {key: number for key, number in tolerance.get(dtype, {}).items() if key in ("rtol", "atol")}
        torch.testing.assert_close(
            value.detach().to(stored[name].dtype).reshape(stored[name].shape),
            stored[name],
            **{"rtol": 0, "atol": 0, **close},  # integers are exact
            msg=lambda text, name=name: f"{name}: {text}",
        )


def filled(parameter: Tensor, value: Tensor) -> None:
    """Set the entries in use of a parameter; those of `widths` are its first."""
    value = value.to(parameter.dtype)
    parameter.data.view(-1)[: value.numel()].copy_(value.reshape(-1))


def set_thresholds(quantizer: LearnedThresholds, stored: Tensors, prefix: str = "") -> dict[str, nn.Parameter]:
    """Give a quantizer its stored parameters; returns them by the names of the arrays."""
    parameters = threshold_parameters(quantizer, prefix)
    for name, parameter in parameters.items():
        filled(parameter, stored[name])
    return parameters


def threshold_parameters(quantizer: LearnedThresholds, prefix: str = "") -> dict[str, nn.Parameter]:
    parts = {"start": "start", "a": "widths", "beta1": "input_scale", "beta2": "output_scale"}
    return {prefix + theirs: getattr(quantizer, ours) for theirs, ours in parts.items()}


def gradient(parameter: nn.Parameter, like: Tensor) -> Tensor:
    """The gradient of the entries in use; those of the others are 0."""
    assert parameter.grad is not None
    flat = parameter.grad.view(-1)
    assert not bool(flat[like.numel() :].any())
    return flat[: like.numel()]


def published(**settings: Any) -> Method:
    return Method(Method.Settings(as_published=True, quantize_ends=False, **settings))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def block_parts(block: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names that arrays begin with: `conv1`, `bn1`, `quan1`, `prelu1`, `ds_q`, `ds_conv`, `ds_bn`."""
    found: dict[str, nn.Module] = {}
    body = [
        (n, m) for n, m in block.named_modules() if isinstance(m, modules.QuantizedConv2d) and "downsample" not in n
    ]
    norms = [m for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and "downsample" not in n]
    for i, ((_, conv), norm) in enumerate(zip(body, norms, strict=True), start=1):
        quantizer: Any = conv.input_quantizer
        found |= {f"conv{i}": conv, f"bn{i}": norm, f"quan{i}": quantizer, f"prelu{i}": quantizer.activation}
    if isinstance(block, ResidualBlock):
        found["prelu3" if len(body) == 2 else "prelu0"] = block.activation
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample
            found |= {"ds_conv": conv, "ds_bn": norm}
            if isinstance(conv, modules.QuantizedConv2d):
                found["ds_q"] = conv.input_quantizer
    return found


def part_parameters(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by the names of their arrays."""
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, RPReLU):
            number = name.removeprefix("prelu")
            found |= {f"bias{number}1": part.shift, name: part.slope, f"bias{number}2": part.offset}
        elif isinstance(part, LearnedThresholds):
            found |= threshold_parameters(part, f"{name}_")
        elif isinstance(part, nn.BatchNorm2d):
            found |= {f"{name}_w": part.weight, f"{name}_b": part.bias}
        else:
            found[name] = part.weight
    return found
