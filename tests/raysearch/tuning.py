"""Tune's loop without Ray: the real searcher, asked as Tune asks it, over trials that are formulas."""

import json
from collections.abc import Iterator
from itertools import count
from typing import Any

from raysearch.book import Book
from raysearch.cluster.searcher import LedgerSearcher
from raysearch.cluster.worker import Message
from raysearch.search.ledger import Proposal
from tests.raysearch.builders import Trial, by_formula


def rest_of(book: Book, proposal: Proposal, trial: Trial) -> Iterator[Message]:
    """What a worker says that goes on from its checkpoint: the last epoch again, and those that follow."""
    known = len(book.live[proposal.number].history)
    return iter(trial(proposal)[max(0, known - 1) :])


def tune(book: Book, *, places: int = 1, trial: Trial = by_formula) -> list[int]:
    """Run a sweep to its end, the places taking turns; the places of the trials that were paused."""
    vacated: list[int] = []
    slots: dict[int, tuple[str, Iterator[Message]]] = {}

    def slot(proposal: Proposal, place: int) -> dict[str, Any]:
        return {"proposal": proposal, "place": place}

    searcher = LedgerSearcher(book.ledger, book, slot, places, vacated.append)
    names = map(str, count())
    asked: Any = None
    while slots or asked != searcher.FINISHED:
        while len(slots) < places and asked != searcher.FINISHED:
            name = next(names)
            asked = searcher.suggest(name)
            if not isinstance(asked, dict):
                assert asked is not None or slots
                break
            slots[asked["place"]] = name, rest_of(book, asked["proposal"], trial)
        for place, (name, messages) in sorted(slots.items()):
            message = next(messages)
            result = {"message": json.dumps(message), "done": message["done"]}
            if message["done"] or not searcher.goes_on(name, result):
                del slots[place]
                searcher.on_trial_complete(name, result)
    book.let_all_go()
    return vacated
