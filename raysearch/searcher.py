"""The Tune searcher: asks the ledger, and passes what Tune hears on to the book.

Metric and mode are None, so Tune neither checks nor interprets results: the truth of a trial is in its messages.
"""

import json
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from raysearch.book import Book
from raysearch.ledger import Ledger, Proposal


class LedgerSearcher(Searcher):
    """Proposals from the ledger to Tune, endings from Tune to the book.

    Args:
        ledger: who proposes.
        book: who writes down.
        tune_config: from a proposal and its place to the config of a slot.
        places: how many trials run at the same time; each has one of the places 0, 1, ... to itself.
    """

    def __init__(
        self, ledger: Ledger, book: Book, tune_config: Callable[[Proposal, int], dict[str, Any]], places: int
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._ledger, self._book, self._tune_config = ledger, book, tune_config
        self._numbers: dict[str, int] = {}
        self._free = set(range(places))
        self._places: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its parts for a restore that is never asked for: everything is on disk."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LedgerSearcher":
        return self

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing of Tune's own search settings applies."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial's slot config, or FINISHED."""
        proposal = self._ledger.propose()
        if proposal is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = proposal.number
        self._places[trial_id] = min(self._free)
        self._free.remove(self._places[trial_id])
        self._book.begin(proposal)
        return self._tune_config(proposal, self._places[trial_id])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """An epoch."""
        message = _message(result)
        if "report" in message:
            self._book.epoch(self._numbers[trial_id], message)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end: Tune gives the last result, or says that the slot's process could not be kept alive."""
        number = self._numbers.pop(trial_id)
        self._free.add(self._places.pop(trial_id))
        message = _message(result)
        if error:
            self._book.end(number, "failed", "its process died again and again; see the Ray logs")
            return
        if "report" in message:
            self._book.epoch(number, message)
        if "failed" in message:
            self._book.end(number, "failed", message["failed"])
        elif message.get("done"):
            self._book.end(number, "complete")
        else:
            self._book.end(number, "pruned", "stopped early")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is on disk."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is on disk."""


def _message(result: dict[str, Any] | None) -> dict[str, Any]:
    text = (result or {}).get("message")
    return {} if text is None else json.loads(text)
