"""Servers that someone else runs: on the stand-in started by hand, and on a scripted one for what no vLLM answers."""

import json
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from doubles import STAND_IN, make_tasks

from sweep.errors import ServerError, ServerFault
from sweep.planning.config import Model
from sweep.planning.plan import ServerPlan
from sweep.record import Status
from sweep.results.store import RunDirectory, read_records
from sweep.serving import external
from sweep.serving.external import ExternalServer

Starts = Callable[..., Any]


def plan(url: str, **settings: Any) -> ServerPlan:
    model = Model(**{"url": url, "tokenizer": "org/t", "startup_timeout_s": 30.0, "entry": "m"} | settings)
    return ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0.0, replicas=1)


def server(url: str, **settings: Any) -> ExternalServer:
    return ExternalServer(plan(url, **settings), name="m-0")


@pytest.fixture(autouse=True)
def short_periods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "START_PERIOD_S", 0.05)
    monkeypatch.setattr(external, "WATCH_PERIOD_S", 0.05)


@dataclass
class Scripted:
    """An HTTP server that answers what a test says, and notes what it was asked."""

    url: str
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Path -> status and body; 404 for all others."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization of each request."""

    def lists(self, *cards: dict[str, Any]) -> None:
        self.answers["/v1/models"] = (200, json.dumps({"object": "list", "data": cards}))


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    """Starts scripted servers, on a given port or any, with TLS where a certificate is given."""
    started: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(port: int = 0, certificate: Path | None = None, **answers: tuple[int, str]) -> Scripted:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                script.asked.append((self.path, self.headers["Authorization"]))
                status, body = script.answers.get(self.path, (404, "not here"))
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "https://elsewhere/")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        listener = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
        script = Scripted(f"http{'s' if certificate else ''}://127.0.0.1:{listener.server_address[1]}", answers)
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        started.append((listener, thread))
        return script

    yield start
    for listener, thread in started:
        listener.shutdown()
        thread.join()
        listener.server_close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Start


def test_a_server_that_runs_already_is_taken_as_it_is(stand_in: Starts) -> None:
    running = stand_in("--max-model-len", "777")
    theirs = server(running.endpoint.url, api_key=running.endpoint.api_key)
    assert not theirs.alive()
    endpoint = theirs.start()
    assert (endpoint.server, endpoint.url, endpoint.api_key) == ("m-0", running.endpoint.url, running.endpoint.api_key)
    assert (endpoint.max_model_len, endpoint.engine_version) == (777, "0.32.0")
    assert theirs.alive()


def test_an_adapter_takes_what_its_base_takes(stand_in: Starts) -> None:
    running = stand_in("--lora-modules", "sql=/adapters/sql")
    theirs = server(running.endpoint.url, api_key=running.endpoint.api_key, served_model_name="sql")
    assert theirs.start().max_model_len == 2048


@pytest.mark.parametrize(
    ("card", "ours", "length"),
    [
        ({"max_model_len": 4096}, None, 4096),
        ({"max_model_len": 4096}, 1000, 1000),
        ({"max_model_len": 4096}, 4096, 4096),
        ({}, 1000, 1000),
        ({"max_model_len": None, "parent": None}, 1000, 1000),
    ],
)
def test_the_shorter_of_both_limits_counts(
    scripted: Callable[..., Scripted], card: dict[str, Any], ours: int | None, length: int
) -> None:
    script = scripted()
    script.lists({"id": "m", **card})
    assert server(script.url, max_model_len=ours).start().max_model_len == length


@pytest.mark.parametrize(
    ("owner", "version", "recorded"),
    [
        ("vllm", (200, '{"version": "0.33.0"}'), "0.33.0"),
        ("vllm", (404, "not here"), "unknown"),
        ("vllm", (200, "<html>"), "unknown"),
        ("llamacpp", (200, '{"version": "1.0"}'), "unknown"),
    ],
)
def test_the_version_is_vllm_s_own_or_unknown(
    scripted: Callable[..., Scripted], owner: str, version: tuple[int, str], recorded: str
) -> None:
    script = scripted()
    script.lists({"id": "m", "max_model_len": 9, "owned_by": owner})
    script.answers["/version"] = version
    assert server(script.url).start().engine_version == recorded


def test_without_a_key_no_authorization_is_sent(scripted: Callable[..., Scripted]) -> None:
    script = scripted()
    script.lists({"id": "m", "max_model_len": 9})
    assert server(script.url).start().api_key == ""
    assert server(script.url, api_key="k").start().api_key == "k"
    assert script.asked == [("/v1/models", None), ("/v1/models", "Bearer k")]


def test_a_path_before_v1_is_a_gateway_s_and_stays(scripted: Callable[..., Scripted]) -> None:
    script = scripted()
    script.answers["/api/v1/models"] = (200, '{"data": [{"id": "m", "max_model_len": 9}]}')
    assert server(f"{script.url}/api").start().url == f"{script.url}/api"


def test_it_tells_how_it_stands_if_it_is_vllm(stand_in: Starts, scripted: Callable[..., Scripted]) -> None:
    assert server(stand_in().endpoint.url).figures().running == 0
    with pytest.raises(ValueError, match="/metrics answered 404"):
        server(scripted().url).figures()


def test_a_server_that_comes_later_is_waited_for(scripted: Callable[..., Scripted], free_port: int) -> None:
    """Nobody listens, then a gateway says that nobody is behind it, then it answers."""
    theirs = server(f"http://127.0.0.1:{free_port}")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(theirs.start()))
    thread.start()
    script = scripted(free_port, **{"/v1/models": (503, "loading")})
    until(lambda: len(script.asked) > 2)
    assert not found
    script.lists({"id": "m", "max_model_len": 9})
    thread.join(30)
    assert [endpoint.max_model_len for endpoint in found] == [9]


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    ((401, "{}"), {}, "/v1/models answered 401: it wants a key; write models.m.api_key: ${oc.env:NAME} and set NAME"),
    ((401, "{}"), {"api_key": "sk-0123456789"}, "answered 401 to the key of models.m.api_key: that server wants an"),
    ((403, "{}"), {"api_key": "sk-0123456789"}, "answered 403 to the key of models.m.api_key"),
    ((404, ""), {}, "/v1/models answered 404: no OpenAI-compatible server answers there; check url"),
    ((308, ""), {}, "/v1/models answered 308 (moved to https://elsewhere/): no OpenAI-compatible server answers there"),
    ((200, "<html>"), {}, "/v1/models answered with no list of models: that is no OpenAI-compatible server"),
    ((200, '{"data": {}}'), {}, "/v1/models answered with no list of models"),
    ((200, '{"data": []}'), {}, "does not serve 'm' but nothing: set models.m.served_model_name"),
    (
        [{"id": "org/qwen"}, {"id": "org/llama"}],
        {"served_model_name": "qwen"},
        "does not serve 'qwen' but org/qwen, org/llama: set models.m.served_model_name; did you mean 'org/qwen'?",
    ),
    (
        [{"id": f"model-{n}"} for n in range(300)],
        {},
        "but model-0, model-1, model-2, model-3, model-4, model-5, model-6",
    ),
    ([{"id": "m"}], {}, "does not say how many tokens 'm' takes: set models.m.max_model_len to prompt plus answer"),
    (
        [{"id": "m", "max_model_len": 4096}],
        {"max_model_len": 8192},
        "takes 4096 tokens, models.m.max_model_len says 8192: lower it",
    ),
]


@pytest.mark.parametrize(("answer", "settings", "message"), REFUSALS)
def test_what_waiting_does_not_change_is_said_at_once_in_one_line(
    scripted: Callable[..., Scripted], answer: Any, settings: dict[str, Any], message: str
) -> None:
    script = scripted()
    if isinstance(answer, list):
        script.lists(*answer)
    else:
        script.answers["/v1/models"] = answer
    begun = time.monotonic()
    with pytest.raises(ServerError) as caught:
        server(script.url, **settings).start()
    assert message in str(caught.value).replace(script.url, "", 1)
    assert str(caught.value).startswith(f"m-0: {script.url}")
    assert "\n" not in str(caught.value)
    assert "sk-0123456789" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not isinstance(caught.value, ServerFault)
    assert time.monotonic() - begun < 10


def test_a_key_that_the_server_does_not_take_is_said_and_not_shown(stand_in: Starts) -> None:
    running = stand_in()
    with pytest.raises(ServerError, match=r"answered 401 to the key of models\.m\.api_key") as caught:
        server(running.endpoint.url, api_key="another-key-0123456789").start()
    assert "another-key" not in str(caught.value)


def test_where_nobody_is_the_end_of_the_wait_says_what_was_tried(free_port: int) -> None:
    with pytest.raises(ServerError) as caught:
        server(f"http://127.0.0.1:{free_port}", startup_timeout_s=0.3).start()
    assert str(caught.value) == (
        f"m-0: http://127.0.0.1:{free_port}/v1/models gave no list of models in startup_timeout_s = 0.3 s (last: "
        "Connection refused): see whether the server runs there and can be reached from this node, or raise it"
    )
    assert not isinstance(caught.value, ServerFault)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_is_there_and_not_ready_may_be_so_at_the_next_try(
    scripted: Callable[..., Scripted], status: int
) -> None:
    script = scripted()
    script.answers["/v1/models"] = (status, "")
    with pytest.raises(ServerFault, match=rf"\(last it answered {status}\)"):
        server(script.url, startup_timeout_s=0.3).start()


def test_a_wait_for_a_server_can_be_stopped(free_port: int) -> None:
    theirs = server(f"http://127.0.0.1:{free_port}")
    timer = threading.Timer(0.2, theirs.stop)
    timer.start()
    with pytest.raises(ServerError, match="m-0 was stopped while its server was waited for"):
        theirs.start()
    timer.join()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command makes the certificate")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "-", "-out", "-"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    path.write_text(made.stdout)
    return path


def test_https_is_spoken_where_the_certificate_is_trusted(
    scripted: Callable[..., Scripted], certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = scripted(certificate=certificate)
    script.lists({"id": "m", "max_model_len": 9})
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert server(script.url).start().url == script.url


def test_a_certificate_that_is_not_trusted_is_said_at_once(
    scripted: Callable[..., Scripted], certificate: Path
) -> None:
    script = scripted(certificate=certificate)
    with pytest.raises(ServerError, match=r"is not trusted here \(self.signed certificate\).*SSL_CERT_FILE"):
        server(script.url).start()


def test_https_to_a_server_that_speaks_http_is_said_at_once(scripted: Callable[..., Scripted]) -> None:
    with pytest.raises(ServerError, match="does not speak TLS: write http:// in url"):
        server(scripted().url.replace("http:", "https:")).start()


# Watch


def until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_a_server_that_falls_silent_is_lost_with_its_reason(stand_in: Starts) -> None:
    running = stand_in()
    theirs = server(running.endpoint.url, api_key=running.endpoint.api_key, hang_timeout_s=5.0)
    theirs.start()
    running.process.kill()
    running.process.wait()
    begun = time.monotonic()
    reason = theirs.wait()
    assert 0.5 < time.monotonic() - begun < 5
    assert reason == (
        f"{running.endpoint.url} did not answer for 0.5 s, a tenth of hang_timeout_s (Connection refused)"
    )
    assert not theirs.alive()


def test_a_gateway_with_nobody_behind_it_is_silent(scripted: Callable[..., Scripted]) -> None:
    script = scripted()
    script.lists({"id": "m", "max_model_len": 9})
    theirs = server(script.url, hang_timeout_s=5.0)
    theirs.start()
    script.answers["/health"] = (502, "")
    assert theirs.wait().endswith("(/health answered 502)")


@pytest.mark.parametrize("status", [200, 401, 404, 429])
def test_any_other_answer_is_a_sign_of_life(scripted: Callable[..., Scripted], status: int) -> None:
    script = scripted()
    script.lists({"id": "m", "max_model_len": 9})
    script.answers["/health"] = (status, "")
    theirs = server(script.url, hang_timeout_s=2.0)
    theirs.start()
    reasons: list[str] = []
    thread = threading.Thread(target=lambda: reasons.append(theirs.wait()))
    thread.start()
    begun = time.monotonic()
    until(lambda: time.monotonic() - begun > 1 and script.asked[-1][0] == "/health")
    assert theirs.alive()
    assert not reasons
    theirs.stop()
    thread.join(30)
    assert reasons == ["was stopped"]


def test_only_a_silence_without_a_break_counts(
    scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(external, "time", SimpleNamespace(monotonic=lambda: clock.now))
    script = scripted()
    script.lists({"id": "m", "max_model_len": 9})
    theirs = server(script.url, hang_timeout_s=100.0)
    theirs.start()

    def answers(status: int, *, passed_s: float) -> None:
        """Two polls, of which the second begins after the change."""
        script.answers["/health"] = (status, "")
        clock.now += passed_s
        enough = len(script.asked) + 2
        until(lambda: len(script.asked) >= enough)

    reasons: list[str] = []
    thread = threading.Thread(target=lambda: reasons.append(theirs.wait()))
    thread.start()
    answers(200, passed_s=0)
    for _ in range(3):
        answers(503, passed_s=6)
        answers(200, passed_s=0)
    assert theirs.alive()
    assert not reasons
    answers(503, passed_s=0)
    clock.now += 11
    thread.join(30)
    assert len(reasons) == 1
    assert not theirs.alive()


def test_stopping_ends_our_watch_and_not_the_server(stand_in: Starts) -> None:
    running = stand_in()
    theirs = server(running.endpoint.url, api_key=running.endpoint.api_key)
    assert theirs.wait() == "was never started"
    theirs.start()
    theirs.stop()
    theirs.stop()
    assert theirs.wait() == "was stopped"
    assert not theirs.alive()
    assert running.process.poll() is None
    again = server(running.endpoint.url, api_key=running.endpoint.api_key)
    assert again.start().max_model_len == 2048


# Whole sweeps

LAUNCH_S = 300


@dataclass(frozen=True, kw_only=True)
class Swept:
    code: int
    output: str
    directory: RunDirectory


def swept(folder: Path, models: dict[str, Any], tasks: list[str], key: str) -> Swept:
    """`python launch.py` on a sweep of these models and tasks of `make_tasks`; `key` is in THEIR_API_KEY."""
    settings = {
        "name": "sweep",
        "runs_dir": str(folder / "runs"),
        "models": models,
        "tasks": {name: {"include_path": str(make_tasks(folder / "tasks" / name))} for name in tasks},
        "wandb": {"mode": "disabled"},
        "ray": {"evaluators": 2, "cpu_servers": 1},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "STAND_IN_"))}
    launch = subprocess.run(
        [sys.executable, "launch.py", f"conf={folder / 'sweep.yaml'}"],
        cwd=Path(__file__).parent.parent,
        env={**kept, "LMSWEEP_ENGINE": shlex.join(STAND_IN), "HF_HUB_OFFLINE": "1", "THEIR_API_KEY": key},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LAUNCH_S,
    )
    return Swept(code=launch.returncode, output=launch.stdout, directory=RunDirectory(folder / "runs" / "sweep"))


@pytest.mark.ray
def test_a_sweep_scores_what_someone_else_serves_like_what_we_serve_and_leaves_it_running(
    stand_in: Starts, tiny_model: Path, tmp_path: Path
) -> None:
    """Both answer as `m`, so that stand-ins give both the same; ours holds the only CPU slot while theirs is scored."""
    theirs = stand_in("--tokenizer", str(tiny_model), "--max-model-len", "512")
    tasks = ["letters", "story", "writing"]
    models = {
        "m": {
            "path": str(tiny_model),
            "device": "cpu",
            "max_model_len": 512,
            "env": {"STAND_IN_START_DELAY_S": "8", "STAND_IN_REQUESTS_LOG": str(tmp_path / "ours.jsonl")},
        },
        "theirs": {
            "url": f"{theirs.endpoint.url}/v1",
            "served_model_name": "m",
            "tokenizer": str(tiny_model),
            "api_key": "${oc.env:THEIR_API_KEY}",
        },
    }
    sweep = swept(tmp_path, models, tasks, theirs.endpoint.api_key)
    assert sweep.code == 0, sweep.output
    directory = sweep.directory
    records = read_records(directory)
    assert len(records) == 6
    assert {record.status for record in records.values()} == {Status.DONE}
    for task in tasks:
        ours, other = records["m", task], records["theirs", task]
        assert other.counts.asked == other.counts.requests == ours.counts.requests > 0
        assert other.scores == ours.scores
        assert other.settings["url"] == theirs.endpoint.url
        assert any("not ours to know" in warning for warning in other.warnings)
        assert not any("not ours to know" in warning for warning in ours.warnings)
    assert {body["model"] for body in theirs.bodies()} == {"m"}
    log = directory.driver_log.read_text()
    assert log.index("server theirs-0 is ready") < log.index("server m-0 is ready")
    assert theirs.process.poll() is None
    again = server(theirs.endpoint.url, api_key=theirs.endpoint.api_key)
    assert again.start().max_model_len == 512
    written = [path for path in directory.root.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert theirs.endpoint.api_key.encode() not in path.read_bytes(), path
    assert theirs.endpoint.api_key not in sweep.output


@pytest.mark.ray
def test_a_server_that_goes_away_in_the_middle_is_waited_for_and_costs_no_answer(
    stand_in: Starts, tiny_model: Path, tmp_path: Path
) -> None:
    first = stand_in("--tokenizer", str(tiny_model), latency_s=0.5)
    log = RunDirectory(tmp_path / "runs" / "sweep").driver_log
    second: list[subprocess.Popen[bytes]] = []

    def logged(text: str) -> bool:
        return log.exists() and text in log.read_text()

    def replace_it() -> None:
        until(lambda: logged("server theirs-0 is ready"), LAUNCH_S)
        before = len(first.bodies())
        until(lambda: len(first.bodies()) > before + 8, LAUNCH_S)
        first.process.kill()
        first.process.wait()
        until(lambda: logged("did not answer for 2 s"), LAUNCH_S)
        arguments = [*STAND_IN, "--model", str(tiny_model), "--served-model-name", "m", "--port"]
        port = first.endpoint.url.rpartition(":")[2]
        second.append(subprocess.Popen([*arguments, port], env={**os.environ, "VLLM_API_KEY": first.endpoint.api_key}))

    theirs = {
        "url": first.endpoint.url,
        "served_model_name": "m",
        "tokenizer": str(tiny_model),
        "api_key": "${oc.env:THEIR_API_KEY}",
        "hang_timeout_s": 20.0,
        "concurrency": 4,
    }
    thread = threading.Thread(target=replace_it)
    thread.start()
    try:
        sweep = swept(tmp_path, {"theirs": theirs}, ["letters"], first.endpoint.api_key)
        thread.join()
        assert sweep.code == 0, sweep.output
        assert logged("server theirs-1 is ready")
        (record,) = read_records(sweep.directory).values()
        assert record.status is Status.DONE
        assert record.counts.asked == record.counts.requests == 64
        assert second[0].poll() is None
    finally:
        thread.join()
        for process in second:
            process.kill()
            process.wait()
