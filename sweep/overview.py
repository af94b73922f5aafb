"""A plan as text: what would run, where, by which command, and what a prompt looks like."""

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from sweep.config import SweepConfig, Task
from sweep.plan import Cell, Plan, ServerPlan, is_local
from sweep.server import command
from sweep.store import RunDirectory

PORT = 20000
"""Stands for the free port that a server gets when it starts."""


def describe(config: SweepConfig, plan: Plan, directory: RunDirectory) -> str:
    """The plan for a terminal: cells, servers with their exact commands, what is done and what is still unknown."""
    return "\n".join(_lines(config, plan, directory))


def _lines(config: SweepConfig, plan: Plan, directory: RunDirectory) -> Iterator[str]:
    models = len({cell.model.name for cell in plan.cells})
    tasks = list(dict.fromkeys(cell.task_name for cell in plan.cells))
    yield f"sweep {config.name}: {models} models × {len(tasks)} tasks, {len(plan.cells)} cells"
    yield f"run directory {directory.root}: {len(plan.done)} cells done, {len(plan.owed)} owed"
    yield ""
    yield "tasks"
    for name in tasks:
        yield f"  {name}: {_settings(config.tasks[name])}"
    yield ""
    yield "cells (x done, o owed)"
    width = max(len(name) for name in plan.models)
    marks = {cell.key: "x" if cell.key in plan.done else "o" for cell in plan.cells}
    for name in plan.models:
        row = "  ".join(f"{marks.get(f'{name}/{task}', '-')} {task}" for task in tasks)
        yield f"  {name:<{width}}  {row}"
    owed = {cell.model.server for cell in plan.owed}
    yield ""
    yield "servers"
    for server in plan.servers.values():
        yield f"  {server.name}: {_needs(server)}{'' if server.name in owed else ', nothing owed: not started'}"
        if not is_local(server.model.path) and server.revision is None:
            yield f"    the commit of {server.model.path} is not known here; it is asked for when the sweep runs"
        yield f"    {shlex.join(command(server, python='python', host='127.0.0.1', port=PORT))}"


def _needs(server: ServerPlan) -> str:
    replicas = "" if server.replicas == 1 else f", {server.replicas} replicas"
    gpus = f"{server.gpus:g} GPU{'' if server.gpus == 1 else 's'}"
    where = {"gpu": gpus, "cpu": "CPU", "auto": f"{gpus} where there are any, else CPU"}[server.model.device]
    return f"{where}{replicas}, concurrency {server.model.concurrency}"


def _settings(task: Task) -> str:
    shots = "its own shots" if task.num_fewshot is None else f"{task.num_fewshot}-shot"
    limit = "all documents" if task.limit is None else f"limit {task.limit}"
    name = f"lm-eval's {task.task}, "
    extra = f", gen_kwargs {json.dumps(task.gen_kwargs)}" if task.gen_kwargs else ""
    return f"{name}{shots}, {limit}{extra}"


def rendered(cell: Cell) -> str:
    """The cell's first request as its server would get it, with stop strings and length. Raises TaskError."""
    from sweep.evaluation import load_tokenizer, preview

    seen = preview(cell, load_tokenizer(cell.model))
    arguments = dict(seen.arguments)
    stop = arguments.pop("stop", None)
    lines = [
        f"{cell.key}: {seen.kind}, {seen.prompt_tokens} prompt tokens, "
        f"{seen.requests} request{'' if seen.requests == 1 else 's'} for the first document",
        *_block("prompt", seen.prompt),
    ]
    if seen.continuation is not None:
        lines += _block("continuation", seen.continuation)
    if stop is not None:
        lines.append(f"  stop       {_listed(stop)}")
    if arguments:
        lines.append(f"  arguments  {json.dumps(arguments)}")
    return "\n".join(lines)


def _block(name: str, text: str) -> list[str]:
    return [f"  {name}", *(f"  | {line}" for line in text.split("\n"))]


def _listed(values: Sequence[Any]) -> str:
    return " ".join(repr(value) for value in values)
