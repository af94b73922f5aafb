"""Requests to calls and replies to answers; what the methods must have in common."""

import asyncio
import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
import pytest
from conftest import StandIn
from hypothesis import given, settings
from hypothesis import strategies as st

from sweep.errors import PassingFault, RequestError
from sweep.evaluating.scoring import (
    NEXT_TOKEN_MOST,
    EchoCall,
    ForcedCall,
    GenerateCall,
    LogProb,
    Method,
    NextTokenCall,
    Packed,
    PromptCall,
    Scored,
    ScoringCall,
    TailCall,
    calls_by,
    edges_of,
    scoring_calls,
)


def pair(index: int = 0, context: Sequence[int] = (1, 2), continuation: Sequence[int] = (3, 4)) -> Scored:
    return Scored(index=index, context=tuple(context), continuation=tuple(continuation))


ALL = (Method.ECHO, Method.PROMPT, Method.NEXT_TOKEN, Method.FORCED, Method.TAIL)

VOCABULARY = 40


@functools.cache
def row(context: tuple[int, ...]) -> tuple[float, ...]:
    """Log-probabilities after `context` in a toy model, a few of them equal."""
    rng = random.Random(str(context))
    weights = [rng.choice((1, 1, 2, 5, 5, 9)) for _ in range(VOCABULARY)]
    return tuple(math.log(weight / sum(weights)) for weight in weights)


def reply_of(call: ScoringCall, body: Mapping[str, Any], prompt: Sequence[int]) -> dict[str, Any]:
    """What vLLM would answer for one prompt of a body, with the toy model behind it."""
    rows = [row(tuple(prompt[:i])) for i in range(1, len(prompt) + 1)]
    if isinstance(call, EchoCall):
        own = [rows[i - 1][prompt[i]] for i in range(1, len(prompt))]
        top = [{"best": max(some), "own": o} for some, o in zip(rows, own, strict=False)]
        return {
            "choices": [{"logprobs": {"token_logprobs": [None, *own, -1], "top_logprobs": [None, *top, {"x": -1}]}}]
        }
    if isinstance(call, NextTokenCall):
        best = max(range(VOCABULARY), key=lambda t: rows[-1][t])
        top_ids = {f"token_id:{t}": rows[-1][t] for t in (*body["logprob_token_ids"], best)}
        return {"choices": [{"logprobs": {"top_logprobs": [top_ids]}}]}
    if isinstance(call, PromptCall):
        told = [
            {str(t): {"logprob": some[t]}, "b": {"logprob": max(some)}}
            for some, t in zip(rows, prompt[1:], strict=False)
        ]
        return {"choices": [{}], "prompt_logprobs": [None, *told]}
    if isinstance(call, TailCall):
        tail = [
            {str(t): {"logprob": some[t]}, "b": {"logprob": max(some)}}
            for some, t in zip(rows[len(call.context) - 1 :], call.continuation, strict=False)
        ]
        cached = len(prompt) - random.Random(str(prompt)).randrange(1, len(prompt))
        computed = [None, *tail][-(len(prompt) - cached) :] if cached > 1 else [None, *tail]
        usage = {"prompt_tokens_details": {"cached_tokens": cached}}
        return {"choices": [{}], "prompt_logprobs": computed, "usage": usage}
    extra = body["vllm_xargs"]
    which = extra["sums"].index(sum(prompt))
    start = sum(extra["lengths"][:which])
    forced = extra["forced"][start : start + extra["lengths"][which]]
    own, greedy = [], 0
    for i, token in enumerate(forced):
        some = row((*prompt, *forced[:i]))
        own.append(some[token])
        greedy += some[token] >= max(some) and greedy == i
    written = [*forced, extra["verdicts"][1 + greedy]]
    return {"choices": [{"logprobs": {"tokens": [f"token_id:{t}" for t in written], "token_logprobs": [*own, 0.0]}}]}


def answers_of(pairs: Sequence[Scored], methods: Sequence[Method], together: int = 3) -> dict[int, LogProb]:
    """All answers, some calls of a group in one request, what is missing by echo."""
    calls, assembly = scoring_calls(pairs, methods=methods)
    found: dict[int, LogProb] = {}
    while calls:
        first, *more = calls[
            : next((i for i, c in enumerate(calls) if c.group != calls[0].group or i == together), None)
        ]
        more = more if first.group is not None else []
        body = first.body(*more)
        prompts = body.get("prompt") or body["token_ids"]
        for call, prompt in zip((first, *more), prompts if more else [prompts], strict=True):
            for whole in assembly.add(list(call.logprobs(reply_of(call, body, prompt)))):
                assert whole.index not in found
                found[whole.index] = whole
        calls = calls[1 + len(more) :]
    if missing := assembly.missing():
        assert Method.TAIL in methods, "only a cache that reaches too far leaves something to echo"
        found |= answers_of(missing, (Method.ECHO,))
    return found


toy = st.integers(0, 9)
heads = st.sampled_from([(1,), (1, 2), (1, 2, 3), tuple(range(30)), tuple(range(8)) * 20, (2, 1)])
contexts = st.tuples(heads, st.lists(toy, max_size=2).map(tuple)).map(lambda parts: parts[0] + parts[1])
continuations = st.lists(st.integers(3, 6), min_size=1, max_size=6).map(tuple)


@settings(deadline=None)  # the toy model is slow where nothing is remembered yet
@given(st.lists(st.tuples(contexts, continuations), max_size=24), st.sets(st.sampled_from(ALL)))
def test_every_method_gives_what_echo_gives(pairs: list[Any], methods: set[Method]) -> None:
    """Shared prefixes, repeats, one continuation the beginning of another: all of them occur among so few tokens."""
    scored = [pair(index, context, continuation) for index, (context, continuation) in enumerate(pairs)]
    ours, echo = answers_of(scored, sorted(methods)), answers_of(scored, (Method.ECHO,))
    assert ours.keys() == echo.keys() == set(range(len(pairs)))
    assert {i: a.is_greedy for i, a in ours.items()} == {i: a.is_greedy for i, a in echo.items()}
    assert [ours[i].logprobs for i in range(len(pairs))] == [echo[i].logprobs for i in range(len(pairs))]


def methods_used(pairs: Sequence[Scored], methods: Sequence[Method]) -> Counter[Method]:
    return Counter(call.method for call in scoring_calls(pairs, methods=methods)[0])


def test_long_contexts_are_computed_once_and_short_ones_echoed() -> None:
    def choices(context: int) -> list[Scored]:
        return [pair(i, range(context), range(100 * i, 100 * i + 8)) for i in range(4)]

    assert methods_used(choices(600), ALL) == {Method.FORCED: 4}
    assert methods_used(choices(600), (Method.ECHO, Method.TAIL)) == {Method.TAIL: 4}
    assert methods_used(choices(600), (Method.ECHO, Method.NEXT_TOKEN)) == {Method.ECHO: 4}
    assert methods_used(choices(20), ALL) == {Method.PROMPT: 4}
    assert methods_used(choices(20), (Method.ECHO, Method.FORCED)) == {Method.ECHO: 4}


def test_what_would_save_next_to_nothing_is_asked_whole_like_all_else() -> None:
    def question(number: int, context: int) -> list[Scored]:
        begin = (1000 + number,)
        return [pair(4 * number + i, (*begin, *range(context)), range(100 * i, 100 * i + 8)) for i in range(4)]

    short = [one for number in range(50) for one in question(number, 20)]
    one_more, ten_more = question(50, 100), [one for number in range(50, 60) for one in question(number, 100)]
    assert methods_used([*short, *one_more], ALL) == {Method.PROMPT: 204}
    assert methods_used([*short, *ten_more], ALL) == {Method.PROMPT: 200, Method.FORCED: 40}


def test_first_tokens_that_choices_share_are_asked_once() -> None:
    """`(A`, `(B`, ...: the bracket once, then all letters at once."""
    pairs = [pair(i, range(300), (500, 600 + i)) for i in range(4)]
    calls, _ = scoring_calls(pairs, methods=ALL)
    assert [call.method for call in calls] == [Method.NEXT_TOKEN, Method.NEXT_TOKEN]
    assert [len(call.indices_by_token) for call in calls if isinstance(call, NextTokenCall)] == [1, 4]


def test_what_two_contexts_ask_alike_is_asked_once() -> None:
    long = tuple(range(30)) * 10
    pairs = [pair(i, long, (0, 7 + i)) for i in range(4)] + [pair(4, (*long, 0), (7,))]
    calls, assembly = scoring_calls(pairs, methods=ALL)
    for call in calls:
        assembly.add(list(call.logprobs(reply_of(call, call.body(), call.context))))  # type: ignore[union-attr]
    assert [call.method for call in calls] == [Method.NEXT_TOKEN] * 2
    assert not assembly.missing()


@pytest.mark.parametrize("behind", [[], [0], [9], [1, 1]], ids=["nothing", "not known", "no verdict", "too much"])
def test_a_forced_answer_that_does_not_say_what_was_greedy_is_left_to_echo(behind: list[int]) -> None:
    call = ForcedCall(context=(1,), continuation=(5, 6), indices=(0,), verdicts=(0, 1, 2, 3), batch=0)
    written = [f"token_id:{token}" for token in (5, 6, *behind)]
    reply = {"choices": [{"logprobs": {"tokens": written, "token_logprobs": [-1.0] * len(written)}}]}
    assert list(call.logprobs(reply)) == []


@pytest.mark.parametrize(("cached", "rows"), [(3, 3), (5, 1), (0, 4)])
def test_a_tail_that_lacks_rows_is_left_to_echo(cached: int, rows: int) -> None:
    """A prompt that was begun twice has been read from a later place the second time."""
    call = TailCall(context=(1, 2, 3, 4), continuation=(5, 5), indices=(0,))
    usage = {"prompt_tokens_details": {"cached_tokens": cached}}
    found = [None, *[{"5": {"logprob": -1.0}}] * (rows - 1)]
    got = list(call.logprobs({"choices": [{}], "usage": usage, "prompt_logprobs": found}))
    assert [answer.logprobs for answer in got] == ([(-1.0, -1.0)] if (cached, rows) == (3, 3) else [])


@pytest.mark.parametrize(
    "rows",
    [
        [None],
        [None, {"5": {"logprob": -1.0}}],
        [None, *[{"6": {"logprob": -1.0}}] * 2],
        [None, *[{"5": {"logprob": None}, "6": {"logprob": -1.0}}] * 2],
    ],
    ids=["none", "too few", "of another token", "no number"],
)
def test_a_prompt_without_its_own_rows_is_left_to_echo(rows: list[Any]) -> None:
    call = PromptCall(pair=pair(0, (1,), (5, 5)))
    assert list(call.logprobs({"choices": [{}], "prompt_logprobs": rows})) == []


def test_a_request_never_forces_behind_two_contexts_of_one_sum() -> None:
    pairs = [pair(i, (*range(300), i, 9 - i), range(700, 708)) for i in range(10)]
    calls, _ = scoring_calls(pairs, methods=(Method.FORCED,))
    assert methods_used(pairs, (Method.FORCED,)) == {Method.FORCED: 10}
    assert len({call.group for call in calls}) == 10


def test_the_letters_of_one_question_share_a_request() -> None:
    (call,), _ = scoring_calls([pair(i, (1, 2, 3), (10 + i,)) for i in range(4)], methods=ALL)
    assert call.body() == {
        "prompt": (1, 2, 3),
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "logprob_token_ids": [10, 11, 12, 13],
        "return_tokens_as_token_ids": True,
        "seed": 1234,
        "ignore_eos": True,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    assert call.tokens == 4


def test_more_continuations_than_one_request_may_ask_for_are_split() -> None:
    calls, _ = scoring_calls([pair(i, (1,), (i,)) for i in range(2 * NEXT_TOKEN_MOST + 1)], methods=ALL)
    asked = [call.indices_by_token for call in calls if isinstance(call, NextTokenCall)]
    assert [len(some) for some in asked] == [128, 128, 1]
    assert sorted(i for some in asked for indices in some.values() for i in indices) == list(range(257))


def test_a_scoring_request_is_the_one_that_stock_lm_eval_sends() -> None:
    call = EchoCall(pair=pair(0, (1, 2), (3, 4, 5)))
    assert call.body() == {
        "prompt": [1, 2, 3, 4, 5],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    assert call.tokens == 6


def echo_reply(logprobs: Sequence[float | None], best: Sequence[float | None]) -> dict[str, Any]:
    """Of a prompt and the one token that vLLM generates behind it."""
    top = [None if b is None else {" a": t, " b": b} for t, b in zip(logprobs, best, strict=True)]
    return {"choices": [{"logprobs": {"token_logprobs": list(logprobs), "top_logprobs": top}}]}


@pytest.mark.parametrize(
    ("best", "greedy"),
    [
        ([None, -0.1, -1.0, -2.0, -0.1], True),
        ([None, -0.1, -1.5, -3.0, -0.1], True),
        ([None, -0.1, -0.9, -2.0, -0.1], False),
        ([None, -0.1, -1.0, -1.9, -0.1], False),
    ],
    ids=["ties are greedy", "the only best", "first token beaten", "last token beaten"],
)
def test_an_echo_reply_counts_the_continuation_alone(best: list[float | None], greedy: bool) -> None:
    reply = echo_reply([None, -5.0, -1.0, -2.0, -9.0], best)
    call = EchoCall(pair=pair(7, (1, 2), (3, 4)))
    assert list(call.logprobs(reply)) == [LogProb(index=7, start=2, logprobs=(-1.0, -2.0), is_greedy=greedy)]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": [{"logprobs": None}]}, "`logprobs: null`"),
        ({"choices": [{}]}, "`logprobs: null`"),
        (echo_reply([None, -5.0, -1.0], [None, -1.0, -1.0]), "lacks log-probabilities for tokens 2 to 3"),
        (echo_reply([None, -5.0, -1.0, None, -1.0], [None, -1.0, -1.0, -1.0, -1.0]), "lacks log-probabilities"),
        (echo_reply([None, -5.0, -1.0, -1.0, -1.0], [None, -1.0, -1.0, None, -1.0]), "lacks log-probabilities"),
        ({"choices": [{"logprobs": {"token_logprobs": [None, -1, -1, -1], "top_logprobs": None}}]}, "lacks"),
        ({"choices": [{"logprobs": {"token_logprobs": None, "top_logprobs": None}}]}, "lacks"),
        ({"choices": [{"logprobs": {"text_offset": []}}]}, "lacks"),
    ],
)
def test_an_echo_reply_without_log_probabilities_is_refused_in_words(reply: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        list(EchoCall(pair=pair()).logprobs(reply))


def next_reply(**logprob_by_token: float) -> dict[str, Any]:
    """`t5=-1.0` is token 5."""
    top = {f"token_id:{name[1:]}": logprob for name, logprob in logprob_by_token.items()}
    return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}


def test_a_next_token_reply_answers_every_index_and_ties_are_greedy() -> None:
    call = NextTokenCall(context=(1,), indices_by_token={5: (0, 3), 6: (1,), 7: (2,)})
    found = {answer.index: answer for answer in call.logprobs(next_reply(t9=-0.5, t5=-0.5, t6=-1.0, t7=-2.0))}
    assert {index: answer.logprob for index, answer in found.items()} == {0: -0.5, 3: -0.5, 1: -1.0, 2: -2.0}
    assert [found[index].is_greedy for index in range(4)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": [{"logprobs": None}]}, "`logprobs: null`"),
        (next_reply(t5=-1.0), r"lacks token id 6 .*\['token_id:5'\]"),
        (next_reply(), "lacks token id 5"),
        ({"choices": [{"logprobs": {"top_logprobs": []}}]}, "lacks token id 5"),
        ({"choices": [{"logprobs": {"top_logprobs": None}}]}, "lacks token id 5"),
        ({"choices": [{"logprobs": {"top_logprobs": [None]}}]}, "lacks token id 5"),
    ],
)
def test_a_next_token_reply_that_lacks_a_token_is_refused_in_words(reply: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        list(NextTokenCall(context=(1,), indices_by_token={5: (0,), 6: (1,)}).logprobs(reply))


def test_a_generation_is_text_its_end_and_its_length() -> None:
    call = GenerateCall(index=0, prompt=Packed((1, 2)), parameters={"max_tokens": 9, "stop": ["x"]})
    assert call.body() == {"prompt": [1, 2], "max_tokens": 9, "stop": ["x"]}
    assert call.tokens == 11
    choice = {"text": "yes", "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 2}
    found = call.generation({"choices": [choice], "usage": usage})
    assert (found.text, found.finish_reason, found.tokens) == ("yes", "stop", 2)
    with pytest.raises(RequestError, match="without text"):
        call.generation({"choices": [{**choice, "text": None}], "usage": usage})
    with pytest.raises(RequestError, match="read 1 tokens of a prompt of 2"):
        call.generation({"choices": [choice], "usage": {**usage, "prompt_tokens": 1}})


def test_next_token_and_echo_agree_on_a_server(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    pairs = [pair(8 * i + j, range(3 + i, 9 + 2 * i), (20 + 3 * j,)) for i in range(5) for j in range(8)]
    # The stand-in's own best tokens, so that greedy ones are among them.
    pairs += [pair(40 + i, range(3 + i, 9 + 2 * i), (token,)) for i in range(5) for token in [best(server, i)]]

    def answers(methods: Sequence[Method]) -> dict[int, LogProb]:
        calls, assembly = scoring_calls(pairs, methods=methods)
        replies = asyncio.run(posted(server, [call.body() for call in calls]))
        found = [assembly.add(list(call.logprobs(reply))) for call, reply in zip(calls, replies, strict=True)]
        return {answer.index: answer for whole in found for answer in whole}

    assert methods_used(pairs, (Method.NEXT_TOKEN,)) == {Method.NEXT_TOKEN: 5}
    shared = answers((Method.NEXT_TOKEN,))
    assert shared == answers((Method.ECHO,))
    assert [i for i, a in sorted(shared.items()) if a.is_greedy][-5:] == [40, 41, 42, 43, 44]


def best(server: StandIn, i: int) -> int:
    body = {"prompt": list(range(3 + i, 9 + 2 * i)), "max_tokens": 1, "logprobs": 1, "return_tokens_as_token_ids": True}
    (reply,) = asyncio.run(posted(server, [body]))
    return int(reply["choices"][0]["logprobs"]["tokens"][0].removeprefix("token_id:"))


async def posted(server: StandIn, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {server.endpoint.api_key}", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(headers=headers) as session:

        async def post(body: dict[str, Any]) -> dict[str, Any]:
            data = msgspec.json.encode(body)
            async with session.post(f"{server.endpoint.url}/v1/completions", data=data) as response:
                return dict(await response.json())

        return list(await asyncio.gather(*(post(body) for body in bodies)))


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_an_answer_that_a_server_gave_up_is_none(reason: str | None) -> None:
    """vLLM that gets SIGTERM ends what is in flight with the text so far, `abort` and status 200."""
    call = GenerateCall(index=0, prompt=Packed((1,)), parameters={"max_tokens": 9})
    reply = {
        "choices": [{"text": "half an", "finish_reason": reason}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    with pytest.raises(PassingFault, match="gave up an answer"):
        call.generation(reply)
    pair = Scored(index=0, context=(1,), continuation=(2,))
    for scoring in [call for method in ALL for call in calls_by(method, edges_of([pair]))]:
        with pytest.raises(PassingFault):
            list(scoring.logprobs({"choices": [{"finish_reason": reason, "logprobs": None}]}))
