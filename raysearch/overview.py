"""A sweep's state in a few lines, from its run folder; works while another process drives it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.pareto import bounded
from raysearch.records import read_lines
from raysearch.result import Result

if TYPE_CHECKING:
    from analysis.front import Front


def overview(path: Path, *, busy: bool) -> str:
    """Counts, trials in training, the front and its hypervolume.

    Args:
        path: the run folder.
        busy: whether a driver is at work on it.
    """
    result = Result(path)
    rows = result.records()
    ended = {row["trial"]: row["status"] for row in rows}
    counts = Counter(ended.values())
    trials = result.description["trials"]
    running: dict[int, int] = {}
    for line in read_lines(result.folder.epochs):
        if line["trial"] not in ended:
            running[line["trial"]] = line["epoch"]
    state = "running" if busy else "finished" if _is_over(result, len(ended)) else "interrupted"
    lines = [
        f"{result.name}: {state}",
        f"  {counts['complete']}/{trials} done, {counts['pruned']} pruned, {counts['failed']} failed",
    ]
    epochs = result.description["sweep"]["epochs"]
    lines += [f"  trial {trial}: epoch {epoch}/{epochs}" for trial, epoch in sorted(running.items())]
    lines += [f"  trial {row['trial']} {row['status']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    count, size = result.folder.checkpoints()
    if count:
        from analysis.front import human_bytes

        most = result.description["sweep"].get("max_checkpoint_bytes")
        limit = "" if most is None else f" of {human_bytes(most)} at most"
        lines.append(f"  checkpoints: {count}, {human_bytes(size)}{limit}")
    if state == "finished" and len(ended) < trials:
        lines.append(f"  the space and its limits leave {len(ended)} configurations; all were tried")
    if counts["complete"]:
        front = result.front()
        lines += [f"  front: {size_of(front)}", "", front.table()]
    if state == "interrupted":
        lines += ["", f"go on with: raysearch resume {path}"]
    return "\n".join(lines)


def _is_over(result: Result, ended: int) -> bool:
    """Whether all trials have ended, or there were no more to try."""
    return ended >= result.description["trials"] or result.folder.end.exists()


def size_of(front: "Front", where: str = "") -> str:
    """`5 points, hypervolume 0.7123`; only the points where an objective has neither a worst value nor a reference."""
    points = f"{len(front)} point{'s' * (len(front) != 1)}{where}"
    known = bounded(front.objectives, front.reference)
    return f"{points}, hypervolume {front.hypervolume():.4f}" if known else points
