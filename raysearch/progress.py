"""What a person sees while a sweep runs: a live view on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.wording import counted, human_bytes
from raysearch.asked_space import words
from raysearch.driver import Watcher
from raysearch.overview import size_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from raysearch.book import Book
    from raysearch.records import RunFolder
    from raysearch.sweep import Resolved

REFRESH_S = 0.5
BEST_SHOWN = 6
SEARCH_LINE_S = 5.0


def seconds_left(book: "Book", elapsed_s: float) -> float | None:
    """Estimated rest of the sweep, from the pace since the first trial ended; None before that.

    The first trial is no measure when others follow: it waits for Ray and may train the float start.
    """
    ended = sum(book.counts.values()) - book.ended_before
    if ended <= 0 or book.first_end_s is None:
        return None
    left = book.sweep.trials - sum(book.counts.values()) - len(book.paused)
    return left * (elapsed_s / ended if ended == 1 else (elapsed_s - book.first_end_s) / (ended - 1))


def clock(seconds: float | None) -> str:
    """`1:02:03`, or a dash when unknown.

    >>> clock(3723), clock(65), clock(None)
    ('1:02:03', '1:05', '-')
    """
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainProgress(Watcher):
    """One line for each trial that ends.

    Args:
        console: where to write.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console
        self._ended = 0

    def say(self, text: str) -> None:
        """One line, without wrapping or markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, folder: "RunFolder", resolved: "Resolved") -> None:
        """Name the run folder, and who proposes and who stops trials, where that was left open."""
        sweep = resolved.sweep
        what = f"{sweep.method} on {sweep.model}, {sweep.data}, {counted(sweep.epochs, 'epoch')}"
        if not resolved.space:  # one configuration: nobody proposes, and nobody is compared
            self.say(f"{folder.path}: one training of {what}")
            return
        space = f"space {words(sweep.space)} ({len(resolved.space)} parameters)"
        self.say(f"{folder.path}: {counted(sweep.trials, 'trial')} of {what}, {space}")
        if sweep.sampler == "auto":
            from raysearch.search.choice import choose

            choice = choose(resolved)
            self.say(f"sampler {choice.sampler}: {choice.reason}")
        if sweep.stopper == "auto":
            from raysearch.search.stopping import choose_stopper

            chosen = choose_stopper(resolved)
            self.say(f"stopper {chosen.stopper}: {chosen.reason}")

    def event(self, book: "Book") -> None:
        """A line when a trial has ended."""
        ended = sum(book.counts.values()) - book.ended_before
        if ended == self._ended:
            return
        self._ended = ended
        row = book.rows[-1]
        left = clock(seconds_left(book, time.monotonic() - book.opened_at))
        front = f" | front: {size_of(book.front())}" if book.has_points() else ""
        self.say(f"trial {row['trial']} {outcome(row)} | {counts(book)}{front} | {left} left")


class SearchProgress:
    """A line now and then while mixtures of a supernet are evaluated.

    Args:
        console: where to write.
    """

    def __init__(self, console: "Console") -> None:
        self.console = console
        self.path: Path | None = None
        self._began = self._said = time.monotonic()
        self._known = 0

    def started(self, path: Path, text: str, known: int) -> None:
        """Name the run folder."""
        self.path, self._known = path, known
        self._began = self._said = time.monotonic()
        self.console.print(f"{path}: {text}", markup=False, highlight=False, soft_wrap=True)

    def evaluated(self, rows: Sequence[Mapping[str, Any]], evaluations: int) -> None:
        """A line every few seconds, and at the end."""
        now = time.monotonic()
        if now - self._said < SEARCH_LINE_S and len(rows) < evaluations:
            return
        self._said = now
        pace = max(len(rows) - self._known, 1e-9) / max(now - self._began, 1e-9)
        left = clock((evaluations - len(rows)) / pace)
        best = max((row["accuracy"] for row in rows if row["accuracy"] is not None), default=math.nan)
        self.console.print(
            f"{len(rows)}/{evaluations} evaluated, {pace:.1f}/s | best accuracy {best:.2%} | {left} left",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def outcome(row: dict[str, Any]) -> str:
    """What became of a trial, in a few words."""
    if row["status"] != "complete":
        return f"{row['status']}: {row['reason']}"
    cost = f"{row['relative_bops']:.2%} BOPs, {human_bytes(row['size_bytes'])}"
    return f"complete: accuracy {row['accuracy']:.2%}, {cost} ({row['source']})"


def counts(book: "Book") -> str:
    """`5/24 done, 2 running, 0 pruned, 1 failed`; with early stopping `3 paused`, too."""
    done = book.counts
    paused = f"{len(book.paused)} paused, " if book.stopper else ""
    return (
        f"{done['complete']}/{book.sweep.trials} done, {len(book.live)} running, {paused}"
        f"{done['pruned']} pruned, {done['failed']} failed"
    )


def _state(epoch: dict[str, Any] | None) -> str:
    """What a trial has reached with its last epoch."""
    if epoch is None:
        return "starting"
    return "accuracy -" if epoch["accuracy"] is None else f"accuracy {epoch['accuracy']:.2%}"


class LiveProgress(Watcher):
    """A view that is redrawn in place: counts, trials in training, the best points, hypervolume, time left.

    Args:
        console: a terminal.
    """

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self.console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._drawn = 0.0
        self._title = ""

    def started(self, folder: "RunFolder", resolved: "Resolved") -> None:
        """Start drawing."""
        sweep = resolved.sweep
        self._title = f"{sweep.method} on {sweep.model}, {sweep.data} | {folder.path}"
        self._live.start()

    def event(self, book: "Book") -> None:
        """Redraw, at most every half second or when a trial ended."""
        now = time.monotonic()
        if now - self._drawn >= REFRESH_S or not book.live:
            self._drawn = now
            self._live.update(self._view(book, now - book.opened_at))

    def closed(self) -> None:
        """Stop drawing; the view goes away and leaves the screen to the result."""
        self._live.stop()

    def _view(self, book: "Book", elapsed_s: float) -> "RenderableType":
        from rich.console import Group
        from rich.padding import Padding
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        ended = sum(book.counts.values())
        lines: list[RenderableType] = [
            Text(self._title, style="bold"),
            Padding(ProgressBar(total=book.sweep.trials, completed=ended, width=60), 0),  # ends its line
            Text(f"{counts(book)} | {clock(elapsed_s)} gone, {clock(seconds_left(book, elapsed_s))} left"),
        ]
        for number, live in sorted(book.live.items()):
            last = live.history[-1] if live.history else None
            epoch = last["epoch"] if last else 0
            lines.append(
                Text(f"  trial {number}: epoch {epoch}/{book.sweep.epochs}, {_state(last)} ({live.proposal.source})")
            )
        if book.has_points():
            front = book.front()
            table = Table(title=f"front: {size_of(front)}", title_justify="left")
            for column in ("trial", "accuracy", "relative BOPs", "size", "bits"):
                table.add_column(column, justify="left" if column == "bits" else "right")
            for _, row in front.to_pandas().head(BEST_SHOWN).iterrows():
                table.add_row(
                    str(row["trial"]),
                    f"{row['accuracy']:.2%}",
                    f"{row['relative_bops']:.2%}",
                    human_bytes(row["size_bytes"]),
                    row["bits"],
                )
            lines.append(table)
        return Group(*lines)
