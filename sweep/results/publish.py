"""A run directory -> W&B: runs completed from what is on the disk, and the Report.

The same child process, schema and run ids as while a sweep runs, so a run that exists is continued: its summary is
sent whole, tables and files anew, and of its history only the rows that are missing there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sweep.planning.config import SweepConfig
from sweep.record import Record, Score, Status
from sweep.results.mirror import ROW, read_history, run_id
from sweep.results.reading import Sweep
from sweep.results.report import markdown
from sweep.results.sharing import shared_rows
from sweep.results.store import RunDirectory, read_sweep_id
from sweep.results.timeline import Span
from sweep.results.tracking import Outcome, Tracker, summary_key

PUBLISH_S = 1800.0
"""Longest time for all runs of a sweep: each takes seconds to open, and some for its files."""


def mirror_of(config: SweepConfig, directory: RunDirectory, secrets: Sequence[str], *, again: bool = False) -> Tracker:
    """The mirror of this sweep: the same runs for every launch, and for `again`. Raises StoreError."""
    return Tracker(
        config.wandb,
        sweep=config.name,
        sweep_id=read_sweep_id(directory),
        directory=directory.wandb,
        models={name: asdict(model) for name, model in config.models.items()},
        secrets=secrets,
        samples=shared_rows(config),
        again=again,
    )


def publish(
    sweep: Sweep,
    config: SweepConfig,
    *,
    secrets: Sequence[str],
    texts: Mapping[str, str] | None = None,
    timeout_s: float = PUBLISH_S,
) -> Outcome:
    """Complete the sweep's runs and its Report on W&B, whatever `wandb.mode` says; what did not arrive is in `errors`.

    `texts` are further chapters of the Report, Markdown by title: paired comparisons, for one. Writes nothing but what
    W&B's client writes, and the Report's id. Without an answer or a key of W&B nothing is done, and `mode` is offline.
    """
    mirror = mirror_of(config, sweep.directory, secrets, again=True)
    kept = read_history(sweep.directory.wandb)
    for model in (None, *config.models):
        mirror.history(model, kept.get(model) or rows_of(sweep, model))
    mirror.stands(sweep.records)
    report(mirror, sweep, config, texts or {})
    return mirror.close(timeout_s)


def report(mirror: Tracker, sweep: Sweep, config: SweepConfig, texts: Mapping[str, str]) -> None:
    """Have the Report made with the next `close`, where it is wanted."""
    if config.wandb.report:
        mirror.report(recipe(sweep, config, texts), share_link=config.wandb.share_link)


def rows_of(sweep: Sweep, model: str | None) -> list[dict[str, Any]]:
    """A run's history as far as the timeline tells it: how many cells were done when."""
    spans = [span for span in sweep.timeline.cells if model in (None, span.name.split("/")[0])]
    if not spans:
        return []
    began = min(span.start for span in (*sweep.timeline.launches, *spans))
    rows: list[dict[str, Any]] = []
    seen = set()
    for span in sorted(spans, key=_end):
        if span.state in (Status.DONE, Status.FAILED):
            seen.add(span.name)
            row = {"progress/elapsed_s": span.end - began, "progress/cells_done": len(seen), ROW: len(rows)}
            rows.append(row)
    return rows


def _end(span: Span) -> float:
    return span.end


def recipe(sweep: Sweep, config: SweepConfig, texts: Mapping[str, str]) -> dict[str, Any]:
    """What the Report is made of: plain data that needs no W&B."""
    done = sum(record.status is Status.DONE for record in sweep.records)
    failed = len(sweep.records) - done
    counted = f"{done} cells of {len(sweep.models)} models and {len(sweep.tasks)} tasks"
    sweep_id = read_sweep_id(sweep.directory)
    intro = f"{counted}; {failed} failed, {sweep.owed} owed. Values are as lm-eval gives them, ± one standard error."
    return {
        "title": f"{config.name} results",
        "description": counted,
        "project": config.wandb.project,
        "models": [run_id(config.name, sweep_id, model) for model in config.models],
        "overview": run_id(config.name, sweep_id, None),
        "intro": f"{intro} All of it is made from the run directory, and the next launch makes it again.",
        "leaderboard": markdown(sweep.records, sweep.models, subtasks=False),
        "bars": _bars(sweep.records),
        "bars_note": "The bars have no error bars, for which these panels have no place; the table above has them.",
        "texts": dict(texts),
        "settings": sweep.config,
    }


def _bars(records: Sequence[Record]) -> list[dict[str, str]]:
    """A chart for each task, of the metric that its cells name first."""
    firsts: dict[str, Counter[tuple[str, str]]] = {}
    for record in records:
        if record.scores:
            score = record.scores[0]
            title = f"{record.task}: {score.metric}{_filter(score)}{_DIRECTIONS[score.higher_is_better]}"
            firsts.setdefault(record.task, Counter())[summary_key(record, score), title] += 1
    return [{"key": key, "title": title} for found in firsts.values() for (key, title), _ in found.most_common(1)]


_DIRECTIONS = {True: ", more is better", False: ", less is better", None: ""}


def _filter(score: Score) -> str:
    return "" if score.filter in ("", "none") else f" ({score.filter})"
