"""What a sweep file expects of its numbers -> which were missed: a regression test on scores. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sweep.errors import nearest
from sweep.planning.config import Expectation, Model, Task
from sweep.record import Record, Score, Status


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One expectation held against the number that the sweep has."""

    cell: str
    """`model/task`."""
    name: str
    """As the sweep file has it: `metric,filter`, with `subtask/` before it for a subtask."""
    expected: Expectation
    value: float | None
    """None where there is no such number."""
    met: bool
    said: str
    """The outcome in a line."""


def check(models: dict[str, Model], tasks: dict[str, Task], records: Iterable[Record]) -> tuple[Checked, ...]:
    """Every expectation about a finished cell; those about others wait until it is done."""
    return tuple(
        _checked(record, name, expectation)
        for record in records
        if record.status is Status.DONE and record.model in models and record.task in tasks
        for name, expectation in expected(models[record.model], tasks[record.task], record.task).items()
    )


def expected(model: Model, task: Task, task_name: str) -> dict[str, Expectation]:
    """What is expected of a cell: what the task says of every model, replaced where the model says it of itself."""
    return {**task.expect, **model.expect.get(task_name, {})}


def _checked(record: Record, name: str, expectation: Expectation) -> Checked:
    cell = f"{record.model}/{record.task}"
    known = dict(reversed(list(_named(record.scores))))
    full = name if "," in name else f"{name},none"
    score = known.get(full)
    wanted = f"{expectation.value:g} ± {expectation.tolerance:g}"
    if score is None:
        own = ", ".join(one for one in known if "/" not in one) or "none at all"
        there = f"there is no such number, only {own}{nearest(full, known)}"
        said = f"{cell}: {name} cannot be checked against {wanted}: {there}"
        return Checked(cell=cell, name=name, expected=expectation, value=None, met=False, said=said)
    away = score.value - expectation.value
    # 0.70 is within 0.68 ± 0.02, whatever binary fractions make of it.
    met = abs(away) <= expectation.tolerance + 1e-12
    said = f"{cell}: {name} is {score.value:.4f}, {'as' if met else 'not'} expected: {wanted}"
    if not met:
        noise = "" if score.stderr is None else f"; its standard error is {score.stderr:.4f}"
        said += f" ({away:+.4f}{noise})"
    return Checked(cell=cell, name=name, expected=expectation, value=score.value, met=met, said=said)


def _named(scores: Iterable[Score]) -> Iterator[tuple[str, Score]]:
    """Each number under the names that a sweep file may give it; of two that share one the first has it."""
    for score in scores:
        own = f"{score.metric},{score.filter}"
        if score.depth == 0:
            yield own, score
        yield f"{score.task}/{own}", score
