"""Points of a search on shared weights, each trained alone at its widths; and how far the shared accuracy is to trust.

The trials are ordinary ones of LSQ that start from the supernet's weights at its highest width, and from the scales
that it has learned for theirs. They are a sweep of their own in the search's run folder (`FOLDER`): records, front,
export and MLflow as for any sweep. Beside them stands the rank correlation between what the points reached on shared
weights and alone, with and without recalibrated batch norm.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysearch.errors import RecordError, SweepError
from raysearch.records import write_json
from raysearch.result import Result
from raysearch.seeds import Seeds
from raysearch.shared_weights.evaluators import SUPERNET
from raysearch.sweep import Sweep

if TYPE_CHECKING:
    from torch import Tensor

    from raysearch.driver import Watcher
    from trainables.fit import Session

FOLDER = "finetuned"
START = "start.safetensors"
CORRELATION = "correlation.json"
SOURCE = "finetune"
METHOD = "lsq"
LR = 0.005
"""A quarter of the default: the weights are trained already."""
FEWEST = 3
"""Points that have a rank correlation at all."""


def finetune(
    result: Result, points: int, *, epochs: int = 1, lr: float = LR, watcher: "Watcher | None" = None
) -> tuple[Result, dict[str, Any]]:
    """Train points of a search's front alone, and compare.

    Args:
        result: of a search on shared weights.
        points: how many, evenly along the front; fewer if it has fewer.
        epochs: of each.
        lr: their learning rate.
        watcher: told of every event.

    Returns:
        the sweep of the trained points, and `compared`.

    Raises:
        RecordError: no search, or it has no front.
        SweepError: widths that LSQ does not take, or the points are in training already.
    """
    from raysearch.driver import run
    from trainables.supernet import opened

    description = result.description
    if "search" not in description:
        raise RecordError(f"{result.path} holds no search on shared weights: `raysearch supernet search` makes one")
    chosen = _chosen(result, points)
    root = description["sweep"]["data_root"]
    session = opened(result.path / SUPERNET, data_root=None if root is None else Path(root))
    start = result.path / START
    _write_start(session, start)
    config = description["base"]
    settings = {
        f"{part}/{name}": value for part in ("model", "data") for name, value in config[part].items() if name != "name"
    }
    sweep = Sweep(
        method=METHOD,
        model=config["model"]["name"],
        data=config["data"]["name"],
        data_root=root,
        epochs=epochs,
        trials=len(chosen),
        seed=description["seed"],
        objectives=description["objectives"],
        mlflow_uri=description["sweep"]["mlflow_uri"],
        settings={**settings, "start/checkpoint": str(start.resolve()), "optimizer/lr": lr},
    )
    seeds = Seeds(first=tuple((SOURCE, _values(row["bits"], session)) for row in chosen))
    tuned = run(sweep, result.path / FOLDER, watcher=watcher, seeds=seeds)
    found = compared(session, chosen, tuned.records())
    write_json(result.path / CORRELATION, found)
    return tuned, found


def _chosen(result: Result, points: int) -> list[dict[str, Any]]:
    """Records of points of the front, evenly along it by BOPs, both ends among them."""
    front = result.front().to_pandas().sort_values(["bops", "size_bytes"], kind="stable")
    places = np.unique(np.linspace(0, len(front) - 1, min(points, len(front))).round().astype(int))
    trials = front["trial"].to_numpy()[places]
    rows = {row["trial"]: row for row in result.records()}
    return [rows[int(trial)] for trial in trials]


def _values(bits: Mapping[str, Sequence[int]], session: "Session") -> dict[str, int]:
    """Widths by address, in the space `all_layers`."""
    values = {}
    for row in session.table.quantizable:
        if row.name not in bits:
            raise SweepError(f"layer {row.name} is float in the supernet: {METHOD} trains it at 2 to 8 bits alone")
        for role, width in zip(("weight", "activation"), bits[row.name], strict=True):
            if not 2 <= width <= 8:
                raise SweepError(f"bits/{row.name}/{role} = {width}: {METHOD} takes 2 to 8 bits")
            if not (row.first and role == "activation"):
                values[f"bits/{row.name}/{role}"] = width
    return values


def _write_start(session: "Session", path: Path) -> None:
    """The weights at the highest widths, and their batch norms, as a float network."""
    from trainables import checkpoint
    from trainables.build import build_model
    from trainables.modules import NormSets
    from trainables.supernet import bits_of

    choices = session.method.choices(session.model)
    widest = {name: [each.weight[0], each.activation[0]] for name, each in choices.items()}
    session.method.mixture(session.model, bits_of(widest)).activate()
    state = session.model.state_dict()
    for name, module in session.model.named_modules():
        if isinstance(module, NormSets):
            state |= {f"{name}.{key}": value for key, value in module.plain_state().items()}
    config = session.config
    plain = build_model(config, session.data.classes, session.data.input_shape, seed=config.seed).state_dict()
    tensors = {f"model/{name}": state[name] for name in plain} | _scales(session)
    checkpoint.write(path, {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, {})


def _scales(session: "Session") -> dict[str, "Tensor"]:
    """What the supernet has learned as scale of every tensor at every width, where that is one number."""
    from trainables.modules import quantized_layers, scale_key
    from trainables.supernet import bits_of

    choices = session.method.choices(session.model)
    found = {}
    for i in range(max(len(widths) for each in choices.values() for widths in (each.weight, each.activation))):
        at = {
            name: [(each.weight[i:] or each.weight)[0], (each.activation[i:] or each.activation)[0]]
            for name, each in choices.items()
        }
        session.method.mixture(session.model, bits_of(at)).activate()
        for name, layer in quantized_layers(session.model):
            for role, quantizer, x in (
                ("weight", layer.weight_quantizer, layer.weight),
                ("input", layer.input_quantizer, None),
            ):
                encoding = None if quantizer is None or quantizer.before() is not None else quantizer.encoding(x)
                if encoding is not None and encoding.scale.dim() == 0 and encoding.offset == 0:
                    found[scale_key(name, role, encoding.bits)] = encoding.scale / encoding.divisor
    return found


def compared(
    session: "Session", chosen: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Accuracy on shared weights and alone, point by point, and their rank correlations.

    Args:
        session: of the supernet.
        chosen: records of the search.
        tuned: records of the trials.

    Returns:
        `points`: bits, and accuracy by column. `correlation`: for each column of shared accuracies, Spearman's rho and
        Kendall's tau with the column `finetuned`; None where ranks say nothing (fewer than three points, all equal).
    """
    from trainables.supernet import CALIBRATION, Supernet

    alone = {_key(row["bits"]): row["accuracy"] for row in tuned if row["status"] == "complete"}
    rows = [row for row in chosen if _key(row["bits"]) in alone]
    columns: dict[str, list[float]] = {"finetuned": [alone[_key(row["bits"])] for row in rows]}
    images = rows[0]["images"] if rows else None
    for name, calibration in (("shared", 0), ("recalibrated", CALIBRATION)):
        if calibration and not session.table.norm_channels:
            continue  # there is nothing to recalibrate
        net = Supernet(session, images=images, calibration=calibration)
        columns[name] = [each.accuracy for each in net.measure([row["bits"] for row in rows])]
    points = [
        {"bits": row["bits"], **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)
    ]
    found = {name: rank_correlation(columns["finetuned"], values) for name, values in columns.items()}
    del found["finetuned"]
    return {"points": points, "correlation": found}


def _key(bits: Mapping[str, Sequence[int]]) -> tuple[Any, ...]:
    return tuple(sorted((name, *pair) for name, pair in bits.items()))


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> dict[str, float | None]:
    """Spearman's rho and Kendall's tau-b.

    >>> rank_correlation([0.1, 0.2, 0.3], [1, 2, 4])
    {'spearman': 1.0, 'kendall': 1.0}
    >>> rank_correlation([0.1, 0.2], [1, 2])
    {'spearman': None, 'kendall': None}
    """
    from scipy.stats import kendalltau, spearmanr

    if len(left) < FEWEST or len(set(left)) == 1 or len(set(right)) == 1:
        return {"spearman": None, "kendall": None}
    rho, tau = float(spearmanr(left, right).statistic), float(kendalltau(left, right).statistic)
    return {"spearman": None if math.isnan(rho) else round(rho, 12), "kendall": None if math.isnan(tau) else tau}


def correlation_text(found: Mapping[str, Any]) -> str:
    """The points and their correlations for a terminal."""
    from analysis.wording import short_bits

    names = [name for name in ("shared", "recalibrated", "finetuned") if found["points"] and name in found["points"][0]]
    lines = ["  ".join(f"{name:>12s}" for name in names) + "  bits"]
    for point in found["points"]:
        lines.append("  ".join(f"{point[name]:>12.2%}" for name in names) + f"  {short_bits(point['bits'])}")
    for name, each in found["correlation"].items():
        rho, tau = (("-" if each[k] is None else f"{each[k]:.3f}") for k in ("spearman", "kendall"))
        lines.append(f"rank correlation, {name} and fine-tuned: Spearman {rho}, Kendall {tau}")
    return "\n".join(lines)
