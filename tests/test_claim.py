"""Who may work in a run directory, and how a dead driver is told from a living one."""

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sweep.errors import StoreError
from sweep.results import claim as module
from sweep.results.claim import Claim, Heartbeat, Work, read_heartbeat, take

OTHER = Heartbeat(driver="d", host="elsewhere", boot="another", pid=7, since="2026-01-01T00:00:00+00:00", time=1.0)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "STALE_S", 0.6)
    monkeypatch.setattr(module, "LOOK_S", 0.02)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def heartbeat(tmp_path: Path) -> Path:
    return tmp_path / "heartbeat.json"


@pytest.fixture
def claimed(lock: Path, heartbeat: Path) -> Iterator[Claim]:
    claim = Claim(lock, heartbeat)
    claim.begin()
    yield claim
    claim.close()


def beat(path: Path, heartbeat: Heartbeat) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(msgspec.json.encode(heartbeat))
    temporary.replace(path)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def now_of(path: Path) -> Heartbeat:
    found = read_heartbeat(path)
    assert found is not None
    return found


def test_a_driver_beats_with_what_it_is_at_and_says_when_it_has_ended(lock: Path, heartbeat: Path) -> None:
    claim = Claim(lock, heartbeat)
    assert not heartbeat.exists()  # nothing is written into a directory that may yet be refused
    claim.begin()
    first = now_of(heartbeat)
    assert (first.pid, first.host, first.ended) == (os.getpid(), os.uname().nodename, False)
    work = Work(running={"m/t": (1, 2)}, servers={"m-0": "ready"}, requests_per_s=2.5)
    claim.tell(work)
    until(lambda: now_of(heartbeat).work == work)
    assert now_of(heartbeat).beats > first.beats
    assert now_of(heartbeat).time >= first.time
    claim.close()
    assert now_of(heartbeat).ended
    assert now_of(heartbeat).work == Work()
    assert {path.name for path in lock.parent.iterdir()} == {"lock", "heartbeat.json"}


def test_beats_say_for_how_long_the_loop_has_said_nothing_until_it_has_ended(claimed: Claim, heartbeat: Path) -> None:
    until(lambda: now_of(heartbeat).beats > 2)
    assert now_of(heartbeat).still_s == 0  # its loop has not begun
    claimed.tell(Work(requests_per_s=1))
    until(lambda: now_of(heartbeat).still_s >= 0.3)

    def turns() -> bool:
        claimed.tell(Work(requests_per_s=2))
        return now_of(heartbeat).still_s < 0.3

    until(turns)
    claimed.tell(None)
    until(lambda: now_of(heartbeat).work == Work())
    ended = now_of(heartbeat)
    until(lambda: now_of(heartbeat).beats > ended.beats + 3)
    assert now_of(heartbeat).still_s == 0


def test_the_heartbeat_of_an_older_version_is_read(heartbeat: Path) -> None:
    old = msgspec.to_builtins(OTHER)
    for later in ("reads", "still_s"):
        del old[later]
    heartbeat.write_bytes(msgspec.json.encode(old))
    assert read_heartbeat(heartbeat) == OTHER


def test_a_second_driver_of_this_machine_is_told_host_process_and_since_when(
    claimed: Claim, lock: Path, heartbeat: Path
) -> None:
    with pytest.raises(StoreError, match=rf"process {os.getpid()} on {os.uname().nodename} since 20\d\d-.*T.*: wait"):
        take(lock, heartbeat)
    claimed.check()


def test_a_dead_driver_of_this_machine_holds_nobody_up(lock: Path, heartbeat: Path) -> None:
    beat(heartbeat, replace(OTHER, boot=module._boot()))  # the lock says more than a fresh heartbeat
    start = time.monotonic()
    take(lock, heartbeat).close()
    assert time.monotonic() - start < 0.5


def test_a_driver_of_another_machine_that_beats_is_alive_whatever_the_lock_says(lock: Path, heartbeat: Path) -> None:
    beat(heartbeat, OTHER)
    stop = threading.Event()

    def live() -> None:
        beats = 1
        while not stop.wait(0.1):
            beats += 1
            beat(heartbeat, replace(OTHER, beats=beats))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(StoreError, match="in use by process 7 on elsewhere since 2026-01-01T00:00:00"):
            Claim(lock, heartbeat)
    finally:
        stop.set()
        thread.join()
    assert now_of(heartbeat).host == "elsewhere"


def test_one_that_stands_still_is_dead_and_one_that_ended_is_not_watched(
    lock: Path, heartbeat: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beat(heartbeat, OTHER)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        take(lock, heartbeat).close()
    assert time.monotonic() - start >= 0.6
    assert "process 7 on elsewhere" in caplog.text
    beat(heartbeat, replace(OTHER, ended=True))
    start = time.monotonic()
    take(lock, heartbeat).close()
    assert time.monotonic() - start < 0.5


def test_where_there_are_no_locks_the_heartbeat_alone_decides(
    lock: Path, heartbeat: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    claim = Claim(lock, heartbeat)
    claim.begin()
    assert "has no file locks" in caplog.text
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on"):
        Claim(lock, heartbeat)
    claim.close()
    take(lock, heartbeat).close()


def test_a_driver_that_was_taken_for_dead_writes_nothing_more(claimed: Claim, heartbeat: Path) -> None:
    claimed.check()
    beat(heartbeat, OTHER)

    until(lambda: claimed._rival)  # its next beat finds the other's
    with pytest.raises(StoreError, match="taken over by process 7 on elsewhere"):
        claimed.check()
    claimed.close()
    assert now_of(heartbeat) == OTHER


def test_a_machine_that_slept_looks_before_it_writes(
    lock: Path, heartbeat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 1000.0)  # its thread has not come round yet
    claim = Claim(lock, heartbeat)
    claim.begin()
    beat(heartbeat, OTHER)
    claim.check()  # seen to be ours a moment ago
    claim._seen_s -= 10
    with pytest.raises(StoreError, match="taken over"):
        claim.check()
    claim.close()


def test_a_heartbeat_that_cannot_be_written_is_logged_and_beats_again_later(
    claimed: Claim, heartbeat: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        until(lambda: "No space left" in caplog.text)
    before = now_of(heartbeat).beats
    until(lambda: now_of(heartbeat).beats > before)


@pytest.mark.parametrize("content", [b"", b"{", b'{"host": 1}', b"[]"])
def test_what_is_no_heartbeat_is_nobodys(heartbeat: Path, content: bytes) -> None:
    heartbeat.write_bytes(content)
    assert read_heartbeat(heartbeat) is None
