"""vLLM's command line and environment as tables, and what its parser is asked and answers."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sweep import ROOT
from sweep.errors import ConfigError, ServerError
from sweep.planning.config import Model, Scoring
from sweep.planning.plan import ServerPlan
from sweep.serving.engine import (
    FORCED_DECODING,
    NO_EXTRAS,
    ON_CPU,
    PROMPT_LOGPROBS,
    SUPPORTED,
    TAIL_PREFILL,
    Extras,
    ServerPart,
    arithmetic,
    command,
    environment,
    examine,
    extras,
    network,
    notices,
    program,
    served_names,
    supported,
)

KEY = "key-for-tests-0123456789"

MODEL = Model(path="org/m", startup_timeout_s=30.0)


def plan(
    *, name: str = "m", adapters: dict[str, str | None] | None = None, gpus: float = 1.0, **changes: Any
) -> ServerPlan:
    return ServerPlan(
        name=name,
        model=replace(MODEL, **changes),
        revision=None,
        adapters={name: None} if adapters is None else adapters,
        gpus=gpus,
        replicas=1,
    )


def arguments(given: ServerPlan) -> list[str]:
    return command(given, python="py", host="127.0.0.1", port=20000)


@pytest.fixture(autouse=True)
def _nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name == "LMSWEEP_ENGINE" or name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# The command line


def together(*some: Extras) -> Extras:
    return Extras(
        methods=tuple(method for one in some for method in one.methods),
        options={name: value for one in some for name, value in one.options.items()},
    )


@pytest.mark.parametrize(
    ("on_cpu", "changes", "found"),
    [
        (True, {}, together(Extras(options=ON_CPU), PROMPT_LOGPROBS, FORCED_DECODING)),
        (
            True,
            {"server": {"worker-extension-cls": "mine.Mine"}},
            together(Extras(options=dict(list(ON_CPU.items())[1:])), PROMPT_LOGPROBS, FORCED_DECODING),
        ),
        (
            True,
            {
                "server": {
                    "worker-extension-cls": "mine.Mine",
                    "block-size": 64,
                    "max-num-seqs": 8,
                    "enable-chunked-prefill": False,
                }
            },
            together(PROMPT_LOGPROBS, FORCED_DECODING),
        ),
        (False, {}, together(PROMPT_LOGPROBS, TAIL_PREFILL)),
        (False, {"env": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}, PROMPT_LOGPROBS),
        (True, {"scoring": Scoring.ECHO}, Extras(options=ON_CPU)),
        (False, {"scoring": Scoring.ECHO}, NO_EXTRAS),
        (True, {"server": {"logits-processors": ["mine:Mine"]}}, together(Extras(options=ON_CPU), PROMPT_LOGPROBS)),
        (False, {"server": {"enable_scale_out": False}}, NO_EXTRAS),
        (False, {"server": {"enable_prompt_tokens_details": True}}, PROMPT_LOGPROBS),
        (True, {"url": "http://x", "path": ""}, NO_EXTRAS),
    ],
)
def test_a_server_is_started_for_the_scoring_that_its_runner_can_do(
    on_cpu: bool, changes: dict[str, Any], found: Extras
) -> None:
    assert extras(plan(**changes), on_cpu=on_cpu) == found


@pytest.mark.parametrize(
    ("cores", "changes", "gpu_ids", "found"),
    [
        (2, {}, [], "0"),
        (8, {}, [], None),
        (2, {"env": {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}}, [], "1"),
        (2, {}, ["0"], None),
    ],
)
def test_a_cpu_server_computes_on_every_core_where_there_are_few(
    cores: int, changes: dict[str, Any], gpu_ids: list[str], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    given = environment(plan(**changes), api_key=KEY, gpu_ids=gpu_ids, base={})
    assert given.get("VLLM_CPU_NUM_OF_RESERVED_CPU") == found


def test_extras_are_on_the_command_line_and_our_package_is_found() -> None:
    line = shlex.join(command(plan(), python="py", host="h", port=1, extras=FORCED_DECODING))
    assert line.endswith(" --logits-processors sweep.serving.forced_decoding:ForcedDecoding")
    line = shlex.join(command(plan(), python="py", host="h", port=1, extras=TAIL_PREFILL))
    assert line.endswith(" --enable-scale-out --enable-prompt-tokens-details")
    given = environment(plan(), api_key=KEY, gpu_ids=[], base={}, extras=FORCED_DECODING)
    assert str(ROOT) in given["PYTHONPATH"].split(os.pathsep)
    assert "PYTHONPATH" not in environment(plan(), api_key=KEY, gpu_ids=[], base={}, extras=TAIL_PREFILL)


def test_a_plain_model_gets_this_command_line() -> None:
    assert shlex.join(arguments(plan())) == (
        "py -m vllm.entrypoints.openai.api_server --model org/m --served-model-name m --host 127.0.0.1 --port 20000"
        " --dtype auto --generation-config vllm --disable-uvicorn-access-log"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"revision": "v1"}, "--revision v1"),
        ({"tokenizer": "org/t"}, "--tokenizer org/t"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"max_model_len": 4096}, "--max-model-len 4096"),
        ({"quantization": "awq"}, "--quantization awq"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"generation_config": "auto"}, "--generation-config auto"),
        ({"tensor_parallel": 2}, "--tensor-parallel-size 2 --distributed-executor-backend mp"),
        ({"gpus": 0.5}, "--gpu-memory-utilization 0.46"),
        ({"gpus": 0.5, "server": {"gpu_memory_utilization": 0.3}}, "--gpu-memory-utilization 0.3"),
        ({"server": {"max_num_seqs": 64}}, "--max-num-seqs 64"),
        ({"server": {"enable-prefix-caching": True}}, "--enable-prefix-caching"),
        ({"server": {"enable_prefix_caching": False}}, "--no-enable-prefix-caching"),
        ({"server": {"disable_uvicorn_access_log": False}}, "--no-disable-uvicorn-access-log"),
        ({"server": {"hf_overrides": {"rope_theta": 1.5}}}, """--hf-overrides '{"rope_theta": 1.5}'"""),
        ({"server": {"logits_processors": ["a:B", "c:D"]}}, "--logits-processors a:B c:D"),
        ({"server": {"cudagraph_capture_sizes": [1, 2]}}, "--cudagraph-capture-sizes 1 2"),
        ({"server": {"compilation-config.mode": 3}}, "--compilation-config.mode 3"),
        ({"server": {"compilation_config.cudagraph_mode": "NONE"}}, "--compilation-config.cudagraph_mode NONE"),
        ({"server": {"some_bias": -0.5, "some_text": "-x-"}}, "--some-bias=-0.5 --some-text=-x-"),
        (
            {"adapters": {"m": None, "m-lora": "/l", "m-other": "org/o"}},
            "--served-model-name m --host 127.0.0.1 --port 20000 --dtype auto --generation-config vllm"
            " --disable-uvicorn-access-log --enable-lora --lora-modules m-lora=/l m-other=org/o --max-loras 2",
        ),
    ],
)
def test_a_setting_becomes_these_arguments(changes: dict[str, Any], expected: str) -> None:
    line = shlex.join(arguments(plan(**changes)))
    assert f"{expected} " in f"{line} "
    flags = re.findall(r"(?<= )--(?:no-)?([a-z-]+)", line)
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"server": {"disable_log_stats": False}}, "log-stats"),
        ({"server": {"disable_uvicorn_access_log": None}}, "access-log"),
        ({}, "trust-remote-code"),
        ({}, "max-model-len"),
        ({}, "quantization"),
    ],
)
def test_what_is_left_to_vllm_is_not_said(changes: dict[str, Any], absent: str) -> None:
    assert absent not in shlex.join(arguments(plan(**changes)))


def test_the_commit_that_was_planned_is_served() -> None:
    line = arguments(replace(plan(revision="main"), revision="abc123"))
    assert line[line.index("--revision") + 1] == "abc123"


@pytest.mark.parametrize(
    ("adapters", "names"),
    [({"m": None}, ["m"]), ({"a": "/a", "m": None}, ["m", "a"]), ({"a": "/a"}, ["m", "a"])],
)
def test_a_server_serves_its_base_and_its_adapters(adapters: dict[str, str | None], names: list[str]) -> None:
    assert served_names(plan(adapters=adapters)) == names


def test_the_commit_of_an_adapter_from_the_hub_is_shown() -> None:
    adapters = {"m": None, "pinned": "org/a", "unknown": "org/b", "own": "/loras/c"}
    shown = arguments(replace(plan(adapters=adapters), adapter_revisions={"pinned": "c0ffee"}))
    start = shown.index("--lora-modules") + 1
    assert shown[start : start + 3] == ["pinned=org/a@c0ffee", "unknown=org/b", "own=/loras/c"]


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("swap_space", 4, "vLLM no longer swaps preempted requests to the CPU, it computes them again"),
        ("swap-space", 4, "vLLM no longer swaps preempted requests to the CPU, it computes them again"),
        ("disable_log_requests", True, "vLLM logs no requests unless enable_log_requests is set"),
        ("use_v2_block_manager", True, "vLLM has only that block manager now"),
        ("num_scheduler_steps", 8, "vLLM's scheduler has one way of stepping now"),
        ("task", "generate", "a model that generates is served as one"),
        ("enable_reasoning", True, "naming a reasoning_parser is enough"),
    ],
)
def test_an_option_of_older_recipes_is_dropped_and_said(option: str, value: Any, why: str) -> None:
    given = plan(server={option: value})
    assert arguments(given) == arguments(plan())
    assert notices(given) == (f"models.m.server.{option} is dropped: {why}",)


@pytest.mark.parametrize(
    ("option", "value"),
    [("task", "embed"), ("enable_reasoning", False), ("rope_theta", 1e6), ("speculative_model", "d")],
)
def test_an_option_of_older_recipes_that_may_change_an_answer_is_never_dropped(option: str, value: Any) -> None:
    given = plan(server={option: value})
    assert any(argument.removeprefix("--no-").strip("-") == option.replace("_", "-") for argument in arguments(given))
    assert notices(given) == ()


# Of several nodes


def parts(given: ServerPlan) -> list[str]:
    """The command line of each part."""
    nodes = given.model.nodes
    return [
        shlex.join(
            command(
                given,
                python="py",
                host="10.0.0.7",
                port=20000,
                part=ServerPart(rank=rank, nodes=nodes, address="10.0.0.7", port=20001),
            )
        )
        for rank in range(nodes)
    ]


def test_of_a_server_of_several_nodes_the_first_part_serves_and_the_others_are_headless() -> None:
    first, second, third = parts(plan(tensor_parallel=8, gpus=8, nodes=3))
    assert first == (
        "py -m vllm.entrypoints.openai.api_server --model org/m --served-model-name m --host 10.0.0.7 --port 20000"
        " --dtype auto --generation-config vllm --disable-uvicorn-access-log --tensor-parallel-size 8"
        " --pipeline-parallel-size 3 --distributed-executor-backend mp --nnodes 3 --node-rank 0"
        " --master-addr 10.0.0.7 --master-port 20001"
    )
    assert second == (
        first.replace("-m vllm.entrypoints.openai.api_server", "-m vllm.entrypoints.cli.main serve")
        .replace(" --host 10.0.0.7 --port 20000", "")
        .replace("--node-rank 0", "--node-rank 1")
        + " --headless"
    )
    assert third == second.replace("--node-rank 1", "--node-rank 2")


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"gpus": 1}, {"pipeline": "2"}),
        ({"gpus": 8, "tensor_parallel": 8}, {"tensor": "8", "pipeline": "2"}),
        ({"gpus": 8, "tensor_parallel": 16}, {"tensor": "16", "pipeline": "1"}),
        ({"gpus": 8, "tensor_parallel": 4}, {"tensor": "4", "pipeline": "4"}),
        (
            {
                "gpus": 4,
                "tensor_parallel": 2,
                "server": {"pipeline-parallel-size": 2, "prefill_context_parallel_size": 2},
            },
            {"tensor": "2", "pipeline": "2", "prefill-context": "2"},
        ),
    ],
)
def test_the_layers_are_split_over_what_tensor_parallelism_leaves(
    changes: dict[str, Any], sizes: dict[str, str]
) -> None:
    for line in parts(plan(nodes=2, **changes)):
        assert dict(re.findall(r"--([a-z-]+)-parallel-size (\d+)", line)) == sizes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"gpus": 8, "tensor_parallel": 3},
            r"nodes: 2 nodes of 8 GPUs hold 16, and vLLM is to use 15: 3 \(tensor_.*size\) x 5 \(pipeline_",
        ),
        ({"server": {"pipeline_parallel_size": 1}}, "nodes: 2 nodes of 1 GPUs hold 2, .* use 1: no parallelism"),
        ({"server": {"data_parallel_size": 2}}, r"server\.data_parallel_size: .* for more of it give `replicas`"),
        ({"server": {"distributed_executor_backend": "ray"}}, r"server\.distributed_executor_backend: .*; got ray"),
        ({"server": {"nnodes": 2}}, r"server\.nnodes: not set here; use `nodes`"),
        ({"server": {"headless": True}}, r"server\.headless: not set here; use `nodes`"),
    ],
)
def test_gpus_of_several_nodes_that_do_not_add_up_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"models\.m\.{said}"):
        arguments(plan(nodes=2, **changes))


def test_the_parts_of_a_server_stay_on_the_network_that_administrators_chose_or_where_nodes_know_each_other() -> None:
    ours = network("10.0.0.7", "eth1")
    given = environment(plan(nodes=2), api_key=KEY, gpu_ids=["0"], base=ours)
    assert (given["VLLM_HOST_IP"], given["GLOO_SOCKET_IFNAME"]) == ("10.0.0.7", "eth1")
    theirs = {"VLLM_HOST_IP": "10.9.9.9", "GLOO_SOCKET_IFNAME": "ib0"}
    given = environment(
        plan(nodes=2, env={"GLOO_SOCKET_IFNAME": "ib1"}), api_key=KEY, gpu_ids=["0"], base=ours | theirs
    )
    assert (given["VLLM_HOST_IP"], given["GLOO_SOCKET_IFNAME"]) == ("10.9.9.9", "ib1")
    assert network("10.0.0.7", None) == {"VLLM_HOST_IP": "10.0.0.7"}


def test_of_a_server_that_someone_else_runs_nothing_is_said() -> None:
    assert notices(plan(path="", url="http://h:1", env={"VLLM_USE_V1": "0"})) == ()


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("dtype", "`dtype`"),
        ("port", "a free port"),
        ("api-key", "the sweep's `api_key`"),
        ("hf_token", "HF_TOKEN"),
        ("no_trust_remote_code", "`trust_remote_code`"),
        ("config", "`server`, option by option"),
        ("chat_template", "`tokenizer`"),
        ("default-chat-template-kwargs", "`chat_template_kwargs`"),
        # argparse would take each for the option that it begins
        ("tensor_parallel", "`tensor_parallel`"),
        ("max_model", "`max_model_len`"),
    ],
)
def test_an_option_that_has_a_place_of_its_own_is_refused(option: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=rf"models\.m\.server\.{option}: not set here; use .*{re.escape(instead)}"):
        arguments(plan(server={option: "x"}))


def test_an_engine_tells_what_it_computes_in() -> None:
    words = "INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m', dtype=torch.bfloat16, "
    more = "max_seq_len=2048, kv_cache_dtype=auto, device_config=cuda, compilation_config={'dtype=torch.x': 1}"
    assert arithmetic(f"(APIServer pid=1) hello\n(EngineCore pid=2) {words}{more}\nmore\n") == "bfloat16 on cuda"
    assert arithmetic("INFO hello\n") == ""


def test_another_engine_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSWEEP_ENGINE", "my-engine --with 'two words'")
    assert arguments(plan())[:5] == ["my-engine", "--with", "two words", "--model", "org/m"]
    assert program("/other/python") == ["my-engine", "--with", "two words"]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_installed_vllm_understands_everything_that_we_say() -> None:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    fullest = plan(
        adapters={"m": None, "l": "/l"},
        gpus=0.5,
        revision="r",
        tokenizer="t",
        max_model_len=128,
        quantization="awq",
        trust_remote_code=True,
        tensor_parallel=2,
        server={
            "enable_prefix_caching": False,
            "enable-log-requests": False,
            "disable_log_stats": False,
            "hf_overrides": {"a": 1},
            "logits_processors": ["a:B"],
            "swap_space": 4,
            "disable_log_requests": True,
        },
    )
    large = plan(tensor_parallel=4, gpus=4, nodes=2)
    part = ServerPart(rank=1, nodes=2, address="10.0.0.7", port=20001)
    headless = command(large, python="py", host="", port=0, part=part)[4:]
    code = (
        "import json, sys\n"
        "from vllm.entrypoints.cli.serve import ServeSubcommand\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
        "validate_parsed_serve_args(found)\n"
        "print(json.dumps([found.served_model_name, [m.name for m in found.lora_modules], found.enable_prefix_caching,"
        " found.disable_uvicorn_access_log, found.hf_overrides, found.logits_processors, found.generation_config,"
        " found.gpu_memory_utilization, found.tensor_parallel_size]))\n"
        "parsers = FlexibleArgumentParser().add_subparsers(dest='subparser')\n"
        f"found = ServeSubcommand().subparser_init(parsers).parse_args({headless})\n"
        "ServeSubcommand().validate(found)\n"
        "print(json.dumps([found.headless, found.nnodes, found.node_rank, found.master_addr, found.master_port,"
        " found.tensor_parallel_size, found.pipeline_parallel_size]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments(fullest)[3:]],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, part_found = map(json.loads, done.stdout.splitlines()[-2:])
    assert found == [["m"], ["l"], False, True, {"a": 1}, ["a:B"], "vllm", 0.46, 2]
    assert part_found == [True, 2, 1, "10.0.0.7", 20001, 4, 2]


# The environment


BASE = {
    "PATH": "/bin",
    "OMP_NUM_THREADS": "1",
    "RAY_ADDRESS": "x",
    "WANDB_API_KEY": "w",
    "AWS_SECRET_ACCESS_KEY": "a",
    "VLLM_PORT": "1",
    "VLLM_USE_MODELSCOPE": "1",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_NCCL_SO_PATH": "/lib/n.so",
    "NVIDIA_TF32_OVERRIDE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "HF_TOKEN": "h",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "/mine",
}


def variables(given: ServerPlan, gpu_ids: list[str], base: dict[str, str] | None = None) -> dict[str, str]:
    return environment(given, api_key=KEY, gpu_ids=gpu_ids, base=BASE if base is None else base)


def test_a_server_inherits_only_what_it_should() -> None:
    assert variables(plan(), ["3", "10", "2"]) == {
        "PATH": "/bin",
        "PYTHONPATH": "/mine",
        "HF_TOKEN": "h",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_NCCL_SO_PATH": "/lib/n.so",
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_STOP_STRINGS": "64",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "2,3,10",
    }


def test_answers_that_do_not_depend_on_the_batch_need_a_gpu() -> None:
    invariant = plan(env={"VLLM_BATCH_INVARIANT": "1"})
    assert variables(invariant, ["0"])["VLLM_BATCH_INVARIANT"] == "1"
    with pytest.raises(ServerError, match="VLLM_BATCH_INVARIANT needs a GPU, and this server has none"):
        variables(invariant, [])
    assert variables(plan(env={"VLLM_BATCH_INVARIANT": "0"}), [])["VLLM_BATCH_INVARIANT"] == "0"


@pytest.mark.parametrize(
    ("gpu_ids", "changes", "base", "expected"),
    [
        (["GPU-b", "GPU-a"], {}, {}, {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}),
        ([], {}, {"CUDA_VISIBLE_DEVICES": "7"}, {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "2"}),
        ([], {}, {"VLLM_CPU_KVCACHE_SPACE": "9"}, {"VLLM_CPU_KVCACHE_SPACE": "9"}),
        ([], {"env": {"VLLM_CPU_KVCACHE_SPACE": "5"}}, {}, {"VLLM_CPU_KVCACHE_SPACE": "5"}),
        ([], {"server": {"gpu-memory-utilization": 0.1}}, {}, {"VLLM_CPU_KVCACHE_SPACE": None}),
        (["0"], {}, {}, {"VLLM_CPU_KVCACHE_SPACE": None}),
        (["0"], {"env": {"OMP_NUM_THREADS": "4"}}, {"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "4"}),
        (
            ["0"],
            {"env": {"VLLM_MAX_STOP_STRINGS": "99"}},
            {"VLLM_MAX_STOP_STRINGS": "5"},
            {"VLLM_MAX_STOP_STRINGS": "99"},
        ),
        (["0"], {"env": {"OPENAI_API_KEY": "judge"}}, {"OPENAI_API_KEY": "other"}, {"OPENAI_API_KEY": "judge"}),
        (["0"], {"env": {"VLLM_TARGET_DEVICE": "cpu"}}, {"VLLM_TARGET_DEVICE": "tpu"}, {"VLLM_TARGET_DEVICE": "cpu"}),
        (
            ["0"],
            {"server_python": "/o/bin/python"},
            {"PATH": "/bin", "PYTHONPATH": "/mine"},
            {"PATH": "/o/bin:/bin", "PYTHONPATH": None},
        ),
        (
            ["0"],
            {"server": {"worker_extension_cls": "sweep.x.Y"}},
            {"PYTHONPATH": "/mine"},
            {"PYTHONPATH": f"/mine:{ROOT}"},
        ),
        (
            ["0"],
            {"server_python": "/o/bin/python", "server": {"logits_processors": ["a:B", "sweep.x:Y"]}},
            {},
            {"PYTHONPATH": str(ROOT)},
        ),
        (["0"], {"env": {"VLLM_API_KEY": "mine", "CUDA_VISIBLE_DEVICES": "9"}}, {}, {"CUDA_VISIBLE_DEVICES": "0"}),
    ],
)
def test_a_variable_gets_this_value(
    gpu_ids: list[str], changes: dict[str, Any], base: dict[str, str], expected: dict[str, str | None]
) -> None:
    found = variables(plan(**changes), gpu_ids, base)
    assert {name: found.get(name) for name in expected} == expected
    assert found["VLLM_API_KEY"] == KEY


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("VLLM_USE_V1", "vLLM has only the V1 engine now"),
        ("CUDA_VISIBLE_DEVICES", "a server sees the GPUs that it was given"),
        ("VLLM_API_KEY", "servers get the sweep's `api_key`"),
    ],
)
def test_a_variable_that_servers_do_not_get_is_dropped_and_said(name: str, why: str) -> None:
    given = plan(env={name: "0"})
    assert variables(given, ["3"]).get(name) != "0"
    assert notices(given) == (f"models.m.env.{name} is dropped: {why}",)


def test_options_that_name_nothing_of_ours_add_no_path() -> None:
    """A folder on PYTHONPATH comes before the packages of the server's Python."""
    assert "PYTHONPATH" not in variables(plan(server={"worker_extension_cls": "other.sweep.X"}), ["0"], {})


# Versions


@pytest.mark.parametrize(
    "version",
    ["0.32.0", "0.33.7", "0.33.0+cu129", "0.33.0.post1", "0.33.1.dev5+gabc123", "dev", "unknown", "0.1.dev1+gabc123"],
)
def test_these_versions_of_vllm_are_taken(version: str) -> None:
    assert supported(version) is None


@pytest.mark.parametrize(
    "version", ["0.31.9", "0.32.0rc1", "0.34.0", "0.34.0rc1", "0.34.0.dev3+g1", "1.0", "0.6.3.post1"]
)
def test_these_versions_of_vllm_are_refused_by_name(version: str) -> None:
    refusal = supported(version)
    assert refusal is not None
    assert refusal.startswith(f"vLLM {version} is not supported, vllm>=0.32,<0.34 is: install one of these")


def test_another_engine_has_versions_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSWEEP_ENGINE", "my-engine")
    assert supported("7.1") is None


def test_the_supported_versions_are_those_that_are_installed_with_us() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["gpu"] == [f"vllm{SUPPORTED}"]


# vLLM's own word


FLAGS = ["--model", "--max-num-seqs", "--max-num-batched-tokens", "--dtype", "--block-size", "--quantization"]
KNOWN = {
    "options": FLAGS,
    "variables": ["VLLM_LOGGING_LEVEL", "VLLM_CACHE_ROOT"],
    "quantizations": ["awq", "fp8", "gptq"],
    "mistakes": [[]],
}

Python = Callable[..., str]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Makes a Python that answers in vllm_parser.py's place and writes down what it is asked."""

    def made(answer: Any = KNOWN, *, version: str | None = "0.33.0", name: str = "python") -> str:
        path = tmp_path / name
        path.write_text(
            f"#!{sys.executable}\n"
            "import json, os, sys\n"
            f"with open({str(tmp_path / 'asked')!r}, 'a') as file:\n"
            "    print(json.dumps([sys.argv[2], sys.stdin.read(), dict(os.environ)]), file=file)\n"
            f"print({json.dumps({'version': version, 'stamp': []})!r} if sys.argv[2] == 'installed' else "
            f"{answer if isinstance(answer, str) else repr(json.dumps(answer))})\n"
        )
        path.chmod(0o755)
        return str(path)

    return made


def asked(tmp_path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


def mistakes(*found: tuple[str, str | None]) -> dict[str, Any]:
    return KNOWN | {"mistakes": [list(map(list, found))]}


def refused(*servers: ServerPlan) -> list[str]:
    with pytest.raises(ConfigError) as error:
        examine(servers, required=True, say=print)
    return str(error.value).splitlines()


def test_every_option_is_put_to_the_parser_of_the_python_that_serves(python: Python, tmp_path: Path) -> None:
    other = python(name="other")
    given = plan(
        server_python=python(), server={"max-num-seqs": 8, "block_size": None}, adapters={"m": None, "l": "/l"}
    )
    assert examine([given, plan(name="n", server_python=other)], required=True, say=print) == ()
    assert [what for what, *_ in asked(tmp_path)] == ["installed", "check", "installed", "check"]
    (options,) = json.loads(asked(tmp_path)[1][1])
    assert ["path", "--model", ["--model", "org/m"]] in options
    assert ["server.max-num-seqs", "--max-num-seqs", ["--max-num-seqs", "8"]] in options
    assert ["server.block_size", "--block-size", []] in options
    assert ["adapters", "--lora-modules", ["--lora-modules", "l=/l"]] in options


@pytest.mark.parametrize(
    ("key", "words", "line"),
    [
        ("server.max_num_seq", None, "vLLM 0.33.0 has no option 'max_num_seq'; did you mean 'max_num_seqs'?"),
        (
            "server.rope_theta",
            None,
            "vLLM 0.33.0 has no option 'rope_theta'; it is a part of hf_overrides now, as rope_parameters",
        ),
        ("server.zzz", None, "vLLM 0.33.0 has no option 'zzz'"),
        (
            "dtype",
            "argument --dtype: invalid choice: 'bf16' (choose from 'auto', 'half')",
            "vLLM 0.33.0 refuses it: invalid choice: 'bf16' (choose from 'auto', 'half')",
        ),
        (
            "server.max_num_seq",
            "argument --hf-overrides: Value {bad} cannot be converted to <function loads at 0x7f6829af8360>.",
            "vLLM 0.33.0 refuses it: Value {bad} cannot be converted to JSON.",
        ),
        (
            "server.zzz",
            "argument --compilation-config/-cc: 2 validation errors for CompilationConfig\nmode\n"
            "  Input should be 0, 1, 2 or 3 [type=enum, input_value=77, input_type=int]\n"
            "    For further information visit https://errors.pydantic.dev/v/enum\n"
            "foo\n  Unexpected keyword argument [type=unexpected_keyword_argument, input_value=1, input_type=int]",
            "vLLM 0.33.0 refuses it: 2 validation errors for CompilationConfig; mode: Input should be 0, 1, 2 or 3; "
            "foo: Unexpected keyword argument",
        ),
        (
            "server.zzz",
            "unrecognized arguments: --no-zzz",
            "vLLM 0.33.0 refuses it: it is no switch, so `false` means nothing; give it a value or leave it out",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_key_and_the_cure(
    python: Python, key: str, words: str | None, line: str
) -> None:
    given = plan(server_python=python(mistakes((key, words))), server={"max_num_seq": 8, "rope_theta": 1, "zzz": 2})
    assert refused(given) == [f"models.m.{key}: {line}"]


def test_options_that_do_not_go_together_are_said_of_the_server(python: Python) -> None:
    given = plan(server_python=python(mistakes(("", "Error: --a requires --b"))))
    assert refused(given) == ["models.m.server: vLLM 0.33.0 refuses it: --a requires --b"]


def test_all_mistakes_are_said_at_once_and_what_models_share_once(python: Python) -> None:
    bad, both = ["dtype", "argument --dtype: no"], ["server.max_num_seq", None]
    answer = KNOWN | {"mistakes": [[both], [both, bad], [both]]}
    server = {"max_num_seq": 8}
    path = python(answer)
    assert refused(*(plan(name=name, server_python=path, server=server) for name in "abc")) == [
        "models.a.server.max_num_seq: vLLM 0.33.0 has no option 'max_num_seq'; did you mean 'max_num_seqs'? "
        "(the same for b, c)",
        "models.b.dtype: vLLM 0.33.0 refuses it: no",
    ]


@pytest.mark.parametrize(
    ("server", "key"),
    [
        ({"other_token": "tok"}, "other_token"),
        ({"model_loader_extra_config": {"s3": [{"s3_secret_access_key": "k"}]}}, None),
        ({"otlp_traces_endpoint": "http://u:pa55word@h:4317"}, "otlp_traces_endpoint"),
    ],
)
def test_a_secret_is_refused_as_an_option_however_deep(server: dict[str, Any], key: str | None) -> None:
    key = key or "model_loader_extra_config.s3.s3_secret_access_key"
    with pytest.raises(ConfigError, match=rf"^models\.m\.server\.{key}: a secret cannot be an option, since arg"):
        command(plan(server=server), python="py", host="h", port=1)
    assert command(plan(server={"hf_overrides": {"image_token": "<image>"}}), python="py", host="h", port=1)


def test_a_secret_is_in_no_message_and_on_no_disk(
    python: Python, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-shell")
    server = {"max_num_seqs": "sk-from-the-shell"}
    found = mistakes(("server.max_num_seqs", "invalid int value: 'sk-from-the-shell'"))
    shown = refused(plan(server_python=python(found), server=server))
    assert shown == [
        "models.m.server.max_num_seqs: vLLM 0.33.0 refuses it: invalid int value: '***'",
    ]
    assert all(b"sk-from" not in file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert all("OPENAI_API_KEY" not in variables_ for *_, variables_ in asked(tmp_path))


def test_the_same_question_is_asked_once_and_another_again(python: Python, tmp_path: Path) -> None:
    path = python(mistakes(("server.max_num_seq", None)))
    given = plan(server_python=path, server={"max_num_seq": 8})
    first = refused(given)
    assert refused(given) == first
    assert [what for what, *_ in asked(tmp_path)] == ["installed", "check", "installed"]
    refused(plan(server_python=path, server={"max_num_seq": 9}))
    python(mistakes(("server.max_num_seq", None)), version="0.33.1")
    refused(given)
    assert [what for what, *_ in asked(tmp_path)][3:] == ["installed", "check", "installed", "check"]


def test_of_several_servers_only_those_are_asked_about_that_were_not_before(python: Python, tmp_path: Path) -> None:
    first, *others = (
        plan(name=name, server_python=python(), server={"max_num_seqs": n}) for n, name in enumerate("abc")
    )
    assert examine([first], required=True, say=print) == ()
    python(KNOWN | {"mistakes": [[["server.max_num_seqs", "too few"]], []]})
    for _ in range(2):
        (line,) = refused(first, *others)
        assert line.startswith("models.b.server.max_num_seqs: ")
        assert examine([others[1], first], required=True, say=print) == ()
    checks = [json.loads(question) for what, question, _ in asked(tmp_path) if what == "check"]
    assert [len(servers) for servers in checks] == [1, 2]


@pytest.mark.parametrize(
    ("name", "cure"),
    [("awqq", "; did you mean 'awq'?"), ("GTPQ", "; did you mean 'gptq'?"), ("int7", "; unset, it is read from the ")],
)
def test_a_quantization_that_vllm_does_not_have_is_refused(python: Python, name: str, cure: str) -> None:
    both = KNOWN | {"mistakes": [[], []]}
    (line,) = refused(*(plan(name=one, quantization=name, server_python=python(both)) for one in "ab"))
    assert line.startswith(f"models.a.quantization: vLLM 0.33.0 has no quantization {name!r}{cure}")
    assert line.endswith("(the same for b)")


@pytest.mark.parametrize(
    ("listed", "asked_for"),
    [
        (["awq"], {"quantization": "AWQ"}),
        (["awq"], {}),
        (None, {"quantization": "awqq"}),
        (["awq"], {"quantization": "awqq", "trust_remote_code": True}),
        (["awq"], {"quantization": "awqq", "env": {"PYTHONPATH": "/mine"}}),
    ],
)
def test_a_quantization_that_may_exist_is_not_refused(
    python: Python, listed: list[str] | None, asked_for: dict[str, Any]
) -> None:
    given = plan(server_python=python(KNOWN | {"quantizations": listed}), **asked_for)
    assert examine([given], required=True, say=print) == ()


def test_a_name_that_a_plugin_may_bring_is_asked_about_again(python: Python) -> None:
    given = plan(server_python=python(), quantization="mine")
    assert len(refused(given)) == 1
    python(KNOWN | {"quantizations": None})  # the plugin is installed
    assert examine([given], required=True, say=print) == ()


def test_a_name_that_is_not_known_is_not_remembered_for_a_server_that_may_bring_it_either(python: Python) -> None:
    given = plan(server_python=python(), quantization="mine")
    bringing = replace(given, model=replace(given.model, env={"PYTHONPATH": "/mine"}))
    assert examine([bringing], required=True, say=print) == ()
    python(KNOWN | {"quantizations": ["mine"]})  # it is installed now
    assert examine([given], required=True, say=print) == ()


@pytest.mark.parametrize("how", ["broken", "unwritable"])
def test_a_cache_that_cannot_be_used_is_done_without(python: Python, tmp_path: Path, how: str) -> None:
    given = plan(server_python=python())
    if how == "broken":
        examine([given], required=True, say=print)
        for file in (tmp_path / "cache").rglob("*.msgpack"):
            file.write_text('{"refusals": 3')
    else:
        (tmp_path / "cache").write_text("a file in the folder's place")
    for _ in range(2):
        assert examine([given], required=True, say=print) == ()
    assert [what for what, *_ in asked(tmp_path)].count("check") == 2


@pytest.mark.parametrize(
    ("answer", "version", "line"),
    [
        (KNOWN, None, "vLLM is not installed for {python}: install lmsweep[gpu] or lmsweep[cpu] there"),
        (KNOWN, "0.31.2", "{python}: vLLM 0.31.2 is not supported, vllm>=0.32,<0.34 is: install one of these"),
        (
            "sys.exit('ImportError: libtorch.so: gone')",
            "0.33.0",
            "vLLM of {python} cannot be asked about options: ImportError: libtorch.so: gone",
        ),
    ],
)
def test_a_vllm_that_cannot_be_asked_stops_a_local_sweep_and_is_a_notice_elsewhere(
    python: Python, answer: Any, version: str | None, line: str
) -> None:
    given = plan(server_python=python(answer, version=version))
    line = f"models.m.server_python: {line.format(python=given.model.server_python)}"
    (refusal,) = refused(given)
    assert refusal.startswith(line)
    (notice,) = examine([given], required=False, say=print)
    assert notice.startswith(line)
    assert notice.endswith("; the options of m are checked when a server starts")


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    assert refused(plan(server_python=missing)) == [
        f"models.m.server_python: cannot run {missing}: No such file or directory"
    ]


def test_a_parser_at_a_place_that_nobody_knows_is_a_notice(python: Python) -> None:
    given = plan(server_python=python(dict.fromkeys(KNOWN)))
    (notice,) = examine([given], required=True, say=print)
    assert notice.startswith("the parser of vLLM 0.33.0 (")


def test_a_variable_that_vllm_does_not_read_is_said(python: Python) -> None:
    env = {"VLLM_CACH_ROOT": "/x", "VLLM_ATTENTION_BACKEND": "X", "VLLM_LOGGING_LEVEL": "INFO", "OTHER": "1"}
    assert examine([plan(server_python=python(), env=env)], required=True, say=print) == (
        "models.m.env.VLLM_CACH_ROOT: vLLM 0.33.0 has no variable 'VLLM_CACH_ROOT' and does not read it; did you mean "
        "'VLLM_CACHE_ROOT'?",
        "models.m.env.VLLM_ATTENTION_BACKEND: vLLM 0.33.0 has no variable 'VLLM_ATTENTION_BACKEND' and does not read "
        "it; it is the option attention_backend now",
    )


def test_a_variable_of_the_shell_that_servers_do_not_get_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSWEEP_ENGINE", "my-engine")
    for name in ("VLLM_USE_MODELSCOPE", "VLLM_USE_V1", "VLLM_CACHE_ROOT", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "1")
    assert examine([plan()], required=True, say=print) == (
        "the environment variable VLLM_USE_MODELSCOPE is not passed to servers: it may change what a model answers; "
        "put it under the model's `env`, where it counts as a part of the model",
        "the environment variable VLLM_USE_V1 is not passed to servers: vLLM has only the V1 engine now",
    )


def test_neither_another_engine_nor_someone_elses_server_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine([plan(path="", url="http://h:1", server_python="/nothing")], required=True, say=print) == ()
    monkeypatch.setenv("LMSWEEP_ENGINE", "my-engine")
    assert examine([plan(server={"no_such_option": 1})], required=True, say=print) == ()


@pytest.mark.slow
@pytest.mark.vllm
def test_the_installed_vllm_accepts_a_good_set_and_names_every_mistake_of_a_bad_one() -> None:
    vllm = pytest.importorskip("vllm.version", reason="vLLM is not installed").__version__
    large = plan(name="large", tensor_parallel=4, gpus=4, nodes=2)
    good = plan(
        name="good",
        gpus=0.5,
        quantization="awq",
        tensor_parallel=2,
        server={"max_num_seqs": 8, "enable_prefix_caching": False, "compilation_config.mode": 0, "swap_space": 4},
    )
    bad = plan(
        name="bad",
        dtype="bf16",
        server={
            "max_num_seq": 4,
            "block_size": 1.5,
            "enable_prefix_caching": "yes",
            "max_num_seqs": False,
            "help": True,
        },
    )
    unfit = plan(name="unfit", quantization="awqq", server={"enable_auto_tool_choice": True})
    shown = refused(good, large, bad, unfit)
    assert [line.partition(f": vLLM {vllm} ")[0] for line in shown] == [
        "models.bad.dtype",
        "models.bad.server.max_num_seq",
        "models.bad.server.block_size",
        "models.bad.server.enable_prefix_caching",
        "models.bad.server.max_num_seqs",
        "models.bad.server.help",
        "models.unfit.server",
        "models.unfit.quantization",
    ]
    assert "invalid choice: 'bf16' (choose from" in shown[0]
    assert "did you mean 'max_num_seqs'" in shown[1]
    assert "invalid int value: '1.5'" in shown[2]
    assert "it is a switch" in shown[3]
    assert "it is no switch" in shown[4]
    assert "--enable-auto-tool-choice requires --tool-call-parser" in shown[6]
    assert "; did you mean 'awq'" in shown[7]
