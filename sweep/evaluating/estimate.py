"""A running mean of each metric while a cell's answers come in, over some of its documents. For people to watch.

Documents that are done early are those that are quick to answer, so the mean is of the finished ones and no sample of
all: it has no standard error, and nothing but the live view and W&B's history is made of it. It is kept for multiple
choice scored by lm-eval's own code, which computes a document in a fraction of a millisecond and changes nothing.
Other tasks score by code that is slow, needs the main thread, or runs what the model wrote.

Knows nothing of lm-eval but `process_results` of the tasks that it is given.
"""

import hashlib
import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

DOCUMENTS_MOST = 500
"""Of a cell, chosen by hash: a tenth of a second of the evaluator in all."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One continuation of one document."""

    task: str
    document: int
    number: int
    """Among the document's own."""
    doc: Any
    key: bytes
    """Of the request; several choices may share one."""


@dataclass(kw_only=True)
class _Document:
    task: str
    doc: Any
    owed: dict[int, bytes] = field(default_factory=dict)
    got: dict[int, tuple[float, bool]] = field(default_factory=dict)


class Estimate:
    def __init__(self, score_by_task: Mapping[str, Callable[[Any, list[Any]], Mapping[str, Any]]]) -> None:
        """`process_results` of the tasks that may be scored so."""
        self._score_by_task = score_by_task
        self._waiting: dict[bytes, list[tuple[_Document, int]]] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def watch(self, choices: Sequence[Choice]) -> None:
        """Wait for the answers of some of these documents."""
        mine = [choice for choice in choices if choice.task in self._score_by_task]
        chosen = set(heapq.nsmallest(DOCUMENTS_MOST, {(c.task, c.document) for c in mine}, key=_order))
        documents: dict[tuple[str, int], _Document] = {}
        for choice in mine:
            name = (choice.task, choice.document)
            document = documents.setdefault(name, _Document(task=choice.task, doc=choice.doc))
            if name in chosen and choice.number not in document.owed:
                document.owed[choice.number] = choice.key
                self._waiting.setdefault(choice.key, []).append((document, choice.number))

    def answered(self, key: bytes, logprob: float, is_greedy: bool) -> None:
        """Take an answer in; a document without one missing is scored."""
        for document, number in self._waiting.pop(key, ()):
            del document.owed[number]
            document.got[number] = (logprob, is_greedy)
            if not document.owed:
                self._score(document)

    def _score(self, document: _Document) -> None:
        results = [document.got[number] for number in sorted(document.got)]
        try:
            values = self._score_by_task[document.task](document.doc, results)
        except Exception as error:  # noqa: BLE001 - a task's own code, and the cell will hear of it when it scores
            log.info("no live estimate of %s: %s: %s", document.task, type(error).__name__, error)
            self._waiting.clear()
            return
        for metric, value in values.items():
            if isinstance(value, (bool, int, float)):
                self._sums[metric] = self._sums.get(metric, 0.0) + value
                self._counts[metric] = self._counts.get(metric, 0) + 1

    def values(self) -> dict[str, float]:
        """`<metric>_of_finished` and how many documents those are; empty before the first."""
        if not self._counts:
            return {}
        means = {f"{metric}_of_finished": self._sums[metric] / count for metric, count in self._counts.items()}
        return means | {"finished_documents": max(self._counts.values())}


def _order(name: tuple[str, int]) -> bytes:
    """The same documents for every model."""
    return hashlib.sha256(f"{name[0]}\0{name[1]}".encode()).digest()
