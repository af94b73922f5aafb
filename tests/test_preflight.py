"""What preflight says of servers that are good, silent, open, foreign, or wrong in one method."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles import stand_in

from sweep.errors import ServerError
from sweep.preflight import inspect
from sweep.scoring import EchoCall, LogProb, Method, NextTokenCall
from sweep.server import Endpoint


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with stand_in(tmp_path_factory.mktemp("server") / "log", max_model_len=512) as endpoint:
        yield endpoint


def test_a_good_server_is_used_with_every_method(endpoint: Endpoint) -> None:
    facts = inspect(endpoint, ("m",))
    assert facts.methods == (Method.ECHO, Method.NEXT_TOKEN)
    assert facts.notes == ()
    assert (facts.max_model_len, facts.engine_version) == (512, endpoint.engine_version)


def test_a_server_without_log_probabilities_is_refused_with_the_cause(tmp_path: Path) -> None:
    with (
        stand_in(tmp_path / "log", null_logprobs=1) as endpoint,
        pytest.raises(ServerError, match=r"m-0 failed the echo probe: .*`logprobs: null`"),
    ):
        inspect(endpoint, ("m",))


def test_a_server_that_takes_anyone_is_refused(tmp_path: Path) -> None:
    with (
        stand_in(tmp_path / "log", api_key="") as endpoint,
        pytest.raises(ServerError, match=r"answered 200 without a key, 401 was expected: another server listens there"),
    ):
        inspect(endpoint, ("m",))


def test_a_server_with_another_key_is_refused(endpoint: Endpoint) -> None:
    with pytest.raises(ServerError, match="answered 401 to our key") as caught:
        inspect(replace(endpoint, api_key="not-the-right-key"), ("m",))
    assert "not-the-right-key" not in str(caught.value)


def test_a_server_of_other_models_is_refused_by_name(endpoint: Endpoint) -> None:
    with pytest.raises(ServerError, match=r"m-0 serves \['m'\], not \['adapter', 'other'\]"):
        inspect(endpoint, ("m", "other", "adapter"))


def test_a_server_that_is_gone_is_said_with_its_name(endpoint: Endpoint) -> None:
    with pytest.raises(ServerError, match="preflight of m-0: ClientConnectorError"):
        inspect(replace(endpoint, url="http://127.0.0.1:9"), ("m",))


def test_a_server_that_does_not_answer_is_said_with_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.preflight.TIMEOUT_S", 0.5)
    with (
        stand_in(tmp_path / "log", latency_s=5.0) as endpoint,
        pytest.raises(ServerError, match=r"m-0 did not answer a probe within 0\.5 s"),
    ):
        inspect(endpoint, ("m",))


def only_echo(endpoint: Endpoint) -> str:
    """The note of a server that is scored by echo alone."""
    facts = inspect(endpoint, ("m",))
    assert facts.methods == (Method.ECHO,)
    (note,) = facts.notes
    assert note.startswith("next_token is not used: ")
    return note


def bent(monkeypatch: pytest.MonkeyPatch, kind: type, **changes: Any) -> None:
    """Let replies of this kind of call say something else."""
    original = kind.logprobs

    def logprobs(call: Any, reply: Any) -> Iterator[LogProb]:
        for answer in original(call, reply):
            yield replace(answer, **{name: change(answer) for name, change in changes.items()})

    monkeypatch.setattr(kind, "logprobs", logprobs)


def test_other_log_probabilities_than_echo_leave_echo_alone(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent(monkeypatch, NextTokenCall, logprob=lambda answer: answer.logprob - 0.25 * (answer.index == 5))
    assert "alone it differs from echo by up to 0.250 in log-likelihood" in only_echo(endpoint)


@pytest.mark.parametrize("always", [True, False])
def test_a_method_that_is_wrong_about_greedy_tokens_leaves_echo_alone(
    always: bool, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent(monkeypatch, NextTokenCall, is_greedy=lambda _: always)
    assert "it disagrees with echo about greedy tokens" in only_echo(endpoint)


def test_one_near_tie_is_no_reason_against_a_method(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    bent(monkeypatch, NextTokenCall, is_greedy=lambda answer: answer.is_greedy != (answer.index == 1))
    assert inspect(endpoint, ("m",)).methods == (Method.ECHO, Method.NEXT_TOKEN)


def test_a_method_that_spoils_echo_in_the_same_batch_is_not_used(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def repeated(answer: LogProb) -> bool:
        return answer.index in seen or seen.add(answer.index) is not None

    bent(monkeypatch, EchoCall, logprob=lambda answer: answer.logprob - 0.5 * repeated(answer))
    assert "mixed with echo it differs from echo by up to 0.500" in only_echo(endpoint)


def test_a_server_that_refuses_the_method_is_scored_by_echo(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NextTokenCall, "body", lambda call: {"prompt": call.context, "stream": True})
    assert "answered the next_token probe with 400" in only_echo(endpoint)


def test_a_server_that_ignores_the_method_is_scored_by_echo(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(call: NextTokenCall) -> dict[str, Any]:
        return {"prompt": call.context, "temperature": 0, "max_tokens": 1, "logprobs": 1}

    monkeypatch.setattr(NextTokenCall, "body", body)
    assert "does not support `logprob_token_ids`" in only_echo(endpoint)
