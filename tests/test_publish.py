"""W&B failing in every known way while a sweep runs, and what publish() makes of the run directory afterwards."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from test_sharing import GATED, line
from test_tracking import BROKEN, GSM8K, KEY, SECRET, child, gone, isolated, stub, wait_until
from wandb_stub import CUT, Run, Stub

from sweep.planning.config import Model, SweepConfig, Task, WandbConfig
from sweep.record import Record
from sweep.results import wandb_report
from sweep.results.mirror import ROW, read_history, run_id
from sweep.results.publish import mirror_of, publish, recipe
from sweep.results.reading import read_sweep
from sweep.results.store import RunDirectory, Store, set_aside
from sweep.results.timeline import TimelineWriter
from sweep.results.tracking import Outcome, Tracker, summary

__all__ = ["isolated", "stub"]  # fixtures

SLOWEST_S = 0.05
"""Of a call on the evaluation's side."""
OF_THE_MACHINE = ("pretty_env_info", "git_hash", "upper_git_hash")
"""In lm-eval's result files."""


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return SweepConfig(
        name="night",
        models={name: Model(path=f"org/{name}") for name in ("small", "large")},
        tasks={"gsm8k": Task(task="gsm8k")},
        runs_dir=str(tmp_path / "runs"),
        wandb=WandbConfig(project="evals", report=False),
    )


def directory_of(config: SweepConfig) -> RunDirectory:
    return RunDirectory(Path(config.runs_dir) / config.name)


def carried_out(config: SweepConfig, *records: Record) -> RunDirectory:
    """A run directory as a sweep leaves it, but for W&B."""
    directory = directory_of(config)
    for record in records:
        folder = directory.cell_results(record.model, record.task)
        folder.mkdir(parents=True)
        results, samples = folder / "results_2026.json", folder / f"samples_{record.task}_2026.jsonl"
        results.write_text(
            json.dumps({"results": {record.task: {}}} | dict.fromkeys(OF_THE_MACHINE, "planted-machine"))
        )
        lines = [line(doc, doc={"question": f"question {doc} of {record.task}"}) for doc in range(10)]
        samples.write_text("".join(f"{one}\n" for one in lines))
        files = tuple(str(path.relative_to(directory.root)) for path in (results, samples))
        path = directory.record(record.model, record.task)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(msgspec.json.encode(replace(record, files=files)))
    cells = {f"{r.model}/{r.task}": {"fingerprint": r.fingerprint} for r in records}
    directory.plan.write_text(json.dumps({"commits": {}, "cells": cells}))
    directory.config.write_text(json.dumps(asdict(config)))  # JSON is YAML
    return directory


def on_disk(config: SweepConfig) -> dict[str, str]:
    """What the sweep itself has written."""
    root = directory_of(config).root
    files = [path for path in root.rglob("*") if path.is_file() and "wandb" not in path.relative_to(root).parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def published(config: SweepConfig) -> Outcome:
    return publish(read_sweep(directory_of(config).root), config, secrets=[SECRET], timeout_s=120)


def run_of(stub: Stub, config: SweepConfig, model: str | None) -> Run:
    return stub.runs[run_id(config.name, str(directory_of(config).root), model)]


def work(tracker: Tracker, records: tuple[Record, ...]) -> float:
    """What a runner tells; the longest that it had to wait, of three times where the machine was busy: who waits for
    W&B does so every time."""

    def told(call: Callable[[], None]) -> float:
        began = time.monotonic()
        call()
        return time.monotonic() - began

    calls: list[Callable[[], None]] = [lambda: tracker.overview({"cells_done": 1})]
    calls += [lambda: tracker.progress("small", {"fraction": 0.5, "server/running": 3})] * 20
    calls += [lambda record=record: tracker.cell(record) for record in records]  # type: ignore[misc]
    slowest = [max(map(told, calls)) for _ in range(3)]
    return min(slowest)


def require_complete(stub: Stub, config: SweepConfig, *records: Record) -> None:
    kept = read_history(directory_of(config).wandb)
    for model in (None, "small", "large"):
        run = run_of(stub, config, model)
        assert [row[ROW] for row in run.history if ROW in row] == list(range(len(kept.get(model, ()))))
        assert [row["_step"] for row in run.history] == list(range(len(run.history)))
        mine = [record for record in records if record.model == model]
        expected = {key: value for record in mine for key, value in summary(record).items()}
        assert {key: value for key, value in run.summary.items() if key.startswith("eval/")} == expected
        assert run.exit_code == 0
        assert run.table("results" if model else "leaderboard")["data"]
    collections = {a["input"]["artifactCollectionName"] for a in stub.artifacts.values() if a["state"] == "COMMITTED"}
    assert f"{run_of(stub, config, 'small').id}-results" in collections
    assert not any(name.endswith("-samples") for name in collections)


def down(stub: Stub, tracker: Tracker) -> None:
    """From the beginning: nothing to do here."""


def lost(stub: Stub, tracker: Tracker) -> None:
    wait_until(lambda: tracker._overview_url, 90)
    stub.fault = lambda method, path, operation: CUT


def core_killed(stub: Stub, tracker: Tracker) -> None:
    wait_until(lambda: tracker._overview_url, 90)
    (core,) = [p for p in child(tracker).children(recursive=True) if p.name() == "wandb-core"]
    core.kill()
    wait_until(lambda: gone(core))


def always(status: int, what: str = "") -> Callable[[str, str, str], int | None]:
    return lambda method, path, operation: status if what in (path, operation, path.split("/")[-1], "") else None


def first(count: int, status: int) -> Callable[[str, str, str], int | None]:
    left = [status] * count
    return lambda method, path, operation: left.pop() if path.endswith("file_stream") and left else None


@pytest.mark.parametrize(
    ("fault", "meanwhile", "mode", "said"),
    [
        pytest.param(always(CUT), down, "offline", "could not be reached", id="down at init"),
        pytest.param(always(401, "Viewer"), down, "offline", "401", id="401"),
        pytest.param(None, lost, "online", "in time", id="lost in the middle"),
        pytest.param(first(2, 429), down, "online", "", id="429"),
        pytest.param(first(1, 403), down, "online", "for good", id="one 403 on the stream"),
        pytest.param(None, core_killed, "online", "is gone", id="wandb-core killed"),
    ],
)
def test_whatever_w_and_b_does_the_sweep_goes_on_and_publish_completes_the_runs(
    fault: Any, meanwhile: Any, mode: str, said: str, config: SweepConfig, stub: Stub
) -> None:
    if fault:
        stub.fault = fault
    directory = carried_out(config, GSM8K, BROKEN)
    before = on_disk(config)
    tracker = mirror_of(config, directory, [SECRET])
    meanwhile(stub, tracker)
    assert work(tracker, read_sweep(directory.root).records) < SLOWEST_S
    outcome = tracker.close(120 if said != "in time" else 5)
    assert outcome.mode == mode
    assert said in " ".join((outcome.why, *outcome.errors))
    assert bool(outcome.errors) == (mode == "online" and bool(said))

    stub.fault = lambda method, path, operation: None
    outcome = published(config)
    assert (outcome.mode, outcome.errors) == ("online", ())
    assert set(outcome.urls) == {"small", "large"}
    require_complete(stub, config, GSM8K, BROKEN)
    assert on_disk(config) == before
    assert all(SECRET.encode() not in arrived and KEY.encode() not in arrived for arrived in stub.received)


DRIVER = """
import sys, time
import msgspec
from pathlib import Path
from sweep.planning.config import SweepConfig
from sweep.results.publish import mirror_of
from sweep.results.reading import read_sweep
from sweep.results.store import RunDirectory
config = msgspec.json.decode(sys.argv[1], type=SweepConfig)
directory = RunDirectory(Path(config.runs_dir) / config.name)
tracker = mirror_of(config, directory, [])
tracker.progress("small", {"fraction": 0.5})
tracker.cell(read_sweep(directory.root).records[0])
print(tracker._process.pid, flush=True)
time.sleep(60)  # until it is killed
"""


def test_publish_completes_what_a_killed_driver_left_and_a_second_time_adds_no_history(
    config: SweepConfig, stub: Stub
) -> None:
    directory = carried_out(config, GSM8K, BROKEN)
    before = on_disk(config)
    command = [sys.executable, "-c", DRIVER, msgspec.json.encode(asdict(config)).decode()]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    assert driver.stdout is not None
    tracked = psutil.Process(int(driver.stdout.readline()))
    wait_until(lambda: read_history(directory.wandb), 90)
    family = [tracked, *tracked.children(recursive=True)]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    wait_until(lambda: all(gone(process) for process in family))
    assert on_disk(config) == before

    rows = []
    for _ in range(2):
        outcome = published(config)
        assert (outcome.mode, outcome.errors) == ("online", ())
        require_complete(stub, config, GSM8K, BROKEN)
        rows.append([row for row in run_of(stub, config, "small").history if ROW in row])
    assert rows[0] == rows[1]
    assert [row["progress/fraction"] for row in rows[0]] == [0.5]


def launch(config: SweepConfig, *fractions: float) -> Outcome:
    directory = directory_of(config)
    tracker = mirror_of(config, directory, [SECRET])
    for fraction in fractions:
        tracker.overview({"fraction": fraction})
        tracker.progress("small", {"fraction": fraction})
    for record in read_sweep(directory.root).records:
        tracker.cell(record)
    return tracker.close(120)


def synced(config: SweepConfig) -> set[bool]:
    runs = directory_of(config).wandb.glob("offline-run-*/run-*.wandb")
    return {run.with_name(f"{run.name}.synced").exists() for run in runs}


def test_a_launch_online_sends_first_what_one_before_it_kept_offline(config: SweepConfig, stub: Stub) -> None:
    """Later, rows of the second would hide that those of the first are missing."""
    carried_out(config, GSM8K, BROKEN)
    offline = replace(config, wandb=replace(config.wandb, mode="offline"))
    assert launch(offline, 0.1, 0.2).mode == "offline"
    assert synced(config) == {False}
    assert launch(config, 0.3).errors == ()
    assert synced(config) == {True}
    for again in (published, published):
        require_complete(stub, config, GSM8K, BROKEN)
        assert again(config).errors == ()
    for model in (None, "small"):
        history = run_of(stub, config, model).history
        assert [row["progress/fraction"] for row in history if ROW in row] == [0.1, 0.2, 0.3]


def test_what_a_refused_stream_lost_is_sent_by_the_next_launch_and_not_marked_before(
    config: SweepConfig, stub: Stub
) -> None:
    carried_out(config, GSM8K, BROKEN)
    launch(replace(config, wandb=replace(config.wandb, mode="offline")), 0.1)
    stub.fault = always(403, "file_stream")
    assert "for good" in " ".join(launch(config, 0.2).errors)
    assert synced(config) == {False}
    stub.fault = lambda method, path, operation: None
    assert launch(config, 0.3).errors == ()
    assert synced(config) == {True}
    require_complete(stub, config, GSM8K, BROKEN)


def test_a_sweep_that_was_never_mirrored_gets_its_history_from_the_timeline(config: SweepConfig, stub: Stub) -> None:
    directory = carried_out(config, GSM8K)
    clock = iter(range(100, 200))
    timeline = TimelineWriter(directory.timeline, clock=lambda: float(next(clock)))
    timeline.add("launch", "here", "began")
    timeline.add("cell", "small/gsm8k", "running")
    timeline.add("cell", "small/gsm8k", "done")
    for _ in range(2):
        assert published(config).errors == ()
    run = run_of(stub, config, "small")
    found = [(row["progress/elapsed_s"], row["progress/cells_done"]) for row in run.history if ROW in row]
    assert found == [(2.0, 1)]
    assert not list(directory.wandb.glob("offline-run-*"))


def test_without_a_key_nothing_is_published_and_it_is_said(config: SweepConfig) -> None:
    directory = carried_out(config, GSM8K)
    outcome = published(config)
    assert outcome.mode == "offline"
    assert "WANDB_API_KEY" in outcome.why
    assert not list(directory.wandb.glob("*run-*"))


def test_samples_and_files_arrive_as_far_as_the_tasks_allow(config: SweepConfig, stub: Stub) -> None:
    tasks = {
        "gsm8k": Task(task="gsm8k"),
        "hard": Task(task=GATED),
        "ours": Task(task="gsm8k", share_samples=False),
    }
    config = replace(config, tasks=tasks, wandb=replace(config.wandb, samples=3))
    records = [replace(GSM8K, task=task) for task in tasks]
    carried_out(config, *records)
    assert published(config).errors == ()
    run = run_of(stub, config, "small")
    assert len(run.table("samples/gsm8k")["data"]) == 3
    assert {key for key in run.summary if key.startswith("samples/")} == {"samples/gsm8k"}
    files = {a["input"]["artifactTypeName"]: a["files"] for a in stub.artifacts.values()}
    (name,) = [name for name in files["lm-eval-samples"] if name.endswith(".jsonl")]
    assert name == "gsm8k/samples_gsm8k_2026.jsonl"
    assert len(files["lm-eval-samples"][name].splitlines()) == 3
    results = [name for name in files["lm-eval-results"] if name.endswith("results_2026.json")]
    assert sorted(results) == [f"{task}/results_2026.json" for task in tasks]
    assert json.loads(files["lm-eval-results"]["gsm8k/results_2026.json"]) == {"results": {"gsm8k": {}}}
    arrived = b"\n".join(stub.received)
    assert b"planted-machine" not in arrived
    assert b"of gsm8k" in arrived
    for task in ("hard", "ours"):
        assert f"of {task}".encode() not in arrived


def test_a_copied_directory_goes_on_with_its_runs_and_one_that_is_started_over_begins_others(
    config: SweepConfig, stub: Stub, tmp_path: Path
) -> None:
    config = replace(config, models={"small": Model(path="org/small")})

    def carry_out_and_publish() -> None:
        directory = carried_out(config, GSM8K)
        with closing(Store(directory)) as store:
            store.keep_sweep_id()
        assert published(config).errors == ()

    carry_out_and_publish()
    ids = set(stub.runs)
    assert len(ids) == 2
    copied = replace(config, runs_dir=str(tmp_path / "copied"))
    shutil.copytree(directory_of(config).root, directory_of(copied).root)
    assert published(copied).errors == ()
    assert set(stub.runs) == ids

    set_aside(directory_of(config))
    carry_out_and_publish()
    assert len(stub.runs) == 4
    assert {run.config["sweep"]["value"]["name"] for run in stub.runs.values()} == {"night"}


# The Report


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # wandb-workspaces' own
def test_a_report_is_built_without_a_login(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    directory = carried_out(config, GSM8K, BROKEN)
    made = recipe(read_sweep(directory.root), config, {"Paired comparisons": "none"})
    spec = wandb_report.build(json.loads(json.dumps(made)), entity="team")._to_model().model_dump_json(by_alias=True)
    for shown in ("eval/gsm8k/exact_match__strict_match", "Run Comparer", "the server died", "org/small", "Paired"):
        assert shown in spec
    for model in (None, *config.models):  # and not the runs of other sweeps of this name
        assert run_id(config.name, str(directory.root), model) in spec


def test_a_report_is_made_kept_up_to_date_and_opened_again(config: SweepConfig, stub: Stub) -> None:
    wandb = replace(config.wandb, report=True, entity="team")
    config = replace(config, wandb=wandb, models={"small": Model(path="org/small")})
    directory = carried_out(config, GSM8K)
    outcome = published(config)
    assert outcome.errors == ()
    (id,) = stub.views
    assert outcome.report_url == f"{stub.url}/team/evals/reports/night-results--{id}"
    assert stub.views[id]["tokens"] == []
    kept = json.loads((directory.wandb / "report.json").read_bytes())
    assert (kept["id"], kept["url"]) == (id, outcome.report_url)

    config = replace(config, wandb=replace(config.wandb, share_link=True))
    texts = {"Paired comparisons": "large is better than small"}
    outcome = publish(read_sweep(directory.root), config, secrets=[SECRET], texts=texts, timeout_s=120)
    assert outcome.report_url == f"{stub.url}/team/evals/reports/night-results--{id}?accessToken=public-{id}"
    assert list(stub.views) == [id]
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, kept["url"]], capture_output=True, text=True, check=True, env=os.environ
    )
    assert "large is better than small" in opened.stdout

    config = replace(config, wandb=replace(config.wandb, share_link=False))
    stub.fault = always(403, "revokeAccessToken")
    (error,) = published(config).errors
    assert "the end of the Report's public link" in error
    stub.fault = lambda method, path, operation: None
    outcome = published(config)
    assert (outcome.errors, outcome.report_url) == ((), kept["url"])
    assert all(token["revokedAt"] for token in stub.views[id]["tokens"])
    assert "share_url" not in json.loads((directory.wandb / "report.json").read_bytes())


OPEN = """
import sys
from wandb_workspaces.reports.v2 import Report
report = Report.from_url(sys.argv[1])
print(*[getattr(block, "text", "") for block in report.blocks])
"""


def test_a_report_that_is_refused_costs_nothing_else(config: SweepConfig, stub: Stub) -> None:
    config = replace(config, wandb=replace(config.wandb, report=True))
    directory = carried_out(config, GSM8K)
    stub.fault = always(403, "upsertView")
    outcome = published(config)
    assert [error for error in outcome.errors if "the Report" in error]
    assert len(outcome.errors) == 1
    assert outcome.report_url is None
    assert run_of(stub, config, "small").exit_code == 0
    assert "recipe" in json.loads((directory.wandb / "report.json").read_bytes())
