"""The timeline: what a driver wrote down is what is drawn, whatever ended the driver."""

import logging
import resource
import signal
from pathlib import Path

import pytest

from sweep.errors import StoreError
from sweep.results.timeline import Event, Timeline, TimelineWriter, read_timeline, spans


def event(time: float, what: str, name: str, state: str, **more: float | str) -> Event:
    return Event(time=time, what=what, name=name, state=state, **more)  # type: ignore[arg-type]


def test_a_launch_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path, now = tmp_path / "timeline.jsonl", iter(range(100, 200, 10))
    writer = TimelineWriter(path, clock=lambda: float(next(now)))
    writer.add("launch", "host", "began")
    writer.add("server", "qwen-0", "starting", server="qwen", on="node", host="gpu-1", gpus=2.0, reason="work for it")
    writer.add("server", "qwen-0", "ready")
    writer.add("cell", "qwen/gsm8k", "running", on="evaluator.0")
    writer.add("cell", "qwen/gsm8k", "failed", reason="no data")
    writer.add("server", "qwen-0", "stopping", reason="its cells are done")
    writer.add("server", "qwen-0", "gone")
    writer.add("launch", "host", "ended")
    timeline = read_timeline(path)
    (server,), (cell,), (launch,) = timeline.servers, timeline.cells, timeline.launches
    assert (server.name, server.server, server.on, server.gpus) == ("qwen-0", "qwen", "node", 2.0)
    assert server.host == "gpu-1"
    assert (server.start, server.ready, server.end, server.state) == (110, 120, 160, "gone")
    assert (cell.name, cell.on, cell.start, cell.ready, cell.end) == ("qwen/gsm8k", "evaluator.0", 130, None, 140)
    assert (cell.state, cell.reason) == ("failed", "no data")
    assert (launch.name, launch.start, launch.end, launch.state) == ("host", 100, 170, "ended")
    assert timeline.gpu_s == 100


def test_there_is_no_timeline_where_nothing_was_written(tmp_path: Path) -> None:
    assert read_timeline(tmp_path / "timeline.jsonl") == Timeline()


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "timeline.jsonl"
    writer = TimelineWriter(path, clock=lambda: 1.0)
    writer.add("server", "a-0", "starting", server="a")
    writer.add("server", "a-0", "ready")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    (server,) = read_timeline(path).servers
    assert (server.state, server.ready) == ("starting", None)


def test_what_follows_a_torn_line_is_read(tmp_path: Path) -> None:
    """The next launch appends to the file of one that was killed while it wrote."""
    path = tmp_path / "timeline.jsonl"
    writer = TimelineWriter(path, clock=lambda: 1.0)
    writer.add("server", "a-0", "starting", server="a")
    path.write_bytes(path.read_bytes() + b'{"time":1.5,"what":"ser')
    TimelineWriter(path, clock=lambda: 2.0).add("launch", "host", "began")
    TimelineWriter(path, clock=lambda: 3.0).add("server", "b-0", "starting", server="b")
    timeline = read_timeline(path)
    assert [server.name for server in timeline.servers] == ["a-0", "b-0"]
    assert [launch.start for launch in timeline.launches] == [2.0]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"time": "noon"}',
        b'{"time":1.0,"wh',
        b'{"time":1.0,"what":"cat","name":"a","state":"ready"}',
        b"\xff\0",
        b'"\xff"',
    ],
)
def test_a_damaged_line_costs_itself_and_is_counted(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "timeline.jsonl"
    writer = TimelineWriter(path, clock=lambda: 1.0)
    writer.add("server", "a-0", "starting", server="a")
    path.write_bytes(path.read_bytes() + damage + b"\n")
    writer.add("server", "b-0", "starting", server="b")
    timeline = read_timeline(path)
    assert [server.name for server in timeline.servers] == ["a-0", "b-0"]
    assert timeline.unreadable == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"read {tmp_path}"):
        read_timeline(tmp_path)


def test_a_full_disk_costs_the_events_that_it_refused(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    writer = TimelineWriter(path, clock=lambda: 1.0)
    writer.add("server", "a-0", "starting", server="a")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        writer.add("server", "b-0", "starting", server="b")
        writer.add("server", "c-0", "starting", server="c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    writer.add("server", "d-0", "starting", server="d")
    writer.add("server", "e-0", "starting", server="e")
    timeline = read_timeline(path)
    assert [server.name for server in timeline.servers] == ["a-0", "d-0", "e-0"]
    assert timeline.unreadable == 1


def test_a_killed_driver_leaves_spans_that_end_with_its_last_word() -> None:
    """And the next launch, a day later, has lives of the same names."""
    timeline = spans(
        [
            event(0, "launch", "one", "began"),
            event(1, "server", "a-0", "starting", server="a", gpus=1.0),
            event(2, "cell", "a/t", "running"),
            event(9, "server", "b-0", "starting", server="b"),
            event(1000, "launch", "two", "began"),
            event(1001, "server", "a-0", "starting", server="a", gpus=1.0),
            event(1002, "cell", "a/t", "running"),
            event(1003, "cell", "a/t", "done"),
            event(1004, "launch", "two", "ended"),
        ]
    )
    assert [(s.name, s.start, s.end, s.state) for s in timeline.servers] == [
        ("a-0", 1, 9, "starting"),
        ("b-0", 9, 9, "starting"),
        ("a-0", 1001, 1004, "starting"),
    ]
    assert [(c.start, c.end, c.state) for c in timeline.cells] == [(2, 9, "running"), (1002, 1003, "done")]
    assert [(one.name, one.start, one.end) for one in timeline.launches] == [("one", 0, 9), ("two", 1000, 1004)]
    assert timeline.gpu_s == 8 + 3


def test_each_turn_of_a_cell_is_a_span_and_what_never_began_is_none() -> None:
    timeline = spans(
        [
            event(1, "cell", "a/t", "running", on="evaluator.0"),
            event(2, "cell", "a/t", "waiting"),
            event(3, "cell", "a/t", "waiting"),
            event(5, "cell", "a/t", "running", on="evaluator.1"),
            event(6, "cell", "a/t", "done"),
            event(7, "cell", "b/t", "failed", reason="no data"),
        ]
    )
    assert [(c.on, c.start, c.end, c.state) for c in timeline.cells] == [
        ("evaluator.0", 1, 2, "waiting"),
        ("evaluator.1", 5, 6, "done"),
    ]


def test_a_lost_server_holds_its_gpus_until_it_is_gone() -> None:
    (server,) = spans(
        [
            event(0, "server", "a-0", "starting", server="a", gpus=2.0),
            event(5, "server", "a-0", "ready"),
            event(7, "server", "a-0", "lost", reason="exited with code 1"),
            event(10, "server", "a-0", "gone"),
        ]
    ).servers
    assert (server.ready, server.end, server.state) == (5, 10, "gone")
    assert (server.lost, server.reason) == (True, "exited with code 1")


def test_a_server_is_lost_only_by_its_death_and_not_by_being_stopped() -> None:
    timeline = spans(
        [
            event(0, "launch", "host", "began"),
            event(0, "server", "a-0", "starting", server="a", reason="3 cells wait for it"),
            event(0, "server", "b-0", "starting", server="b"),
            event(0, "server", "c-0", "starting", server="c"),
            event(1, "server", "b-0", "gone", reason="no such model"),
            event(5, "server", "a-0", "stopping", reason="all cells done"),
            event(6, "server", "a-0", "gone"),
            event(7, "server", "c-0", "stopping", reason="all cells done"),
            event(8, "launch", "host", "ended"),
        ]
    )
    assert [(server.name, server.lost, server.reason) for server in timeline.servers] == [
        ("a-0", False, ""),
        ("b-0", True, "no such model"),
        ("c-0", False, ""),
    ]


def test_a_disk_that_refuses_the_timeline_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = TimelineWriter(tmp_path / "none" / "timeline.jsonl")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            writer.add("launch", "host", "began")
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"the timeline goes on without {tmp_path}/none/timeline.jsonl"
    ]
