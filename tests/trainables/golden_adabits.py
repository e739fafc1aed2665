"""Golden arrays of SAT and AdaBits: how they are loaded and compared.

Whatever `golden/adabits/index.json` lists goes through our kernels, quantizers, layers and methods, within the
tolerances that it recommends, which are shares of the largest magnitude of an array. Left out, because nothing of ours
corresponds: the clip level of the first layer, which reads the image and never uses it. Evaluation arrays of linear
layers go through `evaluation_as_published`; ours agree with training.
"""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden_vectors import index, load

METHOD = "adabits"
FILES = index(METHOD)["files"]

Settings = dict[str, Any]


def tolerance(file: str) -> float:
    """What the index recommends: a share of the largest magnitude, or relative; 0 is exact."""
    for files, text in index(METHOD)["recommended_tolerance"].items():
        if any(re.fullmatch(part.strip().replace("*", ".*"), file) for part in files.split("/")):
            found = re.search(r"\d+e-\d+", text)
            return float(found[0]) if found else 0.0
    raise KeyError(f"{file} has no tolerance")


def arrays_of(file: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in load(METHOD, file)[1].items()}


def settings_of(file: str, array: str) -> Settings:
    return FILES[file]["arrays"][array].get("settings", {})


def assert_close(found: Tensor | None, wanted: Tensor, file: str, *, like: Tensor | None = None) -> None:
    """`like` is the whole array of which `wanted` is a part."""
    assert found is not None
    largest = float((wanted if like is None else like).double().abs().max())
    torch.testing.assert_close(
        found.detach().reshape(wanted.shape).to(wanted.dtype), wanted, rtol=0, atol=tolerance(file) * largest
    )


def prefixes(file: str, of: str) -> list[str]:
    """What stands before `.of` in the names of a file's arrays."""
    return [name.removesuffix(f".{of}") for name in FILES[file]["arrays"] if name.endswith(f".{of}")]


def method_settings(options: Settings) -> Settings:
    """Ours, of the published options and their defaults."""
    return {
        "weight_scheme": options.get("weight_quant_scheme", "modified"),
        "activation_scheme": options.get("act_quant_scheme", "original"),
        "rescale": options.get("rescale", True),
        "rescale_conv": options.get("rescale_conv", False),
        "rescale_target": options.get("rescale_type", "constant"),
        "clamp": options.get("clamp", True),
    }
