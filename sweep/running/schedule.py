"""(View of cluster and work) -> actions. Pure: no Ray, no clock of its own.

In this form it starts servers in the order of the plan as resources allow, gives spare GPUs to replicas, runs up to
CELLS_PER_MODEL cells of a model at a time and retires servers that have nothing left to do.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CELLS_PER_MODEL = 2
"""Two keep a server full: one sends while the other loads its data or scores."""


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """One ServerPlan of the sweep and its lives, in plan order."""

    name: str
    gpus: float
    """Of one life; 0 on the CPU, where it takes one of the CPU server slots."""
    external: bool
    """Someone else runs it: a life of it takes no GPU and no slot."""
    replicas: int | None
    """None: as many as help."""
    lives: tuple[str, ...]
    """Starting and ready ones."""
    resting: bool
    """It was lost and may not start again yet."""
    unfinished_cells: int
    wanted: bool
    """Some cell has requests without a stored answer, or may have."""


@dataclass(frozen=True, kw_only=True)
class CellView:
    """A cell that waits for an evaluator, in plan order."""

    key: str
    server: str
    can_start: bool
    """It has a server, one is starting, or its stored answers may suffice."""


@dataclass(frozen=True, kw_only=True)
class View:
    servers: tuple[ServerView, ...]
    waiting: tuple[CellView, ...]
    running_by_server: dict[str, int]
    free_gpus: float
    free_cpu_servers: int
    idle_evaluators: int


@dataclass(frozen=True, kw_only=True)
class StartServer:
    server: str
    nodes: tuple[str, ...] = ()
    """Where, by the inventory's names: one, or as many as the server spans; none for an external one."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class RetireServer:
    life: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunCell:
    cell: str
    reason: str


Action = StartServer | RetireServer | RunCell


def schedule(view: View) -> list[Action]:
    """What to do now, each with its reason. Retirements come first; their GPUs count as free once they are."""
    return [*_retirements(view), *_starts(view), *_cells(view)]


def _retirements(view: View) -> list[RetireServer]:
    return [
        RetireServer(life=life, reason="all cells of its models are finished")
        for server in view.servers
        if not server.unfinished_cells
        for life in server.lives
    ]


def _starts(view: View) -> Iterator[StartServer]:
    wanted = [server for server in view.servers if server.unfinished_cells and (server.wanted or server.resting)]
    ours = [server for server in wanted if not server.external]
    yield from _filled([server for server in ours if server.gpus], view.free_gpus)
    yield from _filled([server for server in ours if not server.gpus], view.free_cpu_servers)
    yield from _filled([server for server in wanted if server.external], math.inf)


def _filled(wanted: Sequence[ServerView], free: float) -> Iterator[StartServer]:
    """What to start of `wanted`, all of which need GPUs or all a CPU slot, while `free` of these are there.

    A resting server keeps its place and what it needs: its cells wait with the evaluators that they have, and a model
    that took its place would wait for these evaluators, both for ever.
    """
    # GPU fractions add up with rounding errors.
    free += 1e-6
    for server in wanted:
        if not server.lives:
            if _cost(server) > free:
                # The next one may be smaller, but overtaking would starve a large model for ever.
                return
            free -= _cost(server)
            if not server.resting:
                yield StartServer(server=server.name, reason=f"first server, {server.unfinished_cells} cells owed")
    for server in wanted:
        if server.resting:
            continue
        # More servers than cells that may run at a time would idle at the end of the model's work.
        most = server.replicas if server.replicas is not None else server.unfinished_cells
        for _ in range(most - max(1, len(server.lives))):
            if _cost(server) > free:
                break
            free -= _cost(server)
            yield StartServer(server=server.name, reason=f"replica, {server.unfinished_cells} cells owed")


def _cost(server: ServerView) -> float:
    return server.gpus or 1


def _cells(view: View) -> list[RunCell]:
    """Cells for the idle evaluators, each for the server with the fewest running so far, then in plan order."""
    lives = {server.name: max(1, len(server.lives)) for server in view.servers}
    load = {server.name: view.running_by_server.get(server.name, 0) / lives[server.name] for server in view.servers}
    waiting = [cell for cell in view.waiting if cell.can_start]
    actions: list[RunCell] = []
    while waiting and len(actions) < view.idle_evaluators:
        cell = min(waiting, key=lambda c: load[c.server])
        if load[cell.server] >= CELLS_PER_MODEL:
            break
        actions.append(RunCell(cell=cell.key, reason=f"{cell.server} runs {load[cell.server]:g} cells a server"))
        load[cell.server] += 1 / lives[cell.server]
        waiting.remove(cell)
    return actions
