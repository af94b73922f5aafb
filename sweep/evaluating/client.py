"""Calls -> replies over a pool of endpoints: routing, retry, deadline.

One asyncio engine runs while an evaluator waits for answers. It holds as many requests in flight as the pool's shares
allow, never a coroutine for each queued one. What a call is and what its reply means belongs to scoring.py.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec

from sweep.errors import PassingFault, RequestError, RequestFault
from sweep.evaluating.concurrency import Need
from sweep.evaluating.dispatch import Dispatched, Queue, Queued
from sweep.serving.server import Endpoint

log = logging.getLogger(__name__)

ATTEMPTS = 5
"""Tries of one call at servers that answer with an error of their own (5xx, 429) or not in time. A lost connection is
not counted while its server may be dead: that is the scheduler's business, and its calls simply go to the next one."""

BROKEN_S = 120.0
"""An endpoint from which nothing came for so long but broken connections, ATTEMPTS or more, is told of. Of a dead
server, or a node that is cut off, the driver knows before that and takes it out of the pool."""

UNMADE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""What tells that a connection could not be made; others were, and broke."""

PAUSE_S = 1.0
"""How long an endpoint that failed gets nothing new; doubled up to PAUSE_MOST_S while it fails after each pause."""

PAUSE_MOST_S = 15.0

DEADLINE_S = 120.0
"""Of one call before its size is added: covers the queue inside the server and a first-request warm-up."""

DEADLINE_PER_TOKEN_S = 0.25
"""Slower than any server that is worth waiting for; a 256-token answer to a 1,000-token prompt may take 7 minutes."""

KEEP_ALIVE_S = 4.0
"""Below the 5 s after which vLLM's web server closes an idle connection: a request must not meet the closing."""

REQUESTS = 4
"""At least so many requests fill an endpoint's share: while one is answered and the next is made, others compute."""

WORDS = 600
"""Characters of a server's own words that an error quotes."""


class Call(Dispatched, Protocol):
    """One prompt, and what is asked about it."""

    @property
    def path(self) -> str:
        """Where the server answers it."""
        ...

    def body(self, *more: Any) -> dict[str, Any]:
        """The JSON body, without `model`, for this call and `more` of its group; made when it is sent, so that queued
        calls stay small."""
        ...


def replies_of(reply: Mapping[str, Any], calls: int) -> list[Mapping[str, Any]]:
    """The answer to a request of several calls as one for each. Raises PassingFault for another number of choices."""
    if calls == 1:
        return [reply]
    choices = sorted(reply["choices"], key=lambda choice: int(choice["index"]))
    if len(choices) != calls:
        raise PassingFault(f"a server gave {len(choices)} choices for {calls} prompts")
    return [{"choices": [choice]} for choice in choices]


C = TypeVar("C", bound=Call)


@dataclass(kw_only=True)
class _Slot:
    endpoint: Endpoint
    limit: int
    """Prompts; 0 for an endpoint that left the pool and still owes answers."""
    in_flight: int = 0
    """Prompts that it owes answers to."""
    pause_s: float = 0.0
    """The last pause; 0 once it answered again."""
    paused_until: float = 0.0
    refused: int = 0
    answered: int = 0
    """Requests, with whatever it said."""
    broken: int = 0
    """Pauses for a broken connection since the last answer, the first one at `broken_since`."""
    broken_since: float = 0.0
    lost: bool = False
    """It is dead, and nothing that it owes will come."""

    def need(self, queued: int) -> Need:
        held = max(self.limit, self.in_flight)
        # Between an answer and the next request a place is free for a moment, and no less needed.
        return Need(wanted=queued + (held if queued else self.in_flight), held=held, refused=self.refused)


def _nobody(*_: object) -> None:
    """Wakes nobody, while no call waits; tells nobody."""


class Cancelled(BaseException):
    """The scheduler took the cell back; nothing is wrong with it, so no handler of errors on the way may keep it."""


class Pool:
    """The live endpoints of one model and this evaluator's share of each. Changed from any thread, while calls run."""

    def __init__(
        self,
        on_want: Callable[[], object] = _nobody,
        on_broken: Callable[[Endpoint, BaseException], object] = _nobody,
    ) -> None:
        """`on_want` is called, in the thread of `want`, when prompts begin to wait for a place; `on_broken`, in that of
        `broke`, once for each endpoint that gives nothing but broken connections for BROKEN_S."""
        self._lock = threading.Lock()
        self._on_want = on_want
        self._on_broken = on_broken
        self.queued = 0
        """Prompts that wait for a place."""
        self._slots: dict[str, _Slot] = {}
        self._held = False
        self._cancelled: str | None = None
        self._wake: Callable[[], object] = _nobody

    def update(self, shares: Sequence[tuple[Endpoint, int]], *, lost: Collection[str] = ()) -> None:
        """Replace the pool. Requests in flight at an endpoint that left go on, and count if it comes back; those at one
        that is `lost` are asked again."""
        with self._lock:
            old = self._slots
            self._slots = {e.server: old.get(e.server) or _Slot(endpoint=e, limit=0) for e, _ in shares}
            for endpoint, limit in shares:
                self._slots[endpoint.server].limit = limit
            for name, slot in old.items():
                if slot.in_flight and name not in self._slots:
                    slot.limit, slot.lost = 0, slot.lost or name in lost
                    self._slots[name] = slot
            self._wake()

    def hold(self, held: bool) -> None:
        """Let nothing new out while `held`; what is in flight comes home."""
        with self._lock:
            if held != self._held:
                self._held = held
                self._wake()

    def want(self, queued: int) -> None:
        """Tell how many prompts wait for a place: servers are shared by what evaluators could use."""
        began = queued > 0 and not self.queued
        self.queued = queued
        if began:
            self._on_want()

    def refuse(self, endpoint: Endpoint) -> None:
        """Tell that it has too many requests."""
        with self._lock:
            self._slots[endpoint.server].refused += 1

    def answered(self, endpoint: Endpoint) -> None:
        """Tell that an answer came, whatever it says."""
        with self._lock:
            slot = self._slots[endpoint.server]
            slot.answered += 1
            slot.broken = 0

    def broke(self, endpoint: Endpoint, error: BaseException) -> None:
        """Tell that it gets a pause for a connection that broke or could not be made."""
        now = time.monotonic()
        with self._lock:
            slot = self._slots[endpoint.server]
            slot.broken += 1
            if slot.broken == 1:
                slot.broken_since = now
            told = slot.limit > 0 and slot.broken >= ATTEMPTS and now - slot.broken_since >= BROKEN_S
            if told:
                slot.broken_since = math.inf  # once
        if told:
            self._on_broken(endpoint, error)

    def needs(self) -> dict[str, Need]:
        """By endpoint."""
        with self._lock:
            return {name: slot.need(self.queued) for name, slot in self._slots.items()}

    def cancel(self, reason: str) -> None:
        with self._lock:
            self._cancelled = reason
            self._wake()

    def raise_if_cancelled(self) -> None:
        with self._lock:
            if self._cancelled is not None:
                raise Cancelled(self._cancelled)

    def _call(self, wake: Callable[[], object]) -> None:
        """Have `wake` called, from any thread, after each change; never after the next `_call` has returned."""
        with self._lock:
            self._wake = wake

    def take(self, wanted: int = 1, *, but: Collection[str] = ()) -> tuple[_Slot | None, int]:
        """The least loaded endpoint with room, and how many of the `wanted` prompts may go there in one request, at
        least one of them; none of those in `but`.

        They are in flight from now on, until they are given back. (None, 0) where nothing has room.
        """
        now = time.monotonic()
        with self._lock:
            if self._held:
                return None, 0
            for slot in self._slots.values():
                if slot.paused_until <= now:
                    slot.paused_until = 0.0
            ready = [
                slot
                for name, slot in self._slots.items()
                if slot.in_flight < slot.limit and not slot.paused_until and name not in but
            ]
            if not ready:
                return None, 0
            slot = min(ready, key=lambda s: s.in_flight / s.limit)
            granted = min(wanted, slot.limit - slot.in_flight, max(1, slot.limit // REQUESTS))
            slot.in_flight += granted
            return slot, granted

    def give_back(self, slot: _Slot, prompts: int = 1) -> None:
        with self._lock:
            slot.in_flight -= prompts

    def pause_s(self) -> float:
        """Seconds after which an endpoint with room may be over its pause; a minute where none pauses."""
        now = time.monotonic()
        with self._lock:
            # One with room and no pause has nothing to do: what waits needs what others compute.
            paused = [s.paused_until for s in self._slots.values() if s.paused_until and s.in_flight < s.limit]
        return max(0.0, min(paused, default=now + 60.0) - now)


@dataclass(kw_only=True)
class Traffic:
    """When the requests of one cell were on the wire."""

    first_sent: float | None = None
    last_received: float = 0.0
    requests: int = 0
    retries: int = 0

    @property
    def request_s(self) -> float:
        """From the first byte sent to the last received."""
        return 0.0 if self.first_sent is None else self.last_received - self.first_sent


@dataclass(kw_only=True)
class Client:
    """Sends calls of one model to its pool."""

    model: str
    """The served name."""
    pool: Pool
    traffic: Traffic = field(default_factory=Traffic)

    def run(self, calls: Iterable[C], on_reply: Callable[[C, Mapping[str, Any]], None]) -> None:
        """Send every call and hand each reply to `on_reply`, in the order of arrival, in this thread.

        A reply that `on_reply` meets with PassingFault is asked for again.

        While the pool is empty it waits: the scheduler brings a server or cancels. Raises RequestError for a request
        that a server refuses for good, Cancelled when the scheduler takes the cell back, and what `on_reply` raises.
        """
        asyncio.run(self._run(Queue(calls), on_reply))

    async def _run(self, queue: Queue, on_reply: Callable[[C, Mapping[str, Any]], None]) -> None:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        self.pool._call(lambda: loop.call_soon_threadsafe(changed.set))
        # The pool's shares are the limit; the connector's own would be a second, hidden one.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        running: dict[asyncio.Task[None], _Slot] = {}
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                try:
                    while queue or running:
                        self.pool.raise_if_cancelled()
                        self.pool.want(len(queue))
                        if (begun := self._begin(queue)) is not None:
                            task = asyncio.create_task(self._send(session, *begun, queue, on_reply))
                            running[task] = begun[0]
                            task.add_done_callback(lambda _: changed.set())
                            continue
                        try:
                            await asyncio.wait_for(changed.wait(), timeout=self.pool.pause_s() if queue else 60.0)
                        except TimeoutError:
                            continue
                        changed.clear()
                        for task, slot in [*running.items()]:
                            if task.done():
                                del running[task]
                                task.result()
                            elif slot.lost:
                                task.cancel()
                finally:
                    self.pool.want(0)
                    for task in running:
                        task.cancel()
                    await asyncio.gather(*running, return_exceptions=True)
        finally:
            self.pool._call(_nobody)

    def _begin(self, queue: Queue) -> tuple[_Slot, list[Queued]] | None:
        """The next calls, and the endpoint that has places for them."""
        served: list[str] = []
        while queue:
            slot, places = self.pool.take(len(queue), but=served)
            if slot is None:
                return None
            calls = queue.take(slot.endpoint.server, places)
            self.pool.give_back(slot, places - len(calls))
            if calls:
                return slot, calls
            served.append(slot.endpoint.server)
        return None

    async def _send(
        self,
        session: aiohttp.ClientSession,
        slot: _Slot,
        calls: list[Queued],
        queue: Queue,
        on_reply: Callable[[C, Mapping[str, Any]], None],
    ) -> None:
        """One try; on a passing fault the calls wait again."""
        endpoint = slot.endpoint
        answered = 0
        try:
            reply = await self._post(session, endpoint, [queued.call for queued in calls])
            queue.done(endpoint.server, calls)
            for queued, own in zip(calls, replies_of(reply, len(calls)), strict=True):
                on_reply(queued.call, own)
                answered += 1
        except asyncio.CancelledError:
            if not slot.lost:
                raise
            self._pause(slot, f"{endpoint.server} is lost")
            queue.back(endpoint.server, calls)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            if self._pause(slot, f"connection to {endpoint.server} lost: {error!r}"):
                self.pool.broke(endpoint, error)
            if not isinstance(error, UNMADE):
                blamed = [queued for queued in calls if queued.cut(endpoint.server, slot.answered)]
                why = "the connection broke, while others got answers; does a proxy in between end what takes long?"
                self._failed(blamed, endpoint, f"{why} ({error!r})")
            queue.back(endpoint.server, calls)
        except RequestError as error:
            # Of several, one may be wrong, or all together too much for it: alone each gets its own answer.
            if answered or len(calls) == 1:
                raise
            log.info("a request of %d prompts is sent again one by one: %s", len(calls), error)
            queue.back(endpoint.server, calls)
        except (PassingFault, aiohttp.ClientError) as error:
            self._pause(slot, str(error))
            self._failed(calls[answered:], endpoint, str(error))
            queue.back(endpoint.server, calls[answered:])
        else:
            slot.pause_s = 0.0
        finally:
            self.pool.give_back(slot, len(calls))

    def _failed(self, calls: Iterable[Queued], endpoint: Endpoint, why: str) -> None:
        """Count a try of each; raises RequestFault for the last of one."""
        for queued in calls:
            queued.attempts += 1
            if queued.attempts >= ATTEMPTS:
                raise RequestFault(
                    f"a request to model {self.model} failed {ATTEMPTS} times, last at {endpoint.server}: {why}"
                ) from None

    async def _post(
        self, session: aiohttp.ClientSession, endpoint: Endpoint, calls: Sequence[Call]
    ) -> Mapping[str, Any]:
        first, *more = calls
        body = msgspec.json.encode({"model": self.model, **first.body(*more)})
        tokens = sum(call.tokens for call in calls)
        key = endpoint.api_key
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S + DEADLINE_PER_TOKEN_S * tokens, sock_connect=10)
        if self.traffic.first_sent is None:
            self.traffic.first_sent = time.monotonic()
        self.traffic.requests += 1
        try:
            async with session.post(
                f"{endpoint.url}{first.path}", data=body, headers=headers, timeout=timeout
            ) as response:
                content = await response.read()
        except aiohttp.ClientConnectionError:
            raise  # a connection that cannot be made in time is one, and a TimeoutError too
        except TimeoutError:
            raise PassingFault(f"{endpoint.server} did not answer within {timeout.total:.0f} s") from None
        self.traffic.last_received = time.monotonic()
        self.pool.answered(endpoint)
        if response.status == 200:
            try:
                return msgspec.json.decode(content, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise PassingFault(f"{endpoint.server} sent a broken answer: {error}") from None
        if response.status in (429, 503):
            self.pool.refuse(endpoint)
        said = content.decode(errors="replace")
        words = (said.replace(key, "***") if key else said)[:WORDS]
        if response.status == 429 or response.status >= 500:
            raise PassingFault(f"{endpoint.server} answered {response.status}: {words}")
        raise RequestError(f"{endpoint.server} refused a request of model {self.model} ({response.status}): {words}")

    def _pause(self, slot: _Slot, why: str) -> bool:
        """False where it pauses already: others that were in flight fail with the first one, and are one failure."""
        self.traffic.retries += 1
        now = time.monotonic()
        if now < slot.paused_until:
            return False
        slot.pause_s = min(2 * slot.pause_s or PAUSE_S, PAUSE_MOST_S)
        slot.paused_until = now + slot.pause_s
        log.warning("%s; asked again in %.0f s", why, slot.pause_s)
        return True
