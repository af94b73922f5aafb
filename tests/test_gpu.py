"""Free memory, holders and turns, with an nvidia-smi of our own."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from sweep.serving import gpu
from sweep.serving.gpu import Gpu, Holder, gpus, holders, turn, wait_for_memory

MEMORY = "0, GPU-8d2f-00, Disabled, 4, 81004\n1, GPU-8d2f-01, Disabled, 70004, 11004\n2, GPU-9999-02, Enabled, 4, 100\n"
APPS = "GPU-8d2f-01, 4711, VLLM::EngineCore, 69000\nGPU-8d2f-01, 12, /opt/a, b/python, 1000\nGPU-9999-02, 1, x, 5\n"
USE = "0, GPU-8d2f-00, 90\n1, GPU-8d2f-01, 40\n2, GPU-9999-02, [N/A]\n"


class Smi:
    """An nvidia-smi that answers what its files hold."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.answer(memory=MEMORY, apps=APPS, use=USE)
        program = folder / "nvidia-smi"
        program.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --query-gpu=index,uuid,mig.mode.current,memory.used,memory.free) cat {folder}/memory;;\n'
            f"--query-compute-apps=gpu_uuid,pid,process_name,used_memory) cat {folder}/apps;;\n"
            f"--query-gpu=index,uuid,utilization.gpu) cat {folder}/use;;\n"
            '*) echo "what is $1?"; exit 2;; esac\n'
            f"exit $(cat {folder}/code)\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def answer(self, *, memory: str = "", apps: str = "", use: str = "", code: int = 0) -> None:
        for name, text in (("memory", memory), ("apps", apps), ("use", use), ("code", str(code))):
            new = self.folder / f"{name}.new"
            new.write_text(text)
            new.rename(self.folder / name)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    return Smi(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "POLL_S", 0.05)


@pytest.mark.parametrize(
    ("ids", "indices"),
    [
        ([], []),
        (["0"], ["0"]),
        (["1", "0"], ["1", "0"]),
        (["GPU-8d2f-01"], ["1"]),
        (["GPU-9"], "GPU GPU-9 is divided"),
        (["GPU-8d2f"], "no memory of a GPU GPU-8d2f"),  # of two
        (["3"], "no memory of a GPU 3"),
        (["8"], "no memory of a GPU 8"),
        (["2"], "divided into MIG slices"),
        (["MIG-4f1c"], "MIG-4f1c is a slice of a GPU"),
    ],
    ids=str,
)
def test_gpus_are_found_by_index_and_by_uuid(smi: Smi, ids: list[str], indices: list[str] | str) -> None:
    if isinstance(indices, str):
        with pytest.raises(LookupError, match=indices):
            gpus(ids)
    else:
        assert [found.index for found in gpus(ids)] == indices


def test_what_the_driver_keeps_for_itself_is_nobodys(smi: Smi) -> None:
    assert gpus(["0"]) == (Gpu(index="0", uuid="GPU-8d2f-00", usable_mib=81008, free_mib=81004),)


def test_holders_are_told_whatever_their_names_hold(smi: Smi) -> None:
    [second] = gpus(["1"])
    assert holders(second) == (
        Holder(pid="4711", name="VLLM::EngineCore", mib="69000"),
        Holder(pid="12", name="/opt/a, b/python", mib="1000"),
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"memory": "NVIDIA-SMI has failed because it couldn't communicate\n", "code": 9}, "exit code 9: NVIDIA-SMI"),
        ({"code": 9}, "exit code 9: it says nothing"),
        ({"memory": "0, GPU-1, [N/A], [N/A], [N/A]\n"}, "tells no memory of a GPU 0"),
        ({"memory": "No devices were found\n"}, "'No devices were found', which is not understood"),
        ({"memory": ""}, "tells no memory of a GPU 0"),
    ],
)
def test_where_nvidia_smi_cannot_tell_it_is_said_why(smi: Smi, answer: dict[str, object], message: str) -> None:
    smi.answer(**answer)  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=message.replace("[", r"\[")):
        wait_for_memory(["0"], 0.9, timeout_s=1, stopping=threading.Event())


def test_a_node_without_nvidia_smi_cannot_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LookupError, match="there is no nvidia-smi here"):
        gpus(["0"])


def test_free_memory_is_not_waited_for(smi: Smi) -> None:
    assert wait_for_memory(["0"], 0.92, timeout_s=0, stopping=threading.Event()) is None
    # All that there is, less than which no GPU is ever free.
    assert wait_for_memory(["0"], 0.9999, timeout_s=0, stopping=threading.Event()) is None


def test_memory_that_stays_taken_is_told_with_those_who_hold_it(smi: Smi) -> None:
    assert wait_for_memory(["0", "1"], 0.92, timeout_s=0.1, stopping=threading.Event()) == (
        "GPU 1 (GPU-8d2f-01) has 11,004 of 74,527 MiB free; held by VLLM::EngineCore (pid 4711, 69000 MiB), "
        "/opt/a, b/python (pid 12, 1000 MiB)"
    )


def test_holders_of_another_container_are_guessed_at(smi: Smi) -> None:
    smi.answer(memory=MEMORY)
    assert "held by processes that nvidia-smi does not show here" in str(
        wait_for_memory(["1"], 0.92, timeout_s=0, stopping=threading.Event())
    )


def test_memory_that_gets_free_ends_the_wait(smi: Smi) -> None:
    found: list[str | None] = []
    waiter = threading.Thread(
        target=lambda: found.append(wait_for_memory(["1"], 0.92, timeout_s=30, stopping=threading.Event()))
    )
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive()
    smi.answer(memory=MEMORY.replace("70004, 11004", "4, 81004"))
    waiter.join(10)
    assert found == [None]


def test_a_stop_ends_the_wait_for_memory(smi: Smi) -> None:
    stopping = threading.Event()
    stopping.set()
    assert wait_for_memory(["1"], 0.92, timeout_s=30, stopping=stopping) is None


OURS = f"test-{os.getpid()}"
"""A turn is the whole node's, and other tests run on it too."""


def test_one_at_a_time_starts_on_a_gpu_and_others_on_other_gpus() -> None:
    order: list[str] = []
    never = threading.Event()

    def second() -> None:
        with turn([OURS], never):
            order.append("second")

    with turn([OURS], never):
        waiter = threading.Thread(target=second)
        waiter.start()
        with turn([f"{OURS}-other"], never):
            order.append("another GPU")
        waiter.join(0.3)
        assert waiter.is_alive()
        order.append("first")
    waiter.join(10)
    assert order == ["another GPU", "first", "second"]


def test_a_stop_ends_the_wait_for_a_turn_and_takes_it_from_nobody() -> None:
    stopping, never = threading.Event(), threading.Event()
    ended = threading.Event()

    def second() -> None:
        with turn([OURS], stopping):
            ended.set()

    with turn([OURS], never):
        waiter = threading.Thread(target=second)
        waiter.start()
        stopping.set()
        waiter.join(10)
        assert ended.is_set()
        with socket.socket(socket.AF_UNIX) as third, pytest.raises(OSError, match="in use"):
            third.bind(f"\0lmsweep-gpu-{OURS}")


def read_until_it_tells(meter: gpu.Meter, not_this: float | None = None) -> float | None:
    deadline = time.monotonic() + 10
    while (told := meter.read()) == not_this and time.monotonic() < deadline:
        time.sleep(0.01)
    return told


def test_how_busy_gpus_are_is_read_without_waiting(smi: Smi, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = gpu.Meter(["GPU-8d2f-00", "1"])
    assert meter.read() is None
    assert read_until_it_tells(meter) == 0.65
    smi.answer(use=USE.replace("40", "60"))
    assert meter.read() == 0.65  # it is not asked every time
    monkeypatch.setattr(gpu, "METER_S", 0.0)
    assert read_until_it_tells(meter, not_this=0.65) == 0.75


@pytest.mark.parametrize(("ids", "message"), [(["2"], "no use of the GPUs 2"), (["0", "7"], "no use of the GPUs 0, 7")])
def test_a_use_that_is_not_told_is_not_made_up(smi: Smi, ids: list[str], message: str) -> None:
    with pytest.raises(LookupError, match=message):
        gpu.use(ids)


def test_without_gpus_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = gpu.Meter([])
    assert meter.read() is None
    assert not meter._asking.is_set()
