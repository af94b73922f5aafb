"""Requests to calls and replies to answers; what the methods must have in common."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec
import pytest
from conftest import StandIn
from hypothesis import given
from hypothesis import strategies as st

from sweep.errors import PassingFault, RequestError
from sweep.evaluating.scoring import (
    NEXT_TOKEN_MOST,
    EchoCall,
    GenerateCall,
    LogProb,
    NextTokenCall,
    Scored,
    scoring_calls,
)

tokens = st.lists(st.integers(1, 400), min_size=1, max_size=3).map(tuple)


def pair(index: int = 0, context: Sequence[int] = (1, 2), continuation: Sequence[int] = (3, 4)) -> Scored:
    return Scored(index=index, context=tuple(context), continuation=tuple(continuation))


def answered(calls: Sequence[EchoCall | NextTokenCall]) -> Counter[int]:
    """How often each index is answered."""
    found: Counter[int] = Counter()
    for call in calls:
        found.update(
            [call.pair.index] if isinstance(call, EchoCall) else [i for s in call.indices_by_token.values() for i in s]
        )
    return found


@given(st.lists(st.tuples(tokens, tokens), max_size=40), st.booleans())
def test_every_pair_is_answered_by_exactly_one_call(pairs: list[Any], next_token: bool) -> None:
    scored = [pair(index, context, continuation) for index, (context, continuation) in enumerate(pairs)]
    calls = scoring_calls(scored, next_token=next_token)
    assert answered(calls) == Counter(range(len(pairs)))
    for call in calls:
        if isinstance(call, EchoCall):
            assert not next_token or len(call.pair.continuation) > 1
            continue
        assert next_token
        for token, indices in call.indices_by_token.items():
            assert all(scored[i].context == call.context and scored[i].continuation == (token,) for i in indices)


def test_the_letters_of_one_question_share_a_request() -> None:
    (call,) = scoring_calls([pair(i, (1, 2, 3), (10 + i,)) for i in range(4)], next_token=True)
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
    calls = scoring_calls([pair(i, (1,), (i,)) for i in range(2 * NEXT_TOKEN_MOST + 1)], next_token=True)
    assert [len(call.indices_by_token) for call in calls if isinstance(call, NextTokenCall)] == [128, 128, 1]
    assert answered(calls) == Counter(range(2 * NEXT_TOKEN_MOST + 1))


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
    assert list(call.logprobs(reply)) == [LogProb(index=7, logprob=-3.0, is_greedy=greedy)]


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
    call = GenerateCall(index=0, prompt=(1, 2), parameters={"max_tokens": 9, "stop": ["x"]})
    assert call.body() == {"prompt": (1, 2), "max_tokens": 9, "stop": ["x"]}
    assert call.tokens == 11
    choice = {"text": "yes", "finish_reason": "stop"}
    found = call.generation({"choices": [choice], "usage": {"completion_tokens": 2}})
    assert (found.text, found.finish_reason, found.tokens) == ("yes", "stop", 2)
    with pytest.raises(RequestError, match="without text"):
        call.generation({"choices": [{**choice, "text": None}], "usage": {"completion_tokens": 2}})


def test_next_token_and_echo_agree_on_a_server(stand_in: Callable[..., StandIn]) -> None:
    server = stand_in()
    pairs = [pair(8 * i + j, range(3 + i, 9 + 2 * i), (20 + 3 * j,)) for i in range(5) for j in range(8)]
    # The stand-in's own best tokens, so that greedy ones are among them.
    pairs += [pair(40 + i, range(3 + i, 9 + 2 * i), (token,)) for i in range(5) for token in [best(server, i)]]

    def answers(calls: Sequence[EchoCall | NextTokenCall]) -> dict[int, LogProb]:
        replies = asyncio.run(posted(server, [call.body() for call in calls]))
        return {a.index: a for call, reply in zip(calls, replies, strict=True) for a in call.logprobs(reply)}

    shared = scoring_calls(pairs, next_token=True)
    assert len(shared) == 5
    assert answers(shared) == answers(scoring_calls(pairs, next_token=False))
    assert [i for i, a in sorted(answers(shared).items()) if a.is_greedy][-5:] == [40, 41, 42, 43, 44]


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
    call = GenerateCall(index=0, prompt=(1,), parameters={"max_tokens": 9})
    reply = {"choices": [{"text": "half an", "finish_reason": reason}], "usage": {"completion_tokens": 2}}
    with pytest.raises(PassingFault, match="gave up an answer"):
        call.generation(reply)
    pair = Scored(index=0, context=(1,), continuation=(2,))
    for scoring in scoring_calls([pair], next_token=False) + scoring_calls([pair], next_token=True):
        with pytest.raises(PassingFault):
            list(scoring.logprobs({"choices": [{"finish_reason": reason, "logprobs": None}]}))
