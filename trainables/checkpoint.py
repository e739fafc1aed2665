"""Checkpoints: one safetensors file each, written atomically, readable without running anybody's code.

Tensors are named `model/...`, `optimizer/NUMBER/INDEX/KEY` and `rng/...`; everything else is JSON in the header.
"""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from trainables.errors import ConfigError

FILE = "checkpoint.safetensors"


def save(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer, **state: Any) -> None:
    """Write a checkpoint over `path` in one atomic step.

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
    _write(path, {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, state)


def copy_weights(source: Path, path: Path, **state: Any) -> None:
    """Write the model's tensors of the checkpoint `source` to `path`, atomically, without the rest."""
    tensors, _ = read(source)
    _write(path, {name: value for name, value in tensors.items() if name.startswith("model/")}, state)


def _write(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    os.replace(temporary, path)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and the JSON state.

    Raises:
        ConfigError: the file is missing, torn, or not of this format.
    """
    try:
        data = path.read_bytes()  # once: `safe_open` opens the path twice, and the file may be replaced in between
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return tensors, json.loads(header.get("__metadata__", {}).get("state", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read checkpoint {path}: {error}") from error


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


def load_weights(path: Path, model: nn.Module) -> None:
    """Load only the model's tensors: a checkpoint of ours, or a state dict as plain safetensors or NumPy's `.npz`.

    The prefix `module.` that data-parallel training leaves on all names is dropped.

    Raises:
        ConfigError: names the first missing, unexpected and misshapen tensors.
    """
    tensors = _read_npz(path) if path.suffix == ".npz" else read(path)[0]
    weights = _part(tensors, "model/") or tensors
    if all(name.startswith("module.") for name in weights):
        weights = _part(weights, "module.")
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


def _read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays by name; those of Python objects, which would have to be unpickled, are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.as_tensor(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"cannot read checkpoint {path}: {error}") from error


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
