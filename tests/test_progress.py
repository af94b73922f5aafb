"""The terminal: a view that fits every screen, clean lines without one, and no guess without a ground."""

import io
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from sweep.record import Counts, Record, Score, Status
from sweep.running.progress import PROGRESS_EVERY_S, TOTALS_EVERY_S, Terminal

ACC = Score(
    task="gsm8k",
    version="3",
    filter="none",
    num_fewshot=5,
    metric="acc",
    value=0.8125,
    stderr=0.0437,
    higher_is_better=True,
    samples=80,
)
DONE = Record(
    model="m",
    task="gsm8k",
    fingerprint="f",
    status=Status.DONE,
    scores=(ACC,),
    counts=Counts(requests=80, asked=68, reused=12),
    wall_s=3.4,
)
FAILED = Record(model="m", task="mmlu", fingerprint="f", status=Status.FAILED, error="no data\nlong log")


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Screen:
    """A terminal on a console whose output can be read."""

    models: list[str]
    tasks: list[str] = field(default_factory=lambda: ["gsm8k", "mmlu"])
    live: bool = False
    width: int = 80
    height: int = 25
    environ: dict[str, str] = field(default_factory=lambda: {"TERM": "xterm-256color"})

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.console = Console(
            file=io.StringIO(),
            force_terminal=self.live,
            width=self.width,
            height=self.height,
            _environ=self.environ,
        )
        cells = [f"{model}/{task}" for model in self.models for task in self.tasks]
        self.terminal = Terminal(models=self.models, cells=cells, console=self.console, clock=self.clock)

    @property
    def output(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()

    @property
    def said(self) -> list[str]:
        """The plain lines without their time stamps."""
        return [line.split(" ", 1)[1] for line in self.output.splitlines()]

    def view(self) -> list[str]:
        """What the live view would show now, line by line."""
        lines = self.console.render_lines(self.terminal._view, pad=False)
        return ["".join(segment.text for segment in line) for line in lines]


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("test_progress")
    logger.propagate = False
    yield logger
    logger.handlers.clear()


def test_without_a_screen_lines_are_plain_stamped_and_unbroken() -> None:
    screen = Screen(["m"], width=40, environ={"TERM": "dumb"})
    with screen.terminal as terminal:
        terminal.server("m", "starting", "loading weights")
        terminal.cell("m/gsm8k", state="running", done=1, total=80, rate=2.0)
        terminal.finished(DONE, 1, 2)
        terminal.finished(FAILED, 1, 2)
        terminal.note("a word " * 20 + "\x1b[31mred\x1b[0m [bold]")
    assert "\x1b" not in screen.output
    assert screen.said == [
        "server m: starting, loading weights",
        "m/gsm8k: running  1/80  2.0/s  0:40 left",
        "done m/gsm8k  acc 0.8125 ± 0.0437 (80 requests, 12 reused, 3.4 s)",
        "FAILED m/mmlu: no data",
        "a word " * 20 + "red [bold]",
    ]
    assert all(time.strptime(line.split(" ")[0], "%H:%M:%S") for line in screen.output.splitlines())


def test_plain_lines_come_when_something_changed_and_progress_only_now_and_then() -> None:
    screen = Screen(["m"])
    with screen.terminal as terminal:
        for second in range(40):
            screen.clock.now = 100.0 + second
            terminal.server("m", "ready")
            terminal.cell("m/gsm8k", state="running", done=second, total=80)
            terminal.cell("m/mmlu", state="waiting")
    assert screen.said == [
        "server m: ready",
        "m/gsm8k: running  0/80",
        f"m/gsm8k: running  {PROGRESS_EVERY_S:.0f}/80",
        f"m/gsm8k: running  {2 * PROGRESS_EVERY_S:.0f}/80",
    ]


def test_a_cell_that_stands_still_is_not_repeated() -> None:
    screen = Screen(["m"])
    with screen.terminal as terminal:
        for second in range(0, 600, 10):
            screen.clock.now = 100.0 + second
            terminal.cell("m/gsm8k", state="running", done=7, total=80)
    assert screen.said == ["m/gsm8k: running  7/80"]


@pytest.mark.parametrize("environ", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_a_dumb_terminal_gets_plain_lines(environ: dict[str, str]) -> None:
    screen = Screen(["m"], live=True, environ=environ)
    with screen.terminal as terminal:
        terminal.finished(FAILED, 0, 2)
    assert screen.said == ["FAILED m/mmlu: no data"]
    assert "\x1b" not in screen.output


def test_no_color_leaves_the_view_without_colours() -> None:
    screen = Screen(["m"], live=True, environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    with screen.terminal as terminal:
        terminal.server("m", "ready")
        terminal.finished(FAILED, 0, 2)
    assert "FAILED m/mmlu: no data" in screen.output
    assert not any(f"\x1b[{colour}m" in screen.output for colour in range(30, 38))


def test_everything_that_bends_a_finished_cell_is_said_with_it() -> None:
    screen = Screen(["m"])
    with screen.terminal as terminal:
        terminal.finished(
            Record(
                model="m",
                task="gsm8k",
                fingerprint="f",
                status=Status.DONE,
                scores=(ACC,),
                counts=Counts(requests=80, length_stopped=2),
                warnings=("branch moved",),
            ),
            1,
            2,
        )
    assert screen.said[1:] == [
        "  warning for m/gsm8k: 2 of 80 requests were stopped by the token limit",
        "  warning for m/gsm8k: branch moved",
    ]


def test_a_finished_cell_names_filters_and_tasks_and_counts_what_it_leaves_out() -> None:
    screen = Screen(["m"])
    scores = tuple(
        Score(
            task=task,
            version="1",
            filter=name,
            num_fewshot=0,
            metric="acc",
            value=0.5,
            stderr=None,
            higher_is_better=True,
            samples=2,
            depth=depth,
        )
        for task, name, depth in [("a", "none", 0), ("a", "x", 0), ("a_1", "x", 1), ("b", "x", 0), ("b", "y", 0)]
    )
    with screen.terminal as terminal:
        terminal.finished(Record(model="m", task="mmlu", fingerprint="f", status=Status.DONE, scores=scores), 1, 2)
    value = "0.5000 ± N/A"
    assert screen.said == [
        f"done m/mmlu  a: acc {value}, a: acc,x {value}, b: acc,x {value}, 1 more (0 requests, 0.0 s)"
    ]


def test_the_view_shows_servers_cells_rate_and_time_left() -> None:
    screen = Screen(["m", "other"], live=True, width=100)
    screen.terminal.server("m", "ready", "port 8000")
    screen.terminal.cell("m/gsm8k", state="running", done=40, total=80, reused=12, rate=2.5)
    screen.terminal.cell("m/mmlu", state="loading")
    screen.clock.now += 65
    assert screen.view() == [
        "m        ready 1:05      0/2 cells    port 8000",
        "  gsm8k  ━━━━━━━━━━━━────────────  40/80  2.5/s  0:16 left  12 reused",
        "  mmlu   loading",
        "other    queued 1:05     0/2 cells  ",
        "0 of 4 cells done  1:05",
    ]


def test_a_running_cell_shows_its_first_metric_so_far() -> None:
    screen = Screen(["m"], live=True, width=100)
    screen.terminal.cell("m/gsm8k", state="running", done=40, total=80, reused=12, live="acc 0.613 of 39 done")
    assert screen.view()[1] == "  gsm8k  ━━━━━━━━━━━━────────────  40/80  acc 0.613 of 39 done  12 reused"


def test_there_is_no_time_left_before_there_is_a_rate() -> None:
    screen = Screen(["m"], live=True)
    for cell in [{"done": 0, "rate": 0.0}, {"done": 80, "rate": 9.0}]:
        screen.terminal.cell("m/gsm8k", state="running", total=80, **cell)
        assert not any("left" in line for line in screen.view())
    screen.terminal.cell("m/gsm8k", state="scoring", done=40, total=80, rate=9.0)
    assert not any("left" in line for line in screen.view())


def test_the_last_line_tells_what_is_left_how_fast_it_goes_the_servers_and_the_warnings(log: logging.Logger) -> None:
    screen = Screen(["m"], live=True, width=120)
    screen.terminal.overall(servers={"ready": 2, "starting": 1}, rate=31.52, left_s=None)
    assert screen.view()[-1] == "0 of 2 cells done  0:00  31.5/s  2 ready, 1 starting"
    log.addHandler(screen.terminal.log_handler)
    log.info("nothing of note")
    log.warning("the disk is slow")
    screen.terminal.overall(servers={"ready": 3}, rate=31.52, left_s=3700.0)
    assert screen.view()[-1] == "0 of 2 cells done  0:00  about 1:01:40 left  31.5/s  3 ready  1 warning"
    cut = replace(DONE, counts=Counts(requests=80, truncated=2, empty=1))
    screen.terminal.finished(cut, 1, 2)
    assert screen.view()[-1].endswith("3 ready  3 warnings")


def test_without_a_screen_the_totals_are_told_once_a_minute() -> None:
    screen = Screen(["m"])
    with screen.terminal as terminal:
        for second in range(int(2 * TOTALS_EVERY_S) + 1):
            screen.clock.now = 100.0 + second
            terminal.overall(servers={"ready": 1}, rate=2.0, left_s=600.0 - second)
    assert screen.said == [
        "0 of 2 cells done  1:00  about 9:00 left  2.0/s  1 ready",
        "0 of 2 cells done  2:00  about 8:00 left  2.0/s  1 ready",
    ]


def test_the_line_that_stays_expects_nothing_any_more() -> None:
    screen = Screen(["m"], live=True)
    with screen.terminal as terminal:
        terminal.overall(servers={"ready": 1}, rate=2.0, left_s=600.0)
    assert screen.output.endswith("0 of 2 cells done  0:00\n")


def test_a_finished_cell_leaves_the_view_and_is_counted() -> None:
    screen = Screen(["m"], live=True)
    screen.terminal.cell("m/gsm8k", state="running", done=40, total=80)
    screen.terminal.cell("m/mmlu", state="loading")
    screen.terminal.finished(DONE, 1, 2)
    screen.terminal.finished(FAILED, 1, 2)
    assert [line.split() for line in screen.view()] == [
        ["m", "queued", "0:00", "2/2", "cells"],
        ["1", "of", "2", "cells", "done,", "1", "failed", "0:00"],
    ]


def test_a_failed_cell_that_runs_again_is_no_longer_counted_as_failed() -> None:
    screen = Screen(["m"], live=True)
    screen.terminal.finished(FAILED, 0, 2)
    screen.terminal.cell("m/mmlu", state="running", done=1, total=2)
    assert screen.view()[-1] == "0 of 2 cells done  0:00"


@pytest.mark.parametrize("width", [20, 60, 200])
@pytest.mark.parametrize("height", [1, 2, 3, 10, 25, 62, 200])
def test_the_view_fits_any_screen_with_sixty_models(width: int, height: int) -> None:
    models = [f"qwen2-5-{n}b-instruct-with-a-long-name" for n in range(60)]
    screen = Screen(models, live=True, width=width, height=height)
    for number, model in enumerate(models):
        screen.terminal.server(model, ["ready", "queued", "stopped"][number % 3], "some detail")
        if number % 3 == 0:
            screen.terminal.cell(f"{model}/gsm8k", state="running", done=10, total=123456, rate=1234.5, reused=99999)
            screen.terminal.cell(f"{model}/mmlu", state="loading")
    view = screen.view()
    assert len(view) <= max(1, height - 1)
    assert all(cell_len(line) < width for line in view)
    assert "0 of 120 cells"[: width - 2] in view[-1]
    if height >= 3:
        assert len(view) >= min(height - 1, 22)


def test_a_low_screen_folds_what_is_quiet_and_then_the_cells() -> None:
    models = [f"m{n}" for n in range(8)]
    screen = Screen(models, live=True, width=120, height=10)
    for model in models[:3]:
        screen.terminal.server(model, "ready")
        screen.terminal.cell(f"{model}/gsm8k", state="running", done=10, total=20, rate=1.0)
    assert [line.split()[0] for line in screen.view()] == ["m0", "gsm8k", "m1", "gsm8k", "m2", "gsm8k", "…", "0"]
    assert "5 more models: 5 queued" in screen.view()[6]
    for model in models[:3]:
        screen.terminal.cell(f"{model}/mmlu", state="running", done=5, total=20, rate=1.0)
    assert [line.split()[0] for line in screen.view()] == ["m0", "m1", "m2", "…", "0"]
    assert "15/40  2.0/s  0:12 left" in screen.view()[0]
    for model in models:
        screen.terminal.server(model, "ready")
        screen.terminal.cell(f"{model}/gsm8k", state="running", done=10, total=20)
    screen.console.height = 6
    assert [line.split()[0] for line in screen.view()] == ["m0", "m1", "m2", "…", "0"]
    assert "5 more models: 5 ready" in screen.view()[3]


def test_a_resized_screen_is_filled_to_its_new_size() -> None:
    screen = Screen(["m"], live=True, width=100)
    screen.terminal.cell("m/gsm8k", state="running", done=20, total=80)
    assert "━" in screen.view()[1]
    screen.console.width = 50
    assert " 25%  20/80" in screen.view()[1]


@pytest.mark.parametrize("width", [60, 200])
def test_the_live_view_is_drawn_and_taken_away_again(width: int) -> None:
    screen = Screen([f"m{n}" for n in range(60)], live=True, width=width)
    with screen.terminal as terminal:
        assert "0 of 120 cells done" in screen.output
        terminal.note("a line that stays")
    assert "a line that stays" in screen.output
    assert screen.output.endswith("0 of 120 cells done  0:00\n")
    assert screen.output.count("\x1b[?25l") == screen.output.count("\x1b[?25h") == 1  # cursor hidden, shown again
    before = screen.output
    screen.terminal.close()
    assert screen.output == before


def test_the_live_view_ends_with_the_sweep_whatever_ends_it() -> None:
    screen = Screen(["m"], live=True)
    with pytest.raises(KeyboardInterrupt), screen.terminal:
        raise KeyboardInterrupt
    assert "\x1b[?25h" in screen.output


def test_why_a_server_was_lost_stays_above_the_view() -> None:
    screen = Screen(["m"], live=True)
    with screen.terminal as terminal:
        terminal.server("m", "starting")
        terminal.server("m", "lost", "out of memory")
        terminal.server("m", "starting")
    assert screen.output.count("server m: lost, out of memory") == 1
    assert "server m: starting" not in screen.output


@pytest.mark.parametrize("live", [True, False])
def test_log_records_go_through_the_same_console(live: bool, log: logging.Logger) -> None:
    screen = Screen(["m"], live=live, width=40)
    log.addHandler(screen.terminal.log_handler)
    with screen.terminal:
        log.warning("server %s is slow and says so in more than forty columns", "m")
    said = "WARNING test_progress: server m is slow and says so in more than forty columns"
    assert said in screen.output
    if not live:
        assert screen.said == [said]


def test_a_terminal_that_went_away_does_not_stop_the_sweep() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    terminal = Terminal(models=["m"], cells=["m/gsm8k"], console=Console(file=Gone(), force_terminal=False))
    with terminal:
        terminal.note("lost")
        terminal.finished(DONE, 1, 1)


def test_color_asked_for_in_a_log_file_does_not_draw_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    with Terminal(models=["m"], cells=["m/gsm8k"]) as terminal:
        terminal.server("m", "queued")
        terminal.note("hello")
    assert file.getvalue().endswith("hello\n")
    assert "\x1b[?25l" not in file.getvalue()
