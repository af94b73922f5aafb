"""Log-likelihood and generation requests -> calls to a server, with the fewest tokens that it must compute.

The reference is stock lm-eval's `local-completions` with tokenized requests: each pair a prompt of its own, which
comes back with the log-probabilities of all its tokens (`EchoCall`). vLLM ignores its prefix cache for such a request.
`PromptCall` is the same with token ids only, without the text of each of them that nobody reads. The other methods ask
about a context that the cache may hold, and for no more than what follows it:

- `NextTokenCall`: all continuations of one token over a context, from the log-probabilities of its next token.
- `ForcedCall`: longer ones, which the server is made to write (forced_decoding.py, our own servers' V1 runner).
- `TailCall`: longer ones, of which only the rows behind the cached context are computed (vLLM's V2 runner).

preflight.py proves on the live server that a method agrees with echo before it is used. Pairs of a context are planned
together (`scoring_calls`); what a method could not answer is left to echo (`Assembly.missing`).
"""

import itertools
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count, islice
from typing import Any

from sweep.errors import PassingFault, RequestError
from sweep.evaluating.dispatch import common_length

COMPLETIONS = "/v1/completions"
GENERATE = "/inference/v1/generate"
"""vLLM's endpoint for token ids in and out, there with `--enable-scale-out`."""

ECHO_SEED = 1234
"""What stock lm-eval sends with a scoring request; no effect on log-probabilities, kept so that requests are equal."""

NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Against a server's own (`generation_config: auto`, somebody else's server): log-probabilities do not feel them, but
the sampled token does, by which a continuation is called greedy or not."""

NEXT_TOKEN_MOST = 128
"""Token ids that one request may ask for: vLLM's MAX_LOGPROB_TOKEN_IDS."""

FORCED_TOGETHER = 16
"""Contexts whose continuations are asked in turns: few enough to stay in the server's cache meanwhile."""

ECHO_TOKEN, PROMPT_TOKEN = 1.0, 0.75
FORCED_STEP = 4.0
CALL = 12.0
CACHE_BLOCK = 16
"""What scoring costs, in tokens of an echoed prompt: each token echoed, or told without its text, each step of a forced
continuation, each prompt sent, and what of a cached context is computed again since vLLM keeps whole blocks. Only which
of two right methods is taken depends on them; docs/performance.md has the measurement."""

WORTH_SAVING = 0.05
"""Of what echo would cost in all: a few forced continuations among many echoes are steps one after the other, for which
everything waits in the end. In hellaswag four of 400 made the whole a seventh slower."""


class Method(StrEnum):
    ECHO = "echo"
    PROMPT = "prompt_logprobs"
    NEXT_TOKEN = "next_token"
    FORCED = "forced_decoding"
    TAIL = "tail_prefill"
    GENERATE = "generate"


Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One (context, continuation) pair in token ids, and where its answer belongs."""

    index: int
    context: Tokens
    """At least one token."""
    continuation: Tokens
    """At least one token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProb:
    """What a model says of one continuation."""

    index: int
    start: int
    """Tokens in front of it, which orders the parts of one continuation."""
    logprobs: tuple[float, ...]
    """Natural logarithms, one for each token."""
    is_greedy: bool
    """Whether each token was the most likely one; ties count, as in stock lm-eval."""

    @property
    def logprob(self) -> float:
        """Added up in the order of the tokens, as stock does: another order would round otherwise."""
        return sum(self.logprobs)


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoCall:
    """Score one pair by having the whole prompt echoed; the reference, right for continuations of any length."""

    pair: Scored
    also: Sequence[int] = ()
    """Other answers that it is too."""

    method = Method.ECHO
    path = COMPLETIONS
    group = Method.ECHO
    prefix = None

    @property
    def tokens(self) -> int:
        return len(self.pair.context) + len(self.pair.continuation) + 1

    def body(self, *more: "EchoCall") -> dict[str, Any]:
        return {
            "prompt": _prompts([*call.pair.context, *call.pair.continuation] for call in (self, *more)),
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": ECHO_SEED,
            "echo": True,
        }

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb for each index. Raises RequestError for a reply without log-probabilities."""
        got = _logprobs(reply, self.method)
        start, end = len(self.pair.context), len(self.pair.context) + len(self.pair.continuation)
        tokens, best = ((got.get(name) or [])[start:end] for name in ("token_logprobs", "top_logprobs"))
        if not len(tokens) == len(best) == end - start or None in tokens or not all(best):
            raise RequestError(
                f"an echo reply lacks log-probabilities for tokens {start} to {end - 1} of its prompt "
                f"(got {tokens}): does the server support `echo` with `logprobs`?"
            )
        greedy = all(t >= max(b.values()) for t, b in zip(tokens, best, strict=True))
        for index in (self.pair.index, *self.also):
            yield LogProb(index=index, start=start, logprobs=tuple(tokens), is_greedy=greedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCall:
    """Score one pair by the log-probabilities of its whole prompt, as token ids: an echo of which nothing is turned
    into text, which costs a server more than computing it where the model is small."""

    pair: Scored
    also: Sequence[int] = ()
    """Other answers that it is too."""

    method = Method.PROMPT
    path = GENERATE
    group = None
    prefix = None

    @property
    def tokens(self) -> int:
        return len(self.pair.context) + len(self.pair.continuation) + 1

    def body(self) -> dict[str, Any]:
        return _whole_prompt(self.pair.context, self.pair.continuation)

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb for each index; none where the rows are not those of this prompt."""
        _choice(reply)
        rows = reply.get("prompt_logprobs") or []
        start = len(self.pair.context)
        if len(rows) == start + len(self.pair.continuation) and (found := _told(rows[start:], self.pair.continuation)):
            for index in (self.pair.index, *self.also):
                yield LogProb(index=index, start=start, logprobs=found[0], is_greedy=found[1])


def _whole_prompt(context: Tokens, continuation: Tokens, **sampling: Any) -> dict[str, Any]:
    """Token ids in, log-probabilities of the prompt out, each with the likeliest token's."""
    return {
        "token_ids": [*context, *continuation],
        "sampling_params": {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 1, "detokenize": False, **sampling},
    }


def _told(rows: Sequence[Any], tokens: Tokens) -> tuple[tuple[float, ...], bool] | None:
    """What rows of prompt log-probabilities say of these tokens: their own, and whether each was the likeliest; None
    where a row tells of something else, or of no number (null: a model that computes NaN)."""
    wanted = [str(token) for token in tokens]
    if not all(row and token in row for row, token in zip(rows, wanted, strict=True)):
        return None
    logprobs = tuple(row[token]["logprob"] for row, token in zip(rows, wanted, strict=True))
    every = [[other["logprob"] for other in row.values()] for row in rows]
    if any(None in some for some in every):
        return None
    return logprobs, all(logprob >= max(some) for logprob, some in zip(logprobs, every, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenCall:
    """Score all one-token continuations of one context at once."""

    context: Tokens
    indices_by_token: Mapping[int, Sequence[int]]
    """Continuation token id -> answers that it belongs to; at most NEXT_TOKEN_MOST ids."""

    method = Method.NEXT_TOKEN
    path = COMPLETIONS

    @property
    def group(self) -> Hashable:
        return self.method, tuple(self.indices_by_token)

    @property
    def prefix(self) -> Tokens:
        return self.context

    @property
    def tokens(self) -> int:
        return len(self.context) + 1

    def body(self, *more: "NextTokenCall") -> dict[str, Any]:
        return {
            "prompt": _prompts(call.context for call in (self, *more)),
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "logprob_token_ids": list(self.indices_by_token),
            "return_tokens_as_token_ids": True,
            "seed": ECHO_SEED,
            # A context that ends where the model wants to stop must still be answered.
            "ignore_eos": True,
            **NO_PENALTIES,
        }

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb for each index. Raises RequestError when a token that was asked for is missing."""
        first = next(iter(_logprobs(reply, self.method).get("top_logprobs") or ()), None) or {}
        # Besides the ids asked for, vLLM reports the sampled token: at temperature 0 the most likely one.
        best = max(first.values(), default=0.0)
        for token, indices in self.indices_by_token.items():
            logprob = first.get(f"token_id:{token}")
            if logprob is None:
                raise RequestError(
                    f"a next-token reply lacks token id {token} (got {sorted(first)}): the server does not support "
                    "`logprob_token_ids`, which vLLM has since 0.32"
                )
            for index in indices:
                yield LogProb(index=index, start=len(self.context), logprobs=(logprob,), is_greedy=logprob >= best)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcedCall:
    """Score one continuation by having the server write it behind its context; see serving/forced_decoding.py."""

    context: Tokens
    continuation: Tokens
    indices: Sequence[int]
    verdicts: Tokens
    """Tokens that say how many of the continuation's first ones were greedy: not known, 0, 1, ..."""
    batch: int
    """Calls of a batch may share a request: they have the same verdicts, and contexts whose sums differ."""

    method = Method.FORCED
    path = COMPLETIONS

    @property
    def group(self) -> Hashable:
        return self.method, self.batch

    @property
    def prefix(self) -> Tokens:
        return self.context

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.continuation) + 1

    def body(self, *more: "ForcedCall") -> dict[str, Any]:
        calls = (self, *more)
        return {
            "prompt": _prompts(call.context for call in calls),
            "temperature": 0,
            "max_tokens": max(len(call.continuation) for call in calls) + 1,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "seed": ECHO_SEED,
            "ignore_eos": True,
            "stop_token_ids": self.verdicts,
            "vllm_xargs": {
                "forced": [token for call in calls for token in call.continuation],
                "lengths": [len(call.continuation) for call in calls],
                "sums": [sum(call.context) for call in calls],
                "verdicts": self.verdicts,
            },
        }

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb for each index; none where something else was written, or what was greedy is not known."""
        got = _logprobs(reply, self.method)
        end = len(self.continuation)
        tokens, logprobs = (list(got.get(name) or ()) for name in ("tokens", "token_logprobs"))
        verdicts = [f"token_id:{token}" for token in self.verdicts]
        written = [f"token_id:{token}" for token in self.continuation]
        if tokens[:end] != written or tokens[end:] not in [[verdict] for verdict in verdicts[1:]]:
            return
        greedy = verdicts.index(tokens[end]) - 1
        start, found = len(self.context), tuple(logprobs[:end])
        for index in self.indices:
            yield LogProb(index=index, start=start, logprobs=found, is_greedy=greedy == end)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailCall:
    """Score one continuation from the rows that a prefill computes behind its cached context: vLLM's V2 runner."""

    context: Tokens
    continuation: Tokens
    indices: Sequence[int]

    method = Method.TAIL
    path = GENERATE
    group = None

    @property
    def prefix(self) -> Tokens:
        return self.context

    @property
    def tokens(self) -> int:
        return len(self.context) + len(self.continuation) + 1

    def body(self) -> dict[str, Any]:
        # Unset it would be true: vLLM wants to be asked before it leaves out the rows of cached tokens.
        return _whole_prompt(self.context, self.continuation, skip_reading_prefix_cache=False)

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb for each index; none where the cache reached into the continuation, or rows are missing because
        the prompt was begun twice. Raises RequestError where it is not told how many tokens were cached."""
        _choice(reply)
        cached = ((reply.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is None:
            raise RequestError("a tail reply does not tell how many tokens were cached: --enable-prompt-tokens-details")
        computed = reply.get("prompt_logprobs") or []
        if cached >= len(self.context) or len(computed) < len(self.context) + len(self.continuation) - cached:
            return
        # What the V1 runner has in front of them was never written to: only these are looked at.
        if found := _told(computed[-len(self.continuation) :], self.continuation):
            for index in self.indices:
                yield LogProb(index=index, start=len(self.context), logprobs=found[0], is_greedy=found[1])


ScoringCall = EchoCall | PromptCall | NextTokenCall | ForcedCall | TailCall


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a model wrote."""

    text: str
    finish_reason: str
    """`stop` (a stop string or end of text) or `length`."""
    tokens: int
    stop_token: int | None = None
    """The token that ended it: one of `stop_token_ids`, or a second end-of-text token of the checkpoint."""


class Packed:
    """Token ids in two or three bytes each instead of eight: tens of thousands of long prompts may wait."""

    __slots__ = ("_compressed", "length")

    def __init__(self, tokens: Sequence[int]) -> None:
        self.length = len(tokens)
        self._compressed = zlib.compress(array("I", tokens).tobytes(), level=1)

    def tokens(self) -> list[int]:
        return array("I", zlib.decompress(self._compressed)).tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """Have one prompt continued."""

    index: int
    prompt: Packed
    parameters: Mapping[str, Any]
    """The body's sampling part; `max_tokens` is always there."""

    method = Method.GENERATE
    path = COMPLETIONS
    group = None
    prefix = None

    @property
    def tokens(self) -> int:
        return self.prompt.length + int(self.parameters["max_tokens"])

    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt.tokens(), **self.parameters}

    def generation(self, reply: Mapping[str, Any]) -> Generation:
        """The reply's one choice. Raises RequestError for a reply without text, or to another prompt."""
        choice = _choice(reply)
        if (read := reply["usage"]["prompt_tokens"]) != self.prompt.length:
            raise RequestError(
                f"a server read {read} tokens of a prompt of {self.prompt.length}: it shortens long prompts or encodes "
                "them anew, and answers another question; set `max_model_len` to what it takes whole"
            )
        if choice["text"] is None:
            raise RequestError(
                "a generation came back without text: does the server parse reasoning out of its answers?"
            )
        return Generation(
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            tokens=reply["usage"]["completion_tokens"],
            stop_token=reason if isinstance(reason := choice.get("stop_reason"), int) else None,
        )


FINISHED = ("stop", "length", "repetition")
"""How vLLM ends an answer that it has computed. A server that is told to stop ends those in flight with `abort`, the
text as far as it came and status 200: kept, they would be taken for the model's own on every resume."""


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reply's one choice; raises PassingFault for one that was not computed to its end."""
    (choice,) = reply["choices"]
    if (reason := choice.get("finish_reason", FINISHED[0])) not in FINISHED:
        raise PassingFault(f"a server gave up an answer (finish_reason {reason!r})")
    found: Mapping[str, Any] = choice
    return found


def _logprobs(reply: Mapping[str, Any], method: Method) -> Mapping[str, Any]:
    choice = _choice(reply)
    if not choice.get("logprobs"):
        raise RequestError(
            f"a server answered a request for log-probabilities ({method}) with `logprobs: null`; stock lm-eval would "
            "stop with a TypeError here. A server that keeps log-probabilities to itself cannot be scored: use vLLM's"
        )
    found: Mapping[str, Any] = choice["logprobs"]
    return found


def _prompts(prompts: Iterable[Sequence[int]]) -> Sequence[Any]:
    """One prompt as stock lm-eval sends it, several as a list of them."""
    several = list(prompts)
    return several if len(several) > 1 else several[0]


# --- Planning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Edge:
    """Tokens that follow a context and belong to the continuations of these pairs, as a whole or as a part."""

    context: Tokens
    tokens: Tokens
    indices: tuple[int, ...]


class Assembly:
    """Answers of calls -> answers of pairs: where continuations share their first tokens, those are asked once."""

    def __init__(self, pairs: Sequence[Scored], edges: Iterable[_Edge]) -> None:
        self._pairs = {pair.index: pair for pair in pairs}
        self._owed = Counter(index for edge in edges for index in edge.indices)
        self._parts: dict[int, list[LogProb]] = defaultdict(list)

    def add(self, found: Iterable[LogProb]) -> list[LogProb]:
        """The pairs that are answered by now because of what a call `found`."""
        whole = []
        for part in found:
            self._parts[part.index].append(part)
            if len(self._parts[part.index]) == self._owed[part.index]:
                parts = sorted(self._parts.pop(part.index), key=lambda part: part.start)
                del self._pairs[part.index]
                whole.append(
                    LogProb(
                        index=part.index,
                        start=parts[0].start,
                        logprobs=tuple(itertools.chain.from_iterable(some.logprobs for some in parts)),
                        is_greedy=all(some.is_greedy for some in parts),
                    )
                )
        return whole

    def missing(self) -> list[Scored]:
        """Pairs without an answer after all calls: their method could not tell, and they are left to echo."""
        return list(self._pairs.values())


_Way = tuple[float, list[tuple[Method, "_Edge"]]]
"""What it costs to ask for the continuations of a context, and how they are asked."""


def scoring_calls(pairs: Sequence[Scored], *, methods: Collection[Method]) -> tuple[list[ScoringCall], Assembly]:
    """The calls that answer all `pairs` by the cheapest of `methods`, and what puts their answers together.

    Echo is always allowed; all prompts are asked for whole where the others would save next to nothing. Distinct
    contexts keep their order; all that follows one stands together, so that the server still has it in its cache, and
    so do contexts of a common prefix, where `pairs` have them so.
    """
    by_context: dict[Tokens, dict[Tokens, list[int]]] = {}
    for pair in pairs:
        by_context.setdefault(pair.context, {}).setdefault(pair.continuation, []).append(pair.index)
    whole = Method.PROMPT if Method.PROMPT in methods else Method.ECHO
    longer = next((m for m in (Method.FORCED, Method.TAIL) if m in methods), whole)
    cheaper: list[_Way] = []
    by_whole: list[_Way] = []
    contexts = list(by_context)
    for place, (context, indices) in enumerate(by_context.items()):
        cost, found = _cheapest(context, indices, longer, next_token=Method.NEXT_TOKEN in methods)
        neighbours = contexts[max(0, place - 1) : place] + contexts[place + 1 : place + 2]
        cached = max((common_length(context, other) for other in neighbours), default=0)
        whole_cost = sum(_whole_cost(context, continuation, whole) for continuation in indices)
        by_whole.append((whole_cost, [(whole, _edge(context, ids, some)) for ids, some in indices.items()]))
        cheaper.append(min(by_whole[-1], (cost + len(context) - cached, found), key=lambda way: way[0]))
    saves = sum(cost for cost, _ in cheaper) < (1 - WORTH_SAVING) * sum(cost for cost, _ in by_whole)
    edges = [edge for _, found in (cheaper if saves else by_whole) for edge in found]
    by_method: dict[Method, list[_Edge]] = defaultdict(list)
    for method, edge in edges:
        by_method[method].append(edge)
    calls = [call for method, some in by_method.items() for call in calls_by(method, some)]
    return calls, Assembly(pairs, (edge for _, edge in edges))


def edges_of(pairs: Iterable[Scored]) -> list[_Edge]:
    """Each pair by itself, whole."""
    return [_edge(pair.context, pair.continuation, [pair.index]) for pair in pairs]


def _edge(context: Tokens, tokens: Tokens, indices: Sequence[int]) -> _Edge:
    return _Edge(context=context, tokens=tokens, indices=tuple(indices))


def _whole_cost(context: Tokens, continuation: Tokens, method: Method) -> float:
    token = PROMPT_TOKEN if method is Method.PROMPT else ECHO_TOKEN
    return CALL + token * (len(context) + len(continuation))


def _cheapest(
    context: Tokens, indices: Mapping[Tokens, Sequence[int]], longer: Method, *, next_token: bool
) -> tuple[float, list[tuple[Method, _Edge]]]:
    """What it costs to ask for these continuations behind a cached context, and how; `longer` is the method for those
    of several tokens. First tokens that several share are asked once where that is cheaper."""
    by_first: dict[int, list[Tokens]] = defaultdict(list)
    for continuation in indices:
        by_first[continuation[0]].append(continuation)
    total, edges, singles = 0.0, [], False
    for group in by_first.values():
        each = [_one(context, continuation, indices[continuation], longer, next_token) for continuation in group]
        cost, found = sum(c for c, _ in each), [edge for _, edge in each]
        if len(group) > 1:
            shared = min(group)[: common_length(min(group), max(group))]
            rests = {c[len(shared) :]: indices[c] for c in group if len(c) > len(shared)}
            first = _one(context, shared, [i for c in group for i in indices[c]], longer, next_token)
            rest_cost, rest = _cheapest(context + shared, rests, longer, next_token=next_token)
            if first[0] + rest_cost < cost:
                cost, found = first[0] + rest_cost, [first[1], *rest]
        total += cost
        edges += found
        singles |= any(method is Method.NEXT_TOKEN and edge.context == context for method, edge in found)
    return total + CALL * singles, edges


def _one(
    context: Tokens, tokens: Tokens, indices: Sequence[int], longer: Method, next_token: bool
) -> tuple[float, tuple[Method, _Edge]]:
    """What one edge costs behind a cached context, and how it is asked."""
    edge = _edge(context, tokens, indices)
    if len(tokens) == 1 and next_token:
        return 1.0, (Method.NEXT_TOKEN, edge)  # the request is paid for once, by all of them
    if longer is Method.FORCED:
        return CALL + FORCED_STEP * (len(tokens) + 1), (longer, edge)
    if longer is Method.TAIL:
        return CALL + CACHE_BLOCK + len(tokens), (longer, edge)
    return _whole_cost(context, tokens, longer), (longer, edge)


def calls_by(method: Method, edges: Sequence[_Edge]) -> list[ScoringCall]:
    """The calls that ask for all `edges` by one method; by the next token only edges of one token can be asked for."""
    match method:
        case Method.NEXT_TOKEN:
            return list(_next_token_calls(edges))
        case Method.FORCED:
            return list(_forced_calls(edges))
        case Method.TAIL:
            return [TailCall(context=e.context, continuation=e.tokens, indices=e.indices) for e in edges]
    kind = PromptCall if method is Method.PROMPT else EchoCall
    return [
        kind(pair=Scored(index=e.indices[0], context=e.context, continuation=e.tokens), also=e.indices[1:])
        for e in edges
    ]


def _next_token_calls(edges: Iterable[_Edge]) -> Iterator[NextTokenCall]:
    by_context: dict[Tokens, dict[int, list[int]]] = defaultdict(dict)
    for edge in edges:
        # Two may ask the same: what one context ends with may be what the continuations of another share.
        by_context[edge.context].setdefault(edge.tokens[0], []).extend(edge.indices)
    for context, indices in by_context.items():
        rest = iter(indices.items())
        while some := dict(islice(rest, NEXT_TOKEN_MOST)):
            yield NextTokenCall(context=context, indices_by_token=some)


def _forced_calls(edges: Sequence[_Edge]) -> Iterator[ForcedCall]:
    """Rounds over a few contexts at a time: the first continuation of each, the second of each, ..."""
    by_context: dict[Tokens, list[_Edge]] = defaultdict(list)
    for edge in edges:
        by_context[edge.context].append(edge)
    number = count()
    contexts = list(by_context)
    for start in range(0, len(contexts), FORCED_TOGETHER):
        some = [by_context[context] for context in contexts[start : start + FORCED_TOGETHER]]
        for turn in itertools.zip_longest(*some):
            waiting = [edge for edge in turn if edge is not None]
            while waiting:
                by_sum = {sum(edge.context): edge for edge in reversed(waiting)}
                together = [edge for edge in waiting if by_sum[sum(edge.context)] is edge]
                waiting = [edge for edge in waiting if by_sum[sum(edge.context)] is not edge]
                yield from _forced_batch(together, next(number))


def _forced_batch(edges: Sequence[_Edge], number: int) -> Iterator[ForcedCall]:
    taken = {token for edge in edges for token in edge.tokens}
    longest = max(len(edge.tokens) for edge in edges)
    verdicts = tuple(islice((token for token in count() if token not in taken), longest + 2))
    for edge in edges:
        yield ForcedCall(
            context=edge.context,
            continuation=edge.tokens,
            indices=edge.indices,
            verdicts=verdicts,
            batch=number,
        )
