"""A sweep on a cluster of discrete events, driven by the very function that decides in a real one.

It gives `plan` its times and the benchmark of scheduling its figures. What it takes a sweep for:

- A cell is prepared by its evaluator, then worked on by all ready servers of its model, which its running cells share
  evenly, and is over some seconds after its last request was sent: the last answers, and scoring.
- A server takes a while to start, may die, and holds its GPUs a moment longer than it works.
- What decides knows expected costs and starts, how far each cell is and how long that took; not the true costs.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heapify, heappop, heappush
from time import perf_counter

from sweep.planning.plan import Plan, on_cpu
from sweep.running.costs import Costs, corrected_s, in_order, start_s
from sweep.running.inventory import Need, Node, fits, need, total_gpus
from sweep.running.restarts import BACKOFF_S
from sweep.running.schedule import (
    Action,
    LifeView,
    RetireServer,
    RunCell,
    ServerView,
    StartServer,
    View,
    schedule,
)

STOP_S = 2.0
"""From asking a server to stop until its GPUs are free: 0.5 to 1 s for the process, and a look at the memory."""

LOOK_S, LOOK_SHARE = 5.0, 0.02
"""From one word of how far all cells are to the next, at least and of the time so far: evaluators tell it twice a
second, which no decision needs."""

REDONE_S = 5.0
"""Of a server's work that is lost with it: the requests that it held."""


@dataclass(frozen=True, kw_only=True)
class SimulatedCell:
    key: str
    expected_s: float
    """On one server of its model alone."""
    true_s: float
    prepare_s: float = 0.0
    """Before its first request, while servers may still load."""
    last_s: float = 0.0
    """From the end of its work to its record: the longest answer, and scoring."""


@dataclass(frozen=True, kw_only=True)
class SimulatedServer:
    name: str
    need: Need
    replicas: int | None
    cells: tuple[SimulatedCell, ...]
    start_s: float
    """What is expected."""
    starts_s: Callable[[int], float]
    """Number of the life -> how long it takes to start."""
    dies_after_s: Callable[[int], float] = lambda _: math.inf
    """Number of the life -> how long after its start it dies."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A server's life, and the GPUs that it held."""

    server: str
    places: tuple[tuple[str, tuple[int, ...]], ...]
    """Nodes, and the numbers of their GPUs; none for a CPU slot."""
    start_s: float
    ready_s: float | None
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    makespan_s: float
    first_result_s: float
    spans: tuple[Span, ...]
    """In the order in which they ended."""
    gpu_s: float
    """GPUs held, times the seconds."""
    decisions: int
    deciding_s: float
    """By the clock of this machine, all decisions together."""


@dataclass(kw_only=True)
class _Life:
    name: str
    nodes: tuple[str, ...]
    start_s: float
    expected_ready_s: float
    ready_s: float | None = None
    live: bool = True


@dataclass(kw_only=True)
class _Server:
    """A server, its lives and cells. Its cells share it evenly: each is over when `shared_s` has come to its mark."""

    plan: SimulatedServer
    waiting: list[SimulatedCell]
    """The next one last."""
    lives: dict[str, _Life] = field(default_factory=dict)
    seen: tuple[LifeView, ...] | None = ()
    """The lives as they are told; None when they have changed since."""
    started: int = 0
    rests_until_s: float = 0.0
    shared_s: float = 0.0
    """Work that each cell at work has got since the beginning, had it been there all the time."""
    at_work: list[tuple[float, int, SimulatedCell]] = field(default_factory=list)
    """A heap by mark."""
    preparing: int = 0
    """Running cells before their first request."""
    ending: int = 0
    """Running cells after their last."""
    looked_s: float = 0.0
    ready: int = 0
    version: int = 0
    """Of the next end of a cell; earlier ones do not come any more."""
    ahead_s: float = 0.0
    """Expected of the cells that wait or are prepared."""
    done_s: float = 0.0
    """Expected of what has been done."""
    spent_s: float = 0.0
    """What it took."""

    def move_on(self, now_s: float) -> None:
        if self.at_work and self.ready:
            spent_s = (now_s - self.looked_s) * self.ready
            self.shared_s += spent_s / len(self.at_work)
            self.spent_s += spent_s
        self.looked_s = now_s

    def view(self, now_s: float) -> ServerView:
        asking = self.preparing + len(self.at_work)
        left_s, done_s, shared_s = self.ahead_s, self.done_s, self.shared_s
        for mark, _, cell in self.at_work:
            part_s = cell.expected_s * (mark - shared_s) / cell.true_s if mark > shared_s else 0.0
            left_s += part_s
            done_s += cell.expected_s - part_s
        if self.seen is None:
            self.seen = tuple(
                LifeView(
                    name=life.name,
                    nodes=life.nodes,
                    ready_at_s=life.expected_ready_s if life.ready_s is None else life.ready_s,
                    ready=life.ready_s is not None,
                    live=life.live,
                )
                for life in self.lives.values()
            )
        return ServerView(
            name=self.plan.name,
            need=self.plan.need,
            replicas=self.plan.replicas,
            lives=self.seen,
            resting=now_s < self.rests_until_s,
            unfinished_cells=len(self.waiting) + asking + self.ending,
            wanted=bool(self.waiting or asking),
            running=asking,
            waiting=tuple(cell.key for cell in reversed(self.waiting[-8:]))
            if any(life.live for life in self.seen)
            else (),
            work_s=corrected_s(left_s, done_s=done_s, spent_s=self.spent_s),
            start_s=self.plan.start_s,
        )


PREPARE_S, LAST_S = 5.0, 2.0
"""Of a cell in a warm evaluator: its data and requests; the last answers and scores."""


def forecast(plan: Plan, nodes: Sequence[Node], costs: Costs) -> Outcome:
    """What the owed cells of a plan would take on these nodes, as far as is known; servers that someone else runs and
    those that can never start there are left out.

    A sweep also starts servers that serve only if they start faster than expected; here they would never serve.
    """
    cells_by_server: dict[str, list[SimulatedCell]] = {}
    on_cpus = {name: on_cpu(server, cluster_gpus=total_gpus(nodes)) for name, server in plan.owed_servers.items()}
    for cell in plan.owed:
        name = cell.model.server
        expected_s = costs.expected_s(cell, plan.servers[name], on_cpu=on_cpus[name])
        simulated = SimulatedCell(
            key=cell.key, expected_s=expected_s, true_s=expected_s, prepare_s=PREPARE_S, last_s=LAST_S
        )
        cells_by_server.setdefault(name, []).append(simulated)
    servers = []
    for name, server in plan.owed_servers.items():
        wanted = need(server, nodes)
        if wanted is None or sum(fits(wanted, node) for node in nodes) < wanted.nodes:
            continue
        takes_s = start_s(server, on_cpu=on_cpus[name])
        servers.append(
            SimulatedServer(
                name=name,
                need=wanted,
                replicas=server.replicas if isinstance(server.replicas, int) else None,
                cells=tuple(cells_by_server[name]),
                start_s=takes_s,
                starts_s=lambda _, takes_s=takes_s: takes_s,  # type: ignore[misc]
            )
        )
    return simulate(nodes, servers, decide=partial(schedule, hope=1.0))


class StuckError(RuntimeError):
    """What is decided lets servers and cells wait for each other for ever."""


def simulate(
    nodes: Sequence[Node],
    servers: Iterable[SimulatedServer],
    *,
    decide: Callable[[View], Iterable[Action]] = schedule,
) -> Outcome:
    """One sweep from its first start to its last record; StuckError where it never comes."""
    return _Simulation(nodes, servers, decide).run()


class _Simulation:
    def __init__(
        self, nodes: Sequence[Node], servers: Iterable[SimulatedServer], decide: Callable[[View], Iterable[Action]]
    ) -> None:
        self._decide = decide
        self._now_s = 0.0
        self._view = View(nodes)
        self._idle = sum(node.evaluators for node in nodes)
        self._servers: dict[str, _Server] = {}
        self._server_of: dict[str, _Server] = {}
        """By cell that waits, and by life."""
        self._serials = itertools.count()
        self._events: list[tuple[float, int, Callable[[], Sequence[_Server]]]] = []
        """Each says whom it has changed."""
        self._spans: list[Span] = []
        self._first_s = self._last_s = 0.0
        """When records were written."""
        self._unfinished = 0
        for plan in servers:
            server = _Server(plan=plan, waiting=[*reversed(in_order(plan.cells, lambda cell: cell.expected_s))])
            server.ahead_s = sum(cell.expected_s for cell in plan.cells)
            self._servers[plan.name] = server
            self._server_of.update((cell.key, server) for cell in plan.cells)
            self._unfinished += len(plan.cells)
            self._view.put(server.view(0.0))
        self._at(LOOK_S, self._look)

    def run(self) -> Outcome:
        decisions, deciding_s = 0, 0.0
        while True:
            self._view.now_s, self._view.idle_evaluators = self._now_s, self._idle
            before_s = perf_counter()
            actions = list(self._decide(self._view))
            deciding_s += perf_counter() - before_s
            decisions += 1
            touched = {server.plan.name: server for server in map(self._carry_out, actions)}
            while not touched and self._events:
                self._now_s, _, happens = heappop(self._events)
                touched = {server.plan.name: server for server in happens()}
            if not touched:
                break
            self._view.now_s = self._now_s  # before what is put, which is judged by it
            for server in touched.values():
                self._plan_end(server)
                self._view.put(server.view(self._now_s))
        if self._unfinished:
            raise StuckError(f"{self._unfinished} cells are left and nothing happens any more")
        return Outcome(
            makespan_s=self._last_s,
            first_result_s=self._first_s,
            spans=tuple(self._spans),
            gpu_s=sum((span.end_s - span.start_s) * sum(len(gpus) for _, gpus in span.places) for span in self._spans),
            decisions=decisions,
            deciding_s=deciding_s,
        )

    def _look(self) -> list[_Server]:
        if self._events:  # else nothing will ever change
            self._at(self._now_s + max(LOOK_S, LOOK_SHARE * self._now_s), self._look)
        return [server for server in self._servers.values() if server.at_work and server.ready]

    def _at(self, time_s: float, happens: Callable[[], Sequence[_Server]]) -> None:
        heappush(self._events, (time_s, next(self._serials), happens))

    def _carry_out(self, action: Action) -> _Server:
        match action:
            case StartServer(server=name, nodes=nodes):
                return self._start(self._servers[name], nodes)
            case RetireServer(life=life):
                server = self._server_of[life]
                self._stop(server, server.lives[life])
                return server
            case RunCell(cell=key):
                server = self._server_of.pop(key)
                server.move_on(self._now_s)
                # Nearly always the next one.
                number = next(n for n in range(len(server.waiting) - 1, -1, -1) if server.waiting[n].key == key)
                cell = server.waiting.pop(number)
                server.preparing += 1
                self._idle -= 1
                self._at(self._now_s + cell.prepare_s, lambda: self._begin(server, cell))
                return server

    # Servers.

    def _start(self, server: _Server, nodes: tuple[str, ...]) -> _Server:
        plan, number = server.plan, server.started
        life = _Life(
            name=f"{plan.name}-{number}",
            nodes=nodes,
            start_s=self._now_s,
            expected_ready_s=self._now_s + plan.start_s,
        )
        server.started += 1
        server.lives[life.name] = life
        server.seen = None
        self._server_of[life.name] = server
        self._at(self._now_s + plan.starts_s(number), lambda: self._ready(server, life))
        if (dies_after_s := plan.dies_after_s(number)) < math.inf:
            self._at(self._now_s + dies_after_s, lambda: self._die(server, life))
        return server

    def _ready(self, server: _Server, life: _Life) -> list[_Server]:
        if not life.live:
            return []
        server.move_on(self._now_s)
        life.ready_s = self._now_s
        server.seen = None
        server.ready += 1
        return [server]

    def _die(self, server: _Server, life: _Life) -> list[_Server]:
        if not life.live:
            return []
        if life.ready_s is not None and server.at_work:
            server.move_on(self._now_s)
            again_s = REDONE_S / len(server.at_work)
            server.at_work = [
                (min(mark + again_s, server.shared_s + cell.true_s), n, cell) for mark, n, cell in server.at_work
            ]
            heapify(server.at_work)
        server.rests_until_s = self._now_s + BACKOFF_S
        self._at(server.rests_until_s, lambda: [server])
        self._stop(server, life)
        return [server]

    def _stop(self, server: _Server, life: _Life) -> None:
        server.move_on(self._now_s)
        life.live = False
        server.seen = None
        server.ready -= life.ready_s is not None
        self._at(self._now_s + STOP_S, lambda: self._gone(server, life))

    def _gone(self, server: _Server, life: _Life) -> list[_Server]:
        self._spans.append(
            Span(
                server=server.plan.name,
                places=self._view.places.held(life.name),
                start_s=life.start_s,
                ready_s=life.ready_s,
                end_s=self._now_s,
            )
        )
        del server.lives[life.name], self._server_of[life.name]
        server.seen = None
        return [server]

    # Cells.

    def _begin(self, server: _Server, cell: SimulatedCell) -> list[_Server]:
        server.move_on(self._now_s)
        server.preparing -= 1
        server.ahead_s -= cell.expected_s
        heappush(server.at_work, (server.shared_s + cell.true_s, next(self._serials), cell))
        return [server]

    def _plan_end(self, server: _Server) -> None:
        """The next of its cells that has got all its work; what was foreseen before does not come."""
        server.move_on(self._now_s)
        server.version += 1
        if server.at_work and server.ready:
            version = server.version
            left_s = max(0.0, server.at_work[0][0] - server.shared_s) * len(server.at_work) / server.ready
            self._at(self._now_s + left_s, lambda: self._worked(server, version))

    def _worked(self, server: _Server, version: int) -> list[_Server]:
        if version != server.version:
            return []
        server.move_on(self._now_s)
        *_, cell = heappop(server.at_work)
        server.done_s += cell.expected_s
        server.ending += 1
        self._at(self._now_s + cell.last_s, lambda: self._record(server))
        return [server]

    def _record(self, server: _Server) -> list[_Server]:
        server.ending -= 1
        self._idle += 1
        self._unfinished -= 1
        self._first_s, self._last_s = self._first_s or self._now_s, self._now_s
        return [server]
