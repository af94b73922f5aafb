"""What the benchmarks share; what they measure is theirs to show."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import data
from bench.rows import Row, alternately

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("ratio", "holds"), [(3.99, False), (4.0, True), (40.0, True)])
def test_a_row_says_whether_its_claim_holds(ratio: float, holds: bool) -> None:
    row = Row(row="a task, 5-shot", ratio=ratio, bar=4.0, medians={"stock_s": 4 * ratio, "ours_s": 4.0})
    assert json.loads(row.line()) == {
        "row": "a task, 5-shot",
        "ratio": ratio,
        "bar": 4.0,
        "holds": holds,
        "medians": {"stock_s": 4 * ratio, "ours_s": 4.0},
    }


def test_the_sides_of_a_comparison_take_turns() -> None:
    ran: list[str] = []
    seconds = alternately({"stock": lambda: ran.append("stock"), "ours": lambda: ran.append("ours")}, rounds=3)
    assert ran == ["stock", "ours"] * 3
    assert set(seconds) == {"stock", "ours"}


def test_missing_data_are_named_before_anything_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "DATA", tmp_path / "shared" / "data")
    monkeypatch.setattr(data, "MADE", tmp_path / "made")
    with pytest.raises(SystemExit, match=r"needs real evaluation data in .*/shared/data, and there is none"):
        data.real_data_environment()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "bench").glob("[a-z]*.py")))
def test_importing_a_benchmark_loads_nothing_heavy_and_does_nothing(module: str) -> None:
    code = f"import sys, bench.{module}; print(*{{'torch', 'lm_eval', 'datasets', 'vllm', 'ray'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == done.stderr.split() == []
