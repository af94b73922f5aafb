"""The command line and environment as tables; starting, failing and stopping on the stand-in server."""

import contextlib
import http.client
import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import apart
from hub_stub import hub_stub, reach

from sweep.errors import ServerError, ServerFault
from sweep.masking import secret_variables
from sweep.planning.config import Model
from sweep.planning.hub import snapshot
from sweep.planning.plan import ServerPlan
from sweep.serving import engine, gpu, server, watch
from sweep.serving.server import Endpoint, Server

STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_server.py"))]
KEY = "key-for-tests-0123456789"

MODEL = Model(path="org/m", startup_timeout_s=30.0)


def plan(*, adapters: dict[str, str | None] | None = None, gpus: float = 1.0, **changes: Any) -> ServerPlan:
    return ServerPlan(
        name="m",
        model=replace(MODEL, **changes),
        revision=None,
        adapters={"m": None} if adapters is None else adapters,
        gpus=gpus,
        replicas=1,
    )


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _no_engine_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMSWEEP_ENGINE", raising=False)


OTHERS: set[psutil.Process] = set()
"""What was below us before the test: Python's resource tracker, once some test has used multiprocessing."""


@pytest.fixture(autouse=True)
def _others() -> None:
    OTHERS.clear()
    OTHERS.update(psutil.Process().children(recursive=True))


# Starting and stopping, on the stand-in


class Bench:
    """Makes servers on the stand-in and stops them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[Server] = []

    def __call__(
        self,
        executable: list[str] | None = None,
        *,
        timeout_s: float = 30.0,
        hang_timeout_s: float = 600.0,
        gpus: float = 1.0,
        gpu_ids: Sequence[str] = (),
        server: dict[str, Any] | None = None,
        secrets: Sequence[str] = (),
        **options: Any,
    ) -> Server:
        made = Server(
            plan(
                gpus=gpus,
                max_model_len=512,
                startup_timeout_s=timeout_s,
                hang_timeout_s=hang_timeout_s,
                server=server or {},
                env={f"STAND_IN_{name.upper()}": str(value) for name, value in options.items()},
            ),
            name=f"m-{len(self.servers)}",
            api_key=KEY,
            gpu_ids=gpu_ids,
            log_path=self.folder / "logs" / f"m-{len(self.servers)}.log",
            executable=executable or STAND_IN,
            secrets=secrets,
        )
        self.servers.append(made)
        return made


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    for one in made.servers:
        one.stop()


def ask(endpoint: Endpoint, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=10)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith("{") else text


def running() -> list[psutil.Process]:
    """Everything that the test has started and that is no zombie, parents first."""
    below = [process for process in psutil.Process().children(recursive=True) if process not in OTHERS]
    return [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def api_server(endpoint: Endpoint) -> psutil.Process:
    port = int(endpoint.url.rpartition(":")[2])
    [found] = [p for p in running() if any(c.laddr.port == port for c in p.net_connections() if c.status == "LISTEN")]
    return found


def test_a_server_starts_answers_and_stops(bench: Bench) -> None:
    one = bench(tree=1)
    assert not one.alive()
    endpoint = one.start()
    assert one.alive()
    assert endpoint == Endpoint(
        server="m-0",
        url=endpoint.url,
        api_key=KEY,
        max_model_len=512,
        engine_version="0.32.0",
        scoring=("prompt_logprobs", "forced_decoding"),
    )
    assert KEY not in repr(endpoint)
    port = int(endpoint.url.rpartition(":")[2])
    assert port in server.PORTS
    assert ask(endpoint, "/v1/models", key="wrong") == (401, {"error": "Unauthorized"})
    # Two of the supervisor, then the three of the server; the last of them may come after the server is ready.
    until(lambda: len(running()) == 5)
    family = running()
    for process in family:
        assert KEY not in shlex.join(process.cmdline())
    one.stop()
    assert not one.alive()
    assert not any(process.is_running() for process in family)
    assert one.wait() == "was stopped"
    one.stop()
    assert KEY not in one.log_path.read_text()
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))


def test_the_death_of_the_server_is_told_at_once_and_stop_waits_until_nothing_is_left(bench: Bench) -> None:
    one = bench(tree=1)
    endpoint = one.start()
    api = api_server(endpoint)
    until(lambda: len(api.children(recursive=True)) == 2)
    children = api.children(recursive=True)
    for child in children:
        child.suspend()  # so that it minds no SIGTERM, as an engine in the middle of a step
    told: list[tuple[str, float]] = []
    waiter = threading.Thread(target=lambda: told.append((one.wait(), time.monotonic())))
    waiter.start()
    died = time.monotonic()
    api.kill()
    waiter.join(15)
    [(reason, at)] = told
    assert reason == "was killed by SIGKILL (the kernel does that when memory runs out)"
    assert at - died < 1
    assert not one.alive()
    assert any(child.is_running() for child in children)
    one.stop()
    assert not any(child.is_running() for child in children)
    assert running() == []


# A server of several nodes, whose parts meet on this one


@pytest.fixture
def two_parts(bench: Bench) -> Iterator[Callable[..., tuple[Server, Server, Future[None]]]]:
    """The first part, not started, and the second, which follows it in the background."""
    with ThreadPoolExecutor() as pool:

        def make(**options: Any) -> tuple[Server, Server, Future[None]]:
            first, second = bench(gpus=1, **options), bench(gpus=1, **options)
            for one in (first, second):
                one.plan = replace(one.plan, model=replace(one.plan.model, nodes=2))
            return first, second, pool.submit(second.follow, replace(first.meet(2), rank=1))

        yield make
        for one in bench.servers:  # the pool waits for those who follow
            one.stop()


Parts = Callable[..., tuple[Server, Server, "Future[None]"]]


def headless() -> psutil.Process:
    [found] = [p for p in running() if "--headless" in p.cmdline() and "--grace" not in p.cmdline()]
    return found


def test_the_first_part_of_a_server_is_ready_when_the_other_has_come_and_each_is_stopped_by_itself(
    two_parts: Parts,
) -> None:
    first, second, following = two_parts()
    endpoint = first.start()
    assert ask(endpoint, "/v1/models")[0] == 200
    environment = headless().environ()
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "the others (m-0.1) have logs of their own" in first.log_path.read_text()
    second.stop()
    assert following.exception(15) is None
    assert first.alive()
    first.stop()
    assert running() == []


def test_a_part_that_is_killed_says_so_when_nothing_of_it_is_left(two_parts: Parts) -> None:
    first, _, following = two_parts()
    first.start()
    headless().kill()
    error = following.exception(15)
    assert isinstance(error, ServerFault)
    assert re.match(r"m-1 ended: was killed by SIGKILL .*; see .*m-1\.log\n", str(error))
    assert [process for process in running() if "--headless" in process.cmdline()] == []


def test_a_part_ends_with_the_first_and_a_start_that_waits_for_another_can_be_stopped(two_parts: Parts) -> None:
    first, _, following = two_parts()
    first.start()
    first.stop()
    assert re.match("m-1 ended: exited with code 1;", str(following.exception(15)))

    first, _, following = two_parts(refuse_headless="RuntimeError: CUDA out of memory")
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(first.start)
        error = following.exception(15)
        assert not isinstance(error, ServerFault)
        assert str(error).startswith("m-3 ended: out of memory while loading")
        first.stop()
        assert "was stopped while it started" in str(starting.exception(15))


def test_a_first_part_that_loses_a_port_leaves_another_try_to_the_whole_server(
    two_parts: Parts, tmp_path: Path
) -> None:
    first, second, _ = two_parts(lose_port=tmp_path / "lost")
    with pytest.raises(ServerFault, match="m-0 did not start: its port was taken by another program; see"):
        first.start()
    second.stop()
    assert running() == []


# A server that runs and counts as dead


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence may last longer than stillness: a tenth of a few seconds would be too short for a busy machine."""
    monkeypatch.setattr(watch, "SILENT_SHARE", 2.5)


def in_the_background(endpoint: Endpoint, times: int = 1) -> None:
    """Completion requests whose answers nobody waits for."""

    def send() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1})

    for _ in range(times):
        threading.Thread(target=send, daemon=True).start()


@pytest.mark.usefixtures("patient")
def test_a_server_whose_requests_stand_still_is_ended_and_the_reason_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    one = bench(latency_s=600, hang_timeout_s=4, server={"max_num_seqs": 1}, tree=1)
    in_the_background(one.start(), times=2)
    reason = one.wait()
    assert re.fullmatch(
        r"hung: it has 1 running and [12] waiting requests( and owes the answer to a request for one token)?, "
        r"and nothing moved for [45](\.\d+)? s \(hang_timeout_s = 4\)",
        reason,
    )
    assert not one.alive()
    until(lambda: running() == [])
    assert f"lmsweep: {reason}; it is ended" in one.log_path.read_text()
    assert f"m-0 {reason}" in caplog.text


@pytest.mark.usefixtures("patient")
def test_an_engine_that_hangs_while_it_shows_itself_idle_is_found_out(bench: Bench) -> None:
    one = bench(hang_after=1, hang_timeout_s=4)
    endpoint = one.start()
    assert ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1})[0] == 200
    assert "hung: it owes the answer to a request for one token, and nothing moved for" in one.wait()
    until(lambda: running() == [])


@pytest.mark.usefixtures("patient")
def test_an_idle_server_lives_on(bench: Bench) -> None:
    requests = bench.folder / "requests.jsonl"
    one = bench(hang_timeout_s=4, requests_log=requests)
    one.start()
    until(lambda: requests.exists() and len(requests.read_text().splitlines()) == 2, timeout_s=30)
    assert one.alive()
    assert all(json.loads(line)["body"]["max_tokens"] == 1 for line in requests.read_text().splitlines())


def test_a_server_that_does_not_answer_health_is_ended(bench: Bench) -> None:
    one = bench(mute_after=1, hang_timeout_s=15)
    endpoint = one.start()
    assert ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1]})[0] == 200
    asked = time.monotonic()
    assert re.fullmatch(
        r"was silent for 1\.\d+ s, the last time /health gave TimeoutError: timed out "
        r"\(a tenth of hang_timeout_s = 15\)",
        one.wait(),
    )
    assert time.monotonic() - asked > 1
    until(lambda: running() == [])


def test_a_server_that_is_silent_because_it_computes_is_given_all_of_its_time(bench: Bench) -> None:
    one = bench(toil_after=1, hang_timeout_s=4)
    endpoint = one.start()
    assert ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1]})[0] == 200
    silent_s = re.match(r"was silent for (\S+) s though its API server computes, the last time /", one.wait())
    assert silent_s is not None
    assert float(silent_s[1]) > 2  # 0.4 s where it computes nothing
    until(lambda: running() == [])


def test_a_server_that_is_frozen_is_ended_without_its_help(bench: Bench) -> None:
    one = bench(hang_timeout_s=15)
    api_server(one.start()).suspend()
    assert "was silent for " in one.wait()
    until(lambda: running() == [])


@pytest.mark.usefixtures("patient")
def test_a_server_without_figures_is_watched_for_silence_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()

    def no_figures(*_: object) -> None:
        if one.log_path.read_text().count("lmsweep: a hang of the engine will not be seen"):
            looked.set()
        raise ValueError("/metrics has no vllm:num_requests_running")

    for name in secret_variables(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setattr(server, "snapshot", no_figures)
    one = bench(hang_timeout_s=2)
    one.start()
    assert looked.wait(20)
    assert one.alive()
    one.stop()
    assert one.log_path.read_text().count("lmsweep: ") == 1


# What comes before and instead of a start


def test_a_server_that_exits_by_itself_says_so(bench: Bench) -> None:
    one = bench(die_after=1)
    endpoint = one.start()
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1]})
    assert one.wait() == "exited with code 1"


def test_what_was_got_over_at_the_start_is_not_the_cause_of_a_later_death(bench: Bench) -> None:
    warns = "print('huggingface_hub.errors.HfHubHTTPError: 429 Client Error: too many', file=sys.stderr, flush=True)"
    code = f"import os, sys; {warns}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    one = bench([sys.executable, "-c", code, STAND_IN[1]])
    api_server(one.start()).kill()
    assert one.wait() == "was killed by SIGKILL (the kernel does that when memory runs out)"
    assert "429" in one.log_path.read_text()


def test_a_supervisor_that_cannot_work_is_not_taken_for_a_killed_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "supervisor.py"
    broken.write_text("import sys\nprint('supervisor: no folder for temporary files', file=sys.stderr)\nsys.exit(1)\n")
    monkeypatch.setattr(server, "SUPERVISOR", broken)
    with pytest.raises(ServerError, match=r"could not be run or ended by its supervisor \(exit code 1\); see .*\.log"):
        bench().start()


def test_a_deaf_server_is_stopped_within_the_grace_given(bench: Bench) -> None:
    one = bench(ignore_term=1)
    one.start()
    started = time.monotonic()
    one.stop(grace_s=0.3)
    assert time.monotonic() - started < 5
    assert not one.alive()


def test_stop_from_another_thread_ends_a_start(bench: Bench) -> None:
    one = bench(start_delay_s=600)
    timer = threading.Thread(target=lambda: (until(one.alive), one.stop()))
    timer.start()
    with pytest.raises(ServerError, match="m-0 was stopped while it started"):
        one.start()
    timer.join()
    with pytest.raises(ServerError, match="was stopped"):
        one.start()


def test_a_server_that_was_never_started_can_be_stopped_and_waited_for(bench: Bench) -> None:
    one = bench()
    one.stop()
    assert one.wait() == "was never started"


LOGS = [
    ("ModuleNotFoundError: No module named 'vllm'", "vLLM is not installed for this Python"),
    ("api_server.py: error: unrecognized arguments: --max-seqs 3", "vLLM does not know --max-seqs 3"),
    ("api_server.py: error: argument --dtype: invalid choice: 'flot'", "an option: --dtype: invalid choice: 'flot'"),
    (
        "ValueError: No available memory for the cache blocks. Try",
        "no memory is left for the KV cache after the weights",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (1.0 GiB). Based on the available memory, the estimated "
        "maximum model length is 8192. Try",
        "too small for max_model_len 32768: lower max_model_len (vLLM estimates that 8192 fits)",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (1.0 GiB). Try",
        "too small for one request of max_model_len tokens",
    ),
    (
        "ValueError: Free memory on device cuda:0 (3/80 GiB) is less than desired GPU memory utilization (0.9,",
        "too much GPU memory is already taken by others",
    ),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", "out of memory while loading"),
    (
        "User-specified max_model_len (9999) is greater than the derived max_model_len (max_position_embeddings=2048 ",
        "max_model_len 9999 is more than the checkpoint was made for (max_position_embeddings=2048)",
    ),
    ("OSError: You are trying to access a gated repo.\nMake sure to have access", "HF_TOKEN"),
    (
        "OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/no/model'. Use",
        "there is no such model",
    ),
    (
        "401 Client Error. Repository Not Found for url\nRepositoryNotFoundError: If you are trying to access a "
        "private or gated repo, make sure",
        "there is no such model",
    ),
    (
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot",
        "not on this machine",
    ),
    (
        "ValueError: Quantization method specified in the model config (awq) does not match the quantization method "
        "specified in the `quantization` argument (gptq).",
        "quantized with awq, the configuration says gptq",
    ),
    ("ValueError: Bfloat16 is only supported on GPUs with compute capability", "set `dtype: half`"),
]
"""What vLLM 0.32 and the hub print, and what must be said of it."""


@pytest.mark.parametrize(("log", "cause"), LOGS)
def test_a_well_known_cause_is_named_with_its_cure(log: str, cause: str, bench: Bench) -> None:
    one = bench([sys.executable, "-S", "-E", "-c", "import sys; sys.exit(sys.argv[1])", log])
    with pytest.raises(ServerError) as caught:
        one.start()
    first_line = str(caught.value).splitlines()[0]
    assert cause in first_line
    assert first_line.startswith("m-0 did not start: ")
    assert str(one.log_path) in first_line
    assert log.splitlines()[0] in str(caught.value).partition("\n")[2]


def test_an_unknown_cause_shows_the_end_of_the_log_without_the_key(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_a-token-of-the-user")
    lines = "\\n".join([*(f"line {i}" for i in range(40)), f"the key is {KEY}", "and hf_a-token-of-the-user"])
    with pytest.raises(ServerFault) as caught:
        bench(refuse=lines).start()
    text = str(caught.value)
    assert "m-0 did not start: exited with code 1; see " in text
    assert "line 39" in text
    assert "the key is ***" in text
    assert "and ***" in text
    assert "line 20" not in text
    for shown in (text, bench.servers[0].log_path.read_text()):
        assert KEY not in shown
        assert "hf_a-token" not in shown


def test_the_log_names_the_secrets_that_a_server_is_not_given(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-user's-bucket")
    monkeypatch.setenv("PLAIN_NAME", "known-by-its-use")
    monkeypatch.setenv("HF_TOKEN", "hf_a-token-of-the-user")
    monkeypatch.setenv("MY_SERVERS_KEY", KEY)
    one = bench(refuse="no weights at s3://bucket", secrets=["known-by-its-use"])
    with pytest.raises(ServerFault):
        one.start()
    (said,) = [line for line in one.log_path.read_text().splitlines() if "secrets that it is not given" in line]
    assert {"AWS_SECRET_ACCESS_KEY", "PLAIN_NAME"} <= {*re.findall(r"\w+", said)}
    assert not re.search(r"HF_TOKEN|MY_SERVERS_KEY|of-the-user|known-by", said)


def test_a_server_that_does_not_get_ready_in_time_is_stopped(bench: Bench) -> None:
    one = bench(start_delay_s=600, timeout_s=0.6)
    with pytest.raises(
        ServerError, match=r"not ready after startup_timeout_s = 0\.6 s \(it did not answer\); raise it"
    ) as caught:
        one.start()
    assert caught.type is ServerError
    assert not one.alive()
    assert running() == []


def test_a_start_that_was_killed_may_succeed_another_time(bench: Bench) -> None:
    one = bench(tree=1, start_delay_s=600)
    kill = threading.Thread(
        target=lambda: (until(lambda: len(running()) == 5), min(running()[2:], key=lambda p: p.create_time()).kill())
    )
    kill.start()
    with pytest.raises(ServerFault, match=r"m-0 did not start: was killed by SIGKILL \(the kernel does that when"):
        one.start()
    kill.join()
    assert running() == []


@pytest.mark.parametrize(
    "line",
    [
        "RuntimeError: Failed to load 0th LogitsProcessor plugin sweep.serving.forced_decoding:ForcedDecoding",
        "api_server.py: error: unrecognized arguments: --logits-processors sweep.serving.forced_decoding:F",
    ],
)
def test_a_server_that_fails_over_what_only_we_wanted_is_started_without_it(line: str, bench: Bench) -> None:
    bench_server = bench(refuse_forced=line)
    endpoint = bench_server.start()
    assert endpoint.scoring == ()
    log_text = bench_server.log_path.read_text()
    named = "worker_extension_cls or logits_processors"
    assert f"lmsweep: it ended because of {named}; it is started again without, to score by echo" in log_text


def test_an_engine_that_is_not_supported_is_refused_by_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "supported", lambda version: f"no vLLM {version}, please")
    with pytest.raises(ServerError, match=r"m-0 is not used: no vLLM 0\.32\.0, please") as caught:
        bench().start()
    assert caught.type is ServerError
    assert running() == []


def test_the_planned_commit_of_an_adapter_is_served(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"planned"}
    with hub_stub() as hub:
        reach(hub, tmp_path / "hf", monkeypatch)
        commit = hub.add("org/a", files)
        hub.add("org/a", {**files, "adapter_model.safetensors": b"retrained"})
        adapters = replace(plan(adapters={"m": None, "tuned": "org/a"}), adapter_revisions={"tuned": commit})
        tuned = bench()
        tuned.plan = adapters
        tuned.start()
    folder = snapshot("org/a", commit)
    assert f"--lora-modules tuned={folder} " in tuned.log_path.read_text()
    assert (folder / "adapter_model.safetensors").read_bytes() == b"planned"


def test_a_program_that_does_not_exist_is_named(bench: Bench) -> None:
    with pytest.raises(ServerError, match=r"(?s)exited with code 127.*cannot run /no/such/engine"):
        bench(["/no/such/engine"]).start()


def test_a_port_lost_to_a_stranger_is_replaced_by_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sweep.serving.server")
    claim = server._claim_port
    strangers: list[socket.socket] = []

    def lose_two(host: str) -> tuple[int, socket.socket]:
        port, held = claim(host)
        if len(strangers) < 2:
            stranger = socket.socket()
            stranger.bind((host, port))
            strangers.append(stranger)
        return port, held

    monkeypatch.setattr(server, "_claim_port", lose_two)
    endpoint = bench().start()
    assert ask(endpoint, "/health")[0] == 200
    taken = {stranger.getsockname()[1] for stranger in strangers}
    assert len(taken) == 2
    assert int(endpoint.url.rpartition(":")[2]) not in taken
    assert all(f"m-0 lost port {port} to another program" in caplog.text for port in taken)
    log = bench.servers[0].log_path.read_text()
    assert all(f"--port {port}" in log for port in taken), "every attempt is kept"
    for stranger in strangers:
        stranger.close()


def test_a_stranger_that_answers_on_a_lost_port_is_not_taken_for_ours(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = bench().start()
    claim = server._claim_port
    ports = [int(other.url.rpartition(":")[2])]
    monkeypatch.setattr(server, "_claim_port", lambda host: (ports.pop(), socket.socket()) if ports else claim(host))
    mine = Server(
        replace(plan(), name="mine", adapters={"mine": None}),
        name="mine-0",
        api_key="another-key",
        gpu_ids=[],
        log_path=bench.folder / "mine.log",
        executable=STAND_IN,
    )
    bench.servers.append(mine)
    assert mine.start().url != other.url


def test_a_port_that_is_lost_every_time_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        port = stranger.getsockname()[1]
        monkeypatch.setattr(server, "_claim_port", lambda host: (port, socket.socket()))
        with pytest.raises(ServerFault, match="its port was taken by another program, 5 times"):
            bench().start()


def test_two_servers_of_ours_never_claim_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    first, held = server._claim_port("127.0.0.1")
    with held:
        monkeypatch.setattr(server, "PORTS", range(first, first + 1))
        with pytest.raises(ServerFault, match=r"no free port on 127\.0\.0\.1"):
            server._claim_port("127.0.0.1")
    again, held = server._claim_port("127.0.0.1")
    held.close()
    assert again == first


# GPUs


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: str, apps: str = "") -> None:
    """An nvidia-smi that gives these answers."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncase $1 in --query-gpu*) echo '{memory}';; *) echo '{apps}';; esac\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_gpu_whose_memory_others_hold_is_a_fault_that_names_them(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "3, GPU-x, Disabled, 70000, 10000", "GPU-x, 4711, VLLM::EngineCore, 69000")
    monkeypatch.setattr(server, "GPU_WAIT_S", 0.0)
    with pytest.raises(ServerFault) as caught:
        bench(gpu_ids=["3"], server={"gpu_memory_utilization": 0.5}).start()
    assert str(caught.value) == (
        "m-0 did not start: not enough GPU memory is free, after 0 s: GPU 3 (GPU-x) has 10,000 of 40,000 MiB free; "
        "held by VLLM::EngineCore (pid 4711, 69000 MiB); end those processes, or lower gpu_memory_utilization "
        "(or `gpus`), which is 0.5 here"
    )
    assert not bench.servers[0].log_path.exists(), "it was not even tried"


@pytest.mark.parametrize(
    ("gpus", "options", "share"),
    [
        (1, {}, 0.92),
        (4, {}, 0.92),
        (0.5, {}, 0.46),
        (0.5, {"gpu_memory_utilization": 0.3}, 0.3),
        (1, {"gpu_memory_utilization": 0.8}, 0.8),
    ],
)
def test_the_memory_that_is_waited_for_is_what_the_server_is_told_to_take(
    gpus: float, options: dict[str, Any], share: float
) -> None:
    assert server._memory_share(plan(gpus=gpus, server=options)) == share
    told = engine.arguments(plan(gpus=gpus, server=options), host="h", port=1)
    if "--gpu-memory-utilization" in told:
        assert float(told[told.index("--gpu-memory-utilization") + 1]) == share
    else:
        assert share == engine.SHARED_GPU_MEMORY


def test_a_start_goes_on_where_nvidia_smi_cannot_tell_and_its_log_says_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "0, GPU-x, Enabled, 70000, 10000")
    one = bench(gpu_ids=["MIG-1"])
    one.start()
    assert one.log_path.read_text().startswith(
        "lmsweep: whether GPU memory is free was not seen: MIG-1 is a slice of a GPU"
    )


def test_servers_that_share_a_gpu_start_one_after_another(bench: Bench) -> None:
    shared = f"shared-{os.getpid()}"
    first = bench(gpus=0.5, gpu_ids=[shared], start_delay_s=600)
    second = bench(gpus=0.5, gpu_ids=[shared])
    other = bench(gpus=0.5, gpu_ids=[f"{shared}-other"])

    def start_in_vain() -> None:
        with contextlib.suppress(ServerError):
            first.start()

    starting = threading.Thread(target=start_in_vain)
    starting.start()
    until(first.alive)
    ready: list[Endpoint] = []
    waiting = threading.Thread(target=lambda: ready.append(second.start()))
    waiting.start()
    other.start()  # takes longer than anything that does not wait
    assert waiting.is_alive()
    assert not second.alive()
    assert not second.log_path.exists()
    first.stop()
    starting.join(20)
    waiting.join(30)
    assert [endpoint.server for endpoint in ready] == ["m-1"]


def test_a_turn_ends_when_the_server_is_ready(bench: Bench) -> None:
    shared = f"shared-{os.getpid()}"
    both = [bench(gpus=0.5, gpu_ids=[shared]) for _ in range(2)]
    assert len({one.start().url for one in both}) == 2


def test_waiting_for_a_turn_is_not_start_up_time_and_ends_with_a_stop(bench: Bench) -> None:
    shared = f"shared-{os.getpid()}"
    one = bench(gpus=0.5, gpu_ids=[shared], timeout_s=5)
    two = bench(gpus=0.5, gpu_ids=[shared], timeout_s=0.1)
    ends: list[str] = []

    def start(server: Server) -> None:
        try:
            ends.append(server.start().server)
        except ServerError as error:
            ends.append(str(error))

    with gpu.turn([shared], threading.Event()):
        waiting = [threading.Thread(target=start, args=(server,)) for server in (one, two)]
        for thread in waiting:
            thread.start()
        waiting[0].join(5.5)
        assert waiting[0].is_alive()
        assert waiting[1].is_alive()
        two.stop()
        waiting[1].join(5)
        assert ends == ["m-1 was stopped while it started"]
    waiting[0].join(20)
    assert ends[1:] == ["m-0"]


# Four servers at once, on real Ray


ROUNDS, ACTORS, FIRST_PORT = 20, 4, 29_880


def four_servers_at_once(folder: Path) -> int:
    """ROUNDS times on ten ports, of which a stranger has three and takes one more at every other start.

    How often a port was lost to the latter.
    """
    import ray

    served = plan(max_model_len=512)

    class Host:  # goes to the actors whole, so it calls nothing of this file
        """Starts one server after another; every first attempt of every other start loses its port."""

        def __init__(self, number: int) -> None:
            self.number = number
            self.server: Server | None = None
            server.PORTS = range(FIRST_PORT, FIRST_PORT + 10)

        def start(self, turn: int) -> tuple[Endpoint, int]:
            claim = server._claim_port
            strangers: list[socket.socket] = []

            def lose_one(host: str) -> tuple[int, socket.socket]:
                port, held = claim(host)
                if not strangers and (turn + self.number) % 2:
                    stranger = socket.socket()
                    stranger.bind((host, port))
                    strangers.append(stranger)
                return port, held

            self.server = Server(
                served,
                name=f"m-{self.number}-{turn}",
                api_key=f"key-of-actor-{self.number}-{turn}",
                gpu_ids=[],
                log_path=folder / f"m-{self.number}-{turn}.log",
                executable=STAND_IN,
            )
            server._claim_port = lose_one
            try:
                return self.server.start(), len(strangers)
            finally:
                server._claim_port = claim
                for stranger in strangers:
                    stranger.close()

        def stop(self) -> None:
            assert self.server is not None
            self.server.stop(0.5)

    ray.init(address="local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, configure_logging=False)
    strangers = []
    lost = 0
    try:
        for port in (FIRST_PORT, FIRST_PORT + 4, FIRST_PORT + 9):
            strangers.append(socket.socket())
            strangers[-1].bind(("127.0.0.1", port))
        hosts = [ray.remote(num_cpus=1)(Host).remote(number) for number in range(ACTORS)]
        for turn in range(ROUNDS):
            started = ray.get([host.start.remote(turn) for host in hosts], timeout=120)
            endpoints = [endpoint for endpoint, _ in started]
            lost += sum(times for _, times in started)
            assert len({endpoint.url for endpoint in endpoints}) == ACTORS
            for endpoint in endpoints:
                assert ask(endpoint, "/v1/models", key=endpoint.api_key)[0] == 200
                others = {other.api_key for other in endpoints} - {endpoint.api_key}
                assert {ask(endpoint, "/v1/models", key=other)[0] for other in others} == {401}
            ray.get([host.stop.remote() for host in hosts], timeout=60)
    finally:
        for stranger in strangers:
            stranger.close()
        ray.shutdown()
    return lost


@pytest.mark.ray
@pytest.mark.slow
def test_four_actors_start_servers_at_once_and_no_collision_reaches_the_user(tmp_path: Path) -> None:
    with apart({}) as elsewhere:
        assert elsewhere(four_servers_at_once, tmp_path) == ROUNDS * ACTORS // 2


# Real vLLM


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"server": {"max_num_sqs": 4}}, ServerError, "vLLM does not know --max-num-sqs"),
        ({"path": "/no/such/model"}, ServerError, "there is no such model, no folder /no/such/model"),
        ({"max_model_len": 999_999}, ServerError, "max_model_len 999999 is more than the checkpoint was made for"),
    ],
    ids=["bad option", "missing model", "too long"],
)
def test_real_vllm_that_does_not_start_says_why(
    changes: dict[str, Any], kind: type[ServerError], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    one = real(tmp_path, **{"path": str(tiny_model), **changes})
    with pytest.raises(ServerError) as caught:
        one.start()
    assert message in str(caught.value).splitlines()[0]
    assert caught.type is kind
    assert running() == []


@pytest.mark.slow
@pytest.mark.vllm
def test_real_vllm_that_loses_its_port_is_started_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    monkeypatch.setattr(server, "PORT_ATTEMPTS", 1)
    claim = server._claim_port
    with socket.socket() as stranger:

        def lose(host: str) -> tuple[int, socket.socket]:
            port, held = claim(host)
            stranger.bind((host, port))
            stranger.listen()
            return port, held

        monkeypatch.setattr(server, "_claim_port", lose)
        with pytest.raises(ServerFault, match="its port was taken by another program, 1 times"):
            real(tmp_path, path=str(tiny_model)).start()
    assert running() == []


@pytest.mark.long
@pytest.mark.vllm
def test_real_vllm_answers_in_two_parts_as_in_one(tiny_model: Path, tmp_path: Path) -> None:
    """Two processes of one machine play the nodes, each with one layer of two, over gloo."""
    version = pytest.importorskip("vllm.version", reason="vLLM is not installed").__version__
    # vLLM's command line tool looks for a distribution of its own name, which that for CPUs does not have; by the
    # version vLLM tells which of them it is.
    metadata = tmp_path / "named" / f"vllm-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version.partition('+')[0]}+cpu\n")
    # Compiled: on a CPU vLLM's second stage has no place for what it gets but from the warm-up of a compiled model.
    common: dict[str, Any] = {"path": str(tiny_model), "env": {"PYTHONPATH": str(metadata.parents[1])}}
    body = {"model": "m", "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, "logprobs": 1, "echo": True}

    alone = real(tmp_path / "alone", **common)
    expected = ask(alone.start(), "/v1/completions", body)[1]["choices"][0]["logprobs"]["token_logprobs"]
    alone.stop()

    first, second = (real(tmp_path / name, **common, nodes=2) for name in ("first", "second"))
    for one in (first, second):
        one.plan = replace(one.plan, gpus=1.0)  # that many GPUs would be its share
    with ThreadPoolExecutor() as pool:
        following = pool.submit(second.follow, replace(first.meet(2), rank=1))
        try:
            status, answer = ask(first.start(), "/v1/completions", body)
            assert status == 200
            got = answer["choices"][0]["logprobs"]["token_logprobs"]
            assert got[0] is None
            assert got[1:] == pytest.approx(expected[1:], abs=1e-3)
            headless().kill()
            assert isinstance(following.exception(60), ServerFault)
        finally:
            second.stop()
            first.stop()
    assert running() == []


def real(folder: Path, **changes: Any) -> Server:
    changes = {"max_model_len": 512, "startup_timeout_s": 300.0, "dtype": "float32", **changes}
    return Server(plan(gpus=0.0, **changes), name="m-0", api_key=KEY, gpu_ids=[], log_path=folder / "m-0.log")


# The stand-in is honest


SHAPE = {"text_offset", "token_logprobs", "tokens", "top_logprobs"}


def test_the_stand_in_scores_alike_by_echo_and_by_next_token(bench: Bench) -> None:
    endpoint = bench(vocabulary=64).start()
    prompt = [5, 6, 7, 8]
    common = {"model": "m", "temperature": 0, "max_tokens": 1, "logprobs": 1}
    status, echoed = ask(
        endpoint, "/v1/completions", {**common, "prompt": [[*prompt, t] for t in (9, 10)], "echo": True}
    )
    assert status == 200
    asked = {"prompt": prompt, "logprob_token_ids": [9, 10], "return_tokens_as_token_ids": True}
    [choice] = ask(endpoint, "/v1/completions", {**common, **asked})[1]["choices"]
    top = choice["logprobs"]["top_logprobs"][0]
    for one, token in zip(echoed["choices"], (9, 10), strict=True):
        logprobs = one["logprobs"]
        assert logprobs.keys() == SHAPE
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert {len(logprobs[name]) for name in SHAPE} == {6}
        assert logprobs["token_logprobs"][4] == top[f"token_id:{token}"] == logprobs["top_logprobs"][4][f" {token}"]
        assert max(logprobs["top_logprobs"][4].values()) == max(top.values())
    assert echoed["usage"]["prompt_tokens"] == 10
    assert echoed["usage"]["completion_tokens"] == 2


def test_the_stand_in_generates_the_same_text_each_time_and_minds_its_stops(bench: Bench) -> None:
    endpoint = bench(end_every=10**9).start()
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 12, "temperature": 0}
    first, second = (ask(endpoint, "/v1/completions", body)[1]["choices"][0] for _ in range(2))
    assert first == second
    assert first["finish_reason"] == "length"
    words = first["text"].split()
    assert len(words) == 12
    stop = f" {words[3]} "
    stopped = ask(endpoint, "/v1/completions", {**body, "stop": [stop]})[1]["choices"][0]
    assert stopped["text"] == first["text"][: first["text"].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_stand_in_answers_in_vllms_own_types(bench: Bench) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    endpoint = bench().start()
    body = {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 1, "echo": True}
    hello = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answers = [
        ask(endpoint, "/v1/completions", body)[1],
        ask(endpoint, "/v1/models")[1],
        ask(endpoint, "/v1/chat/completions", {**hello, "logprobs": True, "top_logprobs": 1})[1],
        ask(endpoint, "/tokenize", {"model": "m", "prompt": "Hi", "add_special_tokens": False})[1],
    ]
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse\n"
        "from vllm.entrypoints.openai.completion.protocol import CompletionResponse\n"
        "from vllm.entrypoints.serve.engine.protocol import ModelList\n"
        "from vllm.entrypoints.serve.tokenize.protocol import TokenizeResponse\n"
        "kinds = CompletionResponse, ModelList, ChatCompletionResponse, TokenizeResponse\n"
        "for kind, answer in zip(kinds, json.load(sys.stdin), strict=True):\n"
        "    assert kind.model_validate(answer).model_dump() == answer, kind\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], input=json.dumps(answers), text=True, check=True, timeout=300
    )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "other", "prompt": [1]}, 404, "The model `other` does not exist."),
        ({"model": "m", "prompt": [1] * 513}, 400, "maximum context length is 512 tokens"),
        ({"model": "m", "prompt": [1] * 512}, 400, "longer than the maximum model length of 512"),
        ({"model": "m", "prompt": [1], "logprob_token_ids": [1]}, 400, "`logprobs` must be set"),
        ({"model": "m", "prompt": []}, 400, "must be provided and non-empty"),
        ({"model": "m", "prompt": [1], "stop": list("abcde")}, 400, "at most 4 items"),
    ],
)
def test_the_stand_in_refuses_what_vllm_refuses(
    body: dict[str, Any], status: int, message: str, refuser: Endpoint
) -> None:
    got, answer = ask(refuser, "/v1/completions", body)
    assert got == status == answer["error"]["code"]
    assert message in answer["error"]["message"]


@pytest.fixture(scope="module")
def refuser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    one = Server(
        plan(max_model_len=512, env={"VLLM_MAX_STOP_STRINGS": "4"}),
        name="m-0",
        api_key=KEY,
        gpu_ids=[],
        log_path=tmp_path_factory.mktemp("refuser") / "m-0.log",
        executable=STAND_IN,
    )
    yield one.start()
    one.stop()
