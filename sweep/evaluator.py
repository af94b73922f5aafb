"""The process that runs a cell's lm-eval, and what it says to the driver and the driver to it.

An evaluator is a child process whose main thread runs lm-eval: some tasks time their own scoring with SIGALRM
(minerva_math), which Python allows in the main thread only, and they take the error that any other thread gets for a
wrong answer. A second thread reads messages, so that answers and endpoints arrive while lm-eval computes; a third sends
responses in small batches. Both ends of the connection are plain pickles over a socket pair; when the driver's end
closes, the process ends, and with it whatever a task has forked (code execution, data-set workers).
"""

import functools
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sweep.client import Cancelled, Pool
from sweep.config import Model, Seeds, Task
from sweep.errors import SweepError
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

FAILURES = (Exception, SystemExit)
"""What costs a cell and not the process: SystemExit too, since a task's code is anyone's."""


# To an evaluator.


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """Load this task's data and say whether that worked."""

    task_name: str
    task: Task
    seeds: Seeds
    model: Model
    """One that runs the task: some tasks make their documents with its tokenizer."""


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
        # Of its own: lm-eval takes a folder under the working directory that is named like a data set for that data
        # set. Also for temporary files, of which data sets leave gigabytes behind when a process is killed.
        self._folder = tempfile.TemporaryDirectory(prefix="lmsweep-evaluator-", ignore_cleanup_errors=True)
        with theirs, log_path.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweep.evaluator", str(theirs.fileno()), self._folder.name],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._folder.name,
                env={**child_environment(os.environ), "TMPDIR": self._folder.name},
                # Out of a terminal's reach, whose Ctrl-C the driver answers, and ended with all that it started.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        self._stopping = threading.Lock()

    def send(self, message: Any) -> None:
        """Raises OSError when the child is gone; `receive` says so too."""
        with self._sending:
            self._connection.send(message)

    def receive(self) -> Event:
        """The next event; blocks. Raises EOFError when the child is gone, with all that it left."""
        try:
            event: Event = self._connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            raise EOFError("the evaluator is gone") from error
        return event

    def stop(self) -> None:
        """End the child and what it has started; safe to call twice, from any thread."""
        with self._stopping:
            if self._process.returncode is None:  # not waited for yet, so its group's number is still its own
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                self._folder.cleanup()


def child_environment(base: Mapping[str, str]) -> dict[str, str]:
    """An evaluator sees no GPU, no secret but the hub's, and is no part of Ray, which would keep it to one core."""
    hidden = ("WANDB_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY", "OMP_NUM_THREADS")
    kept = {k: v for k, v in base.items() if k not in hidden and not k.startswith("RAY_")}
    path = os.pathsep.join([os.path.dirname(os.path.dirname(os.path.abspath(__file__))), kept.get("PYTHONPATH", "")])
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path.rstrip(os.pathsep)}


class _Attempt:
    """One attempt at a cell: what evaluation.py knows as its Channel, and where the driver's words about it arrive."""

    def __init__(self, run: RunCell, say: Callable[[Event], None]) -> None:
        self.cell = run.cell
        self.number = run.attempt
        self.pool = Pool()
        self._say = say
        self._facts = run.facts
        self._answers: Mapping[bytes, bytes] | None = None
        self._cancelled: str | None = None
        self._heard = threading.Condition()
        self._batch: list[Response] = []
        self._batch_lock = threading.Lock()
        self._last_progress = 0.0

    def hear(self, message: KnownAnswers | PoolChanged | CancelCell) -> None:
        with self._heard:
            match message:
                case KnownAnswers(answers=answers):
                    self._answers = answers
                case PoolChanged(shares=shares, facts=facts):
                    self._facts = facts or self._facts
                    self.pool.update(shares)
                case CancelCell(reason=reason):
                    self._cancelled = reason
                    self.pool.cancel(reason)
            self._heard.notify_all()

    def flush(self) -> None:
        """Send what has been answered; afterwards it is the driver's."""
        with self._batch_lock:
            if self._batch:
                self._say(Answered(cell=self.cell.key, attempt=self.number, responses=tuple(self._batch)))
                self._batch.clear()

    def _wait_for(self, attribute: str) -> Any:
        with self._heard:
            self._heard.wait_for(lambda: getattr(self, attribute) is not None or self._cancelled is not None)
            if self._cancelled is not None:
                raise Cancelled(self._cancelled)
            return getattr(self, attribute)

    # lm.Channel.

    def facts(self) -> Facts:
        facts: Facts = self._wait_for("_facts")
        return facts

    def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        with self._heard:
            self._answers = None
        self._say(WantAnswers(cell=self.cell.key, attempt=self.number, keys=keys))
        answers: Mapping[bytes, bytes] = self._wait_for("_answers")
        return answers

    def owed(self, requests: int) -> None:
        self._say(NeedServer(cell=self.cell.key, attempt=self.number, requests=requests))

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
            self._say(CellProgress(cell=self.cell.key, attempt=self.number, done=done, total=total, reused=reused))


class _Link:
    """The child's end of the connection, and the threads behind it."""

    def __init__(self, connection: Connection, folder: Path) -> None:
        """`folder` is this process's own and goes with it."""
        self.work: queue.Queue[CheckTask | CheckModel | _Attempt] = queue.Queue()
        self._connection = connection
        self._folder = folder
        self._sending = threading.Lock()
        self._attempt: _Attempt | None = None
        """The last one asked for: the driver asks for the next only after this one's end."""

    def send(self, event: Event) -> None:
        with self._sending:
            self._connection.send(event)

    def read_forever(self) -> None:
        """Sort messages until the driver is gone, then end the process: nobody would hear its answers."""
        try:
            while True:
                self._sort(self._connection.recv())
        except (EOFError, OSError):
            log.info("the driver is gone")
        except Exception:
            log.exception("a message could not be read")
        finally:
            self._leave()

    def _leave(self) -> None:
        """End this process and all that a task has forked, then remove its folder: in this order only from outside."""
        subprocess.Popen(
            ["sh", "-c", 'kill -s KILL -- "-$0"; rm -rf -- "$1"', str(os.getpid()), str(self._folder)],
            start_new_session=True,
        )

    def _sort(self, message: Any) -> None:
        match message:
            case RunCell():
                # Here and not when the work is taken up: endpoints may follow before that.
                self._attempt = _Attempt(message, self.send)
                self.work.put(self._attempt)
            case KnownAnswers() | PoolChanged() | CancelCell():
                assert self._attempt is not None
                self._attempt.hear(message)
            case CheckTask() | CheckModel():
                self.work.put(message)
            case _:
                raise TypeError(f"an evaluator cannot take {message!r}")

    def flush_forever(self) -> None:
        while True:
            time.sleep(BATCH_S)
            if (attempt := self._attempt) is not None:
                try:
                    attempt.flush()
                except OSError:
                    return  # the driver is gone, and soon are we


def _work_forever(link: _Link) -> None:
    """Check and run what the driver asks for, one after the other, in the main thread."""
    from sweep.evaluation import check_task, evaluate, load_tokenizer

    tokenizers: dict[str, Any] = {}

    def tokenizer(plan: ModelPlan) -> Any:
        if plan.name not in tokenizers:
            tokenizers[plan.name] = load_tokenizer(plan)
        return tokenizers[plan.name]

    def outcome(attempt: _Attempt) -> CellDone | CellFailed:
        cell, number = attempt.cell, attempt.number
        try:
            done = evaluate(cell, tokenizer=tokenizer(cell.model), pool=attempt.pool, channel=attempt)
        except Cancelled:
            return CellFailed(cell=cell.key, attempt=number, error=None)
        except FAILURES as error:
            return CellFailed(cell=cell.key, attempt=number, error=_words(f"evaluate {cell.key}", error))
        return CellDone(cell=cell.key, attempt=number, record=done.record, files=done.files)

    def problem(doing: str, work: Callable[[], object]) -> str | None:
        try:
            work()
        except FAILURES as error:
            return _words(doing, error)
        return None

    while True:
        match link.work.get():
            case CheckTask(task_name=name, task=task, seeds=seeds, model=model):
                error = problem(f"load task {task.task}", functools.partial(check_task, task, seeds, model))
                link.send(Checked(task_name=name, error=error))
            case CheckModel(model=plan):
                error = problem(f"load the tokenizer of {plan.name}", functools.partial(tokenizer, plan))
                link.send(Checked(model=plan.name, error=error))
            case attempt:
                end = outcome(attempt)
                attempt.flush()
                link.send(end)


def _words(doing: str, error: BaseException) -> str:
    """`error` for the driver; its traceback goes to this process's log."""
    log.error("%s failed", doing, exc_info=error)
    if isinstance(error, SweepError):
        return str(error)
    return f"{doing}: {type(error).__name__}: {error} (the traceback is in the evaluator's log)"


def main(descriptor: int, folder: Path) -> None:
    """The child's entry point; `EvaluatorProcess` has made it the leader of a process group of its own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    link = _Link(Connection(descriptor), folder)
    threading.Thread(target=link.read_forever, daemon=True, name="messages").start()
    threading.Thread(target=link.flush_forever, daemon=True, name="responses").start()
    _work_forever(link)


if __name__ == "__main__":
    # Run as a module of its own name: messages are pickled by class, and `__main__.RunCell` would not be ours.
    from sweep.evaluator import main as run

    run(int(sys.argv[1]), Path(sys.argv[2]))
