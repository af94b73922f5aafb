"""Which samples may leave, which of them are taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.planning.config import Model, SweepConfig, Task, WandbConfig
from sweep.results.sharing import ROWS, picked, shared_rows, table

GATED = "gpqa_main_zeroshot"


def config(samples: bool | int, **tasks: Task) -> SweepConfig:
    return SweepConfig(name="s", models={"m": Model(path="p")}, tasks=tasks, wandb=WandbConfig(samples=samples))


def line(number: int, *, filter: str = "none", **changes: Any) -> str:
    row = {
        "doc_id": number,
        "doc": {"question": f"q{number}"},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": f"prompt {number}", "arg_1": {"until": ["\n"]}}},
        "resps": [[f"answer {number}"]],
        "filtered_resps": [f"{number}"],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": f"d{number}",
        "prompt_hash": f"p{number}",
        "target_hash": "t",
        "exact_match": number % 2,
    }
    return json.dumps(row | changes)


def written(folder: Path, subtask: str, lines: list[str]) -> Path:
    path = folder / f"samples_{subtask}_2026-11-26T01-33-12.123204.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{one}\n" for one in lines))
    return path


@pytest.mark.parametrize(
    ("samples", "share", "rows"),
    [(False, None, 0), (0, True, 0), (True, None, ROWS), (7, None, 7), (7, True, 7), (7, False, 0)],
)
def test_samples_are_shared_where_the_sweep_asks_and_the_task_does_not_refuse(
    samples: bool | int, share: bool | None, rows: int
) -> None:
    found = shared_rows(config(samples, sums=Task(task="gsm8k", share_samples=share)))
    assert found == ({"sums": rows} if rows else {})


@pytest.mark.parametrize(("share", "rows"), [(None, {}), (False, {}), (True, {"hard": 7})])
def test_samples_of_a_gated_data_set_are_shared_only_where_that_is_said(
    share: bool | None, rows: dict[str, int]
) -> None:
    assert shared_rows(config(7, hard=Task(task=GATED, share_samples=share))) == rows


def test_the_same_documents_are_taken_for_every_model_with_all_their_filters(tmp_path: Path) -> None:
    lines = [line(doc, filter=filter) for filter in ("strict", "flexible") for doc in range(50)]
    first = written(tmp_path / "a", "gsm8k", lines)
    second = written(tmp_path / "b", "gsm8k", lines[::-1])
    (taken,) = picked([first], 9).values()
    documents = [json.loads(one)["doc_id"] for one in taken]
    assert len(taken) == 8  # a ninth would be one filter of a document
    assert sorted(documents) == sorted([*set(documents)] * 2)
    assert sorted(picked([second], 9)[second]) == sorted(taken)
    assert set(documents) < {json.loads(one)["doc_id"] for one in picked([first], 30)[first]}


def test_a_group_shares_its_rows_among_subtasks(tmp_path: Path) -> None:
    paths = [written(tmp_path, f"mmlu_{name}", [line(doc) for doc in range(100)]) for name in ("law", "physics")]
    taken = picked(paths, 20)
    assert sum(map(len, taken.values())) == 20
    assert all(len(lines) > 3 for lines in taken.values())


def test_what_is_taken_is_in_the_order_of_the_file_and_never_more_than_there_is(tmp_path: Path) -> None:
    path = written(tmp_path, "gsm8k", [line(doc) for doc in range(5)])
    assert [json.loads(one)["doc_id"] for one in picked([path], 200)[path]] == list(range(5))


def test_a_table_has_texts_as_they_are_and_choices_beside_what_they_got(tmp_path: Path) -> None:
    generated = written(tmp_path, "gsm8k", [line(3)])
    choices = {"gen_args_0": {"arg_0": "Q", "arg_1": " a"}, "gen_args_1": {"arg_0": "Q", "arg_1": " b"}}
    scored = line(1, arguments=choices, resps=[[["-1.5", "True"]], [["-2.5", "False"]]], filtered_resps=["x", "y"])
    chosen = written(tmp_path, "arc", [scored])
    columns, rows = table(picked([generated, chosen], 10))
    arc, gsm8k = (dict(zip(columns, row, strict=True)) for row in rows)
    assert (gsm8k["subtask"], gsm8k["prompt"], gsm8k["response"], gsm8k["answer"]) == (
        "gsm8k",
        "prompt 3",
        "answer 3",
        "3",
    )
    assert (gsm8k["target"], gsm8k["exact_match"], gsm8k["doc_hash"]) == ("4", 1, "d3")
    assert arc["prompt"] == "Q"
    assert json.loads(arc["response"]) == [[" a", ["-1.5", "True"]], [" b", ["-2.5", "False"]]]
