"""The `check` command: its table, its course on a scripted cluster, and as a user starts it on Ray."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import yaml
from doubles import STAND_IN, stand_in

from sweep.checkup import Checkup, table
from sweep.evaluating import evaluator as ev
from sweep.evaluating.preflight import Check, Expected, Facts, Outcome
from sweep.evaluating.scoring import Method
from sweep.planning.config import Device, Model, Seeds, Task
from sweep.planning.plan import Cell, ModelPlan, Plan, ServerPlan
from sweep.results.store import RunDirectory
from sweep.running.cluster import (
    Cluster,
    ClusterEvent,
    EvaluatorLost,
    EvaluatorSaid,
    ServerFailed,
    ServerLost,
    ServerReady,
    ServerStopped,
)
from sweep.running.inventory import Node
from sweep.serving.server import Endpoint

ROOT = Path(__file__).parent.parent

KEY = "a-key-from-the-environment-4711"

PASSED, NOTED, FAILED = Outcome.PASSED, Outcome.NOTED, Outcome.FAILED


def seen(model: str, name: str, outcome: Outcome = PASSED, detail: str = "fine") -> Check:
    return Check(model=model, name=name, outcome=outcome, detail=detail)


# The table


def test_a_table_has_a_line_for_each_check_and_stands_models_apart() -> None:
    checks = [seen("a", "key"), seen("a", "echo", NOTED), seen("long-name", "tokenizer", FAILED, "asked x\ngot y")]
    assert table(checks).splitlines() == [
        "a          key        passed  fine",
        "           echo       noted   fine",
        "",
        "long-name  tokenizer  FAILED  asked x",
        "                              got y",
    ]
    assert table([]) == "\n"


def test_long_details_are_wrapped_beside_their_check_on_a_terminal() -> None:
    lines = table([seen("a", "key", FAILED, "word " * 40)], 80).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80
    assert all(line.startswith(" " * len("a  key  FAILED  ")) for line in lines[1:])


# The course, on a scripted cluster


def a_plan(servers: Mapping[str, list[str]], **model: Any) -> Plan:
    """Servers with the models behind them, on the CPU unless `model` says else."""
    settings = Model(**{"path": "/x", "device": Device.CPU, "max_model_len": 512, **model})
    models = {
        name: ModelPlan(name=name, model=settings, revision=None, fingerprint=name, server=server)
        for server, names in servers.items()
        for name in names
    }
    return Plan(
        models=models,
        servers={
            server: ServerPlan(
                name=server,
                model=settings,
                revision=None,
                adapters={name: None if name == server else "lora" for name in names},
                gpus=0.0 if settings.url else 1.0,
                replicas=1,
            )
            for server, names in servers.items()
        },
        cells=tuple(
            Cell(model=plan, task_name="t", task=Task(task="t"), seeds=Seeds(), fingerprint=name)
            for name, plan in models.items()
        ),
        done={},
    )


class ScriptedCluster:
    """What a check asks of a cluster, noted; what happens there is written by the test."""

    def __init__(self, script: "Script", *, cpu_servers: int, gpus: float) -> None:
        self.inventory = (Node(name="n", gpus=gpus, cpu_servers=cpu_servers, evaluators=1),)
        self.asked: list[str] = []
        """Models whose tokenizers are to be loaded."""
        self.started: dict[str, Mapping[str, Expected]] = {}
        self.stopped: list[str] = []
        self._script = script(self)
        self._settling = False

    def start_evaluator(self, name: str, log_path: Path, *, node: str | None) -> None:
        assert name == "evaluator"

    def send(self, evaluator: str, message: ev.CheckModel) -> None:
        self.asked.append(message.model.name)

    def start_server(
        self, plan: ServerPlan, life: str, log_path: Path, expected: Mapping[str, Expected], *, nodes: Sequence[str]
    ) -> None:
        self.started[life] = expected

    def stop_server(self, life: str) -> None:
        assert life not in self.stopped
        self.stopped.append(life)

    def events(self, timeout_s: float) -> list[ClusterEvent]:
        # What follows from one step of a script is decided before the next.
        self._settling = not self._settling
        if self._settling:
            return []
        try:
            return next(self._script)
        except StopIteration:
            raise AssertionError(f"the script is over and the check is not: {self.started}, {self.stopped}") from None


Script = Callable[[ScriptedCluster], Iterator[list[ClusterEvent]]]


def loaded(model: str, error: str | None = None) -> EvaluatorSaid:
    token_ids = () if error else ((len(model),),)
    return EvaluatorSaid(evaluator="evaluator", event=ev.Checked(model=model, token_ids=token_ids, error=error))


def ready(life: str, *models: str) -> ServerReady:
    endpoint = Endpoint(server=life, url="http://x", api_key=KEY, max_model_len=512, engine_version="1")
    checks = tuple(seen(model, name) for model in models for name in ("key", "tokenizer"))
    facts = Facts(max_model_len=512, engine_version="1", methods=(Method.ECHO,), checks=checks)
    return ServerReady(life=life, endpoint=endpoint, facts=facts)


def run(
    plan: Plan, script: Script, tmp_path: Path, *, cpu_servers: int = 1, gpus: float = 0, stop: list[int] | None = None
) -> tuple[list[Check], int]:
    cluster = ScriptedCluster(script, cpu_servers=cpu_servers, gpus=gpus)
    directory = RunDirectory(tmp_path / "runs" / "x")
    checkup = Checkup(plan=plan, cluster=cast(Cluster, cluster), directory=directory, secrets=(KEY,))
    number = checkup.run(stop if stop is not None else [])
    return checkup.found, number


def test_tokenizers_come_first_then_each_server_as_capacity_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield []
        assert (cluster.asked, cluster.started) == (["a", "a-lora", "b"], {})
        yield [loaded("a")]
        assert not cluster.started  # its adapter may have another
        yield [loaded("a-lora"), loaded("b")]
        assert cluster.started == {
            "a-0": {
                "a": Expected(served_name="a", max_model_len=512, token_ids=((1,),)),
                "a-lora": Expected(served_name="a-lora", max_model_len=512, token_ids=((6,),)),
            }
        }
        yield [ready("a-0", "a", "a-lora")]
        assert cluster.stopped == ["a-0"]
        yield []
        assert "b-0" not in cluster.started  # its slot is not free yet
        yield [ServerStopped(life="a-0")]
        yield [ready("b-0", "b")]
        yield [ServerStopped(life="b-0")]

    found, number = run(a_plan({"a": ["a", "a-lora"], "b": ["b"]}), script, tmp_path)
    assert number == 0
    assert [(check.model, check.name) for check in found] == [
        (model, name) for model in ("a", "a-lora", "b") for name in ("key", "tokenizer")
    ]
    assert "a-0 at http://x (vLLM 1) has been asked" in capsys.readouterr().out


def test_what_shares_a_gpu_or_runs_elsewhere_is_asked_at_the_same_time(tmp_path: Path) -> None:
    plan = a_plan({"a": ["a"], "b": ["b"]}, device=Device.GPU)
    outside = a_plan({"u": ["u"]}, path="", url="http://x", served_model_name="org/u", tokenizer="org/t")
    plan = Plan(
        models={**plan.models, **outside.models},
        servers={**plan.servers, **outside.servers},
        cells=(*plan.cells, *outside.cells),
        done={},
    )

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield [loaded("a"), loaded("b"), loaded("u")]
        assert list(cluster.started) == ["a-0", "b-0", "u-0"]
        assert cluster.started["u-0"]["u"].served_name == "org/u"
        yield [ready("a-0", "a"), ready("b-0", "b"), ready("u-0", "u")]
        yield [ServerStopped(life=life) for life in cluster.started]

    found, _ = run(plan, script, tmp_path, gpus=2, cpu_servers=0)
    assert {check.outcome for check in found} == {PASSED}


def test_a_server_that_fails_costs_its_models_only_and_is_shown_as_far_as_it_was_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield [loaded(model) for model in cluster.asked]
        checks = (seen("a", "key"), seen("a", "echo", FAILED, "asked x"))
        yield [ServerFailed(life="a-0", error="a-0 is refused", checks=checks)]
        yield [ServerFailed(life="b-0", error=f"b-0 did not start: {KEY}\ntail", passing=True)]
        yield [ready("c-0", "c")]
        yield [ServerLost(life="c-0", reason="died"), ServerStopped(life="c-0")]

    found, number = run(a_plan({"a": ["a"], "b": ["b"], "c": ["c"]}), script, tmp_path)
    assert number == 0
    assert [(check.model, check.name, check.outcome) for check in found if check.outcome is FAILED] == [
        ("a", "echo", FAILED),
        ("b", "start", FAILED),
    ]
    assert found[2].detail == f"b-0 did not start: {KEY}\ntail\nA run would try again."
    shown = capsys.readouterr().out
    assert "a-0 is refused" in shown
    assert "b-0 did not start" in shown
    assert KEY not in shown


def test_a_tokenizer_that_is_not_there_fails_beside_what_the_server_says(tmp_path: Path) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield [loaded("a", "load the tokenizer of a: no such folder")]
        assert cluster.started["a-0"]["a"].token_ids == ()
        yield [ready("a-0", "a")]
        yield [ServerStopped(life="a-0")]

    found, _ = run(a_plan({"a": ["a"]}), script, tmp_path)
    assert found == [
        seen("a", "key"),
        seen("a", "tokenizer", FAILED, "load the tokenizer of a: no such folder"),
    ]


def test_a_process_that_dies_of_one_tokenizer_loads_the_others(tmp_path: Path) -> None:
    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield [loaded("a")]
        yield [EvaluatorLost(evaluator="evaluator", reason="out of memory")]
        assert cluster.asked == ["a", "b", "c", "c"]
        yield [loaded("c")]
        for model in "abc":
            yield [ready(f"{model}-0", model)]
            yield [ServerStopped(life=f"{model}-0")]

    found, _ = run(a_plan({"a": ["a"], "b": ["b"], "c": ["c"]}), script, tmp_path)
    (wrong,) = (check for check in found if check.outcome is FAILED)
    assert (wrong.model, wrong.name) == ("b", "tokenizer")
    assert wrong.detail.startswith("the process that loads it died: out of memory (see ")


def test_a_signal_ends_it_with_what_is_known(tmp_path: Path) -> None:
    stop: list[int] = []

    def script(cluster: ScriptedCluster) -> Iterator[list[ClusterEvent]]:
        yield [loaded("a"), loaded("b")]
        yield [ready("a-0", "a")]
        yield [ServerStopped(life="a-0")]
        stop.append(signal.SIGINT)
        yield []

    found, number = run(a_plan({"a": ["a"], "b": ["b"]}), script, tmp_path, stop=stop)
    assert number == signal.SIGINT
    assert {check.model for check in found} == {"a"}


# As a user starts it


class Desk:
    """A sweep file and `python launch.py check` over it, on Ray with the stand-in as the engine."""

    def __init__(self, folder: Path, models: Mapping[str, Any]) -> None:
        self.folder = folder
        self.directory = RunDirectory(folder / "runs" / "small")
        settings = {
            "name": "small",
            "runs_dir": str(folder / "runs"),
            "defaults": {"model": {"device": "cpu", "max_model_len": 512}},
            "models": models,
            "tasks": {"arc_easy": None},
            "ray": {"evaluators": 1, "cpu_servers": 2},
        }
        (folder / "small.yaml").write_text(yaml.safe_dump(settings))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "STAND_IN_"))}
        return subprocess.Popen(
            [sys.executable, "launch.py", "check", f"conf={self.folder / 'small.yaml'}", *arguments],
            cwd=ROOT,
            env={**kept, "LMSWEEP_ENGINE": shlex.join(STAND_IN), "HF_HUB_OFFLINE": "1", "OUR_KEY": KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def check(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=300)
        assert KEY not in output
        return process.returncode, output

    def left(self) -> list[str]:
        """Command lines of stand-ins of this sweep that are still there."""
        mark = str(self.folder)
        return [line for p in psutil.process_iter(["cmdline"]) if mark in (line := " ".join(p.info["cmdline"] or ()))]


def rows(output: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(model, check) -> (outcome, detail) of the table at the end."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    model = ""
    for line in output.splitlines():
        for outcome in ("passed", "noted ", "FAILED"):
            head, middle, detail = line.partition(f"  {outcome}  ")
            if middle:
                model = head[: head.index(" ")] or model
                found[model, head[head.index(" ") :].strip()] = (outcome.strip(), detail)
    return found


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_model)
    return tmp_path


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_good_servers_are_a_table_and_exit_code_0_and_nothing_else_is_left(folder: Path) -> None:
    desk = Desk(
        folder, {name: {"path": str(folder / "model")} for name in ("alpha", "beta")} | {"gone": {"path": "/none"}}
    )
    code, output = desk.check("only=[ab]*/*")
    assert code == 0, output
    found = rows(output)
    questions = ["key", "served name", "max_model_len", "completion logprobs", "chat logprobs", "echo", "tokenizer"]
    methods = ["next_token", "prompt_logprobs", "forced_decoding"]
    assert list(found) == [(model, name) for model in ("alpha", "beta") for name in (*questions, *methods)]
    assert {outcome for outcome, _ in found.values()} == {"passed"}
    assert found["alpha", "key"] == ("passed", "401 without it, 200 with it")
    assert found["beta", "tokenizer"] == ("passed", "the same token ids for all 7 texts")
    assert "2 of 2 models can be evaluated on these servers" in output
    assert not desk.left()
    assert sorted(path.name for path in desk.directory.root.rglob("*") if path.is_file()) == [
        *("alpha-0.log", "beta-0.log", "driver.log", "evaluator.log")
    ]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_servers_that_someone_else_runs_are_refused_each_with_its_own_message(folder: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "good": {},
        "null": {"null_logprobs": 1},
        "open": {"api_key": ""},
        "foreign": {"other_tokenizer": 1},
        "shifted": {"echo_shift": 1},
    }
    path = str(folder / "model")
    with ExitStack() as stack:
        endpoints = {
            name: stack.enter_context(
                stand_in(folder / f"{name}.log", **{"path": path, "api_key": KEY, "max_model_len": 512} | options)
            )
            for name, options in wrong.items()
        }
        shared = {"served_model_name": "m", "tokenizer": path, "api_key": "${oc.env:OUR_KEY}"}
        desk = Desk(folder, {name: {"url": e.url, **shared} for name, e in endpoints.items()})
        code, output = desk.check()
        for name, endpoint in endpoints.items():  # they are not ours to stop
            port = int(endpoint.url.rpartition(":")[2])
            assert any(c.laddr.port == port for c in psutil.net_connections("tcp") if c.status == "LISTEN"), name
    assert code == 1, output
    found = rows(output)
    failed = {(model, name) for (model, name), (outcome, _) in found.items() if outcome == "FAILED"}
    assert failed == {
        ("null", "completion logprobs"),
        ("null", "chat logprobs"),
        ("null", "echo"),
        ("open", "key"),
        ("foreign", "tokenizer"),
        ("shifted", "echo"),
    }
    said = {key: found[key][1] for key in failed}
    assert "`TypeError: 'NoneType' object is not subscriptable`" in said["null", "completion logprobs"]
    assert "got 200 where 401 was expected; another server listens there" in said["open", "key"]
    assert "name the tokenizer that the server uses as `tokenizer:`" in said["foreign", "tokenizer"]
    assert "by echo where it generates with -0.500" in said["shifted", "echo"]
    assert "1 of 5 models can be evaluated on these servers" in output
    assert {outcome for (model, _), (outcome, _) in found.items() if model == "good"} == {"passed"}
    logs = [path for path in desk.directory.root.rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if KEY.encode() in path.read_bytes()]


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_ctrl_c_ends_it_cleanly(folder: Path) -> None:
    slow = {"path": str(folder / "model"), "env": {"STAND_IN_START_DELAY_S": "60"}}
    desk = Desk(folder, {"slow": slow})
    process = desk.start()
    assert process.stdout is not None
    line = next(line for line in process.stdout if "slow-0 is starting" in line)
    assert line.endswith("slow-0 is starting\n")
    deadline = time.monotonic() + 60
    while not any(STAND_IN[1] in words for words in desk.left()):
        assert time.monotonic() < deadline, "the server was not started"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert not desk.left()
