"""SweepConfig + records -> Plan: models, servers, cells, fingerprints, what is still owed."""

import fnmatch
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from sweep.config import Device, Model, Seeds, SweepConfig, Task
from sweep.errors import ConfigError, nearest
from sweep.record import Record, Status
from sweep.tasks import Catalog, catalog

SPEED_ONLY_OPTIONS = frozenset(
    {
        "api_server_count",
        "async_scheduling",
        "block_size",
        "cpu_offload_gb",
        "disable_log_requests",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_log_requests",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "load_format",
        "max_log_len",
        "max_logprobs",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "num_gpu_blocks_override",
        "safetensors_load_strategy",
        "swap_space",
        "uvicorn_log_level",
    }
)
"""vLLM options that change speed or memory, never an answer. Any other option is part of the model's fingerprint:
asking again costs time, serving an answer computed under other settings costs the user's trust."""

SPEED_ONLY_ENVIRONMENT = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "DO_NOT_TRACK",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "OMP_NUM_THREADS",
        "TMPDIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRANSFORMERS_OFFLINE",
        "TRITON_CACHE_DIR",
        "VLLM_CACHE_ROOT",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
    }
)
"""The same for environment variables."""

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
"""Of a checkpoint folder: configuration, tokenizer and template, hashed by content; weights by size and time."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model with everything that is known before a server runs."""

    name: str
    model: Model
    revision: str | None
    """The commit that `model.revision` resolves to; None for a local folder or while the hub cannot be asked."""
    fingerprint: str
    """Hex; of all that changes the model's answers. The first part of every response's key."""
    server: str
    """Name of the server that serves it (ServerPlan.name)."""


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """One vLLM command line and the models behind it (several only when they are adapters of one base)."""

    name: str
    model: Model
    revision: str | None
    adapters: dict[str, str | None]
    """Served model name -> LoRA adapter, None for the base model itself. One entry for a plain server."""
    gpus: float
    """GPUs of one server on a GPU machine: a fraction shares one. Not used where `on_cpu` decides for the CPU."""
    replicas: int | str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model × one task: the unit of result. Self-contained, so that it can be sent to an evaluator."""

    model: ModelPlan
    task_name: str
    """The key under `tasks:`, unlike `task.task`, which is lm-eval's name."""
    task: Task
    seeds: Seeds
    fingerprint: str

    @property
    def key(self) -> str:
        return f"{self.model.name}/{self.task_name}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    models: dict[str, ModelPlan]
    servers: dict[str, ServerPlan]
    cells: tuple[Cell, ...]
    """In the order of the config: models first, then tasks."""
    done: dict[str, Record]
    """Finished records that still fit their cell, by cell key."""

    @property
    def owed(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.key not in self.done)

    @property
    def owed_servers(self) -> dict[str, ServerPlan]:
        """The servers of models with owed cells, in plan order."""
        names = {cell.model.server for cell in self.owed}
        return {name: server for name, server in self.servers.items() if name in names}


def make_plan(
    config: SweepConfig,
    records: Mapping[tuple[str, str], Record],
    *,
    only: str | None = None,
    ask_hub: bool,
) -> Plan:
    """The plan of a sweep. `only` (`model/task`, wildcards allowed) narrows it to cells that run again, done or not.

    Checks task names and shot numbers against the installed lm-eval. With `ask_hub` the commit of a hub model is asked
    for when no local copy tells it; without, it stays unknown (`revision=None`). Raises ConfigError.
    """
    catalogs = {path: catalog((path,) if path else ()) for path in {t.include_path for t in config.tasks.values()}}
    for name, task in config.tasks.items():
        _check_task(name, task, catalogs[task.include_path])
    task_files = {path: _folder_digest(Path(path)) if path else "" for path in catalogs}
    models = _plan_models(config.models, ask_hub=ask_hub)
    servers = _plan_servers(models)
    cells = []
    for model in models.values():
        for task_name in _tasks_of(model, config.tasks):
            task, skipped = _with_overrides(config, model.name, task_name, catalogs)
            if not skipped:
                digest = _cell_fingerprint(model, task, config.seeds, task_files[task.include_path])
                cells.append(Cell(model=model, task_name=task_name, task=task, seeds=config.seeds, fingerprint=digest))
    chosen = cells if only is None else [cell for cell in cells if fnmatch.fnmatchcase(cell.key, only)]
    if not chosen:
        known = [cell.key for cell in cells]
        if only is not None and known:
            raise ConfigError(f"only={only}: no such cell (model/task){nearest(only, known)}")
        raise ConfigError(f"sweep {config.name!r} has no cells: give it models and tasks that are not all skipped")
    done = {
        cell.key: record
        for cell in chosen
        if only is None
        and (record := records.get((cell.model.name, cell.task_name))) is not None
        and record.status is Status.DONE
        and record.fingerprint == cell.fingerprint
    }
    return Plan(models=models, servers=servers, cells=tuple(chosen), done=done)


def _check_task(name: str, task: Task, known: Catalog) -> None:
    try:
        known.require(task.task)
        known.check(task.task, num_fewshot=task.num_fewshot, unsafe_code=task.unsafe_code)
    except ConfigError as error:
        raise ConfigError(f"tasks.{name}: {error}") from None


def _tasks_of(model: ModelPlan, tasks: Mapping[str, Task]) -> list[str]:
    """The task keys that this model runs, after its `tasks:` filter."""
    wanted = model.model.tasks
    patterns = [w.removeprefix("!") for w in wanted]
    for pattern in patterns:
        if not fnmatch.filter(tasks, pattern):
            raise ConfigError(f"models.{model.name}.tasks: unknown task {pattern!r}{nearest(pattern, tasks)}")
    only = [w for w in wanted if not w.startswith("!")]
    excluded = [w.removeprefix("!") for w in wanted if w.startswith("!")]
    return [
        name
        for name in tasks
        if (not only or any(fnmatch.fnmatchcase(name, p) for p in only))
        and not any(fnmatch.fnmatchcase(name, p) for p in excluded)
    ]


def _with_overrides(
    config: SweepConfig, model: str, task_name: str, catalogs: Mapping[str | None, Catalog]
) -> tuple[Task, bool]:
    """The cell's task settings and whether the cell is skipped."""
    task, skipped = config.tasks[task_name], False
    for pattern, override in config.cells.items():
        if not fnmatch.fnmatchcase(f"{model}/{task_name}", pattern):
            continue
        changes = {k: v for k, v in vars(override).items() if k != "skip" and v is not None}
        task, skipped = replace(task, **changes), override.skip
        if changes:
            _check_task(f"{task_name} (cells.{pattern})", task, catalogs[task.include_path])
    return task, skipped


def _plan_models(models: Mapping[str, Model], *, ask_hub: bool) -> dict[str, ModelPlan]:
    planned = {}
    for name, model in models.items():
        revision = None if is_local(model.path) else resolve_revision(model.path, model.revision, ask_hub=ask_hub)
        planned[name] = ModelPlan(
            name=name,
            model=model,
            revision=revision,
            fingerprint=_model_fingerprint(model, revision),
            server=model.entry or name,
        )
    return planned


def _plan_servers(models: Mapping[str, ModelPlan]) -> dict[str, ServerPlan]:
    servers: dict[str, ServerPlan] = {}
    for plan in models.values():
        model = plan.model
        earlier = servers.get(plan.server)
        adapters = {**(earlier.adapters if earlier else {}), plan.name: model.adapter}
        servers[plan.server] = ServerPlan(
            name=plan.server,
            model=earlier.model if earlier else model,
            revision=plan.revision,
            adapters=adapters,
            gpus=model.gpus if model.gpus is not None else float(model.tensor_parallel),
            replicas=model.replicas,
        )
    return servers


def is_local(path: str) -> bool:
    return os.path.isabs(path)


def on_cpu(server: ServerPlan, *, cluster_gpus: float) -> bool:
    """Whether this server runs on the CPU of a cluster with so many GPUs."""
    return server.model.device is Device.CPU or (server.model.device is Device.AUTO and not cluster_gpus)


def resolve_revision(path: str, revision: str | None, *, ask_hub: bool) -> str | None:
    """The commit that a hub model's branch or tag stands for; None when neither the local cache nor the hub tells it.

    The hub comes first where it may be asked, since a branch moves; HF_HUB_OFFLINE is honoured.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    name = revision or "main"
    if ask_hub and not constants.HF_HUB_OFFLINE:
        try:
            sha = HfApi().model_info(path, revision=name, timeout=10).sha
            return str(sha) if sha else None
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            pass  # gated, unknown or unreachable: the local copy may still tell, and vLLM gives the hub's own words
    cached = try_to_load_from_cache(path, "config.json", revision=name)
    # .../models--org--name/snapshots/<commit>/config.json
    return Path(cached).parent.name if isinstance(cached, str) else None


def _model_fingerprint(model: Model, revision: str | None) -> str:
    identity = {
        "weights": _folder_digest(Path(model.path), weights=True) if is_local(model.path) else [model.path, revision],
        "adapter": _source_digest(model.adapter),
        "tokenizer": _source_digest(model.tokenizer),
        "dtype": model.dtype,
        "quantization": model.quantization,
        "trust_remote_code": model.trust_remote_code,
        "generation_config": model.generation_config,
        "server": {k: v for k, v in model.server.items() if k not in SPEED_ONLY_OPTIONS},
        "env": {k: v for k, v in model.env.items() if k not in SPEED_ONLY_ENVIRONMENT},
    }
    return _digest(identity)


def _cell_fingerprint(model: ModelPlan, task: Task, seeds: Seeds, task_files: str) -> str:
    return _digest(
        {
            "model": model.fingerprint,
            "chat": model.model.chat,
            "system_instruction": model.model.system_instruction,
            "max_model_len": model.model.max_model_len,
            "task": {k: v for k, v in asdict(task).items() if k not in ("include_path", "unsafe_code")},
            "task_files": task_files,
            "seeds": asdict(seeds),
            "lm_eval": version("lm_eval"),
        }
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:32]


def _source_digest(source: str | None) -> str | None:
    """Of a tokenizer or adapter: the folder's content when it is local, else its hub name."""
    if source is None or not is_local(source):
        return source
    return _folder_digest(Path(source), weights=True)


def _folder_digest(folder: Path, *, weights: bool = False) -> str:
    """Of a folder's small files by content; with `weights` of its weight files by size and time of change.

    A checkpoint that is overwritten in place must not be served old answers; reading its gigabytes would be too slow.
    """
    digest = hashlib.sha256()

    def add(path: Path, content: bytes) -> None:
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)

    patterns: Sequence[str] = SMALL_FILES if weights else ("**/*",)
    for path in sorted(p for pattern in patterns for p in folder.glob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            add(path, path.read_bytes())
    for path in sorted(p for pattern in WEIGHT_FILES if weights for p in folder.glob(pattern)):
        stat = path.stat()
        add(path, f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
