"""The sweep as one HTML file, `report.html`, that opens anywhere and asks no network for anything.

Charts are drawn and tables written when the page is made; a script of the page sorts, filters, compares and opens the
samples. Whatever comes from outside (prompts, answers, errors, names) is text: the template escapes it, data for the
script is compressed, and a policy in the page lets no other script run and nothing be fetched.
"""

import base64
import gzip
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from sweep import __version__
from sweep.errors import ConfigError, ReportError, boundary
from sweep.planning.config import Task
from sweep.planning.loading import sweep_file
from sweep.record import Record, Score, Status
from sweep.results.answers import Block, blocks
from sweep.results.charts import Bar, Label, Point, size_chart, task_chart, timeline_chart
from sweep.results.compare import Comparison, leaders, wilson
from sweep.results.reading import Sweep
from sweep.results.references import Published
from sweep.results.report import ARROWS, caveats, chance, counted, differences, reason, same_settings
from sweep.results.sharing import may_leave
from sweep.results.sizes import asked_of, billions, in_fewer_bits, quantization, sized
from sweep.results.store import read_cells
from sweep.results.summary import headline
from sweep.results.timeline import Span

TEMPLATES = Path(__file__).parent / "templates"

OPEN_CHARTS = 8
"""Charts that are unfolded at first: more than that many make a page that nobody scrolls through."""

PRINTED_COLUMNS = 5
"""Tasks side by side on paper."""

NORMAL = 1.96
"""Standard errors to each side."""

BY_WILSON, BY_STDERR, NO_INTERVAL = (
    "95 %: Wilson",
    "95 %: ± 1.96 standard errors",
    "no interval: lm-eval gives no error",
)

Key = tuple[str, str, str, str]
"""Task, subtask, metric and filter: what makes two numbers comparable."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A number that models are compared by: one task, metric and filter."""

    task: str
    subtask: str
    """lm-eval's name of what is scored: the task, or one of several that a tag stands for."""
    metric: str
    filter: str
    higher_is_better: bool | None
    version: str
    shots: str
    samples: str
    """Documents; a range where models differ."""
    main: bool
    """The first of its task; the others are shown on request."""
    common: tuple[str, ...] = ()
    """Caveats that every cell of the task has, digits left out."""

    @property
    def arrow(self) -> str:
        return ARROWS[self.higher_is_better]

    @property
    def label(self) -> str:
        return self.metric if self.filter in ("", "none") else f"{self.metric}, {self.filter}"

    @property
    def key(self) -> Key:
        return self.task, self.subtask, self.metric, self.filter

    @property
    def title(self) -> str:
        return self.task if self.subtask == self.task else f"{self.task} ({self.subtask})"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What stands in the leaderboard for a model and a column."""

    score: Score | None = None
    missing: str = ""
    """Why there is no number: `failed`, `owed`, or nothing for a cell that is not part of the sweep."""
    best: bool = False
    """Shown to be better than every other model that has this number."""
    leading: bool = False
    """No other model is shown to be better."""
    said: tuple[str, ...] = ()
    """What bends this number and not those of all others."""
    block: int = 0
    """Number of the group with the same settings, where models differ in them."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    column: Column
    svg: Markup
    said: str
    """The chart in words."""
    interval: str
    """Whose intervals it shows."""
    open: bool


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The same said of several cells."""

    text: str
    cells: tuple[tuple[str, str], ...]
    """A cell and what was said of it in full."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    model: str
    gpu_hours: float | None
    shared: bool
    """Its servers served other models too: the GPU-hours are theirs together."""
    starts: int
    start_s: float | None
    """Until its servers were ready, on average."""
    wall_s: float
    asked: int
    reused: int
    prompt_tokens: int
    generated_tokens: int
    tokens_per_s: float | None
    """Prompt and generated, over the time in which a cell had requests out, summed over cells."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    model: str
    full: str
    comparisons: tuple[Comparison, ...]
    """The quantised model against the full one."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    published: Published
    ours: Score | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of a model, to run it again."""

    model: str
    path: str
    commit: str
    dtype: str
    quantization: str
    chat: str
    billions: str
    methods: str


@dataclass(frozen=True, kw_only=True)
class _View:
    """All that the template shows."""

    sweep: Sweep
    made: str
    lmsweep: str
    digest: Mapping[str, str]
    """What the sweep says, by what each line is about."""
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    chunks: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    pairs: bool
    left_out: tuple[str, ...]
    """What could not be compared."""
    troubles: tuple[str, ...]
    """What the page lacks."""
    charts: tuple[Chart, ...]
    sizes: tuple[Chart, ...]
    unsized: tuple[str, ...]
    references: tuple[Reference, ...]
    quantized: tuple[Quantized, ...]
    bends: tuple[Fold, ...]
    failed: tuple[Fold, ...]
    lost: tuple[Fold, ...]
    speeds: tuple[Speed, ...]
    gpu_hours: float | None
    timeline: Markup | None
    launches: int
    blocks: tuple[Block, ...]
    private: tuple[str, ...]
    facts: tuple[Facts, ...]
    versions: tuple[tuple[str, int], ...]
    settings: str
    commands: tuple[tuple[str, str], ...]
    data: Mapping[str, str] = field(default_factory=dict)


def page(
    sweep: Sweep,
    comparisons: Sequence[Comparison],
    published: Sequence[Published],
    *,
    left_out: Sequence[str] = (),
    troubles: Sequence[str] = (),
    samples: bool = True,
) -> str:
    """`report.html`. Without `samples` no document, prompt or answer is in it.

    `left_out` is what could not be compared. `troubles` is what the page lacks already; a chart that cannot be drawn
    and a sample file that cannot be read are told there, too, and cost nothing else.
    """
    troubles = list(troubles)
    columns = _columns(sweep)
    rows = _rows(sweep, columns, comparisons)
    sizes = {model: billions(sweep, model) for model in sweep.models}
    charts = _charts(sweep, columns, published, sizes, troubles.append)
    size_charts = _size_charts(sweep, columns, sizes, troubles.append)
    timeline = _timeline(sweep, troubles.append)
    kept = blocks(sweep, unread=troubles.append) if samples else ()
    view = _View(
        sweep=sweep,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        lmsweep=__version__,
        digest=headline(sweep, comparisons),
        columns=columns,
        rows=rows,
        chunks=_chunks(columns),
        notes=_differing(sweep),
        pairs=bool(comparisons),
        left_out=tuple(left_out),
        troubles=tuple(troubles),
        charts=charts,
        sizes=size_charts,
        unsized=tuple(model for model, size in sizes.items() if size is None),
        references=tuple(Reference(published=p, ours=_ours(sweep, p)) for p in published),
        quantized=_quantized(sweep, comparisons),
        bends=_folds((r, text, _kind(text)) for r in sweep.records for text in caveats(r)),
        failed=_folds((r, (r.error or "").strip(), reason(r)) for r in sweep.records if r.status is Status.FAILED),
        lost=_lost(sweep.timeline.servers),
        speeds=tuple(_speed(sweep, model) for model in sweep.models),
        gpu_hours=sweep.timeline.gpu_s / 3600 if sweep.timeline.servers else None,
        timeline=timeline,
        launches=len(sweep.timeline.launches),
        blocks=kept,
        private=tuple(block.task for block in kept if _is_private(sweep, block.task)),
        facts=tuple(_facts(sweep, model) for model in sweep.models),
        versions=_versions(sweep.records),
        settings=sweep_file(sweep.config),
        commands=_commands(sweep),
        data={"comparisons": _packed(_comparison_table(comparisons))} if comparisons else {},
    )
    return _rendered(view)


def _columns(sweep: Sweep) -> tuple[Column, ...]:
    found: list[Column] = []
    for task in sweep.tasks:
        records = [r for r in sweep.records if r.task == task and r.status is Status.DONE]
        common = set.intersection(*({_kind(text) for text in caveats(r)} for r in records)) if records else set()
        of_task: dict[tuple[str, str, str], list[Score]] = {}
        documents: dict[tuple[str, str, str], set[int]] = {}
        for record in records:
            for score in record.scores:
                if not score.depth:
                    key = score.task, score.metric, score.filter
                    of_task.setdefault(key, []).append(score)
                    count = _documents(record, score)
                    documents.setdefault(key, set()).update(() if count is None else (count,))
        for number, ((name, metric, by), scores) in enumerate(of_task.items()):
            sizes = sorted(documents[name, metric, by])
            shots = sorted({"–" if score.num_fewshot is None else str(score.num_fewshot) for score in scores})
            found.append(
                Column(
                    task=task,
                    subtask=name,
                    metric=metric,
                    filter=by,
                    higher_is_better=scores[0].higher_is_better,
                    version=", ".join(sorted({score.version for score in scores})),
                    shots=", ".join(shots),
                    samples="" if not sizes else f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}–{sizes[-1]:,}",
                    main=number == 0,
                    common=tuple(sorted(common)),
                )
            )
    return tuple(found)


def _documents(record: Record, score: Score) -> int | None:
    """That a number of what the cell asked for was made of; a group's are those of its subtasks, if all are known."""
    if score.samples is not None:
        return score.samples
    counts = [leaf.samples for leaf in _leaves(record, score)]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _leaves(record: Record, score: Score) -> list[Score]:
    """The same number of the subtasks that a group at the top of a record is made of."""
    # Subtasks come right after their group, a name's numbers together.
    names = list(dict.fromkeys((one.task, one.depth) for one in record.scores))
    same = {(s.task, s.depth): s for s in record.scores if (s.metric, s.filter) == (score.metric, score.filter)}
    below = names[names.index((score.task, 0)) + 1 :]
    end = next((number for number, (_, depth) in enumerate(below) if not depth), len(below))
    return [
        same[name]
        for number, name in enumerate(below[:end])
        if name in same and (number + 1 == end or below[number + 1][1] <= name[1])
    ]


def _right(record: Record, score: Score) -> tuple[int, int] | None:
    """How many documents are right, and of how many, where a number is a mean of 0/1 values, alone or over the subtasks
    of a group weighted by their size; None for any other.

    Told by lm-eval's standard error, so that no sample need be there: it is that of the sample, and of values between 0
    and 1 with mean p only zeros and ones have the variance p (1 - p).
    """
    parts = [score] if score.samples is not None else _leaves(record, score)
    counts = [(round(part.value * part.samples), part.samples) for part in parts if _is_counted(part) and part.samples]
    right, n = sum(count for count, _ in counts), sum(size for _, size in counts)
    known = counts and len(counts) == len(parts) and score.stderr is not None
    return (right, n) if known and math.isclose(right / n, score.value, abs_tol=1e-9) else None


def _is_counted(score: Score) -> bool:
    p, n, stderr = score.value, score.samples or 0, score.stderr
    if stderr is None or n < 2 or not 0 <= p <= 1:
        return False
    whole = math.isclose(p * n, round(p * n), rel_tol=0, abs_tol=1e-6)
    return whole and math.isclose(stderr, math.sqrt(p * (1 - p) / (n - 1)), rel_tol=1e-9, abs_tol=1e-12)


def _rows(
    sweep: Sweep, columns: Sequence[Column], comparisons: Sequence[Comparison]
) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    leading = {(of.task, of.subtask, of.metric, of.filter): of for of in leaders(sweep, comparisons)}
    records = {(r.model, r.task): r for r in sweep.records}
    groups = _settings_groups(sweep)
    planned = set(_planned(sweep))

    def cell(model: str, column: Column) -> Cell:
        record = records.get((model, column.task))
        if record is None:
            return Cell(missing="owed" if (model, column.task) in planned else "")
        if record.status is Status.FAILED:
            return Cell(missing="failed", said=(reason(record),))
        score = _score(record, column)
        of = leading.get(column.key)
        return Cell(
            score=score,
            best=of is not None and of.best == model,
            leading=of is not None and of.best is None and model in of.models,
            said=tuple(text for text in caveats(record) if _kind(text) not in column.common),
            block=groups.get(column.task, {}).get(model, 0),
        )

    return tuple((model, tuple(cell(model, column) for column in columns)) for model in sweep.models)


def _planned(sweep: Sweep) -> list[tuple[str, str]]:
    return [(key.split("/", 1)[0], key.split("/", 1)[1]) for key in read_cells(sweep.directory)]


def _score(record: Record, column: Column) -> Score | None:
    wanted = (column.subtask, column.metric, column.filter)
    return next((s for s in record.scores if not s.depth and (s.task, s.metric, s.filter) == wanted), None)


def _by_model(sweep: Sweep, task: str) -> dict[str, Record]:
    return {record.model: record for record in sweep.records if record.task == task}


def _settings_groups(sweep: Sweep) -> dict[str, dict[str, int]]:
    """Task -> model -> number of its group, of tasks that did not run with the same settings for all."""
    found: dict[str, dict[str, int]] = {}
    for task in sweep.tasks:
        groups = same_settings(_by_model(sweep, task))
        if len(groups) > 1:
            found[task] = {model: number for number, group in enumerate(groups, start=1) for model in group}
    return found


def _differing(sweep: Sweep) -> tuple[str, ...]:
    notes = []
    for task in sweep.tasks:
        groups = same_settings(_by_model(sweep, task))
        if len(groups) > 1:
            notes += [
                f"{task} [{number + 1}], {', '.join(group)}: {differences(number, groups)}"
                for number, group in enumerate(groups)
            ]
    return tuple(notes)


def _chunks(columns: Sequence[Column]) -> tuple[tuple[int, ...], ...]:
    main = [number for number, column in enumerate(columns) if column.main]
    return tuple(tuple(main[at : at + PRINTED_COLUMNS]) for at in range(0, len(main), PRINTED_COLUMNS))


def _drawn(what: str, trouble: Callable[[str], None], draw: Callable[[], str]) -> Markup | None:
    """None, and why, where it fails: everything in a chart stands in a table, too."""
    try:
        with boundary(ReportError, f"draw the chart of {what}"):
            return Markup(draw())
    except ReportError as error:
        trouble(str(error))
        return None


def _charts(
    sweep: Sweep,
    columns: Sequence[Column],
    published: Sequence[Published],
    sizes: Mapping[str, float | None],
    trouble: Callable[[str], None],
) -> tuple[Chart, ...]:
    said: dict[tuple[str, *Key], Published] = {}
    for p in sorted(published, key=lambda p: bool(p.differs)):  # of several sources, one that can be compared
        said.setdefault((p.model, p.task, p.subtask, p.metric, p.filter), p)
    found: list[Chart] = []
    for column in columns:
        points, interval = _points(sweep, column, said, sizes)
        if not column.main or not points:
            continue
        first, last = points[0], points[-1]
        sentence = (
            f"{column.title}, {column.label}: {counted(len(points), 'model')}, from {first.model} with "
            f"{first.value:.4f} to {last.model} with {last.value:.4f}; the numbers are in the leaderboard."
        )
        svg = _drawn(column.title, trouble, partial(task_chart, points, f"{column.label} {column.arrow}".strip()))
        if svg is not None:
            found.append(Chart(column=column, svg=svg, said=sentence, interval=interval, open=len(found) < OPEN_CHARTS))
    return tuple(found)


def _points(
    sweep: Sweep,
    column: Column,
    published: Mapping[tuple[str, *Key], Published],
    sizes: Mapping[str, float | None],
) -> tuple[list[Point], str]:
    """Best first, and what their intervals are."""
    scores = {
        model: (score, _right(record, score))
        for model, record in _by_model(sweep, column.task).items()
        if (score := _score(record, column)) is not None
    }
    # Of all or of none: a metric that is no count may be 1 for every document of the best model.
    by_wilson = all(right is not None for _, right in scores.values())
    points = []
    for model, (score, right) in scores.items():
        if right is not None and by_wilson:
            low, high = wilson(*right)
        else:
            low, high = (score.value + sign * NORMAL * (score.stderr or 0.0) for sign in (-1, 1))
        known = published.get((model, *column.key))
        points.append(
            Point(
                model=model,
                value=score.value,
                low=low,
                high=high,
                published=known.value if known else None,
                comparable=bool(known and not known.differs),
                billions=sizes.get(model),
            )
        )
    interval = (
        BY_WILSON
        if by_wilson
        else BY_STDERR
        if any(score.stderr is not None for score, _ in scores.values())
        else NO_INTERVAL
    )
    return sorted(points, key=lambda point: point.value, reverse=column.higher_is_better is not False), interval


def _size_charts(
    sweep: Sweep, columns: Sequence[Column], sizes: Mapping[str, float | None], trouble: Callable[[str], None]
) -> tuple[Chart, ...]:
    found: list[Chart] = []
    for column in columns:
        all_points, interval = _points(sweep, column, {}, sizes)
        points = [point for point in all_points if point.billions is not None]
        if column.main and len({point.billions for point in points}) > 1:
            high = column.higher_is_better is not False
            small, large = min(points, key=lambda p: p.billions or 0), max(points, key=lambda p: p.billions or 0)
            sentence = (
                f"{column.title}, {column.label} against parameters: from {small.model} ({sized(small.billions or 0)}) "
                f"with {small.value:.4f} to {large.model} ({sized(large.billions or 0)}) with {large.value:.4f}."
            )
            draw = partial(size_chart, points, f"{column.label} {column.arrow}".strip(), higher_is_better=high)
            svg = _drawn(f"size against {column.title}", trouble, draw)
            if svg is not None:
                found.append(Chart(column=column, svg=svg, said=sentence, interval=interval, open=len(found) < 3))
    return tuple(found)


def _quantized(sweep: Sweep, comparisons: Sequence[Comparison]) -> tuple[Quantized, ...]:
    main = {column.key for column in _columns(sweep) if column.main}
    found = []
    for model, full in in_fewer_bits(sweep):
        both = []
        for c in comparisons:
            if {c.model_a, c.model_b} == {model, full} and (c.task, c.subtask, c.metric, c.filter) in main:
                both.append(c if c.model_b == model else turned(c))
        found.append(Quantized(model=model, full=full, comparisons=tuple(both)))
    return tuple(found)


def turned(c: Comparison) -> Comparison:
    """The same comparison with `a` and `b` in each other's place."""
    return replace(
        c,
        model_a=c.model_b,
        model_b=c.model_a,
        value_a=c.value_b,
        value_b=c.value_a,
        difference=-c.difference,
        low=-c.high,
        high=-c.low,
    )


def _ours(sweep: Sweep, published: Published) -> Score | None:
    """Of a task, or of a subtask below it."""
    record = sweep.record(published.model, published.task)
    if record is None:
        return None
    wanted = (published.subtask, published.metric, published.filter)
    return next((s for s in record.scores if (s.task, s.metric, s.filter) == wanted), None)


def _is_private(sweep: Sweep, task: str) -> bool:
    """Whether its samples are kept from W&B, too; a task that nobody here knows any more has no data known as gated."""
    asked = sweep.config.get("tasks", {}).get(task, {})
    try:
        return not may_leave(
            Task(
                task=str(asked.get("task") or task),
                share_samples=asked.get("share_samples"),
                include_path=asked.get("include_path"),
            )
        )
    except ConfigError:
        return False


def _kind(text: str) -> str:
    """A sentence without its numbers, so that cells which differ in them alone are folded together."""
    return re.sub(r"\d[\d,.]*\d|\d", "N", text)


def _folds(said: Iterable[tuple[Record, str, str]]) -> tuple[Fold, ...]:
    """(record, the whole text, what it is folded by) -> most cells first."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for record, text, kind in said:
        by_kind.setdefault(kind, []).append((f"{record.model}/{record.task}", text))
    folds = [Fold(text=_told(kind, [text for _, text in cells]), cells=tuple(cells)) for kind, cells in by_kind.items()]
    return tuple(sorted(folds, key=lambda fold: -len(fold.cells)))


def _told(kind: str, texts: Sequence[str]) -> str:
    """One sentence for all of `texts`, which are alike but for their numbers."""
    counts = [re.match(r"(\d+) of (\d+) (requests .*)", text) for text in texts]
    if counts[0] and all(counts):
        some, of = (sum(int(count[group]) for count in counts if count) for group in (1, 2))
        return f"{some:,} of {of:,} {counts[0][3]}"
    return texts[0] if len(set(texts)) == 1 and "\n" not in texts[0] else kind


def _lost(servers: Iterable[Span]) -> tuple[Fold, ...]:
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for span in servers:
        if span.lost:
            by_reason.setdefault(_kind(span.reason), []).append((span.name, span.reason))
    return tuple(Fold(text=kind, cells=tuple(cells)) for kind, cells in by_reason.items())


def _speed(sweep: Sweep, model: str) -> Speed:
    done = [r for r in sweep.records if r.model == model and r.status is Status.DONE]
    entry = _entry(sweep, model)
    lives = [span for span in sweep.timeline.servers if span.server == entry]
    waits = [span.ready - span.start for span in lives if span.ready is not None]
    prompt, generated = (sum(getattr(r.counts, n) for r in done) for n in ("prompt_tokens", "generated_tokens"))
    request_s = sum(r.request_s for r in done)
    return Speed(
        model=model,
        gpu_hours=sum((span.end - span.start) * span.gpus for span in lives) / 3600 if lives else None,
        shared=sum(_entry(sweep, other) == entry for other in sweep.models) > 1,
        starts=len(lives),
        start_s=sum(waits) / len(waits) if waits else None,
        wall_s=sum(r.wall_s for r in done),
        asked=sum(r.counts.asked for r in done),
        reused=sum(r.counts.reused for r in done),
        prompt_tokens=prompt,
        generated_tokens=generated,
        tokens_per_s=(prompt + generated) / request_s if request_s and prompt + generated else None,
    )


def _entry(sweep: Sweep, model: str) -> str:
    return str(sweep.config.get("models", {}).get(model, {}).get("entry") or model)


def _timeline(sweep: Sweep, trouble: Callable[[str], None]) -> Markup | None:
    """Servers by node, each row a seat that one server after the other took; the time between launches is cut out."""
    servers, cells = sweep.timeline.servers, sweep.timeline.cells
    if not servers:
        return None
    launches = sweep.timeline.launches
    edges = [(span.start, span.end) for span in launches] or [
        (min(span.start for span in servers), max(span.end for span in (*servers, *cells)))
    ]

    def since(moment: float) -> float:
        return sum(min(moment, end) - start for start, end in edges if moment > start)

    free: dict[str, list[float]] = {}
    seat_by_life: list[tuple[str, int]] = []
    for span, place in zip(servers, _places(servers), strict=True):
        ends = free.setdefault(place, [])
        lane = next((index for index, end in enumerate(ends) if end <= span.start), len(ends))
        ends[lane : lane + 1] = [span.end]
        seat_by_life.append((place, lane))
    seats = sorted(set(seat_by_life), key=lambda seat: (_by_number(seat[0]), seat[1]))
    bars, labels = [], []
    for span, seat in zip(servers, seat_by_life, strict=True):
        row = seats.index(seat)
        start, middle, end = since(span.start), since(_up(span)[0]), since(span.end)
        bars.append(Bar(row=row, lane=0, lanes=1, kind="starting", start=start, end=middle))
        if end > middle:
            bars.append(Bar(row=row, lane=0, lanes=1, kind="ready", start=middle, end=end))
        labels.append(Label(row=row, text=span.server or span.name, start=start, end=end))
        lanes: list[float] = []
        placed = []
        for parts in _of_life(sweep, span):
            lane = next((index for index, until in enumerate(lanes) if until <= parts[0][1]), len(lanes))
            lanes[lane : lane + 1] = [parts[-1][2]]
            placed += [(lane, *part) for part in parts]
        bars += [
            Bar(row=row, lane=lane, lanes=len(lanes), kind=kind, start=since(begins), end=since(ends))
            for lane, kind, begins, ends in placed
        ]
    end_s = max(1.0, *(bar.end for bar in bars))
    rows = [f"{place} · {lane + 1}" for place, lane in seats]
    return _drawn("the timeline", trouble, partial(timeline_chart, bars, labels, rows, end_s))


def _places(servers: Sequence[Span]) -> list[str]:
    """Where each server was, in words that people know: hosts, or numbered nodes where the timeline does not tell."""
    nodes = [span.on.split(", ") if span.on else [] for span in servers]
    hosts = {
        node: host
        for span, of in zip(servers, nodes, strict=True)
        for node, host in zip(of, span.host.split(", ") if span.host else (), strict=False)
    }
    short = {host: host if re.fullmatch(r"[\d.]+", host) else host.split(".")[0] for host in hosts.values()}
    if len(set(short.values())) < len(short):
        short = {host: host for host in short}
    unknown = [node for node in dict.fromkeys(node for of in nodes for node in of) if node not in hosts]
    names = {node: short[host] for node, host in hosts.items()}
    names |= {node: f"node {number}" for number, node in enumerate(unknown, start=1)}
    return [", ".join(names[node] for node in of) or "elsewhere" for of in nodes]


def _by_number(text: str) -> list[tuple[str, int]]:
    """To sort `node 2` before `node 10`."""
    return [(words, int(digits or 0)) for words, digits in re.findall(r"(\D*)(\d*)", text)]


def _up(server: Span) -> tuple[float, float]:
    """From when to when it could answer; nothing of its life where it never was ready."""
    return (server.end if server.ready is None else server.ready), server.end


def _of_life(sweep: Sweep, server: Span) -> list[list[tuple[str, float, float]]]:
    """Of each cell that ran during a server's life: (`waiting` or `cell`, from, to), in order and within that life.

    It waits while no server of its model is ready.
    """
    others = [_up(span) for span in sweep.timeline.servers if span.server == server.server and span is not server]
    ready, end = _up(server)
    found = []
    for cell in sweep.timeline.cells:
        if _entry(sweep, cell.name.split("/", 1)[0]) != server.server:
            continue
        waits = [(max(cell.start, server.start), min(cell.end, ready))]
        for begins, ends in others:
            if begins < ends:
                waits = [part for a, b in waits for part in ((a, min(b, begins)), (max(a, ends), b))]
        parts = [("waiting", a, b) for a, b in waits if a < b]
        if (begins := max(cell.start, ready)) < (ends := min(cell.end, end)):
            parts.append(("cell", begins, ends))
        if parts:
            found.append(parts)
    return found


def _facts(sweep: Sweep, model: str) -> Facts:
    asked = asked_of(sweep, model)
    records = [r for r in sweep.records if r.model == model and r.status is Status.DONE]
    methods = Counter[str]()
    for record in records:
        methods.update(record.settings.get("methods", {}))
    templates = {str(sha)[:12] for r in records if (sha := r.settings.get("chat_template_sha"))}
    size = billions(sweep, model)
    return Facts(
        model=model,
        path=str(asked.get("path") or asked.get("url") or ""),
        commit=str(_plan(sweep).get("models", {}).get(model, {}).get("commit") or "")[:12],
        dtype=str(asked.get("dtype") or ""),
        quantization=quantization(sweep, model),
        chat=f"template {', '.join(sorted(templates))}" if templates else "yes" if asked.get("chat") else "",
        billions="" if size is None else sized(size),
        methods=", ".join(f"{name} {count:,}" for name, count in methods.most_common()),
    )


def _plan(sweep: Sweep) -> Mapping[str, Any]:
    plan: Mapping[str, Any] = msgspec.json.decode(sweep.directory.plan.read_bytes())
    return plan


def _commands(sweep: Sweep) -> tuple[tuple[str, str], ...]:
    servers = _plan(sweep).get("servers", {})
    return tuple((name, " ".join(server.get("command") or ())) for name, server in servers.items())


def _versions(records: Iterable[Record]) -> tuple[tuple[str, int], ...]:
    """Which versions computed how many cells, most first."""
    counted = Counter(", ".join(f"{name} {v}" for name, v in r.versions.items()) for r in records if r.versions)
    return tuple(counted.most_common())


def _comparison_table(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Names once, then a row of numbers for each comparison; as page.js reads it."""
    names: dict[str, dict[Any, int]] = {key: {} for key in ("models", "columns", "tests", "notes", "chances")}

    def number(kind: str, value: Any) -> int:
        return names[kind].setdefault(value, len(names[kind]))

    def lean(value: float) -> float | None:
        return float(f"{value:.6g}") if value == value and abs(value) != float("inf") else None

    rows = [
        [
            number("columns", (c.task if c.subtask == c.task else f"{c.task} ({c.subtask})", c.metric, c.filter)),
            number("models", c.model_a),
            number("models", c.model_b),
            c.n,
            c.unpaired,
            *(lean(v) for v in (c.value_a, c.value_b, c.difference, c.low, c.high)),
            number("chances", chance(c.p_adjusted)),
            lean(c.detectable),
            number("tests", c.test),
            [number("notes", note) for note in c.notes],
            {"better": 1, "worse": -1, "differs": 2}.get(c.verdict, 0),
        ]
        for c in comparisons
    ]
    return {"rows": rows, **{key: list(known) for key, known in names.items()}}


def _packed(content: Any) -> str:
    return base64.b64encode(gzip.compress(msgspec.json.encode(content), mtime=0)).decode()


def _rendered(view: _View) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chance"] = chance
    script = (TEMPLATES / "page.js").read_text()
    return environment.get_template("page.html").render(
        v=view,
        style=Markup((TEMPLATES / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
