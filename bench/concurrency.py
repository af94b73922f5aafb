"""`python -m bench.concurrency`: `concurrency: auto` against fixed numbers on a real vLLM server on the CPU.

Every side gets the same seconds of the same work, with prompts that no side before had, so that no prefix cache helps.
What counts is what the server says it has computed in that time: sequences scored, or tokens generated. `auto` begins
each time where it begins in a sweep when nothing is known, so its search is in its figure.
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import data
from bench.rows import Row
from sweep.evaluating.client import Cancelled, Client, Pool
from sweep.evaluating.concurrency import LOOK_S, Controller, automatic_limit
from sweep.evaluating.scoring import COMPLETIONS
from sweep.planning.config import Device, Model
from sweep.planning.plan import ServerPlan
from sweep.serving.metrics import Snapshot
from sweep.serving.server import Endpoint, Server

BAR = 0.95
"""What the project promises: of the best fixed number."""

FIXED = (1, 4, 16, 64, 256)

VOCABULARY = range(5, 400)
"""Token ids that every tokenizer of the demo has."""

SECONDS = 20.0
ROUNDS = 5
"""More than elsewhere: one round's number varies by some percent, and the best of five fixed ones is a lucky one."""


@dataclass(frozen=True, kw_only=True)
class Work:
    name: str
    prompt: int
    """Tokens."""
    generated: tuple[int, int]
    """Fewest and most new tokens; each as likely. Were all alike, sequences that began together would end together, and
    a whole batch would be replaced at once, which no real task does and which favours the size of the batch."""

    def asks(self, count: int, seed: int) -> list["Ask"]:
        return [Ask(work=self, seed=seed * count + number) for number in range(count)]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt of its own."""

    work: Work
    seed: int

    path = COMPLETIONS
    group = None
    prefix = None

    @property
    def tokens(self) -> int:
        return self.work.prompt + self.work.generated[1]

    def body(self) -> dict[str, Any]:
        rng = random.Random(self.seed)
        prompt, length = rng.choices(VOCABULARY, k=self.work.prompt), rng.randint(*self.work.generated)
        rest = {"logprobs": 1} if length == 1 else {"ignore_eos": True}
        return {"prompt": prompt, "max_tokens": length, "temperature": 0, **rest}


WORKS = (
    Work(name="next-token scoring, 400-token prompts", prompt=400, generated=(1, 1)),
    Work(name="generation, 100-token prompts and 16 to 112 new tokens", prompt=100, generated=(16, 112)),
)
QUEUED = 20_000
"""More than any side can do in its seconds."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[Server, Endpoint]]:
    model = Model(
        path=str(folder),
        device=Device.CPU,
        dtype="float32",
        max_model_len=2048,
        server={"enforce_eager": True},
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    plan = ServerPlan(name="bench", model=model, revision=None, adapters={"m": None}, gpus=1, replicas=1)
    with tempfile.TemporaryDirectory() as logs:
        server = Server(plan, name="bench-0", api_key="a-key", gpu_ids=[], log_path=Path(logs) / "bench-0.log")
        try:
            yield server, server.start()
        finally:
            server.stop()


def figures(server: Server) -> Snapshot:
    """Asks a server that is too busy to tell once more. Raises OSError where it is dead."""
    while True:
        try:
            return server.figures()
        except OSError:
            if not server.alive():
                raise
            time.sleep(LOOK_S)


def side(server: Server, endpoint: Endpoint, controller: Controller, asks: Sequence[Ask], seconds: float) -> float:
    """Generated tokens per second: of scoring, one a sequence."""
    pool = Pool()
    pool.update([(endpoint, controller.limit)])
    before = figures(server)

    def tune() -> None:
        """What the server's actor and the driver do in a sweep."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(LOOK_S)
            wanted = sum(need.wanted for need in pool.needs().values())
            controller.look(now_s=time.monotonic(), seen=figures(server), wanted=wanted)
            pool.update([(endpoint, controller.limit)])
        after.append(figures(server))
        took.append(time.monotonic() - start)
        pool.cancel("its time is over")

    after: list[Snapshot] = []
    took: list[float] = []
    start = time.monotonic()
    thread = threading.Thread(target=tune)
    thread.start()
    try:
        Client(model="m", pool=pool).run(asks, lambda *_: None)
    except Cancelled:
        pass  # how each side ends
    else:
        raise RuntimeError(f"{len(asks)} prompts were not enough for {seconds:g} s")
    finally:
        thread.join()
    while (left := figures(server)).running or left.waiting:
        time.sleep(LOOK_S)
    return (after[0].generation_tokens - before.generation_tokens) / took[0]


def measure(server: Server, endpoint: Endpoint, work: Work, *, rounds: int, seconds: float, model: str) -> Row:
    rates: dict[str, list[float]] = {name: [] for name in (*map(str, FIXED), "auto")}
    settled: list[int] = []
    seeds = itertools.count(1)
    for turn in range(rounds):
        # Shuffled, so that none always follows the same.
        for name, found in random.Random(turn).sample(list(rates.items()), len(rates)):
            number = automatic_limit() if name == "auto" else int(name)
            controller = Controller(number, fixed=name != "auto", guessed=name == "auto")
            asks = work.asks(QUEUED, seed=next(seeds))
            found.append(side(server, endpoint, controller, asks, seconds))
            if name == "auto":
                settled.append(controller.settled)
            print(f"{work.name}: {name} in flight, {found[-1]:,.1f} tokens/s", flush=True)
    medians: Mapping[str, float] = {name: statistics.median(found) for name, found in rates.items()}
    best = max(medians[str(n)] for n in FIXED)
    return Row(
        row=f"concurrency auto against the best of {', '.join(map(str, FIXED))}: {work.name}, {model}",
        ratio=medians["auto"] / best,
        bar=BAR,
        medians={f"{name}_tokens_per_s": rate for name, rate in medians.items()}
        | {"auto_settled_at": statistics.median(settled)},
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.concurrency", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each side, by turns ({ROUNDS})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"that each side gets ({SECONDS:g})")
    parser.add_argument("--model", default="demo-base", help="of the demo's models (demo-base)")
    given = parser.parse_args(arguments)
    with served(data.demo_models() / given.model) as (server, endpoint):
        # Its first requests allocate and warm up.
        for work in WORKS:
            side(server, endpoint, Controller(16, fixed=True), work.asks(QUEUED, seed=0), 10.0)
        rows = [
            measure(server, endpoint, work, rounds=given.rounds, seconds=given.seconds, model=given.model)
            for work in WORKS
        ]
    for row in rows:
        print(row.line())
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
