"""timeline.jsonl: what the driver did when, a line an event; for people, never for a decision.

Events are appended as they happen, so the file of a driver that was killed ends where it ended, perhaps with half a
line, which is left out, and cut off by the next launch. A full disk may leave half a line in the middle: it costs its
event and nothing else. Launches follow one another in the file.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from sweep.errors import StoreError, boundary

log = logging.getLogger(__name__)

What = Literal["launch", "server", "cell"]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line."""

    time: float
    """Unix, seconds, by the driver's clock."""
    what: What
    name: str
    """A server's life (`qwen-0`), a cell (`model/task`); of a launch the host."""
    state: str
    """launch: `began`, `ended`. server: `starting`, `ready`, `stopping`, `lost`, `gone`. cell: `running`,
    `waiting` (its turn was taken back), `done`, `failed`."""
    server: str = ""
    """Of a server's life: the entry whose models it serves."""
    on: str = ""
    """A server's nodes as Ray names them, a cell's evaluator."""
    host: str = ""
    """What people call the nodes in `on`, in their order; empty in files of before it was written."""
    gpus: float = 0.0
    """That a server holds, on all its nodes together."""
    reason: str = ""


class TimelineWriter:
    """Appends events. A disk that refuses them costs the picture and is said once."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._refused = False
        self._begun = False
        self._torn = False
        """Half a line may stand at the file's end."""

    def add(
        self,
        what: What,
        name: str,
        state: str,
        *,
        server: str = "",
        on: str = "",
        host: str = "",
        gpus: float = 0.0,
        reason: str = "",
    ) -> None:
        event = Event(
            time=self._clock(),
            what=what,
            name=name,
            state=state,
            server=server,
            on=on,
            host=host,
            gpus=gpus,
            reason=reason,
        )
        try:
            if not self._begun and self._path.exists():
                os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
            self._begun = True
            line = (b"\n" if self._torn else b"") + msgspec.json.encode(event) + b"\n"
            self._torn = True
            with self._path.open("ab", buffering=0) as file:
                if (written := file.write(line)) != len(line):
                    raise OSError(f"it took {written} of {len(line)} bytes")
            self._torn = False
        except OSError as error:
            if not self._refused:
                log.warning("the timeline goes on without %s: %s", self._path, error)
            self._refused = True


@dataclass(frozen=True, kw_only=True)
class Span:
    """One server life, or one attempt at a cell."""

    name: str
    server: str
    on: str
    gpus: float
    start: float
    """Unix, seconds."""
    ready: float | None
    """Of a server that became ready."""
    end: float
    """Where the file ends, for one that had not ended."""
    state: str
    """The last one."""
    reason: str
    """Why it was lost, did not come up or failed; none for what was stopped on purpose."""
    lost: bool = False
    """Of a server: it died, or did not come up."""
    host: str = ""
    """What people call the nodes in `on`, in their order."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    servers: tuple[Span, ...] = ()
    cells: tuple[Span, ...] = ()
    launches: tuple[Span, ...] = ()
    """From `began` to `ended`, or to the last event before the next one."""
    unreadable: int = 0
    """Lines that say nothing: half ones that a full disk left, and damage. What they told is missing."""

    @property
    def gpu_s(self) -> float:
        """GPU-seconds that servers held."""
        return sum((span.end - span.start) * span.gpus for span in self.servers)


_ENDS = {"launch": ("ended",), "server": ("gone",), "cell": ("waiting", "done", "failed")}
_BEGINS = {"launch": "began", "server": "starting", "cell": "running"}
_BAD_ENDS = ("lost", "gone", "failed")
"""What a reason belongs to that is told of a span; the others say why something was done."""


def read_timeline(path: Path) -> Timeline:
    """The file as spans, without lines that cannot be read; empty where there is none. Raises StoreError."""
    if not path.exists():
        return Timeline()
    with boundary(StoreError, f"read {path}"):
        lines = path.read_bytes().splitlines(keepends=True)
    events, unreadable = [], 0
    for line in lines:
        if not line.endswith(b"\n") or not line.strip():
            continue
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            unreadable += 1
    return replace(spans(events), unreadable=unreadable)


def spans(events: Iterable[Event]) -> Timeline:
    """What begins with a new launch ends whatever the one before had left open, at its last event."""
    done: dict[str, list[Span]] = {what: [] for what in _BEGINS}
    open_by_name: dict[tuple[str, str], list[Event]] = {}
    last = 0.0

    def close(key: tuple[str, str], end: float) -> None:
        of_it = open_by_name.pop(key)
        first, latest = of_it[0], of_it[-1]
        reasons = [event.reason for event in of_it if event.state in _BAD_ENDS and event.reason]
        done[key[0]].append(
            Span(
                name=first.name,
                server=first.server,
                on=first.on or latest.on,
                host=first.host,
                gpus=first.gpus,
                start=first.time,
                ready=next((event.time for event in of_it if event.state == "ready"), None),
                end=end,
                state=latest.state,
                reason=reasons[-1] if reasons else "",
                lost=first.what == "server" and (bool(reasons) or any(event.state == "lost" for event in of_it)),
            )
        )

    for event in events:
        key = (event.what, event.name)
        if event.what == "launch" and event.state == "began":
            for left in list(open_by_name):
                close(left, last)
        if event.state == _BEGINS[event.what]:
            if key in open_by_name:
                close(key, event.time)
            open_by_name[key] = [event]
        elif key in open_by_name:
            open_by_name[key].append(event)
        last = event.time
        if event.state in _ENDS[event.what] and key in open_by_name:
            close(key, event.time)
    for left in list(open_by_name):
        close(left, last)
    by_start = {what: tuple(sorted(found, key=lambda span: (span.start, span.name))) for what, found in done.items()}
    return Timeline(servers=by_start["server"], cells=by_start["cell"], launches=by_start["launch"])
