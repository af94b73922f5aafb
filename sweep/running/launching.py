"""A plan -> its cluster, its loop and its W&B, from their beginning to their end, whatever happens."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields

from sweep.errors import ReportError, StoreError, SweepError, boundary
from sweep.planning.config import SweepConfig
from sweep.planning.plan import Plan
from sweep.record import Record
from sweep.results import publish
from sweep.results.reading import Outcome as Sampled
from sweep.results.reading import Sweep, read_sweep
from sweep.results.store import Store
from sweep.results.timeline import TimelineWriter
from sweep.results.tracking import Outcome, Tracker
from sweep.running.cluster import Cluster
from sweep.running.inventory import require
from sweep.running.progress import Terminal
from sweep.running.runner import Runner
from sweep.running.signals import listen, stop_signals
from sweep.running.walltime import Walltime

log = logging.getLogger(__name__)

TABLES_S = 10.0
"""Of a walltime, for what comes after W&B: the tables."""

CLOSE_WANDB_S = 120.0
"""What W&B has not taken by then is left for later; the run directory has it all."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a launch came to."""

    records: dict[str, Record]
    """Of every cell of the plan that has ended, now or before, by cell key."""
    signal: int
    """That stopped it; 0 when none did."""
    wandb: Outcome
    out_of_time: bool = False
    """Its walltime stopped it."""
    got_on: bool = True
    """It brought answers or ended cells, so that another launch like it will too."""


def carry_out(
    config: SweepConfig,
    plan: Plan,
    store: Store,
    *,
    api_key: str,
    secrets: Sequence[str],
    ends_at_s: float = math.inf,
    texts: Callable[[Sweep], Mapping[str, str]] = lambda _: {},
) -> Carried:
    """Bring up the cluster, run the plan's owed cells on it and take everything down again, whatever happens, and
    before the Unix time `ends_at_s`. `texts` makes further chapters of W&B's Report, Markdown by title.

    Raises ResourceError when the cluster cannot carry the plan.
    """
    records, stored = dict(plan.done), store.count()
    timeline, host = TimelineWriter(store.directory.timeline), os.uname().nodename
    timeline.add("launch", host, "began")
    walltime = Walltime(end_s=time.monotonic() + ends_at_s - time.time())
    with (
        stop_signals() as stop,
        Terminal(models=list(plan.models), cells=[cell.key for cell in plan.cells]) as terminal,
        _warnings_on(terminal),
        closing(
            Cluster(config.ray, api_key=api_key, secrets=secrets, env=config.env, servers=plan.owed_servers.values())
        ) as cluster,
    ):
        listen(stop)  # Ray has put a handler of its own in place
        require(plan.owed_servers, cluster.inventory)
        tracker, ended = publish.mirror_of(config, store.directory, secrets), False
        try:
            runner = Runner(
                plan=plan,
                store=store,
                cluster=cluster,
                terminal=terminal,
                tracker=tracker,
                timeline=timeline,
                secrets=secrets,
                records=records,
                retries=config.retries,
                max_failures=config.max_failures,
                load_timeout_s=config.load_timeout_s,
                scoring_timeout_s=config.scoring_timeout_s,
                walltime=walltime,
            )
            number = runner.run(stop)
            ended = not runner.out_of_time
        finally:
            store.tell(None)
            cluster.close()  # no GPU is held while W&B takes its time
            timeline.add("launch", host, "ended")
            report_end_s = walltime.end_s - TABLES_S - CLOSE_WANDB_S
            if ended:
                make_report(tracker, config, store, texts, lambda: bool(stop) or time.monotonic() > report_end_s)
            left_s = walltime.end_s - TABLES_S - time.monotonic()
            outcome = tracker.close(max(0.0, min(CLOSE_WANDB_S, left_s)))
    got_on = store.count() > stored or len(records) > len(plan.done)
    return Carried(records=records, signal=number, wandb=outcome, out_of_time=runner.out_of_time, got_on=got_on)


def make_report(
    tracker: Tracker,
    config: SweepConfig,
    store: Store,
    texts: Callable[[Sweep], Mapping[str, str]],
    over: Callable[[], bool],
) -> None:
    """The Report of what the records say now; none when there is no time for it, without which the sweep is as good.

    `texts` may read every sample, so offline, where nobody would see them, they are left to `report publish=true`.
    """
    if not config.wandb.report or not tracker.shows or over():
        return
    try:
        with boundary(StoreError, "make W&B's Report"):
            sweep = read_sweep(store.directory.root)
            watched = _Watched(over=over, **{one.name: getattr(sweep, one.name) for one in fields(sweep)})
            publish.report(tracker, sweep, config, texts(watched) if tracker.online else {})
    except SweepError as error:
        log.warning("there will be no W&B Report of this launch: %s", error)


@dataclass(frozen=True, kw_only=True)
class _Watched(Sweep):
    """Gives the samples of no further cell when it is `over`."""

    over: Callable[[], bool]

    def outcomes(self, record: Record) -> Iterator[Sampled]:
        if self.over():
            raise ReportError("there is no time left for it; `report publish=true` makes it")
        yield from super().outcomes(record)


@contextmanager
def _warnings_on(terminal: Terminal) -> Iterator[None]:
    logger = logging.getLogger("sweep")
    terminal.log_handler.setLevel(logging.WARNING)
    logger.addHandler(terminal.log_handler)
    try:
        yield
    finally:
        logger.removeHandler(terminal.log_handler)
