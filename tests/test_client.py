"""The client against stand-in servers: every call answered once, whatever the servers and the scheduler do."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from aiohttp import web
from conftest import KEY, StandIn

from sweep.errors import PassingFault, RequestError, RequestFault
from sweep.evaluating import client as module
from sweep.evaluating.client import ATTEMPTS, Cancelled, Client, Pool
from sweep.evaluating.concurrency import Need
from sweep.serving.server import Endpoint


@dataclass(frozen=True)
class Ask:
    """One token after a prompt that no other call has."""

    number: int
    tokens: int = 2
    group: str | None = None
    prefix: tuple[int, ...] | None = None
    path: str = "/v1/completions"
    most: int = 100
    """Prompts that a request may hold; a longer one is refused."""

    def body(self, *more: "Ask") -> dict[str, Any]:
        if len(more) >= self.most:
            return {"prompt": []}
        prompts = [[1 + ask.number // 900, 1 + ask.number % 900] for ask in (self, *more)]
        return {"prompt": prompts if more else prompts[0], "max_tokens": 1, "temperature": 0}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "PAUSE_MOST_S", 0.1)


def asked(count: int) -> list[Ask]:
    return [Ask(number) for number in range(count)]


def run(pool: Pool, calls: list[Ask]) -> Counter[int]:
    """How often each call was answered."""
    found: Counter[int] = Counter()
    Client(model="m", pool=pool).run(calls, lambda call, _: found.update([call.number]))
    return found


def pool_of(*shares: tuple[Endpoint, int]) -> Pool:
    pool = Pool()
    pool.update(shares)
    return pool


@contextmanager
def later(step: Callable[[], object]) -> Iterator[None]:
    """Do it in another thread meanwhile; what it raises there fails the test, as pytest's warnings are errors."""
    thread = threading.Thread(target=step)
    thread.start()
    try:
        yield
    finally:
        thread.join(30)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


class Scripted:
    """A server that answers each request by a function of its number, counted from 0; runs in a thread. None breaks the
    connection."""

    def __init__(self, answer: Callable[[int], web.Response | None]) -> None:
        self.answer = answer
        self.requests: list[Any] = []
        self.keys: list[str | None] = []
        """Authorization of each."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._ready.wait(20)

    def endpoint(self, name: str = "m-0") -> Endpoint:
        return Endpoint(server=name, url=self.url, api_key=KEY, max_model_len=2048, engine_version="0")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        number = len(self.requests)
        self.requests.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        answer = self.answer(number)
        if answer is None:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return answer


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[int], web.Response | None]], Scripted]]:
    servers: list[Scripted] = []

    def start(answer: Callable[[int], web.Response | None]) -> Scripted:
        servers.append(Scripted(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def fine(_: int = 0) -> web.Response:
    return web.json_response({"choices": []})


# Many calls, few connections


def test_every_call_is_answered_once_and_under_the_served_name(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    assert run(pool_of((server.endpoint, 16)), asked(300)) == Counter(range(300))
    assert len(server.bodies()) == 300
    assert {body["model"] for body in server.bodies()} == {"m"}


def test_the_traffic_says_how_long_requests_were_on_the_wire(stand_in: Callable[..., StandIn]) -> None:
    client = Client(model="m", pool=pool_of((stand_in(latency_s=0.2).endpoint, 4)))
    assert client.traffic.request_s == 0.0
    client.run(asked(8), lambda *_: None)
    assert client.traffic.requests == 8
    assert client.traffic.retries == 0
    assert 0.4 <= client.traffic.request_s < 10


def test_no_call_is_no_work(stand_in: Callable[..., StandIn]) -> None:
    assert run(Pool(), []) == Counter()


class Gauge:
    """How many requests each endpoint had in flight at most, seen where they are sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.tasks = 0
        real = Client._post

        async def watched(client: Client, session: Any, endpoint: Endpoint, call: Any) -> Mapping[str, Any]:
            self.now[endpoint.server] += 1
            self.most |= self.now
            self.tasks = max(self.tasks, len(asyncio.all_tasks()))
            try:
                return await real(client, session, endpoint, call)
            finally:
                self.now[endpoint.server] -= 1

        monkeypatch.setattr(Client, "_post", watched)


def test_no_endpoint_has_more_in_flight_than_its_share(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge(monkeypatch)
    first, second = stand_in(latency_s=0.01), stand_in(latency_s=0.01)
    assert run(pool_of((first.endpoint, 3), (second.endpoint, 7)), asked(200)) == Counter(range(200))
    assert gauge.most == {"m-0": 3, "m-1": 7}
    # Each got work in proportion to its share.
    assert len(second.bodies()) > 1.5 * len(first.bodies())


def test_a_share_that_shrinks_grows_or_comes_back_is_kept_to(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge(monkeypatch)
    server = stand_in(latency_s=0.3)
    pool = pool_of((server.endpoint, 8))

    def leave_and_come_back() -> None:
        until(lambda: gauge.now["m-0"] == 8)
        pool.update([])
        pool.update([(server.endpoint, 8)])
        until(lambda: len(server.bodies()) > 8)
        pool.update([(server.endpoint, 2)])
        # What the pool has given out, not what was seen to be sent: a request may be on its way there.
        until(lambda: pool.needs()["m-0"].held <= 2)
        gauge.most.clear()
        until(lambda: len(server.bodies()) >= 24)
        assert gauge.most["m-0"] == 2
        pool.update([(server.endpoint, 8)])

    with later(leave_and_come_back):
        assert run(pool, asked(60)) == Counter(range(60))
    assert gauge.most["m-0"] == 8


def test_a_pool_gives_several_places_at_once_and_says_what_is_needed(stand_in: Callable[..., StandIn]) -> None:
    began: list[bool] = []
    pool = Pool(lambda: began.append(True))
    first, second = stand_in().endpoint, stand_in().endpoint
    pool.update([(first, 5), (second, 8)])
    slot, granted = pool.take(3)
    assert slot is not None
    assert (slot.endpoint, granted) == (first, 1)  # several requests fill a share, so that some compute meanwhile
    assert [pool.take(9, but=[first.server])[1] for _ in range(5)] == [2, 2, 2, 2, 0]
    assert [pool.take(9)[1] for _ in range(4)] == [1, 1, 1, 1]
    assert pool.take() == (None, 0)
    assert pool.pause_s() == 60.0
    pool.want(10)
    pool.want(9)
    assert began == [True]
    pool.update([(first, 1), (second, 4)])
    pool.refuse(first)
    assert pool.needs() == {
        first.server: Need(wanted=9 + 5, held=5, refused=1),  # until it has come down to its share
        second.server: Need(wanted=9 + 8, held=8),
    }
    pool.give_back(slot, 3)
    pool.want(0)
    assert pool.needs()[first.server] == Need(wanted=2, held=2, refused=1)
    pool.want(1)
    assert began == [True, True]


@pytest.mark.parametrize(("status", "refused"), [(429, 1), (503, 1), (500, 0)])
def test_refusals_are_counted_for_the_limit(scripted: Callable[..., Scripted], status: int, refused: int) -> None:
    server = scripted(lambda number: fine() if number else web.Response(status=status))
    pool = pool_of((server.endpoint(), 1))
    assert run(pool, asked(3)) == Counter(range(3))
    assert pool.needs()["m-0"] == Need(wanted=0, held=1, refused=refused)


def test_twenty_thousand_queued_calls_need_no_more_tasks_than_may_be_in_flight(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    gauge = Gauge(monkeypatch)
    pool = pool_of((scripted(fine).endpoint(), 20))
    answered = 0

    def stop_early(*_: object) -> None:
        nonlocal answered
        answered += 1
        if answered == 500:
            pool.cancel("seen enough")

    with pytest.raises(Cancelled, match="seen enough"):
        Client(model="m", pool=pool).run(asked(20_000), stop_early)
    assert gauge.most == {"m-0": 20}
    # Ours, the main one, and what aiohttp needs for a connection that is being made.
    assert gauge.tasks < 50


# Servers that go


def test_a_server_that_dies_loses_no_call_and_another_takes_over(stand_in: Callable[..., StandIn]) -> None:
    dying, other = stand_in(die_after=40, latency_s=0.01), stand_in(latency_s=0.01)
    assert run(pool_of((dying.endpoint, 8), (other.endpoint, 8)), asked(200)) == Counter(range(200))
    assert dying.process.wait(10) == 1
    assert len(dying.bodies()) == 40
    assert len(other.bodies()) >= 200 - 40


def test_calls_wait_while_there_is_no_server_and_go_on_when_one_comes(stand_in: Callable[..., StandIn]) -> None:
    dying, other = stand_in(die_after=10), stand_in()
    pool = Pool()

    def serve() -> None:
        pool.update([(dying.endpoint, 4)])
        assert dying.process.wait(20) == 1
        pool.update([])
        pool.update([(other.endpoint, 4)])

    with later(serve):
        assert run(pool, asked(50)) == Counter(range(50))


def test_a_held_pool_lets_what_is_in_flight_come_home_and_nothing_new_out(
    scripted: Callable[..., Scripted],
) -> None:
    server = scripted(lambda number: web.json_response({"choices": [{"index": 0}]}))
    pool = pool_of((server.endpoint(), 4))
    answered: list[int] = []

    def on_reply(call: Ask, _: object) -> None:
        answered.append(call.number)
        if len(answered) == 10:
            pool.hold(True)

    def let_go() -> None:
        until(lambda: len(answered) >= 10)
        until(lambda: not pool._slots["m-0"].in_flight)
        assert len(server.requests) == len(answered) <= 10 + 4
        assert pool.take() == (None, 0)
        assert pool.needs()["m-0"].wanted > 4  # the server's share is kept
        pool.hold(False)

    with later(let_go):
        Client(model="m", pool=pool).run(asked(40), on_reply)
    assert sorted(answered) == list(range(40))


def test_an_endpoint_that_left_may_still_answer_what_it_has(stand_in: Callable[..., StandIn]) -> None:
    first, second = stand_in(latency_s=0.5), stand_in()
    pool = pool_of((first.endpoint, 4))

    def replace() -> None:
        until(lambda: len(first.bodies()) == 4)
        pool.update([(second.endpoint, 4)])

    with later(replace):
        assert run(pool, asked(20)) == Counter(range(20))
    assert len(first.bodies()) == 4
    assert len(second.bodies()) == 16


def test_what_is_in_flight_at_a_lost_endpoint_is_asked_elsewhere_at_once(stand_in: Callable[..., StandIn]) -> None:
    """One that is cut off answers nothing, and does not close its connections either."""
    silent, other = stand_in(hang_after=1), stand_in()
    pool = pool_of((silent.endpoint, 8))
    begun = time.monotonic()

    def lose() -> None:
        until(lambda: pool.needs()[silent.endpoint.server].wanted and len(silent.bodies()) >= 4)
        pool.update([(other.endpoint, 8)], lost=[silent.endpoint.server])
        pool.update([(other.endpoint, 8)])  # the next news of shares know nothing of it any more

    with later(lose):
        assert run(pool, asked(20)) == Counter(range(20))
    assert time.monotonic() - begun < 20  # and not after the deadline of a request, two minutes
    assert pool.needs().keys() == {other.endpoint.server, silent.endpoint.server}
    assert pool.needs()[silent.endpoint.server].held == 0


def test_a_dead_endpoint_may_stay_in_the_pool_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exponent of a doubled pause once grew with each request that was lost, until it was no float any more."""
    monkeypatch.setattr(module, "PAUSE_S", 1e-5)
    monkeypatch.setattr(module, "PAUSE_MOST_S", 1e-5)
    nowhere = Endpoint(server="m-0", url="http://127.0.0.1:9", api_key=KEY, max_model_len=1, engine_version="0")
    pool = pool_of((nowhere, 64))
    client = Client(model="m", pool=pool)

    def stop() -> None:
        until(lambda: client.traffic.retries > 1500)
        pool.cancel("enough")

    with later(stop), pytest.raises(Cancelled):
        client.run(asked(64), lambda *_: None)


def test_a_call_whose_connection_breaks_always_fails_when_its_server_answers_others(
    scripted: Callable[..., Scripted],
) -> None:
    """As behind a proxy that ends what takes long."""
    server = scripted(lambda number: None if server.requests[number]["prompt"] == [1, 1] else fine())
    words = f"failed {ATTEMPTS} times, last at m-0: the connection broke, while others got answers; does a proxy"
    with pytest.raises(RequestFault, match=words):
        run(pool_of((server.endpoint(), 2)), asked(200))
    assert sum(request["prompt"] == [1, 1] for request in server.requests) > ATTEMPTS


def test_a_server_that_breaks_all_connections_for_a_while_costs_no_call(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda number: fine() if number >= 4 * ATTEMPTS else None)
    assert run(pool_of((server.endpoint(), 2)), asked(4)) == Counter(range(4))


@pytest.mark.parametrize("made", [False, True])
def test_an_endpoint_that_gives_broken_connections_only_is_told_of_once(
    made: bool, scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_S", 0.3)
    nowhere = Endpoint(server="m-0", url="http://127.0.0.1:9", api_key=KEY, max_model_len=1, engine_version="0")
    told: list[tuple[str, bool, float]] = []
    begun = time.monotonic()

    def on_broken(endpoint: Endpoint, error: BaseException) -> None:
        told.append((endpoint.server, isinstance(error, module.UNMADE), time.monotonic() - begun))

    pool = Pool(on_broken=on_broken)
    client = Client(model="m", pool=pool)

    def stop() -> None:
        until(lambda: told)
        seen = client.traffic.retries
        until(lambda: client.traffic.retries > seen + 8)
        pool.cancel("enough")

    pool.update([(scripted(lambda _: None).endpoint() if made else nowhere, 2)])
    with later(stop), pytest.raises(Cancelled, match="enough"):
        client.run(asked(4), lambda *_: None)
    ((server, unmade, after_s),) = told
    assert (server, unmade) == ("m-0", not made)
    assert after_s >= 0.3


def test_requests_that_fail_together_pause_a_server_once(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.3)
    monkeypatch.setattr(module, "PAUSE_MOST_S", 60.0)
    server = scripted(lambda number: fine() if number >= 16 else web.Response(status=503))
    started = time.monotonic()
    assert run(pool_of((server.endpoint(), 16)), asked(16)) == Counter(range(16))
    assert time.monotonic() - started < 5
    assert len(caplog.records) == 1


# The scheduler takes the cell back


def test_a_cancelled_run_ends_within_a_second_though_requests_are_in_flight(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in(latency_s=60)
    pool = pool_of((server.endpoint, 4))
    cancelled_at = 0.0

    def cancel() -> None:
        nonlocal cancelled_at
        until(lambda: len(server.bodies()) == 4)
        cancelled_at = time.monotonic()
        pool.cancel("its turn is over")

    with later(cancel), pytest.raises(Cancelled, match="its turn is over"):
        run(pool, asked(10))
    assert time.monotonic() - cancelled_at < 1


def test_a_cancelled_run_ends_though_there_is_no_server() -> None:
    pool = Pool()
    with later(lambda: pool.cancel("why")), pytest.raises(Cancelled, match="why"):
        run(pool, asked(1))
    with pytest.raises(Cancelled):
        run(pool, asked(1))


def test_a_pool_may_change_at_any_time_around_a_run(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    pool = pool_of((server.endpoint, 4))
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            pool.update([(server.endpoint, 4)])

    with later(change):
        try:
            for _ in range(20):
                assert run(pool, asked(4)) == Counter(range(4))
        finally:
            over.set()


# Servers that refuse


def test_a_refused_request_fails_at_once_with_the_server_s_words(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in("--max-model-len", "2")
    with pytest.raises(RequestError, match=r"m-0 refused a request of model m \(400\): .*maximum model length of 2"):
        run(pool_of((server.endpoint, 1)), asked(5))
    assert len(server.bodies()) == 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_asked_again_and_forgotten(scripted: Callable[..., Scripted], status: int) -> None:
    server = scripted(lambda number: fine() if number % 3 == 2 else web.Response(status=status))
    client = Client(model="m", pool=pool_of((server.endpoint(), 1)))
    answered: list[int] = []
    client.run(asked(5), lambda call, _: answered.append(call.number))
    assert answered == [0, 1, 2, 3, 4]
    assert client.traffic.retries == 10
    assert len(server.requests) == client.traffic.requests == 15


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: web.Response(status=500, text="engine is dead"), r"m-0 answered 500: engine is dead"),
        (lambda: web.Response(status=429, text="slow down"), r"m-0 answered 429: slow down"),
        (lambda: web.Response(text="<html>"), r"m-0 sent a broken answer"),
        (lambda: web.Response(text="[1]"), r"m-0 sent a broken answer"),
    ],
)
def test_a_fault_that_does_not_pass_fails_after_so_many_tries(
    scripted: Callable[..., Scripted], answer: Callable[[], web.Response], words: str
) -> None:
    server = scripted(lambda _: answer())
    with pytest.raises(RequestFault, match=f"failed {ATTEMPTS} times, last at m-0: {words}"):
        run(pool_of((server.endpoint(), 1)), asked(3))
    assert len(server.requests) == ATTEMPTS


def test_a_request_that_is_not_answered_in_time_counts_as_a_try(
    stand_in: Callable[..., StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.1)
    monkeypatch.setattr(module, "DEADLINE_PER_TOKEN_S", 0.0)
    server = stand_in(latency_s=30)
    with pytest.raises(RequestError, match=f"failed {ATTEMPTS} times, last at m-0: m-0 did not answer within 0 s"):
        run(pool_of((server.endpoint, 1)), asked(1))


def test_the_key_is_never_repeated(scripted: Callable[..., Scripted], caplog: pytest.LogCaptureFixture) -> None:
    faults = [web.Response(status=503, text=f"no {KEY} no"), web.Response(status=401, text=f"what is {KEY}?")]
    server = scripted(lambda number: faults[number])
    with pytest.raises(RequestError) as caught:
        run(pool_of((server.endpoint(), 1)), asked(1))
    assert "what is ***?" in str(caught.value)
    assert "no *** no" in caplog.text
    assert KEY not in str(caught.value) + caplog.text + repr(server.endpoint())


def test_a_server_that_wants_no_key_is_sent_none(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda number: fine() if number < 2 else web.Response(status=400, text="no such model"))
    run(pool_of((server.endpoint(), 1)), asked(1))
    without = replace(server.endpoint(), api_key="")
    run(pool_of((without, 1)), asked(1))
    assert server.keys == [f"Bearer {KEY}", None]
    with pytest.raises(RequestError, match=r"\(400\): no such model$"):
        run(pool_of((without, 1)), asked(1))


def test_what_a_reply_s_reader_raises_ends_the_run(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()

    def read(*_: object) -> None:
        raise RequestError("no log-probabilities")

    with pytest.raises(RequestError, match="no log-probabilities"):
        Client(model="m", pool=pool_of((server.endpoint, 4))).run(asked(100), read)
    assert len(server.bodies()) < 100


def test_a_reply_that_is_none_is_asked_for_again(stand_in: Callable[..., StandIn]) -> None:
    client = Client(model="m", pool=pool_of((stand_in().endpoint, 4)))
    refused: list[int] = []
    taken = []

    def on_reply(call: Any, reply: Any) -> None:
        if not refused:
            refused.append(1)
            raise PassingFault("given up")
        taken.append(call)

    client.run(asked(3), on_reply)
    assert len(taken) == 3
    assert client.traffic.requests == 4


def test_a_request_of_several_that_is_refused_is_sent_again_one_by_one(stand_in: Callable[..., StandIn]) -> None:
    """Something between us and a server may take no long requests, and one bad prompt must not be the others' fault."""
    server = stand_in()
    calls = [Ask(number, group="g", most=1) for number in range(20)]
    assert run(pool_of((server.endpoint, 40)), calls) == Counter(range(20))
    with pytest.raises(RequestError, match="400"):
        run(pool_of((server.endpoint, 40)), [*calls, Ask(20, group="g", most=0)])
