"""What `status` says of a run directory, from its files alone."""

import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sweep import status
from sweep.errors import StoreError
from sweep.record import Record
from sweep.record import Status as Outcome
from sweep.results import claim
from sweep.results.claim import STALE_S, Heartbeat, Work
from sweep.results.store import RunDirectory, write_file
from sweep.status import MOST, State, describe, standing

NOW = 1_800_000_000.0
SINCE = "2026-11-26T10:00:00+00:00"

ALIVE = Heartbeat(driver="d", host="login-1", boot="b", pid=42, since=SINCE, time=NOW - 3, beats=9)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "s")


def planned(directory: RunDirectory, *cells: str) -> None:
    content = {"cells": {cell: {"fingerprint": f"of {cell}", "done": False} for cell in cells}, "commits": {}}
    write_file(directory.plan, msgspec.json.encode(content))


def recorded(directory: RunDirectory, cell: str, status: Outcome = Outcome.DONE, **changes: str) -> None:
    model, task = cell.split("/")
    record = Record(model=model, task=task, fingerprint=f"of {cell}", status=status, started_at=SINCE)
    record = replace(record, **changes)  # type: ignore[arg-type]
    write_file(directory.record(model, task), msgspec.json.encode(record))


def beats(directory: RunDirectory, heartbeat: Heartbeat) -> None:
    write_file(directory.heartbeat, msgspec.json.encode(heartbeat))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "WATCH_S", 0.05)
    monkeypatch.setattr(claim, "LOOK_S", 0.01)


def test_every_cell_is_done_running_owed_or_failed(directory: RunDirectory) -> None:
    planned(directory, "a/done", "a/runs", "a/waits", "b/fails", "b/other", "b/failed-before")
    recorded(directory, "a/done")
    recorded(directory, "b/fails", Outcome.FAILED, error="out of memory\nand more")
    recorded(directory, "b/failed-before", Outcome.FAILED, error="e", started_at="2026-11-25T10:00:00+00:00")
    recorded(directory, "b/other", fingerprint="of another limit")
    recorded(directory, "c/gone")  # no longer in the sweep
    beats(directory, replace(ALIVE, work=Work(running={"a/runs": (3, 9)}, servers={"a-0": "ready"})))
    stands = standing(directory, now=NOW)
    assert stands.states == {
        "a/done": State.DONE,
        "a/runs": State.RUNNING,
        "a/waits": State.OWED,
        "b/fails": State.FAILED,
        "b/other": State.OWED,
        "b/failed-before": State.OWED,  # this launch has yet to come to it
    }
    assert stands.errors == {"b/fails": "out of memory"}
    assert stands.alive
    assert not stands.finished


@pytest.mark.parametrize(
    ("heartbeat", "alive", "words"),
    [
        (ALIVE, True, r"process 42 on login-1 since 2026-11-26T10:00:00\+00:00, last heartbeat 3 s ago"),
        (replace(ALIVE, time=NOW + 5), True, "last heartbeat 0 s ago"),  # its clock is ahead of ours
        (
            replace(ALIVE, time=NOW - STALE_S),
            False,
            "died: process 42 on login-1 .* 30 s ago; the same command goes on",
        ),
        (replace(ALIVE, time=NOW + 3600), False, "died: process 42 on login-1"),
        (replace(ALIVE, still_s=14), True, "last heartbeat 3 s ago$"),
        (replace(ALIVE, still_s=95), True, "3 s ago; stalled for 1 min 35 s: the figures are as old, see logs/driver"),
        (replace(ALIVE, ended=True), False, "none; the last was process 42 on login-1 .* ended in order"),
        (replace(ALIVE, reads=True), False, "none; the last to use the answers was an export, process 42 on login-1"),
        (None, False, "none has worked here"),
    ],
)
def test_a_driver_lives_while_it_beats(
    directory: RunDirectory, heartbeat: Heartbeat | None, alive: bool, words: str
) -> None:
    planned(directory, "a/t")
    if heartbeat is not None:
        beats(directory, replace(heartbeat, work=Work(running={"a/t": (1, 2)})))
    stands = standing(directory, now=NOW)
    assert stands.alive is alive
    assert stands.states["a/t"] is (State.RUNNING if alive else State.OWED)
    assert re.search(words, describe(stands, directory.root, width=None), re.MULTILINE)


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
@pytest.mark.parametrize("ended", [False, True])
def test_a_driver_whose_clock_is_off_is_alive_when_it_beats_again(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch, off_s: float, ended: bool
) -> None:
    planned(directory, "a/t")
    seen = replace(ALIVE, time=NOW + off_s, work=Work(running={"a/t": (1, 2)}))
    beats(directory, seen)
    while_waiting = SimpleNamespace(
        sleep=lambda _: beats(directory, replace(seen, beats=seen.beats + 1, ended=ended)), monotonic=time.monotonic
    )
    monkeypatch.setattr(claim, "time", while_waiting)
    stands = standing(directory, now=NOW)
    assert stands.alive is not ended
    assert stands.states["a/t"] is (State.OWED if ended else State.RUNNING)
    words = "ended in order" if ended else "last heartbeat 0 s ago"
    assert words in describe(stands, directory.root, width=None)


def test_nothing_is_waited_for_where_the_clock_is_the_same(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(directory, "a/t")
    monkeypatch.setattr(claim, "time", None)  # no sleep without it
    for beat, alive in ((ALIVE, True), (replace(ALIVE, boot=claim._boot(), time=NOW - STALE_S), False)):
        beats(directory, beat)
        assert standing(directory, now=NOW).alive is alive


def test_a_failure_of_an_earlier_launch_is_one_when_nobody_is_at_it(directory: RunDirectory) -> None:
    planned(directory, "a/t")
    recorded(directory, "a/t", Outcome.FAILED, error="e", started_at="2026-11-25T10:00:00+00:00")
    beats(directory, replace(ALIVE, ended=True))
    stands = standing(directory, now=NOW)
    assert stands.states == {"a/t": State.FAILED}
    assert stands.finished


def test_the_table_is_plain_text_that_fits_the_terminal_and_folds_what_is_too_much(directory: RunDirectory) -> None:
    models = [f"model-{n:03}" for n in range(MOST + 5)]
    planned(directory, *(f"{model}/{task}" for model in models for task in ("one", "two")))
    for model in models:
        recorded(directory, f"{model}/one")
        recorded(directory, f"{model}/two", Outcome.FAILED, error="a long reason " * 20)
    recorded(directory, "model-000/two")
    work = Work(running={f"{model}/two": (50, 100) for model in models[:2]}, servers={"a": "ready", "b": "ready"})
    beats(directory, replace(ALIVE, since="", work=replace(work, requests_per_s=12.5, left_s=3_700.0)))
    text = describe(standing(directory, now=NOW), directory.root, width=60)
    lines = text.splitlines()
    assert max(map(len, lines)) == 60
    assert "\x1b" not in text
    assert "servers  2 ready" in lines
    assert "rate     12.5 requests/s" in lines
    assert "left     about 1 h 02 min" in lines
    assert "model      done  running  owed  failed" in lines
    assert "model-001     1        1     0       0" in lines
    assert "all          25        2     0      23" in lines
    assert "(5 more models)" in lines
    assert "  model-000/two  50/100" in lines
    assert "  … and 3 more" in lines
    assert [line for line in lines if line.startswith("  model-002/two  a long reason") and line.endswith("…")]


def test_a_directory_without_a_launch_and_a_broken_record_are_said(directory: RunDirectory) -> None:
    with pytest.raises(StoreError, match=r"nothing was launched into .*/runs/s yet"):
        standing(directory, now=NOW)
    planned(directory, "a/t")
    write_file(directory.record("a", "t"), "{")
    with pytest.raises(StoreError, match=r"read .*a\.t\.json"):
        standing(directory, now=NOW)
