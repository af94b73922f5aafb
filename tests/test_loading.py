import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from stand_in_server import Options

from sweep import ROOT
from sweep.errors import ConfigError
from sweep.masking import is_secret, secret_variables
from sweep.planning.config import CellOverride, Device, Expectation, NodeGroup, Overflow, Seeds, SweepConfig
from sweep.planning.loading import dump, load, load_cluster, secrets_of, sweep_file, with_source

SMALL = """
models:
  qwen: {path: org/qwen}
  llama: {path: org/llama}
tasks:
  gsm8k: {num_fewshot: 5}
  mmlu:
"""


@pytest.fixture(autouse=True)
def clean_place(tmp_path, monkeypatch):
    """An empty current directory, and no variable of this machine that would count as a secret."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MY_KEY", "LMSWEEP_ENGINE"):
        monkeypatch.delenv(name, raising=False)


def write(name: str, text: str) -> Path:
    path = Path("conf") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def loaded(text: str, *overrides: str) -> SweepConfig:
    write("s.yaml", text)
    return load("s", overrides)


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- What a file means -----------------------------------------------------------------------------------------------


def test_a_small_file_gives_models_and_tasks_with_their_defaults():
    config = loaded(SMALL)
    assert config.name == "s"
    assert config.runs_dir == str(Path.cwd() / "runs")
    assert config.seeds == Seeds(random=0, numpy=1234, torch=1234, fewshot=1234)
    assert list(config.models) == ["qwen", "llama"]
    assert config.models["qwen"].path == "org/qwen"
    assert config.models["qwen"].entry == "qwen"
    assert config.models["qwen"].device is Device.GPU
    assert config.tasks["gsm8k"].num_fewshot == 5
    assert config.tasks["mmlu"].task == "mmlu"
    assert config.tasks["mmlu"].num_fewshot is None


def test_a_path_to_a_file_works_like_a_name():
    path = write("elsewhere/my-sweep.yaml", SMALL)
    assert load(str(path)).name == "my-sweep"
    assert load("my-sweep", conf_dir=path.parent).models == load(str(path)).models


def test_defaults_lie_under_every_model_and_mappings_merge_by_key():
    config = loaded("""
defaults:
  model: {tensor_parallel: 2, server: {max-num-seqs: 8, enable_prefix_caching: true}, env: {A: 1, B: x}}
  task: {limit: 7, gen_kwargs: {temperature: 0}}
models:
  plain: {path: org/a}
  own: {path: org/b, tensor_parallel: 1, server: {max_num_seqs: 64}, env: {B: y}}
tasks: {gsm8k: {gen_kwargs: {max_gen_toks: 9}}, mmlu: {limit: 3, on_overflow: truncate}}
""")
    assert config.models["plain"].tensor_parallel == 2
    assert config.models["own"].tensor_parallel == 1
    assert config.models["own"].server == {"max_num_seqs": 64, "enable_prefix_caching": True}
    assert config.models["own"].env == {"A": "1", "B": "y"}
    assert config.tasks["gsm8k"].gen_kwargs == {"temperature": 0, "max_gen_toks": 9}
    assert config.tasks["gsm8k"].limit == 7
    assert config.tasks["mmlu"].limit == 3
    assert config.tasks["mmlu"].on_overflow is Overflow.TRUNCATE


def test_variants_make_models_in_place_of_their_entry():
    config = loaded("""
models:
  qwen:
    path: org/qwen
    server: {max_num_seqs: 8}
    variants: {plain: , chat: {chat: true, server: {max_num_seqs: 4}}, awq: {path: org/qwen-awq}}
tasks: {gsm8k: }
""")
    assert list(config.models) == ["qwen-plain", "qwen-chat", "qwen-awq"]
    assert [model.entry for model in config.models.values()] == ["qwen-plain", "qwen-chat", "qwen-awq"]
    assert [model.chat for model in config.models.values()] == [False, True, False]
    assert config.models["qwen-chat"].server == {"max_num_seqs": 4}
    assert config.models["qwen-awq"].path == "org/qwen-awq"


def test_checkpoints_make_a_model_for_each_folder_in_the_order_of_steps():
    for step in ("step-1000", "step-200", "step-200.5"):
        Path("train", step).mkdir(parents=True)
    Path("train/step-notes.txt").touch()
    config = loaded("models: {m: {checkpoints: [./train/step-*]}}\ntasks: {gsm8k: }")
    assert list(config.models) == ["m-step-200", "m-step-200-5", "m-step-1000"]
    assert config.models["m-step-200-5"].path == str(Path.cwd() / "train/step-200.5")
    assert config.models["m-step-200-5"].entry == "m-step-200-5"


def test_checkpoints_below_a_wildcard_are_told_apart_by_it():
    for run in "ab":
        Path("train", run, "final").mkdir(parents=True)
    config = loaded("models: {m: {checkpoints: [train/*/final, train/a]}}\ntasks: {gsm8k: }")
    assert list(config.models) == ["m-a-final", "m-b-final", "m-a"]


def test_adapters_share_the_entry_and_so_the_server_of_their_base():
    Path("lora/sql").mkdir(parents=True)
    config = loaded("models: {m: {path: org/m, adapters: {sql: ./lora/sql, law: org/law}}}\ntasks: {gsm8k: }")
    assert {name: (model.entry, model.adapter) for name, model in config.models.items()} == {
        "m": ("m", None),
        "m-sql": ("m", str(Path.cwd() / "lora/sql")),
        "m-law": ("m", "org/law"),
    }


def test_a_variant_may_bring_checkpoints_and_adapters():
    Path("train/final").mkdir(parents=True)
    config = loaded("""
models:
  m:
    path: org/m
    variants:
      hub: {adapters: {sql: org/sql}}
      own: {checkpoints: [train/final], adapters: {sql: org/sql}}
tasks: {gsm8k: }
""")
    assert {name: model.entry for name, model in config.models.items()} == {
        "m-hub": "m-hub",
        "m-hub-sql": "m-hub",
        "m-own-final": "m-own-final",
        "m-own-final-sql": "m-own-final",
    }
    assert config.models["m-own-final-sql"].path.endswith("train/final")


def test_a_list_of_shots_makes_a_grid_that_a_model_can_choose_by_its_key():
    config = loaded("""
models: {all: {path: org/a}, some: {path: org/b, tasks: ["!gsm8k"]}}
tasks: {gsm8k: {num_fewshot: [0, 5]}, mmlu: {task: mmlu_stem}}
""")
    assert {name: (task.task, task.num_fewshot) for name, task in config.tasks.items()} == {
        "gsm8k-0shot": ("gsm8k", 0),
        "gsm8k-5shot": ("gsm8k", 5),
        "mmlu": ("mmlu_stem", None),
    }
    assert config.models["some"].tasks == ("!gsm8k-0shot", "!gsm8k-5shot")


def test_how_much_may_fail_is_said_of_the_sweep_and_of_models():
    config = loaded(SMALL)
    assert (config.retries, config.max_failures, config.models["qwen"].max_failures) == (1, None, None)
    config = loaded(SMALL + "retries: 0\nmax_failures: 9\ndefaults: {model: {max_failures: 3}}")
    assert (config.retries, config.max_failures, config.models["qwen"].max_failures) == (0, 9, 3)


def test_how_long_loading_and_scoring_may_take_is_said_of_the_sweep():
    config = loaded(SMALL)
    assert (config.load_timeout_s, config.scoring_timeout_s) == (7200, 14400)
    config = loaded(SMALL, "load_timeout_s=60", "scoring_timeout_s=90.5")
    assert (config.load_timeout_s, config.scoring_timeout_s) == (60, 90.5)


def test_the_limit_of_the_sweep_fills_tasks_that_set_none():
    config = loaded(SMALL + "  own: {limit: 0.5}\nlimit: 10\n")
    assert [config.tasks[name].limit for name in ("gsm8k", "mmlu", "own")] == [10, 10, 0.5]
    assert loaded(SMALL, "limit=3").tasks["gsm8k"].limit == 3


def test_extended_files_come_first_and_later_ones_win():
    write("shared/base.yaml", "name: base\nseeds: {numpy: 1, torch: 1}\nmodels: {m: {path: org/base, chat: true}}")
    write("shared/more.yaml", "extends: base.yaml\nseeds: {torch: 2}\ntasks: {gsm8k: {num_fewshot: 5, limit: 4}}")
    config = loaded("extends: [shared/base.yaml, shared/more.yaml]\nmodels: {m: {path: org/own}}\ntasks: {gsm8k: }")
    assert config.name == "s"  # its own, as two sweeps of one name would share a run directory
    assert config.seeds == Seeds(numpy=1, torch=2)
    assert (config.models["m"].path, config.models["m"].chat) == ("org/own", True)
    assert (config.tasks["gsm8k"].num_fewshot, config.tasks["gsm8k"].limit) == (5, 4)


def test_a_suite_brings_tasks_that_the_sweep_may_change():
    write("suites/pair.yaml", "tasks: {gsm8k: {num_fewshot: 4, limit: 9}, mmlu: }")
    config = loaded(
        "suites: [pair]\nmodels: {m: {path: org/m}}\ntasks: {gsm8k: {limit: 2}}", "tasks.mmlu.num_fewshot=5"
    )
    assert (config.tasks["gsm8k"].num_fewshot, config.tasks["gsm8k"].limit) == (4, 2)
    assert config.tasks["mmlu"].num_fewshot == 5


def test_local_paths_become_absolute_and_hub_ids_stay():
    for folder in ("weights/deep/er", "bare", "yaml"):
        Path(folder).mkdir(parents=True)
    config = loaded("""
models:
  hub: {path: org/name, tokenizer: org/tok}
  dotted: {path: ./weights, tokenizer: ../}
  deep: {path: weights/deep/er}
  bare: {path: bare}
tasks: {mine: {include_path: yaml}}
runs_dir: out
""")
    here = Path.cwd()
    assert (config.models["hub"].path, config.models["hub"].tokenizer) == ("org/name", "org/tok")
    assert (config.models["dotted"].path, config.models["dotted"].tokenizer) == (
        str(here / "weights"),
        str(here.parent),
    )
    assert config.models["deep"].path == str(here / "weights/deep/er")
    assert config.models["bare"].path == str(here / "bare")
    assert config.tasks["mine"].include_path == str(here / "yaml")
    assert config.runs_dir == str(here / "out")


AT_A_URL = "models: {m: {url: http://node7:8000, tokenizer: org/t}}\ntasks: {gsm8k: }\n"


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("http://node7:8000", "http://node7:8000"),
        ("http://node7:8000/", "http://node7:8000"),
        ("http://node7:8000/v1", "http://node7:8000"),
        ("http://Node7:8000/v1/", "http://node7:8000"),
        ("https://models.org", "https://models.org"),
        ("HTTPS://models.org:/v1", "https://models.org"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("https://gateway.org/api/v1", "https://gateway.org/api"),
        ("https://gateway.org/Team-v1/", "https://gateway.org/Team-v1"),
    ],
)
def test_a_url_becomes_the_address_of_a_server(written, url):
    model = loaded(AT_A_URL, f"models.m.url={written}").models["m"]
    assert (model.url, model.path, model.entry, model.tokenizer) == (url, "", "m", "org/t")


def test_a_model_at_a_url_may_say_how_the_server_calls_it_and_what_it_serves(monkeypatch):
    monkeypatch.setenv("MY_KEY", "key-of-the-gateway")
    model = loaded("""
models:
  m:
    url: http://node7:8000
    tokenizer: ./tokenizer
    served_model_name: org/m-awq
    api_key: ${oc.env:MY_KEY}
    revision: v2
    chat: true
    max_model_len: 4096
    concurrency: 8
    trust_remote_code: true
tasks: {gsm8k: }
""").models["m"]
    assert (model.served_model_name, model.api_key, model.revision) == ("org/m-awq", "key-of-the-gateway", "v2")
    assert model.tokenizer == str(Path.cwd() / "tokenizer")


def test_a_url_replaces_a_weaker_path_and_what_was_said_of_our_server():
    config = loaded("""
defaults: {model: {device: cpu, env: {A: 1}, dtype: bfloat16, tokenizer: org/t, api_key: "${oc.env:MY_KEY,k}"}}
models:
  at: {url: "http://node7:8000"}
  both:
    path: org/m
    server: {max_num_seqs: 8}
    variants: {ours: , theirs: {url: "http://node8:8000", served_model_name: x}, again: {path: org/n}}
tasks: {gsm8k: }
""")
    assert {name: (model.path, model.url, model.device) for name, model in config.models.items()} == {
        "at": ("", "http://node7:8000", Device.GPU),
        "both-ours": ("org/m", None, Device.CPU),
        "both-theirs": ("", "http://node8:8000", Device.GPU),
        "both-again": ("org/n", None, Device.CPU),
    }
    assert [model.dtype for model in config.models.values()] == ["auto", "bfloat16", "auto", "bfloat16"]
    assert [model.api_key for model in config.models.values()] == ["k", None, None, None]
    assert config.models["both-theirs"].server == {}


def test_the_python_of_a_server_keeps_its_links_which_make_a_virtual_environment(tmp_path, monkeypatch):
    Path("old/bin").mkdir(parents=True)
    Path("old/bin/python").symlink_to(sys.executable)
    monkeypatch.setenv("HOME", str(tmp_path))
    for written in ("old/bin/python", "./old/bin/../bin/python", "~/old/bin/python", str(tmp_path / "old/bin/python")):
        model = loaded(SMALL, f"models.qwen.server_python={written}").models["qwen"]
        assert model.server_python == str(tmp_path / "old/bin/python")


def test_a_server_python_beside_an_engine_that_replaces_all_is_refused(monkeypatch):
    monkeypatch.setenv("LMSWEEP_ENGINE", "engine")
    message = refused(SMALL, f"models.qwen.server_python={sys.executable}")
    assert message.startswith("command line: models.qwen.server_python: LMSWEEP_ENGINE is set and replaces every")


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("7200", 7200),
        ("90.5", 90.5),
        ("3h50m", 13800),
        ("3h 50m", 13800),
        ("1d2h", 93600),
        ("45m", 2700),
        ("30s", 30),
        ("3:50:00", 13800),
        ("'3:50:00'", 13800),
        ("0:30:00", 1800),
        ("1-12:00:00", 129600),
        ("50:00", 3000),
        ("null", None),
    ],
)
def test_a_walltime_is_written_as_people_and_slurm_write_it(written, seconds):
    assert loaded(f"{SMALL}\nwalltime: {written}").walltime == seconds
    if "'" not in written and " " not in written:
        assert loaded(SMALL, f"walltime={written}").walltime == seconds


def test_the_sweeps_env_lies_under_that_of_every_server_of_ours():
    config = loaded("""
env: {HF_HOME: /scratch/hf, OMP_NUM_THREADS: 8}
defaults: {model: {env: {VLLM_LOGGING_LEVEL: WARNING}}}
models:
  m: {path: org/m, env: {HF_HOME: /own}}
  n: {path: org/n}
tasks: {gsm8k: }
""")
    assert config.env == {"HF_HOME": "/scratch/hf", "OMP_NUM_THREADS": "8"}
    assert config.models["m"].env == {"HF_HOME": "/own", "OMP_NUM_THREADS": "8", "VLLM_LOGGING_LEVEL": "WARNING"}
    assert config.models["n"].env["HF_HOME"] == "/scratch/hf"
    config = loaded("env: {A: 1}\nmodels: {m: {url: 'http://h:1', tokenizer: org/t}}\ntasks: {gsm8k: }")
    assert config.models["m"].env == {}


def test_keys_with_nothing_behind_them_are_empty():
    config = loaded(SMALL + "suites:\nextends:\nwandb:\ncells:\ndefaults:\n  model:\n")
    assert config == loaded(SMALL)


def test_a_number_from_the_environment_is_decoded_when_asked(monkeypatch):
    monkeypatch.setenv("DOCUMENTS", "12")
    assert loaded(SMALL + "limit: ${oc.decode:${oc.env:DOCUMENTS}}").limit == 12


def test_cells_may_be_named_with_wildcards():
    config = loaded(SMALL + "cells: {'*/mmlu': {limit: 3}, qwen/gsm8k: {skip: true, on_overflow: truncate}}")
    assert config.cells == {
        "*/mmlu": CellOverride(limit=3),
        "qwen/gsm8k": CellOverride(skip=True, on_overflow=Overflow.TRUNCATE),
    }


# --- The command line ------------------------------------------------------------------------------------------------


def test_overrides_change_what_the_file_says():
    config = loaded(
        SMALL,
        "models.qwen.chat=true",
        "models.qwen.server.max-num-seqs=4",
        "tasks.gsm8k.num_fewshot=[0,5]",
        "cells.qwen/mmlu.skip=true",
        "name=other",
        "wandb.mode=offline",
    )
    assert config.models["qwen"].chat is True
    assert config.models["qwen"].server == {"max_num_seqs": 4}
    assert list(config.tasks) == ["gsm8k-0shot", "gsm8k-5shot", "mmlu"]
    assert config.cells["qwen/mmlu"].skip
    assert (config.name, config.wandb.mode) == ("other", "offline")


def test_overrides_may_add_a_task_and_a_model_that_has_a_path():
    config = loaded(SMALL, "tasks.gsm9k={}", "models.new.path=org/new", "models.new.chat=true")
    assert config.tasks["gsm9k"].task == "gsm9k"
    assert config.models["new"].chat


def test_an_override_may_add_a_model_that_has_a_url():
    config = loaded(SMALL, "models.new.url=http://node7:8000/v1", "models.new.tokenizer=org/t")
    assert config.models["new"].url == "http://node7:8000"


# --- Mistakes: one line with the source, the key, what was wrong, the nearest known name -----------------------------

ONE_MODEL = "models: {qwen: {path: org/qwen}}\n"
ONE_TASK = "tasks: {gsm8k: }\n"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        # unknown keys, at every level
        (SMALL + "modles: {}", [], "conf/s.yaml: modles: unknown key; did you mean 'models'?"),
        (SMALL + "wandb: {projcet: x}", [], "conf/s.yaml: wandb.projcet: unknown key; did you mean 'project'?"),
        (SMALL + "ray: {zzz: 1}", [], "conf/s.yaml: ray.zzz: unknown key; known: address, cpu_servers, evaluators"),
        (
            "models: {m: {path: org/m, variants: {a: {caht: true}}}}\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m.variants.a.caht: unknown key; did you mean 'chat'?",
        ),
        (ONE_TASK + "models: {m: {path: org/m, entry: x}}", [], "conf/s.yaml: models.m.entry: unknown key"),
        (SMALL, ["modles.qwen.chat=1"], "command line: modles: unknown key; did you mean 'models'?"),
        (SMALL, ["tasks.gsm8k.num_fewshots=1"], "command line: tasks.gsm8k.num_fewshots: unknown key; did you mean"),
        # wrong types
        (SMALL + "limit: ten", [], "conf/s.yaml: limit: wants an integer or a number, got 'ten'"),
        (SMALL + "limit: '10'", [], "limit: wants an integer or a number, got '10'; write it without quotes"),
        (SMALL + "runs_dir: 7", [], "conf/s.yaml: runs_dir: wants text, got 7; put it in quotes"),
        (SMALL + "seeds: 7", [], "conf/s.yaml: seeds: wants a mapping, got 7"),
        (SMALL + "suites: pair", [], "conf/s.yaml: suites: wants a list of texts, got 'pair'"),
        (SMALL, ["models.qwen.chat=1"], "command line: models.qwen.chat: wants true or false, got 1"),
        (SMALL, ["models.qwen.tensor_parallel=true"], "models.qwen.tensor_parallel: wants an integer, got true"),
        (
            SMALL,
            ["models.qwen.replicas=atuo"],
            "replicas: wants 'auto' or an integer, got 'atuo'; did you mean 'auto'?",
        ),
        (SMALL, ["models.qwen.device=tpu"], "models.qwen.device: wants 'gpu' or 'cpu' or 'auto', got 'tpu'"),
        (SMALL, ["wandb.mode=ofline"], "wandb.mode: wants 'auto' or 'online' or 'offline' or 'disabled', got 'ofline'"),
        (
            SMALL + "wandb: {mode: off}",
            [],
            "or 'offline' or 'disabled', got false; YAML reads a bare off or no as false, write disabled",
        ),
        (SMALL, ["wandb.mode=on"], "got true; YAML reads a bare on or yes as true, write online"),
        (SMALL, ["models.qwen.device=no"], "wants 'gpu' or 'cpu' or 'auto', got false; YAML reads a bare off or no as"),
        (SMALL, ["models.qwen.path=null"], "command line: models.qwen.path: wants text, got nothing"),
        (SMALL, ["tasks.gsm8k.num_fewshot=[0,x]"], "num_fewshot: wants an integer or a list of integers, got [0, 'x']"),
        (
            "models: [org/qwen2.5]\n" + ONE_TASK,
            [],
            "conf/s.yaml: models: wants a mapping, got ['org/qwen2.5']; write `org-qwen2-5: {path: org/qwen2.5}`",
        ),
        (
            ONE_MODEL + "tasks: [gsm8k, mmlu]",
            [],
            "conf/s.yaml: tasks: wants a mapping, got ['gsm8k', 'mmlu']; write `gsm8k: {}` below it, a line for each",
        ),
        (
            ONE_MODEL + "tasks: {gsm8k: 5}",
            [],
            "conf/s.yaml: tasks.gsm8k: wants a mapping, got 5; write `gsm8k: {num_fewshot: 5}`, or `limit` for its doc",
        ),
        (ONE_MODEL + "tasks: {gsm8k: true}", [], "tasks.gsm8k: wants a mapping, got true; write `gsm8k: {}`, with set"),
        (
            "models: {qwen: org/qwen}\n" + ONE_TASK,
            [],
            "models.qwen: wants a mapping, got 'org/qwen'; write `qwen: {path: org/qwen}`",
        ),
        ("- models", [], "conf/s.yaml: wants a mapping, got ['models']"),
        (SMALL, ["retries=-1"], "command line: retries: wants 0 or more, got -1"),
        (SMALL, ["max_failures=0"], "command line: max_failures: wants 1 or more, got 0"),
        (SMALL, ["load_timeout_s=0"], "command line: load_timeout_s: wants more than 0 seconds, got 0.0"),
        (SMALL, ["scoring_timeout_s=-1"], "command line: scoring_timeout_s: wants more than 0 seconds, got -1.0"),
        (SMALL, ["models.qwen.max_failures=0"], "models.qwen.max_failures: wants 1 or more, got 0"),
        # missing values
        (
            "models: {m: }\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m.path: missing value; give a hub id or a local folder, or url for a server that",
        ),
        ("models: {m: {path: ''}}\n" + ONE_TASK, [], "conf/s.yaml: models.m.path: missing value; give a hub id"),
        (SMALL, ["models.new.chat=true"], "no such model (a new one needs a path or url)"),
        ("models: {m: {path: '???'}}\n" + ONE_TASK, [], "conf/s.yaml: models.m.path: missing value"),
        (ONE_TASK, [], "conf/s.yaml: models: missing value; a sweep needs at least one model"),
        (ONE_MODEL, [], "conf/s.yaml: tasks: missing value; a sweep needs at least one task, or a suite"),
        (SMALL, ["limit"], "command line: limit: missing value; write key=value"),
        (SMALL, ["models="], "command line: models: missing value; set keys of it one by one, as in models.NAME=..."),
        (SMALL, ["models={}", "models.x.path=/a"], "command line: models: missing value; set keys of it"),
        (SMALL, ["tasks=null"], "command line: tasks: missing value; set keys of it one by one, as in tasks.NAME=..."),
        (SMALL, ["wandb="], "command line: wandb: missing value; set keys of it one by one, as in wandb.mode=..."),
        (SMALL, ["defaults.model="], "command line: defaults.model: missing value; set keys of it one by one"),
        # files and folders
        (SMALL + "extends: bse.yaml", [], "conf/s.yaml: extends: no file "),
        (SMALL + "extends: qwen_sweep", [], "/conf/qwen_sweep'; did you mean '"),
        (SMALL + "extends: zzz", [], "/conf/zzz'; extends takes a path, relative to the file that says it"),
        (SMALL + "extends: s.yaml", [], "conf/s.yaml: extends: a cycle, conf/s.yaml -> conf/s.yaml"),
        (SMALL + "suites: [nope]", [], "conf/s.yaml: suites: no suite 'nope'"),
        (SMALL + "suites: [open_llm_leaderbord]", [], "did you mean 'open_llm_leaderboard'?"),
        (SMALL, ["tasks.gsm8k.include_path=mine"], "command line: tasks.gsm8k.include_path: no folder '/"),
        (ONE_TASK + "models: {m: {checkpoints: [a/*]}}", [], "conf/s.yaml: models.m.checkpoints: no folder matches '/"),
        (ONE_TASK + "models: {m: {checkpoints: [gone]}}", [], "conf/s.yaml: models.m.checkpoints: no folder '/"),
        # YAML and interpolations
        ("models: {\n", [], "conf/s.yaml: line 2, column 1: bad YAML: did not find expected node content"),
        ("a: 1\na: 2\n", [], "conf/s.yaml: line 2, column 1: bad YAML: found duplicate key a"),
        (
            "tasks:\n  gsm8k: {}\n\tmmlu: {}\n",
            [],
            "conf/s.yaml: line 3, column 1: bad YAML: found character that cannot start any token; a line begins",
        ),
        (
            "name: @x\n",
            [],
            "column 7: bad YAML: found character that cannot start any token; a text that begins like th",
        ),
        (
            "models:\n  a:\n    path: x\n   chat: true\n",
            [],
            "line 4, column 4: bad YAML: did not find expected key; the line is indented unlike",
        ),
        (
            "models:\n  a:\n    path: x: y\n",
            [],
            "line 3, column 12: bad YAML: mapping values are not allowed in this context; a text that holds ': ' wants",
        ),
        (
            "models:\n  a:\n    path: x\n  chat true\ntasks:\n",
            [],
            "line 5, column 1: bad YAML: could not find expected ':'; the line before lacks its colon",
        ),
        (SMALL, ["limit=["], "command line: limit: bad YAML after the ="),
        (SMALL + "api_key: ${oc.env:MY_KEY}", [], "conf/s.yaml: api_key: environment variable 'MY_KEY' is not set"),
        (
            SMALL,
            ["wandb.tags=['${oc.env:MY_KEY}']"],
            "command line: wandb.tags.0: environment variable 'MY_KEY' is not",
        ),
        (SMALL + "limit: ${nope}", [], "conf/s.yaml: limit: not understood: Interpolation key 'nope' not found"),
        (SMALL + "limit: ${nope", [], "conf/s.yaml: limit: not understood: no viable alternative at input '${nope'"),
        ("~: 1", [], "conf/s.yaml: not understood: Incompatible key type 'NoneType'"),
        (
            SMALL + "limit: ${oc.env:N,5}",
            [],
            "limit: wants an integer or a number, got '5'; write it without quotes, an i",
        ),
        # models at a url
        (AT_A_URL, ["models.m.path=org/m"], "command line: models.m.path: the model is what the server at url serves"),
        (SMALL, ["models.qwen.url=http://n:1"], "conf/s.yaml: models.qwen.path: the model is what the server at url"),
        (AT_A_URL, ["models.m.checkpoints=[a/*]"], "command line: models.m.checkpoints: the model is what the server"),
        (
            "models: {m: {url: 'http://n:1'}}\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m.tokenizer: missing value; a model at a url needs its hub id or folder, as prompts",
        ),
        *(
            (AT_A_URL, [f"models.m.{key}={value}"], f"command line: models.m.{key}: has no effect with url: ")
            for key, value in {
                "server": "{max_num_seqs: 8}",
                "env": "{A: b}",
                "device": "cpu",
                "tensor_parallel": "2",
                "gpus": "1.0",
                "replicas": "2",
                "quantization": "awq",
                "dtype": "auto",
                "generation_config": "auto",
                "adapters": "{sql: org/sql}",
                "server_python": sys.executable,
            }.items()
        ),
        (SMALL, ["models.qwen.served_model_name=x"], "served_model_name: has no effect without url: our servers se"),
        (SMALL, ["models.qwen.api_key=${oc.env:N,k}"], "models.qwen.api_key: has no effect without url: our servers"),
        (AT_A_URL, ["models.m.url=node7:8000"], "got 'node7:8000'; did you mean 'http://node7:8000'?"),
        (AT_A_URL, ["models.m.url=ftp://node7"], "models.m.url: wants http://host:port of an OpenAI-compatible server"),
        (AT_A_URL, ["models.m.url=http://"], "got 'http://'"),
        (AT_A_URL, ["models.m.url=http://node7:x"], "got 'http://node7:x'"),
        (AT_A_URL, ["models.m.url=http://node7:80000"], "got 'http://node7:80000'"),
        (AT_A_URL, ["models.m.url='http://node 7'"], "got 'http://node 7'"),
        (AT_A_URL, ["models.m.url=http://[::1"], "got 'http://[::1'"),
        (
            AT_A_URL,
            ["models.m.url=http://node7:8000/v1/completions"],
            "got 'http://node7:8000/v1/completions'; did you mean 'http://node7:8000'?",
        ),
        # prompts and answers
        (
            SMALL,
            ["models.qwen.chat_template_kwargs={a: 1}"],
            "chat_template_kwargs: has no effect without `chat: true`",
        ),
        (
            SMALL,
            ["models.qwen.chat=true", "models.qwen.chat_template_kwargs.add_generation_prompt=false"],
            "chat_template_kwargs: add_generation_prompt is what lm-eval says for each prompt; leave it out",
        ),
        (SMALL, ["models.qwen.think_end_token=''"], "models.qwen.think_end_token: is empty"),
        (
            SMALL,
            ["models.qwen.device=cpu", "models.qwen.env.VLLM_BATCH_INVARIANT=1"],
            "models.qwen.env: VLLM_BATCH_INVARIANT needs a GPU",
        ),
        # the Python of a server
        (SMALL, ["models.qwen.server_python=/gone/python"], "models.qwen.server_python: no file '/gone/python'"),
        (SMALL, ["models.qwen.server_python=."], "is a folder; did you mean '/"),
        (SMALL, ["models.qwen.server_python=conf/s.yaml"], "cannot be executed; give a Python that has vLLM"),
        (SMALL, ["models.qwen.server_python=conf/s.yml"], "/conf/s.yml'; did you mean 's.yaml'?"),
        # names
        ("models: {qwen2.5: {path: o/m}}\n" + ONE_TASK, [], "conf/s.yaml: models.qwen2.5: a name holds only letters"),
        (ONE_MODEL + "tasks: {a/b: }", [], "tasks.a/b: a name holds only letters, digits, - and _; call it 'a-b'"),
        ("models: {7: {path: o/m}}\n" + ONE_TASK, [], "conf/s.yaml: models.7: a name is text; write '7' in quotes"),
        (SMALL + "name: a/b", [], "conf/s.yaml: name: 'a/b' names a folder"),
        (SMALL, ["models.qwne.chat=true"], "command line: models.qwne: no such model"),
        (SMALL, ["models.qwne.chat=true"], "did you mean 'qwen'?"),
        (SMALL, ["models.typo.x=1"], "command line: models.typo: no such model"),
        (SMALL, ["models.zzz.chat=true"], "the sweep has qwen, llama"),
        (
            "models: {m: {path: o/m, variants: {a: }}, m-a: {path: o/n}}\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m-a: makes 'm-a', as models.m.variants.a does; rename one of them",
        ),
        (SMALL, ["tasks.gsm8k.num_fewshot=[5,5]"], "tasks.gsm8k: makes 'gsm8k-5shot', as tasks.gsm8k does"),
        # values
        (SMALL, ["models.qwen.tensor_parallel=0"], "command line: models.qwen.tensor_parallel: wants 1 or more, got 0"),
        (SMALL, ["models.qwen.replicas=0"], "command line: models.qwen.replicas: wants 1 or more, got 0"),
        (SMALL, ["models.qwen.concurrency=-1"], "command line: models.qwen.concurrency: wants 1 or more, got -1"),
        (SMALL, ["models.qwen.hang_timeout_s=0.0"], "hang_timeout_s: wants more than 0 seconds, got 0.0"),
        (SMALL, ["models.qwen.gpus=1.5"], "models.qwen.gpus: wants a share below 1 or whole GPUs, got 1.5"),
        (SMALL, ["models.qwen.gpus=0.5", "models.qwen.tensor_parallel=2"], "gpus: tensor_parallel spans 2 whole GPUs"),
        (SMALL, ["models.qwen.device=cpu", "models.qwen.tensor_parallel=2"], "spans GPUs, but device is cpu; got 2"),
        (
            SMALL,
            ["models.qwen.tasks=[gsm9k]"],
            "models.qwen.tasks: no task 'gsm9k' in this sweep; did you mean 'gsm8k'?",
        ),
        (SMALL, ["models.qwen.tasks=[gsm8k,'!mmlu']"], "models.qwen.tasks: either all or none of the names start"),
        (SMALL, ["limit=0"], "command line: limit: wants a whole number of documents, at least 1, or a share"),
        (SMALL, ["tasks.mmlu.limit=1.5"], "command line: tasks.mmlu.limit: wants a whole number of documents"),
        (
            SMALL,
            ["tasks.mmlu.num_fewshot=-1"],
            "command line: tasks.mmlu.num_fewshot: wants 0 or more examples, got -1",
        ),
        (SMALL, ["tasks.mmlu.num_fewshot=[]"], "command line: tasks.mmlu.num_fewshot: the list is empty"),
        (SMALL, ["seeds.numpy=-1"], "command line: seeds.numpy: wants 0 to 4294967295, as numpy does, got -1"),
        (SMALL, ["ray.evaluators=0"], "command line: ray.evaluators: wants 1 or more, got 0"),
        (
            SMALL,
            ["walltime=soon"],
            "command line: walltime: wants a time as in 3h50m or 3:50:00, or seconds, got 'soon'",
        ),
        (SMALL + "walltime: 3h70", [], "conf/s.yaml: walltime: wants a time as in 3h50m"),
        (SMALL + "walltime: ''", [], "conf/s.yaml: walltime: wants a time as in 3h50m"),
        (SMALL, ["walltime=0"], "command line: walltime: wants more than 0 seconds, got 0"),
        (SMALL + "walltime: true", [], "conf/s.yaml: walltime: wants text or an integer or a number, got true"),
        (SMALL + "env: {RAY_AUTH_MODE: token}", [], "conf/s.yaml: env.RAY_AUTH_MODE: Ray reads it before any sweep"),
        (SMALL + "env: {CUDA_VISIBLE_DEVICES: 0}", [], "env.CUDA_VISIBLE_DEVICES: each server gets its own; leave it"),
        (
            SMALL + "cells: {qwen/mmul: {skip: true}}",
            [],
            "cells.qwen/mmul: no such model/task; did you mean 'qwen/mmlu'",
        ),
        (
            SMALL + "  x: {gen_kwargs: 5}",
            [],
            "conf/s.yaml: tasks.x.gen_kwargs: wants a mapping, got 5",
        ),
        (
            "models: {m: {path: o/m, server: {max-num-seqs: 1, max_num_seqs: 2}}}\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m.server.max_num_seqs: the same option as 'max_num_seqs', which is set too",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_source_and_key(text, overrides, message):
    assert message in refused(text, *overrides)


@pytest.mark.parametrize(
    ("base", "own", "message"),
    [
        ("models: {m: {path: o/m, caht: true}}", ONE_TASK, "conf/base.yaml: models.m.caht: unknown key"),
        ("models: {m: {path: o/m, chat: 3}}", ONE_TASK, "conf/base.yaml: models.m.chat: wants true or false, got 3"),
        ("models: {m: {path: o/m, gpus: 0}}", ONE_TASK, "conf/base.yaml: models.m.gpus: wants a share"),
        ("models: {m: {path: o/m, gpus: 1}}", ONE_TASK + "models: {m: {gpus: 0}}", "conf/s.yaml: models.m.gpus: wants"),
        ("defaults: {model: {gpus: 0}}", ONE_TASK + ONE_MODEL, "conf/base.yaml: defaults.model.gpus: wants a share"),
        ("models: {m: {chat: true}}", ONE_TASK, "conf/base.yaml: models.m.path: missing value"),
        ("wandb: {group: '${oc.env:MY_KEY}'}", SMALL, "conf/base.yaml: wandb.group: environment variable 'MY_KEY'"),
        ("extends: s.yaml", SMALL, "conf/base.yaml: extends: a cycle, conf/s.yaml -> conf/base.yaml -> conf/s.yaml"),
    ],
)
def test_a_mistake_is_said_of_the_file_that_holds_it(base, own, message):
    write("base.yaml", base)
    assert message in refused("extends: base.yaml\n" + own)


@pytest.mark.parametrize(
    ("place", "written", "meant"),
    [
        ("base.yaml", "base", "base.yaml"),
        ("base.yaml", "bse.yaml", "base.yaml"),
        ("mine/base.yaml", "mine/base", "mine/base.yaml"),
    ],
)
def test_the_name_of_a_file_in_extends_is_answered_with_its_path(place, written, meant):
    write(place, SMALL)
    assert refused(f"extends: {written}").endswith(f"/conf/{written}'; did you mean '{meant}'?")


def test_a_file_elsewhere_that_extends_the_name_of_a_sweep_is_told_the_path_to_it():
    write("base.yaml", SMALL)
    path = write("../experiments/deep/s.yaml", "extends: base")
    with pytest.raises(ConfigError, match=r"extends: no file .*; did you mean '\.\./\.\./conf/base\.yaml'\?"):
        load(str(path))


def test_a_word_that_is_near_to_none_of_a_choice_is_answered_with_the_choice_alone():
    assert refused(SMALL, "wandb.mode=none").endswith("'auto' or 'online' or 'offline' or 'disabled', got 'none'")


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("tasks.mmlu: unknown task", [], "conf/base.yaml: "),
        ("tasks.own: unknown task", [], "conf/s.yaml: "),
        ("tasks.new: unknown task", ["tasks.new={}"], "command line: "),
        ("tasks.own-5shot: num_fewshot: 5", ["tasks.own.num_fewshot=[0,5]"], "command line: "),
        ("models.qwen.server.zz: no such option", ["models.qwen.server.zz=1"], "command line: "),
        ("models.qwen.server.zz: no such option", ["models.llama.chat=true"], "conf/base.yaml: "),
        ("conf/s.yaml: models.qwen: said already", [], ""),
        ("only=x: no such cell", [], ""),
    ],
)
def test_what_is_found_after_loading_is_said_with_its_source(text, overrides, source):
    write("base.yaml", SMALL)
    write("s.yaml", "extends: base.yaml\ntasks: {own: }")
    assert with_source(text, "s", overrides) == f"{source}{text}"


@pytest.mark.parametrize(
    ("text", "overrides", "source"),
    [
        ("models.b-big.path: gone", ["models.b.variants.big.path=/gone"], "command line: "),
        ("models.b-big.path: gone", ["models.b.chat=true"], "conf/s.yaml: "),
        ("models.b-sql.adapter: gone", ["models.b.chat=true"], "conf/s.yaml: "),
        ("models.b-sql.adapter: gone", ["models.b.adapters.sql=/gone"], "command line: "),
    ],
)
def test_what_a_variant_or_an_adapter_lacks_is_said_with_the_source_that_has_it(text, overrides, source):
    write("s.yaml", "models: {b: {path: /b, variants: {big: {path: /x}}, adapters: {sql: /y}}}\ntasks: {own: }")
    assert with_source(text, "s", overrides) == f"{source}{text}"


def test_an_unknown_sweep_is_refused_with_the_nearest_one():
    write("demo.yaml", SMALL)
    with pytest.raises(ConfigError, match=r"command line: conf: no sweep 'dmeo' in .*; did you mean 'demo'\?"):
        load("dmeo")
    with pytest.raises(ConfigError, match=r"command line: conf: no file '/.*/dem\.yaml'; did you mean 'demo\.yaml'\?"):
        load("conf/dem.yaml")


def test_what_is_kept_of_a_sweep_asks_as_a_file_for_the_same_sweep(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    monkeypatch.setenv("MY_KEY", "0123456789abcdef")
    for folder in ("train/a", "train/b"):
        (Path(folder)).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
    config = loaded(
        """
        defaults: {model: {dtype: float16}, task: {limit: 10}}
        models:
          m: {checkpoints: [train/*], adapters: {sql: org/sql}, env: {A: "1", MY_KEY: "${oc.env:MY_KEY}"}}
          v: {path: org/v, variants: {x: {chat: true}, y: {quantization: awq, tasks: ["!mmlu"]}}, revision: main}
          url: {url: "http://h:1", tokenizer: org/t, api_key: "${oc.env:OPENAI_API_KEY}"}
        tasks:
          gsm8k: {num_fewshot: [0, 5]}
          mmlu: {gen_kwargs: {temperature: 0.5, until: ["a"]}}
        wandb: {mode: disabled}
        """,
        "runs_dir=elsewhere",
    )
    write("again.yaml", sweep_file(yaml.safe_load(dump(config))))
    assert dump(load("again", ["runs_dir=elsewhere"])) == dump(config)


def test_two_checkpoints_of_one_name_are_refused():
    for folder in ("a/x", "b/x"):
        Path(folder).mkdir(parents=True)
    message = refused("models: {m: {checkpoints: [a/x, b/x]}}\n" + ONE_TASK)
    assert "models.m.checkpoints: " in message
    assert "would both be called 'm-x'" in message


def test_what_a_template_takes_is_kept_as_it_is_written():
    config = loaded("""
defaults: {model: {chat: true, chat_template_kwargs: {enable_thinking: false, effort: low}, think_end_token: </think>}}
models: {a: {path: o/a}, b: {path: o/b, chat_template_kwargs: {enable_thinking: true}, think_end_token: null}}
tasks: {gsm8k: }
""")
    assert config.models["a"].chat_template_kwargs == {"enable_thinking": False, "effort": "low"}
    assert config.models["a"].think_end_token == "</think>"
    assert config.models["b"].chat_template_kwargs == {"enable_thinking": True, "effort": "low"}
    assert config.models["b"].think_end_token is None


# --- Secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_come_from_the_environment_and_are_masked_in_the_dump(monkeypatch):
    monkeypatch.setenv("MY_KEY", "key-of-the-servers")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    config = loaded("""
api_key: ${oc.env:MY_KEY}
models: {m: {path: org/m, env: {HF_TOKEN: "${oc.env:HF_TOKEN}", URL: "https://u:${oc.env:HF_TOKEN}@host"}}}
tasks: {gsm8k: {gen_kwargs: {max_gen_toks: 5, eos_token: <end-of-text>}}}
""")
    assert config.api_key == "key-of-the-servers"
    assert config.models["m"].env["HF_TOKEN"] == "hf_0123456789"
    assert {"key-of-the-servers", "hf_0123456789"} <= set(secrets_of(config))
    assert "<end-of-text>" not in secrets_of(config)
    text = dump(config)
    assert "key-of-the-servers" not in text
    assert "hf_0123456789" not in text
    saved = yaml.safe_load(text)
    assert saved["api_key"] == "***"
    assert saved["models"]["m"]["env"] == {"HF_TOKEN": "***", "URL": "https://u:***@host"}
    assert saved["tasks"]["gsm8k"]["gen_kwargs"] == {"max_gen_toks": 5, "eos_token": "<end-of-text>"}
    assert "key-of-the-servers" not in repr(config)


def test_a_secret_in_the_sweeps_env_is_masked_and_not_written_down(monkeypatch):
    monkeypatch.setenv("MY_KEY", "hf_ofTheSweep0123456789")
    config = loaded(SMALL + 'env: {HF_TOKEN: "${oc.env:MY_KEY}", HTTPS_PROXY: "http://u:${oc.env:MY_KEY}@proxy:1"}')
    assert config.env["HF_TOKEN"] == config.models["qwen"].env["HF_TOKEN"] == "hf_ofTheSweep0123456789"
    assert "hf_ofTheSweep0123456789" in secrets_of(config)
    assert "hf_ofTheSweep0123456789" not in dump(config)
    assert yaml.safe_load(dump(config))["env"] == {"HF_TOKEN": "***", "HTTPS_PROXY": "http://u:***@proxy:1"}
    said = refused(SMALL + "env: {HF_TOKEN: hf_written0123456789}")
    assert "env.HF_TOKEN: a secret is not written down" in said
    assert "hf_written" not in said


def test_variables_of_the_usual_names_are_secret_even_when_the_config_does_not_use_them(monkeypatch):
    values = {"OPENAI_API_KEY": "sk-0123456789", "HF_TOKEN": "hf_0123456789", "WANDB_API_KEY": "wb" * 20}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    found = secrets_of(loaded(SMALL))
    assert set(values.values()) <= set(found)
    assert "abc" not in found
    assert sorted(found, key=len, reverse=True) == list(found)


@pytest.mark.parametrize(
    ("text", "overrides", "where"),
    [
        (SMALL + "api_key: sk-0123456789", [], "conf/s.yaml: api_key: "),
        (SMALL, ["api_key=sk-0123456789"], "command line: api_key: "),
        (
            "models: {m: {path: o/m, env: {HF_TOKEN: sk-0123456789}}}\n" + ONE_TASK,
            [],
            "conf/s.yaml: models.m.env.HF_TOKEN",
        ),
        ("models: {m: {path: o/m, server: {api-key: sk-0123456789}}}\n" + ONE_TASK, [], "models.m.server.api_key: "),
    ],
)
def test_a_secret_that_is_written_down_is_refused_with_the_cure_and_not_repeated(text, overrides, where):
    message = refused(text, *overrides)
    assert where in message
    assert "${oc.env:" in message
    assert "sk-0123456789" not in message


@pytest.mark.parametrize("place", ["models.m", "models.m.variants.a", "defaults.model"])
def test_the_key_of_a_server_at_a_url_is_a_secret_like_any_other(place, monkeypatch):
    assert "sk-0123456789" not in refused(AT_A_URL, f"{place}.api_key=sk-0123456789")
    monkeypatch.setenv("MY_KEY", "sk-0123456789")
    config = loaded(AT_A_URL, f"{place}.api_key=${{oc.env:MY_KEY}}")
    (model,) = config.models.values()
    assert model.api_key == "sk-0123456789"
    assert "sk-0123456789" in secrets_of(config)
    assert "sk-0123456789" not in dump(config) + repr(config)


@pytest.mark.parametrize("url", ["http://me:sk-0123456789@node7:8000", "http://node7:8000/v1?api_key=sk-0123456789"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(url):
    message = refused(AT_A_URL, f"models.m.url={url}")
    assert "command line: models.m.url: " in message
    assert "give the key as api_key" in message
    assert "sk-0123456789" not in message


@pytest.mark.parametrize("key", ["sk-0123456789\n", "sk 0123456789", "sk-0123456789ä"])
@pytest.mark.parametrize("place", ["api_key", "models.m.api_key"])
def test_a_key_that_fits_into_no_header_is_refused_and_not_repeated(place, key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    message = refused(AT_A_URL, f"{place}=${{oc.env:MY_KEY}}")
    assert f"command line: {place}: holds a blank, a line break or a letter beyond ASCII" in message
    assert "0123456789" not in message


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("api_key", True),
        ("api-key", True),
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("DB_PASSWORD", True),
        ("eos_token", False),
        ("max_tokens", False),
        ("KEYBOARD", False),
        ("OPENAI_KEY", True),
        ("GITHUB_PAT", True),
        ("HF_TOKEN_READ", True),
        ("OPENAI_API_KEY_2", True),
        ("AZURE_STORAGE_CONNECTION_STRING", True),
        ("PWD", False),
        ("AWS_ACCESS_KEY_ID", False),
        ("logprob_token_ids", False),
        ("image_token", False),
        ("HF_TOKEN_PATH", False),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", False),
    ],
)
def test_the_end_of_a_name_tells_a_secret(name, secret):
    assert is_secret(name) is secret


@pytest.mark.parametrize("option", [option.name for option in fields(Options)])
def test_no_option_of_the_stand_in_looks_like_a_secret(option):
    """Such a variable reaches no server: the stand-in would go on without it, and what it was to slow down would not be
    slow."""
    assert not is_secret(f"STAND_IN_{option.upper()}")


def test_a_password_in_a_url_is_a_secret_whatever_it_is_called(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://me:pa55-0123456@db:5432/x")
    assert "pa55-0123456" in secrets_of(loaded(SMALL))
    assert "DATABASE_URL" in secret_variables(os.environ)
    assert secret_variables({"HTTPS_PROXY": "http://proxy:3128", "A": "http://h/x@y"}) == {}


def test_the_dump_is_the_resolved_config(monkeypatch):
    config = loaded(SMALL, "limit=4", "models.qwen.device=cpu", "wandb.tags=[a,b]")
    saved = yaml.safe_load(dump(config))
    assert saved["models"]["qwen"]["device"] == "cpu"
    assert saved["tasks"]["mmlu"]["limit"] == 4
    assert saved["wandb"]["tags"] == ["a", "b"]
    assert list(saved) == list(SweepConfig.__dataclass_fields__)


# --- What is shipped -------------------------------------------------------------------------------------------------

SHIPPED = Path(__file__).resolve().parents[1] / "conf"


def lm_eval_tasks() -> dict[str, str]:
    """lm-eval's names -> the YAML that defines each, with the file that it includes; read without importing lm_eval."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.origin is not None
    texts = {}
    for path in (Path(spec.origin).parent / "tasks").rglob("*.yaml"):
        text = path.read_text()
        if name := re.search(r"^(?:task|group): *([\w-]+) *$", text, re.MULTILINE):
            include = re.search(r"^include: *[\"']?([^\s\"']+)", text, re.MULTILINE)
            texts[name[1]] = text + ((path.parent / include[1]).read_text() if include else "")
    return texts


@pytest.mark.parametrize("suite", ["qwen2_5_report", "open_llm_leaderboard", None])
def test_shipped_tasks_exist_in_lm_eval_and_take_the_shots_they_are_given(suite):
    known = lm_eval_tasks()
    config = load("qwen_sweep", [f"suites=[{suite}]"] if suite else [], conf_dir=SHIPPED)
    for task in config.tasks.values():
        assert task.task in known
        if re.search(r"^num_fewshot: *0\b", known[task.task], re.MULTILINE):
            assert task.num_fewshot is None, f"{task.task} pins 0 shots"


def test_the_qwen_sweep_holds_the_models_and_tasks_of_the_original_recipe():
    config = load("qwen_sweep", conf_dir=SHIPPED)
    assert [model.path for model in config.models.values()] == [
        "Qwen/Qwen2.5-3B",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct-AWQ",
        "Qwen/Qwen2.5-14B-Instruct",
        "Qwen/Qwen2.5-14B-Instruct-AWQ",
        "Qwen/Qwen2.5-32B-Instruct-AWQ",
    ]
    assert list(config.tasks) == ["gsm8k", "mmlu", "global_mmlu_en", "mmlu_pro", "gpqa_main_n_shot"]
    assert not any(model.chat for model in config.models.values())
    assert all(model.server == {"enable_prefix_caching": True} for model in config.models.values())


def test_importing_the_config_loads_nothing_heavy():
    heavy = "{'torch', 'vllm', 'ray', 'lm_eval', 'transformers', 'wandb', 'datasets', 'numpy'}"
    code = f"import sys, sweep.planning.loading; print(*{heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SHIPPED.parent)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: {a: {gpu: 8}}", "c.yaml: nodes.a.gpu: unknown key; did you mean 'gpus'?"),
        ("nodes: {a: {gpus: many}}", "c.yaml: nodes.a.gpus: wants an integer, got 'many'"),
        ("nodes: {a: {gpus: -1}}", "c.yaml: nodes.a.gpus: wants 0 or more, got -1"),
        ("nodes: {a: {gpus: 8, count: 0}}", "c.yaml: nodes.a.count: wants 1 or more, got 0"),
        ("nodes: {a: {gpus: 8, gpu_memory_gb: 0}}", "c.yaml: nodes.a.gpu_memory_gb: wants more than 0 GB, got 0.0"),
        ("node: {a: {gpus: 8}}", "c.yaml: node: unknown key; did you mean 'nodes'?"),
        ("nodes: {}", "c.yaml: nodes: describes no nodes; give it some, as in `nodes: {h100: {count: 2, gpus: 8}}`"),
        ("nodes: [", "c.yaml: line 2, column 1: bad YAML"),
    ],
)
def test_a_mistake_in_a_described_cluster_is_one_line(text, message):
    Path("c.yaml").write_text(f"{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster("c.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_shipped_cluster_is_eight_gpus_on_one_node():
    assert load_cluster(str(ROOT / "conf/cluster/8xH100.yaml")) == {
        "h100": NodeGroup(gpus=8, gpu_type="H100", gpu_memory_gb=80, evaluators=16)
    }


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["models.qwen.nodes=0"], "models.qwen.nodes: wants 1 or more, got 0"),
        (["models.qwen.nodes=2", "models.qwen.device=cpu"], "models.qwen.nodes: splits a model over GPUs of several"),
        (["models.qwen.nodes=2", "models.qwen.gpus=0.5"], "models.qwen.nodes: takes whole GPUs of each node"),
        (
            ["models.qwen.nodes=2", "models.qwen.gpus=4", "models.qwen.tensor_parallel=16"],
            "models.qwen.gpus: tensor_parallel spans 16 whole GPUs, got 4 on each of 2 nodes",
        ),
        (["models.qwen.gpu_memory_gb=0"], "models.qwen.gpu_memory_gb: wants more than 0 GB, got 0.0"),
    ],
)
def test_what_a_model_asks_of_its_nodes_is_checked(overrides, where):
    assert where in refused(SMALL, *overrides)


# --- What is expected of the numbers ---------------------------------------------------------------------------------


def test_expectations_stand_in_tasks_and_models_and_a_grid_passes_them_on():
    config = loaded(
        """
models:
  qwen:
    path: org/qwen
    expect:
      gsm8k: {"exact_match,strict-match": {value: 0.7, tolerance: 0.02}}
      gsm8k-0shot: {"exact_match,strict-match": {value: 0.1, tolerance: 0.05}}
tasks:
  gsm8k: {num_fewshot: [0, 5]}
  mmlu: {expect: {acc: {value: 1, tolerance: 0}}}
"""
    )
    assert config.tasks["mmlu"].expect == {"acc": Expectation(value=1.0, tolerance=0.0)}
    assert config.models["qwen"].expect == {
        "gsm8k-0shot": {"exact_match,strict-match": Expectation(value=0.1, tolerance=0.05)},
        "gsm8k-5shot": {"exact_match,strict-match": Expectation(value=0.7, tolerance=0.02)},
    }


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ("", "expect: {acc: {value: 0.5}}", "tasks.gsm8k.expect: acc: tolerance is missing; write {value"),
        (
            "",
            "expect: {acc: {value: 0.5, tolerance: -1}}",
            "tasks.gsm8k.expect: acc: tolerance wants 0 or more, got -1",
        ),
        ("", "expect: {acc: 0.5}", "tasks.gsm8k.expect.acc: wants a mapping, got 0.5"),
        (
            "",
            "expect: {acc: {value: a lot, tolerance: 0}}",
            "tasks.gsm8k.expect.acc.value: wants a number, got 'a lot'",
        ),
        ("", 'expect: {"acc, none": {value: 1, tolerance: 0}}', "acc, none: wants lm-eval's metric,filter"),
        ("expect: {gsm: {acc: {value: 1, tolerance: 0}}}", "", "no task 'gsm' in this sweep; did you mean 'gsm8k'?"),
        (
            "tasks: ['!gsm8k'], expect: {gsm8k: {acc: {value: 1, tolerance: 0}}}",
            "",
            "models.qwen.expect: the model does not run 'gsm8k': its `tasks` leave it out",
        ),
    ],
)
def test_an_expectation_that_cannot_be_meant_is_refused(model, task, message):
    text = f"models: {{qwen: {{path: org/qwen, {model}}}}}\ntasks: {{gsm8k: {{num_fewshot: 5, {task}}}, mmlu: }}"
    assert message in refused(text)
