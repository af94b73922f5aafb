"""What a sweep comes to: cells, servers, what is done, and fingerprints that change with the numbers alone."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from sweep.errors import ConfigError, nearest_file
from sweep.planning.config import CellOverride, Device, Model, Overflow, Seeds, SweepConfig, Task
from sweep.planning.plan import Plan, ServerPlan, make_plan, on_cpu, served_name
from sweep.record import Record, Status

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Hub":
    """An empty cache, and a hub that says what the test tells it to; nobody asks the real one."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    double = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, path, **asked: double.answer(path, **asked))
    return double


class Hub:
    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.commits: dict[tuple[str, str], str] = {}
        self.error: Exception | None = None
        self.asked: list[tuple[str, str]] = []

    def answer(self, path: str, *, revision: str, timeout: float) -> Any:
        self.asked.append((path, revision))
        assert timeout <= 10
        if self.error is not None:
            raise self.error
        return huggingface_hub.hf_api.ModelInfo(id=path, sha=self.commits[path, revision])

    def caches(self, path: str, branch: str, commit: str) -> None:
        folder = self.cache / f"models--{path.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, text in {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "model.safetensors": "weights",
        "original.pth": "weights",
    }.items():
        (folder / name).write_text(text)
    return folder


def sweep(models: dict[str, Model] | None = None, tasks: dict[str, Task] | None = None, **more: Any) -> SweepConfig:
    return SweepConfig(
        name="s",
        models=models or {"m": Model(path="org/m")},
        tasks=tasks or {"gsm8k": Task(task="gsm8k")},
        **more,
    )


def planned(config: SweepConfig, *records: Record, only: str | None = None, **more: Any) -> Plan:
    by_cell = {(record.model, record.task): record for record in records}
    return make_plan(config, by_cell, only=only, **{"ask_hub": False, **more})


def keys(plan: Plan) -> list[str]:
    return [cell.key for cell in plan.cells]


# Fingerprints of models

NUMBERS: list[dict[str, Any]] = [
    {"dtype": "float16"},
    {"quantization": "awq"},
    {"generation_config": "auto"},
    {"trust_remote_code": True},
    {"max_model_len": 99},
    {"tokenizer": "org/t"},
    {"adapter": "org/a"},
    {"revision": "v1"},
    {"server": {"hf_overrides": {"rope_theta": 1}}},
    {"server": {"load_format": "dummy"}},
    {"server": {"kv_cache_dtype": "fp8"}},
    {"server": {"some_option_of_tomorrow": 1}},
    {"env": {"VLLM_ATTENTION_BACKEND": "FLASHINFER"}},
    {"server_python": "/old/bin/python"},
    {"url": "http://node7:8000"},
]
SPEED: list[dict[str, Any]] = [
    {"tensor_parallel": 2},
    {"gpus": 0.5},
    {"replicas": 3},
    {"concurrency": 7},
    {"startup_timeout_s": 1.0},
    {"hang_timeout_s": 1.0},
    {"device": Device.CPU},
    {"server": {"max_num_seqs": 7}},
    {"server": {"enable_prefix_caching": False, "gpu_memory_utilization": 0.5, "enforce_eager": True}},
    {"env": {"HF_TOKEN": "t", "CUDA_VISIBLE_DEVICES": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}},
    {
        "env": {
            "HF_HOME": "/hf",
            "XDG_CACHE_HOME": "/c",
            "https_proxy": "http://p:1",
            "NO_PROXY": "x",
            "HF_ENDPOINT": "e",
        }
    },
    {"tasks": ("gsm8k",)},
]


def fingerprint(model: Model, name: str = "m", **more: Any) -> str:
    return planned(sweep({name: model}), **more).models[name].fingerprint


def ids(changes: dict[str, Any]) -> str:
    return re.sub(r"[^a-z_A-Z]+", "-", str(changes)).strip("-")


@pytest.mark.parametrize("changes", NUMBERS, ids=ids)
def test_what_changes_numbers_changes_the_fingerprint(hub: Hub, changes: dict[str, Any]) -> None:
    hub.caches("org/m", "main", COMMIT)
    hub.caches("org/m", "v1", OTHER_COMMIT)
    model = Model(path="org/m")
    assert fingerprint(replace(model, **changes)) != fingerprint(model)


@pytest.mark.parametrize("changes", SPEED, ids=ids)
def test_what_changes_speed_alone_does_not(changes: dict[str, Any]) -> None:
    model = Model(path="org/m")
    assert fingerprint(replace(model, **changes)) == fingerprint(model)


@pytest.mark.parametrize(
    ("model", "digest"),
    [
        (Model(path="org/m", revision=COMMIT), "ef129a04784b6866870e2ab2134d6438"),
        (Model(path="org/u", tokenizer="org/t"), "77458195f3f48c14ebb2bca40d2461f0"),
        (
            Model(
                path="org/m",
                revision=COMMIT,
                dtype="float16",
                quantization="awq",
                max_model_len=99,
                trust_remote_code=True,
                generation_config="auto",
                server={"hf_overrides": {"rope_theta": 1}, "max_num_seqs": 3},
                env={"A": "1", "HF_TOKEN": "x"},
            ),
            "ed30f1c1a9bd073a73fdfc9dc4c75bc7",
        ),
    ],
    ids=["plain", "tokenizer", "many settings"],
)
def test_answers_that_are_stored_stay_valid(model: Model, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints of run directories that exist; another digest here costs their users every answer they have."""
    monkeypatch.delenv("LMSWEEP_ENGINE", raising=False)
    assert fingerprint(model) == digest


AT_A_URL = Model(url="http://node7:8000", tokenizer="org/t", entry="m")


@pytest.mark.parametrize(
    "changes",
    [
        {"url": "http://node8:8000"},
        {"served_model_name": "other"},
        {"revision": "v2"},
        {"tokenizer": "org/t2"},
        {"max_model_len": 99},
        {"trust_remote_code": True},
    ],
    ids=ids,
)
def test_what_changes_the_answers_of_a_url_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert fingerprint(replace(AT_A_URL, **changes)) != fingerprint(AT_A_URL)


def test_a_model_at_a_url_is_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(AT_A_URL)
    assert fingerprint(AT_A_URL, "n") != before
    assert fingerprint(replace(AT_A_URL, served_model_name="m"), "n") == before
    assert fingerprint(replace(AT_A_URL, api_key="k", hang_timeout_s=1.0, concurrency=3)) == before
    monkeypatch.setenv("LMSWEEP_ENGINE", "an engine in place of those that we start")
    assert fingerprint(AT_A_URL) == before


def test_a_tokenizer_that_moves_makes_other_prompts_for_a_url(hub: Hub) -> None:
    hub.commits["org/t", "main"] = COMMIT
    before = planned(sweep({"m": AT_A_URL}), ask_hub=True)
    hub.commits["org/t", "main"] = OTHER_COMMIT
    after = planned(sweep({"m": AT_A_URL}), ask_hub=True)
    assert before.models["m"].fingerprint != after.models["m"].fingerprint
    assert (before.models["m"].tokenizer_revision, after.models["m"].tokenizer_revision) == (COMMIT, OTHER_COMMIT)


def test_two_pythons_of_one_model_share_no_answer() -> None:
    prints = {fingerprint(Model(path="org/m", server_python=python)) for python in (None, "/a/python", "/b/python")}
    assert len(prints) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"chat": True},
        {"system_instruction": "be brief"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"think_end_token": "</think>"},
    ],
)
def test_what_is_in_the_prompt_is_the_cell_s_business_not_the_model_s(changes: dict[str, Any]) -> None:
    """So that a chat variant reuses what is the same."""
    before, after = (planned(sweep({"m": model})) for model in (Model(path="p/m"), Model(path="p/m", **changes)))
    assert before.models["m"].fingerprint == after.models["m"].fingerprint
    assert before.cells[0].fingerprint != after.cells[0].fingerprint


def test_the_name_of_a_model_is_not_part_of_it(checkpoint: Path) -> None:
    assert fingerprint(Model(path=str(checkpoint)), "a") == fingerprint(Model(path=str(checkpoint)), "b")


def _touch(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "config.json").write_text("{ }"),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: (folder / "chat_template.jinja").write_text(""),
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        lambda folder: _touch(folder / "model.safetensors"),
        lambda folder: _touch(folder / "original.pth"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").rename(folder / "model-2.safetensors"),
    ],
    ids=["config", "tokenizer", "template", "a new file", "newer weights", "other weights", "gone", "renamed"],
)
@pytest.mark.parametrize("place", ["path", "tokenizer", "adapter"])
def test_a_checkpoint_that_is_overwritten_in_place_is_another_one(
    checkpoint: Path, change: Callable[[Path], object], place: str
) -> None:
    model = Model(**{"path": "org/m", place: str(checkpoint)})
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(checkpoint)
    assert fingerprint(model) != before


def test_what_an_option_names_on_this_machine_counts_by_its_content(hub: Hub, tmp_path: Path) -> None:
    settings = tmp_path / "generation_config.json"
    settings.write_text('{"temperature": 1}')
    for model in (
        Model(path="org/m", generation_config=str(tmp_path)),
        Model(path="org/m", server={"speculative_config": {"model": str(tmp_path)}}),
    ):
        before = fingerprint(model)
        settings.write_text('{"repetition_penalty": 2}')
        assert fingerprint(model) != before
        settings.write_text('{"temperature": 1}')
        assert fingerprint(model) == before


def test_the_code_of_a_checkpoint_counts_in_its_folders_too(checkpoint: Path) -> None:
    (checkpoint / "code").mkdir()
    (checkpoint / "code" / "modeling.py").write_text("one")
    before = fingerprint(Model(path=str(checkpoint)))
    (checkpoint / "code" / "modeling.py").write_text("two")
    assert fingerprint(Model(path=str(checkpoint))) != before


def test_what_is_no_part_of_a_checkpoint_does_not_count(checkpoint: Path) -> None:
    model = Model(path=str(checkpoint))
    before = fingerprint(model)
    _touch(checkpoint / "config.json")
    (checkpoint / ".lock").touch()
    (checkpoint / "gone.safetensors").symlink_to("nowhere")
    (checkpoint / "logs").mkdir()
    assert fingerprint(model) == before


def test_weights_of_the_same_size_and_time_differ(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(bytes(100_000) + name.encode() * 900_000)
        os.utime(weights, (0, 0))
    assert fingerprint(Model(path=str(tmp_path / "a"))) != fingerprint(Model(path=str(tmp_path / "b")))


def test_two_checkpoints_that_are_single_files_differ(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    assert fingerprint(Model(path=str(tmp_path / "a.gguf"))) != fingerprint(Model(path=str(tmp_path / "b.gguf")))


# Fingerprints of cells


@pytest.mark.parametrize(
    "changes",
    [
        {"num_fewshot": 3},
        {"limit": 5},
        {"limit": 0.5},
        {"gen_kwargs": {"temperature": 1}},
        {"fewshot_as_multiturn": True},
        {"metadata": {"a": 1}},
        {"on_overflow": Overflow.TRUNCATE},
    ],
    ids=ids,
)
def test_a_setting_of_its_task_changes_the_cell_and_not_the_model(changes: dict[str, Any]) -> None:
    before, after = (planned(sweep(tasks={"t": task})) for task in (Task(task="gsm8k"), Task(task="gsm8k", **changes)))
    assert before.cells[0].fingerprint != after.cells[0].fingerprint
    assert before.models["m"].fingerprint == after.models["m"].fingerprint


@pytest.mark.parametrize("seed", ["random", "numpy", "torch", "fewshot"])
def test_each_seed_changes_the_cell(seed: str) -> None:
    before, after = planned(sweep()), planned(sweep(seeds=Seeds(**{seed: 7})))
    assert before.cells[0].fingerprint != after.cells[0].fingerprint


def test_the_version_of_lm_eval_changes_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(sweep()).cells[0].fingerprint
    monkeypatch.setattr("sweep.planning.plan.version", lambda _: "9.9")
    assert planned(sweep()).cells[0].fingerprint != before


def test_the_user_s_own_task_files_change_its_cells_and_no_others(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text("task: own\ndataset_path: json\noutput_type: generate_until\n")
    tasks = {"own": Task(task="own", include_path=str(folder)), "gsm8k": Task(task="gsm8k")}

    def prints() -> list[str]:
        return [cell.fingerprint for cell in planned(sweep(tasks=tasks)).cells]

    before = prints()
    (folder / ".hidden").touch()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "code.pyc").touch()
    assert prints() == before
    (folder / "data").mkdir()
    (folder / "data" / "test.jsonl").write_text("{}")
    assert prints()[0] != before[0]
    assert prints()[1] == before[1]


# Done and owed


@pytest.fixture
def grid() -> SweepConfig:
    return sweep(
        {"a": Model(path="org/a"), "b": Model(path="org/b")},
        {"gsm8k": Task(task="gsm8k"), "arc_easy": Task(task="arc_easy")},
    )


def record(plan: Plan, key: str, **changes: Any) -> Record:
    cell = next(cell for cell in plan.cells if cell.key == key)
    known = Record(model=cell.model.name, task=cell.task_name, fingerprint=cell.fingerprint, status=Status.DONE)
    return replace(known, **changes)


def test_cells_are_models_times_tasks_in_the_order_of_the_config(grid: SweepConfig) -> None:
    assert keys(planned(grid)) == ["a/gsm8k", "a/arc_easy", "b/gsm8k", "b/arc_easy"]


def test_done_is_what_has_a_finished_record_of_the_same_fingerprint(grid: SweepConfig) -> None:
    fresh = planned(grid)
    plan = planned(
        grid,
        record(fresh, "a/gsm8k"),
        record(fresh, "a/arc_easy", fingerprint="of other settings"),
        record(fresh, "b/gsm8k", status=Status.FAILED),
        record(fresh, "b/gsm8k", model="removed"),
    )
    assert list(plan.done) == ["a/gsm8k"]
    assert [cell.key for cell in plan.owed] == ["a/arc_easy", "b/gsm8k", "b/arc_easy"]


def test_servers_of_finished_models_are_not_owed(grid: SweepConfig) -> None:
    fresh = planned(grid)
    plan = planned(grid, record(fresh, "a/gsm8k"), record(fresh, "a/arc_easy"))
    assert list(plan.servers) == ["a", "b"]
    assert list(plan.owed_servers) == ["b"]


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("a/gsm8k", ["a/gsm8k"]),
        ("*/gsm8k", ["a/gsm8k", "b/gsm8k"]),
        ("b/*", ["b/gsm8k", "b/arc_easy"]),
    ],
)
def test_only_runs_its_cells_again_though_they_are_done(grid: SweepConfig, only: str, expected: list[str]) -> None:
    fresh = planned(grid)
    plan = planned(grid, *(record(fresh, key) for key in keys(fresh)), only=only)
    assert keys(plan) == expected
    assert plan.done == {}
    assert [cell.key for cell in plan.owed] == expected


def test_what_stands_is_of_the_whole_sweep_whatever_only_chose(grid: SweepConfig) -> None:
    fresh = planned(grid)
    known = (
        record(fresh, "a/gsm8k"),
        record(fresh, "a/arc_easy", fingerprint="of other settings"),
        record(fresh, "b/gsm8k", status=Status.FAILED),
        record(fresh, "b/arc_easy"),
    )
    assert set(planned(grid, *known).stands) == {"a/gsm8k", "b/arc_easy"}  # the failure is tried again
    # Numbers stand until others are there.
    assert set(planned(grid, *known, only="a/*").stands) == {"a/gsm8k", "b/gsm8k", "b/arc_easy"}


@pytest.mark.parametrize("only", ["a/gsm9k", "a", "A/gsm8k", ""])
def test_only_with_an_unknown_cell_names_the_nearest(grid: SweepConfig, only: str) -> None:
    with pytest.raises(ConfigError, match=f"^only={only}: no such cell") as caught:
        planned(grid, only=only)
    assert ("'a/gsm8k'" in str(caught.value)) == ("gsm" in only)


@pytest.mark.parametrize(
    ("only", "meant"),
    [("a", "'a/*'"), ("gsm8k", "'*/gsm8k'"), ("gsm9k", "'*/gsm8k'"), ("arc_esy", "'*/arc_easy'")],
)
def test_only_with_half_a_cell_names_the_pattern_for_it(grid: SweepConfig, only: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(grid, only=only)
    assert str(caught.value) == f"only={only}: no such cell (model/task); did you mean {meant}?"


def test_a_sweep_whose_cells_are_all_skipped_is_refused(grid: SweepConfig) -> None:
    with pytest.raises(ConfigError, match="sweep 's' has no cells"):
        planned(replace(grid, cells={"*": CellOverride(skip=True)}))


# Which tasks a model runs, and how


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ((), ["gsm8k", "arc_easy", "boolq"]),
        (("boolq", "gsm8k"), ["gsm8k", "boolq"]),
        (("!gsm8k",), ["arc_easy", "boolq"]),
        (("!gsm8k", "!boolq"), ["arc_easy"]),
    ],
)
def test_a_model_runs_all_or_these_or_all_but_these_tasks(chosen: tuple[str, ...], expected: list[str]) -> None:
    tasks = {name: Task(task=name) for name in ("gsm8k", "arc_easy", "boolq")}
    plan = planned(sweep({"m": Model(path="org/m", tasks=chosen)}, tasks))
    assert [cell.task_name for cell in plan.cells] == expected


def test_a_cell_may_be_skipped_or_changed_by_a_pattern_and_later_patterns_win(grid: SweepConfig) -> None:
    overrides = {
        "*/gsm8k": CellOverride(limit=5, num_fewshot=1),
        "a/*": CellOverride(limit=9, on_overflow=Overflow.TRUNCATE),
        "b/arc_easy": CellOverride(skip=True),
    }
    plan = planned(replace(grid, cells=overrides))
    tasks = {cell.key: cell.task for cell in plan.cells}
    assert tasks == {
        "a/gsm8k": Task(task="gsm8k", limit=9, num_fewshot=1, on_overflow=Overflow.TRUNCATE),
        "a/arc_easy": Task(task="arc_easy", limit=9, on_overflow=Overflow.TRUNCATE),
        "b/gsm8k": Task(task="gsm8k", limit=5, num_fewshot=1),
    }


def test_tasks_of_a_grid_are_cells_of_their_own() -> None:
    tasks = {f"gsm8k-{shots}shot": Task(task="gsm8k", num_fewshot=shots) for shots in (0, 5)}
    plan = planned(sweep(tasks=tasks))
    assert keys(plan) == ["m/gsm8k-0shot", "m/gsm8k-5shot"]
    assert len({cell.fingerprint for cell in plan.cells}) == 2


@pytest.mark.parametrize(
    ("task", "cells", "words"),
    [
        (Task(task="gsm9k"), {}, r"^tasks\.t: unknown task 'gsm9k'; did you mean 'gsm8k'"),
        (Task(task="humaneval"), {}, r"^tasks\.t: code that the model writes would be executed"),
        (Task(task="truthfulqa_mc1", num_fewshot=5), {}, r"^tasks\.t: num_fewshot: 5 would be ignored by lm-eval"),
        (
            Task(task="truthfulqa_mc1"),
            {"m/*": CellOverride(num_fewshot=5)},
            r"^cells\.m/\*: num_fewshot: 5 would be ignored by lm-eval",
        ),
    ],
    ids=["unknown", "executes code", "pinned shots", "pinned shots of a cell"],
)
def test_what_lm_eval_would_refuse_or_ignore_is_refused_with_its_key(
    task: Task, cells: dict[str, CellOverride], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        planned(sweep(tasks={"t": task}, cells=cells))
    assert "\n" not in str(caught.value)


# Servers


def test_adapters_of_one_base_share_a_server() -> None:
    base = Model(path="org/m", entry="m", tensor_parallel=2)
    plan = planned(sweep({"m": base, "m-y": replace(base, adapter="org/y"), "n": Model(path="org/n")}))
    assert list(plan.servers) == ["m", "n"]
    assert plan.servers["m"] == ServerPlan(
        name="m", model=base, revision=None, adapters={"m": None, "m-y": "org/y"}, gpus=2.0, replicas="auto"
    )
    assert plan.models["m"].fingerprint != plan.models["m-y"].fingerprint
    assert [cell.model.server for cell in plan.cells] == ["m", "m", "n"]


def test_a_server_at_a_url_takes_nothing_of_the_cluster() -> None:
    plan = planned(sweep({"m": AT_A_URL, "n": Model(path="org/n", tensor_parallel=2)}))
    server = plan.servers["m"]
    assert (server.external, server.gpus, server.replicas) == (True, 0.0, 1)
    assert not on_cpu(server, cluster_gpus=0)
    assert (plan.servers["n"].external, plan.servers["n"].gpus) == (False, 2.0)
    assert list(plan.owed_servers) == ["m", "n"]


def test_a_label_of_what_is_at_a_url_is_no_revision_on_the_hub(hub: Hub) -> None:
    hub.commits["org/t", "main"] = COMMIT
    plan = planned(sweep({"m": replace(AT_A_URL, revision="v2")}), ask_hub=True)
    assert hub.asked == [("org/t", "main")]
    assert plan.models["m"].revision is None
    assert plan.commits == {"org/t@main": COMMIT}


def test_a_tokenizer_that_is_missing_costs_the_cells_of_its_url(tmp_path: Path) -> None:
    plan = planned(sweep({"m": replace(AT_A_URL, tokenizer=str(tmp_path / "gone"))}))
    assert not plan.owed
    assert plan.refused["m/gsm8k"].error == f"models.m.tokenizer: no file or folder '{tmp_path / 'gone'}'"


def test_a_model_is_asked_for_by_its_key_unless_a_url_calls_it_otherwise() -> None:
    base = Model(path="org/m", entry="m")
    models = {
        "m": base,
        "m-sql": replace(base, adapter="org/sql"),
        "at": replace(AT_A_URL, entry="at"),
        "named": replace(AT_A_URL, entry="named", served_model_name="org/m-awq"),
    }
    plan = planned(sweep(models))
    assert [served_name(model) for model in plan.models.values()] == ["m", "m-sql", "at", "org/m-awq"]
    assert [served_name(server) for server in plan.servers.values()] == ["m", "at", "org/m-awq"]


@pytest.mark.parametrize(
    ("device", "cluster_gpus", "cpu"),
    [
        (Device.CPU, 8, True),
        (Device.GPU, 0, False),
        (Device.AUTO, 0, True),
        (Device.AUTO, 1, False),
    ],
)
def test_auto_means_the_cpu_only_where_there_is_no_gpu(device: Device, cluster_gpus: float, cpu: bool) -> None:
    plan = planned(sweep({"m": Model(path="org/m", device=device)}))
    assert on_cpu(plan.servers["m"], cluster_gpus=cluster_gpus) is cpu


# Commits


def test_a_commit_is_served_as_it_was_asked_for(hub: Hub) -> None:
    assert planned(sweep({"m": Model(path="org/m", revision=COMMIT)})).models["m"].revision == COMMIT
    assert hub.asked == []


def test_the_commit_is_part_of_the_fingerprint_and_is_what_is_served(hub: Hub) -> None:
    config = sweep()
    unknown = planned(config)
    hub.commits["org/m", "main"] = COMMIT
    known = planned(config, ask_hub=True)
    hub.commits["org/m", "main"] = OTHER_COMMIT
    moved = planned(config, ask_hub=True)
    assert len({plan.models["m"].fingerprint for plan in (unknown, known, moved)}) == 3
    assert [plan.servers["m"].revision for plan in (unknown, known, moved)] == [None, COMMIT, OTHER_COMMIT]


@pytest.mark.parametrize("place", ["tokenizer", "adapter"])
def test_a_tokenizer_or_adapter_that_moves_on_the_hub_is_another_one(hub: Hub, place: str) -> None:
    config = sweep({"m": Model(**{"path": "org/m", place: "org/other"})})
    prints = []
    for commit in (COMMIT, OTHER_COMMIT):
        hub.commits = {("org/m", "main"): COMMIT, ("org/other", "main"): commit}
        prints.append(planned(config, ask_hub=True).models["m"].fingerprint)
    assert prints[0] != prints[1]


def test_a_launch_that_cannot_ask_goes_on_with_the_commits_of_the_last_one(hub: Hub) -> None:
    """vLLM fetches by commit, which leaves no branch name in the cache: only the run directory knows."""
    config = sweep({"m": Model(path="org/m"), "n": Model(path="org/m", revision="v1")})
    hub.commits = {("org/m", "main"): COMMIT, ("org/m", "v1"): OTHER_COMMIT}
    first = planned(config, ask_hub=True)
    assert first.commits == {"org/m@main": COMMIT, "org/m@v1": OTHER_COMMIT}
    records = [record(first, key) for key in keys(first)]
    for second in (
        planned(config, *records, commits=first.commits),
        planned(config, *records, commits=first.commits, ask_hub=True),
    ):
        assert not second.owed
        assert second.commits == first.commits
        hub.error = TimeoutError()


def test_commits_of_what_is_no_longer_asked_for_are_kept(hub: Hub) -> None:
    hub.commits["org/m", "main"] = COMMIT
    plan = planned(sweep(), ask_hub=True, commits={"org/gone@main": OTHER_COMMIT, "org/m@main": OTHER_COMMIT})
    assert plan.commits == {"org/gone@main": OTHER_COMMIT, "org/m@main": COMMIT}


def test_models_of_one_repository_ask_for_it_once(hub: Hub) -> None:
    hub.commits["org/m", "main"] = COMMIT
    planned(sweep({name: Model(path="org/m", chat=name == "b") for name in "ab"}), ask_hub=True)
    assert hub.asked == [("org/m", "main")]


def test_a_local_checkpoint_asks_nobody(hub: Hub, checkpoint: Path) -> None:
    plan = planned(sweep({"m": Model(path=str(checkpoint), tokenizer=str(checkpoint))}), ask_hub=True)
    assert plan.models["m"].revision is None
    assert plan.commits == {}
    assert hub.asked == []


def test_a_model_that_is_not_there_costs_its_own_cells(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    gone = Model(path=str(tmp_path / "chekpoint"), entry="gone")
    there = Model(path=str(tmp_path / "checkpoint"), entry="there")
    config = SweepConfig(name="s", models={"gone": gone, "there": there}, tasks={"gsm8k": Task(task="gsm8k")})
    plan = make_plan(config, {}, ask_hub=False)
    assert [cell.key for cell in plan.owed] == ["there/gsm8k"]
    assert list(plan.servers) == ["there"]
    (record,) = plan.refused.values()
    assert (record.model, record.status) == ("gone", Status.FAILED)
    assert record.error == f"models.gone.path: no file or folder '{gone.path}'; did you mean 'checkpoint'?"
    assert plan.stands == plan.refused
    before = replace(record, status=Status.DONE, error=None)
    assert planned(config, before, only="gone/*").stands == {"gone/gsm8k": before}


def test_of_a_folder_that_is_missing_on_the_way_its_like_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    said = nearest_file(tmp_path / "chekpoints" / "a" / "b")
    assert said == f"; there is no folder 'chekpoints' in {str(tmp_path)!r}; did you mean 'checkpoints'?"


def test_an_adapter_that_is_not_there_leaves_its_base_and_the_other_adapters_alone(tmp_path: Path) -> None:
    for name in ("base", "sql"):
        (tmp_path / name).mkdir()
    base = Model(path=str(tmp_path / "base"), entry="m")
    adapters = {f"m-{n}": replace(base, adapter=str(tmp_path / n)) for n in ("sql", "gone")}
    config = SweepConfig(name="s", models={"m": base, **adapters}, tasks={"gsm8k": Task(task="gsm8k")})
    plan = make_plan(config, {}, ask_hub=False)
    assert plan.servers["m"].adapters == {"m": None, "m-sql": str(tmp_path / "sql")}
    assert list(plan.refused) == ["m-gone/gsm8k"]
