"""What the benchmarks share; what they measure is theirs to show."""

import asyncio
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import requests
from conftest import StandIn
from fixture_model import make_fixture_tokenizer

from bench import data, gpu, scoring
from bench.rows import Figure, Row, alternately
from bench.served import by_turns
from bench.sides import Ran, Wire, every, sampling, size_of
from sweep.planning.loading import load

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


@pytest.mark.parametrize(
    ("value", "at_most", "holds"), [(1.0, True, True), (1.01, True, False), (1.0, False, True), (0.99, False, False)]
)
def test_a_figure_is_compared_with_its_bar(value: float, at_most: bool, holds: bool) -> None:
    figure = Figure(row="s to do it", value=value, bar=1.0, at_most=at_most, seen={"longest_s": 2.00049})
    assert json.loads(figure.line()) == {
        "row": "s to do it",
        "value": value,
        "bar": 1.0,
        "holds": holds,
        "seen": {"longest_s": 2.0},
    }


def test_the_sides_of_a_comparison_take_turns() -> None:
    ran: list[str] = []
    seconds = alternately({"stock": lambda: ran.append("stock"), "ours": lambda: ran.append("ours")}, rounds=3)
    assert ran == ["stock", "ours", "ours", "stock", "stock", "ours"]
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


def test_the_wire_is_timed_in_both_libraries_from_the_first_request_to_the_last_answer(
    stand_in: Callable[..., StandIn],
) -> None:
    server = stand_in(latency_s=0.2).endpoint
    address, body = f"{server.url}/v1/completions", {"model": "m", "prompt": [1, 2], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {server.api_key}"}

    async def ask() -> None:
        async with aiohttp.ClientSession() as session, session.post(address, json=body, headers=headers) as response:
            assert (await response.json())["choices"]

    for twice in (lambda: requests.post(address, json=body, headers=headers), lambda: asyncio.run(ask())):
        wire = Wire()
        with wire.watched():
            assert wire.request_s == 0.0
            twice()
            once_s = wire.request_s
            twice()
        assert once_s >= 0.2
        assert wire.request_s >= once_s + 0.2
        before = wire.request_s
        twice()  # nobody looks any more
        assert wire.request_s == before


def turns(ran: list[str], *names: str) -> dict[str, Callable[[], Ran]]:
    """Sides that only note that it was their turn."""
    return {name: lambda name=name: ran.append(name) or Ran() for name in names}


def test_every_side_is_the_first_one_in_its_turn() -> None:
    ran: list[str] = []
    by_turns(turns(ran, "stock", "ours", "echo"), rounds=4)
    assert "".join(name[0] for name in ran) == "soe" + "oes" + "eso" + "soe"


def test_a_side_may_be_left_out_of_later_rounds() -> None:
    ran: list[str] = []
    found = by_turns(turns(ran, "stock", "ours"), rounds=3, fewer={"stock": 1})
    assert ran == ["stock", "ours", "ours", "ours"]
    assert {name: len(some) for name, some in found.items()} == {"stock": 1, "ours": 3}


def test_the_floor_counts_what_prompts_share_once_and_no_last_token() -> None:
    size = size_of([((1, 2, 3), (7,)), ((1, 2, 3), (8,)), ((1, 2, 4), (7, 8, 9)), ((1, 2, 4), (7, 8, 5))])
    assert (size.requests, size.contexts, size.context_tokens, size.continuation_tokens) == (4, 2, 3.0, 2.0)
    assert size.unique_tokens == len([1, 2, 3]) + len([4, 7, 8])


def test_a_part_of_the_work_has_whole_questions() -> None:
    work = [SimpleNamespace(task_name=task, doc_id=doc) for task in "ab" for doc in range(10) for _ in range(4)]
    assert [(one.task_name, one.doc_id) for one in every(10, work)] == [("a", 0)] * 4 + [("b", 0)] * 4
    assert every(1, work) == work


def test_an_engine_without_a_server_samples_as_our_requests_ask(tmp_path: Path) -> None:
    asked = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    (found,) = sampling(str(make_fixture_tokenizer(tmp_path)), [SimpleNamespace(args=("2 + 2 =", asked))])
    assert (found["max_tokens"], found["temperature"]) == (16, 0)
    assert "\n\n" in found["stop"]


def ran(logprob: float, *, documents: int = 1) -> Ran:
    answers = {f"{n}-hash": [[logprob, False], [-1.0, True]] for n in range(documents)}
    return Ran(request_s=1.0, command_s=2.0, answers=answers, scores={"t/acc,none": 0.5})


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [(ran(-2.03), "differ by up to 0.03"), (ran(-2.0, documents=2), "other documents: 1 and 2")],
)
def test_a_fast_wrong_number_makes_no_row(theirs: Ran, complaint: str) -> None:
    sides = {"stock": [theirs], "ours": [ran(-2.0)]}
    with pytest.raises(SystemExit, match=complaint):
        scoring._row("a row", sides, "stock", bar=1.0, more={})


def test_a_row_of_scoring_is_made_of_medians_of_the_request_phase() -> None:
    runs = {"stock": [Ran(request_s=s, answers=ran(-2.0).answers, scores={"t/acc,none": 0.5}) for s in (9.0, 6.0, 7.0)]}
    row = scoring._row("a row", runs | {"ours": [ran(-2.01)]}, "stock", bar=7.0, more={"floor_s": 0.5})
    assert (row.ratio, row.holds) == (7.0, True)
    assert row.medians["stock_runs"] == 3
    assert row.medians["ours_command_s"] == 2.0
    assert row.medians["floor_s"] == 0.5


def test_the_gpu_benchmark_prints_every_command_and_runs_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "MADE", tmp_path / "made")
    assert gpu.main(["--model", "org/model", "--tensor-parallel", "2", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not (tmp_path / "made").exists()
    sweep, *ways = shown.split("\n# ")
    path = tmp_path / "sweep.yaml"
    path.write_text(sweep)
    read = load(str(path))
    assert (read.models["bench"].path, read.models["bench"].tensor_parallel) == ("org/model", 2)
    assert read.tasks["mmlu"].num_fewshot == 5
    assert [way.partition("\n")[0] for way in ways] == ["ours", "local-completions", "vllm", "hf"]
    for way in ways[1:]:
        command = next(line for line in way.splitlines() if " lm_eval run " in line)
        words = shlex.split(command)
        assert words[words.index("--tasks") + 1] == "mmlu"
        assert "org/model" in words[words.index("--model_args") + 1]
    assert "OPENAI_API_KEY=" in ways[1]


def test_dummy_weights_reach_every_engine_and_leave_out_the_one_that_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--model", "org/model", "--load-format", "dummy", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("dummy") == len(["the sweep", "the server", "in process"])
    assert "# hf" not in shown
