"""How a server's limit is found and shared: tables, simulated servers with a known knee, and leases under any order."""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.evaluating.concurrency import (
    LIMIT_MOST,
    LOOK_S,
    Controller,
    Leases,
    Need,
    automatic_limit,
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
class Sequence_:
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
    waiting: deque[Sequence_] = field(default_factory=deque)
    batch: list[Sequence_] = field(default_factory=list)
    """The newest last; those that have ended leave later."""
    running: int = 0
    ends: list[tuple[float, int, Sequence_]] = field(default_factory=list)
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
                self.waiting.append(Sequence_(work=self.work, cost=average * self.chance.uniform(0.5, 1.5)))
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

    def _admit(self, sequence: Sequence_) -> None:
        sequence.began, sequence.runs = self.served, True
        self.running += 1
        self._held += sequence.work.prompt - self.served
        self._number += 1
        self.prompt_tokens += sequence.work.prompt
        self.batch.append(sequence)
        heapq.heappush(self.ends, (self.served + sequence.cost, self._number, sequence))

    def _leave(self, sequence: Sequence_) -> None:
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


if __name__ == "__main__":
    import sys

    for noise in (0.0, 0.05, 0.1):
        for work in (GENERATION, SCORING):
            for knee in (1, 4, 32, 256):
                for start in (1, 40, 1024):
                    for places in (1024, 256, knee):
                        d = drive(start, knee, places=places, noise=noise, work=work)
                        d(10)
                        r10 = d.share(1)
                        d(110)
                        print(
                            noise,
                            work.generated,
                            knee,
                            start,
                            places,
                            "10s: %.2f end: %.2f" % (r10, d.share(30)),
                            d.limits[:28],
                            sorted(set(d.limits[20:])),
                            flush=True,
                        )
