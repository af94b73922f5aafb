"""The run directory: what is durable, who may write, what a reader sees."""

import errno
import fcntl
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from sweep.errors import StoreError
from sweep.record import Counts, Record, Score, Status
from sweep.results import claim
from sweep.results import store as module
from sweep.results.claim import Heartbeat, read_heartbeat
from sweep.results.store import (
    KEY_BYTES,
    Response,
    RunDirectory,
    Store,
    read_cells,
    read_commits,
    read_records,
    read_sweep_id,
    response_key,
    set_aside,
    stored_responses,
    write_file,
)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "s")


def response(number: int, answer: bytes = b"1") -> Response:
    return Response(key=response_key("f", "generate", number), cell="m/t", method="generate", answer=answer)


def record(model: str = "m", task: str = "t", **changes: object) -> Record:
    known: dict[str, object] = {"model": model, "task": task, "fingerprint": "f", "status": Status.DONE}
    return Record(**{**known, **changes})  # type: ignore[arg-type]


# Keys


@pytest.mark.parametrize(
    ("model", "kind", "request_"),
    [
        ("other", "generate", {"prompt": "p", "parameters": {"a": 1, "b": [1, 2]}}),
        ("f", "window", {"prompt": "p", "parameters": {"a": 1, "b": [1, 2]}}),
        ("f", "generate", {"prompt": "p ", "parameters": {"a": 1, "b": [1, 2]}}),
        ("f", "generate", {"prompt": "p", "parameters": {"a": 2, "b": [1, 2]}}),
        ("f", "generate", {"prompt": "p", "parameters": {"a": 1, "b": [2, 1]}}),
        ("f", "generate", {"prompt": "p", "parameters": {"a": 1, "b": [1, 2], "c": None}}),
        ("f", "generate", {"prompt": "p", "parameters": {"a": "1", "b": [1, 2]}}),
        ("f", "generate", {"prompt": "p", "parameters": [["a", 1], ["b", [1, 2]]]}),
    ],
)
def test_a_key_differs_with_the_model_the_kind_and_every_field(model: str, kind: str, request_: object) -> None:
    known = response_key("f", "generate", {"prompt": "p", "parameters": {"a": 1, "b": [1, 2]}})
    assert len(known) == KEY_BYTES
    assert response_key(model, kind, request_) != known


def test_a_key_cannot_be_made_by_moving_text_between_model_and_kind() -> None:
    assert response_key("ab", "c", 1) != response_key("a", "bc", 1)


def test_a_key_does_not_depend_on_the_order_of_a_mapping() -> None:
    assert response_key("f", "k", {"a": 1, "b": {"c": 2, "d": 3}}) == response_key(
        "f", "k", {"b": {"d": 3, "c": 2}, "a": 1}
    )


# Responses


def test_an_answer_survives_a_kill_right_after_it_was_put(directory: RunDirectory) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from sweep.results.store import Response, RunDirectory, Store
        store = Store(RunDirectory(Path({str(directory.root)!r})))
        store.put([Response(key=b"k", cell="m/t", method="echo", answer=b"42")])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    store = Store(directory)
    assert store.answers([b"k"]) == {b"k": b"42"}
    assert store.count() == 1
    store.close()


def test_the_first_answer_to_a_request_is_the_one_that_counts(directory: RunDirectory) -> None:
    store = Store(directory)
    assert store.put([response(1, b"first"), response(2, b"two")]) == {}
    assert store.put([response(1, b"second"), response(2, b"two"), response(3, b"three")]) == {
        response(1).key: b"first"
    }
    assert sorted(store.answers([response(n).key for n in (1, 2, 3)]).values()) == [b"first", b"three", b"two"]
    store.close()


def test_thousands_of_keys_are_looked_up_at_once_and_only_the_stored_ones_come_back(directory: RunDirectory) -> None:
    store = Store(directory)
    stored = [response(n, str(n).encode()) for n in range(0, 2600, 2)]
    store.put(stored)
    assert store.answers([response(n).key for n in range(2600)]) == {r.key: r.answer for r in stored}
    assert store.answers([]) == {}
    store.close()


def test_a_batch_that_cannot_be_written_is_written_not_even_in_part(directory: RunDirectory) -> None:
    store = Store(directory)
    broken = Response(key=b"k", cell="m/t", method="echo", answer=None)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"write 2 responses to .*responses\.db.*NOT NULL"):
        store.put([response(1), broken])
    assert store.count() == 0
    store.put([response(1)])
    assert store.count() == 1
    store.close()


def test_of_two_answers_to_one_request_in_a_batch_the_first_counts(directory: RunDirectory) -> None:
    store = Store(directory)
    in_place = store.put([response(1, b"first"), response(2, b"two"), response(1, b"second")])
    assert in_place == {response(1).key: b"first"}
    assert store.answers([response(1).key]) == {response(1).key: b"first"}
    store.close()


# Where the directory lies


def test_on_a_file_system_that_machines_share_nothing_is_mapped_and_nobody_else_may_look(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "file_system", lambda folder: "nfs4")
    store = Store(directory)
    store.put([response(1)])
    assert store.mode == "nfs4, shared by machines: wal, exclusive"
    assert {path.name for path in directory.root.glob("responses*")} == {"responses.db", "responses.db-wal"}
    locked = pytest.raises(sqlite3.OperationalError, match="locked")
    with closing(sqlite3.connect(directory.responses, timeout=0)) as other, locked:
        other.execute("SELECT count(*) FROM responses")
    store.close()
    monkeypatch.setattr(module, "file_system", lambda folder: "ext4")
    again = Store(directory)  # the file is the same, wherever it lies
    assert again.count() == 1
    assert again.mode == "ext4: wal"
    with closing(sqlite3.connect(directory.responses, timeout=0)) as other:
        assert other.execute("SELECT count(*) FROM responses").fetchone() == (1,)
    again.close()


def test_a_file_system_without_locks_is_worked_on_without_sqlites_either(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    store = Store(directory)
    assert store.mode.endswith("shared by machines: wal, exclusive, without locks")
    store.put([response(1)])
    # Whoever asks for a lock gets one: ours took none.
    with closing(sqlite3.connect(directory.responses, timeout=0)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN IMMEDIATE")
    assert store.answers([response(1).key]).keys() == {response(1).key}
    store.close()


def test_answers_on_a_shared_file_system_survive_a_kill_too(directory: RunDirectory) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from sweep.results import store as module
        module.file_system = lambda folder: "lustre"
        store = module.Store(module.RunDirectory(Path({str(directory.root)!r})))
        store.put([module.Response(key=b"k", cell="m/t", method="echo", answer=b"42")])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    store = Store(directory)
    assert store.answers([b"k"]) == {b"k": b"42"}
    store.close()


# What the disk may refuse


def test_a_full_disk_is_one_line_with_the_cure_and_what_was_stored_is_kept(small_disk: Path) -> None:
    directory = RunDirectory(small_disk / "s")
    store = Store(directory)
    store.put([response(0)])
    (small_disk / "ballast").write_bytes(b"x" * (256 << 10))

    def fill() -> None:
        for batch in range(100):
            store.put([response(1 + 1000 * batch + n, b"x" * 200) for n in range(1000)])

    with pytest.raises(StoreError) as said:
        fill()
    assert re.fullmatch(
        r"write 1000 responses to .*responses\.db: OperationalError: .*: free some space .* what was stored is kept",
        str(said.value),
    )
    number = store.count()
    assert number % 1000 == 1  # whole batches
    with pytest.raises(StoreError, match=r"write the record of m/t: OSError: .*No space left .*free some space"):
        store.write_record(record(), {"samples_1.jsonl": b"x" * (4 << 20)})
    assert read_records(directory) == {}
    assert list(directory.cell_results("m", "t").iterdir()) == []
    store.close()
    (small_disk / "ballast").unlink()
    again = Store(directory)
    assert again.count() == number
    again.close()


def test_a_place_that_may_not_be_written_is_said_with_the_cure(small_disk: Path) -> None:
    directory = RunDirectory(small_disk / "s")
    Store(directory).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=r"open the run directory .*Read-only file system.*: make it writable"):
        Store(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"needs a file system of its own: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_database_that_another_program_holds_is_said_with_the_cure(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(directory).close()
    monkeypatch.setattr(module, "BUSY_S", 0.1)
    with closing(sqlite3.connect(directory.responses, isolation_level=None)) as other:
        store = Store(directory)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"database is locked: another program has .*responses\.db open: close it"):
            store.put([response(1)])
        other.execute("ROLLBACK")
        store.put([response(1)])
        store.close()


def damage(path: Path, *, from_byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[from_byte:] = b"\xa5" * (len(content) - from_byte)
    path.write_bytes(content)


def test_a_damaged_database_is_said_when_it_is_met_and_left_as_it_is(directory: RunDirectory) -> None:
    store = Store(directory)
    store.put([response(n, b"x" * 100) for n in range(5000)])
    store.close()
    damage(directory.responses, from_byte=8192)
    before = directory.responses.read_bytes()
    store = Store(directory)
    with pytest.raises(StoreError, match=r"malformed: it is damaged .*: move .*responses\.db\* away .* stay done"):
        store.answers([response(n).key for n in range(5000)])
    with pytest.raises(StoreError, match="damaged"):
        store.put([response(n) for n in range(5000, 6000)])
    store.close()
    assert directory.responses.read_bytes()[8192:] == before[8192:]


def test_what_a_killed_driver_left_is_checked_before_it_is_used(directory: RunDirectory) -> None:
    store = Store(directory)
    store.put([response(n, b"x" * 100) for n in range(5000)])
    store.close()
    Path(f"{directory.responses}-wal").write_bytes(b"torn")  # as a killed driver leaves one
    Store(directory).close()
    Path(f"{directory.responses}-wal").write_bytes(b"torn")
    damage(directory.responses, from_byte=8192)
    before = directory.responses.read_bytes()
    with pytest.raises(StoreError, match=r"open the run directory .*: it is damaged"):
        Store(directory)
    assert directory.responses.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_stays_as_it_is(directory: RunDirectory) -> None:
    directory.root.mkdir(parents=True)
    with closing(sqlite3.connect(directory.responses)) as foreign:
        foreign.execute("CREATE TABLE answers (a)")
        foreign.commit()
    before = directory.responses.read_bytes()
    with pytest.raises(StoreError, match=r"responses\.db is a database of another program: choose another name="):
        Store(directory)
    assert directory.responses.read_bytes() == before


@pytest.mark.parametrize("use", [Store, set_aside])
def test_a_folder_that_holds_other_things_is_left_alone(tmp_path: Path, use: Callable[[RunDirectory], object]) -> None:
    write_file(tmp_path / "src" / "main.py", "print()")
    with pytest.raises(StoreError, match=r"src is no run directory, it holds main\.py: choose another name="):
        use(RunDirectory(tmp_path / "src"))
    assert [path.name for path in (tmp_path / "src").rglob("*")] == ["main.py"]


def test_a_folder_where_only_a_check_has_been_is_as_good_as_none(directory: RunDirectory) -> None:
    write_file(directory.root / "check" / "logs" / "driver.log", "")
    Store(directory).close()


def test_nothing_is_written_after_another_driver_has_taken_over(directory: RunDirectory) -> None:
    store = Store(directory)
    store.put([response(1)])
    ours = msgspec.json.decode(directory.heartbeat.read_bytes())
    write_file(directory.heartbeat, msgspec.json.encode({**ours, "driver": "another", "host": "elsewhere"}))
    store._claim._seen_s = 0.0  # it slept meanwhile
    for write in (lambda: store.put([response(2)]), lambda: store.write_record(record(), {})):
        with pytest.raises(StoreError, match=r"taken over by process .* on elsewhere"):
            write()
    assert store.count() == 1
    assert read_records(directory) == {}
    store.close()


# Who may write


def test_a_second_driver_on_a_directory_is_refused_and_told_who_is_there(directory: RunDirectory) -> None:
    store = Store(directory)
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on {re.escape(os.uname().nodename)}"):
        Store(directory)
    store.close()
    Store(directory).close()


def test_no_driver_begins_where_answers_are_read_even_where_locks_do_not_reach(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    store = Store(directory)
    store.put([response(1)])
    store.close()
    monkeypatch.setattr(claim, "BEAT_S", 0.05)
    monkeypatch.setattr(claim, "STALE_S", 0.6)
    monkeypatch.setattr(claim, "LOOK_S", 0.02)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with stored_responses(directory) as responses:
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on"):
            Store(directory)
        assert list(responses) == [response(1)]
    Store(directory).close()


def test_a_driver_beats_before_it_looks_at_the_database(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Heartbeat | None] = []
    prepare = Store._prepare

    def watched(store: Store, *, exclusive: bool) -> str:
        seen.append(read_heartbeat(directory.heartbeat))
        return prepare(store, exclusive=exclusive)

    monkeypatch.setattr(Store, "_prepare", watched)
    Store(directory).close()
    assert [beat is not None and not beat.ended for beat in seen] == [True]


def test_a_directory_in_use_is_not_set_aside(directory: RunDirectory) -> None:
    store = Store(directory)
    with pytest.raises(StoreError, match="in use by process"):
        set_aside(directory)
    store.put([response(1)])
    assert store.count() == 1
    store.close()


def test_a_driver_that_was_killed_holds_nobody_up(directory: RunDirectory) -> None:
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from sweep.results.store import RunDirectory, Store
        store = Store(RunDirectory(Path({str(directory.root)!r})))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", code], check=False)
    Store(directory).close()


def test_a_file_of_another_version_is_refused_and_stays_as_it_is(directory: RunDirectory) -> None:
    directory.root.mkdir(parents=True)
    foreign = sqlite3.connect(directory.responses)
    foreign.execute("CREATE TABLE answers (a)")
    foreign.execute("PRAGMA user_version=7")
    foreign.commit()
    foreign.close()
    before = directory.responses.read_bytes()
    for _ in range(2):  # the first refusal leaves no lock behind
        with pytest.raises(StoreError, match=r"format 7, this lmsweep writes 2: .*fresh=true"):
            Store(directory)
    assert directory.responses.read_bytes() == before
    assert {path.name for path in directory.root.iterdir()} == {"responses.db", "lock", "heartbeat.json"}


def test_a_file_that_is_no_database_is_refused_with_its_folder(directory: RunDirectory) -> None:
    directory.root.mkdir(parents=True)
    directory.responses.write_bytes(b"no database at all, " * 100)
    with pytest.raises(StoreError, match=f"open the run directory {re.escape(str(directory.root))}"):
        Store(directory)
    assert directory.responses.read_bytes() == b"no database at all, " * 100


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="open the run directory"):
        Store(RunDirectory(tmp_path / "file" / "s"))


# Records and files


def test_a_record_comes_back_as_it_was(directory: RunDirectory) -> None:
    score = Score(
        task="t",
        version="1.0",
        filter="none",
        num_fewshot=None,
        metric="acc",
        value=0.1,
        stderr=None,
        higher_is_better=True,
        samples=3,
    )
    written = record(scores=(score,), counts=Counts(asked=2), warnings=("w",), settings={"a": [1, None]}, files=("f",))
    store = Store(directory)
    store.write_record(written, {})
    store.close()
    assert read_records(directory) == {("m", "t"): written}


def test_cells_whose_names_run_together_keep_records_of_their_own(directory: RunDirectory) -> None:
    store = Store(directory)
    for model, task in (("a--b", "c"), ("a", "b--c"), ("a-", "-b--c")):
        store.write_record(record(model, task), {})
    store.close()
    assert len(read_records(directory)) == 3


def test_a_record_is_written_after_its_files_and_old_files_go_only_then(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(directory)
    folder = directory.cell_results("m", "t")
    store.write_record(record(), {"results_1.json": b"{}", "samples_1.jsonl": b"1"})
    seen: dict[str, set[str]] = {}
    real = module._replace

    def watched(path: Path, content: bytes | str) -> None:
        seen[path.name] = {file.name for file in folder.iterdir() if not file.name.startswith(".")}
        real(path, content)

    monkeypatch.setattr(module, "_replace", watched)
    store.write_record(record(), {"results_2.json": b"{}", "samples_2.jsonl": b"2"})
    old, new = {"results_1.json", "samples_1.jsonl"}, {"results_2.json", "samples_2.jsonl"}
    assert list(seen)[-1] == "m.t.json"
    assert seen["m.t.json"] == old | new
    assert all(old <= seen[name] for name in new)
    assert {file.name for file in folder.iterdir()} == {"results_2.json", "samples_2.jsonl"}
    store.close()


def test_the_files_of_a_record_are_synced_side_by_side_and_each_folder_once(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced, together = Store(directory), list[str](), threading.Barrier(4)
    real = os.fsync

    def watched(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append("folder" if folder else "file")
        if threading.current_thread() is not threading.main_thread():
            together.wait(timeout=10)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    store.write_record(record(), {f"samples_{number}.jsonl": b"1" for number in range(8)})
    assert synced == [*["file"] * 8, "folder", "file", "folder"]
    assert not together.broken
    store.close()


@pytest.mark.parametrize("write", range(5))
def test_a_kill_at_any_moment_leaves_no_record_without_its_files(directory: RunDirectory, write: int) -> None:
    """The driver dies at its `write`-th rename of two files and a record; the last number lets it live."""
    code = f"""if True:
        import itertools, os, signal
        from pathlib import Path
        from sweep.record import Record, Status
        from sweep.results.store import RunDirectory, Store
        store = Store(RunDirectory(Path({str(directory.root)!r})))
        store._claim._ended.set()  # its heartbeat is renamed too
        store._claim._thread.join()
        renames, replace = itertools.count(), Path.replace
        def counted(self, target):
            if next(renames) == {write}:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)
        Path.replace = counted
        files = ("results_1.json", "samples_1.jsonl")
        record = Record(model="m", task="t", fingerprint="f", status=Status.DONE, files=files)
        store.write_record(record, {{name: name.encode() for name in files}})
    """
    ended = subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert ended == (0 if write > 2 else -signal.SIGKILL)
    records = read_records(directory)
    assert bool(records) == (write > 2)
    folder = directory.cell_results("m", "t")
    whole = {path.name for path in folder.iterdir() if path.read_bytes() == path.name.encode()}
    for found in records.values():
        assert set(found.files) <= whole


def test_a_failed_cell_leaves_the_files_of_an_earlier_outcome(directory: RunDirectory) -> None:
    store = Store(directory)
    store.write_record(record(), {"results_1.json": b"{}"})
    store.write_record(record(status=Status.FAILED, fingerprint="of other settings", error="e"), {})
    store.close()
    assert read_records(directory)["m", "t"].status is Status.FAILED
    assert [file.name for file in directory.cell_results("m", "t").iterdir()] == ["results_1.json"]


def test_a_record_stays_when_its_files_cannot_be_replaced(directory: RunDirectory) -> None:
    store = Store(directory)
    store.write_record(record(fingerprint="old"), {"results_1.json": b"{}"})
    (directory.cell_results("m", "t") / "results_2.json").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(StoreError, match="write the record of m/t"):
        store.write_record(record(fingerprint="new"), {"results_2.json": b"{}"})
    store.close()
    assert read_records(directory)["m", "t"].fingerprint == "old"
    assert (directory.cell_results("m", "t") / "results_1.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": "m"}', b'{"model": 1, "task": "t", "fingerprint": "f", "status": "done"}']
)
def test_a_record_that_cannot_be_read_is_named(directory: RunDirectory, content: bytes) -> None:
    path = directory.record("m", "t")
    write_file(path, content)
    with pytest.raises(StoreError, match=re.escape(str(path))):
        read_records(directory)


def test_half_a_record_of_a_writer_that_was_killed_is_never_read(directory: RunDirectory) -> None:
    store = Store(directory)
    store.write_record(record(), {})
    store.close()
    path = directory.record("m", "t")
    path.with_name(f".{path.name}.123.tmp").write_bytes(b'{"model": "m", "ta')
    assert list(read_records(directory)) == [("m", "t")]


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    write_file(path, "old")

    def full(_: int) -> None:
        assert path.read_text() == "old"
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            write_file(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    write_file(path, "é")
    assert path.read_bytes() == "é".encode()


def test_no_records_are_no_error(directory: RunDirectory) -> None:
    assert read_records(directory) == {}


def test_the_commits_of_the_last_launch_come_back(directory: RunDirectory) -> None:
    assert read_commits(directory) == {}
    write_file(directory.plan, '{"commits": {"org/m@main": "abc"}, "cells": {}}')
    assert read_commits(directory) == {"org/m@main": "abc"}
    for broken in ("{", "{}", '{"commits": {"a": 1}}'):
        write_file(directory.plan, broken)
        with pytest.raises(StoreError, match=re.escape(str(directory.plan))):
            read_commits(directory)


def test_the_cells_of_the_last_launch_come_back(directory: RunDirectory) -> None:
    assert read_cells(directory) == {}
    write_file(directory.plan, '{"commits": {}, "cells": {"m/t": {"fingerprint": "f", "done": false}}}')
    assert read_cells(directory) == {"m/t": "f"}
    write_file(directory.plan, '{"commits": {}}')
    with pytest.raises(StoreError, match=re.escape(str(directory.plan))):
        read_cells(directory)


# Setting aside


def test_an_old_directory_is_set_aside_whole_and_never_over_another(directory: RunDirectory) -> None:
    assert set_aside(directory) is None
    moved = []
    for content in ("one", "two", "three"):
        write_file(directory.report, content)
        directory.lock.touch()
        os.utime(directory.root, (0, 0))
        aside = set_aside(directory)
        assert aside is not None
        moved.append(aside)
        assert not directory.root.exists()
    assert [(path / "report.md").read_text() for path in moved] == ["one", "two", "three"]
    assert [path.name for path in moved] == [f"s.19700101T000000{number}" for number in ("", "-2", "-3")]


def test_the_id_of_a_sweeps_runs_is_made_once_by_its_driver_and_goes_where_its_directory_goes(
    directory: RunDirectory, tmp_path: Path
) -> None:
    assert read_sweep_id(directory) == str(directory.root)
    assert not directory.root.exists()
    with closing(Store(directory)) as store:
        store.keep_sweep_id()
        made = read_sweep_id(directory)
        assert re.fullmatch("[0-9a-f]{32}", made)
        with pytest.raises(StoreError, match="in use"):
            Store(directory)
        store.keep_sweep_id()
    assert read_sweep_id(directory) == made
    assert read_sweep_id(RunDirectory(Path(shutil.copytree(directory.root, tmp_path / "elsewhere" / "copied")))) == made
    assert set_aside(directory) is not None
    with closing(Store(directory)) as store:
        store.keep_sweep_id()
    assert read_sweep_id(directory) != made


def test_runs_of_a_directory_from_before_there_were_ids_go_on_by_its_path(directory: RunDirectory) -> None:
    with closing(Store(directory)) as store:
        (directory.wandb / "offline-run-1").mkdir(parents=True)
        store.keep_sweep_id()
    assert directory.sweep_id.read_text() == str(directory.root)


def test_a_failure_does_not_replace_numbers_of_the_same_settings(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    store = Store(directory)
    try:
        done = Record(model="m", task="t", fingerprint="f", status=Status.DONE)
        assert store.write_record(done, {})
        assert not store.write_record(replace(done, status=Status.FAILED, error="rerun failed"), {})
        assert read_records(directory)["m", "t"] == done
        other = replace(done, fingerprint="g", status=Status.FAILED, error="new settings failed")
        assert store.write_record(other, {})
        assert read_records(directory)["m", "t"] == other
    finally:
        store.close()
