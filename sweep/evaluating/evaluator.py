"""The process that runs a cell's lm-eval, and what it says to the driver and the driver to it.

An evaluator is a child process whose main thread runs lm-eval: some tasks time their own scoring with SIGALRM
(minerva_math), which Python allows in the main thread only, and they take the error that any other thread gets for a
wrong answer. A second thread reads messages, so that answers and endpoints arrive while lm-eval computes; a third sends
responses in small batches. Both ends of the connection are plain pickles over a socket pair. The child runs under
supervisor.py: when the driver's end is gone, however that happened, the process ends, and with it whatever a task has
forked (code execution, data-set workers) and its temporary files.

Some tasks execute code that a model wrote (humaneval, mbpp), in processes forked from this one. What they can and
cannot get at:

- The environment of an evaluator, and of the two processes above it, is free of secrets from the start; os.environ
  alone would not do, as /proc/<pid>/environ keeps what a process was started with. Tokens for loading arrive over the
  socket, are in os.environ while something is loaded, and are out of it before the first answer of a cell that executes
  code is there.
- The socket to the driver is closed in every fork and every program started, so nothing can speak in our name.
- Not protected: a fork has this process's memory, in which the tokens and the key of the cell's server lie. Files and
  processes of the same user stay readable: a token that `hf auth login` wrote, /proc/<pid>/environ of the launch
  itself and of Ray's processes. The network is open. Code that is not to be trusted at all wants a container.
"""

import functools
import logging
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Self

import msgspec

from sweep import ROOT
from sweep.errors import SweepError, may_pass
from sweep.evaluating.client import UNMADE, Cancelled, Pool
from sweep.evaluating.concurrency import Need
from sweep.evaluating.preflight import Facts
from sweep.masking import SECRET_LEAST, is_proxy, secret_variables
from sweep.planning.config import Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan
from sweep.record import Record
from sweep.results.store import Response
from sweep.serving.server import SUPERVISOR, Endpoint
from sweep.serving.supervisor import PIPE_BYTES, Mask

log = logging.getLogger(__name__)

BATCH_RESPONSES = 256
BATCH_S = 0.5
"""Responses leave an evaluator at the latest after so many or so much time."""

AHEAD_MOST = 16_384
"""Responses of all evaluators together that may be on their way to the driver's disk: what can be lost, and how long a
commit holds the driver up, is bounded. At 20,000 a second it is 0.8 s; a commit comes sooner."""

PROGRESS_S = 0.5

GRACE_S = 1.0
"""An evaluator ends at once on SIGTERM; a task's code may have other ideas."""

STOP_S = 15.0
"""The supervisor needs 0.1 s for an evaluator, and 10 s more where the kernel does not let go of a process."""

LOADED_FROM = ("HF_", "HUGGING_FACE_", "AWS_", "AZURE_", "GOOGLE_")
"""How the names of the secret variables begin that an evaluator needs: those of the hub and of stores that a task's
data may lie in. Beside a proxy and the sweep's own `env` it gets no others: W&B is the driver's, and the key of its
servers comes with each endpoint."""

PROGRAM = "sweep.evaluating.evaluator"
"""What the child runs; a benchmark puts one in its place that answers without a server."""

FAILURES = (Exception, SystemExit)
"""What costs a cell and not the process: SystemExit too, since a task's code is anyone's."""


# To an evaluator.


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """The secret variables that loading needs, by name; the first message."""

    variables: Mapping[str, str] = field(repr=False)


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
    ahead: int = AHEAD_MOST // 8
    """With so many responses that are not stored yet the evaluator asks for nothing new: its part of AHEAD_MOST."""


@dataclass(frozen=True, kw_only=True)
class KnownAnswers:
    """The reply to WantAnswers."""

    answers: Mapping[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """So many responses more are on the driver's disk, in the order in which they were handed over."""

    responses: int
    earlier: Mapping[bytes, bytes] = field(default_factory=dict, repr=False)
    """What is there in place of some of them: another cell of the model had the same requests answered before."""


@dataclass(frozen=True, kw_only=True)
class PoolChanged:
    """The endpoints of the running cell's model, each with this evaluator's share of prompts in flight."""

    shares: tuple[tuple[Endpoint, int], ...]
    facts: Facts | None
    lost: tuple[str, ...] = ()
    """Names of endpoints that are dead: what is in flight there is asked again elsewhere and not waited for, since a
    node that is cut off does not even close its connections."""
    serial: int = 0
    """Comes back with Demand, which says that it was heard."""


@dataclass(frozen=True, kw_only=True)
class CancelCell:
    reason: str


# From an evaluator.


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A task's or model's check is over; `error` is None when all is well."""

    task_name: str | None = None
    model: str | None = None
    token_ids: tuple[tuple[int, ...], ...] = ()
    """Of a model: what its tokenizer makes of `preflight.PROBE_TEXTS`, to compare with what its server makes of it."""
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
class Demand:
    """What the cell needs of each endpoint; every half second if it has changed, and at once when it has heard of a
    share or requests begin to wait."""

    cell: str
    attempt: int
    serial: int
    """Of the last PoolChanged that it has heard."""
    needs: Mapping[str, Need]
    """By the name of the endpoint's server life."""


@dataclass(frozen=True, kw_only=True)
class Unreached:
    """For two minutes nothing came of an endpoint of the cell's pool but connections that break."""

    cell: str
    attempt: int
    server: str
    """Name of its life."""
    made: bool
    """The last one was made, and broke before an answer came."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Stored follows when they are durable."""

    cell: str
    attempt: int
    number: int
    packed: bytes = field(repr=False)
    """The responses in MessagePack. Two processes stand between an evaluator and the driver; pickled, a response takes
    36 us of all of them together, packed 1.3."""

    @classmethod
    def of(cls, responses: Sequence[Response], *, cell: str, attempt: int) -> Self:
        return cls(cell=cell, attempt=attempt, number=len(responses), packed=msgspec.msgpack.encode(responses))

    @property
    def responses(self) -> list[Response]:
        return msgspec.msgpack.decode(self.packed, type=list[Response])


@dataclass(frozen=True, kw_only=True)
class CellProgress:
    cell: str
    attempt: int
    done: int
    total: int
    reused: int
    live: Mapping[str, float] = field(default_factory=dict)
    """What estimate.py makes of the answers so far."""


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
    passing: bool = False
    """Another attempt may succeed."""


Event = Checked | WantAnswers | NeedServer | Demand | Unreached | Answered | CellProgress | CellDone | CellFailed


class EvaluatorProcess:
    """The handle of one child, used inside a Ray actor: starts it, sends it messages, receives its events."""

    def __init__(self, log_path: Path, *, secrets: Sequence[str] = (), given: Collection[str] = ()) -> None:
        """`log_path` takes what lm-eval and its libraries print and log; its stem names the child in `ps`.

        `secrets` are masked there and kept out of the child's environment, as are the secret variables of this process.
        Those that were `given` by the sweep, known by name, reach what loads there, as the hub's token does.
        """
        log_path.parent.mkdir(parents=True, exist_ok=True)
        secret = secret_variables(os.environ)
        hidden = {text for text in (*secrets, *secret.values()) if len(text) >= SECRET_LEAST}
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-E", str(SUPERVISOR), "--grace", f"{GRACE_S:g}", "--"),
                    # -P: nothing in whatever folder we are in passes for a library.
                    *(sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), log_path.stem),
                ],
                pass_fds=[theirs.fileno()],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # how it ended: our socket's end says enough
                stderr=subprocess.PIPE,
                env=child_environment(os.environ, hidden),
            )
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        self._stopping = threading.Lock()
        assert self._process.stderr is not None
        self._log = threading.Thread(
            target=_copy_masked,
            args=(self._process.stderr, log_path, hidden),
            name=f"log of {log_path.stem}",
            daemon=True,
        )
        self._log.start()
        with suppress(OSError):  # it is gone already, which `receive` tells
            self.send(Credentials(variables=credentials(secret, given)))

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
            if self._process.returncode is not None:
                return
            assert self._process.stdin is not None
            with suppress(BrokenPipeError), self._process.stdin as pipe:
                pipe.write(b"0\n")  # seconds of grace: whatever it has to say was sent before
            # Closing alone is not enough where a forked child of ours still holds the pipe.
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("the supervisor %d did not end its evaluator and is killed", self._process.pid)
                self._process.kill()
                self._process.wait()
            self._log.join(LOG_S)


LOG_S = 2.0
"""For the last lines of a log; only a process that left its group and outlived the supervisor keeps it open longer."""


def credentials(secret: Mapping[str, str], given: Collection[str] = ()) -> dict[str, str]:
    """What of the `secret` variables an evaluator needs to load tasks, and what was `given` to it by name."""
    return {k: v for k, v in secret.items() if k.startswith(LOADED_FROM) or is_proxy(k) or k in given}


def child_environment(base: Mapping[str, str], secrets: Iterable[str] = ()) -> dict[str, str]:
    """`base` without GPUs, without secrets, known by name or as one of `secrets`, and without Ray, which would keep an
    evaluator to one core."""
    hidden, secret = set(secrets), secret_variables(base)
    kept = {
        name: value
        for name, value in base.items()
        if not (name in secret or value in hidden or name == "OMP_NUM_THREADS" or name.startswith("RAY_"))
    }
    path = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path.rstrip(os.pathsep)}


def _copy_masked(pipe: IO[bytes], path: Path, secrets: Iterable[str]) -> None:
    """Thread: all that comes out of `pipe`, without secrets, to the end of the file at `path`."""
    mask = Mask([text.encode() for text in secrets])
    with pipe, path.open("ab", buffering=0) as file:
        while data := pipe.read(PIPE_BYTES):
            file.write(mask.apply(data))
        file.write(mask.rest())


class _Attempt:
    """One attempt at a cell: what evaluation.py knows as its Channel, and where the driver's words about it arrive."""

    def __init__(self, run: RunCell, say: Callable[[Event], None], hide: Callable[[], None]) -> None:
        """`hide` takes the credentials out of the environment."""
        self.cell = run.cell
        self.number = run.attempt
        self.pool = Pool(self.tell_demand, self._tell_unreached)
        self._say = say
        self._hide = hide
        self._facts = run.facts
        self._answers: Mapping[bytes, bytes] | None = None
        self._cancelled: str | None = None
        self._heard = threading.Condition()
        self._serial = 0
        self._demand: Demand | None = None
        self._telling = threading.Lock()
        self._batch: list[Response] = []
        self._ahead = run.ahead
        self._unstored = 0
        """Responses of this attempt that the driver has not said to be stored."""
        self._earlier: dict[bytes, bytes] = {}
        self._unstored_lock = threading.Lock()
        self._batch_lock = threading.Lock()
        self._last_progress = 0.0

    def hear(self, message: KnownAnswers | Stored | PoolChanged | CancelCell) -> None:
        with self._heard:
            match message:
                case KnownAnswers(answers=answers):
                    self._answers = answers
                case Stored(responses=responses, earlier=earlier):
                    self._earlier.update(earlier)
                    self._count_unstored(-responses)
                case PoolChanged(shares=shares, facts=facts, lost=lost, serial=serial):
                    self._facts = facts or self._facts
                    self.pool.update(shares, lost=lost)
                    self._serial = serial
                case CancelCell(reason=reason):
                    self._cancelled = reason
                    self.pool.cancel(reason)
            self._heard.notify_all()
        self.tell_demand()

    def tell_demand(self) -> None:
        """Say what the cell needs of each endpoint, if that is news."""
        with self._telling:  # in the order of what was seen
            serial = self._serial  # before the pool: what it told may be newer, never older
            demand = Demand(cell=self.cell.key, attempt=self.number, serial=serial, needs=self.pool.needs())
            if demand != self._demand:
                self._demand = demand
                self._say(demand)

    def _tell_unreached(self, endpoint: Endpoint, error: BaseException) -> None:
        made, why = not isinstance(error, UNMADE), str(error) or repr(error)
        self._say(
            Unreached(cell=self.cell.key, attempt=self.number, server=endpoint.server, made=made, why=why),
        )

    def flush(self) -> None:
        """Send what has been answered; afterwards it is the driver's."""
        with self._batch_lock:
            if self._batch:
                self._say(Answered.of(self._batch, cell=self.cell.key, attempt=self.number))
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
        # Asked before any answer is there, when the task, its data and the metrics that execute code are loaded.
        if self.cell.task.unsafe_code:
            self._hide()
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
        self._count_unstored(1)
        if full:
            self.flush()

    def earlier(self) -> Mapping[bytes, bytes]:
        # Cancelled or not: a cell that has all its answers ends, and the driver stores what it has heard in any case.
        self.flush()
        with self._heard:
            self._heard.wait_for(lambda: self._unstored == 0)
            earlier, self._earlier = self._earlier, {}
        return earlier

    def _count_unstored(self, more: int) -> None:
        with self._unstored_lock:
            self._unstored += more
            self.pool.hold(self._unstored >= self._ahead)

    def progress(self, *, done: int, total: int, reused: int, live: Callable[[], Mapping[str, float]] = dict) -> None:
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_S or done == total:
            self._last_progress = now
            self._say(
                CellProgress(
                    cell=self.cell.key, attempt=self.number, done=done, total=total, reused=reused, live=live()
                )
            )


class _Link:
    """The child's end of the connection, and the threads behind it."""

    def __init__(self, connection: Connection) -> None:
        self.work: queue.Queue[CheckTask | CheckModel | _Attempt] = queue.Queue()
        self._connection = connection
        self._credentials: Mapping[str, str] = {}
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
            os._exit(1)  # the supervisor ends what a task has forked

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Credentials are in the environment inside."""
        os.environ.update(self._credentials)
        try:
            yield
        finally:
            self.hide()

    def hide(self) -> None:
        """Take the credentials out of the environment, from now on also of what this process forks."""
        for name in self._credentials:
            os.environ.pop(name, None)

    def _sort(self, message: Any) -> None:
        match message:
            case Credentials(variables=variables):
                self._credentials = variables
            case RunCell():
                # Here and not when the work is taken up: endpoints may follow before that.
                self._attempt = _Attempt(message, self.send, self.hide)
                self.work.put(self._attempt)
            case KnownAnswers() | Stored() | PoolChanged() | CancelCell():
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
                    attempt.tell_demand()
                except OSError:
                    return  # the driver is gone, and soon are we


def _work_forever(link: _Link) -> None:
    """Check and run what the driver asks for, one after the other, in the main thread."""
    from sweep.evaluating.evaluation import check_task, evaluate, load_tokenizer, probe_token_ids

    tokenizers: dict[str, Any] = {}

    def tokenizer(plan: ModelPlan) -> Any:
        if plan.name not in tokenizers:
            tokenizers[plan.name] = load_tokenizer(plan)
        return tokenizers[plan.name]

    def outcome(attempt: _Attempt) -> CellDone | CellFailed:
        cell, number = attempt.cell, attempt.number
        try:
            with link.loading():
                done = evaluate(cell, tokenizer=tokenizer(cell.model), pool=attempt.pool, channel=attempt)
        except Cancelled:
            return CellFailed(cell=cell.key, attempt=number, error=None)
        except FAILURES as error:
            words = _words("evaluate", error, of=cell.key)
            return CellFailed(cell=cell.key, attempt=number, error=words, passing=may_pass(error))
        return CellDone(cell=cell.key, attempt=number, record=done.record, files=done.files)

    def problem(doing: str, work: Callable[[], object]) -> str | None:
        try:
            with link.loading():
                work()
        except FAILURES as error:
            return _words(doing, error)
        return None

    def checked(plan: ModelPlan) -> Checked:
        try:
            with link.loading():
                return Checked(model=plan.name, token_ids=probe_token_ids(tokenizer(plan)))
        except FAILURES as error:
            return Checked(model=plan.name, error=_words(f"load the tokenizer of {plan.name}", error))

    while True:
        match link.work.get():
            case CheckTask(task_name=name, task=task, seeds=seeds, model=model):
                error = problem(f"load task {task.task}", functools.partial(check_task, task, seeds, model))
                link.send(Checked(task_name=name, error=error))
            case CheckModel(model=plan):
                link.send(checked(plan))
            case attempt:
                end = outcome(attempt)
                attempt.flush()
                link.send(end)


def _words(doing: str, error: BaseException, *, of: str = "") -> str:
    """`error` for the driver; its traceback goes to this process's log, with the name of what it is `of`: the driver
    knows it, and says once what many failed by."""
    log.error("%s failed", f"{doing} {of}".rstrip(), exc_info=error)
    if isinstance(error, SweepError):
        return str(error)
    return f"{doing}: {type(error).__name__}: {error} (the traceback is in the evaluator's log)"


def main(descriptor: int) -> None:
    """The child's entry point; its supervisor has made it the leader of a session of its own."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # A connection for each request in flight; what a shell allows by default may be less.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A folder of its own: lm-eval takes a folder under the working directory that is named like a data set for that
    # data set. The supervisor has made it, also for temporary files, and removes it with the gigabytes that data sets
    # leave behind when a process is killed.
    os.chdir(os.environ["TMPDIR"])
    connection = Connection(descriptor)
    os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=connection.close)
    link = _Link(connection)
    threading.Thread(target=link.read_forever, daemon=True, name="messages").start()
    threading.Thread(target=link.flush_forever, daemon=True, name="responses").start()
    _work_forever(link)


if __name__ == "__main__":
    # Run as a module of its own name: messages are pickled by class, and `__main__.RunCell` would not be ours.
    from sweep.evaluating.evaluator import main as run

    run(int(sys.argv[1]))
