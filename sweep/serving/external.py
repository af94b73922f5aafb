"""A server at a `url`, which someone else runs: waited for, watched, never started and never stopped -> Endpoint.

Stands in a `Server`'s place with the same methods. Follows no proxy settings, as no request of a sweep does.
"""

import http.client
import json
import logging
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sweep.errors import ServerError, ServerFault, nearest
from sweep.planning.plan import ServerPlan, served_name
from sweep.serving.metrics import Snapshot, snapshot
from sweep.serving.server import Endpoint

log = logging.getLogger(__name__)

START_PERIOD_S = 1.0
WATCH_PERIOD_S = 5.0
ANSWER_TIMEOUT_S = 10.0
"""It may be far away, and busy with the requests of others."""

LOOKS_LEAST = 3
"""Looks that must fail in a row, whatever the settings: one may take all the patience there is."""

NAMES_SHOWN = 10
"""Of the models that a server has, in a message; a public one has hundreds."""


class ExternalServer:
    """One life of a server at a `url`: as long as it answers. Safe to use from several threads."""

    def __init__(self, plan: ServerPlan, *, name: str) -> None:
        """`name` is that of the life, as for a `Server`."""
        assert plan.model.url is not None
        self.plan = plan
        self.name = name
        self._url = plan.model.url
        self._api_key = plan.model.api_key or ""
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._answers = False

    def start(self) -> Endpoint:
        """The endpoint, once the server answers with our model; it is waited for like one that loads weights.

        Raises ServerError for what waiting does not change, ServerFault when it was there and not ready in time.
        """
        timeout_s = self.plan.model.startup_timeout_s
        deadline = time.monotonic() + timeout_s
        log.info("%s waits for the server at %s", self.name, self._url)
        answered = False
        while not self._stopping.is_set():
            try:
                answer = self._ask("/v1/models")
            except (OSError, http.client.HTTPException) as error:
                self._give_up_on(error)
                seen = f"last: {_words(error)}"
            else:
                answered = True
                if answer.status == 200:
                    return self._endpoint(answer.body)
                if answer.status != 429 and answer.status < 500:
                    raise self._refusal(answer)
                seen = f"last it answered {answer.status}"
            if time.monotonic() > deadline:
                kind = ServerFault if answered else ServerError
                raise kind(
                    f"{self.name}: {self._url}/v1/models gave no list of models in startup_timeout_s = {timeout_s:g} s "
                    f"({seen}): see whether the server runs there and can be reached from this node, or raise it"
                )
            self._stopping.wait(START_PERIOD_S)
        raise ServerError(f"{self.name} was stopped while its server was waited for")

    def wait(self) -> str:
        """Why the server is gone, in words; blocks until it was silent for a tenth of `hang_timeout_s`.

        An answer of any kind is a sign of life but for 5xx, by which a gateway says that nobody is behind it.
        """
        if not self._answers:
            return "was never started"
        silence_s = self.plan.model.hang_timeout_s / 10
        heard, failed = time.monotonic(), 0
        while not self._stopping.wait(min(WATCH_PERIOD_S, silence_s / 2)):
            try:
                status = self._ask("/health").status
                seen = f"/health answered {status}"
            except (OSError, http.client.HTTPException) as error:
                status, seen = None, _words(error)
            if status is not None and status < 500:
                heard, failed = time.monotonic(), 0
                continue
            failed += 1
            if failed >= LOOKS_LEAST and time.monotonic() - heard > silence_s:
                self._lost.set()
                return f"{self._url} did not answer for {silence_s:g} s, a tenth of hang_timeout_s ({seen})"
        return "was stopped"

    def stop(self) -> None:
        """Ends our waiting and watching; the server is not ours to stop."""
        self._stopping.set()

    def alive(self) -> bool:
        return self._answers and not self._lost.is_set() and not self._stopping.is_set()

    def figures(self) -> Snapshot:
        """How the server stands now, with the requests of others. Raises OSError, HTTPException, and ValueError for one
        that does not tell."""
        answer = self._ask("/metrics")
        if answer.status != 200:
            raise ValueError(f"{self._url}/metrics answered {answer.status}")
        return snapshot(answer.body.decode(errors="replace"))

    def _endpoint(self, body: bytes) -> Endpoint:
        """Raises ServerError for a list of models that has not ours, or not its length."""
        cards = _cards(body)
        if cards is None:
            raise ServerError(
                f"{self.name}: {self._url}/v1/models answered with no list of models: that is no OpenAI-compatible "
                "server; check url"
            )
        name = served_name(self.plan)
        if name not in cards:
            shown = ", ".join(list(cards)[:NAMES_SHOWN]) + (", ..." if len(cards) > NAMES_SHOWN else "")
            raise ServerError(
                f"{self.name}: {self._url} does not serve {name!r} but {shown or 'nothing'}: set "
                f"models.{self.plan.name}.served_model_name{nearest(name, cards)}"
            )
        endpoint = Endpoint(
            server=self.name,
            url=self._url,
            api_key=self._api_key,
            max_model_len=self._max_model_len(cards, name),
            engine_version=self._version() if cards[name].get("owned_by") == "vllm" else "unknown",
        )
        self._answers = True
        return endpoint

    def _max_model_len(self, cards: Mapping[str, Mapping[str, Any]], name: str) -> int:
        """What the server says (vLLM does, for an adapter with its base), or else what the config says."""
        key, ours = f"models.{self.plan.name}.max_model_len", self.plan.model.max_model_len
        base = cards.get(str(cards[name].get("parent")), {})
        theirs = cards[name].get("max_model_len") or base.get("max_model_len")
        if not isinstance(theirs, int):
            if ours is None:
                raise ServerError(
                    f"{self.name}: {self._url} does not say how many tokens {name!r} takes: set {key} to prompt plus "
                    "answer as that server was started with"
                )
            return ours
        if ours is not None and theirs < ours:
            raise ServerError(f"{self.name}: {self._url} takes {theirs} tokens, {key} says {ours}: lower it")
        return ours or theirs

    def _version(self) -> str:
        try:
            answer = self._ask("/version")
        except (OSError, http.client.HTTPException) as error:
            log.info("%s: %s/version does not answer: %s", self.name, self._url, _words(error))
            return "unknown"
        found = _decoded(answer.body)
        return str(found["version"]) if isinstance(found, dict) and found.get("version") else "unknown"

    def _give_up_on(self, error: Exception) -> None:
        """Raises ServerError for a connection that no waiting makes."""
        if isinstance(error, ssl.SSLCertVerificationError):
            raise ServerError(
                f"{self.name}: the certificate of {self._url} is not trusted here ({error.verify_message}): name the "
                "file of its authority in SSL_CERT_FILE"
            ) from None
        if isinstance(error, ssl.SSLError) and error.reason == "WRONG_VERSION_NUMBER":
            raise ServerError(f"{self.name}: {self._url} does not speak TLS: write http:// in url") from None

    def _refusal(self, answer: "_Answer") -> ServerError:
        where = f"{self.name}: {self._url}/v1/models answered {answer.status}"
        key = f"models.{self.plan.name}.api_key"
        if answer.status in (401, 403):
            if self._api_key:
                return ServerError(f"{where} to the key of {key}: that server wants another one")
            return ServerError(f"{where}: it wants a key; write {key}: ${{oc.env:NAME}} and set NAME")
        moved = f" (moved to {answer.location})" if answer.location else ""
        return ServerError(f"{where}{moved}: no OpenAI-compatible server answers there; check url")

    def _ask(self, path: str) -> "_Answer":
        parts = urlsplit(self._url)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=ANSWER_TIMEOUT_S)
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        try:
            connection.request("GET", parts.path + path, headers=headers)
            response = connection.getresponse()
            return _Answer(status=response.status, body=response.read(), location=response.getheader("Location"))
        finally:
            connection.close()


@dataclass(frozen=True, kw_only=True)
class _Answer:
    status: int
    body: bytes
    location: str | None
    """Where a redirect leads."""


def _cards(body: bytes) -> dict[str, dict[str, Any]] | None:
    """The models of a list by id; None where it is no such list."""
    found = _decoded(body)
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list):
        return None
    return {str(card["id"]): card for card in cards if isinstance(card, dict) and "id" in card}


def _decoded(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
