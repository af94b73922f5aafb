"""How a server's limit is found and shared: tables, simulated servers with a known knee, and leases under any order."""

import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.evaluating.concurrency import (
    LOOK_S,
    Controller,
    Leases,
    Load,
    Need,
    automatic_limit,
    figures,
    shares,
)
from sweep.serving.metrics import Snapshot

MANY = 10**6

# A server with a known knee


@dataclass(frozen=True)
class Work:
    """What the requests of some work are on average."""

    prompt: int = 100
    generated: int = 32
    """Tokens that are written, each of which costs what a hundred of the prompt do."""


GENERATION, SCORING = Work(), Work(prompt=800, generated=1)


@dataclass(kw_only=True)
class Asked:
    work: Work
    cost: float
    """In tokens written."""
    began: float = 0.0
    """`Simulated.served` when it came into the batch."""
    runs: bool = False


@dataclass(kw_only=True)
class Simulated:
    """A server that batches up to `places` sequences and gains by each of them up to the `knee`; time is its own.

    `knee` sequences together compute `knee * speed` tokens per second, and more no more. The client hears of an answer,
    and sends what follows, a round trip later.
    """

    knee: int
    places: int = 1024
    speed: float = 64.0
    noise: float = 0.0
    """Standard deviation of half a second's speed."""
    cache_tokens: float = math.inf
    """Room of the KV cache; where it is exceeded the newest sequence loses what it has and waits again."""
    work: Work = GENERATION
    now_s: float = 0.0
    done: float = 0.0
    """Tokens computed that were not in vain."""
    finished: int = 0
    prompt_tokens: int = 0
    generation_tokens: float = 0.0
    preemptions: int = 0
    served: float = 0.0
    """What each sequence of the batch has got since the beginning of all."""
    waiting: deque[Asked] = field(default_factory=deque)
    batch: list[Asked] = field(default_factory=list)
    """The newest last; those that have ended leave later."""
    running: int = 0
    ends: list[tuple[float, int, Asked]] = field(default_factory=list)
    """(`served` at the end, number, sequence), a heap."""
    on_the_way: deque[tuple[float, int]] = field(default_factory=deque)
    """(time, answers): when the client will have heard."""
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    STEP_S = 0.02
    ROUND_TRIP_S = 0.03

    def __post_init__(self) -> None:
        self._pace, self._number, self._held = 1.0, 0, 0.0

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + self.running + sum(count for _, count in self.on_the_way)

    def best(self) -> float:
        """Tokens computed per second at most."""
        return min(self.knee, self.places) * self.speed

    def used(self) -> float:
        """Tokens in the KV cache."""
        return self.running * self.served + self._held

    def run(self, seconds: float, limit: int, wanted: int = MANY) -> None:
        """Time passes with clients that keep as many in flight as they may and want to."""
        if self.noise:
            self._pace = max(0.3, self.chance.gauss(1, self.noise))
        for _ in range(round(seconds / self.STEP_S)):
            while self.on_the_way and self.on_the_way[0][0] <= self.now_s:
                self.on_the_way.popleft()
            for _ in range(min(limit, wanted) - self.in_flight):
                average = self.work.generated + self.work.prompt / 100
                self.waiting.append(Asked(work=self.work, cost=average * self.chance.uniform(0.5, 1.5)))
            self._step()
            self.now_s += self.STEP_S

    def _step(self) -> None:
        left = self.STEP_S
        while True:
            while self.waiting and self.running < self.places and self.used() < self.cache_tokens:
                self._admit(self.waiting.popleft())
            while self.used() > self.cache_tokens and self.running > 1:
                self._preempt()
            if not self.running:
                return
            while not self.ends[0][2].runs or self.ends[0][0] != self.ends[0][2].began + self.ends[0][2].cost:
                heapq.heappop(self.ends)
            pace = self.speed * min(1.0, self.knee / self.running) * self._pace
            step_s = min(left, (self.ends[0][0] - self.served) / pace)
            self.served += pace * step_s
            self.done += self.running * pace * step_s
            generated = self.work.generated / (self.work.generated + self.work.prompt / 100)
            self.generation_tokens += self.running * pace * step_s * generated
            left -= step_s
            if left <= 1e-9:
                return
            ended = heapq.heappop(self.ends)[2]
            self._leave(ended)
            self.finished += 1
            self.on_the_way.append((self.now_s + self.ROUND_TRIP_S, 1))

    def _admit(self, sequence: Asked) -> None:
        sequence.began, sequence.runs = self.served, True
        self.running += 1
        self._held += sequence.work.prompt - self.served
        self._number += 1
        self.prompt_tokens += sequence.work.prompt
        self.batch.append(sequence)
        heapq.heappush(self.ends, (self.served + sequence.cost, self._number, sequence))

    def _leave(self, sequence: Asked) -> None:
        sequence.runs = False
        self.running -= 1
        self._held -= sequence.work.prompt - sequence.began

    def _preempt(self) -> None:
        while not self.batch[-1].runs:
            self.batch.pop()
        newest = self.batch.pop()
        self._leave(newest)
        self.done -= self.served - newest.began
        self.preemptions += 1
        self.waiting.appendleft(newest)

    def look(self) -> Snapshot:
        return Snapshot(
            running=self.running,
            waiting=len(self.waiting),
            kv_cache_use=min(1.0, self.used() / self.cache_tokens),
            preemptions=self.preemptions,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=int(self.generation_tokens),
            finished=self.finished,
        )


@dataclass
class Drive:
    """A controller at a simulated server; `limits` and `rates` (tokens per second) have an entry for each look."""

    server: Simulated
    controller: Controller
    limits: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def __call__(self, seconds: float, wanted: int = MANY) -> "Drive":
        for _ in range(round(seconds / LOOK_S)):
            before = self.server.done
            self.server.run(LOOK_S, self.controller.limit, wanted)
            self.rates.append((self.server.done - before) / LOOK_S)
            self.controller.look(now_s=self.server.now_s, seen=self.server.look(), wanted=wanted)
            self.limits.append(self.controller.limit)
        return self

    def share(self, seconds: float) -> float:
        """Throughput of the last seconds, of the best."""
        looks = round(seconds / LOOK_S)
        return sum(self.rates[-looks:]) / looks / self.server.best()


def drive(start: int, knee: int, **settings: Any) -> Drive:
    return Drive(Simulated(knee=knee, **settings), Controller(start))


COLD = [(start, knee) for start in (1, 1024) for knee in (1, 4, 32, 256)]


def moved(limits: list[int]) -> bool:
    """Whether a limit went further than 15 % from its middle, or than one sequence where that is less."""
    middle = (min(limits) + max(limits)) / 2
    return max(limits) - middle > max(1.0, 0.15 * middle)


@pytest.mark.parametrize("work", [GENERATION, SCORING], ids=["generation", "scoring"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(("start", "knee"), COLD)
def test_the_knee_is_found_within_ten_seconds_and_held(start: int, knee: int, noise: float, work: Work) -> None:
    run = drive(start, knee, places=256, noise=noise, work=work)(10)
    assert run.share(2) >= 0.95 - 2 * noise / 4  # four looks
    run(50)
    assert run.share(40) >= 0.95
    assert not moved(run.limits[20:]), run.limits


@pytest.mark.parametrize("places", [1, 4, 32, 256])
def test_a_batch_that_is_full_shows_in_its_queue_and_the_queue_stays_short(places: int) -> None:
    for start in (1, 1024):
        run = drive(start, 1024, places=places)(20)
        assert run.share(2) >= 0.95
        reserve = max(4, places / 4, run.server.best() / 33)
        assert run.controller.limit <= places + 2.2 * reserve
        # At the slow ones a thousand that were sent take longer.
        assert run.server.look().waiting <= 2.2 * reserve or start > 16 * places


def test_it_works_where_the_best_number_was_found_by_trying_them_all() -> None:
    """With a round trip between answer and next request, the best fixed number is above the knee."""
    fixed = [
        Drive(Simulated(knee=32, noise=0.05), Controller(n, fixed=True))(60).share(40) for n in (1, 4, 16, 64, 256)
    ]
    assert drive(40, 32, noise=0.05)(60).share(40) >= 0.95 * max(fixed)


def test_evaluators_that_come_and_go_leave_the_limit_where_it_is() -> None:
    run = drive(40, 64, noise=0.03)(20)
    settled = run.controller.settled
    assert run.share(4) >= 0.95
    for wanted in (3, MANY, 0, MANY, settled // 2, MANY):
        run(7, wanted=wanted)
    assert not moved([settled, run.controller.settled])
    assert run.share(4) >= 0.95


@pytest.mark.parametrize("wanted", [0, 8, 39])
def test_too_little_demand_says_nothing_about_the_limit(wanted: int) -> None:
    run = drive(40, 200)(60, wanted=wanted)
    assert set(run.limits) == {40}
    run(15)
    assert run.share(2) >= 0.95


def test_a_demand_that_is_used_up_is_the_most_that_is_tried() -> None:
    run = drive(40, 400)(60, wanted=70)
    assert max(run.limits) == 70


def test_other_work_is_searched_for_anew() -> None:
    run = drive(40, 16, work=SCORING)(20)
    assert run.share(4) >= 0.95
    assert run.controller.settled < 100
    run.server.work, run.server.knee = GENERATION, 256
    run(25)
    assert run.share(5) >= 0.95
    run.server.work, run.server.knee = SCORING, 16
    run(10)
    assert run.share(5) >= 0.95
    assert run.server.waiting or run.server.running <= 1.2 * run.controller.limit


def test_preemptions_end_and_the_cache_is_used() -> None:
    # 116 tokens a sequence on average: 43 have room, and each of them counts.
    run = drive(320, 256, places=256, cache_tokens=5000)(30)
    before = run.server.preemptions
    run(60)
    assert run.server.preemptions - before <= 6
    room = 5000 / 116
    assert run.rates[-1] > 0
    assert sum(run.rates[-60:]) / 60 >= 0.8 * room * run.server.speed
    assert not moved(run.limits[-120:]), run.limits


def test_a_cache_that_is_nearly_full_stops_the_search() -> None:
    run = drive(40, 256, cache_tokens=10_000)(30)
    assert run.server.preemptions <= 10
    assert 70 <= run.controller.limit <= 86


def test_the_next_life_of_a_server_begins_where_the_last_one_settled() -> None:
    first = drive(1, 100)(20)
    second = drive(first.controller.settled, 100)(2)
    assert second.share(1) >= 0.95
    second(30)
    assert not moved([first.controller.settled, second.controller.settled])


def test_another_server_behind_the_same_address_is_no_loss_of_throughput() -> None:
    run = drive(40, 64)(20)
    settled = run.controller.settled
    run.server.finished = run.server.prompt_tokens = 0
    run.server.generation_tokens = 0.0
    run(20)
    assert not moved([settled, run.controller.settled])


def test_a_number_of_the_users_never_moves() -> None:
    run = Drive(Simulated(knee=4, cache_tokens=1000), Controller(32, fixed=True))(30)
    assert run.server.preemptions
    assert set(run.limits) == {32}
    assert run.controller.look(now_s=99, seen=None, wanted=9, refused=9) == 32


def test_refusals_lower_the_limit_once_in_a_while_and_without_a_word_of_the_server_it_comes_back() -> None:
    controller = Controller(40)
    limits = [controller.look(now_s=second, seen=None, wanted=100, refused=2) for second in range(12)]
    assert limits == [30] * 5 + [22] * 5 + [16] * 2
    for second in range(12, 30):
        assert controller.look(now_s=second, seen=None, wanted=100) == 16  # calm for a while
    for second in range(30, 200):
        controller.look(now_s=second, seen=None, wanted=100)
    assert controller.limit == 40


def test_a_look_that_fails_changes_nothing() -> None:
    run = drive(40, 1024, places=8)(10)
    settled = run.controller.limit
    assert settled < 40
    for second in range(60):
        assert run.controller.look(now_s=run.server.now_s + second, seen=None, wanted=MANY) == settled


def test_a_server_that_tells_nothing_keeps_what_it_began_with() -> None:
    controller = Controller(40)
    assert {controller.look(now_s=second, seen=None, wanted=100) for second in range(100)} == {40}


# Where it begins, and how it is shared


def test_a_guess_is_sent_in_full_once_the_server_shows_no_long_queue() -> None:
    run = Drive(Simulated(knee=256, places=256), Controller(320, guessed=True))
    assert (run.controller.limit, run.controller.settled) == (80, 320)
    run(1)
    assert run.limits[0] == 80  # nothing to compare with yet
    assert run.controller.limit == 320
    assert run(9).share(8) >= 0.95


def test_a_guess_stays_small_where_the_first_part_of_it_waits() -> None:
    run = Drive(Simulated(knee=4, places=4, work=SCORING), Controller(320, guessed=True))(10)
    assert max(run.limits) == 80
    assert run.controller.limit < 40
    assert run.controller.settled == run.controller.limit


def test_a_guess_waits_for_work_that_could_fill_it() -> None:
    run = Drive(Simulated(knee=256, places=256), Controller(320, guessed=True))(10, wanted=20)
    assert set(run.limits) == {80}
    assert run.controller.settled == 320
    assert run(1).limits[-1] == 320


def test_a_guess_is_sent_in_full_where_the_server_tells_nothing() -> None:
    controller = Controller(40, guessed=True)
    assert controller.limit == 10
    assert {controller.look(now_s=second, seen=None, wanted=100) for second in range(100)} == {40}


@pytest.mark.parametrize("start", [1, 2, 8])
def test_a_small_guess_is_no_larger_for_it(start: int) -> None:
    assert Controller(start, guessed=True).limit == min(start, 2)


@pytest.mark.parametrize(
    ("max_num_seqs", "limit"),
    [(None, 320), (64, 80), (1, 1), ("8", 10)],
)
def test_the_first_limit_is_one_batch_of_the_server_and_a_quarter(max_num_seqs: int | str | None, limit: int) -> None:
    assert automatic_limit(max_num_seqs) == limit


@pytest.mark.parametrize(
    ("limit", "demands", "expected"),
    [
        (10, [], []),
        (10, [10], [10]),
        (10, [10, 10], [5, 5]),
        (10, [2, 10], [2, 8]),
        (10, [10, 0, 1], [9, 0, 1]),
        (10, [3, 3], [3, 3]),
        (1, [5, 5], [1, 0]),
        (11, [20, 20], [6, 5]),
        (0, [5], [0]),
    ],
)
def test_what_one_evaluator_leaves_goes_to_the_others(limit: int, demands: list[int], expected: list[int]) -> None:
    assert shares(limit, demands) == expected


@given(st.integers(0, 600), st.lists(st.integers(0, 400), max_size=12))
def test_shares_use_the_whole_limit_and_exceed_neither_it_nor_any_demand(limit: int, demands: list[int]) -> None:
    given_out = shares(limit, demands)
    assert sum(given_out) == min(limit, sum(demands))
    assert all(share <= demand for share, demand in zip(given_out, demands, strict=True))


@given(st.integers(1, 600), st.integers(1, 12))
def test_equal_demands_get_shares_that_differ_by_one_at_most(limit: int, count: int) -> None:
    given_out = shares(limit, [limit] * count)
    assert max(given_out) - min(given_out) <= 1


@dataclass
class Holder:
    """An evaluator that has as much in flight as it may; words between it and the driver take their time."""

    queued: int = 0
    in_flight: int = 0
    share: int = 0
    serial: int = 0
    to_it: deque[tuple[int, int]] = field(default_factory=deque)
    from_it: deque[tuple[Need, int]] = field(default_factory=deque)

    def act(self) -> None:
        sent = max(0, min(self.queued, self.share - self.in_flight))
        self.queued, self.in_flight = self.queued - sent, self.in_flight + sent

    def say(self) -> None:
        held = max(self.share, self.in_flight)
        wanted = self.queued + (held if self.queued else self.in_flight)
        self.from_it.append((Need(wanted=wanted, held=held), self.serial))

    def hear(self) -> None:
        self.serial, self.share = self.to_it.popleft()
        self.say()


class Desk:
    """The driver's side of one endpoint."""

    def __init__(self, limit: int, holders: dict[str, Holder]) -> None:
        self.limit, self.holders, self.leases, self.serial = limit, holders, Leases(), 0

    def hear(self, name: str) -> None:
        need, serial = self.holders[name].from_it.popleft()
        self.leases.hear(name, need, serial=serial)
        self.split()

    def split(self) -> None:
        self.serial += 1
        for name, share in self.leases.split(self.limit, list(self.holders), serial=self.serial).items():
            holder = self.holders[name]
            if share != (holder.to_it[-1][1] if holder.to_it else holder.share):
                holder.to_it.append((self.serial, share))

    def settle(self) -> None:
        """All words arrive."""
        while any(holder.to_it or holder.from_it for holder in self.holders.values()):
            for name, holder in self.holders.items():
                while holder.to_it:
                    holder.hear()
                holder.act()
                while holder.from_it:
                    self.hear(name)


@given(st.data())
def test_leases_never_exceed_the_limit_however_late_the_words_between_driver_and_evaluators_are(
    data: st.DataObject,
) -> None:
    limit = data.draw(st.integers(1, 40), "limit")
    desk = Desk(limit, {name: Holder() for name in "abc"[: data.draw(st.integers(1, 3), "evaluators")]})
    steps = st.tuples(st.sampled_from(["queue", "end", "say", "hear", "driver hears", "limit"]), st.sampled_from("abc"))
    most = limit
    for what, name in data.draw(st.lists(steps, max_size=60), "steps"):
        holder = desk.holders.get(name)
        if what == "limit":
            desk.limit = data.draw(st.integers(1, 40))
            desk.split()
        elif holder is None:
            continue
        elif what == "queue":
            holder.queued += data.draw(st.integers(1, 60))
        elif what == "end":
            holder.in_flight -= data.draw(st.integers(0, holder.in_flight))
        elif what == "say":
            holder.say()
        elif what == "hear" and holder.to_it:
            holder.hear()
        elif what == "driver hears" and holder.from_it:
            desk.hear(name)
        for each in desk.holders.values():
            each.act()
        in_flight = sum(each.in_flight for each in desk.holders.values())
        told = sum(max(each.share, each.in_flight) for each in desk.holders.values())
        # A limit that falls cannot call back what is in flight; until it has left, there is no more than there was.
        most = max(desk.limit, min(most, told))
        assert in_flight <= told <= most


def test_the_share_of_an_evaluator_that_drains_is_used_by_the_other_after_two_words_of_each() -> None:
    first, second = Holder(queued=100), Holder(queued=100)
    desk = Desk(32, {"first": first, "second": second})
    for holder in (first, second):
        holder.say()
    desk.settle()
    assert (first.in_flight, second.in_flight) == (16, 16)
    first.queued, first.in_flight = 0, 5
    first.say()
    desk.hear("first")
    first.hear()
    desk.hear("first")
    second.hear()
    second.act()
    assert (first.share, second.in_flight) == (5, 27)


def test_an_evaluator_that_has_left_leaves_its_share() -> None:
    first, second = Holder(queued=100), Holder(queued=100)
    desk = Desk(32, {"first": first, "second": second})
    for holder in (first, second):
        holder.say()
    desk.settle()
    del desk.holders["first"]
    desk.leases.leave("first")
    desk.split()
    desk.settle()
    assert second.in_flight == 32
    second.say()
    desk.settle()
    assert desk.leases.wanted == second.queued + 32


# What is shown of it


def test_what_servers_did_since_is_told_with_how_they_stand() -> None:
    then = Load(limit=8, settled=8, seen_s=10.0, prompt_tokens=100, generation_tokens=50, preemptions=1)
    now = Load(
        limit=10,
        settled=8,
        running=7,
        waiting=2,
        kv_cache_use=0.5,
        seen_s=14.0,
        prompt_tokens=500,
        generation_tokens=90,
        preemptions=3,
        looked_up_tokens=400,
        cached_tokens=300,
        gpu_use=0.9,
    )
    fresh = Load(limit=4, settled=4, seen_s=1.0, prompt_tokens=10**6, kv_cache_use=0.75)
    assert figures({"a-0": then, "gone": now}, {"a-0": now, "a-1": fresh}) == {
        "concurrency": 14,
        "running": 7,
        "waiting": 2,
        "kv_cache_use": 0.75,
        "gpu_use": 0.9,
        "prompt_tokens_per_s": 100.0,
        "generated_tokens_per_s": 10.0,
        "preemptions": 2,
        "prefix_cache_hit_rate": 0.75,
    }


def test_without_servers_or_news_there_is_no_figure_of_what_they_did() -> None:
    load = Load(limit=4, settled=4, seen_s=3.0)
    assert figures({}, {}) == {}
    assert figures({"a-0": load}, {"a-0": load}).keys() == {"concurrency", "running", "waiting", "kv_cache_use"}
