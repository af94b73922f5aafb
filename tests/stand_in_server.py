"""A double of vLLM's OpenAI server: same arguments, key, addresses, process tree and shapes of answers, no model.

As the engine of a sweep (`LMSWEEP_ENGINE="<python> tests/stand_in_server.py"`) or by hand:

    VLLM_API_KEY=k python tests/stand_in_server.py --model any --served-model-name m --host 127.0.0.1 --port 20001

Answers
    They depend on the request alone, so that a run can be compared with another to the last digit: on the model's name,
    the tokens before, and with a temperature above 0 on the seed. After a prefix one token is the best one (-0.5); any
    other has between -1 and -6. They are no distribution: they do not sum to one. Token `t` reads " t" (" 17"), and
    token 0 ends a text, about one time in `end_every`. A text is encoded by the tokenizer.json in the folder that
    --tokenizer or --model names; where there is none, its token ids are its UTF-8 bytes.

From vLLM's arguments: --model, --tokenizer, --served-model-name, --lora-modules, --host, --port, --max-model-len
(2048), --max-num-seqs (256; more wait, and the metrics say so), --logits-processors (ours forces continuations),
--enable-scale-out (with /inference/v1/generate), and of a server of several nodes --nnodes, --node-rank, --master-addr,
--master-port and --headless: the first part serves when all others have come to it, and does not notice when one of
them dies, as a GPU that waits for another's does not. The rest is accepted and has no effect.

Options of its own, each as `--stand-in-NAME VALUE` or as the environment variable `STAND_IN_NAME` in capitals (`env:`
of a model gives it to one server); see `Options` for what they mean:
    start_delay_s latency_s pace_s hurry_mark die_after die_mark hang_after mute_after toil_after refuse refuse_forced
    refuse_headless lose_port null_logprobs null_chat_logprobs no_chat no_tokenize no_echo echo_shift echo_offset
    echo_clip busy_above other_tokenizer end_every vocabulary tree leftovers ignore_term requests_log
"""

import argparse
import asyncio
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aiohttp import web

VERSION = "0.32.0"
END_OF_TEXT = 0
BEST = -0.5
BATCH_MOST = 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    start_delay_s: float = 0.0
    """Between taking the port and listening on it, as vLLM loads weights."""
    latency_s: float = 0.0
    """Added to each prompt of a request while it holds one of `--max-num-seqs` places."""
    pace_s: float = 0.0
    """Added besides for each new token that a prompt asks for, so that what is scored, and preflight, waits less."""
    hurry_mark: str = ""
    """A file; while it is there neither is added."""
    die_after: int = 0
    """Exit with code 1 in the middle of this completion request, counted from 1; 0 never."""
    die_mark: str = ""
    """A file that is written when `die_after` strikes; while it is there no server dies: one death in a whole sweep."""
    hang_after: int = 0
    """Answer no completion request any more after so many, with a /health that does; 0 never."""
    mute_after: int = 0
    """Do not answer /health any more after so many completion requests; 0 never."""
    toil_after: int = 0
    """Compute for ever, and answer nothing, after so many completion requests; 0 never."""
    refuse: str = ""
    """Print this to stderr and exit with code 1 instead of starting; `\\n` makes lines."""
    lose_port: str = ""
    """A file that is written when a server finds that a stranger has its port; while it is there no server does."""
    null_logprobs: int = 0
    """1 answers `logprobs: null` to every completion, as some servers do."""
    null_chat_logprobs: int = 0
    """1 does so for chats."""
    no_chat: int = 0
    """1 knows no chat, 2 has no chat template."""
    no_tokenize: int = 0
    """1 has no /tokenize, 2 shows no token ids in completions either."""
    refuse_forced: str = ""
    """What a start ends with where ForcedDecoding is among its logits processors."""
    refuse_headless: str = ""
    """What the start of a part that serves nothing ends with."""
    no_echo: int = 0
    """1 gives log-probabilities of generated tokens only, `echo` or not."""
    echo_shift: int = 0
    """Echoed log-probabilities belong to the token so many places further on."""
    echo_offset: float = 0.0
    """Added to echoed log-probabilities."""
    echo_clip: int = 0
    """1 echoes -100 for all but the best token, as servers do that keep a few."""
    busy_above: int = 0
    """Answer 429 to completion requests beyond so many at a time; 0 never."""
    other_tokenizer: int = 0
    """1 encodes texts otherwise: one token for two bytes."""
    end_every: int = 16
    """One in so many generated tokens ends the text."""
    vocabulary: int = 1000
    """Tokens that can be best or generated."""
    tree: int = 0
    """1 starts a child with a child, like vLLM's EngineCore and Worker; neither notices when we are killed."""
    leftovers: int = 0
    """1 lets both of the `tree` hold a file in /dev/shm and a socket in the temporary folder, and free neither."""
    ignore_term: int = 0
    """1 ignores SIGTERM, as a server that hangs."""
    requests_log: str = ""
    """A file that gets a line of JSON for each completion request: `pid`, `model` and the whole `body`."""

    def wait_s(self, new_tokens: int) -> float:
        hurry = self.hurry_mark and Path(self.hurry_mark).exists()
        return 0.0 if hurry else self.latency_s + self.pace_s * new_tokens

    @classmethod
    def parse(cls, arguments: list[str]) -> tuple["Options", list[str]]:
        """The options and what is left for vLLM's own."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for option in fields(cls):
            default = os.environ.get(f"STAND_IN_{option.name.upper()}", option.default)
            parser.add_argument(f"--stand-in-{option.name.replace('_', '-')}", type=option.type, default=default)
        found, rest = parser.parse_known_args(arguments)
        return cls(**{option.name: getattr(found, f"stand_in_{option.name}") for option in fields(cls)}), rest


class Refusal(Exception):
    """An error answer in vLLM's shape."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        kind = {400: "BadRequestError", 404: "NotFoundError", 429: "TooManyRequestsError"}[status]
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Prefix:
    """The state of the pretended model after some tokens."""

    state: int
    vocabulary: int
    end_every: int

    def then(self, token: int) -> "Prefix":
        return Prefix(zlib.crc32(token.to_bytes(8, "little"), self.state), self.vocabulary, self.end_every)

    @property
    def best(self) -> int:
        if self._roll(-1) % self.end_every == 0:
            return END_OF_TEXT
        return 1 + self.state % (self.vocabulary - 1)

    def logprob(self, token: int) -> float:
        return BEST if token == self.best else -(1 + self._roll(token) % 1000 / 200)

    def top(self, most: int) -> list[int]:
        """The `most` likeliest tokens, in order."""
        if most <= 1:
            return [self.best][:most]
        return sorted(range(self.vocabulary), key=lambda token: -self.logprob(token))[:most]

    def _roll(self, salt: int) -> int:
        # A CRC is linear: without the multiplication, likelihoods of different prefixes would differ by a constant XOR.
        return (zlib.crc32(salt.to_bytes(8, "little", signed=True), self.state) * 2654435761 & 0xFFFFFFFF) >> 7


@dataclass
class StandIn:
    options: Options
    models: dict[str, str | None]
    """Served name -> the base model's name for an adapter, None for a base."""
    key: str
    max_model_len: int
    places: asyncio.Semaphore
    tokenizer_file: Path
    forces: bool = False
    """It was given our logits processor, whose part of the answers it plays."""
    scales_out: bool = False
    """It has vLLM's endpoint for token ids in and out, and caches nothing there."""
    running: int = 0
    waiting: int = 0
    requests: int = 0
    finished: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt_tokens": 0, "generation_tokens": 0})

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.guard], client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/version", self.version),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.list_models),
                web.post("/v1/completions", self.complete),
            ]
        )
        if self.scales_out:
            app.router.add_post("/inference/v1/generate", self.generate)
        if self.options.no_chat != 1:
            app.router.add_post("/v1/chat/completions", self.chat)
        if not self.options.no_tokenize:
            app.router.add_post("/tokenize", self.tokenize)
        return app

    @web.middleware
    async def guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        # vLLM guards these, and nothing when it has no key.
        if self.key and request.path.startswith(("/v1", "/v2", "/inference")):
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or given != self.key:
                return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.status)

    async def health(self, _: web.Request) -> web.Response:
        while 0 < self.options.toil_after <= self.requests:
            pass
        if 0 < self.options.mute_after <= self.requests:
            await asyncio.Event().wait()
        return web.Response()

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": VERSION})

    async def metrics(self, _: web.Request) -> web.Response:
        figures = {
            "num_requests_running": ("gauge", self.running),
            "num_requests_waiting": ("gauge", self.waiting),
            "kv_cache_usage_perc": ("gauge", min(1.0, self.running / 256)),
            "num_preemptions_total": ("counter", 0),
            "prompt_tokens_total": ("counter", self.tokens["prompt_tokens"]),
            "generation_tokens_total": ("counter", self.tokens["generation_tokens"]),
            "request_success_total": ("counter", self.finished),
            "prefix_cache_queries_total": ("counter", 0),
            "prefix_cache_hits_total": ("counter", 0),
        }
        name = next(iter(self.models))
        lines = [
            f"# TYPE vllm:{figure.removesuffix('_total')} {kind}\n"
            f'vllm:{figure}{{engine="0",model_name="{name}"}} {float(value)}'
            for figure, (kind, value) in figures.items()
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def list_models(self, _: web.Request) -> web.Response:
        created = int(time.time())
        cards = [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": name,
                "parent": parent,
                "max_model_len": self.max_model_len if parent is None else None,
                "permission": [],
            }
            for name, parent in self.models.items()
        ]
        return web.json_response({"object": "list", "data": cards})

    async def count(self, body: dict[str, Any]) -> None:
        """One more request for completions; with what is said of them in `Options`."""
        self.requests += 1
        if self.options.requests_log:
            with Path(self.options.requests_log).open("a") as file:
                file.write(json.dumps({"pid": os.getpid(), "model": body.get("model"), "body": body}) + "\n")
        if 0 < self.options.die_after <= self.requests and not Path(self.options.die_mark or os.devnull).is_file():
            if self.options.die_mark:
                Path(self.options.die_mark).touch()
            os._exit(1)
        if 0 < self.options.hang_after < self.requests:
            await asyncio.Event().wait()

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self.count(body)
        model = self.model(body)
        prompts = self.prompts(body)
        choices = await asyncio.gather(*(self.choice(i, prompt, model, body) for i, prompt in enumerate(prompts)))
        generated = sum(tokens for _, tokens in choices)
        return web.json_response(
            {
                **self.envelope("text_completion", model, sum(map(len, prompts)), generated),
                "choices": [choice for choice, _ in choices],
            }
        )

    async def chat(self, request: web.Request) -> web.Response:
        """One chat; all messages in a row are the prompt."""
        body = await request.json()
        model = self.model(body)
        if self.options.no_chat:
            raise Refusal(
                "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
                "template if the tokenizer does not define one."
            )
        prompt = self.encode("".join(message["content"] for message in body["messages"]))
        body["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else None
        choice, generated = await self.choice(0, prompt, model, body)
        content = None
        if (rows := choice["logprobs"]) is not None and not self.options.null_chat_logprobs:
            pairs = zip(rows["tokens"], rows["top_logprobs"], strict=True)
            content = [
                {**_alternative(token, top[token]), "top_logprobs": [_alternative(*one) for one in top.items()]}
                for token, top in pairs
            ]
        unused = ("refusal", "annotations", "audio", "function_call", "reasoning")
        message = {"role": "assistant", "content": choice["text"], **dict.fromkeys(unused)}
        kept = ("index", "finish_reason", "stop_reason", "token_ids", "routed_experts")
        return web.json_response(
            {
                **self.envelope("chat.completion", model, len(prompt), generated),
                "choices": [
                    {
                        **{name: choice[name] for name in kept},
                        "message": message,
                        "logprobs": None if content is None else {"content": content},
                    }
                ],
                **dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "prompt_text")),
            }
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.model(body)
        tokens = self.encode(body["prompt"])
        shape = {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens, "token_strs": None}
        return web.json_response(shape)

    def model(self, body: dict[str, Any]) -> str:
        model = str(body.get("model") or next(iter(self.models)))
        if model not in self.models:
            raise Refusal(f"The model `{model}` does not exist.", status=404, param="model")
        return model

    def envelope(self, kind: str, model: str, asked: int, generated: int) -> dict[str, Any]:
        """All of an answer but its choices."""
        self.tokens["prompt_tokens"] += asked
        self.tokens["generation_tokens"] += generated
        self.finished += 1
        return {
            "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{os.urandom(16).hex()}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "service_tier": None,
            "system_fingerprint": f"stand-in-{VERSION}",
            "usage": {
                "prompt_tokens": asked,
                "total_tokens": asked + generated,
                "completion_tokens": generated,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def encode(self, text: str) -> list[int]:
        if self.options.other_tokenizer:
            return [int.from_bytes(text.encode()[i : i + 2]) for i in range(0, len(text.encode()), 2)]
        if self.tokenizer is None:
            return list(text.encode())
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Of the folder that this model is; None where there is none. Imported late: most tests send token ids."""
        if not self.tokenizer_file.is_file():
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_file))

    def prompts(self, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of each prompt of a request; raises Refusal where vLLM does."""
        prompt = body.get("prompt")
        if prompt is None or prompt == "" or prompt == []:
            raise Refusal("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        if body.get("stream"):
            raise Refusal("the stand-in does not stream", param="stream")
        if body.get("logprob_token_ids") and body.get("logprobs") is None:
            raise Refusal("when using `logprob_token_ids`, `logprobs` must be set.", param="logprob_token_ids")
        stop, stops_most = body.get("stop"), int(os.environ.get("VLLM_MAX_STOP_STRINGS", "4"))
        if isinstance(stop, list) and len(stop) > stops_most:
            raise Refusal(
                f"List should have at most {stops_most} items after validation, not {len(stop)}", param="stop"
            )
        several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        if len(several) > BATCH_MOST:
            raise Refusal(f"prompt list length {len(several)} exceeds the maximum allowed count of {BATCH_MOST}.")
        found = [self.encode(one) if isinstance(one, str) else list(one) for one in several]
        for tokens in found:
            if len(tokens) > self.max_model_len:
                raise Refusal(
                    f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt "
                    f"contains {len(tokens)} input tokens, which exceeds this limit even without any output tokens. "
                    "Please reduce the length of the input prompt.",
                    param="input_tokens",
                )
            if len(tokens) == self.max_model_len:
                raise Refusal(
                    f"The decoder prompt (length {len(tokens)}) plus the number of requested output tokens "
                    f"(at least 1) is longer than the maximum model length of {self.max_model_len}."
                )
        return found

    async def choice(
        self, index: int, prompt: list[int], model: str, body: dict[str, Any]
    ) -> tuple[dict[str, Any], int]:
        """One entry of `choices` and how many tokens were generated for it."""
        async with self.place():
            await asyncio.sleep(self.options.wait_s(body.get("max_tokens") or 0))
        salt = [model, body.get("seed")] if (body.get("temperature") or 0) > 0 else [model]
        start = Prefix(zlib.crc32(json.dumps(salt).encode()), self.options.vocabulary, self.options.end_every)
        before = [start]
        for token in prompt:
            before.append(before[-1].then(token))
        asked = body.get("max_tokens")
        most = min(16 if asked is None else asked, self.max_model_len - len(prompt))
        if (forced := self.forced(before[-1], prompt, body)) is not None:
            tokens, text, finish, stop = forced, spell(forced[:-1]), "stop", forced[-1]
        else:
            tokens, text, finish, stop = generate(before[-1], most, body)
        for token in tokens[:-1]:
            before.append(before[-1].then(token))
        echo = bool(body.get("echo"))
        told = echo and not self.options.no_echo
        return {
            "index": index,
            "text": spell(prompt) + text if echo else text,
            "logprobs": self.logprobs(
                before if told else before[len(prompt) :], [*prompt, *tokens] if told else tokens, body, echo=told
            ),
            "finish_reason": finish,
            "stop_reason": stop,
            "token_ids": None,
            # vLLM repeats an echoed prompt's log-probabilities here, with ranks that would cost us a sort each.
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }, len(tokens)

    def forced(self, prefix: Prefix, prompt: list[int], body: dict[str, Any]) -> list[int] | None:
        """What ForcedDecoding makes vLLM write: the continuation, and how many of its first tokens were greedy."""
        arguments = body.get("vllm_xargs") or {}
        if not self.forces or sum(prompt) not in arguments.get("sums", ()):
            return None
        which = arguments["sums"].index(sum(prompt))
        start = sum(arguments["lengths"][:which])
        tokens = arguments["forced"][start : start + arguments["lengths"][which]]
        greedy = 0
        for step, token in enumerate(tokens):
            greedy += prefix.best == token and greedy == step
            prefix = prefix.then(token)
        return [*tokens, arguments["verdicts"][1 + greedy]]

    async def generate(self, request: web.Request) -> web.Response:
        """Token ids in and out, as far as scoring needs it. They are logged under the name that completions have."""
        body = await request.json()
        await self.count({"prompt": body["token_ids"], **body})
        model, prompt = self.model(body), body["token_ids"]
        async with self.place():
            await asyncio.sleep(self.options.wait_s(1))
        prefix = Prefix(zlib.crc32(json.dumps([model]).encode()), self.options.vocabulary, self.options.end_every)
        rows: list[dict[str, Any] | None] = []
        for token in prompt:
            found = {t: {"logprob": prefix.logprob(t), "rank": None} for t in (token, prefix.best)}
            rows.append(found if rows else None)
            prefix = prefix.then(token)
        answer = self.envelope("generate", model, len(prompt), 1)
        answer["usage"]["prompt_tokens_details"] = {"cached_tokens": 0}
        choice = {"index": 0, "finish_reason": "length", "token_ids": [prefix.best], "logprobs": None}
        return web.json_response({**answer, "choices": [choice], "prompt_logprobs": rows})

    def logprobs(
        self, before: list[Prefix], tokens: list[int], body: dict[str, Any], *, echo: bool
    ) -> dict[str, Any] | None:
        """vLLM's CompletionLogProbs: a token comes first among its top ones, the first of a prompt has none."""
        if body.get("logprobs") is None or self.options.null_logprobs:
            return None
        name = (
            (lambda token: f"token_id:{token}")
            if body.get("return_tokens_as_token_ids") and self.options.no_tokenize < 2
            else (lambda token: f" {token}")
        )
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        offset = 0
        for position, (prefix, token) in enumerate(zip(before, tokens, strict=True)):
            found["text_offset"].append(offset)
            found["tokens"].append(name(token))
            offset += len(name(token))
            if echo and position == 0:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            added = self.options.echo_offset if echo else 0.0
            clipped = echo and self.options.echo_clip and token != prefix.best
            found["token_logprobs"].append(-100.0 if clipped else prefix.logprob(token) + added)
            others = body.get("logprob_token_ids") or prefix.top(body["logprobs"])
            found["top_logprobs"].append({name(other): prefix.logprob(other) + added for other in (token, *others)})
        if echo and (shift := self.options.echo_shift):
            for rows in (found["token_logprobs"], found["top_logprobs"]):
                rows[1:] = [*rows[1 + shift :], *rows[-shift:]]
        return found

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the `--max-num-seqs` places that requests run in."""
        if 0 < self.options.busy_above <= self.running + self.waiting:
            raise Refusal("too many requests", status=429)
        self.waiting += 1
        try:
            await self.places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.places.release()


def _alternative(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def generate(prefix: Prefix, most: int, body: dict[str, Any]) -> tuple[list[int], str, str, str | int | None]:
    """Tokens, text, finish reason and stop reason; text and tokens end where vLLM's would."""
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    tokens: list[int] = []
    for token in best_tokens(prefix, most):
        tokens.append(token)
        if token == END_OF_TEXT and not body.get("ignore_eos"):
            return tokens, spell(tokens[:-1]), "stop", None
        if token in (body.get("stop_token_ids") or ()):
            return tokens, spell(tokens[:-1]), "stop", token
        text = spell(tokens)
        if met := [stop for stop in stops if stop in text]:
            stop = min(
                met, key=lambda stop: text.index(stop) + len(stop)
            )  # what a token more a time would have met first
            end = text.index(stop) + (len(stop) if body.get("include_stop_str_in_output") else 0)
            return tokens, text[:end], "stop", stop
    return tokens, spell(tokens), "length", None


def best_tokens(prefix: Prefix, most: int) -> Iterator[int]:
    for _ in range(most):
        yield prefix.best
        prefix = prefix.then(prefix.best)


def spell(tokens: list[int]) -> str:
    return "".join(f" {token}" for token in tokens)


SLEEPER = """
import mmap, os, signal, socket, subprocess, sys, tempfile
below = subprocess.Popen([sys.executable, "-S", "-E", "-c", sys.argv[1], "", sys.argv[2]]) if sys.argv[1] else None
if sys.argv[2] == "leave":
    with open(f"/dev/shm/stand-in-{os.getpid()}", "w+b") as file:
        file.truncate(4096)
        held = mmap.mmap(file.fileno(), 4096)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tempfile.gettempdir()}/stand-in-{os.getpid()}")
def end(*_):
    if below:
        below.terminate()
        below.wait()
    sys.exit()
signal.signal(signal.SIGTERM, end)
while True:
    signal.pause()
"""


def meet(address: str, port: int, others: int) -> list[socket.socket]:
    """The other parts of a server of several nodes, once all have come."""
    with socket.create_server((address, port)) as listener:
        return [listener.accept()[0] for _ in range(others)]


def follow(address: str, port: int) -> int:
    """The exit code of a part that serves nothing, when the first part is gone."""
    while True:
        try:
            with socket.create_connection((address, port)) as first:
                first.recv(1)
                return 1
        except ConnectionRefusedError:  # it has not come yet
            time.sleep(0.05)


def main() -> None:
    options, rest = Options.parse(sys.argv[1:])
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--lora-modules", nargs="+", default=[])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--logits-processors", nargs="+", default=[])
    parser.add_argument("--enable-scale-out", action="store_true")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("--headless", action="store_true")
    found, _ = parser.parse_known_args(rest)
    if found.headless:
        sys.exit(options.refuse_headless.replace("\\n", "\n") or follow(found.master_addr, found.master_port))
    if options.refuse_forced and found.logits_processors:
        sys.exit(options.refuse_forced)
    if options.refuse:
        sys.exit(options.refuse.replace("\\n", "\n"))

    # Bound before anything slow and listened on after it, as vLLM does.
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with socket.socket() as stranger:
        if options.lose_port and not Path(options.lose_port).is_file():
            Path(options.lose_port).touch()
            stranger.bind((found.host, found.port))
            stranger.listen()
        bound.bind((found.host, found.port))
    sleeper = [sys.executable, "-S", "-E", "-c", SLEEPER, SLEEPER, "leave" if options.leftovers else ""]
    child = subprocess.Popen(sleeper) if options.tree else None
    if options.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(options.start_delay_s)
    others = meet(found.master_addr, found.master_port, found.nnodes - 1) if found.nnodes > 1 else []

    names = found.served_model_name or [found.model]
    adapters = {module.partition("=")[0]: names[0] for module in found.lora_modules}

    async def serve() -> None:
        stand_in = StandIn(
            options=options,
            models={**dict.fromkeys(names), **adapters},
            key=os.environ.get("VLLM_API_KEY", ""),
            max_model_len=found.max_model_len,
            places=asyncio.Semaphore(found.max_num_seqs),
            tokenizer_file=Path(found.tokenizer or found.model) / "tokenizer.json",
            forces=any(name.endswith(":ForcedDecoding") for name in found.logits_processors),
            scales_out=found.enable_scale_out,
        )
        runner = web.AppRunner(stand_in.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.SockSite(runner, bound).start()
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, *(() if options.ignore_term else (signal.SIGTERM,))):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        await runner.cleanup()

    try:
        asyncio.run(serve())
    finally:
        for other in others:
            other.close()
        if child is not None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(5)


if __name__ == "__main__":
    main()
