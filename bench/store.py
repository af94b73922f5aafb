"""`python -m bench.store`: how fast responses become durable, how soon and in how much memory they are found again.

All between an evaluator's answer and the disk is the sweep's own: child processes under their supervisors, socket
pairs, Ray actors and their streams, the driver's tick, one transaction for all, acknowledgements, and evaluators that
stop when too much is not stored. What the children run in place of lm-eval is here:

- Sustained: eight evaluators that answer as fast as they may, for a minute, into a store that holds a million
  responses. Counted is what was committed.
- Owed: eight evaluators with a cell of 125,000 requests each, of which one has no stored answer. They build lm-eval's
  request objects and wait until all have; then each looks its requests up and sends what is owed. Counted is the time
  to the first request on the wire (the last evaluator's stands beside it), and the largest memory of any process.

The store lies in the folder given by --folder, `.bench` unless it says otherwise.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import data
from bench.rows import Figure
from sweep.results.store import KEY_BYTES, Response, RunDirectory, Store, response_key
from sweep.running.machine import prepare_local_ray

if TYPE_CHECKING:
    from sweep.running.cluster import Cluster, ClusterEvent

EVALUATORS = 8
STORED = 1_000_000
CELL = STORED // EVALUATORS
CHOICES = 4
CONTEXT_CHARACTERS = 2_000
"""Of a 5-shot question of mmlu."""

SUSTAINED_S = 60.0
WARM_UP_S = 5.0
LEAST_PER_S = 20_000.0
MOST_S = 15.0
GIB = 2**30

FILL = 20_000
"""Responses of one commit while the store is filled."""

SHARE = 512
"""Prompts in flight of one evaluator."""

FINGERPRINT = "of the model"


def answer_text(at: float) -> bytes:
    """An answer of the size that next-token scoring leaves; its `logprob` is minus the time when it was given."""
    return b'{"logprob":%.9f,"is_greedy":false,"cut":0,"method":"next_token","engine":"0.32.0","tokens":1}' % -at


def pairs(cell: int) -> Iterator[tuple[str, str]]:
    """The requests of a cell: the choices of a question share a context that no other question has."""
    filler = "The following are multiple choice questions with their answers. " * (CONTEXT_CHARACTERS // 64)
    for question in range(CELL // CHOICES):
        context = f"{filler}\n\nQuestion {question} of cell {cell}\nAnswer:"
        yield from ((context, f" {letter}") for letter in "ABCD")


def fill(store: Store) -> float:
    """Store all requests of all cells but the last of each; responses a second."""
    start, number = time.monotonic(), 0
    batch: list[Response] = []
    for cell in range(EVALUATORS):
        for number_in_cell, pair in enumerate(pairs(cell), start=1):
            if number_in_cell < CELL:
                key = response_key(FINGERPRINT, "loglikelihood", pair)
                batch.append(Response(key=key, cell=f"m/{cell}", method="next_token", answer=answer_text(1.0)))
            if len(batch) == FILL:
                store.put(batch)
                number += len(batch)
                batch = []
    store.put(batch)
    return (number + len(batch)) / (time.monotonic() - start)


# The driver.


@contextmanager
def cluster_of(kind: str, folder: Path) -> Iterator["Cluster"]:
    """A local cluster whose evaluators run this module; `kind` begins their names and tells them what to do."""
    import ray

    from sweep.evaluating import evaluator
    from sweep.planning.config import RayConfig
    from sweep.running import cluster as module

    class Host(module._EvaluatorHost):
        def __init__(self, *arguments: Any) -> None:
            evaluator.PROGRAM = "bench.store"
            super().__init__(*arguments)

    plain = module._EvaluatorActor
    module._EvaluatorActor = ray.remote(
        num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"messages": 1}
    )(Host)
    try:
        with closing(module.Cluster(RayConfig(address="local", evaluators=EVALUATORS), api_key="")) as cluster:
            for number in range(EVALUATORS):
                cluster.start_evaluator(f"{kind}-{number}", folder / "logs" / f"{kind}-{number}.log", node=None)
            yield cluster
    finally:
        module._EvaluatorActor = plain


def drive(
    store: Store,
    cluster: "Cluster",
    port: int,
    *,
    seen: Callable[[Sequence["ClusterEvent"]], bool],
) -> None:
    """The driver's loop over these evaluators, without what a runner decides, until `seen` has seen enough."""
    from sweep.evaluating import evaluator as ev
    from sweep.evaluating.preflight import Facts
    from sweep.evaluating.scoring import Method
    from sweep.planning.config import Model, Seeds, Task
    from sweep.planning.plan import Cell, ModelPlan
    from sweep.running.cluster import EvaluatorLost, EvaluatorReady, EvaluatorSaid
    from sweep.running.runner import TICK_S, keep_answers
    from sweep.serving.server import Endpoint

    model = ModelPlan(name="m", model=Model(path="m"), revision=None, fingerprint=FINGERPRINT, server="m")
    facts = Facts(max_model_len=4096, engine_version="0.32.0", methods=(Method.NEXT_TOKEN, Method.ECHO))
    endpoint = Endpoint(
        server="m-0", url=f"http://127.0.0.1:{port}", api_key="", max_model_len=4096, engine_version="0.32.0"
    )
    while True:
        events = cluster.events(TICK_S)
        keep_answers(events, store, cluster)
        for event in events:
            match event:
                case EvaluatorReady(evaluator=name):
                    task = name.rpartition("-")[2]
                    cell = Cell(model=model, task_name=task, task=Task(task=task), seeds=Seeds(), fingerprint="")
                    cluster.send(name, ev.RunCell(cell=cell, attempt=1, facts=facts))
                    cluster.send(name, ev.PoolChanged(shares=((endpoint, SHARE),), facts=facts))
                case EvaluatorSaid(evaluator=name, event=ev.WantAnswers(keys=keys)):
                    cluster.send(name, ev.KnownAnswers(answers=store.answers(keys)))
                case EvaluatorLost(reason=reason):
                    raise SystemExit(f"an evaluator was lost: {reason}")
        if seen(events):
            return


def sustained(folder: Path) -> Figure:
    from sweep.evaluating import evaluator as ev
    from sweep.running.cluster import EvaluatorSaid

    delays: list[float] = []
    marks: list[tuple[float, int]] = []
    ticks: list[float] = []
    cpu_s: list[float] = []
    number = 0

    def seen(events: Sequence["ClusterEvent"]) -> bool:
        nonlocal number
        now = time.time()
        batches = [e.event for e in events if isinstance(e, EvaluatorSaid) and isinstance(e.event, ev.Answered)]
        number += sum(batch.number for batch in batches)
        if len(marks) and now - marks[0][0] > WARM_UP_S:
            ticks.append(now - marks[-1][0])
            cpu_s.append(time.process_time())
            # The first of a batch has waited longest.
            delays.extend(now + float(json.loads(b.responses[0].answer)["logprob"]) for b in batches)
        if batches or marks:
            marks.append((now, number))
        return bool(marks) and now - marks[0][0] > WARM_UP_S + SUSTAINED_S

    with closing(Store(RunDirectory(folder / "store"))) as store, cluster_of("answer", folder) as cluster:
        mode = store.mode
        drive(store, cluster, 0, seen=seen)
    begun = next(mark for mark in marks if mark[0] - marks[0][0] > WARM_UP_S)
    spent, stored = marks[-1][0] - begun[0], marks[-1][1] - begun[1]
    return Figure(
        row=f"responses/s from {EVALUATORS} evaluators into SQLite ({mode}), {spent:.0f} s, beside {STORED:,} stored",
        value=stored / spent,
        bar=LEAST_PER_S,
        at_most=False,
        seen={
            "durable_after_s_median": statistics.median(delays),
            "durable_after_s_longest": max(delays),
            "tick_s_longest": max(ticks),
            "driver_cpu_us_per_response": 1e6 * (cpu_s[-1] - cpu_s[0]) / stored,
            "responses": number,
        },
    )


def owed(folder: Path) -> list[Figure]:
    from sweep.evaluating import evaluator as ev
    from sweep.running.cluster import EvaluatorSaid

    ready: set[str] = set()
    told: dict[str, Mapping[str, float]] = {}
    cpu_s: list[float] = []

    with closing(Store(RunDirectory(folder / "store"))) as store, cluster_of("owed", folder) as cluster:

        def seen(events: Sequence["ClusterEvent"]) -> bool:
            for event in events:
                if isinstance(event, EvaluatorSaid) and isinstance(event.event, ev.CellProgress):
                    ready.add(event.evaluator)
                    if len(ready) == EVALUATORS and not cpu_s:
                        cpu_s.append(time.process_time())
                        (folder / "go").touch()
                if isinstance(event, EvaluatorSaid) and isinstance(event.event, ev.Checked):
                    told[event.evaluator] = json.loads(str(event.event.error))
            return len(told) == EVALUATORS

        (folder / "go").unlink(missing_ok=True)
        drive(store, cluster, 9, seen=seen)
    cpu_s.append(time.process_time())
    waits = [each["first_sent"] - min(one["begun"] for one in told.values()) for each in told.values()]
    largest = max(each["peak"] for each in told.values())
    peaks = {
        "driver_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "evaluator_gib": largest / GIB,
        "evaluator_before_gib": max(each["before"] for each in told.values()) / GIB,
    }
    name = f"{EVALUATORS} cells of {CELL:,} requests, all but one of each stored"
    return [
        Figure(
            row=f"s until the first owed request leaves: {name}, all {EVALUATORS} at once",
            value=min(waits),
            bar=MOST_S,
            at_most=True,
            seen={
                "median_s": statistics.median(waits),
                "last_s": max(waits),
                "driver_cpu_s": cpu_s[1] - cpu_s[0],
                "evaluator_cpu_s": statistics.median(each["cpu_s"] for each in told.values()),
            },
        ),
        Figure(
            row=f"GiB of the largest process: {name}",
            value=max(peaks["driver_gib"], peaks["evaluator_gib"]),
            bar=1.0,
            at_most=True,
            seen=peaks,
        ),
    ]


# What an evaluator's child runs.


def evaluator(descriptor: int, name: str) -> None:
    from sweep.evaluating import evaluator as ev

    connection = Connection(descriptor)
    link = ev._Link(connection)
    threading.Thread(target=link.read_forever, daemon=True).start()
    threading.Thread(target=link.flush_forever, daemon=True).start()
    attempt = link.work.get()
    assert isinstance(attempt, ev._Attempt)
    if name.startswith("answer"):
        _answer_forever(attempt)
    told = _send_owed(attempt, Path(os.environ["BENCH_STORE_FOLDER"]))
    link.send(ev.Checked(error=json.dumps(told)))
    threading.Event().wait()


def _answer_forever(attempt: Any) -> None:
    """Answer whatever the pool lets out, at once."""
    wake = threading.Event()
    attempt.pool._call(wake.set)
    while True:
        slot, places = attempt.pool.take(64)
        if slot is None:
            wake.wait(1.0)
            wake.clear()
            continue
        now = answer_text(time.time())
        for _ in range(places):
            attempt.answered(
                Response(key=os.urandom(KEY_BYTES), cell=attempt.cell.key, method="next_token", answer=now)
            )
        attempt.pool.give_back(slot, places)


def _send_owed(attempt: Any, folder: Path) -> Mapping[str, float]:
    """Ask for the cell's requests as lm-eval does; when it began, when the first was sent, bytes at its most."""
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerFast

    from sweep import demo
    from sweep.evaluating.client import Cancelled, Client
    from sweep.evaluating.lm import SweepLM
    from sweep.planning.config import Overflow

    for name in ("torch", "datasets", "lm_eval.evaluator", "sweep.evaluating.evaluation"):
        importlib.import_module(name)  # a real evaluator has them in memory too
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=demo._train_tokenizer(demo._general_text(), 600))
    tokenizer.eos_token = tokenizer.decode([0])
    client = Client(model="m", pool=attempt.pool)
    lm = SweepLM(
        cell=attempt.cell.key,
        fingerprint=FINGERPRINT,
        tokenizer=tokenizer,
        overflow=Overflow.ERROR,
        client=client,
        channel=attempt,
    )
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pair in pairs(int(attempt.cell.task_name))
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    attempt.progress(done=0, total=0, reused=0)
    while not (folder / "go").exists():
        time.sleep(0.01)
    begun, cpu_s = time.monotonic(), time.process_time()

    def cancel_when_sent() -> None:
        while client.traffic.first_sent is None:
            time.sleep(0.01)
        attempt.pool.cancel("seen")

    threading.Thread(target=cancel_when_sent, daemon=True).start()
    try:
        lm.loglikelihood(requests)
    except Cancelled:
        assert client.traffic.first_sent is not None
        assert lm.counts.reused == CELL - 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        spent = {"begun": begun, "first_sent": client.traffic.first_sent, "cpu_s": time.process_time() - cpu_s}
        return {**spent, "before": before, "peak": peak}
    raise AssertionError("there is no server, and nothing is owed")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=__doc__)
    parser.add_argument("--folder", type=Path, default=data.ROOT / ".bench", help="where the store lies (%(default)s)")
    folder = parser.parse_args(arguments).folder / "store-bench"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ |= {"BENCH_STORE_FOLDER": str(folder.resolve())}
    prepare_local_ray()  # before it is imported
    try:
        with closing(Store(RunDirectory(folder / "store"))) as store:
            filled = fill(store)
        rows = owed(folder)
        for row in rows:
            print(row.line(), flush=True)
        rows.append(sustained(folder))
        print(rows[-1].line(), flush=True)
        print(f"(filled at {filled:,.0f} responses/s, keys included)", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():  # as an evaluator's supervisor starts it
        evaluator(int(sys.argv[1]), sys.argv[2])
    sys.exit(main(sys.argv[1:]))
