"""Checkpoints: one safetensors file each, written atomically, readable without running anybody's code.

Tensors are named `model/...`, `optimizer/NUMBER/INDEX/KEY` and `rng/...`; everything else is JSON in the header. The
header also holds the SHA-256 of the file (with zeros in its place), so a file with a flipped bit is refused like a torn
one. While a trial trains, the checkpoint before the newest is kept beside it, and is used when the newest is damaged.
"""

import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trainables.errors import ConfigError
from trainables.storage import patiently

log = logging.getLogger(__name__)

FILE = "checkpoint.safetensors"
PREVIOUS, DAMAGED = ".previous", ".damaged"
"""Endings of the checkpoint before the newest, and of one that was found damaged."""
NO_DIGEST = "0" * 64


def save(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer, **state: Any) -> None:
    """Write a checkpoint to `path` in one atomic step; what was there before is kept until the next call.

    Args:
        path: file to write; its folder is made.
        model: its whole state dict is stored.
        optimizers: their tensors are stored (their hyperparameters belong to the configuration), and the states of the
            random number generators with them.
        state: anything JSON can hold.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{index}/{key}": torch.as_tensor(value) for key, value in values.items()}
    if optimizers:
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
    # Tensors of a tied or channels-last model may share or permute memory, which the format does not hold.
    write(path, {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, state, keep=True)


def _keep(path: Path) -> None:
    """Give a checkpoint its second name, by which it is known once the next one has replaced it."""
    link = path.with_name(f".{path.name}.link.{os.getpid()}")
    try:
        os.link(path, link)
        os.replace(link, previous(path))
    except OSError:  # a file system without links: for a moment there is the previous one only
        os.replace(path, previous(path))


def settle(path: Path) -> None:
    """Drop the checkpoint before the newest: the trial is over."""
    _unlink(previous(path))


def remove(path: Path) -> None:
    """Drop a checkpoint and the one before it."""
    _unlink(path)
    settle(path)


def _unlink(path: Path) -> None:
    if path.exists():
        patiently(lambda: path.unlink(missing_ok=True), path)


def previous(path: Path) -> Path:
    """Where the checkpoint before that of `path` is."""
    return path.with_name(path.name + PREVIOUS)


def size_bytes(path: Path) -> int:
    """Bytes on disk of a checkpoint and the one before it; 0 where there is none."""
    return sum(file.stat().st_size for file in (path, previous(path)) if file.exists())


def recover(path: Path) -> dict[str, Any] | None:
    """The state of the newest good checkpoint, which is at `path` afterwards; None if there is none.

    A damaged one is set aside under another name.
    """
    for file in (path, previous(path)):
        if not file.exists():
            continue
        try:
            _, state = read(file)
        except ConfigError as error:
            log.warning("%s; it is set aside", error)
            os.replace(file, path.with_name(path.name + DAMAGED))
            continue
        if file != path:
            os.replace(file, path)
        return state
    return None


def copy_weights(source: Path, path: Path, **state: Any) -> None:
    """Write the model's tensors of the checkpoint `source` to `path`, atomically, without the rest."""
    tensors, _ = read(source)
    write(path, {name: value for name, value in tensors.items() if name.startswith("model/")}, state)


def write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: bool = False) -> None:
    """Write tensors and a JSON state to `path` in one atomic step; `read` reads them.

    Args:
        path: file to write; its folder is made.
        tensors: contiguous ones on the CPU, by name, none of which shares memory with another.
        state: anything JSON can hold.
        keep: leave the file that is replaced under its second name.
    """
    metadata = {"state": json.dumps(state), "sha256": NO_DIGEST}
    data = bytearray(safetensors.torch.save(tensors, metadata=metadata))
    place = data.index(f'"sha256":"{NO_DIGEST}"'.encode()) + len('"sha256":"')
    data[place : place + len(NO_DIGEST)] = hashlib.sha256(data).hexdigest().encode()
    patiently(lambda: _write(path, data, keep), path)


def _write(path: Path, data: bytearray, keep: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            _keep(path)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file takes space, which may be what lacks
        raise


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the JSON state.

    Raises:
        ConfigError: the file is missing, torn, or not of this format.
    """
    try:
        data = path.read_bytes()  # once: `safe_open` opens the path twice, and the file may be replaced in between
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
        given = metadata.get("sha256")
        if given is not None and given != _digest(data, given.encode(), 8 + length):
            raise ConfigError(f"cannot read checkpoint {path}: it is damaged, its checksum is another")
        state = json.loads(metadata.get("state", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read checkpoint {path}: {error}") from error
    if not isinstance(state, dict):
        raise ConfigError(f"cannot read checkpoint {path}: its state is no JSON object")
    return tensors, state


def _digest(data: bytes, given: bytes, end: int) -> str:
    """SHA-256 of a file with zeros in the place of the digest that its header gives."""
    found = hashlib.sha256(data[:end].replace(given, NO_DIGEST.encode(), 1))
    found.update(memoryview(data)[end:])
    return found.hexdigest()


def restore(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Put model, optimizers and random number generators back as they were saved; the JSON state is returned."""
    tensors, state = read(path)
    model.load_state_dict(_part(tensors, "model/"))
    for number, optimizer in enumerate(optimizers):
        values: dict[int, dict[str, Tensor]] = {}
        for name, value in _part(tensors, f"optimizer/{number}/").items():
            index, key = name.split("/", 1)
            values.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
        _lay_out_like_parameters(optimizer)
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return state


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give momenta the strides of their parameters, which the file lacks; fused steps read in memory order."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def weights_of(path: Path) -> dict[str, Tensor]:
    """Only the model's tensors: of a checkpoint of ours, or a state dict as plain safetensors or NumPy's `.npz`.

    The prefix `module.` that data-parallel training leaves on all names is dropped.

    Raises:
        ConfigError: the file cannot be read.
    """
    tensors = _read_npz(path) if path.suffix == ".npz" else read(path)[0]
    weights = _part(tensors, "model/") or tensors
    return _part(weights, "module.") if all(name.startswith("module.") for name in weights) else weights


def load_weights(path: Path, model: nn.Module) -> None:
    """Load the model's tensors from a file that `weights_of` reads.

    Raises:
        ConfigError: names the first missing, unexpected and misshapen tensors.
    """
    weights = weights_of(path)
    wanted = model.state_dict()
    faults = [f"lacks {name}" for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    faults += [f"has {name}, which the model lacks" for name in sorted(weights) if name not in wanted]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if faults:
        raise ConfigError(f"checkpoint {path} is of another model: {'; '.join(faults[:3])} ({len(faults)} in all)")
    model.load_state_dict(weights, strict=False)


def scales(path: Path) -> dict[str, Tensor]:
    """The trained scales in a file of float weights, by `modules.scale_key`; most files have none."""
    if path.suffix == ".npz":
        return {}
    return {name: value for name, value in read(path)[0].items() if name.startswith("scale/")}


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays by name; those of Python objects, which would have to be unpickled, are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"cannot read checkpoint {path}: {error}") from error


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
