"""The real wandb client, offline and against a stub server."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb_stub import KEY, Stub

from sweep.planning.config import WandbConfig
from sweep.record import Counts, Record, Score, Status
from sweep.results import mirror, tracking
from sweep.results.mirror import run_id
from sweep.results.tracking import Tracker, live_key, scrub, summary

SECRET = "planted-secret-4711"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    with Stub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
    assert server.unknown == []


def score(task: str, metric: str, value: float, **changes: Any) -> Score:
    fields: dict[str, Any] = {"version": "1", "filter": "none", "num_fewshot": 5, "stderr": 0.01, "samples": 40}
    return Score(task=task, metric=metric, value=value, higher_is_better=True, **fields | changes)


def record(model: str = "small", task: str = "gsm8k", scores: tuple[Score, ...] = (), **changes: Any) -> Record:
    counts = Counts(requests=40, prompt_tokens=1000, generated_tokens=200)
    fields: dict[str, Any] = {"status": Status.DONE, "counts": counts, "wall_s": 12.0}
    return Record(model=model, task=task, fingerprint="f", scores=scores, **fields | changes)


GSM8K = record(
    scores=(
        score("gsm8k", "exact_match", 0.75, filter="strict-match"),
        score("gsm8k", "exact_match", 0.7, filter="flexible-extract"),
    ),
    warnings=("2 prompts were truncated",),
)
MMLU = record(
    task="mmlu",
    scores=(
        score("mmlu", "acc", 0.5, samples=None),
        score("mmlu_stem", "acc", 0.4, samples=None, depth=1),
        score("mmlu_astronomy", "acc", 0.3, depth=2),
    ),
)
BROKEN = record(model="large", task="gsm8k", status=Status.FAILED, error="the server died", wall_s=1.0)


def track(tmp_path: Path, *, mode: str = "auto", models: dict[str, Any] | None = None) -> Tracker:
    return Tracker(
        WandbConfig(mode=mode, project="evals", tags=("nightly",)),
        sweep="night run",
        sweep_id="7f3a",
        directory=tmp_path / "runs" / "night run" / "wandb",
        models=models or {"small": {"path": "org/small"}, "large": {"path": "org/large"}},
        secrets=[SECRET],
    )


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)


def inspect(directory: Path) -> dict[str, Any]:
    """State, config and summary of a run on disk, as W&B's own tool reads them."""
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--summary", "--json", directory]
    return json.loads(subprocess.run(command, check=True, capture_output=True, cwd=directory).stdout)


def offline_run(directory: Path, model: str | None) -> Path:
    (found,) = directory.glob(f"offline-run-*-{run_id('night run', '7f3a', model)}")
    return found


def small(stub: Stub) -> Any:
    return stub.runs[run_id("night run", "7f3a", "small")]


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def child(tracker: Tracker) -> psutil.Process:
    assert tracker._process is not None
    return psutil.Process(tracker._process.pid)


# Pure


def test_an_estimate_has_the_names_of_the_summary_in_a_section_of_its_own() -> None:
    key = live_key("gsm8k-5", "exact_match__strict-match_of_finished")
    assert key == "live/gsm8k_5/exact_match__strict_match_of_finished"


def test_a_summary_names_task_metric_and_filter_in_characters_that_w_and_b_can_sort_by() -> None:
    assert summary(GSM8K) == {
        "eval/gsm8k/exact_match__strict_match": 0.75,
        "eval/gsm8k/exact_match_stderr__strict_match": 0.01,
        "eval/gsm8k/exact_match__flexible_extract": 0.7,
        "eval/gsm8k/exact_match_stderr__flexible_extract": 0.01,
        "eval/gsm8k/n": 40,
    }


def test_a_group_has_its_own_line_and_its_subtasks_below_it() -> None:
    assert summary(MMLU) == {
        "eval/mmlu/acc": 0.5,
        "eval/mmlu/acc_stderr": 0.01,
        "eval/mmlu/mmlu_stem/acc": 0.4,
        "eval/mmlu/mmlu_stem/acc_stderr": 0.01,
        "eval/mmlu/mmlu_astronomy/acc": 0.3,
        "eval/mmlu/mmlu_astronomy/acc_stderr": 0.01,
        "eval/mmlu/mmlu_astronomy/n": 40,
    }


def test_a_cell_goes_by_its_own_name_so_that_two_shot_counts_do_not_overwrite_each_other() -> None:
    cell = record(task="gsm8k@5", scores=(score("gsm8k", "acc", 0.5, stderr=None, samples=None),))
    assert summary(cell) == {"eval/gsm8k_5/acc": 0.5}
    tag = record(task="arc", scores=tuple(score(t, "acc", 0.5, stderr=None, samples=None) for t in ("easy", "hard")))
    assert summary(tag) == {"eval/arc/easy/acc": 0.5, "eval/arc/hard/acc": 0.5}


def test_run_ids_are_stable_short_and_different() -> None:
    ids = [run_id("s" * 90, "1", model) for model in ("org/m:a", "org/m#a", "x" * 90, "overview", None)]
    assert ids == [run_id("s" * 90, "1", model) for model in ("org/m:a", "org/m#a", "x" * 90, "overview", None)]
    assert len(set(ids)) == 5
    assert all(len(id) <= 64 and not set(id) & set(":;,#?/'. ") for id in ids)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"env": {"HF_TOKEN": "abc", "prompt_tokens": 5}}, {"env": {"HF_TOKEN": "***", "prompt_tokens": 5}}),
        ({"api_key": "k", "tokenizer": "org/m", "add_bos_token": True}, None),
        ([f"a {SECRET} b", ("--key", SECRET)], ["a *** b", ["--key", "***"]]),
        ({SECRET: 1}, {"***": 1}),
        ("model=x,api_key=sk-1,batch=2", "model=x,api_key=***,batch=2"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("http://me:pw@host:1/v1", "http://***@host:1/v1"),
        ({"token": {"path": "org/m"}, "s_per_token": 0.5}, {"token": {"path": "org/m"}, "s_per_token": 0.5}),
        (Path("/a/b"), "/a/b"),
    ],
)
def test_secrets_are_masked_by_value_by_name_and_in_text(given: Any, left: Any) -> None:
    left = left or {"api_key": "***", "tokenizer": "org/m", "add_bos_token": True}
    assert scrub(given, [SECRET]) == left


# Offline


def test_without_a_key_the_runs_are_complete_on_disk_and_w_and_b_s_own_command_can_send_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = track(tmp_path, models={"small": {"path": "org/small", "env": {"A": f"x{SECRET}"}}})
    tracker.progress("small", {"fraction": 0.5})
    tracker.overview({"fraction": 0.25})
    for cell in (GSM8K, MMLU, BROKEN):
        tracker.cell(cell)
    outcome = tracker.close(60)
    assert (outcome.mode, outcome.errors, outcome.urls) == ("offline", (), {})
    assert "WANDB_API_KEY" in outcome.why
    directory = tmp_path / "runs" / "night run" / "wandb"
    assert sorted(outcome.offline) == sorted(directory.glob("offline-run-*"))
    seen = inspect(offline_run(directory, "small"))
    expected = summary(GSM8K) | summary(MMLU) | {"status/tasks_done": 2, "progress/fraction": 0.5}
    assert expected.items() <= seen["summary"].items()
    assert inspect(offline_run(directory, "large"))["summary"]["status/tasks_failed"] == 1
    assert not any(SECRET.encode() in path.read_bytes() for path in directory.rglob("*") if path.is_file())

    with Stub() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        command = [Path(sys.executable).with_name("wandb"), "sync", "--yes", *outcome.offline]
        environment = {**os.environ, "WANDB_DIR": str(tmp_path)}
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=environment)
        assert summary(GSM8K).items() <= small(server).summary.items()
        assert small(server).table("results")["data"]
    assert server.unknown == []


@pytest.mark.parametrize(("mode", "variable"), [("disabled", ""), ("auto", "disabled")])
def test_switched_off_it_starts_no_process_and_writes_nothing(
    mode: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    tracker = track(tmp_path, mode=mode)
    tracker.cell(GSM8K)
    assert tracker.close(1).mode == "disabled"
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_costs_only_the_tracking(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    tracker = track(tmp_path)
    tracker.cell(GSM8K)
    assert "could not start" in tracker.close(1).errors[0]


# Online


def test_online_everything_arrives_in_one_run_a_model_and_an_overview(tmp_path: Path, stub: Stub) -> None:
    tracker = track(tmp_path)
    tracker.progress("small", {"fraction": 0.5, "elapsed_s": 3.0})
    for cell in (GSM8K, MMLU, BROKEN):
        tracker.cell(cell)
    outcome = tracker.close(60)
    assert (outcome.mode, outcome.why, outcome.errors, outcome.offline) == ("online", "", (), ())
    assert outcome.urls["small"] == f"{stub.url}/team/evals/runs/{small(stub).id}"
    overview = stub.runs[run_id("night run", "7f3a", None)]
    assert outcome.overview_url == f"{stub.url}/team/evals/runs/{overview.id}"
    assert len(stub.runs) == 3

    run = small(stub)
    sent = {key: run.sent[key] for key in ("groupName", "jobType", "displayName", "tags")}
    assert sent == {"groupName": "night run", "jobType": "eval", "displayName": "small", "tags": ["nightly"]}
    assert overview.sent["jobType"] == "sweep"
    assert run.config["path"]["value"] == "org/small"
    assert run.config["sweep"]["value"] == {"name": "night run", "id": "7f3a"}
    assert summary(GSM8K).items() <= run.summary.items()
    assert summary(MMLU).items() <= run.summary.items()
    assert (run.summary["status/tasks_done"], run.summary["status/warnings"]) == (2, 1)
    assert (run.summary["cost/wall_s"], run.summary["cost/prompt_tokens"]) == (24.0, 2000)
    assert [row["progress/fraction"] for row in run.history if "progress/fraction" in row] == [0.5]
    assert run.exit_code == 0

    results = run.table("results")
    row = dict(zip(results["columns"], results["data"][0], strict=True))
    assert (row["task"], row["filter"], row["value"], row["n"]) == ("gsm8k", "strict-match", 0.75, 40)
    assert row["warnings"] == "2 prompts were truncated"
    assert len(results["data"]) == 5
    leaders = overview.table("leaderboard")["data"]
    assert [(row[0], row[1], row[7]) for row in leaders] == [
        ("small", "gsm8k", 0.75),
        ("small", "gsm8k", 0.7),
        ("small", "mmlu", 0.5),
        ("large", "gsm8k", None),
    ]
    assert leaders[-1][-1] == "the server died"
    assert {a["state"] for a in stub.artifacts.values()} == {"COMMITTED"}


def test_no_byte_that_arrives_holds_a_secret_or_tells_how_it_was_started(tmp_path: Path, stub: Stub) -> None:
    tracker = track(tmp_path, models={"small": {"server": {"api_key": "short"}, "url": f"http://u:{SECRET}@h/"}})
    tracker.cell(record(status=Status.FAILED, error=f"401 for key {SECRET}", warnings=("api_key=a-planted-key",)))
    tracker.progress(SECRET, {f"x{SECRET}": 1.0})
    assert tracker.close(60).errors == ()
    assert len(stub.received) > 10
    arrived = b"\n".join(stub.received)
    for planted in (SECRET, KEY, '"short"', "a-planted-key", sys.executable, "test_tracking"):
        assert planted.encode() not in arrived, planted
    assert {run.sent["host"] for run in stub.runs.values()} == {"lmsweep"}


def test_a_resumed_sweep_continues_its_runs_and_publishes_the_whole_summary_again(tmp_path: Path, stub: Stub) -> None:
    for attempt, cells in enumerate([(GSM8K,), (GSM8K, MMLU)]):
        tracker = track(tmp_path, models={"small": {"attempt": attempt}})
        tracker.progress("small", {"fraction": float(attempt)})
        for cell in cells:
            tracker.cell(cell)
        outcome = tracker.close(60)
        assert (outcome.mode, outcome.errors) == ("online", ())
    run = small(stub)
    assert len(stub.runs) == 2
    assert [row["progress/fraction"] for row in run.history if "progress/fraction" in row] == [0.0, 1.0]
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert (summary(GSM8K) | summary(MMLU)).items() <= run.summary.items()
    assert run.summary["status/tasks_done"] == 2
    assert run.config["attempt"]["value"] == 1
    assert len(run.table("results")["data"]) == 5


def test_what_does_not_stand_any_more_leaves_the_summaries_of_a_resumed_sweep(tmp_path: Path, stub: Stub) -> None:
    tracker = track(tmp_path)
    tracker.stands([GSM8K, MMLU, BROKEN])
    assert tracker.close(60).errors == ()
    overview = stub.runs[run_id("night run", "7f3a", None)]
    assert (small(stub).summary["status/tasks_done"], overview.summary["status/models"]) == (2, 2)

    one_filter = record(scores=GSM8K.scores[:1])
    tracker = track(tmp_path)
    tracker.progress("small", {"fraction": 0.5})
    tracker.stands([MMLU])
    tracker.cell(one_filter)
    assert tracker.close(60).errors == ()
    assert of_cells(small(stub)) == summary(one_filter) | summary(MMLU)
    assert small(stub).summary["status/tasks_done"] == 2
    assert len(small(stub).table("results")["data"]) == 4
    large = stub.runs[run_id("night run", "7f3a", "large")].summary
    assert (large["status/tasks_failed"], "results" in large) == (0, False)
    assert {row[0] for row in overview.table("leaderboard")["data"]} == {"small"}

    tracker = track(tmp_path)
    tracker.stands([])
    assert tracker.close(60).errors == ()
    for run in stub.runs.values():
        assert not [key for key in run.summary if key.startswith(mirror.OF_CELLS)]
        assert run.summary["status/tasks_done"] == 0
    assert small(stub).summary["progress/fraction"] == 0.5


def test_a_cell_that_fails_under_other_settings_takes_its_old_numbers_along(tmp_path: Path, stub: Stub) -> None:
    tracker = track(tmp_path, models={"small": {}})
    for cell in (MMLU, GSM8K, record(status=Status.FAILED, error="out of memory")):
        tracker.cell(cell)
    assert tracker.close(60).errors == ()
    assert of_cells(small(stub)) == summary(MMLU)
    assert small(stub).summary["status/tasks_failed"] == 1


def of_cells(run: Any) -> dict[str, Any]:
    return {key: value for key, value in run.summary.items() if key.startswith("eval/")}


def test_a_login_counts_as_a_key(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {stub.url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    assert track(tmp_path).close(60).mode == "online"


# W&B away, refusing, dead


def test_when_w_and_b_never_answers_the_sweep_is_tracked_offline_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        started = time.monotonic()
        tracker = track(tmp_path, mode="online")
        tracker.cell(GSM8K)
        assert time.monotonic() - started < 0.5
        outcome = tracker.close(60)
    assert time.monotonic() - started < mirror.PREFLIGHT_S + 12
    assert outcome.mode == "offline"
    assert "did not answer" in outcome.why or "timed out" in outcome.why
    assert len(outcome.offline) == 2


@pytest.mark.parametrize("refused", ["Viewer", "UpsertBucket"])
def test_a_refused_key_or_first_run_leaves_complete_offline_runs(refused: str, tmp_path: Path, stub: Stub) -> None:
    stub.fault = lambda method, path, operation: {"Viewer": 401, "UpsertBucket": 403}[refused] * (operation == refused)
    tracker = track(tmp_path)
    tracker.cell(GSM8K)
    outcome = tracker.close(60)
    assert (outcome.mode, outcome.errors) == ("offline", ())
    assert "401" in outcome.why or "refused the first run" in outcome.why
    seen = inspect(offline_run(tmp_path / "runs" / "night run" / "wandb", "small"))
    assert summary(GSM8K).items() <= seen["summary"].items()


@pytest.mark.slow  # the client looks for it every 15 s
def test_a_stream_that_is_refused_for_good_is_told(tmp_path: Path, stub: Stub) -> None:
    stub.fault = lambda method, path, operation: 403 if path.endswith("file_stream") else None
    tracker = track(tmp_path, models={})
    tracker.overview({"fraction": 0.5})
    wait_until(lambda: tracker._errors)
    assert "W&B stopped run night run" in tracker.close(60).errors[0]


@pytest.mark.parametrize("victim", ["child", "wandb-core"])
def test_when_its_process_dies_there_is_one_warning_and_calls_still_return_at_once(
    victim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = track(tmp_path)
    process = child(tracker)
    wait_until(lambda: [p for p in process.children(recursive=True) if p.name() == "wandb-core"])
    wait_until(lambda: tracker._offline)
    (core,) = [p for p in process.children(recursive=True) if p.name() == "wandb-core"]
    (process if victim == "child" else core).kill()
    if victim == "wandb-core":
        wait_until(lambda: gone(core))
        tracker.cell(GSM8K)
    wait_until(lambda: tracker._closing)
    started = time.monotonic()
    for _ in range(1000):
        tracker.progress("small", {"fraction": 0.5})
    tracker.cell(GSM8K)
    assert time.monotonic() - started < 0.5
    outcome = tracker.close(60)
    assert time.monotonic() - started < 5
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert any("W&B's process ended" in error for error in outcome.errors)
    assert "1001 updates" in outcome.errors[-1]
    wait_until(lambda: gone(core))


def test_a_process_that_hangs_is_stopped_at_the_deadline_with_its_service(tmp_path: Path) -> None:
    tracker = track(tmp_path)
    process = child(tracker)
    wait_until(lambda: tracker._offline)
    family = [process, *process.children(recursive=True)]
    process.suspend()
    started = time.monotonic()
    for _ in range(3 * tracking.QUEUED):
        tracker.progress("small", {"fraction": 0.5})
    assert time.monotonic() - started < 3
    outcome = tracker.close(1.0)
    assert time.monotonic() - started < 7
    assert any("in time" in error for error in outcome.errors)
    assert any("were not sent" in error for error in outcome.errors)
    wait_until(lambda: all(gone(process) for process in family))


DRIVER = """
import sys, time
from pathlib import Path
from test_tracking import GSM8K, track
tracker = track(Path(sys.argv[1]))
tracker.cell(GSM8K)
print(tracker._process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("online", [False, True])
def test_when_the_driver_is_killed_the_child_ends_by_itself_with_complete_runs(
    online: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    stub = request.getfixturevalue("stub") if online else None
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert driver.stdout is not None
    tracked = psutil.Process(int(driver.stdout.readline()))
    directory = tmp_path / "runs" / "night run" / "wandb"
    wait_until(lambda: list(directory.glob(f"*run-*-{run_id('night run', '7f3a', 'small')}")))
    family = [tracked, *tracked.children(recursive=True)]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    wait_until(lambda: all(gone(process) for process in family), 15)
    if stub is None:
        seen = inspect(offline_run(directory, "small"))["summary"]
    else:
        seen = small(stub).summary
        assert small(stub).exit_code == 1
    assert summary(GSM8K).items() <= seen.items()
    assert seen["results"]["nrows"] == 2
