"""The loop on a scripted cluster, and whole sweeps as a user starts them: on real Ray and lm-eval, without a model."""

import contextlib
import fcntl
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import msgspec
import psutil
import pytest
import yaml
from doubles import by_prompt
from rich.console import Console
from test_publish import carried_out
from test_tracking import GSM8K
from tokenizers import Tokenizer

from sweep.errors import StoreError
from sweep.evaluating import evaluator as ev
from sweep.evaluating.concurrency import Controller, Load, Need
from sweep.evaluating.preflight import Check, Expected, Facts
from sweep.evaluating.preflight import Outcome as Checked
from sweep.evaluating.scoring import Method
from sweep.planning.config import Device, Model, Seeds, SweepConfig, Task, WandbConfig
from sweep.planning.plan import Cell, ModelPlan, Plan, ServerPlan
from sweep.record import Counts, Record, Status
from sweep.results.claim import Work
from sweep.results.reading import Sweep
from sweep.results.store import Response, RunDirectory, Store, read_records, response_key
from sweep.results.timeline import TimelineWriter, read_timeline
from sweep.running.cluster import (
    ClusterEvent,
    EvaluatorLost,
    EvaluatorReady,
    EvaluatorSaid,
    ServerFailed,
    ServerLoad,
    ServerLost,
    ServerReady,
    ServerStopped,
)
from sweep.running.costs import start_s
from sweep.running.hanging import GIVE_BACK_S, SLOW_S
from sweep.running.inventory import Node
from sweep.running.launching import make_report
from sweep.running.progress import Terminal
from sweep.running.restarts import BACKOFF_S, HEALTHY_S, LOSSES_MOST
from sweep.running.runner import DEATHS_MOST, FAILURES_AT_ONCE, Runner
from sweep.running.walltime import LEAVE_S, UNLIMITED, Walltime
from sweep.serving.metrics import Snapshot
from sweep.serving.server import Endpoint

ROOT = Path(__file__).parent.parent

# The loop on a scripted cluster


LONGEST_REST_S = BACKOFF_S * 2**LOSSES_MOST

FACTS = Facts(max_model_len=2048, engine_version="1", methods=(Method.ECHO,))


class ScriptedCluster:
    """What the runner asks of a cluster, noted; what happens there is written by the test."""

    def __init__(self, script: "Script", *, evaluators: int, cpu_servers: int) -> None:
        self.inventory = (Node(name="n", cpu_servers=cpu_servers, evaluators=evaluators),)
        self.evaluators: list[str] = []
        self.node_of: dict[str, str] = {}
        """Evaluator -> where it was to start."""
        self.nodes_of: dict[str, tuple[str, ...]] = {}
        """The same of a life."""
        self.sent: dict[str, list[Any]] = {}
        """Evaluator -> its messages that the test has not taken yet."""
        self.started: list[str] = []
        """Lives of servers."""
        self.stopped: list[str] = []
        self.ended: list[str] = []
        """Evaluators that the runner had killed."""
        self.expected: dict[str, Mapping[str, Expected]] = {}
        """Life -> what it was to be."""
        self.controllers: dict[str, Controller] = {}
        """Life -> what finds its limit."""
        self.pressed: dict[str, tuple[int, int]] = {}
        self.now = 1000.0
        """The runner's clock."""
        self.creeps_s = 0.0
        """What passes between two looks at it."""
        self._script = script(self)
        self._settling = False
        self._placed: list[ClusterEvent] = []

    def start_evaluator(self, name: str, log_path: Path, *, node: str) -> None:
        self.evaluators.append(name)
        self.node_of[name] = node
        self.sent[name] = []
        self._placed.append(EvaluatorReady(evaluator=name))

    def start_server(
        self, plan: ServerPlan, life: str, log_path: Path, expected: Mapping[str, Expected], *, nodes: Sequence[str]
    ) -> None:
        self.started.append(life)
        self.nodes_of[life] = tuple(nodes)
        self.expected[life] = expected

    def stop_server(self, life: str) -> None:
        self.stopped.append(life)

    def tune(self, life: str, controller: Controller) -> None:
        self.controllers[life] = controller

    def press(self, life: str, *, wanted: int, refused: int) -> None:
        self.pressed[life] = (wanted, refused)

    def send(self, evaluator: str, message: Any) -> None:
        self.sent[evaluator].append(message)

    def end_evaluator(self, name: str, reason: str) -> None:
        self.ended.append(name)
        self._placed.append(EvaluatorLost(evaluator=name, reason=reason))

    def events(self, timeout_s: float) -> list[ClusterEvent]:
        # Two rounds for each step of a script: a server that is started in one round gets cells in the next.
        self._settling = not self._settling
        if self._settling:
            placed, self._placed = self._placed, []
            return placed
        try:
            return next(self._script)
        except StopIteration:
            raise AssertionError(f"the script is over and cells are not: {self.sent}, {self.started}") from None

    def clock(self) -> float:
        self.now += self.creeps_s
        return self.now

    # For scripts.

    def taken(self, kind: type[Any]) -> list[tuple[str, Any]]:
        """(evaluator, message) of all messages of a kind, which are then gone."""
        found = [(name, m) for name, messages in self.sent.items() for m in messages if isinstance(m, kind)]
        for name in self.sent:
            self.sent[name] = [m for m in self.sent[name] if not isinstance(m, kind)]
        return found

    def checks_pass(self) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := self.taken(ev.CheckTask) + self.taken(ev.CheckModel):
            yield [said(name, passed(check)) for name, check in work]

    def after(self, seconds: float) -> Iterator[list[ClusterEvent]]:
        """Nothing happens but that so much time passes."""
        self.now += seconds
        yield []

    def running(self) -> dict[str, tuple[str, ev.RunCell]]:
        """Cell -> its evaluator and order, of the cells begun since the last time."""
        return {run.cell.key: (name, run) for name, run in self.taken(ev.RunCell)}

    def ready(self, life: str, facts: Facts = FACTS) -> ServerReady:
        endpoint = Endpoint(server=life, url="http://x", api_key="k", max_model_len=2048, engine_version="1")
        return ServerReady(life=life, endpoint=endpoint, facts=facts)


Script = Callable[[ScriptedCluster], Iterator[list[ClusterEvent]]]


def said(evaluator: str, event: ev.Event) -> EvaluatorSaid:
    return EvaluatorSaid(evaluator=evaluator, event=event)


def passed(check: ev.CheckTask | ev.CheckModel) -> ev.Checked:
    if isinstance(check, ev.CheckTask):
        return ev.Checked(task_name=check.task_name)
    return ev.Checked(model=check.model.name)


def done(evaluator: str, run: ev.RunCell, *, asked: int = 3) -> EvaluatorSaid:
    record = Record(
        model=run.cell.model.name,
        task=run.cell.task_name,
        fingerprint=run.cell.fingerprint,
        status=Status.DONE,
        counts=Counts(requests=3, asked=asked, reused=3 - asked),
    )
    return said(evaluator, ev.CellDone(cell=run.cell.key, attempt=run.attempt, record=record, files={}))


def cancelled(evaluator: str, run: ev.RunCell) -> EvaluatorSaid:
    return said(evaluator, ev.CellFailed(cell=run.cell.key, attempt=run.attempt, error=None))


def asks(evaluator: str, run: ev.RunCell) -> EvaluatorSaid:
    return said(evaluator, ev.NeedServer(cell=run.cell.key, attempt=run.attempt, requests=3))


def a_plan(models: list[str], tasks: list[str], **settings: Any) -> Plan:
    planned = {
        name: ModelPlan(
            name=name,
            model=Model(path="/m", device=Device.CPU, **settings),
            revision=None,
            fingerprint=f"of {name}",
            server=name,
        )
        for name in models
    }
    servers = {
        name: ServerPlan(
            name=name,
            model=model.model,
            revision=None,
            adapters={name: None},
            gpus=1,
            replicas=model.model.replicas,
        )
        for name, model in planned.items()
    }
    cells = tuple(
        Cell(model=model, task_name=task, task=Task(task=task), seeds=Seeds(), fingerprint=f"{name} {task}")
        for name, model in planned.items()
        for task in tasks
    )
    return Plan(models=planned, servers=servers, cells=cells, done={})


@dataclass
class Loop:
    """Runs a plan on a script; `records` is what came of it, by cell key."""

    folder: Path
    screen: io.StringIO = field(default_factory=io.StringIO)
    stop: list[int] = field(default_factory=list)
    """Signals that have come."""
    ended: tuple[int, bool] = (0, False)
    """What stopped the last run: a signal, or that it was out of time."""
    shown: list[Record] = field(default_factory=list)
    """To W&B."""

    def __call__(
        self,
        plan: Plan,
        script: Script,
        *,
        evaluators: int = 1,
        cpu_servers: int = 1,
        known: tuple[str, ...] = (),
        numbers: tuple[Record, ...] = (),
        walltime: Walltime = UNLIMITED,
        **limits: float,
    ) -> dict[str, Record]:
        """`known` are the servers whose facts an earlier launch has stored, `numbers` its records, which no failure of
        this run replaces, `limits` the runner's."""
        store = Store(RunDirectory(self.folder))
        for record in numbers:
            store.write_record(record, {})
        for name in known:
            path = store.directory.facts(name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(msgspec.json.encode({"of": [f"of {name}"], "facts": FACTS}))
        terminal = Terminal(
            models=list(plan.models),
            cells=[cell.key for cell in plan.cells],
            console=Console(file=self.screen, width=200),
        )
        nobody: Any = SimpleNamespace(
            stands=self.shown.extend, cell=self.shown.append, progress=lambda model, figures: None
        )
        cluster: Any = ScriptedCluster(script, evaluators=evaluators, cpu_servers=cpu_servers)
        records: dict[str, Record] = {}
        try:
            runner = Runner(
                plan=plan,
                store=store,
                cluster=cluster,
                terminal=terminal,
                tracker=nobody,
                timeline=TimelineWriter(store.directory.timeline, clock=cluster.clock),
                secrets=(),
                records=records,
                clock=cluster.clock,
                walltime=walltime,
                **limits,
            )
            self.ended = (runner.run(self.stop), runner.out_of_time)
        finally:
            store.close()
        stored = {f"{model}/{task}": r for (model, task), r in read_records(RunDirectory(self.folder)).items()}
        assert stored == records | {f"{record.model}/{record.task}": record for record in numbers}
        return records


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path / "run")


def statuses(records: Mapping[str, Record]) -> dict[str, str]:
    return {key: record.status.value for key, record in records.items()}


def test_a_server_starts_when_all_checks_have_passed_and_is_stopped_when_its_cells_are_done(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            assert not cluster.started
            yield [said(name, passed(check)) for name, check in work]
        assert cluster.started == ["a-0"]  # one slot, two models
        name, run = cluster.running()["a/t"]
        assert run.facts is None
        yield [cluster.ready("a-0")]
        ((_, told),) = [(n, m) for n, m in cluster.taken(ev.PoolChanged) if m.shares]
        assert [endpoint.server for endpoint, _ in told.shares] == ["a-0"]
        assert told.facts == FACTS
        yield [done(name, run)]
        assert cluster.stopped == ["a-0"]
        assert cluster.started == ["a-0"]  # its slot is taken until it is gone
        yield [ServerStopped(life="a-0")]
        assert cluster.started == ["a-0", "b-0"]
        yield [cluster.ready("b-0")]
        yield [done(*cluster.running()["b/t"])]

    assert statuses(loop(a_plan(["a", "b"], ["t"]), script)) == {"a/t": "done", "b/t": "done"}


def test_the_timeline_tells_what_was_where_when_and_how_it_ended(loop: Loop) -> None:
    began = 1000.0

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        cluster.inventory = (Node(name="n", host="big.lab", gpus=4, cpu_servers=1, evaluators=1),)
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        yield from cluster.after(10)
        yield [cluster.ready("a-0"), asks(name, run)]
        yield from cluster.after(5)
        yield [EvaluatorLost(evaluator=name, reason="killed"), ServerLost(life="a-0", reason="crashed\nlog")]
        yield from cluster.after(BACKOFF_S)
        yield [ServerStopped(life="a-0"), ServerFailed(life="b-0", error="no such model\nlog")]
        yield [cluster.ready("a-1")]
        yield from cluster.after(7)
        yield [done(*cluster.running()["a/t"])]

    plan = a_plan(["a", "b"], ["t"], replicas=1)
    of_a = replace(plan.servers["a"].model, device=Device.GPU, tensor_parallel=2)
    loop(replace(plan, servers={**plan.servers, "a": replace(plan.servers["a"], model=of_a, gpus=2)}), script)

    timeline = read_timeline(RunDirectory(loop.folder).timeline)
    back = began + 15 + BACKOFF_S
    assert [(s.name, s.server, s.on, s.gpus, s.start, s.ready, s.end, s.state) for s in timeline.servers] == [
        ("a-0", "a", "n", 2, began, began + 10, back, "gone"),
        ("b-0", "b", "n", 0, began, None, back, "gone"),
        ("a-1", "a", "n", 2, back, back, back + 7, "stopping"),
    ]
    assert {server.host for server in timeline.servers} == {"big.lab"}
    said_of = [(server.lost, server.reason) for server in timeline.servers]
    assert said_of == [(True, "crashed"), (True, "no such model"), (False, "")]
    assert [(s.name, s.on, s.start, s.end, s.state) for s in timeline.cells] == [
        ("a/t", "evaluator.0", began, began + 15, "waiting"),
        ("a/t", "evaluator.1", back, back + 7, "done"),
    ]


def test_a_failed_check_costs_its_own_cells_before_any_server_is_started(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            for name, check in work:
                match passed(check):
                    case ev.Checked(task_name="bad"):
                        yield [said(name, ev.Checked(task_name="bad", error="no data"))]
                    case ev.Checked(model="b"):
                        yield [said(name, ev.Checked(model="b", error="no template"))]
                    case fine:
                        yield [said(name, fine)]
        assert cluster.started == ["a-0"]
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/good"])]

    records = loop(a_plan(["a", "b"], ["good", "bad"]), script)
    assert {key: record.error for key, record in records.items()} == {
        "a/good": None,
        "a/bad": "no data",
        "b/good": "no template",
        "b/bad": "no data",
    }


def test_many_failures_at_once_hold_up_the_answers_of_others_for_a_few_of_them_only(loop: Loop) -> None:
    tasks = [f"t{number}" for number in range(4 * FAILURES_AT_ONCE)]

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            ((name, check),) = work
            no_tokenizer = isinstance(check, ev.CheckModel) and check.model.name == "a"
            yield [said(name, ev.Checked(model="a", error="no tokenizer") if no_tokenizer else passed(check))]
            if no_tokenizer:
                assert 0 < len(list(loop.folder.glob("records/a.*"))) < len(tasks)
        yield [cluster.ready("b-0")]
        while cells := cluster.running():
            yield [done(*cell) for cell in cells.values()]

    records = loop(a_plan(["a", "b"], tasks), script)
    assert Counter(statuses(records).values()) == {"failed": len(tasks), "done": len(tasks)}


def test_w_and_b_hears_of_all_that_stands_and_not_of_a_failure_that_left_the_numbers(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        yield [failed(*cluster.running()["a/again"], passing=False)]
        yield [failed(*cluster.running()["a/new"], passing=False)]

    plan = a_plan(["a"], ["again", "new"])
    numbers = Record(model="a", task="again", fingerprint="a again", status=Status.DONE)
    refused = Record(model="gone", task="new", fingerprint="gone new", status=Status.FAILED, error="no such model")
    plan = replace(plan, stands={"a/again": numbers, "gone/new": refused})
    records = loop(plan, script, numbers=(numbers,))
    assert statuses(records) == {"a/again": "failed", "a/new": "failed"}
    assert loop.shown == [numbers, refused, records["a/new"]]


def test_a_check_is_tried_again_when_its_evaluator_dies_and_fails_when_that_goes_on(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        lost = 0
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            ((name, check),) = work
            if getattr(check, "task_name", None) == "deadly" or not lost:
                lost += 1
                yield [EvaluatorLost(evaluator=name, reason="killed")]
                yield from cluster.after(LONGEST_REST_S)
            else:
                yield [said(name, passed(check))]
        assert lost == 1 + DEATHS_MOST
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/harmless"])]

    records = loop(a_plan(["a"], ["harmless", "deadly"]), script)
    assert statuses(records) == {"a/harmless": "done", "a/deadly": "failed"}
    assert re.match(
        rf"load task deadly: the process that did it died {DEATHS_MOST} times, last: killed \(see .*evaluator\.\d",
        str(records["a/deadly"].error),
    )


def test_a_model_whose_server_does_not_start_fails_alone_and_its_evaluator_comes_back(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        yield [ServerFailed(life="a-0", error="a-0 did not start: bad option")]
        assert [name for name, _ in cluster.taken(ev.CancelCell)] == [name]
        assert cluster.started == ["a-0", "b-0"]
        yield [cluster.ready("b-0")]
        assert not cluster.running()  # its only evaluator is still busy with a cell that has failed
        late = ev.WantAnswers(cell=run.cell.key, attempt=run.attempt, keys=[])
        yield [said(name, late), asks(name, run), cancelled(name, run)]
        # A word of the old cell after the new one has begun, as a batch that was on its way would be.
        now = cluster.running()["b/t"]
        stale = ev.CellFailed(cell="a/t", attempt=1, error="too late")
        yield [said(name, stale), said(name, ev.CellProgress(cell="a/t", attempt=1, done=1, total=2, reused=0))]
        yield [done(*now)]

    records = loop(a_plan(["a", "b"], ["t"]), script)
    assert statuses(records) == {"a/t": "failed", "b/t": "done"}
    assert records["a/t"].error == "a-0 did not start: bad option"


def test_a_cell_that_has_failed_stays_failed_when_its_evaluator_dies_before_it_comes_back(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, _ = cluster.running()["a/t"]
        yield [ServerFailed(life="a-0", error="no"), EvaluatorLost(evaluator=name, reason="killed")]
        assert cluster.started == ["a-0", "b-0"]
        yield [cluster.ready("b-0")]
        assert cluster.evaluators == ["evaluator.0"]
        yield from cluster.after(BACKOFF_S)
        assert cluster.evaluators == ["evaluator.0", "evaluator.1"]
        yield [done(*cluster.running()["b/t"])]

    assert statuses(loop(a_plan(["a", "b"], ["t"]), script)) == {"a/t": "failed", "b/t": "done"}


def test_a_cell_goes_to_another_evaluator_when_its_own_dies_and_fails_when_that_goes_on(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        for attempt in range(1, DEATHS_MOST + 1):
            name, run = cluster.running()["a/deadly"]
            assert run.attempt == attempt
            assert run.facts == (FACTS if attempt > 1 else None)
            yield [EvaluatorLost(evaluator=name, reason="killed")]
            yield from cluster.after(BACKOFF_S)  # its work is to blame, so that the pause does not grow
        yield [done(*cluster.running()["a/harmless"])]

    records = loop(a_plan(["a"], ["deadly", "harmless"]), script)
    assert statuses(records) == {"a/deadly": "failed", "a/harmless": "done"}
    assert re.match(
        rf"its evaluator died {DEATHS_MOST} times, last: killed \(see .*evaluator\.2\.log\)",
        str(records["a/deadly"].error),
    )


def test_a_cell_that_gets_on_between_its_evaluators_deaths_is_not_their_cause(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        for attempt in range(1, 2 * DEATHS_MOST):
            name, _ = cluster.running()["a/t"]
            answer = Response(key=bytes([attempt]), cell="a/t", method="echo", answer=b"1")
            yield [said(name, ev.Answered.of([answer], cell="a/t", attempt=attempt))]
            yield [EvaluatorLost(evaluator=name, reason="killed")]
            yield from cluster.after(BACKOFF_S)
        yield [done(*cluster.running()["a/t"])]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


def test_a_check_that_hangs_holds_up_its_own_cells_only_and_is_ended(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            yield [said(name, passed(check)) for name, check in work if getattr(check, "task_name", "") != "stuck"]
        yield from cluster.after(SLOW_S - 1)
        assert not cluster.started
        yield from cluster.after(2)
        assert cluster.started == ["a-0"]
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/fine"])]
        assert cluster.stopped == ["a-0"]  # and does not idle until the check is over
        yield [ServerStopped(life="a-0")]
        yield from cluster.after(2990 - SLOW_S)
        assert not cluster.ended
        yield from cluster.after(20)

    records = loop(a_plan(["a"], ["stuck", "fine"]), script, evaluators=2, load_timeout_s=3000)
    assert statuses(records) == {"a/stuck": "failed", "a/fine": "done"}
    assert str(records["a/stuck"].error).startswith("load task stuck: not done within 50 min (`load_timeout_s`), its ")
    shown = loop.screen.getvalue()
    assert shown.count("evaluator.0 takes long to load task stuck, 10 min so far (see ") == 1
    assert "it is ended after 50 min (`load_timeout_s`)" in shown


def test_an_evaluator_that_hangs_loses_its_cell_and_makes_room_for_the_next(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield from cluster.after(10_000)  # its server starts, of which it waits to hear
        yield [cluster.ready("a-0")]
        for number, (cell, loaded) in enumerate([("a/loads", False), ("a/scores", True)]):
            name, run = cluster.running()[cell]
            yield from cluster.after(1500)
            if loaded:
                progress = ev.CellProgress(cell=cell, attempt=run.attempt, done=3, total=3, reused=0)
                yield [said(name, ev.WantAnswers(cell=cell, attempt=run.attempt, keys=[])), said(name, progress)]
                yield from cluster.after(2500)
            assert len(cluster.ended) == number
            yield from cluster.after(1600)
            assert cluster.ended[number:] == [name]
            yield from cluster.after(BACKOFF_S)
        yield [done(*cluster.running()["a/fine"])]

    plan = a_plan(["a"], ["loads", "scores", "fine"])
    records = loop(plan, script, load_timeout_s=3000, scoring_timeout_s=4000)
    errors = {key: record.error for key, record in records.items()}
    assert errors.pop("a/fine") is None
    ended = f"its evaluator was ended (see {loop.folder}/logs/evaluator"
    assert errors == {
        "a/loads": f"load a/loads: not done within 50 min (`load_timeout_s`), {ended}.0.log); if its data is only slow "
        "to come, bring it with `fetch` or raise the limit",
        "a/scores": f"score a/scores: not done within 1 h 07 min (`scoring_timeout_s`), {ended}.1.log); if it is only "
        "slow, raise the limit; its answers are kept",
    }


def test_an_evaluator_that_does_not_leave_a_cell_that_has_failed_is_replaced(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, _ = cluster.running()["a/t"]
        yield [ServerFailed(life="a-0", error="no")]
        yield [cluster.ready("b-0")]
        yield from cluster.after(GIVE_BACK_S - 1)
        assert not cluster.ended
        yield from cluster.after(2)
        assert cluster.ended == [name]
        yield from cluster.after(BACKOFF_S)
        yield [done(*cluster.running()["b/t"])]

    records = loop(a_plan(["a", "b"], ["t"]), script)
    assert (records["a/t"].error, records["b/t"].error) == ("no", None)


def test_what_the_infrastructure_takes_is_done_again_as_often_as_it_takes(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        for number in range(2 * DEATHS_MOST):  # checks too
            ((name, _),) = cluster.taken(ev.CheckTask)
            yield [EvaluatorLost(evaluator=name, reason="node died", infrastructure=True)]
            yield from cluster.after(BACKOFF_S)
            for name, check in cluster.taken(ev.CheckModel):
                yield [said(name, passed(check))]
            assert len(cluster.evaluators) == number + 2
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        run = cluster.running()["a/t"]
        yield [asks(*run)]
        for number in range(2 * LOSSES_MOST):
            life = f"a-{number}"
            if number % 2:
                yield [ServerFailed(life=life, error="node died", passing=True, infrastructure=True)]
            else:
                gone = ServerLost(life=life, reason="node died", infrastructure=True)
                yield [cluster.ready(life), gone, ServerStopped(life=life)]
            yield from cluster.after(BACKOFF_S)  # which does not grow
            assert len(cluster.started) == number + 2
        yield [cluster.ready(cluster.started[-1])]
        for _ in range(2 * DEATHS_MOST):
            yield [EvaluatorLost(evaluator=run[0], reason="node died", infrastructure=True)]
            yield from cluster.after(BACKOFF_S)
            run = cluster.running()["a/t"]
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


def failed(evaluator: str, run: ev.RunCell, *, passing: bool) -> EvaluatorSaid:
    return said(evaluator, ev.CellFailed(cell=run.cell.key, attempt=run.attempt, error="it broke", passing=passing))


def test_a_cell_is_run_again_after_an_error_that_may_pass_as_often_as_the_sweep_says(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        yield [failed(*cluster.running()["a/broken"], passing=True)]
        yield [failed(*cluster.running()["a/wrong"], passing=False)]
        for attempt in (2, 3):
            assert not cluster.running()  # it rests
            yield from cluster.after(BACKOFF_S * (attempt - 1))
            name, run = cluster.running()["a/broken"]
            assert run.attempt == attempt
            yield [failed(name, run, passing=True)]

    records = loop(a_plan(["a"], ["broken", "wrong"]), script, retries=2)
    assert statuses(records) == {"a/broken": "failed", "a/wrong": "failed"}


def test_a_model_is_given_up_after_its_failures_and_the_others_go_on(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells = cluster.running()
        yield [failed(*cells["a/t1"], passing=False)]
        assert [name for name, _ in cluster.taken(ev.CancelCell)] == [cells["a/t2"][0]]
        yield [cancelled(*cells["a/t2"])]
        assert cluster.stopped == ["a-0"]
        yield [ServerStopped(life="a-0")]
        yield [cluster.ready("b-0")]
        yield [done(*run) for run in cluster.running().values()]
        yield [done(*cluster.running()["b/t3"])]

    plan = a_plan(["a", "b"], ["t1", "t2", "t3"])
    strict = replace(plan.models["a"], model=replace(plan.models["a"].model, max_failures=1))
    plan = replace(plan, models={**plan.models, "a": strict})
    records = loop(plan, script, evaluators=2, max_failures=2)
    why = "given up: 1 cell has failed, after which a is (`models.a.max_failures: 1`); the last: a/t1: it broke"
    errors = {key: record.error for key, record in records.items()}
    assert errors == {"a/t1": "it broke", "a/t2": why, "a/t3": why, "b/t1": None, "b/t2": None, "b/t3": None}


def test_the_sweep_is_given_up_after_its_failures(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        for task in ("t1", "t2"):
            yield [failed(*cluster.running()[f"a/{task}"], passing=False)]

    records = loop(a_plan(["a", "b"], ["t1", "t2", "t3"]), script, max_failures=2)
    why = "given up: 2 cells have failed, after which the sweep is (`max_failures: 2`); the last: a/t2: it broke"
    assert {record.error for key, record in records.items() if key not in ("a/t1", "a/t2")} == {why}
    assert len(records) == 6


def test_evaluators_of_a_node_that_joins_get_work_and_those_of_one_that_may_be_gone_get_none(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        (node,) = cluster.inventory
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        first = cluster.running()
        assert first.keys() == {"a/t1"}
        cluster.inventory = (node, Node(name="joined", evaluators=1))
        yield []
        assert list(cluster.node_of.values()) == ["n", "joined"]
        second = cluster.running()
        assert second.keys() == {"a/t2"}
        cluster.inventory = (node,)
        yield [done(*second["a/t2"])]
        assert not cluster.running()  # though it is idle
        yield [done(*first["a/t1"])]
        third = cluster.running()
        assert third.keys() == {"a/t3"}
        cluster.inventory = (node, Node(name="joined", evaluators=1))
        yield []
        fourth = cluster.running()
        assert fourth.keys() == {"a/t4"}
        yield [done(*third["a/t3"]), done(*fourth["a/t4"])]

    loop(a_plan(["a"], ["t1", "t2", "t3", "t4"]), script)


def test_evaluators_are_told_which_servers_are_dead(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0"), cluster.ready("a-1")]
        run = cluster.running()["a/t"]
        cluster.taken(ev.PoolChanged)
        yield [lost("a-0"), ServerStopped(life="a-0")]
        told = [news for _, news in cluster.taken(ev.PoolChanged)]
        assert [(news.lost, [endpoint.server for endpoint, _ in news.shares]) for news in told] == [(("a-0",), ["a-1"])]
        yield [done(*run)]

    loop(a_plan(["a"], ["t"], replicas=2), script, cpu_servers=2)


def unreached(evaluator: str, run: ev.RunCell, *, made: bool = False, server: str = "a-0") -> EvaluatorSaid:
    why = "Server disconnected" if made else "Cannot connect to host 10.0.0.7:20100"
    cell, attempt = run.cell.key, run.attempt
    return said(evaluator, ev.Unreached(cell=cell, attempt=attempt, server=server, made=made, why=why))


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_cell_that_cannot_reach_its_server_is_tried_from_another_node_and_then_fails_with_both_addresses(
    again: bool, made: bool, loop: Loop
) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        near = replace(cluster.inventory[0], host="near.lab")
        cluster.inventory = (near, Node(name="far", host="far.lab", evaluators=1))
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells = cluster.running()
        (far,) = [key for key, (name, _) in cells.items() if cluster.node_of[name] == "far"]
        name, run = cells.pop(far)
        yield [asks(name, run), unreached(name, run, made=made)]
        assert cluster.taken(ev.CancelCell) == [(name, ev.CancelCell(reason="its server cannot be reached from here"))]
        yield [cancelled(name, run)]
        yield from cluster.after(1)
        assert not cluster.running()  # though its evaluator is idle
        yield [done(*run) for run in cells.values()]
        name, run = cluster.running()[far]
        assert cluster.node_of[name] == "n"
        yield [unreached(name, run, made=made) if again else done(name, run)]

    records = loop(a_plan(["a"], ["one", "two"]), script)
    errors = [record.error for record in records.values() if record.error is not None]
    shown = loop.screen.getvalue()
    if made:
        words = (
            "gets no answer from a-0 on near.lab at http://x, which is alive: connections break (Server disconnected)"
        )
        cure = "does a proxy in between end what takes long?"
    else:
        words = "cannot connect to a-0 on near.lab at http://x, which is alive: Cannot connect to host 10.0.0.7:20100"
        cure = "ports 20000-29999 must be open between all nodes"
    assert shown.count(f"evaluator.1 on far.lab {words}; {cure}; a/") == 1
    assert errors == ([f"evaluator.0 on near.lab {words}; {cure}"] if again else [])


@pytest.mark.parametrize("takes", ["one", "three"])
def test_while_a_cell_waits_for_an_evaluator_elsewhere_others_take_those_that_there_are(takes: str, loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        cluster.inventory = (*cluster.inventory, Node(name="far", evaluators=1))
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells = cluster.running()
        near, far = cells["a/one"], cells["a/two"]
        assert [cluster.node_of[name] for name, _ in (near, far)] == ["n", "far"]
        yield [asks(*far), unreached(*far)]
        if takes == "one":  # it is given back in the same moment, and comes first
            yield [cancelled(*far), cancelled(*near)]
            near = cluster.running()["a/one"]
        else:
            yield [cancelled(*far)]
            yield [done(*cluster.running()["a/three"])]
        assert cluster.node_of[near[0]] == "n"
        yield [done(*near)]
        last = cluster.running()
        assert cluster.node_of[last["a/two"][0]] == "n"
        yield [done(*run) for run in last.values()]

    tasks = {"one": ["one", "two"], "three": ["one", "two", "three"]}[takes]
    assert set(statuses(loop(a_plan(["a"], tasks), script)).values()) == {"done"}


def test_an_evaluator_elsewhere_that_another_model_leaves_is_taken(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        cluster.inventory = (*cluster.inventory, Node(name="far", evaluators=1))
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0"), cluster.ready("b-0")]
        cells = cluster.running()
        far = cells["b/t"]
        assert cluster.node_of[far[0]] == "far"
        yield [asks(*far), unreached(*far, server="b-0")]
        yield [cancelled(*far)]
        yield [done(*cells["a/t"])]
        name, run = cluster.running()["b/t"]
        assert cluster.node_of[name] == "n"
        yield [done(name, run)]

    loop(a_plan(["a", "b"], ["t"]), script, cpu_servers=2)


def test_a_cell_that_reaches_one_of_its_servers_goes_on_without_the_others(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0"), cluster.ready("a-1")]
        run = cluster.running()["a/t"]
        cluster.taken(ev.PoolChanged)
        yield [unreached(*run)]
        assert not cluster.taken(ev.CancelCell)
        assert [e.server for e, _ in cluster.taken(ev.PoolChanged)[-1][1].shares] == ["a-1"]
        yield [lost("a-1"), unreached(*run, server="a-1"), ServerStopped(life="a-1")]
        assert [name for name, _ in cluster.taken(ev.CancelCell)] == [run[0]]  # with those that it reaches gone
        yield [cancelled(*run)]
        yield [done(*cluster.running()["a/t"])]

    loop(a_plan(["a"], ["t"], replicas=2), script, cpu_servers=2)


def lost(life: str) -> ServerLost:
    return ServerLost(life=life, reason="exited with code 1")


def test_a_dead_server_gets_no_requests_at_once_and_holds_its_place_until_nothing_of_it_is_left(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        run = cluster.running()["a/t"]
        assert [e.server for e, _ in cluster.taken(ev.PoolChanged)[-1][1].shares] == ["a-0"]
        yield [asks(*run), ServerLost(life="a-0", reason="answered no request for 600 s")]
        assert cluster.taken(ev.PoolChanged)[-1][1].shares == ()
        yield from cluster.after(LONGEST_REST_S)
        assert cluster.started == ["a-0"]
        yield [ServerStopped(life="a-0")]
        assert cluster.started == ["a-0", "a-1"]
        assert not cluster.stopped  # a dead one is not asked to stop
        yield [cluster.ready("a-1")]
        assert [e.server for e, _ in cluster.taken(ev.PoolChanged)[-1][1].shares] == ["a-1"]
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}
    shown = loop.screen.getvalue()
    assert f"server a: lost, a-0 answered no request for 600 s (see {loop.folder}/logs/a-0.log); next start in" in shown
    assert "stopped" not in shown


def test_a_lost_server_starts_again_after_a_rest_that_doubles_until_it_was_healthy(loop: Loop) -> None:
    rests = [BACKOFF_S * 2**n for n in range(LOSSES_MOST - 1)]

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        number = 0

        def dies(rest_s: float) -> Iterator[list[ClusterEvent]]:
            nonlocal number
            yield [lost(f"a-{number}"), ServerStopped(life=f"a-{number}")]
            number += 1
            yield from cluster.after(rest_s - 0.1)
            assert len(cluster.started) == number
            yield from cluster.after(0.1)
            assert len(cluster.started) == number + 1
            yield [cluster.ready(f"a-{number}")]

        yield [cluster.ready("a-0")]
        run = cluster.running()["a/first"]
        yield [asks(*run)]
        for rest_s in rests:
            yield from dies(rest_s)
        yield from cluster.after(600 + HEALTHY_S)  # hang_timeout_s
        for rest_s in rests:  # the first of them ends a healthy life
            yield from dies(rest_s)
        yield [done(*run)]
        second = cluster.running()["a/second"]
        yield [asks(*second)]
        for rest_s in rests:  # as does the first of these: a cell was finished
            yield from dies(rest_s)
        yield [done(*second)]

    assert statuses(loop(a_plan(["a"], ["first", "second"]), script)) == {"a/first": "done", "a/second": "done"}


@pytest.mark.parametrize(
    ("later", "anew"),
    [
        (FACTS, False),
        (replace(FACTS, notes=("slow",)), False),
        (replace(FACTS, engine_version="2"), True),
        (replace(FACTS, max_model_len=1024), True),
        (replace(FACTS, methods=(Method.ECHO, Method.NEXT_TOKEN)), True),
    ],
)
def test_what_runs_is_planned_anew_when_its_next_server_can_do_other_things(
    later: Facts, anew: bool, loop: Loop
) -> None:
    """Else answers would carry the old version, or come by a method that this server was not seen to be right in."""

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        run = cluster.running()["a/first"]
        yield [asks(*run), lost("a-0"), ServerStopped(life="a-0")]
        yield from cluster.after(BACKOFF_S)
        yield [cluster.ready("a-1", later)]
        assert [name for name, _ in cluster.taken(ev.CancelCell)] == ([run[0]] if anew else [])
        if anew:
            yield [cancelled(*run)]
            run = cluster.running()["a/first"]
            assert run[1].facts == later
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["first"]), script)) == {"a/first": "done"}


def test_a_crash_loop_takes_its_model_out_with_the_reason_and_the_others_go_on(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        first = cluster.running()["a/first"]
        yield [asks(*first), cluster.ready("a-0"), done(*first)]
        second = cluster.running()["a/second"]
        yield [asks(*second)]
        # Lost and not started count alike.
        for number in range(LOSSES_MOST):
            life = f"a-{number}"
            if number == 2:
                yield [ServerFailed(life=life, error=f"{life} did not start: out of memory", passing=True)]
            else:
                yield [cluster.ready(life), lost(life), ServerStopped(life=life)]
            yield from cluster.after(LONGEST_REST_S)
        assert cluster.started == [*(f"a-{number}" for number in range(LOSSES_MOST)), "b-0"]
        yield [cancelled(*second)]
        yield [cluster.ready("b-0")]
        yield [done(*cluster.running()["b/first"])]
        yield [done(*cluster.running()["b/second"])]

    records = loop(a_plan(["a", "b"], ["first", "second"]), script)
    assert statuses(records) == {"a/first": "done", "a/second": "failed", "b/first": "done", "b/second": "done"}
    logs, last = f"{loop.folder}/logs/a-*.log", f"a-{LOSSES_MOST - 1}"
    assert records["a/second"].error == (
        f"crash loop: lost {LOSSES_MOST} times in a row (logs: {logs}), "
        f"last: {last} exited with code 1 (see {loop.folder}/logs/{last}.log)"
    )


def test_a_start_that_fails_for_good_is_not_tried_again(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        refused = Check(model="a", name="chat logprobs", outcome=Checked.FAILED, detail="none came")
        yield [ServerFailed(life="a-0", error="a-0: chat logprobs: none came", checks=(refused,)), cancelled(name, run)]
        yield from cluster.after(LONGEST_REST_S)
        assert cluster.started == ["a-0", "b-0"]
        yield [cluster.ready("b-0")]
        yield [done(*cluster.running()["b/t"])]

    records = loop(a_plan(["a", "b"], ["t"]), script)
    assert records["a/t"].error == "a-0: chat logprobs: none came"


def test_a_start_that_fails_for_a_passing_reason_is_tried_again(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        run = cluster.running()["a/t"]
        yield [asks(*run), ServerFailed(life="a-0", error="a-0 did not start: port taken", passing=True)]
        assert cluster.started == ["a-0"]
        yield from cluster.after(BACKOFF_S)
        assert cluster.started == ["a-0", "a-1"]
        yield [cluster.ready("a-1")]
        assert not cluster.taken(ev.CancelCell)  # it kept its evaluator
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


def test_replicas_that_one_outage_takes_are_lost_once(loop: Loop) -> None:
    def failed(life: str) -> ServerFailed:
        return ServerFailed(life=life, error="the hub did not answer", passing=True)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        lives = [f"a-{number}" for number in range(2 * LOSSES_MOST)]
        assert cluster.started == lives[:LOSSES_MOST]
        yield [failed(life) for life in cluster.started]
        yield from cluster.after(BACKOFF_S)
        assert cluster.started == lives
        yield [cluster.ready(life) for life in cluster.started[LOSSES_MOST:]]
        yield [done(*cluster.running()["a/t"])]

    records = loop(a_plan(["a"], ["t"], replicas=LOSSES_MOST), script, cpu_servers=LOSSES_MOST)
    assert statuses(records) == {"a/t": "done"}


@pytest.mark.parametrize(
    ("of_the_replica", "why"),
    [
        (replace(FACTS, arithmetic="float16 on cuda"), "it computes with vLLM 1 (float16 on cuda), the other with 1"),
        (replace(FACTS, engine_version="2"), "it computes with vLLM 2, the other with 1"),
        (replace(FACTS, max_model_len=512), "it takes 512 tokens, the other 2048"),
    ],
)
def test_a_replica_that_would_answer_otherwise_is_stopped_with_the_reason(
    of_the_replica: Facts, why: str, loop: Loop
) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        run = cluster.running()["a/t"]
        yield [asks(*run), cluster.ready("a-0")]
        yield [cluster.ready("a-1", of_the_replica)]
        assert cluster.stopped == ["a-1"]
        yield [ServerStopped(life="a-1")]
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["t"], replicas=2), script, cpu_servers=2)) == {"a/t": "done"}
    assert f"replica a-1 is stopped, it is not as a-0: {why}" in " ".join(loop.screen.getvalue().split())


def test_a_replica_in_a_crash_loop_leaves_its_model_with_the_servers_that_it_has(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        run = cluster.running()["a/t"]
        yield [asks(*run)]
        for number in range(1, LOSSES_MOST + 1):
            yield [cluster.ready(f"a-{number}"), lost(f"a-{number}"), ServerStopped(life=f"a-{number}")]
            assert [e.server for e, _ in cluster.taken(ev.PoolChanged)[-1][1].shares] == ["a-0"]
            yield from cluster.after(LONGEST_REST_S)
        assert len(cluster.started) == 1 + LOSSES_MOST
        yield [done(*run)]

    assert statuses(loop(a_plan(["a"], ["t"], replicas=2), script, cpu_servers=2)) == {"a/t": "done"}
    assert f"a goes on with 1 server, another is in a crash loop: lost {LOSSES_MOST} times" in loop.screen.getvalue()


def test_a_replica_that_cannot_start_leaves_its_model_with_the_servers_that_it_has(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert cluster.started == ["a-0", "a-1"]
        yield [cluster.ready("a-0"), ServerFailed(life="a-1", error="out of memory")]
        yield []
        assert cluster.started == ["a-0", "a-1"]
        yield [done(*cluster.running()["a/t"])]
        yield []

    assert statuses(loop(a_plan(["a"], ["t"], replicas=2), script, cpu_servers=2)) == {"a/t": "done"}
    assert "replica a-1 did not start: out of memory" in loop.screen.getvalue()


def test_stored_answers_are_looked_at_without_a_server_which_comes_when_they_do_not_suffice(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert not cluster.started
        cells = cluster.running()
        assert all(run.facts == FACTS for _, run in cells.values())
        name, run = cells["a/new"]
        yield [done(*cells["a/replay"]), asks(name, run)]
        assert [name for name, _ in cluster.taken(ev.CancelCell)] == [name]
        yield [cancelled(name, run)]
        assert cluster.started == ["a-0"]
        name, run = cluster.running()["a/new"]
        assert run.attempt == 2
        yield [cluster.ready("a-0"), done(name, run)]

    records = loop(a_plan(["a"], ["replay", "new"]), script, evaluators=2, known=("a",))
    assert statuses(records) == {"a/replay": "done", "a/new": "done"}


@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize("fits", [True, False])
def test_a_cell_that_fails_by_what_is_stored_of_its_server_is_judged_by_what_the_server_says_itself(
    fits: bool, starting: bool, loop: Loop
) -> None:
    """A prompt that did not fit yesterday may fit into what the owner of the server has started since."""
    now = replace(FACTS, max_model_len=32768)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        if starting:
            yield [asks(name, run)]
            yield [cancelled(name, run)]
            name, run = cluster.running()["a/t"]
            assert cluster.started == ["a-0"]
        yield [asks(name, run), failed(name, run, passing=False)]
        assert cluster.started == ["a-0"]
        yield from cluster.after(LONGEST_REST_S)
        assert not cluster.running()
        yield [cluster.ready("a-0", now)]
        name, run = cluster.running()["a/t"]
        assert run.facts == now
        yield [done(name, run) if fits else failed(name, run, passing=False)]

    records = loop(a_plan(["a"], ["t"]), script, known=("a",))
    assert statuses(records) == {"a/t": "done" if fits else "failed"}


@pytest.mark.parametrize("known", [(), ("a",)])
def test_a_cell_that_fails_by_what_its_server_has_borne_out_fails_at_once(known: tuple[str, ...], loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        yield [asks(name, run)]
        if known:
            yield [cancelled(name, run)]
            name, run = cluster.running()["a/t"]
        yield [cluster.ready("a-0")]
        yield [failed(name, run, passing=False)]

    assert statuses(loop(a_plan(["a"], ["t"]), script, known=known)) == {"a/t": "failed"}


def test_the_place_of_a_resting_server_is_kept_while_its_cells_hold_the_evaluators(loop: Loop) -> None:
    """Both models would wait for ever: the one for a server slot, the other for an evaluator."""

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert cluster.started == ["b-0"]  # what `a` needs is not known yet
        name, run = cluster.running()["a/t"]
        yield [asks(name, run), cluster.ready("b-0")]
        yield [cancelled(name, run)]
        holder = cluster.running()["b/t"]
        yield [asks(*holder), ServerLost(life="b-0", reason="died"), ServerStopped(life="b-0")]
        assert cluster.started == ["b-0"]  # and not a-0, whose turn it would be
        yield from cluster.after(BACKOFF_S)
        assert cluster.started == ["b-0", "b-1"]
        yield [cluster.ready("b-1")]
        yield [done(*holder)]
        yield [ServerStopped(life="b-1")]
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/t"])]

    records = loop(a_plan(["a", "b"], ["t"]), script, known=("a",))
    assert statuses(records) == {"a/t": "done", "b/t": "done"}


@pytest.mark.parametrize("hundredths", range(1, 12))
def test_a_rest_that_ends_between_two_looks_at_the_clock_is_not_missed(loop: Loop, hundredths: int) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        name, run = cluster.running()["a/t"]
        yield [asks(name, run)]
        cluster.creeps_s = hundredths / 100
        yield [ServerLost(life="a-0", reason="killed"), ServerStopped(life="a-0")]
        for _ in range(200):
            if "a-1" in cluster.started:
                break
            yield []
        yield [cluster.ready("a-1")]
        yield [done(name, run)]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


@pytest.mark.parametrize("asked", [True, False])
def test_a_server_whose_place_left_with_its_node_keeps_no_evaluator_from_others(asked: bool, loop: Loop) -> None:
    """Also of a cell that has not asked yet: one that truncates, or scores rolling windows, waits for facts first."""

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        (head,) = cluster.inventory
        nodes = {name: Node(name=name, cpu_servers=1) for name in ("n1", "n2")}
        cluster.inventory = (replace(head, cpu_servers=0), *nodes.values())
        yield from cluster.checks_pass()
        assert sorted(cluster.started) == ["a-0", "b-0"]
        yield [cluster.ready("b-0"), *([cluster.ready("a-0")] if asked else [])]
        name, run = cluster.running()["a/t"]
        yield [asks(name, run)] if asked else []
        del nodes[cluster.nodes_of["a-0"][0]]
        cluster.inventory = (cluster.inventory[0], *nodes.values())
        if asked:
            yield [ServerLost(life="a-0", reason="node lost", infrastructure=True), ServerStopped(life="a-0")]
        else:
            yield [ServerFailed(life="a-0", error="node lost", passing=True, infrastructure=True)]
        yield from cluster.after(LONGEST_REST_S)
        assert cluster.taken(ev.CancelCell) == [(name, ev.CancelCell(reason="its server has no place"))]
        yield [cancelled(name, run)]
        yield [done(*cluster.running()["b/t"])]
        yield [ServerStopped(life="b-0")]
        yield [cluster.ready("a-1")]
        yield [done(*cluster.running()["a/t"])]

    assert statuses(loop(a_plan(["a", "b"], ["t"]), script)) == {"a/t": "done", "b/t": "done"}


def test_a_cell_that_first_asks_while_its_server_rests_waits_for_it(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        run = cluster.running()["a/t"]
        yield [lost("a-0"), ServerStopped(life="a-0")]
        yield [asks(*run)]
        assert not cluster.taken(ev.CancelCell)
        assert cluster.started == ["a-0"]  # and not b-0, whose cells would miss the evaluator
        yield from cluster.after(BACKOFF_S)
        assert cluster.started == ["a-0", "a-1"]
        yield [cluster.ready("a-1")]
        yield [done(*run)]
        yield [ServerStopped(life="a-1")]
        yield [cluster.ready("b-0")]
        yield [done(*cluster.running()["b/t"])]

    assert statuses(loop(a_plan(["a", "b"], ["t"]), script)) == {"a/t": "done", "b/t": "done"}


def test_evaluators_that_die_without_a_word_end_the_launch_with_the_reason(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        for number in range(LOSSES_MOST):
            assert len(cluster.evaluators) == 2 * (number + 1)
            yield [EvaluatorLost(evaluator=name, reason="no module") for name in cluster.evaluators[-2:]]
            yield from cluster.after(BACKOFF_S * 2**number)

    tasks = [f"t{number}" for number in range(2 * LOSSES_MOST)]  # so many that none of them is to blame alone
    records = loop(a_plan(["a", "b"], tasks), script, evaluators=2)
    last = f"evaluator.{2 * LOSSES_MOST - 1}"
    assert {record.error for record in records.values()} == {
        f"no evaluator can work: {LOSSES_MOST} died in a row, last: no module (see {loop.folder}/logs/{last}.log)"
    }
    assert len(records) == 2 * len(tasks)


def test_evaluators_that_the_infrastructure_takes_before_a_word_cost_nobody_a_seat(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        for _ in range(LOSSES_MOST):
            name = cluster.evaluators[-1]
            cluster.sent[name].clear()  # which it has not heard
            yield [EvaluatorLost(evaluator=name, reason="no worker", infrastructure=True)]
            yield from cluster.after(LONGEST_REST_S)
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/t"])]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


def test_idle_evaluators_that_come_to_die_one_after_the_other_end_the_launch_too(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        for number in range(LOSSES_MOST):  # a first server may take so long
            yield [EvaluatorLost(evaluator=cluster.evaluators[-1], reason="killed")]
            yield from cluster.after(BACKOFF_S * 2**number)

    plan = a_plan(["a"], ["t"])
    records = loop(plan, script, evaluators=1, cpu_servers=0)
    assert str(records["a/t"].error).startswith(f"evaluators die one after the other: {LOSSES_MOST} died in a row")


def test_many_deadly_tasks_cost_themselves_and_not_the_evaluators(loop: Loop) -> None:
    deadly = [f"deadly{number}" for number in range(LOSSES_MOST)]

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            ((name, check),) = work
            if getattr(check, "task_name", None) in deadly:
                yield [EvaluatorLost(evaluator=name, reason="killed")]
                yield from cluster.after(BACKOFF_S)
            else:
                yield [said(name, passed(check))]
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/fine"])]

    records = loop(a_plan(["a"], ["fine", *deadly]), script)
    assert statuses(records) == {"a/fine": "done", **{f"a/{task}": "failed" for task in deadly}}


def test_a_server_is_compared_with_what_its_models_tokenizers_said(loop: Loop) -> None:
    ids = ((1, 2), (3,))

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        while work := cluster.taken(ev.CheckTask) + cluster.taken(ev.CheckModel):
            yield [
                said(name, ev.Checked(model="a", token_ids=ids) if isinstance(check, ev.CheckModel) else passed(check))
                for name, check in work
            ]
        assert cluster.expected["a-0"] == {"a": Expected(served_name="a", max_model_len=512, token_ids=ids)}
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/t"])]

    loop(a_plan(["a"], ["t"], max_model_len=512), script)


def test_a_cell_does_not_pass_for_running_while_its_server_starts(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        planned = ev.CellProgress(cell="a/t", attempt=run.attempt, done=1, total=9, reused=1)
        yield [said(name, planned)]
        yield [cluster.ready("a-0")]
        yield [lost("a-0"), ServerStopped(life="a-0")]
        yield [done(name, run)]

    loop(a_plan(["a"], ["t"]), script)
    lines = [line[len("12:34:56 ") :].strip() for line in loop.screen.getvalue().splitlines()]
    assert [line.partition(", a-0 ")[0] for line in lines if line.startswith(("server a", "a/t"))] == [
        "server a: starting, some 54 s",
        "a/t: loading",
        "a/t: waiting for its server  1/9  1 reused",
        "server a: ready, scores by echo; 0 checks passed",
        "a/t: running  1/9  1 reused",
        "server a: lost",
        "a/t: waiting for its server  1/9  1 reused",
    ]


def test_a_replica_that_starts_does_not_hide_that_its_model_is_served(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        work = cluster.running()["a/t"]
        yield [asks(*work), cluster.ready("a-0")]
        (node,) = cluster.inventory
        cluster.inventory = (replace(node, cpu_servers=2),)
        yield []
        assert cluster.started == ["a-0", "a-1"]
        assert loop.screen.getvalue().count("server a: starting") == 1
        yield [lost("a-0"), ServerStopped(life="a-0")]  # now it is not
        assert loop.screen.getvalue().count("server a: starting") == 2
        yield [done(*work)]

    loop(a_plan(["a"], ["t"], replicas=2), script)


def test_what_preflight_saw_is_shown_in_a_line_and_kept_with_the_facts(loop: Loop) -> None:
    checks = (
        Check(model="a", name="key", outcome=Checked.PASSED, detail="401 without it"),
        Check(model="a", name="echo", outcome=Checked.PASSED, detail="12 probes"),
        Check(model="a", name="next_token", outcome=Checked.NOTED, detail="differs from echo by 0.3"),
    )

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        ready = cluster.ready("a-0")
        yield [replace(ready, facts=replace(ready.facts, checks=checks))]
        yield [done(*cluster.running()["a/t"])]

    loop(a_plan(["a"], ["t"]), script)
    shown = loop.screen.getvalue()
    assert "server a: ready, scores by echo; 2 checks passed, 1 noted" in shown
    assert "a-0: next_token noted for a: differs from echo by 0.3" in shown
    assert "401" not in shown
    stored = msgspec.json.decode(RunDirectory(loop.folder).facts("a").read_bytes())
    assert msgspec.convert(stored["facts"], Facts).checks == checks


def test_facts_that_an_older_version_stored_are_read(loop: Loop) -> None:
    path = RunDirectory(loop.folder).facts("a")
    path.parent.mkdir(parents=True)
    path.write_text('{"of": ["of a"], "facts": {"max_model_len": 2048, "engine_version": "1", "methods": ["echo"]}}')

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        assert run.facts == FACTS
        yield [done(name, run)]

    assert statuses(loop(a_plan(["a"], ["t"]), script)) == {"a/t": "done"}


def test_a_server_at_a_url_takes_no_slot_and_starts_beside_the_others(loop: Loop) -> None:
    plan = a_plan(["a", "b"], ["t"])
    at_url = replace(plan.servers["b"], model=Model(url="http://x", tokenizer="/m"), gpus=0)
    plan = replace(plan, servers={**plan.servers, "b": at_url})

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert cluster.started == ["a-0", "b-0"]  # one slot
        yield [cluster.ready("a-0"), cluster.ready("b-0")]
        cells = cluster.running()
        yield [done(*cells["a/t"]), done(*cells["b/t"])]

    assert statuses(loop(plan, script, evaluators=2)) == {"a/t": "done", "b/t": "done"}


def test_answers_are_durable_whatever_became_of_the_attempt_that_asked(loop: Loop) -> None:
    answer = Response(key=b"k", cell="a/t", method="echo", answer=b"1")

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        yield [ServerFailed(life="a-0", error="no")]
        yield [said(name, ev.Answered.of([answer], cell="a/t", attempt=1)), cancelled(name, run)]
        yield [cluster.ready("b-0")]
        yield [done(*cluster.running()["b/t"])]

    loop(a_plan(["a", "b"], ["t"]), script)
    store = Store(RunDirectory(loop.folder))
    assert store.answers([b"k"]) == {b"k": b"1"}
    store.close()


def answered(name: str, run: ev.RunCell, **answers: bytes) -> EvaluatorSaid:
    """Answers by key."""
    responses = [Response(key=k.encode(), cell=run.cell.key, method="echo", answer=a) for k, a in answers.items()]
    return said(name, ev.Answered.of(responses, cell=run.cell.key, attempt=run.attempt))


def test_what_all_evaluators_answered_is_one_transaction_and_each_is_told_of_its_own(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[list[bytes]] = []
    put = Store.put

    def noted(self: Store, responses: Iterable[Response]) -> Mapping[bytes, bytes]:
        responses = list(responses)
        commits.append([response.key for response in responses])
        return put(self, responses)

    monkeypatch.setattr(Store, "put", noted)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells = cluster.running()
        one, two = cells["a/one"], cells["a/two"]
        yield [answered(*one, p=b"1", q=b"1"), answered(*two, r=b"1"), answered(*one, s=b"1")]
        assert commits == [[b"p", b"q", b"r", b"s"]]
        assert sorted((name, m.responses) for name, m in cluster.taken(ev.Stored)) == [(one[0], 3), (two[0], 1)]
        yield [answered(*one, t=b"1"), done(*one)]  # the record stands after its answers
        assert commits[1:] == [[b"t"]]
        yield [done(*two)]

    loop(a_plan(["a"], ["one", "two"]), script, evaluators=2)


def test_of_two_cells_that_ask_the_same_the_second_is_told_the_answer_that_counts(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells = cluster.running()
        one, two = cells["a/one"], cells["a/two"]
        yield [answered(*one, same=b"0.5", own=b"1")]
        assert [stored.earlier for _, stored in cluster.taken(ev.Stored)] == [{}]
        yield [answered(*two, same=b"0.4", other=b"2"), answered(*one, more=b"3")]
        told = {name: stored.earlier for name, stored in cluster.taken(ev.Stored)}
        assert told == {two[0]: {b"same": b"0.5"}, one[0]: {}}
        yield [done(*one), done(*two)]

    loop(a_plan(["a"], ["one", "two"]), script, evaluators=2)


def test_the_heartbeat_tells_what_is_at_work(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Work] = []
    monkeypatch.setattr(Store, "tell", lambda self, work: told.append(work))

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield from cluster.after(1)
        assert told[-1] == Work(servers={"a-0": "starting"}, running={"a/one": (0, 0)})
        yield [cluster.ready("a-0")]
        name, run = cluster.running()["a/one"]

        def progress(done: int) -> list[ClusterEvent]:
            return [said(name, ev.CellProgress(cell="a/one", attempt=1, done=done, total=9, reused=1))]

        yield progress(2)
        cluster.now += 2
        yield progress(6)
        yield from cluster.after(1)
        assert replace(told[-1], left_s=None) == Work(
            servers={"a-0": "ready"}, running={"a/one": (6, 9)}, requests_per_s=2.0
        )
        assert told[-1].left_s is not None
        yield [ServerLost(life="a-0", reason="died")]
        yield from cluster.after(1)
        assert told[-1].servers == {"a-0": "lost"}
        yield [done(name, run)]

    loop(a_plan(["a"], ["one"]), script)


class Sharing:
    """What each cell's evaluator has been told of one endpoint, and words of theirs about it."""

    def __init__(self, cluster: ScriptedCluster) -> None:
        self.cluster = cluster
        self.told: dict[str, ev.PoolChanged] = {}

    def needs(self, cell: tuple[str, ev.RunCell], wanted: int, held: int, *, refused: int = 0) -> EvaluatorSaid:
        """Said by one that has heard all that it was told."""
        self.shares()
        name, run = cell
        need = {"a-0": Need(wanted=wanted, held=held, refused=refused)}
        serial = self.told[name].serial
        return said(name, ev.Demand(cell=run.cell.key, attempt=run.attempt, serial=serial, needs=need))

    def shares(self) -> dict[str, int]:
        """By evaluator, of those that were told something since the last time."""
        changes = dict(self.cluster.taken(ev.PoolChanged))
        self.told |= changes
        return {name: sum(share for _, share in change.shares) for name, change in changes.items()}


def test_a_servers_limit_goes_to_the_cells_that_can_use_it_and_only_when_others_have_given_it_back(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cells, sharing = cluster.running(), Sharing(cluster)
        one, two = cells["a/one"], cells["a/two"]
        assert sharing.shares() == {one[0]: 0, two[0]: 0}  # nobody has asked yet
        yield [sharing.needs(one, wanted=100, held=0)]
        assert sharing.shares() == {one[0]: 8}
        yield [sharing.needs(one, wanted=100, held=8), sharing.needs(two, wanted=100, held=0)]
        assert sharing.shares() == {one[0]: 4}  # what it still has in flight is nobody's yet
        assert cluster.pressed["a-0"] == (32, 0)
        yield [sharing.needs(one, wanted=100, held=6)]
        assert sharing.shares() == {two[0]: 2}
        yield [sharing.needs(one, wanted=100, held=4)]
        assert sharing.shares() == {two[0]: 4}
        yield [sharing.needs(two, wanted=100, held=4)]
        assert sharing.shares() == {}
        yield [sharing.needs(one, wanted=1, held=4)]  # drains
        assert sharing.shares() == {one[0]: 1}
        yield [sharing.needs(one, wanted=1, held=1)]
        assert sharing.shares() == {two[0]: 7}
        yield [EvaluatorLost(evaluator=one[0], reason="killed")]
        assert sharing.shares() == {two[0]: 8}
        yield from cluster.after(BACKOFF_S)
        again = cluster.running()["a/one"]
        assert sharing.shares() == {again[0]: 0}
        yield [done(*again)]
        yield [done(*two)]

    loop(a_plan(["a"], ["one", "two"], concurrency=8), script, evaluators=2)


class Walked(dict[str, Any]):
    """Counts how often all of it is looked at."""

    walks = 0

    def values(self) -> Any:
        self.walks += 1
        return super().values()


def test_words_of_cells_cost_no_look_at_all_cells_of_the_sweep(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluator says twice a second what it needs, and a sweep may have tens of thousands of cells."""
    begin, all_cells = Runner._begin, Walked()

    def watched(self: Runner) -> None:
        begin(self)
        all_cells.update(self._cells)
        self._cells = all_cells

    monkeypatch.setattr(Runner, "_begin", watched)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cell, sharing = cluster.running()["a/one"], Sharing(cluster)
        before = all_cells.walks
        yield []
        of_a_tick = all_cells.walks - before
        yield [sharing.needs(cell, wanted=wanted, held=0) for wanted in range(50)]
        assert all_cells.walks - before == 2 * of_a_tick
        yield [done(*cell)]

    loop(a_plan(["a"], ["one"]), script)


def test_a_limit_that_moves_is_followed_and_the_next_life_and_the_next_run_begin_with_it(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        cell, sharing = cluster.running()["a/one"], Sharing(cluster)
        assert cluster.controllers["a-0"].limit == 80  # a quarter of what is allowed in the end
        yield [sharing.needs(cell, wanted=1000, held=0)]
        assert sharing.shares() == {cell[0]: 80}
        yield [ServerLoad(life="a-0", load=Load(limit=320, settled=320))]
        assert sharing.shares() == {cell[0]: 320}
        yield [ServerLoad(life="a-0", load=Load(limit=60, settled=60, running=48, waiting=12))]
        assert sharing.shares() == {cell[0]: 60}
        yield [asks(*cell), sharing.needs(cell, wanted=1000, held=60, refused=3)]
        assert cluster.pressed["a-0"] == (240, 3)
        yield [ServerLost(life="a-0", reason="died"), ServerStopped(life="a-0")]
        yield from cluster.after(BACKOFF_S)
        yield [ServerLoad(life="a-0", load=Load(limit=1, settled=1)), cluster.ready("a-1")]
        assert cluster.controllers["a-1"].limit == 60
        yield [done(*cell)]

    def next_run(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        cell = cluster.running()["a/two"]
        yield [asks(*cell)]
        yield [cancelled(*cell)]
        yield [cluster.ready("a-0")]
        assert cluster.controllers["a-0"].limit == 60
        yield [done(*cluster.running()["a/two"])]

    loop(a_plan(["a"], ["one"]), script)
    assert msgspec.json.decode(RunDirectory(loop.folder).concurrency("a").read_bytes()) == {"concurrency": 60}
    shutil.rmtree(loop.folder / "records")
    loop(a_plan(["a"], ["two"]), next_run)


def test_a_number_of_the_users_is_the_limit_and_stays(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield [cluster.ready("a-0")]
        seen = Snapshot(
            running=1, waiting=9, kv_cache_use=1.0, preemptions=0, prompt_tokens=0, generation_tokens=0, finished=0
        )
        for second in range(1, 20):
            now = replace(seen, preemptions=second, prompt_tokens=9 * second, finished=second)
            assert cluster.controllers["a-0"].look(now_s=second, seen=now, wanted=99, refused=1) == 32
        yield [ServerLoad(life="a-0", load=cluster.controllers["a-0"].load)]
        yield [done(*cluster.running()["a/one"])]

    loop(a_plan(["a"], ["one"], concurrency=32), script)
    assert not RunDirectory(loop.folder).concurrency("a").exists()


# Ends that were asked for


def one_answer(run: ev.RunCell) -> ev.Answered:
    answer = Response(key=b"k", cell=run.cell.key, method="echo", answer=b"1")
    return ev.Answered.of([answer], cell=run.cell.key, attempt=run.attempt)


def stored(loop: Loop) -> int:
    with contextlib.closing(Store(RunDirectory(loop.folder))) as store:
        return store.count()


def test_a_stop_waits_for_the_answers_that_evaluators_hold(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        runs = cluster.running()
        yield [cluster.ready("a-0")]
        loop.stop.append(signal.SIGTERM)
        yield []
        assert {name for name, _ in cluster.taken(ev.CancelCell)} == {name for name, _ in runs.values()}
        (first, one), (second, two) = runs["a/s"], runs["a/t"]
        yield [done(second, two)]  # it was ready to say so
        yield [said(first, one_answer(one)), cancelled(first, one)]

    records = loop(a_plan(["a"], ["s", "t"]), script, evaluators=2)
    assert statuses(records) == {"a/t": "done"}
    assert loop.ended == (signal.SIGTERM, False)
    assert stored(loop) == 1


def test_an_evaluator_that_does_not_listen_holds_up_a_stop_for_a_moment_only(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sweep.running.runner.KEEP_S", 0.2)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert cluster.running()
        loop.stop.append(signal.SIGINT)
        while True:
            yield []

    assert loop(a_plan(["a"], ["t"]), script) == {}
    assert loop.ended == (signal.SIGINT, False)


def at(seconds: float) -> Walltime:
    """An end so long after the beginning of a script."""
    return Walltime(end_s=1000.0 + LEAVE_S + seconds)


def test_no_server_is_started_that_would_not_pay_and_what_runs_goes_on(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        assert cluster.started == ["a-0"]
        yield from cluster.after(100)
        yield [cluster.ready("a-0")]
        yield from cluster.after(300)
        yield [done(name, run)]  # 10 s are left for b
        assert cluster.stopped == ["a-0"]
        yield [ServerStopped(life="a-0")]

    records = loop(a_plan(["a", "b"], ["t"]), script, walltime=at(410))
    assert statuses(records) == {"a/t": "done"}
    assert loop.ended == (0, True)


def test_a_server_is_started_while_its_start_leaves_as_much_time_for_work(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        assert cluster.started == ["a-0"]
        yield [cluster.ready("a-0")]
        yield [done(*cluster.running()["a/t"])]

    plan = a_plan(["a"], ["t"])
    expected_s = start_s(plan.servers["a"], on_cpu=True)
    assert statuses(loop(plan, script, walltime=at(2 * expected_s))) == {"a/t": "done"}
    assert loop.ended == (0, False)


def test_a_start_that_does_not_pay_leaves_its_place_to_one_that_does(loop: Loop) -> None:
    plan = a_plan(["large", "small"], ["t"])
    sizes = {"large": "org/x-70B", "small": "org/x-1B"}
    servers = {name: replace(s, model=replace(s.model, path=sizes[name])) for name, s in plan.servers.items()}
    large_s, small_s = (start_s(servers[name], on_cpu=True) for name in sizes)
    assert 2 * small_s < large_s

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        yield []
        assert cluster.started == ["small-0"]
        yield [cluster.ready("small-0")]
        yield [done(*cluster.running()["small/t"])]
        yield [ServerStopped(life="small-0")]

    assert statuses(loop(replace(plan, servers=servers), script, walltime=at(large_s))) == {"small/t": "done"}
    assert loop.ended == (0, True)


def test_a_walltime_in_which_nothing_pays_ends_at_once(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        raise AssertionError(f"it goes on: {cluster.started}")

    assert loop(a_plan(["a"], ["t"]), script, walltime=at(20)) == {}
    assert loop.ended == (0, True)


def test_the_end_of_the_walltime_stops_what_runs_and_keeps_its_answers(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, run = cluster.running()["a/t"]
        yield [cluster.ready("a-0")]
        yield from cluster.after(500)
        assert cluster.taken(ev.CancelCell) == [(name, ev.CancelCell(reason="the sweep is stopped"))]
        yield [said(name, one_answer(run)), cancelled(name, run)]

    assert loop(a_plan(["a"], ["t"]), script, walltime=at(500)) == {}
    assert loop.ended == (0, True)
    assert stored(loop) == 1


def test_a_start_that_was_slow_is_expected_to_be_so_again(loop: Loop) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        ((name, _),) = cluster.running().values()
        yield from cluster.after(400)
        yield [cluster.ready("a-0")]
        lost = ServerLost(life="a-0", reason="was killed"), ServerStopped(life="a-0")
        yield [*lost, EvaluatorLost(evaluator=name, reason="killed too")]
        yield from cluster.after(LONGEST_REST_S)
        name, run = cluster.running()["a/t"]  # stored answers may suffice
        yield [asks(name, run)]
        assert cluster.taken(ev.CancelCell)
        yield [cancelled(name, run)]
        assert cluster.started == ["a-0"]  # another would be ready when everything ends

    assert loop(a_plan(["a"], ["t"]), script, walltime=at(900)) == {}
    assert loop.ended == (0, True)


def test_a_store_that_cannot_be_written_ends_the_loop(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, responses: object) -> None:
        raise StoreError("write 1 responses: disk full")

    monkeypatch.setattr(Store, "put", full)

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield from cluster.checks_pass()
        name, _ = cluster.running()["a/t"]
        yield [said(name, ev.Answered.of([], cell="a/t", attempt=1))]

    with pytest.raises(StoreError, match="disk full"):
        loop(a_plan(["a"], ["t"]), script)


# Whole sweeps


STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_server.py"))]
LAUNCH_S = 150.0
GONE_S = 15.0
"""What a killed driver leaves behind is gone by then."""

PAIRS, EXPORTS, STORIES, LATER = 20, 80, 3, 5
"""Documents of each task."""


def task_yaml(name: str, data: Path, kind: str, **more: Any) -> dict[str, Any]:
    metric = {"multiple_choice": "acc", "generate_until": "exact_match", "loglikelihood_rolling": "byte_perplexity"}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": kind,
        "num_fewshot": 0,
        "metric_list": [{"metric": metric[kind]}],
        **more,
        "metadata": {"version": 1.0},
    }


def write_tasks(folder: Path, data: Path) -> None:
    """One task of each kind, and `missing`, whose data is not there: `write_missing` makes it."""
    folder.mkdir()
    data.mkdir()
    write_rows(data / "exports.jsonl", [{"q": export(i)} for i in range(EXPORTS)])
    write_rows(data / "pairs.jsonl", [question("river", i) for i in range(PAIRS)])
    write_rows(data / "stories.jsonl", [{"text": f"Once upon a time {i} foxes met. " * 30} for i in range(STORIES)])
    asked = {"doc_to_text": "Question: {{q}}\nAnswer:"}
    choice = {**asked, "doc_to_choice": "{{options}}", "doc_to_target": 0}
    until = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    tasks = [
        task_yaml(
            "exports",
            data / "exports.jsonl",
            "generate_until",
            **asked,
            doc_to_target="{{q}}",
            generation_kwargs=until,
        ),
        task_yaml("pairs", data / "pairs.jsonl", "multiple_choice", **choice),
        task_yaml("stories", data / "stories.jsonl", "loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}"),
        task_yaml("missing", data / "missing.jsonl", "multiple_choice", **choice),
    ]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


def write_missing(data: Path) -> None:
    write_rows(data / "missing.jsonl", [question("lake", i) for i in range(LATER)])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def export(number: int) -> str:
    return f"What does land {number} sell?"


def question(what: str, number: int) -> dict[str, Any]:
    """Options of several tokens, so that each is a request of its own."""
    return {
        "q": f"Which town lies on {what} {number}?",
        "options": [f"North {number} town", "the old one", f"{number} or more"],
    }


@dataclass(frozen=True, kw_only=True)
class Ended:
    """One launch that is over."""

    code: int
    output: str
    log: str
    """What this launch wrote to driver.log."""
    asked: list[dict[str, Any]]
    """Bodies of the completion requests that servers got, without preflight's."""
    wall_s: float


@dataclass
class Bench:
    """One sweep's file and run directory, launched as often as a test wants."""

    folder: Path
    settings: dict[str, Any]
    """Of the sweep file; changed between launches."""
    environment: dict[str, str]
    """Added to the launch's; reaches every process that it starts."""

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.mark = uuid.uuid4().hex
        self.directory = RunDirectory(self.folder / "runs" / "sweep")
        self.requests = self.folder / "requests.jsonl"

    def start(self, *arguments: str, in_terminal: bool = False) -> "Launch":
        path = self.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump({"name": "sweep", "runs_dir": str(self.folder / "runs"), **self.settings}))
        return Launch(self, [f"conf={path}", *arguments], in_terminal=in_terminal)

    def run(self, *arguments: str) -> Ended:
        return self.start(*arguments).end()

    def processes(self) -> list[psutil.Process]:
        """Everything that launches of this bench have started and that is still there, drivers and Ray included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SWEEP_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def evaluator(self, name: str) -> psutil.Process | None:
        """The child process behind an evaluator, not its supervisor."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line[1:4] == ["-P", "-m", "sweep.evaluating.evaluator"] and line[-1] == name:
                    return process
        return None

    def server(self, name: str) -> psutil.Process | None:
        """The engine process that serves a model, not its supervisor."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                line = process.cmdline()
                if line[1:2] == STAND_IN[1:] and line[line.index("--served-model-name") + 1] == name:
                    return process
        return None

    def stored(self) -> int:
        """Responses that are durable now."""
        if not self.directory.responses.exists():
            return 0
        with contextlib.closing(sqlite3.connect(f"file:{self.directory.responses}?mode=ro", uri=True)) as database:
            try:
                (count,) = database.execute("SELECT count(*) FROM responses").fetchone()
            except sqlite3.OperationalError:
                return 0  # the table is being made
        return int(count)

    def records(self) -> dict[str, Record]:
        return {f"{model}/{task}": record for (model, task), record in read_records(self.directory).items()}

    def scores(self) -> dict[str, list[tuple[str, str, float]]]:
        return {key: [(s.metric, s.filter, s.value) for s in r.scores] for key, r in self.records().items()}

    def nothing_is_left(self, within_s: float = GONE_S) -> None:
        until(lambda: not self.processes(), within_s, lambda: f"still there: {[p.cmdline() for p in self.processes()]}")

    def bodies(self) -> list[dict[str, Any]]:
        if not self.requests.exists():
            return []
        lines = [json.loads(line)["body"] for line in self.requests.read_text().splitlines()]
        bodies = [each for line in lines for each in by_prompt(line)]
        # Preflight's prompts count upwards, which no text does.
        return [b for b in bodies if b["prompt"][:8] != list(range(b["prompt"][0], b["prompt"][0] + 8))]


class Screen:
    """A terminal in which a launch runs; what it shows goes to a file until it is closed."""

    def __init__(self, output: IO[str]) -> None:
        self._ours, self.theirs = os.openpty()
        self._output = output
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while not self._closing.is_set():
            if select.select([self._ours], [], [], 0.05)[0]:
                self._output.buffer.write(os.read(self._ours, 65536))
                self._output.flush()

    def close(self) -> None:
        """The kernel sends SIGHUP, and from then on no write succeeds."""
        self._closing.set()
        self._reader.join()  # the terminal is there as long as someone reads it
        os.close(self._ours)


class Launch:
    """`python launch.py` while it runs, in a process group of its own as from a shell, or in a terminal of its own."""

    def __init__(self, bench: Bench, arguments: list[str], *, in_terminal: bool) -> None:
        self._bench = bench
        self._asked_before = len(bench.bodies())
        self._log_before = self._log_size()
        self._output = (bench.folder / "output.txt").open("w+")
        self.screen = Screen(self._output) if in_terminal else None
        output = self.screen.theirs if self.screen else self._output
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "STAND_IN_"))}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "launch.py", *arguments],
            cwd=ROOT,
            env={
                **kept,
                "LMSWEEP_ENGINE": shlex.join(STAND_IN),
                "STAND_IN_REQUESTS_LOG": str(bench.requests),
                "SWEEP_TEST": bench.mark,
                "HF_HUB_OFFLINE": "1",
                **bench.environment,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(1, termios.TIOCSCTTY, 0)) if self.screen else None,
        )
        if self.screen:
            os.close(self.screen.theirs)
        else:
            self._output.close()  # the launch has its own

    def close_terminal(self) -> None:
        assert self.screen is not None
        self.screen.close()

    def _log_size(self) -> int:
        path = self._bench.directory.driver_log
        return path.stat().st_size if path.exists() else 0

    def log(self) -> str:
        path = self._bench.directory.driver_log
        return path.read_text()[self._log_before :] if path.exists() else ""

    def output(self) -> str:
        return (self._bench.folder / "output.txt").read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something in the middle of the sweep."""

        def true_or_over() -> object:
            return condition() or self.process.poll() is not None

        until(true_or_over, LAUNCH_S, lambda: f"{what} did not happen\n{self.output()}\n{self.log()}")
        assert self.process.poll() is None, f"it ended before {what}\n{self.output()}\n{self.log()}"

    def end(self) -> Ended:
        code = self.process.wait(LAUNCH_S)
        wall_s = time.monotonic() - self.started
        self._output.close()
        return Ended(
            code=code,
            output=self.output(),
            log=self.log(),
            asked=self._bench.bodies()[self._asked_before :],
            wall_s=wall_s,
        )


def until(condition: Callable[[], object], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(what())
        time.sleep(0.05)


@dataclass(frozen=True)
class Made:
    """What sweeps need, made once."""

    folder: Path

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def first(self) -> Path:
        return self.folder / "first"

    def model(self, name: str, *, chat: bool = True) -> str:
        """A checkpoint with weights of its own, as the sweep sees it; models of equal weights share answers."""
        path = self.folder / name
        if not path.exists():
            shutil.copytree(self.first, path)
            (path / "name.txt").write_text(name)
            if not chat:
                settings = json.loads((path / "tokenizer_config.json").read_text())
                settings.pop("chat_template", None)
                (path / "tokenizer_config.json").write_text(json.dumps(settings))
                (path / "chat_template.jinja").unlink(missing_ok=True)
        return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("made"))
    code = "import sys; from pathlib import Path; from sweep.demo import untrained; untrained(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(made.first)], cwd=ROOT, check=True)
    write_tasks(made.tasks, made.data)
    return made


OpenBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def benches(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBench]:
    opened: list[Bench] = []

    def open_bench(models: dict[str, Any], tasks: list[str], **environment: str) -> Bench:
        settings = {
            "defaults": {"model": {"device": "cpu", "max_model_len": 512, "concurrency": 4}},
            "models": models,
            "tasks": {name: {"include_path": str(made.tasks)} for name in tasks},
            "wandb": {"mode": "disabled"},
            "ray": {"evaluators": 1, "cpu_servers": 1},
        }
        opened.append(Bench(tmp_path_factory.mktemp("bench") / "b", settings, environment))
        return opened[-1]

    yield open_bench
    for bench in opened:
        for process in bench.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A sweep in which something of each kind is wrong, and what came of it after that was put right."""

    bench: Bench
    wrong: Ended
    after_wrong: dict[str, Record]
    right: Ended


@pytest.fixture(scope="module")
def mixed(made: Made, benches: OpenBench, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    mark = tmp_path_factory.mktemp("marks") / "port-lost"
    bench = benches(
        {
            "alpha": {"path": made.model("alpha"), "env": {"STAND_IN_LOSE_PORT": str(mark)}},
            "base": {"path": made.model("base"), "adapters": {"one": made.model("one")}},
            "refuser": {"path": made.model("refuser"), "env": {"STAND_IN_REFUSE": "RuntimeError: CUDA out of memory"}},
            "chatty": {"path": made.model("chatty", chat=False), "chat": True},
        },
        ["exports", "pairs", "stories", "missing"],
    )
    wrong = bench.run()
    after_wrong = bench.records()
    del bench.settings["models"]["refuser"]["env"]
    del bench.settings["models"]["chatty"]["chat"]
    write_missing(made.data)
    return Mixed(bench=bench, wrong=wrong, after_wrong=after_wrong, right=bench.run())


MODELS = ("alpha", "base", "base-one", "refuser", "chatty")
TASKS = ("exports", "pairs", "stories", "missing")


@pytest.mark.ray
def test_what_is_wrong_costs_its_own_cells_and_the_others_are_done(mixed: Mixed) -> None:
    assert mixed.wrong.code == 1, mixed.wrong.output
    expected = {
        f"{model}/{task}": (
            "load task missing: FileNotFoundError: Unable to find"
            if task == "missing"
            else {
                "refuser": "refuser-0 did not start: out of memory while loading",
                "chatty": "model chatty has `chat: true`, but the tokenizer in",
            }.get(model)
        )
        for model in MODELS
        for task in TASKS
    }
    if expected["chatty/missing"]:  # which of its two faults is met first is open
        expected["chatty/missing"] = ""
    assert mixed.after_wrong.keys() == expected.keys()
    for key, begins in expected.items():
        record = mixed.after_wrong[key]
        assert (record.status is Status.DONE) == (begins is None), (key, record.error)
        assert (record.error or "").startswith(begins or ""), (key, record.error)
        # Said once while it ran and once in the list at the end.
        assert mixed.wrong.output.count(f"FAILED {key}: ") == (begins is not None), mixed.wrong.output


@pytest.mark.ray
def test_all_checks_come_before_the_first_server(mixed: Mixed) -> None:
    found = mixed.wrong.log.index("alpha/missing failed")
    template = mixed.wrong.log.index("chatty/exports failed")
    assert max(found, template) < mixed.wrong.log.index("start server ")


@pytest.mark.ray
def test_more_models_than_server_slots_take_turns(mixed: Mixed) -> None:
    lives = re.findall(r"runner: (start|stop) server (\S+?)(?: on \S+)?: ", mixed.wrong.log)
    assert lives == [
        ("start", "base-0"),  # with its adapter, so it has the most to do
        ("stop", "base-0"),
        ("start", "alpha-0"),
        ("stop", "alpha-0"),
        ("start", "refuser-0"),
    ]
    assert set(re.findall(r"runner: run \S+ on (\S+),", mixed.wrong.log)) == {"evaluator.0"}


@pytest.mark.ray
def test_an_adapter_is_served_beside_its_base_and_scores_on_its_own(mixed: Mixed) -> None:
    scores = mixed.bench.scores()
    assert scores["base/stories"] != scores["base-one/stories"]


@pytest.mark.ray
def test_a_port_taken_by_a_stranger_costs_a_second_attempt_only(mixed: Mixed) -> None:
    tries = re.findall(r"^\$ .*--port (\d+)", mixed.bench.directory.server_log("alpha-0").read_text(), re.MULTILINE)
    assert len(tries) >= 2
    assert tries[0] != tries[1]


@pytest.mark.ray
def test_the_same_command_does_only_what_is_owed(mixed: Mixed) -> None:
    assert mixed.right.code == 0, mixed.right.output
    records = mixed.bench.records()
    assert {record.status for record in records.values()} == {Status.DONE}
    kept = {key: record for key, record in mixed.after_wrong.items() if record.status is Status.DONE}
    assert len(kept) == 9
    assert {key: records[key] for key in kept} == kept
    asked = Counter(body["model"] for body in mixed.right.asked)
    everything = EXPORTS + 3 * PAIRS + records["refuser/stories"].counts.requests + 3 * LATER
    assert asked == {
        "alpha": 3 * LATER,
        "base": 3 * LATER,
        "base-one": 3 * LATER,
        "refuser": everything,
        "chatty": everything,
    }


@pytest.mark.ray
def test_a_finished_sweep_launched_again_starts_nothing(mixed: Mixed, tmp_path: Path) -> None:
    mixed.bench.environment["RAY_TMPDIR"] = str(tmp_path / "ray")
    ended = mixed.bench.run()
    del mixed.bench.environment["RAY_TMPDIR"]
    assert ended.code == 0, ended.output
    assert "all 20 cells are done" in ended.output
    assert "|alpha" in ended.output.replace(" ", "")
    assert not ended.log
    assert not (tmp_path / "ray").exists()
    assert ended.wall_s < 10  # 2 s where nothing else runs


@pytest.mark.ray
def test_one_cell_runs_again_from_its_stored_answers_without_a_server(mixed: Mixed) -> None:
    before = mixed.bench.records()["alpha/pairs"]
    ended = mixed.bench.run("only=alpha/pairs")
    assert ended.code == 0, ended.output
    assert not ended.asked
    assert "start server" not in ended.log
    after = mixed.bench.records()["alpha/pairs"]
    assert after.scores == before.scores
    assert (after.counts.asked, after.counts.reused) == (0, 3 * PAIRS)
    assert after.started_at > before.started_at
    mixed.bench.nothing_is_left()


# Interruptions


IN_FLIGHT = 4
SENT_S = 1.0
"""Longest way of an answer from the server to the disk: half a second until it leaves the evaluator, and the loop's."""

LATENCY_S = 0.5
ASKED_TWICE_MOST = round(IN_FLIGHT + IN_FLIGHT * SENT_S / LATENCY_S)
"""At an interruption: what is in flight, and what has been answered and is not durable yet."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A launch that was ended in the middle of a cell."""

    ended: Ended
    stored_before: int
    """Responses that were durable when it began."""
    known_before: set[bytes]
    """Their keys."""
    stored_after: int
    port: int
    """Of the server that was up."""
    was_up: set[str]
    """What ran beside the driver."""


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    bench: Bench
    stops: dict[str, Stopped]
    last: Stopped
    """Comes to its end, although its server and its evaluator are killed, and another model's server dies always."""


def keys(bench: Bench) -> set[bytes]:
    if not bench.directory.responses.exists():
        return set()
    with contextlib.closing(sqlite3.connect(bench.directory.responses)) as database:
        return {key for (key,) in database.execute("SELECT key FROM responses")}


def stop_in_the_middle(
    bench: Bench, stop: Callable[[Launch], None], *, after: int = 8, in_terminal: bool = False
) -> Stopped:
    """Launch, wait until so many more answers are durable, `stop` it and see that nothing is left."""
    known = keys(bench)
    launch = bench.start(in_terminal=in_terminal)
    launch.until(lambda: bench.stored() >= len(known) + after, "some answers were stored")
    was_up = {kind for process in bench.processes() if (kind := kind_of(process))}
    stop(launch)
    ended = launch.end()
    bench.nothing_is_left()
    return Stopped(
        ended=ended,
        stored_before=len(known),
        known_before=known,
        stored_after=bench.stored(),
        port=int(re.findall(r"is ready at http://127\.0\.0\.1:(\d+)", ended.log)[-1]),
        was_up=was_up,
    )


def kind_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):
        line = shlex.join(process.cmdline())
        for kind, sign in {
            "raylet": "raylet/raylet",
            "evaluator": "sweep.evaluating.evaluator",
            "supervisor": "supervisor.py",
            "server": STAND_IN[1],
            "tracking": "sweep.results.mirror",
        }.items():
            if sign in line:
                return kind
    return None


@pytest.fixture(scope="module")
def interrupted(made: Made, benches: OpenBench) -> Interrupted:
    bench = benches({"alpha": {"path": made.model("alpha")}}, ["exports", "pairs"], STAND_IN_LATENCY_S=str(LATENCY_S))
    stops = {"SIGKILL": stop_in_the_middle(bench, lambda launch: launch.process.kill())}
    bench.settings["wandb"] = {"mode": "offline"}
    # To all of its process group, as `timeout` does and Ctrl-C.
    stops["SIGTERM"] = stop_in_the_middle(bench, lambda launch: os.killpg(launch.process.pid, signal.SIGTERM))
    stops["SIGINT"] = stop_in_the_middle(bench, lambda launch: os.killpg(launch.process.pid, signal.SIGINT))
    stops["SIGHUP"] = stop_in_the_middle(bench, Launch.close_terminal, in_terminal=True)
    bench.settings["wandb"] = {"mode": "disabled"}
    bench.settings["models"]["doomed"] = {"path": made.model("doomed"), "env": {"STAND_IN_DIE_AFTER": "197"}}
    bench.settings["ray"] = {"evaluators": 2, "cpu_servers": 2}

    def kill_a_server_and_an_evaluator(launch: Launch) -> None:
        kill(bench.server("alpha"))
        launch.until(lambda: "server alpha-1 is ready" in launch.log(), "the server was replaced")
        stored = bench.stored()
        launch.until(lambda: bench.stored() >= stored + 8, "more answers were stored")
        busy = re.findall(r"run alpha/\S+ on (\S+), attempt", launch.log())[-1]
        kill(bench.evaluator(busy))

    return Interrupted(bench=bench, stops=stops, last=stop_in_the_middle(bench, kill_a_server_and_an_evaluator))


def kill(process: psutil.Process | None) -> None:
    assert process is not None
    process.kill()


@pytest.mark.ray
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_stopped_launch_keeps_its_answers_and_leaves_nothing_running(
    interrupted: Interrupted, name: str, code: int
) -> None:
    stopped = interrupted.stops[name]
    assert stopped.was_up >= {"raylet", "evaluator", "supervisor", "server"}
    assert ("tracking" in stopped.was_up) == (name != "SIGKILL")
    assert stopped.ended.code == code, stopped.ended.output
    assert "Traceback" not in stopped.ended.output
    assert stopped.stored_after >= stopped.stored_before + 8
    assert f"{stopped.stored_before} responses stored" in stopped.ended.log
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", stopped.port)) != 0
    if name not in ("SIGKILL", "SIGHUP"):  # nobody hears the last words of what ran in a closed terminal
        assert "the same command goes on where it stopped" in stopped.ended.output


@pytest.mark.ray
def test_nothing_durable_is_asked_again(interrupted: Interrupted, made: Made) -> None:
    """By key: the generation requests of each launch against what was durable when it began."""
    tokenizer = Tokenizer.from_file(str(made.first / "tokenizer.json"))
    prompts = [f"Question: {export(i)}\nAnswer:" for i in range(EXPORTS)]
    text_by_ids = {tuple(tokenizer.encode(text, add_special_tokens=False).ids): text for text in prompts}
    fingerprint = json.loads((interrupted.bench.directory.servers / "alpha.json").read_text())["of"][0]

    def key(body: Mapping[str, Any]) -> bytes:
        parameters = {name: value for name, value in body.items() if name not in ("model", "prompt")}
        return response_key(fingerprint, "generate", [text_by_ids[tuple(body["prompt"])], parameters])

    launches = [*interrupted.stops.values(), interrupted.last]
    seen = 0
    for launch in launches:
        mine = [body for body in launch.ended.asked if body["model"] == "alpha" and "stop" in body]
        assert not {key(body) for body in mine} & launch.known_before
        seen += len(mine)
    assert {key(body) for launch in launches for body in launch.ended.asked if "stop" in body} <= keys(
        interrupted.bench
    )
    # Four ended drivers, a server and an evaluator.
    assert EXPORTS <= seen <= EXPORTS + 6 * ASKED_TWICE_MOST


@pytest.mark.ray
def test_the_metrics_are_those_of_an_undisturbed_run(interrupted: Interrupted, mixed: Mixed) -> None:
    mine, undisturbed = interrupted.bench.scores(), mixed.bench.scores()
    for cell in ("alpha/exports", "alpha/pairs"):
        assert mine[cell]
        assert mine[cell] == undisturbed[cell]
    record = interrupted.bench.records()["alpha/exports"]
    assert record.counts.requests == EXPORTS == record.counts.asked + record.counts.reused


@pytest.mark.ray
def test_a_killed_server_is_replaced_and_a_killed_evaluators_cell_is_finished_by_another(
    interrupted: Interrupted,
) -> None:
    log = interrupted.last.ended.log
    assert "server alpha-0 was lost: was killed by SIGKILL" in log
    assert re.search(r"evaluator\.\d was lost: its process ended", log)
    attempts = re.findall(r"run (alpha/\S+) on (\S+), attempt (\d)", log)
    twice = [cell for cell, _, attempt in attempts if attempt == "2"]
    assert twice
    assert {r.status for key, r in interrupted.bench.records().items() if key.startswith("alpha/")} == {Status.DONE}


@pytest.mark.ray
def test_a_model_whose_server_dies_always_fails_alone_with_the_reason(interrupted: Interrupted) -> None:
    ended = interrupted.last.ended
    assert ended.code == 1, ended.output
    assert "server doomed-0 is ready" in ended.log  # it dies at work: preflight asks 190 completions of its 197
    assert [life for life in re.findall(r"start server (\S+) on ", ended.log) if "doomed" in life] == [
        f"doomed-{i}" for i in range(LOSSES_MOST)
    ]
    for task in ("exports", "pairs"):
        record = interrupted.bench.records()[f"doomed/{task}"]
        assert record.status is Status.FAILED
        last = f"doomed-{LOSSES_MOST - 1}"
        assert re.match(
            rf"crash loop: lost {LOSSES_MOST} times in a row \(logs: .*doomed-\*\.log\), "
            rf"last: {last} exited with code 1 \(see .*{last}\.log\)",
            str(record.error),
        )


# W&B's Report


@dataclass
class Told:
    """A tracker that keeps what the Report would be made of."""

    online: bool
    shows: bool = True
    texts: list[Any] = field(default_factory=list)

    def report(self, recipe: Any, *, share_link: bool) -> None:
        self.texts.append(recipe["texts"])


@pytest.mark.parametrize(
    ("online", "looks_left", "texts"),
    [(True, 9, [{"cells": "1"}]), (False, 9, [{}]), (True, 0, []), (True, 1, [])],
    ids=["online", "offline", "over at once", "over in the middle"],
)
def test_the_report_costs_no_time_that_is_not_there(
    tmp_path: Path, online: bool, looks_left: int, texts: list[Any]
) -> None:
    config = SweepConfig(
        name="night",
        models={"small": Model(path="org/small")},
        tasks={"gsm8k": Task(task="gsm8k")},
        runs_dir=str(tmp_path),
        wandb=WandbConfig(),
    )
    directory = carried_out(config, GSM8K)
    looks = iter([False] * looks_left)

    def chapters(sweep: Sweep) -> dict[str, str]:
        assert online
        return {"cells": str(sum(1 for record in sweep.records if list(sweep.outcomes(record))))}

    told = Told(online=online)
    store: Any = SimpleNamespace(directory=directory)
    make_report(told, config, store, chapters, lambda: next(looks, True))  # type: ignore[arg-type]
    assert told.texts == texts
