"""Which calls travel next, together, and to which endpoint. Pure: no connection, no clock.

Calls whose parameters agree share a request, since a small model's server spends more on a request than on its tokens.
Calls of a common prefix form a family: one of them goes first and alone, so that the server computes the prefix once
and the others find it in its cache; the family then stays at the endpoint that has it while others have work of their
own.
"""

from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

PREFIX_LEAST = 64
"""Tokens of a common prefix that are worth a request of their own in front: four blocks of vLLM's cache."""

FAMILY_LEAST = 4
"""Calls of a common prefix that are worth it."""


TOKENS_MOST = 16_384
"""Of all calls of a request: some 100 kB, which proxies take, and seconds of a server's time, not minutes."""


class Dispatched(Protocol):
    """What of a call decides how it travels."""

    @property
    def tokens(self) -> int:
        """Prompt tokens plus tokens to generate."""
        ...

    @property
    def group(self) -> Hashable | None:
        """Calls of an equal one may share a request; None travels alone."""
        ...

    @property
    def prefix(self) -> tuple[int, ...] | None:
        """Tokens that the server may keep for others; None where it cannot, or where waiting for one takes too long."""
        ...


@dataclass(kw_only=True, slots=True)
class Queued:
    """A call with its history."""

    call: Any
    attempts: int = 0
    cut_by: dict[str, int] | None = None
    """Endpoint -> what it had answered when it last broke a connection on which this call waited."""

    def cut(self, endpoint: str, answered: int) -> bool:
        """Note that a connection broke; whether that is the call's own doing: `endpoint` had broken one before and has
        answered others since, so it has not died of it."""
        self.cut_by = self.cut_by or {}
        before, self.cut_by[endpoint] = self.cut_by.get(endpoint), answered
        return before is not None and answered > before


@dataclass(kw_only=True)
class _Family:
    waiting: deque[Queued]
    shared: int = 0
    """Tokens of the common prefix; 0 where there is none, and nothing has to go first."""
    primed: set[str] = field(default_factory=set)
    """Endpoints that have computed the prefix."""
    priming: set[str] = field(default_factory=set)
    """Endpoints where a call computes it."""


class Queue:
    """Calls that wait, in their order."""

    def __init__(self, calls: Iterable[Any]) -> None:
        self._again: deque[Queued] = deque()
        """What came back: it travels first and alone, so that whatever is wrong with one call stays its own."""
        self._families = dict(enumerate(_families(calls)))
        """Those with calls that wait."""
        self._family_of_call: dict[int, _Family] = {}
        """Of calls that compute a prefix, by id."""
        self._waiting = sum(len(family.waiting) for family in self._families.values())

    def __len__(self) -> int:
        return self._waiting

    def take(self, endpoint: str, most: int) -> list[Queued]:
        """At most `most` calls for one request to `endpoint`; none while all that wait need what is computed there."""
        taken = self._take(endpoint, most)
        self._waiting -= len(taken)
        return taken

    def done(self, endpoint: str, calls: Iterable[Queued]) -> None:
        """`endpoint` has answered: prefixes that these calls computed are there now."""
        for queued in calls:
            if (family := self._family_of_call.pop(id(queued), None)) is not None:
                family.priming.remove(endpoint)
                family.primed.add(endpoint)

    def back(self, endpoint: str, calls: Iterable[Queued]) -> None:
        """`endpoint` has not answered; the calls wait again, in front of all others."""
        for queued in calls:
            if (family := self._family_of_call.pop(id(queued), None)) is not None:
                family.priming.remove(endpoint)
            self._again.append(queued)
            self._waiting += 1

    def _take(self, endpoint: str, most: int) -> list[Queued]:
        if self._again:
            return [self._again.popleft()]
        number = self._next_family(endpoint)
        if number is None:
            return []
        family = self._families[number]
        ready = not family.shared or endpoint in family.primed
        taken = _together(family.waiting, most) if ready else [self._first(family, endpoint)]
        if not family.waiting:
            del self._families[number]
        return taken

    def _next_family(self, endpoint: str) -> int | None:
        """One that is ready there, or begun nowhere; else one of other endpoints that is not being begun there."""
        another = None
        for number, family in self._families.items():
            if not family.shared or endpoint in family.primed or not (family.primed or family.priming):
                return number
            if another is None and endpoint not in family.priming:
                another = number
        return another

    def _first(self, family: _Family, endpoint: str) -> Queued:
        first = family.waiting.popleft()
        family.priming.add(endpoint)
        self._family_of_call[id(first)] = family
        return first


def _together(waiting: deque[Queued], most: int) -> list[Queued]:
    """The next calls that may share a request."""
    taken = [waiting.popleft()]
    group, tokens = taken[0].call.group, taken[0].call.tokens
    while group is not None and waiting and len(taken) < most and waiting[0].call.group == group:
        tokens += waiting[0].call.tokens
        if tokens > TOKENS_MOST:
            break
        taken.append(waiting.popleft())
    return taken


def _families(calls: Iterable[Any]) -> Iterator[_Family]:
    """Neighbours of a common prefix, and what stands between them."""
    loose: deque[Queued] = deque()
    for shared, members in _runs(calls):
        if len(members) < FAMILY_LEAST:
            loose.extend(members)
            continue
        if loose:
            yield _Family(waiting=loose)
            loose = deque()
        yield _Family(waiting=deque(members), shared=shared)
    if loose:
        yield _Family(waiting=loose)


def _runs(calls: Iterable[Any]) -> Iterator[tuple[int, list[Queued]]]:
    """Neighbours and how many tokens all of them begin with: PREFIX_LEAST, and half of what the first two do."""
    run: list[Queued] = []
    shared = 0
    for call in calls:
        if run:
            common = common_length(run[-1].call.prefix or (), call.prefix or (), shared)
            if common >= max(PREFIX_LEAST, shared / 2):
                shared = common
            else:
                yield shared, run
                run, shared = [], 0
        run.append(Queued(call=call))
    if run:
        yield shared, run


def common_length(one: tuple[int, ...], other: tuple[int, ...], guess: int = 0) -> int:
    """Tokens that both begin with; `guess` at most, where it is not 0."""
    if guess and one[:guess] == other[:guess]:
        return guess
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
