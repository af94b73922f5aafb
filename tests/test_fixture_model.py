"""Real vLLM serving a checkpoint that would bend its scores: see fixture_model.py."""

import json
import re
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from doubles import Memory
from fixture_model import BOS, PENALTY, make_fixture_model
from lm_eval.api.instance import Instance

from sweep.evaluating.client import Client, Pool
from sweep.evaluating.evaluation import load_tokenizer, probe_token_ids
from sweep.evaluating.lm import SweepLM
from sweep.evaluating.preflight import Expected, inspect
from sweep.planning.config import Device, Model, Overflow
from sweep.planning.plan import ModelPlan, ServerPlan
from sweep.serving.server import Endpoint, Server

KEY = "a-key-for-the-fixture-model"
NEW_TOKENS = 12
PROMPTS = [f"Question: what is the {word}?\nAnswer:" for word in ("river", "town", "country", "sea", "number", "king")]

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ModelPlan:
    folder = make_fixture_model(tmp_path_factory.mktemp("models") / "fixture")
    model = Model(
        path=str(folder),
        chat=True,
        device=Device.CPU,
        dtype="float32",
        max_model_len=512,
        server={"enforce_eager": True},
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    return ModelPlan(name="m", model=model, revision=None, fingerprint="f", server="m")


@pytest.fixture(scope="module")
def endpoint(plan: ModelPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    served = ServerPlan(name="m", model=plan.model, revision=None, adapters={"m": None}, gpus=0, replicas=1)
    log = tmp_path_factory.mktemp("server") / "m-0.log"
    server = Server(served, name="m-0", api_key=KEY, gpu_ids=[], log_path=log)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def lm(endpoint: Endpoint, plan: ModelPlan) -> SweepLM:
    tokenizer = load_tokenizer(plan)
    expected = Expected(served_name="m", max_model_len=plan.model.max_model_len, token_ids=probe_token_ids(tokenizer))
    seen = inspect(endpoint, {"m": expected})
    assert seen.facts is not None, seen.refusal
    pool = Pool()
    pool.update([(endpoint, 16)])
    return SweepLM(
        cell="m/t",
        fingerprint="f",
        tokenizer=tokenizer,
        overflow=Overflow.ERROR,
        client=Client(model="m", pool=pool),
        channel=Memory(seen.facts),
    )


@pytest.fixture(scope="module")
def greedy(plan: ModelPlan, lm: SweepLM) -> Any:
    """`greedy(prompt, penalty)`: what transformers continues it with, each token the most likely one."""
    import torch
    from transformers import Qwen2ForCausalLM, RepetitionPenaltyLogitsProcessor

    model = Qwen2ForCausalLM.from_pretrained(plan.model.path, dtype=torch.float32)

    def continued(prompt: str, penalty: float = 1.0, *, tokens: int = NEW_TOKENS) -> list[int]:
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        ids = lm.tokenizer(prompt, add_special_tokens=False).input_ids
        start = len(ids)
        while len(ids) < start + tokens:
            with torch.no_grad():
                row = torch.tensor([ids])
                ids.append(int(processor(row, model(row).logits[:, -1]).argmax()))
        return ids[start:]

    return continued


def ask(lm: SweepLM, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    requests = [
        Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("t", i, 1)) for i, a in enumerate(arguments)
    ]
    answers: list[Any] = getattr(lm, kind)(requests)
    return answers


def served_prompt_tokens(endpoint: Endpoint) -> int:
    with urllib.request.urlopen(f"{endpoint.url}/metrics", timeout=30) as reply:
        (found,) = re.findall(r"^vllm:prompt_tokens_total\{.*\} (\S+)$", reply.read().decode(), flags=re.MULTILINE)
    return int(float(found))


def test_a_checkpoints_penalty_and_sampling_defaults_change_no_generation(lm: SweepLM, greedy: Any) -> None:
    texts = ask(lm, "generate_until", [(prompt, {"max_gen_toks": NEW_TOKENS}) for prompt in PROMPTS])
    assert texts == [said(lm, greedy(prompt)) for prompt in PROMPTS]
    asked = {"max_gen_toks": NEW_TOKENS, "repetition_penalty": PENALTY}
    penalised = ask(lm, "generate_until", [(prompt, asked) for prompt in PROMPTS])
    assert penalised == [said(lm, greedy(prompt, PENALTY)) for prompt in PROMPTS]
    assert sum(a != b for a, b in zip(texts, penalised, strict=True)) >= len(PROMPTS) - 1


def said(lm: SweepLM, ids: Sequence[int]) -> str:
    """As vLLM says it: without special tokens, and without the beginning of a letter at the end."""
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\N{REPLACEMENT CHARACTER}")


def test_a_checkpoints_penalty_changes_no_greedy_flag(lm: SweepLM, greedy: Any) -> None:
    """Contexts where the penalty would have another token sampled than the likeliest, each scored without the other."""
    likeliest, sampled = [], []
    continued = {prompt: greedy(prompt) for prompt in PROMPTS}
    for text in (prompt + said(lm, ids[:n]) for prompt, ids in continued.items() for n in range(0, NEW_TOKENS, 2)):
        best, penalised = greedy(text, tokens=1)[0], greedy(text, PENALTY, tokens=1)[0]
        for token, pairs in ((best, likeliest), (penalised, sampled)) if best != penalised else ():
            continuation = said(lm, [token])
            whole, context = lm.tokenizer([text + continuation, text], add_special_tokens=False).input_ids
            if whole == [*context, token] and text == text.rstrip():  # nothing moves across the boundary
                pairs.append((text, continuation))
    assert min(len(likeliest), len(sampled)) >= 3
    assert {is_greedy for _, is_greedy in ask(lm, "loglikelihood", likeliest)} == {True}
    assert {is_greedy for _, is_greedy in ask(lm, "loglikelihood", sampled)} == {False}


def test_a_chat_has_its_template_and_bos_once_for_the_server_too(lm: SweepLM, endpoint: Endpoint) -> None:
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which river?"}]
    prompt = lm.apply_chat_template(history)
    ids = lm.tokenizer(prompt, add_special_tokens=False).input_ids
    assert prompt.count(BOS) == ids.count(lm.tokenizer.bos_token_id) == 1
    before = served_prompt_tokens(endpoint)
    ask(lm, "generate_until", [(prompt, {"max_gen_toks": 2})])
    assert served_prompt_tokens(endpoint) - before == len(ids)

    def tokens(path: str, body: dict[str, Any]) -> int:
        request = urllib.request.Request(
            f"{endpoint.url}{path}",
            json.dumps({"model": "m", "max_tokens": 1, **body}).encode(),
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return int(json.load(reply)["usage"]["prompt_tokens"])

    assert tokens("/v1/chat/completions", {"messages": history}) == len(ids)
    assert tokens("/v1/completions", {"prompt": prompt}) == len(ids) + 1  # what text instead of ids would have come to


def test_a_server_looks_for_stop_strings_in_a_text_without_special_tokens(lm: SweepLM, greedy: Any) -> None:
    """What the ids beside the stop strings are for; this model writes no special token unless it is made to."""
    end = lm.tokenizer.convert_tokens_to_ids("<|im_start|>")
    made = {"max_gen_toks": 3, "until": ["<|im_start|>"], "allowed_token_ids": [end]}
    cases = [{"stop_token_ids": []}, {"skip_special_tokens": False}, {}]
    before = lm.counts.length_stopped
    texts = ask(lm, "generate_until", [(PROMPTS[0], {**made, **case}) for case in cases])
    assert texts == ["", "", ""]
    assert lm.counts.length_stopped - before == 1  # stock's way runs over them to the end
    assert lm.departures.stopped_at == {"<|im_start|>": 1}
