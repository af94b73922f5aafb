"""Which nodes may get something new, step by step."""

import logging
from typing import Any

import pytest

from sweep.planning.config import RayConfig
from sweep.running.nodes import AGAIN_S, LOOK_S, SUSPECT_S, Looked, Nodes


def listed(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As Ray lists a node."""
    named = {key.replace("__", ":"): value for key, value in resources.items()}
    return {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Alive": alive, "Resources": named or {"CPU": 4.0}}


def looking(*names: str, config: RayConfig | None = None) -> Nodes:
    """Nodes that have all answered at 0 s."""
    nodes = Nodes(config or RayConfig())
    nodes.listed([listed(name) for name in names])
    for name in nodes.due(0.0):
        nodes.answered(name, Looked(), 0.0)
    return nodes


def usable(nodes: Nodes, now_s: float) -> list[str]:
    return [node.name for node in nodes.usable(now_s)]


def test_a_node_that_joins_is_used_when_it_has_answered() -> None:
    nodes = looking("a")
    nodes.listed([listed("a"), listed("b")])
    assert usable(nodes, 1.0) == ["a"]
    assert nodes.awaited(1.0)
    assert nodes.due(1.0) == {"b": True}
    assert nodes.due(1.0) == {}
    nodes.answered("b", Looked(gpu_memory_gb=80.0, disk_free_gb=10.0, weights=frozenset({"/m"})), 1.1)
    assert usable(nodes, 1.1) == ["a", "b"]
    assert [node.host for node in nodes.usable(1.1)] == ["host-a", "host-b"]
    assert not nodes.awaited(1.1)
    assert nodes.usable(1.1)[1].weights == {"/m"}


def test_a_node_that_leaves_is_gone_at_once_and_its_late_answer_changes_nothing() -> None:
    nodes = looking("a", "b")
    nodes.due(LOOK_S)
    nodes.listed([listed("a"), listed("b", alive=False)])
    assert usable(nodes, LOOK_S) == ["a"]
    nodes.answered("b", Looked(), LOOK_S)
    nodes.suspect("b")
    assert usable(nodes, LOOK_S) == ["a"]


def test_nodes_are_looked_at_again_and_keep_what_only_the_first_look_asks_for() -> None:
    nodes = looking("a")
    assert nodes.due(LOOK_S - 0.1) == {}
    assert nodes.due(LOOK_S) == {"a": False}
    nodes.answered("a", Looked(disk_free_gb=5.0), LOOK_S)
    assert nodes.due(2 * LOOK_S) == {"a": False}


def test_the_memory_of_a_first_look_stays() -> None:
    nodes = Nodes(RayConfig())
    nodes.listed([listed("a")])
    nodes.due(0.0)
    nodes.answered("a", Looked(gpu_memory_gb=80.0, disk_free_gb=9.0), 0.0)
    nodes.due(LOOK_S)
    nodes.answered("a", Looked(disk_free_gb=5.0), LOOK_S)
    (node,) = nodes.usable(LOOK_S)
    assert (node.gpu_memory_gb, node.disk_free_gb) == (80.0, 5.0)


def test_a_node_that_does_not_answer_gets_nothing_new_until_it_does(caplog: pytest.LogCaptureFixture) -> None:
    nodes = looking("a", "b")
    nodes.due(10.0)
    nodes.answered("a", Looked(), 10.0)
    assert usable(nodes, 10.0 + SUSPECT_S - 0.1) == ["a", "b"]
    for _ in range(3):
        assert usable(nodes, 10.0 + SUSPECT_S) == ["a"]
    nodes.answered("b", Looked(), 99.0)
    assert usable(nodes, 99.0) == ["a", "b"]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "node b may be gone, it gets nothing new until it answers",
        "node b answers again",
    ]


def test_a_node_where_an_actor_cannot_be_reached_is_looked_at_at_once() -> None:
    nodes = looking("a")
    nodes.due(LOOK_S)  # that answer may be on its way, and would say nothing
    nodes.suspect("a")
    assert usable(nodes, LOOK_S) == []
    assert nodes.due(LOOK_S) == {"a": False}
    nodes.answered("a", None, LOOK_S)
    assert usable(nodes, LOOK_S) == []
    assert nodes.due(LOOK_S + AGAIN_S) == {"a": False}
    nodes.answered("a", Looked(), 30.0)
    assert usable(nodes, 30.0) == ["a"]


def test_what_a_node_carries_is_what_it_declares_or_what_its_cores_do() -> None:
    nodes = Nodes(RayConfig())
    nodes.listed(
        [
            listed("cores", CPU=16.0),
            listed("gpus", CPU=64.0, GPU=8.0, accelerator_type__H100=1.0),
            listed("head", CPU=0.0),
            listed("slots", CPU=2.0, lmsweep_evaluator=5.0, lmsweep_cpu_server=0.0),
        ]
    )
    for name in nodes.due(0.0):
        nodes.answered(name, Looked(), 0.0)
    found = {node.name: (node.gpus, node.gpu_type, node.cpu_servers, node.evaluators) for node in nodes.usable(0.0)}
    assert found == {
        "cores": (0.0, "", 4, 8),
        "gpus": (8.0, "H100", 16, 16),
        "head": (0.0, "", 0, 0),
        "slots": (0.0, "", 0, 5),
    }
    assert nodes.declares("slots", "lmsweep_evaluator")
    assert not nodes.declares("cores", "lmsweep_evaluator")


def test_the_sweeps_own_numbers_hold_for_each_node() -> None:
    nodes = looking("a", "b", config=RayConfig(evaluators=3, cpu_servers=2))
    assert [(node.evaluators, node.cpu_servers) for node in nodes.usable(0.0)] == [(3, 2), (3, 2)]
