"""What cells and starts are expected to take, before anything is measured and after. Pure.

An expectation is a cell's tokens over the rate of its model's server. Tokens are those of the task's last record, from
whichever model, else a prior by kind of task, shots and limit. The rate is a prior by parameters, corrected by what the
model's own work has taken so far. Priors are for one H100 and only have to be of the right order: what is decided by
them is corrected minutes later.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sweep.errors import ConfigError
from sweep.planning.config import Task
from sweep.planning.plan import Cell, ServerPlan, is_local
from sweep.planning.tasks import TaskInfo, catalog
from sweep.record import Record, Status
from sweep.running.schedule import CELLS_PER_MODEL, ServerView

READ_PER_S = 200_000.0
"""Prompt tokens a second of a model of a billion parameters on one H100: 40 % of what its arithmetic allows."""

GENERATED_COSTS = 4.0
"""Prompt tokens that can be read in the time of one generated, many at a time."""

REQUEST_COSTS = 20.0
"""Prompt tokens that can be read in the time that a request costs beside its tokens."""

CPU_SLOWER = 2_000.0

START_S, START_S_PER_BILLION = 40.0, 2.0
"""Compiling and capturing graphs, and reading two gigabytes at one a second."""

DOCUMENTS = 1_000
"""Of a task."""

SEVERAL, GROUP_DOCUMENTS = 10, 250
"""Of each subtask, in a group of so many: the 57 of mmlu have 246 each."""

QUESTION_TOKENS = 100
"""Of a question, and of each example in front of it."""

GENERATED_TOKENS = 200

BILLIONS = 7.0
"""Where neither name nor folder tells."""

TRUSTED_S = 120.0
"""So much work is as telling of how fast a model is as what was expected of it."""

OFF_MOST = 10_000.0
"""No expectation is further from the truth: what has hardly begun says little."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a cell, in what a server has to do for it."""

    requests: int
    read: float
    """Prompt tokens, those of a common beginning once."""
    generated: float

    @property
    def weight(self) -> float:
        """In prompt tokens."""
        return self.read + GENERATED_COSTS * self.generated + REQUEST_COSTS * self.requests


class Costs:
    """Expectations for the cells of a plan; `learn` makes them better."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._sizes: dict[str, Size] = {}
        """By task name, as counted."""
        self._priors: dict[str, Size] = {}
        self._took: dict[str, tuple[float, float]] = {}
        """Model -> what its records took, and the weight of what they asked."""
        for record in records:
            self.learn(record)

    @property
    def measured(self) -> bool:
        """Whether anything is more than a prior."""
        return bool(self._took)

    def learn(self, record: Record) -> None:
        """Failed cells and those that asked for nothing teach nothing."""
        counts = record.counts
        if record.status is not Status.DONE or not counts.asked:
            return
        asked = Size(requests=counts.asked, read=counts.prompt_tokens, generated=counts.generated_tokens)
        all_of_it = counts.requests / counts.asked
        self._sizes[record.task] = Size(
            requests=counts.requests, read=asked.read * all_of_it, generated=asked.generated * all_of_it
        )
        took_s, weight = self._took.get(record.model, (0.0, 0.0))
        # Cells share their server, so that each takes longer than it would alone.
        self._took[record.model] = (took_s + record.request_s / CELLS_PER_MODEL, weight + asked.weight)

    def expected_s(self, cell: Cell, server: ServerPlan, *, on_cpu: bool) -> float:
        """Seconds of one server that has nothing else to do."""
        size = self._sizes.get(cell.task_name) or self._priors.get(cell.task_name)
        if size is None:
            size = self._priors[cell.task_name] = prior_size(cell.task)
        weight = size.weight
        prior_s = weight * billions(server.model.path) / READ_PER_S
        prior_s *= CPU_SLOWER if on_cpu else 1 / max(1.0, server.gpus * server.model.nodes)
        took_s, asked = self._took.get(cell.model.name, (0.0, 0.0))
        return corrected_s(prior_s, done_s=asked / weight * prior_s, spent_s=took_s)


def corrected_s(left_s: float, *, done_s: float, spent_s: float) -> float:
    """What is left to do, when what has been done was expected to take `done_s` and took `spent_s`: the longer that
    was, the more it counts against what was expected."""
    if not spent_s:
        return left_s
    return float(left_s * (spent_s / max(done_s, spent_s / OFF_MOST)) ** (spent_s / (spent_s + TRUSTED_S)))


def sweep_s(servers: Iterable[ServerView], now_s: float) -> float:
    """What is left until the cells of all servers are done: those of the one that ends last, or of all on the servers
    that live now, whichever is more. Replicas that may still come would make it less."""
    left = [server for server in servers if server.unfinished_cells]
    ends = []
    for server in left:
        ready_at_s = min((life.ready_at_s for life in server.lives if life.live), default=now_s + server.start_s)
        ends.append(max(0.0, ready_at_s - now_s) + server.work_s / max(1, server.live))
    shared = sum(server.work_s for server in left) / max(1, sum(server.live for server in left))
    return max(shared, *ends) if left else 0.0


def start_s(server: ServerPlan, *, on_cpu: bool) -> float:
    """A prior: what a server takes to start."""
    size = billions(server.model.path)
    return START_S + START_S_PER_BILLION * size / (1 if on_cpu else max(1.0, server.gpus))


def prior_size(task: Task) -> Size:
    """Of a cell of which nothing is known but its settings."""
    known: tuple[TaskInfo, ...] = ()
    with suppress(ConfigError):  # a task that is not there fails its cells elsewhere
        known = catalog((task.include_path,) if task.include_path else ()).leaves(task.task)
    leaves = max(1, len(known))
    documents = DOCUMENTS if leaves < SEVERAL else GROUP_DOCUMENTS
    if isinstance(task.limit, int):
        documents = min(documents, task.limit)
    elif task.limit is not None:
        documents = max(1, int(documents * task.limit))
    requests = read = generated = 0.0
    for leaf in known or (None,):
        shots = task.num_fewshot if task.num_fewshot is not None else (leaf and leaf.num_fewshot) or 0
        writes = leaf is not None and leaf.output_type == "generate_until"
        requests += documents
        # The examples are read once, each question for itself.
        read += (documents + shots) * QUESTION_TOKENS
        generated += documents * (GENERATED_TOKENS if writes else 1)
    return Size(requests=int(requests), read=read, generated=generated)


def billions(path: str) -> float:
    """Parameters that compute each token, told by the weights of a local folder or by a name like Qwen2.5-7B."""
    if is_local(path):
        files = Path(path).glob("*.safetensors") if Path(path).is_dir() else ()
        return sum(file.stat().st_size for file in files) / 2e9 or BILLIONS
    name = path.rpartition("/")[2]
    for form in (r"-A(\d+(?:\.\d+)?)B\b", r"(?<![\d.])(\d+(?:\.\d+)?)[Bb]\b"):
        if found := re.search(form, name):
            return float(found[1])
    found = re.search(r"(?<![\d.])(\d+)[Mm]\b", name)
    return float(found[1]) / 1000 if found else BILLIONS


Costed = TypeVar("Costed")


def in_order(cells: Iterable[Costed], expected_s: Callable[[Costed], float]) -> list[Costed]:
    """The order in which a model's cells are begun: the shortest first, for an early result, then the longest, since
    what cannot be split is best not left to the end. Equals keep their order."""
    rest = list(cells)
    if not rest:
        return []
    first = min(rest, key=expected_s)
    rest.remove(first)
    return [first, *sorted(rest, key=lambda cell: -expected_s(cell))]
