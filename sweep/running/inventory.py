"""What a cluster has, node by node, and where a server may run. Pure data: no Ray."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest

from sweep.errors import ResourceError
from sweep.planning.config import NodeGroup
from sweep.planning.plan import ServerPlan, on_cpu


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine, as found by Ray or described in a file."""

    name: str
    """Ray's id of it, or its name in the file."""
    host: str = ""
    """What people call the machine; empty where nobody knows."""
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


def described(groups: Mapping[str, NodeGroup]) -> tuple[Node, ...]:
    """The nodes of a cluster that is described and not there."""
    nodes = []
    for name, group in groups.items():
        cpu_servers = int(not group.gpus) if group.cpu_servers is None else group.cpu_servers
        for number in range(group.count):
            nodes.append(
                Node(
                    name=f"{name}-{number}" if group.count > 1 else name,
                    gpus=group.gpus,
                    gpu_type=group.gpu_type,
                    gpu_memory_gb=group.gpu_memory_gb,
                    cpu_servers=cpu_servers,
                    evaluators=group.evaluators or 2 * max(1, group.gpus or cpu_servers),
                    weights=frozenset(group.weights),
                )
            )
    return tuple(nodes)


def total_gpus(nodes: Iterable[Node]) -> float:
    return sum(node.gpus for node in nodes)


def fits(need: Need, node: Node) -> bool:
    """Whether the node, were it empty, could carry (one node's part of) the server."""
    if not need.gpus:
        return node.cpu_servers > 0
    # What nobody knows is not held against a node: vLLM says at its start what it lacks.
    typed = need.gpu_type is None or node.gpu_type.lower() in ("", need.gpu_type.lower())
    large = need.gpu_memory_gb is None or node.gpu_memory_gb is None or node.gpu_memory_gb >= need.gpu_memory_gb
    return node.gpus >= need.gpus and typed and large


class Places:
    """What is free on each node, and who holds the rest. Ray numbers the GPUs of a node as it likes; the numbers here
    only say which fractions share one."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._gpus = {name: [1.0] * int(node.gpus) for name, node in self._nodes.items()}
        """What is left of each GPU."""
        self._slots = {name: node.cpu_servers for name, node in self._nodes.items()}
        """For CPU servers."""
        self._held: dict[str, tuple[tuple[str, tuple[int, ...], float], ...]] = {}
        """By holder: node, its GPUs and how much of each; no GPU for a CPU slot."""
        self._by_free: dict[int, set[str]] = {}
        """Nodes by how many of their GPUs are wholly free: what fits is found without a look at what does not."""
        for name, gpus in self._gpus.items():
            self._by_free.setdefault(len(gpus), set()).add(name)
        self.total_gpus = sum(map(len, self._gpus.values()))
        self.free_gpus = float(self.total_gpus)
        self.total_slots = self.free_slots = sum(self._slots.values())

    def copy(self) -> "Places":
        other = Places()
        vars(other).update(vars(self))
        other._gpus = {name: [*gpus] for name, gpus in self._gpus.items()}
        other._slots, other._held = dict(self._slots), dict(self._held)
        other._by_free = {free: set(names) for free, names in self._by_free.items()}
        return other

    def find(self, need: Need, *, closed: Collection[str] = ()) -> tuple[str, ...]:
        """Where a server would be put now, as many nodes as it needs; none where it does not fit. `closed` nodes are
        kept for others.

        Nodes that hold the weights come first, then the fullest: what is left elsewhere stays whole for large servers.
        """
        suited: list[tuple[bool, float, str]] = []
        for left, names in self._fitting(need):
            suited += [
                (need.weights not in self._nodes[name].weights, left, name)
                for name in names
                if name not in closed and fits(need, self._nodes[name])
            ]
            if len(suited) >= need.nodes and not need.weights:
                break
        return tuple(name for *_, name in nsmallest(need.nodes, suited)) if len(suited) >= need.nodes else ()

    def nearest(self, need: Need, *, closed: Collection[str] = ()) -> tuple[str, ...]:
        """The nodes that lack least of what the server needs, to be kept for it; none where it can never start."""
        if not need.gpus:
            lacking = [name for name in self._nodes if name not in closed and fits(need, self._nodes[name])]
            return tuple(lacking[: need.nodes]) if len(lacking) >= need.nodes else ()
        found: list[str] = []
        for _, names in sorted(self._by_free.items(), reverse=True):
            found += sorted(name for name in names if name not in closed and fits(need, self._nodes[name]))
            if len(found) >= need.nodes:
                return tuple(found[: need.nodes])
        return ()

    def _fitting(self, need: Need) -> Iterator[tuple[float, Collection[str]]]:
        """Nodes with room, by what would be left, the least first."""
        if not need.gpus:
            yield from ((slots - 1, (name,)) for name, slots in self._slots.items() if slots)
            return
        beside: set[str] = set()
        if need.gpus < 1:
            # A fraction goes beside others first, into the GPU that it fills best.
            for name, gpus in self._gpus.items():
                shared = [left - need.gpus for left in gpus if need.gpus <= left + ROUNDING and left < 1]
                if shared:
                    beside.add(name)
                    yield min(shared), (name,)
        for free, names in sorted(self._by_free.items()):
            if free >= need.gpus and names:
                yield free, names - beside

    @property
    def room(self) -> float:
        """No server of more GPUs on a node fits anywhere; a fraction may not either."""
        return max((free for free, names in self._by_free.items() if names), default=0) or min(1.0, self.free_gpus)

    def free_on(self, node: str) -> float:
        return sum(self._gpus[node])

    def take(self, holder: str, need: Need, nodes: Iterable[str]) -> None:
        """A node that is no longer there has nothing to hold."""
        held: list[tuple[str, tuple[int, ...], float]] = []
        for name in nodes:
            if name not in self._nodes:
                continue
            if not need.gpus:
                self._slots[name] -= 1
                self.free_slots -= 1
                held.append((name, (), 0.0))
                continue
            gpus, share = self._gpus[name], min(1.0, need.gpus)
            # Best fit here too: a fraction goes to the fullest GPU that has room for it.
            fitting = sorted((left, number) for number, left in enumerate(gpus) if share <= left + ROUNDING)
            numbers = tuple(number for _, number in fitting[: max(1, int(need.gpus))])
            self._change(name, numbers, -share)
            held.append((name, numbers, share))
        self._held[holder] = tuple(held)

    def give_back(self, holder: str) -> None:
        for name, numbers, share in self._held.pop(holder, ()):
            if numbers:
                self._change(name, numbers, share)
            else:
                self._slots[name] += 1
                self.free_slots += 1

    def held(self, holder: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """The holder's nodes and its GPUs there."""
        return tuple((name, numbers) for name, numbers, _ in self._held.get(holder, ()))

    def _change(self, name: str, numbers: Iterable[int], by: float) -> None:
        gpus = self._gpus[name]
        before = gpus.count(1.0)
        for number in numbers:
            left = gpus[number] + by
            self.free_gpus += by
            # Tenths do not add up to one.
            gpus[number] = 0.0 if left < ROUNDING else 1.0 if left > 1 - ROUNDING else left
        if (after := gpus.count(1.0)) != before:
            self._by_free[before].remove(name)
            self._by_free.setdefault(after, set()).add(name)


ROUNDING = 1e-6
"""Fractions of a GPU add up with rounding errors."""


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
