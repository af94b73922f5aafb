"""Decisions as tables, and a simulated sweep that has to come to its end."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.running.schedule import (
    CELLS_PER_MODEL,
    CellView,
    RetireServer,
    RunCell,
    ServerView,
    StartServer,
    View,
    schedule,
)


def server(name: str = "a", **changes: object) -> ServerView:
    known = ServerView(
        name=name, gpus=1, external=False, replicas=1, lives=(), resting=False, unfinished_cells=3, wanted=True
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def waiting(*keys: str, can_start: bool = True) -> tuple[CellView, ...]:
    """Cells `server/task`."""
    return tuple(CellView(key=key, server=key.partition("/")[0], can_start=can_start) for key in keys)


def view(*servers: ServerView, **changes: object) -> View:
    known = View(servers=servers, waiting=(), running_by_server={}, free_gpus=0, free_cpu_servers=0, idle_evaluators=0)
    return replace(known, **changes)  # type: ignore[arg-type]


def decided(seen: View) -> list[str]:
    words = []
    for action in schedule(seen):
        assert action.reason
        match action:
            case StartServer(server=name):
                words.append(f"start {name}")
            case RetireServer(life=life):
                words.append(f"retire {life}")
            case RunCell(cell=key):
                words.append(f"run {key}")
    return words


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a"), server("b"), free_gpus=2), ["start a", "start b"]),
        (view(server("a"), server("b"), free_gpus=1), ["start a"]),
        (view(server("a", gpus=0), server("b", gpus=0), free_cpu_servers=1), ["start a"]),
        (view(server("a", gpus=0.5), server("b", gpus=0.5), free_gpus=1), ["start a", "start b"]),
        (view(*(server(n, gpus=0.1) for n in "abcdefghijk"), free_gpus=1), [f"start {n}" for n in "abcdefghij"]),
        (view(server("a", wanted=False), server("b"), free_gpus=2), ["start b"]),
        (view(server("a", unfinished_cells=0), free_gpus=2), []),
        (view(server("a", lives=("a-0",)), free_gpus=2), []),
    ],
    ids=["in order", "as fits", "cpu slots", "half GPUs", "tenths", "not wanted", "nothing owed", "runs already"],
)
def test_servers_start_in_plan_order_as_resources_allow(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


def test_no_smaller_server_overtakes_one_that_waits_for_gpus() -> None:
    assert decided(view(server("big", gpus=4), server("small"), free_gpus=2)) == []


def test_a_server_that_waits_for_gpus_holds_up_no_cpu_server() -> None:
    seen = view(server("big", gpus=4), server("tiny", gpus=0), free_gpus=2, free_cpu_servers=1)
    assert decided(seen) == ["start tiny"]


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", replicas=3), server("b"), free_gpus=4), ["start a", "start b", "start a", "start a"]),
        (view(server("a", replicas=3), server("b"), free_gpus=2), ["start a", "start b"]),
        (view(server("a", replicas=2, lives=("a-0",)), free_gpus=4), ["start a"]),
        (view(server("a", replicas=None, unfinished_cells=2), free_gpus=8), ["start a", "start a"]),
        (view(server("a", replicas=3, lives=("a-0",)), server("b", gpus=2), free_gpus=1), []),
    ],
    ids=["others first", "none spare", "the second", "auto: one a cell", "not before another's first"],
)
def test_spare_gpus_go_to_replicas_once_every_wanted_server_has_one(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", resting=True), free_gpus=1), []),
        (view(server("a", resting=True), server("b"), free_gpus=1), []),
        (view(server("a", resting=True), server("b"), free_gpus=2), ["start b"]),
        (view(server("a", resting=True, wanted=False), server("b"), free_gpus=1), []),
        (view(server("a", resting=True, unfinished_cells=0), server("b"), free_gpus=1), ["start b"]),
        (view(server("a", gpus=2, resting=True), server("b"), free_gpus=1), []),
        (view(server("a", gpus=0, resting=True), server("b"), free_gpus=1, free_cpu_servers=1), ["start b"]),
        (view(server("a", resting=True, lives=("a-0",), replicas=2), server("b"), free_gpus=1), ["start b"]),
        (view(server("a", resting=True), server("b", replicas=2, lives=("b-0",)), free_gpus=1), []),
        (view(server("a", resting=True), server("b", lives=("b-0",), unfinished_cells=0), free_gpus=0), ["retire b-0"]),
    ],
    ids=[
        "not yet",
        "its place is kept",
        "the rest is free",
        "kept though nobody asked",
        "not for a model that has failed",
        "kept though it is not free",
        "its own kind only",
        "a replica's place is not",
        "not given to replicas",
        "others retire",
    ],
)
def test_what_a_resting_server_needs_stays_free_for_it(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (view(server("a", external=True)), ["start a"]),
        (view(server("a", external=True, gpus=0)), ["start a"]),
        (view(server("big", gpus=4), server("a", external=True), free_gpus=2), ["start a"]),
        (view(server("a", external=True), server("b"), free_gpus=1), ["start b", "start a"]),
        (view(server("a", external=True, lives=("a-0",))), []),
        (view(server("a", external=True, resting=True)), []),
        (view(server("a", external=True, wanted=False)), []),
        (view(server("a", external=True, lives=("a-0",), unfinished_cells=0)), ["retire a-0"]),
    ],
    ids=["no GPU", "no slot", "waits for nobody", "takes nothing", "once", "resting", "not wanted", "retires"],
)
def test_a_server_that_someone_else_runs_costs_nothing(seen: View, expected: list[str]) -> None:
    assert decided(seen) == expected


def test_a_server_without_unfinished_cells_is_retired_with_all_its_replicas() -> None:
    seen = view(server("a", unfinished_cells=0, lives=("a-0", "a-1"), wanted=False), server("b", lives=("b-0",)))
    assert decided(seen) == ["retire a-0", "retire a-1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"idle_evaluators": 2}, ["run a/1", "run b/1"]),
        ({"idle_evaluators": 9}, ["run a/1", "run b/1", "run a/2", "run b/2"]),
        ({"idle_evaluators": 9, "running_by_server": {"a": CELLS_PER_MODEL}}, ["run b/1", "run b/2"]),
        ({"idle_evaluators": 1, "running_by_server": {"a": 1}}, ["run b/1"]),
        ({"idle_evaluators": 0}, []),
        ({"idle_evaluators": 9, "waiting": waiting("a/1", can_start=False)}, []),
    ],
)
def test_idle_evaluators_take_cells_of_the_least_loaded_server(changes: dict[str, object], expected: list[str]) -> None:
    cells = waiting("a/1", "a/2", "a/3", "b/1", "b/2", "b/3")
    seen = view(server("a", lives=("a-0",)), server("b", lives=("b-0",)), waiting=cells)
    assert decided(replace(seen, **changes)) == expected  # type: ignore[arg-type]


def test_a_model_with_two_servers_runs_twice_as_many_cells() -> None:
    cells = waiting(*(f"a/{n}" for n in range(9)))
    seen = view(server("a", lives=("a-0", "a-1"), replicas=2), waiting=cells, idle_evaluators=9)
    assert len(decided(seen)) == 2 * CELLS_PER_MODEL


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
    count: int = 0

    def of(self, name: str, cells: Iterable[str]) -> list[str]:
        return [key for key in cells if key.partition("/")[0] == name]

    def view(self) -> View:
        def lives(name: str) -> tuple[str, ...]:
            return tuple(life for life, owner in self.lives.items() if owner == name)

        servers = [
            replace(
                known,
                lives=lives(name),
                resting=name in self.rests,
                unfinished_cells=len(self.of(name, [*self.waiting, *self.running])),
                wanted=any(not self.waiting[key] for key in self.of(name, self.waiting))
                or any(self.running[key] for key in self.of(name, self.running)),
            )
            for name, known in self.servers.items()
        ]
        # As the runner does.
        servers.sort(key=lambda seen: not (seen.resting or self.of(seen.name, self.running)))
        holders = [self.servers[owner] for owner in [*self.lives.values(), *self.dying.values()]]
        ours = [known for known in holders if not known.external]
        return View(
            servers=tuple(servers),
            waiting=tuple(
                CellView(key=key, server=(owner := key.partition("/")[0]), can_start=stored or bool(lives(owner)))
                for key, stored in self.waiting.items()
            ),
            running_by_server={name: len(self.of(name, self.running)) for name in self.servers},
            free_gpus=self.gpus - sum(known.gpus for known in ours),
            free_cpu_servers=self.slots - sum(not known.gpus for known in ours),
            idle_evaluators=self.evaluators - len(self.running),
        )

    def step(self, chance: Random, *, losses: bool) -> None:
        for action in schedule(self.view()):
            match action:
                case StartServer(server=name):
                    assert name not in self.rests
                    self.lives[f"{name}-{self.count}"] = name
                    self.count += 1
                case RetireServer(life=life):
                    del self.lives[life]
                case RunCell(cell=key):
                    self.running[key] = not self.waiting.pop(key)
        seen = self.view()
        assert seen.free_gpus >= -1e-3
        assert seen.free_cpu_servers >= 0
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


@settings(max_examples=300)
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
            f"s{n}": server(f"s{n}", gpus=needs, replicas=replicas, external=external)
            for n, (needs, replicas, _, external) in enumerate(servers)
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
