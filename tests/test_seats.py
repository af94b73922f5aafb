"""Room for evaluators: where, how many, and what becomes of it when nodes come and go."""

from sweep.running.inventory import Node
from sweep.running.restarts import BACKOFF_S
from sweep.running.seats import Seats


def nodes(**evaluators: int) -> list[Node]:
    return [Node(name=name, evaluators=number) for name, number in evaluators.items()]


def fill(seats: Seats, here: list[Node], most: int, now_s: float = 0.0) -> list[str]:
    """Where evaluators are started; each is called after its node and its number there."""
    found = []
    for seat in seats.due(here, most, now_s):
        seat.evaluator = f"{seat.node}{sum(place == seat.node for place in found)}"
        found.append(seat.node)
    return found


def test_evaluators_are_spread_over_the_nodes() -> None:
    assert fill(Seats(), nodes(a=4, b=2, c=0), 5) == ["a", "b", "a", "b", "a"]
    assert fill(Seats(), nodes(a=1, b=1), 5) == ["a", "b"]


def test_a_node_that_joins_brings_seats() -> None:
    seats = Seats()
    assert fill(seats, nodes(a=1), 3) == ["a"]
    assert fill(seats, nodes(a=1, b=4), 3) == ["b", "b"]


def test_a_lost_nodes_seats_are_gone_with_their_evaluators_and_others_take_their_place() -> None:
    seats = Seats()
    fill(seats, nodes(a=2, b=2), 2)
    lost = seats.of("a0")
    assert lost is not None
    assert fill(seats, nodes(b=2), 2) == []  # it may yet be heard of
    lost.evaluator = None
    assert fill(seats, nodes(b=2), 2) == ["b"]
    assert len(seats) == 2


def test_a_seat_rests_after_a_loss() -> None:
    seats = Seats()
    fill(seats, nodes(a=1), 1)
    seat = seats.of("a0")
    assert seat is not None
    seat.evaluator, seat.restarts = None, seat.restarts.lost(10.0)
    assert fill(seats, nodes(a=1), 1, 10.0) == []
    assert fill(seats, nodes(a=1), 1, 10.0 + BACKOFF_S) == ["a"]


def test_a_seat_that_is_given_up_is_not_made_again_and_other_nodes_go_on() -> None:
    seats = Seats()
    fill(seats, nodes(a=1, b=1), 2)
    seat = seats.of("a0")
    assert seat is not None
    seats.give_up(seat)
    assert fill(seats, nodes(a=1, b=1), 2) == []
    assert fill(seats, nodes(a=1, b=2), 2) == ["b"]


def test_only_evaluators_without_work_on_nodes_that_answer_get_some() -> None:
    seats = Seats()
    fill(seats, nodes(a=2, b=1), 3)
    work = {"a0": None, "b0": None}  # a1 has yet to start
    assert seats.idle(work, nodes(a=2, b=1)) == ["a0", "b0"]
    assert seats.idle(work, nodes(b=1)) == ["b0"]
    assert seats.idle({**work, "b0": "m/t"}, nodes(a=2, b=1)) == ["a0"]


def test_evaluators_elsewhere_are_those_of_other_nodes_and_all_where_there_is_no_other() -> None:
    seats = Seats()
    fill(seats, nodes(a=1, b=1), 2)
    assert [seats.node_of(name) for name in ("a0", "b0", "gone")] == ["a", "b", ""]
    assert seats.elsewhere(["a0", "b0"], []) == ["a0", "b0"]
    assert seats.elsewhere(["a0", "b0"], ["a"]) == ["b0"]
    assert seats.elsewhere(["a0"], ["a"]) == []  # one is coming back there
    assert seats.elsewhere(["a0"], ["a", "b"]) == ["a0"]
