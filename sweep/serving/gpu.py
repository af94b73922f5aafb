"""A node's GPUs: whether their memory is free, who holds it, and whose turn it is to start a server on a shared one.

Asks nvidia-smi, so that no GPU library is needed. Where it cannot tell (another vendor's GPU, a MIG slice), LookupError
says why, and whoever asks goes on without knowing.
"""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

QUERY_TIMEOUT_S = 20.0
"""nvidia-smi answers within a second; without its persistence daemon it first wakes every GPU, which takes seconds."""

POLL_S = 1.0

METER_S = 10.0
"""Between two looks at how busy GPUs are."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    index: str
    uuid: str
    usable_mib: int
    """What programs can have: all but what the driver keeps for itself. CUDA calls this the total."""
    free_mib: int

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.uuid})"


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process with memory of a GPU."""

    pid: str
    name: str
    mib: str
    """A number, or why nvidia-smi does not tell it."""

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid}, {self.mib} MiB)"


def gpus(ids: Sequence[str]) -> tuple[Gpu, ...]:
    """The GPUs of these ids, as CUDA_VISIBLE_DEVICES writes them: an index or (the start of) a UUID.

    Raises LookupError when nvidia-smi does not tell of one of them.
    """
    present = {}
    mig = set()
    for index, uuid, mode, used, free in _rows("--query-gpu=index,uuid,mig.mode.current,memory.used,memory.free", 5):
        if used.isdigit() and free.isdigit():
            present[index] = Gpu(index=index, uuid=uuid, usable_mib=int(used) + int(free), free_mib=int(free))
        if mode == "Enabled":
            mig.add(index)
    found = []
    for one in ids:
        if one.startswith("MIG-"):
            raise LookupError(f"{one} is a slice of a GPU, and nvidia-smi lists the memory of whole ones")
        match = [gpu for gpu in present.values() if gpu.index == one or (gpu.uuid.startswith(one) and "-" in one)]
        if len(match) != 1:
            raise LookupError(f"nvidia-smi tells no memory of a GPU {one}")
        if match[0].index in mig:
            raise LookupError(f"GPU {one} is divided into MIG slices, and nvidia-smi lists the memory of whole GPUs")
        found += match
    return tuple(found)


def holders(gpu: Gpu) -> tuple[Holder, ...]:
    """The processes that hold memory of this GPU; those of other containers are not seen."""
    return tuple(
        Holder(pid=pid, name=name, mib=mib)
        for uuid, pid, name, mib in _rows("--query-compute-apps=gpu_uuid,pid,process_name,used_memory", 4)
        if uuid == gpu.uuid
    )


def wait_for_memory(ids: Sequence[str], share: float, *, timeout_s: float, stopping: threading.Event) -> str | None:
    """None as soon as each GPU has this share of its memory free or `stopping` is set, what is short after `timeout_s`.

    A process that was killed gives its GPU memory back some time after it is gone: the next server on this GPU would
    find too little. Raises LookupError when nvidia-smi cannot tell.
    """
    deadline = time.monotonic() + timeout_s
    while short := [gpu for gpu in gpus(ids) if gpu.free_mib < share * gpu.usable_mib]:
        if time.monotonic() > deadline:
            return "; ".join(_shortage(gpu, share) for gpu in short)
        if stopping.wait(POLL_S):
            return None
    return None


def _shortage(gpu: Gpu, share: float) -> str:
    held = ", ".join(map(str, holders(gpu))) or "processes that nvidia-smi does not show here (of another container?)"
    return f"{gpu} has {gpu.free_mib:,} of {share * gpu.usable_mib:,.0f} MiB free; held by {held}"


class Meter:
    """How busy GPUs are, without waiting for nvidia-smi: it is asked aside, and at most every METER_S."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = tuple(ids)
        self._use: float | None = None
        self._asked_s = -METER_S
        self._asking = threading.Event()

    def read(self) -> float | None:
        """What `use` told last; None where it does not, or not yet."""
        if self._ids and not self._asking.is_set() and time.monotonic() >= self._asked_s + METER_S:
            self._asked_s = time.monotonic()
            self._asking.set()
            threading.Thread(target=self._ask, name="gpu-meter", daemon=True).start()
        return self._use

    def _ask(self) -> None:
        try:
            self._use = use(self._ids)
            self._asking.clear()
        except LookupError:
            self._use = None  # and is not asked again


def use(ids: Sequence[str]) -> float:
    """Mean share of the time in which these GPUs computed, 0 to 1. Raises LookupError when nvidia-smi does not tell."""
    found = []
    for index, uuid, percent in _rows("--query-gpu=index,uuid,utilization.gpu", 3):
        if any(index == one or (uuid.startswith(one) and "-" in one) for one in ids):
            found.append(percent)
    if len(found) != len(ids) or not all(map(str.isdigit, found)):
        raise LookupError(f"nvidia-smi tells no use of the GPUs {', '.join(ids)}")
    return sum(map(int, found)) / len(found) / 100


@contextmanager
def turn(ids: Sequence[str], stopping: threading.Event) -> Iterator[None]:
    """One holder at a time on this node for each of these ids; waits until it is our turn or `stopping` is set.

    vLLM measures how much memory a GPU has left while it starts, so servers that start on one GPU at the same time
    mis-measure each other (vLLM issue 55827). A name in Linux's abstract socket namespace leaves no file and ends with
    its holder, however that dies.
    """
    held: list[socket.socket] = []
    try:
        for one in sorted(ids):  # in one order, so that no two wait for each other
            name = socket.socket(socket.AF_UNIX)
            held.append(name)
            while not stopping.is_set():
                try:
                    name.bind(f"\0lmsweep-gpu-{one}")
                    break
                except OSError:
                    stopping.wait(POLL_S / 4)
        yield
    finally:
        for name in held:
            name.close()


def smallest_gb() -> float | None:
    """Memory of this machine's smallest GPU in 10^9 bytes, as its name counts them; None where nobody tells."""
    try:
        sizes = [total for _, total in _rows("--query-gpu=index,memory.total", 2)]
    except LookupError:
        return None
    return min(map(int, sizes)) * 2**20 / 1e9 if sizes and all(map(str.isdigit, sizes)) else None


def _rows(query: str, columns: int) -> list[list[str]]:
    """nvidia-smi's answer. The last column but one may hold anything: it is where a process's name stands."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise LookupError("there is no nvidia-smi here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LookupError(f"nvidia-smi does not answer: {error}") from None
    if done.returncode:
        said = next(iter((done.stdout + done.stderr).strip().splitlines()), "it says nothing")
        raise LookupError(f"nvidia-smi fails with exit code {done.returncode}: {said}")
    rows = []
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        first = line.split(", ", columns - 2)
        rows.append([*first[:-1], *first[-1].rsplit(", ", 1)])
        if len(rows[-1]) != columns:
            raise LookupError(f"nvidia-smi answers {line!r}, which is not understood")
    return rows
