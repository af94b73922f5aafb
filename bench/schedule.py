"""`python -m bench.schedule`: how long simulated sweeps take, against a bound that none can beat and simpler ways.

Each sweep is drawn from a seed: 2 to 64 models of 0.5 to 72 billion parameters, 3 to 60 tasks from seconds to hours,
1 to 512 GPUs on nodes of up to eight. True costs differ from the expected ones by 30 % (lognormal, each cell for
itself), starts by 30 % too, and one server in a hundred dies. `--seeds 20` is a short form; `--draws 6` compares with
longest first over several draws of what is not known beforehand.

The bound is the least T for which both hold, with the sweep's true costs and no deaths:

- All work and all unavoidable starts fit into T seconds of all GPUs. A server that is started does no more than T less
  its start, so a model with more work than that needs a second one and its start, and so on.
- Every model fits: its fastest start, then its work on as many servers as the nodes have room for, or its longest last
  answers.
"""

import argparse
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.rows import Figure
from sweep.running.inventory import Need, Node
from sweep.running.schedule import Action, StartServer, View, cells, retirements
from sweep.running.simulate import SimulatedCell, SimulatedServer, StuckError, simulate

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
    work = []
    for n, (cost_s, tail_s) in enumerate(zip(task_s, last_s, strict=True)):
        expected_s = cost_s * billions / 7 / gpus * chance.lognormvariate(0, 0.2)
        true_s = expected_s * math.exp(noise * chance.gauss(0, 1))
        work.append(
            SimulatedCell(key=f"{name}/{n}", expected_s=expected_s, true_s=true_s, prepare_s=2.0, last_s=tail_s)
        )
    return with_lives(
        SimulatedServer(
            name=name,
            need=Need(gpus=gpus),
            replicas=None,
            cells=tuple(work),
            start_s=start_s,
            starts_s=lambda _: start_s,
        ),
        draws=chance.random(),
    )


def with_lives(server: SimulatedServer, *, draws: float) -> SimulatedServer:
    """The server with starts and deaths that follow from `draws`."""

    def starts_s(life: int) -> float:
        return server.start_s * random.Random(draws + life).lognormvariate(0, NOISE)

    def dies_after_s(life: int) -> float:
        luck = random.Random(draws - 1 - life)
        return luck.uniform(0, 3600) if luck.random() < DEATHS else math.inf

    return replace(server, starts_s=starts_s, dies_after_s=dies_after_s)


def drawn_again(seed: int, draw: int) -> Sweep:
    """The sweep of a seed, expected as ever, with other true costs, starts and deaths in each draw but the first."""
    sweep = drawn(seed)
    if not draw:
        return sweep
    servers = []
    for number, server in enumerate(sweep.servers):
        chance = random.Random(f"{seed}/{draw}/{number}")
        again = with_lives(server, draws=chance.random())
        cells = (replace(c, true_s=c.expected_s * math.exp(NOISE * chance.gauss(0, 1))) for c in server.cells)
        servers.append(replace(again, cells=tuple(cells)))
    return replace(sweep, servers=tuple(servers))


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
    return [*retirements(view), *cells(view)]


def need_of(view: View, name: str) -> Need:
    need = view[name].need
    assert need is not None  # no drawn server is someone else's
    return need


def placed(view: View, names: Iterable[str]) -> Iterator[StartServer]:
    """One more server for each of these while there is room; none overtakes one that has to wait."""
    places = view.places.copy()
    for number, name in enumerate(names):
        need = need_of(view, name)
        if not (nodes := places.find(need)):
            return
        places.take(f"new {number}", need, nodes)
        yield StartServer(server=name, nodes=nodes, reason="")


def first_come(view: View) -> list[Action]:
    """One server a model, in the order of the plan."""
    if not view.places.room:
        return others(view)
    waiting = sorted([*view.gpus.back.values(), *view.gpus.first.values()], key=lambda known: known.order)
    return [*others(view), *placed(view, (k.view.name for k in waiting if not k.view.resting))]


def longest_first(view: View) -> list[Action]:
    """The model with the longest time left gets the next server, whatever its start costs."""
    if not view.places.room:
        return others(view)
    starts: list[StartServer] = []
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
        need = need_of(view, name)
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
    if not view.places.room:
        return others(view)
    known = [*view.gpus.back.values(), *view.gpus.first.values(), *view.gpus.served.values()]
    holding = [k for k in known if k.view.lives]
    turn = min(holding or known, key=lambda k: k.order, default=None)
    if turn is None or turn.view.resting or (not holding and view.places.free_gpus < view.places.total_gpus):
        return others(view)
    return [*others(view), *placed(view, (turn.view.name for _ in range(view.places.total_gpus)))]


RIVALS: Mapping[str, Callable[[View], list[Action]]] = {
    "first come, one server a model": first_come,
    "longest first, with replicas": longest_first,
    "one model at a time": one_at_a_time,
}


def large(models: int = 1_000, tasks: int = 60, nodes: int = 512) -> Sweep:
    """What the scheduler must keep up with."""
    chance = random.Random(0)
    task_s = [chance.lognormvariate(math.log(60), 1.5) for _ in range(tasks)]
    last_s = [chance.uniform(0.5, 5) for _ in range(tasks)]
    return Sweep(
        nodes=cluster(nodes * NODE_GPUS),
        servers=tuple(
            model(f"m{n}", chance.random(), task_s, last_s, largest=NODE_GPUS, noise=NOISE) for n in range(models)
        ),
    )


def against_bound(seeds: Sequence[int]) -> Iterator[Figure]:
    for name, noise, bar in (("misestimated by 30 %", NOISE, 1.08), ("exact costs", 0.0, 1.05)):
        ratios = []
        for seed in seeds:
            sweep = drawn(seed, noise=noise)
            ratios.append(simulate(sweep.nodes, sweep.servers).makespan_s / bound_s(sweep))
        spread = {"seeds": len(seeds), "worst": max(ratios), "worst_seed": seeds[ratios.index(max(ratios))]}
        yield Figure(
            row=f"makespan over bound, median, {name}",
            value=statistics.median(ratios),
            bar=bar,
            at_most=True,
            seen=spread,
        )
        if noise:
            tenth = statistics.quantiles(ratios, n=10)[-1]
            yield Figure(
                row=f"makespan over bound, worst, {name}",
                value=max(ratios),
                bar=1.3,
                at_most=True,
                seen={"one_in_ten_above": tenth},
            )


def rival(sweep: Sweep, decide: Callable[[View], list[Action]]) -> tuple[float, float]:
    """Its makespan and GPU-seconds; infinite where its servers and evaluators wait for each other for ever, as after
    some deaths."""
    try:
        outcome = simulate(sweep.nodes, sweep.servers, decide=decide)
    except StuckError:
        return math.inf, math.inf
    return outcome.makespan_s, outcome.gpu_s


def in_the_mean(seeds: Sequence[int], draws: int) -> Figure:
    """Longest first and ours over many draws of each sweep: what is left of a difference when luck is out of it."""
    means: dict[int, float] = {}
    single: list[float] = []
    for seed in seeds:
        sweeps = [drawn_again(seed, draw) for draw in range(draws)]
        ours = [simulate(sweep.nodes, sweep.servers).makespan_s for sweep in sweeps]
        theirs = [rival(sweep, longest_first)[0] for sweep in sweeps]
        # A draw in which it waits for ever has no mean.
        ended = [(their, our) for their, our in zip(theirs, ours, strict=True) if their < math.inf]
        means[seed] = round(sum(t for t, _ in ended) / sum(o for _, o in ended), 9) if ended else math.inf
        single += [their / our for their, our in zip(theirs, ours, strict=True)]
    more = {
        "draws": draws,
        "draws_stuck": sum(ratio == math.inf for ratio in single),
        "sweeps_shorter": sum(ratio < 1 for ratio in means.values()),
        "seed": min(means, key=means.__getitem__),
        "draws_shorter_by_over_1_percent": sum(ratio < 0.99 for ratio in single) / len(single),
        "draws_shorter_by_over_5_percent": sum(ratio < 0.95 for ratio in single) / len(single),
        "draw_least": min(single),
    }
    row = "longest first, with replicas: its mean makespan over ours, least"
    return Figure(row=row, value=min(means.values()), bar=1.0, at_most=False, seen=more)


def against_rivals(seeds: Sequence[int]) -> Iterator[Figure]:
    sweeps = [drawn(seed) for seed in seeds]
    ours = [simulate(sweep.nodes, sweep.servers) for sweep in sweeps]
    for name, decide in RIVALS.items():
        theirs = [rival(sweep, decide) for sweep in sweeps]
        # The same seconds added up in another order differ in the fifteenth digit.
        ratios = [round(their_s / our.makespan_s, 9) for (their_s, _), our in zip(theirs, ours, strict=True)]
        median, stuck = statistics.median(ratios), ratios.count(math.inf)
        if decide is first_come:
            more = {
                "stuck": stuck,
                "least": min(ratios),
                "most": max((r for r in ratios if r < math.inf), default=math.inf),
            }
            yield Figure(row=f"{name}: its makespan over ours, median", value=median, bar=1.5, at_most=False, seen=more)
            continue
        more = {
            "stuck": stuck,
            "median": median,
            "shorter": sum(ratio < 1 for ratio in ratios),
            "shorter_by_over_1_percent": sum(ratio < 0.99 for ratio in ratios),
            "shorter_by_over_5_percent": sum(ratio < 0.95 for ratio in ratios),
            "seed": seeds[ratios.index(min(ratios))],
            "gpu_hours_median": statistics.median(gpu_s / o.gpu_s for (_, gpu_s), o in zip(theirs, ours, strict=True)),
        }
        yield Figure(row=f"{name}: its makespan over ours, least", value=min(ratios), bar=1.0, at_most=False, seen=more)


def at_scale() -> Figure:
    sweep = large()
    start, began_s = time.process_time(), time.perf_counter()
    outcome = simulate(sweep.nodes, sweep.servers)
    took_s = time.process_time() - start
    more = {
        "wall_s": time.perf_counter() - began_s,
        "decisions": outcome.decisions,
        "ms_a_decision": 1000 * outcome.deciding_s / outcome.decisions,
        "servers_started": len(outcome.spans),
        "makespan_over_bound": outcome.makespan_s / bound_s(sweep),
    }
    return Figure(
        row="1,000 models x 60 tasks on 4,096 GPUs simulated, seconds of one core",
        value=took_s,
        bar=120.0,
        at_most=True,
        seen=more,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.schedule", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"sweeps that are drawn ({SEEDS})")
    parser.add_argument("--first", type=int, default=0, help="the first of their seeds (0)")
    parser.add_argument(
        "--draws",
        type=int,
        help="nothing but longest first and ours over so many draws of each sweep's costs, starts and deaths: what of "
        "their difference is more than luck",
    )
    given = parser.parse_args(arguments)
    if given.draws is not None and given.draws < 1:
        parser.error("--draws: at least 1")
    seeds = range(given.first, given.first + given.seeds)
    claims: Iterable[Figure]
    if given.draws is not None:
        claims = [in_the_mean(seeds, given.draws)]
    else:
        claims = itertools.chain(against_bound(seeds), against_rivals(seeds), [at_scale()])
    holds = True
    for claim in claims:
        print(claim.line(), flush=True)
        holds &= claim.holds
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
