"""A run directory read back: what the page, comparisons, W&B's reports and exports are made of.

Files only, never the database: it works beside a driver, after one died, and from another machine. It knows nothing of
lm-eval beyond the layout of its sample files.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml

from sweep.errors import StoreError, boundary
from sweep.record import Record, Status
from sweep.results.store import RunDirectory, read_cells, read_records, require_launched
from sweep.results.timeline import Timeline, read_timeline


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document of one (sub)task, through one filter: a line of lm-eval's `samples_*.jsonl`."""

    subtask: str
    """lm-eval's name of the task that the document belongs to."""
    filter: str
    doc_id: int
    """Its position in the data set; two data sets of one size share them, so nothing is paired by it."""
    doc_hash: str
    prompt_hash: str
    """Of the first request's context."""
    target_hash: str
    doc: Mapping[str, Any]
    target: Any
    arguments: Mapping[str, Mapping[str, Any]]
    """By request: `arg_0` the context, `arg_1` the continuation or the generation's settings."""
    resps: tuple[Any, ...]
    """By request, as the model gave them: texts, or `[log-likelihood, is greedy]`, of which lm-eval makes texts."""
    filtered_resps: tuple[Any, ...]
    metrics: Mapping[str, Any]
    """As the task gave them for this document: a number, or what an aggregation of its own needs (`[ll, bytes]`)."""


class Outcome(NamedTuple):
    """What a comparison needs of a sample; several times faster to read than the whole."""

    subtask: str
    filter: str
    doc_hash: str
    prompt_hash: str
    target_hash: str
    doc: msgspec.Raw
    """The document as JSON, not decoded."""
    metrics: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep as its run directory tells it."""

    directory: RunDirectory
    name: str
    config: Mapping[str, Any]
    """As resolved for the last launch, secrets masked; empty when it is missing."""
    models: tuple[str, ...]
    """In the order of the config; those that only old records know come last."""
    tasks: tuple[str, ...]
    records: tuple[Record, ...]
    """By task and then model, in the order above. Of cells that are no longer planned, or were computed under other
    settings than the last launch asked for, there is none."""
    left_out: int
    """Records of such cells."""
    owed: int
    """Cells without a record."""
    timeline: Timeline = field(default_factory=Timeline)

    def record(self, model: str, task: str) -> Record | None:
        return next((r for r in self.records if (r.model, r.task) == (model, task)), None)

    def samples(self, record: Record) -> Iterator[Sample]:
        """The samples of a finished cell, file by file in lm-eval's order. Raises StoreError."""
        for path in self._sample_files(record):
            yield from read_samples(path)

    def outcomes(self, record: Record) -> Iterator[Outcome]:
        """The same samples without prompts and answers. Raises StoreError."""
        for path in self._sample_files(record):
            yield from _outcomes(path)

    def _sample_files(self, record: Record) -> list[Path]:
        paths = (self.directory.root / name for name in sorted(record.files))
        return [path for path in paths if path.name.startswith("samples_")]


def read_sweep(root: Path) -> Sweep:
    """The sweep in a run directory. Raises StoreError where there is none or a file of it cannot be read."""
    directory = RunDirectory(root)
    require_launched(directory)
    config: dict[str, Any] = {}
    if directory.config.exists():
        with boundary(StoreError, f"read {directory.config}"):
            config = yaml.safe_load(directory.config.read_bytes())
    fingerprints = read_cells(directory)
    known = read_records(directory)
    kept = {
        cell: record for cell, record in known.items() if fingerprints.get(f"{cell[0]}/{cell[1]}") == record.fingerprint
    }
    planned = [tuple(key.split("/", 1)) for key in fingerprints]
    models = tuple(dict.fromkeys([*config.get("models", ()), *(model for model, _ in planned)]))
    tasks = tuple(dict.fromkeys([*config.get("tasks", ()), *(task for _, task in planned)]))
    return Sweep(
        directory=directory,
        name=str(config.get("name", root.name)),
        config=config,
        models=models,
        tasks=tasks,
        records=tuple(kept[model, task] for task in tasks for model in models if (model, task) in kept),
        left_out=len(known) - len(kept),
        owed=sum(not (record := kept.get((m, t))) or record.status is not Status.DONE for m, t in planned),
        timeline=read_timeline(directory.timeline),
    )


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples in one of lm-eval's files. Raises StoreError."""
    with boundary(StoreError, f"read {path}"), path.open("rb") as lines:
        for line in lines:
            yield sample(subtask_of(path), line)


def subtask_of(path: Path) -> str:
    """lm-eval's name of the task whose samples a file holds: `samples_<task>_<date>.jsonl`."""
    return path.stem.removeprefix("samples_").rpartition("_")[0]


_PLAIN: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()


def sample(subtask: str, line: bytes) -> Sample:
    row = _decoded(_PLAIN, line)
    return Sample(
        subtask=subtask,
        filter=row["filter"],
        doc_id=row["doc_id"],
        doc_hash=row["doc_hash"],
        prompt_hash=row["prompt_hash"],
        target_hash=row["target_hash"],
        doc=row["doc"] if isinstance(row["doc"], dict) else {"doc": row["doc"]},
        target=row["target"],
        arguments=row["arguments"],
        resps=tuple(row["resps"]),
        filtered_resps=tuple(row["filtered_resps"]),
        metrics={name: row[name] for name in row["metrics"]},
    )


def _outcomes(path: Path) -> Iterator[Outcome]:
    subtask = subtask_of(path)
    names: tuple[str, ...] = ()
    fields: dict[str, str] = {}
    decoder = _row_decoder(names)
    with boundary(StoreError, f"read {path}"), path.open("rb") as lines:
        for line in lines:
            row = _decoded(decoder, line)
            if not set(row.metrics) <= set(names):
                names = (*names, *(name for name in row.metrics if name not in names))
                decoder = _row_decoder(names)
                row = _decoded(decoder, line)
                fields = {name: f"value_{index}" for index, name in enumerate(names)}
            values = tuple([(name, getattr(row, fields[name])) for name in row.metrics])
            yield Outcome(subtask, row.filter, row.doc_hash, row.prompt_hash, row.target_hash, row.doc.copy(), values)


@lru_cache(maxsize=64)
def _row_decoder(metrics: tuple[str, ...]) -> "msgspec.json.Decoder[Any]":
    """Reads these metrics and the hashes of a line and skips the rest of it: prompts and answers are most of a file."""
    fixed = [(name, str) for name in ("filter", "doc_hash", "prompt_hash", "target_hash")]
    values = [(f"value_{index}", Any, msgspec.field(name=name, default=None)) for index, name in enumerate(metrics)]
    row = msgspec.defstruct("Row", [*fixed, ("metrics", list[str]), ("doc", msgspec.Raw), *values])
    return msgspec.json.Decoder(row)


def _decoded(decoder: "msgspec.json.Decoder[Any]", line: bytes) -> Any:
    try:
        return decoder.decode(line)
    except msgspec.DecodeError:
        # Python writes NaN, which is no JSON; msgspec writes null for it.
        return decoder.decode(msgspec.json.encode(json.loads(line)))
