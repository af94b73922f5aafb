"""What a machine carries, and refusing at once what it does not."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sweep.planning.config import RayConfig
from sweep.running import machine
from sweep.running.machine import local_gpus, local_node, starts_local


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
