"""A running mean of each metric while a cell's answers come in, over some of its documents. For people to watch.

Documents that are done early are those that are quick to answer, so the mean is of the finished ones and no sample of
all: it has no standard error, and nothing but the live view and W&B's history is made of it. It is kept for tasks that
lm-eval's own code scores, which looks at one document at a time, takes a millisecond or two for it and changes nothing
(`evaluation.unwatched` says which). Other tasks score by code that is slow, needs the main thread, draws random numbers
that the score would miss, or runs what the model wrote.

Knows nothing of lm-eval but how it scores a document of the tasks that it is given.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

DOCUMENTS_MOST = 500
"""Of a cell, at random."""

BUDGET_S = 0.01
"""Of processor time of the thread that evaluates, each time that it says how far it is, which is twice a second: 2 %,
and what the last document takes longer."""

DOCUMENT_S = 0.05
"""Of processor time. A cell with a document that takes longer to score has no estimate from then on."""

_SUFFIX = "_of_finished"
_DOCUMENTS = "finished_documents"

Scorer = Callable[[Any, list[Any]], Mapping[str, Any]]
"""A document and the results of its requests, in their order -> its value of each metric."""

Document = tuple[str, int]
"""lm-eval's name of a (sub)task, and the number of a document in it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request of one document."""

    task: str
    document: int
    number: tuple[int, int]
    """By lm-eval's index within the document, and where that is the same by their order."""
    doc: Any
    key: bytes
    """Of its answer; several requests may share one."""
    result: Callable[[Any], Any]
    """The answer as lm-eval is handed it."""


@dataclass(kw_only=True)
class _Document:
    task: str
    doc: Any
    owed: dict[tuple[int, int], Callable[[Any], Any]] = field(default_factory=dict)
    got: dict[tuple[int, int], tuple[Callable[[Any], Any], Any]] = field(default_factory=dict)
    """How an answer is read, and the answer."""


class Estimate:
    """Taking an answer in costs next to nothing; documents are scored by `values`, some at a time."""

    def __init__(self, scorer_by_task: Mapping[str, Scorer], clock: Callable[[], float] = time.thread_time) -> None:
        """Of the tasks that may be scored so."""
        self._scorer_by_task = dict(scorer_by_task)
        self._clock = clock
        self._waiting: dict[bytes, list[tuple[_Document, tuple[int, int]]]] = {}
        self._finished: deque[_Document] = deque()
        """With every answer, not scored yet."""
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def chosen(self, documents: Iterable[Document]) -> Collection[Document]:
        """Those whose requests it wants to `watch`: the same for every model."""
        mine = sorted({document for document in documents if document[0] in self._scorer_by_task})
        return set(random.Random(0).sample(mine, min(DOCUMENTS_MOST, len(mine))))

    def watch(self, requests: Iterable[Request]) -> None:
        """Wait for the answers of these, which are all that their documents have."""
        documents: dict[Document, _Document] = {}
        for request in requests:
            name = (request.task, request.document)
            document = documents.setdefault(name, _Document(task=request.task, doc=request.doc))
            document.owed[request.number] = request.result
            self._waiting.setdefault(request.key, []).append((document, request.number))

    def answered(self, key: bytes, answer: Any) -> None:
        """Take an answer in."""
        for document, number in self._waiting.pop(key, ()):
            document.got[number] = (document.owed.pop(number), answer)
            if not document.owed:
                self._finished.append(document)

    def values(self) -> dict[str, float]:
        """`<metric>_of_finished`, with the filter behind it as in a summary (`<metric>__<filter>_of_finished`), and how
        many documents these means are of; empty before the first."""
        start = now = self._clock()
        while self._finished and now - start < BUDGET_S:
            document, before = self._finished.popleft(), now
            try:
                self._score(document)
            except Exception as error:  # noqa: BLE001 - of a task, and the cell will hear of it when it is scored
                self._end(f"{document.task}: {type(error).__name__}: {error}")
            now = self._clock()
            if now - before > DOCUMENT_S:
                self._end(f"{document.task}: a document took {now - before:.3f} s to score")
        if not self._counts:
            return {}
        means = {f"{metric}{_SUFFIX}": self._sums[metric] / count for metric, count in self._counts.items()}
        return means | {_DOCUMENTS: max(self._counts.values())}

    def _score(self, document: _Document) -> None:
        got = (document.got[number] for number in sorted(document.got))
        results = [result(answer) for result, answer in got]
        for metric, value in self._scorer_by_task[document.task](document.doc, results).items():
            if isinstance(value, (bool, int, float)):
                self._sums[metric] = self._sums.get(metric, 0.0) + value
                self._counts[metric] = self._counts.get(metric, 0) + 1

    def _end(self, why: str) -> None:
        """For the whole cell: a mean over the rest of its subtasks would pass for one over all."""
        log.debug("no live estimate any more: %s", why)
        for kept in (self._scorer_by_task, self._waiting, self._finished, self._sums, self._counts):
            kept.clear()


def in_words(live: Mapping[str, float]) -> str:
    """`exact_match,strict-match 0.613 of 93 done`: the first of what `values` gave; empty where there is nothing."""
    first = next((name for name in live if name.endswith(_SUFFIX)), None)
    if first is None:
        return ""
    metric = first.removesuffix(_SUFFIX).replace("__", ",")
    return f"{metric} {live[first]:.3f} of {live[_DOCUMENTS]:.0f} done"
