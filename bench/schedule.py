"""`python -m bench.schedule`: how long simulated sweeps take, against a bound that none can beat and against simple ways.

Each sweep is drawn from a seed: 2 to 64 models of 0.5 to 72 billion parameters, 3 to 60 tasks from seconds to hours,
1 to 512 GPUs on nodes of up to eight. True costs differ from the expected ones by 30 % (lognormal, each cell for
itself), starts by 30 % too, and one server in a hundred dies. `--seeds 20` is a short form.

The bound is the least T for which both hold, with the sweep's true costs and no deaths:

- All work and all unavoidable starts fit into T seconds of all GPUs. A server that is started does no more than T less
  its start, so a model with more work than that needs a second one and its start, and so on.
- Every model fits: its fastest start, then its work on as many servers as the nodes have room for, or its longest last
  answers.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sweep.running.inventory import Need, Node
from sweep.running.schedule import Action, StartServer, View, schedule
from sweep.running.simulate import SimulatedCell, SimulatedServer

NOISE = 0.3
"""Standard deviation of the logarithm of true over expected."""

DEATHS = 0.01
"""Of servers."""

NODE_GPUS = 8

SEEDS = 200


@dataclass(frozen=True, kw_only=True)
class Sweep:
    nodes: tuple[Node, ...]
    servers: tuple[SimulatedServer, ...]


def spread(chance: random.Random, least: float, most: float) -> float:
    """Even on a logarithmic scale."""
    return math.exp(chance.uniform(math.log(least), math.log(most)))


def cluster(gpus: int) -> tuple[Node, ...]:
    sizes = [NODE_GPUS] * (gpus // NODE_GPUS) + [gpus % NODE_GPUS] * (gpus % NODE_GPUS > 0)
    return tuple(Node(name=f"n{n}", gpus=size, evaluators=2 * size) for n, size in enumerate(sizes))


def drawn(seed: int, *, noise: float = NOISE) -> Sweep:
    """The sweep of a seed. Without noise its costs are as expected, and its starts and deaths are the same."""
    chance = random.Random(seed)
    models, tasks = round(spread(chance, 2, 64)), round(spread(chance, 3, 60))
    nodes = cluster(round(spread(chance, 1, 512)))
    task_s = [chance.lognormvariate(math.log(60), 1.5) for _ in range(tasks)]
    last_s = [chance.uniform(0.5, 5) for _ in range(tasks)]
    return Sweep(
        nodes=nodes,
        servers=tuple(
            model(f"m{n}", chance.random(), task_s, last_s, largest=int(max(node.gpus for node in nodes)), noise=noise)
            for n in range(models)
        ),
    )


def model(
    name: str, seed: float, task_s: Sequence[float], last_s: Sequence[float], *, largest: int, noise: float
) -> SimulatedServer:
    """A model whose speed, GPUs and starts follow from its size, which is at most what a node of so many GPUs holds."""
    chance = random.Random(seed)
    billions = spread(chance, 0.5, min(72, 30 * largest))
    gpus = 1
    while gpus * 2 <= largest and (billions > 30 * gpus or chance.random() < 0.1):
        gpus *= 2
    start_s = 40 + 2 * billions
    cells = []
    for n, (cost_s, tail_s) in enumerate(zip(task_s, last_s, strict=True)):
        expected_s = cost_s * billions / 7 / gpus * chance.lognormvariate(0, 0.2)
        true_s = expected_s * math.exp(noise * chance.gauss(0, 1))
        cells.append(
            SimulatedCell(key=f"{name}/{n}", expected_s=expected_s, true_s=true_s, prepare_s=2.0, last_s=tail_s)
        )
    draws = chance.random()

    def starts_s(life: int) -> float:
        return start_s * random.Random(draws + life).lognormvariate(0, NOISE)

    def dies_after_s(life: int) -> float:
        luck = random.Random(draws - 1 - life)
        return luck.uniform(0, 3600) if luck.random() < DEATHS else math.inf

    return SimulatedServer(
        name=name,
        need=Need(gpus=gpus),
        replicas=None,
        cells=tuple(cells),
        start_s=start_s,
        starts_s=starts_s,
        dies_after_s=dies_after_s,
    )


def bound_s(sweep: Sweep) -> float:
    """No schedule ends earlier; see above."""
    gpus = sum(node.gpus for node in sweep.nodes)
    rooms = {s.name: sum(int(node.gpus // s.need.gpus) for node in sweep.nodes) for s in sweep.servers}
    work_s = {s.name: sum(cell.true_s for cell in s.cells) for s in sweep.servers}
    starts_s = {s.name: [s.starts_s(life) for life in range(rooms[s.name] + 8)] for s in sweep.servers}
    alone_s = max(
        min(starts_s[s.name]) + max(work_s[s.name] / rooms[s.name], max(cell.last_s for cell in s.cells))
        for s in sweep.servers
    )

    def fits(horizon_s: float) -> bool:
        total_s = 0.0
        for server in sweep.servers:
            left_s, taken_s = work_s[server.name], work_s[server.name]
            for start_s in starts_s[server.name]:
                if left_s <= 0:
                    break
                left_s -= max(0.0, horizon_s - start_s)
                taken_s += min(start_s, horizon_s)
            total_s += server.need.gpus * taken_s
        return total_s <= gpus * horizon_s

    low, high = alone_s, alone_s
    while not fits(high):
        high *= 2
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


# What it is compared with. Cells and retirements are decided as ever.


def others(view: View) -> list[Action]:
    return [action for action in schedule(view) if not isinstance(action, StartServer)]


def placed(view: View, names: Iterable[str], *, most: float = math.inf, strict: bool) -> Iterator[StartServer]:
    """One more server for each of these while there is room; `strict`: none overtakes one that has to wait."""
    places = view.places.copy()
    for number, name in enumerate(names):
        need = view[name].need
        nodes = places.find(need)
        if nodes:
            places.take(f"new {number}", need, nodes)
            yield StartServer(server=name, nodes=nodes, reason="")
        elif strict:
            return


def first_come(view: View) -> list[Action]:
    """One server a model, in the order of the plan."""
    waiting = sorted([*view.gpus.back.values(), *view.gpus.first.values()], key=lambda known: known.order)
    return [*others(view), *placed(view, (k.view.name for k in waiting if not k.view.resting), strict=True)]


def longest_first(view: View) -> list[Action]:
    """The model with the longest time left gets the next server, whatever its start costs."""
    starts = []
    places = view.places.copy()
    left = {
        known.view.name: (known.view.work_s, known.live)
        for some in (view.gpus.back, view.gpus.first, view.gpus.served)
        for known in some.values()
        if not known.view.resting and known.view.work_s > 0
    }
    while left:
        name = max(left, key=lambda name: left[name][0] / (left[name][1] or 1e-3))
        work_s, live = left[name]
        need = view[name].need
        if nodes := places.find(need):
            places.take(f"new {len(starts)}", need, nodes)
            starts.append(StartServer(server=name, nodes=nodes, reason=""))
            left[name] = (work_s, live + 1)
        elif not live:
            break  # nothing overtakes a first server
        else:
            del left[name]
    return [*others(view), *starts]


def one_at_a_time(view: View) -> list[Action]:
    """Each model has the whole cluster until it is done."""
    known = [*view.gpus.back.values(), *view.gpus.first.values(), *view.gpus.served.values()]
    holding = [k for k in known if k.view.lives]
    turn = min(holding or known, key=lambda k: k.order, default=None)
    if turn is None or turn.view.resting or (not holding and view.places.free_gpus < view.places.total_gpus):
        return others(view)
    return [*others(view), *placed(view, (turn.view.name for _ in range(view.places.total_gpus)), strict=True)]


RIVALS: Mapping[str, Callable[[View], list[Action]]] = {
    "first come, one server a model": first_come,
    "longest first, with replicas": longest_first,
    "one model at a time": one_at_a_time,
}
