"""Nodes, GPUs, actors, waiting. The only module that knows Ray.

Ray carries control: starting, stopping, messages and their events. Requests go over HTTP from evaluators to servers.
Both kinds of actor are made without restarts or retries: what happens after a loss is the runner's decision.
"""

import http.client
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import services
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sweep.errors import ResourceError, ServerError, ServerFault, SweepError, boundary
from sweep.evaluating.concurrency import LOOK_S, Controller, Load
from sweep.evaluating.evaluator import EvaluatorProcess, Event
from sweep.evaluating.preflight import Check, Expected, Facts, Inspection, inspect
from sweep.planning.config import RayConfig
from sweep.planning.hub import Part, Source, cache, lacking
from sweep.planning.plan import ServerPlan, on_cpu
from sweep.running.inventory import Node, total_gpus
from sweep.running.machine import CPU_SERVER, EVALUATOR, local_node, ray_address, starts_local
from sweep.running.nodes import Looked, Nodes
from sweep.serving import gpu
from sweep.serving.engine import ServerPart
from sweep.serving.external import ExternalServer
from sweep.serving.server import Endpoint, Server, part_name

log = logging.getLogger(__name__)

STOP_S = 20.0
"""Servers get so long to end by themselves; what hangs after that is left to their supervisors, which kill it."""

DEATH_SEEN_S = 1.0
"""A server's death is known after so long at the latest; a request that it fails may be known earlier."""

DEATH_PERIOD_S = 0.05

PLACE_S = 30.0
"""Ray starts an actor within a second or two of what it needs being free, on a busy machine within ten."""

LOAD_S = 5.0
"""Between two words of a server's figures while its limit stays."""

LIST_S = 1.0
"""Between two looks at Ray's list of nodes, which is one small call."""

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
"""What these are where the sweep is launched holds for its servers and evaluators on every node, whose own environment
is that of whoever started Ray there."""


@dataclass(frozen=True, kw_only=True)
class ServerReady:
    life: str
    endpoint: Endpoint
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class ServerFailed:
    """It never became ready, and nothing of it is left."""

    life: str
    error: str
    passing: bool = False
    """Another start may succeed."""
    infrastructure: bool = False
    """Its node or its actor was taken away; the server had no part in it."""
    checks: tuple[Check, ...] = ()
    """What preflight had seen of it, when it came so far."""


@dataclass(frozen=True, kw_only=True)
class ServerLost:
    """It was ready and is dead, unasked; ServerStopped follows when nothing of it is left and its GPUs are free."""

    life: str
    reason: str
    infrastructure: bool = False
    """As with ServerFailed."""


@dataclass(frozen=True, kw_only=True)
class ServerLoad:
    """How many sequences may be in flight at a ready server, and how it stands; told when that changes."""

    life: str
    load: Load


@dataclass(frozen=True, kw_only=True)
class ServerStopped:
    life: str


@dataclass(frozen=True, kw_only=True)
class EvaluatorReady:
    """Ray has found a place for it; before that it may wait for ever."""

    evaluator: str


@dataclass(frozen=True, kw_only=True)
class EvaluatorSaid:
    evaluator: str
    event: Event


@dataclass(frozen=True, kw_only=True)
class EvaluatorLost:
    evaluator: str
    reason: str
    infrastructure: bool = False
    """Its node or its actor was taken away; what it was doing had no part in it."""


ClusterEvent = (
    ServerReady
    | ServerFailed
    | ServerLoad
    | ServerLost
    | ServerStopped
    | EvaluatorReady
    | EvaluatorSaid
    | EvaluatorLost
)


@dataclass(kw_only=True)
class _Unplaced:
    """An actor that Ray has not started yet."""

    name: str
    node: str | None
    """The only one where it may start."""
    needs: dict[str, float]
    """Ray's resources."""
    next_look_s: float = field(default_factory=lambda: time.monotonic() + PLACE_S)
    told: bool = False
    """That it waits."""


# No `async def` in an actor: it would put every method on one event loop, where lm-eval and our own asyncio.run cannot
# start theirs. Concurrency groups give the sentinel and the stop call threads of their own.
class _ServerHost:
    """One server's life on its node, or one part of it on one of its nodes."""

    def __init__(
        self,
        plan: ServerPlan,
        life: str,
        api_key: str,
        log_path: str,
        loopback: bool,
        secrets: Sequence[str],
        variables: Mapping[str, str],
    ) -> None:
        _be_ordinary(variables)
        self._life = life
        self._log_path = log_path
        self._pressure = (0, 0)
        self._stopped = False
        self._server: Server | ExternalServer
        if plan.external:
            self._server = ExternalServer(plan, name=life)
        else:
            self._server = Server(
                plan,
                name=life,
                api_key=api_key,
                gpu_ids=[str(gpu) for gpu in ray.get_gpu_ids()],
                secrets=secrets,
                log_path=Path(log_path),
                host="127.0.0.1" if loopback else ray.util.get_node_ip_address(),
            )

    def meet(self, nodes: int) -> ServerPart:
        """Before `start`, for the first part of a server of several nodes; the others follow what comes back."""
        assert isinstance(self._server, Server)
        return self._server.meet(nodes)

    def follow(self, first: ServerPart, rank: int) -> None:
        """Lasts as long as this other part of a server, and raises nothing once that was stopped, as `start`."""
        assert isinstance(self._server, Server)
        try:
            self._server.follow(replace(first, rank=rank))
        except ServerError:
            if not self._stopped:
                raise

    def start(self, expected: Mapping[str, Expected]) -> tuple[Endpoint, Inspection] | None:
        """Nothing is left of a server that is refused, as of one whose start raises. None once it was stopped: nobody
        waits for it any more, and Ray would show its user an error that nobody asked for."""
        try:
            endpoint = self._server.start()
            try:
                inspection = self._inspect(endpoint, expected)
            except BaseException:
                self._server.stop()
                raise
        except ServerError:
            if self._stopped:
                return None
            raise
        if inspection.refusal is not None:
            self._server.stop()
        return endpoint, inspection

    def _inspect(self, endpoint: Endpoint, expected: Mapping[str, Expected]) -> Inspection:
        """Raises ServerFault when the server died of it or before: its answers then tell nothing of what it can do."""
        try:
            inspection = inspect(endpoint, expected)
        except ServerError as error:
            self._see_alive(str(error))
            raise
        if inspection.refusal is not None:
            self._see_alive(inspection.refusal)
        return inspection

    def _see_alive(self, seen: str) -> None:
        deadline = time.monotonic() + DEATH_SEEN_S
        while self._server.alive():
            if time.monotonic() > deadline:
                return
            time.sleep(DEATH_PERIOD_S)
        log.info("%s died in preflight: %s", self._life, seen)
        raise ServerFault(f"{self._life} died in preflight: {self._server.wait()} (see {self._log_path})")

    @ray.method(num_returns="streaming", concurrency_group="tuning")
    def tune(self, controller: Controller) -> Iterator[Load]:
        """The limit and the server's figures until it is gone, the first as soon as it changes."""
        told, told_s, silent, refused_before = controller.load, time.monotonic(), False, 0
        meter = gpu.Meter([str(one) for one in ray.get_gpu_ids()])
        while self._server.alive():
            time.sleep(LOOK_S)
            (wanted, refused), seen = self._pressure, None
            if wanted and not silent:
                try:
                    seen = self._server.figures()
                except ValueError as error:
                    log.info("%s does not tell how it stands, its limit stays: %s", self._life, error)
                    silent = True
                except (OSError, http.client.HTTPException) as error:
                    log.debug("%s did not tell how it stands: %s", self._life, error)
            now_s = time.monotonic()
            controller.look(now_s=now_s, seen=seen, wanted=wanted, refused=refused - refused_before)
            refused_before, load = refused, replace(controller.load, gpu_use=meter.read())
            if load != told and (load.limit != told.limit or now_s > told_s + LOAD_S):
                told, told_s = load, now_s
                yield load

    def press(self, wanted: int, refused: int) -> None:
        """How many sequences evaluators could have in flight here, and how many requests were refused in all."""
        self._pressure = (wanted, refused)

    @ray.method(concurrency_group="sentinel")
    def wait(self) -> str:
        return str(self._server.wait())

    @ray.method(concurrency_group="stop")
    def stop(self) -> None:
        self._stopped = True
        self._server.stop()


class _EvaluatorHost:
    """One evaluator's child process on its node."""

    def __init__(self, log_path: str, secrets: Sequence[str], variables: Mapping[str, str]) -> None:
        _be_ordinary(variables)
        self._process = EvaluatorProcess(Path(log_path), secrets=secrets, given=variables.keys())

    @ray.method(num_returns="streaming")
    def events(self) -> Iterator[Event]:
        """Everything the child says, until it is gone."""
        while True:
            try:
                yield self._process.receive()
            except EOFError:
                self._process.stop()  # takes its folder away
                return

    @ray.method(concurrency_group="messages")
    def send(self, message: Any) -> None:
        try:
            self._process.send(message)
        except OSError:
            log.info("the evaluator is gone; its stream of events says so")

    @ray.method(concurrency_group="messages")
    def stop(self) -> None:
        self._process.stop()


# The scheduler owns retries: a restart of Ray's own would load a model again behind its back.
_ServerActor: Any = ray.remote(
    num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"stop": 1, "sentinel": 1, "tuning": 1}
)(_ServerHost)
_EvaluatorActor: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"messages": 1})(
    _EvaluatorHost
)


@ray.remote(num_cpus=0, max_retries=0)
def _look(sources: Mapping[str, Sequence[Source]], variables: Mapping[str, str], *, first: bool) -> Looked:
    """What a node has. `sources` are parts of the hub's repositories by the path of the model that needs them; they are
    looked for where `variables` put the hub's cache."""
    os.environ.update(variables)
    folder = cache()
    while not folder.exists():
        folder = folder.parent
    return Looked(
        gpu_memory_gb=gpu.smallest_gb() if first else None,
        disk_free_gb=shutil.disk_usage(folder).free // 10**9,  # whole, so that a node seldom changes
        weights=frozenset(
            path for path, parts in sources.items() if (not any(map(lacking, parts)) if parts else os.path.exists(path))
        ),
    )


@contextmanager
def _in_groups_of_their_own() -> Iterator[None]:
    """Ray's processes that are started meanwhile do not get the signals of the launch's process group.

    `timeout`, process managers and some schedulers signal all of it. Ray's processes would end at once, and Ray's
    client would end the launch after 5 s, in the middle of its stop. Ray has no setting for it (2.60 blocks SIGINT
    alone, services.py 1049).
    """
    theirs = services.ConsolePopen
    services.ConsolePopen = partial(theirs, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = theirs


def _be_ordinary(variables: Mapping[str, str]) -> None:
    """Take over `variables`, and Ray's mark off this process.

    Ray marks its workers as the first to be killed when memory runs out; a server of ours is no such thing.
    """
    os.environ.update(variables)
    try:
        Path("/proc/self/oom_score_adj").write_text("0")
    except OSError as error:  # lowering it takes a privilege
        log.debug("oom_score_adj stays as Ray set it: %s", error)


class Cluster:
    """A connection to Ray with this sweep's actors. Close it always: `close` ends every process it started."""

    def __init__(
        self,
        config: RayConfig,
        *,
        api_key: str,
        secrets: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        servers: Iterable[ServerPlan] = (),
    ) -> None:
        """Connect, or start a local cluster. Raises ResourceError when that fails.

        `env` is for everything of ours there; nodes tell which of the weights of `servers` they hold.
        """
        self._api_key = api_key
        self._secrets = tuple(secrets)
        """Masked in evaluators' logs, besides what the environment of their node holds."""
        self._variables = {name: os.environ[name] for name in OFFLINE if name in os.environ} | dict(env or {})
        self._servers: dict[str, Any] = {}
        self._followers: dict[str, dict[str, Any]] = {}
        """By life and name: the parts of a server of several nodes, but for the first, which is in `_servers`."""
        self._evaluators: dict[str, Any] = {}
        self._starting: dict[Any, str] = {}
        self._following: dict[Any, str] = {}
        """Names of parts, as in `_stopping`."""
        self._sentinels: dict[Any, str] = {}
        self._stopping: dict[Any, str] = {}
        self._then: dict[str, ServerFailed | ServerStopped] = {}
        """What is to be told of a life when all its parts have stopped."""
        self._streams: dict[Any, str] = {}
        self._loads: dict[Any, str] = {}
        self._unplaced: dict[Any, _Unplaced] = {}
        self._node_of: dict[str, str] = {}
        """Where servers' lives and evaluators were told to run."""
        self._nodes: Nodes | None = None
        """None on a cluster that is ours alone: with its one node all is lost."""
        self._raylet: psutil.Process | None = None
        """Ray's process for that node."""
        self._looks: dict[Any, str] = {}
        self._next_list_s = 0.0
        self._weights = {
            server.model.path: [source for source in server.sources if source.part is Part.MODEL] for server in servers
        }
        self._next: list[ClusterEvent] = []
        """Events that are known already."""
        self._session: Path | None = None
        """Ray's folder of logs and sockets of a cluster that is ours alone, to be removed with it."""
        with boundary(ResourceError, f"connect to Ray ({ray_address(config)})"):  # a slow start is a plain Exception
            self.inventory = self._start_local(config) if starts_local(config) else self._connect(config)
        if not any(node.evaluators for node in self.inventory):
            self.close()
            raise ResourceError(
                f"no node of the cluster ({ray_address(config)}) carries an evaluator: each takes a CPU, "
                f"or one of `{EVALUATOR}` where a node was started with such resources"
            )

    def _start_local(self, config: RayConfig) -> tuple[Node, ...]:
        node = local_node(config)
        with _in_groups_of_their_own():
            context = ray.init(
                address="local",
                num_gpus=int(node.gpus),
                resources={CPU_SERVER: node.cpu_servers, EVALUATOR: node.evaluators},
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
        self._session = Path(context.address_info["session_dir"])
        self._raylet = next((child for child in psutil.Process().children() if child.name() == "raylet"), None)
        there = ray.nodes()[0]
        return (replace(node, name=there["NodeID"], host=there["NodeManagerHostname"]),)

    def _connect(self, config: RayConfig) -> tuple[Node, ...]:
        ray.init(address=ray_address(config), log_to_driver=False, configure_logging=False)
        self._nodes = Nodes(config)
        inventory = self._usable()
        while self._nodes.awaited(time.monotonic()):
            self._looked(ray.wait([*self._looks], timeout=LIST_S, fetch_local=False)[0])
            inventory = self._usable()
        return inventory

    def _usable(self) -> tuple[Node, ...]:
        """The nodes that may get something new, after a look at Ray's list and at those where one is due."""
        if self._nodes is None:
            return self.inventory
        now = time.monotonic()
        if now >= self._next_list_s:
            self._next_list_s = now + LIST_S
            self._nodes.listed(ray.nodes())
        for name, first in self._nodes.due(now).items():
            self._looks[_look.options(**_on(name)).remote(self._weights, self._variables, first=first)] = name
        return self._nodes.usable(now)

    def _looked(self, references: Iterable[Any]) -> None:
        for reference in references:
            assert self._nodes is not None
            name = self._looks.pop(reference)
            try:
                looked = ray.get(reference)
            except RayTaskError as error:
                log.info("node %s answers, but not what it holds: %s", name, _named(error.cause))
                looked = Looked()
            except RayError as error:
                log.info("node %s does not answer: %s", name, _named(error))
                looked = None
            self._nodes.answered(name, looked, time.monotonic())

    def _suspect(self, name: str) -> None:
        """The node of what is called `name` may be gone."""
        if self._nodes is not None and (node := self._node_of.get(name)) is not None:
            self._forget(self._looks, node)  # what was asked before says nothing
            self._nodes.suspect(node)
            self._next_list_s = 0.0

    def start_server(
        self,
        plan: ServerPlan,
        life: str,
        log_path: Path,
        expected: Mapping[str, Expected],
        *,
        nodes: Sequence[str] = (),
    ) -> None:
        """Begin a server's life; ServerReady or ServerFailed follows. `expected` is what it must be, by model.

        `nodes` are names of the inventory, where the server is to run with a part on each; without any Ray finds a
        place.
        """
        first = self._servers[life] = self._start_part(plan, life, log_path, next(iter(nodes), None))
        if others := dict(enumerate(nodes[1:], start=1)):
            meeting = first.meet.remote(len(nodes))
            self._followers[life] = {}
            for rank, node in others.items():
                name = part_name(life, rank)
                actor = self._start_part(plan, name, log_path.with_stem(part_name(log_path.stem, rank)), node)
                self._followers[life][name] = actor
                self._following[actor.follow.remote(meeting, rank)] = name
        self._starting[first.start.remote(expected)] = life

    def _start_part(self, plan: ServerPlan, name: str, log_path: Path, node: str | None) -> Any:
        needs = self._needs(plan, node)
        # Servers are heard on loopback only when all that asks them is on their node, for good.
        loopback = self._nodes is None
        actor = _ServerActor.options(**needs, **_on(node)).remote(
            plan, name, self._api_key, str(log_path), loopback, self._secrets, self._variables
        )
        self._await_place(name, actor, needs, node)
        return actor

    def stop_server(self, life: str) -> None:
        """Ask a server to end; ServerStopped follows when nothing of it is left."""
        if life in self._then:  # it ends already, and what it ends for matters no more
            self._then[life] = ServerStopped(life=life)
        else:
            self._next += self._end(life, ServerStopped(life=life))

    def tune(self, life: str, controller: Controller) -> None:
        """Have the limit of a ready server found; ServerLoad follows each time it changes."""
        self._loads[self._servers[life].tune.remote(controller)] = life

    def press(self, life: str, *, wanted: int, refused: int) -> None:
        """Tell a ready server's controller what evaluators want; nobody waits for it."""
        if (actor := self._servers.get(life)) is not None:
            actor.press.remote(wanted, refused)

    def start_evaluator(self, name: str, log_path: Path, *, node: str | None) -> None:
        """EvaluatorReady or EvaluatorLost follows; what is sent before waits for it.

        `node` is of the inventory; without one Ray finds a place.
        """
        needs = self._slot(EVALUATOR, node)
        actor = _EvaluatorActor.options(**needs, **_on(node)).remote(str(log_path), self._secrets, self._variables)
        self._evaluators[name] = actor
        self._await_place(name, actor, needs, node)
        self._streams[actor.events.remote()] = name

    def send(self, evaluator: str, message: Any) -> None:
        """Deliver in order; a message to an evaluator that died is dropped, EvaluatorLost says why."""
        # It may have died in the very tick whose earlier events are being answered.
        if (actor := self._evaluators.get(evaluator)) is not None:
            actor.send.remote(message)

    def end_evaluator(self, name: str, reason: str) -> None:
        """End one that does not come back by itself; EvaluatorLost follows. Killed and not asked: what hangs reads no
        message, and a stop would wait behind those that it has not read. Its supervisor ends what the actor leaves."""
        if name in self._evaluators:
            self._end_evaluator(name)
            self._next.append(EvaluatorLost(evaluator=name, reason=reason))

    def _needs(self, plan: ServerPlan, node: str | None) -> dict[str, Any]:
        if plan.external:
            return {}
        cpu = on_cpu(plan, cluster_gpus=total_gpus(self.inventory))
        return self._slot(CPU_SERVER, node) if cpu else {"num_gpus": plan.gpus}

    def _slot(self, name: str, node: str | None) -> dict[str, Any]:
        """One slot where the node declares them, a whole CPU where it does not."""
        declared = self._nodes is None or node is None or self._nodes.declares(node, name)
        return {"resources": {name: 1}} if declared else {"num_cpus": 1}

    def events(self, timeout_s: float) -> list[ClusterEvent]:
        """What happened in the next `timeout_s`; many events at a time cost the driver half as much as one by one.

        Raises ResourceError when the one node of a cluster of ours is gone.
        """
        if self._raylet is not None and not _lives(self._raylet):
            kept, self._session = self._session, None  # they say why, so they are left behind
            raise ResourceError(
                f"Ray's process on this machine (raylet) has died, and all servers and evaluators with it (Ray's logs: "
                f"{kept}/logs). What was answered is kept: the same command goes on"
            )
        events, self._next = self._next, []
        references = [
            *(*self._starting, *self._following, *self._sentinels, *self._stopping, *self._streams, *self._loads),
            *(*self._unplaced, *self._looks),
        ]
        if not references and not events:  # all that there was has died and rests
            time.sleep(timeout_s)
            self.inventory = self._usable()
            return []
        ready: list[Any] = []
        if references:
            wait_s = 0 if events else timeout_s
            ready, _ = ray.wait(references, num_returns=len(references), timeout=wait_s, fetch_local=False)
        self._looked([reference for reference in ready if reference in self._looks])
        for reference in ready:
            if reference in self._unplaced:
                placed = self._unplaced.pop(reference)
                if placed.name in self._evaluators and _succeeded(reference):
                    events.append(EvaluatorReady(evaluator=placed.name))
            elif reference in self._streams:
                events += self._heard(reference)
            elif reference in self._loads:
                events += self._load(reference)
            elif reference in self._starting:
                events += self._started(reference)
            elif reference in self._following:
                events += self._followed(reference)
            elif reference in self._sentinels:
                events += self._lost(reference)
            elif reference in self._stopping:
                events += self._stopped(reference)
        self.inventory = self._usable()
        return [*events, *self._without_place()]

    # Finding a place.

    def _await_place(self, name: str, actor: Any, needs: Mapping[str, Any], node: str | None) -> None:
        """Must come before the call that keeps the actor busy."""
        if node is not None:
            self._node_of[name] = node
        names = {"num_cpus": "CPU", "num_gpus": "GPU"}
        flat = {names.get(key, key): value for key, value in needs.items() if key != "resources"}
        needed = flat | needs.get("resources", {})
        self._unplaced[actor.__ray_ready__.remote()] = _Unplaced(name=name, node=node, needs=needed)

    def _has_place(self, name: str) -> bool:
        return all(unplaced.name != name for unplaced in self._unplaced.values())

    def _without_place(self) -> Iterator[ClusterEvent]:
        """Says of what waits long for a place that it does, and ends what no node can carry, now that one has gone."""
        now = time.monotonic()
        late = [unplaced for unplaced in self._unplaced.values() if now > unplaced.next_look_s]
        if not late:
            return
        usable = {node.name for node in self.inventory}
        resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["NodeID"] in usable}
        for unplaced in late:
            if self._has_place(unplaced.name):  # it was given up with another part of its server
                continue
            unplaced.next_look_s = now + PLACE_S
            name, needs = unplaced.name, " and ".join(f"{n:g} {what}" for what, n in unplaced.needs.items())
            possible = [node for name_of, node in resources.items() if unplaced.node in (None, name_of)]
            if any(all(node.get(what, 0) >= n for what, n in unplaced.needs.items()) for node in possible):
                if not unplaced.told:
                    log.warning(
                        "%s has waited %.0f s for Ray to start it: it needs %s on one node, which others on this "
                        "cluster may hold (see `ray status`)",
                        name,
                        PLACE_S,
                        needs,
                    )
                unplaced.told = True
                continue
            reason = f"no node of the cluster has {needs} (any more)" if possible else "its node does not answer"
            gone = not possible
            if name in self._evaluators:
                self._end_evaluator(name)
                yield EvaluatorLost(evaluator=name, reason=reason, infrastructure=gone)
            else:
                life, error = self._life_of(name), f"{name} did not start: {reason}"
                failed = ServerFailed(life=life, error=error, passing=True, infrastructure=gone)
                yield from self._end(life, failed, gone=name)

    def _heard(self, stream: Any) -> Iterator[ClusterEvent]:
        """All that an evaluator has said by now: one event a wait would be slower than a busy one speaks."""
        name = self._streams[stream]
        try:
            while ray.wait([stream], timeout=0, fetch_local=False)[0]:
                yield EvaluatorSaid(evaluator=name, event=ray.get(next(stream)))
            return
        except StopIteration:
            reason, taken = "its process ended; its log tells why", False
        except RayError as error:
            reason, taken = self._of_ray(error), self._taken(name, error)
        self._end_evaluator(name)
        yield EvaluatorLost(evaluator=name, reason=reason, infrastructure=taken)

    def _load(self, stream: Any) -> Iterator[ClusterEvent]:
        try:
            while ray.wait([stream], timeout=0, fetch_local=False)[0]:
                yield ServerLoad(life=self._loads[stream], load=ray.get(next(stream)))
        except StopIteration:
            del self._loads[stream]  # the server is gone, which its sentinel tells
        except RayError as error:
            log.info("nothing more is heard of the load of %s: %s", self._loads.pop(stream), error)

    def _started(self, reference: Any) -> Iterator[ClusterEvent]:
        life = self._starting.pop(reference)
        try:
            endpoint, inspection = ray.get(reference)
        except RayError as error:
            yield from self._end(life, self._unstarted(life, life, error), gone=life)
            return
        if inspection.facts is None:
            failed = ServerFailed(
                life=life, error=str(inspection.refusal), passing=inspection.passing, checks=inspection.checks
            )
            yield from self._end(life, failed, gone=life)
            return
        self._sentinels[self._servers[life].wait.remote()] = life
        yield ServerReady(life=life, endpoint=endpoint, facts=inspection.facts)

    def _unstarted(self, life: str, part: str, error: RayError) -> ServerFailed:
        """What a server's start failed of, which happened to this part of it."""
        if not isinstance(error, RayTaskError):
            # The process above the server has died, or its node; why is nobody's to know here.
            taken, reason = self._taken(part, error), f"{part} did not start: {self._of_ray(error)}"
            return ServerFailed(life=life, error=reason, passing=True, infrastructure=taken)
        if isinstance(error.cause, SweepError):
            others = ", ".join(name for name in self._parts(life) if name != part)
            # What one part ends of is often another's end.
            aside = f"\nThe cause may stand in the log of another part of this server: {others}" if others else ""
            passing = isinstance(error.cause, ServerFault)
            return ServerFailed(life=life, error=f"{error.cause}{aside}", passing=passing)
        log.info("%s did not start", part, exc_info=error)
        return ServerFailed(life=life, error=f"{part} did not start: {_named(error.cause)}")

    def _followed(self, reference: Any) -> Iterator[ClusterEvent]:
        """A part of a server of several nodes has ended, and with it the server."""
        part = self._following.pop(reference)
        life = self._life_of(part)
        try:
            ray.get(reference)
        except RayError as error:
            if life in self._starting.values():
                yield from self._end(life, self._unstarted(life, part, error), gone=part)
                return
            taken = self._taken(part, error)
            told = str(error.cause).partition("\n")[0] if isinstance(error, RayTaskError) else self._of_ray(error)
            yield ServerLost(life=life, reason=f"lost its part {part}: {told}", infrastructure=taken)
            yield from self._end(life, ServerStopped(life=life), gone=part)

    def _lost(self, sentinel: Any) -> Iterator[ClusterEvent]:
        life = self._sentinels.pop(sentinel)
        try:
            yield ServerLost(life=life, reason=str(ray.get(sentinel)))
        except RayError as error:
            # There is nobody left to ask for a stop. The supervisor ends the server when its owner is gone, and the
            # next server on these GPUs waits for their memory.
            taken = self._taken(life, error)
            yield ServerLost(life=life, reason=self._of_ray(error), infrastructure=taken)
            yield from self._end(life, ServerStopped(life=life), gone=life)
        else:
            yield from self._end(life, ServerStopped(life=life))

    def _end(
        self, life: str, then: ServerFailed | ServerStopped, *, gone: str | None = None
    ) -> Iterator[ServerFailed | ServerStopped]:
        """Have all parts of a server end; `then` is told when nothing of it is left, here where nothing is.

        `gone` is a part that has ended.
        """
        for references in (self._starting, self._sentinels, self._loads):
            self._forget(references, life)
        stops = {}
        for name, actor in self._parts(life).items():
            self._forget(self._following, name)
            if not self._has_place(name):  # nobody would hear it
                self._forget_place(name)
                ray.kill(actor)
            elif name != gone:
                stops[actor.stop.remote()] = name
        if stops:
            self._stopping |= stops
            self._then[life] = then
        else:
            self._end_server(life)
            yield then

    def _stopped(self, reference: Any) -> Iterator[ServerFailed | ServerStopped]:
        part = self._stopping.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            self._taken(part, error)
            log.warning("%s did not stop as it should, its supervisor ends it: %s", part, self._of_ray(error))
        life = self._life_of(part)
        if self._parts(life).keys().isdisjoint(self._stopping.values()):
            self._end_server(life)
            yield self._then.pop(life)

    def _parts(self, life: str) -> dict[str, Any]:
        """A server's actors by name: one for each of its nodes, and the first is called as the server."""
        return {life: self._servers[life], **self._followers.get(life, {})}

    def _life_of(self, part: str) -> str:
        return next(life for life in self._servers if part in self._parts(life))

    def _taken(self, name: str, error: RayError) -> bool:
        """Whether an actor was taken away, its node perhaps with it; not by what ran in it or by the memory it took."""
        itself = isinstance(error, (RayTaskError, OutOfMemoryError)) or getattr(error, "actor_init_failed", False)
        if not itself:
            self._suspect(name)
        return not itself

    def _of_ray(self, error: RayError) -> str:
        """A failure of Ray's own in words; it may have to be looked up in Ray's logs, which then stay."""
        if self._session is None:
            return _named(error)
        kept, self._session = self._session, None
        return f"{_named(error)} (Ray's logs: {kept / 'logs'})"

    def _end_server(self, life: str) -> None:
        for name, actor in self._parts(life).items():
            self._node_of.pop(name, None)
            ray.kill(actor)
        del self._servers[life]
        self._followers.pop(life, None)

    def _end_evaluator(self, name: str) -> None:
        self._forget_place(name)
        self._forget(self._streams, name)
        self._node_of.pop(name, None)
        ray.kill(self._evaluators.pop(name))

    def _forget_place(self, name: str) -> None:
        for reference in [r for r, unplaced in self._unplaced.items() if unplaced.name == name]:
            del self._unplaced[reference]

    @staticmethod
    def _forget(references: dict[Any, str], owner: str) -> None:
        for reference in [r for r, name in references.items() if name == owner]:
            del references[reference]

    def close(self) -> None:
        """Stop every server gently and in parallel, then everything else; bounded by STOP_S. A second call does
        nothing."""
        if not ray.is_initialized():
            return
        actors = dict(self._evaluators)
        for life in self._servers:
            actors |= self._parts(life)
        try:
            stops = [actor.stop.remote() for name, actor in actors.items() if self._has_place(name)]
            if stops:
                ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
            for actor in actors.values():
                ray.kill(actor)
        except RayError as error:
            log.warning("Ray failed while it was stopped, supervisors end what is left: %s", self._of_ray(error))
        finally:
            ray.shutdown()
            if self._session is not None:
                _remove_session(self._session)


def _on(node: str | None) -> dict[str, Any]:
    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayError:  # whoever else waits for the actor is told why
        return False
    return True


def _remove_session(folder: Path) -> None:
    """Remove what a local cluster leaves in Ray's folder for temporary files: some megabytes of logs a launch."""
    latest = folder.with_name("session_latest")
    if latest.is_symlink() and latest.resolve() == folder.resolve():
        latest.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # an agent of Ray's may still write its last line


def _named(error: BaseException) -> str:
    """An error's type and first line; of an actor that could not be made the last line, where the cause stands."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["it says no more"]
    cause = f" {lines[-1].strip()}" if getattr(error, "actor_init_failed", False) else ""
    return f"{type(error).__name__}: {lines[0]}{cause}"
