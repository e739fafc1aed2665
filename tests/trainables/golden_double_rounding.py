"""Golden cases of Double Rounding: how they are loaded and compared.

Whatever `golden/double_rounding/index.json` lists is put through our code, case by case and within its tolerance, by
the test that carries its kind (`of_kind`). Not compared, because nothing of ours computes them: `gs_alt_hbit_*` (a
third reading of the scale's gradient, which the index calls reference only), `lam_literal_*` (equation 6 as printed
gives negative learning rates; `lam_literal_floor0_*` is compared), and the spread of a single probe, which is a
property of the matrix.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.golden_vectors import ROOT, index
from trainables.methods._switched_quantizers import CodedWeight, ScaledInput

METHOD = "double_rounding"
REFERENCE_ONLY = re.compile(r"gs_alt_hbit_\d+|lam_literal_\d+|variance_layerwise_theory")
CASES = index(METHOD)["cases"]

Case = dict[str, Any]
Arrays = dict[str, Tensor]


def load(case: Case) -> Arrays:
    with np.load(ROOT / METHOD / case["file"]) as archive:
        return {name: torch.from_numpy(np.array(value)) for name, value in archive.items()}


def tolerance(case: Case) -> dict[str, float]:
    """What the case's text says of floats: `rtol 1e-12`, `rtol 1e-10, atol 1e-12`, or `exact`."""
    stated = {name: float(value) for name, value in re.findall(r"(rtol|atol) ([\d.e+-]+\d)", case["tolerance"])}
    return {"rtol": 0.0, "atol": 0.0, **stated}


def compare(case: Case, stored: Arrays, computed: dict[str, Any]) -> None:
    """Every output that the index lists is among what was computed, and equal to it."""
    outputs = [name for name in case["outputs"] if not REFERENCE_ONLY.fullmatch(name)]
    assert set(outputs) <= set(computed), "the index lists outputs that this test does not know"
    for name in outputs:
        wanted = stored[name]
        found = torch.as_tensor(computed[name]).detach()
        exact = not wanted.is_floating_point()
        torch.testing.assert_close(
            found.to(wanted.dtype).reshape(wanted.shape),
            wanted,
            **({"rtol": 0, "atol": 0} if exact else tolerance(case)),
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert not exact or bool((found == wanted.reshape(found.shape)).all()), name  # no rounding on the way


def of_kind(kind: str) -> Callable[[Any], Any]:
    """Runs a test on every case of a kind."""
    found = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", found, ids=[case["id"] for case in found])


def double(module: nn.Module) -> Any:
    return module.to(torch.float64)


def weight_quantizer(widths: Iterable[int], scale: Tensor, **options: Any) -> CodedWeight:
    quantizer = double(CodedWeight(list(widths), scales=scale.numel() if scale.dim() else 1, **options))
    quantizer.scale.data.copy_(scale.reshape(quantizer.scale.shape))
    return quantizer


def input_quantizer(stored: Arrays, widths: list[int], prefix: str = "s_", **options: Any) -> ScaledInput:
    quantizer = double(ScaledInput(widths, signed=False, **options))
    for bits in widths:
        quantizer.get_parameter(f"scale_{bits}").data.copy_(stored[f"{prefix}{bits}"])
    return quantizer


def widths_of(case: Case, stored: Arrays) -> list[int]:
    return [int(b) for b in (stored["bits"] if "bits" in stored else case["params"]["bits"])]
