"""The `check` command: every server of a plan is started, asked what it can do, and stopped again -> a table.

The way to a server is that of a run: tokenizers in an evaluator, servers as capacity allows, preflight on their nodes.
Nothing is kept but logs: a run asks each of its servers anew, since another life may be another server.
"""

import logging
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from sweep.evaluating import evaluator as ev
from sweep.evaluating.preflight import Check, Outcome, expectation
from sweep.masking import masked
from sweep.planning.config import SweepConfig
from sweep.planning.plan import Plan, ServerPlan, decided
from sweep.results.store import RunDirectory
from sweep.running.cluster import (
    Cluster,
    ClusterEvent,
    EvaluatorLost,
    EvaluatorSaid,
    ServerFailed,
    ServerLost,
    ServerReady,
    ServerStopped,
)
from sweep.running.inventory import need, require, total_gpus
from sweep.running.runner import TICK_S
from sweep.running.schedule import LifeView, RetireServer, ServerView, StartServer, View, schedule
from sweep.running.signals import listen, stop_signals

log = logging.getLogger(__name__)

EVALUATOR = "evaluator"

SHOWN = {Outcome.PASSED: "passed", Outcome.NOTED: "noted", Outcome.FAILED: "FAILED"}

NARROWEST = 40
"""Columns that details get at least; a terminal without room for them wraps by itself."""


def check(config: SweepConfig, plan: Plan, directory: RunDirectory, *, api_key: str, secrets: Sequence[str]) -> int:
    """Check the servers of the plan's owed cells and print what came; the exit code: 1 when a model failed, 128 and its
    number when a signal ended it.

    Raises ResourceError when the cluster cannot carry the plan.
    """
    found = [
        Check(model=model.name, name="start", outcome=Outcome.FAILED, detail=model.problem)
        for model in plan.models.values()
        if model.problem is not None and any(cell.model.name == model.name for cell in plan.cells)
    ]
    number = 0
    if plan.owed_servers:
        with (
            stop_signals() as stop,
            closing(Cluster(config.ray, api_key=api_key, secrets=secrets, env=config.env)) as cluster,
        ):
            listen(stop)  # Ray has put a handler of its own in place
            require(plan.owed_servers, cluster.inventory)
            checkup = Checkup(plan=plan, cluster=cluster, directory=directory, secrets=secrets, found=found)
            number = checkup.run(stop)
    order = list(plan.models)
    found.sort(key=lambda each: order.index(each.model))
    failed = {each.model for each in found if each.outcome is Outcome.FAILED}
    good = {each.model for each in found} - failed
    print(f"\n{masked(table(found, _width()), secrets)}")
    print(f"{len(good)} of {len(good | failed)} models can be evaluated on these servers")
    print(f"logs     {directory.logs}")
    return 128 + number if number else int(bool(failed))


def table(checks: Iterable[Check], width: int | None = None) -> str:
    """A line for each check, models apart; details are wrapped to `width` columns where one is given."""
    checks = list(checks)
    models = max((len(check.model) for check in checks), default=0)
    names = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    before: str | None = None
    for check in checks:
        if before not in (None, check.model):
            lines.append("")
        head = f"{check.model if check.model != before else '':<{models}}  {check.name:<{names}}  "
        head += f"{SHOWN[check.outcome]:<6}  "
        first, *rest = _wrapped(check.detail, None if width is None else max(NARROWEST, width - len(head)))
        lines += [f"{head}{first}".rstrip(), *(f"{'':<{len(head)}}{line}".rstrip() for line in rest)]
        before = check.model
    return "\n".join(lines) + "\n"


def _wrapped(text: str, width: int | None) -> list[str]:
    lines = text.splitlines() or [""]
    if width is None:
        return lines
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]


def _width() -> int | None:
    """Columns of the terminal; None where a program reads."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


@dataclass(kw_only=True)
class _Server:
    plan: ServerPlan
    life: str | None = None
    """None before it starts and when nothing of it is left."""
    nodes: tuple[str, ...] = ()
    asked: bool = False
    """Or found to be none that can be."""
    stopping: bool = False


@dataclass(kw_only=True)
class Checkup:
    """Carries a check out on a cluster that its caller closes."""

    plan: Plan
    cluster: Cluster
    directory: RunDirectory
    """For logs."""
    secrets: Sequence[str]
    """Masked in all that is printed: a server may tell what its environment holds."""
    found: list[Check] = field(default_factory=list)
    """Grows as servers are asked."""
    _servers: dict[str, _Server] = field(default_factory=dict)
    _tokenizers: dict[str, ev.Checked] = field(default_factory=dict)
    """By model, as far as they are known."""
    _begun: float = field(default_factory=time.monotonic)

    def run(self, stop: Sequence[int] = ()) -> int:
        """0 when every server has been asked; else the first number in `stop`, a signal that ended it."""
        gpus = total_gpus(self.cluster.inventory)
        self._servers = {
            name: _Server(plan=decided(plan, cluster_gpus=gpus)) for name, plan in self.plan.owed_servers.items()
        }
        self._load_tokenizers()
        while any(server.life is not None or not server.asked for server in self._servers.values()):
            for event in self.cluster.events(TICK_S):
                self._observe(event)
            if stop:
                return stop[0]
            for action in schedule(self._view()):
                match action:
                    case StartServer(server=name, nodes=nodes):
                        self._start(self._servers[name], nodes)
                    case RetireServer(life=life):
                        self._of(life).stopping = True
                        self.cluster.stop_server(life)
        return 0

    def _observe(self, event: ClusterEvent) -> None:
        match event:
            case EvaluatorSaid(event=ev.Checked(model=str() as model) as checked):
                self._tokenizers[model] = checked
            case EvaluatorLost(reason=reason):
                if unknown := self._unknown_tokenizers():
                    # One after the other: it died of the first that it has not told of.
                    error = f"the process that loads it died: {reason} (see {self.directory.server_log(EVALUATOR)})"
                    self._tokenizers[unknown[0]] = ev.Checked(model=unknown[0], error=error)
                    self._load_tokenizers()
            case ServerReady(life=life, endpoint=endpoint, facts=facts):
                self._say(f"{life} at {endpoint.url} (vLLM {endpoint.engine_version}) has been asked")
                self._ended(self._of(life), facts.checks)
            case ServerFailed(life=life, error=error, passing=passing, checks=checks):
                server = self._of(life)
                server.life = None
                self._say(f"{life} {'is refused' if checks else 'did not start'}")
                again = "\nA run would try again." if passing else ""
                start = Check(model="", name="start", outcome=Outcome.FAILED, detail=f"{error}{again}")
                self._ended(server, checks or [replace(start, model=model) for model in server.plan.adapters])
            case ServerLost(life=life, reason=reason):
                # It has been asked before, and is about to be stopped; nothing depends on it any more.
                log.info("%s was lost: %s", life, reason)
                self._of(life).stopping = True
            case ServerStopped(life=life):
                self._of(life).life = None
                log.info("%s has stopped", life)

    # Tokenizers, one after the other in one process.

    def _unknown_tokenizers(self) -> list[str]:
        models = (model for server in self._servers.values() for model in server.plan.adapters)
        return [model for model in models if model not in self._tokenizers]

    def _load_tokenizers(self) -> None:
        if models := self._unknown_tokenizers():
            self._say(f"loading the tokenizers of {', '.join(models)}")
            node = next((node.name for node in self.cluster.inventory if node.evaluators), None)
            self.cluster.start_evaluator(EVALUATOR, self.directory.server_log(EVALUATOR), node=node)
        for model in models:
            self.cluster.send(EVALUATOR, ev.CheckModel(model=self.plan.models[model]))

    # Servers.

    def _start(self, server: _Server, nodes: tuple[str, ...]) -> None:
        server.life, server.nodes = f"{server.plan.name}-0", nodes
        self._say(f"{server.life} is {'waited for' if server.plan.external else 'starting'}")
        token_ids = {model: self._tokenizers[model].token_ids for model in server.plan.adapters}
        expected = expectation(server.plan, self.plan.models, token_ids)
        log_path = self.directory.server_log(server.life)
        self.cluster.start_server(server.plan, server.life, log_path, expected, nodes=nodes)

    def _ended(self, server: _Server, checks: Sequence[Check]) -> None:
        server.asked = True
        for model in server.plan.adapters:
            error, mine = self._tokenizers[model].error, [check for check in checks if check.model == model]
            if error is not None:  # the server's could not be compared with it
                mine = [check for check in mine if check.name != "tokenizer"]
                mine.append(Check(model=model, name="tokenizer", outcome=Outcome.FAILED, detail=error))
            self.found += mine

    def _of(self, life: str) -> _Server:
        return next(server for server in self._servers.values() if server.life == life)

    def _view(self) -> View:
        """To be asked is the one cell that each server has to do, once its tokenizers are known."""
        nodes, unknown = self.cluster.inventory, set(self._unknown_tokenizers())
        view = View(nodes)
        for name, server in self._servers.items():
            lives = (
                ()
                if server.life is None
                else (LifeView(name=server.life, nodes=server.nodes, live=not server.stopping),)
            )
            view.put(
                ServerView(
                    name=name,
                    need=need(server.plan, nodes),
                    replicas=1,
                    lives=lives,
                    unfinished_cells=int(not server.asked),
                    wanted=unknown.isdisjoint(server.plan.adapters),
                )
            )
        return view

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun:5.0f} s  {masked(text, self.secrets)}", flush=True)
