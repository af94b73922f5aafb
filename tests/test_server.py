"""The command line and environment as tables; starting, failing and stopping on the stand-in server."""

import http.client
import json
import logging
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from sweep import server
from sweep.config import Model
from sweep.errors import ConfigError, ServerError
from sweep.plan import ServerPlan
from sweep.server import Endpoint, Server, command, environment, served_names

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


def arguments(given: ServerPlan) -> list[str]:
    return command(given, python="py", host="127.0.0.1", port=20000)


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _no_engine_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMSWEEP_ENGINE", raising=False)


# The command line


def test_a_plain_model_gets_this_command_line() -> None:
    assert shlex.join(arguments(plan())) == (
        "py -m vllm.entrypoints.openai.api_server --model org/m --served-model-name m --host 127.0.0.1 --port 20000"
        " --dtype auto --generation-config vllm --disable-uvicorn-access-log"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"revision": "v1"}, "--revision v1"),
        ({"tokenizer": "org/t"}, "--tokenizer org/t"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"max_model_len": 4096}, "--max-model-len 4096"),
        ({"quantization": "awq"}, "--quantization awq"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"generation_config": "auto"}, "--generation-config auto"),
        ({"tensor_parallel": 2}, "--tensor-parallel-size 2 --distributed-executor-backend mp"),
        ({"gpus": 0.5}, "--gpu-memory-utilization 0.46"),
        ({"gpus": 0.5, "server": {"gpu_memory_utilization": 0.3}}, "--gpu-memory-utilization 0.3"),
        ({"server": {"max_num_seqs": 64}}, "--max-num-seqs 64"),
        ({"server": {"enable-prefix-caching": True}}, "--enable-prefix-caching"),
        ({"server": {"enable_prefix_caching": False}}, "--no-enable-prefix-caching"),
        ({"server": {"disable_uvicorn_access_log": False}}, "--no-disable-uvicorn-access-log"),
        ({"server": {"hf_overrides": {"rope_theta": 1.5}}}, """--hf-overrides '{"rope_theta": 1.5}'"""),
        ({"server": {"logits_processors": ["a:B", "c:D"]}}, "--logits-processors a:B c:D"),
        ({"server": {"cudagraph_capture_sizes": [1, 2]}}, "--cudagraph-capture-sizes 1 2"),
        (
            {"adapters": {"m": None, "m-lora": "/l", "m-other": "org/o"}},
            "--served-model-name m --host 127.0.0.1 --port 20000 --dtype auto --generation-config vllm"
            " --disable-uvicorn-access-log --enable-lora --lora-modules m-lora=/l m-other=org/o --max-loras 2",
        ),
    ],
)
def test_a_setting_becomes_these_arguments(changes: dict[str, Any], expected: str) -> None:
    line = shlex.join(arguments(plan(**changes)))
    assert f"{expected} " in f"{line} "
    flags = re.findall(r"(?<= )--(?:no-)?([a-z-]+)", line)
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"server": {"disable_log_stats": False}}, "log-stats"),
        ({"server": {"disable_uvicorn_access_log": None}}, "access-log"),
        ({}, "trust-remote-code"),
        ({}, "max-model-len"),
        ({}, "quantization"),
    ],
)
def test_what_is_left_to_vllm_is_not_said(changes: dict[str, Any], absent: str) -> None:
    assert absent not in shlex.join(arguments(plan(**changes)))


def test_the_commit_that_was_planned_is_served() -> None:
    line = arguments(replace(plan(revision="main"), revision="abc123"))
    assert line[line.index("--revision") + 1] == "abc123"


@pytest.mark.parametrize(
    ("adapters", "names"),
    [({"m": None}, ["m"]), ({"a": "/a", "m": None}, ["m", "a"]), ({"a": "/a"}, ["m", "a"])],
)
def test_a_server_serves_its_base_and_its_adapters(adapters: dict[str, str | None], names: list[str]) -> None:
    assert served_names(plan(adapters=adapters)) == names


@pytest.mark.parametrize("option", ["swap_space", "swap-space", "disable_log_requests"])
def test_an_option_of_older_recipes_is_dropped_with_a_warning(option: str, caplog: pytest.LogCaptureFixture) -> None:
    assert arguments(plan(server={option: 4})) == arguments(plan())
    assert f"m: the option {option} is dropped: vLLM " in caplog.text


@pytest.mark.parametrize(
    ("option", "instead"),
    [("dtype", "`dtype`"), ("port", "a free port"), ("api-key", "the sweep's `api_key`"), ("hf_token", "HF_TOKEN")],
)
def test_an_option_that_has_a_place_of_its_own_is_refused(option: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=rf"models\.m\.server\.{option}: not set here; use .*{re.escape(instead)}"):
        arguments(plan(server={option: "x"}))


def test_another_engine_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSWEEP_ENGINE", "my-engine --with 'two words'")
    assert arguments(plan())[:5] == ["my-engine", "--with", "two words", "--model", "org/m"]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_installed_vllm_understands_everything_that_we_say() -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    fullest = plan(
        adapters={"m": None, "l": "/l"},
        gpus=0.5,
        revision="r",
        tokenizer="t",
        max_model_len=128,
        quantization="awq",
        trust_remote_code=True,
        tensor_parallel=2,
        server={
            "enable_prefix_caching": False,
            "enable-log-requests": False,
            "disable_log_stats": False,
            "hf_overrides": {"a": 1},
            "logits_processors": ["a:B"],
            "swap_space": 4,
            "disable_log_requests": True,
        },
    )
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "validate_parsed_serve_args(found)\n"
        "print(json.dumps([found.served_model_name, [m.name for m in found.lora_modules], found.enable_prefix_caching,"
        " found.disable_uvicorn_access_log, found.hf_overrides, found.logits_processors, found.generation_config,"
        " found.gpu_memory_utilization, found.tensor_parallel_size]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments(fullest)[3:]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [["m"], ["l"], False, True, {"a": 1}, ["a:B"], "vllm", 0.46, 2]


# The environment


BASE = {
    "PATH": "/bin",
    "OMP_NUM_THREADS": "1",
    "RAY_ADDRESS": "x",
    "WANDB_API_KEY": "w",
    "VLLM_PORT": "1",
    "HF_TOKEN": "h",
}


def variables(given: ServerPlan, gpu_ids: list[str], base: dict[str, str] | None = None) -> dict[str, str]:
    return environment(given, api_key=KEY, gpu_ids=gpu_ids, base=BASE if base is None else base)


def test_a_server_inherits_only_what_it_should() -> None:
    assert variables(plan(), ["3", "10", "2"]) == {
        "PATH": "/bin",
        "HF_TOKEN": "h",
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": "64",
        "CUDA_VISIBLE_DEVICES": "2,3,10",
    }


@pytest.mark.parametrize(
    ("gpu_ids", "changes", "base", "expected"),
    [
        (["GPU-b", "GPU-a"], {}, {}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
        ([], {}, {"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "2"}),
        ([], {}, {"VLLM_CPU_KVCACHE_SPACE": "9"}, {"VLLM_CPU_KVCACHE_SPACE": "9"}),
        ([], {"env": {"VLLM_CPU_KVCACHE_SPACE": "5"}}, {}, {"VLLM_CPU_KVCACHE_SPACE": "5"}),
        ([], {"server": {"gpu-memory-utilization": 0.1}}, {}, {"VLLM_CPU_KVCACHE_SPACE": None}),
        (["0"], {}, {}, {"VLLM_CPU_KVCACHE_SPACE": None}),
        (["0"], {"env": {"OMP_NUM_THREADS": "4"}}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "4"}),
        (["0"], {"env": {"VLLM_API_KEY": "mine", "CUDA_VISIBLE_DEVICES": "9"}}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
    ],
)
def test_a_variable_gets_this_value(
    gpu_ids: list[str], changes: dict[str, Any], base: dict[str, str], expected: dict[str, str | None]
) -> None:
    found = variables(plan(**changes), gpu_ids, base)
    assert {name: found.get(name) for name in expected} == expected
    assert found["VLLM_API_KEY"] == KEY


def test_a_variable_of_older_recipes_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert "VLLM_USE_V1" not in variables(plan(env={"VLLM_USE_V1": "0"}), ["0"])
    assert "m: the variable VLLM_USE_V1 is dropped: vLLM has only the V1 engine now" in caplog.text


# Starting and stopping, on the stand-in


class Bench:
    """Makes servers on the stand-in and stops them after the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[Server] = []

    def __call__(self, executable: list[str] | None = None, *, timeout_s: float = 30.0, **options: Any) -> Server:
        made = Server(
            plan(
                max_model_len=512,
                startup_timeout_s=timeout_s,
                env={f"STAND_IN_{name.upper()}": str(value) for name, value in options.items()},
            ),
            name=f"m-{len(self.servers)}",
            api_key=KEY,
            gpu_ids=[],
            log_path=self.folder / "logs" / f"m-{len(self.servers)}.log",
            executable=executable or STAND_IN,
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
    """Everything below us that is no zombie."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def api_server(endpoint: Endpoint) -> psutil.Process:
    port = int(endpoint.url.rpartition(":")[2])
    [found] = [p for p in running() if any(c.laddr.port == port for c in p.net_connections() if c.status == "LISTEN")]
    return found


def test_a_server_starts_answers_and_stops(bench: Bench) -> None:
    one = bench(tree=1)
    assert not one.alive()
    endpoint = one.start()
    assert one.alive()
    assert endpoint == Endpoint(server="m-0", url=endpoint.url, api_key=KEY, max_model_len=512, engine_version="0.32.0")
    assert KEY not in repr(endpoint)
    port = int(endpoint.url.rpartition(":")[2])
    assert port in server.PORTS
    assert ask(endpoint, "/v1/models", key="wrong") == (401, {"error": "Unauthorized"})
    family = running()
    # Two of the supervisor, then the three of the server.
    assert len(family) == 5
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


def test_the_death_of_the_server_is_told(bench: Bench) -> None:
    one = bench()
    endpoint = one.start()
    found: list[str] = []
    watcher = threading.Thread(target=lambda: found.append(one.wait()))
    watcher.start()
    api_server(endpoint).kill()
    watcher.join(5)
    assert found == ["was killed by SIGKILL (the kernel does that when memory runs out)"]
    assert not one.alive()


def test_a_server_that_exits_by_itself_says_so(bench: Bench) -> None:
    one = bench(die_after=1)
    endpoint = one.start()
    with pytest.raises((http.client.HTTPException, OSError)):
        ask(endpoint, "/v1/completions", {"model": "m", "prompt": [1]})
    assert one.wait() == "exited with code 1"


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


def test_an_unknown_cause_shows_the_end_of_the_log_without_the_key(bench: Bench) -> None:
    lines = "\\n".join([*(f"line {i}" for i in range(40)), f"the key is {KEY}"])
    with pytest.raises(ServerError) as caught:
        bench(refuse=lines).start()
    text = str(caught.value)
    assert "m-0 did not start: exited with code 1; see " in text
    assert "line 39" in text
    assert "the key is ***" in text
    assert "line 20" not in text
    assert KEY not in text


def test_a_server_that_does_not_get_ready_in_time_is_stopped(bench: Bench) -> None:
    one = bench(start_delay_s=600, timeout_s=0.6)
    with pytest.raises(
        ServerError, match=r"not ready after startup_timeout_s = 0\.6 s \(it did not answer\); raise it"
    ):
        one.start()
    assert not one.alive()
    assert running() == []


def test_a_program_that_does_not_exist_is_named(bench: Bench) -> None:
    with pytest.raises(ServerError, match=r"(?s)exited with code 127.*cannot run /no/such/engine"):
        bench(["/no/such/engine"]).start()


def test_a_port_lost_to_a_stranger_is_replaced_by_another(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sweep.server")
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
        with pytest.raises(ServerError, match="its port was taken by another program, 5 times"):
            bench().start()


def test_two_servers_of_ours_never_claim_the_same_port(monkeypatch: pytest.MonkeyPatch) -> None:
    first, held = server._claim_port("127.0.0.1")
    with held:
        monkeypatch.setattr(server, "PORTS", range(first, first + 1))
        with pytest.raises(ServerError, match=r"no free port on 127\.0\.0\.1"):
            server._claim_port("127.0.0.1")
    again, held = server._claim_port("127.0.0.1")
    held.close()
    assert again == first


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
    answers = [ask(endpoint, "/v1/completions", body)[1], ask(endpoint, "/v1/models")[1]]
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.openai.completion.protocol import CompletionResponse\n"
        "from vllm.entrypoints.serve.engine.protocol import ModelList\n"
        "for kind, answer in zip((CompletionResponse, ModelList), json.load(sys.stdin), strict=True):\n"
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
