"""Prompts, bodies and answers against stock lm-eval's `local-completions` on the same stand-in; resume; overflow.

The stand-in answers by the request alone, so what is compared is compared to the last digit.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles import KEY, Memory, RequestsLog, facts, make_tokenizer, stand_in
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sweep.errors import TaskError
from sweep.evaluating.client import Client, Pool
from sweep.evaluating.lm import SweepLM
from sweep.evaluating.preflight import Facts
from sweep.evaluating.scoring import Method
from sweep.planning.config import Overflow
from sweep.serving.server import Endpoint

ECHO_ONLY = facts(methods=[Method.ECHO])

TEMPLATE_WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PAIRS = [
    ("The capital of the country is", " the town"),
    ("The capital of the country is", " not"),
    ("The capital of the country is", " not"),  # asked twice
    ("Question: which one?\nAnswer: ", "A"),  # the space moves to the continuation
    ("Question: which one?\nAnswer:  \n ", "(B)"),
    ("Question: which one?\nAnswer:", " A"),
    ("Question: which one?\nAnswer:", " B"),
    ("Question: which one?\nAnswer:", " the whole of it"),
    ("", "An empty context"),
    ("", " "),
    ("", "<|endoftext|>begins with the prefix token"),
    ("<|endoftext|>", " a context that is the prefix token"),
    ("für die Straße – 中文字符 😀", " größer 日本語"),
    ("中", "文字"),
    ("foo ba", "r it"),  # one token of the whole reaches across the boundary: the prompt is not the whole
    ("x\n", "\nno"),  # the whole has one token where the context ends with another
    ("th", "e and the rest"),
    ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", "Hello there<|im_end|>"),
    ("a" * 300, "b" * 40),
]

WITHOUT_TOKENS = [("the thing", ""), ("foo ba", "r")]

GENERATIONS: list[dict[str, Any]] = [
    {},
    {"until": None, "max_gen_toks": 3},
    {"until": "\n", "max_gen_toks": 8},
    {"until": ["\n", " 9", "Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
    {"until": ["<|endoftext|>", "."], "max_gen_toks": 12},
    {"until": [], "max_tokens": 5},
    {"until": ["7"], "max_tokens": 5, "top_p": 1.0, "repetition_penalty": 1.0},
    {"until": ["\n"], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_gen_toks": 6},
    {"until": ["\n"], "do_sample": True, "temperature": 0.7, "seed": 99, "max_gen_toks": 6},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> RequestsLog:
    return RequestsLog(tmp_path_factory.mktemp("requests") / "log.jsonl")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, log: RequestsLog) -> Iterator[Endpoint]:
    with stand_in(tmp_path_factory.mktemp("server") / "log", requests_log=log.path, vocabulary=600) as endpoint:
        yield endpoint


@pytest.fixture
def stock(endpoint: Endpoint, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalCompletionsAPI]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def make(concurrent: int, *, max_length: int = 2048, tokenizer: Path = folder) -> LocalCompletionsAPI:
        return LocalCompletionsAPI(
            base_url=f"{endpoint.url}/v1/completions",
            model="m",
            tokenizer=str(tokenizer),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            max_length=max_length,
            num_concurrent=concurrent,
            max_retries=1,
        )

    return make


@pytest.fixture
def ours(endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> Callable[..., SweepLM]:
    def make(
        channel: Memory,
        *,
        overflow: Overflow = Overflow.ERROR,
        tokenizer: PreTrainedTokenizerBase = tokenizer,
        shares: Sequence[tuple[Endpoint, int]] = ((endpoint, 8),),
    ) -> SweepLM:
        pool = Pool()
        pool.update(shares)
        return SweepLM(
            cell="m/t",
            fingerprint="f",
            tokenizer=tokenizer,
            overflow=overflow,
            client=Client(model="m", pool=pool),
            channel=channel,
        )

    return make


class NoClient:
    """Whoever asks a server fails the test."""

    def run(self, *_: Any) -> None:
        raise AssertionError("a server was asked")


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def generations(prompts: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> list[Instance]:
    return instances("generate_until", [(prompt, dict(a)) for prompt in prompts for a in arguments])


def normal(bodies: Sequence[Mapping[str, Any]]) -> set[str]:
    """Distinct bodies; stock wraps its one prompt into a batch of one."""
    return {
        json.dumps({**b, "prompt": b["prompt"][0] if isinstance(b["prompt"][0], list) else b["prompt"]}, sort_keys=True)
        for b in bodies
    }


# The same requests, the same answers


@pytest.mark.parametrize("concurrent", [1, 4])
def test_pairs_are_sent_and_scored_as_stock_does(concurrent: int, stock: Any, ours: Any, log: RequestsLog) -> None:
    requests = instances("loglikelihood", PAIRS)
    log.new()
    expected = stock(concurrent).loglikelihood(requests, disable_tqdm=True)
    sent_by_stock = log.new()
    assert ours(Memory(ECHO_ONLY)).loglikelihood(requests) == expected
    sent = log.new()
    assert normal(sent) == normal(sent_by_stock)
    assert len(sent) == len(set(PAIRS))


def test_next_token_scoring_gives_what_stock_gets_with_fewer_requests(stock: Any, ours: Any, log: RequestsLog) -> None:
    questions = [f"Question: is {n} the one?\nAnswer:" for n in range(5)]
    pairs = [*PAIRS, *((question, f" {letter}") for question in questions for letter in "ABCD")]
    requests = instances("loglikelihood", pairs)
    expected = stock(4).loglikelihood(requests, disable_tqdm=True)
    log.new()
    lm = ours(Memory(facts()))
    assert lm.loglikelihood(requests) == expected
    assert lm.methods[Method.NEXT_TOKEN] >= 20
    assert lm.client.traffic.requests < len(set(pairs)) - 3 * len(questions) + 1


def test_a_greedy_continuation_is_greedy_by_either_method(ours: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [tokenizer.decode([token]) for token in range(260, 600)]
    words = [text for text in texts if text.startswith(" ") and text.strip().isalpha()]
    requests = instances("loglikelihood", [(f"{n} or\nAnswer:", word) for n in range(6) for word in words])
    by_next_token = ours(Memory(facts())).loglikelihood(requests)
    assert by_next_token == ours(Memory(ECHO_ONLY)).loglikelihood(requests)
    assert 1 <= sum(is_greedy for _, is_greedy in by_next_token) <= 6


def test_continuations_without_tokens_count_as_certain_and_are_not_sent(
    stock: Any, ours: Any, log: RequestsLog
) -> None:
    requests = instances("loglikelihood", WITHOUT_TOKENS)
    expected = stock(1).loglikelihood(requests, disable_tqdm=True)
    log.new()
    lm = ours(Memory(facts()))
    assert lm.loglikelihood(requests) == expected == [(0, True)] * len(WITHOUT_TOKENS)
    assert log.new() == []
    assert lm.without_tokens == len(WITHOUT_TOKENS)


def test_a_context_of_blanks_is_refused_where_stock_stops_with_an_assertion(stock: Any, ours: Any) -> None:
    requests = instances("loglikelihood", [("Fine", " yes"), ("  \n", "Answer")])
    with pytest.raises(AssertionError, match="Context length must be greater than 0"):
        stock(1).loglikelihood(requests, disable_tqdm=True)
    channel = Memory(facts())
    with pytest.raises(TaskError, match="a context without tokens"):
        ours(channel).loglikelihood(requests)
    assert channel.fresh == []


def test_any_two_texts_are_split_as_stock_splits_them(stock: Any, ours: Any) -> None:
    reference, lm = stock(1), ours(Memory())
    source = random.Random(5)
    pieces = ["the", " the", "th", "e", " ", "  ", "\n", "\n\n", ":", " A", "(A)", "é", "中", "😀", "ing", "1", "'s"]
    pairs = []
    while len(pairs) < 400:
        context, continuation = ("".join(source.choices(pieces, k=source.randint(1, 6))) for _ in range(2))
        if context.strip():
            pairs.append((context, continuation))
    stocks = [tuple(map(tuple, reference._encode_pair(*pair))) for pair in pairs]
    assert lm._encode_pairs(pairs) == stocks


@pytest.mark.parametrize("concurrent", [1, 4])
def test_windows_of_long_texts_are_sent_and_summed_as_stock_does(
    concurrent: int, stock: Any, ours: Any, log: RequestsLog
) -> None:
    long = "the river and the town " * 40
    texts = ["One short text.", long, "für 中文 😀 " * 30, "x", long, ""]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    log.new()
    expected = stock(concurrent, max_length=64).loglikelihood_rolling(requests, disable_tqdm=True)
    sent_by_stock = log.new()
    lm = ours(Memory(facts(max_model_len=64, methods=[Method.ECHO])))
    assert lm.loglikelihood_rolling(requests) == expected
    sent = log.new()
    assert normal(sent) == normal(sent_by_stock)
    assert len(sent) == lm.counts.requests == lm.counts.asked == len(normal(sent))
    assert max(len(body["prompt"]) for body in sent) == 63
    by_next_token = ours(Memory(facts(max_model_len=64)))
    assert by_next_token.loglikelihood_rolling(requests) == expected


@pytest.mark.parametrize("concurrent", [1, 4])
def test_generations_are_sent_and_answered_as_stock_does(
    concurrent: int, stock: Any, ours: Any, log: RequestsLog
) -> None:
    prompts = ["Question: what?\nAnswer:", "Write: ", "für 中文 😀", "<|im_start|>user\nHello<|im_end|>\n"]
    requests = generations(prompts, GENERATIONS)
    log.new()
    expected = stock(concurrent).generate_until(requests, disable_tqdm=True)
    sent_by_stock = log.new()
    if concurrent > 1:
        # With several in flight stock leaves the end-of-text string out of the stop strings.
        for body in sent_by_stock:
            body["stop"] += [] if "<|endoftext|>" in body["stop"] else ["<|endoftext|>"]
    assert ours(Memory(facts())).generate_until(requests) == expected
    assert normal(log.new()) == normal(sent_by_stock)


def test_max_tokens_wins_over_max_gen_toks_and_is_sent_alone(stock: Any, ours: Any, log: RequestsLog) -> None:
    requests = generations(["Go:"], [{"until": ["\n"], "max_tokens": 5, "max_gen_toks": 9}])
    log.new()
    expected = stock(1).generate_until(requests, disable_tqdm=True)
    (by_stock,) = log.new()
    assert ours(Memory(facts())).generate_until(requests) == expected
    assert by_stock.pop("max_gen_toks") == 9  # which no server knows
    assert normal(log.new()) == normal([by_stock])


def test_the_arguments_of_a_task_are_left_as_they_are(ours: Any) -> None:
    arguments = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    ours(Memory(facts())).generate_until(instances("generate_until", [("Go:", arguments)]))
    assert arguments == {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}


def test_a_template_brings_its_bos_and_no_second_one_is_added(
    stock: Any, ours: Any, log: RequestsLog, tmp_path: Path
) -> None:
    folder = make_tokenizer(
        tmp_path / "t", bos_token="<|im_start|>", add_bos_token=True, chat_template=TEMPLATE_WITH_BOS
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference, lm = stock(1, tokenizer=folder), ours(Memory(ECHO_ONLY), tokenizer=tokenizer)
    history = [{"role": "user", "content": "Hello"}]
    prompts = [lm.apply_chat_template(history), lm.apply_chat_template(history, add_generation_prompt=False)]
    assert prompts == [
        reference.apply_chat_template(history),
        reference.apply_chat_template(history, add_generation_prompt=False),
    ]
    assert lm.chat_template(True) == reference.chat_template(True) == TEMPLATE_WITH_BOS
    pairs = instances("loglikelihood", [(prompts[0], "Yes"), ("", "Yes"), ("", "<|im_start|>Yes")])
    log.new()
    expected = reference.loglikelihood(pairs, disable_tqdm=True)
    texts = reference.generate_until(generations(prompts, [{}]), disable_tqdm=True)
    sent_by_stock = log.new()
    assert lm.loglikelihood(pairs) == expected
    assert lm.generate_until(generations(prompts, [{}])) == texts
    sent = log.new()
    assert normal(sent) == normal(sent_by_stock)
    bos = tokenizer.bos_token_id
    assert {body["prompt"][0] for body in sent} == {bos}


# Resume


def every_kind(lm: SweepLM) -> list[Any]:
    return [
        lm.loglikelihood(instances("loglikelihood", PAIRS)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("the river and the town " * 60,), ("x",)])),
        lm.generate_until(generations(["Question: what?\nAnswer:", "Write: "], GENERATIONS)),
    ]


def test_only_what_is_missing_is_asked(ours: Any, log: RequestsLog) -> None:
    first = Memory(facts(max_model_len=512, methods=[Method.ECHO]))
    expected = every_kind(ours(first))
    half = dict(list(first.answers.items())[::2])
    log.new()
    second = Memory(first.known_facts, answers=dict(half))
    lm = ours(second)
    assert every_kind(lm) == expected
    assert len(log.new()) == len(second.fresh) == len(first.answers) - len(half) == sum(second.announced)
    assert lm.counts.reused == len(half)
    assert lm.counts.requests == len(first.answers)


def test_with_every_answer_stored_no_server_is_needed(ours: Any) -> None:
    first = Memory(facts(max_model_len=512))
    lm = ours(first)
    expected = every_kind(lm)
    replay = Memory(first.known_facts, answers=first.answers)
    again = ours(replay, shares=())
    again.client = NoClient()  # type: ignore[assignment]
    assert every_kind(again) == expected
    assert replay.fresh == []
    assert replay.announced == []
    for name in ("truncated", "empty", "length_stopped"):
        assert getattr(again.counts, name) == getattr(lm.counts, name)
    assert again.counts.asked == 0


def test_stored_scores_and_answers_need_no_facts_of_a_server(ours: Any) -> None:
    first = Memory(facts())
    requests = instances("loglikelihood", PAIRS)
    expected = ours(first).loglikelihood(requests)
    assert ours(Memory(answers=first.answers), shares=()).loglikelihood(requests) == expected


def test_repeats_of_a_sampled_request_get_a_seed_each(ours: Any, log: RequestsLog) -> None:
    (sampled,) = generations(["Go:"], [{"temperature": 0.8, "max_gen_toks": 20}])
    (own_seed,) = generations(["Go:"], [{"temperature": 0.8, "max_gen_toks": 20, "seed": 50}])
    (greedy,) = generations(["Go:"], [{"temperature": 0.0, "max_gen_toks": 20}])
    log.new()
    channel = Memory(facts())
    lm = ours(channel)
    texts = lm.generate_until([sampled] * 3 + [own_seed] * 2 + [greedy] * 3)
    assert sorted(body["seed"] for body in log.new()) == [50, 51, 1234, 1234, 1235, 1236]
    assert len(set(texts[:3])) == 3
    assert len(set(texts[5:])) == 1
    assert len(channel.answers) == 6
    assert lm.seeded_repeats == 3
    assert ours(Memory(answers=channel.answers), shares=()).generate_until([sampled] * 3) == texts[:3]


def test_another_model_is_never_served_these_answers(ours: Any) -> None:
    channel = Memory(facts())
    requests = instances("loglikelihood", PAIRS)
    ours(channel).loglikelihood(requests)
    other = ours(channel)
    other.fingerprint = "another"
    other.loglikelihood(requests)
    assert len(channel.answers) == 2 * len(set(PAIRS))


def test_counts_are_of_distinct_requests(ours: Any) -> None:
    lm = ours(Memory(facts(max_model_len=300)))
    lm.generate_until(generations(["Go:", "Go:", "Go:"], [{"max_gen_toks": 2}]))
    assert (lm.counts.requests, lm.counts.length_stopped) == (1, 1)
    prompt_tokens = len(lm.encoder.texts(["Go:"])[0])
    assert lm.counts.prompt_tokens == prompt_tokens


# What does not fit

LONG = [("the river and the town " * n, " by the sea") for n in (1, 10, 11, 12)]


def test_what_does_not_fit_is_refused_before_anything_is_sent(ours: Any, log: RequestsLog) -> None:
    log.new()
    channel = Memory(facts(max_model_len=48))
    lm = ours(channel)
    lengths = [len(c) + len(t) for c, t in lm._encode_pairs(LONG)]
    over = [length - 47 for length in lengths if length > 47]
    assert len(over) == 3
    with pytest.raises(TaskError) as caught:
        lm.loglikelihood(instances("loglikelihood", LONG))
    message = str(caught.value)
    assert f"m/t: 3 of 4 requests exceed the server by up to {max(over)} tokens (max_model_len 48)" in message
    assert "on_overflow: truncate" in message
    with pytest.raises(TaskError, match=r"1 of 2 requests exceed the server by up to \d+ tokens"):
        lm.generate_until(generations(["Go:", "the river and the town " * 12], [{"max_gen_toks": 8}]))
    assert log.new() == []
    assert channel.fresh == []


def test_an_answer_that_leaves_no_room_for_its_prompt_is_refused_in_any_case(ours: Any, log: RequestsLog) -> None:
    log.new()
    for overflow in Overflow:
        lm = ours(Memory(facts(max_model_len=48)), overflow=overflow)
        with pytest.raises(TaskError, match="1 of 1 requests leave no room for any context beside the answer"):
            lm.generate_until(generations(["Go:"], [{"max_gen_toks": 47}]))
    assert log.new() == []


@pytest.mark.parametrize("concurrent", [1, 4])
def test_contexts_are_cut_as_stock_cuts_them_where_the_config_allows_it(
    concurrent: int, stock: Any, ours: Any, log: RequestsLog
) -> None:
    pairs = instances("loglikelihood", LONG)
    prompts = generations([context for context, _ in LONG], [{"until": ["\n"], "max_gen_toks": 8}])
    reference = stock(concurrent, max_length=48)
    log.new()
    expected = [reference.loglikelihood(pairs, disable_tqdm=True), reference.generate_until(prompts, disable_tqdm=True)]
    sent_by_stock = log.new()
    for body in sent_by_stock:
        if "stop" in body and "<|endoftext|>" not in body["stop"]:
            body["stop"].append("<|endoftext|>")
    channel = Memory(facts(max_model_len=48, methods=[Method.ECHO]))
    lm = ours(channel, overflow=Overflow.TRUNCATE)
    assert [lm.loglikelihood(pairs), lm.generate_until(prompts)] == expected
    assert normal(log.new()) == normal(sent_by_stock)
    assert lm.counts.truncated == 6
    replay = ours(Memory(channel.known_facts, answers=channel.answers), overflow=Overflow.TRUNCATE, shares=())
    assert [replay.loglikelihood(pairs), replay.generate_until(prompts)] == expected
    assert replay.counts.truncated == 6
    assert replay.counts.asked == 0


def test_a_cut_answer_is_not_used_for_another_length(ours: Any) -> None:
    channel = Memory(facts(max_model_len=48))
    pairs = instances("loglikelihood", LONG)
    ours(channel, overflow=Overflow.TRUNCATE).loglikelihood(pairs)
    longer = Memory(facts(max_model_len=512), answers=dict(channel.answers))
    lm = ours(longer, overflow=Overflow.TRUNCATE)
    lm.loglikelihood(pairs)
    assert lm.counts.asked == 4
    assert lm.counts.truncated == 0


def test_waiting_for_a_server_is_measured(ours: Any, endpoint: Endpoint) -> None:
    import threading
    import time

    class Slow(Memory):
        def facts(self) -> Facts:
            time.sleep(0.2)
            return super().facts()

    lm = ours(Slow(facts()), shares=())
    timer = threading.Timer(0.8, lambda: lm.client.pool.update([(endpoint, 8)]))
    timer.start()
    lm.loglikelihood(instances("loglikelihood", PAIRS))
    timer.join()
    assert lm.waited_s > 0.7
