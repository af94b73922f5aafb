"""The `report` command, and the end of every sweep: what a run directory says, from its files alone.

It works beside a driver, after one died, and on a run directory that was copied from elsewhere. The page comes after
the tables and costs them nothing when it cannot be made.
"""

from collections.abc import Sequence
from dataclasses import replace

from sweep.errors import ConfigError, StoreError, boundary, nearest
from sweep.record import Record, Status
from sweep.results.compare import Findings, examine, examine_sweeps
from sweep.results.page import page
from sweep.results.reading import Sweep
from sweep.results.references import Published, published
from sweep.results.report import counted, markdown
from sweep.results.store import write_file
from sweep.results.summary import compared, headline


def write_page(sweep: Sweep, *, samples: bool = True, findings: Findings | None = None) -> Findings:
    """report.html, and report.md with the comparisons; what was compared, which is `findings` where it was before.
    Without `samples` no prompt or answer is in the page. What cannot be read costs its part and is said there. Raises
    StoreError where nothing can be written.
    """
    findings = examined(sweep) if findings is None else findings
    references: tuple[Published, ...] = ()
    troubles = []
    try:
        references = published(sweep)
    except ConfigError as error:
        troubles.append(f"published scores: {error}")
    if unreadable := sweep.timeline.unreadable:
        troubles.append(
            f"timeline.jsonl: {counted(unreadable, 'line')} cannot be read, so times and GPU-hours may lack some"
        )
    html = page(sweep, findings.comparisons, references, left_out=findings.left_out, troubles=troubles, samples=samples)
    lines = "".join(f"- {name}: {text}\n" for name, text in headline(sweep, findings.comparisons).items())
    table = markdown(sweep.records, sweep.models)
    with boundary(StoreError, f"write the page to {sweep.directory.root}"):
        write_file(sweep.directory.page, html)
        write_file(sweep.directory.report, f"{lines}\n{table}\n**Paired comparisons**\n\n{compared(findings)}")
    return findings


def examined(sweep: Sweep) -> Findings:
    """What was compared; cells whose samples cannot be read are left out and named."""
    try:
        return examine(sweep)
    except StoreError:
        unread = [(record, _unread(sweep, record)) for record in sweep.records]
    findings = examine(replace(sweep, records=tuple(record for record, why in unread if why is None)))
    said = (f"{record.task}: {record.model}: {why}" for record, why in unread if why is not None)
    return replace(findings, left_out=(*said, *findings.left_out))


def _unread(sweep: Sweep, record: Record) -> str | None:
    """Why the samples of a finished cell cannot be read."""
    try:
        for _ in sweep.outcomes(record) if record.status is Status.DONE else ():
            pass
    except StoreError as error:
        return str(error)
    return None


def between(a: Sweep, b: Sweep, *, pairs: Sequence[tuple[str, str]] = ()) -> str:
    """The same tasks in two sweeps, as Markdown: checkpoints, versions of vLLM. `pairs` are a model of `a` and one of
    `b` each, and nothing else is compared; without them models of one name are, or the only model of `a` with that of
    `b`. Raises StoreError, and ConfigError for a model that is not there.
    """
    _require_models(a, b, pairs)
    alone = not pairs and len(a.models) == len(b.models) == 1 and a.models != b.models
    by_name = [(model, model) for model in a.models if model in b.models]
    chosen = list(dict.fromkeys(pairs)) or ([(a.models[0], b.models[0])] if alone else by_name)
    findings = examine_sweeps(a, b, pairs=chosen)
    verdicts = [one.verdict for one in findings.comparisons]
    by_verdict = [(verdicts.count(v), v) for v in ("better", "worse", "differs", "no difference shown")]
    named = ", ".join(f"{of_a} of a with {of_b} of b" for of_a, of_b in chosen)
    lines = [
        f"- a: {_made_of(a)}",
        f"- b: {_made_of(b)}",
        *([f"- compared: {named}, as each sweep has just one model"] if alone else []),
        *([f"- compared: {named}"] if pairs else []),
        *([] if chosen else ["- no model has one name in both: `pair=MODEL:MODEL` says which belong together"]),
        *_only(a, b, chosen, all_models=not pairs),
        *_only(b, a, [(of_b, of_a) for of_a, of_b in chosen], all_models=not pairs),
        f"- {len(verdicts)} numbers compared: {', '.join(f'{n} {what}' for n, what in by_verdict if n) or 'none'}",
    ]
    return "\n".join([*lines, "", compared(findings, most=None)])


def _require_models(a: Sweep, b: Sweep, pairs: Sequence[tuple[str, str]]) -> None:
    for pair in pairs:
        for sweep, model in zip((a, b), pair, strict=True):
            if model not in sweep.models:
                near = nearest(model, sweep.models) or f"; it has {', '.join(sweep.models)}"
                raise ConfigError(f"pair={':'.join(pair)}: {sweep.directory.root} has no model {model!r}{near}")


def _only(sweep: Sweep, other: Sweep, pairs: Sequence[tuple[str, str]], *, all_models: bool) -> list[str]:
    """What `sweep` has done and `other` has not; the models of `pairs` are those of `sweep` and `other`."""
    theirs = _done(other)
    done = {cell for cell in _done(sweep) if all_models or cell[0] in [ours for ours, _ in pairs]}
    both = {(ours, task) for ours, of_other in pairs for _, task in done if (of_other, task) in theirs}
    cells = sorted(f"{model}/{task}" for model, task in done - both)
    more = " …" if len(cells) > 3 else ""
    where = sweep.directory.root
    return [f"- {counted(len(cells), 'cell')} done in {where} only: {', '.join(cells[:3])}{more}"] if cells else []


def _done(sweep: Sweep) -> set[tuple[str, str]]:
    return {(record.model, record.task) for record in sweep.records if record.status is Status.DONE}


def _made_of(sweep: Sweep) -> str:
    """`runs/a, 21 cells, lm_eval 0.4.13, vllm 0.32.0`."""
    versions: dict[str, set[str]] = {}
    for record in sweep.records:
        for name in ("lm_eval", "vllm", "transformers"):
            if version := record.versions.get(name):
                versions.setdefault(name, set()).add(version)
    parts = [f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())]
    return ", ".join([str(sweep.directory.root), counted(len(_done(sweep)), "cell"), *parts])
