"""The loop: observe -> schedule -> carry out -> record."""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from sweep.errors import StoreError, boundary
from sweep.evaluating import evaluator as ev
from sweep.evaluating.concurrency import Controller, Load, automatic_limit, figures
from sweep.evaluating.estimate import in_words
from sweep.evaluating.preflight import Check, Facts, expectation
from sweep.evaluating.preflight import Outcome as Checked
from sweep.masking import masked
from sweep.planning.config import SweepConfig
from sweep.planning.plan import Plan, ServerPlan, decided, failure, on_cpu
from sweep.record import Record, Status
from sweep.results.claim import Work
from sweep.results.report import lasting
from sweep.results.store import Store, masked_json, write_file
from sweep.results.timeline import TimelineWriter
from sweep.results.tracking import Tracker, live_key
from sweep.running.cluster import (
    Cluster,
    ClusterEvent,
    EvaluatorLost,
    EvaluatorReady,
    EvaluatorSaid,
    ServerFailed,
    ServerLoad,
    ServerLost,
    ServerReady,
    ServerStopped,
)
from sweep.running.costs import Costs, corrected_s, in_order, start_s, sweep_s
from sweep.running.failures import Failures
from sweep.running.hanging import CURES, GIVE_BACK_S, SLOW_S, Doing, Spells, Verdict
from sweep.running.inventory import Node, need, total_gpus
from sweep.running.progress import WAITING, Terminal
from sweep.running.restarts import LOSSES_MOST, NEVER_LOST, Restarts, healthy
from sweep.running.schedule import LifeView, RetireServer, RunCell, ServerView, StartServer, View, schedule
from sweep.running.seats import Seats
from sweep.running.states import CellState, Life, ServerState
from sweep.running.walltime import CELL_START_S, UNLIMITED, Walltime
from sweep.serving.server import PORTS, Endpoint

log = logging.getLogger(__name__)

TICK_S = 0.1
"""Between two looks at what happened: how late an answer to an evaluator, a decision or a signal may be."""

DEATHS_MOST = 3
"""A check or a cell that so many evaluators died at, with no new answer between them, is the cause of it; one or two
may be the memory of a moment."""

KEEP_S = 2.0
"""At an end that was asked for, evaluators pass on what they have been answered for so long. It takes 0.1 s, and longer
only where one loads data and does not listen."""

RATE_S = 1.0
"""Shortest time over which a rate says something."""

TRACK_S = 5.0
"""Between two points of a model's history in W&B."""

FAILURES_AT_ONCE = 8
"""Written between two looks at what happened, of those that one check or server may cause by the thousand: each is two
syncs, and answers wait for them."""

TELL_S = 1.0
"""Between two words of what is at work; the heartbeat takes the last."""


@dataclass(kw_only=True)
class Runner:
    """Carries a plan out on a cluster that its caller closes."""

    plan: Plan
    store: Store
    cluster: Cluster
    terminal: Terminal
    tracker: Tracker
    timeline: TimelineWriter
    secrets: Sequence[str]
    """Masked in every message that a record keeps: a server may print what its environment holds."""
    records: dict[str, Record]
    """By cell key; begins with what was done before and grows as cells end."""
    retries: int = 0
    """Of a cell, after errors of its own that may pass."""
    max_failures: int | None = None
    """Of the sweep."""
    load_timeout_s: float = SweepConfig.load_timeout_s
    scoring_timeout_s: float = SweepConfig.scoring_timeout_s
    clock: Callable[[], float] = time.monotonic
    walltime: Walltime = UNLIMITED
    """On the same clock."""
    out_of_time: bool = False
    """The walltime has ended it."""
    _cells: dict[str, CellState] = field(default_factory=dict)
    _servers: dict[str, ServerState] = field(default_factory=dict)
    _lives: dict[str, Life] = field(default_factory=dict)
    _facts: dict[str, Facts] = field(default_factory=dict)
    _token_ids: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    """Model -> what its tokenizer makes of preflight's texts."""
    _done: int = 0
    """Cells of the plan, now and before."""
    _failures: Failures = field(init=False)
    _seats: Seats = field(default_factory=Seats)
    _evaluators: dict[str, str | None] = field(default_factory=dict)
    """Those that Ray has started, by name -> what they do: a cell's key, `check`, or None when idle."""
    _checks: deque[ev.CheckTask | ev.CheckModel] = field(default_factory=deque)
    _checking: dict[str, ev.CheckTask | ev.CheckModel] = field(default_factory=dict)
    _check_losses: Counter[str] = field(default_factory=Counter)
    _spells: Spells = field(default_factory=Spells)
    _evaluators_started: int = 0
    _evaluators_work: bool = False
    """One of them has said something."""
    _last_tracked: float = 0.0
    _loads_before: dict[str, Load] = field(default_factory=dict)
    """By life, when W&B was told last."""
    _last_told: float = 0.0
    _serials: Iterator[int] = field(default_factory=itertools.count)
    """Of what evaluators are told of their shares."""
    _costs: Costs = field(default_factory=Costs)
    _view: View = field(default_factory=View)
    _nodes: tuple[Node, ...] = ()
    """As the view has them."""
    _touched: set[str] = field(default_factory=set)
    """Servers of which the view does not know the latest."""
    _late: set[str] = field(default_factory=set)
    """Servers for which nothing pays any more before the walltime's end."""
    _unwritten: deque[Record] = field(default_factory=deque)
    """Failures on their way to the disk; a cell whose failure gets lost is owed, as it is with it."""

    def run(self, stop: Sequence[int] = ()) -> int:
        """0 when every cell is finished or has failed, or when it is `out_of_time`; else the first number in `stop`, a
        signal that ended it."""
        self.tracker.stands(self.plan.stands.values())
        for done, record in enumerate(self.records.values(), start=1):
            self.terminal.finished(record, done, len(self.plan.cells))
        self._begin()
        while any(c.unfinished for c in self._cells.values()):
            self._hear()
            if stop or self.walltime.over(self.clock()):
                self.out_of_time = not stop and any(c.unfinished for c in self._cells.values())
                break
            self._see_hanging()
            self._fill_seats()
            self._dispatch_checks()
            self._look()
            for action in schedule(self._view):
                if isinstance(action, RetireServer) or self._pays(action):
                    self._carry_out(action)
                else:
                    self._put_off(action)
            if self._late and not self._at_work():
                self.out_of_time = True
                break
            self._free_evaluators()
            self._track()
            self._tell()
        if stop or self.out_of_time:
            self._hear_last()
        self._write_failures(len(self._unwritten))
        self._keep_concurrency()
        return stop[0] if stop else 0

    def _pays(self, action: StartServer | RunCell) -> bool:
        """Whether there is time enough left for it."""
        takes_s = CELL_START_S
        if isinstance(action, StartServer) and not self._servers[action.server].plan.external:
            takes_s = self._servers[action.server].start_s
        return self.walltime.pays(takes_s, self.clock())

    def _put_off(self, action: StartServer | RunCell) -> None:
        """Leave a server whose start, or cells, do not pay any more to the next launch; others may have its place."""
        server = action.server if isinstance(action, StartServer) else self._cells[action.cell].cell.model.server
        if server not in self._late:
            log.info("this does not pay before the end: %s", action)
            self._late.add(server)
            self._touched.add(server)

    def _at_work(self) -> bool:
        """Whether anything runs, or may still be started."""
        return any(
            c.state in ("running", "checking") or self._expected_back(server) or server not in self._late
            for c in self._cells.values()
            if c.unfinished
            for server in [c.cell.model.server]
        )

    def _free_evaluators(self) -> None:
        """Have cells give back evaluators with which they wait for a server that has lost its place, or for its facts:
        other servers may be waiting for cells, and that one for the end of theirs."""
        for key in self._evaluators.values():
            state = self._cells.get(key or "")
            if state is None or state.state != "running" or state.taken_back or not self._wants_server(state):
                continue
            if not (state.answered or self._expected_back(state.cell.model.server)):
                state.taken_back = True
                self.cluster.send(str(state.evaluator), ev.CancelCell(reason="its server has no place"))

    def _see_hanging(self) -> None:
        """End evaluators that hang: the cell of one would never end, and behind its check no cell would begin."""
        now = self.clock()
        for name, work in [*self._evaluators.items()]:
            doing = self._doing(name, work)
            verdict = self._spells.look(name, doing, now)
            if doing is None or verdict is Verdict.FINE:
                continue
            if verdict is Verdict.OVER:
                self._end_hanging(name, doing)
                continue
            so_far = f"{lasting(SLOW_S)} so far (see {self.store.directory.server_log(name)})"
            limit = f"{lasting(doing.limit_s)} (`{doing.key}`)"
            self.terminal.note(f"{name} takes long to {doing.what}, {so_far}; it is ended after {limit}")
            self._release()

    def _doing(self, name: str, work: str | None) -> Doing | None:
        if (check := self._checking.get(name)) is not None:
            return Doing(what=f"load {_subject(check)}", limit_s=self.load_timeout_s, key="load_timeout_s")
        if (state := self._cells.get(work or "")) is None:
            return None
        key, attempt = state.cell.key, state.attempt
        if state.evaluator != name:
            return Doing(what=f"leave {key}, which is over", attempt=attempt, limit_s=GIVE_BACK_S)
        # Without facts it may be waiting for its server.
        knows = state.by_stored_facts or (state.told is not None and state.told.facts is not None)
        if state.loads and (knows or state.taken_back):
            return Doing(what=f"load {key}", attempt=attempt, limit_s=self.load_timeout_s, key="load_timeout_s")
        if state.answered and not state.loads:
            return Doing(what=f"score {key}", attempt=attempt, limit_s=self.scoring_timeout_s, key="scoring_timeout_s")
        return None

    def _end_hanging(self, name: str, doing: Doing) -> None:
        """What it was at fails at once: another attempt would take as long."""
        within = f"within {lasting(doing.limit_s)}"
        why = f"its evaluator was ended (see {self.store.directory.server_log(name)})"
        error = f"{doing.what}: not done {within} (`{doing.key}`), {why}; {CURES.get(doing.key)}"
        if (check := self._checking.pop(name, None)) is not None:
            self._check_failed(check, error)
        elif (state := self._cells[str(self._evaluators[name])]).evaluator == name:
            self._fail(state, error)
        self.cluster.end_evaluator(name, f"it did not {doing.what} {within} and was ended")

    def _hear(self) -> None:
        events = self.cluster.events(TICK_S)
        keep_answers(events, self.store, self.cluster)
        for event in events:
            self._observe(event)
        self._write_failures(FAILURES_AT_ONCE)

    def _write_failures(self, most: int) -> None:
        for _ in range(min(most, len(self._unwritten))):
            record = self._unwritten.popleft()
            if self.store.write_record(record, {}):
                self.tracker.cell(record)

    def _hear_last(self) -> None:
        """Have evaluators pass on what they have been answered, and hear them, for KEEP_S at most."""
        for state in self._cells.values():
            if state.state == "running" and state.evaluator is not None:
                self.cluster.send(state.evaluator, ev.CancelCell(reason="the sweep is stopped"))
        deadline = time.monotonic() + KEEP_S
        while any(state.state == "running" for state in self._cells.values()) and time.monotonic() < deadline:
            self._hear()

    # Beginning.

    def _begin(self) -> None:
        owed = self.plan.owed
        self._cells = {cell.key: CellState(cell=cell) for cell in owed}
        self._costs = Costs(self.records.values())
        self._done = sum(record.status is Status.DONE for record in self.records.values())
        gpus = total_gpus(self.cluster.inventory)
        for name, plan in self.plan.owed_servers.items():
            plan = decided(plan, cluster_gpus=gpus)
            self._servers[name] = ServerState(
                plan=plan,
                replicas=plan.replicas if isinstance(plan.replicas, int) else None,
                start_s=start_s(plan, on_cpu=on_cpu(plan, cluster_gpus=gpus)),
                looked_s=self.clock(),
            )
            facts = self._stored_facts(plan)
            if facts is not None:
                self._facts[name] = facts
            self._servers[name].concurrency = self._servers[name].stored_concurrency = self._stored_concurrency(plan)
        for state in self._cells.values():
            self._servers[state.cell.model.server].cells.append(state)
        for name, server in self._servers.items():
            self._expect(name)
            server.cells = in_order(server.cells, lambda state: state.expected_s)
        self._touched.update(self._servers)
        for task_name in dict.fromkeys(cell.task_name for cell in owed):
            cell = next(c for c in owed if c.task_name == task_name)
            self._checks.append(
                ev.CheckTask(task_name=task_name, task=cell.task, seeds=cell.seeds, model=cell.model.model)
            )
        for model in dict.fromkeys(cell.model.name for cell in owed):
            self._checks.append(ev.CheckModel(model=self.plan.models[model]))
        log.info("%d cells owed, %d done, %d responses stored", len(owed), len(self.plan.done), self.store.count())
        log.info("responses go to %s", self.store.mode)
        self._failures = Failures(
            most=self.max_failures,
            most_by_model={name: model.model.max_failures for name, model in self.plan.models.items()},
        )
        self._fill_seats()

    def _fill_seats(self) -> None:
        for seat in self._seats.due(self.cluster.inventory, len(self._cells), self.clock()):
            name = f"evaluator.{self._evaluators_started}"  # no model has a dot, so no server's log is called so
            self._evaluators_started += 1
            seat.evaluator = name
            self.cluster.start_evaluator(name, self.store.directory.server_log(name), node=seat.node)

    def _idle(self) -> list[str]:
        """The evaluators that may get work."""
        return self._seats.idle(self._evaluators, self.cluster.inventory)

    def _facts_identity(self, plan: ServerPlan) -> list[str]:
        """Facts of a server hold for the same models."""
        return [self.plan.models[model].fingerprint for model in plan.adapters]

    def _stored_facts(self, plan: ServerPlan) -> Facts | None:
        path = self.store.directory.facts(plan.name)
        if not path.exists():
            return None
        with boundary(StoreError, f"read {path} (it may be deleted: a server then tells it anew)"):
            stored = msgspec.json.decode(path.read_bytes())
            return msgspec.convert(stored["facts"], Facts) if stored["of"] == self._facts_identity(plan) else None

    def _stored_concurrency(self, plan: ServerPlan) -> int | None:
        path = self.store.directory.concurrency(plan.name)
        if isinstance(plan.model.concurrency, int) or not path.exists():
            return None
        with boundary(StoreError, f"read {path} (it may be deleted: the next number is found anew)"):
            return msgspec.convert(msgspec.json.decode(path.read_bytes())["concurrency"], int)

    def _keep_concurrency(self) -> None:
        """For the next run, which is likely to have the same machines."""
        for name, server in self._servers.items():
            if server.concurrency != server.stored_concurrency:
                with boundary(StoreError, f"write the concurrency of server {name}"):
                    content = msgspec.json.encode({"concurrency": server.concurrency})
                    write_file(self.store.directory.concurrency(name), content)
                server.stored_concurrency = server.concurrency

    def _dispatch_checks(self) -> None:
        for name in self._idle():
            if self._checks:
                check = self._checks.popleft()
                self._evaluators[name] = "check"
                self._checking[name] = check
                self.cluster.send(name, check)

    # Observing.

    def _observe(self, event: ClusterEvent) -> None:
        self._touch(event)
        match event:
            case ServerReady():
                self._server_ready(event)
            case ServerFailed():
                self._server_failed(event)
            case ServerLoad():
                self._server_load(event)
            case ServerLost():
                self._server_lost(event)
            case ServerStopped(life=life):
                self._server_stopped(life)
            case EvaluatorReady(evaluator=name):
                self._evaluators[name] = None
            case EvaluatorSaid(evaluator=name, event=said):
                self._heard(name, said)
            case EvaluatorLost():
                self._evaluator_lost(event)

    def _server_ready(self, event: ServerReady) -> None:
        life = self._lives[event.life]
        plan = self._servers[life.server].plan
        others = self._ready(life.server)
        if others and (why := event.facts.lacks(self._facts[life.server])):
            # Cells are planned by what the first server can do; a lesser one would fail them.
            self.terminal.note(f"replica {event.life} is stopped, it is not as {others[0]}: {why}")
            self._servers[life.server].replicas = len(others)
            life.retiring = True
            self.timeline.add("server", event.life, "stopping", reason=f"it is not as the others: {why}")
            self.cluster.stop_server(event.life)
            return
        life.endpoint, life.ready_at_s = event.endpoint, self.clock()
        self._servers[life.server].start_s = life.ready_at_s - life.started_at_s
        if not others:
            before = self._facts.get(life.server)
            self._facts[life.server] = event.facts
            if before is not None and not event.facts.plans_as(before):
                self._plan_anew(life.server)
            else:
                for state in self._cells_of(life.server):
                    state.by_stored_facts = False
        with boundary(StoreError, f"write what is known of server {life.server}"):
            write_file(
                self.store.directory.facts(life.server),
                masked_json(
                    msgspec.json.encode({"of": self._facts_identity(plan), "facts": self._facts[life.server]}),
                    self.secrets,
                ),
            )
        log.info("server %s is ready at %s: %s", event.life, event.endpoint.url, event.facts)
        self.timeline.add("server", event.life, "ready")
        self._show_server(life.server, "ready", _in_one_line(event.facts))
        self._show_cells(life.server)
        self._note_checks(event.life, event.facts.checks)
        life.load = self._tune(event.life)
        self._share(life.server)

    def _tune(self, name_of_life: str) -> Load:
        """Have the limit of a ready server found, beginning where the last one settled."""
        name = self._lives[name_of_life].server
        server = self._servers[name]
        model = server.plan.model
        if isinstance(model.concurrency, int):
            controller = Controller(model.concurrency, fixed=True)
        elif server.concurrency is not None:
            controller = Controller(server.concurrency)
        else:
            controller = Controller(automatic_limit(model.server.get("max_num_seqs")), guessed=True)
        self.cluster.tune(name_of_life, controller)
        return controller.load

    def _server_load(self, event: ServerLoad) -> None:
        # One that has died may have been told of before.
        if (life := self._lives.get(event.life)) is None:
            return
        before, life.load = life.load, event.load
        server = self._servers[life.server]
        if not isinstance(server.plan.model.concurrency, int):
            server.concurrency = event.load.settled
        if before is None or before.limit != event.load.limit:
            log.info("server %s: up to %d sequences in flight (%s)", event.life, event.load.limit, event.load)
            self._share(life.server)

    def _plan_anew(self, server: str) -> None:
        """Take back what runs on facts that no longer hold: other methods, another length, another version of vLLM.

        What was answered is kept; a cell that has all its answers ends all the same.
        """
        for state in self._cells_of(server):
            if state.state == "running" and state.evaluator is not None:
                state.by_stored_facts = True
                log.info("%s is planned anew, its server can do other things than before", state.cell.key)
                self.cluster.send(state.evaluator, ev.CancelCell(reason="its server is another one now"))

    def _note_checks(self, life: str, checks: Sequence[Check]) -> None:
        for check in checks:
            if check.outcome is not Checked.PASSED:
                detail = masked(check.detail, self.secrets)
                self.terminal.note(f"{life}: {check.name} {check.outcome} for {check.model}: {detail}")

    def _server_failed(self, event: ServerFailed) -> None:
        life, error = self._lives.pop(event.life), masked(event.error, self.secrets)
        name, server = life.server, self._servers[life.server]
        log.info("server %s failed: %s", event.life, error)  # the terminal tells it below
        self.timeline.add("server", event.life, "gone", reason=_first_line(error))
        if event.passing:
            restarts = server.restarts.lost(self.clock(), started_s=life.started_at_s, counts=not event.infrastructure)
            self._again(name, restarts, error)
        elif others := self._live(name):
            # The model goes on with the servers that it has.
            server.replicas = len(others)
            self.terminal.note(f"replica {event.life} did not start: {error}")
        else:
            self._fail_server(name, error)

    def _server_lost(self, event: ServerLost) -> None:
        name_of_life = event.life
        life = self._lives[name_of_life]
        life.lost, reason = True, masked(event.reason, self.secrets)
        log.info("server %s was lost: %s", name_of_life, reason)
        self.timeline.add("server", name_of_life, "lost", reason=_first_line(reason))
        server, now = self._servers[life.server], self.clock()
        was_healthy = healthy(
            ready_s=now - life.ready_at_s,
            hang_timeout_s=server.plan.model.hang_timeout_s,
            finished_cell=life.finished_cell,
        )
        log_path = self.store.directory.server_log(name_of_life)
        restarts = server.restarts.lost(
            now, started_s=life.started_at_s, healthy=was_healthy, counts=not event.infrastructure
        )
        self._again(life.server, restarts, f"{name_of_life} {reason} (see {log_path})")
        self._move_cut_off(life.server)
        self._share(life.server)
        self._show_cells(life.server)

    def _again(self, name: str, restarts: Restarts, reason: str) -> None:
        """A server was lost or did not start, which may pass: another start after a rest, or no more."""
        server = self._servers[name]
        server.restarts = restarts
        others = self._live(name)
        if not restarts.exhausted:
            rest_s = restarts.rest_s(self.clock())
            brief = f"{reason.splitlines()[0]}; next start in {rest_s:g} s"
            if restarts.losses:
                brief += f", loss {restarts.losses} of {LOSSES_MOST}"
            if others:
                self.terminal.note(f"a server of {name} was lost: {brief}")
                if not self._ready(name):
                    self._show_server(name, "starting")
            else:
                self._show_server(name, "lost", brief)
            return
        logs = self.store.directory.server_log(f"{name}-*")
        error = f"crash loop: lost {restarts.losses} times in a row (logs: {logs}), last: {reason}"
        if others:
            server.replicas = len(others)
            if self._ready(name):
                server.restarts = NEVER_LOST  # those were not the losses of the others
            count = "1 server" if len(others) == 1 else f"{len(others)} servers"
            self.terminal.note(f"{name} goes on with {count}, another is in a {error}")
        else:
            self._fail_server(name, error)

    def _server_stopped(self, name_of_life: str) -> None:
        life = self._lives.pop(name_of_life)
        log.info("nothing is left of server %s", name_of_life)
        self.timeline.add("server", name_of_life, "gone")
        if life.retiring and not self._live(life.server):
            self._show_server(life.server, "stopped")

    def _fail_server(self, name: str, error: str) -> None:
        """Take the server's models out; the others go on."""
        self._show_server(name, "failed", error.splitlines()[0])
        for state in self._cells_of(name):
            if state.unfinished:
                self._fail(state, error)

    def _fail(self, state: CellState, error: str, *, counts: bool = True) -> None:
        cell = state.cell
        if state.evaluator is not None:
            self.cluster.send(state.evaluator, ev.CancelCell(reason="its model failed"))
        error = masked(error, self.secrets)
        self._finish(state, failure(cell, error), {})
        for given_up in self._failures.add(cell.model.name, cell.key, error) if counts else ():
            for other in self._cells.values():
                if other.unfinished and given_up.model in (None, other.cell.model.name):
                    self._fail(other, given_up.reason, counts=False)

    def _evaluator_lost(self, event: EvaluatorLost) -> None:
        name, reason = event.evaluator, event.reason
        work = self._evaluators.pop(name, None)
        self._spells.forget(name)
        log.warning("%s was lost: %s", name, reason)
        self._leave(work)
        reason = f"{reason} (see {self.store.directory.server_log(name)})"
        if (check := self._checking.pop(name, None)) is not None:
            self._check_lost(check, reason, counts=not event.infrastructure)
        elif (state := self._cells.get(work or "")) is not None and state.evaluator == name:  # else its work had failed
            state.losses += not event.infrastructure
            self._take_back(state)
            if state.losses >= DEATHS_MOST:
                self._fail(state, f"its evaluator died {state.losses} times, last: {reason}")
            self._share(state.cell.model.server)
        self._leave_seat(name, reason, at_work=work is not None, counts=not event.infrastructure)

    def _leave_seat(self, name: str, reason: str, *, at_work: bool, counts: bool) -> None:
        """Its next evaluator starts after a rest; seats whose evaluators die by themselves are given up.

        Where evaluators have been seen to work, one that dies at work is counted with its work alone: several deadly
        tasks must not cost the others their evaluators.
        """
        seat = self._seats.of(name)
        assert seat is not None
        before = NEVER_LOST if at_work and self._evaluators_work else seat.restarts
        seat.evaluator, seat.restarts = None, before.lost(self.clock(), counts=counts)
        if not seat.restarts.exhausted:
            return
        self._seats.give_up(seat)
        what = "evaluators die one after the other" if self._evaluators_work else "no evaluator can work"
        error = f"{what}: {seat.restarts.losses} died in a row, last: {reason}"
        if self._seats:
            self.terminal.note(f"{len(self._seats)} evaluators go on without one: {error}")
            return
        for state in self._cells.values():
            if state.unfinished:
                self._fail(state, error)

    def _check_lost(self, check: ev.CheckTask | ev.CheckModel, reason: str, *, counts: bool) -> None:
        """Once more, since memory may have been short for a moment; a check that kills every evaluator has failed."""
        what = _subject(check)
        self._check_losses[what] += counts
        if (losses := self._check_losses[what]) < DEATHS_MOST:
            self._checks.append(check)
            return
        self._check_failed(check, f"load {what}: the process that did it died {losses} times, last: {reason}")

    def _check_failed(self, check: ev.CheckTask | ev.CheckModel, error: str) -> None:
        if isinstance(check, ev.CheckTask):
            self._checked(ev.Checked(task_name=check.task_name, error=error))
        else:
            self._checked(ev.Checked(model=check.model.name, error=error))

    def _heard(self, name: str, said: ev.Event) -> None:
        self._evaluators_work = True
        if (seat := self._seats.of(name)) is not None:
            seat.restarts = NEVER_LOST
        match said:
            case ev.Checked():
                self._evaluators[name] = None
                del self._checking[name]
                self._checked(said)
            case ev.Answered(cell=key):
                state = self._cells[key]  # the answers are stored with those of the others
                state.losses, state.cut_off = 0, set()
            case _:
                if name not in self._evaluators or self._evaluators[name] != said.cell:
                    return
                state = self._cells[said.cell]
                if said.attempt == state.attempt:
                    self._heard_of_cell(name, state, said)

    def _heard_of_cell(self, name: str, state: CellState, said: ev.Event) -> None:
        cell = state.cell
        match said:
            case ev.WantAnswers(keys=keys):
                state.loads = False
                self.cluster.send(name, ev.KnownAnswers(answers=self.store.answers(keys)))
            case ev.NeedServer(requests=requests):
                state.needs_server = True
                if not self._expected_back(cell.model.server):
                    # An evaluator that waits here would be missing where servers wait for cells.
                    log.info("%s needs a server for %d requests", cell.key, requests)
                    self.cluster.send(name, ev.CancelCell(reason="its server has yet to be started"))
            case ev.CellProgress():
                self._progressed(state, said)
            case ev.Demand(needs=needs, serial=serial):
                for life, need in needs.items():
                    if life in self._lives:
                        self._lives[life].leases.hear(cell.key, need, serial=serial)
                self._share(cell.model.server)
            case ev.Unreached():
                self._unreached(name, state, said)
            case ev.CellDone(record=record, files=files):
                self._evaluators[name] = None
                self._leave(cell.key)
                if state.unfinished:
                    self._finish(state, record, files)
                self._share(cell.model.server)
            case ev.CellFailed(error=error, passing=passing):
                self._evaluators[name] = None
                self._leave(cell.key)
                if state.unfinished and error is None:
                    self._take_back(state)
                elif state.unfinished and error is not None:
                    self._attempt_failed(state, error, passing=passing)
                self._share(cell.model.server)

    def _unreached(self, evaluator: str, state: CellState, said: ev.Unreached) -> None:
        """A server that is alive cannot be reached from where a cell runs, which goes on with those that it reaches."""
        server = state.cell.model.server
        if state.evaluator != evaluator or said.server not in self._ready(server):
            return
        life, node = self._lives[said.server], self._seats.node_of(evaluator)
        why = masked(self._in_words(said, life, evaluator, self._host(node)), self.secrets)
        state.unreached[said.server] = why
        life.leases.leave(state.cell.key)
        if not state.unreached.keys() >= set(self._ready(server)):
            self.terminal.note(f"{why}; {state.cell.key} goes on with other servers")
        self._move_cut_off(server)
        self._share(server)

    def _move_cut_off(self, server: str) -> None:
        """Take what reaches none of the live servers to another node; what did not from there either has failed."""
        ready = self._ready(server)
        for state in self._cells_of(server):
            if state.evaluator is None or not ready or not state.unreached.keys() >= set(ready):
                continue
            why = state.unreached[ready[-1]]
            if state.cut_off:
                self._fail(state, why)
                continue
            self.terminal.note(f"{why}; {state.cell.key} is tried from another node")
            state.cut_off, state.unreached = {self._seats.node_of(state.evaluator)}, {}
            self.cluster.send(state.evaluator, ev.CancelCell(reason="its server cannot be reached from here"))

    def _in_words(self, said: ev.Unreached, life: Life, evaluator: str, host: str) -> str:
        assert life.endpoint is not None
        there = ", ".join(map(self._host, life.nodes))
        server = f"{said.server}{f' on {there}' if there else ''} at {life.endpoint.url}, which is alive"
        if said.made:
            cure = "does a proxy in between end what takes long?"
            return f"{evaluator} on {host} gets no answer from {server}: connections break ({said.why}); {cure}"
        if self._servers[life.server].plan.external:
            cure = "every node must reach that address"
        else:
            cure = f"ports {PORTS.start}-{PORTS.stop - 1} must be open between all nodes"
        return f"{evaluator} on {host} cannot connect to {server}: {said.why}; {cure}"

    def _host(self, node: str) -> str:
        """What people call it."""
        return next((known.host for known in self._nodes if known.name == node and known.host), node)

    def _attempt_failed(self, state: CellState, error: str, *, passing: bool) -> None:
        said = masked(error, self.secrets)
        if state.by_stored_facts and state.needs_server and not passing:
            log.info("%s waits for what its server says of itself: %s", state.cell.key, said)
            state.misled = True
            self._take_back(state)
            return
        state.errors = state.errors.lost(self.clock())
        if passing and state.errors.losses <= self.retries:
            log.warning("%s is run once more: %s", state.cell.key, said)
            self._take_back(state)
        else:
            state.evaluator = None  # idle again, there is nothing to cancel
            self._fail(state, error)

    def _leave(self, cell: str | None) -> None:
        """Nothing of this cell is in flight any more."""
        for life in self._lives.values():
            life.leases.leave(cell or "")

    def _take_back(self, state: CellState) -> None:
        self._touched.add(state.cell.model.server)
        state.state, state.evaluator = "waiting", None
        self.timeline.add("cell", state.cell.key, "waiting")
        self.terminal.cell(state.cell.key, state="waiting")

    def _checked(self, said: ev.Checked) -> None:
        if said.model is not None:
            self._token_ids[said.model] = said.token_ids
        if said.error is not None:
            for state in self._cells.values():
                if state.unfinished and (state.cell.task_name == said.task_name or state.cell.model.name == said.model):
                    self._fail(state, said.error)
        self._release()

    def _release(self) -> None:
        """Let cells begin when all checks are over, so that what is wrong is known before a server starts; those that
        take long are waited for by their own cells alone."""
        slow = [name for name in self._checking if self._spells.slow(name)]
        if self._checks or len(slow) < len(self._checking):
            return
        tasks = {check.task_name for check in self._checking.values() if isinstance(check, ev.CheckTask)}
        # A server is compared with the tokenizers of all its models.
        servers = {check.model.server for check in self._checking.values() if isinstance(check, ev.CheckModel)}
        self._touched.update(self._servers)
        for state in self._cells.values():
            cell = state.cell
            if state.state == "checking" and cell.task_name not in tasks and cell.model.server not in servers:
                state.state = "waiting"

    def _progressed(self, state: CellState, said: ev.CellProgress) -> None:
        now, asked = self.clock(), said.done - said.reused
        then, before = state.first_answers
        # Since the first answers: the time before is the server's start, and a burst of a moment is no rate.
        if before and now > then + RATE_S:
            state.rate = (asked - before) / (now - then)
        if not before:
            state.first_answers = (now, asked)
        state.progress = said
        self._show_cell(state, said)

    def _finish(self, state: CellState, record: Record, files: Mapping[str, bytes]) -> None:
        folder = self.store.directory.cell_results(record.model, record.task).relative_to(self.store.directory.root)
        record = replace(record, files=tuple(str(folder / name) for name in sorted(files)))
        if record.status is Status.FAILED:
            self._unwritten.append(record)
        else:
            self.store.write_record(record, files)
            self.tracker.cell(record)
        state.state, state.evaluator = ("done" if record.status is Status.DONE else "failed"), None
        if record.status is Status.DONE and record.counts.asked:
            for life in self._ready(state.cell.model.server):
                self._lives[life].finished_cell = True
        self.records[state.cell.key] = record
        self.timeline.add("cell", state.cell.key, state.state, reason=_first_line(record.error))
        self._costs.learn(record)
        self._touched.add(state.cell.model.server)
        self._expect(state.cell.model.server)
        self._done += record.status is Status.DONE
        self.terminal.finished(record, self._done, len(self.plan.cells))
        log.info(
            "%s %s: %d requests, %d asked, %d reused, %.1f s",
            state.cell.key,
            record.status,
            record.counts.requests,
            record.counts.asked,
            record.counts.reused,
            record.wall_s,
        )

    # Deciding and carrying out.

    def _live(self, server: str) -> list[str]:
        """Its lives that start or are ready."""
        return [n for n, life in self._lives.items() if life.server == server and not (life.retiring or life.lost)]

    def _ready(self, server: str) -> list[str]:
        return [name for name in self._live(server) if self._lives[name].endpoint is not None]

    def _resting(self, server: str) -> bool:
        return self._servers[server].restarts.rest_s(self.clock()) > 0

    def _expected_back(self, server: str) -> bool:
        """Whether a cell may keep its evaluator while it waits: what the server needs is its own already."""
        return bool(self._live(server)) or self._resting(server)

    def _cells_of(self, server: str) -> list[CellState]:
        return self._servers[server].cells

    def _touch(self, event: ClusterEvent) -> None:
        """Note whom an event may change, before it does."""
        match event:
            case EvaluatorReady():
                pass
            case EvaluatorSaid(evaluator=name) | EvaluatorLost(evaluator=name):
                if (state := self._cells.get(self._evaluators.get(name) or "")) is not None:
                    self._touched.add(state.cell.model.server)
            case _:
                if (life := self._lives.get(event.life)) is not None:
                    self._touched.add(life.server)

    def _look(self) -> None:
        """Bring the view up to date: servers that were touched, and nodes."""
        self._view.now_s = self.clock()
        self._view.idle_evaluators = 0 if self._checks else len(self._idle())
        if self._nodes != self.cluster.inventory:
            self._nodes = self.cluster.inventory
            self._view.put_nodes(self._nodes)
            self._touched.update(self._servers)  # what a server needs may follow from what there is
        # Asked before they are put: a pause that ends meanwhile is seen at the next look.
        pausing = {name for name in self._touched if self._pauses(name)}
        for name in self._servers:
            if name in self._touched:
                self._view.put(self._seen(name))
        self._touched = pausing

    def _pauses(self, server: str) -> bool:
        """Whether time alone, or any evaluator, changes what may be done: it rests, or one of its cells waits."""
        now = self.clock()
        return self._resting(server) or any(
            c.unfinished and (c.errors.rest_s(now) or c.cut_off) for c in self._cells_of(server)
        )

    def _seen(self, name: str) -> ServerView:
        server, now = self._servers[name], self.clock()
        # One that may be checked for hours yet keeps no server.
        unfinished = [state for state in server.cells if state.unfinished and state.state != "checking"]
        waiting = [state for state in unfinished if state.state == "waiting" and self._can_start(state)]
        ready = self._ready(name)
        if ready and any(state.asks for state in unfinished):
            server.spent_s += len(ready) * (now - server.looked_s)
        server.looked_s = now
        return ServerView(
            name=name,
            need=need(server.plan, self._nodes),
            replicas=server.replicas,
            lives=tuple(
                LifeView(
                    name=life_name,
                    nodes=life.nodes,
                    ready_at_s=life.ready_at_s if life.endpoint else life.started_at_s + server.start_s,
                    ready=life.endpoint is not None,
                    live=not (life.retiring or life.lost),
                )
                for life_name, life in self._lives.items()
                if life.server == name
            ),
            resting=self._resting(name),
            unfinished_cells=len(unfinished),
            wanted=name not in self._late and any(map(self._wants_server, unfinished)),
            running=sum(state.state == "running" and not state.answered for state in unfinished),
            waiting=tuple(state.cell.key for state in waiting),
            begun=bool(waiting and waiting[0].attempt),
            work_s=corrected_s(
                sum(state.expected_s * (1 - state.share(reused=True)) for state in unfinished),
                done_s=sum(state.expected_s * state.share(reused=False) for state in server.cells),
                spent_s=server.spent_s,
            ),
            start_s=server.start_s,
        )

    def _expect(self, name: str) -> None:
        """What its cells take, by what is known now."""
        server, on_cpus = self._servers[name], self._on_cpu(name)
        for state in server.cells:
            state.expected_s = self._costs.expected_s(state.cell, server.plan, on_cpu=on_cpus)

    def _on_cpu(self, server: str) -> bool:
        return on_cpu(self._servers[server].plan, cluster_gpus=total_gpus(self.cluster.inventory))

    def _wants_server(self, state: CellState) -> bool:
        """Before facts of its server are known, nothing can be stored for it; afterwards an evaluator looks first."""
        if state.state == "checking":
            return False
        return state.cell.model.server not in self._facts if state.needs_server is None else state.needs_server

    def _can_start(self, state: CellState) -> bool:
        if state.errors.rest_s(self.clock()):
            return False
        if state.cut_off and not self._seats.elsewhere(self._idle(), state.cut_off):
            return False
        if state.misled:
            return bool(self._ready(state.cell.model.server))
        return bool(self._live(state.cell.model.server)) or (
            state.needs_server is None and state.cell.model.server in self._facts
        )

    def _carry_out(self, action: StartServer | RetireServer | RunCell) -> None:
        match action:
            case StartServer(server=name, nodes=nodes, reason=reason):
                self._touched.add(name)
                server = self._servers[name]
                life = f"{name}-{server.started}"
                server.started += 1
                self._lives[life] = Life(server=name, nodes=nodes, started_at_s=self.clock())
                where = ", ".join(nodes)
                log.info("start server %s%s: %s", life, f" on {where}" if where else "", reason)
                takes = need(server.plan, self._nodes)
                gpus = takes.gpus * takes.nodes if takes is not None else 0.0
                known = {node.name: node.host for node in self._nodes}
                hosts = [known.get(node, "") for node in nodes]
                host = ", ".join(hosts) if all(hosts) else ""
                self.timeline.add(
                    "server", life, "starting", server=name, on=where, host=host, gpus=gpus, reason=reason
                )
                if not self._ready(name):
                    expected_s = "" if server.plan.external else f"some {lasting(server.start_s)}"
                    self._show_server(name, "starting", expected_s)
                expected = expectation(server.plan, self.plan.models, self._token_ids)
                log_path = self.store.directory.server_log(life)
                self.cluster.start_server(server.plan, life, log_path, expected, nodes=nodes)
            case RetireServer(life=life, reason=reason):
                log.info("stop server %s: %s", life, reason)
                self.timeline.add("server", life, "stopping", reason=reason)
                self._touched.add(self._lives[life].server)
                self._lives[life].retiring = True
                self.cluster.stop_server(life)
            case RunCell(cell=key, reason=reason):
                state = self._cells[key]
                self._touched.add(state.cell.model.server)
                idle = self._seats.elsewhere(self._idle(), state.cut_off)
                if not idle:  # another cell of this tick has the last one
                    return
                state.attempt += 1
                state.state, state.first_answers, state.rate = "running", (0.0, 0), 0.0
                state.told, state.taken_back, state.loads = None, False, True
                state.unreached = {}
                state.evaluator = idle[0]
                self._evaluators[state.evaluator] = key
                server_name = state.cell.model.server
                log.info("run %s on %s, attempt %d: %s", key, state.evaluator, state.attempt, reason)
                self.timeline.add("cell", key, "running", on=state.evaluator, reason=reason)
                self.terminal.cell(key, state="loading")
                facts = self._facts.get(server_name)
                state.by_stored_facts = facts is not None and not self._ready(server_name)
                ahead = max(ev.BATCH_RESPONSES, ev.AHEAD_MOST // len(self._evaluators))
                run = ev.RunCell(cell=state.cell, attempt=state.attempt, facts=facts, ahead=ahead)
                self.cluster.send(state.evaluator, run)
                self._share(server_name)

    def _share(self, server: str) -> None:
        """Tell the evaluators of this server's models which endpoints they have, and how much of each."""
        running = [c for c in self._cells_of(server) if c.state == "running" and c.evaluator]
        # The new shares are all of one serial, and an evaluator that hears it has heard those of all its endpoints.
        serial = next(self._serials)
        pools: dict[str, list[tuple[Endpoint, int]]] = {state.cell.key: [] for state in running}
        for name in self._ready(server):
            life = self._lives[name]
            assert life.endpoint is not None
            assert life.load is not None
            reach = [state.cell.key for state in running if name not in state.unreached]
            for holder, share in life.leases.split(life.load.limit, reach, serial=serial).items():
                pools[holder].append((life.endpoint, share))
            self._press(name)
        facts = self._facts.get(server) if self._ready(server) else None
        lost = tuple(name for name, life in self._lives.items() if life.server == server and life.lost)
        for state in running:
            news = ev.PoolChanged(shares=tuple(pools[state.cell.key]), facts=facts, lost=lost, serial=serial)
            if state.told is None or (news.shares, news.facts) != (state.told.shares, state.told.facts):
                state.told = news
                self.cluster.send(str(state.evaluator), news)

    def _press(self, name_of_life: str) -> None:
        """Tell a server's controller what is wanted of it, of which four times its limit is as good as more."""
        life = self._lives[name_of_life]
        assert life.load is not None
        pressure = (min(life.leases.wanted, 4 * life.load.limit), life.leases.refused)
        if pressure != life.pressure:
            life.pressure = pressure
            self.cluster.press(name_of_life, wanted=pressure[0], refused=pressure[1])

    # Showing.

    def _show_cells(self, server: str) -> None:
        """Those that ask, now that the server has come or gone."""
        for state in self._cells_of(server):
            if state.asks and state.progress is not None:
                self._show_cell(state, state.progress)

    def _show_cell(self, state: CellState, progress: ev.CellProgress) -> None:
        waits = state.asks and not self._ready(state.cell.model.server)
        self.terminal.cell(
            state.cell.key,
            state=WAITING if waits else "running",
            done=progress.done,
            total=progress.total,
            reused=progress.reused,
            rate=0.0 if waits else state.rate,
            live=in_words(progress.live),
        )

    def _show_server(self, server: str, state: str, detail: str = "") -> None:
        for model in self.plan.servers[server].adapters:
            self.terminal.server(model, state, detail)

    def _track(self) -> None:
        now = self.clock()
        if now - self._last_tracked < TRACK_S:
            return
        self._last_tracked = now
        loads = {
            server: {name: load for name in self._ready(server) if (load := self._lives[name].load)}
            for server in self._servers
        }
        shown = {server: figures(self._loads_before, now_there) for server, now_there in loads.items()}
        self._loads_before = {name: load for there in loads.values() for name, load in there.items()}
        for model in {c.cell.model.name for c in self._cells.values() if c.state == "running"}:
            mine = [c for c in self._cells.values() if c.cell.model.name == model]
            known = [c.progress for c in mine if c.progress is not None]
            self.tracker.progress(
                model,
                {
                    "cells_done": sum(not c.unfinished for c in mine),
                    "requests_done": sum(p.done for p in known),
                    "requests_per_s": sum(c.rate for c in mine if c.state == "running"),
                    **{
                        live_key(c.cell.task_name, name): value
                        for c in mine
                        if c.state == "running" and c.progress is not None
                        for name, value in c.progress.live.items()
                    },
                    **{f"server/{name}": value for name, value in shown[mine[0].cell.model.server].items()},
                },
            )
        self._keep_concurrency()

    def _tell(self) -> None:
        """Say in the heartbeat what is at work."""
        now = self.clock()
        if now - self._last_told < TELL_S:
            return
        self._last_told = now
        running = [c for c in self._cells.values() if c.state == "running"]
        rate = sum(c.rate for c in running)
        # Priors alone are no ground for a guess of the end.
        left_s = sweep_s([self._view[name] for name in self._servers], now) if rate else None
        self.terminal.overall(servers=Counter(life.state for life in self._lives.values()), rate=rate, left_s=left_s)
        self.store.tell(
            Work(
                running={c.cell.key: (c.progress.done, c.progress.total) if c.progress else (0, 0) for c in running},
                servers={name: life.state for name, life in self._lives.items()},
                requests_per_s=round(rate, 1),
                left_s=round(left_s, 1) if left_s is not None else None,
            )
        )


def keep_answers(events: Sequence[ClusterEvent], store: Store, cluster: Cluster) -> None:
    """Store the responses of all evaluators in one transaction, and tell each that its own are durable.

    A commit costs a few fsyncs whatever is in it; one for each batch would be dozens a second. It comes before anything
    else of these events: no record stands before the answers that it was made of. Right whichever attempt asked: an
    answer belongs to a model and a request.
    """
    said = [
        (event.evaluator, event.event.responses)
        for event in events
        if isinstance(event, EvaluatorSaid) and isinstance(event.event, ev.Answered)
    ]
    if not said:
        return
    earlier = store.put(itertools.chain.from_iterable(responses for _, responses in said))
    keys: dict[str, list[bytes]] = {}
    for evaluator, responses in said:
        keys.setdefault(evaluator, []).extend(response.key for response in responses)
    for evaluator, own in keys.items():
        of_others = {key: earlier[key] for key in own if key in earlier} if earlier else {}
        cluster.send(evaluator, ev.Stored(responses=len(own), earlier=of_others))


def _subject(check: ev.CheckTask | ev.CheckModel) -> str:
    return f"task {check.task.task}" if isinstance(check, ev.CheckTask) else f"model {check.model.name}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def _in_one_line(facts: Facts) -> str:
    """`scores by echo, next_token; 21 checks passed, 1 noted`."""
    passed = sum(check.outcome is Checked.PASSED for check in facts.checks)
    noted = len(facts.checks) - passed
    return f"scores by {', '.join(facts.methods)}; {passed} checks passed{f', {noted} noted' if noted else ''}"
