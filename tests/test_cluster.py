"""Servers and evaluators on real Ray, without a model; whole sweeps are in test_runner.py."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import psutil
import pytest
from conftest import apart, command_line, free_port

from sweep.errors import ServerError
from sweep.evaluating.concurrency import Controller
from sweep.evaluating.preflight import Expected, Outcome
from sweep.planning.config import Device, Model, RayConfig
from sweep.planning.plan import ServerPlan
from sweep.running import cluster as module
from sweep.running.cluster import (
    STOP_S,
    Cluster,
    ClusterEvent,
    EvaluatorLost,
    EvaluatorReady,
    ServerFailed,
    ServerLoad,
    ServerLost,
    ServerReady,
    ServerStopped,
)
from sweep.running.inventory import Node

KEY = "a-key-for-the-cluster-0123456789"
STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_server.py"))]
EVENT_S = 60.0
GONE_S = 15.0

GPUS = 4
VISIBLE = "7,5,3,1"
"""CUDA_VISIBLE_DEVICES of the node: Ray numbers its GPUs 0 to 3, in this order."""

ENV = {"HF_HOME": "/scratch/of-the-sweep", "HTTPS_PROXY": "http://proxy:3128"}

Expect = Mapping[str, Expected]


def test_a_message_to_an_evaluator_that_has_just_died_is_dropped() -> None:
    cluster = Cluster.__new__(Cluster)
    sent: list[Any] = []
    living = SimpleNamespace(send=SimpleNamespace(remote=sent.append))
    cluster._evaluators = {"evaluator.0": living}
    cluster.send("evaluator.0", "first")
    del cluster._evaluators["evaluator.0"]  # as the stream's end does, in the middle of a batch of events
    cluster.send("evaluator.0", "second")
    assert sent == ["first"]


# On Ray

T = TypeVar("T")

Elsewhere = Callable[..., Any]
"""Runs a function in the process that has the clusters."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    variables = {
        "LMSWEEP_ENGINE": shlex.join(STAND_IN),
        "CUDA_VISIBLE_DEVICES": VISIBLE,
        # Set by some launchers, and then everyone sees every GPU who does not say otherwise.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "yes",
    }
    with apart(variables) as run:
        yield run


def a_cluster() -> Cluster:
    module.local_node = lambda config: Node(  # type: ignore[assignment]
        name="", gpus=GPUS, cpu_servers=1, evaluators=1
    )
    return Cluster(RayConfig(address="local"), api_key=KEY, env=ENV)


def a_server(gpus: float = 1, device: Device = Device.GPU, **stand_in: object) -> ServerPlan:
    model = Model(
        path="/m",
        device=device,
        startup_timeout_s=60.0,
        env={f"STAND_IN_{name.upper()}": str(value) for name, value in stand_in.items()},
    )
    return ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=gpus, replicas=1)


EXPECTED = {"m": Expected(served_name="m", max_model_len=None, token_ids=())}


class Play:
    """A cluster and what has happened there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.events: list[ClusterEvent] = []
        self._folder = folder

    def start(self, life: str, plan: ServerPlan) -> None:
        self.cluster.start_server(plan, life, self.log(life), EXPECTED)

    def start_evaluator(self, name: str) -> None:
        self.cluster.start_evaluator(name, self.log(name), node=self.cluster.inventory[0].name)

    def log(self, life: str) -> Path:
        return self._folder / f"{life}.log"

    def until(self, kind: type[T], name: str) -> T:
        """The first event of a kind about a life or an evaluator."""
        deadline = time.monotonic() + EVENT_S
        while time.monotonic() < deadline:
            for event in self.events:
                if isinstance(event, kind) and name in (getattr(event, "life", ""), getattr(event, "evaluator", "")):
                    return event
            self.events += self.cluster.events(0.1)
        raise AssertionError(f"no {kind.__name__} of {name}: {self.events}")

    def words(self, life: str) -> list[str]:
        return [type(event).__name__ for event in self.events if getattr(event, "life", "") == life]

    def process(self, life: str) -> psutil.Process:
        """The engine of a ready server."""
        url = self.until(ServerReady, life).endpoint.url
        port = url.rpartition(":")[2]
        (found,) = [p for p in below() if (line := command_line(p))[1:2] == STAND_IN[1:] and port in line]
        return found


def below() -> list[psutil.Process]:
    """All that this process has started, supervisors' children too."""
    mine = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CLUSTER_TEST") == os.environ["CLUSTER_TEST"] and process.pid != os.getpid():
                mine.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in mine if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def stand_ins() -> list[list[str]]:
    """Command lines of the servers that live."""
    return [line for process in below() if (line := command_line(process))[1:2] == STAND_IN[1:]]


def gone(process: psutil.Process, within_s: float = GONE_S) -> bool:
    return not psutil.wait_procs([process], timeout=within_s)[1]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came of servers and evaluators on one cluster."""

    gpus_of_two: str
    gpus_of_four: str
    server_offline: dict[str, str]
    server_of_ray: list[str]
    sweeps_env: list[dict[str, str]]
    """Of a server and an evaluator."""
    evaluator_gpus: str
    evaluator_offline: dict[str, str]
    refusing: int
    killed: list[str]
    killed_reason: str
    killed_after_s: float
    owner_killed: list[str]
    server_gone_with_owner: bool
    refused: ServerFailed
    refused_gone: bool
    died_in_preflight: ServerFailed
    bad: ServerFailed
    external: list[str]
    external_lives: bool
    evaluator_lost: str
    evaluator_ended: str
    starting_at_close: int
    left: list[list[str]]
    session: Path
    session_made: bool


def offline(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.endswith("_OFFLINE")}


def everything(folder: Path) -> Seen:
    os.environ["CLUSTER_TEST"] = str(folder)
    found: dict[str, Any] = {}
    port = free_port()
    own = subprocess.Popen(
        [*STAND_IN, "--model", "any", "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "VLLM_API_KEY": KEY, "CLUSTER_TEST": "its own"},
    )
    try:
        with closing(a_cluster()) as cluster:
            found["session"] = cluster._session
            found["session_made"] = cluster._session is not None and cluster._session.is_dir()
            play(Play(cluster, folder), found, url=f"http://127.0.0.1:{port}")
            found["external_lives"] = own.poll() is None
            starting = Play(cluster, folder)
            starting.start("late-0", a_server(start_delay_s=60, tree=1))
            until(lambda: bool(stand_ins()), "the last server began")
            found["starting_at_close"] = len(stand_ins())
        deadline = time.monotonic() + GONE_S
        while below() and time.monotonic() < deadline:
            time.sleep(0.1)
        found["left"] = [line for process in below() if (line := command_line(process))]
    finally:
        own.kill()
        own.wait()
    return Seen(**found)


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + EVENT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: it did not happen"
        time.sleep(0.05)


def play(play: Play, found: dict[str, Any], *, url: str) -> None:
    import ray

    cluster = play.cluster
    play.start_evaluator("evaluator.0")
    play.start("two-0", a_server(gpus=2))
    environment = play.process("two-0").environ()
    found["gpus_of_two"] = environment["CUDA_VISIBLE_DEVICES"]
    found["server_offline"] = offline(environment)
    found["sweeps_env"] = [{name: environment.get(name, "") for name in ENV}]
    found["server_of_ray"] = [name for name in environment if name.startswith("RAY_")]
    play.until(ServerReady, "two-0")
    cluster.tune("two-0", Controller(64))
    cluster.press("two-0", wanted=100, refused=3)
    found["refusing"] = play.until(ServerLoad, "two-0").load.limit

    until(lambda: bool(evaluators()), "the evaluator began")
    environment = evaluators()[0].environ()
    found["evaluator_gpus"] = environment["CUDA_VISIBLE_DEVICES"]
    found["evaluator_offline"] = offline(environment)
    found["sweeps_env"].append({name: environment.get(name, "") for name in ENV})
    evaluators()[0].kill()
    found["evaluator_lost"] = play.until(EvaluatorLost, "evaluator.0").reason
    play.start_evaluator("evaluator.1")
    until(lambda: bool(evaluators()), "another evaluator began")
    evaluators()[0].suspend()
    cluster.end_evaluator("evaluator.1", "it hung")
    found["evaluator_ended"] = play.until(EvaluatorLost, "evaluator.1").reason
    until(lambda: not evaluators(), "nothing was left of an evaluator that hung")

    play.process("two-0").kill()
    begun = time.monotonic()
    found["killed_reason"] = play.until(ServerLost, "two-0").reason
    found["killed_after_s"] = time.monotonic() - begun
    play.until(ServerStopped, "two-0")
    found["killed"] = play.words("two-0")

    play.start("four-0", a_server(gpus=4, tree=1))  # all there are: what the dead one had is free again
    process = play.process("four-0")
    found["gpus_of_four"] = process.environ()["CUDA_VISIBLE_DEVICES"]
    tree = [process, *process.children(recursive=True), process.parent(), process.parent().parent()]
    ray.kill(cluster._servers["four-0"])
    play.until(ServerStopped, "four-0")
    found["owner_killed"] = play.words("four-0")
    found["server_gone_with_owner"] = len(tree) == 5 and all(gone(p) for p in tree)

    play.start("null-0", a_server(null_logprobs=1))
    found["refused"] = play.until(ServerFailed, "null-0")
    found["refused_gone"] = not stand_ins()
    play.start("dies-0", a_server(die_after=1))
    found["died_in_preflight"] = play.until(ServerFailed, "dies-0")
    play.start("bad-0", a_server(refuse="RuntimeError: CUDA out of memory"))
    found["bad"] = play.until(ServerFailed, "bad-0")

    # The only slot is taken, and the server of someone else needs none.
    play.start("slot-0", a_server(device=Device.CPU))
    play.until(ServerReady, "slot-0")
    model = Model(url=url, api_key=KEY, served_model_name="m", tokenizer="/m", max_model_len=2048)
    plan = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0, replicas=1)
    play.start("theirs-0", plan)
    play.until(ServerReady, "theirs-0")
    cluster.stop_server("theirs-0")
    play.until(ServerStopped, "theirs-0")
    found["external"] = play.words("theirs-0")


def evaluators() -> list[psutil.Process]:
    """Children of supervisors, that is lm-eval's processes."""
    return [
        process
        for process in below()
        if "sweep.evaluating.evaluator" in (line := command_line(process)) and "--" not in line
    ]


@pytest.fixture(scope="module")
def seen(elsewhere: Elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    found: Seen = elsewhere(everything, tmp_path_factory.mktemp("cluster"))
    return found


@pytest.mark.ray
def test_a_server_sees_the_gpus_that_ray_gave_it_in_their_order(seen: Seen) -> None:
    assert seen.gpus_of_four == "1,3,5,7"
    first, second = seen.gpus_of_two.split(",")
    assert {first, second} < set("1357")
    assert first < second


@pytest.mark.ray
def test_an_evaluator_sees_no_gpu(seen: Seen) -> None:
    assert seen.evaluator_gpus == ""


@pytest.mark.ray
def test_offline_words_of_the_launch_reach_servers_and_evaluators_and_rays_own_do_not(seen: Seen) -> None:
    expected = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "yes"}
    assert seen.server_offline == expected
    assert seen.evaluator_offline == expected
    assert seen.server_of_ray == []


@pytest.mark.ray
def test_the_sweeps_env_reaches_servers_and_evaluators(seen: Seen) -> None:
    assert seen.sweeps_env == [ENV, ENV]


@pytest.mark.ray
def test_a_killed_server_is_lost_within_a_second_and_stopped_when_nothing_of_it_is_left(seen: Seen) -> None:
    assert seen.refusing == 48
    assert seen.killed == ["ServerReady", "ServerLoad", "ServerLost", "ServerStopped"]
    assert seen.killed_reason.startswith("was killed by SIGKILL")
    assert seen.killed_after_s < 2  # a second, and a busy machine


@pytest.mark.ray
def test_a_server_whose_actor_ray_kills_is_lost_and_stopped_at_once_and_ends_with_all_its_tree(seen: Seen) -> None:
    assert seen.owner_killed == ["ServerReady", "ServerLost", "ServerStopped"]
    assert seen.server_gone_with_owner


@pytest.mark.ray
def test_a_server_that_preflight_refuses_is_stopped_and_will_be_refused_again(seen: Seen) -> None:
    assert not seen.refused.passing
    failed = [check for check in seen.refused.checks if check.outcome is Outcome.FAILED]
    assert failed
    assert failed[0].detail in seen.refused.error
    assert seen.refused_gone


@pytest.mark.ray
def test_a_server_that_dies_in_preflight_is_no_refusal(seen: Seen) -> None:
    assert seen.died_in_preflight.passing
    assert re.match(
        r"dies-0 died in preflight: exited with code 1 \(see .*dies-0\.log\)$", seen.died_in_preflight.error
    )


@pytest.mark.ray
def test_a_server_that_cannot_start_says_why(seen: Seen) -> None:
    assert "out of memory" in seen.bad.error


@pytest.mark.ray
def test_a_server_at_a_url_needs_no_slot_and_is_not_stopped(seen: Seen) -> None:
    assert seen.external == ["ServerReady", "ServerStopped"]
    assert seen.external_lives


@pytest.mark.ray
def test_an_evaluator_that_dies_is_told(seen: Seen) -> None:
    assert seen.evaluator_lost.startswith("its process ended")


@pytest.mark.ray
def test_an_evaluator_that_hangs_can_be_ended_and_leaves_nothing(seen: Seen) -> None:
    assert seen.evaluator_ended == "it hung"


@pytest.mark.ray
def test_closing_while_a_server_starts_leaves_nothing(seen: Seen) -> None:
    assert seen.starting_at_close
    assert seen.left == []


@pytest.mark.ray
def test_the_folder_of_a_cluster_that_was_ours_alone_stays_for_its_logs_when_ray_failed(seen: Seen) -> None:
    """A killed owner is a failure of Ray's."""
    assert seen.session_made
    assert (seen.session / "logs").is_dir()


@dataclass(frozen=True, kw_only=True)
class Unplaced:
    """What came of actors for which there was no place."""

    too_large: ServerFailed
    waits: str
    """What was said of the one that had to wait."""
    stopped: list[str]
    evaluators: list[str]
    """Those that were started, of two for one place."""
    close_s: float


def without_a_place(folder: Path) -> Unplaced:
    module.PLACE_S = 1.0
    said: list[str] = []
    module.log.warning = lambda text, *values: said.append(text % values)  # type: ignore[method-assign, assignment]
    cluster = a_cluster()
    try:
        play = Play(cluster, folder)
        play.start("large-0", a_server(gpus=9))
        too_large = play.until(ServerFailed, "large-0")
        play.start("all-0", a_server(gpus=4))
        play.until(ServerReady, "all-0")
        play.start("late-0", a_server(gpus=1))
        play.start_evaluator("evaluator.0")
        play.until(EvaluatorReady, "evaluator.0")
        play.start_evaluator("evaluator.1")
        while len(said) < 2:
            play.events += cluster.events(0.1)
        cluster.stop_server("late-0")
        play.until(ServerStopped, "late-0")
    finally:
        begun = time.monotonic()
        cluster.close()
    return Unplaced(
        too_large=too_large,
        waits=next(text for text in said if text.startswith("late-0")),
        stopped=play.words("late-0"),
        evaluators=[event.evaluator for event in play.events if isinstance(event, EvaluatorReady)],
        close_s=time.monotonic() - begun,
    )


@pytest.mark.ray
def test_what_ray_finds_no_place_for_is_told_and_can_be_stopped(elsewhere: Elsewhere, tmp_path: Path) -> None:
    found: Unplaced = elsewhere(without_a_place, tmp_path)
    assert found.too_large.error == "large-0 did not start: no node of the cluster has 9 GPU (any more)"
    assert found.too_large.passing
    assert found.waits.startswith("late-0 has waited 1 s for Ray to start it: it needs 1 GPU on one node")
    assert found.stopped == ["ServerStopped"]
    assert found.evaluators == ["evaluator.0"]
    assert found.close_s < STOP_S / 2


def test_a_server_that_is_stopped_while_it_starts_has_no_error_that_ray_would_show() -> None:
    model = Model(url=f"http://127.0.0.1:{free_port()}", tokenizer="/m", max_model_len=2048, startup_timeout_s=1.0)
    plan = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0, replicas=1)
    host = module._ServerHost(plan, "m-0", KEY, "m-0.log", True, (), {})
    with pytest.raises(ServerError, match="m-0"):
        host.start(EXPECTED)
    host.stop()
    assert host.start(EXPECTED) is None


def an_empty_cluster() -> Path:
    with closing(a_cluster()) as cluster:
        assert cluster._session is not None
        folder = cluster._session
        assert folder.is_dir()
    return folder


@pytest.mark.ray
def test_the_folder_of_a_cluster_that_was_ours_alone_is_removed_with_it(elsewhere: Elsewhere) -> None:
    folder: Path = elsewhere(an_empty_cluster)
    assert not folder.exists()
    assert not (folder.parent / "session_latest").is_symlink()
