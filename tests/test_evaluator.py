"""The child process with a driver that is a test: what it says and when, how a cell ends, how the process ends."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import psutil
import pytest
from conftest import command_line
from doubles import KEY, RequestsLog, facts, make_gpqa, make_tasks, make_tokenizer, stand_in
from tokenizers import Tokenizer

from sweep.evaluating.client import ATTEMPTS
from sweep.evaluating.concurrency import Need
from sweep.evaluating.evaluator import (
    Answered,
    CancelCell,
    CellDone,
    CellFailed,
    CellProgress,
    Checked,
    CheckModel,
    CheckTask,
    Demand,
    EvaluatorProcess,
    Event,
    KnownAnswers,
    NeedServer,
    PoolChanged,
    RunCell,
    Stored,
    Unreached,
    WantAnswers,
    _Attempt,
    child_environment,
    credentials,
)
from sweep.evaluating.preflight import Facts
from sweep.evaluating.scoring import Method
from sweep.planning.config import Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan
from sweep.results.store import Response
from sweep.serving.server import Endpoint

ROOT = Path(__file__).parent.parent
E = TypeVar("E")

ECHO_ONLY = facts(methods=[Method.ECHO])

SECRETS = {"HF_TOKEN": "hf_of-the-hub-4711", "WANDB_API_KEY": "secret-of-wandb", "MY_TOKEN": "a-token-of-my-own"}
"""In the environment of whoever starts an evaluator."""


def child_of(supervisor: int) -> psutil.Process:
    """The evaluator itself, two processes below."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found[:] = [
            process
            for process in psutil.Process(supervisor).children(recursive=True)
            if command_line(process)[1:4] == ["-P", "-m", "sweep.evaluating.evaluator"]
        ]
        return bool(found)

    until(is_there)
    return found[0]


class Driver:
    """Starts a child, notes what it says and when, keeps its answers and gives them back when it asks for them."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = EvaluatorProcess(log, secrets=[KEY])
        self.child = child_of(self.process._process.pid)
        self.answers: dict[bytes, bytes] = {}
        self.replies = True
        self.said: list[tuple[float, Event]] = []
        self.gone = threading.Event()
        self._heard = threading.Condition()
        self._attempts = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                event = self.process.receive()
            except EOFError:
                self.gone.set()
                with self._heard:
                    self._heard.notify_all()
                return
            with self._heard:
                if isinstance(event, Answered):
                    self.answers.update((r.key, r.answer) for r in event.responses)
                    self.process.send(Stored(responses=event.number))
                if isinstance(event, WantAnswers) and self.replies:
                    known = {key: self.answers[key] for key in event.keys if key in self.answers}
                    self.process.send(KnownAnswers(answers=known))
                self.said.append((time.monotonic(), event))
                self._heard.notify_all()

    def wait(self, kind: type[E], since: int = 0, timeout_s: float = 60.0) -> E:
        """The first event of this kind."""

        def found() -> list[E]:
            return [event for _, event in self.said[since:] if isinstance(event, kind)]

        with self._heard:
            assert self._heard.wait_for(lambda: found() or self.gone.is_set(), timeout_s), f"no {kind} in time"
            assert found(), f"the child is gone without {kind}:\n{self.log.read_text()}"
            return found()[0]

    def begin(self, cell: Cell, facts: Facts | None = None, pool: Sequence[tuple[Endpoint, int]] = ()) -> int:
        """Ask for a cell; where its events begin."""
        since = len(self.said)
        self._attempts += 1
        self.process.send(RunCell(cell=cell, attempt=self._attempts, facts=facts))
        if pool:
            self.process.send(PoolChanged(shares=tuple(pool), facts=facts))
        return since

    def end(self, since: int) -> CellDone | CellFailed:
        event = self.wait((CellDone, CellFailed), since)  # type: ignore[arg-type]
        assert event.attempt == self._attempts  # type: ignore[attr-defined]
        return event  # type: ignore[return-value]

    def run(self, cell: Cell, facts: Facts, pool: Sequence[tuple[Endpoint, int]]) -> CellDone:
        done = self.end(self.begin(cell, facts, pool))
        assert isinstance(done, CellDone), done
        return done

    def ask(self, check: CheckTask | CheckModel) -> str | None:
        since = len(self.said)
        self.process.send(check)
        return self.wait(Checked, since).error

    def events(self, kind: type[E], since: int) -> list[E]:
        with self._heard:
            return [event for _, event in self.said[since:] if isinstance(event, kind)]


@contextmanager
def driver(log: Path, hf_home: Path) -> Iterator[Driver]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(hf_home))
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        patch.setenv("RENAMED", KEY)
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        found = Driver(log)
    try:
        yield found
    finally:
        found.process.stop()
        assert found.gone.wait(10)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "plain")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with stand_in(tmp_path_factory.mktemp("server") / "log") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, RequestsLog]]:
    """A server that takes 0.3 s for a request."""
    root = tmp_path_factory.mktemp("slow")
    log = RequestsLog(root / "requests.jsonl")
    with stand_in(root / "log", latency_s=0.3, requests_log=log.path) as endpoint:
        yield endpoint, log


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One child for all tests that leave it alive: importing lm-eval takes seconds."""
    root = tmp_path_factory.mktemp("evaluator")
    with driver(root / "evaluator.log", root / "hf") as found:
        yield found


@pytest.fixture
def model(folder: Path, request: pytest.FixtureRequest) -> ModelPlan:
    # Responses of one test are none of another's.
    fingerprint = request.node.name
    return ModelPlan(name="m", model=Model(path=str(folder)), revision=None, fingerprint=fingerprint, server="m")


@pytest.fixture
def cell(model: ModelPlan, tasks: Path) -> Callable[..., Cell]:
    def make(task: str, *, folder: Path = tasks, **settings: Any) -> Cell:
        asked = Task(task=task, include_path=str(folder), **settings)
        return Cell(model=model, task_name=task, task=asked, seeds=Seeds(), fingerprint="c")

    return make


# Checks


def test_a_check_says_whether_a_task_can_be_loaded(evaluator: Driver, tasks: Path) -> None:
    def check(task: str) -> str | None:
        asked = Task(task=task, include_path=str(tasks))
        return evaluator.ask(CheckTask(task_name=task, task=asked, seeds=Seeds(), model=Model(path="org/m")))

    assert check("letters") is None
    lost = check("lost")
    assert lost is not None
    assert "task lost" in lost
    assert "nowhere.jsonl" in lost


def test_a_check_says_whether_a_model_has_what_it_needs(
    evaluator: Driver, model: ModelPlan, folder: Path, tmp_path: Path
) -> None:
    assert evaluator.ask(CheckModel(model=model)) is None
    bare = make_tokenizer(tmp_path / "bare", chat_template=None)
    chat = replace(model, name="chatty", model=Model(path=str(bare), chat=True))
    error = evaluator.ask(CheckModel(model=chat))
    assert error is not None
    assert "model chatty has `chat: true`" in error
    assert "no chat template" in error


# Secrets


def test_the_child_and_those_above_it_were_started_without_a_secret_and_without_a_gpu(evaluator: Driver) -> None:
    family = [psutil.Process(evaluator.process._process.pid)]
    family += family[0].children(recursive=True)
    assert len(family) == 3
    for process in family:
        environment = process.environ()
        assert not {*SECRETS, "RENAMED"} & environment.keys()
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        told = json.dumps(environment) + json.dumps(process.cmdline())
        assert not [secret for secret in (KEY, *SECRETS.values()) if secret in told]


def test_an_environment_keeps_no_secret_and_nothing_of_ray() -> None:
    given = {"HF_TOKEN": "t", "RAY_ADDRESS": "x", "OMP_NUM_THREADS": "1", "MY_PASSWORD": "w", "PATH": "/bin"}
    made = child_environment({**given, "OTHER": "known-by-value"}, ["known-by-value"])
    assert made == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    assert child_environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{ROOT}{os.pathsep}/mine"


def test_an_evaluator_gets_the_secrets_that_load_data_and_those_of_the_sweeps_env() -> None:
    secret = {"HF_TOKEN": "h", "AWS_SECRET_ACCESS_KEY": "a", "HTTPS_PROXY": "p", "WANDB_API_KEY": "w", "JUDGE_KEY": "j"}
    assert credentials(secret).keys() == {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"}
    assert credentials(secret, {"JUDGE_KEY", "HF_HOME"}).keys() == secret.keys() - {"WANDB_API_KEY"}


def test_code_that_a_model_wrote_finds_the_hubs_token_nowhere_and_no_way_to_the_driver(
    evaluator: Driver, cell: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    found = tmp_path / "found.json"
    folder = make_tasks(tmp_path / "own")
    (folder / "spy.py").write_text(SPY.replace("FOUND", repr(str(found))))
    (folder / "spies.yaml").write_text(
        (folder / "code.yaml").read_text().replace("utils.code", "spy.looks").replace('task: "code"', 'task: "spies"')
        + "process_docs: !function spy.loads\n"
    )
    for asked in (1, 0):  # from a server, from stored answers
        found.unlink(missing_ok=True)
        done = evaluator.run(cell("spies", folder=folder, limit=1, unsafe_code=True), facts(), [(endpoint, 8)])
        assert done.record.counts.asked == asked
        seen = json.loads(found.read_text())
        # The task can be loaded, and its metrics have what they need from the start.
        assert seen["loading"] == SECRETS["HF_TOKEN"]
        for where in ("forked", "started"):
            assert "PATH" in seen[where]["environment"]
            assert len(seen[where]["above"]) >= 3  # the evaluator and its supervisor, read from /proc
            assert not [name for name, secret in SECRETS.items() if secret in json.dumps(seen[where])], seen[where]
            assert not [link for link in seen[where]["descriptors"] if link.startswith("socket:")], seen[where]
    # The next task can load again.
    assert (
        evaluator.ask(
            CheckTask(
                task_name="spies",
                task=Task(task="spies", include_path=str(folder)),
                seeds=Seeds(),
                model=Model(path="org/m"),
            )
        )
        is None
    )
    assert json.loads(found.read_text())["loading"] == SECRETS["HF_TOKEN"]


SPY = '''
import json
import multiprocessing
import os
import subprocess
import sys

LOOK = """
import json, os, sys

def look(highest):
    above, pid = [], os.getppid()
    while True:
        with open(f"/proc/{pid}/environ", "rb") as file:
            above.append(file.read().decode(errors="replace"))
        if pid == highest:
            break
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rpartition(")")[2].split()[1])
    with open("/proc/self/environ", "rb") as file:
        first = file.read().decode(errors="replace")
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # of the listing itself
            pass
    return {"environment": dict(os.environ), "first": first, "above": above, "descriptors": links}
"""
exec(LOOK)
PROGRAM = LOOK + "json.dump(look(int(sys.argv[1])), sys.stdout)"
SEEN = {}


def supervisor():
    """The evaluator's parent's parent is the last that is ours."""
    with open(f"/proc/{os.getppid()}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def loads(split):
    SEEN["loading"] = os.environ.get("HF_TOKEN")
    with open(FOUND, "w") as file:
        json.dump(SEEN, file)
    return split


def looks(doc, results):
    highest = supervisor()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(look(highest)))
    child.start()
    SEEN["forked"] = queue.get()
    child.join()
    # close_fds=False as os.system and os.posix_spawn have it.
    command = [sys.executable, "-c", PROGRAM, str(highest)]
    told = subprocess.run(command, close_fds=False, capture_output=True, check=True)
    SEEN["started"] = json.loads(told.stdout)
    with open(FOUND, "w") as file:
        json.dump(SEEN, file)
    return {"score": 1}
'''


def test_a_log_holds_no_secret_even_when_it_comes_in_pieces(
    evaluator: Driver, cell: Any, endpoint: Endpoint, tmp_path: Path
) -> None:
    folder = make_tasks(tmp_path / "own")
    (folder / "says.py").write_text(SAYS)
    (folder / "says.yaml").write_text(
        (folder / "timed.yaml").read_text().replace("utils.timed", "says.says").replace('task: "timed"', 'task: "says"')
    )
    evaluator.run(cell("says", folder=folder, limit=1), facts(), [(endpoint, 8)])
    until(lambda: "the end of it" in evaluator.log.read_text())
    shown = evaluator.log.read_text()
    assert "in pieces ***, whole ***, logged ***, almost hf_of-the\n" in shown
    assert SECRETS["HF_TOKEN"] not in shown


SAYS = """
import os, sys, time

def says(doc, results):
    token = os.environ["HF_TOKEN"]
    os.write(1, b"in pieces " + token[:5].encode())
    time.sleep(0.2)
    os.write(1, token[5:].encode() + f", whole {token}, logged {token}, almost {token[:9]}".encode())
    time.sleep(0.2)
    os.write(2, b"\\nthe end of it\\n")
    return {"score": 1}
"""


# A cell from beginning to end


def test_a_cell_runs_to_its_record_and_again_from_its_answers(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    since = evaluator.begin(cell("letters"))  # before any server is there
    assert evaluator.wait(NeedServer, since).requests == 64
    evaluator.process.send(PoolChanged(shares=((endpoint, 8),), facts=facts()))
    done = evaluator.end(since)
    assert isinstance(done, CellDone)
    assert done.record.counts.asked == 64
    assert sum(len(event.responses) for event in evaluator.events(Answered, since)) == 64
    last = evaluator.events(CellProgress, since)[-1]
    assert (last.done, last.total, last.reused) == (64, 64, 0)
    assert sorted(re.sub(r"_2\d{3}-.*", "", name) for name in done.files) == ["results", "samples_letters"]

    since = evaluator.begin(cell("letters"), facts())  # no endpoint any more
    again = evaluator.end(since)
    assert isinstance(again, CellDone)
    assert again.record.scores == done.record.scores
    assert (again.record.counts.asked, again.record.counts.reused) == (0, 64)
    assert again.record.request_s == 0
    assert not evaluator.events(NeedServer, since)
    assert not evaluator.events(Answered, since)


def test_answers_arrive_in_batches_and_at_most_half_a_second_late(
    evaluator: Driver, cell: Any, slow: tuple[Endpoint, RequestsLog]
) -> None:
    endpoint, log = slow
    log.new()
    since = evaluator.begin(cell("phrases"), ECHO_ONLY, [(endpoint, 8)])
    end = evaluator.end(since)
    assert isinstance(end, CellDone)
    assert len(log.new()) == 64  # 8 in flight, 0.3 s each: 2.4 s
    times = [(when, len(e.responses)) for when, e in evaluator.said[since:] if isinstance(e, Answered)]
    assert sum(number for _, number in times) == 64
    assert 4 <= len(times) <= 10
    assert max(later - earlier for (earlier, _), (later, _) in itertools.pairwise(times)) < 1.2


def test_an_evaluator_asks_for_nothing_new_while_too_many_answers_are_not_stored(cell: Any, endpoint: Endpoint) -> None:
    said: list[Event] = []
    run = RunCell(cell=cell("letters"), attempt=1, facts=None, ahead=1000)
    attempt = _Attempt(run, said.append, lambda: None)
    attempt.hear(PoolChanged(shares=((endpoint, 8),), facts=facts()))
    for number in range(1000):
        assert attempt.pool.take()[1] == 1
        attempt.answered(Response(key=number.to_bytes(4), cell="m/letters", method="echo", answer=b"1"))
        attempt.pool.give_back(attempt.pool._slots[endpoint.server])
    assert attempt.pool.take() == (None, 0)
    batches = [event for event in said if isinstance(event, Answered)]
    assert [batch.number for batch in batches] == [256, 256, 256]  # the rest follows within half a second
    attempt.flush()
    batches = [event for event in said if isinstance(event, Answered)]
    assert [r.key for batch in batches for r in batch.responses] == [n.to_bytes(4) for n in range(1000)]
    attempt.hear(Stored(responses=batches[0].number))
    assert attempt.pool.take()[1] == 1


def test_an_evaluator_hears_which_answers_count_when_all_that_it_has_are_stored(cell: Any) -> None:
    said: list[Event] = []
    attempt = _Attempt(RunCell(cell=cell("letters"), attempt=1, facts=None), said.append, lambda: None)
    for key in (b"1", b"2", b"3"):
        attempt.answered(Response(key=key, cell="m/letters", method="echo", answer=b"ours"))
    found: list[Mapping[bytes, bytes]] = []
    waiting = threading.Thread(target=lambda: found.append(attempt.earlier()))
    waiting.start()
    until(lambda: [event for event in said if isinstance(event, Answered)])  # it sends what it waits for
    attempt.hear(CancelCell(reason="the sweep is stopped"))
    attempt.hear(Stored(responses=2, earlier={b"2": b"of another"}))
    assert waiting.is_alive()
    attempt.hear(Stored(responses=1))
    waiting.join(10)
    assert found == [{b"2": b"of another"}]
    assert attempt.earlier() == {}


@pytest.mark.parametrize("made", [False, True])
def test_an_evaluator_says_of_which_endpoint_it_gets_nothing_but_broken_connections(
    made: bool, cell: Any, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.evaluating.client.BROKEN_S", 0.0)
    said: list[Event] = []
    attempt = _Attempt(RunCell(cell=cell("letters"), attempt=3, facts=None), said.append, lambda: None)
    attempt.hear(PoolChanged(shares=((endpoint, 8),), facts=facts()))
    attempt.pool.take()
    for _ in range(2 * ATTEMPTS):
        error = aiohttp.ServerDisconnectedError("gone") if made else aiohttp.ConnectionTimeoutError("silent")
        attempt.pool.broke(endpoint, error)
    why = "gone" if made else "silent"
    assert [event for event in said if isinstance(event, Unreached)] == [
        Unreached(cell="m/letters", attempt=3, server=endpoint.server, made=made, why=why)
    ]


def test_an_evaluator_says_at_once_what_it_needs_and_that_it_has_heard_of_a_share(
    evaluator: Driver, cell: Any, slow: tuple[Endpoint, RequestsLog]
) -> None:
    endpoint, _ = slow
    since = evaluator.begin(cell("phrases"), ECHO_ONLY, [(endpoint, 0)])

    def needs(serial: int) -> list[Need]:
        told = [event for event in evaluator.events(Demand, since) if event.serial == serial]
        return [event.needs[endpoint.server] for event in told if endpoint.server in event.needs]

    evaluator.wait(NeedServer, since)
    until(lambda: Need(wanted=64, held=0) in needs(0))
    evaluator.process.send(PoolChanged(shares=((endpoint, 4),), facts=ECHO_ONLY, serial=7))
    until(lambda: needs(7))
    assert needs(7)[0].held == 4
    assert 60 <= needs(7)[0].wanted <= 68
    assert isinstance(evaluator.end(since), CellDone)
    until(lambda: needs(7)[-1] == Need(wanted=0, held=4))


def test_a_time_limit_by_sigalrm_works_in_a_tasks_metric(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    (score,) = evaluator.run(cell("timed", limit=3), facts(), [(endpoint, 8)]).record.scores
    assert score.value == 1


# A cell that ends otherwise


def still_works(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    done = evaluator.run(cell("letters", limit=2), facts(), [(endpoint, 8)])
    assert len(done.record.scores) == 1


def cancelled(evaluator: Driver, since: int) -> None:
    evaluator.process.send(CancelCell(reason="the scheduler wants it back"))
    end = evaluator.end(since)
    assert isinstance(end, CellFailed)
    assert end.error is None


def test_a_cell_can_be_taken_back_while_it_waits_for_stored_answers(
    evaluator: Driver, cell: Any, endpoint: Endpoint
) -> None:
    evaluator.replies = False
    try:
        since = evaluator.begin(cell("letters"))
        evaluator.wait(WantAnswers, since)
        cancelled(evaluator, since)
    finally:
        evaluator.replies = True
    still_works(evaluator, cell, endpoint)


def test_a_cell_can_be_taken_back_while_it_waits_for_facts(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    since = evaluator.begin(cell("letters"))
    evaluator.wait(NeedServer, since)
    cancelled(evaluator, since)
    still_works(evaluator, cell, endpoint)


def test_a_cell_can_be_taken_back_while_it_waits_for_an_endpoint(
    evaluator: Driver, cell: Any, endpoint: Endpoint
) -> None:
    since = evaluator.begin(cell("letters"), facts())
    evaluator.wait(NeedServer, since)
    cancelled(evaluator, since)
    still_works(evaluator, cell, endpoint)


def test_a_cell_can_be_taken_back_in_the_middle_and_goes_on_with_what_it_had(
    evaluator: Driver, cell: Any, slow: tuple[Endpoint, RequestsLog], endpoint: Endpoint
) -> None:
    slow_endpoint, log = slow
    since = evaluator.begin(cell("phrases"), ECHO_ONLY, [(slow_endpoint, 4)])
    evaluator.wait(Answered, since)
    cancelled(evaluator, since)
    had = sum(len(event.responses) for event in evaluator.events(Answered, since))
    assert 0 < had < 64
    log.new()
    done = evaluator.run(cell("phrases"), ECHO_ONLY, [(endpoint, 8)])
    assert (done.record.counts.reused, done.record.counts.asked) == (had, 64 - had)
    assert len(log.new()) <= 4  # what was in flight may reach a busy server late


def test_a_cell_taken_back_before_it_began_leaves_the_next_one_alone(
    evaluator: Driver, cell: Any, endpoint: Endpoint
) -> None:
    since = evaluator.begin(cell("letters", limit=3))
    cancelled(evaluator, since)
    still_works(evaluator, cell, endpoint)


def test_a_failed_cell_says_why_and_the_next_one_runs(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    end = evaluator.end(evaluator.begin(cell("pinned", num_fewshot=5, limit=2), facts(), [(endpoint, 8)]))
    assert isinstance(end, CellFailed)
    assert "num_fewshot 5 was asked for, but pinned ran with 0" in str(end.error)
    assert not end.passing
    still_works(evaluator, cell, endpoint)


def test_a_task_that_leaves_the_process_costs_its_cell_only(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    end = evaluator.end(evaluator.begin(cell("exits", limit=2), facts(), [(endpoint, 8)]))
    assert isinstance(end, CellFailed)
    assert str(end.error).startswith("evaluate: SystemExit: a task that wants to leave (the traceback")
    assert end.passing  # nobody knows
    # Comes by another way than the event, the name first.
    until(lambda: "in exits" in evaluator.log.read_text())
    assert "evaluate m/exits failed" in evaluator.log.read_text()
    still_works(evaluator, cell, endpoint)


def test_a_mistake_of_our_own_costs_its_cell_only(evaluator: Driver, cell: Any, endpoint: Endpoint) -> None:
    broken = replace(cell("letters"), seeds=None)
    end = evaluator.end(evaluator.begin(broken, facts(), [(endpoint, 8)]))
    assert isinstance(end, CellFailed)
    assert "AttributeError: 'NoneType' object has no attribute" in str(end.error)
    until(lambda: "Traceback" in evaluator.log.read_text())
    still_works(evaluator, cell, endpoint)


@pytest.mark.slow
def test_an_evaluator_stops_with_all_that_a_task_has_started(cell: Any, endpoint: Endpoint, tmp_path: Path) -> None:
    with driver(tmp_path / "log", tmp_path / "hf") as evaluator:
        evaluator.begin(cell("forks", limit=1), facts(), [(endpoint, 8)])
        until(lambda: evaluator.child.children(recursive=True), 60)
        family = [evaluator.child, *evaluator.child.children(recursive=True)]
        own = Path(evaluator.child.cwd())
        assert own.is_dir()
        evaluator.process.stop()
        evaluator.process.stop()
        assert evaluator.gone.wait(10)
        until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
        assert not own.exists()


PARENT = """
import sys, time
from pathlib import Path
from sweep.evaluating.evaluator import EvaluatorProcess, PoolChanged
process = EvaluatorProcess(Path(sys.argv[1]))
print(process._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_an_evaluator_does_not_outlive_a_driver_that_was_killed(tmp_path: Path, stopped: bool) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        child = child_of(int(parent.stdout.readline()))
        until(lambda: child.cwd() != str(ROOT))
        folder = Path(child.cwd())
        assert folder.parent.is_relative_to(tempfile.gettempdir())
        if stopped:  # as one that computes for long and hears nothing
            child.suspend()
        parent.send_signal(signal.SIGKILL)
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    until(lambda: not folder.exists())


# GPQA: documents that are shuffled while they are loaded


class Oracle:
    """A server that knows the right answers and sees nothing but prompts: it reads the last question and its choices.

    It speaks as much of vLLM as an echo request needs. A continuation that names the right choice gets -0.01 a token,
    any other -5.
    """

    def __init__(self, tokenizer: Path, answer_by_question: Mapping[str, str]) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self.answer_by_question = answer_by_question
        self.latency_s = 0.0
        self.prompts: list[str] = []
        oracle = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def log_message(self, *_: Any) -> None: ...

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                content = json.dumps(oracle.answer(body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # a client that was killed hears no answer

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.endpoint = Endpoint(server="oracle-0", url=self.url, api_key=KEY, max_model_len=8192, engine_version="0")

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(self.latency_s)
        (prompt,) = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        value, number = self.logprob(self.tokenizer.decode(prompt)), len(prompt) + 1
        logprobs = {"token_logprobs": [None] + [value] * (number - 1), "top_logprobs": [{"x": 0.0}] * number}
        return {"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}

    def logprob(self, text: str) -> float:
        self.prompts.append(text)
        question, choices, letter = re.findall(r"Question: (.*)\nChoices:\n((?:\(.\) .*\n){4})Answer: \((.)\)", text)[
            -1
        ]
        by_letter = dict(re.findall(r"\((.)\) (.*)\n", choices))
        return -0.01 if by_letter[letter] == self.answer_by_question[question] else -5.0


@pytest.fixture(scope="module")
def gpqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpqa(tmp_path_factory.mktemp("gpqa") / "tasks")


@pytest.fixture
def oracle(gpqa: Path, folder: Path) -> Iterator[Oracle]:
    rows = [json.loads(line) for line in (gpqa / "train.jsonl").read_text().splitlines()]
    # As lm-eval's own processing cleans it.
    clean = {r["Question"]: r["Correct Answer"].replace(" [title]", ". ").replace("  ", " ") for r in rows}
    oracle = Oracle(folder, clean)
    thread = threading.Thread(target=oracle.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield oracle
    oracle.server.shutdown()
    thread.join()
    oracle.server.server_close()


LONG = facts(max_model_len=8192, methods=[Method.ECHO])


def accuracies(done: CellDone) -> dict[str, float]:
    return {score.metric: score.value for score in done.record.scores}


def prompt_hashes(done: CellDone) -> list[str]:
    (content,) = (content for name, content in done.files.items() if name.startswith("samples_"))
    return [json.loads(line)["prompt_hash"] for line in content.splitlines()]


@pytest.mark.slow
def test_an_oracle_is_always_right_about_gpqa(cell: Any, gpqa: Path, oracle: Oracle, tmp_path: Path) -> None:
    asked = cell("gpqa_like", folder=gpqa, num_fewshot=5)
    pool = [(oracle.endpoint, 4)]
    oracle.latency_s = 0.05
    with driver(tmp_path / "first.log", tmp_path / "cold") as first:
        first.begin(asked, LONG, pool)
        until(lambda: len(first.answers) >= 40, 60)
        first.process.stop()  # in the middle of the cell
    oracle.latency_s = 0
    stored = dict(first.answers)
    assert len(stored) < 96

    with driver(tmp_path / "second.log", tmp_path / "cold-too") as second:
        whole = second.run(asked, LONG, pool)
        assert whole.record.counts.asked == 96
        second.answers = dict(stored)
        resumed = second.run(asked, LONG, pool)
        # Another process made the same prompts on another cold cache: each of its answers is one to ours.
        assert resumed.record.counts.reused == len(stored)
        second.answers = {}
        other = second.run(cell("gpqa_like_too", folder=gpqa, num_fewshot=5), LONG, pool)
    for done in (whole, resumed, other):
        assert accuracies(done) == {"acc": 1.0, "acc_norm": 1.0}
        assert prompt_hashes(done) == prompt_hashes(whole)
    for prompt in oracle.prompts:
        *examples, question = re.findall(r"Question: (.*)\n", prompt)
        assert len(examples) == 5
        assert question not in examples


STOCK = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
url, tokenizer, tasks = sys.argv[1:]
found = simple_evaluate(
    model="local-completions",
    model_args={"base_url": f"{url}/v1/completions", "model": "m", "tokenizer": tokenizer, "num_concurrent": 4,
                "tokenizer_backend": "huggingface", "max_length": 8192},
    tasks=["gpqa_like"], num_fewshot=5, task_manager=TaskManager(include_path=tasks, include_defaults=False),
)
print(json.dumps(found["results"]["gpqa_like"]["acc,none"]))
"""


@pytest.mark.slow
def test_the_same_oracle_fails_in_stock_lm_eval_on_a_cold_cache(
    gpqa: Path, oracle: Oracle, folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOCK, oracle.url, str(folder), str(gpqa)],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": KEY},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 0.6
