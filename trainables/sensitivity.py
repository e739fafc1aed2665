"""How much each layer suffers from quantization: tables by layer and width, of four kinds.

Hessian traces times the squared error of quantization are HAWQ-V2's Omega (Dong et al. 2020, arXiv:1911.03852), Fisher
traces times the same the weight part of FIT (Zandonati et al. 2022, arXiv:2210.08502); the error alone needs no data;
the drop of accuracy with one layer quantized at a time needs an evaluation for each entry. Traces: `curvature`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from trainables.curvature import Traces, fisher_traces, hessian_traces, hutchinson, pooled
from trainables.errors import ConfigError

__all__ = [
    "Traces",
    "accuracy_drops",
    "check_layers",
    "fisher_traces",
    "hessian_traces",
    "hutchinson",
    "nearest_grid",
    "nearest_scale",
    "on_grid",
    "other_network",
    "pooled",
    "quantization_errors",
    "weighted",
]


def quantization_errors(
    weights: Mapping[str, Tensor], widths: Sequence[int], quantized: Callable[[str, Tensor, int], Tensor] | None = None
) -> dict[str, dict[int, float]]:
    """Squared error `|Q(w) - w|^2`, by layer and width in bits.

    Args:
        weights: by layer, any shapes.
        widths: in bits.
        quantized: what stands for a layer's weights at a width, from (name, weights, bits); None takes `nearest_grid`.
    """
    quantized = quantized or (lambda name, weight, bits: nearest_grid(weight, bits))
    return {
        name: {bits: float((quantized(name, w, bits) - w).double().square().sum()) for bits in widths}
        for name, w in weights.items()
    }


def nearest_grid(x: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """`x` on the evenly spaced grid of `2^bits` values with the scale of `nearest_scale`."""
    return on_grid(x, nearest_scale(x, bits, signed=signed), bits, signed=signed)


def nearest_scale(x: Tensor, bits: int, *, signed: bool = True, candidates: int = 64) -> float:
    """The scale, of 64 tried, whose grid of `2^bits` values has the least squared distance from `x`.

    Args:
        x: any shape.
        bits: of the grid.
        signed: whether its codes begin at -2^(bits - 1), or at 0.
        candidates: scales to try, evenly up to the one that clips nothing.
    """
    full = float(x.abs().max()) / max(2 ** (bits - signed) - 1, 0.5)
    scales = (max(full * (i + 1) / candidates, 1e-12) for i in range(candidates))
    return min(scales, key=lambda scale: float((on_grid(x, scale, bits, signed=signed) - x).square().sum()))


def on_grid(x: Tensor, scale: float, bits: int, *, signed: bool) -> Tensor:
    """`x` rounded to codes times `scale`."""
    top = 2 ** (bits - signed)
    return (x / scale).round().clamp(-top if signed else 0, top - 1) * scale


def weighted(average: Mapping[str, float], errors: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Average trace times squared error, by layer and width: Omega of HAWQ-V2 for Hessian traces, FIT for Fisher ones.

    Traces below zero are noise and count as zero.

    Raises:
        ConfigError: traces of another network.
    """
    check_layers(average, errors)
    return {name: {b: max(average[name], 0.0) * error for b, error in row.items()} for name, row in errors.items()}


def accuracy_drops(
    layers: Sequence[str], widths: Sequence[int], accuracy: Callable[[Mapping[str, int]], float]
) -> dict[str, dict[int, float]]:
    """What accuracy falls by when one layer alone is quantized, by layer and width.

    Args:
        layers: names.
        widths: in bits.
        accuracy: 0..1 of the network with these layers at these widths and all others float.
    """
    reference = accuracy({})
    return {name: {bits: reference - accuracy({name: bits}) for bits in widths} for name in layers}


def check_layers(given: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse sensitivities of another network.

    Raises:
        ConfigError: names the layers that are missing or unknown.
    """
    fault = other_network(given, wanted)
    if fault:
        raise ConfigError(f"these sensitivities {fault}")


def other_network(given: Iterable[str], wanted: Iterable[str]) -> str:
    """What shows that sensitivities by layer are of another network; an empty text if nothing does."""
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if not missing and not unknown:
        return ""
    parts = [f"lack {', '.join(missing[:3])}"] * bool(missing) + [f"have {', '.join(unknown[:3])}"] * bool(unknown)
    return (
        f"are of another network: they {' and '.join(parts)} ({len(missing) + len(unknown)} layers in all); "
        "measure them on this one"
    )
