"""What a cluster has, node by node, and where a server may run. Pure data: no Ray."""

from dataclasses import dataclass


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


def fits(need: Need, node: Node) -> bool:
    """Whether the node, were it empty, could carry (one node's part of) the server."""
    if not need.gpus:
        return node.cpu_servers > 0
    typed = need.gpu_type is None or need.gpu_type.lower() == node.gpu_type.lower()
    # Memory that nobody knows is not held against a node: vLLM says at its start what it lacks.
    large = need.gpu_memory_gb is None or node.gpu_memory_gb is None or node.gpu_memory_gb >= need.gpu_memory_gb
    return node.gpus >= need.gpus and typed and large
