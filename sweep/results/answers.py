"""Samples of a sweep -> one compressed block a task for the page, each document once, with what every model made of it.

A block is JSON, gzip, base64: the browser opens it when its task is looked at. Nothing is left out before the size
demands it, and what is left out then is counted: first the middle of long texts, then documents, the same for all
models and chosen by their hash, which knows nothing of the answers.
"""

import base64
import gzip
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sweep.record import Record, Status
from sweep.results.reading import Sample, Sweep

BUDGET_BYTES = 11_000_000
"""Of all blocks, compressed; in base64 a third more. With the rest of the page that stays below 20 MB, which mail and
chat still carry."""

MEMORY_CHARACTERS = 96_000_000
"""Of one task while it is collected; a browser should be able to open the block too."""

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


@dataclass(kw_only=True)
class _Answer:
    prompt: int
    responses: Any
    filtered: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Document:
    sample: Sample
    choices: list[str]
    answers: dict[str, _Answer] = field(default_factory=dict)
    characters: int = 0


class _Task:
    """What is collected of a task, file by file."""

    def __init__(self) -> None:
        self.documents: dict[_Key, _Document] = {}
        self.texts: dict[str, int] = {}
        """Prompts by number; a document's prompts are kept while the task is."""
        self.models: dict[str, None] = {}
        self.gone: set[_Key] = set()

    def add(self, model: str, samples: Iterable[Sample]) -> None:
        for sample in samples:
            # Subtask and both: within one data set a document may be there twice, and two data sets share positions.
            key = (sample.subtask, sample.doc_hash, sample.doc_id)
            if key in self.gone:
                continue
            self.models[model] = None
            first = next(iter(sample.arguments.values()), {})
            prompt = str(first.get("arg_0", ""))
            document = self.documents.get(key)
            if document is None:
                choices = [str(a["arg_1"]) for a in sample.arguments.values() if isinstance(a.get("arg_1"), str)]
                document = self.documents[key] = _Document(sample=sample, choices=choices)
                document.characters += len(prompt) + sum(map(len, choices)) + len(str(sample.target))
            answer = document.answers.get(model)
            if answer is None:
                number = self.texts.setdefault(prompt, len(self.texts))
                responses = [[_short(given) for given in of_request] for of_request in sample.resps]
                answer = document.answers[model] = _Answer(prompt=number, responses=responses)
                document.characters += sum(len(str(given)) for given in responses)
            if not document.choices and list(sample.filtered_resps) != [given[0] for given in sample.resps if given]:
                answer.filtered[sample.filter] = list(sample.filtered_resps)
            answer.metrics[sample.filter] = {name: _short(value) for name, value in sample.metrics.items()}
        size = sum(document.characters for document in self.documents.values())
        if size > MEMORY_CHARACTERS:
            self.keep(int(len(self.documents) * MEMORY_CHARACTERS / size))

    def keep(self, count: int) -> None:
        """The `count` documents with the smallest hashes."""
        order = sorted(self.documents, key=lambda key: (key[1], key))
        for key in order[count:]:
            del self.documents[key]
            self.gone.add(key)


def blocks(sweep: Sweep, *, budget_bytes: int = BUDGET_BYTES) -> tuple[Block, ...]:
    """A block for each task with samples, together within the budget. Raises StoreError."""
    tasks: dict[str, _Task] = {}
    packed: dict[str, tuple[bytes, int]] = {}
    by_task: dict[str, list[Record]] = {}
    for record in sweep.records:
        if record.status is Status.DONE:
            by_task.setdefault(record.task, []).append(record)
    for name, records in by_task.items():
        task = _Task()
        for record in records:
            task.add(record.model, sweep.samples(record))
        if task.documents:
            tasks[name] = task
            packed[name] = _block(task, None)
    longest = None
    for _ in range(6):
        level = _level([len(data) for data, _ in packed.values()], budget_bytes)
        over = [name for name, (data, _) in packed.items() if len(data) > level]
        if not over:
            break
        if longest is None:
            longest = LONG_CHARACTERS
        else:
            for name in over:
                tasks[name].keep(int(0.97 * len(tasks[name].documents) * level / len(packed[name][0])))
        packed |= {name: _block(tasks[name], longest) for name in over}
    return tuple(
        Block(
            task=name,
            data=base64.b64encode(data).decode(),
            models=tuple(tasks[name].models),
            documents=len(tasks[name].documents),
            left_out=len(tasks[name].gone),
            shortened=shortened,
        )
        for name, (data, shortened) in packed.items()
    )


def _level(sizes: Sequence[int], budget: int) -> float:
    """What each may take so that all fit: small ones take what they need, the others share the rest."""
    rest, left = float(budget), len(sizes)
    for size in sorted(sizes):
        if size * left > rest:
            return rest / left
        rest, left = rest - size, left - 1
    return float("inf")


def _block(task: _Task, longest: int | None) -> tuple[bytes, int]:
    """The task as page.js reads it, and how many texts were shortened.

    {models, subtasks, prompts: [text], docs: [[subtask, id, prompt, target, choices, document]],
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
        if longest is None:
            return value
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Mapping):
            return {str(key): every(item) for key, item in value.items()}
        return [every(item) for item in value] if isinstance(value, list | tuple) else value

    models = list(task.models)
    subtasks = {name: number for number, name in enumerate(dict.fromkeys(key[0] for key in task.documents))}
    originals = list(task.texts)
    prompts: dict[int, int] = {}
    docs, answers = [], []
    for document in task.documents.values():
        sample = document.sample
        own = next(iter(document.answers.values())).prompt
        for given in document.answers.values():
            prompts.setdefault(given.prompt, len(prompts))
        docs.append(
            [
                subtasks[sample.subtask],
                sample.doc_id,
                prompts[own],
                every(sample.target),
                every(document.choices),
                every(sample.doc),
            ]
        )
        answers.append(
            [
                None
                if (answer := document.answers.get(model)) is None
                else [
                    -1 if answer.prompt == own else prompts[answer.prompt],
                    every(answer.responses),
                    every(answer.filtered),
                    answer.metrics,
                ]
                for model in models
            ]
        )
    content = {
        "models": models,
        "subtasks": list(subtasks),
        "prompts": [text(originals[number]) for number in prompts],
        "docs": docs,
        "answers": answers,
    }
    # No time in it: the same samples make the same page.
    return gzip.compress(msgspec.json.encode(content), compresslevel=6, mtime=0), shortened


def _short(value: Any) -> Any:
    """A number to five digits, and lm-eval's texts of a log-likelihood and of whether it is greedy as what they say."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, list | tuple):
        pair = len(value) == 2 and value[1] in ("True", "False")
        return [_short(float(value[0])), value[1] == "True"] if pair else [_short(item) for item in value]
    return value
