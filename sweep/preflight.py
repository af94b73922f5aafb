"""Endpoint -> what it can really do, or a clear refusal.

Runs once for each server life, right after it is ready and before it gets any work. A scoring method is used only when
it has been seen to agree with echo on this very server, alone and mixed in one batch with the others.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import aiohttp

from sweep.errors import RequestError, ServerError, boundary
from sweep.scoring import EchoCall, LogProb, Method, NextTokenCall, Scored, scoring_calls
from sweep.server import Endpoint

TOLERANCE = 0.02
"""Echo against itself differs by as much between batch sizes (bf16, short continuations); more means a wrong method."""

TIMEOUT_S = 180.0
"""The first requests of a server compile and warm up."""

PROBES = tuple(
    Scored(index=4 * i + j, context=tuple(range(20 + 7 * i, 44 + 9 * i)), continuation=(60 + 11 * i + 5 * j,))
    for i in range(4)
    for j in range(4)
)
"""Token ids below 150, which every vocabulary has; what they spell does not matter."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's server was seen to do; enough to score stored answers with no server at all."""

    max_model_len: int
    engine_version: str
    methods: tuple[Method, ...]
    """Scoring methods proven equal to echo, which is always among them."""
    notes: tuple[str, ...] = ()
    """Why a method is not used, in sentences."""


def inspect(endpoint: Endpoint, models: tuple[str, ...]) -> Facts:
    """Ask the live server; raises ServerError when it cannot be trusted with scores."""
    with boundary(ServerError, f"preflight of {endpoint.server}"):
        return asyncio.run(_inspect(endpoint, models))


async def _inspect(endpoint: Endpoint, models: tuple[str, ...]) -> Facts:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await _check_key(session, endpoint)
        served = await _served_models(session, endpoint)
        if missing := set(models) - served.keys():
            raise ServerError(f"{endpoint.server} serves {sorted(served)}, not {sorted(missing)}")
        max_model_len = served[models[0]]
        async with session.get(f"{endpoint.url}/version") as response:
            version = str((await response.json())["version"])
        methods, notes = [Method.ECHO], []
        why_not = await _next_token_differs(session, endpoint, models[0])
        if why_not is None:
            methods.append(Method.NEXT_TOKEN)
        else:
            notes.append(f"{Method.NEXT_TOKEN} is not used: {why_not}")
    return Facts(max_model_len=max_model_len, engine_version=version, methods=tuple(methods), notes=tuple(notes))


async def _check_key(session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
    """A server that answers without the key would take anyone's requests, and ours may reach a stranger's server."""
    async with session.get(f"{endpoint.url}/v1/models") as response:
        if response.status != 401:
            raise ServerError(
                f"{endpoint.url}/v1/models answered {response.status} without a key, 401 was expected: "
                "another server listens there, or this one does not check VLLM_API_KEY"
            )


async def _served_models(session: aiohttp.ClientSession, endpoint: Endpoint) -> dict[str, int]:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    async with session.get(f"{endpoint.url}/v1/models", headers=headers) as response:
        if response.status != 200:
            raise ServerError(f"{endpoint.url}/v1/models answered {response.status} to our key")
        listed = (await response.json())["data"]
    # An adapter reports no length of its own: its base decides.
    lengths = [m["max_model_len"] for m in listed if m.get("max_model_len")]
    return {m["id"]: int(m.get("max_model_len") or lengths[0]) for m in listed}


async def _next_token_differs(session: aiohttp.ClientSession, endpoint: Endpoint, model: str) -> str | None:
    """None when next-token scoring equals echo, alone and in one batch with echo requests; otherwise how it differs.

    An echo probe that fails refuses the server: nothing could be scored there.
    """
    echo = [EchoCall(pair=pair) for pair in PROBES]
    shared = scoring_calls(PROBES, next_token=True)
    reference = await _answers(session, endpoint, model, echo)
    try:
        alone = await _answers(session, endpoint, model, shared)
        mixed = await _answers(session, endpoint, model, [*shared, *echo])
    except ServerError as error:
        return str(error)
    for how, got in (("alone", alone), ("mixed with echo", mixed)):
        worst = max(abs(got[i].logprob - reference[i].logprob) for i in reference)
        if worst > TOLERANCE:
            return f"{how} it differs from echo by up to {worst:.3f} in log-likelihood"
        if any(got[i].is_greedy != reference[i].is_greedy for i in reference):
            return f"{how} it disagrees with echo about greedy tokens"
    return None


async def _answers(
    session: aiohttp.ClientSession, endpoint: Endpoint, model: str, calls: list[Any]
) -> dict[int, LogProb]:
    """The calls' answers by index, all sent at once; where two calls answer one index, the next-token one counts."""

    async def send(call: EchoCall | NextTokenCall) -> list[LogProb]:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        body = {"model": model, **call.body()}
        async with session.post(f"{endpoint.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                raise ServerError(f"a {call.method} probe got {response.status}: {(await response.text())[:300]}")
            try:
                return list(call.logprobs(await response.json()))
            except RequestError as error:
                raise ServerError(f"a {call.method} probe failed: {error}") from None

    replies = await asyncio.gather(*(send(call) for call in calls))
    return {
        answer.index: answer
        for call, answers in sorted(
            zip(calls, replies, strict=True), key=lambda pair: pair[0].method is Method.NEXT_TOKEN
        )
        for answer in answers
    }
