"""The demo as a user runs it: four real vLLM servers, Ray, lm-eval and the W&B client."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sweep import demo
from sweep.record import Record, Status
from sweep.results.store import RunDirectory, read_records

ROOT = Path(__file__).parent.parent

GONE_S = 15.0
"""What is ours must be gone so long after the command has ended."""

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    demo.make(ROOT / ".demo")
    runs = tmp_path_factory.mktemp("runs")
    return [sys.executable, "launch.py", "conf=demo", f"runs_dir={runs}"]


@pytest.fixture(scope="module")
def directory(launch: list[str]) -> RunDirectory:
    """Of a finished demo sweep."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HF_"))}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\x1b" not in done.stdout
    return RunDirectory(Path(launch[-1].partition("=")[2]) / "demo")


@pytest.fixture(scope="module")
def records(directory: RunDirectory) -> dict[tuple[str, str], Record]:
    return read_records(directory)


def score(record: Record, metric: str) -> float:
    return next(s.value for s in record.scores if s.metric == metric and s.depth == 0)


def test_every_cell_is_done_on_a_real_server(records: dict[tuple[str, str], Record]) -> None:
    assert len(records) == 21
    assert {record.status for record in records.values()} == {Status.DONE}
    assert {record.versions["vllm"] for record in records.values()} == {"0.32.0 (float16 on cpu)"}


def test_the_models_differ_as_they_were_trained_to(records: dict[tuple[str, str], Record]) -> None:
    accuracy = {model: score(records[model, "demo_animals"], "acc") for model, _ in records}
    assert accuracy["demo-nano"] < 0.5
    assert accuracy["demo-base"] > 0.8
    assert accuracy["demo-base-awq"] == pytest.approx(accuracy["demo-base"], abs=0.1)


def test_the_last_model_was_served_as_awq(directory: RunDirectory) -> None:
    assert "LinearKernel for AutoAWQ" in directory.server_log("demo-base-awq-0").read_text()


def test_both_ways_of_scoring_were_used(records: dict[tuple[str, str], Record]) -> None:
    assert set(records["demo-base", "demo_capitals_mc"].settings["methods"]) == {"next_token"}
    assert set(records["demo-base", "demo_stories"].settings["methods"]) == {"prompt_logprobs"}


def test_every_record_tells_what_its_server_was_asked(records: dict[tuple[str, str], Record]) -> None:
    for (model, _), record in records.items():
        checks = record.settings["preflight"]
        assert {check["model"] for check in checks} == {model}
        assert {check["name"]: check["outcome"] for check in checks} == dict.fromkeys(
            (
                *("key", "served name", "max_model_len", "completion logprobs", "chat logprobs", "echo", "tokenizer"),
                *("next_token", "prompt_logprobs", "forced_decoding"),
            ),
            "passed",
        )


def test_the_table_holds_the_numbers_of_the_records(
    directory: RunDirectory, records: dict[tuple[str, str], Record]
) -> None:
    rows = list(csv.DictReader(directory.csv.read_text().splitlines()))
    for (model, task), record in records.items():
        found = {
            (r["metric"], r["filter"], r["lm_eval_task"]): float(r["value"])
            for r in rows
            if (r["model"], r["task"]) == (model, task)
        }
        assert found == {(s.metric, s.filter, s.task): s.value for s in record.scores}


def test_lm_eval_files_of_every_cell_are_there(directory: RunDirectory, records: dict[tuple[str, str], Record]) -> None:
    for record in records.values():
        assert any("results_" in name for name in record.files)
        assert any("samples_" in name for name in record.files)
        assert all((directory.root / name).stat().st_size for name in record.files)


def test_each_model_and_the_sweep_have_an_offline_w_and_b_run(directory: RunDirectory) -> None:
    assert len(list(directory.wandb.glob("offline-run-*"))) == 5


def test_nothing_is_left_running_or_listening(directory: RunDirectory) -> None:
    def left() -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "pid"]):
            words = " ".join(process.info["cmdline"] or ())
            if f"{ROOT}/.demo/models" in words or str(directory.root) in words:
                found.append(words)
        return found

    deadline = time.monotonic() + GONE_S
    while left() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left()


def test_the_same_command_again_starts_nothing(launch: list[str], directory: RunDirectory) -> None:
    logs = sorted(path.name for path in directory.logs.iterdir())
    start = time.monotonic()
    again = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "all 21 cells are done" in again.stdout
    assert time.monotonic() - start < 10
    assert sorted(path.name for path in directory.logs.iterdir()) == logs
