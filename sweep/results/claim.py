"""Who works in a run directory: a lock, a heartbeat for where the lock does not reach, and what the heartbeat tells.

A lock (flock) keeps a second driver out on one machine, and on others where the file system carries locks between
them. Some do not (Lustre with `localflock`, NFS with `nolock`, parts of FUSE), and from the inside nobody can tell. So
a driver, and whoever reads its answers, also writes heartbeat.json every BEAT_S. One of another machine (another boot
of a kernel: names repeat) that did not end well is watched before its directory is taken: if its heartbeat moves within
STALE_S it lives. No two machines' clocks are compared.

A driver that was taken for dead and is not (a machine that slept, a network that came back) finds another's heartbeat
in place of its own and writes nothing any more: before each write the store asks `Claim.check`.

What is not promised: two drivers that take one directory in the same second, on two machines and a file system without
locks, see each other at the next beat only.
"""

import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import msgspec

from sweep.errors import StoreError

log = logging.getLogger(__name__)

BEAT_S = 5.0

STALE_S = 30.0
"""A heartbeat that has stood still for so long is a dead driver's: six beats, and as long as NFS caches a folder."""

LOOK_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a driver is at, for `status`."""

    running: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Cell -> requests that have an answer, and all; (0, 0) while it loads."""
    servers: Mapping[str, str] = field(default_factory=dict)
    """Server's life -> `starting`, `ready`, `stopping` or `lost`."""
    requests_per_s: float = 0.0
    left_s: float | None = None
    """Until the sweep is expected to end; None while nothing is known to expect it from."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    driver: str
    """Random; a process number comes back, and hosts may share a name."""
    host: str
    boot: str
    """Of the machine's kernel: under one, locks hold whatever the file system."""
    pid: int
    since: str
    """UTC, ISO 8601."""
    time: float
    """Of this beat, seconds since 1970 on the driver's clock."""
    beats: int = 0
    ended: bool = False
    """It has left the directory in order."""
    reads: bool = False
    """It is no driver: it reads the stored answers (`export`), and no driver can begin meanwhile."""
    work: Work = field(default_factory=Work)
    still_s: float = 0.0
    """For so long its loop had not said what it is at; beats come from a thread of their own. 0 outside of the loop."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The last beat of whoever worked there last; None where nobody has, or what is there is not one of ours."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Heartbeat)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def take(lock: Path, heartbeat: Path) -> TextIO:
    """The directory's lock, held until it is closed or this process is gone.

    Raises StoreError while another driver lives; takes STALE_S to find out that one of another machine does not.
    """
    file = lock.open("a+")
    try:
        carried = _locked(file, lock.parent)
        last = read_heartbeat(heartbeat)
        if last is not None and not last.ended and not (carried and of_this_machine(last)):
            _outlive(last, heartbeat)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename} since {_now()}")
        file.flush()
    except BaseException:
        file.close()
        raise
    return file


def _locked(file: TextIO, root: Path) -> bool:
    """Lock it; False where the file system has no locks. Raises StoreError when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise _in_use(root, file.read().strip() or "another process") from error
    except OSError as error:
        log.warning("%s has no file locks (%s): a second driver is told by its heartbeat alone", root, error)
        return False
    return True


def _has_locks(file: TextIO) -> bool:
    """Of a file that is ours: where there are locks, this one is taken once more."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _outlive(last: Heartbeat, path: Path) -> None:
    """Return when `last` has not beaten for STALE_S; raises StoreError when it does, or when another begins."""
    log.warning("%s was in use by %s, which did not leave in order: watching for %g s", path.parent, last, STALE_S)
    if (beat := next_beat(last, path, within_s=STALE_S)) is not None and not beat.ended:
        raise _in_use(path.parent, str(beat))


def next_beat(last: Heartbeat, path: Path, *, within_s: float) -> Heartbeat | None:
    """The one that follows `last`; None when none does in that time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        beat = read_heartbeat(path)
        if beat is not None and (beat.driver, beat.beats) != (last.driver, last.beats):
            return beat
    return None


def of_this_machine(beat: Heartbeat) -> bool:
    """Whether its clock and its locks are ours."""
    return beat.boot == _boot()


def _in_use(root: Path, owner: str) -> StoreError:
    return StoreError(f"{root} is in use by {owner}: wait for it, stop it, or choose another name=")


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Claim:
    """The hold of a driver, or of one who `reads`, on a run directory, from `take` to `close`."""

    def __init__(self, lock: Path, heartbeat: Path, *, reads: bool = False) -> None:
        """Raises StoreError while another one lives. Writes no heartbeat before `begin`, and is not seen from machines
        that the lock does not reach."""
        self._lock = take(lock, heartbeat)
        self.locks = _has_locks(self._lock)
        """Whether the file system has any."""
        self._path = heartbeat
        self._told: tuple[Work, float | None] = (Work(), None)
        """What the next beat says, and when that was told."""
        self._mine = Heartbeat(
            driver=secrets.token_hex(8),
            host=os.uname().nodename,
            boot=_boot(),
            pid=os.getpid(),
            since=_now(),
            time=0.0,
            reads=reads,
        )
        self._rival: Heartbeat | None = None
        self._seen_s = 0.0
        """When the directory was last seen to be ours; on the clock that goes on while a machine sleeps."""
        self._beating = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="heartbeat", daemon=True)

    def begin(self) -> None:
        """Raises OSError where nothing can be written."""
        self._write()
        self._thread.start()

    def tell(self, work: Work | None) -> None:
        """What the next beat says of the loop; None when it has ended, and its silence means nothing."""
        self._told = (Work(), None) if work is None else (work, time.monotonic())

    def check(self) -> None:
        """Raises StoreError when another driver has taken the directory over."""
        if time.time() - self._seen_s > STALE_S / 2:
            self._beat()
        if self._rival is not None:
            raise StoreError(
                f"{self._path.parent} was taken over by {self._rival}, which saw no heartbeat of ours for "
                f"{STALE_S:g} s: this driver stops, the other goes on"
            )

    def _beat_forever(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._beat()

    def _beat(self, *, ended: bool = False) -> None:
        with self._beating:
            try:
                found = read_heartbeat(self._path)
                if found is not None and found.driver != self._mine.driver:
                    self._rival = found
                else:
                    self._mine = replace(self._mine, ended=ended)
                    self._write()
            except OSError as error:
                log.warning("no heartbeat could be written: %s", error)  # what has to be written says so itself

    def _write(self) -> None:
        """Without fsync: after a power cut nobody lives here anyway."""
        now, (work, told_s) = time.time(), self._told
        still_s = 0.0 if told_s is None else round(time.monotonic() - told_s, 1)
        self._mine = replace(self._mine, time=now, beats=self._mine.beats + 1, work=work, still_s=still_s)
        temporary = self._path.with_name(f".{self._path.name}.{self._mine.driver}.tmp")
        try:
            temporary.write_bytes(msgspec.json.encode(self._mine))
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)
        self._seen_s = now

    def close(self) -> None:
        if self._thread.ident is not None:
            self._ended.set()
            self._thread.join()
            self.tell(None)
            self._beat(ended=True)
        self._lock.close()
