"""The shape of the package: who may import whom, where each foreign library may appear, what the README lists."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweep.planning.loading import load

ROOT = Path(__file__).parent.parent

ORDER = [
    "errors",
    "masking",
    "remembered",
    "record",
    # planning
    "numbers",
    "tasks",
    "config",
    "loading",
    "keys",
    "hub",
    "plan",
    # results
    "claim",
    "mounts",
    "store",
    "timeline",
    "reading",
    "compare",
    "references",
    "expectations",
    "sharing",
    "wandb_report",
    "mirror",
    "tracking",
    "report",
    "publish",
    "summary",
    "export",
    "answers",
    "charts",
    "sizes",
    "page",
    # serving
    "supervisor",
    "vllm_plugin",
    "forced_decoding",
    "vllm_parser",
    "causes",
    "engine",
    "metrics",
    "watch",
    "gpu",
    "server",
    "external",
    # evaluating
    "concurrency",
    "dispatch",
    "client",
    "scoring",
    "preflight",
    "encoding",
    "estimate",
    "lm",
    "evaluation",
    "evaluator",
    # running
    "inventory",
    "machine",
    "nodes",
    "restarts",
    "hanging",
    "signals",
    "seats",
    "failures",
    "schedule",
    "walltime",
    "costs",
    "simulate",
    "cluster",
    "progress",
    "states",
    "runner",
    "launching",
    # the commands
    "checkup",
    "fetch",
    "overview",
    "status",
    "reporting",
    "demo",
    "cli",
]
"""A module imports only from those to its left."""

OWNERS = {
    "omegaconf": {"loading"},
    "ray": {"cluster"},
    "wandb": {"mirror", "wandb_report"},
    "wandb_workspaces": {"wandb_report"},
    "pyarrow": {"export"},
    "lm_eval": {"lm", "evaluation"},  # tasks.py finds its folder without importing it
    "scipy": {"compare"},
    "jinja2": {"page"},
    "vl_convert": {"charts"},
    "vllm": {"forced_decoding", "vllm_parser"},  # in vLLM's own process, and a script
}
"""The only modules that may import a foreign library, at whatever depth of their code."""

HEAVY = [
    "scipy",
    "torch",
    "vllm",
    "ray",
    "lm_eval",
    "transformers",
    "datasets",
    "wandb",
    "wandb_workspaces",
    "pyarrow",
]

PATHS = {path.stem: path for path in (ROOT / "sweep").rglob("*.py") if path.stem != "__init__"}
MODULES = sorted(PATHS)


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, at any depth; `from a import b` yields `a` and `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("sweep" if node.level else "", node.module or "") if part)
            yield node.lineno, base
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def imports_of(path: Path) -> list[tuple[int, str]]:
    return list(imported_names(path.read_text()))


def siblings(path: Path) -> dict[str, int]:
    """Module of ours -> the line of `path` that first imports it."""
    found: dict[str, int] = {}
    for line, name in imports_of(path):
        package, *parts = name.split(".")
        for part in parts[:2] if package == "sweep" else ():
            if part in {*ORDER, *MODULES}:
                found.setdefault(part, line)
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import sweep.planning.plan", {"sweep.planning.plan"}),
        ("from sweep.planning import plan", {"sweep.planning", "sweep.planning.plan"}),
        ("from . import plan", {"sweep", "sweep.plan"}),
        ("from .plan import Cell", {"sweep.plan", "sweep.plan.Cell"}),
        ("def f():\n    import ray.util", {"ray.util"}),
    ],
)
def test_an_import_is_seen_in_every_spelling_and_at_every_depth(source: str, names: set[str]) -> None:
    assert {name for _, name in imported_names(source)} == names


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_left(module: str) -> None:
    left = ORDER[: ORDER.index(module)] if module in ORDER else []
    wrong = [
        f"{PATHS[module].relative_to(ROOT)}:{line} imports {name}"
        for name, line in siblings(PATHS[module]).items()
        if name not in [*left, module]  # itself: run with `-m`, a module imports its own name so that its types pickle
    ]
    assert not wrong, f"{wrong}; the order is {' '.join(ORDER)}"


@pytest.mark.parametrize("module", MODULES)
def test_a_foreign_library_appears_only_where_it_belongs(module: str) -> None:
    wrong = [
        f"{PATHS[module].relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports_of(PATHS[module])
        if module not in OWNERS.get(name.partition(".")[0], {module})
    ]
    assert not wrong, wrong


def test_the_supervisor_needs_the_standard_library_only() -> None:
    """It runs as `python -S -E` and has to start within milliseconds, from whatever the environment has become."""
    foreign = {
        name for _, name in imports_of(PATHS["supervisor"]) if name.partition(".")[0] not in sys.stdlib_module_names
    }
    assert not foreign


def test_the_package_itself_and_the_launcher_pull_in_nothing_else() -> None:
    assert siblings(ROOT / "sweep" / "__init__.py") == {}
    assert set(siblings(ROOT / "launch.py")) == {"cli"}


def test_the_command_line_loads_no_heavy_library_before_it_is_needed() -> None:
    code = f"import sys, sweep.cli; print(*[name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_the_tree_in_the_readme_names_every_module() -> None:
    listed = re.findall(r"^ +([a-z_]+)\.py +\S", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(ORDER)


def test_the_sweep_file_in_the_readme_is_valid(tmp_path: Path) -> None:
    block = re.search(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block
    path = tmp_path / "sweep.yaml"
    path.write_text(block[1])
    assert {"gsm8k", "mmlu"} == set(load(str(path)).tasks)
