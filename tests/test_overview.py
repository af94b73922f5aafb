"""What `plan` prints and plan.json holds."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from sweep.errors import ConfigError
from sweep.overview import describe, document, expected, rendered
from sweep.planning.config import CellOverride, Device, Model, SweepConfig, Task
from sweep.planning.plan import Cell, Plan, ServerPlan, make_plan
from sweep.record import Counts, Record, Status
from sweep.results.store import RunDirectory
from sweep.running import simulate
from sweep.running.costs import Costs
from sweep.running.inventory import Node

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/hf")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    for name in ("HF_TOKEN", "LMSWEEP_ENGINE"):
        monkeypatch.delenv(name, raising=False)


def sweep(**changes: object) -> SweepConfig:
    known = {
        "name": "s",
        "models": {
            "base": Model(path="org/base", revision=COMMIT, tensor_parallel=2, replicas=3, concurrency=8),
            "tiny-awq": Model(path="org/tiny", device=Device.AUTO, tasks=("gsm8k",)),
        },
        "tasks": {
            "gsm8k": Task(task="gsm8k", num_fewshot=5, limit=20, gen_kwargs={"temperature": 0.7}),
            "gpqa": Task(task="gpqa_main_n_shot"),
        },
    }
    return SweepConfig(**{**known, **changes})  # type: ignore[arg-type]


def planned(config: SweepConfig) -> Plan:
    return make_plan(config, {}, ask_hub=False)


def lines(config: SweepConfig) -> list[str]:
    return describe(config, planned(config), RunDirectory(Path("/runs/s"))).splitlines()


def test_a_plan_is_cells_tasks_and_servers_with_their_commands() -> None:
    assert lines(sweep()) == [
        "sweep s: 2 models × 2 tasks, 3 cells",
        "run directory /runs/s: 0 cells done, 3 owed",
        "",
        "tasks",
        '  gsm8k: lm-eval\'s gsm8k, 5-shot, limit 20, gen_kwargs {"temperature": 0.7}',
        "  gpqa: lm-eval's gpqa_main_n_shot, its own shots, all documents",
        "    gated, needs accepted terms and HF_TOKEN (which is not set): Idavidrein/gpqa (gpqa_main)",
        "",
        "cells (x done, o owed)",
        "  base      o gsm8k  o gpqa",
        "  tiny-awq  o gsm8k  - gpqa",
        "",
        "servers",
        "  base: 2 GPUs, at most 3 at a time, concurrency 8",
        "    python -m vllm.entrypoints.openai.api_server --model org/base --revision " + COMMIT + " "
        "--served-model-name base --host 127.0.0.1 --port 20000 --dtype auto --generation-config vllm "
        "--disable-uvicorn-access-log --tensor-parallel-size 2 --distributed-executor-backend mp "
        "--enable-scale-out --enable-prompt-tokens-details",
        "  tiny-awq: 1 GPU where there are any, else CPU, concurrency auto",
        "    the commit of org/tiny is not known here; it is asked for when the sweep runs",
        "    python -m vllm.entrypoints.openai.api_server --model org/tiny --served-model-name tiny-awq "
        "--host 127.0.0.1 --port 20000 --dtype auto --generation-config vllm --disable-uvicorn-access-log "
        "--enable-scale-out --enable-prompt-tokens-details",
        "",
        "missing here, in /hf",
        f"  model org/base@{COMMIT}: not here",
        "  model org/tiny@main: not here",
        "  data set openai/gsm8k (main): not here",
        "  data set Idavidrein/gpqa (gpqa_main): not here",
        "  `python launch.py fetch` with the same arguments brings what the hub has of it",
    ]


def test_one_model_on_one_task_is_said_in_the_singular() -> None:
    one = sweep(models={"m": Model(path="org/base")}, tasks={"gsm8k": Task(task="gsm8k")})
    assert lines(one)[0] == "sweep s: 1 model × 1 task, 1 cell"


def test_of_a_server_of_several_nodes_the_first_part_is_shown() -> None:
    large = Model(path="org/base", revision=COMMIT, device=Device.AUTO, tensor_parallel=8, nodes=2)
    shown = lines(sweep(models={"large": large}))
    start = shown.index("servers")
    assert shown[start + 1] == "  large: 8 GPUs on each of 2 nodes, concurrency auto"
    assert "--pipeline-parallel-size 2 --distributed-executor-backend mp --nnodes 2 --node-rank 0" in shown[start + 2]
    assert shown[start + 3].startswith("    on its first node; on each of the others the same as --headless")


def test_a_server_that_someone_else_runs_has_an_address_and_no_command() -> None:
    theirs = Model(url="http://node7:8000", tokenizer="org/base", served_model_name="org/x", revision="v2")
    config = sweep(models={"theirs": theirs})
    shown = lines(config)
    start = shown.index("servers")
    assert shown[start + 1 : start + 3] == [
        "  theirs: no GPU of ours, concurrency auto",
        "    org/x at http://node7:8000, which someone else runs: not started, not stopped",
    ]
    assert not any("vllm" in line for line in shown)
    saved = document(planned(config))
    assert saved["servers"]["theirs"] == {"gpus": 0.0, "replicas": 1, "url": "http://node7:8000"}
    known = {"url": "http://node7:8000", "revision": "v2", "commit": None, "server": "theirs"}
    assert saved["models"]["theirs"].items() >= known.items()
    assert "path" not in saved["models"]["theirs"]


def test_a_cell_with_settings_of_its_own_says_them() -> None:
    cells = {"base/gsm8k": CellOverride(num_fewshot=0, limit=3), "*/gpqa": CellOverride(skip=True)}
    shown = lines(sweep(cells=cells))
    assert '  base/gsm8k: lm-eval\'s gsm8k, 0-shot, limit 3, gen_kwargs {"temperature": 0.7}' in shown
    assert not any("gpqa" in line for line in shown)


def test_a_token_that_is_there_is_said_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    shown = "\n".join(lines(sweep()))
    assert "HF_TOKEN (which is set)" in shown
    assert "very_secret" not in shown


def test_the_saved_plan_is_json_with_what_a_later_launch_needs() -> None:
    plan = planned(sweep())
    saved = json.loads(json.dumps(document(plan)))
    assert list(saved) == ["models", "servers", "cells", "commits"]
    assert saved["models"]["base"] == {
        "path": "org/base",
        "revision": COMMIT,
        "commit": COMMIT,
        "fingerprint": plan.models["base"].fingerprint,
        "server": "base",
    }
    assert saved["cells"]["base/gpqa"] == {"fingerprint": plan.cells[1].fingerprint, "done": False}
    assert saved["servers"]["base"]["gpus"] == 2
    assert "--tensor-parallel-size" in saved["servers"]["base"]["command"]
    assert saved["commits"] == {f"org/base@{COMMIT}": COMMIT}


def test_a_server_is_shown_with_its_own_python_and_variables_and_what_became_of_older_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "NOTE": "two words", "JUDGE_API_KEY": "sk-very-secret", "VLLM_USE_V1": "0"}
    server = {"swap_space": 4, "override_generation_config": {"note": "sk-very-secret"}}
    model = Model(path="org/m", revision=COMMIT, server_python="/o/bin/python", env=env, server=server)
    shown = lines(sweep(models={"m": model}))
    start = shown.index("servers")
    assert shown[start + 2 : start + 5] == [
        "    VLLM_CPU_KVCACHE_SPACE=1 NOTE='two words' JUDGE_API_KEY=*** /o/bin/python -m "
        f"vllm.entrypoints.openai.api_server --model org/m --revision {COMMIT} --served-model-name m "
        "--host 127.0.0.1 --port 20000 --dtype auto --generation-config vllm --disable-uvicorn-access-log "
        """--override-generation-config '{"note": "***"}' """
        "--enable-scale-out --enable-prompt-tokens-details",
        "    models.m.server.swap_space is dropped: vLLM no longer swaps preempted requests to the CPU, it computes "
        "them again",
        "    models.m.env.VLLM_USE_V1 is dropped: vLLM has only the V1 engine now",
    ]
    assert not any("very-secret" in line for line in shown)


def test_an_option_that_is_not_set_there_is_refused() -> None:
    config = sweep(models={"m": Model(path="org/m", server={"api_key": "k"})})
    with pytest.raises(ConfigError, match=r"models\.m\.server\.api_key: not set here"):
        document(planned(config))


@pytest.mark.slow
def test_the_rendered_prompt_of_a_cell_is_what_its_server_would_get(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.json").write_text(json.dumps([{"q": "one?", "a": "uno"}, {"q": "two?", "a": "dos"}]))
    (folder / "numbers.yaml").write_text(f"""
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.json}}}}
output_type: generate_until
test_split: test
fewshot_split: test
num_fewshot: 1
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 7}}
metric_list: [{{metric: exact_match}}]
""")
    config = sweep(
        models={"m": Model(path=str(tiny_model))}, tasks={"numbers": Task(task="numbers", include_path=str(folder))}
    )
    (cell,) = planned(config).cells
    shown = rendered(cell)
    assert shown.startswith("m/numbers: generate_until, ")
    assert "  prompt\n  | Q: two?\n  | A: dos\n  | \n  | Q: one?\n  | A:\n" in shown
    assert r"  stop       '\n'" in shown
    assert '"max_tokens": 7' in shown


H100 = [Node(name="h100", gpus=4, evaluators=8)]


def forecast(config: SweepConfig, nodes: Sequence[Node], *records: Record) -> list[str]:
    return expected(planned(config), nodes, records, where="c.yaml").splitlines()


def test_a_plan_tells_how_long_it_takes_where_and_that_this_rests_on_priors() -> None:
    models = {"big": Model(path="org/big-70B", tensor_parallel=2), "small": Model(path="org/small-1B", replicas=1)}
    shown = forecast(sweep(models=models, tasks={"gsm8k": Task(task="gsm8k")}), H100)
    assert shown[0] == "expected on c.yaml (4 GPUs on 1 node)"
    assert re.fullmatch(
        r"  [\d smin]+ in all, first result after [\d smin]+, 0\.\d\d GPU-hours; "
        r"an estimate from priors, nothing measured yet",
        shown[1],
    )
    assert re.fullmatch(r" +0:00 +0:\d\d h:mm \(\. a server starts\)", shown[2])
    rows = [line for line in shown if line.startswith("  h100")]
    assert re.match(r"  h100 0-[13]  \.+A+", rows[0])
    assert any(re.search(r"\.+B+", row) for row in rows)
    assert re.fullmatch(r"  A big: 0:00 to 0:\d\d, \d servers?, 0\.\d\d GPU-hours", shown[-2])
    assert re.fullmatch(r"  B small: 0:00 to 0:\d\d, 1 server, 0\.0\d GPU-hours", shown[-1])


def test_a_plan_rests_on_what_was_measured_once_something_was() -> None:
    counts = Counts(requests=100, asked=100, prompt_tokens=10_000, generated_tokens=10_000)
    record = Record(model="m", task="t", fingerprint="", status=Status.DONE, counts=counts, request_s=60.0)
    shown = forecast(sweep(tasks={"gsm8k": Task(task="gsm8k")}), H100, record)
    assert shown[1].endswith("; an estimate from what earlier cells took, priors for the rest")


def test_a_plan_names_what_can_never_start_there() -> None:
    shown = forecast(sweep(models={"huge": Model(path="org/huge", tensor_parallel=8)}), H100)
    assert shown == [
        "expected on c.yaml (4 GPUs on 1 node)",
        "  cannot start there: huge needs 8 GPUs on one node; the largest node has 4",
    ]


def test_a_model_over_several_nodes_is_planned_on_each_of_them() -> None:
    nodes = [Node(name=name, gpus=8, evaluators=8) for name in ("a", "b")]
    models = {"huge": Model(path="org/huge-400B", tensor_parallel=8, nodes=2)}
    shown = forecast(sweep(models=models, tasks={"gsm8k": Task(task="gsm8k")}), nodes)
    assert re.fullmatch(r"  a 0-7, b 0-7  \.+A+", shown[3])


class KnownCosts(Costs):
    def __init__(self, **seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def expected_s(self, cell: Cell, server: ServerPlan, *, on_cpu: bool) -> float:
        return self.seconds[cell.model.name]


@pytest.mark.parametrize(("longer_s", "servers"), [(34, 2), (64, 3)])
def test_no_server_is_planned_that_would_never_serve(longer_s: float, servers: int) -> None:
    """A start takes 42 s. When b's GPU is free, a has 4 s less to do than it has `longer_s`."""
    models = {"a": Model(path="org/a-1B"), "b": Model(path="org/b-1B", replicas=1)}
    plan = planned(sweep(models=models, tasks={"gsm8k": Task(task="gsm8k")}))
    nodes = [Node(name="n", gpus=2, evaluators=4)]
    spans = simulate.forecast(plan, nodes, KnownCosts(a=100 + longer_s, b=100)).spans
    assert len(spans) == servers
    assert all(span.ready_s is not None for span in spans)
