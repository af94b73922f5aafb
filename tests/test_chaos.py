"""What breaks on a cluster of several nodes while a sweep runs on it: real Ray on this machine, stand-in servers.

Nodes are raylets of one machine (`ray.cluster_utils`), with GPUs that Ray takes our word for. Stand-ins answer by the
request alone, so a sweep that was disturbed can be compared with one that was not to the last digit. Evaluators are the
real processes but for lm-eval (see light/): what is killed here by the dozen has to come up in a second. Whole lm-eval
processes are killed in test_runner.py and in the last test here.
"""

import contextlib
import os
import random
import re
import shlex
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from conftest import apart, command_line
from light import python_path
from light.evaluation import MARK, key_of
from test_runner import GONE_S, STAND_IN, Bench, Launch, Made, made, until

from sweep.record import Record, Status
from sweep.running.machine import EVALUATOR
from sweep.serving.server import SUPERVISOR

__all__ = ["made"]  # a fixture

SERVER_BOUND_S = 5.0
"""From a server's death to the first request at the next one, of which its start may take START_S."""

START_S = 2.0
"""Of an actor and a stand-in where nothing else runs. What a busy machine takes beyond it is no fault of ours."""

NODE_BOUND_S = 20.0
"""The same for a node's."""

KILLS = {"evaluator": 28, "server": 12, "server actor": 15, "node": 3, "driver": 2}
"""Of each kind. Four servers of each of three models: five deaths in a row are a crash loop, which takes a model out;
that is meant, and no matter here. Of a driver or a node a dozen processes start: they die less often. Of those that die
together evaluators come first, as they are only killed when they have got on, and what starts others last, since after
it there is nothing else to be killed for a while."""
AT_ONCE = 6
"""What breaks together comes up together."""
SEED = 20_261_126
PATIENCE_S = 6.0
"""For a sweep that comes up again, which takes some seconds; after that it is a victim too."""

CHEAP = {"RAY_num_workers_soft_limit": "8", "RAY_prestart_worker_first_driver": "false"}
"""Ray's variables for a cluster whose nodes have few CPUs and lose processes by the dozen: what looks at a node stays
there, as on one with many CPUs, and no worker is started to no end."""


# In the process that has the cluster.

_cluster: Any = None
_nodes: list[Any] = []


def begin(nodes: int, evaluators: int) -> dict[str, str]:
    """The environment in which drivers find the cluster; each node has room for so many evaluators."""
    global _cluster
    from ray.cluster_utils import Cluster

    _cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(nodes):
        add_node(evaluators)
    ours = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    return {**ours, "RAY_ADDRESS": _cluster.address}


def add_node(evaluators: int) -> None:
    _nodes.append(_cluster.add_node(num_cpus=2, num_gpus=2, resources={EVALUATOR: evaluators}))


def raylets() -> list[int]:
    """The process of each node, in the order of their joining."""
    return [node.all_processes["raylet"][0].process.pid for node in _nodes]


def kill_node(raylet: int) -> None:
    index = raylets().index(raylet)
    _cluster.remove_node(_nodes.pop(index), allow_graceful=False)


def end() -> None:
    _cluster.shutdown()


# In the test.


@dataclass
class Field:
    """A sweep's file on a cluster, and what there is of it all."""

    bench: Bench
    elsewhere: Callable[..., Any]
    mark: str
    evaluators: int
    known: dict[psutil.Process, bool] = field(default_factory=dict)
    """Whether a process is of this field."""
    joining: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    """Nodes take seconds to join, and nobody has to wait for it."""

    def processes(self, kind: str = "") -> list[psutil.Process]:
        """All of a kind, oldest first; drivers are none of them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if not self._is_ours(process) or kind not in ("", kind_of(process.cmdline())):
                    continue
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def _is_ours(self, process: psutil.Process) -> bool:
        """Read once: looking for victims twenty times a second would take a core from what is looked at."""
        if process not in self.known:
            self.known[process] = process.environ().get("CHAOS_TEST") == self.mark
        return self.known[process]

    def asked(self) -> list[tuple[int, str, tuple[int, ...]]]:
        """Server process, model and prompt of every request of a cell that has reached a server, in order."""
        text = self.bench.requests.read_text() if self.bench.requests.exists() else ""
        requests = [msgspec.json.decode(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [
            (request["pid"], request["model"], tuple(request["body"]["prompt"]))
            for request in requests
            if request["body"]["prompt"][0] == MARK and len(request["body"]["prompt"]) == 3
        ]

    def asked_keys(self) -> list[bytes]:
        """Of each request in `asked`."""
        fingerprints = {}
        for path in self.bench.directory.servers.glob("*.json"):
            if "concurrency" not in path.name:
                (fingerprints[path.stem],) = msgspec.json.decode(path.read_bytes())["of"]
        return [key_of(fingerprints[model], prompt) for _, model, prompt in self.asked()]

    def cell_of(self, evaluator: psutil.Process) -> str | None:
        """What it was given last by the driver that lives; None while that is nothing."""
        if not (line := command_line(evaluator)):
            return None
        log = self.bench.directory.driver_log.read_text()
        runs = re.findall(r"run (\S+) on (\S+), attempt", log.rpartition(" responses stored")[2])
        return {by: cell for cell, by in runs}.get(line[-1])

    def kill_node(self, raylet: int) -> "Future[None]":
        self.elsewhere(kill_node, raylet)
        return self.joining.submit(self.elsewhere, add_node, self.evaluators)

    def of_the_sweep(self) -> list[list[str]]:
        """What is there beside Ray's own."""
        return [line for process in self.processes() if kind_of(line := command_line(process))]


SIGNS = {
    str(SUPERVISOR): "supervisor",  # first, since the command of what it supervises follows
    STAND_IN[1]: "server",
    "vllm.entrypoints.openai.api_server": "server",
    "ray::_ServerHost": "server actor",
    "sweep.evaluating.evaluator": "evaluator",
    "ray::_EvaluatorHost": "evaluator actor",
}


def kind_of(line: list[str]) -> str:
    """By its first words: those of Ray's own have dozens."""
    first = line[:6]
    return next((kind for sign, kind in SIGNS.items() if any(word.startswith(sign) for word in first)), "")


OpenField = Callable[..., Field]


@pytest.fixture
def fields(tmp_path: Path) -> Iterator[OpenField]:
    """Opens a field with so many nodes: models and cells by number, requests of each cell, how long each new
    token takes, and whether Ray starts few workers (CHEAP)."""
    # Directly under /tmp: pytest's folders are too long for the sockets of Ray.
    temporary = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)

        def open_field(
            nodes: int,
            *,
            models: int,
            cells: int,
            requests: int,
            pace_s: float,
            evaluators: int = 2,
            cheap: bool = False,
        ) -> Field:
            settings = a_sweep(tmp_path, models=models, cells=cells, requests=requests)
            bench = Bench(tmp_path / "chaos", settings, {"PYTHONPATH": python_path()})
            mark = uuid.uuid4().hex
            variables = {
                **stand_ins(pace_s, bench),
                "RAY_TMPDIR": str(temporary),
                "CHAOS_TEST": mark,
                # Half of Ray's own patience. With less, nodes of a busy machine are taken for dead.
                "RAY_health_check_period_ms": "2000",
                "RAY_health_check_timeout_ms": "5000",
                "RAY_health_check_failure_threshold": "4",
                **(CHEAP if cheap else {}),
            }
            elsewhere = stack.enter_context(apart(variables))
            stack.callback(elsewhere, end)
            bench.environment |= elsewhere(begin, nodes, evaluators)
            field = Field(bench, elsewhere, mark, evaluators)
            stack.callback(field.joining.shutdown)
            return field

        yield open_field


def a_sweep(folder: Path, *, models: int, cells: int, requests: int) -> dict[str, Any]:
    tasks = folder / "tasks"
    tasks.mkdir()
    for number in range(cells):
        name = f"letters-{number}"
        (tasks / f"{name}.yaml").write_text(f"task: {name}\noutput_type: generate_until\n")
    for number in range(models):
        checkpoint = folder / f"m{number}"
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text(f'{{"name": "{number}"}}')
    return {
        "defaults": {
            "model": {"device": "auto", "max_model_len": 512, "concurrency": 8, "scoring": "echo", "replicas": 1}
        },
        "models": {f"m{number}": {"path": str(folder / f"m{number}")} for number in range(models)},
        "tasks": {f"letters-{number}": {"include_path": str(tasks), "limit": requests} for number in range(cells)},
        "wandb": {"mode": "disabled"},
    }


def stand_ins(pace_s: float, bench: Bench) -> dict[str, str]:
    return {
        "LMSWEEP_ENGINE": shlex.join(STAND_IN),
        "STAND_IN_PACE_S": str(pace_s),  # by a name that does not look like a secret's, which servers do not get
        "STAND_IN_HURRY_MARK": str(hurry_mark(bench)),
        "STAND_IN_REQUESTS_LOG": str(bench.requests),
        "PYTHONPATH": python_path(),
    }


def hurry_mark(bench: Bench) -> Path:
    """A file; when it is there, the rest of a sweep is answered at once."""
    return bench.folder / "hurry"


def recorded(log: str) -> Counter[str]:
    """How often each cell was."""
    return Counter(re.findall(r"runner: (\S+) done: \d+ requests", log))


def ends_well(field: Field, launch: Launch, *, cells: int) -> None:
    """Every cell is done and was recorded once, and nothing is left but the cluster."""
    ended = launch.end()
    assert ended.code == 0, ended.output
    records = field.bench.records()
    assert {record.status for record in records.values()} == {Status.DONE}
    assert len(records) == cells
    assert set(recorded(field.bench.directory.driver_log.read_text()).values()) == {1}
    until(lambda: not field.of_the_sweep(), GONE_S, lambda: f"still there: {field.of_the_sweep()}")
    assert not listening(field), "a port of a server is still open"


def listening(field: Field) -> list[int]:
    """Ports that servers had and that something of the sweep listens on; others may have them by now."""
    log = field.bench.directory.driver_log.read_text()
    ours = {int(port) for port in re.findall(r"is ready at http://\S+:(\d+)", log)}
    mine = {process.pid for process in field.processes()}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in mine]
    return sorted(ours & {c.laddr.port for c in listening})


# A server, then a node


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_server_and_a_killed_node_are_replaced_within_their_bounds_and_nothing_is_lost(
    fields: OpenField,
) -> None:
    # Too slow to be done before both deaths are seen to, whatever the machine.
    field = fields(3, models=6, cells=20, requests=30, pace_s=0.02)
    launch = field.bench.start()

    def asked_by(model: str, but: set[int]) -> bool:
        return any(name == model and pid not in but for pid, name, _ in field.asked())

    models = [f"m{number}" for number in range(6)]
    launch.until(lambda: {model for _, model, _ in field.asked()} == set(models), "all models were asked")

    durable = answers(field.bench)
    before = {process.pid for process in field.processes("server")}
    (victim,) = [process for process in field.processes("server") if "m0" in command_line(process)]
    server_s = asked_again(field, launch, victim.kill, lambda: asked_by("m0", before))
    one_s = slowest_start_s(field, ["m0"])

    hosts = {
        process.cmdline()[process.cmdline().index("--served-model-name") + 1]: raylet_above(process)
        for process in field.processes("server")
    }
    raylet, _ = Counter(hosts.values()).most_common(1)[0]
    moved = [model for model, host in hosts.items() if host == raylet]
    durable |= answers(field.bench)
    before = {process.pid for process in field.processes("server")}
    node_s = asked_again(
        field, launch, lambda: field.kill_node(raylet), lambda: all(asked_by(model, before) for model in moved)
    )
    all_s = slowest_start_s(field, moved)
    hurry_mark(field.bench).touch()
    ends_well(field, launch, cells=120)
    assert durable.items() <= answers(field.bench).items(), "a stored answer is gone"
    print(
        f"asked again {server_s:.1f} s after a server's death, {one_s:.1f} s of it the next one's start, and "
        f"{node_s:.1f} s after the death of a node with {len(moved)} servers, {all_s:.1f} s of it their starts"
    )
    assert server_s < SERVER_BOUND_S + max(0.0, one_s - START_S)
    assert node_s < NODE_BOUND_S + max(0.0, all_s - START_S)


def asked_again(field: Field, launch: Launch, kill: Callable[[], object], condition: Callable[[], bool]) -> float:
    begun = time.monotonic()
    kill()
    launch.until(condition, "what was lost was asked again")
    return time.monotonic() - begun


def slowest_start_s(field: Field, models: list[str]) -> float:
    """Of each model's last server, from the order until it was ready."""
    log, found = field.bench.directory.driver_log.read_text(), []
    for model in models:
        ordered = re.findall(rf"^(\S+ \S+) .*start server {model}-\d+ on", log, re.MULTILINE)[-1]
        ready = re.findall(rf"^(\S+ \S+) .*server {model}-\d+ is ready at", log, re.MULTILINE)[-1]
        found.append((datetime.fromisoformat(ready) - datetime.fromisoformat(ordered)).total_seconds())
    return max(found)


def raylet_above(process: psutil.Process) -> int:
    """The raylet that a server's actor belongs to."""
    return next(parent.pid for parent in process.parents() if parent.cmdline()[0].endswith("raylet/raylet"))


# Random kills


@dataclass(kw_only=True)
class Chaos:
    """Random kills over one sweep."""

    field: Field
    launch: Launch
    random: random.Random
    durable: dict[bytes, bytes] = field(default_factory=dict)
    """Every answer that was ever seen to be stored."""
    in_flight: int = 0
    """Requests that were sent and not stored at the next kill; each can be lost once."""
    looked_at: int = 0
    """Requests that were sent before the last kill."""
    servers_killed: Counter[str] = field(default_factory=Counter)
    answers_at_first: dict[tuple[int, str], int] = field(default_factory=dict)
    """Evaluator and cell -> how many the cell had when it was first seen there."""

    def work_on(self, *, answers_more: int) -> None:
        """Wait until so many more answers are stored."""
        deadline = time.monotonic() + PATIENCE_S
        while len(answers(self.field.bench)) < len(self.durable) + answers_more and time.monotonic() < deadline:
            time.sleep(0.05)

    def kill(self, kind: str) -> None:
        """One of that kind, as soon as there is one."""
        victims: list[Any] = []

        def there() -> bool:
            victims[:] = self.field.elsewhere(raylets) if kind == "node" else self.field.processes(kind)
            if kind == "evaluator":
                victims[:] = filter(self._got_on, victims)
            return bool(victims)

        if kind != "driver":
            self.launch.until(there, f"there was a {kind}")
        assert self.launch.process.poll() is None, f"the sweep ended before its time\n{self.launch.output()}"
        stored = answers(self.field.bench)
        with contextlib.suppress(psutil.NoSuchProcess):  # of its own death, or another's
            self._kill(kind, victims)
        assert self.durable.items() <= stored.items(), "a stored answer is gone"
        self.durable = stored
        sent = self.field.asked_keys()
        self.in_flight += sum(key not in stored for key in sent[self.looked_at :])
        self.looked_at = len(sent)

    def _kill(self, kind: str, victims: list[Any]) -> None:
        match kind:
            case "driver":
                self.launch.process.kill()
                self.launch.end()
                self.launch = self.field.bench.start()
            case "node":
                self.field.kill_node(self.random.choice(victims))
            case "server":
                process = min(victims, key=lambda each: (self.servers_killed[model_of(each)], self.random.random()))
                self.servers_killed[model_of(process)] += 1
                process.kill()
            case _:
                self.random.choice(victims).kill()

    def _got_on(self, evaluator: psutil.Process) -> bool:
        """Whether its cell has got answers since it is there: three deaths without would be laid at the cell's door,
        which is meant, and no matter here."""
        if (cell := self.field.cell_of(evaluator)) is None:
            return False
        now = answers_of(self.field.bench, cell)
        return now > self.answers_at_first.setdefault((evaluator.pid, cell), now)


def model_of(server: psutil.Process) -> str:
    """Nothing of one that has ended by itself."""
    line = command_line(server)
    return line[line.index("--served-model-name") + 1] if line else ""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_sixty_random_kills_change_no_record_and_lose_no_answer(fields: OpenField, tmp_path: Path) -> None:
    begun = time.monotonic()
    field = fields(3, models=3, cells=8, requests=100, pace_s=0.01, evaluators=1, cheap=True)
    chaos = Chaos(field=field, launch=field.bench.start(), random=random.Random(SEED))
    kinds = [kind for kind, count in KILLS.items() for _ in range(count)]
    chaos.random.shuffle(kinds)
    field_s = time.monotonic() - begun
    for first in range(0, len(kinds), AT_ONCE):
        chaos.work_on(answers_more=chaos.random.randint(1, 15))
        for kind in sorted(kinds[first : first + AT_ONCE], key=list(KILLS).index):
            chaos.kill(kind)
    kills_s = time.monotonic() - begun - field_s
    hurry_mark(field.bench).touch()
    ends_well(field, chaos.launch, cells=24)

    asked = [(model, prompt) for _, model, prompt in field.asked()]
    again = len(asked) - len(set(asked))

    # On the same cluster, whose stand-ins are in a hurry by now.
    calm = Bench(tmp_path / "calm", field.bench.settings, field.bench.environment)
    ended = calm.run()
    assert ended.code == 0, ended.output

    final = answers(field.bench)
    print(
        f"{len(kinds)} kills in {kills_s:.0f} s; {len(asked)} requests for {len(set(asked))} answers, "
        f"{again} asked again where {chaos.in_flight} were in flight; {time.monotonic() - begun:.0f} s in all"
    )
    assert outcomes(field.bench) == outcomes(calm)
    assert chaos.durable.items() <= final.items()
    assert final == answers(calm)
    assert again <= chaos.in_flight
    assert chaos.in_flight > len(kinds), "most kills hit nothing"


def answers(bench: Bench) -> dict[bytes, bytes]:
    """What is durable, by key."""
    if not bench.directory.responses.exists():
        return {}
    path = f"file:{bench.directory.responses}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as database, contextlib.suppress(sqlite3.OperationalError):
        return dict(database.execute("SELECT key, answer FROM responses"))
    return {}  # the table is being made


def answers_of(bench: Bench, cell: str) -> int:
    path = f"file:{bench.directory.responses}?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as database:
        (number,) = database.execute("SELECT count(*) FROM responses WHERE cell = ?", [cell]).fetchone()
    return int(number)


def outcomes(bench: Bench) -> dict[str, tuple[Record, dict[str, bytes]]]:
    """Each cell's record but for its timings and for where its answers came from, and the files beside it."""
    found = {}
    for cell, record in bench.records().items():
        counts = replace(record.counts, asked=0, reused=record.counts.asked + record.counts.reused)
        bare = replace(record, started_at="", wall_s=0.0, request_s=0.0, counts=counts)
        found[cell] = bare, {name: (bench.directory.root / name).read_bytes() for name in record.files}
    return found


# A real vLLM


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(900)
def test_four_kills_on_real_vllm_lose_no_answer_and_change_no_metric(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    answers_long = {"num_fewshot": 0, "gen_kwargs": {"max_gen_toks": 120}}
    settings = {
        "defaults": {"model": {"device": "cpu", "dtype": "float32", "max_model_len": 512, "concurrency": 2}},
        "models": {"alpha": {"path": made.model("alpha"), "server": {"enforce_eager": True}}},
        "tasks": {name: {"include_path": str(made.tasks)} for name in ("exports", "pairs")},
        "wandb": {"mode": "disabled"},
        "ray": {"evaluators": 1, "cpu_servers": 1},
    }
    settings["tasks"]["exports"] |= answers_long
    bench = Bench(tmp_path / "killed", settings, {"LMSWEEP_ENGINE": ""})
    launch, durable = bench.start(), dict[bytes, bytes]()
    for kind in ("server", "evaluator", "server actor", "driver"):
        wanted = len(durable) + 8
        launch.until(lambda most=wanted: len(answers(bench)) >= most, f"there were new answers before the {kind} died")
        stored = answers(bench)
        if kind == "driver":
            launch.process.kill()
            launch.end()
            bench.nothing_is_left()
            launch = bench.start()
        else:
            victims = [process for process in bench.processes() if kind_of(command_line(process)) == kind]
            assert victims, f"there is no {kind}"
            victims[-1].kill()
        assert durable.items() <= stored.items()
        durable = stored
    ended = launch.end()
    assert ended.code == 0, ended.output
    bench.nothing_is_left()

    calm = Bench(tmp_path / "calm", settings, {"LMSWEEP_ENGINE": ""})
    assert calm.run().code == 0
    final = answers(bench)
    assert durable.items() <= final.items()
    assert final.keys() == answers(calm).keys()
    mine, undisturbed = bench.scores(), calm.scores()
    assert mine.keys() == undisturbed.keys() == {"alpha/exports", "alpha/pairs"}
    for cell, scores in mine.items():
        # Answers of a busy server differ in the last digits from one run to the next.
        assert [score[2] for score in scores] == pytest.approx([score[2] for score in undisturbed[cell]], abs=0.051)
