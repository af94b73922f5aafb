"""The script that asks vLLM's parser, run as it is run: by a Python of its own, here over a vLLM of a few lines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "sweep" / "serving" / "vllm_parser.py"

CLI_ARGS = """
import json
def make_arg_parser(parser):
    from vllm.platforms import current_platform
    if not current_platform.device_type:
        raise RuntimeError("Failed to infer device type")
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--model")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--dtype", choices=["auto", "half"])
    parser.add_argument("--quantization")
    parser.add_argument("--config", type=json.loads)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--auto-tools", action="store_true")
    print("vLLM talks on stdout")
    return parser
def validate_parsed_serve_args(found):
    if found.auto_tools and not found.enforce_eager:
        raise TypeError("Error: --auto-tools requires --enforce-eager")
"""


def vllm(folder: Path, *, parser: str = "entrypoints/common/cli_args.py", version: str | None = "0.33.0") -> Path:
    """A folder that holds a package `vllm` with what the script touches."""
    files = {
        "__init__.py": "",
        "envs.py": "environment_variables = {'VLLM_B': None, 'VLLM_A': None}",
        "platforms.py": "import os\nclass current_platform: device_type = os.environ.get('VLLM_TARGET_DEVICE', '')",
        "utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser",
        "model_executor/layers/quantization/__init__.py": "QUANTIZATION_METHODS = ['awq', 'fp8']",
        "model_executor/layers/quantization/deep/awq.py": "accepted = user_quant in ('awq', \"marlin\")",
        parser: CLI_ARGS,
    }
    if version is not None:
        files["_version.py"] = f"__version__ = version = {version!r}"
    for name, text in files.items():
        (folder / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "vllm" / name).write_text(text)
    return folder


def say(folder: Path, what: str, question: Any = None, *options: str, **environment: str) -> Any:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, *options, str(SCRIPT), what],
        input=json.dumps(question),
        env=inherited | {"PYTHONPATH": str(folder)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(folder: Path, *servers: list[tuple[str, str, list[str]]], **environment: str) -> Any:
    return say(folder, "check", servers, **{"VLLM_TARGET_DEVICE": "cuda", **environment})


def test_what_is_installed_is_told_without_importing_it(tmp_path: Path) -> None:
    (vllm(tmp_path) / "vllm" / "__init__.py").write_text("raise RuntimeError('imported')")
    told = say(tmp_path, "installed")
    assert told["version"] == "0.33.0"
    (tmp_path / "vllm" / "envs.py").write_text("environment_variables = {}")
    assert say(tmp_path, "installed")["stamp"] != told["stamp"]


def test_a_python_without_vllm_says_so(tmp_path: Path) -> None:
    assert say(tmp_path, "installed", None, "-S") == {"version": None, "stamp": []}


def test_a_build_without_a_version_is_called_as_vllm_calls_it(tmp_path: Path) -> None:
    assert say(vllm(tmp_path, version=None), "installed")["version"] == "dev"


@pytest.mark.parametrize("place", ["launchers", "common", "openai"])
def test_the_parser_is_found_where_vllm_keeps_it(tmp_path: Path, place: str) -> None:
    said = check(vllm(tmp_path, parser=f"entrypoints/{place}/cli_args.py"), [])
    assert {"--model", "--max-num-seqs"} <= set(said["options"])
    assert said["variables"] == ["VLLM_A", "VLLM_B"]
    assert said["mistakes"] == [[]]


def test_a_parser_somewhere_else_is_not_guessed(tmp_path: Path) -> None:
    said = check(vllm(tmp_path, parser="elsewhere/cli_args.py"), [])
    assert said == {"options": None, "variables": None, "quantizations": None, "mistakes": None}


def test_a_gpu_build_on_a_machine_without_a_gpu_is_asked_as_well(tmp_path: Path) -> None:
    folder = vllm(tmp_path)
    said = say(folder, "check", [[["a", "--max-num-seq", ["--max-num-seq", "1"]]]])
    assert said["mistakes"] == [[["a", None]]]


@pytest.mark.parametrize(
    ("flag", "arguments", "words"),
    [
        ("--max-num-seqs", ["--max-num-seqs", "4"], ""),
        ("--config.a", ["--config", "{}"], ""),
        # argparse takes the beginning of a name for the name.
        ("--max-num-seq", ["--max-num-seq", "4"], None),
        ("--max-num-seq", [], None),
        ("--max-num-seqs", ["--max-num-seqs", "x"], "argument --max-num-seqs: invalid int value: 'x'"),
        ("--max-num-seqs", ["--max-num-seqs"], "argument --max-num-seqs: expected one argument"),
        ("--dtype", ["--dtype", "x"], "argument --dtype: invalid choice: 'x' (choose from 'auto', 'half')"),
        ("--dtype", ["--no-dtype"], "unrecognized arguments: --no-dtype"),
        ("--enforce-eager", ["--enforce-eager", "yes"], "it is a switch and takes no value but true and false"),
        ("--help", ["--help"], "it ends the server"),
    ],
)
def test_each_option_is_judged_alone(tmp_path: Path, flag: str, arguments: list[str], words: str | None) -> None:
    said = check(vllm(tmp_path), [("the.key", flag, arguments), ("other", "--model", ["--model", "m"])])
    assert said["mistakes"] == [[] if words == "" else [["the.key", words]]]


def test_options_that_are_right_alone_are_judged_together(tmp_path: Path) -> None:
    eager = ("e", "--enforce-eager", ["--enforce-eager"])
    tools = ("t", "--auto-tools", ["--auto-tools"])
    said = check(vllm(tmp_path), [tools], [tools, eager], [tools, ("x", "--x", ["--x"])])
    assert said["mistakes"] == [[["", "Error: --auto-tools requires --enforce-eager"]], [], [["x", None]]]


def asks(*names: str) -> list[list[tuple[str, str, list[str]]]]:
    return [[("quantization", "--quantization", ["--quantization", name])] for name in names]


def plugin(folder: Path, group: str, where: str) -> None:
    """A distribution with an entry point."""
    (folder / "some-1.dist-info").mkdir()
    (folder / "some-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1\n")
    (folder / "some-1.dist-info" / "entry_points.txt").write_text(f"[{group}]\nsome = {where}:register\n")


def test_a_quantization_is_known_that_vllm_lists_or_takes_for_a_checkpoint(tmp_path: Path) -> None:
    plugin(tmp_path, "vllm.general_plugins", "vllm.plugins.lora")  # vLLM comes with such of its own
    assert check(vllm(tmp_path), *asks("awqq", "AWQ", "Marlin", "arlin"))["quantizations"] == ["awq", "fp8", "marlin"]
    assert check(tmp_path, [])["quantizations"] == ["awq", "fp8"]


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm.platform_plugins"])
def test_where_another_package_may_add_quantizations_none_is_unknown(tmp_path: Path, group: str) -> None:
    plugin(vllm(tmp_path), group, "some")
    assert check(tmp_path, *asks("awqq"))["quantizations"] is None


@pytest.mark.parametrize("listing", ["", "raise RuntimeError('no GPU')"])
def test_a_vllm_that_does_not_list_its_quantizations_refuses_none(tmp_path: Path, listing: str) -> None:
    (vllm(tmp_path) / "vllm/model_executor/layers/quantization/__init__.py").write_text(listing)
    said = check(tmp_path, *asks("awqq"))
    assert (said["quantizations"], said["mistakes"]) == (None, [[]])


def test_a_module_of_ours_hides_none_of_the_same_name(tmp_path: Path) -> None:
    """The folder of a script comes first on the path, and ours holds a server.py and a metrics.py."""
    folder = vllm(tmp_path)
    (folder / "server.py").write_text("")
    (folder / "vllm" / "envs.py").write_text("import server\nenvironment_variables = {server.__file__: None}")
    assert check(folder, [])["variables"] == [str(folder / "server.py")]
