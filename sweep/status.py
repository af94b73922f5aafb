"""The `status` command: what of a sweep is done, running, owed and failed, and whether its driver lives.

Reads plan.json, the records and the heartbeat, never the database: it works from another machine, while a sweep runs
and after it died. A cell counts as the last launch planned it; a record of other settings makes it neither done nor
failed.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from sweep.errors import StoreError, boundary
from sweep.record import Status
from sweep.results.claim import BEAT_S, STALE_S, Heartbeat, next_beat, of_this_machine, read_heartbeat
from sweep.results.report import lasting
from sweep.results.store import RunDirectory, read_cells, require_launched

log = logging.getLogger(__name__)

MOST = 20
"""Cells that a list names before it counts the rest."""

WATCH_S = 1.5 * BEAT_S
"""A beat of a living driver falls into it."""

STALLED_S = 15.0
"""Of a loop that turns ten times a second. A commit or a large record on a busy disk may take it a few seconds."""


class State(StrEnum):
    DONE = "done"
    RUNNING = "running"
    OWED = "owed"
    FAILED = "failed"


class _Outcome(msgspec.Struct):
    """What is needed of a record; the rest may be megabytes."""

    model: str
    task: str
    fingerprint: str
    status: Status
    started_at: str = ""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a sweep stands."""

    states: Mapping[str, State]
    """By cell key, in the order of the plan."""
    errors: Mapping[str, str]
    """Of failed cells: the first line."""
    heartbeat: Heartbeat | None
    """None where no driver has worked yet."""
    silent_s: float
    """Since the last beat, by this machine's clock; 0 where there is none."""
    alive: bool
    """Whether a driver is at work; one that was killed is known as dead after STALE_S."""

    @property
    def finished(self) -> bool:
        return all(state in (State.DONE, State.FAILED) for state in self.states.values())


def standing(directory: RunDirectory, *, now: float) -> Standing:
    """`now` is in seconds since 1970. Raises StoreError where no sweep was launched or a file cannot be read."""
    require_launched(directory)
    with boundary(StoreError, f"read {directory.heartbeat}"):
        heartbeat, silent_s, alive = _last_beat(directory.heartbeat, now)
    outcomes = {f"{o.model}/{o.task}": o for o in _outcomes(directory)}
    since = heartbeat.since if heartbeat is not None and alive else ""
    running = heartbeat.work.running if heartbeat is not None and alive else {}
    states: dict[str, State] = {}
    errors: dict[str, str] = {}
    for key, fingerprint in read_cells(directory).items():
        outcome = outcomes.get(key)
        if key in running:
            states[key] = State.RUNNING
        elif outcome is None or outcome.fingerprint != fingerprint:
            states[key] = State.OWED
        elif outcome.status is Status.DONE:
            states[key] = State.DONE
        elif outcome.started_at < since:
            states[key] = State.OWED  # it failed in an earlier launch, and this one comes to it
        else:
            states[key] = State.FAILED
            errors[key] = (outcome.error or "it says no more").strip().splitlines()[0]
    return Standing(states=states, errors=errors, heartbeat=heartbeat, silent_s=silent_s, alive=alive)


def _last_beat(path: Path, now: float) -> tuple[Heartbeat | None, float, bool]:
    """The last heartbeat, how long ago it was, and whether a driver is behind it.

    Where that seems long, which on two machines may be their clocks' doing, the next beat is waited for.
    """
    last = read_heartbeat(path)
    if last is None:
        return None, 0.0, False
    silent_s = now - last.time
    if last.ended or last.reads or (silent_s >= STALE_S and of_this_machine(last)):
        return last, max(0.0, silent_s), False
    if abs(silent_s) < STALE_S:
        return last, max(0.0, silent_s), True
    log.warning("the heartbeat of %s is %.0f s off this machine's clock: waiting for the next", last, abs(silent_s))
    if (beat := next_beat(last, path, within_s=WATCH_S)) is None:
        return last, max(0.0, silent_s), False
    return beat, 0.0, not (beat.ended or beat.reads)


def _outcomes(directory: RunDirectory) -> Iterator[_Outcome]:
    for path in sorted(directory.records.glob("*.json")):
        with boundary(StoreError, f"read {path}"):
            yield msgspec.json.decode(path.read_bytes(), type=_Outcome)


def describe(stands: Standing, root: Path, *, width: int | None) -> str:
    """For people; lines are cut to `width` where there is one."""
    return "\n".join(_cut(line, width) for line in _lines(stands, root))


def _lines(stands: Standing, root: Path) -> Iterator[str]:
    by_model: dict[str, Counter[State]] = {}
    for key, state in stands.states.items():
        by_model.setdefault(key.partition("/")[0], Counter())[state] += 1
    every = Counter(stands.states.values())
    yield f"{root}: {every[State.DONE]} of {len(stands.states)} cells done"
    yield f"driver   {_driver(stands)}"
    work = stands.heartbeat.work if stands.heartbeat is not None and stands.alive else None
    if work is not None and work.servers:
        states = list(work.servers.values())
        yield f"servers  {', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}"
    if work is not None and work.requests_per_s:
        yield f"rate     {work.requests_per_s:g} requests/s"
    if work is not None and work.left_s is not None:
        yield f"left     about {lasting(60 * math.ceil(work.left_s / 60))}"
    yield ""
    unfinished_first = sorted(by_model.items(), key=lambda item: item[1].keys() == {State.DONE})
    rows = [[name, *(str(count[state]) for state in State)] for name, count in [*unfinished_first, ("all", every)]]
    yield from _table([["model", *State], *rows[:-1][:MOST], rows[-1]])
    if (more := len(by_model) - MOST) > 0:
        yield f"({more} more models)"
    if work is not None and work.running:
        known = {key: f"{done}/{total}" if total else "loading" for key, (done, total) in work.running.items()}
        yield from _listed("running", known)
    if stands.errors:
        yield from _listed("failed", stands.errors)


def _driver(stands: Standing) -> str:
    beat = stands.heartbeat
    if beat is None:
        return "none has worked here"
    if beat.reads:
        return f"none; the last to use the answers was an export, {beat}"
    if beat.ended:
        return f"none; the last was {beat} and ended in order"
    silent = f"last heartbeat {stands.silent_s:.0f} s ago"
    if not stands.alive:
        return f"died: {beat}, {silent}; the same command goes on where it stopped"
    if beat.still_s >= STALLED_S:
        return f"{beat}, {silent}; stalled for {lasting(beat.still_s)}: the figures are as old, see logs/driver.log"
    return f"{beat}, {silent}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *figures in rows:
        yield "  ".join([f"{name:<{widths[0]}}", *(f"{f:>{w}}" for f, w in zip(figures, widths[1:], strict=True))])


def _listed(title: str, text_by_cell: Mapping[str, str]) -> Iterator[str]:
    yield ""
    yield title
    shown = list(text_by_cell.items())[:MOST]
    widest = max(len(key) for key, _ in shown)
    for key, text in shown:
        yield f"  {key:<{widest}}  {text}"
    if more := len(text_by_cell) - len(shown):
        yield f"  … and {more} more"


def _cut(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"
