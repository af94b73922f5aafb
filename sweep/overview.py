"""A plan as text and as JSON: what would run, where, by which command, and what a prompt looks like."""

import json
import logging
import os
import shlex
import string
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from sweep.fetch import missing_block
from sweep.masking import MASK, masked, secret_variables
from sweep.planning.config import Device, SweepConfig, Task
from sweep.planning.loading import secrets_of
from sweep.planning.plan import Cell, Plan, ServerPlan, is_local, served_name
from sweep.planning.tasks import catalog
from sweep.record import Record
from sweep.results.report import counted, lasting
from sweep.results.store import RunDirectory
from sweep.running.costs import Costs
from sweep.running.inventory import Node, shortages, total_gpus
from sweep.running.simulate import Outcome, forecast
from sweep.serving.engine import command, extras, first_part, notices, variables

PORT = 20000
"""Stands for the free port that a server gets when it starts."""


def describe(config: SweepConfig, plan: Plan, directory: RunDirectory, *, only: str | None = None) -> str:
    """The plan for a terminal: cells, servers with their exact commands, what is done and what is still unknown.

    `only` is what the plan was narrowed to. Raises ConfigError for a server option that is not set there.
    """
    return "\n".join(_lines(config, plan, directory, only))


def document(plan: Plan) -> dict[str, Any]:
    """The plan for plan.json, with the servers of done and owed cells.

    Raises ConfigError for an option of such a server that is not set there.
    """
    used = {cell.model.server for cell in plan.cells if cell.key not in plan.refused}
    return {
        "models": {
            name: {
                **({"url": model.model.url} if model.model.url else {"path": model.model.path}),
                "revision": model.model.revision,
                "commit": model.revision,
                "fingerprint": model.fingerprint,
                "server": model.server,
            }
            for name, model in plan.models.items()
        },
        "servers": {
            name: {"gpus": server.gpus, "replicas": server.replicas}
            | ({"url": server.model.url} if server.external else {"command": _command(server)})
            for name, server in plan.servers.items()
            if name in used
        },
        "cells": {cell.key: {"fingerprint": cell.fingerprint, "done": cell.key in plan.done} for cell in plan.cells},
        "commits": plan.commits,
    }


def replaced(plan: Plan) -> Iterator[str]:
    """A line about finished cells that are to be finished again under other settings."""
    if plan.superseded:
        have = "cell has" if len(plan.superseded) == 1 else "cells have"
        yield (
            f"{len(plan.superseded)} {have} numbers of other settings, which these will replace; answers stay, and "
            "`name=...` gives these a run directory of their own"
        )


def _lines(config: SweepConfig, plan: Plan, directory: RunDirectory, only: str | None) -> Iterator[str]:
    models = len({cell.model.name for cell in plan.cells})
    tasks = list(dict.fromkeys(cell.task_name for cell in plan.cells))
    size = f"{counted(models, 'model')} × {counted(len(tasks), 'task')}, {counted(len(plan.cells), 'cell')}"
    yield f"sweep {config.name}: {size}"
    if only is None:
        yield f"run directory {directory.root}: {counted(len(plan.done), 'cell')} done, {len(plan.owed)} owed"
    else:
        yield f"only={only}: of the sweep's cells these, which run again from the answers in {directory.root}"
    yield from replaced(plan)
    yield ""
    yield "tasks"
    for name in tasks:
        yield f"  {name}: {_settings(config.tasks[name])}"
        yield from _gated(config.tasks[name])
    yield ""
    yield "cells (x done, o owed, ! cannot run)" if plan.refused else "cells (x done, o owed)"
    width = max(len(name) for name in plan.models)
    marks = dict.fromkeys((cell.key for cell in plan.cells), "o")
    marks |= dict.fromkeys(plan.done, "x") | dict.fromkeys(plan.refused, "!")
    for name in plan.models:
        row = "  ".join(f"{marks.get(f'{name}/{task}', '-')} {task}" for task in tasks)
        yield f"  {name:<{width}}  {row}"
    for cell in plan.cells:
        if cell.task != config.tasks[cell.task_name]:
            yield f"  {cell.key}: {_settings(cell.task)}"
    for problem in dict.fromkeys(record.error for record in plan.refused.values()):
        yield f"  ! {problem}"
    owed = {cell.model.server for cell in plan.owed}
    hidden = secrets_of(config)
    yield ""
    yield "servers"
    for server in plan.servers.values():
        if only is not None and server.name not in owed:
            continue
        yield f"  {server.name}: {_needs(server)}{'' if server.name in owed else ', nothing owed: not started'}"
        if server.external:
            yield f"    {served_name(server)} at {server.model.url}, which someone else runs: not started, not stopped"
            continue
        if not is_local(server.model.path) and server.revision is None:
            yield f"    the commit of {server.model.path} is not known here; it is asked for when the sweep runs"
        yield f"    {_variables(server)}{shlex.join(masked(argument, hidden) for argument in _command(server))}"
        if server.model.nodes > 1:
            yield "    on its first node; on each of the others the same as --headless, with a --node-rank of its own"
        yield from (f"    {notice}" for notice in notices(server))
    if absent := missing_block(plan):
        yield ""
        yield from absent


def _command(server: ServerPlan) -> list[str]:
    """As it will be started where its device decides so; `auto` is shown as for a GPU."""
    python = server.model.server_python or "python"
    added = extras(server, on_cpu=server.model.device is Device.CPU)
    part = first_part(server, port=PORT + 1)
    return command(server, python=python, host="127.0.0.1", port=PORT, extras=added, part=part)


def _variables(server: ServerPlan) -> str:
    """The model's `env` as a shell takes it before a command."""
    given = variables(server)
    secret = secret_variables(given)
    shown = {name: MASK if name in secret else shlex.quote(value) for name, value in given.items()}
    return "".join(f"{name}={value} " for name, value in shown.items())


def _needs(server: ServerPlan) -> str:
    most = f", at most {server.replicas} at a time" if isinstance(server.replicas, int) else ""
    gpus = f"{server.gpus:g} GPU{'' if server.gpus == 1 else 's'}"
    if server.external:
        return f"no GPU of ours, concurrency {server.model.concurrency}"
    where = {"gpu": gpus, "cpu": "CPU", "auto": f"{gpus} where there are any, else CPU"}[server.model.device]
    if server.model.nodes > 1:
        where = f"{gpus} on each of {server.model.nodes} nodes"
    return f"{where}{most}, concurrency {server.model.concurrency}"


def _settings(task: Task) -> str:
    shots = "its own shots" if task.num_fewshot is None else f"{task.num_fewshot}-shot"
    limit = "all documents" if task.limit is None else f"limit {task.limit}"
    name = f"lm-eval's {task.task}, "
    extra = f", gen_kwargs {json.dumps(task.gen_kwargs)}" if task.gen_kwargs else ""
    return f"{name}{shots}, {limit}{extra}"


def _gated(task: Task) -> Iterator[str]:
    known = catalog((task.include_path,) if task.include_path else ())
    datasets = sorted({leaf.dataset for leaf in known.leaves(task.task) if leaf.gated})
    if datasets:
        token = "is set" if os.environ.get("HF_TOKEN") else "is not set"
        yield f"    gated, needs accepted terms and HF_TOKEN (which {token}): {', '.join(datasets)}"


def expected(plan: Plan, nodes: Sequence[Node], records: Iterable[Record], *, where: str) -> str:
    """When the owed cells would be done, on how many GPUs for how long, and which model sits where when."""
    gpus, count = total_gpus(nodes), f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
    there = f"{where} ({gpus:g} GPU{'' if gpus == 1 else 's'} on {count})"
    if not plan.owed:
        return f"expected on {there}: nothing is owed"
    costs = Costs(records)
    short = shortages(plan.owed_servers, nodes)
    outcome = forecast(plan, nodes, costs)
    lines = [f"expected on {there}"]
    lines += [f"  cannot start there: {reason}" for reason in short]
    if outcome.spans:
        source = "from what earlier cells took, priors for the rest" if costs.measured else "from priors"
        unmeasured = "" if costs.measured else ", nothing measured yet"
        lines += [
            f"  {lasting(outcome.makespan_s)} in all, first result after {lasting(outcome.first_result_s)}, "
            f"{outcome.gpu_s / 3600:.2f} GPU-hours; an estimate {source}{unmeasured}",
            *_timeline(outcome, plan),
        ]
    return "\n".join(lines)


COLUMNS = 60
"""Of the timeline."""

ROWS = 40

MARKS = string.ascii_uppercase + string.ascii_lowercase + string.digits


def _timeline(outcome: Outcome, plan: Plan) -> Iterator[str]:
    """A row for each GPU: which model's server held it when; GPUs with the same row stand together."""
    started = {span.server for span in outcome.spans}
    names = [name for name in plan.owed_servers if name in started]
    marks = {name: MARKS[number % len(MARKS)] for number, name in enumerate(names)}
    rows: dict[tuple[str, int], list[str]] = {}
    scale = COLUMNS / outcome.makespan_s
    for span in outcome.spans:
        for node, numbers in span.places:
            for number in numbers:
                row = rows.setdefault((node, number), [" "] * COLUMNS)
                first, last = (min(COLUMNS - 1, int(time_s * scale)) for time_s in (span.start_s, span.end_s))
                ready = COLUMNS if span.ready_s is None else int(span.ready_s * scale)
                row[first : last + 1] = ["." if at < ready else marks[span.server] for at in range(first, last + 1)]
    together: dict[str, list[tuple[str, int]]] = {}
    for place, row in sorted(rows.items()):
        together.setdefault("".join(row), []).append(place)
    named = {row: _listed_gpus(places) for row, places in together.items()}
    width = max(map(len, named.values()), default=0)
    if named:
        yield f"  {'':<{width}}  0:00{clock(outcome.makespan_s):>{COLUMNS - 4}} h:mm (. a server starts)"
    for line, places_shown in list(named.items())[:ROWS]:
        yield f"  {places_shown:<{width}}  {line}".rstrip()
    if len(named) > ROWS:
        yield f"  and {len(named) - ROWS} more rows like these"
    for name, mark in marks.items():
        mine = [span for span in outcome.spans if span.server == name]
        held_s = sum((span.end_s - span.start_s) * sum(len(gpus) for _, gpus in span.places) for span in mine)
        start, end = clock(min(span.start_s for span in mine)), clock(max(span.end_s for span in mine))
        lives = f"{len(mine)} server{'' if len(mine) == 1 else 's'}"
        yield f"  {mark} {name}: {start} to {end}, {lives}, {held_s / 3600:.2f} GPU-hours"


def _listed_gpus(places: Sequence[tuple[str, int]]) -> str:
    """`h100 0-3 7`."""
    by_node: dict[str, list[int]] = {}
    for node, number in places:
        by_node.setdefault(node, []).append(number)
    shown = []
    for node, numbers in by_node.items():
        runs = [
            [number for _, number in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
        ]
        shown.append(" ".join([node, *(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)]))
    return ", ".join(shown) if len(shown) <= 2 else f"{shown[0]} and {len(shown) - 1} nodes more"


def clock(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def rendered(cell: Cell) -> str:
    """The cell's first request as its server would get it, with stop strings and length. Raises TaskError."""
    _quiet()
    from sweep.evaluating.evaluation import load_tokenizer, preview

    seen = preview(cell, load_tokenizer(cell.model))
    arguments = dict(seen.arguments)
    stop = arguments.pop("stop", None)
    lines = [
        f"{cell.key}: {seen.kind}, {seen.prompt_tokens} prompt tokens, "
        f"{seen.requests} request{'' if seen.requests == 1 else 's'} for the first document of each subtask",
        *_block("prompt", seen.prompt),
    ]
    if seen.continuation is not None:
        lines += _block("continuation", seen.continuation)
    if stop is not None:
        lines.append(f"  stop       {_listed(stop)}")
    if arguments:
        lines.append(f"  arguments  {json.dumps(arguments)}")
    return "\n".join(lines)


def _quiet() -> None:
    """Keep the libraries' progress bars and notes out of the rendered prompts; before they are imported."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    for library in ("lm_eval", "datasets", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _block(name: str, text: str) -> list[str]:
    return [f"  {name}", *(f"  | {line}" for line in text.split("\n"))]


def _listed(values: Sequence[Any]) -> str:
    return " ".join(repr(value) for value in values)
