"""Published scores."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    model: str
    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    source: str
    settings: str
    differs: tuple[str, ...]
