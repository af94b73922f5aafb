"""What may leave the run directory for W&B: which samples, which of them are taken, what they look like as a table, and
lm-eval's results without the machine.

Prompts and answers are data that somebody else may own, so the default is none. The same documents are taken for every
model, so that tables can be read side by side.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from sweep.errors import StoreError, boundary
from sweep.planning.config import SweepConfig, Task
from sweep.planning.tasks import catalog
from sweep.results.reading import sample, subtask_of

ROWS = 200
"""Of a cell, with `wandb.samples: true`."""


def shared_rows(config: SweepConfig) -> dict[str, int]:
    """Task -> samples of each of its cells that W&B may have; only those with any."""
    asked = ROWS if config.wandb.samples is True else int(config.wandb.samples)
    return {name: asked for name, task in config.tasks.items() if asked and may_leave(task)}


def may_leave(task: Task) -> bool:
    """Whether the task's samples may go to others: as the sweep says, else not where its data set is known to be gated.

    Raises ConfigError where lm-eval has no such task.
    """
    if task.share_samples is not None:
        return task.share_samples
    known = catalog((task.include_path,) if task.include_path else ())
    return not any(leaf.gated for leaf in known.leaves(task.task))


MACHINE = ("pretty_env_info", "git_hash", "upper_git_hash")
"""Of lm-eval's result files: operating system, hardware and packages, commits of the folders that it ran in."""


def results(path: Path) -> bytes:
    """One of lm-eval's result files without what it tells of the machine. Raises StoreError."""
    with boundary(StoreError, f"read {path}"):
        found = json.loads(path.read_bytes())
    return json.dumps({key: value for key, value in found.items() if key not in MACHINE}, indent=2).encode()


class _Head(msgspec.Struct):
    doc_hash: str


def picked(paths: Sequence[Path], rows: int) -> dict[Path, list[bytes]]:
    """At most `rows` lines of lm-eval's sample files, by file and in its order, each document with all its filters.

    Which documents depends only on what they are: those with the smallest hashes, of all subtasks together. Raises
    StoreError.
    """
    kept: dict[bytes, list[tuple[Path, int, bytes]]] = {}
    most, count = b"\xff" * 33, 0  # above every hash
    for path in sorted(paths):
        with boundary(StoreError, f"read {path}"), path.open("rb") as lines:
            for number, line in enumerate(lines):
                head = msgspec.json.decode(line, type=_Head)
                key = hashlib.sha256(f"{subtask_of(path)}\0{head.doc_hash}".encode()).digest()
                if key >= most:
                    continue
                kept.setdefault(key, []).append((path, number, line))
                count += 1
                while count > rows:
                    most = max(kept)
                    count -= len(kept.pop(most))
    found: dict[Path, list[bytes]] = {}
    for path, _, line in sorted(row for of_document in kept.values() for row in of_document):
        found.setdefault(path, []).append(line)
    return found


def table(lines_by_path: Mapping[Path, Sequence[bytes]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of picked samples."""
    samples = [sample(subtask_of(path), line) for path, lines in lines_by_path.items() for line in lines]
    metrics = sorted({name for one in samples for name in one.metrics})
    rows = [
        [
            *(one.subtask, one.doc_id, one.doc_hash, one.filter),
            _text([arguments.get("arg_0") for arguments in one.arguments.values()][:1]),
            _text([one.target]),
            _text(_responses(one.arguments, one.resps)),
            _text(list(one.filtered_resps)),
            *(_number(one.metrics.get(name)) for name in metrics),
        ]
        for one in samples
    ]
    return ["subtask", "doc_id", "doc_hash", "filter", "prompt", "target", "response", "answer", *metrics], rows


def _responses(arguments: Mapping[str, Mapping[str, Any]], resps: Sequence[Any]) -> list[Any]:
    """What came back; of a log-likelihood with the continuation that it belongs to."""
    asked = [request.get("arg_1") for request in arguments.values()]
    came = [one[0] if isinstance(one, list) and len(one) == 1 else one for one in resps]
    if len(asked) == len(came) and all(isinstance(continuation, str) for continuation in asked):
        return [[continuation, answer] for continuation, answer in zip(asked, came, strict=True)]
    return came


def _text(values: list[Any]) -> str | None:
    """One text as it is, anything else as JSON: a column of W&B has one type."""
    if len(values) == 1 and (values[0] is None or isinstance(values[0], str)):
        return values[0]
    return json.dumps(values[0] if len(values) == 1 else values, ensure_ascii=False, default=str)


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else json.dumps(value, default=str)
