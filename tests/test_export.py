"""Parquet of a run directory: the very values that are in its files, however many there are."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from test_reading import a_line, launched, record

from sweep.errors import StoreError
from sweep.evaluating.lm import GenerationAnswer, PairAnswer
from sweep.record import Score, Status
from sweep.results import export as module
from sweep.results.export import GROUP_ROWS, RESPONSES, SAMPLES, SCORES, export
from sweep.results.reading import read_sweep
from sweep.results.report import COLUMNS, rows
from sweep.results.store import Response, RunDirectory, Store

SCORE = Score(
    task="t",
    version="1",
    filter="none",
    num_fewshot=None,
    metric="acc",
    value=0.1 + 0.2,
    stderr=None,
    higher_is_better=True,
    samples=2,
)


def responses(number: int) -> list[Response]:
    pair = PairAnswer(logprob=-1.5, is_greedy=True, engine="0.32.0", tokens=3)
    generated = GenerationAnswer(text="<b>4</b>", finish_reason="stop", tokens=5, engine="0.32.0")
    answers = [msgspec.json.encode(answer) for answer in (pair, generated)]
    return [
        Response(key=n.to_bytes(16), cell="a/t", method="echo" if n % 2 == 0 else "generate", answer=answers[n % 2])
        for n in range(number)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of a sweep with a done cell, a failed one and two responses."""
    root = tmp_path / "run"
    launched(root, ["a/t", "b/t"])
    file = "results/t/a/samples_t_2026-11-26T09-14-05.000001.jsonl"
    lines = a_line(0, metrics=["acc", "bits"], acc=True, bits=[-1.0, 7]) + a_line(1, metrics=["acc"], acc=0.0)
    store = Store(RunDirectory(root))
    store.write_record(record("a", "t", scores=(SCORE,), files=(file,)), {Path(file).name: lines})
    store.write_record(record("b", "t", status=Status.FAILED, error="no memory\nlog"), {})
    store.put(responses(2))
    store.close()
    return root


def exported(root: Path, name: str) -> list[dict[str, Any]]:
    said: list[str] = []
    export(read_sweep(root), root / "export", say=said.append)
    assert [line.split()[-1] for line in said] == [
        str(root / "export" / f"{file}.parquet") for file in ("scores", "samples", "responses")
    ]
    found: list[dict[str, Any]] = pq.read_table(root / "export" / f"{name}.parquet").to_pylist()
    return found


def test_scores_are_those_of_the_csv_with_their_types(root: Path) -> None:
    sweep = read_sweep(root)
    assert tuple(SCORES.names) == COLUMNS
    assert exported(root, "scores") == [{**dict.fromkeys(COLUMNS), **row} for row in rows(sweep.records, sweep.models)]


def test_samples_hold_what_the_files_of_lm_eval_do_and_a_column_for_each_metric(root: Path) -> None:
    first, second = exported(root, "samples")
    assert {k: first[k] for k in ("model", "task", "subtask", "filter", "doc_id", "doc_hash", "prompt_hash")} == {
        "model": "a",
        "task": "t",
        "subtask": "t",
        "filter": "strict-match",
        "doc_id": 0,
        "doc_hash": "d0",
        "prompt_hash": "p0",
    }
    assert (first["metric_acc"], second["metric_acc"]) == (1.0, 0.0)
    assert json.loads(first["metrics"]) == {"acc": True, "bits": [-1.0, 7]}
    assert json.loads(first["doc"]) == {"question": "<b>?"}
    assert json.loads(first["arguments"])["gen_args_0"]["arg_0"] == "2 + 2 ="
    assert (json.loads(first["resps"]), json.loads(first["filtered_resps"])) == ([["4"]], ["4"])
    assert json.loads(first["target"]) == "4"


def test_responses_come_as_they_are_stored_in_the_order_of_their_arrival(root: Path) -> None:
    pair, generated = exported(root, "responses")
    known = {"model": "a", "task": "t", "engine": "0.32.0", "cut": 0, "stop_token": None}
    assert pair == known | {
        "key": f"{0:032x}",
        "method": "echo",
        "logprob": -1.5,
        "is_greedy": True,
        "text": None,
        "finish_reason": None,
        "tokens": 3,
    }
    assert generated == known | {
        "key": f"{1:032x}",
        "method": "generate",
        "logprob": None,
        "is_greedy": None,
        "text": "<b>4</b>",
        "finish_reason": "stop",
        "tokens": 5,
    }


def test_every_column_is_documented() -> None:
    documented = module.__doc__ or ""
    for schema in (SCORES, SAMPLES, RESPONSES):
        for name in schema.names:
            assert any(name in row.split("|")[1] for row in documented.splitlines() if row.startswith("| ")), name


def test_what_a_driver_at_work_holds_is_left_out_and_the_rest_is_written(root: Path) -> None:
    store, said = Store(RunDirectory(root)), list[str]()
    with pytest.raises(StoreError, match=r"the responses are not exported: .*/run is in use by process \d+"):
        export(read_sweep(root), root / "export", say=said.append)
    store.close()
    assert sorted(path.name for path in (root / "export").iterdir()) == ["samples.parquet", "scores.parquet"]
    assert len(said) == 2


def test_the_export_leaves_the_store_as_it_was(root: Path) -> None:
    held = ("lock", "heartbeat.json")  # while it reads
    before = {path: path.read_bytes() for path in root.iterdir() if path.is_file() and path.name not in held}
    exported(root, "responses")
    assert {path: path.read_bytes() for path in before} == before


def test_a_sample_file_that_cannot_be_read_leaves_no_half_of_a_table(root: Path) -> None:
    exported(root, "samples")
    whole = (root / "export" / "samples.parquet").read_bytes()
    (file,) = (root / "results").rglob("samples_*")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(StoreError, match=file.name):
        export(read_sweep(root), root / "export", say=lambda _: None)
    assert (root / "export" / "samples.parquet").read_bytes() == whole
    assert not list((root / "export").glob(".*"))


def test_a_sweep_without_answers_says_so(root: Path) -> None:
    said: list[str] = []
    (root / "responses.db").unlink()
    export(read_sweep(root), root / "export", say=said.append)
    assert said[-1] == f"no responses: there is no {root}/responses.db"


def test_many_rows_are_written_in_groups(root: Path) -> None:
    store = Store(RunDirectory(root))
    store.put(responses(GROUP_ROWS + 10))
    store.close()
    assert len(exported(root, "responses")) == GROUP_ROWS + 10
    assert pq.ParquetFile(root / "export" / "responses.parquet").num_row_groups == 2
