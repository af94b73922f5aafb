"""The run directory: responses, records, paths. The source of truth; only the driver writes here.

    runs/<name>/
      config.yaml       what was asked, resolved, secrets masked
      plan.json         models, servers and cells of the last launch
      responses.db      every answer a model gave (SQLite)
      lock, heartbeat.json      which driver works here, and what it is at (claim.py)
      records/          one JSON file per finished or failed cell, written last
      results/<task>/<model>/   lm-eval's own results_*.json and samples_*.jsonl
      servers/<model>.json      what preflight saw of a model's server; enough to score stored answers without one
      servers/<model>.concurrency.json   how many sequences its servers had in flight at last; the next run begins there
      logs/             one file per server life, and the driver's own
      timeline.jsonl    what the driver did when (timeline.py)
      report.md, results.csv, report.html, wandb/
      wandb/sweep_id    what its runs at W&B are known by, made once; who copies the directory copies it too

A response is durable when `Store.put` returns: one transaction, `synchronous=FULL`. Files are written under a temporary
name and renamed, so a reader never sees half of one.

SQLite writes ahead (WAL) everywhere, with one fsync for a commit. What makes WAL unfit for file systems that machines
share is its index in memory that processes map; where the folder is not this machine's own, the connection is exclusive
from its first access, which keeps that index in its own memory (sqlite.org/wal.html, "Use of WAL Without
Shared-Memory"). Nobody else may then read the file while a driver works: `status` reads the heartbeat and the records.
"""

import errno
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from sweep.errors import StoreError, boundary
from sweep.record import Record, Status
from sweep.results.claim import Claim, Work, take
from sweep.results.mounts import LOCAL, file_system

SCHEMA = 2
"""Of responses.db; a directory written by another one is refused, never converted in place."""

APPLICATION = int.from_bytes(b"lmsw")
"""Marks the file as ours (PRAGMA application_id)."""

KEY_BYTES = 16
"""Of a hash: two of a billion requests are the same once in 10^20 stores. The index over keys is what commits cost, and
it is half as large as with the whole hash."""

CHECKPOINT_PAGES = 8192
"""32 MiB of WAL before it goes into the database. Keys are random, so each commit changes pages all over their index;
they are written back once for many commits. With SQLite's own 1,000 it was once for each."""

CACHE_KB = 65_536
"""SQLite's page cache: the index of a million keys."""

BUSY_S = 5.0
"""How long a look into the database from outside may hold a commit up."""

SYNCS_AT_ONCE = 16
"""Files of a record. The driver's loop stands still meanwhile, and behind a network each sync is a round trip: 57
subtasks of MMLU at 20 ms, one after the other with their folder each time, took 2.5 s."""

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
    """What identifies one request to one model; `request` is anything JSON can hold, in a fixed order.

    The model's fingerprint is part of it, so no model is ever served another's answer (lm-eval issue 4063).
    """
    text = msgspec.json.encode([model_fingerprint, kind, request], order="sorted")
    return hashlib.sha256(text).digest()[:KEY_BYTES]


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
        self.sweep_id = self.wandb / "sweep_id"
        self.report = root / "report.md"
        self.csv = root / "results.csv"
        self.page = root / "report.html"
        self.timeline = root / "timeline.jsonl"
        self.lock = root / "lock"
        self.heartbeat = root / "heartbeat.json"

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


def read_sweep_id(directory: RunDirectory) -> str:
    """What tells this sweep's runs at W&B from those of any other: the same wherever the directory lies.

    Where no launch has kept one it is the path, which it always was before. Raises StoreError.
    """
    if not directory.sweep_id.exists():
        return str(directory.root)
    with boundary(StoreError, f"read {directory.sweep_id}"):
        return directory.sweep_id.read_text(encoding="utf-8").strip()


def require_launched(directory: RunDirectory) -> None:
    """Raises StoreError where no sweep was ever launched."""
    if directory.plan.exists():
        return
    name = directory.plan.name
    near = [directory.root.parent / name, *sorted(directory.root.glob(f"*/{name}"))]
    found = [repr(str(plan.parent)) for plan in near if plan.exists()]
    cure = f"did you mean {' or '.join(found[:3])}?" if found else "the run directory of a sweep is <runs_dir>/<name>"
    raise StoreError(f"nothing was launched into {directory.root} yet (there is no {name}); {cure}")


def read_cells(directory: RunDirectory) -> dict[str, str]:
    """The cells of the sweep at its last launch and their fingerprints, empty before the first. Raises StoreError."""
    if not directory.plan.exists():
        return {}
    with boundary(StoreError, f"read {directory.plan}"):
        return {
            key: cell.fingerprint
            for key, cell in msgspec.json.decode(directory.plan.read_bytes(), type=_Planned).cells.items()
        }


class _PlannedCell(msgspec.Struct):
    fingerprint: str


class _Planned(msgspec.Struct):
    """What of plan.json comes back."""

    cells: dict[str, _PlannedCell]


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` in one step; afterwards the content survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, content)
    _sync_folder(path.parent)


def _replace(path: Path, content: bytes | str) -> None:
    """`write_file`, but a power cut may undo it as a whole until the folder is synced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk should not be fuller for the attempt


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
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
    _require_ours(directory)
    with _disk(f"set {directory.root} aside", directory), take(directory.lock, directory.heartbeat):
        return _renamed(directory)


def _require_ours(directory: RunDirectory) -> None:
    """Raises StoreError for a folder that holds other things and none of a run directory."""
    if not directory.root.is_dir():
        return
    there = {path.name for path in directory.root.iterdir()}
    made = (directory.lock, directory.plan, directory.responses, directory.records, directory.servers)
    if there and not there & {"check", *(path.name for path in made)}:
        some = ", ".join(sorted(there)[:3])
        raise StoreError(f"{directory.root} is no run directory, it holds {some}: choose another name= or runs_dir=")


def _renamed(directory: RunDirectory) -> Path:
    stamp = datetime.fromtimestamp(directory.root.stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%S")
    aside = directory.root.with_name(f"{directory.root.name}.{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.root.with_name(f"{directory.root.name}.{stamp}-{number}")
    directory.root.rename(aside)
    return aside


_JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')


def masked_json(content: bytes, secrets: Iterable[str]) -> bytes:
    """JSON documents with every secret in their texts replaced by `***`; numbers and layout stay as they are."""
    spelled = {json.dumps(text, ensure_ascii=way)[1:-1].encode() for text in secrets for way in (True, False)}
    found = sorted((text for text in spelled if text and text in content), key=len, reverse=True)
    if not found:
        return content
    pattern = re.compile(b"|".join(map(re.escape, found)))
    return _JSON_TEXT.sub(lambda match: pattern.sub(b"***", match[0]), content)


@contextmanager
def _disk(doing: str, directory: RunDirectory) -> Iterator[None]:
    """`boundary` for what the disk may refuse: with the cure for the faults that have one."""
    try:
        with boundary(StoreError, doing):
            yield
    except StoreError as error:
        if (cause := error.__cause__) is not None and (cure := _cure(cause, directory)):
            raise StoreError(f"{error}: {cure}") from cause
        raise


def _cure(error: BaseException, directory: RunDirectory) -> str:
    """What to do about a fault of the disk or the database; empty where nobody can say."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # extended codes have the kind in their lowest byte
    number = error.errno if isinstance(error, OSError) else None
    if code == sqlite3.SQLITE_FULL or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space there (or raise the quota) and run the same command again; what was stored is kept"
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return f"another program has {directory.responses} open: close it (`fuser {directory.responses}` names it)"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return (
            f"it is damaged and was left as it is: move {directory.responses}* away and run the same command again; "
            "finished cells stay done, the others ask anew (`sqlite3 responses.db .recover` may save their answers)"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) or number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make it writable for this user, or choose another runs_dir="
    if code == sqlite3.SQLITE_IOERR or number == errno.EIO:
        return "the file system failed, or has no file locks: see `dmesg`, or choose another runs_dir="
    return ""


def _format_of(db: sqlite3.Connection, directory: RunDirectory) -> int:
    """SCHEMA, or 0 of an empty file. Raises StoreError for any other."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version not in (0, SCHEMA):
        raise StoreError(
            f"{directory.responses} has format {version}, this lmsweep writes {SCHEMA}: "
            "use the version that wrote it, another name=, or fresh=true to set it aside"
        )
    if tables and application != APPLICATION:
        raise StoreError(f"{directory.responses} is a database of another program: choose another name= or runs_dir=")
    return int(version)


@contextmanager
def stored_responses(directory: RunDirectory) -> Iterator[Iterator[Response]]:
    """Every stored response in the order of arrival, one at a time; no driver can begin meanwhile.

    Raises StoreError, also where a driver is at work: on file systems that machines share it has the file to itself.
    """
    with (
        _disk(f"read {directory.responses}", directory),
        closing(Claim(directory.lock, directory.heartbeat, reads=True)) as claim,
    ):
        # A lock may not reach other machines, and whoever closes the database last removes its WAL: here with answers
        # of a driver that began there meanwhile.
        claim.begin()
        with closing(sqlite3.connect(f"{directory.responses.absolute().as_uri()}?mode=rw", uri=True)) as db:
            if file_system(directory.root) not in LOCAL:
                db.execute("PRAGMA locking_mode=EXCLUSIVE")  # as in the store: no index in memory that machines share
            db.execute("PRAGMA query_only=ON")
            every = "SELECT key, cell, method, answer FROM responses ORDER BY rowid"
            yield (
                Response(key=key, cell=cell, method=method, answer=answer)
                for key, cell, method, answer in (db.execute(every) if _format_of(db, directory) else ())
            )


class Store:
    """The open run directory. One at a time: a second driver on the same directory is refused.

    Raises StoreError when the directory is in use, was written by another version or program, is damaged or cannot be
    written, here and in every method.
    """

    def __init__(self, directory: RunDirectory, *, secrets: Iterable[str] = ()) -> None:
        """`secrets` become `***` in what a record and its files say; responses stay as they are."""
        self.directory = directory
        self._secrets = tuple(secrets)
        with _disk(f"open the run directory {directory.root}", directory), ExitStack() as undone:
            _require_ours(directory)
            directory.root.mkdir(parents=True, exist_ok=True)
            self._claim = undone.enter_context(closing(Claim(directory.lock, directory.heartbeat)))
            self._claim.begin()  # before anything that takes its time, such as the check of a file that was left open
            kind, locks = file_system(directory.root), self._claim.locks
            # SQLite cannot do without locks unless it is told to; the heartbeat keeps others out.
            database = f"{directory.responses.absolute().as_uri()}{'' if locks else '?vfs=unix-none'}"
            self._db = undone.enter_context(
                closing(sqlite3.connect(database, uri=True, timeout=BUSY_S, isolation_level=None))
            )
            alone = kind in LOCAL and locks
            journal = self._prepare(exclusive=not alone)
            self.mode = f"{kind}: {journal}" if alone else f"{kind}, shared by machines: {journal}, exclusive"
            if not locks:
                self.mode += ", without locks"
            """The file system and how SQLite works on it, for the log."""
            undone.pop_all()

    def _prepare(self, *, exclusive: bool) -> str:
        """Check the file, or make it; its journal's mode."""
        left = Path(f"{self.directory.responses}-wal")
        unclean = left.exists() and left.stat().st_size > 0
        if exclusive:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # before the first access, or it is too late
        # Before anything that writes: a file of another version stays as it is.
        version = _format_of(self._db, self.directory)
        if unclean:
            # The last driver was killed, perhaps with its machine; it costs a second for a million responses.
            (said,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if said != "ok":
                damage = sqlite3.DatabaseError(" ".join(said.split()))
                damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
                raise damage
        (journal,) = self._db.execute("PRAGMA journal_mode=WAL").fetchone()
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        self._db.execute(f"PRAGMA cache_size=-{CACHE_KB}")
        if version == 0:
            with self._db:  # all or nothing: half of it would be another program's
                self._db.execute("BEGIN IMMEDIATE")
                # Rows lie in the order of their arrival and only the index is all over the place: with rows in the
                # order of their keys (WITHOUT ROWID) each of them changed a page of its own.
                self._db.execute(
                    "CREATE TABLE responses ("
                    "key BLOB NOT NULL UNIQUE, cell TEXT NOT NULL, method TEXT NOT NULL, answer BLOB NOT NULL)"
                )
                self._db.execute(f"PRAGMA application_id={APPLICATION}")
                self._db.execute(f"PRAGMA user_version={SCHEMA}")
        return str(journal)

    def put(self, responses: Iterable[Response]) -> dict[bytes, bytes]:
        """Make a batch durable. An answer that is already there stays: the first one given is the one that counts.

        Returns the answers that count in place of others of this batch, by key.
        """
        # In the order of the index, each of whose pages is then changed once; the first of equal keys stays first.
        rows = sorted(((r.key, r.cell, r.method, r.answer) for r in responses), key=itemgetter(0))
        with _disk(f"write {len(rows)} responses to {self.directory.responses}", self.directory):
            self._claim.check()
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                insert = "INSERT INTO responses VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
                new = self._db.executemany(insert, rows).rowcount
        if new == len(rows):
            return {}
        stored = self.answers([key for key, *_ in rows])
        return {key: stored[key] for key, *_, answer in rows if stored[key] != answer}

    def answers(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The stored answers among `keys`."""
        found: dict[bytes, bytes] = {}
        ordered = sorted(keys)
        with _disk(f"read {self.directory.responses}", self.directory):
            for start in range(0, len(ordered), LOOKUP_ROWS):
                some = ordered[start : start + LOOKUP_ROWS]
                marks = ",".join("?" * len(some))
                found.update(self._db.execute(f"SELECT key, answer FROM responses WHERE key IN ({marks})", some))
        return found

    def count(self) -> int:
        """Responses stored."""
        with _disk(f"read {self.directory.responses}", self.directory):
            (number,) = self._db.execute("SELECT count(*) FROM responses").fetchone()
        return int(number)

    def tell(self, work: Work | None) -> None:
        """What the next heartbeat says of the driver's loop, None when it has ended; costs nothing."""
        self._claim.tell(work)

    def keep_sweep_id(self) -> None:
        """Give the sweep an id of its own, unless it has one. What W&B has of a directory from before there were ids
        goes by its path, and goes on so."""
        known = self.directory.sweep_id
        with _disk(f"write {known}", self.directory):
            self._claim.check()
            if not known.exists():
                write_file(known, str(self.directory.root) if self.directory.wandb.exists() else uuid4().hex)

    def write_record(self, record: Record, files: Mapping[str, bytes]) -> bool:
        """Store a cell's outcome: its lm-eval files first, the record last. `files` is name -> content. False where it
        does not stand now.

        Files of an earlier outcome are removed once the new record stands. A failure has none to put in their place and
        leaves them; it does not replace numbers of the same settings, which it makes no worse.
        """
        with _disk(f"write the record of {record.model}/{record.task}", self.directory):
            self._claim.check()
            if record.status is Status.FAILED and self._has_numbers(record):
                return False
            folder = self.directory.cell_results(record.model, record.task)
            if files:
                self._write_results(folder, files)
            path = self.directory.record(record.model, record.task)
            encoded = masked_json(msgspec.json.encode(record), self._secrets)
            write_file(path, msgspec.json.format(encoded, indent=1))
            for old in [file for file in folder.glob("*") if files and file.name not in files]:
                old.unlink()
        return True

    def _write_results(self, folder: Path, files: Mapping[str, bytes]) -> None:
        def write(name: str) -> None:
            _replace(folder / name, masked_json(files[name], self._secrets))

        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(SYNCS_AT_ONCE) as pool:
            list(pool.map(write, files))
        _sync_folder(folder)

    def _has_numbers(self, record: Record) -> bool:
        path = self.directory.record(record.model, record.task)
        if not path.exists():
            return False
        stored = msgspec.json.decode(path.read_bytes(), type=Record)
        return stored.status is Status.DONE and stored.fingerprint == record.fingerprint

    def close(self) -> None:
        self._db.close()
        self._claim.close()
