"""The run directory: responses, records, paths. The source of truth; only the driver writes here.

    runs/<name>/
      config.yaml       what was asked, resolved, secrets masked
      plan.json         models, servers and cells of the last launch
      responses.db      every answer a model gave (SQLite)
      records/          one JSON file per finished or failed cell, written last
      results/<task>/<model>/   lm-eval's own results_*.json and samples_*.jsonl
      servers/<model>.json      what preflight saw of a model's server; enough to score stored answers without one
      servers/<model>.concurrency.json   how many sequences its servers had in flight at last; the next run begins there
      logs/             one file per server life, and the driver's own
      report.md, results.csv, wandb/

A response is durable when `Store.put` returns: one transaction, `synchronous=FULL`. Files are written under a temporary
name and renamed, so a reader never sees half of one.
"""

import fcntl
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

from sweep.errors import StoreError, boundary
from sweep.record import Record, Status

SCHEMA = 1
"""Of responses.db; a directory written by another one is refused, never converted in place."""

LOOKUP_ROWS = 500
"""Keys per SELECT: under SQLite's oldest limit of 999 variables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One model answer on its way to the disk."""

    key: bytes
    """Of model and request, from `response_key`."""
    cell: str
    """`model/task` that asked first; for people, not part of the identity."""
    method: str
    """How it was computed: `echo`, `next_token`, `generate`."""
    answer: bytes
    """JSON; its shape belongs to the kind of request (see lm.py)."""


def response_key(model_fingerprint: str, kind: str, request: Any) -> bytes:
    """32 bytes that identify one request to one model; `request` is anything JSON can hold, in a fixed order.

    The model's fingerprint is part of it, so no model is ever served another's answer (lm-eval issue 4063).
    """
    return hashlib.sha256(msgspec.json.encode([model_fingerprint, kind, request], order="sorted")).digest()


class RunDirectory:
    """Every path of a sweep. Made from `runs_dir` and the sweep's name; creates nothing by itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.plan = root / "plan.json"
        self.responses = root / "responses.db"
        self.records = root / "records"
        self.results = root / "results"
        self.servers = root / "servers"
        self.logs = root / "logs"
        self.driver_log = self.logs / "driver.log"
        self.wandb = root / "wandb"
        self.report = root / "report.md"
        self.csv = root / "results.csv"
        self.lock = root / "lock"

    def record(self, model: str, task: str) -> Path:
        # No name holds a dot, so no two cells share a file.
        return self.records / f"{model}.{task}.json"

    def cell_results(self, model: str, task: str) -> Path:
        """lm-eval's layout, one output folder a task: `<output_path>/<model>/results_*.json`."""
        return self.results / task / model

    def server_log(self, life: str) -> Path:
        return self.logs / f"{life}.log"

    def facts(self, model: str) -> Path:
        return self.servers / f"{model}.json"

    def concurrency(self, model: str) -> Path:
        return self.servers / f"{model}.concurrency.json"


def read_records(directory: RunDirectory) -> dict[tuple[str, str], Record]:
    """The records on disk by (model, task). Raises StoreError for one that this version cannot read."""
    records = {}
    for path in sorted(directory.records.glob("*.json")):
        with boundary(StoreError, f"read {path}"):
            record = msgspec.json.decode(path.read_bytes(), type=Record)
        records[record.model, record.task] = record
    return records


def read_commits(directory: RunDirectory) -> dict[str, str]:
    """`Plan.commits` of the last launch, empty before the first. Raises StoreError."""
    if not directory.plan.exists():
        return {}
    with boundary(StoreError, f"read {directory.plan}"):
        return msgspec.convert(msgspec.json.decode(directory.plan.read_bytes())["commits"], dict[str, str])


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step; afterwards the content survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk should not be fuller for the attempt
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def set_aside(directory: RunDirectory) -> Path | None:
    """Move an old run directory out of the way; its new place, or None where there was none.

    Raises StoreError when another driver works in it: that one would go on writing under the old name.
    """
    if not directory.root.exists():
        return None
    with boundary(StoreError, f"set {directory.root} aside"), _locked(directory):
        return _renamed(directory)


def _renamed(directory: RunDirectory) -> Path:
    stamp = datetime.fromtimestamp(directory.root.stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%S")
    aside = directory.root.with_name(f"{directory.root.name}.{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.root.with_name(f"{directory.root.name}.{stamp}-{number}")
    directory.root.rename(aside)
    return aside


def _locked(directory: RunDirectory) -> TextIO:
    """The directory's lock, held until it is closed or this process is gone."""
    lock = directory.lock.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        lock.close()
        raise StoreError(
            f"{directory.root} is in use by {owner}: wait for it, stop it, or choose another name="
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock


_JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')


def masked_json(content: bytes, secrets: Iterable[str]) -> bytes:
    """JSON documents with every secret in their texts replaced by `***`; numbers and layout stay as they are."""
    spelled = {json.dumps(text, ensure_ascii=way)[1:-1].encode() for text in secrets for way in (True, False)}
    found = sorted((text for text in spelled if text and text in content), key=len, reverse=True)
    if not found:
        return content
    pattern = re.compile(b"|".join(map(re.escape, found)))
    return _JSON_TEXT.sub(lambda match: pattern.sub(b"***", match[0]), content)


class Store:
    """The open run directory. One at a time: a second driver on the same directory is refused.

    Raises StoreError when the directory is in use, was written by another version, or cannot be written.
    """

    def __init__(self, directory: RunDirectory, *, secrets: Iterable[str] = ()) -> None:
        """`secrets` become `***` in what a record and its files say; responses stay as they are."""
        self.directory = directory
        self._secrets = tuple(secrets)
        with boundary(StoreError, f"open the run directory {directory.root}"), ExitStack() as undone:
            directory.root.mkdir(parents=True, exist_ok=True)
            self._lock = undone.enter_context(_locked(directory))
            self._db = undone.enter_context(closing(sqlite3.connect(directory.responses, isolation_level=None)))
            self._prepare()
            undone.pop_all()

    def _prepare(self) -> None:
        # Before anything that writes: a file of another version stays as it is.
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA):
            raise StoreError(
                f"{self.directory.responses} has format {version}, this lmsweep writes {SCHEMA}: "
                "use the version that wrote it, another name=, or fresh=true to set it aside"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS responses ("
            "key BLOB PRIMARY KEY, cell TEXT NOT NULL, method TEXT NOT NULL, answer BLOB NOT NULL) WITHOUT ROWID"
        )
        self._db.execute(f"PRAGMA user_version={SCHEMA}")

    def put(self, responses: Sequence[Response]) -> None:
        """Make a batch durable. An answer that is already there stays: the first one given is the one that counts."""
        with boundary(StoreError, f"write {len(responses)} responses to {self.directory.responses}"), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany(
                "INSERT INTO responses VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                [(r.key, r.cell, r.method, r.answer) for r in responses],
            )

    def answers(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The stored answers among `keys`."""
        found: dict[bytes, bytes] = {}
        with boundary(StoreError, f"read {self.directory.responses}"):
            for start in range(0, len(keys), LOOKUP_ROWS):
                some = keys[start : start + LOOKUP_ROWS]
                marks = ",".join("?" * len(some))
                found.update(self._db.execute(f"SELECT key, answer FROM responses WHERE key IN ({marks})", some))
        return found

    def count(self) -> int:
        """Responses stored."""
        with boundary(StoreError, f"read {self.directory.responses}"):
            (number,) = self._db.execute("SELECT count(*) FROM responses").fetchone()
        return int(number)

    def write_record(self, record: Record, files: Mapping[str, bytes]) -> None:
        """Store a cell's outcome: its lm-eval files first, the record last. `files` is name -> content.

        Files of an earlier outcome are removed once the new record stands. A failure has none to put in their place and
        leaves them; it does not replace numbers of the same settings, which it makes no worse.
        """
        with boundary(StoreError, f"write the record of {record.model}/{record.task}"):
            if record.status is Status.FAILED and self._has_numbers(record):
                return
            folder = self.directory.cell_results(record.model, record.task)
            for name, content in files.items():
                write_file(folder / name, masked_json(content, self._secrets))
            path = self.directory.record(record.model, record.task)
            encoded = masked_json(msgspec.json.encode(record), self._secrets)
            write_file(path, msgspec.json.format(encoded, indent=1))
            for old in [file for file in folder.glob("*") if files and file.name not in files]:
                old.unlink()

    def _has_numbers(self, record: Record) -> bool:
        path = self.directory.record(record.model, record.task)
        if not path.exists():
            return False
        stored = msgspec.json.decode(path.read_bytes(), type=Record)
        return stored.status is Status.DONE and stored.fingerprint == record.fingerprint

    def close(self) -> None:
        self._db.close()
        self._lock.close()
