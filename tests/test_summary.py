"""What a sweep says in five lines and as a table of pairs: no leader where the difference may be noise."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweep.record import Counts, Record, Score, Status
from sweep.results.compare import Comparison, Findings
from sweep.results.reading import Sweep
from sweep.results.store import RunDirectory
from sweep.results.summary import compared, headline, in_lines
from sweep.results.timeline import Span, Timeline


def pair(a: str, b: str, difference: float, *, task: str = "t", shown: bool = True, **changes: Any) -> Comparison:
    known = {
        "task": task,
        "subtask": task,
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "n": 100,
        "unpaired": 0,
        "value_a": 0.5,
        "value_b": 0.5 + difference,
        "stderr": 0.02,
        "low": difference - 0.04,
        "high": difference + 0.04,
        "p": 0.001 if shown else 0.6,
        "p_adjusted": 0.003 if shown else 1.0,
        "test": "exact McNemar",
        "strata": 1,
        "clusters": None,
        "detectable": 0.1,
        "same_settings": True,
        "notes": (),
    }
    return Comparison(model_a=a, model_b=b, difference=difference, **{**known, **changes})


SCORE = Score(
    task="t",
    version="1",
    filter="none",
    num_fewshot=0,
    metric="acc",
    value=0.5,
    stderr=0.05,
    higher_is_better=True,
    samples=100,
)


def record(model: str, task: str = "t", **changes: Any) -> Record:
    counts = Counts(requests=1000, asked=900, reused=100)
    return Record(
        **{
            "model": model,
            "task": task,
            "fingerprint": "f",
            "status": Status.DONE,
            "counts": counts,
            "scores": (replace(SCORE, task=task),),
            **changes,
        }
    )


def sweep(*records: Record, owed: int = 0, timeline: Timeline | None = None) -> Sweep:
    return Sweep(
        directory=RunDirectory(Path("runs/s")),
        name="s",
        config={},
        models=tuple(dict.fromkeys(r.model for r in records)),
        tasks=tuple(dict.fromkeys(r.task for r in records)),
        records=records,
        left_out=0,
        owed=owed,
        timeline=timeline or Timeline(),
    )


def test_it_is_five_lines_whatever_there_is() -> None:
    said = headline(sweep(), ())
    assert list(said) == ["leads", "noise", "failed", "bends", "cost"]
    assert [text.split()[0] for text in in_lines(said)] == list(said)


def test_a_model_leads_where_it_is_shown_to_be_better_than_each_other_one() -> None:
    pairs = [
        *(pair(a, b, d) for a, b, d in [("a", "b", 0.2), ("a", "c", -0.1), ("b", "c", -0.3)]),
        *(pair(a, b, 0.01, task="u", shown=False) for a, b in [("a", "b"), ("a", "c"), ("b", "c")]),
    ]
    cells = [record(model, task) for task in ("t", "u") for model in ("a", "b", "c")]
    lines = headline(sweep(*cells, record("a", "alone")), pairs)
    assert lines["leads"] == "b on t; nobody alone on u: a, b and c are not told apart"
    assert lines["noise"] == (
        "3 of 6 paired differences may be noise (95%, corrected for their number); "
        "the largest for its documents, b against a on u by acc, is +0.0100 with n = 100"
    )


def test_tasks_with_the_same_models_in_front_are_told_together_and_many_are_counted() -> None:
    def tied(task: str, *models: str) -> list[Comparison]:
        return [pair(a, b, 0.01, task=task, shown=False) for i, a in enumerate(models) for b in models[i + 1 :]]

    def leads(*made: list[Comparison]) -> str:
        pairs = [one for each in made for one in each]
        cells = {(model, one.task) for one in pairs for model in (one.model_a, one.model_b)}
        return headline(sweep(*(record(*cell) for cell in sorted(cells))), pairs)["leads"]

    assert leads(tied("t", "a", "b"), tied("u", "a", "b")) == "nobody alone on t, u: a and b are not told apart"
    assert leads(tied("t", *"abcde")) == "nobody alone on t: a, b, c and 2 more are not told apart"
    assert leads(*(tied(f"t{n}", "a", f"b{n}") for n in range(5))).endswith(
        "nobody alone on t2: a and b2 are not told apart; nobody alone on 2 other tasks"
    )
    one_short = [*tied("t", "a", "b"), pair("a", "c", -0.2), pair("b", "c", 0.2)]
    assert leads(one_short) == "nobody alone on t: a is not shown to be better than all others"
    circle = [pair("a", "b", 0.2), pair("b", "c", 0.2), pair("a", "c", -0.2)]
    assert leads(circle) == "nobody alone on t: each is shown to be worse than some other"


def test_large_numbers_of_comparisons_and_documents_have_separators() -> None:
    noise = headline(sweep(), [pair("a", "b", 0.01, shown=False, n=20_000)] * 1200)["noise"]
    assert noise.startswith("1,200 of 1,200 paired differences")
    assert noise.endswith("n = 20,000")


def test_the_model_on_most_tasks_comes_first_and_long_lists_are_counted() -> None:
    pairs = [pair("a", "b", -0.2, task=f"t{n}") for n in range(5)] + [pair("a", "b", 0.2, task="u")]
    cells = [record(model, task) for task in ("t0", "t1", "t2", "t3", "t4", "u") for model in "ab"]
    assert headline(sweep(*cells), pairs)["leads"] == "a on t0, t1, t2 and 2 more; b on u"


def test_a_task_counts_by_the_first_number_of_its_cells_whichever_was_compared_first() -> None:
    pairs = [pair("a", "b", -0.2, metric="acc_norm"), pair("a", "b", 0.2)]
    cells = [record("a"), record("b")]
    assert headline(sweep(*cells), pairs)["leads"] == "b on t"
    assert headline(sweep(*cells), pairs[:1])["leads"] == "nobody: no number of two models can be compared"


def test_a_difference_is_large_for_its_documents_not_for_the_scale_of_its_metric() -> None:
    pairs = [
        pair("a", "b", 3.0, metric="bleu", shown=False, detectable=20.0),
        pair("a", "b", 0.05, metric="em", filter="strict", shown=False, detectable=0.1),
        pair("a", "b", 0.9, metric="f1", shown=False, detectable=math.nan),
    ]
    noise = headline(sweep(), pairs)["noise"]
    assert noise.endswith("b against a on t by em,strict, is +0.0500 with n = 100")
    assert headline(sweep(), pairs[2:])["noise"].endswith("(95%, corrected for their number)")


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ((record("a"),), "nobody: there is one model"),
        ((record("a"), record("b", "u")), "nobody: no number of two models can be compared"),
    ],
)
def test_nobody_leads_where_nothing_is_compared(records: tuple[Record, ...], said: str) -> None:
    lines = headline(sweep(*records), ())
    assert lines["leads"] == said
    assert lines["noise"] == "nothing was compared"


def test_what_failed_is_said_by_cause_and_what_is_owed_is_no_failure() -> None:
    failed = record("b", status=Status.FAILED, error="no memory\nlog")
    lines = headline(sweep(record("a"), failed, replace(failed, model="c"), owed=5), ())
    assert lines["failed"] == "2 of 6 cells; 2 for: no memory; 3 cells still owed"
    assert headline(sweep(record("a")), ())["failed"] == "nothing"


def test_what_bends_is_counted_with_an_example() -> None:
    cut = record("b", counts=Counts(requests=10, truncated=2))
    said = "2 of 10 requests had their context cut from the left to fit the model"
    assert headline(sweep(record("a"), cut), ())["bends"] == f"1 cell with what could bend a number: b/t: {said}"
    assert headline(sweep(record("a")), ())["bends"] == "nothing that is known of"


def test_cost_is_time_gpu_hours_and_requests_of_all_launches() -> None:
    def span(name: str, start: float, end: float, gpus: float = 0.0) -> Span:
        known = {"server": "", "on": "", "ready": None, "state": "", "reason": ""}
        return Span(name=name, start=start, end=end, gpus=gpus, **known)  # type: ignore[arg-type]

    timeline = Timeline(
        launches=(span("h", 0, 60), span("h", 1000, 4600)),
        servers=(span("a-0", 0, 1800, 2.0), span("b-0", 0, 900)),
    )
    lines = headline(sweep(record("a"), record("b"), timeline=timeline), ())
    assert lines["cost"] == (
        "1 h 01 min in 2 launches, 1.00 GPU-hours, 0.25 server-hours without a GPU, 1,800 requests computed, 200 reused"
    )
    assert headline(sweep(record("a")), ())["cost"] == "900 requests computed, 100 reused"


def test_pairs_are_a_table_with_what_is_shown_first_and_notes_together() -> None:
    few = "too few clusters (7)"
    findings = Findings(
        comparisons=(
            pair("a", "b", 0.01, shown=False, notes=(few,)),
            pair("a", "c", -0.2, notes=(few,), filter="strict"),
            pair("b", "c", 0.2, subtask="u", higher_is_better=False),
        ),
        left_out=("t: word_perplexity is no mean over documents",),
    )
    (said, table), notes, left_out = (
        part.split("\n\n") if not n else part for n, part in enumerate(compared(findings).split("\n\n**"))
    )
    assert said == (
        "The 95 % interval is that of each pair alone; p is corrected for the number of all comparisons "
        "(3, by Holm), and what is shown follows p: where an interval leaves out 0, p may still not be below 0.05."
    )
    header, _, *rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()]
    named = ["Task", "Metric", "a", "b", "n", "a is", "b is", "b - a", "95 %", "p (Holm)", "b is shown to be"]
    assert header == named
    sizes = ["100", "0.5000"]
    assert rows == [
        ["t", "acc,strict ↑", "a", "c", *sizes, "0.3000", "-0.2000 ± 0.0200", "-0.2400 … -0.1600", "0.003", "worse"],
        ["t (u)", "acc ↓", "b", "c", *sizes, "0.7000", "+0.2000 ± 0.0200", "+0.1600 … +0.2400", "0.003", "worse"],
        ["t", "acc ↑", "a", "b", *sizes, "0.5100", "+0.0100 ± 0.0200", "-0.0300 … +0.0500", "1.000", "–"],
    ]
    assert notes == "Notes**\n\n- t a : b, t a : c: too few clusters (7)"
    assert left_out == "Not compared**\n\n- t: word_perplexity is no mean over documents\n"
    assert "2 more comparisons are in report.html." in compared(findings, most=1)
    unknown = pair("a", "b", 0.2, stderr=math.nan, low=math.nan, high=math.nan, detectable=math.nan)
    last = compared(Findings(comparisons=(unknown,), left_out=())).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")][8:10] == ["+0.2000 ± –", "–"]
    assert compared(Findings(comparisons=(), left_out=())) == "Nothing could be compared.\n"
