"""One cell through lm-eval -> Record: scores, sample files, what was truncated, what took effect.

Runs in an evaluator's child process (evaluator.py) or in a test; knows neither Ray nor servers.
"""

import functools
import logging
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from sweep import __version__
from sweep.errors import TaskError, boundary
from sweep.evaluating.client import Client, Pool
from sweep.evaluating.estimate import Estimate, Scorer
from sweep.evaluating.lm import Channel, SweepLM
from sweep.evaluating.preflight import PROBE_TEXTS, Facts
from sweep.evaluating.scoring import Method
from sweep.planning.config import UNSCORED, Model, Scoring, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan, served_name
from sweep.record import WITHOUT_BOS, Record, Score, Status

log = logging.getLogger(__name__)

LIBRARIES = ("lm_eval", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished cell: its record, and lm-eval's files by name, to be stored before the record."""

    record: Record
    files: dict[str, bytes]


def load_tokenizer(plan: ModelPlan) -> Any:
    """The model's own tokenizer, or the one that its config names; a chat model's has a chat template.

    Raises TaskError, which costs the model's cells before any server is started for them.
    """
    from transformers import AutoTokenizer

    model = plan.model
    source, revision = model.path, plan.revision or model.revision
    if model.tokenizer:
        source, revision = model.tokenizer, plan.tokenizer_revision
    with boundary(TaskError, f"load the tokenizer of model {plan.name} from {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=model.trust_remote_code)
    if model.chat:
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise TaskError(
                f"model {plan.name} has `chat: true`, but the tokenizer in {source} brings no chat template: "
                f"set `chat: false`, or `tokenizer:` to one that has it ({str(error).splitlines()[0]})"
            ) from None
    return tokenizer


def probe_token_ids(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """What a model's tokenizer makes of PROBE_TEXTS, which its server must make of them too."""
    encoded = tokenizer(list(PROBE_TEXTS), add_special_tokens=False).input_ids
    return tuple(tuple(ids) for ids in encoded)


def check_task(task: Task, seeds: Seeds, model: Model) -> None:
    """Load a task with its data; raises TaskError with the cause. Finds gated, missing and broken data sets early, and
    metrics that cannot be loaded, for which lm-eval only logs an error until it scores.

    `model` is one that runs the task: some tasks make their documents with its tokenizer.
    """
    with boundary(TaskError, f"load task {task.task}"), _reproducible_documents(seeds), _confirmed_code(task):
        manager = _manager(task, model)
        loaded = manager.load([task.task])
        nltk: Any = sys.modules.get("nltk")
        if nltk is not None and not isinstance(nltk.download, functools.partial):
            # A download that fails (IFEval's punkt_tab) returns False, which the task ignores until it scores. It is
            # known only now that this one uses nltk, whose import costs every evaluator 3 s and 100 MB.
            nltk.download = functools.partial(nltk.download, raise_on_error=True)
            loaded = manager.load([task.task])
        for name, leaf in loaded["tasks"].items():
            _require_metrics(name, leaf)


def _require_metrics(name: str, leaf: Any) -> None:
    """Raises TaskError for a metric that scoring would call in vain: one that lm-eval did not find in `evaluate`."""
    from lm_eval.api.task import ConfigurableTask

    own_scoring = leaf.config.process_results or type(leaf).process_results is not ConfigurableTask.process_results
    if not own_scoring and leaf.OUTPUT_TYPE == "generate_until":
        absent = [metric for metric, function in leaf._metric_fn_list.items() if function is None]
        if absent:
            raise TaskError(
                f"task {name}: the metric script {', '.join(absent)} cannot be had from the hub (evaluate-metric/…); "
                "`python launch.py fetch` brings it where there is a network"
            )


def evaluate(cell: Cell, *, tokenizer: Any, pool: Pool, channel: Channel) -> Evaluated:
    """Run one cell; every answer it gets is handed to `channel` before the cell ends.

    Raises TaskError or RequestError for what costs this cell, client.Cancelled when the scheduler takes it back.
    """
    started_at, start = datetime.now(UTC), time.monotonic()
    client = Client(model=served_name(cell.model), pool=pool)
    lm = _lm(cell, tokenizer, client, channel)
    with boundary(TaskError, f"evaluate {cell.key}"):
        results = _simple_evaluate(cell, lm, limit=cell.task.limit)
        _check_effect(cell, results)
        samples = results.pop("samples")
        facts = channel.facts()
        scores, unusable = _scores(results)
        settings = _settings(cell, lm, facts, results, samples)
        files = _files(cell, lm, results, samples)
    record = Record(
        model=cell.model.name,
        task=cell.task_name,
        fingerprint=cell.fingerprint,
        status=Status.DONE,
        scores=scores,
        counts=lm.counts,
        warnings=(*unusable, *_warnings(cell, lm), *facts.notes),
        started_at=started_at.isoformat(timespec="seconds"),
        # A cell that waits for its server's weights has not become a slower one.
        wall_s=round(time.monotonic() - start - lm.waited_s, 3),
        request_s=round(client.traffic.request_s, 3),
        settings=settings,
        versions={
            "vllm": ", ".join(sorted(lm.engines)),
            **{name: version(name) for name in LIBRARIES},
            "lmsweep": __version__,  # its own word: a checkout that a job ships is installed nowhere
        },
    )
    return Evaluated(record=record, files=files)


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The first request of a cell as a server would get it."""

    kind: str
    prompt: str
    continuation: str | None
    """Of a scoring request."""
    arguments: Mapping[str, Any]
    """Of a generation: stop strings, limits."""
    prompt_tokens: int
    requests: int
    """Of one document."""


def preview(cell: Cell, tokenizer: Any) -> Preview:
    """The first document's first request, rendered without any server. Raises TaskError."""
    seen: list[tuple[str, Any]] = []  # kind and lm-eval's Instance
    lm = _lm(cell, tokenizer, Client(model=served_name(cell.model), pool=Pool()), _NoChannel())

    class Rendered(Exception):
        pass

    def capture(kind: str) -> Callable[[list[Any]], Any]:
        def requests(instances: list[Any]) -> Any:
            seen.extend((kind, instance) for instance in instances)
            raise Rendered

        return requests

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, capture(kind))
    with boundary(TaskError, f"render {cell.key}"), suppress(Rendered):
        _simple_evaluate(cell, lm, limit=1)
    kind, first = seen[0]
    arguments = first.args
    prompt = str(arguments[0])
    return Preview(
        kind=kind,
        prompt=prompt,
        continuation=str(arguments[1]) if kind == "loglikelihood" else None,
        arguments=lm.generation(prompt, arguments[1], repeat=0).parameters if kind == "generate_until" else {},
        prompt_tokens=len(tokenizer(prompt, add_special_tokens=False).input_ids),
        requests=sum((i.task_name, i.doc_id) == (first.task_name, first.doc_id) for _, i in seen),
    )


class _NoChannel:
    """For rendering, where nothing is asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a preview must not need {name}")


def _lm(cell: Cell, tokenizer: Any, client: Client, channel: Any) -> SweepLM:
    return SweepLM(
        cell=cell.key,
        fingerprint=cell.model.fingerprint,
        tokenizer=tokenizer,
        overflow=cell.task.on_overflow,
        client=client,
        channel=channel,
        scoring=(Method.ECHO,) if cell.model.model.scoring is Scoring.ECHO else (),
        chat_template_kwargs=cell.model.model.chat_template_kwargs,
        system_instruction=cell.model.model.system_instruction,
        think_end_token=cell.model.model.think_end_token,
    )


def _simple_evaluate(cell: Cell, lm: SweepLM, *, limit: int | float | None) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    task, model, seeds = cell.task, cell.model.model, cell.seeds
    manager = _manager(task, model)
    with _reproducible_documents(seeds), _confirmed_code(task), _estimated(manager, lm):
        results = simple_evaluate(
            model=lm,
            tasks=[task.task],
            num_fewshot=task.num_fewshot,
            limit=limit,
            gen_kwargs=dict(task.gen_kwargs) or None,
            system_instruction=model.system_instruction,
            apply_chat_template=model.chat,
            fewshot_as_multiturn=_as_multiturn(cell),
            task_manager=manager,
            random_seed=seeds.random,
            numpy_random_seed=seeds.numpy,
            torch_random_seed=seeds.torch,
            fewshot_random_seed=seeds.fewshot,
            confirm_run_unsafe_code=task.unsafe_code,
        )
    found: dict[str, Any] = results
    return found


@contextmanager
def _estimated(manager: Any, lm: SweepLM) -> Iterator[None]:
    """Let `lm` estimate the metrics of the tasks that lm-eval loads, as far as that is safe and cheap."""

    def load(names: Any) -> Any:
        loaded = type(manager).load(manager, names)
        scorers: dict[str, Scorer] = {}
        for name, leaf in loaded["tasks"].items():
            if (why := unwatched(leaf)) is not None:
                log.debug("no live estimate of %s: %s", name, why)
            else:
                scorers[name] = leaf.process_results if leaf.OUTPUT_TYPE == "multiple_choice" else _generated(leaf)
        lm.estimate = Estimate(scorers)
        return loaded

    manager.load = load
    try:
        yield
    finally:
        del manager.load


QUICK_FILTERS = (
    *("take_first", "take_first_k", "majority_vote", "regex", "remove_whitespace"),
    *("lowercase", "uppercase", "map"),
)
"""Of lm-eval's own those that look at one document at a time and take less than a millisecond for it;
`multi_choice_regex` takes half a second, since it looks at every character of Unicode each time."""


def unwatched(leaf: Any) -> str | None:
    """Why there is no live estimate of a task; None where lm-eval's own code scores its documents, one by one."""
    from lm_eval.api.registry import get_aggregation, get_metric
    from lm_eval.api.task import ConfigurableTask

    config = leaf.config
    if config.process_results or type(leaf).process_results is not ConfigurableTask.process_results:
        return "its scoring is its own"
    if leaf.OUTPUT_TYPE == "multiple_choice":
        return None if config.repeats == 1 and config.filter_list is None else "it has filters or repeats"
    if leaf.OUTPUT_TYPE != "generate_until":
        return f"its requests are {leaf.OUTPUT_TYPE}"
    if type(leaf) is not ConfigurableTask or callable(config.doc_to_target) or callable(config.doc_to_choice):
        return "its scoring needs code of its own"
    exact, mean = get_metric("exact_match"), get_aggregation("mean")
    if leaf._metric_fn_list != {"exact_match": exact} or leaf._aggregation_list != {"exact_match": mean}:
        return f"its metrics are not just the mean of exact_match: {', '.join(map(str, leaf._metric_fn_list))}"
    filters = [step["function"] for pipeline in config.filter_list or () for step in pipeline["filter"]]
    slow = [step for step in filters if step not in QUICK_FILTERS]
    return f"its filters may be slow, or need other documents: {', '.join(map(str, slow))}" if slow else None


def _generated(leaf: Any) -> Scorer:
    """What lm-eval does with the answers to one document: every filter, then the metrics."""
    from lm_eval.api.instance import Instance

    def scored(doc: Any, texts: list[Any]) -> dict[str, Any]:
        instance = Instance(request_type="generate_until", doc=doc, arguments=(), idx=0, resps=texts)
        for pipeline in leaf._filters:
            pipeline.apply([instance])
        return {
            metric if name == "none" else f"{metric}__{name}": value
            for name, filtered in instance.filtered_resps.items()
            for metric, value in leaf.process_results(doc, [filtered]).items()
        }

    return scored


def _as_multiturn(cell: Cell) -> bool:
    """Turns exist in a chat only; without one the wish has no effect and must not stand in the record."""
    return cell.model.model.chat and cell.task.fewshot_as_multiturn is not False


@contextmanager
def _confirmed_code(task: Task) -> Iterator[None]:
    """The variable by which the code_eval metric wants execution confirmed, set only where the config confirms it."""
    if task.unsafe_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_ALLOW_CODE_EVAL", None)


def _manager(task: Task, model: Model) -> Any:
    """lm-eval's TaskManager with this task's folder and metadata; its index is kept for the process."""
    from lm_eval.tasks._factory import TaskFactory

    _settle_downloads()
    # What lm-eval's own command hands to tasks that look at the model, RULER for one.
    of_model = {"pretrained": model.path or model.tokenizer, "tokenizer": model.tokenizer or model.path}
    manager = _indexed_manager(task.task, task.include_path)
    manager.metadata = {**of_model, **task.metadata}
    manager._factory = TaskFactory(meta=manager.metadata)
    return manager


def _settle_downloads() -> None:
    """Before a task imports them: `evaluate` heeds HF_HUB_OFFLINE as all else does, which it would not by itself, and
    nltk downloads into HF_HOME, which is what people take to a machine without network.

    nltk takes the first folder of NLTK_DATA that exists, and looks in the user's own ones too.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    folder = os.environ.setdefault("NLTK_DATA", os.path.join(constants.HF_HOME, "nltk_data"))
    with suppress(OSError):  # a cache that others keep: nltk uses the user's folder then
        os.makedirs(folder, exist_ok=True)


def _indexed_manager(name: str, include_path: str | None) -> Any:
    if include_path is not None:
        # What stands on its own needs no index of lm-eval's 14,000, which takes 5 s.
        own = _index(include_path, include_defaults=False)
        if _is_complete(own, name):
            return own
    return _index(include_path, include_defaults=True)


def _is_complete(manager: Any, name: Any) -> bool:
    """Whether all that a task or group consists of is in this index; a tag may hold tasks of others too."""
    if name in manager.all_groups:
        return all(_is_complete(manager, member) for member in manager.task_index[name].cfg["task"])
    return name in manager.all_subtasks


@functools.cache
def _index(include_path: str | None, *, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


@contextmanager
def _reproducible_documents(seeds: Seeds) -> Iterator[None]:
    """Make each split's documents once for a task, the same wherever and whenever it is loaded.

    Some tasks shuffle while they load, with a module's own random state (GPQA: `random.Random(42)`) or the global one.
    lm-eval processes a split several times, so on a cold data-set cache prompts and answers are shuffled differently;
    its warm cache returns what the first pass made. Here each task gets fresh modules, its process_docs runs once for a
    split from a fixed random state, and nothing is taken from a cache that another process filled.
    """
    import datasets
    from lm_eval.tasks._factory import TaskFactory

    load = TaskFactory._load_full_config

    def load_afresh(factory: Any, entry: Any, overrides: Any = None) -> dict[str, Any]:
        # lm-eval marks the modules that it loads for tasks with `__mtime__` (tasks/_yaml_loader.py).
        for name in [n for n, module in sys.modules.items() if "__mtime__" in getattr(module, "__dict__", ())]:
            del sys.modules[name]
        config: dict[str, Any] = load(factory, entry, overrides)
        once_by_function: dict[Any, Any] = {}
        for part in (config, config.get("fewshot_config")):
            if isinstance(part, dict) and callable(function := part.get("process_docs")):
                part["process_docs"] = once_by_function.setdefault(function, _once_a_split(function, seeds))
        return config

    cached = datasets.is_caching_enabled()
    TaskFactory._load_full_config = load_afresh
    datasets.disable_caching()
    try:
        yield
    finally:
        TaskFactory._load_full_config = load
        if cached:
            datasets.enable_caching()


def _once_a_split(function: Callable[[Any], Any], seeds: Seeds) -> Callable[[Any], Any]:
    made: dict[int, tuple[Any, Any]] = {}

    @functools.wraps(function)  # lm-eval writes the source of a task's functions into its results
    def process_docs(split: Any) -> Any:
        if id(split) not in made:
            # The split is kept beside its documents: an id is only unique while its object lives.
            made[id(split)] = (split, _seeded(lambda: function(split), seeds))
        return made[id(split)][1]

    return process_docs


def _seeded(work: Callable[[], Any], seeds: Seeds) -> Any:
    """`work()` from the sweep's random and numpy seeds, whose states are then put back."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    random.seed(seeds.random)
    np.random.seed(seeds.numpy)
    try:
        return work()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _check_effect(cell: Cell, results: Mapping[str, Any]) -> None:
    """Raise TaskError where lm-eval did not do what it was asked: a number under a wrong heading is worse than none."""
    asked = cell.task.num_fewshot
    for name, took in results["n-shot"].items():
        if asked is not None and name in results["configs"] and took != asked:
            raise TaskError(
                f"{cell.key}: num_fewshot {asked} was asked for, but {name} ran with {took}; "
                "its own YAML pins it: leave num_fewshot unset, or list the subtasks that take it"
            )
    limit = cell.task.limit
    for name, samples in results["n-samples"].items():
        if limit is not None and limit >= 1 and samples["effective"] > limit:
            raise TaskError(f"{cell.key}: limit {limit} was asked for, but {name} scored {samples['effective']}")
    for name, seed in asdict(cell.seeds).items():
        if (took := results["config"][f"{name}_seed"]) != seed:
            raise TaskError(f"{cell.key}: the {name} seed {seed} was asked for, but lm-eval took {took}")
    for name, config in results["configs"].items():
        took = config.get("generation_kwargs") or {}
        wrong = {key: took.get(key) for key, value in cell.task.gen_kwargs.items() if took.get(key) != value}
        if config.get("output_type") == "generate_until" and wrong:
            raise TaskError(
                f"{cell.key}: gen_kwargs {cell.task.gen_kwargs} were asked for, but {name} ran with {wrong}"
            )


def _scores(results: Mapping[str, Any]) -> tuple[tuple[Score, ...], tuple[str, ...]]:
    """lm-eval's result table as rows: groups before their subtasks, filters and metrics in its own order.

    With it a sentence for each metric that came out as no finite number, which a record could not hold.
    """
    rows = {**results["results"], **results.get("groups", {})}
    scores, unusable = [], []
    for name, depth in _by_group(rows, results["group_subtasks"]):
        higher = results["higher_is_better"].get(name) or {}
        samples = results["n-samples"].get(name, {}).get("effective")
        for key, value in rows[name].items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str | bool) or value is None:
                continue
            if not isinstance(value, Real) or not math.isfinite(value):
                unusable.append(f"{name}: {metric} ({filter_name}) is {value} and left out of the scores")
                continue
            stderr = rows[name].get(f"{metric}_stderr,{filter_name}")
            known = isinstance(stderr, Real) and math.isfinite(stderr)
            scores.append(
                Score(
                    task=name,
                    version=str(results["versions"].get(name, "N/A")),
                    filter=filter_name,
                    num_fewshot=results["n-shot"].get(name),
                    metric=metric,
                    value=float(value),
                    stderr=float(stderr) if known else None,
                    higher_is_better=higher.get(metric),
                    samples=samples,
                    depth=depth,
                )
            )
    return tuple(scores), tuple(unusable)


def _by_group(names: Mapping[str, Any], subtasks: Mapping[str, list[str]]) -> list[tuple[str, int]]:
    """Every name with its depth, children right after their group."""
    children = {child for members in subtasks.values() for child in members}
    ordered: dict[str, int] = {}

    def visit(name: str, depth: int) -> None:
        if name in names and name not in ordered:
            ordered[name] = depth
            for child in subtasks.get(name, []):
                visit(child, depth + 1)

    for name in [*subtasks, *names]:
        if name not in children:
            visit(name, 0)
    for name in names:
        visit(name, 0)
    return list(ordered.items())


def _files(cell: Cell, lm: SweepLM, results: dict[str, Any], samples: dict[str, list[Any]]) -> dict[str, bytes]:
    """What lm-eval's own EvaluationTracker writes for these results, by file name. It rewrites `samples` on the way."""
    from lm_eval.loggers import EvaluationTracker

    model = cell.model.model
    results["config"] |= {"model": "lmsweep", "model_args": _model_args(cell.model)}
    with tempfile.TemporaryDirectory() as folder:
        tracker = EvaluationTracker(output_path=folder)
        tracker.general_config_tracker.log_experiment_args(
            model_source="lmsweep",
            # The name that lm-eval's tools show is the last part of this.
            model_args=f"pretrained={cell.model.name}",
            system_instruction=model.system_instruction,
            chat_template=lm.chat_template(model.chat),
            fewshot_as_multiturn=_as_multiturn(cell),
        )
        tracker.save_results_aggregated(results=results, samples=samples)
        for name, rows in samples.items():
            tracker.save_results_samples(task_name=name, samples=rows)
        files = {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    # The tracker logs and swallows what goes wrong, so what it wrote is counted.
    if len(files) != len(samples) + 1:
        raise TaskError(f"{cell.key}: lm-eval wrote {len(files)} of {len(samples) + 1} result files (its log says why)")
    return files


def _model_args(plan: ModelPlan) -> str:
    """What lm-eval's `--model_args` would have been: of its vllm backend, or of local-completions for a url."""
    model = plan.model
    if model.url is not None:
        label = f",revision={model.revision}" if model.revision else ""
        return f"model={served_name(plan)},base_url={model.url}/v1/completions,tokenizer={model.tokenizer}{label}"
    adapter = f",peft={model.adapter}" if model.adapter else ""
    return f"pretrained={model.path},revision={plan.revision},dtype={model.dtype}{adapter}"


def _warnings(cell: Cell, lm: SweepLM) -> Iterator[str]:
    if lm.without_tokens:
        yield f"{lm.without_tokens} continuations have no tokens of their own and count as certain, as in stock lm-eval"
    if len(lm.engines) > 1:
        mixed = ", ".join(f"{engine}: {answers}" for engine, answers in lm.engines.items())
        yield f"answers of several versions of vLLM, or of several kinds of arithmetic, are mixed: {mixed}"
    yield from _departures(cell.model.model, lm)
    model = cell.model.model
    if model.url is not None:
        yield (
            f"what {model.url} serves is not ours to know: a change of its weights, dtype, quantization or "
            "generation_config would go unnoticed (`revision` may hold a label that changes with them)"
        )
    elif not cell.model.revision and not os.path.isabs(model.path):
        yield f"the commit of {model.path} is not known: a later change of the branch would go unnoticed"


def _departures(model: Model, lm: SweepLM) -> Iterator[str]:
    """What is not as stock lm-eval or the reader would expect; see docs/fidelity.md."""
    found = lm.departures
    if found.seeded_repeats:
        yield (
            f"{found.seeded_repeats} repeats of sampled requests have a seed of their own each; "
            "stock lm-eval sends one seed for all, which makes them equal"
        )
    if found.made_greedy:
        yield (
            f"{found.made_greedy} requests with `do_sample: false` beside a temperature were sent with temperature 0; "
            "stock lm-eval would sample them, `gen_kwargs: {do_sample: true}` does"
        )
    if found.never_sampled:
        yield (
            f"{found.never_sampled} requests with `do_sample: true` and no temperature were sent with temperature 0, "
            "as stock lm-eval sends them; `gen_kwargs: {temperature: ...}` samples them"
        )
    if found.without_bos:
        yield (
            f"{found.without_bos} {WITHOUT_BOS} that this tokenizer puts before a text, as stock "
            "local-completions sends them; lm-eval's hf and vllm backends send it"
        )
    dated = model.chat and "strftime_now" in str(lm.chat_template(model.chat))
    if dated and "date_string" not in model.chat_template_kwargs:
        yield (
            "the chat template writes the day into prompts: on another day they are other prompts, whose answers are "
            "asked anew (Llama 3's templates take `chat_template_kwargs: {date_string: ...}`, which holds it)"
        )
    if model.chat and found.outside_template:
        yield (
            f"{found.outside_template} prompts are not as the chat template rendered them: whole texts have no turns, "
            "and some tasks write their prompts themselves"
        )
    if found.without_instruction:
        yield (
            f"the system instruction is missing in {found.without_instruction} prompts: the chat template drops or "
            "changes it, or the task takes none (whole texts do not)"
        )
    if found.unfinished_reasoning:
        yield (
            f"{found.unfinished_reasoning} answers have no {model.think_end_token!r} and are taken whole: unfinished "
            "reasoning, or none at all"
        )
    if model.think_end_token and lm.methods.keys() - {Method.GENERATE}:
        yield "continuations are scored without the reasoning that this model would write before an answer"
    for token, answers in found.stopped_at.items():
        yield (
            f"{answers} answers ended at the stop string {token!r}, a special token, which stock local-completions "
            "runs over: servers leave special tokens out of the text in which they look for stop strings"
        )


def _settings(
    cell: Cell, lm: SweepLM, facts: Facts, results: Mapping[str, Any], samples: Mapping[str, list[Any]]
) -> dict[str, Any]:
    from lm_eval.utils import hash_string

    model = cell.model.model
    template = lm.chat_template(model.chat)
    first = next((rows[0] for rows in samples.values() if rows), None)
    return {
        **_served(cell.model),
        "tokenizer": model.tokenizer,
        "max_model_len": facts.max_model_len,
        "chat": model.chat,
        "chat_template_sha": hash_string(template) if template else None,
        "chat_template_kwargs": model.chat_template_kwargs,
        "think_end_token": model.think_end_token,
        "fewshot_as_multiturn": _as_multiturn(cell),
        "system_instruction": model.system_instruction,
        "task": {name: value for name, value in asdict(cell.task).items() if name not in UNSCORED},
        "seeds": asdict(cell.seeds),
        "num_fewshot": dict(results["n-shot"]),
        "samples": {name: n["effective"] for name, n in results["n-samples"].items()},
        "methods": dict(lm.methods),
        "preflight": [asdict(check) for check in facts.checks if check.model == cell.model.name],
        "first_prompt": None if first is None else first["arguments"][0][0],
    }


UNKNOWN_AT_A_URL = ("dtype", "quantization", "adapter", "device", "tensor_parallel", "server", "generation_config")
"""Settings of a server that its API does not tell; the values that ours would have are not those of another's."""


def _served(plan: ModelPlan) -> dict[str, Any]:
    """What was served and how, as far as it is known."""
    model = plan.model
    if model.url is not None:
        name = {"url": model.url, "served_model_name": served_name(plan), "revision": model.revision}
        return name | dict.fromkeys(UNKNOWN_AT_A_URL, "unknown")
    engine = {"server_python": model.server_python} if model.server_python else {}
    return {
        "path": model.path,
        "revision": plan.revision,
        **{name: getattr(model, name) for name in UNKNOWN_AT_A_URL},
        **engine,
    }
