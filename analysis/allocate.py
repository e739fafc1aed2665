"""One option for each layer: the least summed sensitivity under limits on bits, size and operations.

An integer program (Yao et al. 2021, HAWQ-V3, arXiv:2011.10680): `scores[l, k]` is what layer l costs in sensitivity
when it takes option k, `amounts[l, k]` what that uses of a resource, and every resource has a limit. An option is
whatever the caller tables: a width, or a pair of a weight and an activation width.

`allocate` solves one such program exactly; `analysis.ladder` solves many budgets of one resource. `alternatives` forces
each layer in turn to other options, as Huang et al. 2025 (arXiv:2502.01199, algorithm 2) do for a pool of nets.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.integer_program import Allocation, InfeasibleError, IntegerProgram, Limit, Table


def mean_bits(layers: int, widths: Sequence[int], at_most: float) -> Limit:
    """Limit on the mean over layers of the options' widths in bits."""
    return Limit(name="mean_bits", amounts=np.tile(np.asarray(widths) / layers, (layers, 1)), at_most=at_most)


def size_bytes(weights: Sequence[int], widths: Sequence[int], at_most: float) -> Limit:
    """Limit on the bytes of all codes: weights of each layer times width of each option, over 8."""
    return Limit(name="size_bytes", amounts=np.outer(weights, widths) / 8, at_most=at_most)


def bops(macs: Sequence[int], widths: Sequence[int], activation_widths: Sequence[int], at_most: float) -> Limit:
    """Limit on bit operations: multiply-accumulates of each layer times both widths of each option."""
    products = np.multiply(widths, activation_widths)
    return Limit(name="bops", amounts=np.outer(np.asarray(macs, dtype=float), products), at_most=at_most)


def linear_scores(sensitivities: Sequence[float], widths: Sequence[int], *, printed: bool = False) -> np.ndarray:
    """Scores of Huang et al.: sensitivity times width, whose sum their code maximizes, so negative here.

    Args:
        sensitivities: average Hessian trace of each layer.
        widths: of the options, in bits.
        printed: minimize the sum as their algorithm 2 prints it, which gives sensitive layers the fewest bits.
    """
    return np.outer(sensitivities, widths) * (1 if printed else -1)


def allocate(scores: Table, limits: Sequence[Limit] = (), *, forced: Mapping[int, int] | None = None) -> Allocation:
    """The options with the least summed score within all limits, exactly.

    Args:
        scores: (layers, options); infinite or NaN where a layer cannot take an option. Rows may differ in length.
        limits: bounds on resources.
        forced: option that a layer must take, by the layer's number.

    Raises:
        InfeasibleError: names the limits that cannot be met, and by how much.
        ValueError: a layer without any option, or tables of other shapes.

    >>> widths = [2, 4, 8]
    >>> best = allocate([[9, 1, 0], [5, 4, 0]], [mean_bits(2, widths, 6)])
    >>> [widths[k] for k in best.options], best.score, best.used
    ([4, 8], 1.0, {'mean_bits': 6.0})
    """
    program = IntegerProgram(scores, limits)
    for layer, option in (forced or {}).items():
        program.legal[layer] &= np.arange(program.legal.shape[1]) == option
    program.check_layers()
    return program.solved()


def alternatives(scores: Table, limits: Sequence[Limit]) -> tuple[list[Allocation], int]:
    """The best choice, then those with one layer forced to another option, in order of discovery, each once.

    Options must be in ascending order of width. Forced are those below the highest in use; if all layers have the same
    option, nothing is.

    Returns:
        the allocations, and how many forced programs were infeasible.
    """
    best = allocate(scores, limits)
    found = {tuple(best.options.tolist()): best}
    infeasible = 0
    if len(set(best.options.tolist())) > 1:
        for layer, taken in enumerate(best.options):
            for option in range(int(best.options.max())):
                if option != taken:
                    try:
                        other = allocate(scores, limits, forced={layer: option})
                    except InfeasibleError:
                        infeasible += 1
                        continue
                    found.setdefault(tuple(other.options.tolist()), other)
    return list(found.values()), infeasible
