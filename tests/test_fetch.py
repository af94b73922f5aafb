"""`fetch` and what `plan` says is missing, with the real clients against a hub of our own (hub_stub.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_stub import TOKEN, HubStub, hub_stub, reach
from huggingface_hub import constants

from sweep import ROOT
from sweep import fetch as module
from sweep.errors import ConfigError
from sweep.fetch import fetch, missing, missing_block
from sweep.planning.config import Device, Model, SweepConfig, Task
from sweep.planning.plan import Plan, make_plan
from sweep.serving.server import Server

# No two alike: the cache downloads one content once.
MODEL = {"config.json": b"{}", "tokenizer.json": b"[]", "model.safetensors": b"w" * 1500}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}

CARD = b"""---
configs:
- config_name: Small-Talk
  data_files:
  - split: test
    path: data/test.jsonl
---
"""
DOCUMENTS = b"".join(json.dumps({"q": f"Say {n}:", "a": f" {n}"}).encode() + b"\n" for n in range(8))
TASK = """\
task: echoes
dataset_path: org/EchoWords
dataset_name: Small-Talk
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list:
  - {metric: tiny_match, aggregation: mean, higher_is_better: true, hf_evaluate: true}
"""
METRIC = b"""
import datasets
import evaluate

class TinyMatch(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of equal strings.", citation="", inputs_description="",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        return {"tiny_match": sum(p == r for p, r in zip(predictions, references)) / len(references)}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """An empty hub, an empty cache and no token, for this process."""
    with hub_stub() as stub:
        reach(stub, tmp_path / "hf", monkeypatch)
        yield stub
    assert stub.unknown == []


@pytest.fixture
def no_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves data sets to the slow tests, where lm-eval itself loads them."""
    monkeypatch.setattr(module, "_loaded", lambda cells, secrets: iter(()))


def planned(models: dict[str, Model], *tasks: Task, ask_hub: bool = True) -> Plan:
    named = {task.task: task for task in tasks or (Task(task="gsm8k"),)}
    return make_plan(SweepConfig(name="s", models=models, tasks=named), {}, ask_hub=ask_hub)


# What is fetched


@pytest.mark.usefixtures("no_tasks")
def test_every_part_of_a_sweep_is_brought_once_at_its_commit(hub: HubStub, capsys: pytest.CaptureFixture[str]) -> None:
    commits = {
        "org/m": hub.add("org/m", MODEL),
        "org/t": hub.add("org/t", MODEL),
        "org/a": hub.add("org/a", ADAPTER),
    }
    base = Model(path="org/m", tokenizer="org/t", entry="m")
    models = {"m": base, "tuned": Model(**{**vars(base), "adapter": "org/a"}), "again": Model(path="org/m")}
    assert fetch(planned(models), ()) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"fetching into {constants.HF_HOME}"
    assert shown[1:4] == [
        f"  model org/m@main: commit {commits['org/m'][:12]}, 1.5 kB",
        f"  tokenizer org/t@main: commit {commits['org/t'][:12]}, 4 bytes",
        f"  adapter org/a@main: commit {commits['org/a'][:12]}, 3 bytes",
    ]
    assert missing(planned(models, ask_hub=False)) == ["data set openai/gsm8k (main): not here"]
    assert fetch(planned(models), ()) == 0
    assert [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()[1:4]] == ["already here"] * 3


@pytest.mark.usefixtures("no_tasks")
def test_what_cannot_be_had_is_listed_with_its_reason_and_the_rest_is_brought(
    hub: HubStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/closed", MODEL)
    hub.repositories["models", "org/closed"].gated = True
    hub.add("org/m", MODEL)
    models = {name: Model(path=f"org/{name}") for name in ("closed", "nowhere", "m")}
    assert fetch(planned(models), ()) == 1
    shown = capsys.readouterr().out
    assert "model org/closed@main: failed" in shown
    assert "model org/m@main: commit" in shown
    _, _, listed = shown.partition("2 could not be had")
    page = f"{hub.url}/org/closed"
    assert f"org/closed@main: gated: accept its terms at {page} and give HF_TOKEN, which is not set" in listed
    assert "org/nowhere@main: the hub knows no such repository" in listed
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch(planned({"closed": models["closed"]}), ()) == 0
    assert TOKEN not in capsys.readouterr().out


@pytest.mark.usefixtures("no_tasks")
def test_a_repository_without_what_a_server_reads_is_no_success(
    hub: HubStub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/gguf", {"config.json": b"{}", "tokenizer.json": b"{}", "m.gguf": b"GGUF"})
    assert fetch(planned({"gguf": Model(path="org/gguf")}), ()) == 1
    assert "*.safetensors or *.bin or *.pt is not here, and the repository does not have it" in capsys.readouterr().out


@pytest.mark.usefixtures("no_tasks")
def test_a_branch_that_moved_is_planned_at_the_commit_that_was_fetched(
    hub: HubStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/m", MODEL)
    models = {"m": Model(path="org/m")}
    earlier = planned(models).commits  # of a launch whose servers had a cache of their own
    moved = hub.add("org/m", {**MODEL, "extra.json": b"{}"})
    assert fetch(planned(models), ()) == 0
    config = SweepConfig(name="s", models=models, tasks={"gsm8k": Task(task="gsm8k")})
    assert earlier["org/m@main"] != moved
    assert make_plan(config, {}, ask_hub=False, commits=earlier).models["m"].revision == moved


@pytest.mark.usefixtures("no_tasks")
def test_a_large_file_of_no_known_kind_is_left_where_it_is(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.planning.hub.LARGE_BYTES", 5000)
    hub.add("org/m", {**MODEL, "model.other": b"x" * 5001, "notes.txt": b"x" * 5000})
    assert fetch(planned({"m": Model(path="org/m")}), ()) == 0
    assert "notes.txt" in hub.downloaded()
    assert "model.other" not in hub.downloaded()


@pytest.mark.usefixtures("no_tasks")
def test_a_local_model_needs_nothing_and_one_at_a_url_its_tokenizer(
    hub: HubStub, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/t", MODEL)
    models = {"local": Model(path=str(tiny_model)), "theirs": Model(url="http://127.0.0.1:1", tokenizer="org/t")}
    assert missing(planned(models))[0] == "tokenizer org/t@main: not here"
    assert fetch(planned(models), ()) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["  tokenizer org/t@main"]
    assert set(hub.downloaded()) == {"config.json", "tokenizer.json"}


def test_without_network_it_is_refused_in_one_line(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({"m": Model(path="org/m")}, ask_hub=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^fetch has to ask the hub, and HF_HUB_OFFLINE forbids it[^\n]*$"):
        fetch(plan, ())
    assert hub.requests == []


# What is missing


def test_a_plan_says_what_is_missing_and_what_brings_it(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned({"m": Model(path="org/m")}, Task(task="mmlu"), Task(task="gsm8k"), ask_hub=False)
    assert missing_block(plan) == [
        f"missing here, in {constants.HF_HOME}",
        "  model org/m@main: not here",
        "  data set cais/mmlu, 57 configurations: not here",
        "  data set openai/gsm8k (main): not here",
        "  `python launch.py fetch` with the same arguments brings what the hub has of it",
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert missing_block(plan)[-1].startswith("  HF_HUB_OFFLINE is set, so their cells would fail")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("folder", "here"),
    [
        ("openai___gsm8k/main/0.0.0/abc", True),
        ("openai___gsm8k/main-1234567890abcdef/0.0.0/abc", True),
        ("openai___gsm8k/main/0.0.0/abc.incomplete", False),
        ("openai___gsm8k/socratic/0.0.0/abc", False),
        ("openai___gsm8k/main-hard/0.0.0/abc", False),
        ("other___gsm8k/main/0.0.0/abc", False),
    ],
)
def test_a_data_set_is_there_once_its_configuration_is_prepared(
    hub: HubStub, tiny_model: Path, folder: str, here: bool
) -> None:
    prepared = Path(constants.HF_HOME, "datasets", folder)
    prepared.mkdir(parents=True)
    (prepared / "dataset_info.json").write_text("{}")
    plan = planned({"m": Model(path=str(tiny_model))})
    assert (missing(plan) == []) is here


def test_a_task_on_files_of_its_own_asks_the_hub_for_nothing(hub: HubStub, tmp_path: Path, tiny_model: Path) -> None:
    own = tmp_path / "tasks"
    own.mkdir()
    for name, path in {"loader": "json", "folder": str(tmp_path)}.items():
        (own / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: {path}\noutput_type: generate_until\n")
    tasks = [Task(task=name, include_path=str(own)) for name in ("loader", "folder")]
    assert missing_block(planned({"m": Model(path=str(tiny_model))}, *tasks)) == []


# The real thing


@dataclass(frozen=True, kw_only=True)
class Site:
    """A machine with a cache and a sweep file, and the hub that it can reach."""

    hub: HubStub
    environment: dict[str, str]
    conf: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def launch(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("launch.py", command, f"conf={self.conf}", **variables)


@pytest.fixture
def site(tmp_path: Path, tiny_model: Path) -> Iterator[Site]:
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "echoes.yaml").write_text(TASK)
    conf = tmp_path / "sweep.yaml"
    conf.write_text(
        f"name: airgap\nruns_dir: {tmp_path / 'runs'}\nmodels:\n  m: {{path: org/m}}\n"
        f"tasks:\n  echoes: {{task: echoes, include_path: {own}}}\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "NLTK_"))}
    with hub_stub() as stub:
        stub.add("org/m", {path.name: path.read_bytes() for path in tiny_model.iterdir()})
        stub.add("org/EchoWords", {"README.md": CARD, "data/test.jsonl": DOCUMENTS}, kind="datasets")
        stub.add("evaluate-metric/tiny_match", {"tiny_match.py": METRIC}, kind="spaces")
        variables = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": stub.url, "CUDA_VISIBLE_DEVICES": ""}
        yield Site(hub=stub, environment={**kept, **variables}, conf=conf)
    assert stub.unknown == []


CHECK = """
import sys
from sweep.evaluating.evaluation import check_task, load_tokenizer
from sweep.planning.loading import load
from sweep.planning.plan import make_plan
from transformers import AutoConfig

(cell,) = make_plan(load(sys.argv[1], ()), {}, ask_hub=True).owed
print(cell.model.revision)
print(type(load_tokenizer(cell.model)).__name__)
print(AutoConfig.from_pretrained(cell.model.model.path, revision=cell.model.revision).model_type)
check_task(cell.task, cell.seeds, cell.model.model)
print("loaded")
"""
"""What a run does before any server starts, and what a server reads first."""


@pytest.mark.slow
def test_what_was_fetched_loads_without_network(site: Site) -> None:
    before = site.launch("plan")
    assert "model org/m@main: not here" in before.stdout
    assert "data set org/EchoWords (Small-Talk): not here" in before.stdout
    fetched = site.launch("fetch")
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert "task echoes: its data and metrics are here" in fetched.stdout
    assert "model.safetensors" in site.hub.downloaded()
    asked = len(site.hub.requests)
    checked = site.run("-c", CHECK, str(site.conf), HF_HUB_OFFLINE="1")
    assert checked.returncode == 0, checked.stderr
    commit = site.hub.repositories["models", "org/m"].branches["main"]
    assert checked.stdout.split() == [commit, "Qwen2Tokenizer", "qwen2", "loaded"]
    assert "missing here" not in site.launch("plan", HF_HUB_OFFLINE="1").stdout
    assert len(site.hub.requests) == asked


@pytest.mark.slow
def test_a_task_without_its_data_or_metric_is_listed_and_brought_by_the_next_fetch(site: Site) -> None:
    metric = site.hub.repositories.pop(("spaces", "evaluate-metric/tiny_match"))
    data = site.hub.repositories.pop(("datasets", "org/EchoWords"))
    fetched = site.launch("fetch")
    assert fetched.returncode == 1, fetched.stderr
    assert "model org/m@main: commit" in fetched.stdout
    assert "task echoes: failed" in fetched.stdout
    assert "org/EchoWords" in fetched.stdout
    assert "HF_TOKEN, which is not set" in fetched.stdout
    site.hub.repositories["datasets", "org/EchoWords"] = data
    fetched = site.launch("fetch")
    assert fetched.returncode == 1, fetched.stderr
    assert "the metric script tiny_match cannot be had from the hub" in fetched.stdout
    site.hub.repositories["spaces", "evaluate-metric/tiny_match"] = metric
    site.hub.requests.clear()
    assert site.launch("fetch").returncode == 0
    assert "model.safetensors" not in site.hub.downloaded()


@pytest.mark.slow
def test_what_a_task_fails_to_download_through_nltk_is_listed(site: Site, tmp_path: Path) -> None:
    """IFEval's punkt_tab, for one: nltk returns False, and nobody looks until the answers are scored."""
    own = tmp_path / "tasks"
    (own / "utils.py").write_text("import nltk\nnltk.download('no_such_data')\ndef text(doc):\n    return doc['q']\n")
    (own / "echoes.yaml").write_text(TASK.replace('"{{q}}"', "!function utils.text"))
    fetched = site.launch("fetch")
    assert fetched.returncode == 1, fetched.stderr
    assert "task echoes: load task echoes: ValueError" in fetched.stdout
    assert Path(site.environment["HF_HOME"], "nltk_data").is_dir()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.usefixtures("no_tasks")
def test_real_vllm_serves_without_network_what_was_fetched(
    hub: HubStub, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    checkpoint = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    hub.add("org/m", checkpoint)
    model = Model(
        path="org/m",
        device=Device.CPU,
        dtype="float32",
        max_model_len=256,
        server={"enforce_eager": True},  # compiling takes minutes on a new machine
        startup_timeout_s=300.0,
    )
    plan = planned({"m": model})
    assert fetch(plan, ()) == 0
    hub.add("org/m", {**checkpoint, "config.json": b"the branch has moved"})
    asked = len(hub.requests)
    for name, value in {"HF_HOME": constants.HF_HOME, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    log_path = tmp_path / "m-0.log"
    server = Server(plan.servers["m"], name="m-0", api_key="key-0123456789", gpu_ids=[], log_path=log_path)
    try:
        assert server.start().max_model_len == 256
    finally:
        server.stop()
    assert f"--revision {plan.models['m'].revision}" in log_path.read_text()
    assert len(hub.requests) == asked


# Several at once

DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
sys.stdin.readline()
print(snapshot_download("org/m", revision=sys.argv[1]))
"""
"""What a server's vLLM does; begins when it is told to."""


def test_servers_that_start_on_one_node_at_once_fetch_each_file_once(hub: HubStub, tmp_path: Path) -> None:
    """huggingface_hub locks each file of its cache, whoever asks; that is relied on, and has to stay so."""
    commit = hub.add("org/m", MODEL)
    hub.repositories["models", "org/m"].slow_s = 1.0  # so that each comes while another is at it
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "of-the-node"), "HF_HUB_DISABLE_XET": "1"}
    servers = []
    for n in range(3):
        own = tmp_path / str(n)  # each server has a temporary folder of its own
        own.mkdir()
        servers.append(
            subprocess.Popen(
                [sys.executable, "-c", DOWNLOAD, commit],
                env=environment | {"TMPDIR": str(own)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    for server in servers:
        assert server.stdin is not None
        server.stdin.write("go\n")
        server.stdin.flush()
    (folder,) = {server.communicate(timeout=60)[0].strip() for server in servers}
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == MODEL
    assert sorted(hub.downloaded()) == sorted(MODEL)
