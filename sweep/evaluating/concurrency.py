"""How many sequences may be in flight at a server, and how evaluators share that number. Pure.

`Controller` finds the number for one endpoint from what the server says of itself, `Leases` splits it among the cells
that ask there. A sequence is what vLLM batches: one prompt, of which an HTTP request may bring several.

A little more than the best number costs latency and no throughput, and too few leaves the machine idle. So what is in
doubt is decided upwards, and only what the server shows to be useless (a queue that stays) or harmful (preemptions)
brings the number down.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sweep.serving.metrics import Snapshot

BATCH = 256
"""Sequences that vLLM batches by default on a data-centre GPU, and our servers on a CPU (engine.ON_CPU)."""

AHEAD = 1.25
"""A quarter more than one batch in flight, so that the server never waits for the next request."""

FIRST_SHARE = 0.25
"""Of what a server begins with when nothing is known of its work, so much is sent at once, and the rest when it is seen
to have no long queue: prompts that wait a minute help nobody, and many that grow at once may not fit in its cache."""

AHEAD_S = 1.0
"""A queue of so much time is never too long. Short scoring requests are computed in whole batches of which the figures,
written after each step, show nothing; on two cores a quarter of a second was too little for a full one."""

AHEAD_LEAST = 4
"""Sequences in the queue that are never too many."""

LIMIT_LEAST, LIMIT_MOST = 2, 1024
"""What is found lies between: one that is computed and one that waits, and the largest batch that vLLM makes by
default. What it begins with may lie beyond."""

PROMPT_COST = 0.1
"""Of a prompt's token, in generated ones. Prompts are read many tokens at a time; counted in full, the chance of how
many came just now would hide what is gained."""

LOOK_S = 0.5
"""Between two looks at a server."""

WIDE_LOOKS, FINE_LOOKS = 4, 8
"""How many looks a level gets before it is judged. Throughput of half a second varies by some percent, so a step of an
eighth takes the longer of them."""

FINISHED_LEAST, WIDE_FINISHED_LEAST, FINE_FINISHED_LEAST = 3, 16, 64
"""Sequences that must have ended, however few run: to begin with a throughput, to judge a wide step, and to judge an
eighth, which is less than the chance of how many end in a few seconds."""

QUEUE_LOOKS = 3
"""A queue that is there in so many looks in a row stays."""

STEPS = (0.125, 0.125, 0.25, 0.5, 1.0, 3.0)
"""By how much the limit is raised for a trial. A cold start takes the last of them, since a trial costs time but no
throughput; each later search begins with the first, and each success takes the next."""

GAIN = 0.1
"""Throughput that a trial must bring to be kept, or three fifths of its step if that is less."""

CLEAR_GAIN = 0.5
"""So much more is no noise, and is believed at once."""

PROBE_S, PROBE_MOST_S = 5.0, 60.0
"""Pause before the next trial after one that brought nothing; doubled each time."""

CALM_S = 20.0
"""No trial for so long after a preemption."""

KV_CACHE_FULL, KV_CACHE_FULL_MOST = 0.92, 0.98
"""No trial beyond the first, less in flight beyond the second: sequences grow after they were let in, and where there
is no room left the server starts one of them anew."""

REFUSED_CALM_S = 5.0
"""A server that refuses is given less once in such a time: what is in flight has first to become less."""

NEW_WORK = 2.0
"""Generated tokens among all tokens: when their share changes by this factor, what was found is of other work."""


def automatic_limit(max_num_seqs: int | str | None = None) -> int:
    """Where `concurrency: auto` begins when nothing is known: one batch of the server and a quarter more.

    `max_num_seqs` is vLLM's option as the config has it, which may be quoted.
    """
    return int(int(max_num_seqs or BATCH) * AHEAD)


@dataclass(frozen=True, kw_only=True)
class _Interval:
    """What a server did between two looks, and how it stood at the second."""

    seconds: float
    running: int
    waiting: int
    kv_cache_use: float
    prompt_tokens: int
    generation_tokens: int
    finished: int


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a controller tells of its endpoint."""

    limit: int
    settled: int
    running: int = 0
    waiting: int = 0
    kv_cache_use: float = 0.0
    seen_s: float = 0.0
    """When it told what follows, by a clock of its own; 0 where it has told nothing."""
    preemptions: int = 0
    """Since its start, as all that follows."""
    prompt_tokens: int = 0
    generation_tokens: int = 0
    looked_up_tokens: int = 0
    cached_tokens: int = 0
    gpu_use: float | None = None
    """Share of the time in which its GPUs computed, 0 to 1; None where nothing tells."""


def figures(before: Mapping[str, Load], now: Mapping[str, Load]) -> dict[str, float]:
    """What is shown of a model's servers, by name of their lives: how they stand now and what they did since `before`.

    Counters of a life that was not there before, or did not tell, count from the next time on.
    """
    loads = list(now.values())
    if not loads:
        return {}
    found: dict[str, float] = {
        "concurrency": sum(load.limit for load in loads),
        "running": sum(load.running for load in loads),
        "waiting": sum(load.waiting for load in loads),
        "kv_cache_use": max(load.kv_cache_use for load in loads),
    }
    if uses := [load.gpu_use for load in loads if load.gpu_use is not None]:
        found["gpu_use"] = sum(uses) / len(uses)
    pairs = [(before[name], load) for name, load in now.items() if name in before]
    pairs = [(then, load) for then, load in pairs if load.seen_s > then.seen_s > 0]
    if pairs:
        for shown, counted in (("prompt", "prompt_tokens"), ("generated", "generation_tokens")):
            found[f"{shown}_tokens_per_s"] = sum(
                (getattr(load, counted) - getattr(then, counted)) / (load.seen_s - then.seen_s) for then, load in pairs
            )
        found["preemptions"] = sum(load.preemptions - then.preemptions for then, load in pairs)
        if looked_up := sum(load.looked_up_tokens - then.looked_up_tokens for then, load in pairs):
            cached = sum(load.cached_tokens - then.cached_tokens for then, load in pairs)
            found["prefix_cache_hit_rate"] = cached / looked_up
    return found


class _Window:
    """The looks since the limit was changed, at a server that had all it was allowed."""

    def __init__(self, intervals: Sequence[_Interval] = ()) -> None:
        self.intervals = list(intervals)

    def __len__(self) -> int:
        return len(self.intervals)

    def last(self, looks: int) -> "_Window":
        return _Window(self.intervals[-looks:])

    def mean(self, name: str) -> float:
        return self.total(name) / max(1, len(self))

    def total(self, name: str) -> float:
        return float(sum(getattr(interval, name) for interval in self.intervals))

    @property
    def throughput(self) -> float:
        """Generated tokens per second and what the prompts cost: compared only while the work is the same."""
        work = self.total("generation_tokens") + PROMPT_COST * self.total("prompt_tokens")
        return work / self.total("seconds")

    @property
    def generated_share(self) -> float:
        return self.total("generation_tokens") / max(1, self.total("prompt_tokens") + self.total("generation_tokens"))

    @property
    def reserve(self) -> float:
        """Sequences that a queue should hold, so that the server never waits for the next one."""
        rate = self.total("finished") / self.total("seconds")
        return max(AHEAD_LEAST, (AHEAD - 1) * self.mean("running"), AHEAD_S * rate)

    def cache_is_full(self) -> bool:
        seen = [interval.kv_cache_use for interval in self.intervals[-QUEUE_LOOKS:]]
        return len(seen) == QUEUE_LOOKS and min(seen) >= KV_CACHE_FULL_MOST

    def tells(self, limit: int, least: int = FINISHED_LEAST) -> bool:
        """Whether enough was done for a throughput: each sequence has ended once. Before, sequences that began together
        all read their prompts, or all write."""
        return self.total("finished") >= max(least, limit)


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A raised limit that has yet to show that it brings something."""

    before: int
    """The limit that it is compared with."""
    throughput: float
    """With that one."""
    level: int
    """Index of STEPS."""
    first: bool
    """The limit before was found by no trial: it began there, or it was at rest and has a margin already."""


class Controller:
    """The limit of one endpoint. Told at each look how the server stands, it says how many may be in flight."""

    def __init__(self, start: int, *, fixed: bool = False, guessed: bool = False) -> None:
        """`fixed` is a number that the user gave: it never changes; `guessed` one that comes from no work before."""
        self.limit = min(start, max(LIMIT_LEAST, int(FIRST_SHARE * start))) if guessed else start
        self._start = start
        self._opening = self.limit < start
        self._fixed = fixed
        self._last: tuple[float, Snapshot] | None = None
        self._tells = False
        """It has told how it stands; where it does not now, it is only slow."""
        self._window = _Window()
        self._settling = True
        """The looks since a change are too few: what comes in is of both limits."""
        self._trial: _Trial | None = None
        self._rival: tuple[int, float] | None = None
        """A limit that seemed useless, with its throughput: returned to if the present one turns out to give less."""
        self._level = len(STEPS) - 1
        self._next_trial_s = -math.inf
        self._pause_s = PROBE_S
        self._refused_s = -math.inf
        self._share: float | None = None
        """Generated tokens among all, of the work for which the limit was found."""

    @property
    def settled(self) -> int:
        """The limit without the trial that may be going on: where the next server of this model begins."""
        if self._opening:
            return self._start
        return self._trial.before if self._trial else self.limit

    @property
    def load(self) -> Load:
        if self._last is None:
            return Load(limit=self.limit, settled=self.settled)
        seen_s, seen = self._last
        return Load(
            limit=self.limit,
            settled=self.settled,
            running=seen.running,
            waiting=seen.waiting,
            kv_cache_use=seen.kv_cache_use,
            seen_s=seen_s,
            preemptions=seen.preemptions,
            prompt_tokens=seen.prompt_tokens,
            generation_tokens=seen.generation_tokens,
            looked_up_tokens=seen.looked_up_tokens,
            cached_tokens=seen.cached_tokens,
        )

    def look(self, *, now_s: float, seen: Snapshot | None, wanted: int, refused: int = 0) -> int:
        """The limit from now on.

        `seen` is None where the server tells nothing, `wanted` how many sequences evaluators could have in flight,
        `refused` how many were answered with "too many requests" since the last look.
        """
        last, self._last = self._last, None if seen is None else (now_s, seen)
        self._tells = self._tells or seen is not None
        if self._fixed:
            return self.limit
        if refused and now_s >= self._refused_s + REFUSED_CALM_S:
            self._refused_s, self._opening = now_s, False
            self._hold(max(1, self.limit * 3 // 4), now_s + CALM_S)
        elif self._opening:
            self._open(_between(last, (now_s, seen)) if last and seen and now_s > last[0] else None, wanted)
        elif seen is None:
            self._rest()
            if not self._tells:
                self._recover(now_s, wanted)
        elif last is not None and now_s > last[0]:
            self._judge(now_s, _between(last, (now_s, seen)), wanted, seen.preemptions > last[1].preemptions)
        return self.limit

    def _recover(self, now_s: float, wanted: int) -> None:
        """Without a word of the server: back to where it was before it refused."""
        if wanted >= self.limit < self._start and now_s >= self._next_trial_s:
            self._hold(min(self._start, math.ceil(self.limit * (1 + STEPS[0]))), now_s + REFUSED_CALM_S)

    def _open(self, interval: _Interval | None, wanted: int) -> None:
        """Allows all that it begins with, but to a server that has a long queue by then, which is judged as it is."""
        if interval is None:
            opens = not self._tells
        elif wanted < self.limit:
            return
        else:
            self._window.intervals.append(interval)
            opens = interval.waiting <= self._window.reserve
            self._opening = len(self._window) < QUEUE_LOOKS
        if opens:
            self._opening = False
            self._change(self._start)

    def _judge(self, now_s: float, interval: _Interval, wanted: int, preempted: bool) -> None:
        window = self._window
        window.intervals.append(interval)
        if preempted or window.cache_is_full():
            # Of what runs, not of the limit: what is in flight cannot be called back, and each look would take more.
            self._hold(max(1, min(self.limit, int(0.95 * interval.running))), now_s + CALM_S)
            return
        if wanted < self.limit or interval.finished < 0:
            # What the server does says nothing about the limit; or it is another server behind the same address.
            self._rest()
            return
        if self._settling and not self._trial:
            # What is in flight beyond a limit that has fallen keeps new requests away, whose prompts would count.
            self._settling = interval.running + interval.waiting > 1.1 * self.limit + LIMIT_LEAST
            window.intervals.clear()
            return
        if self._queue_stays(now_s):
            return
        if self._trial:
            self._compare(self._trial, now_s, wanted)
            return
        if len(window) > FINE_LOOKS and _finely(window.last(FINE_LOOKS), self.limit):
            window.intervals.pop(0)
        if window.tells(self.limit):
            self._search(now_s, wanted)

    def _queue_stays(self, now_s: float) -> bool:
        """Takes back what only waits: the server's batch is as large as it gets."""
        window = self._window.last(QUEUE_LOOKS)
        waiting = [interval.waiting for interval in window.intervals]
        # One that becomes shorter is being worked off, after a start or after the limit has fallen.
        if len(waiting) < QUEUE_LOOKS or min(waiting) == 0 or waiting[-1] < 0.8 * waiting[0]:
            return False
        enough = math.ceil(window.mean("running") + window.reserve)
        if window.mean("waiting") <= 2 * window.reserve or enough >= 0.85 * self.limit:
            return False
        self._share = None
        self._hold(enough, now_s + PROBE_S)
        return True

    def _compare(self, trial: _Trial, now_s: float, wanted: int) -> None:
        """Keeps a trial's limit or goes back."""
        settling, self._settling = self._settling, False
        window = self._window
        gain = window.throughput / trial.throughput - 1
        clear = STEPS[trial.level] >= 1 and gain >= CLEAR_GAIN and window.tells(self.limit // 2)
        if settling and not clear:
            window.intervals.clear()
            return
        wide = STEPS[trial.level] > STEPS[0]
        if not clear and not (_enough(window, self.limit) if wide else _finely(window, self.limit)):
            return
        step = self.limit / trial.before - 1
        if gain >= min(GAIN, 0.6 * step):
            # Less than half of what the step could bring: the best number is near.
            level = trial.level + 1 if gain >= step / 2 else min(trial.level, STEPS.index(1.0))
            self._accept(window.throughput, min(level, len(STEPS) - 1), now_s, wanted)
            return
        high = (self.limit, window.throughput)
        self._pause_s = min(2 * self._pause_s, PROBE_MOST_S)
        # A wide step that brings a little has gone past the best number, which lies between.
        middle = (trial.before + self.limit + 1) // 2 if wide and gain > GAIN / 3 else trial.before
        ahead = trial.before if trial.first else max(trial.before + LIMIT_LEAST, math.ceil(trial.before * AHEAD))
        self._hold(max(middle, min(ahead, self.limit), LIMIT_LEAST), now_s + PROBE_S)
        self._rival = high if wide else None
        self._next_trial_s = now_s + self._pause_s

    def _accept(self, throughput: float, level: int, now_s: float, wanted: int) -> None:
        self._trial = None
        self._pause_s = PROBE_S
        self._level = level
        if not self._raise(throughput, wanted, first=False):
            self._hold(self.limit, now_s + PROBE_S)

    def _search(self, now_s: float, wanted: int) -> None:
        """With the limit at rest: the next trial, when it is time for one."""
        window = self._window
        climbing = STEPS[self._level] >= 1
        if _enough(window, self.limit) and not climbing:
            if self._rival is not None and _finely(window, self.limit):
                (limit, throughput), self._rival = self._rival, None
                if throughput >= (1 + 2 * GAIN) * window.throughput:
                    self.limit = limit
                    self._accept(throughput, STEPS.index(1.0), now_s, wanted)
                    return
            share = window.generated_share
            self._share = self._share or share
            if share > NEW_WORK * self._share or share < self._share / NEW_WORK:
                self._share = None
                self._level, climbing, self._next_trial_s = len(STEPS) - 1, True, -math.inf
        if now_s >= self._next_trial_s and (climbing or _finely(window, self.limit)):
            self._raise(window.throughput, wanted, first=True)

    def _raise(self, throughput: float, wanted: int, *, first: bool) -> bool:
        """Whether a trial began: not where the server has a queue already, or no room in its KV cache."""
        window = self._window.last(QUEUE_LOOKS)
        if not throughput or window.mean("waiting") > window.reserve / 2:
            return False
        room = KV_CACHE_FULL / max(window.mean("kv_cache_use"), 0.01)
        most = min(LIMIT_MOST, wanted, int(self.limit * room))
        raised = min(math.ceil(self.limit * (1 + STEPS[self._level])), most)
        if raised <= self.limit:
            return False
        self._trial = _Trial(before=self.limit, throughput=throughput, level=self._level, first=first)
        self._change(raised)
        return True

    def _hold(self, limit: int, next_trial_s: float) -> None:
        self._trial = self._rival = None
        self._level = 0
        self._next_trial_s = next_trial_s
        self._change(limit)

    def _rest(self) -> None:
        """Gives up a trial, and goes on with the next one when there is something to see again."""
        limit, self._trial, self._rival = self.settled, None, None
        self._change(limit)

    def _change(self, limit: int) -> None:
        self.limit = limit
        self._settling = True
        self._window = _Window()


def _enough(window: _Window, limit: int) -> bool:
    return len(window) >= WIDE_LOOKS and window.tells(limit, WIDE_FINISHED_LEAST)


def _finely(window: _Window, limit: int) -> bool:
    return len(window) >= FINE_LOOKS and window.tells(limit, FINE_FINISHED_LEAST)


def _between(last: tuple[float, Snapshot], now: tuple[float, Snapshot]) -> _Interval:
    (then_s, before), (now_s, seen) = last, now
    return _Interval(
        seconds=now_s - then_s,
        running=seen.running,
        waiting=seen.waiting,
        kv_cache_use=seen.kv_cache_use,
        prompt_tokens=seen.prompt_tokens - before.prompt_tokens,
        generation_tokens=seen.generation_tokens - before.generation_tokens,
        finished=seen.finished - before.finished,
    )


# Sharing a limit.


@dataclass(frozen=True, kw_only=True)
class Need:
    """What an evaluator says of one endpoint."""

    wanted: int
    """Sequences that it could have in flight there."""
    held: int
    """Its share, or what it has in flight where that is more, after the share has fallen."""
    refused: int = 0
    """Requests since the cell began that were answered with "too many"."""


@dataclass(kw_only=True)
class _Lease:
    need: Need = Need(wanted=0, held=0)
    share: int = 0
    """What it was told last."""
    unheard: list[tuple[int, int]] = field(default_factory=list)
    """(serial, share) of what it was told since `need`."""

    @property
    def most(self) -> int:
        """What it may have in flight at this moment, whatever it has heard."""
        return max(self.need.held, *(share for _, share in self.unheard), 0)


class Leases:
    """Who may have how much in flight at one endpoint.

    Nobody gets what another may still use: a share that falls is given on when its holder has said that it keeps to it.
    So the holders together never have more in flight than the limit, or than was in flight when the limit fell.
    """

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}
        self.refused = 0
        """Requests that this endpoint has refused, since the beginning."""

    @property
    def wanted(self) -> int:
        return sum(lease.need.wanted for lease in self._leases.values())

    def hear(self, holder: str, need: Need, *, serial: int) -> None:
        """What a holder says, who by then has heard all that was split up to `serial`."""
        lease = self._leases.setdefault(holder, _Lease())
        self.refused += need.refused - lease.need.refused
        lease.need = need
        lease.unheard = [told for told in lease.unheard if told[0] > serial]

    def leave(self, holder: str) -> None:
        """It has nothing in flight any more."""
        self._leases.pop(holder, None)

    def split(self, limit: int, holders: Sequence[str], *, serial: int) -> Mapping[str, int]:
        """Holder -> share, which the caller sends to each holder whose share has changed, under this serial."""
        leases = {holder: self._leases.setdefault(holder, _Lease()) for holder in holders}
        free = limit - sum(lease.most for lease in self._leases.values())
        targets = shares(limit, [lease.need.wanted for lease in leases.values()])
        for lease, target in zip(leases.values(), targets, strict=True):
            more = min(max(0, target - lease.most), max(0, free))
            free -= more
            share = min(target, lease.most + more)
            if share != lease.share:
                lease.share = share
                lease.unheard.append((serial, share))
        return {holder: lease.share for holder, lease in leases.items()}


def shares(limit: int, demands: Sequence[int]) -> list[int]:
    """`limit` split among evaluators by how many sequences each could have in flight.

    The sum never exceeds `limit`, nobody gets more than it demands, and what one leaves goes to the others.
    """
    given = [0] * len(demands)
    left = limit
    while left > 0 and (hungry := [i for i, demand in enumerate(demands) if given[i] < demand]):
        each = max(1, left // len(hungry))
        for i in hungry:
            take = min(each, demands[i] - given[i], left)
            given[i] += take
            left -= take
    return given
