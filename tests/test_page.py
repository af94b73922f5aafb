"""The page in a real browser: what it shows, that it asks nobody for anything, that only its own script runs."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import expect, sync_playwright

from sweep.record import Counts, Record, Score, Status
from sweep.results.answers import blocks
from sweep.results.charts import Bar, Label, Point, task_chart, timeline_chart
from sweep.results.compare import compare, leaders, wilson
from sweep.results.page import page
from sweep.results.reading import Sample, Sweep, read_sweep
from sweep.results.references import Published
from sweep.results.report import chance
from sweep.results.timeline import Event, spans
from tests.synthetic import NASTY, write

CHROMIUM = shutil.which("chromium")

expect.set_options(timeout=30_000)
"""Conditions are waited for with `expect`: the policy of the page forbids `wait_for_function`, which evaluates text."""

USABLE_S = 3.0
"""The promise: forty models, thirty tasks and 100,000 samples are ready to be used so soon."""

BYTES = 20_000_000

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on this machine: the page is not opened")


@dataclass
class Opened:
    """A page in the browser, and all that a reader must never see of it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    usable_s: float = 0.0
    computed_s: float = 0.0
    """Of the processor, by the page's own process until it was usable: what a machine that is free would take."""

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


def opened(browser: Any, path: Path, **context: Any) -> Opened:
    """The page, once its script has run."""
    tab = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context).new_page()
    tab.set_default_timeout(60_000)
    found = Opened(page=tab)
    tab.on("console", lambda m: found.errors.append(m.text) if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: found.errors.append(str(error)))
    tab.on("request", lambda request: found.requests.append(request.url))
    metrics = tab.context.new_cdp_session(tab)
    metrics.send("Performance.enable")
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready=yes]", state="attached")
    found.usable_s = tab.evaluate("performance.now()") / 1000
    figures = metrics.send("Performance.getMetrics")["metrics"]
    found.computed_s = next(figure["value"] for figure in figures if figure["name"] == "ProcessTime")
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    directory = write(tmp_path_factory.mktemp("runs") / "demo-like", models=4, tasks=6, samples=900)
    return read_sweep(directory.root)


def references(sweep: Sweep) -> list[Published]:
    one = Published(
        model=sweep.models[1],
        task=sweep.tasks[0],
        subtask=sweep.tasks[0],
        metric="acc",
        filter="none",
        value=0.5,
        stderr=None,
        source="a <paper>",
        settings="2-shot",
        differs=(),
    )
    return [one, replace(one, model=sweep.models[3], settings="25-shot", differs=("25 shots there, 2 here",))]


@pytest.fixture(scope="module")
def small_page(small: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(small, compare(small), references(small)))
    return path


@pytest.fixture
def view(browser: Any, small_page: Path) -> Iterator[Opened]:
    found = opened(browser, small_page)
    yield found
    assert found.errors == []
    assert found.requests == [small_page.as_uri()]
    found.page.context.close()


def number(text: str) -> float:
    return float(re.match(r"[-−+]?\d+(\.\d+)?", text)[0].replace("−", "-"))  # type: ignore[index]


# --- Without a browser -----------------------------------------------------------------------------------------------


def test_the_numbers_of_the_leaderboard_are_those_of_the_records(small: Sweep, small_page: Path) -> None:
    text = small_page.read_text()
    for record in small.records:
        for score in record.scores:
            if not score.depth:
                assert f'data-v="{score.value}"' in text
                assert f"{score.value:.4f}" in text


def test_the_same_sweep_makes_the_same_blocks(small: Sweep) -> None:
    assert blocks(small) == blocks(small)


def test_without_samples_no_prompt_and_no_answer_is_in_the_page(small: Sweep) -> None:
    assert 'id="block-0"' in page(small, (), ())
    without = page(small, (), (), samples=False)
    assert 'id="block-' not in without
    assert "made without samples" in without


def test_data_that_must_not_be_shared_is_said_at_the_top(small: Sweep) -> None:
    task = small.tasks[0]
    config = {**small.config, "tasks": {**small.config["tasks"], task: {"share_samples": False}}}
    gated = replace(small, config=config)
    assert "Not for sharing" not in page(small, (), ())
    assert "Not for sharing" in page(gated, (), ())
    assert "Not for sharing" not in page(gated, (), (), samples=False)


def test_data_that_are_known_to_be_gated_are_not_for_sharing_unless_the_sweep_says_so(small: Sweep) -> None:
    def of(**settings: Any) -> str:
        asked = {"task": "gpqa_main_zeroshot", **settings}
        return page(replace(small, config={**small.config, "tasks": {small.tasks[0]: asked}}), (), ())

    assert re.search(rf"holds samples of {small.tasks[0]},.*samples=false", of())
    assert "Not for sharing" not in of(share_samples=True)


def test_a_published_score_that_can_be_compared_stands_in_the_chart_before_others(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Point] = []
    monkeypatch.setattr("sweep.results.page.task_chart", lambda points, _: drawn.extend(points) or "")
    good, other = references(small)
    page(small, (), (replace(other, model=good.model, value=0.9), good, replace(good, value=0.7)), samples=False)
    assert [(point.published, point.comparable) for point in drawn if point.published] == [(0.5, True)]


def test_a_published_score_of_a_subtask_stands_beside_ours(small: Sweep) -> None:
    record = next(r for r in small.records if any(score.depth for score in r.scores))
    score = next(score for score in record.scores if score.depth)
    named = {"model": record.model, "task": record.task, "subtask": score.task, "metric": score.metric}
    one = replace(references(small)[0], **named, value=0.0)
    assert f'<td class="n">+{score.value:.4f}</td>' in page(small, (), (one,), samples=False)


def weights(path: Path, numbers: int) -> None:
    header = msgspec.json.encode({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_parameters_are_counted_once_and_not_in_what_is_no_safetensors_file(small: Sweep, tmp_path: Path) -> None:
    def size() -> str:
        """Of a sweep whose only model lies in the folder, as the page tells it."""
        config = {**small.config, "models": {small.models[0]: {"path": str(tmp_path / str(len(made)))}}}
        html = page(replace(small, config=config, models=small.models[:1], records=()), (), ())
        return re.search(r'<td class="n">([^<]*)</td>', html.split("<h3>Models</h3>")[1])[1]  # type: ignore[index]

    made: list[dict[str, int]] = []
    by_name = size()
    for files, index, expected in (
        ({"model.safetensors": 7_000_000, "consolidated.safetensors": 7_000_000}, (), "7 M"),
        ({"model-1.safetensors": 2_000_000, "model-2.safetensors": 3_000_000}, (), "5 M"),
        ({"a.safetensors": 2_000_000, "model.safetensors": 9_000_000}, ("a.safetensors",), "2 M"),
    ):
        made.append(files)
        folder = tmp_path / str(len(made))
        folder.mkdir()
        for name, numbers in files.items():
            weights(folder / name, numbers)
        if index:
            named = {f"layer.{number}": name for number, name in enumerate(index)}
            (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": named}))
        assert size() == expected
    made.append({})
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    assert size() == by_name


def test_a_model_in_fewer_bits_has_the_parameters_of_the_full_one_and_small_ones_are_counted_in_millions(
    small: Sweep, tmp_path: Path
) -> None:
    asked, scored = {}, [r for r in small.records if r.task == small.tasks[0]][:2]
    for name in ("full", "full-awq", "other"):
        (tmp_path / name).mkdir()
        weights(tmp_path / name / "model.safetensors", 300_000)
        asked[name] = {"path": str(tmp_path / name)}
    (tmp_path / "full-awq" / "config.json").write_text(
        '{"hidden_size": 8, "quantization_config": {"quant_method": "awq"}}'
    )
    weights(tmp_path / "other" / "model.safetensors", 900_000)
    (tmp_path / "other" / "config.json").write_text('{"hidden_size": 8}')
    records = tuple(replace(r, model=name) for r, name in zip(scored, ("full-awq", "other"), strict=True))
    html = page(replace(small, config={"models": asked}, models=tuple(asked), records=records), (), ())
    shown = re.findall(r'<td class="n">([^<]*)</td><td></td><td>([^<]*)</td>', html.split("<h3>Models</h3>")[1])
    assert shown == [("0.3 M", ""), ("0.3 M", "awq"), ("0.9 M", "")]
    assert re.search(r"against parameters: from full-awq \(0.3 M\) with [\d.]+ to other \(0.9 M\)", html)
    assert "parameters, millions (log scale)" in html


def test_what_the_size_does_not_allow_is_counted(small: Sweep) -> None:
    whole = {block.task: block for block in blocks(small)}
    assert not any(block.left_out or block.shortened for block in whole.values())
    tight = {block.task: block for block in blocks(small, budget_bytes=12_000)}
    assert sum(len(block.data) for block in tight.values()) < 12_000 * 4 / 3 * 1.05
    assert sum(block.left_out for block in tight.values()) > 0
    for task, block in tight.items():
        assert block.documents + block.left_out == whole[task].documents


def test_the_documents_of_a_group_are_those_of_its_subtasks_where_all_are_known(small: Sweep) -> None:
    def of(task: str, samples: int | None, depth: int, metric: str = "acc") -> Score:
        known = {"version": "1", "filter": "none", "num_fewshot": 0, "value": 0.5, "stderr": None}
        how = {"task": task, "metric": metric, "samples": samples, "depth": depth, "higher_is_better": True}
        return Score(**{**known, **how})  # type: ignore[arg-type]

    def shown(*scores: Score) -> str:
        cell = Record(model=small.models[0], task="g", fingerprint="", status=Status.DONE, scores=scores)
        html = page(replace(small, records=(cell,), tasks=("g",)), (), (), samples=False)
        row = html.split('<th scope="col" class="n">Documents</th>')[1].split("</tr>")[1]
        return re.findall(r'<td class="n">([^<]*)</td>', row)[1]

    nested = (
        of("g", None, 0),
        of("a", 40, 1),
        of("a", 40, 1, "f1"),
        of("h", None, 1),
        of("b", 900, 2),
        of("c", 100, 2),
    )
    assert shown(*nested) == "1,040"
    assert shown(*nested, of("d", 5, 1, "em"), of("other", 7, 0)) == "1,040"
    assert shown(*nested, of("d", None, 1)) == ""
    assert shown(of("g", None, 0)) == ""


def scored(task: str, values: list[float], depth: int = 0) -> Score:
    """As lm-eval scores documents of these values."""
    mean, n = sum(values) / len(values), len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Score(
        task=task,
        version="1",
        filter="none",
        num_fewshot=0,
        metric="acc",
        value=mean,
        stderr=spread / math.sqrt(n),
        higher_is_better=True,
        samples=n,
        depth=depth,
    )


def group(*subtasks: list[float], by_size: bool) -> tuple[Score, ...]:
    """The error of a group is not what this is about."""
    parts = [scored(f"part{number}", values, depth=1) for number, values in enumerate(subtasks)]
    together = [value for values in subtasks for value in values]
    mean = sum(together) / len(together) if by_size else sum(part.value for part in parts) / len(parts)
    return replace(scored("t", together), value=mean, samples=None), *parts


@dataclass
class Charts:
    """The page of models with these scores on one task: what its chart was asked to draw, and the page itself."""

    small: Sweep
    monkeypatch: pytest.MonkeyPatch

    def of(self, *models: tuple[Score, ...]) -> tuple[list[Point], str]:
        drawn: list[Point] = []
        self.monkeypatch.setattr("sweep.results.page.task_chart", lambda points, _: drawn.extend(points) or "")
        records = [
            Record(model=name, task="t", fingerprint="", status=Status.DONE, scores=scores)
            for name, scores in zip(self.small.models, models, strict=False)
        ]
        html = page(replace(self.small, records=tuple(records), tasks=("t",)), (), (), samples=False)
        (whose,) = re.findall(r'<p class="whose">(.*?)</p>', html)
        return drawn, whose


@pytest.fixture
def charts(small: Sweep, monkeypatch: pytest.MonkeyPatch) -> Charts:
    return Charts(small, monkeypatch)


def test_a_chart_of_right_and_wrong_has_wilsons_intervals_which_stay_within_0_and_1(charts: Charts) -> None:
    (best, good, none), whose = charts.of(
        (scored("t", [1.0] * 39 + [0.0]),), (scored("t", [0.0] * 40),), (scored("t", [1.0] * 40),)
    )
    assert [point.value for point in (best, good, none)] == [1.0, 0.975, 0.0]
    assert (best.low, best.high) == pytest.approx(wilson(40, 40))
    assert (good.low, good.high) == pytest.approx(wilson(39, 40))
    assert (none.low, none.high) == pytest.approx(wilson(0, 40))
    assert good.value + 1.96 * 0.025 > 1 >= good.high
    assert whose == "95 %: Wilson"


def test_a_number_that_is_no_count_of_right_documents_keeps_the_interval_of_its_standard_error(charts: Charts) -> None:
    partly = scored("t", [1.0, 0.5, 0.5, 0.0] * 10)
    perfect = scored("t", [1.0] * 40)
    (first, second), whose = charts.of((partly,), (perfect,))
    assert (first.low, first.high) == (1.0, 1.0), "its documents look like right ones, those of the other do not"
    assert (second.low, second.high) == pytest.approx((0.5 - 1.96 * partly.stderr, 0.5 + 1.96 * partly.stderr))  # type: ignore[operator]
    assert whose == "95 %: ± 1.96 standard errors"


@pytest.mark.parametrize("lost", [{"stderr": None}, {"samples": 1}, {"samples": None}])
def test_what_does_not_tell_how_many_are_right_has_no_interval_of_wilson(charts: Charts, lost: dict[str, Any]) -> None:
    (point,), whose = charts.of((replace(scored("t", [1.0] * 30 + [0.0] * 10), **lost),))
    assert "Wilson" not in whose
    assert (point.high > 0.75) == (lost != {"stderr": None})
    _, at_the_end = charts.of((replace(scored("t", [1.0] * 40), **lost),))
    assert at_the_end == whose, "an error of 0 is one"


def test_a_group_that_weighs_documents_alike_is_a_share_of_them_and_another_is_not(charts: Charts) -> None:
    subtasks = [1.0] * 30 + [0.0] * 10, [1.0] * 10
    (point,), whose = charts.of(group(*subtasks, by_size=True))
    assert (point.low, point.high) == pytest.approx(wilson(40, 50))
    assert whose == "95 %: Wilson"
    (point,), whose = charts.of(group(*subtasks, by_size=False))
    assert point.value == 0.875
    assert whose == "95 %: ± 1.96 standard errors"


def test_a_name_in_a_chart_is_text() -> None:
    drawn = task_chart([Point(model=NASTY[0][:20], value=0.81254, low=0.79, high=0.83)], "acc")
    assert "<script" not in drawn
    assert "0.8125" in drawn  # rounding what is drawn must not touch what is written


def test_no_model_is_called_best_where_the_difference_may_be_chance(small: Sweep, small_page: Path) -> None:
    best = [of for of in leaders(small, compare(small)) if of.best]
    assert small_page.read_text().count("<strong>") >= 2 * len(best)
    nothing = page(small, (), ())
    assert "<strong>" not in nothing
    assert "nothing is marked as better" in nothing
    assert "no mean over documents" in small_page.read_text()


def test_a_star_beside_a_cell_that_failed_claims_nothing_of_it(small: Sweep) -> None:
    task = small.tasks[0]
    made = [replace(one, p_adjusted=0.001) for one in compare(small) if one.task == task]
    (best,) = {of.best for of in leaders(small, made) if of.metric == "acc"}
    assert best is not None
    lost = next(model for model in small.models if model != best)
    records = tuple(
        replace(r, status=Status.FAILED, error="no", scores=()) if (r.model, r.task) == (lost, task) else r
        for r in small.records
    )
    rest = [one for one in made if lost not in (one.model_a, one.model_b)]
    html = page(replace(small, records=records), rest, (), samples=False)
    assert "★" in html
    assert html.count("better than every other model") == html.count(
        "better than every other model that has this number"
    )


def test_what_could_not_be_compared_is_said_with_and_without_comparisons(small: Sweep) -> None:
    assert "could not be compared" not in page(small, (), (), samples=False)
    for comparisons in ((), compare(small)):
        html = page(small, comparisons, (), samples=False, left_out=("acc of <a> has no samples",))
        assert "<summary>What could not be compared (1)</summary>\n<ul><li>acc of &lt;a&gt; has no samples</li>" in html
        assert 'href="#pairs"' in html


def test_an_empty_sweep_makes_a_page(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path / "none", models=1, tasks=1, samples=1).root)
    assert "No cell failed." in page(replace(sweep, records=()), (), ())


def test_a_cell_without_numbers_counts_or_versions_does_not_break_the_page(small: Sweep) -> None:
    bare = Record(model=small.models[0], task=small.tasks[0], fingerprint="", status=Status.DONE)
    odd = replace(
        bare,
        model=small.models[1],
        counts=Counts(requests=1),
        scores=(
            Score(
                task="x",
                version="",
                filter="none",
                num_fewshot=None,
                metric="m",
                value=float("nan"),
                stderr=float("nan"),
                higher_is_better=None,
                samples=None,
            ),
        ),
    )
    assert "nan" in page(replace(small, records=(bare, odd)), (), ())


@dataclass
class Drawn:
    """What the timeline's chart was asked to draw."""

    bars: list[Bar]
    labels: list[Label]
    rows: list[str]

    def cells(self, row: int) -> list[tuple[str, float, float]]:
        return [(b.kind, b.start, b.end) for b in self.bars if b.row == row and b.kind in ("waiting", "cell")]


def drawn_timeline(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, *events: Event) -> Drawn:
    """Of a launch that began at 0 s."""
    asked: list[Drawn] = []

    def draw(bars: list[Bar], labels: list[Label], rows: list[str], end_s: float) -> str:
        asked.append(Drawn(bars, labels, rows))
        return timeline_chart(bars, labels, rows, end_s)

    monkeypatch.setattr("sweep.results.page.timeline_chart", draw)
    began = Event(time=0, what="launch", name="h", state="began")
    page(replace(sweep, records=(), timeline=spans((began, *events))), (), (), samples=False)
    return asked[0]


def life(name: str, model: str, times: tuple[float, float | None, float], *, on: str, host: str = "") -> list[Event]:
    """Of a server: it starts, is ready where it ever is, and is gone."""
    known: dict[str, Any] = {"what": "server", "name": name}
    start, ready, end = times
    found = [Event(**known, time=start, state="starting", server=model, on=on, host=host)]
    found += [] if ready is None else [Event(**known, time=ready, state="ready")]
    return [*found, Event(**known, time=end, state="gone")]


def ran(cell: str, start: float, end: float) -> list[Event]:
    return [Event(what="cell", name=cell, time=t, state=state) for t, state in ((start, "running"), (end, "done"))]


def in_time(*events: list[Event]) -> list[Event]:
    return sorted((one for each in events for one in each), key=lambda event: event.time)


def test_a_cell_waits_on_the_timeline_until_a_server_of_its_model_is_ready(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, task = small.models[0], small.tasks[0]
    events = in_time(
        life("a-0", a, (0, 100, 200), on="n1"),
        life("a-1", a, (50, 150, 300), on="n2"),
        life("a-2", a, (250, None, 290), on="n1"),
        ran(f"{a}/{task}", 10, 260),
    )
    drawn = drawn_timeline(small, monkeypatch, *events)
    assert drawn.rows == ["node 1 · 1", "node 2 · 1"]
    assert drawn.cells(0) == [("waiting", 10, 100), ("cell", 100, 200)]
    assert drawn.cells(1) == [("waiting", 50, 100), ("cell", 150, 260)]
    alone = in_time(life("a-0", a, (0, None, 90), on="n1"), ran(f"{a}/{task}", 10, 90))
    assert drawn_timeline(small, monkeypatch, *alone).cells(0) == [("waiting", 10, 90)]


def test_rows_of_the_timeline_are_hosts_or_numbered_nodes(small: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    a = small.models[0]

    def rows(*hosts: tuple[str, str]) -> list[str]:
        lives = (life(f"a-{n}", a, (n, n + 9.5, n + 20), on=on, host=host) for n, (on, host) in enumerate(hosts))
        return drawn_timeline(small, monkeypatch, *in_time(*lives)).rows

    ids = ["c98" * 18, "f00" * 18, "d11" * 18]
    named = [(ids[0], "gpu-10.lab.org"), (ids[1], "gpu-2.lab.org"), (ids[2], "10.0.0.7")]
    assert rows(*named) == ["10.0.0.7 · 1", "gpu-2 · 1", "gpu-10 · 1"]
    assert rows((ids[0], "x.a"), (ids[1], "x.b")) == ["x.a · 1", "x.b · 1"]
    assert rows((ids[1], ""), (ids[0], ""), (ids[1], "")) == ["node 1 · 1", "node 1 · 2", "node 2 · 1"]
    assert rows((f"{ids[1]}, {ids[0]}", "h1, h2"), ("", "")) == ["elsewhere · 1", "h1, h2 · 1"]
    assert rows((ids[0], "h1"), (ids[1], "h1")) == ["h1 · 1", "h1 · 2"]


def test_each_server_on_the_timeline_has_its_name_as_far_as_its_row_has_room() -> None:
    def texts(*lives: tuple[float, float]) -> list[str]:
        labels = [Label(row=0, text="a-long-name", start=start, end=end) for start, end in lives]
        bars = [Bar(row=0, lane=0, lanes=1, kind="starting", start=start, end=end) for start, end in lives]
        return re.findall(r"<text [^>]*>(a-[^<]*)</text>", timeline_chart(bars, labels, ["n · 1"], 860.0))

    assert texts((0, 10)) == ["a-long-name"]
    assert texts((850, 860)) == ["a-long-name"]
    assert texts((0, 10), (100, 110), (850, 860)) == ["a-long-name"] * 3
    assert texts((0, 40), (40, 860)) == ["a-lon…", "a-long-name"]
    assert texts((0, 10), (10, 860)) == ["a-long-name"]


# --- In a browser ----------------------------------------------------------------------------------------------------


@in_browser
def test_a_column_sorts_both_ways_by_keyboard_and_says_so(view: Opened) -> None:
    head = view.page.locator("#board thead th").nth(1)
    head.locator("button").focus()
    view.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    down = [number(text) for text in view.texts("#board tbody td:nth-child(2)") if text[:1].isdigit()]
    assert down == sorted(down, reverse=True)
    view.page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    up = [number(text) for text in view.texts("#board tbody td:nth-child(2)") if text[:1].isdigit()]
    assert up == sorted(up)
    assert len(up) >= 3


@in_browser
def test_models_tasks_and_metrics_are_filtered(view: Opened, small: Sweep) -> None:
    view.page.fill("#find-model", "AWQ")
    expect(view.page.locator("#shown")).to_contain_text("1 model,")
    assert view.texts("#board tbody tr:visible th") == [small.models[2]]
    view.page.fill("#find-task", "generation")
    expect(view.page.locator("#shown")).to_contain_text("2 columns")
    view.page.check("#all-metrics")
    assert view.page.inner_text("#shown") == "1 model, 4 columns"


@in_browser
def test_two_models_are_compared(view: Opened, small: Sweep) -> None:
    view.page.locator("#pairs").scroll_into_view_if_needed()
    view.page.wait_for_selector("#pair-table tbody tr")
    view.page.select_option("#pair-a", label=small.models[0])
    view.page.select_option("#pair-b", label=small.models[3])
    expected = [c for c in compare(small) if {c.model_a, c.model_b} == {small.models[0], small.models[3]}]
    assert view.page.locator("#pair-table tbody tr").count() == len(expected) > 0
    assert view.texts("#pair-table tbody tr td:nth-child(7)") == [chance(c.p_adjusted) for c in expected]
    there = view.texts("#pair-table tbody tr td:nth-child(5)")
    view.page.select_option("#pair-a", label=small.models[3])
    view.page.select_option("#pair-b", label=small.models[0])
    back = view.texts("#pair-table tbody tr td:nth-child(5)")
    assert [number(text) for text in back] == [-number(text) for text in there]


def samples_of(view: Opened, task: str) -> None:
    """Scroll to the samples and open those of a task."""
    view.page.locator("#sample-controls").scroll_into_view_if_needed()
    view.page.wait_for_selector("#s-list details")
    label = next(text for text in view.texts("#s-task option") if text.startswith(f"{task} "))
    view.page.select_option("#s-task", label=label)
    expect(view.page.locator("#s-count")).to_contain_text("document")


@in_browser
def test_a_script_in_a_sample_is_shown_as_text_and_never_runs(view: Opened, small: Sweep) -> None:
    title = view.page.title()
    samples_of(view, small.tasks[0])
    view.page.fill("#s-text", "</script><script>")
    expect(view.page.locator("#s-list details")).to_have_count(1)
    view.page.locator("#s-list summary").first.click()
    view.page.wait_for_selector("#s-list pre")
    assert NASTY[0] in view.page.locator("#s-list pre").first.inner_text()
    assert view.page.locator("#s-list mark").first.inner_text() == "</script><script>"
    assert view.page.locator("#s-list script, #s-list img").count() == 0
    assert view.page.title() == title


@in_browser
def test_samples_are_narrowed_to_where_two_models_differ(view: Opened, small: Sweep) -> None:
    samples_of(view, small.tasks[0])
    a, b = small.models[0], small.models[3]
    view.page.select_option("#s-a", label=a)
    view.page.select_option("#s-b", label=b)
    right = {
        model: {s.doc_hash: s.metrics["acc"] for s in small.samples(small.record(model, small.tasks[0]))}  # type: ignore[arg-type]
        for model in (a, b)
    }
    for choice, keep in (
        ("score", lambda x, y: x != y),
        ("a", lambda x, y: x > y),
        ("b", lambda x, y: y > x),
    ):
        view.page.select_option("#s-which", choice)
        count = sum(keep(right[a][key], right[b][key]) for key in right[a])
        assert view.page.inner_text("#s-count").split()[0] == str(count)


class Mixed(Sweep):
    """Its groups' last subtasks have another metric, of which less is better."""

    def samples(self, record: Record) -> Iterator[Sample]:
        for one in super().samples(record):
            other = {"error": 1.5 - one.metrics["acc"]}
            yield replace(one, metrics=other) if one.subtask.endswith("_physics") else one


@in_browser
def test_better_follows_the_metric_and_a_subtask_with_another_one_is_filtered_by_its_own(
    browser: Any, small: Sweep, tmp_path: Path
) -> None:
    def mixed(score: Score) -> Score:
        own = score.task.endswith("_physics")
        return replace(score, metric="error", higher_is_better=False) if own else score

    group = next(task for task in small.tasks if task.startswith("group"))
    records = [r for r in small.records if r.task == group]
    changed = tuple(replace(record, scores=tuple(map(mixed, record.scores))) for record in records)
    sweep = Mixed(**{**vars(small), "records": changed, "tasks": (group,)})
    path = tmp_path / "report.html"
    path.write_text(page(sweep, (), ()))
    found = opened(browser, path)
    samples_of(found, group)
    assert found.texts("#s-metric option") == ["acc", "acc_norm", "error"]
    a, b = small.models[0], small.models[3]
    found.page.select_option("#s-a", label=a)
    found.page.select_option("#s-b", label=b)
    values = {
        model: {(s.subtask, s.doc_id): s.metrics for s in sweep.samples(sweep.record(model, group))}  # type: ignore[arg-type]
        for model in (a, b)
    }
    better = {-1: 0, 0: 0, 1: 0}
    for key, of_a in values[a].items():
        name = "acc" if "acc" in of_a else "error"
        x, y = of_a[name], values[b][key][name]
        better[((x > y) - (x < y)) * (1 if name == "acc" else -1)] += 1
    assert any("error" in metrics for metrics in values[a].values())
    for choice, expected in (("a", better[1]), ("b", better[-1]), ("score", better[1] + better[-1])):
        found.page.select_option("#s-which", choice)
        assert found.page.inner_text("#s-count").split()[0] == str(expected)
    assert found.errors == []
    found.page.context.close()


@in_browser
def test_1_and_0_are_right_and_wrong_only_where_more_is_better(browser: Any, small: Sweep, tmp_path: Path) -> None:
    """`crows_pairs_english` counts with 1 that a stereotype was preferred, and less is better."""
    task = next(task for task in small.tasks if task.startswith("group"))
    marks = {}
    for high in (True, False, None):
        records = tuple(
            replace(r, scores=tuple(replace(score, higher_is_better=high) for score in r.scores))
            for r in small.records
            if r.task == task
        )
        path = tmp_path / "report.html"
        path.write_text(page(replace(small, records=records, tasks=(task,)), (), ()))
        found = opened(browser, path)
        samples_of(found, task)
        found.page.select_option("#s-metric", label="acc")
        marks[high] = set(found.page.locator("#s-list .marks > span").all_text_contents())
        assert bool(found.page.locator("#s-list .yes, #s-list .no").count()) == bool(high)
        found.page.context.close()
    assert {text[2:] for text in marks[True]} == {"✓ right", "✗ wrong"}
    assert {text[2:] for text in marks[False]} == {text[2:] for text in marks[None]} == {"1", "0"}


@in_browser
def test_the_page_is_operated_by_keyboard_alone(view: Opened, small: Sweep) -> None:
    view.page.keyboard.press("Tab")
    assert view.page.evaluate("document.activeElement.textContent") == "Skip to the content"
    view.page.keyboard.press("Enter")
    assert view.page.evaluate("document.activeElement.id") == "main"
    samples_of(view, small.tasks[1])
    view.page.locator("#s-list summary").first.focus()
    view.page.keyboard.press("Enter")
    view.page.wait_for_selector("#s-list .body")
    view.page.keyboard.press("Tab")
    assert view.page.evaluate("document.activeElement.tagName") == "PRE"  # a long text scrolls by keyboard


@in_browser
def test_everything_has_a_name_for_those_who_do_not_see_it(view: Opened) -> None:
    nameless = view.page.evaluate(
        """() => {
          const all = (selector) => [...document.querySelectorAll(selector)];
          return [
            ...all('input, select').filter((e) => !e.labels.length),
            ...all('[role=img], [role=region], nav').filter((e) => !e.getAttribute('aria-label')),
            ...all('section').filter((e) => !document.getElementById(e.getAttribute('aria-labelledby'))),
            ...all('svg').filter((e) => !e.closest('[role=img]')),
          ].map((e) => e.outerHTML.slice(0, 80));
        }"""
    )
    assert nameless == []
    assert view.page.locator("main, header, footer, nav").count() == 4


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser: Any, small_page: Path, scheme: str) -> None:
    found = opened(browser, small_page, color_scheme=scheme)
    colours = found.page.evaluate(
        """() => Object.fromEntries(['bg', 'raised', 'ink', 'muted', 'accent', 'good', 'bad', 'warn'].map((name) =>
          [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"""
    )
    found.page.context.close()

    def light(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name in ("ink", "muted", "accent", "good", "bad", "warn"):
        for ground in ("bg", "raised"):
            low, high = sorted((light(colours[name]), light(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)  # WCAG 2, AA


@in_browser
def test_on_a_phone_nothing_sticks_out(browser: Any, small_page: Path, small: Sweep) -> None:
    found = opened(browser, small_page, viewport={"width": 360, "height": 740}, is_mobile=True)
    samples_of(found, small.tasks[0])
    # Not those within: what is opened is filled a moment later, so that they would shift what is counted off.
    for summary in found.page.locator("#s-list > details > summary").all()[:4]:
        summary.click()
    expect(found.page.locator("#s-list > details[open] .body")).to_have_count(4)
    found.page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    expect(found.page.locator("#s-list .body > details[open]:not(:has(pre))")).to_have_count(0)
    assert found.page.evaluate("document.documentElement.scrollWidth") == 360
    assert found.errors == []
    found.page.context.close()


@in_browser
def test_on_paper_there_is_the_leaderboard_and_no_control(browser: Any, small_page: Path) -> None:
    found = opened(browser, small_page)
    found.page.emulate_media(media="print")
    assert found.page.locator(".print-only table").first.is_visible()
    assert not found.page.locator("#find-model").is_visible()
    assert not found.page.locator("nav").is_visible()
    assert found.page.pdf(format="A4")[:5] == b"%PDF-"
    found.page.context.close()


@in_browser
def test_without_javascript_scores_and_charts_are_there(browser: Any, small_page: Path, small: Sweep) -> None:
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(small_page.as_uri())
    assert tab.locator("#board tbody tr").count() == len(small.models)
    assert tab.locator("#chart-list svg").first.is_visible()
    assert not tab.locator("#find-model").is_visible()
    tab.context.close()


@in_browser
@pytest.mark.slow
def test_forty_models_thirty_tasks_and_a_hundred_thousand_samples_stay_usable(browser: Any, tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path / "wide", models=40, tasks=30, samples=100_000).root)
    path = tmp_path / "report.html"
    path.write_text(page(sweep, compare(sweep), references(sweep)))
    assert path.stat().st_size < BYTES
    assert not any(f"{noun} are left out" in path.read_text() for noun in ("documents", "characters"))

    # On a machine whose cores are all taken, the time by the clock says who else works there.
    found = opened(browser, path)
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert (found.computed_s if busy else found.usable_s) < USABLE_S

    found.page.fill("#find-model", "chat-awq")
    expect(found.page.locator("#shown")).to_contain_text("13 models")
    found.page.locator("#board thead button").nth(1).click()
    figures = [number(text) for text in found.texts("#board tbody tr:visible td:nth-child(2)") if text[:1].isdigit()]
    assert figures == sorted(figures, reverse=True)
    found.page.locator("#pairs").scroll_into_view_if_needed()
    found.page.wait_for_selector("#pair-table tbody tr")
    for task in sweep.tasks[:3]:
        found.page.fill("#s-text", "")  # of what was sought before there may be nothing, and a list is waited for
        found.page.select_option("#s-which", "all")
        samples_of(found, task)
        found.page.select_option("#s-which", "score")
        found.page.fill("#s-text", "script>")
        expect(found.page.locator("#s-count")).to_contain_text(" of 84")
    assert found.page.evaluate("document.documentElement.scrollWidth") == 1280
    assert found.errors == []
    assert found.requests == [path.as_uri()]
    found.page.context.close()
