"""Runs a function in two processes that are the ranks of one training.

The function is named by its module and takes a JSON tree and a folder; what it returns is JSON, too.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def on_two_ranks(function: Callable[[Any, Path], Any], tree: Any, out: Path) -> list[Any]:
    """What `function(tree, out)` returns on each rank."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(out), function.__module__, function.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    for process in ranks:
        assert process.stdin is not None
        process.stdin.write(json.dumps(tree))
        process.stdin.close()
        process.stdin = None
    return [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in ranks]


def main(rank: int, out: Path, module: str, function: str) -> None:
    """One of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    answer = getattr(importlib.import_module(module), function)(json.loads(sys.stdin.read()), out)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
