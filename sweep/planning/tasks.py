"""lm-eval's tasks, groups and tags by name, found without importing lm-eval, and the `tasks` command.

lm-eval's own TaskManager parses some 14,000 YAML files, and every include anew, which takes 4-5 seconds; a plan, a
spelling mistake and `launch.py tasks` must not wait for it. The scan here takes 0.6 s on the same machine. The rules
are those of lm-eval 0.4.13 (`lm_eval/tasks/_index.py`, `_yaml_loader.py`, `_factory.py`); tests hold every name, group
member and setting to the real TaskManager.

It does not know whether a data set can be loaded, nor what a task written in Python (`class:`) sets in its code: such a
task has neither output type nor data set here.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sweep import remembered
from sweep.errors import ConfigError, boundary, nearest
from sweep.planning.numbers import ANY, Numbers, missing, of_group, of_task

GATED_DATASETS: Mapping[str, str] = {
    "Idavidrein/gpqa": "lm_eval/tasks/gpqa/README.md",
    "meta-llama/Llama-3.1-8B-Instruct-evals": "github.com/meta-llama/llama-cookbook/pull/627",
    "skg/toxigen-data": "github.com/IBM/unitxt/pull/502",
    "cais/hle": "promptfoo's example huggingface/hle; no task of lm-eval's own, but of many users",
    "openlanguagedata/flores_plus": "github.com/mozilla/translations/issues/1190; the successor of facebook/flores",
}
"""Hub data sets that ask for accepted terms and a token, with where that is said.

Only the hub knows for certain and this module is offline: a data set that is missing here may be gated all the same.
"""

_GROUP_FIELDS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata"})
"""lm-eval's GroupConfig; every other key of a group's YAML overrides its members."""

_IGNORED_FOLDERS = frozenset({"__pycache__", ".ipynb_checkpoints"})


T = TypeVar("T")


class Kind(StrEnum):
    TASK = "task"
    GROUP = "group"
    """Has a score of its own, aggregated from its members."""
    TAG = "tag"
    """A name for several tasks, each with its own score."""


_KIND_ORDER = (Kind.GROUP, Kind.TAG, Kind.TASK)


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What the YAML says about a task; for a group or tag, what its tasks have in common."""

    name: str
    kind: Kind
    output_type: str | None = None
    """lm-eval's request kind; None for a task written in Python and for a group whose tasks differ."""
    num_fewshot: int | None = None
    """The task's own shots. None: unset (lm-eval takes 0 and allows any), or a group whose tasks differ."""
    dataset_path: str | None = None
    """Hub id, or a loader such as `json`; None for a task written in Python and for a group whose tasks differ."""
    dataset_name: str | None = None
    """Configuration of the data set; None also for a group whose tasks differ."""
    unsafe_code: bool = False
    """Executes code that the model wrote; for a group or tag, at least one task does."""
    gated: bool = False
    """The data set is known to need accepted terms and HF_TOKEN (GATED_DATASETS); for a group or tag, at least one."""
    version: str | None = None
    """`metadata.version`; None where the YAML has none, and for a tag."""
    members: tuple[str, ...] = ()
    """Direct children of a group or tag."""
    subtasks: int = 1
    """Tasks that lm-eval runs for this name; 1 for a task."""
    numbers: tuple[Numbers, ...] = (ANY,)
    """What it can give: of a group its aggregates, of a tag what its tasks give."""
    path: str | None = None
    """The YAML file; None for a tag and for a task that is defined inside a group's file."""

    @property
    def dataset(self) -> str:
        """`path (configuration)`, or an empty string."""
        if self.dataset_path is None:
            return ""
        return f"{self.dataset_path} ({self.dataset_name})" if self.dataset_name else self.dataset_path


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A registered name: lm-eval's index entry."""

    kind: Kind
    path: str | None
    head: Mapping[str, Any]
    """The keys of `_HEAD`, includes merged."""
    tagged: set[str] = field(default_factory=set)
    """Tasks of a tag."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is kept of lm-eval's own folder."""

    state: str
    """Of its files when it was read."""
    entries: dict[str, _Entry]


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """A task inside what it was asked for, with the overrides of the groups on the way."""

    path: str | None
    config: Mapping[str, Any]


class Catalog:
    """Every name that lm-eval accepts as a task: its own and those of the user's folders. Made by `catalog()`."""

    def __init__(self, entries: Mapping[str, _Entry], broken: Mapping[str, str]) -> None:
        self._entries = entries
        self._broken = broken
        self._yaml = _Yaml()
        self._leaves_by_name: dict[str, dict[str, _Leaf]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self, kind: Kind | None = None) -> tuple[str, ...]:
        """Sorted names of one kind, or of all."""
        return tuple(sorted(name for name, entry in self._entries.items() if kind in (None, entry.kind)))

    def require(self, name: str) -> None:
        """Raises ConfigError with the nearest names when lm-eval knows no such task, group or tag."""
        if name in self._entries:
            return
        letters = re.match(r"[^\W\d_]*", name.lower())
        stem = letters[0] if letters else ""
        starts = (stem[:length] for length in range(len(stem), 1, -1))
        words = next((start for start in starts if any(start in known for known in self._entries)), "<words>")
        unread = "".join(f"; cannot read {path}: {reason}" for path, reason in self._broken.items())
        raise ConfigError(
            f"unknown task {name!r}{nearest(name, self._entries)} (`python launch.py tasks {words}` searches){unread}"
        )

    def info(self, name: str) -> TaskInfo:
        """What the YAML says about `name`. Raises ConfigError for an unknown name or a group that cannot be built."""
        self.require(name)
        entry = self._entries[name]
        if entry.kind is Kind.TASK:
            (leaf,) = self._expand(name).values()
            return _describe(name, leaf)
        tasks = self.leaves(name)
        metadata = None
        if entry.kind is Kind.TAG:
            members = tuple(sorted(entry.tagged))
            numbers = tuple(number for task in tasks for number in task.numbers)
        else:
            assert entry.path is not None
            config = self._yaml.load(entry.path)
            metadata = config.get("metadata")
            members = tuple(self._children(name, config, {}))
            numbers = of_group(
                config.get("aggregate_metric_list"), (number for task in tasks for number in task.numbers)
            )
        return TaskInfo(
            name=name,
            kind=entry.kind,
            output_type=_shared(task.output_type for task in tasks),
            num_fewshot=_shared(task.num_fewshot for task in tasks),
            dataset_path=_shared(task.dataset_path for task in tasks),
            dataset_name=_shared(task.dataset_name for task in tasks),
            unsafe_code=any(task.unsafe_code for task in tasks),
            gated=any(task.gated for task in tasks),
            version=_version(metadata),
            members=members,
            subtasks=len(tasks),
            numbers=numbers,
            path=entry.path,
        )

    def leaves(self, name: str) -> tuple[TaskInfo, ...]:
        """The tasks that lm-eval runs for `name`, in its order, each as the groups on the way override it."""
        self.require(name)
        return tuple(_describe(task, leaf) for task, leaf in self._expand(name).items())

    def check(self, name: str, *, num_fewshot: int | None, unsafe_code: bool) -> None:
        """Raises ConfigError, in one line, where lm-eval would ignore or refuse these settings of `name`.

        lm-eval's simple_evaluate drops a `num_fewshot` without a word on the terminal where the task's own is 0, and
        refuses a task that executes code only after every data set has been loaded.
        """
        leaves = self.leaves(name)
        if not leaves:
            raise ConfigError(f"{name!r} has no tasks; look at its `task:` list in {self._entries[name].path}")
        pinned = [leaf.name for leaf in leaves if leaf.num_fewshot == 0]
        if num_fewshot and pinned:
            raise ConfigError(
                f"num_fewshot: {num_fewshot} would be ignored by lm-eval: {_which(name, pinned, len(leaves))} "
                "pinned to 0 shots; remove num_fewshot, or choose another variant of the task"
            )
        unsafe = [leaf.name for leaf in leaves if leaf.unsafe_code]
        if unsafe and not unsafe_code:
            raise ConfigError(
                f"code that the model writes would be executed: {_which(name, unsafe, len(leaves))} "
                "marked unsafe by lm-eval; set `unsafe_code: true` for this task to allow it"
            )

    def missing(self, name: str, number: str) -> str | None:
        """Why `name` gives no such number (`metric,filter`, see numbers.py); None where it may."""
        subtasks = {leaf.name: leaf.numbers[0] for leaf in self.leaves(name)}
        return missing(number, self.info(name).numbers, subtasks, self.names(Kind.GROUP))

    def search(self, words: Sequence[str]) -> tuple[str, ...]:
        """Names where each word occurs in the name, data set, tags or output type, whatever its case; best first.

        Best is the exact name, then a name that starts with the first word, then all words in the name, then the rest;
        groups before tags before tasks, then by alphabet.
        """
        wanted = [word.lower() for word in words]
        whole = "_".join(wanted)
        found = []
        for name, entry in self._entries.items():
            lower = name.lower()
            in_name = all(word in lower for word in wanted)
            if not in_name:
                text = _searchable(lower, entry)
                if not all(word in text for word in wanted):
                    continue
            rank = 0 if lower == whole else 1 if in_name and lower.startswith(wanted[0]) else 2 if in_name else 3
            found.append((rank, _KIND_ORDER.index(entry.kind), lower, name))
        return tuple(name for *_, name in sorted(found))

    def main_groups(self) -> tuple[str, ...]:
        """Sorted names of the groups, without those that only divide another one (`mmlu_stem` in `mmlu`)."""
        parts: set[str] = set()
        groups = self.names(Kind.GROUP)
        for group in groups:
            members = self._yaml.load(self._entries[group].path or "").get("task")
            for member in members if isinstance(members, list) else []:
                name = member.get("group", member.get("task")) if isinstance(member, dict) else member
                if str(name).startswith(group):
                    parts.add(str(name))
        return tuple(group for group in groups if group not in parts)

    def _expand(self, name: str) -> dict[str, _Leaf]:
        """The leaves of a registered name by lm-eval's name for each; of a name met twice the last one counts."""
        if name not in self._leaves_by_name:
            with boundary(ConfigError, f"expand {name!r} as lm-eval does ({self._entries[name].path or 'a tag'})"):
                self._leaves_by_name[name] = self._build(name, {})
        return self._leaves_by_name[name]

    def _build(self, name: str, overrides: Mapping[str, Any]) -> dict[str, _Leaf]:
        """TaskFactory.build: the leaves of a registered name; `overrides` come from the groups around it."""
        entry = self._entries[name]
        if entry.kind is Kind.TAG:
            return {k: v for task in sorted(entry.tagged) for k, v in self._build(task, overrides).items()}
        assert entry.path is not None
        config = self._yaml.load(entry.path)
        if entry.kind is Kind.TASK:
            leaf = _Leaf(path=entry.path, config={**config, **overrides})
            if not isinstance(leaf.config["task"], str):
                raise ValueError(f"a group that is named with its own `task:` list passes that list on to {name!r}")
            return {leaf.config["task"]: leaf}
        return _flat(self._children(name, config, overrides))

    def _children(
        self, group: str, config: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> dict[str, dict[str, _Leaf]]:
        """TaskFactory._build_group: leaves by direct child.

        Outer groups win over inner ones and over the task; what a group says about one member wins over all of these.
        """
        outer = {**{key: value for key, value in config.items() if key not in _GROUP_FIELDS}, **overrides}
        children: dict[str, dict[str, _Leaf]] = {}
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            item: Mapping[str, Any] = {} if isinstance(member, str) else member
            if "group" in item:
                child = item["group"]
                if child in self._entries:
                    children[child] = self._build(child, {**outer, **{k: v for k, v in item.items() if k != "group"}})
                else:
                    child = f"{group}::{child}"
                    children[child] = _flat(self._children(child, item, outer))
                continue
            if not isinstance(member, str) and "task" not in item:
                raise ValueError(f"a member of {group!r} has neither `task` nor `group`, but {', '.join(item)}")
            child = member if isinstance(member, str) else item["task"]
            merged = {**outer, **item}
            if child not in self._entries:
                child = f"{group}::{child}"
                children[child] = {child: _Leaf(path=None, config={**merged, "task": child})}
            elif self._entries[child].kind is Kind.GROUP:
                children[child] = self._build(child, merged)
            else:
                # A tag's or task's own name comes first, so a `task` among the overrides renames it, as in lm-eval.
                tagged = sorted(self._entries[child].tagged) if self._entries[child].kind is Kind.TAG else [child]
                for task in tagged:
                    for name, leaf in self._build(task, {"task": task, **merged}).items():
                        children[name] = {name: leaf}
        return children


def catalog(include_paths: Sequence[str] = ()) -> Catalog:
    """Every name that lm-eval knows, and the user's folders on top: of two with one name the later folder's counts.

    Raises ConfigError where a folder does not exist, which lm-eval passes over in silence.
    """
    entries = dict(_bundled())
    broken: dict[str, str] = {}
    for folder in include_paths:
        if not os.path.isdir(folder):
            raise ConfigError(f"include_path: no such folder: {folder}")
        found, unread = _scan(folder, quick=False)
        entries.update(found)
        broken.update(unread)
    return Catalog(entries, broken)


def render(infos: Sequence[TaskInfo], *, width: int | None = None) -> str:
    """The table of the `tasks` command, cut to `width` columns; names are never cut, they are there to be copied."""
    header = ("name", "kind", "tasks", "output type", "shots", "flags", "data set")
    rows = [header, *(_row(info) for info in infos)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    lines = ("  ".join([*(cell.ljust(n) for cell, n in zip(row, widths, strict=False)), row[-1]]) for row in rows)
    room = None if width is None else max(width, widths[0])
    return "\n".join(line.rstrip() if room is None else _cut(line, room) for line in lines)


def tasks_command(words: Sequence[str], include_paths: Sequence[str] = ()) -> tuple[str, bool]:
    """What `python launch.py tasks [words]` prints: the best matches, or without words the groups and how to search;
    and whether there is any.

    On a terminal it fits one screen and says how much more there is; into a pipe everything goes.
    """
    known = catalog(include_paths)
    screen = _screen()
    width = screen.columns if screen else None
    counts = ", ".join(f"{len(known.names(kind)):,} {kind}s" for kind in (Kind.TASK, Kind.GROUP, Kind.TAG))
    source = f"lm-eval {importlib.metadata.version('lm-eval')}"
    how = "Search: python launch.py tasks WORD ... (each must occur in the name, data set, tags or output type)"
    if not words:
        names = textwrap.wrap("  ".join(known.main_groups()), width=width or 120, break_on_hyphens=False)
        lines = names[: _lines(screen, len(names), beside=5)]
        more = "..." if len(lines) < len(names) else ""
        shown_groups = (f"{counts} in {source}. The groups, without parts of others:", *lines, more, how)
        return "\n".join(filter(None, shown_groups)), True
    found = known.search(words)
    if not found:
        with_hint = nearest("_".join(words), known.names())
        return f"nothing in {source} matches {' '.join(words)!r}{with_hint} ({counts})", False
    details = _details(_listed(known, found[0]), width) if found[0].lower() == "_".join(words).lower() else []
    shown = found[: _lines(screen, len(found), beside=4 + len(details))]
    more = f"... and {len(found) - len(shown)} more; add words to narrow it down" if len(shown) < len(found) else ""
    table = render([_listed(known, name) for name in shown], width=width)
    flags = "gated: needs accepted terms and HF_TOKEN; code: executes what the model writes, needs unsafe_code: true"
    legend = flags if re.search(r"\b(gated|code)\b", table) else ""
    return "\n".join(filter(None, (table, more, *details, legend))), True


# ---- what the YAML says


def _describe(name: str, leaf: _Leaf) -> TaskInfo:
    config = leaf.config
    shots = config.get("num_fewshot")
    dataset = config.get("dataset_path")
    subset = config.get("dataset_name")
    # generate_until is the default of lm-eval's TaskConfig
    output_type = config.get("output_type", None if "class" in config else "generate_until")
    return TaskInfo(
        name=name,
        kind=Kind.TASK,
        output_type=output_type,
        num_fewshot=shots if isinstance(shots, int) else None,
        dataset_path=None if dataset is None else str(dataset),
        dataset_name=None if subset is None else str(subset),
        # lm-eval takes anything but a plain `false` as a yes
        unsafe_code=config.get("unsafe_code", False) is not False,
        gated=dataset in GATED_DATASETS,
        version=_version(config.get("metadata")),
        numbers=(of_task(config, output_type),),
        path=leaf.path,
    )


def _version(metadata: object) -> str | None:
    return str(metadata["version"]) if isinstance(metadata, dict) and "version" in metadata else None


def _shared(values: Iterable[T]) -> T | None:
    """The value that all have in common, otherwise None."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _flat(children: Mapping[str, Mapping[str, _Leaf]]) -> dict[str, _Leaf]:
    return {name: leaf for leaves in children.values() for name, leaf in leaves.items()}


def _which(name: str, some: Sequence[str], total: int) -> str:
    """`'a' is`, or `2 of 3 subtasks of 'g' ('a', 'b') are`."""
    if total == 1:
        return f"{name!r} is"
    listed = ", ".join(map(repr, some[:3])) + (", ..." if len(some) > 3 else "")
    return f"{len(some)} of {total} subtasks of {name!r} ({listed}) {'is' if len(some) == 1 else 'are'}"


# ---- the table


def _listed(known: Catalog, name: str) -> TaskInfo:
    """What is known of `name`, or without tasks where lm-eval cannot build it (its own `t0_eval`, for one)."""
    try:
        return known.info(name)
    except ConfigError:
        kind = next(kind for kind in Kind if name in known.names(kind))
        return TaskInfo(name=name, kind=kind, subtasks=0)


def _row(info: TaskInfo) -> tuple[str, ...]:
    several = info.kind is not Kind.TASK
    if info.subtasks == 0:
        return (info.name, info.kind.value, "0", "", "", "broken", "")
    return (
        info.name,
        info.kind.value,
        str(info.subtasks) if several else "",
        info.output_type or ("mixed" if several else "in Python"),
        "" if info.num_fewshot is None else str(info.num_fewshot),
        " ".join(flag for flag, on in (("gated", info.gated), ("code", info.unsafe_code)) if on),
        info.dataset or ("mixed" if several else ""),
    )


def _details(info: TaskInfo, width: int | None) -> list[str]:
    """What the row of the exact match has no room for."""
    members = f"{info.name} = " + ", ".join(info.members) if info.members else ""
    source = ", ".join(filter(None, (info.version and f"version {info.version}", info.path)))
    facts = (members, f"{info.name}: {source}" if source else "")
    return [line if width is None else _cut(line, width) for line in facts if line]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 3] + "..."


def _screen() -> os.terminal_size | None:
    """None where the output goes into a pipe or file, which has room for all."""
    return shutil.get_terminal_size() if sys.stdout.isatty() else None


def _lines(screen: os.terminal_size | None, wanted: int, *, beside: int) -> int:
    """Lines to show: all without a screen, otherwise what fits with `beside` other lines and the shell's prompt."""
    return wanted if screen is None else max(5, screen.lines - beside - 1)


# ---- reading lm-eval's YAML

_HEAD = ("task", "group", "class", "tag", "include", "output_type", "dataset_path", "dataset_name")
"""What names and search need of a file."""

_HEAD_LINE = re.compile(
    rb"""^(["']?)(%b)\1[ \t]*:                       # one of the keys, at the margin
        (?: [ \t]+                                   # with a string on the same line:
            (?: "([^"\\\r\n]*)"
              | '([^'\r\n]*)'
              | ((?:\.\.?/)*[A-Za-z_][\w./-]*) )
            [ \t]* (?: \r?\n(?![ \t]) | \Z ) )?      # and nothing after it that could belong to it
    """
    % "|".join(_HEAD).encode(),
    re.MULTILINE | re.VERBOSE,
)
_NOT_STRINGS = frozenset({b"null", b"true", b"false", b"yes", b"no", b"on", b"off"})
"""Bare words that YAML 1.1 reads as something else."""

_FOREIGN_ERRORS = (OSError, yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""What a broken YAML file of a user can raise; lm-eval skips the file on any exception."""


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.FullLoader):  # type: ignore[misc]
    """lm-eval's choice of loader, with `!function` left as its text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


class _Yaml:
    """Reads a file as lm-eval does, with its includes, each file at most once."""

    def __init__(self, *, quick: bool = False) -> None:
        """`quick` reads only the keys of `_HEAD`, eight times faster; where that cannot be sure it parses the file."""
        self._read: Callable[[str], dict[str, Any]] = functools.cache(_read_head if quick else _parse)

    def load(self, path: str) -> Mapping[str, Any]:
        """The file's keys over those that it includes. Raises one of `_FOREIGN_ERRORS`."""
        return self._merge(path, set())

    def _merge(self, path: str, seen: set[str]) -> dict[str, Any]:
        if path in seen:  # lm-eval refuses a file that is met twice, even by two paths that do not form a cycle
            raise ValueError(f"include cycle at {path}")
        seen.add(path)
        own = self._read(path)
        if "include" not in own:
            return own
        includes = own["include"]
        merged: dict[str, Any] = {}
        for include in includes if isinstance(includes, list) else [includes]:
            merged.update(self._merge(_resolve(path.rpartition("/")[0], include), seen))
            merged.pop("task_list", None)
        merged.update(own)
        del merged["include"]
        return merged


@functools.cache
def _resolve(folder: str, include: str) -> str:
    return os.path.realpath(os.path.expanduser(os.path.join(folder, include)))


def _parse(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        config = yaml.load(file, Loader=_Loader)
    if not isinstance(config, dict):
        raise ValueError(f"expected a mapping, not {type(config).__name__}")
    return config


def _read_head(path: str) -> dict[str, Any]:
    file = os.open(path, os.O_RDONLY)  # three times faster than open(), and there are 14,000 of them
    try:
        text = os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)
    head: dict[str, Any] = {}
    unread = set()
    for match in _HEAD_LINE.finditer(text):
        key, value, last = match[2].decode(), match[match.lastindex or 2], match.lastindex
        if key in head:  # a line inside a quoted text, perhaps
            return _parse(path)
        if last == 2 or (last == 5 and value.lower() in _NOT_STRINGS):
            unread.add(key)
            head[key] = None
        else:
            head[key] = value.decode()
    # of a class only the presence counts, and a group's `task` is its list of members, which no name depends on
    return _parse(path) if unread - ({"class", "task"} if "group" in head else {"class"}) else head


def _files(folder: str) -> list[str]:
    """YAML files under `folder` in lm-eval's order: the first of two with the same name wins."""
    return sorted(
        os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        for entry in _entries(folder)
        if entry.name.endswith(".yaml")
    )


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """All files under `folder` where lm-eval looks for tasks."""
    folders = [os.path.realpath(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        yield entry
                    elif entry.name not in _IGNORED_FOLDERS:
                        folders.append(entry.path)
        except PermissionError:
            continue


def _state(folder: str) -> str:
    """A digest of the names, sizes and times of all files under `folder`: what is included is called anything."""
    found = hashlib.sha256()
    for entry in sorted(_entries(folder), key=lambda entry: entry.path):
        with suppress(OSError):  # a link to nothing
            stat = entry.stat()
            found.update(f"{entry.path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _scan(folder: str, *, quick: bool) -> tuple[dict[str, _Entry], dict[str, str]]:
    """TaskIndex.build for one folder: entries by name, and the reason by file for those that cannot be read."""
    entries: dict[str, _Entry] = {}
    broken: dict[str, str] = {}
    reader = _Yaml(quick=quick)
    for path in _files(folder):
        try:
            head = reader.load(path)
        except _FOREIGN_ERRORS as error:
            broken[path] = " ".join(str(error).split())
            continue
        grouped = "group" in head and "class" not in head
        name = head.get("group") if grouped else head.get("task")
        if not isinstance(name, str) or name in entries:
            continue
        if grouped:
            entries[name] = _Entry(kind=Kind.GROUP, path=path, head=head)
            continue
        entries[name] = _Entry(kind=Kind.TASK, path=path, head=head)
        for tag in _tags(head):
            if tag not in entries:  # a tag that is called like a task or group stays that task or group
                entries[tag] = _Entry(kind=Kind.TAG, path=None, head={})
            entries[tag].tagged.add(name)
    return entries, broken


@functools.cache
def _bundled() -> Mapping[str, _Entry]:
    """lm-eval's own entries."""
    spec = importlib.util.find_spec("lm_eval")  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("lm-eval is not installed in this Python; install the project's dependencies (see README.md)")
    return _kept(os.path.join(spec.submodule_search_locations[0], "tasks"))


def _kept(folder: str) -> Mapping[str, _Entry]:
    """What a scan finds, which takes a second for lm-eval's folder: kept for as long as its files are the same."""
    path, state = remembered.place("tasks", os.fsencode(folder), Path(__file__).read_bytes()), _state(folder)
    known = remembered.recall(path, _Known)
    if known is None or known.state != state:
        known = _Known(state=state, entries=_scan(folder, quick=True)[0])
        remembered.keep(path, known)
    return known.entries


def _tags(head: Mapping[str, Any]) -> list[str]:
    tags = head.get("tag")
    return [tag for tag in (tags if isinstance(tags, list) else [tags]) if tag and isinstance(tag, str)]


def _searchable(lower_name: str, entry: _Entry) -> str:
    head = entry.head
    if entry.kind is not Kind.TASK:
        return lower_name
    output_type = head.get("output_type") or ("" if "class" in head else "generate_until")
    words = (lower_name, head.get("dataset_path"), head.get("dataset_name"), output_type, *_tags(head))
    return "\n".join(str(word) for word in words if word).lower()
