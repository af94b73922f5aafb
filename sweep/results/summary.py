"""What a sweep says: in five lines, and its paired comparisons as a table.

Pure, as the tables of report.py are.
"""

import math
from collections.abc import Mapping, Sequence

from sweep.record import Status
from sweep.results.compare import LEVEL, Comparison, Findings, leaders
from sweep.results.reading import Sweep
from sweep.results.report import (
    ARROWS,
    LISTED,
    aligned,
    by_text,
    caveats,
    chance,
    counted,
    lasting,
    reason,
    section,
    some,
)

NOTHING = "Nothing could be compared.\n"

UNDECIDED_MOST = 3
"""Groups of models that are not told apart in the headline, which is a line."""

PAIRS_MOST = 200
"""Comparisons in report.md; the page has them all, to be searched."""


def headline(sweep: Sweep, comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Five lines: who leads, which differences may be noise, what failed, what could bend a number, what it cost."""
    return {
        "leads": _led(sweep, comparisons),
        "noise": _noise(comparisons),
        "failed": _failed(sweep),
        "bends": _bent(sweep),
        "cost": _cost(sweep),
    }


def in_lines(said: Mapping[str, str]) -> list[str]:
    """A headline for a terminal."""
    return [f"{name:<8} {text}" for name, text in said.items()]


def _led(sweep: Sweep, comparisons: Sequence[Comparison]) -> str:
    """By each task's main number; a model leads where it is shown to be better than each other that has it."""
    main = _main_numbers(sweep)
    found = [of for of in leaders(sweep, comparisons) if main.get(of.task) == (of.subtask, of.metric, of.filter)]
    if not found:
        models = {record.model for record in sweep.records if record.status is Status.DONE}
        return "nobody: there is one model" if len(models) == 1 else "nobody: no number of two models can be compared"
    tasks_by_best: dict[str, list[str]] = {}
    for of in found:
        if of.best is not None:
            tasks_by_best.setdefault(of.best, []).append(of.task)
    most_first = sorted(tasks_by_best.items(), key=lambda item: -len(item[1]))
    said = [f"{model} on {some(tasks)}" for model, tasks in most_first]
    undecided: dict[tuple[str, ...], list[str]] = {}
    for of in found:
        if of.best is None:
            undecided.setdefault(of.models, []).append(of.task)
    most_tasks = sorted(undecided.items(), key=lambda item: -len(item[1]))
    said += [f"nobody alone on {some(tasks)}: {_in_front(models)}" for models, tasks in most_tasks[:UNDECIDED_MOST]]
    if more := sum(len(tasks) for _, tasks in most_tasks[UNDECIDED_MOST:]):
        said.append(f"nobody alone on {counted(more, 'other task')}")
    return "; ".join(said)


def _in_front(models: Sequence[str]) -> str:
    """Of the models that no other is shown to be better than."""
    if not models:
        return "each is shown to be worse than some other"
    if len(models) == 1:
        return f"{models[0]} is not shown to be better than all others"
    named = f"{', '.join(models[:-1])} and {models[-1]}" if len(models) <= LISTED else some(models)
    return f"{named} are not told apart"


def _main_numbers(sweep: Sweep) -> dict[str, tuple[str, str, str]]:
    """Task -> (subtask, metric, filter) of its first finished cell's first number, as in the page's leaderboard."""
    found: dict[str, tuple[str, str, str]] = {}
    for record in sweep.records:
        if record.status is Status.DONE:
            for score in record.scores:
                if not score.depth:
                    found.setdefault(record.task, (score.task, score.metric, score.filter))
    return found


def _noise(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "nothing was compared"
    unclear = [one for one in comparisons if one.verdict == "no difference shown"]
    certain = f"{LEVEL:.0%}, corrected for their number"
    said = f"{len(unclear):,} of {len(comparisons):,} paired differences may be noise ({certain})"
    measured = [one for one in unclear if one.detectable > 0]
    if measured:
        # Metrics have scales of their own; a difference is large against what its documents can show.
        largest = max(measured, key=lambda one: abs(one.difference) / one.detectable)
        said += (
            f"; the largest for its documents, {largest.model_b} against {largest.model_a} on {_named(largest)} "
            f"by {_metric(largest)}, is {largest.difference:+.4f} with n = {largest.n:,}"
        )
    return said


def _named(one: Comparison) -> str:
    return one.task if one.subtask == one.task else f"{one.task} ({one.subtask})"


def _metric(one: Comparison) -> str:
    return one.metric if one.filter == "none" else f"{one.metric},{one.filter}"


def _failed(sweep: Sweep) -> str:
    failed = [record for record in sweep.records if record.status is Status.FAILED]
    waiting = sweep.owed - len(failed)
    said = [f"{len(failed):,} of {len(sweep.records) + waiting:,} cells"] if failed else []
    said += [f"{len(records):,} for: {text}" for text, records in by_text((r, [reason(r)]) for r in failed)[:2]]
    if waiting > 0:
        said.append(f"{counted(waiting, 'cell')} still owed")
    return "; ".join(said) or "nothing"


def _bent(sweep: Sweep) -> str:
    bent = {f"{r.model}/{r.task}": caveats(r) for r in sweep.records}
    cells = [cell for cell, said in bent.items() if said]
    if not cells:
        return "nothing that is known of"
    example = f"{cells[0]}: {bent[cells[0]][0]}"
    return f"{counted(len(cells), 'cell')} with what could bend a number{', as' if len(cells) > 1 else ':'} {example}"


def _cost(sweep: Sweep) -> str:
    counts = [record.counts for record in sweep.records]
    timeline, said = sweep.timeline, []
    if timeline.launches:
        launches = f" in {len(timeline.launches)} launches" if len(timeline.launches) > 1 else ""
        said.append(f"{lasting(sum(span.end - span.start for span in timeline.launches))}{launches}")
    if timeline.servers:
        on_cpus = sum(span.end - span.start for span in timeline.servers if not span.gpus)
        said += [f"{timeline.gpu_s / 3600:.2f} GPU-hours"] if timeline.gpu_s else []
        said += [f"{on_cpus / 3600:.2f} server-hours without a GPU"] if on_cpus else []
    asked, reused = (sum(getattr(c, name) for c in counts) for name in ("asked", "reused"))
    return ", ".join([*said, f"{asked:,} requests computed, {reused:,} reused"])


def _alone(comparisons: int) -> str:
    """Why an interval without 0 may stand beside no verdict."""
    return (
        f"The 95 % interval is that of each pair alone; p is corrected for the number of all comparisons "
        f"({comparisons:,}, by Holm), and what is shown follows p: where an interval leaves out 0, "
        "p may still not be below 0.05.\n"
    )


def compared(findings: Findings, *, most: int | None = PAIRS_MOST) -> str:
    """Paired comparisons as a Markdown table, what is shown first; then their notes, and what was left out."""
    shown = sorted(findings.comparisons, key=lambda one: one.verdict == "no difference shown")[:most]
    table = [("Task", "Metric", "a", "b", "n", "a is", "b is", "b - a", "95 %", "p (Holm)", "b is shown to be")]
    for one in shown:
        table.append(
            (
                _named(one),
                f"{_metric(one)} {ARROWS[one.higher_is_better]}".rstrip(),
                one.model_a,
                one.model_b,
                str(one.n),
                f"{one.value_a:.4f}",
                f"{one.value_b:.4f}",
                f"{one.difference:+.4f} ± {'–' if math.isnan(one.stderr) else f'{one.stderr:.4f}'}",
                "–" if math.isnan(one.low) else f"{one.low:+.4f} … {one.high:+.4f}",
                chance(one.p_adjusted),
                "–" if one.verdict == "no difference shown" else one.verdict,
            )
        )
    notes: dict[str, list[str]] = {}
    for one in findings.comparisons:
        for note in one.notes:
            notes.setdefault(note, []).append(f"{one.task} {one.model_a} : {one.model_b}")
    parts = [_alone(len(findings.comparisons)), aligned(table, left={0, 1, 2, 3, 10})] if shown else [NOTHING]
    if (more := len(findings.comparisons) - len(shown)) > 0:
        parts.append(f"{more:,} more comparisons are in report.html.\n")
    parts.append(section("Notes", [f"{some(pairs)}: {note}" for note, pairs in notes.items()]))
    parts.append(section("Not compared", findings.left_out))
    return "\n".join(part for part in parts if part)
