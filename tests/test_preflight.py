"""What preflight says of servers that are good, silent, open, foreign, or wrong in one thing."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles import KEY, stand_in

from sweep.evaluating.preflight import (
    CONTEXTS,
    PROBE_TEXTS,
    Check,
    Expected,
    Facts,
    Inspection,
    Outcome,
    inspect,
)
from sweep.evaluating.scoring import EchoCall, LogProb, Method, NextTokenCall
from sweep.serving.server import Endpoint

BYTES = tuple(tuple(text.encode()) for text in PROBE_TEXTS)
"""The stand-in's tokenizer, where its model is no folder with one."""

EXPECTED = Expected(served_name="m", max_model_len=512, token_ids=BYTES)

NAMES = (
    *("key", "served name", "max_model_len", "completion logprobs", "chat logprobs", "echo", "tokenizer"),
    "next_token",
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with stand_in(tmp_path_factory.mktemp("server") / "log", max_model_len=512) as endpoint:
        yield endpoint


def look(endpoint: Endpoint, expected: Expected = EXPECTED) -> Inspection:
    return inspect(endpoint, {"m": expected})


def by_name(inspection: Inspection) -> dict[str, Check]:
    found = {check.name: check for check in inspection.checks}
    assert tuple(found) == NAMES  # each question is asked, whatever came of the others
    return found


def failed(inspection: Inspection) -> dict[str, str]:
    """Failed checks by name, each with what was asked, what came and what to do; the server is refused by them."""
    wrong = {n: check.detail for n, check in by_name(inspection).items() if check.outcome is Outcome.FAILED}
    assert inspection.facts is None
    assert inspection.refusal is not None
    assert inspection.refusal.startswith("m-0 is refused, ")
    for name, detail in wrong.items():
        assert f"{name}: {detail}" in inspection.refusal
    assert KEY not in str(inspection)
    return wrong


def noted(inspection: Inspection) -> dict[str, str]:
    assert inspection.refusal is None
    assert inspection.facts is not None
    return {n: check.detail for n, check in by_name(inspection).items() if check.outcome is Outcome.NOTED}


def facts_of(inspection: Inspection) -> Facts:
    assert inspection.facts is not None, inspection.refusal
    return inspection.facts


def test_a_good_server_is_used_with_every_method(endpoint: Endpoint) -> None:
    seen = look(endpoint)
    assert {check.outcome for check in by_name(seen).values()} == {Outcome.PASSED}
    facts = facts_of(seen)
    assert facts.methods == (Method.ECHO, Method.NEXT_TOKEN)
    assert (facts.notes, facts.checks) == ((), seen.checks)
    assert (facts.max_model_len, facts.engine_version) == (512, endpoint.engine_version)
    details = {name: check.detail for name, check in by_name(seen).items()}
    assert details == {
        "key": "401 without it, 200 with it",
        "served name": "'m' is in the list of models",
        "max_model_len": "512",
        "completion logprobs": details["completion logprobs"],
        "chat logprobs": "logprobs.content[].top_logprobs are there",
        "echo": "agrees with generation within 0.000",
        "tokenizer": "the same token ids for all 7 texts",
        "next_token": "alone within 0.000 of echo, mixed with echo within 0.000 of echo",
    }


def test_each_model_of_a_server_is_asked_for(endpoint: Endpoint) -> None:
    seen = inspect(endpoint, {"m": EXPECTED, "adapter": replace(EXPECTED, served_name="gone")})
    assert [check.name for check in seen.checks if check.model == "adapter"] == list(NAMES)
    assert {check.outcome for check in seen.checks if check.model == "m"} == {Outcome.PASSED}
    assert seen.facts is None
    assert seen.refusal is not None
    assert "adapter, served name: asked GET /v1/models for 'gone', got ['m']; another server listens" in seen.refusal
    assert "adapter, echo: asked POST /v1/completions with `logprobs: 1`, got 404: " in seen.refusal


# Who it is


def test_a_server_that_takes_anyone_is_refused(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", api_key="") as endpoint:
        wrong = failed(look(replace(endpoint, api_key=KEY)))
    assert list(wrong) == ["key"]
    assert wrong["key"].startswith("asked GET /v1/models without the key, got 200 where 401 was expected; another ")
    assert "does not check its key (vLLM: VLLM_API_KEY or --api-key)" in wrong["key"]


def test_a_server_that_wants_no_key_is_noted(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", api_key="") as endpoint:
        assert noted(look(endpoint)) == {"key": "no key is configured, and the server answers without one"}


def test_a_server_that_wants_a_key_where_none_is_configured_is_refused(endpoint: Endpoint) -> None:
    wrong = failed(look(replace(endpoint, api_key="")))
    assert "got 401" in wrong["key"]
    assert "give it as `api_key: ${oc.env:NAME}`" in wrong["key"]


def test_a_server_with_another_key_is_refused_without_showing_it(endpoint: Endpoint) -> None:
    seen = look(replace(endpoint, api_key="not-the-right-key"))
    assert "got 401" in failed(seen)["key"]
    assert "another key than the one configured here" in failed(seen)["key"]
    assert "not-the-right-key" not in str(seen)


def test_a_server_that_repeats_our_key_is_not_quoted_with_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NextTokenCall, "body", lambda _: {"prompt": [1], "model": KEY})
    assert "The model `***` does not exist" in noted(look(endpoint))["next_token"]


def test_a_server_of_other_models_is_refused_by_name(endpoint: Endpoint) -> None:
    wrong = failed(look(endpoint, replace(EXPECTED, served_name="other")))
    assert wrong["served name"].startswith("asked GET /v1/models for 'other', got ['m']; ")
    assert "`served_model_name:`" in wrong["served name"]


@pytest.mark.parametrize(
    ("limit", "wanted", "outcome", "words"),
    [
        (512, 512, Outcome.PASSED, "512"),
        (512, None, Outcome.PASSED, "512"),
        (256, 256, Outcome.NOTED, "256 as configured, the server would take 512"),
        (512, 1024, Outcome.FAILED, "asked for 1024 tokens of prompt plus answer, got max_model_len 512 in the list"),
        (1024, None, Outcome.FAILED, "asked for 1024 tokens of prompt plus answer, got max_model_len 512 in the list"),
    ],
)
def test_the_length_that_is_used_is_one_that_the_server_takes(
    limit: int, wanted: int | None, outcome: Outcome, words: str, endpoint: Endpoint
) -> None:
    seen = look(replace(endpoint, max_model_len=limit), replace(EXPECTED, max_model_len=wanted))
    check = by_name(seen)["max_model_len"]
    assert (check.outcome, check.detail.startswith(words)) == (outcome, True), check


# What its answers hold


def test_a_server_without_log_probabilities_is_refused_with_cause_and_cure(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", null_logprobs=1, max_model_len=512) as endpoint:
        wrong = failed(look(endpoint))
    assert list(wrong) == ["completion logprobs", "chat logprobs", "echo"]
    assert wrong["completion logprobs"].startswith(
        "asked POST /v1/completions with `logprobs: 1`, got `logprobs: null`; stock lm-eval would stop with "
        "`TypeError: 'NoneType' object is not subscriptable`. "
    )
    assert "llama-server (ggml-org/llama.cpp#11346) and mistral.rs" in wrong["completion logprobs"]
    assert "serve the model with vLLM" in wrong["completion logprobs"]


def test_stock_lm_eval_stops_with_the_error_that_is_named() -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    reply = {"choices": [{"index": 0, "logprobs": None}]}
    with pytest.raises(TypeError, match=r"^'NoneType' object is not subscriptable$"):
        LocalCompletionsAPI.parse_logprobs(reply, tokens=[[1, 2]], ctxlens=[1])


@pytest.mark.parametrize(("no_chat", "words"), [(1, "not offered (404)"), (2, "the model has no chat template")])
def test_a_model_without_chat_is_noted(no_chat: int, words: str, tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", no_chat=no_chat, max_model_len=512) as endpoint:
        (detail,) = noted(look(endpoint)).values()
    assert words in detail
    assert "not needed" in detail


def test_a_chat_without_the_log_probabilities_that_were_asked_for_is_refused(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", null_chat_logprobs=1, max_model_len=512) as endpoint:
        wrong = failed(look(endpoint))
    assert list(wrong) == ["chat logprobs"]
    assert wrong["chat logprobs"].startswith(
        "asked POST /v1/chat/completions with `logprobs: true, top_logprobs: 1`, got `logprobs: null`; "
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"no_echo": 1}, "got 1 entries; it ignores `echo`, as llama.cpp's llama-server does"),
        ({"echo_shift": 1}, "asked the log-probability of the likeliest next token after 4 contexts, generated and "),
        ({"echo_offset": -0.3}, "-0.800 by echo where it generates with -0.500"),
        ({"echo_offset": 0.3}, "-0.200 by echo where it generates with -0.500"),
        ({"echo_clip": 1}, "got -100.0 each time; it knows those of the likeliest tokens only"),
    ],
    ids=str,
)
def test_a_server_whose_echo_is_wrong_is_refused_with_the_numbers(
    options: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    with stand_in(tmp_path / "log", max_model_len=512, **options) as endpoint:
        seen = look(endpoint)
    wrong = failed(seen)
    assert list(wrong) == ["echo"]
    assert words in wrong["echo"]
    assert by_name(seen)["next_token"].detail == "not compared, since echo is not right"


def bent(monkeypatch: pytest.MonkeyPatch, kind: type, **changes: Any) -> None:
    """Let replies of this kind of call say something else."""
    original = kind.logprobs

    def logprobs(call: Any, reply: Any) -> Iterator[LogProb]:
        for answer in original(call, reply):
            changed = {name: change(answer, call) for name, change in changes.items()}
            if "logprob" in changed:
                changed["logprobs"] = (changed.pop("logprob"),)
            yield replace(answer, **changed)

    monkeypatch.setattr(kind, "logprobs", logprobs)


def test_one_near_tie_between_echo_and_generation_is_noted(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    bent(monkeypatch, EchoCall, is_greedy=lambda answer, call: answer.is_greedy and call.pair.context != CONTEXTS[2])
    seen = look(endpoint)
    assert facts_of(seen).methods == (Method.ECHO, Method.NEXT_TOKEN)
    assert noted(seen)["echo"].startswith("agrees with generation within 0.000; -0.500 by echo where it generates")


def test_rounding_of_one_bf16_logit_is_no_reason_against_echo(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in (EchoCall, NextTokenCall):
        bent(monkeypatch, kind, logprob=lambda answer, _: answer.logprob - 0.125)
    assert by_name(look(endpoint))["echo"].detail == "agrees with generation within 0.125"


# Its tokenizer


@pytest.mark.parametrize("no_tokenize", [0, 1])
def test_another_tokenizer_is_refused_with_the_first_difference(no_tokenize: int, tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", max_model_len=512, other_tokenizer=1, no_tokenize=no_tokenize) as endpoint:
        wrong = failed(look(endpoint))
    assert list(wrong) == ["tokenizer"]
    how = "an echoed text, since it has no /tokenize" if no_tokenize else "POST /tokenize"
    assert wrong["tokenizer"].startswith(f"asked for the token ids of 7 texts ({how}), got others for 7, the first ")
    assert f"{PROBE_TEXTS[0]!r}: [21608, 25888, 29045] from token 0 on (22 in all)" in wrong["tokenizer"]
    assert "where our tokenizer has [84, 104, 101] (44 in all); name the tokenizer" in wrong["tokenizer"]


def test_the_ids_around_a_late_difference_are_shown(endpoint: Endpoint) -> None:
    changed = (*BYTES[:3], (*BYTES[3][:5], 1, *BYTES[3][6:]), *BYTES[4:])
    wrong = failed(look(endpoint, replace(EXPECTED, token_ids=changed)))
    ours, theirs = [changed[3][4], 1, *BYTES[3][6:8]], list(BYTES[3][4:8])
    assert f"got others for 1, the first {PROBE_TEXTS[3]!r}: {theirs} from token 4 on" in wrong["tokenizer"]
    assert f"our tokenizer has {ours}" in wrong["tokenizer"]


def test_a_server_without_tokenize_shows_its_tokens_by_echo(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", max_model_len=512, no_tokenize=1) as endpoint:
        detail = by_name(look(endpoint))["tokenizer"].detail
    assert detail == "the same token ids for all 7 texts, by an echoed text, since it has no /tokenize"


def test_a_server_without_token_ids_is_compared_by_their_number(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", max_model_len=512, no_tokenize=2) as endpoint:
        seen = look(endpoint)
        other = failed(look(endpoint, replace(EXPECTED, token_ids=(BYTES[0][1:], *BYTES[1:]))))
    assert noted(seen)["tokenizer"].startswith("compared by the number of tokens only: it has no /tokenize")
    assert by_name(seen)["echo"].outcome is Outcome.PASSED
    assert other["tokenizer"].startswith("asked the number of tokens of 7 texts, got [44, ")
    assert "where we have [43, " in other["tokenizer"]


def test_without_a_local_tokenizer_nothing_is_compared(endpoint: Endpoint) -> None:
    seen = look(endpoint, replace(EXPECTED, token_ids=()))
    assert noted(seen) == {"tokenizer": "not compared, the local tokenizer is not known"}


# Servers that do not answer


def test_a_server_that_is_gone_fails_each_check_with_its_address(endpoint: Endpoint) -> None:
    seen = look(replace(endpoint, url="http://127.0.0.1:9"))
    wrong = failed(seen)
    assert [*wrong, "next_token"] == list(NAMES)
    for detail in wrong.values():
        assert detail.startswith("m-0 at http://127.0.0.1:9 cannot be reached (ClientConnectorError: ")
    assert seen.passing


def answers_with(status: int, monkeypatch: pytest.MonkeyPatch, *, path: str = "", unless: str = "no key") -> None:
    """Let the server answer so on `path`; a request with the header `unless` is answered as always."""
    import aiohttp

    start = aiohttp.ClientResponse.start

    async def started(response: aiohttp.ClientResponse, connection: Any) -> aiohttp.ClientResponse:
        await start(response, connection)
        if path in response.url.path and unless not in response.request_info.headers:
            response.status = status
        return response

    monkeypatch.setattr(aiohttp.ClientResponse, "start", started)


@pytest.mark.parametrize(("status", "passing"), [(429, True), (500, True), (503, True), (501, False), (418, False)])
def test_a_server_that_is_busy_or_failing_may_do_better_another_time(
    status: int, passing: bool, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_with(status, monkeypatch, path="/v1/completions")
    seen = look(endpoint)
    assert f"got {status}: " in failed(seen)["completion logprobs"]
    assert seen.passing is passing


def test_a_server_that_takes_few_requests_at_a_time_is_asked_again(tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", busy_above=4, latency_s=0.02, max_model_len=512) as endpoint:
        assert facts_of(look(endpoint)).methods == (Method.ECHO, Method.NEXT_TOKEN)


@pytest.mark.parametrize("key", ["token", "1", "m"])
def test_a_key_that_stands_in_every_answer_spoils_none(key: str, tmp_path: Path) -> None:
    with stand_in(tmp_path / "log", api_key=key, max_model_len=512) as endpoint:
        assert facts_of(look(endpoint)).methods == (Method.ECHO, Method.NEXT_TOKEN)


def test_one_thing_that_will_not_pass_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_with(503, monkeypatch, path="/tokenize")
    with stand_in(tmp_path / "log", null_chat_logprobs=1) as endpoint:
        seen = look(endpoint)
    assert "chat logprobs" in failed(seen)
    assert not seen.passing


def test_a_list_of_models_that_everyone_may_read_is_noted_where_completions_want_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_with(200, monkeypatch, path="/v1/models", unless="Authorization")
    assert noted(look(endpoint))["key"] == "the list of models is open to everyone, completions want the key"


def test_a_server_that_does_not_answer_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.evaluating.preflight.TIMEOUT_S", 0.5)
    with stand_in(tmp_path / "log", latency_s=5.0, max_model_len=512) as endpoint:
        wrong = failed(look(endpoint))
        assert wrong["completion logprobs"] == (
            f"m-0 at {endpoint.url} did not answer within 0.5 s; see its log, or ask it by hand"
        )
    late = {"chat logprobs", "echo", "tokenizer"}
    assert {wrong[name] for name in late} == {"not asked, since an earlier question had no answer in time"}
    assert set(wrong) == {"completion logprobs", *late}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<html>welcome</html>", "got 200: <html>welcome</html> (JSON is malformed"),
        (b"[]", "got 200: [] (Expected `object`, got `array`)"),
        (b'{"data": [{"name": "m"}]}', "(Object missing required field `id` - at `$.data[0]`)"),
    ],
)
def test_another_kind_of_server_is_refused_with_its_own_words(
    answer: bytes, words: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import aiohttp

    async def text(*_: Any, **__: Any) -> str:
        return answer.decode()

    monkeypatch.setattr(aiohttp.ClientResponse, "text", text)
    assert words in failed(look(endpoint))["served name"]


# How it can be scored


def only_echo(endpoint: Endpoint) -> str:
    """The note of a server that is scored by echo alone."""
    seen = look(endpoint)
    facts = facts_of(seen)
    assert facts.methods == (Method.ECHO,)
    (note,) = facts.notes
    assert note == f"next_token is not used: {noted(seen)['next_token']}"
    return note


def test_other_log_probabilities_than_echo_leave_echo_alone(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent(monkeypatch, NextTokenCall, logprob=lambda answer, _: answer.logprob - 0.25 * (answer.index == 5))
    assert "alone it differs from echo by up to 0.250 in log-likelihood" in only_echo(endpoint)


def test_where_echo_differs_from_itself_a_method_may_differ_as_much(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bf16, where batches of another size round a logit to its other neighbour."""
    times: dict[int, int] = {}

    def rounded(answer: LogProb, call: Any) -> float:
        # The contexts' own echo check has index 0 and one pair; the reference comes all at once and then one by one.
        times[answer.index] = times.get(answer.index, 0) + 1
        return answer.logprob - 0.125 * (answer.index == 5 and times[5] == 2)

    bent(monkeypatch, EchoCall, logprob=rounded)
    bent(monkeypatch, NextTokenCall, logprob=lambda answer, _: answer.logprob - 0.1 * (answer.index == 5))
    seen = look(endpoint)
    assert facts_of(seen).methods == (Method.ECHO, Method.NEXT_TOKEN)
    (check,) = [check for check in seen.checks if check.name == "next_token"]
    assert "alone within 0.100 of echo, which differs from itself by 0.125" in check.detail


@pytest.mark.parametrize("always", [True, False])
def test_a_method_that_is_wrong_about_greedy_tokens_leaves_echo_alone(
    always: bool, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent(monkeypatch, NextTokenCall, is_greedy=lambda *_: always)
    assert "it disagrees with echo about greedy tokens" in only_echo(endpoint)


def test_one_near_tie_is_no_reason_against_a_method(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    bent(monkeypatch, NextTokenCall, is_greedy=lambda answer, _: answer.is_greedy != (answer.index == 1))
    assert facts_of(look(endpoint)).methods == (Method.ECHO, Method.NEXT_TOKEN)


def test_a_method_that_spoils_echo_in_the_same_batch_is_not_used(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[NextTokenCall] = []
    original = NextTokenCall.body

    def body(call: NextTokenCall, *more: NextTokenCall) -> dict[str, Any]:
        asked.extend([call, *more])
        return original(call, *more)

    monkeypatch.setattr(NextTokenCall, "body", body)
    # Each context is asked once alone; whatever is echoed after that is echoed beside the second time.
    bent(monkeypatch, EchoCall, logprob=lambda answer, _: answer.logprob - 0.5 * (len(asked) > len(CONTEXTS)))
    assert "mixed with echo it differs from echo by up to 0.500" in only_echo(endpoint)


def test_a_server_that_refuses_the_method_is_scored_by_echo(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NextTokenCall, "body", lambda call, *_: {"prompt": call.context, "stream": True})
    assert "asked POST /v1/completions to score by next_token, got 400: " in only_echo(endpoint)


def test_a_server_that_ignores_the_method_is_scored_by_echo(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(*calls: NextTokenCall) -> dict[str, Any]:
        return {"prompt": [call.context for call in calls], "temperature": 0, "max_tokens": 1, "logprobs": 1}

    monkeypatch.setattr(NextTokenCall, "body", body)
    assert "does not support `logprob_token_ids`" in only_echo(endpoint)
