"""What a finished or failed cell leaves behind: plain data, no behaviour, written once and read by everything after."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

WITHOUT_BOS = "prompts begin without the BOS"
"""In a warning, behind their number."""


class Status(StrEnum):
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of the outcome: a row of lm-eval's own result table."""

    task: str
    """lm-eval's name of the task, subtask or group that this number belongs to."""
    version: str
    filter: str
    """lm-eval's filter, `none` where the task has only one."""
    num_fewshot: int | None
    """As lm-eval gives it; None for a group whose subtasks differ."""
    metric: str
    value: float
    stderr: float | None
    """None where lm-eval gives none (`N/A`)."""
    higher_is_better: bool | None
    samples: int | None
    """Documents that were scored; None for a group."""
    depth: int = 0
    """0 for what the cell asked for, 1 and more for subtasks of a group."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Requests of one cell. `asked` were computed by a server in this attempt, `reused` came from the store."""

    requests: int = 0
    asked: int = 0
    reused: int = 0
    truncated: int = 0
    """Requests whose context was cut from the left because `on_overflow: truncate` allowed it."""
    empty: int = 0
    """Generations without any text."""
    length_stopped: int = 0
    """Generations that ended at the token limit, not at a stop string or end of text."""
    prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one cell (one model × one task). Its presence means that its sample files are complete."""

    model: str
    task: str
    fingerprint: str
    """Of everything that changes the cell's numbers; a different one means that the cell is owed again."""
    status: Status
    error: str | None = None
    """For a failed cell: what failed, where to look, what to change."""
    scores: tuple[Score, ...] = ()
    counts: Counts = field(default_factory=Counts)
    warnings: tuple[str, ...] = ()
    """What could bend the numbers, in sentences."""
    started_at: str = ""
    """UTC, ISO 8601."""
    wall_s: float = 0.0
    """From loading to scoring, without the wait for the model's server."""
    request_s: float = 0.0
    """First byte sent to last received, over all requests of the cell; 0 for a pure replay."""
    files: tuple[str, ...] = ()
    """lm-eval's result and sample files, relative to the run directory."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was asked of lm-eval and what took effect: shots, limit, seeds, template hash, first prompt, methods."""
    versions: dict[str, str] = field(default_factory=dict)
    """lm-eval, vLLM, transformers, tokenizers, lmsweep."""
