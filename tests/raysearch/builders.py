"""What the tests of the platform share: a small sweep, and a trainable whose accuracy is a formula of the bits.

The formula rises with every width, so the front of a whole space is known before anything runs. Its messages are those
of `raysearch.cluster.worker`: nothing that listens can tell it from a training.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from raysearch.book import Book
from raysearch.cluster.worker import Job, Message, make_job, messages
from raysearch.driver import describe
from raysearch.records import RunFolder
from raysearch.resolve import resolve
from raysearch.search.ledger import Ledger, Proposal
from raysearch.sweep import Resolved, Sweep
from trainables.fit import PointReport, Report

FACTS = {"sweep": "a-run", "versions": {"torch": "2"}, "git": {"commit": "c0ffee", "dirty": False}}
BEGAN_AT = 1_795_256_103.0
SMALL = {"data/train_limit": 128, "data/validation_limit": 64, "start/epochs": 0, "optimizer/lr": 0.05}
"""Settings under which an epoch takes some hundredths of a second."""

law = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Of a test that draws its examples: the first one may import, and a folder may serve all of them."""

Ending = tuple[str, str | None]
Trial = Callable[[Proposal], list[Message]]


def small_sweep(**changes: Any) -> Sweep:
    """Uniform bits, 49 configurations, on a network that is never trained unless a test says so."""
    fields: dict[str, Any] = {"space": "uniform", "trials": 12, "epochs": 2}
    return Sweep(**fields | changes)


def make_run(path: Path, sweep: Sweep | None = None) -> tuple[RunFolder, Resolved]:
    """The folder of a sweep that has not begun."""
    resolved = resolve(sweep or small_sweep())
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    describe(folder, resolved, path.name)
    return folder, resolved


def formula(bits: Mapping[str, list[int]]) -> float:
    """Accuracy, 0..1: each layer loses a part that a further bit of weights or activations quarters."""
    return 1 - sum(4.0**-w + 4.0**-a for w, a in bits.values()) / len(bits)


def point(proposal: Proposal, accuracy: float, /, **changes: Any) -> PointReport:
    """What an operating point of the proposal reports."""
    cost = proposal.cost
    fields: dict[str, Any] = {
        "label": "final",
        "accuracy": accuracy,
        "loss": 1 - accuracy,
        "bops": cost.bops,
        "relative_bops": cost.relative_bops,
        "size_bytes": cost.size_bytes,
        "bits": cost.bits,
    }
    return PointReport(**fields | changes)


def message(points: list[PointReport], epoch: int, epochs: int) -> Message:
    """What a worker says after an epoch, as it arrives through JSON."""
    report = Report(
        epoch=epoch, epochs=epochs, train_loss=1 / epoch, seconds=0.5, first_step_at=BEGAN_AT + 1, points=points
    )
    return {
        "report": report.to_json(),
        "done": epoch == epochs,
        "began_at": BEGAN_AT,
        "reported_at": BEGAN_AT + epoch,
        "slot": 1,
    }


def by_formula(proposal: Proposal) -> list[Message]:
    """All messages of a trial; its accuracy rises with the epochs to that of the formula."""
    epochs = proposal.tree["training"]["epochs"]
    return [
        message([point(proposal, formula(proposal.cost.bits) * epoch / epochs)], epoch, epochs)
        for epoch in range(1, epochs + 1)
    ]


def train(book: Book, proposal: Proposal, said: list[Message], ending: Ending = ("complete", None)) -> None:
    """One trial, from its beginning to its end, as the searcher tells the book."""
    book.begin(proposal)
    for each in said:
        book.epoch(proposal.number, each)
    book.end(proposal.number, *ending)


def proposals(ledger: Ledger) -> Iterator[Proposal]:
    """What the ledger proposes until there is none left; whoever iterates tells it the ends."""
    return iter(ledger.propose, None)  # type: ignore[arg-type]


def open_book(folder: RunFolder, resolved: Resolved, listener: Callable[[Book], None] = lambda book: None) -> Book:
    """Ledger and book of a run folder, as a driver opens them."""
    return Book(folder, Ledger(folder, resolved), FACTS, listener)


def drive(book: Book, *, limit: int | None = None, trial: Trial = by_formula) -> None:
    """Run the sweep, one trial after the other, or `limit` trials of it."""
    for done, proposal in enumerate(proposals(book.ledger), start=1):
        train(book, proposal, trial(proposal))
        if done == limit:
            return


def finished_run(path: Path, sweep: Sweep | None = None) -> RunFolder:
    """The folder of a sweep that ran to its end by the formula."""
    folder, resolved = make_run(path, sweep)
    book = open_book(folder, resolved)
    drive(book)
    book.close()
    return folder


def job(folder: RunFolder, number: int, tree: Mapping[str, Any]) -> Job:
    """A job for this process."""
    return make_job(number, dict(tree), folder.trial(number), folder.starts, None, "cpu")


def by_training(folder: RunFolder) -> Trial:
    """Really train the proposals, in this process."""
    return lambda proposal: list(messages(job(folder, proposal.number, proposal.tree)))
