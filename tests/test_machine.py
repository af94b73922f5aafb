"""What a machine carries, and refusing at once what it does not."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import free_port

from sweep.errors import ConfigError, ResourceError
from sweep.planning.config import RayConfig
from sweep.running import machine
from sweep.running.machine import (
    local_gpus,
    local_node,
    prepare_ray,
    ray_address,
    require_head,
    require_kept,
    starts_local,
)


def gpus_listed(path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """An nvidia-smi that lists so many GPUs, the first with MIG slices."""
    lines = [f"GPU {n}: NVIDIA H100 (UUID: GPU-{n})" for n in range(count)]
    lines[1:1] = ["  MIG 1g.10gb     Device  0: (UUID: MIG-0)"] if count else []
    program = path / "nvidia-smi"
    program.write_text("#!/bin/sh\ncat <<'E'\n" + "\n".join(lines) + "\nE\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, 4),
        ("", 0),
        ("0", 1),
        ("0,2", 2),
        (" 0, 2 ", 2),
        ("-1", 0),
        ("0,-1,1", 1),
        ("NoDevFiles", 0),
        ("GPU-1,GPU-2", 2),
        ("MIG-0", 1),
        ("0,1,2,3,4,5,6,7", 4),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: int
) -> None:
    gpus_listed(tmp_path, monkeypatch, 4)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_gpus() == seen


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local_gpus() == 0


def test_a_driver_that_hangs_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert local_gpus() == 0


@pytest.mark.parametrize(
    ("address", "variable", "local"),
    [
        (None, None, True),
        (None, "10.0.0.1:6379", False),
        ("local", "10.0.0.1:6379", True),
        ("auto", None, False),
        ("10.0.0.1:6379", None, False),
    ],
)
def test_a_local_cluster_is_started_unless_another_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, local: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert starts_local(RayConfig(address=address)) is local


@pytest.mark.parametrize(
    ("address", "variable", "expected"),
    [
        (None, None, "local"),
        (None, " ", "local"),
        (None, "local", "local"),
        (None, "head:6379", "head:6379"),
        ("auto", None, "auto"),
        ("auto", "head:6379", "head:6379"),  # as Ray itself reads it
        ("local", "head:6379", "local"),
        ("other:6379", "head:6379", "other:6379"),
        ("10.0.0.1:1", None, "10.0.0.1:1"),
        ("[fe80::1]:6379", None, "[fe80::1]:6379"),
    ],
)
def test_the_config_comes_before_ray_address_which_says_what_auto_is(
    monkeypatch: pytest.MonkeyPatch, address: str | None, variable: str | None, expected: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_address(RayConfig(address=address)) == expected


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://head:10001", "ray://head:10001 is an address of Ray Client, and a sweep would die with the connection"),
        ("http://head:8265", "http://head:8265 is where jobs are submitted"),
        ("head", "wants auto, local or host:port, got 'head'; did you mean 'head:6379'?"),
        ("head:", "wants auto, local or host:port, got 'head:'"),
        ("head:ray", "wants auto, local or host:port, got 'head:ray'"),
        ("head:0", "wants auto, local or host:port, got 'head:0'"),
        ("head:65536", "wants auto, local or host:port, got 'head:65536'"),
        ("fe80::1:6379", "wants auto, local or host:port, got 'fe80::1:6379'"),
        ("me@head:6379", "wants auto, local or host:port, got 'me@head:6379'"),
    ],
)
def test_an_address_that_no_sweep_can_join_is_refused_with_the_way_there(
    monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as caught:
        ray_address(RayConfig(address=address))
    assert str(caught.value).startswith(f"ray.address: {words}")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught:
        ray_address(RayConfig())
    assert str(caught.value).startswith(f"RAY_ADDRESS: {words}")


@contextlib.contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Something that listens, and says this when it is spoken to; None: nothing, and it keeps the line."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    connection.recv(100)  # until the other side gives up
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            "is no head of Ray: its port is the one that `ray start --head` was given",
        ),
        (b"", "is no head of Ray"),
        (None, "does not answer within 0.2 s"),
    ],
)
def test_what_listens_and_is_no_head_is_told_from_one(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    monkeypatch.setattr(machine, "REACH_S", 0.2)
    with listener(answer) as address:
        with pytest.raises(ResourceError) as caught:
            require_head(address)
        assert address in str(caught.value)
    assert words in str(caught.value)


def test_an_address_where_nothing_listens_costs_no_minutes_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    address = f"127.0.0.1:{free_port()}"
    begun = time.monotonic()
    with pytest.raises(ResourceError, match=f"nothing listens at {address}; start Ray there"):
        prepare_ray(RayConfig(address=address), {})
    with pytest.raises(ResourceError, match=r"Ray at no-such-host\.invalid:6379 cannot be reached: "):
        require_head("no-such-host.invalid:6379")
    assert time.monotonic() - begun < 10


def test_something_that_speaks_as_grpc_does_may_be_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "before")
    monkeypatch.delenv("RAY_gcs_server_port_wait_time_s")
    monkeypatch.setenv("RAY_py_gcs_connect_timeout_s", "60")
    with listener(b"\0\0\0\x04\0\0\0\0\0") as address:
        prepare_ray(RayConfig(address=address), {})
    told = {name: os.environ[name] for name in ("RAY_gcs_server_port_wait_time_s", "RAY_py_gcs_connect_timeout_s")}
    assert list(told.values()) == ["2", "60"]  # the second is the user's own


def test_a_run_directory_in_the_copy_that_ray_makes_for_a_job_is_refused() -> None:
    require_kept(Path("/shared/runtime_resources/runs/s"))
    package = "/tmp/ray/session_2026-01-01_00-00-00_000000_1/runtime_resources/working_dir_files/_ray_pkg_0123"
    with pytest.raises(ConfigError, match=r"runs_dir: /tmp/ray/.*would be lost with it; give an absolute folder"):
        require_kept(Path(package, "runs", "s"))


@pytest.mark.parametrize(
    ("cores", "memory_gb", "gpus", "config", "expected"),
    [
        (2, 24, 0, RayConfig(), (2, 2)),
        (2, 8, 0, RayConfig(), (1, 2)),
        (64, 500, 0, RayConfig(), (4, 8)),
        (64, 500, 8, RayConfig(), (4, 16)),
        (1, 2, 0, RayConfig(), (1, 1)),
        (2, 24, 0, RayConfig(cpu_servers=3, evaluators=5), (3, 5)),
    ],
)
def test_cpu_servers_and_evaluators_follow_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    memory_gb: float,
    gpus: int,
    config: RayConfig,
    expected: tuple[int, int],
) -> None:
    monkeypatch.setattr(machine, "local_gpus", lambda: gpus)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory_gb * 2**30))
    node = local_node(config)
    assert (node.cpu_servers, node.evaluators) == expected
    assert node.gpus == gpus


def test_a_local_cluster_gets_a_token_of_its_own_and_leaves_choices_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_worker_niceness")
    for name in names:
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    machine.prepare_local_ray()
    first = machine.os.environ["RAY_AUTH_TOKEN"]
    machine.prepare_local_ray()
    assert len(first) == 64
    assert machine.os.environ["RAY_AUTH_TOKEN"] != first
    assert machine.os.environ["RAY_USAGE_STATS_ENABLED"] == "1"
