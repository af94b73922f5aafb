"""The process that runs a cell's lm-eval, and what it says to the driver and the driver to it.

An evaluator is a child process whose main thread runs lm-eval: some tasks time their own scoring with SIGALRM
(minerva_math), which Python allows in the main thread only, and they take the error that any other thread gets for a
wrong answer. A second thread reads messages, so that answers and endpoints arrive while lm-eval computes; a third sends
responses in small batches. Both ends of the connection are plain pickles over a socket pair; when the driver's end
closes, the process ends.
"""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sweep.client import Cancelled, Pool
from sweep.config import Seeds, Task
from sweep.errors import SweepError, TaskError
from sweep.plan import Cell, ModelPlan
from sweep.preflight import Facts
from sweep.record import Record
from sweep.server import Endpoint
from sweep.store import Response

log = logging.getLogger(__name__)

BATCH_RESPONSES = 256
BATCH_S = 0.5
"""Responses leave an evaluator at the latest after so many or so much time; each batch is one commit of the store."""

PROGRESS_S = 0.5


# To an evaluator.


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """Load this task's data and say whether that worked."""

    task_name: str
    task: Task
    seeds: Seeds


@dataclass(frozen=True, kw_only=True)
class CheckModel:
    """Load this model's tokenizer and say whether that worked."""

    model: ModelPlan


@dataclass(frozen=True, kw_only=True)
class RunCell:
    cell: Cell
    attempt: int
    """Comes back with everything the cell says, so that a late word of an earlier attempt is known as such."""
    facts: Facts | None
    """Stored or live; None while the model's first server starts."""


@dataclass(frozen=True, kw_only=True)
class KnownAnswers:
    """The reply to WantAnswers."""

    answers: Mapping[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class PoolChanged:
    """The endpoints of the running cell's model, each with this evaluator's share of requests in flight."""

    shares: tuple[tuple[Endpoint, int], ...]
    facts: Facts | None


@dataclass(frozen=True, kw_only=True)
class CancelCell:
    reason: str


# From an evaluator.


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A task's or model's check is over; `error` is None when all is well."""

    task_name: str | None = None
    model: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class WantAnswers:
    cell: str
    attempt: int
    keys: Sequence[bytes]


@dataclass(frozen=True, kw_only=True)
class NeedServer:
    """So many requests of the cell have no stored answer."""

    cell: str
    attempt: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class Answered:
    cell: str
    attempt: int
    responses: Sequence[Response]


@dataclass(frozen=True, kw_only=True)
class CellProgress:
    cell: str
    attempt: int
    done: int
    total: int
    reused: int


@dataclass(frozen=True, kw_only=True)
class CellDone:
    """The cell's outcome; every response it got was sent before."""

    cell: str
    attempt: int
    record: Record
    files: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class CellFailed:
    """Cancelled or failed for a reason of the cell's own. `error` is None for a cancelled one."""

    cell: str
    attempt: int
    error: str | None


Event = Checked | WantAnswers | NeedServer | Answered | CellProgress | CellDone | CellFailed


class EvaluatorProcess:
    """The handle of one child, used inside a Ray actor: starts it, sends it messages, receives its events."""

    def __init__(self, log_path: Path) -> None:
        """`log_path` takes what lm-eval and its libraries print and log."""
        log_path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        # lm-eval takes a folder under the working directory that is named like a data set for that data set.
        self._folder = tempfile.TemporaryDirectory(prefix="lmsweep-evaluator-")
        with theirs, log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweep.evaluator", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder.name,
                env=child_environment(os.environ),
            )
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError when the child is gone; `receive` says so too."""
        with self._sending:
            self._connection.send(message)

    def receive(self) -> Event:
        """The next event; blocks. Raises EOFError when the child is gone."""
        try:
            event: Event = self._connection.recv()
        except OSError as error:
            raise EOFError from error
        return event

    def stop(self) -> None:
        """End the child; safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def child_environment(base: Mapping[str, str]) -> dict[str, str]:
    """An evaluator sees no GPU, none of the sweep's secrets but the hub's, and may use the CPU it is given."""
    hidden = ("WANDB_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "OMP_NUM_THREADS")
    kept = {k: v for k, v in base.items() if k not in hidden and not k.startswith("RAY_")}
    # A forked tokenizer warns and locks; one cell's texts are encoded in one batch anyway.
    path = os.pathsep.join([os.path.dirname(os.path.dirname(os.path.abspath(__file__))), kept.get("PYTHONPATH", "")])
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path.rstrip(os.pathsep)}


class _Link:
    """The child's end: what evaluation.py knows as its Channel, and the threads behind it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.work: queue.Queue[Any] = queue.Queue()
        self.pool = Pool()
        self._cell = ""
        self._attempt = 0
        self._facts: Facts | None = None
        self._arrived = threading.Condition()
        self._answers: Mapping[bytes, bytes] | None = None
        self._cancelled: str | None = None
        self._batch: list[Response] = []
        self._batch_lock = threading.Lock()
        self._last_progress = 0.0

    # Threads.

    def read(self) -> None:
        """Sort messages until the driver is gone, then end the process: nobody would hear its answers."""
        try:
            while True:
                self._sort(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    def _sort(self, message: Any) -> None:
        with self._arrived:
            match message:
                case KnownAnswers(answers=answers):
                    self._answers = answers
                case PoolChanged(shares=shares, facts=facts):
                    self._facts = facts or self._facts
                    self.pool.update(shares)
                case CancelCell(reason=reason):
                    self._cancelled = reason
                    self.pool.cancel(reason)
                case RunCell():
                    # Here and not when the work is taken up: endpoints may follow before that.
                    self._begin(message)
                    self.work.put(message)
                case _:
                    self.work.put(message)
            self._arrived.notify_all()

    def flush_forever(self) -> None:
        while True:
            time.sleep(BATCH_S)
            self.flush()

    def flush(self) -> None:
        with self._batch_lock:
            if self._batch:
                self.send(Answered(cell=self._cell, attempt=self._attempt, responses=tuple(self._batch)))
                self._batch.clear()

    def send(self, event: Event) -> None:
        with self._sending:
            self._connection.send(event)

    def _begin(self, run: RunCell) -> None:
        self.pool = Pool()
        self._cell, self._attempt, self._facts = run.cell.key, run.attempt, run.facts
        self._answers = self._cancelled = None
        self._last_progress = 0.0

    def _wait_for(self, attribute: str) -> Any:
        with self._arrived:
            self._arrived.wait_for(lambda: getattr(self, attribute) is not None or self._cancelled is not None)
            if self._cancelled is not None:
                raise Cancelled(self._cancelled)
            return getattr(self, attribute)

    # lm.Channel.

    def facts(self) -> Facts:
        facts: Facts = self._wait_for("_facts")
        return facts

    def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        with self._arrived:
            self._answers = None
        self.send(WantAnswers(cell=self._cell, attempt=self._attempt, keys=keys))
        answers: Mapping[bytes, bytes] = self._wait_for("_answers")
        return answers

    def owed(self, requests: int) -> None:
        self.send(NeedServer(cell=self._cell, attempt=self._attempt, requests=requests))

    def answered(self, response: Response) -> None:
        with self._batch_lock:
            self._batch.append(response)
            full = len(self._batch) >= BATCH_RESPONSES
        if full:
            self.flush()

    def progress(self, *, done: int, total: int, reused: int) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_S or done == total:
            self._last_progress = now
            self.send(CellProgress(cell=self._cell, attempt=self._attempt, done=done, total=total, reused=reused))


def _serve(link: _Link) -> None:
    """Work off messages in the main thread, for ever."""
    from sweep.evaluation import check_task, evaluate, load_tokenizer

    tokenizers: dict[str, Any] = {}

    def tokenizer(plan: ModelPlan) -> Any:
        if plan.name not in tokenizers:
            tokenizers[plan.name] = load_tokenizer(plan)
        return tokenizers[plan.name]

    while True:
        match link.work.get():
            case CheckTask(task_name=name, task=task, seeds=seeds):
                link.send(Checked(task_name=name, error=_error_of(lambda t=task, s=seeds: check_task(t, s))))
            case CheckModel(model=plan):
                link.send(Checked(model=plan.name, error=_error_of(lambda p=plan: tokenizer(p))))
            case RunCell(cell=cell, attempt=attempt):
                try:
                    outcome = evaluate(cell, tokenizer=tokenizer(cell.model), pool=link.pool, channel=link)
                except Cancelled:
                    link.flush()
                    link.send(CellFailed(cell=cell.key, attempt=attempt, error=None))
                except SweepError as error:
                    link.flush()
                    log.info("cell %s failed", cell.key, exc_info=error)
                    link.send(CellFailed(cell=cell.key, attempt=attempt, error=str(error)))
                else:
                    link.flush()
                    link.send(CellDone(cell=cell.key, attempt=attempt, record=outcome.record, files=outcome.files))
            case unknown:
                raise TypeError(f"an evaluator cannot take {unknown!r}")


def _error_of(work: Any) -> str | None:
    try:
        work()
    except TaskError as error:
        return str(error)
    return None


def main(descriptor: int) -> None:
    """The child's entry point."""
    # The driver stops us by closing the connection; a terminal's Ctrl-C must not tear a cell in the middle of a write.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    link = _Link(Connection(descriptor))
    threading.Thread(target=link.read, daemon=True, name="messages").start()
    threading.Thread(target=link.flush_forever, daemon=True, name="responses").start()
    _serve(link)


if __name__ == "__main__":
    # Run as a module of its own name: messages are pickled by class, and `__main__.RunCell` would not be ours.
    from sweep.evaluator import main as run

    run(int(sys.argv[1]))
