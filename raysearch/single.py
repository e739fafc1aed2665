"""One trial without Ray: the same configuration, the same numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from raysearch.resolve import trial_config
from raysearch.sweep import Sweep

if TYPE_CHECKING:
    from trainables.fit import Report


def train(sweep: Sweep, out: str | Path | None = None, *, threads: int | None = None) -> Iterator["Report"]:
    """Train the base configuration of `sweep` in this process and yield a report after each epoch.

    Args:
        sweep: method, model, data, epochs, seed and settings are used; the space and the search are not.
        out: folder for the checkpoint and the float start; a call with the same folder goes on from there. None keeps
            nothing, not even the float start.
        threads: CPU threads; None leaves torch's setting.
    """
    import tempfile

    import torch

    from trainables.fit import fit
    from trainables.start import float_start

    config = trial_config(sweep)
    if threads is not None:
        torch.set_num_threads(threads)
    root = None if sweep.data_root is None else Path(sweep.data_root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        folder = None if out is None else Path(out)
        start = float_start(config, (folder or Path(scratch)) / "starts", data_root=root, device=device)
        yield from fit(config, data_root=root, start=start, folder=folder, device=device)
