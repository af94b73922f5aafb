"""Nodes, GPUs, actors, waiting. The only module that knows Ray.

Ray carries control: starting, stopping, messages and their events. Requests go over HTTP from evaluators to servers.
Both kinds of actor are made without restarts or retries: what happens after a loss is the runner's decision.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sweep.config import RayConfig
from sweep.errors import ResourceError, SweepError
from sweep.evaluator import EvaluatorProcess, Event
from sweep.machine import CPU_SERVER, EVALUATOR, Capacity, local_capacity, starts_local
from sweep.plan import ServerPlan, on_cpu
from sweep.preflight import Facts, inspect
from sweep.server import Endpoint, Server

log = logging.getLogger(__name__)

STOP_S = 20.0
"""Servers get so long to end by themselves; what hangs after that is left to their supervisors, which kill it."""


@dataclass(frozen=True, kw_only=True)
class ServerReady:
    life: str
    endpoint: Endpoint
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class ServerFailed:
    """It never became ready."""

    life: str
    error: str


@dataclass(frozen=True, kw_only=True)
class ServerLost:
    """It was ready and is gone, unasked."""

    life: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ServerStopped:
    life: str


@dataclass(frozen=True, kw_only=True)
class EvaluatorSaid:
    evaluator: str
    event: Event


@dataclass(frozen=True, kw_only=True)
class EvaluatorLost:
    evaluator: str
    reason: str


ClusterEvent = ServerReady | ServerFailed | ServerLost | ServerStopped | EvaluatorSaid | EvaluatorLost


# No `async def` in an actor: it would put every method on one event loop, where lm-eval and our own asyncio.run cannot
# start theirs. Concurrency groups give the sentinel and the stop call threads of their own.
class _ServerHost:
    """One server's life on its node."""

    def __init__(self, plan: ServerPlan, life: str, api_key: str, log_path: str, loopback: bool) -> None:
        _be_ordinary()
        self._plan = plan
        self._server = Server(
            plan,
            name=life,
            api_key=api_key,
            gpu_ids=[str(gpu) for gpu in ray.get_gpu_ids()],
            log_path=Path(log_path),
            host="127.0.0.1" if loopback else ray.util.get_node_ip_address(),
        )

    def start(self) -> tuple[Endpoint, Facts]:
        endpoint = self._server.start()
        try:
            return endpoint, inspect(endpoint, tuple(self._plan.adapters))
        except BaseException:
            self._server.stop()
            raise

    @ray.method(concurrency_group="sentinel")
    def wait(self) -> str:
        return str(self._server.wait())

    @ray.method(concurrency_group="stop")
    def stop(self) -> None:
        self._server.stop()


class _EvaluatorHost:
    """One evaluator's child process on its node."""

    def __init__(self, log_path: str) -> None:
        _be_ordinary()
        self._process = EvaluatorProcess(Path(log_path))

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
    num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"stop": 1, "sentinel": 1}
)(_ServerHost)
_EvaluatorActor: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"messages": 1})(
    _EvaluatorHost
)


def _be_ordinary() -> None:
    """Ray marks its workers as the first to be killed when memory runs out; a server of ours is no such thing."""
    try:
        Path("/proc/self/oom_score_adj").write_text("0")
    except OSError as error:  # lowering it takes a privilege
        log.debug("oom_score_adj stays as Ray set it: %s", error)


class Cluster:
    """A connection to Ray with this sweep's actors. Close it always: `close` ends every process it started."""

    def __init__(self, config: RayConfig, *, api_key: str) -> None:
        """Connect, or start a local cluster. Raises ResourceError when that fails."""
        self._api_key = api_key
        self._servers: dict[str, Any] = {}
        self._evaluators: dict[str, Any] = {}
        self._starting: dict[Any, str] = {}
        self._sentinels: dict[Any, str] = {}
        self._stopping: dict[Any, str] = {}
        self._streams: dict[Any, str] = {}
        try:
            self.capacity = self._start_local(config) if starts_local(config) else self._connect(config)
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise ResourceError(f"connect to Ray at {config.address or 'a local cluster'}: {error}") from error
        self._loopback = len([node for node in ray.nodes() if node["Alive"]]) == 1

    def _start_local(self, config: RayConfig) -> Capacity:
        capacity = local_capacity(config)
        ray.init(
            address="local",
            num_gpus=int(capacity.gpus),
            resources={CPU_SERVER: capacity.cpu_servers, EVALUATOR: capacity.evaluators},
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        return capacity

    def _connect(self, config: RayConfig) -> Capacity:
        ray.init(address=config.address or "auto", log_to_driver=False, configure_logging=False)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        gpus, cpus = total.get("GPU", 0.0), total.get("CPU", 1.0)
        cpu_servers = config.cpu_servers or int(total.get(CPU_SERVER, max(1, cpus // 4)))
        evaluators = config.evaluators or int(total.get(EVALUATOR, max(1, min(2 * (gpus or cpu_servers), cpus // 2))))
        return Capacity(
            gpus=gpus,
            largest_node_gpus=max((node.get("GPU", 0.0) for node in nodes), default=0.0),
            cpu_servers=cpu_servers,
            evaluators=evaluators,
        )

    def start_server(self, plan: ServerPlan, life: str, log_path: Path) -> None:
        """Begin a server's life; ServerReady or ServerFailed follows."""
        cpu = on_cpu(plan, cluster_gpus=self.capacity.gpus)
        resources = self._slot(CPU_SERVER) if cpu else {"num_gpus": plan.gpus}
        actor = _ServerActor.options(**resources).remote(plan, life, self._api_key, str(log_path), self._loopback)
        self._servers[life] = actor
        self._starting[actor.start.remote()] = life

    def stop_server(self, life: str) -> None:
        """Ask a server to end; ServerStopped follows when its process is gone."""
        self._forget(self._starting, life)
        self._forget(self._sentinels, life)
        self._stopping[self._servers[life].stop.remote()] = life

    def start_evaluator(self, name: str, log_path: Path) -> None:
        actor = _EvaluatorActor.options(**self._slot(EVALUATOR)).remote(str(log_path))
        self._evaluators[name] = actor
        self._streams[actor.events.remote()] = name

    def send(self, evaluator: str, message: Any) -> None:
        """Deliver in order; a message to an evaluator that died is dropped, EvaluatorLost says why."""
        # It may have died in the very tick whose earlier events are being answered.
        if (actor := self._evaluators.get(evaluator)) is not None:
            actor.send.remote(message)

    def _slot(self, name: str) -> dict[str, Any]:
        """One slot where the cluster declares them, a whole CPU where it does not."""
        return {"resources": {name: 1}} if name in ray.cluster_resources() else {"num_cpus": 1}

    def events(self, timeout_s: float) -> list[ClusterEvent]:
        """What happened in the next `timeout_s`; many events at a time cost the driver half as much as one by one."""
        references = [*self._starting, *self._sentinels, *self._stopping, *self._streams]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s, fetch_local=False)
        if not ready:
            return []
        events: list[ClusterEvent] = []
        for reference in ready:
            if reference in self._streams:
                events += self._heard(reference)
            elif reference in self._starting:
                events.append(self._started(reference))
            elif reference in self._sentinels:
                life = self._sentinels.pop(reference)
                events.append(ServerLost(life=life, reason=self._reason(reference)))
                self._end_server(life)
            elif reference in self._stopping:
                life = self._stopping.pop(reference)
                self._end_server(life)
                events.append(ServerStopped(life=life))
        return events

    def _heard(self, stream: Any) -> Iterator[ClusterEvent]:
        """All that an evaluator has said by now: one event a wait would be slower than a busy one speaks."""
        name = self._streams[stream]
        try:
            while ray.wait([stream], timeout=0, fetch_local=False)[0]:
                yield EvaluatorSaid(evaluator=name, event=ray.get(next(stream)))
            return
        except StopIteration:
            reason = "its process ended; its log tells why"
        except RayError as error:
            reason = _named(error)
        del self._streams[stream]
        ray.kill(self._evaluators.pop(name))
        yield EvaluatorLost(evaluator=name, reason=reason)

    def _started(self, reference: Any) -> ClusterEvent:
        life = self._starting.pop(reference)
        try:
            endpoint, facts = ray.get(reference)
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            self._end_server(life)
            if isinstance(cause, SweepError):
                return ServerFailed(life=life, error=str(cause))
            log.info("%s did not start", life, exc_info=error)
            return ServerFailed(life=life, error=f"{life} did not start: {_named(cause)}")
        self._sentinels[self._servers[life].wait.remote()] = life
        return ServerReady(life=life, endpoint=endpoint, facts=facts)

    def _reason(self, reference: Any) -> str:
        try:
            return str(ray.get(reference))
        except RayError as error:
            return _named(error)

    def _end_server(self, life: str) -> None:
        ray.kill(self._servers.pop(life))

    @staticmethod
    def _forget(references: dict[Any, str], life: str) -> None:
        for reference in [r for r, name in references.items() if name == life]:
            del references[reference]

    def close(self) -> None:
        """Stop every server gently and in parallel, then everything else; bounded by STOP_S. A second call does
        nothing."""
        if not ray.is_initialized():
            return
        actors = [*self._servers.values(), *self._evaluators.values()]
        try:
            stops = [actor.stop.remote() for actor in actors]
            if stops:
                ray.wait(stops, num_returns=len(stops), timeout=STOP_S)
            for actor in actors:
                ray.kill(actor)
        except RayError as error:
            log.warning("Ray failed while it was stopped, supervisors end what is left: %s", _named(error))
        finally:
            ray.shutdown()


def _named(error: BaseException) -> str:
    """An error's type and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'it says no more')}"
