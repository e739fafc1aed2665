"""Records and sweeps as a run folder has them, without a sweep."""

import numpy as np

from analysis.swept import Swept

OBJECTIVES = {"accuracy": "max", "bops": "min", "size_bytes": "min"}


def record(trial=0, **changes):
    """A complete record as a sweep writes it, with 1000 multiply-accumulates."""
    made = {
        "schema": 1,
        "sweep": "digits-lenet5-lsq",
        "trial": trial,
        "point": "final",
        "status": "complete",
        "reason": None,
        "accuracy": 0.5,
        "loss": 1.0,
        "bops": 16_000,
        "size_bytes": 2048,
        "macs": 1000,
        "bits": {"conv1": [8, 8], "conv2": [4, 3], "fc": [8, 8]},
        "seed": 0,
        "digest": f"digest of {trial}",
        "source": "tpe",
        "method": "lsq",
        "model": "lenet5",
        "data": "digits",
        "params": {"bits/conv2/weight": 4},
        "checkpoint": f"trials/{trial:05d}",
        "finished_at": f"2026-11-21T{10 + trial // 60:02d}:{trial % 60:02d}:00+00:00",
        **changes,
    }
    bops = made["bops"]
    return {"relative_bops": None if bops is None else bops / (1000 * 1024), **made}


def sweep(name="a-sweep", *, seed=0, trials=20, method="lsq", layers=4, asked=None, tested=0, **changes):
    """A sweep whose accuracy rises with the bits, with some luck."""
    random = np.random.default_rng([seed, len(method)])
    names = [f"conv{number}" if number < layers else "fc" for number in range(1, layers + 1)]
    records = []
    for trial in range(trials):
        bits = {layer: [int(b) for b in random.integers(2, 9, 2)] for layer in names}
        products = float(np.mean([w * a for w, a in bits.values()]))
        records.append(
            record(
                trial,
                accuracy=round(1 - 0.4 * float(np.exp(-0.09 * products)) - 0.03 * float(random.random()), 4),
                bops=int(1000 * products),
                size_bytes=int(1024 * np.mean([w for w, _ in bits.values()])) + trial % 7,
                float_size_bytes=32 * 1024,
                bits=bits,
                method=method,
                seed=seed,
                finished_at=f"2026-11-21T10:{trial // 60:02d}:{trial % 60:02d}+00:00",
                **changes,
            )
        )
    for row in sorted(records, key=lambda row: -row["accuracy"])[:tested]:
        row |= {"test_accuracy": row["accuracy"] - 0.01, "test_images": 359}
    fields = {"method": method, "model": "lenet5", "data": "digits", "seed": seed, "epochs": 2, "trials": trials}
    facts = {name: fields[name] for name in ("method", "model", "data", "seed", "trials")}
    return Swept(
        name=name,
        folder=f"runs/{name}",
        description={
            **facts,
            "name": name,
            "objectives": OBJECTIVES,
            "macs": 1000,
            "sweep": {**fields, **(asked or {})},
        },
        records=records,
        importances={"accuracy": {"bits/conv1/weight": 0.7, "optimizer/lr": 0.3}},
        kept=frozenset(range(trials)),
        command=f"raysearch sweep --from runs/{name}",
    )
