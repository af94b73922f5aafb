"""Sweeps on a simulated cluster: times that can be worked out by hand, deaths, and how good the decisions are."""

import math
import statistics
from functools import partial

import pytest

from bench import schedule as bench
from sweep.running.costs import corrected_s, in_order
from sweep.running.inventory import Need, Node
from sweep.running.restarts import BACKOFF_S
from sweep.running.schedule import schedule
from sweep.running.simulate import REDONE_S, STOP_S, Outcome, SimulatedCell, SimulatedServer, StuckError, simulate

START_S = 10.0


def model(name: str, *costs_s: float, gpus: float = 1, replicas: int | None = 1, **more: object) -> SimulatedServer:
    cells = tuple(
        SimulatedCell(key=f"{name}/{n}", expected_s=cost_s, true_s=cost_s) for n, cost_s in enumerate(costs_s)
    )
    known = {"start_s": START_S, "starts_s": lambda _: START_S, **more}
    return SimulatedServer(name=name, need=Need(gpus=gpus), replicas=replicas, cells=cells, **known)  # type: ignore[arg-type]


def on(gpus: int, *servers: SimulatedServer, nodes: int = 1, evaluators: int = 16) -> Outcome:
    return simulate([Node(name=f"n{n}", gpus=gpus, evaluators=evaluators) for n in range(nodes)], servers)


@pytest.mark.parametrize(
    ("outcome", "makespan_s"),
    [
        (on(1, model("a", 100)), START_S + 100),
        (on(1, model("a", 100, 100, 100)), START_S + 300),
        (on(1, model("a", 100), model("b", 50)), 2 * START_S + STOP_S + 150),
        (on(2, model("a", 100), model("b", 50)), START_S + 100),
        (on(2, model("a", 100, replicas=None)), START_S + 50),
        (on(8, model("a", 100, replicas=2)), START_S + 50),
        (on(2, model("a", 100, gpus=2)), START_S + 100),
        (on(1, model("a", 100, starts_s=lambda _: 30.0)), 130),
        (on(2, model("a", 100, replicas=None, starts_s=lambda life: 30.0 if life else 10.0)), (10 + 30 + 100) / 2),
    ],
    ids=[
        "one cell",
        "several share it",
        "models take turns",
        "or run beside each other",
        "a cell is spread over replicas",
        "of which there are no more than allowed",
        "several GPUs make one server",
        "a start may take longer than expected",
        "a replica joins the running cell",
    ],
)
def test_a_sweep_takes_its_starts_and_its_work_over_its_servers(outcome: Outcome, makespan_s: float) -> None:
    assert outcome.makespan_s == pytest.approx(makespan_s)


def test_gpus_of_a_model_that_is_done_go_to_the_one_with_most_left() -> None:
    outcome = on(2, model("a", 1000, replicas=None), model("b", 100))
    # At 110 b is done, at 112 its GPU is free, from 122 on it helps with the 888 that are left.
    assert outcome.makespan_s == pytest.approx(122 + 888 / 2)
    assert [
        (span.server, span.places) for span in sorted(outcome.spans, key=lambda span: (span.start_s, span.server))
    ] == [
        ("a", (("n0", (0,)),)),
        ("b", (("n0", (1,)),)),
        ("a", (("n0", (1,)),)),
    ]


@pytest.mark.parametrize(("hope", "lives"), [(0.1, 3), (1.0, 2)])
def test_a_start_that_is_only_hoped_to_pay_is_made_where_hope_allows_it(hope: float, lives: int) -> None:
    nodes = [Node(name="n", gpus=2, evaluators=4)]
    # From 102 on b's GPU is free, and a has 8 s left: less than a start.
    outcome = simulate(nodes, [model("a", 100, replicas=None), model("b", 90)], decide=partial(schedule, hope=hope))
    assert outcome.makespan_s == pytest.approx(START_S + 100)
    assert [span.ready_s is None for span in outcome.spans].count(True) == lives - 2
    assert len(outcome.spans) == lives


def test_gpu_seconds_are_those_that_servers_hold() -> None:
    outcome = on(4, model("a", 100, gpus=2))
    assert outcome.gpu_s == pytest.approx(2 * (START_S + 100 + STOP_S))
    (span,) = outcome.spans
    assert (span.start_s, span.ready_s, span.end_s) == pytest.approx((0, START_S, START_S + 100 + STOP_S))


def test_a_server_that_dies_is_started_again_and_only_what_it_held_is_done_twice() -> None:
    outcome = on(1, model("a", 100, dies_after_s=lambda life: math.inf if life else START_S + 60))
    assert outcome.makespan_s == pytest.approx(START_S + 60 + max(STOP_S, BACKOFF_S) + START_S + 40 + REDONE_S)
    assert len(outcome.spans) == 2


def test_a_server_that_dies_while_it_starts_costs_its_start() -> None:
    outcome = on(1, model("a", 100, dies_after_s=lambda life: math.inf if life else 4.0))
    assert outcome.makespan_s == pytest.approx(4 + max(STOP_S, BACKOFF_S) + START_S + 100)


def test_evaluators_limit_how_many_models_are_worked_on() -> None:
    outcome = on(2, model("a", 100), model("b", 100), evaluators=1)
    assert outcome.makespan_s == pytest.approx(START_S + 200)


def test_the_first_result_comes_from_the_shortest_cell() -> None:
    cells = (
        SimulatedCell(key="long", expected_s=100, true_s=100),
        SimulatedCell(key="short", expected_s=1, true_s=1),
        SimulatedCell(key="longer", expected_s=200, true_s=200),
    )
    assert [cell.key for cell in in_order(cells, lambda cell: cell.expected_s)] == ["short", "longer", "long"]
    assert in_order([], lambda cell: 0.0) == []


def test_equals_keep_their_order() -> None:
    assert in_order("abc", lambda _: 1.0) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("done_s", "spent_s", "left_s"), [(0, 0, 100), (1e9, 2e9, 200), (1e9, 0.5e9, 50), (30, 120, 200), (0, 120, 1e4)]
)
def test_what_is_left_is_corrected_by_what_was_spent_the_more_the_more_there_is_of_it(
    done_s: float, spent_s: float, left_s: float
) -> None:
    assert corrected_s(100, done_s=done_s, spent_s=spent_s) == pytest.approx(left_s, rel=1e-3)


def test_a_sweep_that_cannot_go_on_says_so() -> None:
    with pytest.raises(StuckError, match="1 cells are left and nothing happens any more"):
        on(1, model("a", 100, gpus=2))


# How good the decisions are: a part of what `python -m bench.schedule` prints.


def test_the_bound_is_what_can_be_worked_out_by_hand() -> None:
    nodes = bench.cluster(2)
    # 200 s of work and the start of the second server that they need in less than 210 s.
    assert bench.bound_s(bench.Sweep(nodes=nodes, servers=(model("a", 200, replicas=None),))) == pytest.approx(
        110, 1e-3
    )
    two = (model("a", 100, replicas=None), model("b", 100, replicas=None))
    assert bench.bound_s(bench.Sweep(nodes=nodes, servers=two)) == pytest.approx(110, 1e-3)
    wide = (model("a", 100, gpus=2), model("b", 50))
    assert bench.bound_s(bench.Sweep(nodes=nodes, servers=wide)) == pytest.approx((220 + 60) / 2, 1e-3)


def test_simulated_sweeps_come_near_the_bound_and_never_below() -> None:
    ratios = {}
    for seed in range(12):
        sweep = bench.drawn(seed)
        ratios[seed] = simulate(sweep.nodes, sweep.servers).makespan_s / bench.bound_s(sweep)
    assert min(ratios.values()) >= 1
    assert max(ratios.values()) < 1.3, ratios
    assert statistics.median(ratios.values()) < 1.08, ratios


def test_a_seed_gives_the_same_sweep_and_the_same_outcome_every_time() -> None:
    first, again = (simulate(sweep.nodes, sweep.servers) for sweep in (bench.drawn(4), bench.drawn(4)))
    assert first.spans == again.spans
    assert first.makespan_s == again.makespan_s


def test_each_draw_of_a_sweep_expects_the_same_and_comes_to_something_else() -> None:
    first, second, third = (bench.drawn_again(4, draw) for draw in range(3))
    assert first.nodes == second.nodes == third.nodes

    def costs(sweep: bench.Sweep, which: str) -> list[float]:
        return [getattr(cell, which) for server in sweep.servers for cell in server.cells]

    assert costs(first, "expected_s") == costs(second, "expected_s") == costs(third, "expected_s")
    assert costs(first, "true_s") == costs(bench.drawn(4), "true_s")
    starts = {tuple(server.starts_s(0) for server in sweep.servers) for sweep in (first, second, third)}
    assert len(starts) == len({tuple(costs(sweep, "true_s")) for sweep in (first, second, third)}) == 3


def test_a_rival_that_waits_for_ever_never_ends() -> None:
    stuck = bench.Sweep(nodes=bench.cluster(1), servers=(model("a", 100, gpus=2),))
    assert bench.rival(stuck, bench.longest_first) == (math.inf, math.inf)


def test_means_are_over_all_draws_of_each_sweep() -> None:
    ratios, single = {}, []
    for seed in (3, 5):
        sweeps = [bench.drawn_again(seed, draw) for draw in range(2)]
        theirs = [bench.rival(sweep, bench.longest_first)[0] for sweep in sweeps]
        ours = [simulate(sweep.nodes, sweep.servers).makespan_s for sweep in sweeps]
        ratios[seed] = sum(theirs) / sum(ours)
        single += [their_s / our_s for their_s, our_s in zip(theirs, ours, strict=True)]
    figure = bench.in_the_mean([3, 5], 2)
    assert figure.value == pytest.approx(min(ratios.values()))
    assert figure.seen["seed"] == min(ratios, key=lambda seed: round(ratios[seed], 9))
    assert figure.seen["draw_least"] == pytest.approx(min(single))
    assert figure.seen["draws_stuck"] == 0


def test_shares_of_draws_and_a_rival_that_is_stuck_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By turns it takes 0.9, 0.97 and 1.2 times as long as we, and for ever: the mean is of the draws that end."""
    times = iter((0.9, 0.97, 1.2, math.inf))

    def rival(sweep: bench.Sweep, _: object) -> tuple[float, float]:
        return next(times) * simulate(sweep.nodes, sweep.servers).makespan_s, 0.0

    monkeypatch.setattr(bench, "rival", rival)
    ours = [simulate(sweep.nodes, sweep.servers).makespan_s for sweep in (bench.drawn_again(3, d) for d in range(3))]
    figure = bench.in_the_mean([3], 4)
    assert figure.value == pytest.approx((0.9 * ours[0] + 0.97 * ours[1] + 1.2 * ours[2]) / sum(ours))
    assert figure.seen["draws_stuck"] == 1
    assert figure.seen["draws_shorter_by_over_1_percent"] == 0.5
    assert figure.seen["draws_shorter_by_over_5_percent"] == 0.25
