"""The Tune searcher: asks the ledger, and passes what Tune hears on to the book.

A trial whose slot died is proposed again, at the same place, where its worker group may still be at work on it. Tune's
own retries would forget trials whose slot died while it changed from one trial to the next.

Metric and mode are None, so Tune neither checks nor interprets results: the truth of a trial is in its messages.
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysearch.book import Book
from raysearch.search.ledger import Ledger, Proposal

PROCESS_RETRIES = 2
"""How often a trial goes on after its slot has died."""


class LedgerSearcher(Searcher):
    """Proposals from the ledger to Tune, endings from Tune to the book.

    Args:
        ledger: who proposes.
        book: who writes down.
        tune_config: from a proposal and its place to the config of a slot.
        places: how many trials run at the same time; each has one of the places 0, 1, ... to itself.
        vacate: called with the place of a trial that is paused, whose workers wait for a word.
    """

    def __init__(
        self,
        ledger: Ledger,
        book: Book,
        tune_config: Callable[[Proposal, int], dict[str, Any]],
        places: int,
        vacate: Callable[[int], None],
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._vacate = vacate
        self._ledger, self._book, self._tune_config = ledger, book, tune_config
        self._numbers: dict[str, int] = {}
        self._free = set(range(places))
        self._places: dict[str, int] = {}
        self._deaths: Counter[int] = Counter()
        self._kept: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its parts for a restore that is never asked for: everything is on disk."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LedgerSearcher":
        return self

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing of Tune's own search settings applies."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial's slot config; None while it depends on trials in training whether there is one; FINISHED."""
        proposal = self._next()
        if proposal is None:
            return None if self._numbers else Searcher.FINISHED
        place = self._kept.pop(proposal.number, None)
        if place is None:
            place = min(self._free)
            self._free.remove(place)
            self._book.begin(proposal)
        self._numbers[trial_id], self._places[trial_id] = proposal.number, place
        return self._tune_config(proposal, place)

    def _next(self) -> Proposal | None:
        """What was interrupted, then a paused trial that is good enough by now, then a new one."""
        if not self._ledger.interrupted:
            promoted = self._book.promotion()
            if promoted or self._book.room() < self._book.sweep.epochs:
                return promoted
        return self._ledger.propose()

    def goes_on(self, trial_id: str, result: dict[str, Any]) -> bool:
        """An epoch; the answer says whether the trial goes on."""
        message = _message(result)
        return "report" not in message or self._book.epoch(self._numbers[trial_id], message)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: `goes_on` has heard it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The end: Tune gives the last result, or says that the slot's process could not be kept alive."""
        number, place = self._numbers.pop(trial_id), self._places.pop(trial_id)
        if error and self._deaths[number] < PROCESS_RETRIES:
            self._deaths[number] += 1
            self._kept[number] = place
            self._ledger.interrupted.insert(0, self._book.live[number].proposal)
            return
        self._free.add(place)
        if error:
            self._book.end(number, "failed", "its process died again and again; see the Ray logs")
            return
        message = _message(result)
        if "report" in message:
            self._book.epoch(number, message)
        if "failed" in message:
            self._book.end(number, "failed", message["failed"])
        elif message.get("done"):
            self._book.end(number, "complete")
        else:
            self._vacate(place)
            self._book.pause(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is on disk."""
        with open(checkpoint_path, "w", encoding="utf-8") as file:
            file.write("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is on disk."""


class RungScheduler(FIFOScheduler):
    """Tune's trials in their order; each result is heard by the book, which says whether its trial goes on.

    Args:
        searcher: who knows the trials by Tune's names.
    """

    def __init__(self, searcher: LedgerSearcher) -> None:
        super().__init__()
        self._searcher = searcher

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Let Tune forget those that ended before, also in sets that it only ever adds to (see `Forget`)."""
        for name in ("_stopped_trials", "_failed_trials", "_trials_to_cache"):
            getattr(tune_controller, name, set()).clear()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE or STOP, which ends the slot's step and not its process."""
        goes_on = self._searcher.goes_on(trial.trial_id, result)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP


class Forget(TrialProgressCallback):
    """Lets Tune forget trials that have ended.

    Tune keeps every trial, and looks at all of them several times a step: a sweep would get slower and larger with each
    trial. One that has ended stays, because Tune looks for a state on disk when it has none. This also takes the place
    of the callback that Tune adds where none of its kind is given: that one prints, and keeps every trial, too.
    """

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        """Nothing is printed."""

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Nothing is printed."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Nothing is printed."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """`trials` is Tune's own list."""
        ended = [trial for trial in trials if trial.is_finished()]
        if len(ended) > 1:
            trials[:] = [trial for trial in trials if not trial.is_finished()] + ended[-1:]


def _message(result: dict[str, Any] | None) -> dict[str, Any]:
    text = (result or {}).get("message")
    return {} if text is None else json.loads(text)
