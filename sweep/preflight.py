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

CONTEXTS = tuple(tuple(range(20 + 7 * i, 44 + 9 * i)) for i in range(4))
"""Of the probes: token ids below 150, which every vocabulary has; what they spell does not matter."""

FLIPS_MOST = 1
"""Probes that may disagree about being greedy: rounding may break a near tie. A wrong method fails four or more, the
likeliest token of each context or everything else."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's server was seen to do; enough to score stored answers with no server at all."""

    max_model_len: int
    engine_version: str
    methods: tuple[Method, ...]
    """Scoring methods proven equal to echo, which is always among them."""
    notes: tuple[str, ...] = ()
    """Why a method is not used, in sentences."""

    def serves_as(self, other: "Facts") -> bool:
        """Whether a server with these facts can answer every request that was planned for one with the `other`'s."""
        return self.max_model_len >= other.max_model_len and set(self.methods) >= set(other.methods)


def inspect(endpoint: Endpoint, models: tuple[str, ...]) -> Facts:
    """Ask the live server; raises ServerError when it cannot be trusted with scores."""
    with boundary(ServerError, f"preflight of {endpoint.server}"):
        return asyncio.run(_inspect(endpoint, models))


async def _inspect(endpoint: Endpoint, models: tuple[str, ...]) -> Facts:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await _check_key(session, endpoint)
        await _check_models(session, endpoint, models)
        methods, notes = [Method.ECHO], []
        try:
            # Of every adapter: each is a model of its own to the engine.
            differences = [await _next_token_differs(session, endpoint, model) for model in models]
        except TimeoutError:
            raise ServerError(f"{endpoint.server} did not answer a probe within {TIMEOUT_S:g} s") from None
        why_not = next((difference for difference in differences if difference is not None), None)
        if why_not is None:
            methods.append(Method.NEXT_TOKEN)
        else:
            notes.append(f"{Method.NEXT_TOKEN} is not used: {why_not}")
    return Facts(
        max_model_len=endpoint.max_model_len,
        engine_version=endpoint.engine_version,
        methods=tuple(methods),
        notes=tuple(notes),
    )


async def _check_key(session: aiohttp.ClientSession, endpoint: Endpoint) -> None:
    """A server that answers without the key would take anyone's requests, and ours may reach a stranger's server."""
    async with session.get(f"{endpoint.url}/v1/models") as response:
        if response.status != 401:
            raise ServerError(
                f"{endpoint.url}/v1/models answered {response.status} without a key, 401 was expected: "
                "another server listens there, or this one does not check VLLM_API_KEY"
            )


async def _check_models(session: aiohttp.ClientSession, endpoint: Endpoint, models: tuple[str, ...]) -> None:
    async with session.get(f"{endpoint.url}/v1/models", headers=_headers(endpoint)) as response:
        if response.status != 200:
            raise ServerError(f"{endpoint.url}/v1/models answered {response.status} to our key")
        served = {card["id"] for card in (await response.json())["data"]}
    if missing := set(models) - served:
        raise ServerError(f"{endpoint.server} serves {sorted(served)}, not {sorted(missing)}")


async def _next_token_differs(session: aiohttp.ClientSession, endpoint: Endpoint, model: str) -> str | None:
    """None when next-token scoring equals echo, alone and in one batch with echo requests; otherwise how it differs.

    An echo probe that fails refuses the server: nothing could be scored there.
    """
    probes = await _probes(session, endpoint, model)
    echo = [EchoCall(pair=pair) for pair in probes]
    shared = scoring_calls(probes, next_token=True)
    reference = {answer.index: answer for answer in await _answers(session, endpoint, model, echo)}
    try:
        alone = await _answers(session, endpoint, model, shared)
        # Either may spoil the other's rows: vLLM's V1 runner gives every row of a batch what one request asked for.
        mixed = await _answers(session, endpoint, model, [*shared, *echo])
    except ServerError as error:
        return str(error)
    for how, answers in (("alone", alone), ("mixed with echo", mixed)):
        worst = max(abs(answer.logprob - reference[answer.index].logprob) for answer in answers)
        if not worst <= TOLERANCE:
            return f"{how} it differs from echo by up to {worst:.3f} in log-likelihood"
        flips = sum(answer.is_greedy != reference[answer.index].is_greedy for answer in answers)
        if flips > FLIPS_MOST:
            return f"{how} it disagrees with echo about greedy tokens ({flips} of {len(answers)})"
    return None


async def _probes(session: aiohttp.ClientSession, endpoint: Endpoint, model: str) -> list[Scored]:
    """For each context three tokens, and the likeliest one where the server tells which it generates."""
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True, "ignore_eos": True}
    probes: list[Scored] = []
    for i, context in enumerate(CONTEXTS):
        reply = await _post(session, endpoint, model, {"prompt": context, **body}, "generation")
        names = (reply["choices"][0].get("logprobs") or {}).get("tokens", ())
        likeliest = [int(name.removeprefix("token_id:")) for name in names if name.startswith("token_id:")]
        for token in dict.fromkeys((*likeliest, 61 + 11 * i, 66 + 11 * i, 71 + 11 * i)):
            probes.append(Scored(index=len(probes), context=context, continuation=(token,)))
    return probes


async def _answers(session: aiohttp.ClientSession, endpoint: Endpoint, model: str, calls: list[Any]) -> list[LogProb]:
    """What the calls answer, all sent at once."""

    async def send(call: EchoCall | NextTokenCall) -> list[LogProb]:
        reply = await _post(session, endpoint, model, call.body(), call.method)
        try:
            return list(call.logprobs(reply))
        except RequestError as error:
            raise ServerError(f"{endpoint.server} failed the {call.method} probe: {error}") from None

    replies = await asyncio.gather(*(send(call) for call in calls))
    return [answer for answers in replies for answer in answers]


async def _post(
    session: aiohttp.ClientSession, endpoint: Endpoint, model: str, body: dict[str, Any], what: str
) -> dict[str, Any]:
    url = f"{endpoint.url}/v1/completions"
    async with session.post(url, json={"model": model, **body}, headers=_headers(endpoint)) as response:
        if response.status != 200:
            raise ServerError(
                f"{endpoint.server} answered the {what} probe with {response.status}: {(await response.text())[:300]}"
            )
        reply: dict[str, Any] = await response.json()
        return reply


def _headers(endpoint: Endpoint) -> dict[str, str]:
    return {"Authorization": f"Bearer {endpoint.api_key}"}
