"""A sweep's state in a few lines, from its run folder; works while another process drives it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.pareto import bounded
from analysis.wording import counted, human_bytes
from raysearch.records import read_trials
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
    running: dict[int, dict[str, Any]] = {}
    for line in read_trials(result.folder.epochs):
        if line["trial"] not in ended:
            running[line["trial"]] = line
    paused = {trial for trial, line in running.items() if not line.get("rung", {}).get("goes_on", True)}
    state = "running" if busy else "finished" if _is_over(result, len(ended)) else "interrupted"
    lines = [
        f"{result.name}: {state}",
        f"  {counts['complete']}/{trials} done, {counts['pruned']} pruned, {counts['failed']} failed"
        + (f", {len(paused)} paused" if paused else ""),
    ]
    epochs = result.description["sweep"]["epochs"]
    lines += [
        f"  trial {trial}: epoch {line['epoch']}/{epochs}{', paused' if trial in paused else ''}"
        for trial, line in sorted(running.items())
    ]
    lines += [f"  trial {row['trial']} {row['status']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    count, size = result.folder.checkpoints()
    if count:
        most = result.description["sweep"].get("max_checkpoint_bytes")
        limit = "" if most is None else f" of {human_bytes(most)} at most"
        lines.append(f"  checkpoints: {count}, {human_bytes(size)}{limit}")
    if state == "finished" and len(ended) < trials:
        budget = result.description["sweep"].get("epoch_budget")
        lines.append(
            f"  the space and its limits leave {len(ended)} configurations; all were tried"
            if budget is None
            else f"  the budget of {budget} epochs is spent"
        )
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
    points = counted(len(front), "point") + where
    known = bounded(front.objectives, front.reference)
    return f"{points}, hypervolume {front.hypervolume():.4f}" if known else points
