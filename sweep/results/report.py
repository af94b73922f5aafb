"""Records -> the tables at the end: Markdown in lm-eval's form, CSV in full precision, the list of what failed.

Pure: it reads no file and knows nothing of lm-eval. A number is shown as it stands in its record; nothing is averaged,
ranked or rounded beyond lm-eval's four decimals here. The order of tasks is that of the records that are given.
"""

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from sweep.record import Record, Score, Status

MISSING = "–"
"""Stands where a model has no such number: the cell is not part of the sweep or not finished."""

COMPARED = ("gen_kwargs", "fewshot_as_multiturn", "metadata")
"""Settings of a task that change its numbers and leave no trace in the table, unlike shots, version and the number of
documents. What belongs to the model (chat template, scoring method) is not among them: to compare it is the purpose."""

COUNTED = {"truncated": "truncated", "empty": "empty", "length_stopped": "length-stopped"}
"""Counters of requests that can bend a number, and what their rows are called; a task without any has no such row."""

COLUMNS = (
    *("model", "task", "lm_eval_task", "version", "filter", "num_fewshot", "metric", "higher_is_better"),
    *("value", "stderr", "samples", "status", "error", "wall_s"),
    *("asked", "reused", "truncated", "empty", "length_stopped"),
)

ARROWS = {True: "↑", False: "↓", None: ""}
_KEYS = ("Tasks", "Version", "Filter", "n-shot", "Metric", "")
"""Of a row; the models follow."""
_LEFT = {"Tasks", "Filter", "Metric", ""}
_NARROWEST = 8
"""To which a column is cut so that the table fits a narrow terminal."""
LISTED = 3
"""Differences that a note names before it counts the rest: a group of 57 subtasks differs 57 times for one reason."""


def markdown(
    records: Sequence[Record], models: Sequence[str], *, subtasks: bool = True, width: int | None = None
) -> str:
    """The table of `make_table` in lm-eval with a column for each model, then what failed and what could bend a number.

    Models share a row only where the task ran with the same settings; otherwise the task has a block of rows for each
    setting, marked `[1]`, `[2]`, and a note says how they differ. `subtasks=False` leaves out the subtasks of groups.
    With a `width` the table is made to fit it: without versions and shots first, then by some models at a time.
    """
    table = [(*_KEYS, *models)]
    notes: list[str] = []
    by_task = _by_task(records, models)
    for task, by_model in by_task.items():
        blocks = same_settings(by_model)
        failed = {model: record for model, record in by_model.items() if record.status is Status.FAILED}
        for number, block in enumerate(blocks, start=1):
            mark = f" [{number}]" if len(blocks) > 1 else ""
            table += _rows(f"{task}{mark}", task, block | failed, models, subtasks=subtasks)
            if mark:
                notes.append(f"{task}{mark}, {', '.join(block)}: {differences(number - 1, blocks)}")

    kept = [record for by_model in by_task.values() for record in by_model.values()]
    reasons = _folded((record, [reason(record)]) for record in kept if record.status is Status.FAILED)
    parts = _fitted(table, width)
    if not subtasks and any(score.depth for record in kept for score in record.scores):
        parts.append("Subtasks of groups are left out.\n")
    parts.append(section("Settings differ between models", notes))
    parts.append(section("Failed", reasons))
    parts.append(section("What could bend these numbers", _folded((record, caveats(record)) for record in kept)))
    return "\n".join(part for part in parts if part)


def _fitted(table: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """The table, or several that are no wider, and what they leave out."""
    whole = aligned(table)
    if width is None or _width(whole) <= width:
        return [whole]
    header, *body = table
    same = {0, *(i for i in range(1, 6) if header[i] in _LEFT and len({row[i] for row in body} - {""}) > 1)}
    keys = [i for i in range(6) if i in same]
    dropped = [header[i] for i in (1, 2, 3) if i not in keys]
    parts, left = [], list(range(6, len(header)))
    while True:
        some = left[:1]
        while len(some) < len(left) and _width(aligned(_columns(table, [*keys, *left[: len(some) + 1]]))) <= width:
            some = left[: len(some) + 1]
        parts.append(aligned(_cut(_columns(table, [*keys, *some]), len(keys), width)))
        left = left[len(some) :]
        if not left:
            return [*parts, f"{', '.join(dropped)}: see report.md.\n"] if dropped else parts


def _columns(table: Sequence[Sequence[str]], chosen: Sequence[int]) -> list[list[str]]:
    return [[row[i] for i in chosen] for row in table]


def _cut(table: list[list[str]], keys: int, width: int) -> list[list[str]]:
    """With the widest columns cut, one character after the other, until the table fits; figures are never cut."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    least = [_NARROWEST if i < keys else max(len(row[i]) for row in table[1:]) for i in range(len(widths))]
    for _ in range(_width(aligned(table)) - width):
        widest = max(range(len(widths)), key=lambda i: widths[i] - least[i])
        widths[widest] = max(widths[widest] - 1, min(widths[widest], least[widest]))
    return [
        [cell if len(cell) <= widths[i] else f"{cell[: widths[i] - 1]}…" for i, cell in enumerate(row)] for row in table
    ]


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def duration(seconds: float) -> str:
    """`0:35`, `12:03` or `1:02:03`: where a column is narrow or ticks."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lasting(seconds: float) -> str:
    """`35 s`, `4 min 27 s`, `35 min` or `3 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 10:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
    return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"


def csv_text(records: Sequence[Record], models: Sequence[str]) -> str:
    """`rows` with `COLUMNS` as the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(records, models))
    return text.getvalue()


def rows(records: Sequence[Record], models: Sequence[str]) -> Iterator[dict[str, object]]:
    """`COLUMNS` of each number, in full precision, and of each cell that has none."""
    for by_model in _by_task(records, models).values():
        for record in by_model.values():
            counts = record.counts
            cell: dict[str, object] = {
                "model": record.model,
                "task": record.task,
                "status": record.status.value,
                "error": record.error,
                "wall_s": record.wall_s,
                "asked": counts.asked,
                "reused": counts.reused,
                "truncated": counts.truncated,
                "empty": counts.empty,
                "length_stopped": counts.length_stopped,
            }
            yield from (cell | _columns_of(score) for score in record.scores)
            if not record.scores:
                yield cell


def failures(records: Sequence[Record]) -> str:
    """Every failed cell with its whole message, cells of one cause together; empty when nothing failed."""
    failed = [record for record in records if record.status is Status.FAILED]
    if not failed:
        return ""
    cells_by_error: dict[str, list[str]] = {}
    for record in failed:
        cells_by_error.setdefault((record.error or reason(record)).strip(), []).append(f"{record.model}/{record.task}")
    lines = [f"{len(failed)} {'cell' if len(failed) == 1 else 'cells'} failed:"]
    for error, cells in cells_by_error.items():
        lines += ["", ", ".join(cells), *(f"    {line}".rstrip() for line in error.splitlines())]
    return "\n".join(lines) + "\n"


def figure(score: Score) -> str:
    """`0.8125 ± 0.0437`, with lm-eval's four decimals and its `N/A` where there is no standard error."""
    stderr = "N/A" if score.stderr is None else f"{score.stderr:.4f}"
    return f"{score.value:.4f} ± {stderr}"


def reason(record: Record) -> str:
    """The first line of why a cell failed; the rest (the tail of a log, say) is for `failures`."""
    lines = (record.error or "").strip().splitlines()
    return lines[0].strip() if lines else "no reason was recorded"


def caveats(record: Record) -> list[str]:
    """What could bend the numbers of a finished cell, in sentences: its counters, then its warnings."""
    if record.status is Status.FAILED:
        return []
    counts = record.counts
    counted = (
        (counts.truncated, "had their context cut from the left to fit the model"),
        (counts.empty, "were answered with an empty text"),
        (counts.length_stopped, "were stopped by the token limit"),
    )
    said = [] if record.scores else ["lm-eval gave no number"]
    limit = record.settings.get("task", {}).get("limit")
    if limit is not None:
        said.append(f"only a part of the documents was scored (limit {limit})")
    said += [f"{count} of {counts.requests} requests {what}" for count, what in counted if count]
    return said + [" ".join(warning.split()) for warning in record.warnings]


def _by_task(records: Iterable[Record], models: Sequence[str]) -> dict[str, dict[str, Record]]:
    """Task -> model -> record, in the order of `models`; others are left out and the last record of a cell counts."""
    tasks: dict[str, dict[str, Record]] = {}
    for record in records:
        tasks.setdefault(record.task, {})[record.model] = record
    return {
        task: kept
        for task, by_model in tasks.items()
        if (kept := {model: by_model[model] for model in models if model in by_model})
    }


def same_settings(by_model: Mapping[str, Record]) -> list[dict[str, Record]]:
    """The finished cells of one task, apart where their terms differ; one empty block when none has finished."""
    blocks: list[tuple[dict[str, str], dict[str, Record]]] = []
    for model, record in by_model.items():
        if record.status is Status.FAILED:
            continue
        terms = _terms(record)
        same = next((block for known, block in blocks if known == terms), None)
        if same is None:
            blocks.append((terms, {model: record}))
        else:
            same[model] = record
    return [block for _, block in blocks] or [{}]


def _terms(record: Record) -> dict[str, str]:
    """What must be equal before two models share a row: what took effect where scores say it, else what was asked."""
    asked = {**record.settings.get("task", {}), "seeds": record.settings.get("seeds")}
    terms = {
        name: json.dumps(asked[name], sort_keys=True, default=str)
        for name in (*COMPARED, "seeds")
        if asked.get(name) not in (None, {})
    }
    for score in record.scores:
        terms[f"version of {score.task}"] = score.version
        terms[f"shots of {score.task}"] = MISSING if score.num_fewshot is None else str(score.num_fewshot)
        terms[f"documents of {score.task}"] = MISSING if score.samples is None else str(score.samples)
    return terms


def differences(index: int, blocks: Sequence[Mapping[str, Record]]) -> str:
    """`shots of gsm8k 5, documents of gsm8k 40`: what in one block is not the same in all blocks."""
    terms = [_terms(next(iter(block.values()))) for block in blocks]
    names = dict.fromkeys(name for known in terms for name in known)
    differing = [name for name in names if len({known.get(name) for known in terms}) > 1]
    listed = ", ".join(f"{name} {terms[index].get(name, 'unset')}" for name in differing[:LISTED])
    more = len(differing) - LISTED
    return f"{listed} and {more} more" if more > 0 else listed


def _rows(
    label: str, task: str, by_model: Mapping[str, Record], models: Sequence[str], *, subtasks: bool
) -> list[tuple[str, ...]]:
    """The rows of one block; like lm-eval's, name and version stand only in the first row of each (sub)task."""

    def cells(number: Mapping[str, str]) -> list[str]:
        failed = {model: "failed" for model, record in by_model.items() if record.status is Status.FAILED}
        return [number.get(model) or failed.get(model, MISSING) for model in models]

    # By (sub)task first and by metric then, so that a metric which only a later model has does not end up below
    # another subtask.
    figures: dict[tuple[int, str], dict[tuple[str, ...], dict[str, str]]] = {}
    for model, record in by_model.items():
        for score in record.scores:
            if score.depth and not subtasks:
                continue
            shots = "" if score.num_fewshot is None else str(score.num_fewshot)
            metric = (score.version, score.filter, shots, score.metric, ARROWS[score.higher_is_better])
            figures.setdefault((score.depth, score.task), {}).setdefault(metric, {})[model] = figure(score)

    rows: list[tuple[str, ...]] = []
    for (depth, name), metrics in figures.items():
        shown = f"{' ' * depth}- {name}" if depth else label if name == task else f"{label} ({name})"
        for (version, *rest), number in metrics.items():
            rows.append((shown, version if shown else "", *rest, *cells(number)))
            shown = ""
        if (depth, name) == next(iter(figures)):  # of the whole cell, so above its subtasks
            rows += [("", "", "", "", what, "", *cells(number)) for what, number in _counted(by_model)]
    return rows or [(label, "", "", "", "", "", *cells({}))]


def _counted(by_model: Mapping[str, Record]) -> Iterator[tuple[str, dict[str, str]]]:
    """`length-stopped`, and by model how many of its requests were; only what happened to one model at least."""
    done = {model: record.counts for model, record in by_model.items() if record.status is Status.DONE}
    for name, what in COUNTED.items():
        numbers = {model: getattr(counts, name) for model, counts in done.items()}
        if any(numbers.values()):
            yield what, {m: f"{n} of {done[m].requests}" for m, n in numbers.items()}


def _columns_of(score: Score) -> dict[str, object]:
    return {
        "lm_eval_task": score.task,
        "version": score.version,
        "filter": score.filter,
        "num_fewshot": score.num_fewshot,
        "metric": score.metric,
        "higher_is_better": score.higher_is_better,
        "value": score.value,
        "stderr": score.stderr,
        "samples": score.samples,
    }


def aligned(table: Sequence[Sequence[str]], *, left: Collection[int] | None = None) -> str:
    """A Markdown table whose columns also line up as plain text; what is a number stands on the right."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *(len(row[column]) for row in escaped)) for column in range(len(escaped[0]))]
    if left is None:
        left = {column for column, name in enumerate(table[0][: len(_KEYS)]) if name in _LEFT}

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"|{'|'.join(padded)}|\n"

    rule = ["-" * width if column in left else f"{'-' * (width - 1)}:" for column, width in enumerate(widths)]
    header, *body = escaped
    return "".join(map(line, (header, rule, *body)))


def section(title: str, points: Sequence[str]) -> str:
    return f"**{title}**\n\n" + "".join(f"- {point}\n" for point in points) if points else ""


def _folded(said: Iterable[tuple[Record, Sequence[str]]]) -> list[str]:
    """`a/gsm8k, b/gsm8k: text`, the cells of which the same is said together."""
    return [f"{', '.join(f'{r.model}/{r.task}' for r in records)}: {text}" for text, records in by_text(said)]


def counted(number: int, noun: str) -> str:
    """`1 cell`, `1,000 cells`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def chance(p: float) -> str:
    """A p-value; `< 0.001` where three decimals would be a 0 that it is not."""
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return f"{', '.join(names[:LISTED])} and {more} more" if more > 0 else ", ".join(names)


def by_text(said: Iterable[tuple[Record, Sequence[str]]]) -> list[tuple[str, list[Record]]]:
    records_by_text: dict[str, list[Record]] = {}
    for record, texts in said:
        for text in texts:
            records_by_text.setdefault(text, []).append(record)
    return list(records_by_text.items())
