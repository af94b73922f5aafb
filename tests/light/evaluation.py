"""A double of sweep/evaluating/evaluation.py: a cell is so many generations whose answers are its score, without
lm-eval. Like the real one it asks for stored answers first, and for a server only where some are missing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sweep.evaluating.client import Client, Pool
from sweep.planning.config import Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan
from sweep.record import Counts, Record, Score, Status
from sweep.results.store import Response, response_key

MARK = 7
"""The first token of every prompt, which preflight's do not begin with."""

NEW_TOKENS = 80
"""Of every request: many, so that what slows a stand-in down by the token hardly slows preflight down, which asks for
one at a time."""


@dataclass(frozen=True)
class Generation:
    """One call of a cell."""

    prompt: tuple[int, ...]
    tokens: int = 3 + NEW_TOKENS
    group: str | None = None
    prefix: tuple[int, ...] | None = None
    path: str = "/v1/completions"

    def body(self, *more: Any) -> dict[str, Any]:
        assert not more  # of no group
        return {"prompt": list(self.prompt), "max_tokens": NEW_TOKENS, "temperature": 0}


def key_of(fingerprint: str, prompt: tuple[int, ...]) -> bytes:
    return response_key(fingerprint, "generate", list(prompt))


def load_tokenizer(plan: ModelPlan) -> None:
    pass


def probe_token_ids(tokenizer: None) -> tuple[tuple[int, ...], ...]:
    return ()


def check_task(task: Task, seeds: Seeds, model: Model) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    record: Record
    files: Mapping[str, bytes]


def evaluate(cell: Cell, *, tokenizer: None, pool: Pool, channel: Any) -> Evaluated:
    """The task's name is `<letters>-<number>`, its limit the number of requests."""
    number, limit = int(cell.task_name.rpartition("-")[2]), int(cell.task.limit or 0)
    channel.facts()
    calls = [Generation((MARK, number, index)) for index in range(limit)]
    key_by_call = {call: key_of(cell.model.fingerprint, call.prompt) for call in calls}
    texts = {key: msgspec.json.decode(text) for key, text in channel.known([*key_by_call.values()]).items()}
    reused = len(texts)
    owed = [call for call, key in key_by_call.items() if key not in texts]

    def answered(call: Generation, reply: Mapping[str, Any]) -> None:
        texts[key_by_call[call]] = reply["choices"][0]["text"]
        answer = msgspec.json.encode(texts[key_by_call[call]])
        channel.answered(Response(key=key_by_call[call], cell=cell.key, method="generate", answer=answer))
        channel.progress(done=len(texts), total=limit, reused=reused)

    if owed:
        channel.owed(len(owed))
        Client(model=cell.model.name, pool=pool).run(owed, answered)
    samples = [texts[key] for key in key_by_call.values()]
    score = Score(
        task=cell.task_name,
        version="1",
        filter="none",
        num_fewshot=0,
        metric="letters",
        value=sum(map(len, samples)) / limit,
        stderr=None,
        higher_is_better=True,
        samples=limit,
    )
    record = Record(
        model=cell.model.name,
        task=cell.task_name,
        fingerprint=cell.fingerprint,
        status=Status.DONE,
        scores=(score,),
        counts=Counts(requests=limit, asked=len(owed), reused=reused),
    )
    return Evaluated(record=record, files={"samples.json": msgspec.json.encode(samples)})
