"""The same numbers as stock lm-eval on the same server: real vLLM, real tasks, one request kind each."""

import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sweep import demo
from sweep.evaluating.client import Client, Pool
from sweep.evaluating.scoring import GenerateCall, LogProb, Method, Packed, Scored, calls_by, edges_of
from sweep.planning.config import Device, Model
from sweep.planning.plan import ServerPlan
from sweep.serving.server import Endpoint, Server

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"

KEY = "a-key-for-the-fidelity-tests"

SHORT = 0.02
"""Between two runs of the same short continuation: batches of other sizes round differently."""

PER_TOKEN = 0.001
"""The same for a long text, by token."""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not DATA.is_dir(), reason=f"needs real evaluation data in {DATA.relative_to(ROOT.parent)}"),
]


@pytest.fixture(scope="module")
def models() -> Path:
    demo.make(ROOT / ".demo")
    return ROOT / ".demo" / "models"


@pytest.fixture(scope="module")
def endpoint(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    model = Model(
        path=str(models / "demo-base"),
        device=Device.CPU,
        dtype="float32",
        max_model_len=4096,
        # Contexts of some hundred tokens are read in parts, as those of thousands are with vLLM's own default.
        server={"enforce_eager": True, "max_num_batched_tokens": 512},
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"},
    )
    plan = ServerPlan(name="demo", model=model, revision=None, adapters={"demo": None}, gpus=1, replicas=1)
    log = tmp_path_factory.mktemp("server") / "demo-0.log"
    server = Server(plan, name="demo-0", api_key=KEY, gpu_ids=[], log_path=log)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def outcomes(endpoint: Endpoint, models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Ours and stock's results and samples by task."""
    home = tmp_path_factory.mktemp("hf")
    subprocess.run([sys.executable, DATA / "make_cache.py", "--hf-home", home], check=True, capture_output=True)
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "OPENAI_API_KEY": KEY,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "stock_comparison.py"),
            *("--url", endpoint.url, "--model", "demo", "--tokenizer", models / "demo-base"),
            *("--max-model-len", str(endpoint.max_model_len)),
            *("--scoring", *endpoint.scoring, "--"),
            *("gsm8k:20", "mmlu_abstract_algebra:25@5", "hellaswag:50", "wikitext:2"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def hostile_pairs(endpoint: Endpoint) -> list[Scored]:
    """Shared prefixes, repeats, beginnings of one another, token 0, what the model would write, long contexts."""
    rng = random.Random(7)
    heads = [tuple(rng.randrange(4000) for _ in range(n)) for n in (1, 2, 15, 16, 17, 40, 300, 700)]
    contexts = [*heads, *((*head, rng.randrange(4000)) for head in heads), heads[6] + heads[2], (0,), (0, 0)]
    greedy: dict[int, tuple[int, ...]] = {}

    def written(call: GenerateCall, reply: Mapping[str, Any]) -> None:
        names = reply["choices"][0]["logprobs"]["tokens"]
        greedy[call.index] = tuple(int(name.removeprefix("token_id:")) for name in names)

    ask = {"max_tokens": 9, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True, "ignore_eos": True}
    run(endpoint, [GenerateCall(index=i, prompt=Packed(c), parameters=ask) for i, c in enumerate(contexts)], written)
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for i, context in enumerate(contexts):
        best = greedy[i]
        found += [(context, best[:n]) for n in (1, 2, 9)] + [(context, (*best[:4], 5)), (context, (5, *best[:3]))]
        found += [(context, tuple(rng.randrange(4000) for _ in range(n))) for n in (1, 1, 3, 12)]
        found += [(context, (0,)), (context, (0, 0, best[0]))]
    found += found[:20]
    return [Scored(index=index, context=c, continuation=t) for index, (c, t) in enumerate(found)]


def forget(endpoint: Endpoint) -> None:
    """Empty the server's prefix cache."""
    request = urllib.request.Request(f"{endpoint.url}/reset_prefix_cache", method="POST")
    urllib.request.urlopen(request, timeout=30).close()


def run(endpoint: Endpoint, calls: Sequence[Any], on_reply: Callable[[Any, Mapping[str, Any]], None]) -> None:
    pool = Pool()
    pool.update([(endpoint, 48)])
    Client(model="demo", pool=pool).run(calls, on_reply)


def test_all_methods_and_generation_at_once_give_what_each_gives_alone(endpoint: Endpoint) -> None:
    """One request with `logprob_token_ids` in a batch takes the likeliest token out of the others' rows."""
    assert set(endpoint.scoring) == {Method.PROMPT, Method.FORCED}
    pairs = hostile_pairs(endpoint)
    echo: dict[int, LogProb] = {}
    run(
        endpoint,
        calls_by(Method.ECHO, edges_of(pairs)),
        lambda call, reply: echo.update({answer.index: answer for answer in call.logprobs(reply)}),
    )
    able = {
        Method.NEXT_TOKEN: [p for p in pairs if len(p.continuation) == 1],
        **dict.fromkeys((Method.FORCED, Method.PROMPT, Method.ECHO), pairs),
    }
    prompts = [p.context for p in pairs[::9]]
    writing = [
        GenerateCall(index=i, prompt=Packed(p), parameters={"max_tokens": 9, "temperature": 0, "stop": ["zzz"]})
        for i, p in enumerate(prompts)
    ]
    alone: dict[int, str] = {}
    run(endpoint, writing, lambda call, reply: alone.update({call.index: call.generation(reply).text}))

    calls = [call for method, some in able.items() for call in calls_by(method, edges_of(some))] + writing
    random.Random(3).shuffle(calls)
    found: dict[tuple[Method, int], LogProb] = {}
    texts: dict[int, str] = {}

    def heard(call: Any, reply: Mapping[str, Any]) -> None:
        if isinstance(call, GenerateCall):
            texts[call.index] = call.generation(reply).text
        else:
            found.update({(call.method, answer.index): answer for answer in call.logprobs(reply)})

    forget(endpoint)
    run(endpoint, calls, heard)
    assert found.keys() == {(method, pair.index) for method, some in able.items() for pair in some}
    for (_, index), answer in found.items():
        assert answer.logprob == pytest.approx(echo[index].logprob, abs=SHORT)
        assert answer.is_greedy == echo[index].is_greedy
    assert sum(answer.is_greedy for answer in echo.values()) >= 3 * 19
    assert texts == alone


def test_sampled_answers_come_to_prompts_that_are_read_in_parts(endpoint: Endpoint) -> None:
    """vLLM's engine for CPUs would die of the first."""
    rng = random.Random(1)
    ask = {"max_tokens": 4, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    prompts = [Packed([rng.randrange(4000) for _ in range(700)]) for _ in range(4)]
    heard: dict[int, int] = {}
    run(
        endpoint,
        [GenerateCall(index=i, prompt=prompt, parameters=ask) for i, prompt in enumerate(prompts)],
        lambda call, reply: heard.update({call.index: call.generation(reply).tokens}),
    )
    assert heard == dict.fromkeys(range(4), 4)


def pairs(task: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each of our samples with stock's of the same document and filter."""
    matched = []
    for name, theirs in task["stock"]["samples"].items():
        ours = {(s["doc_id"], s["filter"]): s for s in task["ours"]["samples"][name]}
        assert len(ours) == len(theirs)
        matched += [(ours[s["doc_id"], s["filter"]], s) for s in theirs]
    return matched


def test_every_prompt_and_document_is_the_one_of_stock_lm_eval(outcomes: dict[str, Any]) -> None:
    for task in outcomes.values():
        for mine, theirs in pairs(task):
            assert [mine[h] for h in ("doc_hash", "prompt_hash", "target_hash")] == [
                theirs[h] for h in ("doc_hash", "prompt_hash", "target_hash")
            ]


@pytest.mark.parametrize("name", ["mmlu_abstract_algebra", "hellaswag"])
def test_log_likelihoods_and_choices_are_those_of_stock_lm_eval(outcomes: dict[str, Any], name: str) -> None:
    for mine, theirs in pairs(outcomes[name]):
        ours = [float(resp[0][0]) for resp in mine["resps"]]
        stock = [float(resp[0][0]) for resp in theirs["resps"]]
        assert ours == pytest.approx(stock, abs=SHORT)
        best, second = sorted(stock, reverse=True)[:2]
        if best - second > SHORT:
            assert ours.index(max(ours)) == stock.index(best)
            assert mine["acc"] == theirs["acc"]
        assert [str(resp[0][1]) for resp in mine["resps"]] == [str(resp[0][1]) for resp in theirs["resps"]]


def test_one_token_choices_are_scored_by_the_next_token_and_longer_ones_otherwise(outcomes: dict[str, Any]) -> None:
    assert outcomes["mmlu_abstract_algebra"]["ours"]["methods"] == {"next_token": 100}
    assert set(outcomes["hellaswag"]["ours"]["methods"]) <= {"prompt_logprobs", "forced_decoding"}
    assert set(outcomes["wikitext"]["ours"]["methods"]) == {"prompt_logprobs"}


def test_perplexities_are_those_of_stock_lm_eval(outcomes: dict[str, Any]) -> None:
    ours, stock = (outcomes["wikitext"][side]["results"]["wikitext"] for side in ("ours", "stock"))
    # A byte is at most one token here, so this bounds the noise of a token.
    assert ours["bits_per_byte,none"] == pytest.approx(stock["bits_per_byte,none"], abs=PER_TOKEN)


def test_generations_score_as_those_of_stock_lm_eval(outcomes: dict[str, Any]) -> None:
    ours, stock = (outcomes["gsm8k"][side]["results"]["gsm8k"] for side in ("ours", "stock"))
    for metric in ("exact_match,strict-match", "exact_match,flexible-extract"):
        assert ours[metric] == stock[metric]
    texts = [(mine["resps"][0][0], theirs["resps"][0][0]) for mine, theirs in pairs(outcomes["gsm8k"])]
    # Greedy decoding may take the other of two equal tokens when batches differ; most texts are the same all the same.
    assert sum(mine == theirs for mine, theirs in texts) >= 0.9 * len(texts)
