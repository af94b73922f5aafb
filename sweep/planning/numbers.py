"""A task's YAML -> which numbers it can give, by `metric,filter`, as far as that is known before it runs. Pure.

The rules are those of lm-eval 0.4.13 (`ConfigurableTask` and `Group`); tests hold the lists to it. Code of a task's own
(`class:`, `process_results`, a metric that is a function) may give any number: nothing is called missing there, and the
check at the end of a sweep stays.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweep.errors import nearest

DEFAULT_METRICS: Mapping[str, tuple[str, ...]] = {
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": ("acc", "acc_norm"),
    "generate_until": ("exact_match",),
}
"""By output type, of a task without a `metric_list`."""

REGISTERED_METRICS = frozenset(
    {
        "acc",
        "acc_all",
        "acc_bytes",
        "acc_mutual_info",
        "acc_norm",
        "bits_per_byte",
        "bleu",
        "brier_score",
        "bypass",
        "byte_perplexity",
        "chrf",
        "chrf++",
        "exact_match",
        "f1",
        "likelihood",
        "mcc",
        "perplexity",
        "ter",
        "word_perplexity",
    }
)
"""lm-eval's own, each of which gives one number of its name. What it takes from the hub beside them (`rouge`) may give
several of other names."""

SHOWN = 6
"""Names that a message lists before it counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Each of these metrics by each of these filters; None means any."""

    metrics: tuple[str, ...] | None
    filters: tuple[str, ...] | None

    def may_hold(self, name: str) -> bool:
        """Whether `metric,filter` can be one of them."""
        metric, _, by = name.rpartition(",")
        return (self.metrics is None or metric in self.metrics) and (self.filters is None or by in self.filters)

    def names(self) -> list[str]:
        """All of them, empty where any may be one."""
        return [f"{metric},{by}" for metric in self.metrics or () for by in self.filters or ()]


ANY = Numbers(metrics=None, filters=None)


def of_task(config: Mapping[str, Any], output_type: str | None) -> Numbers:
    """Of a task by what its YAML says, includes and the settings of groups merged."""
    if "class" in config:
        return ANY
    return Numbers(metrics=_metrics(config, output_type), filters=_filters(config.get("filter_list")))


def of_group(aggregated: Any, members: Iterable[Numbers]) -> tuple[Numbers, ...]:
    """Of a group by its `aggregate_metric_list`; a metric that names no filters there has those of the members."""
    filters: tuple[str, ...] | None = ()
    for member in members:
        filters = None if filters is None or member.filters is None else tuple(dict.fromkeys(filters + member.filters))
    entries = [aggregated] if isinstance(aggregated, dict) else aggregated or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "metric" in entry for entry in entries):
        return (ANY,)  # lm-eval will say what is wrong with it
    return tuple(
        Numbers(metrics=(str(entry["metric"]),), filters=_texts(entry.get("filter_list")) or filters)
        for entry in entries
    )


def missing(
    number: str, own: Sequence[Numbers], subtasks: Mapping[str, Numbers], groups: Collection[str]
) -> str | None:
    """Why a task with its `own` numbers and these `subtasks` gives no such `number`; None where it may.

    A number is `metric,filter`, or a metric by the filter `none`; a subtask's name and a slash may stand before it. Of
    `groups`, which may be among the subtasks, nothing is known.
    """
    name = number if "," in number else f"{number},none"
    subtask, slash, rest = name.partition("/")
    if any(one.may_hold(name) for one in own):
        return None
    if slash and subtask in subtasks:
        if subtasks[subtask].may_hold(rest):
            return None
        own, name, before = (subtasks[subtask],), rest, f"{subtask}/"
    elif slash and (subtask in groups or "::" in subtask):
        return None
    elif slash:
        near = nearest(subtask, subtasks) or f"; there is {_listed(list(subtasks))}"
        return f"there is no subtask {subtask!r}{near}"
    else:
        before = ""
    known = list(dict.fromkeys(f"{before}{one}" for numbers in own for one in numbers.names()))
    same = [one for one in known if one.startswith(f"{before}{name.rpartition(',')[0]},")]
    if same:
        near = f"; did you mean {' or '.join(map(repr, same[:SHOWN]))}?"
    elif known:
        near = nearest(f"{before}{name}", known) or f"; there is {_listed(known)}"
    elif filters := list(dict.fromkeys(one for numbers in own for one in numbers.filters or ())):
        near = f"; its filters are {_listed(filters)}"
    else:
        near = f"; it has none of its own, only of subtasks, as in {min(subtasks)}/{number}" if subtasks else ""
    return f"there is no number {before + name!r}{near}"


def _metrics(config: Mapping[str, Any], output_type: str | None) -> tuple[str, ...] | None:
    if config.get("process_results") is not None or output_type is None or output_type not in DEFAULT_METRICS:
        return None
    listed = config.get("metric_list")
    if listed is None:
        return DEFAULT_METRICS[output_type]
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        return None
    if any(entry.get("hf_evaluate") or entry.get("metric") not in REGISTERED_METRICS for entry in listed):
        return None
    return tuple(dict.fromkeys(entry["metric"] for entry in listed))


def _filters(listed: Any) -> tuple[str, ...] | None:
    if listed is None:
        return ("none",)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and "name" in entry for entry in listed):
        return None
    return tuple(dict.fromkeys(str(entry["name"]) for entry in listed))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, [value] if isinstance(value, str) else value or ()))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
