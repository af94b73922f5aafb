"""A run directory as a sweep of any size leaves it, made up but in our exact layout, with text meant to break a page.

Seeded: the same arguments write the same bytes. What models answer depends on their size and on the difficulty of each
document, so that models which answer the same documents are correlated as real ones are.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sweep.record import Counts, Record, Score, Status
from sweep.results.store import RunDirectory
from sweep.results.timeline import Event

BEGAN = 1_790_000_000.0
"""When the sweep began; Unix, seconds."""

FAMILIES = ("alder", "birch", "cedar", "douglas", "elm", "fir")
SIZES = (0.5, 1.5, 3.0, 7.0, 14.0, 32.0, 72.0)

NASTY = (
    '</script><script>document.title="owned"</script>',
    "<img src=x onerror=\"document.title='owned'\">",
    "\"quotes\" 'and' `ticks` & ampersands &amp; <b>tags</b> <!-- <script> -->",
    "Grüße, 你好, שלום, 🦊, \u2028 and \u202e right to left",
    "{{ 7 * 7 }} {% raw %} ]]> ${1} \\u003c \\ \x07 \t tab",
)
"""In prompts and answers of every task."""

CAUSES = (
    "EvaluationError: the data set <gated/set> could not be read: 403\nLook into logs/evaluator.0.log",
    "ServerError: the server died with exit code -9\nlog tail:\n  CUDA out of memory. Tried to allocate 2.00 GiB",
)


@dataclass(frozen=True, kw_only=True)
class SyntheticModel:
    name: str
    path: str
    billions: float
    chat: bool = False
    quantization: str | None = None

    @property
    def skill(self) -> float:
        return math.log(self.billions) / 2 + 0.3 * self.chat - 0.05 * (self.quantization is not None)


@dataclass(frozen=True, kw_only=True)
class SyntheticTask:
    name: str
    kind: str
    """`choice`, `generation`, `perplexity`, or `group`: choices of four subjects."""
    difficulty: float
    subtasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Document:
    subtask: str
    doc_id: int
    head: bytes
    """The part of a line that is the same for all models, without the closing brace."""
    question: str
    answer: str
    choices: tuple[str, ...]
    difficulty: float
    prompt_hash: Mapping[bool, str] = field(default_factory=dict)
    arguments: Mapping[bool, bytes] = field(default_factory=dict)


def models_of(count: int) -> list[SyntheticModel]:
    """Base, chat and 4-bit chat models of growing sizes, family by family."""
    found: list[SyntheticModel] = []
    for family in FAMILIES:
        for size in SIZES:
            label = f"{size:g}".replace(".", "-")
            path = f"Forest/{family.title()}-{size:g}B"
            found += [
                SyntheticModel(name=f"{family}-{label}b", path=path, billions=size),
                SyntheticModel(name=f"{family}-{label}b-chat", path=f"{path}-Instruct", billions=size, chat=True),
                SyntheticModel(
                    name=f"{family}-{label}b-chat-awq",
                    path=f"{path}-Instruct-AWQ",
                    billions=size,
                    chat=True,
                    quantization="awq",
                ),
            ]
    return found[:count]


def tasks_of(count: int, rng: random.Random) -> list[SyntheticTask]:
    kinds = ("choice", "generation", "group", "choice", "perplexity", "generation")
    return [
        SyntheticTask(
            name=f"{kind}_{number:02d}",
            kind=kind,
            difficulty=rng.uniform(-1, 1.5),
            subtasks=tuple(f"{kind}_{number:02d}_{subject}" for subject in ("law", "physics", "art", "logic"))
            if kind == "group"
            else (),
        )
        for number, kind in ((number, kinds[number % len(kinds)]) for number in range(count))
    ]


def write(
    root: Path, *, models: int = 4, tasks: int = 6, samples: int = 400, seed: int = 0, failed: int | None = None
) -> RunDirectory:
    """A sweep with at least `samples` lines of samples in all. `failed` cells have failed; unset is one in 150.

    A sweep of ten cells or fewer is whole: none of them has failed by itself, none is owed.
    """
    rng = random.Random(seed)
    directory = RunDirectory(root)
    for folder in (directory.records, directory.results, directory.logs, directory.servers):
        folder.mkdir(parents=True, exist_ok=True)
    made, asked = models_of(models), tasks_of(tasks, rng)
    cells = [(model, task) for task in asked for model in made]
    broken = math.ceil(len(cells) / 150) * (len(cells) > 10) if failed is None else failed
    lost = dict.fromkeys(rng.sample(range(len(cells)), broken))
    owed = {rng.randrange(len(cells))} - lost.keys() if len(cells) > 10 else set()
    per_cell = math.ceil(samples / (len(cells) - len(lost) - len(owed)))
    documents = {task.name: list(_documents(task, per_cell, rng)) for task in asked}

    fingerprints: dict[str, dict[str, Any]] = {}
    for number, (model, task) in enumerate(cells):
        key = f"{model.name}/{task.name}"
        fingerprint = hashlib.md5(key.encode()).hexdigest()
        fingerprints[key] = {"fingerprint": fingerprint, "done": False}
        if number in owed:
            continue
        if number in lost:
            cause = CAUSES[number % len(CAUSES)]
            record = Record(
                model=model.name, task=task.name, fingerprint=fingerprint, status=Status.FAILED, error=cause
            )
        else:
            record = _cell(directory, model, task, documents[task.name], fingerprint, rng)
        directory.record(model.name, task.name).write_bytes(msgspec.json.encode(record))

    plan = {
        "models": {
            model.name: {
                "path": model.path,
                "revision": None,
                "commit": hashlib.sha1(model.path.encode()).hexdigest(),
                "fingerprint": hashlib.md5(model.path.encode()).hexdigest(),
                "server": model.name,
            }
            for model in made
        },
        "servers": {
            model.name: {"gpus": 1.0, "replicas": 1, "command": ["python", "-m", "vllm", "--model", model.path]}
            for model in made
        },
        "cells": fingerprints,
        "commits": {},
    }
    directory.plan.write_bytes(msgspec.json.format(msgspec.json.encode(plan), indent=1))
    config = {
        "name": root.name,
        "models": {
            model.name: {
                "path": model.path,
                "chat": model.chat,
                "dtype": "auto",
                "quantization": model.quantization,
                "tensor_parallel": 1,
                "entry": model.name,
                "server": {"enable_prefix_caching": True},
            }
            for model in made
        },
        "tasks": {task.name: {"task": task.name, "num_fewshot": 2, "limit": None} for task in asked},
        "runs_dir": str(root.parent),
        "seeds": {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234},
    }
    directory.config.write_text(yaml.safe_dump(config, sort_keys=False))
    events = _events(made, asked, rng)
    directory.timeline.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
    return directory


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_vocabulary(), k=count))


@cache
def _vocabulary() -> list[str]:
    rng = random.Random(1)
    return ["".join(rng.choices("aeioulnrstdmkp", k=rng.randint(2, 9))) for _ in range(3000)]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(task: SyntheticTask, count: int, rng: random.Random) -> Iterator[_Document]:
    shots = "\n\n".join(f"Question: {_words(rng, 20)}?\nAnswer: {_words(rng, 3)}" for _ in range(2))
    for number in range(count):
        subtask = task.subtasks[number % len(task.subtasks)] if task.subtasks else task.name
        doc_id = number // max(1, len(task.subtasks))
        question = f"{_words(rng, 18)}?"
        if number % 17 == 3:
            question += f" {NASTY[number // 17 % len(NASTY)]}"
        if number == 11:  # long enough to break a layout
            question += f" {_words(rng, 4000 if task.name.endswith('_00') else 200)}"
        if number == 12:
            question += " " + "x" * 700
        choices = tuple(f" {_words(rng, 2)}" for _ in range(4)) if task.kind in ("choice", "group") else ()
        answer = str(rng.randrange(4)) if choices else str(rng.randint(10, 9999))
        doc = {"question": question, "answer": answer, **({"choices": choices} if choices else {})}
        prompts = {
            False: f"{shots}\n\nQuestion: {question}\nAnswer:",
            True: f"<|im_start|>user\n{shots}\n\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n",
        }
        if task.kind == "perplexity":
            prompts = dict.fromkeys((False, True), "")
        if choices:
            requests: dict[bool, dict[str, Any]] = {
                chat: {f"gen_args_{i}": {"arg_0": prompt, "arg_1": choice} for i, choice in enumerate(choices)}
                for chat, prompt in prompts.items()
            }
        elif task.kind == "generation":
            settings = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 256}
            requests = {c: {"gen_args_0": {"arg_0": prompt, "arg_1": settings}} for c, prompt in prompts.items()}
        else:
            requests = {chat: {"gen_args_0": {"arg_0": question}} for chat in (False, True)}
        head = {
            "doc_id": doc_id,
            "doc": doc,
            "target": answer if choices else question if not prompts[True] else answer,
        }
        yield _Document(
            subtask=subtask,
            doc_id=doc_id,
            head=msgspec.json.encode(head | {"doc_hash": _sha(question), "target_hash": _sha(answer)})[:-1],
            question=question,
            answer=answer,
            choices=choices,
            difficulty=rng.gauss(task.difficulty, 1),
            prompt_hash={chat: _sha(prompt) for chat, prompt in prompts.items()},
            arguments={chat: msgspec.json.encode(request) for chat, request in requests.items()},
        )


def _cell(
    directory: RunDirectory,
    model: SyntheticModel,
    task: SyntheticTask,
    documents: list[_Document],
    fingerprint: str,
    rng: random.Random,
) -> Record:
    folder = directory.cell_results(model.name, task.name)
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[bytes]] = {name: [] for name in (task.subtasks or (task.name,))}
    values: dict[tuple[str, str, str], list[float]] = {}
    empty = 0
    for document in documents:
        right = rng.random() < 1 / (1 + math.exp(2 * (document.difficulty - model.skill)))
        empty += task.kind == "generation" and rng.random() < 0.01
        for name, row in _rows(task, model, document, right, rng):
            for metric in row["metrics"]:
                figure = row[metric]
                values.setdefault((document.subtask, name, metric), []).append(
                    figure if isinstance(figure, float) else -figure[0] / figure[1]
                )
            rest = msgspec.json.encode({"prompt_hash": document.prompt_hash[model.chat], **row})[1:]
            request = document.arguments[model.chat]
            lines[document.subtask].append(document.head + b',"arguments":' + request + b"," + rest + b"\n")
    stamp = "2026-09-21T14-13-20.000000"
    files = [folder / f"results_{stamp}.json"]
    for name, of_subtask in lines.items():
        files.append(folder / f"samples_{name}_{stamp}.jsonl")
        files[-1].write_bytes(b"".join(of_subtask))
    scores = list(_scores(task, values))
    results = {
        "results": {score.task: {f"{score.metric},{score.filter}": score.value} for score in scores},
        "config": {"model": "lmsweep", "model_args": {"model": model.path}},
        "model_name": model.name,
    }
    files[0].write_bytes(msgspec.json.encode(results))
    requests = len(documents) * (4 if task.kind in ("choice", "group") else 1)
    reused = requests // 3 if rng.random() < 0.2 else 0
    stopped = rng.randrange(3, 9) if task.kind == "generation" and rng.random() < 0.1 else 0
    seconds = 5 + model.billions * rng.uniform(0.5, 1.5)
    return Record(
        model=model.name,
        task=task.name,
        fingerprint=fingerprint,
        status=Status.DONE,
        scores=tuple(scores),
        counts=Counts(
            requests=requests,
            asked=requests - reused,
            reused=reused,
            truncated=2 if rng.random() < 0.01 else 0,
            empty=empty,
            length_stopped=stopped,
            prompt_tokens=180 * (requests - reused),
            generated_tokens=60 * (requests - reused) if task.kind == "generation" else 0,
        ),
        warnings=("the chat template <adds> a date",) if model.chat and rng.random() < 0.02 else (),
        started_at="2026-09-21T14:13:20+00:00",
        wall_s=round(seconds + 2, 3),
        request_s=round(seconds, 3),
        files=tuple(str(path.relative_to(directory.root)) for path in files),
        settings={
            "path": model.path,
            "dtype": "auto",
            "quantization": model.quantization,
            "chat": model.chat,
            "chat_template_sha": _sha(model.path)[:12] if model.chat else None,
            "task": {"task": task.name, "num_fewshot": 2, "limit": None, "gen_kwargs": {}},
            "seeds": {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234},
            "methods": {"generate": requests} if task.kind == "generation" else {"next_token": requests},
            "first_prompt": NASTY[0],
        },
        versions={"vllm": "0.32.0", "lm_eval": "0.4.13", "transformers": "5.19.0", "lmsweep": "0.1.0"},
    )


def _rows(
    task: SyntheticTask, model: SyntheticModel, document: _Document, right: bool, rng: random.Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(filter, what of a line belongs to the model)."""
    if task.kind == "perplexity":
        size = len(document.question)
        likelihood = -size * (2.5 - model.skill / 4 + document.difficulty / 20)
        row = {"resps": [[str(likelihood)]], "filtered_resps": [str(likelihood)]}
        yield "none", row | {"filter": "none", "metrics": ["bits_per_byte"], "bits_per_byte": [likelihood, size]}
    elif task.kind == "generation":
        said = f" {_words(rng, 25)} so the answer is {document.answer if right else rng.randint(10, 9999)}."
        if rng.random() < 0.02:
            said += rng.choice(NASTY)
        for name, correct in (("strict", right and rng.random() < 0.9), ("flexible", right)):
            row = {"resps": [[said]], "filtered_resps": [document.answer if correct else said[-12:]], "filter": name}
            yield name, row | {"metrics": ["exact_match"], "exact_match": float(correct)}
    else:
        target = int(document.answer)
        chosen = target if right else (target + rng.randint(1, 3)) % 4
        pairs = [[f"{-rng.uniform(1, 4) - 6 * (i != chosen):.6f}", str(i == chosen)] for i in range(4)]
        normed = float(right) if rng.random() < 0.95 else float(not right)
        row = {"resps": [[pair] for pair in pairs], "filtered_resps": pairs, "filter": "none"}
        yield "none", row | {"metrics": ["acc", "acc_norm"], "acc": float(right), "acc_norm": normed}


def _scores(task: SyntheticTask, values: Mapping[tuple[str, str, str], list[float]]) -> Iterator[Score]:
    def score(name: str, by: str, metric: str, figures: list[float], depth: int) -> Score:
        mean = sum(figures) / len(figures)
        perplexity = metric == "bits_per_byte"
        spread = sum((figure - mean) ** 2 for figure in figures) / max(1, len(figures) - 1)
        return Score(
            task=name,
            version="1.0",
            filter=by,
            num_fewshot=0 if perplexity else 2,
            metric=metric,
            value=mean,
            stderr=None if perplexity else math.sqrt(spread / len(figures)),
            higher_is_better=not perplexity,
            samples=None if task.subtasks and not depth else len(figures),
            depth=depth,
        )

    if task.subtasks:
        whole: dict[tuple[str, str], list[float]] = {}
        for (_, by, metric), figures in values.items():
            whole.setdefault((by, metric), []).extend(figures)
        for (by, metric), figures in whole.items():
            yield score(task.name, by, metric, figures, 0)
    for (name, by, metric), figures in values.items():
        yield score(name, by, metric, figures, int(bool(task.subtasks)))


def _events(models: list[SyntheticModel], tasks: list[SyntheticTask], rng: random.Random) -> list[Event]:
    """Models in turn on 8 GPUs of two nodes, their cells two at a time."""
    events = [Event(time=BEGAN, what="launch", name="head", state="began")]
    free = [BEGAN + 2.0] * 8
    for model in models:
        gpu = min(range(8), key=lambda index: free[index])
        node, life = f"node-{gpu // 4}", f"{model.name}-0"
        start = free[gpu]
        ready = start + 20 + 2 * model.billions

        def server(time: float, state: str, *, name: str = life, entry: str = model.name, on: str = node) -> None:
            events.append(
                Event(time=time, what="server", name=name, state=state, server=entry, on=on, gpus=1.0, reason="")
            )

        server(start, "starting")
        server(ready, "ready")
        lanes = [ready, ready]
        for task in tasks:
            lane = lanes.index(min(lanes))
            begins, ends = lanes[lane], lanes[lane] + 5 + model.billions * rng.uniform(0.5, 1.5)
            for time, state in ((begins, "running"), (ends, "done")):
                events.append(Event(time=time, what="cell", name=f"{model.name}/{task.name}", state=state, on="eval-0"))
            lanes[lane] = ends
        server(max(lanes), "stopping")
        server(max(lanes) + 3, "gone")
        free[gpu] = max(lanes) + 3
    events.append(Event(time=max(free), what="launch", name="head", state="ended"))
    return sorted(events, key=lambda event: event.time)
