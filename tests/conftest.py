"""What tests of several modules share: a stand-in server without a supervisor, and a tiny model with random weights."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweep.serving.server import Endpoint

KEY = "key-of-the-stand-in-0123456789"


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A running stand-in server."""

    endpoint: Endpoint
    process: subprocess.Popen[bytes]
    log: Path

    def bodies(self) -> list[dict[str, Any]]:
        """The body of every completion request so far."""
        return [json.loads(line)["body"] for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[..., StandIn]]:
    """Starts stand-in servers that serve the model `m`: `stand_in("--max-num-seqs", "4", latency_s=0.1)`.

    Positional arguments are vLLM's, keywords are the stand-in's own options. All are killed at the end of the test.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: object) -> StandIn:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights and a real tokenizer; nothing is trained."""
    from sweep.demo import untrained

    folder = tmp_path_factory.mktemp("models") / "tiny"
    untrained(folder)
    return folder
