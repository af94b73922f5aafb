"""A server as a sweep would have it, and the rows that compare on one."""

import http.client
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from bench import data, sides
from bench.rows import in_turn
from bench.sides import Job, Ran, Settings, Side, Size, Work
from sweep.evaluating.concurrency import automatic_limit
from sweep.evaluating.preflight import Expected, Facts, inspect
from sweep.planning.config import Device, Model
from sweep.planning.plan import ServerPlan
from sweep.serving.server import Endpoint, Server

TRIED = tuple(Settings(num_concurrent=n, batch_size=b) for n in (1, 16, 64) for b in (1, 8))
"""Among which local-completions is at its best."""

PARTS = 10
"""That best is found on a tenth of the questions."""

PREFILL_PROMPTS, PREFILL_TOKENS, PREFILL_ROUNDS = 8, 800, 3
"""Random prompts whose time tells how fast an engine reads: as long as five examples in front of a question."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """A server that has passed preflight."""

    model: Path
    endpoint: Endpoint
    facts: Facts
    start_s: float
    """Until it answered."""

    def job(self, side: Side, work: Work, **more: object) -> Job:
        limit = automatic_limit()
        return Job(
            side=side,
            work=work,
            model=str(self.model),
            endpoint=self.endpoint,
            facts=self.facts,
            concurrency=limit,
            **more,  # type: ignore[arg-type]
        )

    def run(self, side: Side, work: Work, **more: object) -> Ran:
        """One side, with nothing in the server's cache."""
        self.forget()
        return sides.run(self.job(side, work, **more))

    def forget(self) -> None:
        """Empty the prefix cache: the next prompts are new to the server."""
        answer = self._post("/reset_prefix_cache", {})
        if not answer["success"]:
            raise SystemExit("the server did not empty its prefix cache: something still runs there")

    def prefill_tokens_per_s(self) -> float:
        """How fast the engine reads prompts that it has not seen, several at once; the best of a few rounds."""
        rng = random.Random(0)
        rates = []
        for _ in range(PREFILL_ROUNDS):
            prompts = [[rng.randrange(10, 7000) for _ in range(PREFILL_TOKENS)] for _ in range(PREFILL_PROMPTS)]
            start = time.perf_counter()
            self._post("/v1/completions", {"model": self.model.name, "prompt": prompts, "max_tokens": 1})
            rates.append(PREFILL_PROMPTS * PREFILL_TOKENS / (time.perf_counter() - start))
        return max(rates)

    def _post(self, path: str, body: object) -> dict[str, object]:
        connection = http.client.HTTPConnection(urlsplit(self.endpoint.url).netloc, timeout=600)
        key = {"Authorization": f"Bearer {self.endpoint.api_key}", "Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), key)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if response.status != 200:
            raise SystemExit(f"{path} answered {response.status}: {content[:500].decode(errors='replace')}")
        found: dict[str, object] = json.loads(content)
        return found


@contextmanager
def live(model: Path) -> Iterator[Live]:
    """A server of this model, stopped at the end. Ends the program where preflight refuses it."""
    name = model.name
    engine = {name: value for name, value in sides.ENGINE.items() if name not in ("dtype", "max_model_len")}
    config = Model(
        path=str(model),
        device=Device.CPU,
        dtype=str(sides.ENGINE["dtype"]),
        max_model_len=data.MAX_MODEL_LEN,
        server=engine,
        # The mode has the address that empties the prefix cache, so that every run can be the first one.
        env={"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": str(sides.KV_CACHE_GIB)},
        # local-completions with 512 prompts in flight can keep the server from answering /health for over a minute.
        hang_timeout_s=6000.0,
    )
    plan = ServerPlan(name=name, model=config, revision=None, adapters={name: None}, gpus=1, replicas=1)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(plan, name=f"{name}-0", api_key="bench", gpu_ids=[], log_path=Path(folder) / "server.log")
        try:
            start = time.perf_counter()
            endpoint = server.start()
            start_s = time.perf_counter() - start
            seen = inspect(endpoint, {name: Expected(served_name=name, max_model_len=data.MAX_MODEL_LEN, token_ids=())})
            if seen.facts is None:
                raise SystemExit(seen.refusal)
            yield Live(model=model, endpoint=endpoint, facts=seen.facts, start_s=start_s)
        finally:
            server.stop()


def best_settings(server: Live, work: Work, *, part: int) -> tuple[Settings, Size]:
    """What local-completions is fastest with, and the size of the whole work."""
    found = server.run(Side.SEARCH, work, settings=TRIED, part=part)
    assert found.size is not None
    by_settings = dict(zip(TRIED, found.seconds, strict=True))
    best = min(TRIED, key=by_settings.__getitem__)
    tried = ", ".join(f"{s.num_concurrent} x {s.batch_size}: {seconds:.1f} s" for s, seconds in by_settings.items())
    print(f"  local-completions, num_concurrent x batch_size on 1/{part} of the questions: {tried}", flush=True)
    return best, found.size


def by_turns(
    turns: Mapping[str, Callable[[], Ran]], *, rounds: int, fewer: Mapping[str, int] | None = None
) -> dict[str, list[Ran]]:
    """Every side so many times, by turns, so that what else the machine does falls on all of them, and each time with
    another one first, since it matters what ran before; `fewer` for sides that are left out of the later rounds."""
    ran: dict[str, list[Ran]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, turn in in_turn(turns, number):
            if number < (fewer or {}).get(name, rounds):
                ran[name].append(turn())
                print(f"  {name}: {ran[name][-1].request_s:.2f} s, whole {ran[name][-1].command_s:.1f} s", flush=True)
    return ran


def most_different(one: Ran, other: Ran) -> float:
    """The largest difference of two sides' log-likelihoods. Ends the program where they have not the same documents."""
    if one.answers.keys() != other.answers.keys() or not one.answers:
        raise SystemExit(f"two sides have other documents: {len(one.answers)} and {len(other.answers)}")
    pairs: Sequence[tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]]
    pairs = [(one.answers[key], other.answers[key]) for key in one.answers]
    return max(abs(a[0] - b[0]) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
