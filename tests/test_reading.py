"""A run directory read back: what the last launch planned, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.errors import StoreError
from sweep.record import Record, Status
from sweep.results.reading import Sweep, read_sweep
from sweep.results.store import RunDirectory, Store
from sweep.results.timeline import TimelineWriter


def record(model: str, task: str, **changes: Any) -> Record:
    known = {"fingerprint": f"{model} {task}", "status": Status.DONE}
    return Record(model=model, task=task, **{**known, **changes})


def a_line(doc_id: int, **changes: Any) -> bytes:
    """Of lm-eval's samples_*.jsonl."""
    row = {
        "doc_id": doc_id,
        "doc": {"question": "<b>?"},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": "2 + 2 =", "arg_1": {"until": ["\n"]}}},
        "resps": [["4"]],
        "filtered_resps": ["4"],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "doc_hash": f"d{doc_id}",
        "prompt_hash": f"p{doc_id}",
        "target_hash": "t",
        "exact_match": 1.0,
    }
    return json.dumps(row | changes).encode() + b"\n"


def launched(
    root: Path, cells: list[str], *, config: str = "name: two\nmodels: {b: {}, a: {}}\ntasks: {t: {}, u: {}}\n"
) -> None:
    """A run directory after `cells` were planned."""
    root.mkdir(exist_ok=True)
    planned = {cell: {"fingerprint": cell.replace("/", " ")} for cell in cells}
    (root / "plan.json").write_text(json.dumps({"cells": planned}))
    (root / "config.yaml").write_text(config)


def stored(root: Path, *records: Record, files: dict[str, bytes] | None = None) -> None:
    store = Store(RunDirectory(root))
    for one in records:
        store.write_record(one, files or {})
    store.close()


def keys(sweep: Sweep) -> list[str]:
    return [f"{r.model}/{r.task}" for r in sweep.records]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_records_come_by_task_and_model_in_the_order_of_the_sweep_file(root: Path) -> None:
    launched(root, ["a/t", "a/u", "b/t", "b/u"])
    stored(root, record("a", "u"), record("b", "t"), record("a", "t"), record("b", "u", status=Status.FAILED))
    sweep = read_sweep(root)
    assert keys(sweep) == ["b/t", "a/t", "b/u", "a/u"]
    assert (sweep.name, sweep.models, sweep.tasks) == ("two", ("b", "a"), ("t", "u"))
    assert (sweep.owed, sweep.left_out) == (1, 0)
    assert sweep.record("b", "u") == record("b", "u", status=Status.FAILED)
    assert sweep.record("b", "v") is None


def test_records_of_other_settings_and_of_cells_that_are_no_longer_planned_are_left_out(root: Path) -> None:
    launched(root, ["a/t", "b/t"])
    stored(root, record("a", "t"), record("b", "t", fingerprint="with another limit"), record("a", "gone"))
    sweep = read_sweep(root)
    assert keys(sweep) == ["a/t"]
    assert (sweep.owed, sweep.left_out) == (1, 2)


def test_a_sweep_is_read_while_its_driver_holds_the_directory(root: Path) -> None:
    launched(root, ["a/t", "b/t"])
    store = Store(RunDirectory(root))
    store.write_record(record("a", "t"), {})
    TimelineWriter(RunDirectory(root).timeline, clock=lambda: 1.0).add("cell", "b/t", "running")
    assert keys(read_sweep(root)) == ["a/t"]
    assert [span.name for span in read_sweep(root).timeline.cells] == ["b/t"]
    store.close()


def test_what_a_launch_without_its_config_left_is_read(root: Path) -> None:
    launched(root, ["a/t"])
    (root / "config.yaml").unlink()
    stored(root, record("a", "t"))
    sweep = read_sweep(root)
    assert (sweep.name, sweep.models, sweep.tasks, keys(sweep)) == ("run", ("a",), ("t",), ["a/t"])


def test_samples_of_all_files_and_filters_come_with_their_subtask(root: Path) -> None:
    launched(root, ["a/t"])
    files = {
        "samples_t_two_2026-11-26T09-14-05.000001.jsonl": a_line(0),
        "samples_t_one_2026-11-26T09-14-05.000001.jsonl": a_line(0) + a_line(1, exact_match=0.0, doc="a text alone"),
        "results_2026-11-26T09-14-05.000001.json": b"{}",
    }
    names = tuple(f"results/t/a/{name}" for name in files)
    stored(root, record("a", "t", files=names), files=files)
    sweep = read_sweep(root)
    samples = list(sweep.samples(sweep.records[0]))
    assert [(s.subtask, s.doc_id, s.doc_hash, s.metrics) for s in samples] == [
        ("t_one", 0, "d0", {"exact_match": 1.0}),
        ("t_one", 1, "d1", {"exact_match": 0.0}),
        ("t_two", 0, "d0", {"exact_match": 1.0}),
    ]
    assert samples[1].doc == {"doc": "a text alone"}
    assert samples[0].arguments["gen_args_0"]["arg_0"] == "2 + 2 ="
    assert (samples[0].resps, samples[0].filtered_resps, samples[0].filter) == ((["4"],), ("4",), "strict-match")


def test_a_sample_file_that_is_gone_or_damaged_is_named(root: Path) -> None:
    launched(root, ["a/t"])
    name = "results/t/a/samples_t_2026.jsonl"
    stored(root, record("a", "t", files=(name,)))
    sweep = read_sweep(root)
    with pytest.raises(StoreError, match=r"samples_t_2026\.jsonl"):
        list(sweep.samples(sweep.records[0]))
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(a_line(0)[:-20])
    with pytest.raises(StoreError, match=r"samples_t_2026\.jsonl"):
        list(sweep.samples(sweep.records[0]))


def test_a_folder_that_is_no_run_directory_is_refused(root: Path) -> None:
    with pytest.raises(StoreError, match=r"nothing was launched into .* yet \(there is no plan\.json\)"):
        read_sweep(root)
