"""The page of a run directory, and two of them side by side, on sweeps that are made up but laid out as ours."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import write

from sweep.errors import ConfigError
from sweep.reporting import between, write_page
from sweep.results import charts
from sweep.results.reading import Sweep, read_sweep
from sweep.results.summary import headline


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "one", models=3, tasks=3, samples=900, failed=1).root


@pytest.fixture
def sweep(root: Path) -> Sweep:
    return read_sweep(root)


def test_the_page_and_the_tables_hold_what_was_compared_and_the_five_lines(sweep: Sweep) -> None:
    findings = write_page(sweep)
    assert findings.comparisons
    text = sweep.directory.report.read_text()
    for name, said in headline(sweep, findings.comparisons).items():
        assert f"- {name}: {said}\n" in text
    assert "**Paired comparisons**" in text
    assert sweep.directory.page.read_text().startswith("<!doctype html>")


def test_a_sweep_beside_itself_shows_no_difference(root: Path, tmp_path: Path) -> None:
    copy = write(tmp_path / "two", models=3, tasks=3, samples=900, failed=1).root
    text = between(read_sweep(root), read_sweep(copy))
    assert f"- a: {root}, 8 cells" in text
    assert f"- b: {copy}, 8 cells" in text
    assert "numbers compared:" in text
    assert " better" not in text.split("|")[0]
    assert "+0.0000 ± 0.0000" in text


def test_two_sweeps_say_what_only_one_has_done(root: Path, tmp_path: Path) -> None:
    fewer = write(tmp_path / "two", models=2, tasks=3, samples=600, failed=0).root
    text = between(read_sweep(root), read_sweep(fewer))
    assert f"cells done in {root} only: " in text


def renamed(sweep: Sweep, *names: str) -> Sweep:
    """Its first models, by these names."""
    called = dict(zip(sweep.models, names, strict=False))
    records = [replace(record, model=called[record.model]) for record in sweep.records if record.model in called]
    return replace(sweep, name="other", models=names, records=tuple(records))


def rows(text: str) -> set[tuple[str, ...]]:
    """The models of each line of the table."""
    found = re.findall(r"^\|[^|]+\|[^|]+\|\s*([^|\s]+)\s*\|\s*([^|\s]+)\s*\|", text, flags=re.MULTILINE)
    return {row for row in found if "/" in "".join(row)}


def test_models_of_other_names_are_compared_where_they_are_paired_and_no_others_are(root: Path) -> None:
    a = read_sweep(root)
    _, second, third = a.models
    b = renamed(a, second, "quantised", "other")  # the second's name for what is the first here
    text = between(a, b, pairs=[(second, "quantised"), (second, "quantised"), (third, "other")])
    assert f"- compared: {second} of a with quantised of b, {third} of a with other of b\n" in text
    assert rows(text) == {(f"{a.name}/{second}", "other/quantised"), (f"{a.name}/{third}", "other/other")}
    assert " done in " not in text, "of models that are in no pair nothing is said"
    assert "+0.0000 ± 0.0000" in text
    by_name = between(a, b)
    assert "- compared:" not in by_name
    assert rows(by_name) == {(f"{a.name}/{second}", f"other/{second}")}


def test_what_only_one_of_a_pair_has_done_is_said(root: Path) -> None:
    a = read_sweep(root)
    first = a.models[0]
    b = renamed(a, "renamed")
    b = replace(b, records=b.records[1:])
    text = between(a, b, pairs=[(first, "renamed")])
    assert f"- 1 cell done in {root} only: {first}/{a.tasks[0]}\n" in text


def test_two_sweeps_of_one_model_each_are_compared_whatever_it_is_called_there(root: Path) -> None:
    a = read_sweep(root)
    first = a.models[0]
    alone = replace(a, models=(first,), records=tuple(r for r in a.records if r.model == first))
    text = between(alone, renamed(a, "renamed"))
    assert f"- compared: {first} of a with renamed of b, as each sweep has just one model\n" in text
    assert rows(text) == {(f"{a.name}/{first}", "other/renamed")}
    assert "as each sweep has just one model" not in between(alone, alone)


def test_several_models_of_other_names_are_not_guessed_at(root: Path) -> None:
    a = read_sweep(root)
    text = between(a, renamed(a, "x", "y"))
    assert "- no model has one name in both: `pair=MODEL:MODEL` says which belong together\n" in text
    assert "- 0 numbers compared: none" in text


def test_a_pair_of_a_model_that_is_not_there_names_the_sweep_and_the_nearest(root: Path) -> None:
    a = read_sweep(root)
    first = a.models[0]
    with pytest.raises(ConfigError, match=rf"pair={first}x:{first}: {root} has no model '{first}x'; did you mean"):
        between(a, a, pairs=[(f"{first}x", first)])
    with pytest.raises(ConfigError, match=rf"no model 'zzz'; it has {', '.join(a.models)}"):
        between(a, a, pairs=[(first, "zzz")])


def test_lines_of_the_timeline_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    root = write(tmp_path / "one", models=2, tasks=2, samples=40, failed=0).root
    with read_sweep(root).directory.timeline.open("a") as timeline:
        timeline.write("{torn\n")
    sweep = read_sweep(root)
    write_page(sweep)
    assert "timeline.jsonl: 1 line cannot be read" in sweep.directory.page.read_text()


@pytest.mark.parametrize("damage", ["deleted", "torn"])
def test_a_sample_file_that_cannot_be_read_costs_its_cell_only_and_is_named(tmp_path: Path, damage: str) -> None:
    sweep = read_sweep(write(tmp_path / "one", models=3, tasks=3, samples=300, failed=0).root)
    record = sweep.records[0]
    (path,) = [sweep.directory.root / name for name in record.files if "samples_" in name]
    if damage == "deleted":
        path.unlink()
    else:
        path.write_text(path.read_text()[:-40])
    findings = write_page(sweep)
    assert any(str(path) in text for text in findings.left_out)
    assert any(c.task != record.task and record.model in (c.model_a, c.model_b) for c in findings.comparisons)
    assert all(record.model not in (c.model_a, c.model_b) for c in findings.comparisons if c.task == record.task)
    html = sweep.directory.page.read_text()
    assert path.name in html.split('<details class="plain" id="left-out">')[1].split("</details>")[0]
    told = html.split("Not everything is here.")[1].split("</div>")[0]
    assert f"samples of {record.model}/{record.task}" in told
    assert html.count('id="block-') == 3


def test_published_scores_that_cannot_be_read_are_missing_and_said(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Sweep) -> tuple[()]:
        raise ConfigError("conf/references/x.yaml: line 3: bad YAML")

    monkeypatch.setattr("sweep.reporting.published", broken)
    write_page(sweep)
    html = sweep.directory.page.read_text()
    assert "<li>published scores: conf/references/x.yaml: line 3: bad YAML</li>" in html
    assert 'id="board"' in html


class PanicException(BaseException):
    """Named as what a panic in Rust becomes in Python."""


@pytest.mark.parametrize("error", [PanicException("index out of bounds"), ValueError("bad specification")])
def test_a_chart_that_cannot_be_drawn_is_missing_and_said(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    import vl_convert

    real, seen = vl_convert.vegalite_to_svg, []

    def first_fails(*arguments: object, **named: object) -> object:
        seen.append(arguments)
        if len(seen) == 1:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", first_fails)
    write_page(sweep)
    html = sweep.directory.page.read_text()
    assert f"draw the chart of {sweep.tasks[0]}" in html
    assert str(error) in html
    assert "<svg" in html
    assert f"{sweep.records[0].scores[0].value:.4f}" in html


def test_an_interrupt_while_a_chart_is_drawn_is_no_failed_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(vl_convert, "vegalite_to_svg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        charts.task_chart([charts.Point(model="m", value=0.5, low=0.4, high=0.6)], "acc")
