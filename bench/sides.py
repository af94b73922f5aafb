"""One side of a comparison, in a process of its own: `python -m bench.sides OUTCOME < JOB`, both JSON.

Each side runs lm-eval 0.4.13 on the same task with the same settings; what differs is the model that lm-eval talks to.
The benchmark that starts it (`run`) times the whole process.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from bench import data
from sweep.evaluating.dispatch import common_length
from sweep.evaluating.preflight import Facts
from sweep.serving.engine import ON_CPU, cpu_variables
from sweep.serving.server import Endpoint

KV_CACHE_GIB = 2
"""Of every engine here: 60,000 tokens of the larger model."""

ENGINE = {
    "dtype": "float32",
    "max_model_len": data.MAX_MODEL_LEN,
    "enforce_eager": True,
    "block_size": ON_CPU["block_size"],
}
"""vLLM's options, the same for servers and in process: compiling pays for itself in no run that is this short."""

WARM_UP = ((("", ""), [1] * 32, [2]),)
"""A request for an engine in process, before the clock runs: a server has answered preflight by then."""


class Side(StrEnum):
    OURS = "ours"
    """Our client against a server."""
    STOCK = "stock"
    """`lm_eval --model local-completions` against the same server."""
    SEARCH = "search"
    """The same on a part of the requests, with each of several settings; and how large the work is."""
    IN_PROCESS = "in_process"
    """`lm_eval --model vllm`."""
    OFFLINE = "offline"
    """vLLM's `LLM.generate` on the prompts that we would send, with the parameters that we would send."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What lm-eval is asked for."""

    task: str
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of local-completions."""

    num_concurrent: int
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Job:
    side: Side
    work: Work
    model: str
    """Folder of the model; its name is the name under which it is served."""
    endpoint: Endpoint | None = None
    facts: Facts | None = None
    concurrency: int = 0
    """Prompts in flight, of ours."""
    echo: bool = False
    """Ours scores by echo alone."""
    settings: tuple[Settings, ...] = ()
    """What is tried in a search, or the one that is used."""
    part: int = 1
    """A search takes every so-manieth question."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is to do."""

    requests: int
    contexts: int
    """Distinct."""
    context_tokens: float
    """Mean of the distinct ones."""
    continuation_tokens: float
    """Mean."""
    unique_tokens: int
    """Tokens that an engine cannot do without: beginnings that prompts share once, and of a continuation all but the
    last token, which is only predicted."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What came of one side."""

    request_s: float = 0.0
    """From the first byte sent to the last received; inside the engine's methods for those in process."""
    command_s: float = 0.0
    """Of the whole process, with imports and the making of prompts."""
    answers: dict[str, Any] = field(default_factory=dict)
    """By `<task>/<document>`: [log-likelihood, greedy] of each choice, or the text."""
    scores: dict[str, float] = field(default_factory=dict)
    methods: dict[str, int] = field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    """Of a search, for each of the settings."""
    size: Size | None = None


def run(job: Job) -> Ran:
    """Raises SystemExit with the end of its output where the process fails."""
    environment = {
        **os.environ,
        **data.real_data_environment(),
        "OPENAI_API_KEY": job.endpoint.api_key if job.endpoint else "",
        "PYTHONPATH": str(data.ROOT),
        # vLLM in process divides by the time that its progress bar has seen.
        **({} if job.side is Side.IN_PROCESS else {"TQDM_DISABLE": "1"}),
        # As our servers have them, for an engine in process.
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        **cpu_variables(),
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder) / "outcome.json"
        if job.side is Side.IN_PROCESS:
            environment["PYTHONPATH"] += os.pathsep + str(_named_vllm(Path(folder) / "metadata"))
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "bench.sides", outcome],
            input=msgspec.json.encode(job),
            env=environment,
            cwd=folder,  # a folder that is named like a data set would be taken for it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{job.side} failed on {job.work}:\n{done.stdout.decode(errors='replace')[-4000:]}")
        return replace(msgspec.json.decode(outcome.read_bytes(), type=Ran), command_s=seconds)


def _named_vllm(folder: Path) -> Path:
    """A folder for PYTHONPATH where the CPU build of vLLM is called `vllm`, the distribution that lm-eval looks for."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm-cpu")
    except PackageNotFoundError:
        return folder  # it is called vllm here
    metadata = folder / f"vllm-{found}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    # vLLM tells by the version that it is for a CPU.
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
    return folder


# --- In the process --------------------------------------------------------------------------------------------------


class Wire:
    """When a client's requests were on the wire, whichever of the two HTTP libraries it uses."""

    def __init__(self) -> None:
        self.first_sent: float | None = None
        self.last_received = 0.0

    @property
    def request_s(self) -> float:
        return 0.0 if self.first_sent is None else self.last_received - self.first_sent

    def sent(self) -> None:
        if self.first_sent is None:
            self.first_sent = time.monotonic()

    def received(self) -> None:
        self.last_received = time.monotonic()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While it is entered, requests of aiohttp and `requests` are seen."""
        import aiohttp
        import requests

        ask, read, post = aiohttp.ClientSession._request, aiohttp.ClientResponse.read, requests.sessions.Session.send

        async def asked(*given: Any, **named: Any) -> Any:
            self.sent()
            return await ask(*given, **named)

        async def seen(response: Any) -> bytes:
            content = await read(response)
            self.received()
            return content

        def posted(*given: Any, **named: Any) -> Any:
            self.sent()
            answer = post(*given, **named)  # with its content
            self.received()
            return answer

        aiohttp.ClientSession._request, aiohttp.ClientResponse.read = asked, seen  # type: ignore[assignment, method-assign]
        requests.sessions.Session.send = posted  # type: ignore[method-assign]
        try:
            yield
        finally:
            aiohttp.ClientSession._request, aiohttp.ClientResponse.read = ask, read  # type: ignore[method-assign]
            requests.sessions.Session.send = post  # type: ignore[method-assign]


class Alone:
    """The channel of a cell without a sweep: nothing is stored before, and nothing is kept."""

    def __init__(self, facts: Facts | None = None) -> None:
        self._facts = facts
        """None where there is no server."""

    def facts(self) -> Facts:
        assert self._facts is not None
        return self._facts

    def known(self, _: Sequence[bytes]) -> Mapping[bytes, bytes]:
        return {}

    def owed(self, requests: int) -> None: ...

    def answered(self, response: object) -> None: ...

    def earlier(self) -> Mapping[bytes, bytes]:
        return {}

    def progress(self, *, done: int, total: int, reused: int, live: Any = dict) -> None: ...


def _ours(job: Job) -> Ran:
    from sweep.evaluating.client import Pool
    from sweep.evaluating.evaluation import evaluate, load_tokenizer

    assert job.endpoint is not None
    assert job.facts is not None
    cell = _cell(job)
    pool = Pool()
    pool.update([(job.endpoint, job.concurrency)])
    done = evaluate(cell, tokenizer=load_tokenizer(cell.model), pool=pool, channel=Alone(job.facts))
    files = [content for name, content in done.files.items() if name.startswith("samples_")]
    return Ran(
        request_s=done.record.request_s,
        answers=_answers(msgspec.json.decode(line) for content in files for line in content.splitlines()),
        scores={f"{score.task}/{score.metric},{score.filter}": score.value for score in done.record.scores},
        methods=done.record.settings["methods"],
    )


def _cell(job: Job) -> Any:
    from sweep.planning.config import Device, Model, Scoring, Seeds, Task
    from sweep.planning.plan import Cell, ModelPlan

    work, name = job.work, Path(job.model).name
    model = Model(path=job.model, device=Device.CPU, scoring=Scoring.ECHO if job.echo else Scoring.AUTO)
    task = Task(
        task=work.task,
        num_fewshot=work.num_fewshot,
        limit=work.limit,
        include_path=work.include_path,
        gen_kwargs=work.gen_kwargs,
    )
    plan = ModelPlan(name=name, model=model, revision=None, fingerprint="", server=name)
    return Cell(model=plan, task_name=work.task, task=task, seeds=Seeds(), fingerprint="")


def _stock(job: Job) -> Ran:
    wire = Wire()
    (settings,) = job.settings
    with wire.watched():
        return replace(_evaluated(_local_completions(job, settings), job.work), request_s=wire.request_s)


def _local_completions(job: Job, settings: Settings) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    assert job.endpoint is not None
    return LocalCompletionsAPI(
        base_url=f"{job.endpoint.url}/v1/completions",
        model=Path(job.model).name,
        tokenizer=job.model,
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        max_length=job.endpoint.max_model_len,
        num_concurrent=settings.num_concurrent,
        batch_size=settings.batch_size,
        timeout=3600,  # all requests wait in its own queue, which counts
    )


def _evaluated(model: Any, work: Work) -> Ran:
    """What lm-eval finds; its command line calls the same function with the same arguments."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=model,
        tasks=[work.task],
        num_fewshot=work.num_fewshot,
        limit=work.limit,
        gen_kwargs=work.gen_kwargs or None,
        task_manager=TaskManager(include_path=work.include_path),
    )
    assert found is not None
    scores = {
        f"{task}/{name}": float(value)
        for task, row in found["results"].items()
        for name, value in row.items()
        if isinstance(value, float) and "_stderr," not in name
    }
    return Ran(answers=_answers(row for rows in found["samples"].values() for row in rows), scores=scores)


def _answers(samples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A document's hash tells it from one of the same number in another subject."""
    return {f"{sample['doc_id']}-{sample['doc_hash']}": _answer(sample["resps"]) for sample in samples}


def _answer(responses: Sequence[Any]) -> Any:
    if isinstance(responses[0][0], str):
        return responses[0][0]
    return [[float(logprob), str(greedy) == "True"] for ((logprob, greedy),) in responses]


def _search(job: Job) -> Ran:
    from transformers import AutoTokenizer

    from sweep.evaluating.encoding import Encoder

    requests = _requests(job.work)
    seconds = []
    for settings in job.settings:
        wire = Wire()
        with wire.watched():
            _local_completions(job, settings).loglikelihood(every(job.part, requests), disable_tqdm=True)
        seconds.append(wire.request_s)
    pairs = Encoder(AutoTokenizer.from_pretrained(job.model)).pairs([request.args for request in requests])
    return Ran(seconds=tuple(seconds), size=size_of(pairs))


def _requests(work: Work) -> list[Any]:
    return data.requests(
        work.task,
        limit=work.limit,
        num_fewshot=work.num_fewshot,
        include_path=work.include_path,
        gen_kwargs=work.gen_kwargs or None,
    )


def every(part: int, requests: Sequence[Any]) -> list[Any]:
    """All requests of every so-manieth question, beginning with the first."""
    questions = list(dict.fromkeys((request.task_name, request.doc_id) for request in requests))
    chosen = set(questions[::part])
    return [request for request in requests if (request.task_name, request.doc_id) in chosen]


def size_of(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Size:
    contexts = {tuple(context) for context, _ in pairs}
    unique, before = 0, tuple[int, ...]()
    for prompt in sorted({(*context, *continuation[:-1]) for context, continuation in pairs}):
        unique += len(prompt) - common_length(before, prompt)
        before = prompt
    return Size(
        requests=len(pairs),
        contexts=len(contexts),
        context_tokens=sum(map(len, contexts)) / len(contexts),
        continuation_tokens=sum(len(continuation) for _, continuation in pairs) / len(pairs),
        unique_tokens=unique,
    )


def _in_process(job: Job) -> Ran:
    from lm_eval.models.vllm_causallms import VLLM

    seconds: list[float] = []

    class Timed(VLLM):  # type: ignore[misc]
        """Encoding is left out, as it comes before the first byte of a client too."""

        def _loglikelihood_tokens(self, requests: Any, **named: Any) -> Any:
            start = time.perf_counter()
            found = super()._loglikelihood_tokens(requests, **named)
            seconds.append(time.perf_counter() - start)
            return found

    model = Timed(pretrained=job.model, **ENGINE)
    model._loglikelihood_tokens(WARM_UP, disable_tqdm=True)
    seconds.clear()
    return replace(_evaluated(model, job.work), request_s=sum(seconds))


def sampling(model: str, requests: Sequence[Any]) -> list[dict[str, Any]]:
    """The parameters that ours sends with each of these generations."""
    from sweep.evaluating.client import Client, Pool
    from sweep.evaluating.lm import SweepLM
    from sweep.planning.config import Overflow

    ours = SweepLM(
        cell="",
        fingerprint="",
        tokenizer=_tokenizer(model),
        overflow=Overflow.ERROR,
        client=Client(model="", pool=Pool()),
        channel=Alone(),
    )
    return [ours.generation(request.args[0], request.args[1], repeat=0).parameters for request in requests]


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _offline(job: Job) -> Ran:
    from vllm import LLM, SamplingParams

    from sweep.evaluating.encoding import Encoder

    requests = _requests(job.work)
    parameters = [SamplingParams(**found) for found in sampling(job.model, requests)]
    texts = Encoder(_tokenizer(job.model)).texts([request.args[0] for request in requests])
    prompts = [{"prompt_token_ids": list(ids)} for ids in texts]
    engine = LLM(model=job.model, **ENGINE)
    engine.generate([{"prompt_token_ids": [1] * 32}], SamplingParams(max_tokens=2), use_tqdm=False)
    start = time.perf_counter()
    found = engine.generate(prompts, parameters, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = {str(request.doc_id): answer.outputs[0].text for request, answer in zip(requests, found, strict=True)}
    return Ran(request_s=seconds, answers=answers)


SIDES: Mapping[Side, Callable[[Job], Ran]] = {
    Side.OURS: _ours,
    Side.STOCK: _stock,
    Side.SEARCH: _search,
    Side.IN_PROCESS: _in_process,
    Side.OFFLINE: _offline,
}


if __name__ == "__main__":
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    Path(sys.argv[1]).write_bytes(msgspec.json.encode(SIDES[job.side](job)))
