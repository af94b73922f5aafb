"""Published scores beside a sweep's own: which exist, and in what they were measured differently.

A published number and ours are the same quantity only where harness, task version, shots, prompt form and documents are
the same. What a source does not state counts as different: the reader sees the number, and why it is no yardstick.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from sweep import ROOT
from sweep.errors import ConfigError, nearest
from sweep.planning.config import Seeds
from sweep.planning.plan import SPEED_ONLY_OPTIONS, is_local
from sweep.record import WITHOUT_BOS, Record, Score, Status
from sweep.results.reading import Sweep

FOLDER = ROOT / "conf" / "references"
HARNESS = "lm-eval"
"""What a source's `harness` begins with when its numbers come from the harness that makes ours."""
ALIKE = "local-completions"
"""The backend of it whose prompts have no BOS of the tokenizer's own, as ours have none."""
USUAL: dict[str, Any] = {
    "quantization": None,
    "dtype": "auto",
    "generation_config": "vllm",
    "adapter": None,
    "tokenizer": None,
    "chat_template_kwargs": {},
    "think_end_token": None,
    "system_instruction": None,
    "server": {},
    "seeds": asdict(Seeds()),
}
"""Settings of a model that change numbers, and the values with which one of its weights alone is measured. Where a
record has no such setting there was none to choose when it was made."""
UNKNOWN = "unknown"
"""A record's word for what a server at a `url` does not tell."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published score of a cell that the sweep has finished."""

    model: str
    """The sweep's name of the model."""
    task: str
    """The cell's."""
    subtask: str
    """lm-eval's name of the task or group that the score belongs to."""
    metric: str
    filter: str
    value: float
    """On lm-eval's scale of 0 to 1."""
    stderr: float | None
    source: str
    settings: str
    """What the source says of how it was measured."""
    differs: tuple[str, ...]
    """What is not as here, or not stated; empty means that the two numbers can be compared."""


class Settings(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True):
    """How a published score was measured; unset means that the source does not say."""

    harness: str | None = None
    """`lm-eval` (with the backend, if known) or what else produced it."""
    num_fewshot: int | None = None
    version: str | None = None
    """lm-eval's version of the task."""
    chat: bool | None = None
    """Whether the chat template was applied."""
    fewshot_as_multiturn: bool | None = None
    limit: int | float | None = None
    """Documents, or a share of them; unset means all, as a source says so where it is otherwise."""
    unlike: tuple[str, ...] = ()
    """What no run here has in common with it, in words."""


class Source(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    title: str
    where: str
    """Repository and path, or address."""
    settings: Settings = Settings()
    """Of all its scores, unless they say otherwise."""


class PublishedScore(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    model: str
    """Hub id."""
    task: str
    """lm-eval's task that is nearest to what was measured."""
    metric: str
    filter: str = "none"
    value: Annotated[float, msgspec.Meta(ge=0, le=1)]
    stderr: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    source: str
    """A key of `sources`."""
    settings: Settings = Settings()


class References(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A file of conf/references."""

    sources: dict[str, Source]
    scores: tuple[PublishedScore, ...]


def published(sweep: Sweep, *, folders: Sequence[Path] = (FOLDER,)) -> tuple[Published, ...]:
    """The published scores of the sweep's finished cells, in the order of its records and of the files.

    Raises ConfigError where a file cannot be used.
    """
    files = [read_references(path) for folder in folders for path in sorted(folder.glob("*.yaml"))]
    return tuple(
        found
        for record in sweep.records
        if record.status is Status.DONE
        for found in _of_record(record, _revision(sweep, record), files)
    )


def read_references(path: Path) -> References:
    """One file. Raises ConfigError with one line that names the file, the place and what is wrong."""
    try:
        loaded = yaml.safe_load(path.read_bytes())
        references = msgspec.convert(loaded, References)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ConfigError(f"{path}: {line}bad YAML: {error.problem}") from None
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        cure = "; values are on lm-eval's scale of 0 to 1" if place.endswith(("value`", "stderr`")) else ""
        plain = what.replace("`", "'")
        where = f"{place.removesuffix('`')}: " if place else ""
        raise ConfigError(f"{path}: {where}{plain}{cure}") from None
    for index, score in enumerate(references.scores):
        if score.source not in references.sources:
            known = (
                nearest(score.source, references.sources) or f"; there are {', '.join(references.sources) or 'none'}"
            )
            raise ConfigError(f"{path}: scores[{index}].source: no source {score.source!r}{known}")
    return references


def _revision(sweep: Sweep, record: Record) -> str | None:
    """The revision that was chosen; None for the hub's own choice, for which a record has a commit too."""
    asked: Mapping[str, Any] = sweep.config.get("models", {}).get(record.model, record.settings)
    return asked.get("revision")


def _of_record(record: Record, revision: str | None, files: Iterable[References]) -> Iterator[Published]:
    for references in files:
        for one in references.scores:
            ours = _own(record, one)
            if ours is None:
                continue
            source = references.sources[one.source]
            settings = _layered(source.settings, one.settings)
            yield Published(
                model=record.model,
                task=record.task,
                subtask=ours.task,
                metric=one.metric,
                filter=one.filter,
                value=one.value,
                stderr=one.stderr,
                source=f"{source.title} ({source.where})",
                settings=_described(settings),
                differs=(*_other_weights(record, revision), *_differences(settings, record, ours)),
            )


def _own(record: Record, one: PublishedScore) -> Score | None:
    """Our number that a published one is about: of the same model, task, metric and filter."""
    path = str(record.settings.get("path") or record.settings.get("served_model_name") or "")
    local = is_local(path) and path.rstrip("/").rpartition("/")[2].lower() == one.model.rpartition("/")[2].lower()
    if not (local or path.lower() == one.model.lower()) or record.settings.get("adapter") not in (None, UNKNOWN):
        return None
    wanted = (one.task, one.metric, one.filter)
    return next((s for s in record.scores if (s.task, s.metric, s.filter) == wanted), None)


def _layered(below: Settings, above: Settings) -> Settings:
    return msgspec.structs.replace(below, **msgspec.to_builtins(above))


def _described(settings: Settings) -> str:
    chat = {True: "chat template", False: "no chat template", None: None}[settings.chat]
    parts = (
        settings.harness,
        None if settings.num_fewshot is None else f"{settings.num_fewshot}-shot",
        settings.version and f"task version {settings.version}",
        chat,
        "examples as turns" if settings.fewshot_as_multiturn else None,
        None if settings.limit is None else f"limit {settings.limit}",
        *settings.unlike,
    )
    return ", ".join(part for part in parts if part)


def _other_weights(record: Record, revision: str | None) -> Iterator[str]:
    """Why what was measured here may not be the published weights."""
    here = record.settings
    if here.get("url") is not None:
        yield "a server at a url: not known to be these weights"
    elif is_local(str(here.get("path") or "")):
        yield "a local folder: not known to be these weights"
    elif revision is not None:
        yield f"revision: none there, {revision} here"


def _differences(settings: Settings, record: Record, score: Score) -> Iterator[str]:
    here = record.settings
    asked = here.get("task", {})
    if settings.harness is None or not settings.harness.startswith(HARNESS):
        yield f"measured with {settings.harness or 'an unknown harness'}, not lm-eval"
    yield from settings.unlike
    chat = bool(here.get("chat"))
    yield from _differs("shots", settings.num_fewshot, _shots(record, score))
    yield from _differs("task version", settings.version, score.version)
    yield from _differs("chat template", settings.chat, chat)
    if chat and settings.chat and settings.num_fewshot != 0:
        yield from _differs("examples as turns", settings.fewshot_as_multiturn, bool(here.get("fewshot_as_multiturn")))
    if asked.get("limit") != settings.limit:
        yield f"limit: {_word(settings.limit)} there, {_word(asked.get('limit'))} here"
    told = {name: here.get(name, usual) for name, usual in USUAL.items()}
    unknown = [name for name, value in told.items() if value == UNKNOWN]
    if unknown:
        yield f"not known here: {', '.join(unknown)}"
    if "server" not in unknown:
        told["server"] = {name: value for name, value in told["server"].items() if name not in SPEED_ONLY_OPTIONS}
    for name, value in told.items():
        if name not in unknown and value != USUAL[name]:
            yield f"{name.replace('_', ' ')}: {USUAL[name] or 'none'} there, {value!r} here"
    for name in ("gen_kwargs", "metadata"):
        if asked.get(name):
            yield f"{name}: the task's own there, {asked[name]} here"
    if asked.get("include_path"):
        yield "task files: lm-eval's there, with a folder of its own here (include_path)"
    bare = next((text for text in record.warnings if WITHOUT_BOS in text), None)
    if bare is not None and ALIKE not in (settings.harness or ""):
        yield f"{bare.split()[0]} {WITHOUT_BOS} here, as with {ALIKE}; other backends put it there"
    if record.counts.truncated:
        yield f"{record.counts.truncated} requests were cut to fit the model here"


def _differs(name: str, there: Any, here: Any) -> Iterator[str]:
    if there is None:
        yield f"{name}: not stated there, {_word(here)} here"
    elif str(there).removesuffix(".0") != str(here).removesuffix(".0"):
        yield f"{name}: {_word(there)} there, {_word(here)} here"


def _shots(record: Record, score: Score) -> int | str | None:
    """Of a task, or of all subtasks of a group."""
    if score.num_fewshot is not None:
        return score.num_fewshot
    known = {shots for shots in (record.settings.get("num_fewshot") or {}).values() if shots is not None}
    return known.pop() if len(known) == 1 else "several" if known else None


def _word(value: Any) -> str:
    return {None: "none", True: "yes", False: "no"}.get(value, str(value)) if not _number(value) else str(value)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
