"""What a cluster has, node by node, and where a server may run. Pure data: no Ray."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sweep.errors import ResourceError
from sweep.planning.plan import ServerPlan, on_cpu


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine, as found by Ray or described in a file."""

    name: str
    """Ray's id of it, or its name in the file."""
    gpus: float = 0.0
    gpu_type: str = ""
    """As Ray's accelerator type has it (`H100`), or what the file says; empty where nobody knows."""
    gpu_memory_gb: float | None = None
    """Of each GPU; None where nobody knows."""
    cpu_servers: int = 0
    """CPU servers that it carries at the same time."""
    evaluators: int = 0
    """Evaluators that it carries at the same time."""
    disk_free_gb: float | None = None
    """For weights, where they are kept; None where nobody knows."""
    weights: frozenset[str] = frozenset()
    """Paths of models whose weights it holds already."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one server takes."""

    gpus: float = 0.0
    """On each of its nodes: a fraction shares one GPU, 0 takes a CPU slot."""
    nodes: int = 1
    """More than one only for a model that no node can hold."""
    gpu_type: str | None = None
    gpu_memory_gb: float | None = None
    """At least, of each GPU."""
    weights: str = ""
    """The model's path: a node that holds it is preferred."""


def need(server: ServerPlan, nodes: Sequence[Node]) -> Need | None:
    """What a server takes of this cluster; None for one that someone else runs."""
    if server.external:
        return None
    model = server.model
    if on_cpu(server, cluster_gpus=total_gpus(nodes)):
        return Need(weights=model.path)
    return Need(
        gpus=server.gpus,
        nodes=model.nodes,
        gpu_type=model.gpu_type,
        gpu_memory_gb=model.gpu_memory_gb,
        weights=model.path,
    )


def total_gpus(nodes: Iterable[Node]) -> float:
    return sum(node.gpus for node in nodes)


def fits(need: Need, node: Node) -> bool:
    """Whether the node, were it empty, could carry (one node's part of) the server."""
    if not need.gpus:
        return node.cpu_servers > 0
    typed = need.gpu_type is None or need.gpu_type.lower() == node.gpu_type.lower()
    # Memory that nobody knows is not held against a node: vLLM says at its start what it lacks.
    large = need.gpu_memory_gb is None or node.gpu_memory_gb is None or node.gpu_memory_gb >= need.gpu_memory_gb
    return node.gpus >= need.gpus and typed and large


def require(servers: Mapping[str, ServerPlan], nodes: Sequence[Node]) -> None:
    """Raise ResourceError when some server could never start, with all that are concerned and why."""
    if short := shortages(servers, nodes):
        raise ResourceError(
            f"not enough GPUs: {'. '.join(short)}. Run it where they are (`ray.address=host:port`), "
            "or set `device: cpu` for models that a CPU can serve"
        )


def shortages(servers: Mapping[str, ServerPlan], nodes: Sequence[Node]) -> list[str]:
    """Which servers could never start on these nodes, were they empty: a sentence for each thing that is missing."""
    short: dict[str, list[str]] = {}
    for name, server in servers.items():
        wanted = need(server, nodes)
        if wanted is not None and sum(fits(wanted, node) for node in nodes) < wanted.nodes:
            short.setdefault(_there(wanted, nodes), []).append(f"{name} needs {_asked(wanted)}")
    return ["; ".join([*each, there]) for there, each in short.items()]


def _asked(need: Need) -> str:
    if not need.gpus:
        return "a place for a CPU server"
    gpus = f"{need.gpus:g} GPU{'s' if need.gpus > 1 else ''}"
    kind = f" of type {need.gpu_type}" if need.gpu_type is not None else ""
    memory = f" with {need.gpu_memory_gb:g} GB" if need.gpu_memory_gb is not None else ""
    return f"{gpus}{kind}{memory} on {'one node' if need.nodes == 1 else f'each of {need.nodes} nodes'}"


def _there(need: Need, nodes: Sequence[Node]) -> str:
    if not need.gpus:
        return "no node has one"
    if not total_gpus(nodes):
        return "there is none here"
    enough = sum(node.gpus >= need.gpus for node in nodes)
    if not enough:
        return f"the largest node has {max(node.gpus for node in nodes):g}"
    return f"{_nodes(enough)} so many" if enough < need.nodes else f"the cluster has {_kinds(nodes)}"


def _nodes(count: int) -> str:
    return "1 node has" if count == 1 else f"{count} nodes have"


def _kinds(nodes: Sequence[Node]) -> str:
    """`2 nodes of 8 H100 (80 GB), 1 node of 4 A100-40G`."""
    kinds = Counter(
        f"{node.gpus:g} {node.gpu_type or 'GPUs'}{f' ({node.gpu_memory_gb:g} GB)' if node.gpu_memory_gb else ''}"
        for node in nodes
        if node.gpus
    )
    return ", ".join(f"{count} node{'s' if count > 1 else ''} of {kind}" for kind, count in kinds.items())
