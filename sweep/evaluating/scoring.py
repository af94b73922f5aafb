"""Log-likelihood and generation requests -> calls to a server, with the fewest tokens that it must compute.

The reference is stock lm-eval's `local-completions` with tokenized requests: each pair a prompt of its own, which
comes back with the log-probabilities of all its tokens (`EchoCall`). Where continuations are one token, all those of a
context become one request for the next token's log-probabilities instead (`NextTokenCall`): the few-shot prefix is
computed once and stays in vLLM's prefix cache, which an echo request must ignore. preflight.py proves on the live
server that both agree.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sweep.errors import PassingFault, RequestError

ECHO_SEED = 1234
"""What stock lm-eval sends with a scoring request; no effect on log-probabilities, kept so that requests are equal."""

NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Against a server's own (`generation_config: auto`, somebody else's server): log-probabilities do not feel them, but
the sampled token does, by which a continuation is called greedy or not."""

NEXT_TOKEN_MOST = 128
"""Token ids that one request may ask for: vLLM's MAX_LOGPROB_TOKEN_IDS."""


class Method(StrEnum):
    ECHO = "echo"
    NEXT_TOKEN = "next_token"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One (context, continuation) pair in token ids, and where its answer belongs."""

    index: int
    context: tuple[int, ...]
    """At least one token."""
    continuation: tuple[int, ...]
    """At least one token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProb:
    """What a model says of one continuation."""

    index: int
    logprob: float
    """Natural logarithm, summed over the continuation's tokens."""
    is_greedy: bool
    """Whether each token was the most likely one; ties count, as in stock lm-eval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EchoCall:
    """Score one pair by having the whole prompt echoed; the reference, right for continuations of any length."""

    pair: Scored

    method = Method.ECHO

    @property
    def tokens(self) -> int:
        return len(self.pair.context) + len(self.pair.continuation) + 1

    def body(self) -> dict[str, Any]:
        return {
            "prompt": [*self.pair.context, *self.pair.continuation],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": ECHO_SEED,
            "echo": True,
        }

    def logprobs(self, reply: Mapping[str, Any]) -> Iterator[LogProb]:
        """One LogProb. Raises RequestError for a reply without log-probabilities."""
        got = _logprobs(reply, self.method)
        start, end = len(self.pair.context), len(self.pair.context) + len(self.pair.continuation)
        tokens, best = ((got.get(name) or [])[start:end] for name in ("token_logprobs", "top_logprobs"))
        if not len(tokens) == len(best) == end - start or None in tokens or not all(best):
            raise RequestError(
                f"an echo reply lacks log-probabilities for tokens {start} to {end - 1} of its prompt "
                f"(got {tokens}): does the server support `echo` with `logprobs`?"
            )
        greedy = all(t >= max(b.values()) for t, b in zip(tokens, best, strict=True))
        yield LogProb(index=self.pair.index, logprob=sum(tokens), is_greedy=greedy)


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenCall:
    """Score all one-token continuations of one context at once."""

    context: tuple[int, ...]
    indices_by_token: Mapping[int, tuple[int, ...]]
    """Continuation token id -> answers that it belongs to; at most NEXT_TOKEN_MOST ids."""

    method = Method.NEXT_TOKEN

    @property
    def tokens(self) -> int:
        return len(self.context) + 1

    def body(self) -> dict[str, Any]:
        return {
            "prompt": self.context,
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
                yield LogProb(index=index, logprob=logprob, is_greedy=logprob >= best)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """What a model wrote."""

    text: str
    finish_reason: str
    """`stop` (a stop string or end of text) or `length`."""
    tokens: int
    stop_token: int | None = None
    """The token that ended it: one of `stop_token_ids`, or a second end-of-text token of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """Have one prompt continued."""

    index: int
    prompt: tuple[int, ...]
    parameters: Mapping[str, Any]
    """The body's sampling part; `max_tokens` is always there."""

    method = Method.GENERATE

    @property
    def tokens(self) -> int:
        return len(self.prompt) + int(self.parameters["max_tokens"])

    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **self.parameters}

    def generation(self, reply: Mapping[str, Any]) -> Generation:
        """The reply's one choice. Raises RequestError for a reply without text."""
        choice = _choice(reply)
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


def scoring_calls(pairs: Sequence[Scored], *, next_token: bool) -> list[EchoCall | NextTokenCall]:
    """The calls that answer all `pairs`, in an order that keeps prompts with a common prefix together.

    With `next_token`, one-token continuations of the same context share a request; everything else is echoed.
    Every index of `pairs` is answered by exactly one call.
    """
    by_context: dict[tuple[int, ...], dict[int, list[int]]] = {}
    calls: list[EchoCall | NextTokenCall] = []
    for pair in pairs:
        if next_token and len(pair.continuation) == 1:
            by_context.setdefault(pair.context, {}).setdefault(pair.continuation[0], []).append(pair.index)
        else:
            calls.append(EchoCall(pair=pair))
    for context, indices in by_context.items():
        ids = list(indices)
        for start in range(0, len(ids), NEXT_TOKEN_MOST):
            some = {token: tuple(indices[token]) for token in ids[start : start + NEXT_TOKEN_MOST]}
            calls.append(NextTokenCall(context=context, indices_by_token=some))
    return calls
