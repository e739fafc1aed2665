"""What runs where the training runs: a job in, messages out. Knows nothing of Ray; `slots` and `group` carry it.

A job is one trial: its number, its configuration's tree, and where things lie. Its messages are JSON trees: one for
each epoch (`report`), the last of them `done`, or `failed` with the reason. Whatever a trial does wrong is a message,
never the end of the worker; nothing of a trial is left when the next one begins.
"""

import atexit
import gc
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainables.storage import patiently

atexit.register(gc.unfreeze)  # extension modules count what is left when Python ends

Job = dict[str, Any]
Message = dict[str, Any]
ERROR = "error.txt"
"""Traceback of a failed trial, in its folder."""


def make_job(
    number: int,
    tree: dict[str, Any],
    folder: Path,
    starts: Path,
    data_root: str | None,
    device: str,
    measures: Mapping[str, Any] | None = None,
    rungs: Sequence[int] = (),
) -> Job:
    """The job of one trial, as it travels to a worker.

    Args:
        measures: where a person's own come from, by name.
        rungs: epochs after which it waits for a word whether to go on.
    """
    return {
        "number": number,
        "tree": tree,
        "folder": str(folder),
        "starts": str(starts),
        "data_root": data_root,
        "device": device,
        "measures": dict(measures or {}),
        "rungs": list(rungs),
    }


def prepare_process(threads: int) -> None:
    """Import what every trial needs, once, and keep it out of later garbage collections."""
    import torch

    import trainables.fit
    import trainables.start  # noqa: F401

    torch.set_num_threads(threads)
    gc.collect()
    gc.freeze()


def messages(job: Job) -> Iterator[Message]:
    """Train one trial; yields a message for each epoch, the last one with `done` or `failed`."""
    from trainables.build import load_data
    from trainables.config import parse
    from trainables.fit import fit
    from trainables.measures import load_all
    from trainables.start import float_start

    began_at = time.time()
    root = None if job["data_root"] is None else Path(job["data_root"])
    folder = Path(job["folder"])
    if (folder / ERROR).exists():  # of an attempt whose worker died
        patiently(lambda: (folder / ERROR).unlink(missing_ok=True), folder / ERROR)
    try:
        config = parse(job["tree"])
        load_data(config, root)  # while another slot may still train the float start
        start = float_start(config, Path(job["starts"]), data_root=root, device=job["device"])
        options = {"data_root": root, "device": job["device"], "measures": load_all(job["measures"])}
        for report in fit(config, start=start, folder=folder, **options):
            yield {
                "report": report.to_json(),
                "done": report.epoch == report.epochs,
                "rung": report.epoch in job["rungs"],
                "began_at": began_at,
                "reported_at": time.time(),
            }
    except Exception as error:  # a trial may fail in any way; it is recorded, and the sweep goes on
        text = traceback.format_exc()
        patiently(lambda: _write(folder / ERROR, text), folder / ERROR)
        yield {"failed": f"{type(error).__name__}: {error}", "done": True, "began_at": began_at}
    finally:
        gc.collect()
        gc.freeze()  # what is left belongs to the process; the next collection need not look at it


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
