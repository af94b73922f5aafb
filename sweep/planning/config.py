"""What a sweep can be told: every key of a sweep file, its meaning, its unit and the reason for its default.

Plain data after everything that a file may leave open has been resolved; loading.py makes it from YAML, and keys.py
docs/keys.md from the texts below the fields.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Device(StrEnum):
    GPU = "gpu"
    CPU = "cpu"
    AUTO = "auto"


class Overflow(StrEnum):
    ERROR = "error"
    TRUNCATE = "truncate"


class Scoring(StrEnum):
    AUTO = "auto"
    ECHO = "echo"


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """A number that a finished cell should have; missing it makes the sweep end with exit code 3."""

    value: float
    """On lm-eval's scale: 0.6861 of an accuracy, not 68.61."""
    tolerance: float
    """How far off it may be in either direction. Two standard errors of the metric leave one false alarm in twenty."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the sweep, after `defaults`, `variants`, `checkpoints` and `adapters` have been resolved."""

    path: str = ""
    """Hub id or absolute local folder, given to vLLM as it is; empty for a model at a `url`."""
    url: str | None = None
    """`http://host:port` (or https, and what a gateway has before /v1) of an OpenAI-compatible server that someone else
    runs: it needs no GPU of ours and is never stopped by us. `tokenizer` must then say with which tokenizer its prompts
    are encoded."""
    served_model_name: str | None = None
    """The name under which a server at `url` knows the model; unset means the model's key."""
    api_key: str | None = field(default=None, repr=False)
    """Key of the server at `url`, from the environment (`${oc.env:NAME}`); unset means that it wants none."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the commit that it resolves to is what is served and recorded. With `url` a
    label of your own for what is served there: change it when that changes, and no stored answer is taken for new."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer than the model's own."""
    chat: bool = False
    """Apply the model's chat template. Off as in stock lm-eval."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What a template takes beside the messages: `enable_thinking: false`, say."""
    system_instruction: str | None = None
    """Before everything else, as a turn of its own with `chat`."""
    think_end_token: str | None = None
    """What ends the reasoning of a reasoning model (`</think>`): its answer is the text behind the last one. Stop
    strings then apply to the answer alone, so give it room (`gen_kwargs: {max_gen_toks: ...}`)."""
    dtype: str = "auto"
    """As vLLM takes it: `auto` is the checkpoint's own, a half one where that is float32, and
    float16 on GPUs that know no bfloat16."""
    quantization: str | None = None
    """Left to vLLM, which reads it from the checkpoint, when unset."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint, in the server and in the tokenizer."""
    device: Device = Device.GPU
    """`cpu` serves with vLLM's CPU build; `auto` takes a GPU where the cluster has one and the CPU elsewhere."""
    tensor_parallel: int = 1
    """GPUs that one server spans; all on one node, or on each of its `nodes`."""
    nodes: int = 1
    """Nodes that one server spans, for a model that no single node can hold. Each gives `gpus` (`tensor_parallel` where
    that is unset), and the layers are split over what `tensor_parallel` leaves: `nodes: 2, tensor_parallel: 8` is two
    halves of the layers, `nodes: 2, gpus: 8, tensor_parallel: 16` splits every layer over both nodes."""
    gpus: float | None = None
    """GPUs held by one server, on each of its nodes: a fraction shares one GPU. Unset means `tensor_parallel`."""
    gpu_type: str | None = None
    """Only GPUs of this type, by Ray's name for it (`H100`, `A100-80G`); unset means any."""
    gpu_memory_gb: float | None = None
    """Only GPUs with so much memory or more; unset means any. A node whose memory nobody knows is not ruled out: vLLM
    says what it lacks when it starts."""
    replicas: int | Literal["auto"] = "auto"
    """Servers of this model at the same time, at most. `auto`: as many as make it end earlier, on GPUs that no other
    model waits for; one on the CPU, whose cores they would share."""
    concurrency: int | Literal["auto"] = "auto"
    """Requests in flight at one server, or `auto`."""
    max_model_len: int | None = None
    """Tokens of prompt plus answer; unset means the checkpoint's own limit."""
    generation_config: str = "vllm"
    """`vllm` keeps a checkpoint's generation_config.json (repetition penalties, sampling defaults) from changing
    scores; `auto` applies it."""
    scoring: Scoring = Scoring.AUTO
    """`auto` scores by the fastest methods that the server was seen to do as well as `echo`, the way of stock lm-eval;
    `echo` keeps to that. Answers that are stored are used either way."""
    server: dict[str, Any] = field(default_factory=dict)
    """Any further option of `vllm serve`; a file may write `max-num-seqs` too, here keys are in snake_case."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the server process."""
    tasks: tuple[str, ...] = ()
    """Only these tasks, or with a leading `!` all but these; empty means all."""
    expect: dict[str, dict[str, Expectation]] = field(default_factory=dict)
    """What its numbers should be, by task and then as in a task's `expect`, which it replaces."""
    server_python: str | None = None
    """Absolute path of the Python whose vLLM serves this model; unset means the one that runs the sweep. So two
    versions of vLLM can be compared in one sweep."""
    startup_timeout_s: float = 900.0
    """Covers weight loading and CUDA-graph capture."""
    hang_timeout_s: float = 600.0
    """A server that has requests and computes nothing for so long counts as dead, as does one that does not answer
    /health for a tenth of it. Longer than the slowest single step: a long prompt on a CPU takes minutes."""
    max_failures: int | None = None
    """After so many failed cells the rest of the model is given up; unset means never. What failed is tried again by
    the next launch, and so is what was given up."""
    entry: str = ""
    """Models with the same entry share a server: the model's own name, or for an adapter the name of its base model."""
    adapter: str | None = None
    """A LoRA adapter (folder or hub id) served on top of `path`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One lm-eval task with its settings, after `defaults`, `suites` and shot grids have been resolved."""

    task: str
    """lm-eval's name of a task, group or tag; unset means the task's key."""
    num_fewshot: int | None = None
    """Examples before each question; unset means the task's own default. A file may give a list: one task for each,
    named `<name>-0shot`, `<name>-5shot`."""
    limit: int | float | None = None
    """Documents per subtask, or a share of them below 1; unset means all."""
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    """Merged over the task's generation_kwargs, as lm-eval's `--gen_kwargs`."""
    fewshot_as_multiturn: bool | None = None
    """Examples become turns of the conversation; unset means with `chat` only, as lm-eval does."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """lm-eval's `--metadata`, for tasks that are configured by it (RULER, for one)."""
    unsafe_code: bool = False
    """Confirms a task that executes code which the model wrote."""
    include_path: str | None = None
    """Absolute folder with the user's own task YAML."""
    expect: dict[str, Expectation] = field(default_factory=dict)
    """What every model's numbers should be, by lm-eval's `metric,filter`; `acc` means `acc,none`, and a subtask's name
    may stand before it: `mmlu_anatomy/acc`. It changes no number and costs no cell."""
    on_overflow: Overflow = Overflow.ERROR
    """What happens when a prompt does not fit into `max_model_len`: fail the cell before anything is sent, or cut the
    context from the left as stock lm-eval does, counted and said in the record."""
    share_samples: bool | None = None
    """Whether W&B may have documents and answers of this task where `wandb.samples` asks for them; unset means unless
    its data set is known to be gated, whose terms forbid to pass it on (GPQA asks that no example appears online)."""


UNSCORED = ("expect", "share_samples")
"""Settings of a task that its scores do not depend on."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """lm-eval's four seeds and their defaults."""

    random: int = 0
    """Of Python's `random`."""
    numpy: int = 1234
    """Of numpy."""
    torch: int = 1234
    """Of torch."""
    fewshot: int = 1234
    """Of the draw of examples, where a task draws them."""


@dataclass(frozen=True, kw_only=True)
class CellOverride:
    """Changes one model × task; every field that is set replaces the task's."""

    skip: bool | None = None
    """The model does not run the task."""
    num_fewshot: int | None = None
    """As of a task."""
    limit: int | float | None = None
    """As of a task."""
    gen_kwargs: dict[str, Any] | None = None
    """As of a task, whose own they replace as a whole."""
    on_overflow: Overflow | None = None
    """As of a task."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online with WANDB_API_KEY (or a login) and offline without; the other words decide it."""
    project: str = "lmsweep"
    """W&B's, made when it is missing."""
    entity: str | None = None
    """Team or user whose project it is; unset means the account's default."""
    group: str | None = None
    """Of the runs; unset means the sweep's name."""
    tags: tuple[str, ...] = ()
    """On every run."""
    samples: bool | int = False
    """Samples of each cell that go to W&B, as a table and as lines of lm-eval's sample files: at most so many; `true`
    means 200. Prompts and answers are data that is published, so none go unasked; a task's `share_samples` forbids
    it."""
    report: bool = True
    """A W&B Report of the sweep is made at its end, and brought up to date by later launches. Online only."""
    share_link: bool = False
    """The Report also gets a link under which anyone who has it can read it, without an account; `false` again ends
    that link with the next Report."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    address: str | None = None
    """Unset: RAY_ADDRESS if it is set, otherwise a local cluster for this sweep alone. `local` is always that, `auto`
    the cluster that runs here (or RAY_ADDRESS), `host:port` the head of any."""
    cpu_servers: int | None = None
    """CPU servers that may run at the same time on a node; unset means what it declares, or what its cores carry."""
    evaluators: int | None = None
    """Evaluators at the same time on a node; unset means what it declares, or what its cores carry."""


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Like nodes of a cluster that a file describes, for `plan cluster=FILE`."""

    count: int = 1
    """How many there are."""
    gpus: int = 0
    """On each."""
    gpu_type: str = ""
    """By Ray's name for it (`H100`)."""
    gpu_memory_gb: float | None = None
    """Of each GPU."""
    cpu_servers: int | None = None
    """CPU servers at the same time on each; unset means 1 where there are no GPUs."""
    evaluators: int | None = None
    """At the same time on each; unset means two for each server that it carries."""
    weights: tuple[str, ...] = ()
    """Models, as in their `path`, whose weights these nodes hold."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    name: str
    """Names the run directory and W&B's runs; unset means as the file is called, whatever that extends."""
    models: dict[str, Model]
    """By a name of your own: letters, digits, `-` and `_`."""
    tasks: dict[str, Task]
    """By a name of your own, which is lm-eval's unless `task` says that."""
    runs_dir: str = "runs"
    """Absolute after loading; the sweep lives in `<runs_dir>/<name>`."""
    limit: int | float | None = None
    """As of a task, for every task that sets none of its own, in which it is filled in already."""
    seeds: Seeds = field(default_factory=Seeds)
    """What is random in an evaluation."""
    retries: int = 1
    """How often a cell is run again that failed of an error that may pass (a data set that could not be read, servers
    that answer with errors): once tells an accident from a fault, and costs no answer that was given. What is lost with
    a server, an evaluator or a node is run again as often as it takes and counts for nothing."""
    max_failures: int | None = None
    """After so many failed cells the rest of the sweep is given up; unset means never, as cells fail on their own."""
    load_timeout_s: float = 7200.0
    """An evaluator that loads a task or a tokenizer for longer is ended and what needs it fails: it hangs. Long enough
    for the first download of tens of gigabytes; after ten minutes it is said, and cells that need not wait begin."""
    scoring_timeout_s: float = 14400.0
    """An evaluator that scores for longer, all answers being there, is ended and its cell fails: it hangs. Long enough
    for tasks that execute code and for metrics that are models themselves; the answers are kept."""
    cells: dict[str, CellOverride] = field(default_factory=dict)
    """Keys are `model/task` and may hold shell wildcards; later keys win."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """How the sweep is mirrored to W&B."""
    ray: RayConfig = field(default_factory=RayConfig)
    """On which cluster it runs."""
    api_key: str | None = field(default=None, repr=False)
    """Key of our servers, from the environment (`${oc.env:NAME}`); a random one when unset."""
    env: dict[str, str] = field(default_factory=dict, repr=False)
    """Environment variables of every server and evaluator on every node, and of the launch itself where it asks the
    hub: HF_HOME, caches, proxies. Stronger than what is set on a node, weaker than a model's `env`, in which they are
    filled in already."""
    walltime: float | None = None
    """Seconds after its start at which the launch has to be over; a file may write `3h50m` or `3:50:00`. The end of a
    Slurm job around it counts where it is earlier, or where this is unset."""
