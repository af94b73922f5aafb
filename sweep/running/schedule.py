"""(View of cluster and work) -> actions. Pure: no Ray, no clock of its own.

What it aims at: the sweep ends as early as possible, then first results come early. What it goes by:

- A cell's requests go to any server of its model, so a model's work is split as finely as one likes, at the price of a
  start for each further server. Only a start and the last answers cannot be split.
- So every model gets its first server before any gets a second, the one with most work first. This costs the fewest
  starts, shows a first result of each model early, and leaves the largest models running at the end, whose work can
  then be spread over whatever is free.
- GPUs that no model waits for go to the model that would end last, as long as a further server there has time to do
  more than it costs; once that has servers enough, by work.
- A server that fits nowhere closes the nodes where it will fit soonest; whatever comes after it is put elsewhere.

The view is kept up to date by its owner, server by server (`View.put`), and never rebuilt: what is decided by is in
sums and sets that change with each `put`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace, nlargest
from operator import attrgetter

from sweep.running.inventory import ROUNDING, Need, Node, Places

CELLS_PER_MODEL = 2
"""Two keep a server full: one sends while the other loads its data or scores."""


FILLED = 0.25
"""Of the time that GPUs will be free before the end; expectations are not exact enough for all of it."""

WORTH_STARTS = 2.0
"""A model that leaves so many of the longest start before the end leaves its GPUs to replicas and need not wait."""

DOUBT = 1.5
"""Of the time that a model will work after its starts, counted on top when it is asked which ends last. Work is what
expectations are wrong about, and a model that ends early leaves its GPUs to those that do not: with this, sweeps end
earlier on many GPUs (docs/decisions.md)."""

LATEST = 64
"""So many of the models that end last are looked at for a replica in one decision; on a thousand it would be slow."""

HOPE = 0.5
"""Of an expected start. A replica is started on a GPU that nobody else wants if it would find work after that: it may
start faster than expected, and work may take longer."""

BESIDE = 2.0
"""Of an expected start: so much a model must have left for a replica while one that ends later waits for more GPUs on
one node than are free. What ends soon then leaves its GPUs together instead of one by one to itself."""

ENOUGH = 0.03
"""Of an expected start. A model that would end last has servers enough when a further one ends it by less sooner:
what is free then goes by work, since of many starts some are fast."""


@dataclass(frozen=True, kw_only=True)
class LifeView:
    """One life of a server that holds something."""

    name: str
    nodes: tuple[str, ...] = ()
    """Empty for an external one."""
    ready_at_s: float = 0.0
    """On the view's clock; while it starts, when that is expected."""
    ready: bool = False
    live: bool = True
    """It starts or is ready; else it retires or was lost and still holds what it had."""


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """One ServerPlan of the sweep, its lives and what its models' cells come to."""

    name: str
    need: Need | None
    """Of one life; None for a server that someone else runs, which takes nothing."""
    replicas: int | None
    """At most; None: as many as help."""
    lives: tuple[LifeView, ...] = ()
    resting: bool = False
    """It was lost and may not start again yet."""
    unfinished_cells: int
    wanted: bool
    """Some cell has requests without a stored answer, or may have."""
    running: int = 0
    """Cells with an evaluator that have not got all their answers."""
    waiting: tuple[str, ...] = ()
    """Cells that an evaluator may take now, in their order: they have a server, one is starting, or stored answers may
    suffice."""
    begun: bool = False
    """The first of `waiting` was begun before: what was lost goes on first, where evaluators are few it would wait for
    all new cells of the models before it."""
    work_s: float = 0.0
    """What its cells still take, on one server alone."""
    start_s: float = 60.0
    """From the start of a life until it is ready."""

    @property
    def live(self) -> int:
        return sum(life.live for life in self.lives)

    @property
    def ready(self) -> bool:
        """Whether one of its lives can answer."""
        return any(life.live and life.ready for life in self.lives)

    @property
    def load(self) -> float:
        """Running cells for each live server."""
        return self.running / max(1, self.live)

    @property
    def most(self) -> float:
        """Lives at the same time."""
        if self.replicas is not None:
            return self.replicas
        # CPU servers of a node share its cores: a second one makes the model no faster.
        return float("inf") if self.need is not None and self.need.gpus else 1

    @property
    def width(self) -> float:
        """GPUs, or CPU slots, of one life."""
        return (self.need.gpus or 1) * self.need.nodes if self.need is not None else 0.0


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


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A server, and what its owner's last word of it comes to."""

    view: ServerView
    order: int
    live: int
    end_s: float
    """When its live servers will have done its work; 0 without any."""
    late_s: float
    """The same with `DOUBT`."""


class _Pool:
    """The servers with work that compete for one kind of place, GPUs or CPU slots."""

    def __init__(self) -> None:
        self.back: dict[str, _Known] = {}
        """Without a live server, though cells have evaluators, or its place is kept while it rests."""
        self.first: dict[str, _Known] = {}
        """All others without one."""
        self.served: dict[str, _Known] = {}
        """Those that may get a replica."""


class View:
    """Cluster and work, kept up to date by its owner."""

    def __init__(self, nodes: Iterable[Node] = (), *, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self.idle_evaluators = 0
        self.places = Places(nodes)
        self._known: dict[str, _Known] = {}
        self._on: dict[str, dict[str, str]] = {}
        """Node -> life there -> its server."""
        self.gpus, self.slots = _Pool(), _Pool()
        self.external: dict[str, _Known] = {}
        """Those to be started."""
        self.idle: dict[str, _Known] = {}
        """With live servers and nothing left to do."""
        self.open: dict[str, _Known] = {}
        """With cells to run and room for them."""

    def put(self, server: ServerView) -> None:
        """The latest of one server; the first calls are in the order of the plan, which decides between equals."""
        name, known = server.name, self._known.get(server.name)
        changed = known is not None and known.view.need != server.need
        self._hold(known.view.lives if known is not None else (), server)
        known = self._known[name] = _known(server, len(self._known) if known is None else known.order, self.now_s)
        _keep(self.idle, known, bool(known.live and not server.unfinished_cells))
        _keep(self.open, known, bool(server.waiting and server.running < CELLS_PER_MODEL * max(1, known.live)))
        due = bool(server.unfinished_cells and (server.wanted or server.resting))
        if server.need is None:
            _keep(self.external, known, due and not known.live and not server.resting)
            return
        back = bool(server.resting or server.running)
        mine, other = (self.gpus, self.slots) if server.need.gpus else (self.slots, self.gpus)
        _keep(mine.back, known, due and not known.live and back)
        _keep(mine.first, known, due and not known.live and not back)
        _keep(mine.served, known, due and 0 < known.live < server.most and not server.resting)
        if changed:  # with the nodes
            for some in (other.back, other.first, other.served):
                some.pop(name, None)

    def put_nodes(self, nodes: Iterable[Node]) -> None:
        """The cluster as it is now. What lives on a node that is gone holds nothing of the others."""
        self.places, self._on = Places(nodes), {}
        for known in self._known.values():
            self._hold((), known.view)

    def __getitem__(self, server: str) -> ServerView:
        return self._known[server].view

    def _hold(self, before: tuple[LifeView, ...], server: ServerView) -> None:
        if server.need is None or before is server.lives or before == server.lives:
            return
        old, new = {life.name for life in before}, {life.name for life in server.lives}
        for life in before:
            if life.name not in new:
                self.places.give_back(life.name)
                for node in life.nodes:
                    del self._on[node][life.name]
        for life in server.lives:
            if life.name not in old:
                self.places.take(life.name, server.need, life.nodes)
                for node in life.nodes:
                    self._on.setdefault(node, {})[life.name] = server.name

    def ends(self, node: str) -> list[tuple[float, float]]:
        """When the lives on a node are expected to be over, the first first, and the GPUs that each then leaves."""
        known = [self._known[server] for server in self._on.get(node, {}).values()]
        return sorted((max(self.now_s, each.end_s), each.view.need.gpus) for each in known if each.view.need)


def _keep(some: dict[str, _Known], known: _Known, wanted: bool) -> None:
    if wanted:
        some[known.view.name] = known
    else:
        some.pop(known.view.name, None)


def _known(server: ServerView, order: int, now_s: float) -> _Known:
    live, ready_s = 0, 0.0
    for life in server.lives:
        if life.live:
            live += 1
            ready_s += life.ready_at_s if life.ready_at_s > now_s else now_s
    end_s = (server.work_s + ready_s) / live if live else 0.0
    return _Known(view=server, order=order, live=live, end_s=end_s, late_s=_late_s(server, live, end_s))


def _late_s(server: ServerView, live: int, end_s: float) -> float:
    return end_s + DOUBT * server.work_s / live if live else end_s


def schedule(view: View, *, hope: float = HOPE) -> list[Action]:
    """What to do now, each with its reason. Retirements come first; their GPUs count as free once they are."""
    return [*retirements(view), *_starts(view, hope), *cells(view)]


def retirements(view: View) -> Iterator[RetireServer]:
    for known in _in_order(view.idle.values()):
        for life in known.view.lives:
            if life.live:
                yield RetireServer(life=life.name, reason="all cells of its models are finished")


def _in_order(some: Iterable[_Known]) -> list[_Known]:
    return sorted(some, key=lambda known: known.order)


def _starts(view: View, hope: float) -> Iterator[StartServer]:
    if view.places.free_gpus > ROUNDING:
        yield from _filled(view, view.gpus, hope)
    if view.places.free_slots > 0:
        yield from _filled(view, view.slots, hope)
    for known in _in_order(view.external.values()):
        yield StartServer(server=known.view.name, reason=f"{_owed(known.view)}, someone else runs it")


def _filled(view: View, pool: _Pool, hope: float) -> Iterator[StartServer]:
    """What to start of a pool while there is room."""
    filling = _Filling(view)
    # A lost server comes back before others begin: evaluators that wait for it are missing elsewhere. While it rests it
    # keeps its place, since a model that took it would wait for these evaluators, both for ever.
    for known in _in_order(pool.back.values()):
        nodes = filling.place(known, until_s=_alone_s(view, known.view))
        if nodes and not known.view.resting:
            yield StartServer(server=known.view.name, nodes=nodes, reason=f"its cells wait for it, {_owed(known.view)}")
    served = [
        (known, known.live, known.end_s) for known in nlargest(LATEST, pool.served.values(), key=attrgetter("late_s"))
    ]
    later = []
    turns = _Turns(view, pool)
    # The largest of those without a server, then of those with one that which ends last.
    for known in sorted(
        pool.first.values(), key=lambda known: (-known.view.width, -known.view.work_s - known.view.start_s, known.order)
    ):
        end_s = _alone_s(view, known.view)
        if turns.can_wait(known.view, end_s):
            later.append(known)
        elif nodes := filling.place(known, until_s=end_s):
            yield StartServer(server=known.view.name, nodes=nodes, reason=f"first server, {_owed(known.view)}")
            served.append((known, 1, end_s))
    yield from _replicas(view, served, filling, hope)
    for known in later:
        if nodes := filling.place(known, until_s=_alone_s(view, known.view), keep=False):
            yield StartServer(server=known.view.name, nodes=nodes, reason=f"first server, {_owed(known.view)}")


class _Turns:
    """Which models may wait for their turn on GPUs that others leave before the sweep ends."""

    def __init__(self, view: View, pool: _Pool) -> None:
        if not pool.first:
            return
        self._now_s = view.now_s
        work = sum(known.view.width * (known.view.start_s + known.view.work_s) for known in pool.first.values())
        work += sum(k.view.width * k.live * max(0.0, k.end_s - view.now_s) for k in pool.served.values())
        self._horizon_s = view.now_s + work / max(
            1, view.places.total_gpus if pool is view.gpus else view.places.total_slots
        )
        """When all would be done, were nothing idle."""
        self._left = sum(
            k.view.width * k.live * max(0.0, self._horizon_s - max(view.now_s, k.end_s)) for k in pool.served.values()
        )
        """GPU-seconds between the end of what runs and the horizon."""
        self._start_s = max(k.view.start_s for some in (pool.first, pool.served) for k in some.values())
        """The longest."""

    def can_wait(self, server: ServerView, end_s: float) -> bool:
        takes_s = end_s - self._now_s
        if (
            2 * takes_s < self._horizon_s - self._now_s
            and server.width * takes_s < FILLED * self._left
            and self._horizon_s - end_s < WORTH_STARTS * self._start_s
        ):
            self._left -= server.width * takes_s
            return True
        self._left += server.width * max(0.0, self._horizon_s - end_s)
        return False


def _replicas(
    view: View, served: Iterable[tuple[_Known, int, float]], filling: "_Filling", hope: float
) -> Iterator[StartServer]:
    """One after the other to the model that would end last, should its work be more than expected; once it has servers
    enough, to the one with the most work for each server."""

    def entry(known: _Known, live: int, end_s: float) -> tuple[float, int, int, float, _Known]:
        left_s = known.view.work_s / live if enough else _late_s(known.view, live, end_s)
        return -left_s, known.order, live, end_s, known

    now_s, least, enough, room = view.now_s, hope, False, filling.room
    heap = [entry(known, live, end_s) for known, live, end_s in served]
    if not any(_gpus(known) <= room for *_, known in heap):
        return
    heapify(heap)
    while heap:
        _, _, live, end_s, known = heap[0]
        server, left_s = known.view, end_s - now_s
        if live >= server.most or left_s <= least * server.start_s:
            heappop(heap)
            continue
        sooner_s = (left_s - server.start_s) / (live + 1)
        if not enough and 0 < sooner_s < ENOUGH * server.start_s:
            enough = True
            heap = [entry(known, live, end_s) for _, _, live, end_s, known in heap]
            heapify(heap)
            continue
        then_s = left_s - max(0.0, sooner_s)
        # Where it is larger than all room no node is looked at: with a thousand models that took most of the time.
        fits = _gpus(known) <= room
        nodes = filling.place(known, until_s=now_s + then_s, keep=False) if fits else ()
        if not nodes:
            heappop(heap)
            least = BESIDE  # for those that come after it
            continue
        reason = f"replica {live + 1}, {left_s:.0f} s left become {then_s:.0f} s with a start of {server.start_s:.0f} s"
        yield StartServer(server=server.name, nodes=nodes, reason=reason)
        room = filling.room
        heapreplace(heap, entry(known, live + 1, now_s + then_s))


def _gpus(known: _Known) -> float:
    return known.view.need.gpus if known.view.need is not None else 0.0


@dataclass(kw_only=True)
class _Kept:
    """A node that waits for lives to end, so that a large server fits there."""

    from_s: float
    spare_gpus: float
    """Besides what the large server will take of what is free then."""


class _Filling:
    """Places as they become when what is decided now has been started."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._places = view.places
        self._kept: dict[str, _Kept] = {}
        self._count = 0

    @property
    def room(self) -> float:
        return self._places.room

    def place(self, known: _Known, *, until_s: float, keep: bool = True) -> tuple[str, ...]:
        """Where a server that is over at `until_s` goes.

        Where it does not fit yet, the nodes that lack least are kept for it (`keep`): what comes after it is put there
        only if it is over before, or fits beside.
        """
        need = known.view.need
        assert need is not None
        closed = {
            name
            for name, kept in self._kept.items()
            if until_s > kept.from_s and not (need.gpus <= kept.spare_gpus and need.gpus)
        }
        nodes = self._places.find(need, closed=closed)
        if not nodes:
            for name in self._places.nearest(need, closed=self._kept) if keep else ():
                self._kept[name] = self._keep(name, need)
            return ()
        if not self._count:
            self._places = self._places.copy()
        self._count += 1
        self._places.take(f"start {self._count}", need, nodes)
        for kept in [kept for name in nodes if (kept := self._kept.get(name)) and until_s > kept.from_s]:
            kept.spare_gpus -= need.gpus
        return nodes

    def _keep(self, node: str, need: Need) -> _Kept:
        free, from_s = self._places.free_on(node), self._view.now_s
        for end_s, gpus in self._view.ends(node):
            if free >= need.gpus and end_s > from_s:
                break
            free, from_s = free + gpus, end_s
        return _Kept(from_s=from_s, spare_gpus=free - need.gpus)


def _alone_s(view: View, server: ServerView) -> float:
    """When a first server that is started now will have done the work alone."""
    return view.now_s + server.start_s + server.work_s


def _owed(server: ServerView) -> str:
    return f"{server.unfinished_cells} cells owed, {server.work_s:.0f} s of work"


def cells(view: View) -> Iterator[RunCell]:
    """Cells for the idle evaluators, each for the server with the fewest running so far, then for one whose next cell
    was begun before, then in plan order; those of servers that still start get what the ready ones leave."""
    idle = view.idle_evaluators
    if not idle:
        return
    heap = [
        (not known.view.ready, known.view.load, not known.view.begun, known.order, 0, known.view)
        for known in view.open.values()
    ]
    heapify(heap)
    while heap and idle:
        starts, load, _, order, taken, server = heappop(heap)
        yield RunCell(cell=server.waiting[taken], reason=f"{server.name} runs {load:g} cells a server")
        idle -= 1
        load += 1 / max(1, server.live)
        if taken + 1 < len(server.waiting) and load < CELLS_PER_MODEL:
            heappush(heap, (starts, load, True, order, taken + 1, server))
