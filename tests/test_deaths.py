"""One test for each way to die: 15 seconds later no process, no port, no shared memory and no temporary file of ours.

Servers are stand-ins with vLLM's tree: a child and a grandchild that notice nobody's death, and leave a file in
/dev/shm and a socket in the temporary folder however they end. One test at the end has a real vLLM.

Everything is known by a mark in its environment. Ray keeps `ray/session_…` (logs) in the temporary folder when its
driver cannot take it away, and torch its compile caches; all else there is ours and has to go.
"""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import command_line
from light import python_path
from test_runner import LAUNCH_S, ROOT, STAND_IN, Bench, Made, made

from sweep.serving.supervisor import Entry, entries, mapped

__all__ = ["made"]  # a fixture

pytestmark = pytest.mark.slow

GONE_S = 15.0
MARK = "DEATHS_TEST"
TREE = {"STAND_IN_TREE": "1", "STAND_IN_LEFTOVERS": "1"}


def until(condition: Callable[[], object], timeout_s: float, what: Callable[[], object]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What there was of some processes before a death."""

    processes: list[psutil.Process]
    ports: set[tuple[str, int]]
    """On which they listened."""
    memory: set[Entry]
    """What they mapped of /dev/shm."""
    sockets: set[Path]
    """Files of unix sockets on which they listened, in the world's view, without those in Ray's own folder."""

    @classmethod
    def of(cls, processes: list[psutil.Process]) -> "Seen":
        connections = [c for p in processes for c in p.net_connections("all")]
        listening = {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}
        return cls(
            processes=processes,
            ports={(address.ip, address.port) for address in listening},
            memory={entry for p in processes for entry in mapped(p.pid, entries())},
            sockets={
                Path(c.laddr)
                for c in connections
                if c.family == socket.AF_UNIX and c.laddr.startswith("/") and "/ray/session_" not in c.laddr
            },
        )

    def left(self) -> list[object]:
        """What is still there, processes by their command lines."""
        alive = []
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(process.cmdline())
        ports = set(filter(listens, self.ports))
        if ports:  # some may be of others by now, who are at work on this machine
            mine = {process.pid for process in self.processes}
            listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid]
            ports -= {tuple(c.laddr) for c in listening if c.pid not in mine}
        return [*alive, *ports, *(self.memory & entries()), *filter(Path.exists, self.sockets)]


def listens(address: tuple[str, int]) -> bool:
    ip, port = address
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as probe:
        return probe.connect_ex((ip, port)) == 0


class Place:
    """A temporary folder and a mark for everything that a test starts there."""

    def __init__(self) -> None:
        # Directly under /tmp: pytest's folders are too long for the sockets of Ray.
        self.temporary = Path(tempfile.mkdtemp(prefix="deaths-", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "STAND_IN_"))},
            **TREE,
            MARK: self.mark,
            "TMPDIR": str(self.temporary),
            "LMSWEEP_ENGINE": shlex.join(STAND_IN),
            "HF_HUB_OFFLINE": "1",
        }
        self._memory = entries()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _left_in_memory(self) -> set[Entry]:
        new = set(entries() - self._memory)
        if new:  # of others that are at work on this machine
            new -= {entry for process in psutil.process_iter() for entry in mapped(process.pid, new)}
        return new

    def left(self) -> list[object]:
        """What is there of us by now."""
        ours = [path.name for path in self.temporary.iterdir() if not path.name.startswith(("ray", "torchinductor_"))]
        return [*filter(None, map(command_line, self.processes())), *self._left_in_memory(), *ours]

    def nothing_is_left(self, seen: Seen, *, after: float) -> None:
        """Nothing of it in GONE_S from `after`, a time of the monotonic clock."""

        def left() -> list[object]:
            return [*seen.left(), *self.left()]

        until(lambda: not left(), after + GONE_S - time.monotonic(), left)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        until(lambda: not self.processes(), GONE_S, self.processes)
        for name, _ in self._left_in_memory():
            if name.startswith("stand-in-"):
                Path("/dev/shm", name).unlink(missing_ok=True)
        shutil.rmtree(self.temporary)


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


def servers(processes: list[psutil.Process], script: str = STAND_IN[1]) -> list[psutil.Process]:
    """The API servers among them."""
    return [process for process in processes if command_line(process)[1:2] == [script]]


def tree_of(server: psutil.Process) -> list[psutil.Process]:
    """An API server with all that it has started, and both stages of its supervisor."""
    second = server.parent()
    assert second is not None
    first = second.parent()
    assert first is not None
    assert all("supervisor.py" in " ".join(stage.cmdline()) for stage in (first, second))
    below = server.children(recursive=True)
    assert len(below) == 2
    return [first, second, server, *below]


def is_complete(server: psutil.Process) -> bool:
    """Whether what it has started holds its memory and its sockets, which come last."""
    with contextlib.suppress(psutil.Error):  # it may have died
        held = [c for process in server.children(recursive=True) for c in process.net_connections("unix")]
        return len([c for c in held if Path(c.laddr).name.startswith("stand-in-")]) == 2
    return False


# Whatever ends the sweep, in the middle of its work


class Sweep:
    """`python launch.py` with one model, whose server has answered and is answering."""

    def __init__(self, place: Place, made: Made, folder: Path, *prefix: str, whole: bool = False) -> None:
        """`prefix` is the start of the command line. Without lm-eval (see light/), which takes most of a launch's time
        on two cores and leaves nothing behind that an evaluator without it would not, but for a `whole` one."""
        self.bench = Bench(folder / "sweep", {}, {})
        path = self.bench.folder / "sweep.yaml"
        tasks: dict[str, object] = {"exports": {"include_path": str(made.tasks)}}
        if not whole:
            (self.bench.folder / "tasks").mkdir()
            (self.bench.folder / "tasks" / "letters-0.yaml").write_text(
                "task: letters-0\noutput_type: generate_until\n"
            )
            tasks = {"letters-0": {"include_path": str(self.bench.folder / "tasks"), "limit": 1000}}
        settings = {
            "name": "sweep",
            "runs_dir": str(self.bench.folder / "runs"),
            "defaults": {"model": {"device": "cpu", "max_model_len": 512, "concurrency": 4}},
            "models": {"alpha": {"path": made.model("alpha")}},
            "tasks": tasks,
            "wandb": {"mode": "disabled"},
            "ray": {"evaluators": 1, "cpu_servers": 1},
        }
        path.write_text(yaml.safe_dump(settings))
        self._place = place
        self._output = self.bench.folder / "output.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "launch.py", f"conf={path}"],
                cwd=ROOT,
                env={
                    **place.environment,
                    "STAND_IN_LATENCY_S": "0.5",
                    **({} if whole else {"PYTHONPATH": python_path()}),
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, as from a shell
            )
        self.works(than=0)

    def works(self, *, than: int) -> None:
        """Wait until some more answers than that are durable."""
        until(
            lambda: self.bench.stored() >= than + 4 or self.process.poll() is not None,
            LAUNCH_S,
            lambda: f"no answers came\n{self.output()}",
        )
        assert self.process.poll() is None, f"it ended too early\n{self.output()}"

    def works_again(self) -> None:
        """Wait until another server has come and answered."""
        until(lambda: servers(self._place.processes()), LAUNCH_S, self.output)
        self.works(than=self.bench.stored())

    def output(self) -> str:
        log = self.bench.directory.driver_log
        return self._output.read_text() + (log.read_text() if log.exists() else "")

    def seen(self) -> Seen:
        """Everything, once it is all there: an answer may be of the server before, and what a server starts comes after
        it."""
        until(lambda: any(map(is_complete, servers(self._place.processes()))), LAUNCH_S, self.output)
        processes = self._place.processes()
        (server,) = servers(processes)
        lines = [" ".join(process.cmdline()) for process in processes]
        assert {process.pid for process in tree_of(server)} <= {process.pid for process in processes}
        assert all(any(sign in line for line in lines) for sign in ("raylet/raylet", "sweep.evaluating.evaluator"))
        seen = Seen.of(processes)
        assert len([name for name, _ in seen.memory if name.startswith("stand-in-")]) == 2
        assert any(ip == "127.0.0.1" and 20000 <= port < 30000 for ip, port in seen.ports)
        assert len([path for path in seen.sockets if path.name.startswith("stand-in-")]) == 2
        assert self._place.left()
        return seen

    def end(self) -> int:
        return self.process.wait(GONE_S)


OpenSweep = Callable[..., Sweep]


@pytest.fixture
def sweep(place: Place, made: Made, tmp_path: Path) -> OpenSweep:
    return lambda *prefix, whole=False: Sweep(place, made, tmp_path, *prefix, whole=whole)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_nothing_is_left_of_a_sweep_whose_driver_gets_a_signal(
    number: signal.Signals, place: Place, sweep: OpenSweep
) -> None:
    started = sweep()
    seen = started.seen()
    at = time.monotonic()
    started.process.send_signal(number)
    started.end()
    place.nothing_is_left(seen, after=at)


@pytest.mark.ray
def test_nothing_is_left_of_a_sweep_that_is_interrupted_from_its_terminal(place: Place, sweep: OpenSweep) -> None:
    started = sweep(whole=True)
    seen = started.seen()
    at = time.monotonic()
    os.killpg(started.process.pid, signal.SIGINT)
    assert started.end() == 130
    place.nothing_is_left(seen, after=at)


@pytest.mark.ray
def test_nothing_is_left_of_a_server_whose_api_server_is_killed_nor_of_the_sweep_that_replaced_it(
    place: Place, sweep: OpenSweep
) -> None:
    started = sweep()
    seen = started.seen()
    (server,) = servers(seen.processes)
    tree = Seen.of(tree_of(server))
    at = time.monotonic()
    server.kill()
    until(lambda: not tree.left(), GONE_S, tree.left)
    assert time.monotonic() - at < GONE_S
    started.works_again()
    seen = started.seen()
    at = time.monotonic()
    started.process.terminate()
    started.end()
    place.nothing_is_left(seen, after=at)


@pytest.mark.ray
def test_nothing_is_left_of_a_sweep_whose_raylet_is_killed(place: Place, sweep: OpenSweep) -> None:
    started = sweep()
    seen = started.seen()
    (raylet,) = [process for process in seen.processes if process.cmdline()[0].endswith("raylet/raylet")]
    at = time.monotonic()
    raylet.kill()
    assert started.end() == 2
    assert "(raylet) has died" in started.output()
    place.nothing_is_left(seen, after=at)


def actor_of(server: psutil.Process) -> psutil.Process:
    """The Ray worker above the server's supervisor."""
    found = tree_of(server)[0].parent()
    assert found is not None
    assert found.cmdline()[0].startswith("ray::_ServerHost")
    return found


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_nothing_is_left_of_a_server_whose_actor_dies_and_the_sweep_goes_on_with_another(
    number: signal.Signals, place: Place, sweep: OpenSweep
) -> None:
    started = sweep()
    (server,) = servers(started.seen().processes)
    tree = Seen.of(tree_of(server))
    at = time.monotonic()
    actor_of(server).send_signal(number)
    until(lambda: not tree.left(), at + GONE_S - time.monotonic(), tree.left)
    started.works_again()
    seen = started.seen()
    at = time.monotonic()
    started.process.terminate()
    started.end()
    place.nothing_is_left(seen, after=at)


@contextlib.contextmanager
def killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()


KILLER = """
import sys
from pathlib import Path
from sweep.running.machine import prepare_local_ray
prepare_local_ray()
import ray
from sweep.evaluating.preflight import Expected
from sweep.planning.config import Device, Model, RayConfig
from sweep.planning.plan import ServerPlan
from sweep.running.cluster import Cluster
model = Model(path=sys.argv[1], device=Device.CPU, max_model_len=512)
plan = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0.0, replicas=1)
cluster = Cluster(RayConfig(address="local", cpu_servers=1, evaluators=1), api_key="a-key-0123456789")
expected = Expected(served_name="m", max_model_len=512, token_ids=())
cluster.start_server(plan, "m-0", Path(sys.argv[2]), {"m": expected})
while not (events := cluster.events(1.0)):
    pass
print(type(events[0]).__name__, flush=True)
sys.stdin.readline()
ray.kill(cluster._servers["m-0"])
sys.stdin.read()
cluster.close()
"""
"""Has a server on a cluster, and kills its actor without a word to it."""


@pytest.mark.ray
def test_nothing_is_left_of_a_server_whose_actor_is_ended_by_ray_kill(place: Place, made: Made, tmp_path: Path) -> None:
    killer = subprocess.Popen(
        [sys.executable, "-c", KILLER, made.model("alpha"), str(tmp_path / "m-0.log")],
        cwd=ROOT,
        env=place.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with killer, killed_at_the_end(killer):
        assert killer.stdin is not None
        assert killer.stdout is not None
        assert killer.stdout.readline() == "ServerReady\n"
        (server,) = servers(place.processes())
        until(lambda: is_complete(server), GONE_S, server.children)
        tree = Seen.of(tree_of(server))
        assert len(tree.memory) == 2
        everything = Seen.of(place.processes())
        at = time.monotonic()
        killer.stdin.write("kill it\n")
        killer.stdin.flush()
        until(lambda: not tree.left(), at + GONE_S - time.monotonic(), tree.left)
        assert killer.poll() is None
        at = time.monotonic()
        killer.stdin.close()
        killer.wait(GONE_S)
    place.nothing_is_left(everything, after=at)


INIT = """
import os, subprocess, sys
subprocess.Popen(sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
"""The first process of a process-id namespace: it takes leave of orphans and stays as long as anyone is there."""


@pytest.mark.ray
def test_nothing_is_left_of_a_sweep_after_ray_stop_force(place: Place, sweep: OpenSweep) -> None:
    # It kills every Ray process that it sees, which must be this test's alone.
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    alone = shutil.which("unshare") and not subprocess.run([*unshare, "true"], capture_output=True).returncode
    started = sweep(*unshare, sys.executable, "-c", INIT) if alone else sweep()
    seen = started.seen()
    if alone:
        (init,) = psutil.Process(started.process.pid).children()
        enter = ["nsenter", "--target", str(init.pid), "--pid", "--mount"]
        stop = subprocess.run([*enter, str(Path(sys.executable).with_name("ray")), "stop", "--force"])
        # The namespace may end with the sweep, and take the command with it that caused it.
        assert stop.returncode in (0, -signal.SIGKILL)
    else:
        for process in seen.processes:
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line[0].startswith("ray::") or "/ray/" in line[0]:
                    process.kill()
    at = time.monotonic()  # the command itself takes a while, from one process to the next
    started.end()
    place.nothing_is_left(seen, after=at)


# A real vLLM


OWNER = """
import json, sys
from pathlib import Path
from sweep.planning.config import Model
from sweep.planning.plan import ServerPlan
from sweep.serving.server import Server
model = Model(path=sys.argv[1], max_model_len=512, dtype="float32", server={"enforce_eager": True})
plan = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0.0, replicas=1)
server = Server(plan, name="m-0", api_key="a-key-0123456789", gpu_ids=[], log_path=Path(sys.argv[2]))
print(json.dumps(server.start().url), flush=True)
print(server.wait(), flush=True)
sys.stdin.read()
"""
"""Has a server, as an actor does, and tells how it died."""


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_nothing_is_left_of_a_real_vllm_whose_api_server_is_killed(
    place: Place, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    environment = {name: value for name, value in place.environment.items() if name != "LMSWEEP_ENGINE"}
    log = tmp_path / "m-0.log"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tiny_model), str(log)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner, killed_at_the_end(owner):
        assert owner.stdout is not None
        assert owner.stdin is not None
        assert owner.stdout.readline(), log.read_text()[-3000:]
        processes = [process for process in place.processes() if process.pid != owner.pid]
        (server,) = [p for p in processes if p.cmdline()[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]]
        assert server.children(), "EngineCore is a process of its own"
        seen = Seen.of(processes)
        assert seen.ports
        assert seen.sockets
        at = time.monotonic()
        server.kill()
        assert owner.stdout.readline().startswith("was killed by SIGKILL")
        assert time.monotonic() - at < 2  # a second, and a busy machine
        until(lambda: not seen.left(), at + GONE_S - time.monotonic(), seen.left)
        owner.stdin.close()
        owner.wait(GONE_S)
        place.nothing_is_left(seen, after=at)
