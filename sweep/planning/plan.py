"""SweepConfig + records -> Plan: models, servers, cells, fingerprints, what is still owed."""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from sweep.errors import ConfigError, boundary, nearest, nearest_file
from sweep.masking import is_proxy, is_secret
from sweep.planning.config import UNSCORED, Device, Model, Seeds, SweepConfig, Task
from sweep.planning.hub import Part, Source, at, resolve_revision
from sweep.planning.tasks import Catalog, catalog
from sweep.record import Record, Status

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
        "CURL_CA_BUNDLE",
        "DO_NOT_TRACK",
        "HF_DATASETS_OFFLINE",
        "HF_EVALUATE_OFFLINE",
        "HF_DATASETS_CACHE",
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "HF_TOKEN",
        "NLTK_DATA",
        "OMP_NUM_THREADS",
        "REQUESTS_CA_BUNDLE",
        "SSL_CERT_FILE",
        "TMPDIR",
        "TORCH_HOME",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRANSFORMERS_OFFLINE",
        "TRITON_CACHE_DIR",
        "VLLM_CACHE_ROOT",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_LOGGING_LEVEL",
        "VLLM_NO_USAGE_STATS",
        "XDG_CACHE_HOME",
    }
)
"""The same for environment variables, and so for those of a proxy."""

SAMPLES, SAMPLE_BYTES = 8, 65_536
"""Of each weight file that are read for a checkpoint's fingerprint: half a megabyte, whatever its size."""

SMALL_FILES = frozenset({".json", ".jinja", ".txt", ".model", ".py"})
"""Of a checkpoint: configuration, tokenizer and template, hashed by content. All else counts by samples."""


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model with everything that is known before a server runs."""

    name: str
    model: Model
    revision: str | None
    """The commit that `model.revision` resolves to; None for a local folder, for a model at a `url`, where it is a
    label, and while the hub cannot be asked."""
    fingerprint: str
    """Hex; of all that changes the model's answers. The first part of every response's key."""
    server: str
    """Name of the server that serves it (ServerPlan.name)."""
    tokenizer_revision: str | None = None
    """The commit of a hub tokenizer that is not the model's own."""
    adapter_revision: str | None = None
    """The commit of a hub adapter."""
    problem: str | None = None
    """Why it cannot be served at all; its cells fail, the others go on."""


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """One vLLM command line and the models behind it (several only when they are adapters of one base), or the server
    at a `url`, which is not ours to start."""

    name: str
    model: Model
    revision: str | None
    tokenizer_revision: str | None = None
    adapters: dict[str, str | None]
    """Model -> LoRA adapter, None for the base model itself; our servers serve them under these names. One entry for a
    plain server."""
    adapter_revisions: dict[str, str] = field(default_factory=dict)
    """Model -> commit of its adapter from the hub, where it is known."""
    gpus: float
    """GPUs of one server on a GPU machine: a fraction shares one. Not used where `on_cpu` decides for the CPU; 0 for an
    external server."""
    replicas: int | str

    @property
    def external(self) -> bool:
        """Whether someone else runs it: it takes nothing of this cluster and is neither started nor stopped by us."""
        return self.model.url is not None

    @property
    def sources(self) -> tuple[Source, ...]:
        """What it takes from the hub: the model, a tokenizer of another repository, adapters; of a model at a `url`
        only the tokenizer, with which its prompts are made here."""
        load_format = str(self.model.server.get("load_format", "auto"))
        wanted = [
            (self.model.path, self.model.revision, self.revision, Part.MODEL, load_format),
            (self.model.tokenizer, None, self.tokenizer_revision, Part.TOKENIZER, ""),
            *((a, None, self.adapter_revisions.get(name), Part.ADAPTER, "") for name, a in self.adapters.items()),
        ]
        return tuple(
            Source(repository=repository, branch=branch, commit=commit, part=part, load_format=load_format)
            for repository, branch, commit, part, load_format in wanted
            if repository and not is_local(repository)
        )


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
    refused: dict[str, Record] = field(default_factory=dict)
    """Cells that cannot run whatever the cluster does, as the failures that they are."""
    stands: dict[str, Record] = field(default_factory=dict)
    """What there is of the whole sweep, whatever `only` chose, by cell key: records that fit their cell and refusals,
    but no failure that is tried again."""
    superseded: tuple[str, ...] = ()
    """Cells that have numbers of other settings, which theirs will replace."""
    commits: dict[str, str] = field(default_factory=dict)
    """What this launch and earlier ones into the same run directory took hub names for: `name@branch` -> commit."""

    @property
    def owed(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.key not in self.done and cell.key not in self.refused)

    @property
    def owed_servers(self) -> dict[str, ServerPlan]:
        """The servers of models with owed cells, in plan order."""
        names = {cell.model.server for cell in self.owed}
        return {name: server for name, server in self.servers.items() if name in names}


def served_name(plan: ModelPlan | ServerPlan) -> str:
    """The name under which a model is asked for: its key, unless a server at a `url` knows it under another.

    Of a server it is that of its base model.
    """
    return plan.model.served_model_name or plan.name


def failure(cell: Cell, error: str) -> Record:
    """The record of a cell that failed just now."""
    return Record(
        model=cell.model.name,
        task=cell.task_name,
        fingerprint=cell.fingerprint,
        status=Status.FAILED,
        error=error,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def make_plan(
    config: SweepConfig,
    records: Mapping[tuple[str, str], Record],
    *,
    only: str | None = None,
    ask_hub: bool,
    commits: Mapping[str, str] | None = None,
    located: Callable[[str], str] = str,
) -> Plan:
    """The plan of a sweep. `only` (`model/task`, wildcards allowed) narrows it to cells that run again, done or not.

    Checks task names, shot numbers and what is expected of scores against the installed lm-eval. `commits` is
    `Plan.commits` of the last launch: it stands in where the hub is not asked or does not answer, so that such a launch
    goes on with the weights that the run directory is about. `located` puts the source before a message that begins
    with a key, for the models that cannot run. Raises ConfigError.
    """
    catalogs = {path: catalog((path,) if path else ()) for path in {t.include_path for t in config.tasks.values()}}
    for name, task in config.tasks.items():
        _check_task(f"tasks.{name}", task, catalogs[task.include_path])
    if misnamed := list(_misnamed(config, catalogs)):
        raise ConfigError("\n".join(misnamed))
    task_files = dict.fromkeys(catalogs, "")
    for folder in filter(None, catalogs):
        with boundary(ConfigError, f"include_path: read {folder}"):
            task_files[folder] = _folder_digest(Path(folder))
    commit_by_source = _resolve_all(config.models.values(), commits or {}, ask_hub=ask_hub)
    models = _plan_models(config.models, commit_by_source, located)
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
        if only is not None and cells:
            raise ConfigError(f"only={only}: no such cell (model/task){_nearest_cells(only, cells)}")
        raise ConfigError(f"sweep {config.name!r} has no cells: give it models and tasks that are not all skipped")
    known_commits = {source: commit for source, commit in commit_by_source.items() if commit is not None}
    plan = Plan(
        models=models, servers=servers, cells=tuple(chosen), done={}, commits={**(commits or {}), **known_commits}
    )
    return as_of(plan, records, chosen_from=None if only is None else cells)


def as_of(plan: Plan, records: Mapping[tuple[str, str], Record], *, chosen_from: Sequence[Cell] | None = None) -> Plan:
    """The plan with what `records` say is done, whatever it said before, and with its refusals made just now.

    Cells that were chosen (`only`) from all of the sweep's run again whatever there is.
    """
    fitting = {
        cell.key: record
        for cell in chosen_from or plan.cells
        if (record := records.get((cell.model.name, cell.task_name))) is not None
        and record.fingerprint == cell.fingerprint
    }
    numbers = {key: record for key, record in fitting.items() if record.status is Status.DONE}
    done = {} if chosen_from else {cell.key: numbers[cell.key] for cell in plan.cells if cell.key in numbers}
    refused = {
        cell.key: failure(cell, cell.model.problem)
        for cell in plan.cells
        if cell.model.problem is not None and cell.key not in done
    }
    superseded = tuple(
        cell.key
        for cell in plan.cells
        if (record := records.get((cell.model.name, cell.task_name))) is not None
        and record.status is Status.DONE
        and record.fingerprint != cell.fingerprint
    )
    tried = {cell.key for cell in plan.cells}
    untried = {key: record for key, record in fitting.items() if key not in tried}
    # Numbers outlast a failure of the same settings, as in the store.
    stands = {**untried, **refused, **numbers}
    return replace(plan, done=done, refused=refused, stands=stands, superseded=superseded)


def _nearest_cells(only: str, cells: Iterable[Cell]) -> str:
    """What `only` may have meant: cells, or of the bare name of a model or task all its cells."""
    cells = list(cells)
    if "/" in only:
        return nearest(only, [cell.key for cell in cells])
    all_of = [(cell.model.name, f"{cell.model.name}/*") for cell in cells]
    all_of += [(cell.task_name, f"*/{cell.task_name}") for cell in cells]
    if exact := dict.fromkeys(pattern for name, pattern in all_of if name == only):
        return f"; did you mean {' or '.join(map(repr, exact))}?"
    return nearest(only, dict.fromkeys(pattern for _, pattern in all_of), most=2)


def _check_task(key: str, task: Task, known: Catalog) -> None:
    """Raises ConfigError that begins with `key`, where the settings were written."""
    try:
        known.require(task.task)
        known.check(task.task, num_fewshot=task.num_fewshot, unsafe_code=task.unsafe_code)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _misnamed(config: SweepConfig, catalogs: Mapping[str | None, Catalog]) -> Iterator[str]:
    """A line for each number that is expected of a task and that it cannot give: after the sweep would be too late."""
    said = [(f"tasks.{name}.expect", name, task.expect) for name, task in config.tasks.items()]
    for model_name, model in config.models.items():
        said += [(f"models.{model_name}.expect.{name}", name, expect) for name, expect in model.expect.items()]
    for key, name, expect in said:
        task = config.tasks[name]
        for number in expect:
            if (why := catalogs[task.include_path].missing(task.task, number)) is not None:
                yield f"{key}.{number}: {why}"


def _tasks_of(model: ModelPlan, tasks: Mapping[str, Task]) -> list[str]:
    """The task keys that this model runs, after its `tasks:` filter, which names either these or all but these."""
    named = {choice.removeprefix("!") for choice in model.model.tasks}
    if any(choice.startswith("!") for choice in model.model.tasks):
        return [name for name in tasks if name not in named]
    return [name for name in tasks if not named or name in named]


def _with_overrides(
    config: SweepConfig, model: str, task_name: str, catalogs: Mapping[str | None, Catalog]
) -> tuple[Task, bool]:
    """The cell's task settings and whether the cell is skipped."""
    task, skipped = config.tasks[task_name], False
    for pattern, override in config.cells.items():
        if not fnmatch.fnmatchcase(f"{model}/{task_name}", pattern):
            continue
        changes = {name: value for name, value in vars(override).items() if value is not None}
        skipped = changes.pop("skip", skipped)
        if changes:
            task = replace(task, **changes)
            _check_task(f"cells.{pattern}", task, catalogs[task.include_path])
    return task, skipped


def _resolve_all(models: Iterable[Model], earlier: Mapping[str, str], *, ask_hub: bool) -> dict[str, str | None]:
    """The commit of everything that these models take from the hub, by `name@branch`."""
    sources = dict.fromkeys(
        (source, revision)
        for model in models
        for source, revision in ((model.path, model.revision), (model.tokenizer, None), (model.adapter, None))
        if source and not is_local(source)
    )

    def resolve(source: tuple[str, str | None]) -> str | None:
        return resolve_revision(*source, ask_hub=ask_hub, earlier=earlier.get(at(*source)))

    # At the same time: where packets to the hub get lost, each would take the whole timeout.
    with ThreadPoolExecutor() as pool:
        return dict(zip((at(*source) for source in sources), pool.map(resolve, sources), strict=True))


def _plan_models(
    models: Mapping[str, Model], commits: Mapping[str, str | None], located: Callable[[str], str]
) -> dict[str, ModelPlan]:
    return {
        name: ModelPlan(
            name=name,
            model=model,
            revision=commits.get(at(model.path, model.revision)),
            fingerprint=_model_fingerprint(name, model, commits),
            server=model.entry or name,
            tokenizer_revision=commits.get(at(model.tokenizer, None)) if model.tokenizer else None,
            adapter_revision=commits.get(at(model.adapter, None)) if model.adapter else None,
            problem=None if (problem := _problem(name, model)) is None else located(problem),
        )
        for name, model in models.items()
    }


def _problem(name: str, model: Model) -> str | None:
    for key, source in (("path", model.path), ("tokenizer", model.tokenizer), ("adapter", model.adapter)):
        if source is not None and is_local(source) and not os.path.exists(source):
            return f"models.{name}.{key}: no file or folder {source!r}{nearest_file(Path(source))}"
    return None


def _plan_servers(models: Mapping[str, ModelPlan]) -> dict[str, ServerPlan]:
    servers: dict[str, ServerPlan] = {}
    for plan in (p for p in models.values() if p.problem is None):
        model = plan.model
        earlier = servers.get(plan.server)
        adapters = {**(earlier.adapters if earlier else {}), plan.name: model.adapter}
        servers[plan.server] = ServerPlan(
            name=plan.server,
            model=earlier.model if earlier else model,
            revision=plan.revision,
            tokenizer_revision=plan.tokenizer_revision,
            adapters=adapters,
            adapter_revisions={name: commit for name in adapters if (commit := models[name].adapter_revision)},
            gpus=_gpus(model),
            replicas=1 if model.url is not None else model.replicas,
        )
    return servers


def _gpus(model: Model) -> float:
    if model.url is not None:
        return 0.0
    return model.gpus if model.gpus is not None else float(model.tensor_parallel)


def is_local(path: str) -> bool:
    return os.path.isabs(path)


def decided(server: ServerPlan, *, cluster_gpus: float) -> ServerPlan:
    """The server with `device: auto` decided by a cluster with so many GPUs. Once for a launch: nodes come and go."""
    device = Device.CPU if on_cpu(server, cluster_gpus=cluster_gpus) else Device.GPU
    return replace(server, model=replace(server.model, device=device))


def on_cpu(server: ServerPlan, *, cluster_gpus: float) -> bool:
    """Whether this server runs on the CPU of a cluster with so many GPUs; never one of several nodes."""
    model = server.model
    return model.device is Device.CPU or (model.device is Device.AUTO and not cluster_gpus and model.nodes == 1)


def _model_fingerprint(name: str, model: Model, commits: Mapping[str, str | None]) -> str:
    def identity(source: str | None, revision: str | None = None) -> Any:
        """What tells one state of a checkpoint, tokenizer or adapter from another."""
        if source is not None and is_local(source) and not os.path.exists(source):
            return [source, "missing"]
        if source is None or not is_local(source):
            return source and [source, commits[at(source, revision)]]
        with boundary(ConfigError, f"models.{name}: read {source}"):
            return _checkpoint_digest(Path(source))

    def meant(value: Any) -> Any:
        """The value of an option; what it names on this machine counts by what is in it."""
        if isinstance(value, dict):
            return {key: meant(item) for key, item in value.items()}
        if isinstance(value, str) and is_local(value) and os.path.exists(value):
            return [value, identity(value)]
        return value

    if model.url is None:
        weights, engine = identity(model.path, model.revision), os.environ.get("LMSWEEP_ENGINE")
    else:
        # All that tells one state of what is served there from another; the last is the user's own word for it.
        weights, engine = ["url", model.url, model.served_model_name or name, model.revision], None
    # A key of its own only where it is set: answers that are stored under older fingerprints stay valid.
    program = {"server_python": model.server_python} if model.server_python else {}
    return _digest(
        {
            "weights": weights,
            "adapter": identity(model.adapter),
            "tokenizer": identity(model.tokenizer),
            "dtype": model.dtype,
            # Some models choose their position factors by it (Phi-3's longrope), for short prompts too.
            "max_model_len": model.max_model_len,
            "quantization": model.quantization,
            "trust_remote_code": model.trust_remote_code,
            "generation_config": meant(model.generation_config),
            "server": {k: meant(v) for k, v in model.server.items() if k not in SPEED_ONLY_OPTIONS},
            # A key or a token opens doors, behind which is the same for everyone; it may change from day to day.
            "env": {
                k: v for k, v in model.env.items() if not (k in SPEED_ONLY_ENVIRONMENT or is_proxy(k) or is_secret(k))
            },
            # Another engine in vLLM's place (see server.py) answers differently.
            "engine": engine,
            **program,
        }
    )


def _cell_fingerprint(model: ModelPlan, task: Task, seeds: Seeds, task_files: str) -> str:
    # Keys of their own only where they are set, as above. Answers are stored whole and by their prompts, so neither is
    # a part of the model's fingerprint.
    chosen = {
        name: value for name in ("chat_template_kwargs", "think_end_token") if (value := getattr(model.model, name))
    }
    return _digest(
        {
            "model": model.fingerprint,
            "chat": model.model.chat,
            **chosen,
            "system_instruction": model.model.system_instruction,
            "task": {k: v for k, v in asdict(task).items() if k not in ("include_path", "unsafe_code", *UNSCORED)},
            "task_files": task_files,
            "seeds": asdict(seeds),
            "lm_eval": version("lm_eval"),
        }
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()[:32]


def _checkpoint_digest(path: Path) -> str:
    """Of a checkpoint folder or file: small files by content, weights by size, time of change and samples.

    Of what lies in folders below it only the code counts, which `trust_remote_code` may run.

    A checkpoint that is overwritten in place must not be served old answers, nor one of the same shape whose times were
    set alike by an archive; reading gigabytes would be too slow.
    """
    digest = hashlib.sha256()
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        files += sorted(path.glob("[!.]*/**/*.py"))
    for file in files:
        name = file.name if file == path else str(file.relative_to(path))
        _add(digest, name, file.read_bytes() if file.suffix in SMALL_FILES else _samples(file))
    return digest.hexdigest()


def _samples(file: Path) -> bytes:
    """The file's size and time, and blocks spread over it from its beginning, where safetensors list their tensors."""
    stat = file.stat()
    parts = [f"{stat.st_size} {stat.st_mtime_ns}".encode()]
    with file.open("rb") as content:
        for number in range(SAMPLES):
            content.seek(max(0, stat.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            parts.append(content.read(SAMPLE_BYTES))
    return b"".join(parts)


def _folder_digest(folder: Path) -> str:
    """Of all files below, by content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            _add(digest, str(name), file.read_bytes())
    return digest.hexdigest()


def _add(digest: Any, name: str, content: bytes) -> None:
    digest.update(os.fsencode(f"{name}\0{len(content)}\0") + content)
