"""lm-eval's LM interface over client + store.

A request whose answer is stored is answered from the store; only what is missing is tokenized, checked for length and
sent. Prompts are lm-eval's, byte for byte: encoding, window and stop-string rules are those of its `local-completions`
with tokenized requests (lm_eval 0.4.13: models/api_models.py, models/openai_completions.py, api/model.py).
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import msgspec
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sweep.errors import TaskError
from sweep.evaluating.client import Call, Client
from sweep.evaluating.encoding import Encoder, Tokens
from sweep.evaluating.estimate import Estimate, Request
from sweep.evaluating.preflight import Facts
from sweep.evaluating.scoring import GenerateCall, Method, Packed, Scored, ScoringCall, scoring_calls
from sweep.planning.config import Overflow
from sweep.record import Counts
from sweep.results.store import Response, response_key

GENERATION_SEED = 1234
"""What `local-completions` sends with every request."""

DEFAULT_MAX_GEN_TOKS = 256
"""What `local-completions` generates at most where neither task nor config says."""


A = TypeVar("A", "PairAnswer", "GenerationAnswer")

C = TypeVar("C", bound=Call)

Sample = tuple[str, int]
"""lm-eval's name of a (sub)task, and the number of a document in it."""

LOOKUP_KEYS = 16_384
"""Keys that are looked up at a time: neither driver nor evaluator holds a large cell's answers twice, and the driver's
loop, which does 100,000 a second, stands still for none of them."""

LISTED = 5
"""Subtasks that an error names before it counts the rest."""

Answer = Callable[[int, Any], None]
"""Takes the index of an owed request and its answer."""


class Channel(Protocol):
    """What an evaluation needs from the driver's side; every method may be called from the evaluating thread only."""

    def facts(self) -> Facts:
        """Of the model's server: at once when they are stored, else when its first server is ready."""
        ...

    def known(self, keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        """The stored answers among `keys`."""
        ...

    def owed(self, requests: int) -> None:
        """So many requests are about to need a server."""
        ...

    def answered(self, response: Response) -> None:
        """Hand over one answer; it is durable within two seconds."""
        ...

    def earlier(self) -> Mapping[bytes, bytes]:
        """When all that was handed over is durable: the answers that are stored in place of some of it, since another
        cell had asked the same before. They are the ones that a replay gives."""
        ...

    def progress(
        self, *, done: int, total: int, reused: int, live: Callable[[], Mapping[str, float]] = dict
    ) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PairAnswer:
    """The stored answer of a (context, continuation) pair or of a rolling window."""

    logprob: float
    is_greedy: bool
    cut: int = 0
    """Tokens cut from the left of the context."""
    method: Method = Method.ECHO
    engine: str = ""
    """Version of vLLM that computed it."""
    tokens: int = 0
    """Of the continuation. 0: it has none of its own behind the context, and counts as certain, as in the reference."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationAnswer:
    """The stored answer of a generate_until request."""

    text: str
    """As the server gave it: with the reasoning, which is cut off when the answer is handed to lm-eval."""
    finish_reason: str
    tokens: int
    cut: int = 0
    stop_token: int | None = None
    """The token of `stop_token_ids` that ended it."""
    method: Method = Method.GENERATE
    engine: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Generate:
    """One generate_until request."""

    prompt: str
    parameters: dict[str, Any]
    """The request body without the prompt; with it all that the answer depends on."""
    until: tuple[str, ...] = ()
    """Stop strings that end the answer behind the reasoning. They are not sent, since reasoning may hold them."""
    stop_tokens: tuple[int, ...] = ()
    """Those of the body's `stop_token_ids` that stand for stop strings."""


class _TooLongError(Exception):
    """Requests that the server's length does not hold; caught where it is known whose they are."""

    def __init__(self, excess: Sequence[int], *, hopeless: bool, what: str) -> None:
        """`excess`: tokens too many of each request that was asked for. `hopeless`: cutting contexts does not help."""
        super().__init__("too long")
        self.excess = excess
        self.hopeless = hopeless
        self.what = what


@dataclass(kw_only=True)
class Departures:
    """Requests of a cell, counted by what is not as stock lm-eval or its reader would expect."""

    seeded_repeats: int = 0
    """Sampled, with another seed than stock lm-eval's because they repeat an earlier one."""
    made_greedy: int = 0
    """With `do_sample: false` beside a temperature, which stock lm-eval sends."""
    never_sampled: int = 0
    """With `do_sample: true` and no temperature: stock lm-eval sends 0, and so do we."""
    without_bos: int = 0
    """With a prompt that begins without the BOS which the tokenizer puts before a text."""
    outside_template: int = 0
    """With a prompt that is no chat as the template rendered it."""
    without_instruction: int = 0
    """With a prompt that does not hold the system instruction."""
    unfinished_reasoning: int = 0
    """Answers without the `think_end_token`: they are taken whole."""
    stopped_at: Counter[str] = field(default_factory=Counter)
    """Answers that ended at a stop string which is a special token, by this token."""


class SweepLM(LM):  # type: ignore[misc]
    """One model to lm-eval; made for each cell."""

    def __init__(
        self,
        *,
        cell: str,
        fingerprint: str,
        tokenizer: Any,
        overflow: Overflow,
        client: Client,
        channel: Channel,
        scoring: Collection[Method] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        system_instruction: str | None = None,
        think_end_token: str | None = None,
    ) -> None:
        """`scoring` are the only methods to score by; empty leaves it to what the server was seen to do."""
        super().__init__()
        self.scoring = scoring
        self.cell = cell
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.encoder = Encoder(tokenizer)
        self.overflow = overflow
        self.client = client
        self.channel = channel
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.system_instruction = system_instruction
        self.think_end_token = think_end_token
        self.counts = Counts()
        self.methods: Counter[str] = Counter()
        self.engines: Counter[str] = Counter()
        """Distinct requests by the way that their answers were computed, and by what computed them, now or before."""
        self.without_tokens = 0
        """Continuations that have no tokens of their own."""
        self.departures = Departures()
        self._rendered: set[str] = set()
        self.waited_s = 0.0
        """For a server, before the first request could be sent."""
        self._done = 0
        self.estimate = Estimate({})

    # What lm-eval asks of a model that renders chats.

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.tokenizer.get_chat_template()) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        rendered = str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_kwargs,
            )
        )
        self._rendered.add(rendered)
        return rendered

    # The three kinds of request.

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [(str(context), str(continuation)) for context, continuation in (r.args for r in requests)]
        self._look_at({context for context, _ in pairs})
        answers, distinct = self._answers(
            "loglikelihood",
            pairs,
            PairAnswer,
            samples=_samples(requests),
            identity=self._effective,
            ask=self._ask_pairs,
            watch=lambda keys: self._watch(requests, keys, itertools.repeat(_pair)),
        )
        self._count(truncated=sum(a.cut > 0 for a in distinct))
        self.without_tokens += sum(a.tokens == 0 for a in distinct)
        return [_pair(a) for a in answers]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        # Windows are requests of their own, so a long document is as durable as a short one. The reference keeps one
        # token of the context free for an answer and one for the prefix: hence two less than the server's length.
        texts = [str(text) for (text,) in (r.args for r in requests)]
        self._look_at(set(texts), begun=True)
        encoded = self.encoder.texts(texts)
        longest = self._facts().max_model_len - 2
        windows: list[list[tuple[tuple[int, ...], tuple[int, ...]]]] = []
        for tokens in encoded:
            rolling = get_rolling_token_windows(
                token_list=list(tokens), prefix_token=self.encoder.prefix_token_id, max_seq_len=longest, context_len=1
            )
            windows.append([(tuple(c), tuple(t)) for c, t in map(make_disjoint_window, rolling)])
        flat = list(itertools.chain.from_iterable(windows))
        answers, _ = self._answers("window", flat, PairAnswer, identity=lambda w: w, ask=self._ask_windows)
        rest = iter(answers)
        return [sum(answer.logprob for answer in itertools.islice(rest, len(w))) for w in windows]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        prompts = []
        seen: Counter[int] = Counter()
        said = self.departures
        for request in requests:
            text, arguments = request.args
            # lm-eval repeats a request by listing the same object again.
            repeat = seen[id(request)]
            seen[id(request)] += 1
            prompts.append(self.generation(str(text), arguments, repeat=repeat))
            asked, sent = arguments.get("temperature"), prompts[-1].parameters["temperature"]
            said.seeded_repeats += bool(repeat and sent)
            said.made_greedy += bool(asked and not sent)
            said.never_sampled += bool(arguments.get("do_sample") and not sent)
        self._look_at({wanted.prompt for wanted in prompts})
        generations, distinct = self._answers(
            "generate",
            prompts,
            GenerationAnswer,
            samples=_samples(requests),
            identity=lambda g: self._effective((g.prompt, g.parameters)),
            ask=self._ask_generations,
            watch=lambda keys: self._watch(requests, keys, (partial(self._text, wanted) for wanted in prompts)),
        )
        texts = [self._text(wanted, g) for g, wanted in zip(generations, prompts, strict=True)]
        each = {id(g): (g, wanted, text) for g, wanted, text in zip(generations, prompts, texts, strict=True)}
        for g, wanted, _ in each.values():
            if g.stop_token in wanted.stop_tokens:
                said.stopped_at[self._special[g.stop_token]] += 1
            said.unfinished_reasoning += bool(self.think_end_token) and str(self.think_end_token) not in g.text
        self._count(
            truncated=sum(g.cut > 0 for g in distinct),
            empty=sum(not text.strip() for _, _, text in each.values()),
            length_stopped=sum(g.finish_reason == "length" for g in distinct),
        )
        return texts

    def _text(self, wanted: _Generate, answer: GenerationAnswer) -> str:
        """What lm-eval is handed; of a reasoning model what lm-eval's own backends for them hand over: the text behind
        the last `think_end_token`, up to the first stop string."""
        if self.think_end_token is None:
            return answer.text
        return str(postprocess_generated_text(answer.text, list(wanted.until), self.think_end_token))

    def _look_at(self, prompts: Collection[str], *, begun: bool = False) -> None:
        """Count what of these distinct prompts is not as the template, the tokenizer or the user would have it.

        `begun`: each is sent behind the prefix token, as an empty one is in any case.
        """
        known = [prompt for prompt in prompts if prompt]
        self.departures.outside_template += sum(prompt not in self._rendered for prompt in known)
        if self.system_instruction is not None:
            instruction = self.system_instruction.strip()
            self.departures.without_instruction += sum(instruction not in prompt for prompt in known)
        if not begun and (bos := self._own_bos) is not None:
            self.departures.without_bos += sum(not prompt.startswith(bos) for prompt in known)

    # Stored answers first.

    def _answers(
        self,
        kind: str,
        items: Sequence[Any],
        answer_type: type[A],
        *,
        samples: Sequence[Sample] = (),
        identity: Callable[[Any], Any],
        ask: Callable[[Sequence[Any], Answer], None],
        watch: Callable[[Sequence[bytes]], None] = lambda _: None,
    ) -> tuple[list[A], Collection[A]]:
        """The answers of `items` in order, and those of distinct items, which is what is asked and counted.

        `ask` gets what no stored answer covers. `samples` says of each item whose it is, where it may be too long.
        `watch` gets the items' keys and tells the live estimate of them.
        """
        keys = [response_key(self.fingerprint, kind, identity(item)) for item in items]
        item_by_key = dict(zip(keys, items, strict=True))
        answer_by_key: dict[bytes, A] = {}
        distinct = iter(item_by_key)
        while some := list(itertools.islice(distinct, LOOKUP_KEYS)):
            known = self.channel.known(some)
            answer_by_key.update((key, msgspec.json.decode(text, type=answer_type)) for key, text in known.items())
        watch(keys)
        for key, known_before in answer_by_key.items():
            self.estimate.answered(key, known_before)
        owed = [key for key in item_by_key if key not in answer_by_key]
        self._done += len(item_by_key) - len(owed)
        self._count(requests=len(item_by_key), reused=len(item_by_key) - len(owed))
        self._show_progress()
        if owed:
            self.channel.owed(len(owed))

            engine = self._facts().engine

            def answer(index: int, value: A) -> None:
                key = owed[index]
                answer_by_key[key] = value = replace(value, engine=engine)
                self.channel.answered(
                    Response(key=key, cell=self.cell, method=value.method, answer=msgspec.json.encode(value))
                )
                self._done += 1
                self.estimate.answered(key, value)
                self._count(asked=1)
                self._show_progress()

            try:
                ask([item_by_key[key] for key in owed], answer)
            except _TooLongError as error:
                excess = dict(zip(owed, error.excess, strict=True))
                raise TaskError(
                    self._too_long(error, [(s, excess.get(k, 0)) for k, s in zip(keys, samples, strict=True)])
                ) from None
            for key, text in self.channel.earlier().items():
                answer_by_key[key] = msgspec.json.decode(text, type=answer_type)
        self.methods.update(str(answer.method) for answer in answer_by_key.values())
        self.engines.update(answer.engine for answer in answer_by_key.values())
        return [answer_by_key[key] for key in keys], answer_by_key.values()

    def _effective(self, request: Any) -> Any:
        """What identifies a request: its text, and the length it may be cut to where cutting is allowed."""
        if self.overflow is Overflow.TRUNCATE:
            return [request, self._facts().max_model_len]
        return request

    def _facts(self) -> Facts:
        """What the model's server can do; waits for it where nothing is stored."""
        start = time.monotonic()
        facts = self.channel.facts()
        self.waited_s += time.monotonic() - start
        return facts

    def _count(self, **more: int) -> None:
        self.counts = replace(self.counts, **{name: getattr(self.counts, name) + n for name, n in more.items()})

    def _show_progress(self) -> None:
        self.channel.progress(
            done=self._done, total=self.counts.requests, reused=self.counts.reused, live=self.estimate.values
        )

    def _watch(
        self, requests: Sequence[Instance], keys: Sequence[bytes], results: Iterable[Callable[[Any], Any]]
    ) -> None:
        samples = _samples(requests)
        chosen = self.estimate.chosen(samples)
        if not chosen:
            return
        watched, before = [], Counter[Sample]()
        for sample, request, key, result in zip(samples, requests, keys, results, strict=False):
            if sample in chosen:
                number = (request.idx, before[sample])
                before[sample] += 1
                watched.append(
                    Request(task=sample[0], document=sample[1], number=number, doc=request.doc, key=key, result=result)
                )
        self.estimate.watch(watched)

    # Asking a server.

    def _ask_pairs(self, pairs: Sequence[tuple[str, str]], answer: Answer) -> None:
        encoded = self._encode_pairs(pairs)
        # One token of the context stays free for the answer that every request must generate.
        longest = self._facts().max_model_len - 1
        cuts = self._cuts([(len(c), len(t)) for c, t in encoded], longest, what="continuation")
        scored = []
        for index, ((context, continuation), cut) in enumerate(zip(encoded, cuts, strict=True)):
            if continuation:
                scored.append(Scored(index=index, context=context[cut:], continuation=continuation))
            else:
                answer(index, PairAnswer(logprob=0.0, is_greedy=True))
        self._score(scored, cuts, answer)

    def _ask_windows(self, windows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], answer: Answer) -> None:
        scored = [Scored(index=i, context=c, continuation=t) for i, (c, t) in enumerate(windows)]
        self._score(scored, [0] * len(scored), answer)

    def _score(self, scored: Sequence[Scored], cuts: Sequence[int], answer: Answer) -> None:
        """By the fastest of the methods that were proven, and what these cannot tell by echo."""
        self._score_by(self.scoring or self._facts().methods, scored, cuts, answer)

    def _score_by(
        self, methods: Collection[Method], scored: Sequence[Scored], cuts: Sequence[int], answer: Answer
    ) -> None:
        length_by_index = {pair.index: len(pair.continuation) for pair in scored}
        calls, assembly = scoring_calls(scored, methods=methods)

        def parse(call: ScoringCall, reply: Mapping[str, Any]) -> None:
            for found in assembly.add(list(call.logprobs(reply))):
                value = PairAnswer(
                    logprob=found.logprob,
                    is_greedy=found.is_greedy,
                    cut=cuts[found.index],
                    tokens=length_by_index[found.index],
                    method=call.method,
                )
                answer(found.index, value)

        # Each has a token generated that nobody reads.
        self._count(prompt_tokens=sum(call.tokens - 1 for call in calls))
        self._send(calls, parse)
        if rest := assembly.missing():
            self._score_by((Method.ECHO,), rest, cuts, answer)

    def _ask_generations(self, wanted: Sequence[_Generate], answer: Answer) -> None:
        longest = self._facts().max_model_len - 1
        prompts = [Packed(tokens) for tokens in self.encoder.each(w.prompt for w in wanted)]
        rooms = [int(w.parameters["max_tokens"]) for w in wanted]
        cuts = self._cuts([(p.length, room) for p, room in zip(prompts, rooms, strict=True)], longest, what="answer")
        calls = [
            GenerateCall(index=i, prompt=Packed(prompt.tokens()[cut:]) if cut else prompt, parameters=w.parameters)
            for i, (prompt, cut, w) in enumerate(zip(prompts, cuts, wanted, strict=True))
        ]

        def parse(call: GenerateCall, reply: Mapping[str, Any]) -> None:
            found = call.generation(reply)
            self._count(generated_tokens=found.tokens)
            value = GenerationAnswer(
                text=found.text,
                finish_reason=found.finish_reason,
                tokens=found.tokens,
                cut=cuts[call.index],
                stop_token=found.stop_token,
            )
            answer(call.index, value)

        self._count(prompt_tokens=sum(call.prompt.length for call in calls))
        self._send(calls, parse)

    def _send(self, calls: Sequence[C], parse: Callable[[C, Mapping[str, Any]], None]) -> None:
        start, sent_before = time.monotonic(), self.client.traffic.first_sent is not None
        self.client.run(calls, parse)
        first_sent = self.client.traffic.first_sent
        if not sent_before and first_sent is not None:
            self.waited_s += first_sent - start

    def generation(self, prompt: str, arguments: Mapping[str, Any], *, repeat: int) -> _Generate:
        """`arguments` (lm-eval's generation_kwargs) as the body that `local-completions` would send, but for this:

        - Repeats of a sampled request get a seed each; the reference sends one for all, which makes them equal.
        - The end-of-text string is always a stop string; the reference adds it with one request in flight only.
        - `do_sample: false` means temperature 0; the reference drops it and sends the temperature.
        - A stop string that is a special token is sent as its id too: servers leave special tokens out of the text in
          which they look for stop strings. The end-of-text token ends an answer anyway.
        - Of a reasoning model (`think_end_token`) stop strings are kept back, as reasoning may hold them.
        """
        rest = dict(arguments)
        do_sample = rest.pop("do_sample", None)
        default = rest.pop("max_gen_toks", DEFAULT_MAX_GEN_TOKS)
        max_tokens = int(rest.pop("max_tokens", default))
        temperature = rest.pop("temperature", 0)
        if do_sample is False and temperature:
            temperature = 0
        seed = int(rest.pop("seed", GENERATION_SEED))
        until = rest.pop("until", None)
        stop = handle_stop_sequences(list(until) if isinstance(until, list | tuple) else until, self.eos)
        stop_tokens = [token for token, text in self._special.items() if text in stop and text != self.eos]
        kept_back: list[str] = []
        if self.think_end_token is not None:
            kept_back, stop = stop, [text for text in stop if text == self.eos]
            if any(text and text in self.think_end_token for text in self._special.values()):
                rest = {"skip_special_tokens": False, "spaces_between_special_tokens": False, **rest}
        if stop_tokens and rest.get("skip_special_tokens", True) and "stop_token_ids" not in rest:
            rest["stop_token_ids"] = stop_tokens
        else:
            stop_tokens = []
        parameters = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stop": stop,
            "seed": seed + (repeat if temperature else 0),
            **rest,
        }
        return _Generate(prompt=prompt, parameters=parameters, until=tuple(kept_back), stop_tokens=tuple(stop_tokens))

    # Tokens.

    @property
    def eos(self) -> str | None:
        token: str | None = self.tokenizer.eos_token
        return token

    @cached_property
    def _special(self) -> dict[int, str]:
        """The tokens that a server leaves out of its texts, by id."""
        return {i: str(token) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    @cached_property
    def _own_bos(self) -> str | None:
        """The BOS that the tokenizer by itself puts before a text; stock `local-completions` does not let it."""
        adds = self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]
        return str(self.tokenizer.bos_token) if adds else None

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        """Context and continuation ids of each pair; raises TaskError for a context that has none."""
        encoded = self.encoder.pairs(pairs)
        for (context_tokens, _), (context, continuation) in zip(encoded, pairs, strict=True):
            if not context_tokens:
                raise TaskError(
                    f"{self.cell}: a request has a context without tokens ({context[-40:]!r}, followed by "
                    f"{continuation[:40]!r}); stock lm-eval cannot score it either"
                )
        return encoded

    def _cuts(self, wanted: Sequence[tuple[int, int]], longest: int, *, what: str) -> list[int]:
        """How many tokens to cut from the left of each context; `wanted` is (context, room for its `what`) in tokens.

        Cuts where the config allows it, as the reference does; raises _TooLongError otherwise, before anything is sent.
        """
        if any(room >= longest for _, room in wanted):
            # A context has one token at least.
            raise _TooLongError([max(0, 1 + room - longest) for _, room in wanted], hopeless=True, what=what)
        excess = [max(0, context + room - longest) for context, room in wanted]
        if self.overflow is Overflow.ERROR and any(excess):
            raise _TooLongError(excess, hopeless=False, what=what)
        return excess

    def _too_long(self, error: _TooLongError, excess: Iterable[tuple[Sample, int]]) -> str:
        """Which samples are too long by how many tokens, by subtask, the worst first; and what to set."""
        most: dict[str, dict[int, int]] = {}
        for (task, doc), tokens in excess:
            of_task = most.setdefault(task, {})
            of_task[doc] = max(tokens, of_task.get(doc, 0))
        over = {task: [tokens for tokens in docs.values() if tokens] for task, docs in most.items()}
        worst = sorted((task for task in over if over[task]), key=lambda task: (-len(over[task]), -max(over[task])))
        listed = ", ".join(
            f"{task} {len(over[task])} of {len(most[task])} by up to {max(over[task])} tokens"
            for task in worst[:LISTED]
        )
        more = f" and {len(worst) - LISTED} more subtasks" if len(worst) > LISTED else ""
        length = self._facts().max_model_len
        needed = f"raise max_model_len to {length + max(max(over[task]) for task in worst)}"
        shorter = "" if error.what == "continuation" else ", lower the generated tokens (gen_kwargs: max_gen_toks)"
        if error.hopeless:
            said = f"leave no room for a context beside the {error.what} in max_model_len {length}"
            cure = f"{needed} and by what contexts need{shorter}"
        else:
            said = f"do not fit into max_model_len {length}"
            cure = (
                f"{needed} if the model was made for it, use fewer shots (num_fewshot){shorter}, or set "
                "`on_overflow: truncate` to cut contexts from the left as stock lm-eval does"
            )
        total = sum(map(len, most.values()))
        return f"{self.cell}: {sum(map(len, over.values()))} of {total} samples {said}: {listed}{more}; {cure}"


def _pair(answer: PairAnswer) -> tuple[float, bool]:
    return answer.logprob, answer.is_greedy


def _samples(requests: Iterable[Instance]) -> list[Sample]:
    return [(str(request.task_name), int(request.doc_id or 0)) for request in requests]
