"""Endpoint -> what it can really do, or a clear refusal.

Runs once for each server life, right after it is ready and before it gets any work, and for `python launch.py check`.
Every question is asked that can still be asked, so that one look tells all that is wrong. A scoring method is used only
when it has been seen to agree with echo on this very server, alone and mixed in one batch with the others; echo itself
only when it agrees with what the server generates.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import aiohttp
import msgspec

from sweep.errors import PassingFault, RequestError, ServerError, boundary
from sweep.evaluating.client import replies_of
from sweep.evaluating.scoring import (
    EchoCall,
    LogProb,
    Method,
    Scored,
    ScoringCall,
    calls_by,
    edges_of,
)
from sweep.masking import masked
from sweep.planning.plan import ModelPlan, ServerPlan, served_name
from sweep.serving.server import Endpoint

TOLERANCE = 0.02
"""Of a method against echo, in log-likelihood: echo against itself differs by as much between batch sizes (bf16, short
continuations). Where it is seen to differ on this server, NOISE_FACTOR times that counts instead, up to ECHO_TOLERANCE.
More means a wrong method, or one that is not worth its doubts: nothing but speed is lost without it."""

NOISE_FACTOR = 3.0
"""The largest of 16 differences is exceeded in the next 16 every other time; three times it practically never."""

ECHO_TOLERANCE = 0.25
"""Of echo against generation, in the log-likelihood of one token. Many engines compute logits in bf16, where one of
magnitude 16 to 32 is rounded to steps of 0.125; here two kernels compute two of them, the token's own and its rival's.
An echo that is shifted, scaled or of another model is off by whole units: 0.25 refuses it and no honest server."""

TIMEOUT_S = 180.0
"""Of one answer. The first requests of a server compile and warm up."""

CONTEXTS = tuple(tuple(range(20 + 7 * i, 44 + 9 * i)) for i in range(4))
"""Of the probes: token ids below 150, which every vocabulary has; what they spell does not matter."""

LONG_CONTEXT = tuple(20 + i % 120 for i in range(700))
"""As long as five examples in front of a question; cut where the server takes less."""

SEVERAL = 12
"""Tokens of the longest continuation that is probed."""

UNLIKELY = 66
"""A token that follows none of CONTEXTS well."""

IN_FLIGHT = 16
"""Requests at once: enough that methods meet in a batch, and no flood for a small server."""

BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
BUSY_PAUSES_S = (0.25, 0.5, 1.0, 2.0)
"""Before such an answer is taken for the last word."""

UNWELL = frozenset(HTTPStatus) - {HTTPStatus.NOT_IMPLEMENTED} - frozenset(s for s in HTTPStatus if s < 500)
"""Answers that tell of the server's state, not of what it can do."""

FLIPS_MOST = 1
"""Probes that may disagree about being greedy, and contexts that may disagree about their likeliest token: rounding may
break a near tie. What is wrong fails in four or more, the likeliest token of each context or everything else."""

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ttab,\n\nnew lines \r\n and an end   ",
    "Zürich, naïve café, ﬁne, Ω ≈ 3.14159, 東京は雨、москва, العربية, हिन्दी",
    "👩‍👩‍👧 🤷🏽‍♀️ e\u0301 \u00a0\u200b\ufeff",
    "1234567890 0.001 1e-9 100,000",
    "def f(x):\n    return {'a': [x ** 2]}\n",
    "<s></s><|im_start|>user<|im_end|><|endoftext|><|eot_id|>[INST]<bos><eos>",
)
"""Texts that a server and the local tokenizer must make the same token ids of: spaces, scripts, digits, code, and the
special tokens of the common families, which are plain text to the others."""

WORDS = 300
"""Characters of a server's own words that a check quotes."""

NOT_OFFERED = (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED)

USE_ANOTHER = "serve the model with vLLM, or with another server that has them"
SAME_TOKENIZER = (
    "name the tokenizer that the server uses as `tokenizer:` of the model, or serve it with the one that is named "
    "there (vLLM takes Mistral's own where a checkpoint has one; with `tokenizer_mode: hf` it does not)"
)

METHODS = (Method.NEXT_TOKEN, Method.PROMPT, Method.FORCED, Method.TAIL)
"""What is proven against echo, where the server offers it; the first one every server may."""

TOGETHER = 4
"""Calls of a group that share a request, as they do later."""


TokenIds = Mapping[str, tuple[tuple[int, ...], ...]]
"""Model -> what its tokenizer makes of PROBE_TEXTS."""


class Outcome(StrEnum):
    PASSED = "passed"
    NOTED = "noted"
    """Not as wished, and nothing is lost but speed; or not offered and not needed."""
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that a server was asked."""

    model: str
    name: str
    """`key`, `served name`, `max_model_len`, `completion logprobs`, `chat logprobs`, `echo`, `tokenizer`,
    `next_token`, `prompt_logprobs`, `forced_decoding`, `tail_prefill`."""
    outcome: Outcome
    detail: str
    """What came; of a failed one: what was asked, what came, what to do."""
    passing: bool = False
    """Of a failed one: the server was busy, failing or out of reach, and may do better another time."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a server must be for one model."""

    served_name: str
    max_model_len: int | None
    """As configured; None leaves it to the server."""
    token_ids: tuple[tuple[int, ...], ...]
    """Of PROBE_TEXTS by the local tokenizer, without special tokens added; empty: not compared."""


def expectation(plan: ServerPlan, models: Mapping[str, ModelPlan], token_ids: TokenIds) -> dict[str, Expected]:
    """What a server must be for each of its models; `token_ids` by model, as far as they are known."""
    return {
        name: Expected(
            served_name=served_name(models[name]),
            max_model_len=models[name].model.max_model_len,
            token_ids=token_ids.get(name, ()),
        )
        for name in plan.adapters
    }


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's server was seen to do; enough to score stored answers with no server at all."""

    max_model_len: int
    engine_version: str
    arithmetic: str = ""
    """See Endpoint."""
    methods: tuple[Method, ...]
    """Scoring methods proven equal to echo, which is always among them."""
    notes: tuple[str, ...] = ()
    """Why a method is not used, in sentences."""
    checks: tuple[Check, ...] = ()
    """All that was asked of the server, for the record."""

    @property
    def engine(self) -> str:
        """What computes the answers and stands beside each of them: `0.32.0 (bfloat16 on cuda)`."""
        return f"{self.engine_version} ({self.arithmetic})" if self.arithmetic else self.engine_version

    def plans_as(self, other: "Facts") -> bool:
        """Whether what was planned by the `other` facts is what these would give."""
        return (self.max_model_len, self.engine, set(self.methods)) == (
            other.max_model_len,
            other.engine,
            set(other.methods),
        )

    def lacks(self, other: "Facts") -> str | None:
        """Why a server with these facts cannot answer what was planned for one with the `other`'s; None when it can."""
        if self.engine != other.engine:
            return (
                f"it computes with vLLM {self.engine}, the other with {other.engine}, and no cell may have answers of "
                "both (`dtype`, `gpu_type` and one version of vLLM make servers equal)"
            )
        if self.max_model_len < other.max_model_len:
            return f"it takes {self.max_model_len} tokens, the other {other.max_model_len}"
        if missing := set(other.methods) - set(self.methods):
            return f"it cannot be scored by {', '.join(sorted(missing))}: {'; '.join(self.notes)}"
        return None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What came of all checks of a server."""

    server: str
    checks: tuple[Check, ...]
    """In the order in which they were asked, models one after the other."""
    facts: Facts | None
    """None when a check failed."""

    @property
    def passing(self) -> bool:
        """Whether all that failed may pass."""
        return all(check.passing for check in self.checks if check.outcome is Outcome.FAILED)

    @property
    def refusal(self) -> str | None:
        """Why the server cannot be trusted with scores: each failed check in a line; None when it can."""
        failed = [check for check in self.checks if check.outcome is Outcome.FAILED]
        if not failed:
            return None
        several = len({check.model for check in self.checks}) > 1
        lines = [f"{f'{c.model}, ' if several else ''}{c.name}: {c.detail}" for c in failed]
        return f"{self.server} is refused, " + "\n".join(lines)


def inspect(endpoint: Endpoint, expected: Mapping[str, Expected]) -> Inspection:
    """Ask the live server, once for each model (keys of `expected`): each adapter is one of its own to the engine.

    A server that is gone or silent fails its checks; raises ServerError only for what nobody has thought of.
    """
    with boundary(ServerError, f"preflight of {endpoint.server}"):
        return asyncio.run(_inspect(endpoint, expected))


async def _inspect(endpoint: Endpoint, expected: Mapping[str, Expected]) -> Inspection:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    checks: list[Check] = []
    async with aiohttp.ClientSession(timeout=timeout) as session:
        line = _Line(session=session, endpoint=endpoint)
        for model, wanted in expected.items():
            checks += await _Interview(line=line, model=model, expected=wanted).checks()
    if any(check.outcome is Outcome.FAILED for check in checks):
        return Inspection(server=endpoint.server, checks=tuple(checks), facts=None)
    doubts = {check.name: check.detail for check in reversed(checks) if check.outcome is not Outcome.PASSED}
    facts = Facts(
        max_model_len=endpoint.max_model_len,
        engine_version=endpoint.engine_version,
        arithmetic=endpoint.arithmetic,
        methods=(Method.ECHO, *(method for method in _asked(endpoint) if method not in doubts)),
        notes=tuple(f"{method} is not used: {doubts[method]}" for method in METHODS if method in doubts),
        checks=tuple(checks),
    )
    return Inspection(server=endpoint.server, checks=tuple(checks), facts=facts)


def _asked(endpoint: Endpoint) -> list[Method]:
    return [method for method in METHODS if method is Method.NEXT_TOKEN or method in endpoint.scoring]


class _Wrong(Exception):
    """A check failed: what was asked, what came, what to do."""

    def __init__(self, asked: str, came: str, cure: str) -> None:
        super().__init__(f"asked {asked}, got {came}; {cure}")


class _Unwell(_Wrong):
    """The server could not answer now."""


# What servers answer, as far as it is looked at.


@dataclass(frozen=True, kw_only=True)
class _Card:
    id: str
    parent: str | None = None
    """The base of an adapter, in vLLM's list."""
    max_model_len: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Models:
    data: list[_Card]


@dataclass(frozen=True, kw_only=True)
class _LogProbs:
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


@dataclass(frozen=True, kw_only=True)
class _Choice:
    logprobs: _LogProbs | None = None


@dataclass(frozen=True, kw_only=True)
class _Usage:
    prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Completion:
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1, max_length=1)]
    usage: _Usage | None = None
    """Not every server gives it with an echo; `_next` demands it, since lengths of answers are counted by it."""


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Of any scoring request; what is in them is the calls' own to read."""

    choices: Annotated[list[Any], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _Alternative:
    token: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class _ChatToken(_Alternative):
    top_logprobs: Annotated[list[_Alternative], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _ChatLogProbs:
    content: Annotated[list[_ChatToken], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _ChatChoice:
    logprobs: _ChatLogProbs | None = None


@dataclass(frozen=True, kw_only=True)
class _Chat:
    choices: Annotated[list[_ChatChoice], msgspec.Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    tokens: Annotated[list[int], msgspec.Meta(min_length=1)]


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Reply:
    asked: str
    status: int
    text: str
    """As it came: a short key may stand anywhere in it."""
    secret: str

    def read(self, kind: type[T], cure: str) -> T:
        """Raises _Wrong with the `cure` for another status than 200 and for another shape."""
        self.see_well()
        if self.status != HTTPStatus.OK:
            raise _Wrong(self.asked, self.said, cure)
        try:
            return msgspec.json.decode(self.text, type=kind)
        except msgspec.DecodeError as error:
            raise _Wrong(self.asked, f"{self.said} ({error})", cure) from None

    def see_well(self) -> None:
        """Raises _Unwell for an answer that tells of the server's state alone."""
        if self.status == HTTPStatus.TOO_MANY_REQUESTS or self.status in UNWELL:
            raise _Unwell(self.asked, self.said, "it is busy or failing; its log may tell")

    @property
    def said(self) -> str:
        text = masked(self.text, [self.secret] if self.secret else [])
        return f"{self.status}: {text[:WORDS]}{'…' if len(text) > WORDS else ''}"


@dataclass(kw_only=True)
class _Line:
    """The connection to a server."""

    session: aiohttp.ClientSession
    endpoint: Endpoint
    silent: bool = False
    """It has let a question time out; it gets no more of them, each of which would cost minutes again."""
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))
    _pauses_s: tuple[float, ...] = BUSY_PAUSES_S
    """None is left once it was busy for all of them."""

    async def get(self, path: str, *, key: bool = True) -> _Reply:
        return await self._ask("GET", path, None, key=key)

    async def post(self, path: str, body: Mapping[str, Any], *, about: str, key: bool = True) -> _Reply:
        return await self._ask("POST", path, body, about=about, key=key)

    async def _ask(
        self, verb: str, path: str, body: Mapping[str, Any] | None, *, about: str = "", key: bool = True
    ) -> _Reply:
        secret = self.endpoint.api_key
        headers = {"Authorization": f"Bearer {secret}"} if secret and key else {}
        asked = f"{verb} {path}{f' {about}' if about else ''}"
        async with self._places:
            for pause_s in (*self._pauses_s, None):
                async with self.session.request(
                    verb, f"{self.endpoint.url}{path}", json=body, headers=headers
                ) as answer:
                    reply = _Reply(
                        asked=asked, status=answer.status, text=await answer.text(errors="replace"), secret=secret
                    )
                if reply.status not in BUSY:
                    return reply
                if pause_s is not None:
                    await asyncio.sleep(pause_s)
            self._pauses_s = ()
            return reply


Finding = tuple[Outcome, str]
Question = Callable[[], Awaitable[Finding]]


@dataclass(kw_only=True)
class _Interview:
    """All questions about one model."""

    line: _Line
    model: str
    expected: Expected
    _likeliest: list[tuple[str, float]] = field(default_factory=list)
    """Of each of CONTEXTS, as generated: the next token's name and log-probability."""
    _reference: dict[int, LogProb] = field(default_factory=dict)
    """What echo alone says of each probe."""
    _noise: float = 0.0
    """By how much echo one request at a time differs from echo all at once."""

    async def checks(self) -> list[Check]:
        questions = {
            "key": self._key,
            "served name": self._served_name,
            "max_model_len": self._max_model_len,
            "completion logprobs": self._completion_logprobs,
            "chat logprobs": self._chat_logprobs,
            "echo": self._echo,
            "tokenizer": self._tokenizer,
        }
        found = {name: await self._check(name, question) for name, question in questions.items()}
        echo_is_right = found["echo"].outcome is not Outcome.FAILED
        return [*found.values(), *await self._methods(echo_is_right=echo_is_right)]

    async def _check(self, name: str, question: Question) -> Check:
        return Check(model=self.model, name=name, **await self._found(question))

    async def _found(self, question: Question) -> dict[str, Any]:
        """Outcome, detail and passing of a check."""
        where = f"{self.line.endpoint.server} at {self.line.endpoint.url}"
        passing = True
        try:
            if self.line.silent:
                detail = "not asked, since an earlier question had no answer in time"
            else:
                outcome, detail = await question()
                return {"outcome": outcome, "detail": detail}
        except TimeoutError:
            self.line.silent = True
            detail = f"{where} did not answer within {TIMEOUT_S:g} s; see its log, or ask it by hand"
        except aiohttp.ClientError as error:
            words = f"{type(error).__name__}: {error}"
            detail = f"{where} cannot be reached ({words}); is it running, and is that its address?"
        except _Wrong as wrong:
            detail, passing = str(wrong), isinstance(wrong, _Unwell)
        return {"outcome": Outcome.FAILED, "detail": detail, "passing": passing}

    # Who it is.

    async def _key(self) -> Finding:
        """A server that answers without the key takes anyone's requests, and ours may be with a stranger's server."""
        bare = await self.line.get("/v1/models", key=False)
        bare.see_well()
        guarded = bare.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        if not self.line.endpoint.api_key:
            if guarded:
                cure = "it wants a key: give it as `api_key: ${oc.env:NAME}` of the model"
                raise _Wrong(f"{bare.asked} without a key, since none is configured", bare.said, cure)
            return Outcome.NOTED, "no key is configured, and the server answers without one"
        if not guarded and not await self._completions_are_guarded():
            raise _Wrong(
                f"{bare.asked} without the key",
                f"{bare.status} where 401 was expected",
                "another server listens there, or this one does not check its key (vLLM: VLLM_API_KEY or --api-key); "
                "if a server at a `url` is meant to take anyone, leave out its `api_key`",
            )
        ours = await self.line.get("/v1/models")
        ours.read(_Models, "the server was started with another key than the one configured here")
        if not guarded:
            return Outcome.NOTED, "the list of models is open to everyone, completions want the key"
        return Outcome.PASSED, f"{bare.status} without it, 200 with it"

    async def _completions_are_guarded(self) -> bool:
        """Some gateways show everyone what they serve."""
        body = {"model": self.expected.served_name, "prompt": CONTEXTS[0], "max_tokens": 1}
        reply = await self.line.post("/v1/completions", body, about="without the key", key=False)
        reply.see_well()
        return reply.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)

    async def _card(self) -> _Card:
        reply = await self.line.get("/v1/models")
        cards = reply.read(_Models, "is this the address of an OpenAI-compatible server?").data
        name = self.expected.served_name
        if (card := next((card for card in cards if card.id == name), None)) is None:
            raise _Wrong(
                f"{reply.asked} for {name!r}",
                str(sorted(card.id for card in cards)),
                "another server listens there, or a server at a `url` knows the model by another name: "
                "say it in `served_model_name:`",
            )
        return card

    async def _served_name(self) -> Finding:
        return Outcome.PASSED, f"{(await self._card()).id!r} is in the list of models"

    async def _max_model_len(self) -> Finding:
        card, used, wanted = await self._card(), self.line.endpoint.max_model_len, self.expected.max_model_len
        if card.max_model_len is None:
            if card.parent is not None:
                return Outcome.PASSED, f"{used}, that of its base {card.parent!r}"
            return Outcome.NOTED, f"the list of models tells none, {used} is taken for it"
        if card.max_model_len < max(used, wanted or 0):
            raise _Wrong(
                f"for {max(used, wanted or 0)} tokens of prompt plus answer",
                f"max_model_len {card.max_model_len} in the list of models",
                "lower `max_model_len:` of the model, or start the server with a larger one",
            )
        if card.max_model_len > used:
            return Outcome.NOTED, f"{used} as configured, the server would take {card.max_model_len}"
        return Outcome.PASSED, str(used)

    # What its answers hold.

    async def _complete(self, body: Mapping[str, Any], about: str) -> tuple[_Reply, _LogProbs]:
        """A reply as it came and the log-probabilities in it. Raises _Wrong for one without them."""
        reply = await self.line.post("/v1/completions", {"model": self.expected.served_name, **body}, about=about)
        cure = (
            f"what is scored are `choices[].logprobs.token_logprobs` and `top_logprobs`: {USE_ANOTHER}. llama.cpp's "
            "llama-server answers in the shape of a chat here (EleutherAI/lm-evaluation-harness#4158)"
        )
        found = reply.read(_Completion, cure).choices[0].logprobs
        if found is None:
            raise _Wrong(
                reply.asked,
                "`logprobs: null`",
                "stock lm-eval would stop with `TypeError: 'NoneType' object is not subscriptable`. Versions of "
                "llama.cpp's llama-server (ggml-org/llama.cpp#11346) and mistral.rs (EricLBuehler/mistral.rs#1876) "
                f"are known to answer so: {USE_ANOTHER}",
            )
        return reply, found

    async def _next(self, context: Sequence[int]) -> tuple[str, float]:
        """The likeliest token after `context` and its log-probability, as generated."""
        body = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "return_tokens_as_token_ids": True}
        about = "with `logprobs: 1`"
        reply, found = await self._complete({"prompt": context, "ignore_eos": True, **body}, about)
        usage = reply.read(_Completion, USE_ANOTHER).usage
        if usage is None or usage.prompt_tokens != len(context):
            came = "no usage" if usage is None else f"usage.prompt_tokens {usage.prompt_tokens}"
            raise _Wrong(
                f"POST /v1/completions {about} for a prompt of {len(context)} token ids",
                came,
                f"what was cut, added or computed could not be seen: {USE_ANOTHER}",
            )
        if not len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 1:
            sizes = [len(found.tokens), len(found.token_logprobs), len(found.top_logprobs)]
            raise _Wrong(
                f"POST /v1/completions {about} for one token",
                f"{sizes} entries in tokens, token_logprobs, top_logprobs",
                USE_ANOTHER,
            )
        (name,), (logprob,), (top,) = found.tokens, found.token_logprobs, found.top_logprobs
        if logprob is None or not top:
            raise _Wrong(f"POST /v1/completions {about}", f"`{logprob}` and top_logprobs `{top}`", USE_ANOTHER)
        return name, logprob

    async def _completion_logprobs(self) -> Finding:
        name, logprob = await self._next(CONTEXTS[0])
        return Outcome.PASSED, f"token_logprobs and top_logprobs are there ({name}: {logprob:.3f})"

    async def _chat_logprobs(self) -> Finding:
        """Not needed, since templates are applied here; a server that leaves out what was asked for is still wrong."""
        about = "with `logprobs: true, top_logprobs: 1`"
        body = {
            "model": self.expected.served_name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 1,
        }
        reply = await self.line.post("/v1/chat/completions", body, about=about)
        if reply.status in NOT_OFFERED:
            return Outcome.NOTED, f"not offered ({reply.status}) and not needed"
        if reply.status != HTTPStatus.OK:
            why = "the model has no chat template" if "chat template" in reply.text else reply.said
            return Outcome.NOTED, f"not offered and not needed: {why}"
        found = reply.read(_Chat, f"`choices[].logprobs.content[].top_logprobs` was expected: {USE_ANOTHER}")
        if found.choices[0].logprobs is None:
            raise _Wrong(
                reply.asked,
                "`logprobs: null`",
                "a server that keeps to itself what it is asked for cannot be trusted with scores (Ollama's cloud is "
                f"known to answer so, ollama/ollama#13638): {USE_ANOTHER}",
            )
        return Outcome.PASSED, "logprobs.content[].top_logprobs are there"

    async def _echo(self) -> Finding:
        """Echo must have one entry for each prompt token, and say of the next token what a generation says of it."""
        self._likeliest = [await self._next(context) for context in CONTEXTS]
        wrong: list[str] = []
        unlikely: list[float | None] = []
        worst = 0.0
        remark = ""
        for context, (name, generated) in zip(CONTEXTS, self._likeliest, strict=True):
            token = _token_id(name)
            # Without ids for names any token will do: the likeliest one is reported beside it.
            pair = Scored(index=0, context=context, continuation=(UNLIKELY if token is None else token,))
            call = EchoCall(pair=pair)
            # One more behind it: what an echo that is shifted would show in its place must not be as likely by chance.
            body = {**call.body(), "prompt": [*pair.context, *pair.continuation, UNLIKELY]}
            reply, rows = await self._complete(body, "with `echo: true, logprobs: 1`")
            remark = self._shape_of_echo(rows, len(context) + 2) or remark
            unlikely.append(rows.token_logprobs[len(context) + 1])
            (answer,) = _logprobs([call], reply)
            best = max((rows.top_logprobs[len(context)] or {}).values())
            echoed = best if token is None else answer.logprob
            worst = max(worst, abs(echoed - generated))
            greedy = token is None or answer.is_greedy
            if not abs(echoed - generated) <= ECHO_TOLERANCE or not greedy:
                also = "" if greedy else f", and another token before it with {best:.3f}"
                wrong.append(f"{echoed:.3f} by echo where it generates with {generated:.3f}{also}")
        if len(wrong) > FLIPS_MOST:
            raise _Wrong(
                f"the log-probability of the likeliest next token after {len(CONTEXTS)} contexts, generated and echoed",
                f"another one in {len(wrong)} ({'; '.join(wrong)})",
                "its echo is shifted, scaled or of another model, and scores from it would be wrong: use another "
                "version of the server, or no `url` that spreads requests over different servers",
            )
        if len(set(unlikely)) == 1:
            raise _Wrong(
                f"the log-probability of an unlikely token after {len(CONTEXTS)} contexts, echoed",
                f"{unlikely[0]} each time",
                "it knows those of the likeliest tokens only, and choices among the others would tie: use another "
                "version of the server, or one that returns the log-probability of any token",
            )
        return Outcome.NOTED if wrong or remark else Outcome.PASSED, (
            f"agrees with generation within {worst:.3f}{remark}{f'; {wrong[0]}' if wrong else ''}"
        )

    def _shape_of_echo(self, rows: _LogProbs, prompt_tokens: int) -> str:
        """A remark about what is odd and harmless. Raises _Wrong for rows that cannot belong to the prompt."""
        asked = f"POST /v1/completions with `echo: true, logprobs: 1` for a prompt of {prompt_tokens} tokens"
        sizes = {len(rows.tokens), len(rows.token_logprobs), len(rows.top_logprobs)}
        # With the one token that is generated after them, or without.
        if not sizes <= {prompt_tokens, prompt_tokens + 1}:
            came = f"{' or '.join(map(str, sorted(sizes)))} entries"
            if max(sizes) <= 1:
                raise _Wrong(
                    asked,
                    came,
                    "it ignores `echo`, as llama.cpp's llama-server does (ggml-org/llama.cpp#27174); stock lm-eval "
                    f"would score every choice alike and come out at chance: {USE_ANOTHER}",
                )
            raise _Wrong(asked, came, f"tokens and log-probabilities cannot be told apart: {USE_ANOTHER}")
        lacking = [i for i in range(1, prompt_tokens) if rows.token_logprobs[i] is None or not rows.top_logprobs[i]]
        if lacking:
            raise _Wrong(asked, f"none for {len(lacking)} of them, the first at {lacking[0]}", USE_ANOTHER)
        if rows.token_logprobs[0] is not None:
            return f"; the first token, which nothing comes before, has {rows.token_logprobs[0]:.3f} and not null"
        return ""

    # Its tokenizer.

    async def _tokenizer(self) -> Finding:
        ours = self.expected.token_ids
        if not ours:
            return Outcome.NOTED, "not compared, the local tokenizer is not known"
        theirs = []
        for text in PROBE_TEXTS:
            body = {"model": self.expected.served_name, "prompt": text, "add_special_tokens": False}
            reply = await self.line.post("/tokenize", body, about="")
            try:
                theirs.append(reply.read(_Tokens, "").tokens)
            except _Wrong:  # another server's idea of this path, or none
                return await self._tokenizer_by_echo()
        self._compare(theirs, "POST /tokenize")
        return Outcome.PASSED, f"the same token ids for all {len(ours)} texts"

    async def _tokenizer_by_echo(self) -> Finding:
        """Where there is no /tokenize: from the tokens of an echoed text, or from their number."""
        how, lengths, theirs = "an echoed text, since it has no /tokenize", [], []
        for text in PROBE_TEXTS:
            body = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            options = {"return_tokens_as_token_ids": True, "add_special_tokens": False}
            reply, rows = await self._complete({**body, **options}, "with a text and `echo: true, logprobs: 1`")
            usage = reply.read(_Completion, USE_ANOTHER).usage
            lengths.append(len(rows.tokens) - 1 if usage is None else usage.prompt_tokens)
            theirs.append([_token_id(name) for name in rows.tokens[: lengths[-1]]])
        # Some put a token in front of every text, whatever they are asked; our prompts are ids and have what they need.
        fronts = {length - len(ids) for length, ids in zip(lengths, self.expected.token_ids, strict=True)}
        front = 1 if fronts == {1} else 0
        also = "; it puts a token in front of a text" if front else ""
        if all(None not in ids for ids in theirs):
            self._compare([[i for i in ids if i is not None][front:] for ids in theirs], how)
            return Outcome.PASSED, f"the same token ids for all {len(theirs)} texts, by {how}{also}"
        if fronts - {front}:
            ours = list(map(len, self.expected.token_ids))
            raise _Wrong(
                f"the number of tokens of {len(ours)} texts", f"{lengths} where we have {ours}", SAME_TOKENIZER
            )
        return Outcome.NOTED, f"compared by the number of tokens only: it has no /tokenize and shows no token ids{also}"

    def _compare(self, theirs: Sequence[Sequence[int]], how: str) -> None:
        pairs = zip(PROBE_TEXTS, self.expected.token_ids, map(tuple, theirs), strict=True)
        different = [(text, ours, got) for text, ours, got in pairs if ours != got]
        if not different:
            return
        text, ours, got = different[0]
        at = next((i for i, (a, b) in enumerate(zip(ours, got, strict=False)) if a != b), min(len(ours), len(got)))
        around = slice(max(0, at - 1), at + 3)
        raise _Wrong(
            f"for the token ids of {len(theirs)} texts ({how})",
            f"others for {len(different)}, the first {text!r}: {list(got[around])} from token {around.start} on "
            f"({len(got)} in all) where our tokenizer has {list(ours[around])} ({len(ours)} in all)",
            SAME_TOKENIZER,
        )

    # How it can be scored.

    async def _methods(self, *, echo_is_right: bool) -> list[Check]:
        asked = _asked(self.line.endpoint)
        if not echo_is_right:
            why = "not compared, since echo is not right"
            return [Check(model=self.model, name=name, outcome=Outcome.NOTED, detail=why) for name in asked]
        probes = self._probes()
        echo = calls_by(Method.ECHO, edges_of(probes))
        calls = {method: self._calls(method, probes) for method in asked}
        checks = {m: await self._check(m, partial(self._agree, echo, calls[m], "alone")) for m in asked}
        able = [method for method, check in checks.items() if check.outcome is Outcome.PASSED]
        # Any may spoil the others' rows: vLLM's V1 runner gives every row of a batch what one request asked for.
        batch = [*(call for method in able for call in calls[method]), *echo]
        if able:
            found = await self._found(partial(self._agree, echo, batch, "mixed with echo"))
            for method in able:
                together = f"{checks[method].detail}, {found['detail']}"
                told = together if found["outcome"] is Outcome.PASSED else found["detail"]
                checks[method] = replace(checks[method], **{**found, "detail": told})
        return list(checks.values())

    def _calls(self, method: Method, probes: Sequence[Scored]) -> list[ScoringCall]:
        able = [pair for pair in probes if method is not Method.NEXT_TOKEN or len(pair.continuation) == 1]
        return calls_by(method, edges_of(able))

    async def _agree(self, echo: Sequence[ScoringCall], calls: Sequence[ScoringCall], how: str) -> Finding:
        """Whether what `calls` say is what `echo` said when it was alone."""
        if not self._reference:
            self._reference = {answer.index: answer for answer in await self._answers(echo)}
            one_by_one = [answer for call in echo for answer in await self._answers([call])]
            self._noise = max(abs(answer.logprob - self._reference[answer.index].logprob) for answer in one_by_one)
        try:
            answers = await self._answers(calls)
        except _Unwell:
            raise
        except _Wrong as wrong:
            return Outcome.NOTED, f"{how} {wrong}"
        if not answers:
            return Outcome.NOTED, f"{how} it answers nothing"
        worst = max(abs(answer.logprob - self._reference[answer.index].logprob) for answer in answers)
        if not worst <= min(max(TOLERANCE, NOISE_FACTOR * self._noise), ECHO_TOLERANCE):
            return Outcome.NOTED, f"{how} it differs from echo by up to {worst:.3f} in log-likelihood"
        flips = sum(answer.is_greedy != self._reference[answer.index].is_greedy for answer in answers)
        if flips > FLIPS_MOST:
            return Outcome.NOTED, f"{how} it disagrees with echo about greedy tokens ({flips} of {len(answers)})"
        noise = f", which differs from itself by {self._noise:.3f}" if self._noise > TOLERANCE else ""
        return Outcome.PASSED, f"{how} within {worst:.3f} of echo{noise}"

    def _probes(self) -> list[Scored]:
        """For each context three tokens, and the likeliest one where the server tells which it generates; where it may
        write several, also continuations of several: likely ones, unlikely ones, of text in many scripts, behind a
        context that fills blocks of the cache."""
        pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        likely = [() if (token := _token_id(name)) is None else (token,) for name, _ in self._likeliest]
        for i, (context, first) in enumerate(zip(CONTEXTS, likely, strict=True)):
            pairs += [(context, (token,)) for token in dict.fromkeys((*first, 61 + 11 * i, 66 + 11 * i, 71 + 11 * i))]
        if len(_asked(self.line.endpoint)) > 1:
            texts = [ids[:SEVERAL] for ids in self.expected.token_ids if len(ids) > 1] or [CONTEXTS[1][:SEVERAL]]
            pairs += [(context, (*first, 66, 77)) for context, first in zip(CONTEXTS, likely, strict=True)]
            pairs += [(CONTEXTS[0], text) for text in texts] + [(LONG_CONTEXT, text) for text in texts[:2]]
        distinct = dict.fromkeys(pairs)
        room = self.line.endpoint.max_model_len - 1
        return [
            Scored(index=index, context=context[: room - len(continuation)], continuation=continuation)
            for index, (context, continuation) in enumerate(distinct)
        ]

    async def _answers(self, calls: Sequence[ScoringCall]) -> list[LogProb]:
        """What the calls answer, all sent at once, some of a group in one request."""

        async def send(some: Sequence[Any]) -> list[LogProb]:
            first, *more = some
            body = {"model": self.expected.served_name, **first.body(*more)}
            reply = await self.line.post(first.path, body, about=f"to score by {first.method}")
            reply.read(_Choices, USE_ANOTHER)
            return _logprobs(some, reply)

        found = await asyncio.gather(*(send(some) for some in _together(calls)))
        return [answer for answers in found for answer in answers]


def _together(calls: Sequence[ScoringCall]) -> list[list[ScoringCall]]:
    """Neighbours of one group, TOGETHER at most; echo is what others are compared with and asked one by one."""
    requests: list[list[ScoringCall]] = []
    for call in calls:
        last = requests[-1] if requests else []
        alone = call.group is None or call.method is Method.ECHO
        if last and not alone and last[0].group == call.group and len(last) < TOGETHER:
            last.append(call)
        else:
            requests.append([call])
    return requests


def _logprobs(calls: Sequence[ScoringCall], reply: _Reply) -> list[LogProb]:
    try:
        own = replies_of(msgspec.json.decode(reply.text), len(calls))
        return [answer for call, its in zip(calls, own, strict=True) for answer in call.logprobs(its)]
    except (RequestError, PassingFault, ValueError) as error:
        raise _Wrong(reply.asked, reply.said, str(error)) from None


def _token_id(name: str) -> int | None:
    """Of a token as `return_tokens_as_token_ids` names it; None where the server does not know that option."""
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdecimal() else None
