"""The page of a run directory, and two of them side by side, on sweeps that are made up but laid out as ours."""

from pathlib import Path

import pytest
from synthetic import write

from sweep.reporting import between, write_page
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
    assert f"cells are done in {root} only: " in text
