"""A server's process: port, log, readiness, watch, stop -> Endpoint.

What it runs is `engine.py`'s to say, and when a server that still runs counts as dead is `watch.py`'s. Knows nothing
of Ray: `cluster.py` puts a `Server` into an actor and says which GPUs it has. The process runs under `supervisor.py`,
which promises that nothing of it outlives us.

A server of several nodes is a `Server` on each: the first (`meet`, then `start`) serves, the others `follow`.
"""

import http.client
import json
import logging
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from sweep.errors import ServerError, ServerFault, boundary
from sweep.masking import masked, secret_variables
from sweep.planning.hub import Part, folder_of
from sweep.planning.plan import ServerPlan
from sweep.serving import engine, gpu
from sweep.serving.metrics import Snapshot, snapshot
from sweep.serving.watch import Watch

log = logging.getLogger(__name__)

SUPERVISOR = Path(__file__).with_name("supervisor.py")

PORTS = range(20000, 30000)
"""Ray's workers take 10002-19999, the kernel's outgoing connections start at 32768."""

PORT_ATTEMPTS = 5

HEALTH_PERIOD_S = 0.25
ANSWER_TIMEOUT_S = 2.0
"""An idle server answers within milliseconds; a stranger on a lost port may never answer."""
START_GRACE_S = 2.0
"""Until it is ready. vLLM ends at once while it imports, and later not before its engine is up: SIGTERM while it loads
weights or compiles had no effect within 40 s, and a large model does that for a quarter of an hour."""
STOP_GRACE_S = 10.0
"""Once it is ready: 0.5 s measured when idle, 1 s with 200 requests in flight; the rest is for slow machines. Whatever
the server does, nothing of it is left 15 s later."""

SUPERVISOR_MARGIN_S = 25.0
"""What the supervisor may take beyond the grace: orphans 2 s, and in each of its stages 10 s for processes that even
SIGKILL does not end."""

GPU_WAIT_S = 60.0
"""For the memory of a server that was killed: the driver gives it back within seconds of the last process's end."""

TAIL_LINES = 15
LOG_READ_BYTES = 256 * 1024
"""The end of a log that is searched for a cause; each of eight workers may write a traceback of 10 KB. As much of its
beginning, where the engine says what it was configured for."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a live server answers, with what it can take."""

    server: str
    """Name of the server life, unique in the sweep: `<server>-<n>`."""
    url: str
    """`http://host:port`, without a path."""
    api_key: str = field(repr=False)
    max_model_len: int
    """Tokens of prompt plus answer."""
    engine_version: str
    """vLLM's."""
    arithmetic: str = ""
    """What it computes in, `bfloat16 on cuda`; empty where it does not say."""
    scoring: tuple[str, ...] = ()
    """Scoring methods that it was started for, beyond those of any server; preflight sees whether they work."""


class Server:
    """One life of one server: started once, stopped once. Safe to use from several threads."""

    def __init__(
        self,
        plan: ServerPlan,
        *,
        name: str,
        api_key: str,
        gpu_ids: Sequence[str],
        log_path: Path,
        secrets: Sequence[str] = (),
        host: str = "127.0.0.1",
        executable: Sequence[str] | None = None,
    ) -> None:
        """`name` is that of the life (`demo-base-0`); `executable` replaces `engine.program()` for this one."""
        self.plan = plan
        self.name = name
        self.log_path = log_path
        self._api_key = api_key
        self._gpu_ids = gpu_ids
        self._secrets = frozenset(secrets)
        self._host = host
        self._executable = executable
        self._extras = engine.extras(plan, on_cpu=not gpu_ids)
        self._process: _Process | None = None
        self._port: int | None = None
        """Where it answers, once it does."""
        self._part: engine.ServerPart | None = None
        """None on one node."""
        self._claim: AbstractContextManager[Any] = nullcontext()
        """Of the port where the parts meet, until all have."""
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def meet(self, nodes: int) -> engine.ServerPart:
        """Become the first part of a server of so many nodes, before it starts; what the others have to know."""
        port, self._claim = _claim_port(self._host)
        self._part = engine.ServerPart(rank=0, nodes=nodes, address=self._host, port=port)
        others = ", ".join(part_name(self.name, rank) for rank in range(1, nodes))
        self._note(f"the first of {nodes} parts, which serves; the others ({others}) have logs of their own beside it")
        return self._part

    def follow(self, part: engine.ServerPart) -> None:
        """Be this other part of a server, until it ends or is stopped.

        Raises ServerError as `start` does, unless it was asked to stop; nothing of it is left.
        """
        with boundary(ServerError, f"run {self.name}"):
            self._part = part
            self.plan = _with_adapters_here(self.plan)
            self._await_memory()
            process = self._launch(port=0)
            process.dead.wait()
            process.stop()
            if not self._stopping.is_set():
                raise self._ended(process, "ended")

    def start(self) -> Endpoint:
        """The endpoint, once the server answers; otherwise nothing of it is left.

        Raises ServerError with the cause, the log's end and its path, as ServerFault when another start may succeed.
        """
        shared = 0 < self.plan.gpus < 1
        with boundary(ServerError, f"start {self.name}"), self._claim:
            self.plan = _with_adapters_here(self.plan)
            # Waiting for a turn or for memory is none of the server's own time.
            with gpu.turn(self._gpu_ids, self._stopping) if shared else nullcontext():
                self._await_memory()
                endpoint = self._start()
            threading.Thread(target=self._watch, name=f"watch {self.name}", daemon=True).start()
            return endpoint

    def wait(self) -> str:
        """Why the server is dead, in words, within a second of its death or when it counts as dead though it runs.

        Something of it may be left still: `stop` returns when nothing is.
        """
        if (process := self._process) is None:
            return "was never started"
        process.dead.wait()
        return "was stopped" if self._stopping.is_set() else process.ending(self._cause(process))

    def stop(self, grace_s: float | None = None) -> None:
        """Returns when nothing of the server is left. Again, from another thread or during `start`: the same."""
        self._stopping.set()
        with self._lock:  # a start that is between two attempts makes no further one
            process = self._process
        if process is not None:
            process.stop(grace_s)

    def alive(self) -> bool:
        return self._process is not None and not self._process.dead.is_set()

    def figures(self) -> Snapshot:
        """How a server that has started stands now. Raises OSError, HTTPException, and ValueError for one that does not
        tell."""
        assert self._port is not None
        return self._figures(self._port, ANSWER_TIMEOUT_S)

    def _await_memory(self) -> None:
        """Raises ServerFault when the GPUs do not have the memory free that vLLM will ask for."""
        if not self._gpu_ids:
            return
        share = _memory_share(self.plan)
        try:
            short = gpu.wait_for_memory(self._gpu_ids, share, timeout_s=GPU_WAIT_S, stopping=self._stopping)
        except LookupError as error:
            self._note(f"whether GPU memory is free was not seen: {error}")
            return
        if short:
            raise ServerFault(
                f"{self.name} did not start: not enough GPU memory is free, after {GPU_WAIT_S:g} s: {short}; end those "
                f"processes, or lower gpu_memory_utilization (or `gpus`), which is {share:g} here"
            )

    def _start(self) -> Endpoint:
        deadline = time.monotonic() + self.plan.model.startup_timeout_s
        for _ in range(PORT_ATTEMPTS):
            port, claim = _claim_port(self._host)
            try:
                with claim:
                    endpoint = self._attempt(port, deadline)
            except ServerError:
                if not self._goes_without_extras():
                    raise
                continue
            if endpoint is not None:
                self._port = port
                return endpoint
            if self._part is not None:
                # It may be the one where its other parts wait, who are told of no other.
                raise self._failure(engine.PORT_TAKEN, offset=0, kind=ServerFault)
            log.info("%s lost port %d to another program and takes another one", self.name, port)
        raise self._failure(f"{engine.PORT_TAKEN}, {PORT_ATTEMPTS} times", offset=0, kind=ServerFault)

    def _goes_without_extras(self) -> bool:
        """Whether it ended because of options that only we wanted; from now on it is started without them."""
        process = self._process
        if not self._extras.options or process is None or not engine.names_extras(self._log_text(process.log_offset)):
            return False
        ours = [name for name, value in self._extras.options.items() if "sweep." in str(value)]
        self._note(f"it ended because of {' or '.join(ours)}; it is started again without, to score by echo")
        self._extras = engine.NO_EXTRAS
        return True

    def _attempt(self, port: int, deadline: float) -> Endpoint | None:
        """None when the port was lost to someone else."""
        process = self._launch(port)
        try:
            if endpoint := self._ready(process, port, deadline):
                process.become_ready(STOP_GRACE_S)
                return endpoint
            process.stop()
            self._go_on()
            cause = self._cause(process)
            if cause and cause.text == engine.PORT_TAKEN:
                return None
            raise self._ended(process, "did not start")
        except BaseException:
            process.stop()
            raise

    def _launch(self, port: int) -> "_Process":
        serves = self._part is None or not self._part.rank
        program = self._executable or engine.program(self.plan.model.server_python or sys.executable, serves=serves)
        told = engine.arguments(self.plan, host=self._host, port=port, extras=self._extras, part=self._part)
        environment = self._environment()
        if withheld := self._withheld(environment):
            names = ", ".join(withheld)
            self._note(f"secrets that it is not given: {names}; what it needs of them goes into `env` of its model")
        with self._lock:
            self._go_on()
            self._process = _Process([*program, *told], environment, self.log_path)
            return self._process

    def _environment(self) -> dict[str, str]:
        # Some secrets have ordinary names: the config knows them by their use, as the key of somebody's server, say.
        base = {k: v for k, v in os.environ.items() if v not in self._secrets or k in engine.HUB_TOKENS}
        if self._part is not None:
            base = engine.network(self._host, _interface(self._host)) | base
        return engine.environment(
            self.plan, api_key=self._api_key, gpu_ids=self._gpu_ids, base=base, extras=self._extras
        )

    def _withheld(self, environment: Mapping[str, str]) -> list[str]:
        """Secrets of this node's environment that are not in the server's; Ray's own concern no server."""
        secret = secret_variables(os.environ) | {k: v for k, v in os.environ.items() if v in self._secrets}
        given = set(environment.values())
        return sorted(name for name, value in secret.items() if value not in given and not name.startswith("RAY_"))

    def _ready(self, process: "_Process", port: int, deadline: float) -> Endpoint | None:
        """Waits for /health and for our models under our key: another program could answer on a port that we lost.

        None when the process has ended.
        """
        seen = "it did not answer"
        while not process.dead.wait(HEALTH_PERIOD_S):
            if time.monotonic() > deadline:
                timeout_s = self.plan.model.startup_timeout_s
                process.stop()
                raise self._failure(
                    f"not ready after startup_timeout_s = {timeout_s:g} s ({seen})",
                    process.log_offset,
                    "raise it, or see",
                )
            try:
                # Our key is not for whoever won a race for the port.
                if self._ask(port, "/health")[0] != 200 or not process.listens(port):
                    continue
                status, models = self._ask(port, "/v1/models")
                _, version = self._ask(port, "/version")
            except (OSError, http.client.HTTPException):
                continue
            lengths = _lengths(models)
            names = engine.served_names(self.plan)
            if status == 200 and lengths.keys() >= set(names):
                engine_version = str(version.get("version", "unknown"))
                if refusal := engine.supported(engine_version):
                    raise ServerError(f"{self.name} is not used: {refusal}")
                return Endpoint(
                    server=self.name,
                    url=f"http://{self._host}:{port}",
                    api_key=self._api_key,
                    max_model_len=int(lengths[names[0]]),  # adapters report none of their own
                    engine_version=engine_version,
                    arithmetic=engine.arithmetic(self._first_words(process.log_offset)),
                    scoring=self._extras.methods,
                )
            seen = f"/v1/models answered {status} with {sorted(lengths)}, not {names}"
        return None

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise ServerError(f"{self.name} was stopped while it started")

    def _watch(self) -> None:
        """Looks at the ready server until it is dead; one that only seems alive is ended, and `wait` returns why."""
        process = self._process
        assert process is not None
        port = self._port
        assert port is not None
        watch = Watch(self.plan.model.hang_timeout_s)
        request: threading.Thread | None = None
        blind = False
        last, computed_s = time.monotonic(), process.computed_s(port)
        while not (process.dead.wait(watch.period_s) or self._stopping.is_set()):
            fault, seen, path = None, None, "/health"
            try:
                status, _ = self._ask(port, path, timeout_s=watch.answer_timeout_s)
                fault = None if status == 200 else f"{path} answered {status}"
                path = "/metrics"
                seen = None if fault else self._figures(port, watch.answer_timeout_s)
            except (OSError, http.client.HTTPException) as error:
                fault = f"{path} gave {type(error).__name__}: {error}"
            except ValueError as error:
                if not blind:
                    self._note(f"a hang of the engine will not be seen, only silence: {error}")
                blind = True
            asked = request is not None and request.is_alive()
            last, elapsed_s = time.monotonic(), time.monotonic() - last
            before_s, computed_s = computed_s, process.computed_s(port)
            reason = watch.look(
                fault=fault, seen=seen, asked=asked, elapsed_s=elapsed_s, computed_s=computed_s - before_s
            )
            if reason:
                log.warning("%s %s", self.name, reason)
                self._note(f"{reason}; it is ended")
                process.condemn(reason)
            elif not watch.doubtful:
                request = None
            elif request is None:
                request = threading.Thread(
                    target=self._ask_one_token, args=(port,), name=f"ask {self.name}", daemon=True
                )
                request.start()

    def _figures(self, port: int, timeout_s: float) -> Snapshot:
        return snapshot(self._read(port, "GET", "/metrics", timeout_s=timeout_s)[1].decode())

    def _ask_one_token(self, port: int) -> None:
        """Gives an engine something to do that seems to have nothing: its figures move if it can."""
        body = {"model": engine.served_names(self.plan)[0], "prompt": [1], "max_tokens": 1, "temperature": 0}
        try:
            status, _ = self._read(port, "POST", "/v1/completions", body, timeout_s=self.plan.model.hang_timeout_s)
        except (OSError, http.client.HTTPException) as error:
            log.info("%s did not answer a request for one token: %s", self.name, error)
        else:
            log.debug("%s answered a request for one token with status %d", self.name, status)

    def _ask(self, port: int, path: str, timeout_s: float = ANSWER_TIMEOUT_S) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer, {} where there is none."""
        status, body = self._read(port, "GET", path, timeout_s=timeout_s)
        with suppress(ValueError):
            answer = json.loads(body)
            if isinstance(answer, dict):
                return status, answer
        return status, {}

    def _read(
        self, port: int, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float
    ) -> tuple[int, bytes]:
        """Status and body. Not urllib, which follows the user's proxy settings."""
        connection = http.client.HTTPConnection(self._host, port, timeout=timeout_s)
        headers = {"Content-Type": "application/json"}
        if path.startswith("/v1/"):
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _note(self, text: str) -> None:
        """A line of ours in the server's log."""
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with self.log_path.open("a") as file:
                file.write(f"lmsweep: {text}\n")
        except OSError as error:  # a full disk must not end the watch
            log.warning("%s: %s (not in its log: %s)", self.name, text, error)

    def _log_text(self, offset: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(max(offset, os.fstat(file.fileno()).st_size - LOG_READ_BYTES))
            return masked(file.read().decode(errors="replace"), [self._api_key])

    def _first_words(self, offset: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(offset)
            return file.read(LOG_READ_BYTES).decode(errors="replace")

    def _cause(self, process: "_Process") -> "engine.Cause | None":
        return engine.cause_of(self._log_text(process.log_offset))

    def _ended(self, process: "_Process", what: str) -> ServerError:
        """A process that ended unasked, and whether another would."""
        cause = self._cause(process)
        kind = ServerFault if cause is None or cause.passing or process.killed else ServerError
        return self._failure(process.ending(cause), process.log_offset, kind=kind, what=what)

    def _failure(
        self,
        why: str,
        offset: int,
        cure: str = "see",
        kind: type[ServerError] = ServerError,
        what: str = "did not start",
    ) -> ServerError:
        tail = [line for line in self._log_text(offset).splitlines() if line.strip()][-TAIL_LINES:]
        lines = "\n".join(f"    {line}" for line in tail) or "    (the log is empty)"
        return kind(f"{self.name} {what}: {why}; {cure} {self.log_path}\nIts last lines:\n{lines}")


def part_name(server: str, rank: int) -> str:
    """Of a part of a server of several nodes; the first is called as the server."""
    return f"{server}.{rank}" if rank else server


def _waited_s(pid: int) -> float:
    """How long the threads of a process wanted a core and had none; 0 where the kernel does not tell.

    Source: proc(5), schedstat, whose second number are nanoseconds on a run queue.
    """
    waited_ns = 0
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            waited_ns += int(path.read_text().split()[1])
    return waited_ns / 1e9


class _Process:
    """A server under its supervisor."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log_path: Path) -> None:
        self.dead = threading.Event()
        """The server has ended, or counts as dead; what it started may be there still."""
        self.gone = threading.Event()
        """Nothing of it is left."""
        self._report = ""
        self._verdict: str | None = None
        self._grace_s = START_GRACE_S
        self._closing = threading.Lock()
        self._api_servers: list[psutil.Process] | None = None
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_path = log_path
        with log_path.open("ab") as file:
            file.write(f"$ {shlex.join(arguments)}\n".encode())
            file.flush()
            self.log_offset = file.tell()
            """Where its log starts that may tell of its end: a lost port leaves an earlier one before it, and what was
            got over while it started is the cause of nothing later."""
            # Not in a new session: our stage of the supervisor stays where Ray can see it, the other stage leaves.
            self._supervisor = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-E", str(SUPERVISOR), "--grace", f"{START_GRACE_S:g}"),
                    *("--mask", ",".join(secret_variables(variables))),
                    *("--", *arguments),
                ],
                env=variables,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert self._supervisor.stdin is not None
        self._pipe = self._supervisor.stdin
        threading.Thread(target=self._listen, name=f"listen {log_path.stem}", daemon=True).start()

    def _listen(self) -> None:
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as pipe:
            self._report = pipe.readline().decode()
            self.dead.set()
            pipe.read()  # ends when both stages have ended
        self._supervisor.wait()
        with self._closing:
            self._pipe.close()
        self.gone.set()

    @property
    def killed(self) -> bool:
        """By a signal, as was its supervisor if that said nothing; not by an error of its own."""
        return self._report.startswith("signal") or (not self._report and (self._supervisor.poll() or 0) < 0)

    def ending(self, cause: "engine.Cause | None") -> str:
        """How it ended, in words; `cause` is what the log told."""
        if self._verdict:
            return self._verdict
        kind, _, number = self._report.strip().partition(" ")
        if kind == "signal":
            how = f"was killed by {signal.Signals(int(number)).name}"
            if int(number) == signal.SIGKILL:
                how += " (the kernel does that when memory runs out)"
        elif kind == "exit":
            how = f"exited with code {number}"
        elif (code := self._supervisor.poll()) is None or code < 0:
            how = "was ended because its supervisor was killed"
        else:
            how = f"could not be run or ended by its supervisor (exit code {code})"
        return f"{cause.text} ({how})" if cause else how

    def listens(self, port: int) -> bool:
        """Whether it is one of our processes that listens there; taken for granted where that cannot be seen."""
        try:
            return bool(self._listeners(port))
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return True

    def computed_s(self, port: int) -> float:
        """Processor time that those of our processes have used which listen there, and what they waited for a core to
        use more; 0 where that cannot be seen."""
        try:
            if self._api_servers is None:
                self._api_servers = self._listeners(port)
            times = [process.cpu_times() for process in self._api_servers]
            waited_s = sum(_waited_s(process.pid) for process in self._api_servers)
        except psutil.Error:
            return 0.0
        return float(sum(used.user + used.system for used in times)) + waited_s

    def _listeners(self, port: int) -> list[psutil.Process]:
        return [
            process
            for process in psutil.Process(self._supervisor.pid).children(recursive=True)
            if any(
                connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
                for connection in process.net_connections("tcp")
            )
        ]

    def become_ready(self, grace_s: float) -> None:
        """From now on it gets so long to end by itself, also when we are the ones who die."""
        self.log_offset = self._log_path.stat().st_size
        with self._closing:
            self._grace_s = grace_s
            if self._pipe.closed:  # it has died meanwhile, which others tell
                return
            with suppress(BrokenPipeError):
                self._pipe.write(f"{grace_s:g}\n".encode())

    def condemn(self, verdict: str) -> None:
        """It counts as dead for this reason and is killed; returns when nothing is left."""
        self._verdict = verdict
        self.dead.set()
        self.stop(0.0)

    def stop(self, grace_s: float | None = None) -> None:
        """Returns when nothing is left, but for what the kernel does not let go of even when it is killed.

        Without `grace_s` it gets what it has been set to.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        with self._closing:
            if not self._pipe.closed:
                with suppress(BrokenPipeError):
                    self._pipe.write(f"{grace_s}\n".encode())
                self._pipe.close()
                # Closing alone is not enough where a forked child of ours still holds the pipe.
                self._supervisor.terminate()
        if self.gone.wait(grace_s + SUPERVISOR_MARGIN_S):
            return
        log.warning("the supervisor %d did not stop its server and is killed", self._supervisor.pid)
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._supervisor.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self._supervisor.kill()
        if not self.gone.wait(SUPERVISOR_MARGIN_S):
            log.error("something of the server is still there, see the children of process %d", self._supervisor.pid)


def _lengths(models: Mapping[str, Any]) -> dict[str, Any]:
    """Served name -> max_model_len; {} for the answer of something else than vLLM."""
    cards = models.get("data")
    if not isinstance(cards, list):
        return {}
    return {card["id"]: card.get("max_model_len") for card in cards if isinstance(card, dict) and "id" in card}


def _interface(host: str) -> str | None:
    """The network interface of this machine that has the address."""
    found = psutil.net_if_addrs().items()
    return next((name for name, has in found if any(address.address == host for address in has)), None)


def _memory_share(plan: ServerPlan) -> float:
    """The share of each GPU's memory that vLLM wants to see free when it starts."""
    named = plan.model.server.get("gpu_memory_utilization")
    return float(engine.SHARED_GPU_MEMORY * min(1.0, plan.gpus) if named is None else named)


def _with_adapters_here(plan: ServerPlan) -> ServerPlan:
    """`plan` with the planned commits of hub adapters as folders of this machine: told a name, vLLM would take its main
    branch."""
    with boundary(ServerFault, f"bring the adapters of {plan.name}"):
        folders = {source.repository: str(folder_of(source)) for source in plan.sources if source.part is Part.ADAPTER}
    adapters = {name: folders.get(adapter, adapter) if adapter else None for name, adapter in plan.adapters.items()}
    return replace(plan, adapters=adapters)


def _claim_port(host: str) -> tuple[int, socket.socket]:
    """A port that nobody on this machine uses, and a socket to hold while the server takes it.

    vLLM binds its port only after some seconds of imports. Until then a name in Linux's abstract socket namespace keeps
    other servers of ours off it: it leaves no file and ends with its holder. A stranger can still win the race, which
    shows in the log.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0lmsweep-port-{port}")
            # Without SO_REUSEADDR, so that a socket that is bound and does not listen yet counts as taken.
            with socket.socket() as probe:
                probe.bind((host, port))
        except OSError:
            claim.close()
            continue
        return port, claim
    raise ServerFault(f"no free port on {host} between {PORTS.start} and {PORTS.stop - 1}")
