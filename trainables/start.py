"""The shared float start: one float network for all trials of a sweep that have the same model, data and seed.

Trials of other architectures share it too, where `start/parent` names it: they inherit its weights as far as they fit.

Whichever trial needs it first trains it, under a file lock; the others wait and load. What is trained depends on the
configuration alone, so it does not matter who does it.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import filelock
import torch
import torch.distributed as dist

from trainables import checkpoint, world
from trainables.build import settled
from trainables.config import Optimizer, Plugin, Training, TrialConfig, digest, merged, parse
from trainables.errors import ConfigError
from trainables.fit import fit
from trainables.storage import patiently

POLL_S = 0.2


def start_config(config: TrialConfig) -> TrialConfig:
    """The configuration of the float network that `config` starts from; how the trial is trained plays no part.

    Raises:
        ConfigError: `start/parent` is no setting of model or data, or a value that they do not take.
    """
    if config.start.parent != "own":
        wrong = [name for name in config.start.parent if not name.startswith(("model/", "data/"))]
        if wrong:
            raise ConfigError(f"start/parent: {', '.join(wrong)}: settings of model and data make a parent")
        config = parse(merged(config.tree(), config.start.parent))
    return replace(
        settled(config),
        method=Plugin(name="float"),
        bits={},
        optimizer=Optimizer(lr=config.start.lr),
        training=Training(epochs=max(1, config.start.epochs), batch_size=config.start.batch_size),
        start=replace(config.start, checkpoint=None, parent="own"),
    )


def float_start(
    config: TrialConfig, folder: Path, *, data_root: Path | None = None, device: str = "cpu"
) -> Path | None:
    """Path of the float weights that a trial starts from; trained now if nobody has. None: from scratch.

    Args:
        config: of the trial.
        folder: where the sweep keeps its float starts.
        data_root: where the data set lies.
        device: where to train.

    Raises:
        ConfigError: `start/checkpoint` does not exist, or `start/parent` is no network.
    """
    if config.method.name == "float":
        return None
    if config.start.checkpoint is not None:
        path = Path(config.start.checkpoint)
        if not path.is_file():
            raise ConfigError(
                f"start/checkpoint = {path}: no such file; give a safetensors or npz file, or leave it out"
            )
        return path
    if config.start.epochs == 0:
        return None
    wanted = start_config(config)
    path = folder / f"{digest(wanted, {})}.safetensors"
    patiently(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
    lock = filelock.FileLock(path.with_suffix(".lock"))
    while not _ready(path):
        if not _acquired(lock):
            time.sleep(POLL_S)
            continue
        try:
            if not _ready(path):
                _train(wanted, path, data_root, device)
        finally:
            lock.release()
    return path


def _train(config: TrialConfig, path: Path, data_root: Path | None, device: str) -> None:
    scratch = path.with_suffix(".training")
    history = [report.to_json() for report in fit(config, data_root=data_root, folder=scratch, device=device)]
    if world.rank() == 0:
        checkpoint.copy_weights(scratch / checkpoint.FILE, path, history=history, config=config.tree())
        shutil.rmtree(scratch, ignore_errors=True)  # of a storage that has just become read-only
    world.barrier()


def _ready(path: Path) -> bool:
    """Whether rank 0 sees the file; all ranks hear the same answer."""
    return _agreed(path.exists())


def _acquired(lock: filelock.BaseFileLock) -> bool:
    """Whether rank 0 got the lock; all ranks hear the same answer."""
    got = False
    if world.rank() == 0:
        try:
            patiently(lambda: lock.acquire(blocking=False), Path(lock.lock_file))
            got = True
        except filelock.Timeout:
            got = False
    return _agreed(got)


def _agreed(value: bool) -> bool:
    if world.size() == 1:
        return value
    answer = torch.tensor(int(value))
    dist.broadcast(answer, src=0)
    return bool(answer)
