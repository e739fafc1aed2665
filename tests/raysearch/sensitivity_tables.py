"""Tables of sensitivities without a network."""

import numpy as np
import pandas as pd

WIDTHS = (2, 4, 8)


def random_table(seed: int, names: tuple[str, ...] = ("l0", "l1", "l2")) -> pd.DataFrame:
    """A table of random sensitivities, with errors that fall."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"layer": names, **{c: rng.exponential(size=len(names)) for c in ("hessian", "fisher", "fisher_read")}}
    )
    for role in ("weight", "activation"):
        for bits in WIDTHS:
            frame[f"{role}_error_{bits}"] = rng.exponential(size=len(names)) * 4.0**-bits
            frame[f"{role}_rise_{bits}"] = rng.normal(size=len(names))
    frame.attrs = {"model": "m", "data": "d", "widths": list(WIDTHS)}
    return frame
