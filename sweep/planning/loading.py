"""YAML + overrides -> SweepConfig. The only module that knows OmegaConf and YAML.

A sweep is put together from sources, weakest first: the suites it names, the files it extends, the file itself, the
command line; `defaults` lie under every model and task. Each source is checked alone before they are merged, so that a
wrong key or type is said with the file that holds it. What a file may leave open, and is resolved here, is in OPEN.

This module does not know which tasks lm-eval has, which options vLLM takes or which models the hub holds.
"""

import glob
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sweep import ROOT
from sweep.errors import ConfigError, nearest, nearest_file
from sweep.masking import MASK, SECRET_LEAST, is_secret, masked, passwords
from sweep.planning.config import (
    CellOverride,
    Device,
    Expectation,
    Model,
    NodeGroup,
    RayConfig,
    Seeds,
    SweepConfig,
    Task,
    WandbConfig,
)


def load(
    conf: str, overrides: Sequence[str] = (), *, conf_dir: Path | None = None, words: Collection[str] = ()
) -> SweepConfig:
    """The sweep that `conf` (a name, or a path to a YAML file) describes, changed by `key=value` overrides.

    A name is looked up in `conf_dir`; without one in ./conf, then beside launch.py. Everything is resolved in what
    comes back: defaults, suites, variants, grids, limits, environment variables, absolute paths. Raises ConfigError
    with one line that names the source, the key, what was wrong and the nearest known name, among which are the `words`
    that the command line may hold beside keys.
    """
    folders = [conf_dir] if conf_dir else [*_FOLDERS]
    path, files, line = _said_in(conf, overrides, folders, words)
    sources = [*files, line]
    # Unlike everything else a name is not inherited: two sweeps of one name would share a run directory.
    name = line.data.get("name", files[-1].data.get("name", path.stem))
    try:
        sources = _suites(_merge_all(sources).get("suites", ()), [path.parent, *folders]) + sources
        document = _resolve(_merge_all(sources) | {"name": name})
        return _build(_typed(document, FILE, (), final=True))
    except _Mistake as mistake:
        raise _located(mistake, sources, default=files[-1]) from None


_FOLDERS = (Path("conf"), ROOT / "conf")
"""Where a sweep's name is looked up."""


def _said_in(
    conf: str, overrides: Sequence[str], folders: Sequence[Path], words: Collection[str] = ()
) -> "tuple[Path, list[_Source], _Source]":
    """The path of the sweep file, the files that it stands for, weakest first, and the command line."""
    path = _find(conf, folders)
    files = _chain(path, folders)
    models = [name for source in files for name in source.data.get("models", {})]
    return path, files, _command_line(overrides, known=models, words=words)


def with_source(text: str, conf: str, overrides: Sequence[str]) -> str:
    """What was found wrong with a sweep after it was loaded, each line that begins with a key behind its source.

    For checks that see the resolved sweep alone: of `tasks.gsm9k: ...` comes `conf/demo.yaml: tasks.gsm9k: ...`.
    """
    lines = text.split("\n")
    keys = [re.match(r"(tasks|models|cells)\.([^.:]+)([^: ]*): ", line) for line in lines]
    if not any(keys):
        return text
    path, files, line = _said_in(conf, overrides, _FOLDERS)
    sources = [*files, line]
    sources = _suites(_merge_all(sources).get("suites", ()), [path.parent, *_FOLDERS]) + sources

    said = tuple(f"{source.label}: " for source in sources)  # a file may be called tasks.yaml

    def label(kind: str, name: str, below: str) -> str:
        entries = [entry for entry in _merge_all(sources).get(kind, {}) if f"{name}-".startswith(f"{entry}-")]
        # A variant or a grid's task has the name of its entry and more; what both may have set is said of the entry.
        entry = max(entries, key=len, default=name)
        rest = tuple(below.split(".")[1:])
        place, own = "task" if kind == "tasks" else "model", name.removeprefix(f"{entry}-")
        written = [(kind, entry, "adapters", own)] if rest == ("adapter",) else [(kind, entry, "variants", own, *rest)]
        places = (*written, (kind, entry, *rest), *([("defaults", place, *rest)] if rest else []), (kind, entry))
        return _holder(places, sources, files[-1])[0].label

    return "\n".join(
        f"{label(*key.groups())}: {line}" if key and not line.startswith(said) else line
        for key, line in zip(keys, lines, strict=True)
    )


def load_cluster(path: str) -> dict[str, NodeGroup]:
    """The nodes that a file describes, `nodes: {name: {gpus: 8, ...}}`, by name. Raises ConfigError in one line."""
    where = Path(path).expanduser()
    if not where.is_file():
        raise ConfigError(f"command line: cluster: no file {str(where.absolute())!r}{nearest_file(where)}")
    source = _read(where, {"nodes": Named(get_type_hints(NodeGroup))})
    try:
        document = _typed(_resolve(source.data), {"nodes": Named(get_type_hints(NodeGroup))}, (), final=True)
        groups = {name: NodeGroup(**group) for name, group in document.get("nodes", {}).items()}
        if not groups:
            raise _Mistake("describes no nodes; give it some, as in `nodes: {h100: {count: 2, gpus: 8}}`", ("nodes",))
        for name, group in groups.items():
            mistake = _Draft({}, (("nodes", name),)).mistake
            _check_amounts(group, ("count", "evaluators", "gpu_memory_gb"), mistake)
            for key in ("gpus", "cpu_servers"):
                if (getattr(group, key) or 0) < 0:
                    raise mistake(key, f"wants 0 or more, got {getattr(group, key)}")
    except _Mistake as mistake:
        raise ConfigError(f"{source.label}: {'.'.join(mistake.keys[0])}: {mistake.text}") from None
    return groups


def dump(config: SweepConfig) -> str:
    """The resolved config as YAML for the run directory, without secrets."""
    hidden = secrets_of(config)

    def shown(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: shown(item, key) for key, item in value.items()}
        if is_secret(name) and value is not None and not isinstance(value, bool):
            return MASK
        if isinstance(value, (list, tuple)):
            return [shown(item, name) for item in value]
        if isinstance(value, str):
            return masked(str(value), hidden)  # a StrEnum is not YAML
        return value

    return yaml.safe_dump(shown(asdict(config)), sort_keys=False, allow_unicode=True, width=120)


def sweep_file(kept: Mapping[str, Any]) -> str:
    """What `dump` wrote as a sweep file that asks for the same, in a run directory of its own; secrets by variables."""
    models: dict[str, Any] = {}
    for name, model in kept.get("models", {}).items():
        entry, adapter = model.get("entry"), model.get("adapter")
        if adapter is not None and entry in models:
            models[entry].setdefault("adapters", {})[name.removeprefix(f"{entry}-")] = adapter
            continue
        left_out = {"entry", "adapter", *(("path", *_OF_OUR_SERVER) if model.get("url") else ())}
        models[name] = {key: value for key, value in model.items() if key not in left_out}

    def by_variables(value: Any, key: _Key = ()) -> Any:
        if isinstance(value, dict):
            return {name: by_variables(item, (*key, name)) for name, item in value.items()}
        return f"${{oc.env:{_variable(key)}}}" if value == MASK else value

    settings = {key: value for key, value in kept.items() if key != "runs_dir"} | {"models": models}
    return yaml.safe_dump(by_variables(settings), sort_keys=False, allow_unicode=True, width=100)


def secrets_of(config: SweepConfig) -> tuple[str, ...]:
    """The texts that must not be shown, longest first: what stands under secret-looking keys and environment variables,
    and the passwords of URLs.

    All variables of this process count, used by the config or not, as a server's log may repeat any of them. Texts of
    fewer than SECRET_LEAST characters are left out.
    """
    named = [(key[-1], value) for key, value in _leaves(asdict(config)) if isinstance(value, str)]
    named += os.environ.items()
    values = [secret for name, value in named for secret in ([value] if is_secret(name) else passwords(value))]
    return tuple(sorted({value for value in values if len(value) >= SECRET_LEAST}, key=len, reverse=True))


# --- Sources: where the words of a sweep come from -------------------------------------------------------------------

_Key = tuple[str, ...]
"""Where a value stands: `("models", "qwen", "path")`."""


@dataclass(frozen=True)
class _Source:
    label: str
    """What messages call it: the file, or "command line"."""
    data: dict[str, Any]
    """Checked against the schema, interpolations still unresolved."""


class _Mistake(Exception):
    """What is wrong, and the keys that may have caused it, most specific first. `_located` adds the source."""

    def __init__(self, text: str, *keys: _Key) -> None:
        super().__init__(text)
        self.text = text
        self.keys = keys


def _find(conf: str, folders: Sequence[Path]) -> Path:
    """The sweep file that `conf` means."""
    if "/" in conf or conf.endswith((".yaml", ".yml")):
        if not (path := Path(conf).expanduser()).is_file():
            raise ConfigError(f"command line: conf: no file {str(path.absolute())!r}{nearest_file(path)}")
        return path
    for folder in folders:
        if (path := folder / f"{conf}.yaml").is_file():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(f"command line: conf: no sweep {conf!r} in {_label(folders[-1])}{_near(conf, known)}")


def _chain(path: Path, folders: Sequence[Path], above: tuple[Path, ...] = ()) -> list[_Source]:
    """The sources that a file stands for, weakest first: what it extends, then itself.

    Names are looked up in `folders` for messages alone: what `extends` takes is a path.
    """
    path = path.absolute()
    source = _read(path, FILE)
    extended = source.data.pop("extends", ())
    chain = []
    for name in [extended] if isinstance(extended, str) else extended:
        below = Path(os.path.abspath(path.parent / name))
        if below in (*above, path):
            ring = " -> ".join(_label(file) for file in (*above, path, below))
            raise ConfigError(f"{source.label}: extends: a cycle, {ring}")
        if not below.is_file():
            raise ConfigError(f"{source.label}: extends: no file {str(below)!r}{_nearest_base(name, path, folders)}")
        chain += _chain(below, folders, (*above, path))
    return [*chain, source]


def _nearest_base(name: str, path: Path, folders: Sequence[Path]) -> str:
    """What the `extends` of the file at `path` may have meant by a path where there is no file."""
    for folder in (path.parent, *folders):
        for file in (name, f"{name}.yaml"):
            if (there := folder / file).is_file() and there.absolute() != path:
                return f"; did you mean {os.path.relpath(there, path.parent)!r}?"
    beside = (path.parent / name).parent
    files = [file.name for file in beside.iterdir() if file != path] if beside.is_dir() else []
    return nearest(Path(name).name, files) or "; extends takes a path, relative to the file that says it"


def _suites(names: str | Iterable[str], parents: Sequence[Path]) -> list[_Source]:
    """The suites' files, each a source of tasks."""
    folders = [parent / "suites" for parent in parents]
    found = []
    for name in [names] if isinstance(names, str) else names:
        path = next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)
        if path is None:
            known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
            raise _Mistake(f"no suite {name!r}{_near(name, known)}", ("suites",))
        found.append(_read(path, _SUITE))
    return found


def _read(path: Path, schema: Mapping[str, Any]) -> _Source:
    """One file, checked alone; ConfigError names it and the line (bad YAML) or the key."""
    label = _label(path)
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{label}: {_unparsed(error, path)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(": ".join(filter(None, (label, error.full_key, _said(error))))) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{label}: cannot be read: {str(error).splitlines()[0]}") from None
    return _checked(label, loaded, schema)


def _unparsed(error: yaml.MarkedYAMLError, path: Path) -> str:
    """The parser's complaint about a file in one line, with a cure where its words need one."""
    problem, mark = error.problem or "", error.problem_mark
    if mark is None:
        return f"bad YAML: {problem}"
    lines = path.read_text(encoding="utf-8").splitlines()
    rest = lines[mark.line][mark.column :] if mark.line < len(lines) else ""
    cure = "a line begins with spaces, YAML takes no tab there" if rest.startswith("\t") else _CURES.get(problem)
    return f"line {mark.line + 1}, column {mark.column + 1}: bad YAML: {problem}{f'; {cure}' if cure else ''}"


_INDENTATION = "the line is indented unlike those that it belongs to"
_CURES = {
    "did not find expected key": _INDENTATION,
    "did not find expected '-' indicator": _INDENTATION,
    "mapping values are not allowed in this context": "a text that holds ': ' wants quotes, a key a space behind its "
    "colon, and keys of one mapping the same indentation",
    "could not find expected ':'": "the line before lacks its colon, or is indented unlike those that it belongs to",
    "found character that cannot start any token": "a text that begins like this wants quotes",
}
"""What to look at, by what libyaml says."""


def _command_line(overrides: Sequence[str], known: Sequence[str], words: Collection[str]) -> _Source:
    """The overrides as a source. They may change every model that is `known`, and add one only with its path."""
    label = "command line"
    schema = {key: kind for key, kind in FILE.items() if key != "extends"}
    data: dict[str, Any] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{label}: {override}: missing value; write key=value, as in limit=10")
        try:
            said = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except yaml.YAMLError:  # the value is not repeated: it may be a secret
            raise ConfigError(f"{label}: {key}: bad YAML after the =") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{label}: {key}: {_said(error)}") from None
        if (inner := _emptied(said, schema)) is not None:
            raise ConfigError(f"{label}: {key}: missing value; set keys of it one by one, as in {key}.{inner}=...")
        data = _merge(data, said)
    models = data.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        if name not in known and not (isinstance(model, dict) and {"path", "url"} & model.keys()):
            near = nearest(name, known) or f"; the sweep has {_listed(known)}"
            raise ConfigError(f"{label}: models.{name}: no such model (a new one needs a path or url){near}")
    for name in data:
        if isinstance(name, str) and name not in schema:
            raise ConfigError(f"{label}: {name}: unknown key{_near(name, [*words, *schema])}")
    return _checked(label, data, schema)


def _emptied(value: Any, kind: Any) -> str | None:
    """Of an override, as a document, that gives a mapping nothing and that merging would pass over: a key which that
    mapping may have.

    A task with nothing is a task with its defaults.
    """
    key: _Key = ()
    while isinstance(value, dict) and len(value) == 1:
        ((name, value),) = value.items()
        kind = kind.get(name) if isinstance(kind, dict) else kind.of if isinstance(kind, Named) else None
        key = (*key, str(name))
    if value not in (None, {}) or (key[0] == "tasks" and len(key) == 2):
        return None
    if isinstance(kind, dict):
        return str(next(iter(kind)))
    return "NAME" if isinstance(kind, Named) or kind is Options or get_origin(kind) is dict else None


def _checked(label: str, data: Any, schema: Mapping[str, Any]) -> _Source:
    """A source whose keys and types fit the schema and that spells out no secret."""
    try:
        typed = _typed(data, schema, ())
        for key, value in _leaves(typed):
            holds_secret = key[-1] == "api_key" or (key[-2:-1] in (("env",), ("server",)) and is_secret(key[-1]))
            if holds_secret and isinstance(value, str) and "${" not in value:
                cure = f"write {key[-1]}: ${{oc.env:{_variable(key)}}} and set {_variable(key)} in the environment"
                raise _Mistake(f"a secret is not written down; {cure}", key)
    except _Mistake as mistake:
        raise ConfigError(": ".join(filter(None, (label, ".".join(mistake.keys[0]), mistake.text)))) from None
    return _Source(label, typed)


def _variable(key: _Key) -> str:
    """Of the environment, which is to hold the secret at this key."""
    return key[-1].upper() if key[-2:-1] == ("env",) else "OPENAI_API_KEY"


def _merge(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Both: mappings merge key by key, anything else of `stronger` replaces."""
    merged = dict(weaker)
    for key, value in stronger.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


def _merge_all(sources: Iterable[_Source]) -> dict[str, Any]:
    return reduce(_merge, (source.data for source in sources), {})


def _resolve(document: dict[str, Any]) -> Any:
    """The document with every `${...}` replaced by its value."""
    try:
        return OmegaConf.to_container(OmegaConf.create(document), resolve=True)
    except OmegaConfBaseException as error:
        raise _Mistake(_said(error), tuple(re.findall(r"[^.\[\]]+", error.full_key or ""))) from None


def _said(error: Exception) -> str:
    """OmegaConf's complaint in one line of ours."""
    text = str(error).splitlines()[0]
    if unset := re.search(r"Environment variable '(.*?)' not found", text):
        return f"environment variable {unset[1]!r} is not set; export {unset[1]}=... before the launch"
    return f"not understood: {text}"


def _located(mistake: _Mistake, sources: Sequence[_Source], default: _Source) -> ConfigError:
    """The mistake as one line with the strongest source that holds one of its keys, or else the nearest key above."""
    source, key = _holder(mistake.keys, sources, default)
    shown = key if key in mistake.keys else mistake.keys[0]
    return ConfigError(f"{source.label}: {'.'.join(shown)}: {mistake.text}")


def _holder(keys: Sequence[_Key], sources: Sequence[_Source], default: _Source) -> tuple[_Source, _Key]:
    """The strongest source that holds one of the keys, or else the nearest key above the first, and that key."""

    def holds(data: Any, key: _Key) -> bool:
        return not key or (isinstance(data, dict) and key[0] in data and holds(data[key[0]], key[1:]))

    first = keys[0]
    for key in (*keys, *(first[:length] for length in range(len(first) - 1, 0, -1))):
        for source in reversed(sources):
            if holds(source.data, key):
                return source, key
    return default, first


# --- Schema: the keys of a file and what each may hold ---------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """A mapping whose keys the user chooses."""

    of: Any
    """What each value holds: a type, or a mapping from fixed keys to types."""
    plain: bool = True
    """Names end up in other names, paths and overrides, so they hold letters, digits, `-` and `_` only."""


class Options:
    """vLLM's options by name, in either spelling."""


_EXPECT = Named(get_type_hints(Expectation), plain=False)
_ENV = Named(str | int | float, plain=False)  # `OMP_NUM_THREADS: 8` needs no quotes
_VARIANT = {key: kind for key, kind in get_type_hints(Model).items() if key not in ("entry", "adapter")} | {
    "env": _ENV,
    "server": Options,
    "checkpoints": tuple[str, ...],
    "adapters": Named(str),
    "expect": Named(_EXPECT),
}
_ENTRY = _VARIANT | {"variants": Named(_VARIANT)}
_TASK = get_type_hints(Task) | {"num_fewshot": int | tuple[int, ...] | None, "expect": _EXPECT}
_SUITE: dict[str, Any] = {"tasks": Named(_TASK)}
FILE: dict[str, Any] = _SUITE | {
    "extends": str | tuple[str, ...],
    "name": str,
    "runs_dir": str,
    "limit": int | float | None,
    "seeds": get_type_hints(Seeds),
    "retries": int,
    "max_failures": int | None,
    "load_timeout_s": float,
    "scoring_timeout_s": float,
    "defaults": {"model": _ENTRY, "task": _TASK},
    "models": Named(_ENTRY),
    "suites": tuple[str, ...],
    "cells": Named(get_type_hints(CellOverride), plain=False),
    "wandb": get_type_hints(WandbConfig),
    "ray": get_type_hints(RayConfig),
    "api_key": str | None,
    "env": _ENV,
    "walltime": str | int | float | None,
}

OPEN: Mapping[str, str] = {
    "extends": "Another file, or a list of them, to start from, by its path relative to this one; later ones win.",
    "suites": "Adds the tasks of `conf/suites/<name>.yaml`.",
    "defaults": "Settings under every model (`model:`) and under every task (`task:`).",
    "variants": "Several models of one entry, each with its own changes: `<entry>-<name>`.",
    "checkpoints": "In place of `path`, patterns of folders: one model for each that matches, `<entry>-<folder>`.",
    "adapters": "LoRA adapters (folder or hub id) that the entry's server serves too: `<entry>-<name>`.",
}
"""Keys beside those of config.py: what a file may leave open, and what comes of it."""

_UNFIT: Any = object()


def _typed(value: Any, kind: Any, key: _Key, *, final: bool = False) -> Any:
    """`value` as the schema's `kind`, or _Mistake with the full key; nothing written means an empty mapping or list.

    Before the `final` pass, which sees values only, an interpolation or `???` fits anywhere.
    """
    if value == "???" and final:
        raise _Mistake("missing value", key)
    if _unresolved(value, final):
        return value
    if not (isinstance(kind, (dict, Named)) or kind is Options):
        fit = _fit(value, kind, final)
        if fit is _UNFIT:
            raise _Mistake(_misfit(value, kind, key), key)
        return fit
    if not isinstance(value, dict | None):
        raise _Mistake(f"wants a mapping, got {_shown(value, key)}{_as_mapping(value, key)}", key)
    typed: dict[str, Any] = {}
    for name, item in (value or {}).items():
        if not isinstance(name, str):
            raise _Mistake(f"a name is text; write '{name}' in quotes", (*key, str(name)))
        if isinstance(kind, dict) and name not in kind:
            raise _Mistake(f"unknown key{_near(name, kind)}", (*key, name))
        if isinstance(kind, Named) and kind.plain and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise _Mistake(f"a name holds only letters, digits, - and _; call it {_plain(name)!r}", (*key, name))
        option = name.lstrip("-").replace("-", "_") if kind is Options else name
        if option in typed:
            raise _Mistake(f"the same option as {option!r}, which is set too", (*key, name))
        item_kind = kind[name] if isinstance(kind, dict) else kind.of if isinstance(kind, Named) else Any
        typed[option] = _typed(item, item_kind, (*key, name), final=final)
    return typed


def _fit(value: Any, kind: Any, final: bool) -> Any:
    """`value` converted to a type hint, or _UNFIT. YAML's types are taken at their word: no text becomes a number."""
    if kind is Any or _unresolved(value, final):
        return value
    arms, origin = get_args(kind), get_origin(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arms:
            return None
        return next((fit for arm in arms if (fit := _fit(value, arm, final)) is not _UNFIT), _UNFIT)
    if origin is Literal:
        return value if isinstance(value, str) and value in arms else _UNFIT
    if origin is tuple:
        if value is None:
            return ()
        items = [_fit(item, arms[0], final) for item in value] if isinstance(value, (list, tuple)) else [_UNFIT]
        return _UNFIT if _UNFIT in items else tuple(items)
    if origin is dict:
        texts = isinstance(value, dict) and all(isinstance(name, str) for name in value)
        return {} if value is None else value if texts else _UNFIT
    if kind is float:
        return float(value) if type(value) in (int, float) else _UNFIT
    if issubclass(kind, StrEnum):
        return kind(value) if value in list(kind) else _UNFIT
    return value if type(value) is kind else _UNFIT  # the exact type: `true` is no integer


def _unresolved(value: Any, final: bool) -> bool:
    return not final and isinstance(value, str) and (value == "???" or "${" in value)


def _misfit(value: Any, kind: Any, key: _Key) -> str:
    """What was wanted, what was given, and how to write what was probably meant."""
    arms, words = _arms(kind), _words(kind)
    cure = ""
    if isinstance(value, str):
        cure = nearest(value, words)
        # A number in a file is one already; only quotes and interpolations make text of it.
        if str not in arms and re.fullmatch(r"[\d.]+|true|false", value):
            cure = "; write it without quotes, an interpolation as ${oc.decode:${...}}"
    elif isinstance(value, bool) and words:
        cure = f"; YAML reads a bare {'on or yes as true' if value else 'off or no as false'}"
        cure += f", write {_SWITCHES[value]}" if _SWITCHES[value] in words else ""
    elif str in arms and isinstance(value, (int, float)):
        cure = "; put it in quotes"
    return f"wants {wanted(kind)}, got {_shown(value, key)}{cure}"


def wanted(kind: Any) -> str:
    """What a type hint takes, in words."""
    return " or ".join([*map(repr, _words(kind)), *(_KIND_WORDS[arm] for arm in _arms(kind) if arm in _KIND_WORDS)])


def _arms(kind: Any) -> list[Any]:
    return [arm for arm in get_args(kind) if arm is not NoneType] if get_origin(kind) in (Union, UnionType) else [kind]


def _words(kind: Any) -> list[str]:
    """The words that it may be."""
    return [word for arm in _arms(kind) for word in (get_args(arm) if get_origin(arm) is Literal else _members(arm))]


_SWITCHES = {False: "disabled", True: "online"}
"""What someone means who writes off or on where there is such a choice."""

_KIND_WORDS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of texts",
    tuple[int, ...]: "a list of integers",
    dict[str, Any]: "a mapping",
}


def _as_mapping(value: Any, key: _Key) -> str:
    """How to write the models or tasks that were probably meant by something else than a mapping."""
    match key, value:
        case ("tasks",), [str(name), *_]:
            return f"; write `{name}: {{}}` below it, a line for each"
        case ("models",), [str(name), *_]:
            return f"; write `{_plain(name)}: {{path: {name}}}` below it, a line for each"
        case ("tasks", name), bool() | str():
            return f"; write `{name}: {{}}`, with settings inside"
        case ("tasks", name), int():
            return f"; write `{name}: {{num_fewshot: {value}}}`, or `limit` for its documents"
        case ("models", name), str():
            return f"; write `{name}: {{path: {value}}}`"
    return ""


def _members(kind: Any) -> list[str]:
    return [str(member) for member in kind] if isinstance(kind, type) and issubclass(kind, StrEnum) else []


def _shown(value: Any, key: _Key) -> str:
    """A value as its author wrote it, unless it may be a secret."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if key and is_secret(key[-1]):
        return "something else"
    return repr(list(value) if isinstance(value, tuple) else value)


# --- Meaning: from a merged document to models, tasks and cells ------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A model or task on its way: what is set, and the places that may have set it, most specific first."""

    settings: dict[str, Any]
    places: tuple[_Key, ...]

    def mistake(self, name: str, text: str) -> _Mistake:
        return _Mistake(text, *((*place, name) for place in self.places))


def _build(document: dict[str, Any]) -> SweepConfig:
    """The config of a document that fits the schema; raises _Mistake for what the schema cannot say."""
    defaults = document.get("defaults", {})
    models = _unique(
        draft
        for entry, own in document.get("models", {}).items()
        for draft in _model_drafts(entry, own, defaults.get("model", {}))
    )
    tasks: dict[str, _Draft] = {}
    grids: dict[str, list[str]] = {}
    for key, own in document.get("tasks", {}).items():
        grid = _unique(_task_drafts(key, own, defaults.get("task", {})), tasks)
        grids[key] = list(grid)
        tasks |= grid
    env = {name: str(value) for name, value in document.get("env", {}).items()}
    config = SweepConfig(
        name=document["name"],
        models={name: _model(draft, grids, env) for name, draft in models.items()},
        tasks={name: _task(draft, document.get("limit")) for name, draft in tasks.items()},
        runs_dir=_absolute(document.get("runs_dir", "runs")),
        limit=document.get("limit"),
        seeds=Seeds(**document.get("seeds", {})),
        retries=document.get("retries", SweepConfig.retries),
        max_failures=document.get("max_failures"),
        load_timeout_s=document.get("load_timeout_s", SweepConfig.load_timeout_s),
        scoring_timeout_s=document.get("scoring_timeout_s", SweepConfig.scoring_timeout_s),
        cells={key: CellOverride(**own) for key, own in document.get("cells", {}).items()},
        wandb=WandbConfig(**document.get("wandb", {})),
        ray=RayConfig(**document.get("ray", {})),
        api_key=document.get("api_key"),
        env=env,
        walltime=_seconds(document.get("walltime")),
    )
    _check(config, models, tasks)
    return config


def _unique(drafts: Iterable[tuple[str, _Draft]], taken: Mapping[str, _Draft] | None = None) -> dict[str, _Draft]:
    """The drafts by name; a name that two of them would have is a mistake of the second."""
    by_name: dict[str, _Draft] = {}
    for name, draft in drafts:
        if other := by_name.get(name) or (taken or {}).get(name):
            raise _Mistake(f"makes {name!r}, as {'.'.join(other.places[0])} does; rename one of them", *draft.places)
        by_name[name] = draft
    return by_name


def _model_drafts(entry: str, own: dict[str, Any], default: dict[str, Any]) -> Iterator[tuple[str, _Draft]]:
    """The models of one entry: itself or its variants, each spread over checkpoints and adapters."""
    places: tuple[_Key, ...] = (("models", entry), ("defaults", "model"))
    settings = _layered(default, own)
    variants = settings.pop("variants", {})
    if not variants:
        yield from _spread(entry, _Draft(settings, places))
    for name, changes in variants.items():
        inner = tuple((*place, "variants", name) for place in places)
        yield from _spread(f"{entry}-{name}", _Draft(_layered(settings, changes), inner + places))


_PLACES = ("path", "checkpoints", "url")
"""The keys that say where a model is; it has one of them."""
_OF_A_URL: dict[str, str] = {
    "served_model_name": "our servers serve a model under its key",
    "api_key": "our servers share the sweep's own api_key",
}
"""What is said of a server at a `url` alone, and what to know where it is said of one that we start."""
_OF_OUR_SERVER: dict[str, str] = {
    "server": "the server at url was started with options of its own",
    "env": "the server at url runs in an environment of its own",
    "device": "the server at url has devices of its own",
    "tensor_parallel": "the server at url has devices of its own",
    "nodes": "the server at url has devices of its own",
    "gpus": "the server at url has devices of its own",
    "gpu_type": "the server at url has devices of its own",
    "gpu_memory_gb": "the server at url has devices of its own",
    "replicas": "there is one server at url; several behind one address share `concurrency`",
    "quantization": "the server at url was started with its own; `revision` may hold a label of what it serves",
    "dtype": "the server at url was started with its own; `revision` may hold a label of what it serves",
    "generation_config": "the server at url was started with its own; `revision` may hold a label of what it serves",
    "adapters": "an adapter at url is a model of its own: give it an entry with its served_model_name",
    "server_python": "the server at url runs already",
}
"""What is said of a server that we start alone, and what to know where it is said of one at a `url`."""


def _layered(weaker: dict[str, Any], stronger: dict[str, Any]) -> dict[str, Any]:
    """Both merged, where the stronger one's place replaces the weaker one's and what was said of a server there."""
    replaced: set[str] = set()
    if stronger.keys() & set(_PLACES):
        replaced = {*_PLACES, *(_OF_OUR_SERVER if "url" in stronger else _OF_A_URL)}
    return _merge({key: value for key, value in weaker.items() if key not in replaced}, stronger)


def _spread(name: str, draft: _Draft) -> Iterator[tuple[str, _Draft]]:
    """A model once per checkpoint, and each of these once more per adapter on the same server."""
    settings = dict(draft.settings)
    if settings.get("url"):
        _check_external(draft)
        yield name, _Draft(settings | {"url": _address(draft), "entry": name}, draft.places)
        return
    for key, why in _OF_A_URL.items():
        if settings.get(key) is not None:
            raise draft.mistake(key, f"has no effect without url: {why}")
    adapters = settings.pop("adapters", {})
    patterns = settings.pop("checkpoints", ())
    if settings.get("path") and patterns:
        raise draft.mistake("checkpoints", "the checkpoints are the paths; leave out path")
    if not patterns and not settings.get("path"):
        raise draft.mistake(
            "path", "missing value; give a hub id or a local folder, or url for a server that someone else runs"
        )
    folders = {name: settings.get("path", "")}
    if patterns:
        folders = {}
        for label, folder in (match for pattern in patterns for match in _checkpoints(pattern, draft)):
            base = f"{name}-{_plain(label)}"
            if base in folders:
                raise draft.mistake("checkpoints", f"{folders[base]} and {folder} would both be called {base!r}")
            folders[base] = folder
    for base, folder in folders.items():
        own = settings | {"path": _local(folder), "url": None, "entry": base}
        yield base, _Draft(own, draft.places)
        for adapter, path in adapters.items():
            yield f"{base}-{adapter}", _Draft(own | {"adapter": _local(path)}, draft.places)


def _check_external(draft: _Draft) -> None:
    """Raises _Mistake for what a model at a `url` lacks or cannot have."""
    settings = draft.settings
    for key in ("path", "checkpoints"):
        if settings.get(key):
            raise draft.mistake(key, "the model is what the server at url serves; leave out this or url")
    for key, why in _OF_OUR_SERVER.items():
        if key in settings:
            raise draft.mistake(key, f"has no effect with url: {why}")
    if not settings.get("tokenizer"):
        raise draft.mistake(
            "tokenizer", "missing value; a model at a url needs its hub id or folder, as prompts are sent as token ids"
        )


def _address(draft: _Draft) -> str:
    """The `url` of a draft as `http://host:port`, with a path only where a gateway adds one before /v1.

    What is refused is not repeated where it may hold a secret.
    """
    wanted = "wants http://host:port of an OpenAI-compatible server"
    text = draft.settings["url"].strip()
    if "@" in text:
        raise draft.mistake("url", f"{wanted}, without a user or password; give the key as api_key")
    if "?" in text or "#" in text:
        raise draft.mistake("url", f"{wanted}, without a query; give the key as api_key")
    if "://" not in text:
        raise draft.mistake("url", f"{wanted}, got {text!r}; did you mean 'http://{text}'?")
    try:
        parts = urlsplit(text)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or re.search(r"\s", text)
    except ValueError:  # a port that is none, a bracket that is not closed
        bad = True
    if bad:
        raise draft.mistake("url", f"{wanted}, got {text!r}")
    path, *beyond = re.split(r"/v1(?=/|$)", parts.path.rstrip("/"))
    base = f"{parts.scheme}://{parts.netloc.lower().removesuffix(':')}{path.rstrip('/')}"
    if "".join(beyond):
        raise draft.mistake("url", f"{wanted}, got {text!r}; did you mean {base!r}?")
    return base


def _checkpoints(pattern: str, draft: _Draft) -> list[tuple[str, str]]:
    """(label, folder) of each match, step 200 before step 1000; labels are paths below the part without wildcards."""
    pattern = _absolute(pattern)
    if not glob.has_magic(pattern):
        if not os.path.isdir(pattern):
            raise draft.mistake("checkpoints", f"no folder {pattern!r}{nearest_file(Path(pattern))}")
        return [(os.path.basename(pattern), pattern)]
    parts = pattern.split("/")
    fixed = "/".join(parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
    matches = [match for match in glob.glob(pattern, recursive=True) if os.path.isdir(match)]
    if not matches:
        raise draft.mistake("checkpoints", f"no folder matches {pattern!r}")
    in_order = sorted(
        matches, key=lambda match: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", match)]
    )
    return [(os.path.relpath(match, fixed or "/"), match.rstrip("/")) for match in in_order]


def _task_drafts(key: str, own: dict[str, Any], default: dict[str, Any]) -> Iterator[tuple[str, _Draft]]:
    """The task, or for a list of shots one task for each."""
    draft = _Draft({"task": key} | _merge(default, own), (("tasks", key), ("defaults", "task")))
    shots = draft.settings.get("num_fewshot")
    if not isinstance(shots, tuple):
        yield key, draft
        return
    if not shots:
        raise draft.mistake("num_fewshot", "the list is empty; leave it out for the task's own number")
    for shot in shots:
        yield f"{key}-{shot}shot", _Draft(draft.settings | {"num_fewshot": shot}, draft.places)


def _seconds(walltime: str | float | None) -> float | None:
    """A time as people and Slurm write it: `3h50m`, `3:50:00`, `1-12:00:00`, `50:00`, or seconds."""
    if not isinstance(walltime, str):
        return walltime
    text = walltime.replace(" ", "")
    spelt = re.fullmatch(r"(?=.)(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    clock = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?([0-5]?\d):([0-5]\d)", text)
    if (found := spelt or clock) is None:
        raise _Mistake(f"wants a time as in 3h50m or 3:50:00, or seconds, got {walltime!r}", ("walltime",))
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _model(draft: _Draft, grids: Mapping[str, list[str]], env: Mapping[str, str]) -> Model:
    """The model of a draft; a grid in its `tasks` stands for all tasks of the grid, and `env` is the sweep's."""
    settings = dict(draft.settings)
    if settings.get("tokenizer") is not None:
        settings["tokenizer"] = _local(settings["tokenizer"])
    if settings.get("server_python") is not None:
        settings["server_python"] = _python(draft)
    own = {name: str(value) for name, value in settings.get("env", {}).items()}
    settings["env"] = own if settings.get("url") else {**env, **own}
    chosen = []
    for choice in settings.get("tasks", ()):
        bare = choice.removeprefix("!")
        chosen += [choice[: -len(bare)] + name for name in grids.get(bare, [bare])]
    expect: dict[str, dict[str, Expectation]] = {}
    # What is said of a grid holds for each of its shots, unless one of them has its own word.
    for task, said in sorted(settings.get("expect", {}).items(), key=lambda item: item[0] not in grids):
        for name in grids.get(task, [task]):
            expect[name] = {**expect.get(name, {}), **_expectations(draft, said, task)}
    return Model(**settings | {"tasks": tuple(chosen), "expect": expect})


def _expectations(draft: _Draft, settings: Mapping[str, Any], *below: str) -> dict[str, Expectation]:
    """An `expect` as data. Raises _Mistake where a value or tolerance is missing or cannot be meant."""
    found = {}
    for name, own in settings.items():
        key = ".".join((*below, name))
        for part in ("value", "tolerance"):
            if part not in own:
                raise draft.mistake("expect", f"{key}: {part} is missing; write {{value: 0.69, tolerance: 0.02}}")
        if own["tolerance"] < 0:
            raise draft.mistake("expect", f"{key}: tolerance wants 0 or more, got {own['tolerance']:g}")
        if name.count(",") > 1 or not name.strip(",") or name != name.replace(" ", ""):
            raise draft.mistake("expect", f"{key}: wants lm-eval's metric,filter, as in exact_match,strict-match")
        found[name] = Expectation(**own)
    return found


def _python(draft: _Draft) -> str:
    """The `server_python` of a draft as an absolute path; its links stay, they are what makes a virtual environment."""
    path = Path(_absolute(draft.settings["server_python"]))
    if path.is_dir():
        raise draft.mistake("server_python", f"{str(path)!r} is a folder; did you mean {str(path / 'bin/python')!r}?")
    if not path.is_file():
        raise draft.mistake("server_python", f"no file {str(path)!r}{nearest_file(path)}")
    if not os.access(path, os.X_OK):
        raise draft.mistake("server_python", f"{str(path)!r} cannot be executed; give a Python that has vLLM")
    if os.environ.get("LMSWEEP_ENGINE"):
        raise draft.mistake(
            "server_python", "LMSWEEP_ENGINE is set and replaces every model's engine; unset one of them"
        )
    return str(path)


def _task(draft: _Draft, limit: float | None) -> Task:
    settings = dict(draft.settings)
    if settings.get("include_path") is not None:
        folder = settings["include_path"] = _absolute(settings["include_path"])
        if not os.path.isdir(folder):
            raise draft.mistake("include_path", f"no folder {folder!r}{nearest_file(Path(folder))}")
    if settings.get("limit") is None:
        settings["limit"] = limit
    return Task(**settings | {"expect": _expectations(draft, settings.get("expect", {}))})


def _local(text: str) -> str:
    """An absolute path where `text` looks like a local one, otherwise `text`, a hub id.

    Whether it exists is plan's to say: a checkpoint that is missing costs its own cells, not the sweep.
    """
    local = text.startswith((".", "/", "~")) or text.count("/") > 1 or os.path.isdir(text)
    return _absolute(text) if local else text


def _absolute(text: str) -> str:
    return os.path.abspath(os.path.expanduser(text))


def _check(config: SweepConfig, models: Mapping[str, _Draft], tasks: Mapping[str, _Draft]) -> None:
    """Raises _Mistake for the first value that has the right type and still cannot be meant."""
    if not config.models:
        raise _Mistake("missing value; a sweep needs at least one model", ("models",))
    if not config.tasks:
        raise _Mistake("missing value; a sweep needs at least one task, or a suite", ("tasks",))
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", config.name):
        raise _Mistake(f"{config.name!r} names a folder: letters, digits, -, _ and . only", ("name",))
    amounts = ("limit", "walltime", "retries", "max_failures", "load_timeout_s", "scoring_timeout_s")
    _check_amounts(config, amounts, lambda name, text: _Mistake(text, (name,)))
    for name in config.env:
        if name.startswith("RAY_"):
            raise _Mistake("Ray reads it before any sweep file is read: export it instead", ("env", name))
        if name in ("CUDA_VISIBLE_DEVICES", "VLLM_API_KEY"):
            raise _Mistake("each server gets its own; leave it out", ("env", name))
    _check_key(config.api_key, lambda name, text: _Mistake(text, (name,)))
    _check_amounts(
        config.seeds, ("random", "numpy", "torch", "fewshot"), lambda name, text: _Mistake(text, ("seeds", name))
    )
    _check_amounts(config.ray, ("cpu_servers", "evaluators"), lambda name, text: _Mistake(text, ("ray", name)))
    _check_amounts(config.wandb, ("samples",), lambda name, text: _Mistake(text, ("wandb", name)))
    for name, model in config.models.items():
        _check_model(model, models[name], config.tasks)
    for name, task in config.tasks.items():
        _check_amounts(task, ("num_fewshot", "limit"), tasks[name].mistake)
    pairs = [f"{model}/{task}" for model in config.models for task in config.tasks]
    for cell, override in config.cells.items():
        if not any(fnmatchcase(pair, cell) for pair in pairs):
            raise _Mistake(f"no such model/task{_near(cell, pairs)}", ("cells", cell))
        _check_amounts(override, ("num_fewshot", "limit"), _Draft({}, (("cells", cell),)).mistake)


def _check_model(model: Model, draft: _Draft, tasks: Mapping[str, Task]) -> None:
    amounts = ("tensor_parallel", "nodes", "gpus", "gpu_memory_gb", "replicas", "concurrency", "max_model_len")
    _check_amounts(model, (*amounts, "startup_timeout_s", "hang_timeout_s", "max_failures"), draft.mistake)
    _check_key(model.api_key, draft.mistake)
    if model.device is Device.CPU and model.tensor_parallel > 1:
        raise draft.mistake("tensor_parallel", f"spans GPUs, but device is cpu; got {model.tensor_parallel}")
    if model.device is Device.CPU and model.gpus is not None:
        raise draft.mistake("gpus", f"device is cpu, which holds none; got {model.gpus:g}")
    if model.gpus is not None and model.gpus * model.nodes < model.tensor_parallel > 1:
        there = f"{model.gpus:g}" + (f" on each of {model.nodes} nodes" if model.nodes > 1 else "")
        raise draft.mistake("gpus", f"tensor_parallel spans {model.tensor_parallel} whole GPUs, got {there}")
    if model.device is Device.CPU and model.nodes > 1:
        raise draft.mistake("nodes", f"splits a model over GPUs of several nodes, but device is cpu; got {model.nodes}")
    if model.nodes > 1 and (model.gpus or 1) < 1:
        raise draft.mistake("nodes", f"takes whole GPUs of each node, but gpus is {model.gpus:g}")
    if model.device is Device.CPU and model.env.get(BATCH_INVARIANT, "0") != "0":
        raise draft.mistake(
            "env", f"{BATCH_INVARIANT} needs a GPU: vLLM's CPU build cannot keep answers independent of the batch"
        )
    if model.chat_template_kwargs and not model.chat:
        raise draft.mistake("chat_template_kwargs", "has no effect without `chat: true`")
    for name in sorted(_OF_LM_EVAL & model.chat_template_kwargs.keys()):
        raise draft.mistake("chat_template_kwargs", f"{name} is what lm-eval says for each prompt; leave it out")
    if model.think_end_token == "":
        raise draft.mistake("think_end_token", "is empty; leave it out for a model without reasoning")
    excluded = [choice.startswith("!") for choice in model.tasks]
    if any(excluded) and not all(excluded):
        raise draft.mistake("tasks", "either all or none of the names start with '!'")
    for name in model.expect:
        if name not in tasks:
            raise draft.mistake("expect", f"no task {name!r} in this sweep{_near(name, tasks)}")
        if model.tasks and (f"!{name}" in model.tasks or (name not in model.tasks and not any(excluded))):
            raise draft.mistake("expect", f"the model does not run {name!r}: its `tasks` leave it out")
    for name in (choice.removeprefix("!") for choice in model.tasks):
        if name not in tasks:
            raise draft.mistake("tasks", f"no task {name!r} in this sweep{_near(name, tasks)}")


BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
"""vLLM's variable for answers that do not depend on what else is computed at the same time."""

_OF_LM_EVAL = frozenset(
    {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
)
"""Arguments of `apply_chat_template` that are not the user's."""

_AMOUNTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "limit": (
        lambda limit: limit >= 1 if isinstance(limit, int) else 0 < limit < 1,
        "a whole number of documents, at least 1, or a share of them between 0 and 1",
    ),
    "num_fewshot": (lambda shots: shots >= 0, "0 or more examples"),
    "gpus": (lambda gpus: 0 < gpus < 1 or (gpus >= 1 and gpus.is_integer()), "a share below 1 or whole GPUs"),
    "gpu_memory_gb": (lambda gb: gb > 0, "more than 0 GB"),
    "retries": (lambda retries: retries >= 0, "0 or more"),
    "startup_timeout_s": (lambda seconds: seconds > 0, "more than 0 seconds"),
    "hang_timeout_s": (lambda seconds: seconds > 0, "more than 0 seconds"),
    "load_timeout_s": (lambda seconds: seconds > 0, "more than 0 seconds"),
    "scoring_timeout_s": (lambda seconds: seconds > 0, "more than 0 seconds"),
    "walltime": (lambda seconds: seconds > 0, "more than 0 seconds"),
    "samples": (lambda rows: 0 <= rows <= 10_000, "0 to 10000, the most that a table of W&B shows"),
} | {
    seed: (lambda seed: 0 <= seed < 2**32, "0 to 4294967295, as numpy does")
    for seed in ("random", "numpy", "torch", "fewshot")
}
_COUNT: tuple[Callable[[Any], bool], str] = (lambda count: count >= 1, "1 or more")


def _check_amounts(holder: Any, names: Iterable[str], mistake: Callable[[str, str], _Mistake]) -> None:
    """Raises what `mistake` makes of the first of `names` whose number is out of range; unset and `auto` always fit."""
    for name in names:
        value = getattr(holder, name)
        fits, wanted = _AMOUNTS.get(name, _COUNT)
        if isinstance(value, (int, float)) and not fits(value):
            raise mistake(name, f"wants {wanted}, got {value}")


def _check_key(api_key: str | None, mistake: Callable[[str, str], _Mistake]) -> None:
    """A key travels in a header; one that cannot would be repeated in the error of whoever sends it."""
    if api_key is not None and not re.fullmatch(r"[!-~]*", api_key):
        raise mistake("api_key", "holds a blank, a line break or a letter beyond ASCII; a key has none of them")


# --- Words for messages ----------------------------------------------------------------------------------------------


def _leaves(data: Mapping[str, Any], above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    """Every value that is no mapping, with its key; the items of a list have the key of the list."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, name))
        else:
            for item in value if isinstance(value, (list, tuple)) else (value,):
                yield (*above, name), item


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest known names, or all of them when none is near."""
    known = list(known)
    return nearest(name, known) or f"; known: {_listed(known)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _plain(name: str) -> str:
    """A name that `models` and `tasks` may have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)


def _label(path: Path) -> str:
    """A file as its user would write it: relative where it lies below the current directory."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
