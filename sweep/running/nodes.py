"""Which nodes of a cluster may get something new: what Ray lists, and what each answers when it is looked at. Pure: no
Ray, no clock of its own.

Ray says only after a while that a node is gone, for a cut network a minute by default. So each node is looked at every
few seconds by a tiny task, whose answer also tells what Ray does not know of it. A node that has yet to answer, or
where an actor could not be reached, is suspect: it is left out until it answers. What runs there stays as it is.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sweep.planning.config import RayConfig
from sweep.running.inventory import Node
from sweep.running.machine import CPU_SERVER, EVALUATOR

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Between a node's answer and the next look. Its worker stays warm where the node has more CPUs than workers, and then
a look costs milliseconds; elsewhere Ray ends it after a second or two, and each look starts another, a second of a
core."""

SUSPECT_S = 15.0
"""A look takes some milliseconds, and up to ten seconds where its worker has to start on a busy machine."""

AGAIN_S = 1.0
"""After a look that failed."""

GPU_TYPE = "accelerator_type:"
"""How Ray's resources of a node name the type of its GPUs."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a node answers."""

    gpu_memory_gb: float | None = None
    disk_free_gb: float | None = None
    weights: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class _Known:
    node: Node
    declared: frozenset[str]
    """Names of Ray's resources there."""
    looked_at: bool = False
    """It has answered once."""
    suspect: bool = False
    told: bool = False
    """That it is suspect."""
    asked_s: float = math.inf
    """Of a look without an answer yet."""
    next_look_s: float = -math.inf

    def late(self, now_s: float) -> bool:
        return now_s - self.asked_s >= SUSPECT_S


class Nodes:
    """The living nodes of a cluster, in a stable order."""

    def __init__(self, config: RayConfig) -> None:
        self._config = config
        self._known: dict[str, _Known] = {}

    def listed(self, nodes: Iterable[Mapping[str, Any]]) -> None:
        """Take over Ray's list: who joined is to be looked at, who left is forgotten."""
        alive = {str(node["NodeID"]): node for node in nodes if node["Alive"]}
        for name in self._known.keys() - alive.keys():
            log.warning("node %s has left the cluster", name)
            del self._known[name]
        for name in sorted(alive.keys() - self._known.keys(), key=lambda n: (alive[n]["NodeManagerHostname"], n)):
            host, resources = str(alive[name]["NodeManagerHostname"]), alive[name]["Resources"]
            self._known[name] = _Known(node=_node(name, host, resources, self._config), declared=frozenset(resources))
            log.info("node %s is there: %s", name, self._known[name].node)

    def due(self, now_s: float) -> dict[str, bool]:
        """The nodes to look at now, which count as asked from here on, and whether it is for the first time."""
        due = [name for name, known in self._known.items() if known.asked_s == math.inf and known.next_look_s <= now_s]
        for name in due:
            self._known[name].asked_s = now_s
        return {name: not self._known[name].looked_at for name in due}

    def answered(self, name: str, looked: Looked | None, now_s: float) -> None:
        """A look has come back; None when it failed, as on a node that is going."""
        if (known := self._known.get(name)) is None:
            return
        known.asked_s, known.suspect = math.inf, looked is None
        known.next_look_s = now_s + (AGAIN_S if looked is None else LOOK_S)
        if looked is None:
            return
        # What is said of memory holds for as long as the node does, and only a first look asks for it.
        memory = known.node.gpu_memory_gb or looked.gpu_memory_gb
        known.node = replace(known.node, gpu_memory_gb=memory, disk_free_gb=looked.disk_free_gb, weights=looked.weights)
        known.looked_at = True
        if known.told:
            log.warning("node %s answers again", name)
            known.told = False

    def suspect(self, name: str) -> None:
        """An actor there could not be reached: it takes the answer to another look to clear the node."""
        if (known := self._known.get(name)) is not None:
            known.suspect, known.asked_s, known.next_look_s = True, math.inf, -math.inf

    def usable(self, now_s: float) -> tuple[Node, ...]:
        """Those that may get something new."""
        for name, known in self._known.items():
            if (known.suspect or known.late(now_s)) and not known.told:
                log.warning("node %s may be gone, it gets nothing new until it answers", name)
                known.told = True
        return tuple(known.node for known in self._known.values() if known.looked_at and not known.told)

    def declares(self, name: str, resource: str) -> bool:
        return name in self._known and resource in self._known[name].declared

    def awaited(self, now_s: float) -> bool:
        """Whether the first answer of some node is still to come."""
        return any(not (known.looked_at or known.suspect or known.late(now_s)) for known in self._known.values())


def _node(name: str, host: str, resources: Mapping[str, float], config: RayConfig) -> Node:
    """A node of a cluster that we joined; slots that it does not declare are taken as whole CPUs."""
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    types = [key.removeprefix(GPU_TYPE) for key in resources if key.startswith(GPU_TYPE)]
    cpu_servers = config.cpu_servers or max(1, cpus // 4)
    evaluators = config.evaluators or max(1, min(2 * (gpus or cpu_servers), cpus // 2))
    # A node without a CPU, as many a head is set up, is for nothing of ours.
    most = math.inf if cpus else 0
    return Node(
        name=name,
        host=host,
        gpus=gpus,
        gpu_type=types[0] if types else "",
        cpu_servers=int(resources.get(CPU_SERVER, min(cpu_servers, most))),
        evaluators=int(resources.get(EVALUATOR, min(evaluators, most))),
    )
