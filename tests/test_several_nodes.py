"""A server of several nodes on real Ray: nodes are raylets of this machine (`ray.cluster_utils`), with GPUs that Ray
takes our word for; its parts are stand-ins that meet as vLLM's do."""

import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from conftest import apart

from sweep.evaluating.preflight import Expected
from sweep.planning.config import Model, RayConfig
from sweep.planning.plan import ServerPlan
from sweep.running.cluster import Cluster, ClusterEvent, ServerFailed, ServerLost, ServerReady, ServerStopped
from sweep.running.machine import EVALUATOR

KEY = "a-key-for-several-nodes-0123456789"
STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in_server.py"))]
EVENT_S = 60.0
GPUS = 2
"""Of each of the three nodes."""

T = TypeVar("T")


def a_server(**stand_in: object) -> ServerPlan:
    model = Model(
        path="/m",
        nodes=2,
        tensor_parallel=GPUS,
        startup_timeout_s=60.0,
        env={f"STAND_IN_{name.upper()}": str(value) for name, value in stand_in.items()},
    )
    return ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=GPUS, replicas=1)


def until(condition: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + EVENT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: it did not happen"
        time.sleep(0.05)
    return found


def parts() -> dict[str, psutil.Process]:
    """Processes of servers by their rank; what supervises them names the same command."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            line = process.cmdline()
            ours = process.environ().get("SEVERAL_NODES_TEST") == os.environ["SEVERAL_NODES_TEST"]
            if ours and line[1:2] == STAND_IN[1:] and process.status() != psutil.STATUS_ZOMBIE:
                found[line[line.index("--node-rank") + 1]] = process
    return found


@dataclass
class Play:
    """A cluster and what has happened there."""

    cluster: Cluster
    folder: Path
    events: list[ClusterEvent]

    def start(self, life: str, plan: ServerPlan) -> list[str]:
        """Its nodes, which are the first two of those that can be used."""
        nodes = [node.name for node in self.cluster.inventory if node.gpus][:2]
        expected = {"m": Expected(served_name="m", max_model_len=None, token_ids=())}
        self.cluster.start_server(plan, life, self.folder / f"{life}.log", expected, nodes=nodes)
        return nodes

    def ready(self, life: str) -> None:
        """Raises for one that fails, with its reason."""
        until(lambda: self._heard(ServerReady, life) or self._heard(ServerFailed, life), f"{life} is ready")
        assert self._heard(ServerReady, life), self.events

    def ended(self, life: str, kind: type[T]) -> T:
        """What was said of its end, once that is over."""
        until(lambda: self._heard(ServerStopped, life) or self._heard(ServerFailed, life), f"{life} has ended")
        (found,) = self._heard(kind, life)
        return found

    def both_start(self) -> bool:
        self.events += self.cluster.events(0.1)
        return len(parts()) == 2 and not self.cluster._unplaced

    def words(self, life: str) -> list[str]:
        return [type(event).__name__ for event in self._heard(object, life)]

    def _heard(self, kind: type[T], life: str) -> list[T]:
        self.events += self.cluster.events(0.1)
        return [event for event in self.events if isinstance(event, kind) and getattr(event, "life", "") == life]


@dataclass(frozen=True, kw_only=True)
class Seen:
    nodes: list[str]
    """Where the first life was put."""
    gpus_held: dict[str, float]
    """By node, as Ray counts them."""
    gpus_seen: dict[str, str]
    """CUDA_VISIBLE_DEVICES by rank."""
    logs: list[str]
    part_killed: ServerLost
    part_killed_words: list[str]
    left: dict[str, list[str]]
    """Ranks of what still ran when a life had ended."""
    gpus_free: float
    refused: ServerFailed
    refused_words: list[str]
    stopped_words: list[str]
    node_lost: ServerLost
    node_lost_words: list[str]
    node_is_used: bool
    gone_after_s: float
    """With the cluster closed around a server that runs."""


def everything(folder: Path) -> Seen:
    os.environ["SEVERAL_NODES_TEST"] = str(folder)
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [machines.add_node(num_cpus=1, num_gpus=GPUS, resources={EVALUATOR: 1}) for _ in range(3)]
    found: dict[str, Any] = {"left": {}}
    try:
        with closing(Cluster(RayConfig(address=machines.address), api_key=KEY)) as cluster:
            play(Play(cluster, folder, []), found, machines, nodes)
            begun = time.monotonic()
        until(lambda: not parts(), "nothing is left of a server around which the cluster was closed")
        found["gone_after_s"] = time.monotonic() - begun
    finally:
        machines.shutdown()
    return Seen(**found)


def play(play: Play, found: dict[str, Any], machines: Any, nodes: list[Any]) -> None:
    import ray
    from ray._private.state import available_resources_per_node

    def free() -> float:
        return float(ray.available_resources().get("GPU", 0))

    def ended(life: str, kind: type[T]) -> T:
        end = play.ended(life, kind)
        found["left"][life] = sorted(parts())
        return end

    found["nodes"] = play.start("m-0", a_server())
    play.ready("m-0")
    until(lambda: free() == GPUS, "Ray has given two nodes' GPUs away")
    left = available_resources_per_node()
    found["gpus_held"] = {node.node_id: GPUS - left[node.node_id].get("GPU", 0.0) for node in nodes}
    found["gpus_seen"] = {rank: part.environ()["CUDA_VISIBLE_DEVICES"] for rank, part in parts().items()}
    found["logs"] = sorted(path.name for path in play.folder.glob("m-0*.log"))
    parts()["1"].kill()
    found["part_killed"] = ended("m-0", ServerLost)
    found["part_killed_words"] = play.words("m-0")
    until(lambda: free() == 3 * GPUS, "all GPUs are free again")
    found["gpus_free"] = free()

    play.start("m-1", a_server(refuse_headless="RuntimeError: CUDA out of memory"))
    found["refused"] = ended("m-1", ServerFailed)
    found["refused_words"] = play.words("m-1")

    play.start("m-2", a_server(start_delay_s=60))
    until(play.both_start, "both parts start")
    play.cluster.stop_server("m-2")
    ended("m-2", ServerStopped)
    found["stopped_words"] = play.words("m-2")

    _, second = play.start("m-3", a_server())
    play.ready("m-3")
    machines.remove_node(next(node for node in nodes if node.node_id == second), allow_graceful=False)
    found["node_lost"] = play.ended("m-3", ServerLost)
    until(lambda: not parts(), "what was on the lost node has ended too")
    found["node_lost_words"] = play.words("m-3")
    found["node_is_used"] = second in [node.name for node in play.cluster.inventory]

    play.start("m-4", a_server())
    play.ready("m-4")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    # Directly under /tmp: pytest's folders are too long for the sockets of Ray.
    with tempfile.TemporaryDirectory(prefix="several-", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        variables = {"LMSWEEP_ENGINE": shlex.join(STAND_IN), "RAY_TMPDIR": temporary}
        with apart(variables) as run:
            found: Seen = run(everything, tmp_path_factory.mktemp("several"))
    return found


@pytest.mark.ray
def test_each_part_has_its_node_with_its_gpus_and_a_log(seen: Seen) -> None:
    assert [seen.gpus_held.pop(node) for node in seen.nodes] == [GPUS, GPUS]
    assert [*seen.gpus_held.values()] == [0]
    assert seen.gpus_seen == {"0": "0,1", "1": "0,1"}
    assert seen.logs == ["m-0.1.log", "m-0.log"]


@pytest.mark.ray
def test_a_server_is_lost_with_any_of_its_parts_and_stopped_when_nothing_is_left_on_any_node(seen: Seen) -> None:
    assert seen.part_killed_words == ["ServerReady", "ServerLost", "ServerStopped"]
    assert seen.part_killed.reason.startswith("lost its part m-0.1: m-0.1 ended: was killed by SIGKILL")
    assert not seen.part_killed.infrastructure
    assert seen.gpus_free == 3 * GPUS


@pytest.mark.ray
def test_a_part_that_cannot_start_fails_the_server_with_its_cause(seen: Seen) -> None:
    assert seen.refused_words == ["ServerFailed"]
    assert seen.refused.error.startswith("m-1.1 ended: out of memory while loading")
    assert seen.refused.error.endswith("\nThe cause may stand in the log of another part of this server: m-1")
    assert not seen.refused.passing


@pytest.mark.ray
def test_a_server_that_starts_is_stopped_in_all_its_parts(seen: Seen) -> None:
    assert seen.stopped_words == ["ServerStopped"]


@pytest.mark.ray
def test_a_node_that_is_lost_takes_the_server_and_no_blame_falls_on_that(seen: Seen) -> None:
    assert seen.node_lost_words == ["ServerReady", "ServerLost", "ServerStopped"]
    assert seen.node_lost.infrastructure
    assert not seen.node_is_used


@pytest.mark.ray
def test_no_part_outlives_its_server_or_the_cluster(seen: Seen) -> None:
    assert seen.left == {"m-0": [], "m-1": [], "m-2": []}
    assert seen.gone_after_s < EVENT_S / 2
