"""docs/keys.md, made of what config.py and loading.py say of each key. Nothing at run time needs it.

    python -m sweep.planning.keys      writes the page anew

A test holds the page to what is made here, and every key that a file may have to a row.
"""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, get_type_hints

from sweep import ROOT
from sweep.planning import config
from sweep.planning.config import (
    CellOverride,
    Expectation,
    Model,
    NodeGroup,
    RayConfig,
    Seeds,
    SweepConfig,
    Task,
    WandbConfig,
)
from sweep.planning.loading import FILE, OPEN, Named, Options, wanted

PAGE = ROOT / "docs" / "keys.md"

UNITS = {
    "concurrency": "requests",
    "count": "nodes",
    "cpu_servers": "servers",
    "evaluators": "evaluators",
    "gpu_memory_gb": "GB",
    "gpus": "GPUs",
    "hang_timeout_s": "seconds",
    "limit": "documents",
    "load_timeout_s": "seconds",
    "max_failures": "cells",
    "max_model_len": "tokens",
    "nodes": "nodes",
    "num_fewshot": "examples",
    "replicas": "servers",
    "retries": "times",
    "samples": "samples",
    "scoring_timeout_s": "seconds",
    "startup_timeout_s": "seconds",
    "tensor_parallel": "GPUs",
    "tolerance": "the metric's own",
    "value": "the metric's own",
    "walltime": "seconds",
}
"""Of every number but seeds."""


@dataclass(frozen=True)
class Section:
    title: str
    about: str
    keys: Mapping[str, Any]
    """As loading.py takes them: kinds by key."""
    holder: type
    """Has the defaults, and below each field its meaning."""


SECTIONS = (
    Section("The file", "At the top of a sweep file.", FILE, SweepConfig),
    Section(
        "A model",
        "Below `models.<name>`, and for all models below `defaults.model`. It needs `path`, `checkpoints` or `url`.",
        FILE["models"].of,
        Model,
    ),
    Section("A task", "Below `tasks.<name>`, and for all tasks below `defaults.task`.", FILE["tasks"].of, Task),
    Section(
        "An expectation",
        "Below `expect.<metric,filter>` of a task, and below `expect.<task>.<metric,filter>` of a model.",
        get_type_hints(Expectation),
        Expectation,
    ),
    Section(
        "A cell",
        "Below `cells.<model/task>`, shell wildcards allowed: what is set replaces the task's for these cells.",
        FILE["cells"].of,
        CellOverride,
    ),
    Section("Seeds", "Below `seeds`: lm-eval's four.", FILE["seeds"], Seeds),
    Section("W&B", "Below `wandb`.", FILE["wandb"], WandbConfig),
    Section("Ray", "Below `ray`.", FILE["ray"], RayConfig),
    Section(
        "A described cluster",
        "Below `nodes.<name>` of a file for `plan cluster=FILE`, which is no part of a sweep file.",
        get_type_hints(NodeGroup),
        NodeGroup,
    ),
)


def page() -> str:
    """The text of docs/keys.md."""
    head = (
        "# Keys of a sweep file\n\n"
        "Each can be set in the file and, but for `extends`, on the command line (`models.qwen.chat=true`).\n"
        "Made by `python -m sweep.planning.keys` of `sweep/planning/config.py`, where the texts are changed.\n"
    )
    return head + "".join(f"\n## {one.title}\n\n{one.about}\n\n{''.join(_table(one))}" for one in SECTIONS)


def _table(section: Section) -> Iterator[str]:
    meanings = {**_meanings()[section.holder.__name__], **OPEN}
    known = {field.name: field for field in fields(section.holder)}
    yield "| key | takes | unit | default | meaning |\n|---|---|---|---|---|\n"
    for key in sorted(section.keys, key=list({**known, **section.keys}).index):
        unit = UNITS.get(key, "")
        cells = (f"`{key}`", _takes(section.keys[key]), unit, _default(known.get(key)), meanings[key])
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _meanings() -> dict[str, dict[str, str]]:
    """By class of config.py and field, the text below the field in one line."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                field.target.id: " ".join(text.value.value.split())
                for field, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                if isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return found


def _takes(kind: Any) -> str:
    if not (isinstance(kind, (dict, Named)) or kind is Options):
        return wanted(kind).replace("'", "`").replace("an integer or a number", "a number")
    inner = kind
    while isinstance(inner, Named):
        inner = inner.of
    title = next((section.title for section in SECTIONS if section.keys == inner), "")
    what = "a mapping by name" if isinstance(kind, Named) else "a mapping"
    return f"{what}: [{title}](#{anchor(title)})" if title else what


def anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def _default(field: "Field[Any] | None") -> str:
    """What holds where the key is not set; empty where the meaning says it."""
    if field is None or field.default is MISSING or field.default in (None, "", ()):
        return ""
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
