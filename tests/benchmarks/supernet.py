"""How fast mixtures of a supernet are evaluated, beside a one-epoch training of the same network, on one core.

    python -m tests.benchmarks.supernet --data mnist --data-root DATA [--model lenet5] [--mixtures 256] [--images 2000]

Three ways: every mixture as a whole, with shared prefixes, and a trial of LSQ of one epoch. CPU time of one thread.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch

from trainables.config import parse
from trainables.fit import Session, fit
from trainables.supernet import KEPT_BYTES, Supernet

BAR_RATE, BAR_RATIO = 20.0, 50.0
PLAIN = 12
"""Mixtures evaluated without sharing."""


def rate(session: Session, images: int, mixtures: list[dict[str, list[int]]], kept_bytes: int, batch: int) -> float:
    """Mixtures a second of CPU time, in batches as a search proposes them."""
    net = Supernet(session, images=images, kept_bytes=kept_bytes)
    net.measure(mixtures[:1])  # quantized weights, and what torch sets up on its first call
    net = Supernet(session, images=images, kept_bytes=kept_bytes)
    began = time.process_time()
    for first in range(0, len(mixtures), batch):
        net.measure(mixtures[first : first + batch])
    return len(mixtures) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet5")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--mixtures", type=int, default=256)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    tree: dict[str, Any] = {"model": {"name": given.model}, "data": {"name": given.data}, "training": {"epochs": 1}}
    session = Session(parse({**tree, "method": {"name": "double_rounding"}}), data_root=given.data_root)
    session.calibrate()
    choices = session.method.choices(session.model)
    chance = random.Random(given.seed)
    drawn = [
        {n: [chance.choice(c.weight), chance.choice(c.activation)] for n, c in choices.items()}
        for _ in range(4 * given.mixtures)
    ]
    mixtures = list({str(each): each for each in drawn}.values())[: given.mixtures]
    plain = rate(session, given.images, mixtures[:PLAIN], 0, PLAIN)
    shared = rate(session, given.images, mixtures, KEPT_BYTES, 64)
    began = time.process_time()
    for _ in fit(parse({**tree, "method": {"name": "lsq"}}), data_root=given.data_root):
        pass
    trial_s = time.process_time() - began
    print(f"{given.model}, {given.data}, {given.images} validation images, {len(mixtures)} mixtures, one core")
    print(f"  as a whole           {plain:8.1f} mixtures/s")
    print(f"  shared prefixes      {shared:8.1f} mixtures/s (bar {BAR_RATE:g})")
    print(f"  one-epoch LSQ trial  {trial_s:8.1f} s: {trial_s * shared:.0f} times a mixture (bar {BAR_RATIO:g})")


if __name__ == "__main__":
    main()
