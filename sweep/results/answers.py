"""Samples of a sweep -> one compressed block a task for the page, each document once, with what every model made of it.

A block is JSON, gzip, base64: the browser opens it when its task is looked at. Nothing is left out before the size
demands it, and what is left out then is counted: first the middle of long texts, then documents, the same for all
models and chosen by their hash, which knows nothing of the answers.
"""

import base64
import gzip
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import msgspec

from sweep.errors import StoreError
from sweep.record import Record, Status
from sweep.results.reading import Sample, Sweep

BUDGET_BYTES = 11_000_000
"""Of all blocks, compressed; in base64 a third more. With the rest of the page that stays below 20 MB, which mail and
chat still carry."""

MEMORY_BYTES = 256_000_000
"""Of one task while it is collected, one task at a time; a browser should be able to open the block too."""

ANSWER_BYTES = 300
"""Of an answer besides its text: what Python's objects take."""

LONG_CHARACTERS = 6_000
"""What is left of a longer text where the size demands it: both ends."""

_Key = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class Block:
    """The samples of one task."""

    task: str
    data: str
    """Gzipped JSON in base64; see `_block` for its shape."""
    models: tuple[str, ...]
    documents: int
    """In the block."""
    left_out: int
    """Documents that the size did not allow."""
    shortened: int
    """Texts of which only both ends are there."""


@dataclass(kw_only=True, slots=True)
class _Answer:
    """As JSON, which takes a fifth of the memory that Python's objects do."""

    prompt: int
    responses: bytes
    filtered: bytes = b""
    """`"filter":[answer, ...]`, one after the other."""
    metrics: bytes = b""
    """`"filter":{metric: value, ...}`, one after the other."""


@dataclass(kw_only=True, slots=True)
class _Document:
    """Of the samples only what is shown."""

    subtask: str
    doc_id: int
    target: bytes
    choices: tuple[str, ...]
    doc: bytes
    answers: dict[str, _Answer] = field(default_factory=dict)

    @property
    def size(self) -> int:
        own = len(self.target) + sum(map(len, self.choices)) + len(self.doc)
        return own + ANSWER_BYTES + sum(map(_size, self.answers.values()))


def _size(answer: _Answer) -> int:
    return ANSWER_BYTES + len(answer.responses) + len(answer.filtered) + len(answer.metrics)


class _Task:
    """What is collected of a task, file by file, within MEMORY_BYTES."""

    def __init__(self) -> None:
        self.documents: dict[_Key, _Document] = {}
        self.texts: dict[str, int] = {}
        """Prompts by number."""
        self.models: dict[str, None] = {}
        self.measures: dict[tuple[str, str], None] = {}
        """Filter and metric, of all documents: a group's subtasks may have different ones."""
        self.gone: set[_Key] = set()
        self.size = 0
        self._numbers = count()
        self._first_gone: tuple[str, _Key] | None = None
        """In the order of hashes: no document from here on is kept."""

    def add(self, model: str, samples: Iterable[Sample]) -> None:
        for sample in samples:
            # Subtask and both: within one data set a document may be there twice, and two data sets share positions.
            key = (sample.subtask, sample.doc_hash, sample.doc_id)
            if self._first_gone is not None and (sample.doc_hash, key) >= self._first_gone:
                self.gone.add(key)
                continue
            self.models[model] = None
            document = self.documents.get(key)
            if document is None:
                choices = [str(a["arg_1"]) for a in sample.arguments.values() if isinstance(a.get("arg_1"), str)]
                document = self.documents[key] = _Document(
                    subtask=sample.subtask,
                    doc_id=sample.doc_id,
                    target=_json(sample.target),
                    choices=tuple(choices),
                    doc=_json(sample.doc),
                )
                self.size += document.size
            answer = document.answers.get(model)
            before = 0 if answer is None else _size(answer)
            if answer is None:
                first = next(iter(sample.arguments.values()), {})
                prompt = str(first.get("arg_0", ""))
                if (number := self.texts.get(prompt)) is None:
                    number = self.texts[prompt] = next(self._numbers)
                    self.size += len(prompt)
                responses = [[_short(given) for given in of_request] for of_request in sample.resps]
                answer = document.answers[model] = _Answer(prompt=number, responses=_json(responses))
            name = _json(sample.filter)
            if not document.choices and list(sample.filtered_resps) != [given[0] for given in sample.resps if given]:
                answer.filtered += b"%b%b:%b" % (b"," * bool(answer.filtered), name, _json(sample.filtered_resps))
            metrics = {metric: _short(value) for metric, value in sample.metrics.items()}
            answer.metrics += b"%b%b:%b" % (b"," * bool(answer.metrics), name, _json(metrics))
            self.measures.update(dict.fromkeys((sample.filter, metric) for metric in metrics))
            self.size += _size(answer) - before
            if self.size > MEMORY_BYTES:
                # A tenth more than is needed, so that it does not come again with the next line.
                self.keep(int(0.9 * len(self.documents) * MEMORY_BYTES / self.size))

    def keep(self, most: int) -> None:
        """The `most` documents with the smallest hashes."""
        order = sorted((key[1], key) for key in self.documents)
        for _, key in order[most:]:
            del self.documents[key]
            self.gone.add(key)
        self._first_gone = min(order[most:], default=self._first_gone)
        used = {answer.prompt for document in self.documents.values() for answer in document.answers.values()}
        self.texts = {text: number for text, number in self.texts.items() if number in used}
        self.size = sum(document.size for document in self.documents.values()) + sum(map(len, self.texts))


def blocks(
    sweep: Sweep, *, budget_bytes: int = BUDGET_BYTES, unread: Callable[[str], None] | None = None
) -> tuple[Block, ...]:
    """A block for each task with samples, together within the budget.

    Files that cannot be read are told to `unread`; without it that raises StoreError.
    """
    by_task: dict[str, list[Record]] = {}
    for record in sweep.records:
        if record.status is Status.DONE:
            by_task.setdefault(record.task, []).append(record)
    made: dict[str, tuple[bytes, Block]] = {}
    for name, records in by_task.items():
        task = _collected(sweep, records, unread)
        if task.documents:
            made[name] = _block(name, task, None, records)
    # Tasks are too large to be kept; the few that are over their share are read again.
    for times in (0, 5):
        level = _level([len(data) for data, _ in made.values()], budget_bytes)
        for name in [name for name, (data, _) in made.items() if len(data) > level]:
            task = _collected(sweep, by_task[name], lambda _: None)
            made[name] = _block(name, task, LONG_CHARACTERS, by_task[name])
            for _ in range(times):
                if len(made[name][0]) > level:
                    task.keep(int(0.97 * len(task.documents) * level / len(made[name][0])))
                    made[name] = _block(name, task, LONG_CHARACTERS, by_task[name])
    return tuple(block for _, block in made.values())


def _collected(sweep: Sweep, records: Iterable[Record], unread: Callable[[str], None] | None) -> _Task:
    task = _Task()
    for record in records:
        try:
            task.add(record.model, sweep.samples(record))
        except StoreError as error:
            if unread is None:
                raise
            unread(f"samples of {record.model}/{record.task}: {error}")
    return task


def _level(sizes: Sequence[int], budget: int) -> float:
    """What each may take so that all fit: small ones take what they need, the others share the rest."""
    rest, left = float(budget), len(sizes)
    for size in sorted(sizes):
        if size * left > rest:
            return rest / left
        rest, left = rest - size, left - 1
    return float("inf")


def _block(name: str, task: _Task, longest: int | None, records: Iterable[Record]) -> tuple[bytes, Block]:
    """The task as page.js reads it.

    {models, subtasks, measures: [[filter, metric, whether higher is better or null]], prompts: [text],
     docs: [[subtask, id, prompt, target, choices, document]],
     answers: by document, by model: null or [prompt or -1 for the document's own, responses, filtered, metrics]}
    """
    shortened = 0

    def text(value: str) -> str:
        nonlocal shortened
        if longest is None or len(value) <= longest:
            return value
        shortened += 1
        half = longest // 2
        return f"{value[:half]}\n[… {len(value) - longest:,} characters are left out here …]\n{value[-half:]}"

    def every(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Mapping):
            return {str(key): every(item) for key, item in value.items()}
        return [every(item) for item in value] if isinstance(value, list | tuple) else value

    def shown(content: bytes) -> Any:
        return msgspec.Raw(content) if longest is None else every(msgspec.json.decode(content))

    models = list(task.models)
    subtasks = {name: number for number, name in enumerate(dict.fromkeys(key[0] for key in task.documents))}
    originals = {number: prompt for prompt, number in task.texts.items()}
    prompts: dict[int, int] = {}
    docs, answers = [], []
    for document in task.documents.values():
        own = next(iter(document.answers.values())).prompt
        for given in document.answers.values():
            prompts.setdefault(given.prompt, len(prompts))
        choices = [text(choice) for choice in document.choices]
        where = (subtasks[document.subtask], document.doc_id, prompts[own])
        docs.append([*where, shown(document.target), choices, shown(document.doc)])
        answers.append(
            [
                None
                if (answer := document.answers.get(model)) is None
                else [
                    -1 if answer.prompt == own else prompts[answer.prompt],
                    shown(answer.responses),
                    shown(b"{%b}" % answer.filtered),
                    msgspec.Raw(b"{%b}" % answer.metrics),
                ]
                for model in models
            ]
        )
    directions: dict[tuple[str, str], set[bool]] = {}
    for record in records:
        for score in record.scores:
            if score.higher_is_better is not None:
                directions.setdefault((score.filter, score.metric), set()).add(score.higher_is_better)
    # Where subtasks disagree, lm-eval gives their group no direction either.
    agreed = {measure: next(iter(said)) for measure, said in directions.items() if len(said) == 1}
    content = {
        "models": models,
        "subtasks": list(subtasks),
        "measures": [[*measure, agreed.get(measure)] for measure in task.measures],
        "prompts": [text(originals[number]) for number in prompts],
        "docs": docs,
        "answers": answers,
    }
    # No time in it: the same samples make the same page.
    data = gzip.compress(msgspec.json.encode(content), compresslevel=6, mtime=0)
    return data, Block(
        task=name,
        data=base64.b64encode(data).decode(),
        models=tuple(models),
        documents=len(task.documents),
        left_out=len(task.gone),
        shortened=shortened,
    )


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _short(value: Any) -> Any:
    """A number to five digits, and lm-eval's texts of a log-likelihood and of whether it is greedy as what they say."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, list | tuple):
        pair = len(value) == 2 and value[1] in ("True", "False")
        return [_short(float(value[0])), value[1] == "True"] if pair else [_short(item) for item in value]
    return value
