"""Which calls travel together, what goes first, and where families stay."""

import time
from collections import Counter
from dataclasses import dataclass

import pytest

from sweep.evaluating.dispatch import FAMILY_LEAST, PREFIX_LEAST, TOKENS_MOST, Queue, common_length


@dataclass(frozen=True)
class Ask:
    number: int
    group: str | None = "g"
    prefix: tuple[int, ...] | None = None
    tokens: int = 2


def family(first: int, size: int, head: int, length: int = PREFIX_LEAST) -> list[Ask]:
    return [Ask(first + i, prefix=(*[head] * length, first + i)) for i in range(size)]


def numbers(queue: Queue, endpoint: str, most: int) -> list[int]:
    return [queued.call.number for queued in queue.take(endpoint, most)]


def test_calls_of_a_group_share_a_request_and_others_do_not() -> None:
    queue = Queue([Ask(0), Ask(1), Ask(2), Ask(3, group="h"), Ask(4, group=None), Ask(5, group=None)])
    assert [numbers(queue, "s", 2) for _ in range(6)] == [[0, 1], [2], [3], [4], [5], []]
    assert not queue


def test_a_request_is_no_longer_than_a_proxy_takes() -> None:
    queue = Queue([Ask(i, tokens=TOKENS_MOST // 3) for i in range(5)] + [Ask(5, tokens=2 * TOKENS_MOST)])
    assert [numbers(queue, "s", 9) for _ in range(3)] == [[0, 1, 2], [3, 4], [5]]


def test_thousands_of_families_are_no_more_work_each_than_a_few() -> None:
    def seconds(families: int) -> float:
        queue = Queue(call for head in range(families) for call in family(4 * head, 4, head))
        queue.take("slow", 4)  # and never answers, so that its family stays in front
        start = time.process_time()
        while calls := queue.take("s", 4):
            queue.done("s", calls)
        return time.process_time() - start

    assert seconds(4000) < 8 * seconds(1000) + 0.2


def test_one_of_a_common_prefix_goes_first_and_the_others_when_it_is_back() -> None:
    queue = Queue(family(0, 6, head=1))
    first = queue.take("s", 4)
    assert [queued.call.number for queued in first] == [0]
    assert (len(queue), numbers(queue, "s", 4)) == (5, [])
    queue.done("s", first)
    assert [numbers(queue, "s", 4), numbers(queue, "s", 4)] == [[1, 2, 3, 4], [5]]


def test_while_a_prefix_is_computed_the_next_one_is_begun() -> None:
    queue = Queue([*family(0, 5, head=1), *family(5, 5, head=2), Ask(10)])
    one, two = queue.take("s", 4), queue.take("s", 4)
    assert [q.call.number for q in (*one, *two)] == [0, 5]
    assert numbers(queue, "s", 4) == [10]
    queue.done("s", two)
    assert numbers(queue, "s", 4) == [6, 7, 8, 9]


def test_families_stay_at_their_endpoint_while_others_have_work_of_their_own() -> None:
    queue = Queue([*family(0, 9, head=1), *family(9, 9, head=2)])
    at_a, at_b = queue.take("a", 4), queue.take("b", 4)
    queue.done("a", at_a)
    queue.done("b", at_b)
    assert [numbers(queue, "a", 4), numbers(queue, "b", 4)] == [[1, 2, 3, 4], [10, 11, 12, 13]]
    assert [numbers(queue, "b", 8), numbers(queue, "a", 2)] == [[14, 15, 16, 17], [5, 6]]
    # b has nothing of its own left: it computes the other prefix too, with one call first.
    assert numbers(queue, "b", 8) == [7]


def test_what_comes_back_goes_first_and_alone_to_whoever_asks() -> None:
    queue = Queue([*family(0, 6, head=1), Ask(6), Ask(7)])
    first, rest = queue.take("a", 4), queue.take("a", 4)
    queue.back("a", first)
    queue.back("a", rest)
    assert len(queue) == 8
    assert [numbers(queue, "b", 4) for _ in range(3)] == [[0], [6], [7]]
    assert numbers(queue, "b", 4) == [1]


@pytest.mark.parametrize(
    "calls",
    [
        family(0, FAMILY_LEAST - 1, head=1),
        family(0, 8, head=1, length=PREFIX_LEAST - 1),
        [Ask(i, prefix=None) for i in range(8)],
    ],
    ids=["too few", "too short", "nothing to keep"],
)
def test_small_families_do_not_wait(calls: list[Ask]) -> None:
    assert numbers(Queue(calls), "s", 8) == [call.number for call in calls]


def test_a_long_prefix_within_a_shorter_one_has_a_family_of_its_own() -> None:
    """A system prompt is common to all subjects, and each has its examples behind it."""
    calls = [Ask(10 * s + i, prefix=(*[0] * 100, *[s + 1] * 300, i)) for s in range(3) for i in range(5)]
    queue = Queue(calls)
    assert [numbers(queue, "s", 8) for _ in range(4)] == [[0], [10], [20], []]


def test_every_call_is_taken_once_whatever_fails() -> None:
    queue = Queue([*family(0, 30, head=1), *(Ask(i) for i in range(30, 50)), *family(50, 30, head=2)])
    taken: Counter[int] = Counter()
    flight = []
    for step in range(1000):
        endpoint = "abc"[step % 3]
        if calls := queue.take(endpoint, 4):
            flight.append((endpoint, calls))
        if len(flight) > 5 or not calls:
            if not flight:
                break
            where, back = flight.pop(0)
            if step % 7 == 0:
                queue.back(where, back)
            else:
                queue.done(where, back)
                taken.update(queued.call.number for queued in back)
    assert taken == Counter(range(80))


def test_the_common_length_is_found_and_guessed() -> None:
    assert common_length((1, 2, 3), (1, 2, 4, 5)) == 2
    assert common_length((1, 2, 3), (1, 2, 3, 5)) == 3
    assert common_length((1, 2, 3), (1, 2, 3, 5), 2) == 2
    assert common_length((9, 2), (1, 2), 1) == 0
    assert common_length((), (1,)) == 0
