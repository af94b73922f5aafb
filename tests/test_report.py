"""The tables at the end: lm-eval's form, nothing merged or hidden, one number everywhere."""

import csv
import io
import re
from typing import Any

import pytest
from test_layout import ROOT

from sweep.record import Counts, Record, Score, Status
from sweep.results.report import COLUMNS, caveats, chance, csv_text, failures, markdown, reason


def score(task: str = "gsm8k", **changes: Any) -> Score:
    known = {
        "task": task,
        "version": "3",
        "filter": "none",
        "num_fewshot": 5,
        "metric": "acc",
        "value": 0.8125,
        "stderr": 0.0437123,
        "higher_is_better": True,
        "samples": 80,
    }
    return Score(**{**known, **changes})


def done(model: str, task: str, *scores: Score, **changes: Any) -> Record:
    return Record(model=model, task=task, fingerprint="f", status=Status.DONE, scores=scores, **changes)


def failed(model: str, task: str, error: str) -> Record:
    return Record(model=model, task=task, fingerprint="f", status=Status.FAILED, error=error)


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "< 0.001"), (0.00099, "< 0.001"), (0.001, "0.001"), (0.05, "0.050"), (1.0, "1.000"), (float("nan"), "–")],
)
def test_a_p_value_is_never_written_as_the_zero_that_it_is_not(p: float, text: str) -> None:
    assert chance(p) == text


def lines_of(table: str) -> list[list[str]]:
    """The body of the Markdown table as cells."""
    return [line[1:-1].split("|") for line in table.splitlines() if line.startswith("|")][2:]


def test_the_table_has_lm_evals_form_with_all_models_side_by_side() -> None:
    strict = score(filter="strict-match", metric="exact_match")
    flexible = score(filter="flexible-extract", metric="exact_match", value=2 / 3, stderr=None)
    perplexity = score("wikitext", version="2", num_fewshot=0, metric="word_perplexity", higher_is_better=False)
    records = [
        done("small", "gsm8k", flexible, strict),
        failed("large", "gsm8k", "no memory"),
        done("large", "wikitext", perplexity),
    ]
    assert markdown(records, ["small", "large"]) == (
        "|Tasks   |Version|Filter          |n-shot|Metric         |   |          small|          large|\n"
        "|--------|------:|----------------|-----:|---------------|---|--------------:|--------------:|\n"
        "|gsm8k   |      3|flexible-extract|     5|exact_match    |↑  |   0.6667 ± N/A|         failed|\n"
        "|        |       |strict-match    |     5|exact_match    |↑  |0.8125 ± 0.0437|         failed|\n"
        "|wikitext|      2|none            |     0|word_perplexity|↓  |              –|0.8125 ± 0.0437|\n"
        "\n"
        "**Failed**\n"
        "\n"
        "- large/gsm8k: no memory\n"
    )


@pytest.mark.parametrize("width", [50, 80, 120, 200, 2000])
@pytest.mark.parametrize("models", [1, 2, 7, 60])
def test_the_table_of_any_number_of_models_fits_the_terminal(models: int, width: int) -> None:
    names = [f"qwen2-5-instruct-awq-{n:02}" for n in range(models)]
    records = [
        done(
            model,
            task,
            score(task, metric="exact_match", filter="flexible-extract", value=(int(model[-2:]) + 1) / 100),
            counts=Counts(requests=10, truncated=1),
        )
        for model in names
        for task in ("gsm8k", "a_task_with_quite_a_name")
    ]
    shown = markdown(records, names, width=width)
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert max(map(len, table)) <= width
    headers = [cell.strip() for line in table if "Tasks" in line for cell in line[1:-1].split("|")]
    shown_models = [cell for cell in headers if cell.startswith("qwen")]
    assert len(shown_models) == models
    if width >= 80:
        assert shown_models == names
    for n in range(models):
        assert sum(f"{(n + 1) / 100:.4f} ± 0.0437" in line for line in table) == 2
    whole = markdown(records, names)
    assert ("see report.md" in shown) == (shown != whole)
    if width == 2000:
        assert shown == whole


def test_columns_that_tell_rows_apart_stay_however_narrow_it_is() -> None:
    two = [score(filter=name, metric="exact_match", version="3") for name in ("strict", "flexible")]
    shown = markdown([done("a", "gsm8k", *two), done("b", "gsm8k", *two)], ["a", "b"], width=62)
    rows = [[cell.strip() for cell in row] for row in lines_of(shown)]
    assert [row[:2] for row in rows if row[0] != "-----"][:2] == [["gsm8k", "strict"], ["", "flexible"]]
    assert "Version, n-shot: see report.md." in shown


def test_subtasks_are_indented_as_in_lm_eval_and_can_be_folded() -> None:
    group = done(
        "m",
        "mmlu",
        score("mmlu", num_fewshot=None, samples=None),
        score("mmlu_stem", depth=1, num_fewshot=None, samples=None),
        score("mmlu_algebra", depth=2),
    )
    assert [row[0].rstrip() for row in lines_of(markdown([group], ["m"]))] == [
        "mmlu",
        " - mmlu_stem",
        "  - mmlu_algebra",
    ]
    assert [row[3].strip() for row in lines_of(markdown([group], ["m"]))] == ["", "", "5"]
    folded = markdown([group], ["m"], subtasks=False)
    assert [row[0].rstrip() for row in lines_of(folded)] == ["mmlu"]
    assert "Subtasks of groups are left out." in folded


def test_a_task_with_a_name_of_ours_shows_both_names() -> None:
    assert lines_of(markdown([done("m", "gsm8k_short", score())], ["m"]))[0][0] == "gsm8k_short (gsm8k)"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"num_fewshot": 5}, {"num_fewshot": 0}, "shots of gsm8k 5"),
        ({"samples": 80}, {"samples": 40}, "documents of gsm8k 80"),
        ({"version": "3"}, {"version": "2"}, "version of gsm8k 3"),
    ],
)
def test_models_whose_task_ran_differently_do_not_share_a_row(
    first: dict[str, Any], second: dict[str, Any], said: str
) -> None:
    records = [done("a", "gsm8k", score(**first)), done("b", "gsm8k", score(**second))]
    table = markdown([*records, failed("c", "gsm8k", "x")], ["a", "b", "c"])
    rows = [(row[0].strip(), *(cell.strip() for cell in row[6:])) for row in lines_of(table)]
    assert rows == [
        ("gsm8k [1]", "0.8125 ± 0.0437", "–", "failed"),
        ("gsm8k [2]", "–", "0.8125 ± 0.0437", "failed"),
    ]
    assert f"- gsm8k [1], a: {said}\n" in table


def test_settings_that_leave_no_trace_in_the_scores_keep_rows_apart_too() -> None:
    plain = done("a", "gsm8k", score(), settings={"task": {"gen_kwargs": {}, "limit": None}, "chat": True})
    warm = done(
        "b", "gsm8k", score(), settings={"task": {"gen_kwargs": {"temperature": 1}, "limit": 80}, "chat": False}
    )
    table = markdown([plain, warm], ["a", "b"])
    assert len(lines_of(table)) == 2
    assert '- gsm8k [1], a: gen_kwargs unset\n- gsm8k [2], b: gen_kwargs {"temperature": 1}\n' in table


def test_asking_for_what_another_model_gets_by_default_shares_the_row() -> None:
    records = [
        done("a", "gsm8k", score(), settings={"task": {"num_fewshot": None}, "chat": True, "seeds": {"random": 0}}),
        done("b", "gsm8k", score(), settings={"task": {"num_fewshot": 5}, "chat": False, "seeds": {"random": 0}}),
    ]
    assert len(lines_of(markdown(records, ["a", "b"]))) == 1


def test_differences_in_many_subtasks_are_counted_not_listed() -> None:
    few, many = ([score(f"mmlu_{n}", depth=1, samples=samples) for n in range(57)] for samples in (10, 20))
    table = markdown([done("a", "mmlu", *few), done("b", "mmlu", *many)], ["a", "b"])
    assert "documents of mmlu_2 10 and 54 more" in table


def test_a_metric_that_only_one_model_has_stays_with_its_task() -> None:
    records = [
        done("a", "t", score("t"), score("u", depth=1)),
        done("b", "t", score("t"), score("t", metric="f1"), score("u", depth=1)),
    ]
    rows = lines_of(markdown(records, ["a", "b"]))
    assert [(row[0].strip(), row[4].strip()) for row in rows] == [("t", "acc"), ("", "f1"), ("- u", "acc")]


def test_everything_that_could_bend_a_number_is_listed_once_for_all_cells_it_concerns() -> None:
    bent = {"counts": Counts(requests=80, truncated=3, empty=2, length_stopped=1), "warnings": ("branch\nmoved",)}
    table = markdown([done("a", "gsm8k", score(), **bent), done("b", "gsm8k", score(), **bent)], ["a", "b"])
    assert table.split("**What could bend these numbers**")[1].strip().splitlines() == [
        "- a/gsm8k, b/gsm8k: 3 of 80 requests had their context cut from the left to fit the model",
        "- a/gsm8k, b/gsm8k: 2 of 80 requests were answered with an empty text",
        "- a/gsm8k, b/gsm8k: 1 of 80 requests were stopped by the token limit",
        "- a/gsm8k, b/gsm8k: branch moved",
    ]


def test_requests_that_were_cut_empty_or_stopped_are_counted_in_the_table_by_model() -> None:
    records = [
        done("a", "mmlu", score("mmlu"), score("algebra", depth=1), counts=Counts(requests=80, truncated=3)),
        done("b", "mmlu", score("mmlu"), score("algebra", depth=1), counts=Counts(requests=40, length_stopped=7)),
        failed("c", "mmlu", "no memory"),
    ]
    rows = [[cell.strip() for cell in row] for row in lines_of(markdown(records, ["a", "b", "c", "d"]))]
    figure = "0.8125 ± 0.0437"
    assert [(row[0], *row[4:]) for row in rows] == [
        ("mmlu", "acc", "↑", figure, figure, "failed", "–"),
        ("", "truncated", "", "3 of 80", "0 of 40", "failed", "–"),
        ("", "length-stopped", "", "0 of 80", "7 of 40", "failed", "–"),
        ("- algebra", "acc", "↑", figure, figure, "failed", "–"),
    ]


def test_a_finished_cell_without_a_number_says_so() -> None:
    empty = done("m", "gsm8k")
    assert caveats(empty) == ["lm-eval gave no number"]
    assert lines_of(markdown([empty], ["m"]))[0][6].strip() == "–"


def test_a_bar_in_a_name_does_not_add_a_column() -> None:
    assert r"a\|b" in markdown([done("m", "a|b", score("a|b"))], ["m"])


def test_a_sweep_without_records_has_an_empty_table() -> None:
    assert len(markdown([], ["m"]).splitlines()) == 2
    assert csv_text([], ["m"]).splitlines() == [",".join(COLUMNS)]


def test_the_csv_holds_every_number_in_full_precision_and_every_cell_without_one() -> None:
    counts = Counts(requests=80, asked=68, reused=12, length_stopped=1)
    records = [
        done("a", "short", score(value=1 / 3, stderr=None), counts=counts, wall_s=3.4),
        failed("b", "short", 'two\nlines, "quoted"'),
        done("elsewhere", "short", score()),
    ]
    first, second = csv.DictReader(io.StringIO(csv_text(records, ["a", "b"])))
    assert first == {
        "model": "a",
        "task": "short",
        "lm_eval_task": "gsm8k",
        "version": "3",
        "filter": "none",
        "num_fewshot": "5",
        "metric": "acc",
        "higher_is_better": "True",
        "value": repr(1 / 3),
        "stderr": "",
        "samples": "80",
        "status": "done",
        "error": "",
        "wall_s": "3.4",
        "asked": "68",
        "reused": "12",
        "truncated": "0",
        "empty": "0",
        "length_stopped": "1",
    }
    assert (second["status"], second["error"], second["value"]) == ("failed", 'two\nlines, "quoted"', "")


def test_numbers_in_the_table_equal_those_in_the_csv() -> None:
    records = [
        done(model, task, *(score(task, metric=f"m{n}", value=(n + size) / 7, stderr=n / 70) for n in range(3)))
        for size, model in enumerate(["a", "b"])
        for task in ("gsm8k", "mmlu")
    ]
    table: dict[tuple[str, str, str], str] = {}
    name = ""
    for row in lines_of(markdown(records, ["a", "b"])):
        name = row[0].strip() or name
        for model, cell in zip(["a", "b"], row[6:], strict=True):
            table[model, name, row[4].strip()] = cell.strip()
    rows = list(csv.DictReader(io.StringIO(csv_text(records, ["a", "b"]))))
    assert len(rows) == len(table) == 12
    for row in rows:
        shown = table[row["model"], row["task"], row["metric"]]
        assert shown == f"{float(row['value']):.4f} ± {float(row['stderr']):.4f}"


def test_the_table_agrees_with_lm_evals_make_table() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    stock = utils.make_table(
        {
            "results": {
                "mmlu": {"alias": "mmlu", "acc,none": 0.25, "acc_stderr,none": 0.0123},
                "mmlu_law": {"alias": "mmlu_law", "acc,none": 0.3, "acc_stderr,none": "N/A"},
            },
            "group_subtasks": {"mmlu": ["mmlu_law"]},
            "versions": {"mmlu": 2, "mmlu_law": 1},
            "n-shot": {"mmlu_law": 0},
            "higher_is_better": {"mmlu": {"acc": True}, "mmlu_law": {"acc": True}},
        }
    )
    ours = markdown(
        [
            done(
                "m",
                "mmlu",
                score("mmlu", version="2", num_fewshot=None, value=0.25, stderr=0.0123),
                score("mmlu_law", version="1", num_fewshot=0, value=0.3, stderr=None, depth=1),
            )
        ],
        ["m"],
    )

    def words(table: str) -> list[list[str]]:
        # pytablewriter drops the zeros at the end of a column, so numbers are compared as numbers.
        cells = [re.split(r"[|±\s]+", line.strip("|")) for line in table.splitlines()[2:]]
        return [[str(float(w)) if re.fullmatch(r"[\d.]+", w) else w for w in row if w] for row in cells]

    assert words(ours) == words(stock)


def test_failures_tell_each_cause_once_with_all_it_says() -> None:
    log = "server m did not start\n\nlast lines:\n  boom\n"
    records = [failed("m", "a", log), done("m", "b", score()), failed("m", "c", log), failed("n", "a", "no data")]
    assert failures(records) == (
        "3 cells failed:\n\nm/a, m/c\n    server m did not start\n\n    last lines:\n      boom\n\nn/a\n    no data\n"
    )
    assert failures([done("m", "b", score())]) == ""
    assert reason(records[0]) == "server m did not start"
    assert reason(failed("m", "a", "")) == "no reason was recorded"


def test_every_number_in_the_readmes_table_is_the_one_of_its_run() -> None:
    """docs/demo.csv is the results.csv of the run whose table the README shows."""
    rows = list(csv.DictReader(io.StringIO((ROOT / "docs" / "demo.csv").read_text())))
    by_number = {
        (row["model"], row["lm_eval_task"], row["filter"], row["metric"]): row
        for row in rows
        if row["task"] == row["lm_eval_task"]
    }
    table = [line[1:-1].split("|") for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    start = next(number for number, cells in enumerate(table) if cells[0].strip() == "Tasks")
    models = [cell.strip() for cell in table[start][6:]]
    task, seen = "", 0
    for cells in table[start + 2 :]:
        if len(cells) != len(table[start]):
            break  # the next table
        name, _, filter_name, _, metric, _, *figures = (cell.strip() for cell in cells)
        task = name or task
        for model, figure in zip(models, figures, strict=True):
            if filter_name and figure != "–":
                row = by_number[model, task, filter_name, metric]
                stderr = f"{float(row['stderr']):.4f}" if row["stderr"] else "N/A"
                assert figure == f"{float(row['value']):.4f} ± {stderr}"
                seen += 1
    assert seen == len(by_number)
