"""What tests of several modules share: a stand-in server without a supervisor, a process for Ray, a tiny model, and
the order in which `make test` hands their files to its two workers.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from xdist.scheduler import LoadFileScheduling

from sweep.running.machine import prepare_local_ray
from sweep.serving.server import Endpoint

KEY = "key-of-the-stand-in-0123456789"

# What is ignored when we start (by `nohup`, or by `&` in a script) is ignored by all that we start, and a sweep that
# ignores a signal does not end of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

LONGEST = ("deaths", "runner", "demo_sweep", "fidelity", "partition", "fetch", "deploy", "several_nodes")
"""Files that take minutes, in this order before all others: what a worker takes up last should be short."""

ONE_WORKER = {"tests/test_fidelity.py": "tests/test_demo_sweep.py"}
"""Files that one worker takes one after the other, under the name of the first: they make the same models, and see that
no server is left on this machine."""


class _ByFile(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return ONE_WORKER.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByFile:
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A running stand-in server."""

    endpoint: Endpoint
    process: subprocess.Popen[bytes]
    log: Path

    def bodies(self) -> list[dict[str, Any]]:
        """The body of every completion request so far."""
        return [json.loads(line)["body"] for line in self.log.read_text().splitlines()] if self.log.exists() else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(process: psutil.Process) -> list[str]:
    """Of a process that may end meanwhile; then nothing."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # a zombie too
        return []


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    """Starts stand-in servers that serve the model `m`: `stand_in("--max-num-seqs", "4", latency_s=0.1)`.

    Positional arguments are vLLM's, keywords are the stand-in's own options. All are killed at the end of the test.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: object) -> StandIn:
        port = free_port()
        log = tmp_path / f"requests-{len(started)}.jsonl"
        process = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).with_name("stand_in_server.py")), "--model", "any"),
                *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), *arguments),
            ],
            env={
                **os.environ,
                "VLLM_API_KEY": KEY,
                "STAND_IN_REQUESTS_LOG": str(log),
                **{f"STAND_IN_{name.upper()}": str(value) for name, value in options.items()},
            },
        )
        started.append(process)
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, f"the stand-in exited with code {process.returncode}"
            assert time.monotonic() < deadline, "the stand-in did not listen in time"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.05)
        endpoint = Endpoint(
            server=f"m-{len(started) - 1}",
            url=f"http://127.0.0.1:{port}",
            api_key=KEY,
            max_model_len=2048,
            engine_version="0.32.0",
        )
        return StandIn(endpoint=endpoint, process=process, log=log)

    yield start
    for process in started:
        process.kill()
        process.wait()


@contextmanager
def apart(variables: Mapping[str, str], *, timeout_s: float = 300.0) -> Iterator[Callable[..., Any]]:
    """Runs functions in one other process, where Ray is imported as a launch imports it, with these variables set.

    What Ray reads from the environment it reads when it is imported, and a `ray.init` in the tests' own process would
    leave its threads, handlers and children there.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin_as_a_launch, initargs=(variables,)) as pool:
        yield lambda work, *arguments: pool.submit(work, *arguments).result(timeout=timeout_s)


def _begin_as_a_launch(variables: Mapping[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    os.environ.update(variables)
    prepare_local_ray()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights and a real tokenizer; nothing is trained."""
    from sweep.demo import untrained

    folder = tmp_path_factory.mktemp("models") / "tiny"
    untrained(folder)
    return folder
