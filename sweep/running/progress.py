"""The terminal while a sweep runs: a live view where there is a screen, plain lines with a time where there is none.

It shows what the driver tells it and decides nothing. A terminal that goes away costs the view, never the sweep.
"""

import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from sweep.record import Record, Status
from sweep.results.report import caveats, duration, figure, reason

PROGRESS_EVERY_S = 15.0
"""Between two plain lines about one thing in one state: the log of a night stays readable."""

TOTALS_EVERY_S = 60.0
"""Between two plain lines about the sweep as a whole."""

_REFRESH_PER_S = 4
_VIEW_WIDTH = 110
"""The view is no wider, so that a wide window can be made narrower without breaking lines on the screen in two; what
is broken in two is redrawn below its own remains."""
_BAR_WIDTH = 24
_BAR_FROM_WIDTH = 80
"""Narrower screens show a percentage."""
_METRICS_SHOWN = 3
"""In the line of a finished cell; all are in the table."""

_QUIET = ("queued", "stopped", "failed")
"""Servers in these states fold into one line when the screen is too low for all models."""
WAITING = "waiting for its server"
_AT_WORK = ("loading", WAITING, "running", "scoring")
_ENDED = tuple(Status)
_STATE_STYLES = {"ready": "green", "starting": "yellow", "lost": "red", "failed": "red"}
_LEVEL_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "bold red"}


@dataclass(frozen=True, kw_only=True)
class _Server:
    since_s: float
    """When this state began, on the terminal's clock."""
    state: str = "queued"
    detail: str = ""
    printed_s: float = 0.0
    """When a plain line last spoke of it."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    state: str = "waiting"
    done: int = 0
    total: int = 0
    reused: int = 0
    rate: float = 0.0
    live: str = ""
    printed_s: float = 0.0


class Terminal:
    """What the driver says about servers and cells, on the screen; `with Terminal(...)` draws the view and removes it.

    One thread calls its methods (logging may come from any).
    """

    def __init__(
        self,
        *,
        models: Sequence[str],
        cells: Sequence[str],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or _stdout()
        self.log_handler: logging.Handler = _LogHandler(self)
        """For a logger whose records shall appear above the live view instead of tearing it."""
        self._clock = clock
        self._view = _View(models, cells, clock)
        self._live: Live | None = None
        self._totals_s = clock()
        """When a plain line last told them."""

    def __enter__(self) -> Self:
        if self.console.is_interactive:
            self._live = Live(self._view, console=self.console, refresh_per_second=_REFRESH_PER_S, transient=True)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the live view away, its totals stay as a line; a second call changes nothing."""
        if self._live is None:
            return
        live, self._live = self._live, None
        with contextlib.suppress(OSError):
            live.stop()
        self._view.overall = ""
        self._print(self._view.totals())

    def server(self, model: str, state: str, detail: str = "") -> None:
        """The server of `model` is queued, starting, ready, lost, failed or stopped; `detail` says more in short."""
        known, now = self._view.servers[model], self._clock()
        changed = state != known.state
        if self.console.is_interactive:
            # The view shows every state, but the reason of a loss must not vanish with the next one.
            due = changed and state in ("lost", "failed")
        else:
            due = changed or (detail != known.detail and now - known.printed_s >= PROGRESS_EVERY_S)
        if due:
            self._print(_joined(", ", f"server {model}: {state}", detail), style=_STATE_STYLES.get(state, ""))
        self._view.servers[model] = _Server(
            since_s=now if changed else known.since_s,
            state=state,
            detail=detail,
            printed_s=now if due else known.printed_s,
        )

    def cell(
        self,
        key: str,
        *,
        state: str,
        done: int = 0,
        total: int = 0,
        reused: int = 0,
        rate: float = 0.0,
        live: str = "",
    ) -> None:
        """The cell `model/task` is waiting, loading, waiting for its server (WAITING), running or scoring.

        `done` of `total` requests have an answer, `reused` of these came from the store; `rate` is how many servers
        answer in a second now, 0 while that is not known; `live` is a number of the documents that are done, in words.
        """
        known, now = self._view.cells[key], self._clock()
        cell = _Cell(
            state=state, done=done, total=total, reused=reused, rate=rate, live=live, printed_s=known.printed_s
        )
        due = state != known.state or (done != known.done and now - known.printed_s >= PROGRESS_EVERY_S)
        if due and not self.console.is_interactive:
            self._print(_joined("  ", f"{key}: {state}", *_figures(cell)))
            cell = replace(cell, printed_s=now)
        self._view.failed.discard(key)
        self._view.cells[key] = cell

    def finished(self, record: Record, done_cells: int, total_cells: int) -> None:
        """The cell of `record` is over; `done_cells` of the sweep's `total_cells` have results now."""
        key = f"{record.model}/{record.task}"
        self._view.done_cells, self._view.total_cells = done_cells, total_cells
        self._view.cells[key] = replace(self._view.cells[key], state=record.status.value)
        if record.status is Status.FAILED:
            self._view.failed.add(key)
            self._print(f"FAILED {key}: {reason(record)}", style="red")
            return
        self._view.failed.discard(key)
        counts = record.counts
        effort = _joined(", ", f"{counts.requests} requests", _reused(counts.reused), f"{record.wall_s:.1f} s")
        self._print(f"done {key}  {_scores(record)} ({effort})", style="green")
        for caveat in caveats(record):
            self._view.warnings += 1
            self._print(f"  warning for {key}: {caveat}", style="yellow")

    def overall(self, *, servers: Mapping[str, int], rate: float, left_s: float | None) -> None:
        """How the sweep stands: `servers` by state, requests answered in a second, and what is expected to be left;
        None while there is no ground to expect anything."""
        self._view.overall = _joined(
            "  ",
            f"about {duration(left_s)} left" if left_s is not None else "",
            f"{rate:.1f}/s" if rate > 0 else "",
            ", ".join(f"{count} {state}" for state, count in servers.items()),
        )
        now = self._clock()
        if not self.console.is_interactive and self._view.overall and now - self._totals_s >= TOTALS_EVERY_S:
            self._totals_s = now
            self._print(self._view.totals())

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._print(text)

    def _print(self, text: str, *, style: str = "") -> None:
        """Above the live view, or with the time of day where there is no screen; never wrapped, never fails."""
        stamp = "" if self.console.is_interactive else time.strftime("%H:%M:%S ")
        # What servers and harness say may hold escape sequences, which would reach a log file as they are.
        line = Text(stamp) + Text.from_ansi(text, style=style)
        try:
            self.console.print(line, soft_wrap=True)
        except OSError:
            # Nobody reads any more, and rich would try all that is unwritten again with each new line.
            self.console.quiet = True


class _View:
    """The state of the sweep, drawn to the size that the screen has at that moment.

    The live view draws it from a thread of its own while the driver's writes. No lock is needed, and none can be
    waited for: entries are frozen and replaced whole, and their keys are all there from the start.
    """

    def __init__(self, models: Sequence[str], cells: Sequence[str], clock: Callable[[], float]) -> None:
        self.servers = {model: _Server(since_s=clock()) for model in models}
        self.cells = {key: _Cell() for key in cells}
        self.failed: set[str] = set()
        self.done_cells = 0
        self.total_cells = len(cells)
        self.warnings = 0
        """Lines about what could bend a number, or that something is not as it should be."""
        self.overall = ""
        self._clock = clock
        self._started_s = clock()

    def totals(self) -> str:
        """`3 of 12 cells done, 1 failed  4:05  about 9:30 left  31.5/s  2 ready, 1 starting  4 warnings`."""
        counts = _joined(
            ", ",
            f"{self.done_cells} of {self.total_cells} cells done",
            f"{len(self.failed)} failed" if self.failed else "",
        )
        warnings = f"{self.warnings} warning{'' if self.warnings == 1 else 's'}"
        took = duration(self._clock() - self._started_s)
        return _joined("  ", counts, took, self.overall, warnings if self.warnings else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One line stays free for the cursor, and a full last column would make some terminals break the line.
        yield from self._lines(min(options.max_width - 1, _VIEW_WIDTH), options.size.height - 1)

    def _lines(self, width: int, height: int) -> list[Text]:
        """At most `height` lines; the less room there is, the more is folded, and the totals always come last."""
        cells_by_model: dict[str, list[_Cell]] = {model: [] for model in self.servers}
        at_work: dict[str, dict[str, _Cell]] = {model: {} for model in self.servers}
        for key, cell in self.cells.items():
            model, _, task = key.partition("/")
            cells_by_model[model].append(cell)
            if cell.state in _AT_WORK:
                at_work[model][task] = cell
        names = [*self.servers, *(f"  {task}" for cells in at_work.values() for task in cells)]
        name_width = min(max(map(cell_len, names), default=0), width // 3)

        def row(name: str, *parts: str, style: str = "") -> Text:
            shown = Text(name)
            shown.truncate(name_width, overflow="ellipsis", pad=True)
            line = shown + Text("  " + _joined("  ", *parts), style=style)
            line.truncate(width, overflow="ellipsis")
            return line

        def model_row(model: str, *parts: str) -> Text:
            server, cells = self.servers[model], cells_by_model[model]
            state = f"{server.state} {duration(self._clock() - server.since_s)}"
            ended = sum(cell.state in _ENDED for cell in cells)
            ends = f"{ended}/{len(cells)} cells"
            return row(
                model, f"{state:<14}", f"{ends:<11}", *parts, server.detail, style=_STATE_STYLES.get(server.state, "")
            )

        def block(model: str) -> list[Text]:
            rows = [row(f"  {task}", _bar(cell, width), *_figures(cell)) for task, cell in at_work[model].items()]
            return [model_row(model), *rows]

        def folded(models: Sequence[str]) -> list[Text]:
            counts = Counter(self.servers[model].state for model in models)
            text = ", ".join(f"{count} {state}" for state, count in counts.items())
            return [row("…", f"{len(models)} more models: {text}", style="dim")] if models else []

        room = height - 1
        busy = [model for model in self.servers if at_work[model] or self.servers[model].state not in _QUIET]
        quiet = [model for model in self.servers if model not in busy]
        lines = [line for model in self.servers for line in block(model)]
        if len(lines) > room:
            lines = [line for model in busy for line in block(model)] + folded(quiet)
        if len(lines) > room:
            fit = len(busy) if len(busy) + bool(quiet) <= room else max(0, room - 1)
            brief = [model_row(model, *_figures(_together(at_work[model].values()))) for model in busy[:fit]]
            lines = brief + folded(busy[fit:] + quiet)
        totals = Text(self.totals(), style="bold")
        totals.truncate(width, overflow="ellipsis")
        return [*lines[: max(0, room)], totals]


class _LogHandler(logging.Handler):
    """Log records as lines above the live view."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__()
        self._terminal = terminal
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._terminal._view.warnings += record.levelno >= logging.WARNING
            self._terminal._print(self.format(record), style=_LEVEL_STYLES.get(record.levelno, ""))
        except Exception:  # noqa: BLE001 - as in every handler: a bad log call must not fail what it speaks of
            self.handleError(record)


class _Stdout(Console):
    """Standard output that may lose its reader: Ctrl-C ends `| tee log` first, while the sweep is still tidying up."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


def _stdout() -> Console:
    # rich takes FORCE_COLOR, which CI systems set, for a terminal; a view drawn into a log file is of no use.
    return _Stdout(highlight=False, force_interactive=None if sys.stdout.isatty() else False)


def _scores(record: Record) -> str:
    """The first numbers of what the cell asked for, without the subtasks of a group."""
    asked = [score for score in record.scores if not score.depth]
    several = len({score.task for score in asked}) > 1
    shown = []
    for score in asked[:_METRICS_SHOWN]:
        metric = score.metric if score.filter == "none" else f"{score.metric},{score.filter}"
        shown.append(f"{score.task}: {metric} {figure(score)}" if several else f"{metric} {figure(score)}")
    more = len(asked) - len(shown)
    return _joined(", ", *shown, f"{more} more" if more else "")


def _figures(cell: _Cell) -> list[str]:
    """Requests done, rate, time left, live estimate, reused: what is known of them, the most telling first."""
    if not cell.total:
        return []
    # Time left is a guess; without a rate there is nothing to guess from.
    guess = cell.state == "running" and cell.rate > 0 and cell.done < cell.total
    return [
        f"{cell.done}/{cell.total}",
        f"{cell.rate:.1f}/s" if cell.rate > 0 else "",
        f"{duration((cell.total - cell.done) / cell.rate)} left" if guess else "",
        cell.live,
        _reused(cell.reused),
    ]


def _together(cells: Collection[_Cell]) -> _Cell:
    """The cells of one model as if they were one; running when all of them are, so that its time left holds for all."""
    states = {cell.state for cell in cells}
    return _Cell(
        state=states.pop() if len(states) == 1 else "loading",
        done=sum(cell.done for cell in cells),
        total=sum(cell.total for cell in cells),
        reused=sum(cell.reused for cell in cells),
        rate=sum(cell.rate for cell in cells),
    )


def _bar(cell: _Cell, width: int) -> str:
    if cell.state != "running" or not cell.total:
        return cell.state
    share = min(1.0, cell.done / cell.total)
    if width < _BAR_FROM_WIDTH:
        return f"{share:4.0%}"
    full = int(share * _BAR_WIDTH)
    return "━" * full + "─" * (_BAR_WIDTH - full)


def _reused(count: int) -> str:
    return f"{count} reused" if count else ""


def _joined(gap: str, *parts: str) -> str:
    """The parts that are not empty."""
    return gap.join(part for part in parts if part)
