"""Prompts, bodies and answers against stock lm-eval's `local-completions` on the same stand-in; resume; overflow.

The stand-in answers by the request alone, so what is compared is compared to the last digit.
"""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from doubles import KEY, Memory, RequestsLog, distinct, facts, make_tokenizer, stand_in, with_end
from fixture_model import BOS, make_fixture_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sweep.errors import TaskError
from sweep.evaluating import lm as module
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
        **settings: Any,
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
            **settings,
        )

    return make


class NoClient:
    """Whoever asks a server fails the test."""

    def run(self, *_: Any) -> None:
        raise AssertionError("a server was asked")


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    """Each of a document of its own."""
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("task", i, 1))
        for i, a in enumerate(arguments)
    ]


def generations(prompts: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> list[Instance]:
    return instances("generate_until", [(prompt, dict(a)) for prompt in prompts for a in arguments])


# The same requests, the same answers


@pytest.mark.parametrize("concurrent", [1, 4])
def test_pairs_are_sent_and_scored_as_stock_does(concurrent: int, stock: Any, ours: Any, log: RequestsLog) -> None:
    requests = instances("loglikelihood", PAIRS)
    log.new()
    expected = stock(concurrent).loglikelihood(requests, disable_tqdm=True)
    sent_by_stock = log.new()
    assert ours(Memory(ECHO_ONLY)).loglikelihood(requests) == expected
    sent = log.new()
    assert distinct(sent) == distinct(sent_by_stock)
    assert len(sent) == len(distinct(sent))  # two texts of the same tokens are one prompt


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
    assert distinct(sent) == distinct(sent_by_stock)
    assert len(sent) == lm.counts.requests == lm.counts.asked == len(distinct(sent))
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
        assert any("<|endoftext|>" not in body["stop"] for body in sent_by_stock)
        sent_by_stock = with_end(sent_by_stock, "<|endoftext|>")
    assert ours(Memory(facts())).generate_until(requests) == expected
    assert distinct(log.new()) == distinct(sent_by_stock)


def test_max_tokens_wins_over_max_gen_toks_and_is_sent_alone(stock: Any, ours: Any, log: RequestsLog) -> None:
    requests = generations(["Go:"], [{"until": ["\n"], "max_tokens": 5, "max_gen_toks": 9}])
    log.new()
    expected = stock(1).generate_until(requests, disable_tqdm=True)
    (by_stock,) = log.new()
    assert ours(Memory(facts())).generate_until(requests) == expected
    assert by_stock.pop("max_gen_toks") == 9  # which no server knows
    assert distinct(log.new()) == distinct([by_stock])


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
    assert distinct(sent) == distinct(sent_by_stock)
    bos = tokenizer.bos_token_id
    assert {body["prompt"][0] for body in sent} == {bos}


def test_plain_prompts_are_sent_without_bos_as_in_stock_whatever_the_tokenizer_adds(
    stock: Any, ours: Any, log: RequestsLog, begins_texts: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(begins_texts)
    bos = tokenizer.bos_token_id
    assert tokenizer("the").input_ids[0] == bos
    pairs = instances("loglikelihood", [("The town", " is"), ("", "The town"), (f"{BOS}The town", " is")])
    texts = instances("loglikelihood_rolling", [("The town is by the river.",)])
    prompts = generations(["Go:", f"{BOS}Go:"], [{"until": ["\n"], "max_gen_toks": 3}])

    def answers(lm: Any, **settings: Any) -> list[Any]:
        return [
            lm.loglikelihood(pairs, **settings),
            lm.loglikelihood_rolling(texts, **settings),
            lm.generate_until(prompts, **settings),
        ]

    log.new()
    expected = answers(stock(4, tokenizer=begins_texts), disable_tqdm=True)
    sent_by_stock = with_end(log.new(), tokenizer.eos_token)
    lm = ours(Memory(ECHO_ONLY), tokenizer=tokenizer)
    assert answers(lm) == expected
    sent = log.new()
    assert distinct(sent) == distinct(sent_by_stock)
    assert sorted(body["prompt"].count(bos) for body in sent) == [0, 0, 1, 1, 1, 1]
    assert lm.departures.without_bos == 2


def test_a_tokenizer_that_adds_nothing_is_not_said_to(ours: Any) -> None:
    lm = ours(Memory(facts()))
    lm.loglikelihood(instances("loglikelihood", [("The town", " is")]))
    assert lm.departures.without_bos == 0


@pytest.fixture(scope="module")
def begins_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fixture_tokenizer(tmp_path_factory.mktemp("tokenizer") / "begins texts")


def test_what_a_template_takes_reaches_it_beside_what_lm_eval_says(ours: Any, begins_texts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(begins_texts)
    quick = ours(Memory(), tokenizer=tokenizer, chat_template_kwargs={"enable_thinking": False})
    history = [{"role": "user", "content": "Hi"}]
    asked = f"{BOS}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ours(Memory(), tokenizer=tokenizer).apply_chat_template(history) == asked
    assert quick.apply_chat_template(history) == asked + "<think>\n\n</think>\n\n"
    begun = [*history, {"role": "assistant", "content": "The answer is"}]
    assert quick.apply_chat_template(begun, add_generation_prompt=False) == asked + "The answer is"


# Greedy or sampled


@pytest.mark.parametrize(
    ("arguments", "temperature", "counted"),
    [
        ({"do_sample": False, "temperature": 0.8}, 0, "made_greedy"),
        ({"do_sample": False, "temperature": 0.0}, 0.0, None),
        ({"do_sample": False}, 0, None),
        ({"temperature": 0.8}, 0.8, None),
        ({"do_sample": True, "temperature": 0.8}, 0.8, None),
        ({"do_sample": True}, 0, "never_sampled"),
        ({"do_sample": True, "temperature": 0.0}, 0.0, "never_sampled"),
    ],
)
def test_do_sample_is_minded_or_said(
    arguments: dict[str, Any], temperature: float, counted: str | None, stock: Any, ours: Any, log: RequestsLog
) -> None:
    (request,) = generations(["Go:"], [{**arguments, "max_gen_toks": 4}])
    log.new()
    stock(1).generate_until([request], disable_tqdm=True)
    (by_stock,) = log.new()
    assert by_stock["temperature"] == arguments.get("temperature", 0)
    lm = ours(Memory(facts()))
    lm.generate_until([request, request])
    sent = log.new()
    assert {body["temperature"] for body in sent} == {temperature}
    assert len(sent) == (2 if temperature else 1)
    assert (lm.departures.made_greedy, lm.departures.never_sampled) == tuple(
        2 * (counted == name) for name in ("made_greedy", "never_sampled")
    )
    if counted != "made_greedy":
        assert by_stock in [{**body, "prompt": [body["prompt"]]} for body in sent]


# Special tokens and reasoning


def test_a_stop_string_that_is_a_special_token_is_sent_as_its_id_too(ours: Any, tokenizer: Any, tmp_path: Path) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    until = ["<|im_end|>", "</s>", "<|endoftext|>"]
    lm = ours(Memory())

    def body(**arguments: Any) -> dict[str, Any]:
        parameters: dict[str, Any] = lm.generation("Go:", {"until": until, **arguments}, repeat=0).parameters
        return parameters

    assert body()["stop"] == until
    assert body()["stop_token_ids"] == [end]
    assert body(stop_token_ids=[])["stop_token_ids"] == []
    assert "stop_token_ids" not in body(skip_special_tokens=False)
    assert "stop_token_ids" not in body(until=["</s>"])
    log = RequestsLog(tmp_path / "requests")
    with stand_in(tmp_path / "log", vocabulary=6, end_every=10**9, requests_log=log.path) as few:
        channel = Memory(facts())
        lm = ours(channel, shares=[(few, 4)])
        prompts = [f"Go {n}:" for n in range(8)]
        texts = lm.generate_until(generations(prompts, [{"until": ["<|im_end|>"], "max_gen_toks": 12}]))
        unstopped = ours(Memory(facts()), shares=[(few, 4)]).generate_until(
            generations(prompts, [{"until": ["<|im_end|>"], "max_gen_toks": 12, "stop_token_ids": []}])
        )
    stopped = sum(f" {end}" in text for text in unstopped)
    assert texts == [text.partition(f" {end}")[0] for text in unstopped]
    assert lm.departures.stopped_at == {"<|im_end|>": stopped}
    assert stopped > 4
    again = ours(Memory(answers=channel.answers), shares=())
    again.generate_until(generations(prompts, [{"until": ["<|im_end|>"], "max_gen_toks": 12}]))
    assert again.departures.stopped_at == {"<|im_end|>": stopped}


def test_the_answer_of_a_reasoning_model_is_behind_its_last_thought(ours: Any, log: RequestsLog) -> None:
    requests = generations([f"Go {n}:" for n in range(8)], [{"until": [" 3", " 4"], "max_gen_toks": 12}])
    whole = ours(Memory(facts())).generate_until(
        generations([f"Go {n}:" for n in range(8)], [{"until": [], "max_gen_toks": 12}])
    )
    log.new()
    channel = Memory(facts())
    lm = ours(channel, think_end_token=" 2")
    texts = lm.generate_until(requests)
    assert {tuple(body["stop"]) for body in log.new()} == {("<|endoftext|>",)}  # reasoning may hold the task's own
    behind = [text.split(" 2")[-1] for text in whole]
    assert texts == [text.lstrip().split(" 3")[0].split(" 4")[0] for text in behind]
    assert texts != whole
    assert 0 < lm.departures.unfinished_reasoning == sum(" 2" not in text for text in whole) < 8
    assert lm.counts.empty == sum(not text.strip() for text in texts)
    stored = [json.loads(answer)["text"] for answer in channel.answers.values()]
    assert sorted(stored) == sorted(whole)
    replayed = ours(Memory(answers=channel.answers), shares=(), think_end_token=" 5")
    assert replayed.generate_until(requests) != texts


def test_reasoning_that_ends_with_a_special_token_is_asked_for_with_special_tokens(ours: Any) -> None:
    plain = ours(Memory(), think_end_token="</think>").generation("Go:", {}, repeat=0).parameters
    assert "skip_special_tokens" not in plain
    special = ours(Memory(), think_end_token="<|im_end|>").generation("Go:", {}, repeat=0).parameters
    assert special["skip_special_tokens"] is False
    several = ours(Memory(), think_end_token="<|im_start|>final<|im_end|>").generation("Go:", {}, repeat=0).parameters
    assert several["skip_special_tokens"] is False


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


def test_a_cell_is_scored_by_what_another_was_answered_before_as_its_replay_would_be(ours: Any) -> None:
    channel = Memory(known_facts=ECHO_ONLY)
    first = ours(channel).loglikelihood(instances("loglikelihood", PAIRS))
    key, text = next(iter(channel.answers.items()))
    theirs = {**json.loads(text), "logprob": -0.25}
    beside = Memory(known_facts=ECHO_ONLY, others={key: json.dumps(theirs).encode()})
    scored = ours(beside).loglikelihood(instances("loglikelihood", PAIRS))
    assert set(scored) - set(first) == {(-0.25, theirs["is_greedy"])}
    replayed = ours(Memory(answers={**beside.answers, **beside.others}))
    assert replayed.loglikelihood(instances("loglikelihood", PAIRS)) == scored


def test_stored_answers_are_looked_up_in_pieces(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Memory):
        def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
            pieces.append(len(keys))
            return super().known(keys)

    pieces: list[int] = []
    first = Memory(facts(max_model_len=512))
    expected = ours(first).loglikelihood(instances("loglikelihood", PAIRS))
    monkeypatch.setattr(module, "LOOKUP_KEYS", 3)
    again = Counted(answers=first.answers)
    assert ours(again, shares=()).loglikelihood(instances("loglikelihood", PAIRS)) == expected
    assert sum(pieces) == len(first.answers) > 3
    assert max(pieces) == 3


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
    assert lm.departures.seeded_repeats == 3
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
    assert str(caught.value) == (
        f"m/t: 3 of 4 samples do not fit into max_model_len 48: task 3 of 4 by up to {max(over)} tokens; raise "
        f"max_model_len to {48 + max(over)} if the model was made for it, use fewer shots (num_fewshot), or set "
        "`on_overflow: truncate` to cut contexts from the left as stock lm-eval does"
    )
    with pytest.raises(
        TaskError, match=r"1 of 2 samples do not .* lower the generated tokens \(gen_kwargs: max_gen_toks"
    ):
        lm.generate_until(generations(["Go:", "the river and the town " * 12], [{"max_gen_toks": 8}]))
    assert log.new() == []
    assert channel.fresh == []
    longer = ours(Memory(facts(max_model_len=48 + max(over))))
    longer.loglikelihood(instances("loglikelihood", LONG))
    assert longer.counts.truncated == 0


def test_what_does_not_fit_is_told_by_subtask_the_worst_first(ours: Any) -> None:
    long, longer = "the river and the town " * 12, "the river and the town " * 15
    by_task = {
        "one": [long, "Go:", "Go on:"],
        "two": [long, long, "Go:"],  # asked once, of two documents
        "three": ["Go:"],
        **{f"more_{n}": [longer] for n in range(5)},
    }
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(context, end), idx=i, metadata=(task, doc, 1))
        for task, contexts in by_task.items()
        for doc, context in enumerate(contexts)
        for i, end in enumerate((" by the sea", " A"))
    ]
    lm = ours(Memory(facts(max_model_len=48)))
    with pytest.raises(TaskError) as caught:
        lm.loglikelihood(requests)
    first, second = (
        len(c) + len(t) - 47 for c, t in lm._encode_pairs([(text, " by the sea") for text in (long, longer)])
    )
    assert str(caught.value).split("; ")[0] == (
        f"m/t: 8 of 12 samples do not fit into max_model_len 48: two 2 of 3 by up to {first} tokens, "
        + ", ".join(f"more_{n} 1 of 1 by up to {second} tokens" for n in range(4))
        + " and 2 more subtasks"
    )


def test_an_answer_that_leaves_no_room_for_its_prompt_is_refused_in_any_case(ours: Any, log: RequestsLog) -> None:
    log.new()
    for overflow in Overflow:
        lm = ours(Memory(facts(max_model_len=48)), overflow=overflow)
        with pytest.raises(TaskError) as caught:
            lm.generate_until(generations(["Go:"], [{"max_gen_toks": 47}]))
        assert str(caught.value) == (
            "m/t: 1 of 1 samples leave no room for a context beside the answer in max_model_len 48: task 1 of 1 by up "
            "to 1 tokens; raise max_model_len to 49 and by what contexts need, lower the generated tokens (gen_kwargs: "
            "max_gen_toks)"
        )
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
    sent_by_stock = with_end(log.new(), "<|endoftext|>")
    channel = Memory(facts(max_model_len=48, methods=[Method.ECHO]))
    lm = ours(channel, overflow=Overflow.TRUNCATE)
    assert [lm.loglikelihood(pairs), lm.generate_until(prompts)] == expected
    assert distinct(log.new()) == distinct(sent_by_stock)
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
