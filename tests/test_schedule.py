"""Decisions as tables, and a simulated sweep that has to come to its end."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.running.inventory import Need, Node
from sweep.running.schedule import (
    CELLS_PER_MODEL,
    LifeView,
    RetireServer,
    RunCell,
    ServerView,
    StartServer,
    View,
    schedule,
)


def server(name: str = "a", *, gpus: float = 1, lives: int = 0, **changes: object) -> ServerView:
    """One with so many ready servers on the first node, and hours of work."""
    known = ServerView(
        name=name,
        need=Need(gpus=gpus),
        replicas=1,
        lives=tuple(LifeView(name=f"{name}-{n}", nodes=("n0",)) for n in range(lives)),
        unfinished_cells=3,
        wanted=True,
        work_s=3600.0,
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def external(name: str = "a", *, lives: int = 0, **changes: object) -> ServerView:
    there = tuple(LifeView(name=f"{name}-{n}") for n in range(lives))
    return replace(server(name, **changes), need=None, lives=there)  # type: ignore[arg-type]


def waiting(*keys: str) -> tuple[str, ...]:
    return tuple(f"a/{key}" for key in keys)


def view(*servers: ServerView, gpus: float | tuple[float, ...] = 0, slots: int = 0, idle_evaluators: int = 0) -> View:
    """Of a cluster with `gpus` on each of its nodes."""
    each = gpus if isinstance(gpus, tuple) else (gpus,)
    seen = View([Node(name=f"n{n}", gpus=count, cpu_servers=slots) for n, count in enumerate(each)])
    for known in servers:
        seen.put(known)
    seen.idle_evaluators = idle_evaluators
    return seen


def decided(seen: View, *, places: bool = False) -> list[str]:
    words = []
    for action in schedule(seen):
        assert action.reason
        match action:
            case StartServer(server=name, nodes=nodes):
                words.append(f"start {name}" + (f" on {' '.join(nodes)}" if places else ""))
            case RetireServer(life=life):
                words.append(f"retire {life}")
            case RunCell(cell=key):
                words.append(f"run {key}")
    return words


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a"), server("b"), gpus=2), ["start a", "start b"]),
        (view(server("a"), server("b"), gpus=1), ["start a"]),
        (view(server("a", gpus=0), server("b", gpus=0), slots=1), ["start a"]),
        (view(server("a", gpus=0.5), server("b", gpus=0.5), gpus=1), ["start a", "start b"]),
        (view(*(server(n, gpus=0.1) for n in "abcdefghijk"), gpus=1), [f"start {n}" for n in "abcdefghij"]),
        (view(server("a", wanted=False), server("b"), gpus=2), ["start b"]),
        (view(server("a", unfinished_cells=0), gpus=2), []),
        (view(server("a", lives=1), gpus=2), []),
    ],
    ids=["in order", "as fits", "cpu slots", "half GPUs", "tenths", "not wanted", "nothing owed", "runs already"],
)
def test_servers_with_as_much_to_do_start_in_plan_order_as_resources_allow(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", work_s=10), server("b", work_s=90), gpus=1), ["start b"]),
        (view(server("a", work_s=90), server("b", work_s=10, gpus=2), gpus=2), ["start b"]),
        (view(server("a", work_s=10, start_s=100), server("b", work_s=90, start_s=10), gpus=1), ["start a"]),
    ],
    ids=["most work", "most GPUs, which will not be free together later", "with its start"],
)
def test_the_largest_goes_first(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


def test_no_smaller_server_overtakes_one_that_waits_for_gpus() -> None:
    assert decided(view(server("big", gpus=4), server("busy", gpus=2, lives=1), server("small"), gpus=4)) == []


@pytest.mark.parametrize(
    ("small", "gpus", "expected"),
    [
        ({"work_s": 100.0}, 4, ["start small on n0"]),
        ({}, 5, ["start small on n0"]),
        ({}, (4, 1), ["start small on n1"]),
    ],
    ids=["over before", "beside it", "elsewhere"],
)
def test_what_does_not_delay_the_one_that_waits_goes_on(
    small: dict[str, object], gpus: tuple[float, ...], expected: list[str]
) -> None:
    busy = server("busy", gpus=2, lives=1)
    assert decided(view(server("big", gpus=4), busy, server("small", **small), gpus=gpus), places=True) == expected  # type: ignore[arg-type]


def test_a_server_that_waits_for_gpus_holds_up_no_cpu_server() -> None:
    seen = view(server("big", gpus=4), server("busy", lives=1), server("tiny", gpus=0), gpus=4, slots=1)
    assert decided(seen) == ["start tiny"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", replicas=3, lives=1), server("b"), gpus=4), ["start b", "start a", "start a"]),
        (view(server("a", replicas=3), server("b"), gpus=2), ["start a", "start b"]),
        (view(server("a", replicas=2, lives=1), gpus=4), ["start a"]),
        (view(server("a", replicas=None, lives=1), gpus=4), ["start a"] * 3),
        (view(server("a", replicas=2, lives=1), server("b", replicas=2, lives=1, work_s=9000), gpus=3), ["start b"]),
        (view(server("a", lives=1), server("b", gpus=2), server("c", replicas=2, lives=1, work_s=9000), gpus=3), []),
        (view(server("a", gpus=0, replicas=None, lives=1), slots=3), []),
        (view(server("a", gpus=0, replicas=2, lives=1), slots=3), ["start a"]),
    ],
    ids=[
        "others first",
        "none spare",
        "the second",
        "auto: all that help",
        "to the one that ends last",
        "not before another's first",
        "auto: none on the CPU",
        "a number: on the CPU too",
    ],
)  # fmt: skip
def test_spare_gpus_go_to_replicas_once_every_wanted_server_has_one(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


@pytest.mark.parametrize(
    ("replicas", "start_s", "small", "expected"),
    [
        (None, 2000.0, {"work_s": 100.0}, ["start big"]),
        (None, 60.0, {"work_s": 100.0}, ["start small"]),
        (1, 2000.0, {"work_s": 100.0}, ["start small"]),
        (None, 2000.0, {"work_s": 3000.0}, ["start small"]),
    ],
    ids=[
        "its turn comes before the end",
        "a replica comes early enough after it",
        "nobody else has a use for the GPU",
        "it would end last",
    ],
)
def test_a_small_model_waits_for_a_gpu_that_another_leaves(
    replicas: int | None, start_s: float, small: dict[str, float], expected: list[str]
) -> None:
    big = server("big", lives=1, work_s=9000.0, replicas=replicas, start_s=start_s)
    following = server("next", lives=1, work_s=500.0, replicas=2)
    assert decided(view(big, following, server("small", **small), gpus=3)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("left_s", "starts"), [(0, 0), (50, 0), (51, 1), (1000, 1)])
def test_a_replica_starts_when_it_may_be_ready_before_the_work_is_done(left_s: float, starts: int) -> None:
    seen = view(server("a", replicas=2, lives=1, work_s=left_s, start_s=100.0), gpus=2)
    assert len(decided(seen)) == starts


def test_hoping_for_a_fast_start_does_not_make_an_end_look_later() -> None:
    a = server("a", replicas=None, lives=1, work_s=80.0, start_s=100.0)
    b = server("b", replicas=None, lives=1, work_s=75.0, start_s=100.0)
    assert decided(view(a, b, gpus=6)) == ["start a", "start b", "start a", "start b"]


@pytest.mark.parametrize(
    ("left_s", "gpus", "expected"),
    [(250.0, (4, 1), []), (450.0, (4, 1), ["start narrow"]), (250.0, (5, 2), ["start wide", "start wide"])],
    ids=["two that are free together are waited for", "much is left of the narrow one", "the wide one fits"],
)
def test_no_short_replica_takes_a_gpu_that_a_wider_model_waits_for(
    left_s: float, gpus: tuple[float, ...], expected: list[str]
) -> None:
    wide = server("wide", gpus=2, replicas=3, lives=1, work_s=9000.0, start_s=200.0)
    narrow = server("narrow", replicas=2, lives=1, work_s=left_s, start_s=200.0)
    assert decided(view(wide, narrow, gpus=gpus)) == expected


def test_gpus_that_end_nothing_sooner_go_by_work() -> None:
    small = server("small", replicas=None, work_s=40.0, start_s=200.0)
    large = server("large", replicas=None, work_s=400.0, start_s=150.0)
    starts = Counter(decided(view(small, large, gpus=64)))
    assert starts.total() == 64
    assert starts["start large"] >= 9 * starts["start small"]


def test_a_reason_has_the_numbers_that_it_follows_from() -> None:
    (action,) = schedule(view(server("a", replicas=2, lives=1, work_s=1000, start_s=100.0), gpus=2))
    assert action.reason == "replica 2, 1000 s left become 550 s with a start of 100 s"


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", resting=True), gpus=1), []),
        (view(server("a", resting=True), server("b"), gpus=1), []),
        (view(server("a", resting=True), server("b"), gpus=2), ["start b"]),
        (view(server("a", resting=True, wanted=False), server("b"), gpus=1), []),
        (view(server("a", resting=True, unfinished_cells=0), server("b"), gpus=1), ["start b"]),
        (view(server("a", gpus=2, resting=True), server("b"), gpus=1), ["start b"]),
        (view(server("a", gpus=2, resting=True), server("c", lives=1), server("b"), gpus=2), []),
        (view(server("a", gpus=0, resting=True), server("b"), gpus=1, slots=1), ["start b"]),
        (view(server("a", resting=True, lives=1, replicas=2), server("b"), gpus=2), ["start b"]),
        (view(server("a", resting=True), server("b", replicas=2, lives=1), gpus=2), []),
        (view(server("a", resting=True), server("b", lives=1, unfinished_cells=0), gpus=1), ["retire b-0"]),
        (view(server("b"), server("a", running=2), gpus=1), ["start a"]),
    ],
    ids=[
        "not yet",
        "its place is kept",
        "the rest is free",
        "kept though nobody asked",
        "not for a model that has failed",
        "not where it can never be",
        "kept though it is not free",
        "its own kind only",
        "a replica's place is not",
        "not given to replicas",
        "others retire",
        "what has evaluators comes back first",
    ],
)
def test_what_a_resting_server_needs_stays_free_for_it(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(external("a")), ["start a"]),
        (view(server("big", gpus=4), server("c", lives=1), external("a"), gpus=4), ["start a"]),
        (view(external("a"), server("b"), gpus=1), ["start b", "start a"]),
        (view(external("a", lives=1)), []),
        (view(external("a", resting=True)), []),
        (view(external("a", wanted=False)), []),
        (view(external("a", lives=1, unfinished_cells=0)), ["retire a-0"]),
    ],
    ids=["no GPU", "waits for nobody", "takes nothing", "once", "resting", "not wanted", "retires"],
)
def test_a_server_that_someone_else_runs_costs_nothing(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


def test_a_server_without_unfinished_cells_is_retired_with_all_its_replicas() -> None:
    seen = view(server("a", unfinished_cells=0, lives=2, wanted=False), server("b", lives=1), gpus=3)
    assert decided(seen) == ["retire a-0", "retire a-1"]


@pytest.mark.parametrize(
    ("idle", "changes", "expected"),
    [
        (2, {}, ["run a/1", "run b/1"]),
        (9, {}, ["run a/1", "run b/1", "run a/2", "run b/2"]),
        (9, {"running": CELLS_PER_MODEL}, ["run b/1", "run b/2"]),
        (1, {"running": 1}, ["run b/1"]),
        (0, {}, []),
        (9, {"waiting": ()}, ["run b/1", "run b/2"]),
    ],
)
def test_idle_evaluators_take_cells_of_the_least_loaded_server(
    idle: int, changes: dict[str, object], expected: list[str]
) -> None:
    a = server("a", lives=1, **{"waiting": ("a/1", "a/2", "a/3"), **changes})  # type: ignore[arg-type]
    b = server("b", lives=1, waiting=("b/1", "b/2", "b/3"))
    assert decided(view(a, b, gpus=2, idle_evaluators=idle)) == expected


@pytest.mark.parametrize(
    ("idle", "changes", "expected"),
    [
        (1, {}, ["run b/1"]),
        (3, {}, ["run b/1", "run a/1", "run a/2"]),
        (1, {"running": 1}, ["run a/1"]),
    ],
    ids=["before new ones of others", "its own others are new", "not where more runs"],
)
def test_a_cell_that_was_begun_goes_on_before_new_ones_of_other_models(
    idle: int, changes: dict[str, object], expected: list[str]
) -> None:
    a = server("a", lives=1, waiting=("a/1", "a/2"))
    b = server("b", lives=1, waiting=("b/1", "b/2"), begun=True, **changes)  # type: ignore[arg-type]
    assert decided(view(a, b, gpus=2, idle_evaluators=idle)) == expected


def test_a_model_with_two_servers_runs_twice_as_many_cells() -> None:
    seen = view(server("a", lives=2, replicas=2, waiting=waiting(*"123456789")), gpus=2, idle_evaluators=9)
    assert len(decided(seen)) == 2 * CELLS_PER_MODEL


def test_deciding_changes_nothing() -> None:
    seen = view(server("a", replicas=None), server("b", gpus=2), server("c", gpus=4), gpus=(4, 2), idle_evaluators=2)
    assert schedule(seen) == schedule(seen)


def test_a_node_that_joins_is_used_and_one_that_leaves_holds_nothing() -> None:
    seen = view(server("a", lives=1), server("b"), gpus=1)
    assert decided(seen) == []
    seen.put_nodes([Node(name="n0", gpus=1), Node(name="n1", gpus=1)])
    assert decided(seen, places=True) == ["start b on n1"]
    seen.put_nodes([Node(name="n1", gpus=1)])
    assert decided(seen, places=True) == ["start b on n1"]
    seen.put(server("a", lives=0))
    assert len(decided(seen)) == 1


# A sweep in small: what the runner makes of the decisions, with chance in place of servers and cells.


@dataclass(kw_only=True)
class World:
    """Cells `server/task`; lives start, die and are replaced, cells end or lose their turn, as chance says."""

    servers: dict[str, ServerView]
    gpus: float
    slots: int
    evaluators: int
    waiting: dict[str, bool]
    """Whether the cell's stored answers may suffice."""
    running: dict[str, bool] = field(default_factory=dict)
    """Whether the cell has asked for a server; it then keeps its evaluator until it has been answered."""
    lives: dict[str, str] = field(default_factory=dict)
    """Life -> server."""
    ready: set[str] = field(default_factory=set)
    dying: dict[str, str] = field(default_factory=dict)
    """Life -> server; lost, and still holding what it had."""
    rests: dict[str, int] = field(default_factory=dict)
    """Server -> steps until it may start again."""
    nodes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each life that ever was."""
    count: int = 0

    def fits_everywhere(self) -> None:
        held = {"n0": 0.0, "n1": 0.0, "slots": 0.0}
        for life, owner in [*self.lives.items(), *self.dying.items()]:
            need = self.servers[owner].need
            for node in self.nodes[life] if need is not None else ():
                held[node if need and need.gpus else "slots"] += need.gpus or 1 if need else 0
        assert held["n0"] <= self.gpus + 1e-3
        assert held["n1"] <= 1 + 1e-3
        assert held["slots"] <= self.slots

    def of(self, name: str, cells: Iterable[str]) -> list[str]:
        return [key for key in cells if key.partition("/")[0] == name]

    def view(self) -> View:
        def lives(name: str) -> tuple[str, ...]:
            return tuple(life for life, owner in self.lives.items() if owner == name)

        servers = [
            replace(
                known,
                lives=tuple(LifeView(name=life, nodes=self.nodes[life]) for life in lives(name))
                + tuple(
                    LifeView(name=life, nodes=self.nodes[life], live=False)
                    for life, owner in self.dying.items()
                    if owner == name
                ),
                resting=name in self.rests,
                running=len(self.of(name, self.running)),
                waiting=tuple(key for key in self.of(name, self.waiting) if self.waiting[key] or lives(name)),
                unfinished_cells=len(self.of(name, [*self.waiting, *self.running])),
                wanted=any(not self.waiting[key] for key in self.of(name, self.waiting))
                or any(self.running[key] for key in self.of(name, self.running)),
            )
            for name, known in self.servers.items()
        ]
        view = View([Node(name="n0", gpus=self.gpus, cpu_servers=self.slots), Node(name="n1", gpus=1)])
        for known in servers:
            view.put(known)
        view.idle_evaluators = self.evaluators - len(self.running)
        return view

    def step(self, chance: Random, *, losses: bool) -> None:
        for action in schedule(self.view()):
            match action:
                case StartServer(server=name, nodes=nodes):
                    assert name not in self.rests
                    self.lives[f"{name}-{self.count}"] = name
                    self.nodes[f"{name}-{self.count}"] = nodes
                    self.count += 1
                case RetireServer(life=life):
                    del self.lives[life]
                case RunCell(cell=key):
                    self.running[key] = not self.waiting.pop(key)
        seen = self.view()
        self.fits_everywhere()
        assert seen.idle_evaluators >= 0
        self.rests = {name: left - 1 for name, left in self.rests.items() if left > 1}
        self.dying = {life: owner for life, owner in self.dying.items() if chance.random() < 0.5}
        for life in list(self.lives):
            if losses and chance.random() < 0.2:
                owner = self.dying[life] = self.lives.pop(life)  # lost, or it did not start
                self.rests[owner] = chance.randint(1, 4)
            elif chance.random() < 0.5:
                self.ready.add(life)
        for key, asked in list(self.running.items()):
            owner = key.partition("/")[0]
            if asked:
                if chance.random() < 0.4 and any(self.lives.get(life) == owner for life in self.ready):
                    del self.running[key]
            elif chance.random() < 0.5:
                del self.running[key]  # its stored answers sufficed
            elif owner in self.lives.values() or owner in self.rests:
                self.running[key] = True
            else:
                del self.running[key]
                self.waiting[key] = False


@settings(max_examples=300, deadline=None)
@given(
    # So little of everything that servers, losses and evaluators get into each other's way.
    st.lists(
        st.tuples(
            st.sampled_from([0, 0.5, 1, 2]),  # GPUs
            st.sampled_from([1, 2, None]),  # replicas
            st.integers(0, 5),  # cells
            st.booleans(),  # whether someone else runs it
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(2, 4),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 2**32).map(Random),
)
def test_every_sweep_ends_with_all_cells_done_and_never_holds_more_than_there_is(
    servers: list[tuple[float, int | None, int, bool]], gpus: int, slots: int, evaluators: int, chance: Random
) -> None:
    world = World(
        servers={
            f"s{n}": (external if outside else server)(
                f"s{n}", replicas=replicas, **({} if outside else {"gpus": needs})
            )
            for n, (needs, replicas, _, outside) in enumerate(servers)
        },
        gpus=gpus,
        slots=slots,
        evaluators=evaluators,
        waiting={
            f"s{n}/{task}": chance.random() < 0.3 for n, (*_, cells, _) in enumerate(servers) for task in range(cells)
        },
    )
    for step in range(1000):
        if not world.waiting and not world.running and not world.lives:
            return
        world.step(chance, losses=step < 10)  # later ones would free what a deadlock holds
    pytest.fail(f"still {world.waiting} waiting, {world.running} running, {world.lives} alive")


def test_servers_that_start_get_the_evaluators_that_ready_ones_leave() -> None:
    starting = [server(name, lives=1, waiting=(f"{name}/s", f"{name}/t"), wanted=True) for name in ("m0", "m1")]
    ready = [
        replace(
            server(name, waiting=(f"{name}/s", f"{name}/t")),
            lives=(LifeView(name=f"{name}-0", nodes=("n0",), ready=True),),
        )
        for name in ("m2", "m3")
    ]

    def begun(evaluators: int) -> list[str]:
        seen = view(*starting, *ready, gpus=4, idle_evaluators=evaluators)
        return [action.cell for action in schedule(seen) if isinstance(action, RunCell)]

    assert begun(2) == ["m2/s", "m3/s"]
    assert begun(5) == ["m2/s", "m3/s", "m2/t", "m3/t", "m0/s"]
